//! Reads of files, many at once, by one thread: io_uring(7).

use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

/// Reads under way, each into a buffer of the ring's own.
pub struct Ring {
    ring: IoUring,
    /// Of a slot that is busy the kernel may write to the buffer at any time.
    buffers: Vec<Box<[u8]>>,
    busy: Vec<bool>,
}

/// A read that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Where it was.
    pub slot: usize,
    /// How many bytes came, 0 at the end of the file; or what read(2) would have said.
    pub result: Result<usize, Errno>,
}

impl Ring {
    /// A ring for so many reads at once, of so many bytes at most.
    ///
    /// # Errors
    /// What io_uring_setup(2) said: EPERM where kernel.io_uring_disabled or a seccomp filter forbids it, ENOSYS where the kernel has
    /// none; ENOMEM, EMFILE.
    pub fn new(slots: usize, bytes: usize) -> Result<Self, Errno> {
        let entries = slots.max(1).next_power_of_two() as u32;
        let ring =
            IoUring::new(entries).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let buffers = (0..slots).map(|_| vec![0; bytes].into_boxed_slice()).collect();
        Ok(Self { ring, buffers, busy: vec![false; slots] })
    }

    /// A slot in which no read is under way.
    pub fn free(&self) -> Option<usize> {
        self.busy.iter().position(|busy| !busy)
    }

    /// Whether any read is under way.
    pub fn is_busy(&self) -> bool {
        self.busy.contains(&true)
    }

    /// Begins to read, with the next [`wait`](Self::wait) or [`submit`](Self::submit).
    ///
    /// # Panics
    /// If the slot is busy, or the buffer too small: the caller's arithmetic is wrong.
    pub fn read(&mut self, slot: usize, file: BorrowedFd<'_>, offset: u64, length: usize) {
        assert!(!std::mem::replace(&mut self.busy[slot], true), "slot {slot} is busy");
        let into = &mut self.buffers[slot][..length];
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), into.as_mut_ptr(), length as u32)
            .offset(offset)
            .build()
            .user_data(slot as u64);
        // SAFETY: the buffer is this ring's, is not touched while the slot is busy, and lives until the kernel is done with it:
        // `drop` waits for that.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many entries as slots, and each slot has one at most.
        pushed.expect("an entry for each slot");
    }

    /// Hands the kernel what was begun.
    ///
    /// # Errors
    /// What io_uring_enter(2) said.
    pub fn submit(&mut self) -> Result<(), Errno> {
        self.enter(0)
    }

    /// Hands the kernel what was begun, waits for the end of a read, and returns that; `None` if none is under way.
    ///
    /// # Errors
    /// What io_uring_enter(2) said.
    pub fn wait(&mut self) -> Result<Option<Done>, Errno> {
        while self.is_busy() {
            // The device shall have what was begun while the caller sees to what has ended.
            if !self.ring.submission().is_empty() && !self.ring.completion().is_empty() {
                self.enter(0)?;
            }
            if let Some(done) = self.finished() {
                return Ok(Some(done));
            }
            self.enter(1)?;
        }
        Ok(None)
    }

    /// A read that has ended, without waiting.
    pub fn finished(&mut self) -> Option<Done> {
        let entry = self.ring.completion().next()?;
        let slot = entry.user_data() as usize;
        self.busy[slot] = false;
        let result = usize::try_from(entry.result()).map_err(|_| Errno::from_raw_os_error(-entry.result()));
        Some(Done { slot, result })
    }

    /// What a read that has ended brought.
    ///
    /// # Panics
    /// If the slot is busy, or the buffer shorter than that.
    pub fn bytes(&self, slot: usize, length: usize) -> &[u8] {
        assert!(!self.busy[slot], "slot {slot} is busy");
        &self.buffers[slot][..length]
    }

    fn enter(&self, want: usize) -> Result<(), Errno> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) => match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
                    Errno::INTR => {}
                    errno => return Err(errno),
                },
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        loop {
            match self.wait() {
                Ok(Some(_)) => {}
                Ok(None) => return,
                // The kernel may still write to them.
                Err(_) => return std::mem::forget(std::mem::take(&mut self.buffers)),
            }
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("slots", &self.busy.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    /// A ring and a file of so many pages that hold their number; `None` where io_uring is not to be had, which is printed.
    fn ring_and_file(slots: usize, pages: u8) -> Option<(Ring, std::fs::File)> {
        let ring = match Ring::new(slots, 4096) {
            Ok(ring) => ring,
            Err(errno) => {
                eprintln!("skipped: io_uring: {errno}");
                return None;
            }
        };
        let file = crate::sys::memfd::create("ring", 0).unwrap();
        let mut file = std::fs::File::from(file);
        file.write_all(&(0..pages).flat_map(|number| [number; 4096]).collect::<Vec<u8>>()).unwrap();
        Some((ring, file))
    }

    #[test]
    fn every_read_brings_its_own_bytes_whatever_the_order_in_which_they_end() {
        let Some((mut ring, file)) = ring_and_file(5, 40) else { return };
        let (mut next, mut came) = (0, [false; 40]);
        let mut pages = [0; 5];
        loop {
            while let Some(slot) = ring.free().filter(|_| next < 40) {
                ring.read(slot, file.as_fd(), next as u64 * 4096, 4096);
                pages[slot] = next;
                next += 1;
            }
            let Some(done) = ring.wait().unwrap() else { break };
            assert_eq!(done.result, Ok(4096));
            assert!(ring.bytes(done.slot, 4096).iter().all(|byte| usize::from(*byte) == pages[done.slot]));
            assert!(!std::mem::replace(&mut came[pages[done.slot]], true));
        }
        assert!(came.iter().all(|came| *came) && !ring.is_busy());
    }

    #[test]
    fn what_cannot_be_read_is_said_of_that_read_alone() {
        let Some((mut ring, file)) = ring_and_file(3, 2) else { return };
        let directory = std::fs::File::open("/").unwrap();
        ring.read(0, file.as_fd(), 2 * 4096, 4096);
        ring.read(1, directory.as_fd(), 0, 4096);
        ring.read(2, file.as_fd(), 4096 + 100, 4096);
        let mut results = [None; 3];
        while let Some(done) = ring.wait().unwrap() {
            results[done.slot] = Some(done.result);
        }
        assert_eq!(results, [Some(Ok(0)), Some(Err(Errno::ISDIR)), Some(Ok(3996))]);
    }

    #[test]
    fn what_was_begun_is_under_way_while_what_has_ended_is_seen_to() {
        let Some((mut ring, file)) = ring_and_file(3, 2) else { return };
        ring.read(0, file.as_fd(), 0, 4096);
        ring.read(1, file.as_fd(), 4096, 4096);
        ring.enter(2).unwrap();
        ring.read(2, file.as_fd(), 0, 4096);
        assert!(ring.wait().unwrap().is_some());
        assert!(ring.ring.submission().is_empty());
    }

    #[test]
    fn a_ring_that_goes_waits_for_what_is_under_way() {
        let Some((mut ring, file)) = ring_and_file(2, 2) else { return };
        let (out, into) = rustix::pipe::pipe().unwrap();
        ring.read(0, out.as_fd(), 0, 8);
        ring.read(1, file.as_fd(), 0, 4096);
        ring.submit().unwrap();
        let dropped = std::thread::spawn(move || drop(ring));
        rustix::io::write(&into, b"8 bytes!").unwrap();
        dropped.join().unwrap();
    }

    #[test]
    #[should_panic(expected = "slot 0 is busy")]
    fn a_slot_is_not_used_twice_at_once() {
        let Some((mut ring, file)) = ring_and_file(1, 1) else {
            panic!("slot 0 is busy, had there been a ring")
        };
        ring.read(0, file.as_fd(), 0, 4096);
        ring.read(0, file.as_fd(), 0, 4096);
    }
}

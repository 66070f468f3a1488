//! The thread that reads what faults wait for by io_uring (`latepage-ring`): many reads at once, of many VMs.
//!
//! For sources that say where their bytes lie. Two VMs that wait for the same bytes share one read. What does not go smoothly here
//! (a short read, an error) is handed to the readers, who ask the source and hear from it what is the matter.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::session::{Scratch, Session, Wanted};
use crate::source::Source;
use crate::sys::ring::Ring;

/// Reads under way at once.
const SLOTS: usize = 64;
/// Where the bell is read.
const BELL: usize = SLOTS;
/// The most that is read at once: what comes with a page that has to be waited for. More is the readers' affair.
const MOST: usize = 64 << 10;

/// What a thread that cannot do it is asked to do instead.
pub(super) type Otherwise = Box<dyn Fn(Arc<Session>, u32) + Send>;
/// Who is told why it cannot any more.
pub(super) type Tell = Box<dyn Fn(Errno) + Send>;

/// The side of the thread that others see.
pub(super) struct ColdReads {
    state: Mutex<State>,
    bell: OwnedFd,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(Arc<Session>, u32)>,
    /// Nothing is taken any more: the readers do it.
    over: bool,
}

impl ColdReads {
    /// Starts the thread.
    ///
    /// # Errors
    /// Why there is no ring, or no thread: then the readers do all.
    pub(super) fn start(otherwise: Otherwise, tell: Tell) -> Result<(Arc<Self>, JoinHandle<()>), Errno> {
        let ring = Ring::new(SLOTS + 1, MOST)?;
        // Blocking: a read of it waits in the ring until it rings.
        let bell = eventfd(0, EventfdFlags::CLOEXEC)?;
        let reads = Arc::new(Self { state: Mutex::default(), bell });
        let thread = Thread { shared: Arc::clone(&reads), ring, under_way: Vec::new(), otherwise, tell };
        let builder = std::thread::Builder::new().name("latepage-ring".to_owned());
        let handle = builder
            .spawn(move || thread.run())
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
        Ok((reads, handle))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a page read that is in flight. Whether that will be done: if not, the readers do it.
    pub(super) fn submit(&self, session: &Arc<Session>, page: u32) -> bool {
        let mut state = self.state();
        if state.over {
            return false;
        }
        state.jobs.push_back((Arc::clone(session), page));
        drop(state);
        self.ring();
        true
    }

    /// Whether it takes nothing any more.
    pub(super) fn is_over(&self) -> bool {
        self.state().over
    }

    /// Ends the thread. What was not done is dropped.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.over = true;
        let undone = std::mem::take(&mut state.jobs);
        drop(state);
        drop(undone);
        self.ring();
    }

    fn ring(&self) {
        // It would have to ring 2^64 times to fail.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

/// A read, and who waits for it.
struct UnderWay {
    slot: usize,
    wanted: Wanted,
    source: Arc<dyn Source>,
    waiting: Vec<(Arc<Session>, u32)>,
}

/// Fields drop in their order: the sources, and so their files, after the ring, which may still hand the kernel reads of them.
struct Thread {
    shared: Arc<ColdReads>,
    ring: Ring,
    under_way: Vec<UnderWay>,
    otherwise: Otherwise,
    tell: Tell,
}

impl Thread {
    fn run(mut self) {
        let mut scratch = Scratch::new();
        self.ring.read(BELL, self.shared.bell.as_fd(), 0, 8);
        loop {
            if !self.begin() {
                return;
            }
            let done = match self.ring.wait() {
                Ok(Some(done)) => done,
                // The bell is always under way.
                Ok(None) => return self.give_up(Errno::INVAL),
                Err(errno) => return self.give_up(errno),
            };
            if done.slot == BELL {
                self.ring.read(BELL, self.shared.bell.as_fd(), 0, 8);
                continue;
            }
            let Some(at) = self.under_way.iter().position(|read| read.slot == done.slot) else { continue };
            let read = self.under_way.swap_remove(at);
            let length = read.wanted.length;
            // After the read: what was read before a writer was let in is the snapshot's.
            if done.result == Ok(length) && read.source.vouch().is_ok() {
                for (session, page) in read.waiting {
                    session.finish_with_bytes(page, self.ring.bytes(done.slot, length), &mut scratch);
                }
                read.source.missed(read.wanted.offset);
            } else {
                read.waiting.into_iter().for_each(|(session, page)| (self.otherwise)(session, page));
            }
        }
    }

    /// Begins what waits, as far as there is room. Whether the thread goes on.
    fn begin(&mut self) -> bool {
        while let Some(slot) = self.ring.free() {
            let job = {
                let mut state = self.shared.state();
                if state.over {
                    return false;
                }
                state.jobs.pop_front()
            };
            let Some((session, page)) = job else { break };
            if session.end().is_some() {
                // A VM that has gone meanwhile waits for nothing.
                continue;
            }
            self.begin_one(slot, session, page);
        }
        true
    }

    fn begin_one(&mut self, slot: usize, session: Arc<Session>, page: u32) {
        let (source, wanted) = (session.shared_source(), session.wanted(page));
        let length = wanted.length.min(MOST);
        let extent =
            if wanted.unit <= MOST { source.extent(wanted.offset, length, wanted.unit) } else { None };
        let Some(extent) = extent else { return (self.otherwise)(session, page) };
        let wanted = Wanted { length: extent.length, ..wanted };
        let same = |read: &&mut UnderWay| read.wanted == wanted && Arc::ptr_eq(&read.source, &source);
        if let Some(read) = self.under_way.iter_mut().find(same) {
            session.stats().counters.shared_reads.add(1);
            return read.waiting.push((session, page));
        }
        self.ring.read(slot, extent.file, extent.offset, extent.length);
        session.stats().counters.ring_reads.add(1);
        self.under_way.push(UnderWay {
            slot,
            wanted,
            source: Arc::clone(&source),
            waiting: vec![(session, page)],
        });
    }

    /// The ring is of no more use: the readers do what is left, and what comes.
    fn give_up(mut self, why: Errno) {
        let left = {
            let mut state = self.shared.state();
            state.over = true;
            std::mem::take(&mut state.jobs)
        };
        let otherwise = &self.otherwise;
        let waiting = self.under_way.iter_mut().flat_map(|read| read.waiting.drain(..));
        waiting.chain(left).for_each(|(session, page)| otherwise(session, page));
        (self.tell)(why);
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // The ring waits for what is under way in it, and the bell is.
        self.shared.ring();
    }
}

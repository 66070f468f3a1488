//! What a process says before it dies of a page that cannot be had: one line to standard error, from the handler of the signal.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Says why the access to `address` in this process fails. Only the first of all threads does, and only where nobody would have to be
/// waited for: a pipe that is full must not keep the process from dying. It allocates nothing, unless `why` does.
pub(crate) fn say(address: u64, why: impl fmt::Display) {
    static SAID: AtomicBool = AtomicBool::new(false);
    let stderr = std::io::stderr();
    let mut polled = [PollFd::new(&stderr, PollFlags::OUT)];
    let ready = rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    if ready == Ok(1) && !SAID.swap(true, Ordering::Relaxed) {
        let _ = rustix::io::write(&stderr, Line::new(address, why).bytes());
    }
}

/// A line of a length that any pipe takes at once.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Line {
    fn new(address: u64, why: impl fmt::Display) -> Self {
        let mut line = Self { bytes: [0; 512], length: 0 };
        // It fails where there is no more room: then the rest is left out.
        let _ = write!(line, "latepage.kvm: the memory at host address {address:#x} could not be had: {why}");
        line.bytes[line.length] = b'\n';
        line.length += 1;
        line
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // The last byte is for the end of the line.
        let room = &mut self.bytes[self.length..511];
        let fits = text.len().min(room.len());
        room[..fits].copy_from_slice(&text.as_bytes()[..fits]);
        self.length += fits;
        if fits < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_address_and_the_reason_and_is_cut_where_it_is_long() {
        let line = Line::new(0x7f00_1000, "its pager cannot supply it");
        let said = b"latepage.kvm: the memory at host address 0x7f001000 could not be had: its pager cannot supply it\n";
        assert_eq!(line.bytes(), said);
        let long = Line::new(0x7f00_1000, "lost ".repeat(200));
        assert_eq!(
            (long.bytes().len(), long.bytes().iter().position(|byte| *byte == b'\n')),
            (512, Some(511))
        );
    }
}

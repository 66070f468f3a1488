//! A tiny VMM for tests: guest memory of every backing with a real userfaultfd, threads that touch it, a snapshot that can be
//! cold or broken, a pager whose events are waited for, and processes of their own for what only another process's end shows.
//!
//! Nothing here sleeps. [`BOUND`] only keeps a hang from being silent: it fails the test.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses a part of it")]

pub mod child;
pub mod guest;
pub mod serving;
pub mod snapshot;
pub mod trap;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use latepage::sys::fdpass;
use latepage::sys::uffd::Userfaultfd;
use rustix::event::{PollFd, PollFlags, Timespec};

/// How long a test waits for what must come.
pub const BOUND: Duration = Duration::from_secs(60);
/// Bytes of a small page.
pub const PAGE: usize = 4096;
/// Bytes of a huge page.
pub const HUGE: usize = 2 << 20;

/// Whether this machine can run tests of userfaultfd; prints why not.
pub fn available() -> bool {
    match Userfaultfd::offered() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: {error}");
            false
        }
    }
}

/// Returns from a test, with a printed reason, where there is no userfaultfd.
#[macro_export]
macro_rules! need_userfaultfd {
    () => {
        if !$crate::vmm::available() {
            return;
        }
    };
}

/// A thread whose result is waited for with a bound.
pub struct Running<T> {
    result: Receiver<T>,
    thread: Option<JoinHandle<()>>,
}

/// Runs `work` on a thread of its own.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Running<T> {
    let (send, result) = sync_channel(1);
    let thread = std::thread::spawn(move || {
        // Nobody waits any more where the test has failed.
        let _ = send.send(work());
    });
    Running { result, thread: Some(thread) }
}

impl<T> Running<T> {
    /// Its result.
    pub fn join(mut self) -> T {
        let result =
            self.result.recv_timeout(BOUND).expect("the thread came to no end: it hangs, or has panicked");
        let _ = self.thread.take().expect("joined once").join();
        result
    }

    /// Whether it has not come to its end.
    pub fn still_runs(&self) -> bool {
        !self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }
}

/// Opens once.
#[derive(Default)]
pub struct Latch {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Latch {
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    pub fn wait(&self) {
        let open = self.open.lock().unwrap();
        let (open, _) = self.changed.wait_timeout_while(open, BOUND, |open| !*open).unwrap();
        assert!(*open, "the latch was never opened");
    }
}

/// The one descriptor that comes by a socket.
pub fn received(socket: &UnixStream) -> OwnedFd {
    let mut polled = [PollFd::new(socket, PollFlags::IN)];
    let bound = Timespec { tv_sec: BOUND.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut polled, Some(&bound)), Ok(1), "no descriptor came");
    let mut received = fdpass::receive(socket, &mut [0; 64]).unwrap();
    received.descriptors.pop().expect("a descriptor")
}

/// Waits, yielding, for what another thread must bring about soon.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !holds() {
        assert!(begun.elapsed() < BOUND, "never came: {what}");
        std::thread::yield_now();
    }
}

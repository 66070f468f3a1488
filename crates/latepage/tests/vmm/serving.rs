//! A pager in this process, and what it tells.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use latepage::pager::{Config, Pager, What};
use latepage::session::{FaultAround, OnMissing, Policy, Population, Session};
use latepage::source::Source;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::BOUND;

/// A directory that is removed when dropped.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("latepage-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A pager, its socket, and what it has told so far.
pub struct Serving {
    pub pager: Pager,
    pub socket: PathBuf,
    pub directory: Directory,
    /// Every event that has been looked at, whether or not it was the one waited for.
    pub seen: Vec<What>,
    /// Events from here on have not been looked at by [`Serving::wait`].
    next: usize,
}

impl Serving {
    pub fn new(source: Arc<dyn Source>, policy: Policy) -> Self {
        Self::with(Config { workers: Some(1), ..Config::default() }, source, policy)
    }

    pub fn with(config: Config, source: Arc<dyn Source>, policy: Policy) -> Self {
        let directory = Directory::new();
        let socket = directory.file("s");
        let pager = Pager::start(config).unwrap();
        pager.listen(&socket, source, policy).unwrap();
        Self { pager, socket, directory, seen: Vec::new(), next: 0 }
    }

    /// Listens at another path too.
    pub fn also(&self, name: &str, source: Arc<dyn Source>, policy: Policy) -> PathBuf {
        let socket = self.directory.file(name);
        self.pager.listen(&socket, source, policy).unwrap();
        socket
    }

    /// Waits for the next event that `wanted` says yes to, and passes by others.
    pub fn wait(&mut self, what: &str, mut wanted: impl FnMut(&What) -> bool) -> What {
        let deadline = Instant::now() + BOUND;
        loop {
            while self.next < self.seen.len() {
                self.next += 1;
                if wanted(&self.seen[self.next - 1]) {
                    return self.seen[self.next - 1].clone();
                }
            }
            self.look(deadline, what);
        }
    }

    /// Waits for an event that `wanted` says yes to, among those that were passed by too.
    pub fn ever(&mut self, what: &str, mut wanted: impl FnMut(&What) -> bool) -> What {
        let deadline = Instant::now() + BOUND;
        loop {
            if let Some(event) = self.seen.iter().find(|event| wanted(event)) {
                return event.clone();
            }
            self.look(deadline, what);
        }
    }

    fn look(&mut self, deadline: Instant, what: &str) {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let ready = {
            let descriptor = self.pager.descriptor();
            let mut polled = [PollFd::new(&descriptor, PollFlags::IN)];
            rustix::event::poll(&mut polled, Some(&timeout)).unwrap_or(1)
        };
        assert!(ready > 0, "no event: {what}; these came: {:#?}", self.seen);
        self.seen.extend(self.pager.events().take(64).into_iter().map(|event| event.what));
    }

    /// Everything told so far, without waiting.
    pub fn so_far(&mut self) -> &[What] {
        loop {
            let more = self.pager.events().take(64);
            if more.is_empty() {
                return &self.seen;
            }
            self.seen.extend(more.into_iter().map(|event| event.what));
        }
    }

    /// The session of the VM of this name, once it has begun.
    pub fn session(&mut self, name: &str) -> Arc<Session> {
        self.ever("session-started", |what| matches!(what, What::SessionStarted { vm, .. } if vm == name));
        self.pager.sessions().into_iter().find(|session| session.name() == name).expect("it has just begun")
    }

    pub fn refused(&mut self) -> (String, String) {
        match self.wait("refused", |what| matches!(what, What::Refused { .. })) {
            What::Refused { reason, action, .. } => (reason, action),
            _ => unreachable!(),
        }
    }

    pub fn ended(&mut self, name: &str) -> &'static str {
        match self.ever("ended", |what| matches!(what, What::Ended { vm, .. } if vm == name)) {
            What::Ended { reason, .. } => reason,
            _ => unreachable!(),
        }
    }

    /// Leaves the pager to the end of the process: for tests whose guests, in this very process, still wait for pages that
    /// nobody will bring.
    pub fn abandon(self) {
        // The directory goes; the pager's threads and descriptors stay.
        std::mem::forget(self.pager);
    }
}

/// A policy for guests in this process: they cannot be killed.
pub fn policy() -> Policy {
    // A fixed window: which pages come with a touch does not hang on the touches before it.
    let fault_around = FaultAround::Window(64 << 10);
    Policy { on_missing: OnMissing::Poison, fault_around, ..Policy::default() }
}

pub fn populating() -> Policy {
    Policy { population: Population::Background, ..policy() }
}

pub fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

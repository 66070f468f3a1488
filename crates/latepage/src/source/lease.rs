//! Keeping a memory file as it was opened, as far as the kernel lets us: by a read lease, or else by looking.
//!
//! ```text
//!             a writer comes               every VM is full, or the time is over
//!   held ─────────────────────▶ breaking ────────────────────────────────────────▶ let go ──▶ (changed: for good)
//!    ▲ ▲                           │                                                  │
//!    │ └─ the writer went away ────┘                                                  │
//!    └────────────────────── the writer is gone, and nothing was changed ─────────────┘
//! ```
//!
//! A thread of its own waits for the kernel's word (a lease is broken by a signal to one thread); it is there only where a
//! lease was granted. Once in a while it looks by itself, and each time that it finds the lease whole, what is read is
//! trusted for as long as the kernel would hold a writer back from that moment on, less a margin. Readers compare one
//! atomic number with the clock. So they never trust a page for too long, even if that thread, or the whole process, is
//! stopped for a minute; and then they do not fail either, but look for themselves.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::sys::lease::{self, Breaks};

use super::opened::Opened;
use super::{NoLease, SourceError, SourceNotice};

/// Without a lease there is no moment from which on reads are not trusted.
const NEVER: u64 = u64::MAX;
/// Reads fail. Every other moment that is over means: look first.
const CLOSED: u64 = 0;
/// The lease is being renewed.
const RENEWING: u64 = 1;

/// What the kernel gives a holder where its setting cannot be read, in seconds (`fs/locks.c`, `lease_break_time`).
const DEFAULT_BREAK_TIME: u64 = 45;

/// How often we look whether a writer that waits has gone away.
const WHILE_BREAKING: Duration = Duration::from_millis(100);
/// How often we look whether the lease is whole, at least, and whether a writer that was let in is gone.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Whether what was read is to be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Readable {
    Yes,
    /// Not known without a look at the lease, which takes a lock.
    Later,
    No,
}

/// Watches over one file for as long as it lives.
#[derive(Debug)]
pub(super) struct Guard {
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
}

/// Tells whether a file is as it was opened, for as long as it is watched.
#[derive(Debug, Clone)]
pub(super) struct Trust {
    watch: Arc<Watch>,
}

impl Trust {
    /// Whether nobody can have changed the file by now: a lease is held. Takes no lock.
    pub(super) fn is_leased(&self) -> bool {
        self.watch.is_leased()
    }
}

#[derive(Debug)]
struct Watch {
    file: Arc<Opened>,
    /// Nanoseconds of the [clock](Watch::now) up to which reads are trusted; or NEVER, RENEWING, CLOSED.
    trusted_until: AtomicU64,
    /// From a look that found the lease whole, how long reads are trusted.
    allowance: Duration,
    ward: Mutex<Ward>,
}

/// What changes rarely, and never on the path of a fault.
#[derive(Debug)]
struct Ward {
    standing: Standing,
    /// No VM lacks anything.
    filled: bool,
    /// The file is no longer what was opened, and how.
    changed: Option<&'static str>,
    ended: bool,
    notices: Vec<SourceNotice>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// No lease was granted.
    Without,
    Held,
    Breaking,
    LetGo,
}

impl Guard {
    /// Takes a lease if it can, and begins to watch.
    pub(super) fn new(file: Arc<Opened>) -> Self {
        Self::with_allowance(file, allowance())
    }

    /// The same, trusting a lease for that long instead of nearly as long as the kernel does.
    pub(super) fn with_allowance(file: Arc<Opened>, allowance: Duration) -> Self {
        let watch = Arc::new(Watch {
            file,
            trusted_until: AtomicU64::new(NEVER),
            allowance,
            ward: Mutex::new(Ward {
                standing: Standing::Without,
                filled: true,
                changed: None,
                ended: false,
                notices: Vec::new(),
            }),
        });
        let granted = start(&watch);
        let mut guard = Self { watch, thread: None };
        match granted {
            Ok(thread) => guard.thread = Some(thread),
            Err(why) => {
                guard.watch.ward().notices.push(SourceNotice::NoLease { path: guard.watch.path(), why });
            }
        }
        guard
    }

    /// Whether what has been read by now is the snapshot's. Takes no lock.
    pub(super) fn readable(&self) -> Readable {
        self.watch.readable()
    }

    /// Whether a lease is held, so that nobody can have changed the file, or truncated it, by now. Takes no lock.
    pub(super) fn is_leased(&self) -> bool {
        self.watch.is_leased()
    }

    /// The same as [`readable`](Self::readable), looking at the lease if need be.
    pub(super) fn wait_readable(&self) -> Readable {
        match self.watch.readable() {
            Readable::Later => {
                let mut ward = self.watch.ward();
                self.watch.look(&mut ward);
                // What was read before this look is right if the lease is whole now: no writer comes in without a change
                // of `standing`, or unseen while it is renewed.
                match self.watch.readable() {
                    Readable::Yes => Readable::Yes,
                    Readable::Later | Readable::No => Readable::No,
                }
            }
            known => known,
        }
    }

    /// For whoever looks at the file beside us.
    pub(super) fn trust(&self) -> Trust {
        Trust { watch: Arc::clone(&self.watch) }
    }

    /// Whether VMs may lack memory.
    pub(super) fn is_needed(&self) -> bool {
        !self.watch.ward().filled
    }

    pub(super) fn has_lease(&self) -> bool {
        matches!(self.watch.ward().standing, Standing::Held | Standing::Breaking)
    }

    /// Whether a further VM may be served.
    pub(super) fn admit(&self) -> Result<(), SourceError> {
        let mut ward = self.watch.ward();
        let path = || self.watch.path();
        self.watch.look(&mut ward);
        if let Some(how) = ward.changed {
            return Err(SourceError::Changed { path: path(), how });
        }
        match ward.standing {
            // What breaks the lease now would have us fail this VM in the middle.
            Standing::Breaking | Standing::LetGo => Err(SourceError::OpenedForWriting { path: path() }),
            Standing::Without | Standing::Held => {
                ward.filled = false;
                Ok(())
            }
        }
    }

    /// No VM lacks anything: a writer may go on.
    pub(super) fn filled(&self) {
        let before = std::mem::replace(&mut self.watch.ward().filled, true);
        if !before {
            self.wake();
        }
    }

    pub(super) fn check(&self) -> Vec<SourceNotice> {
        let mut ward = self.watch.ward();
        self.watch.look(&mut ward);
        std::mem::take(&mut ward.notices)
    }
}

impl Guard {
    /// Has the thread look at the ward.
    fn wake(&self) {
        self.thread.iter().for_each(lease::wake);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.watch.ward().ended = true;
        self.wake();
        if let Some(thread) = self.thread.take() {
            // It ends as soon as it is woken; had it panicked, there is nobody to tell.
            let _ = thread.join();
        }
    }
}

impl Watch {
    fn ward(&self) -> MutexGuard<'_, Ward> {
        // Each change of a ward is a single assignment: a panic in between leaves none half done.
        self.ward.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel's coarse clock, in ns: some milliseconds behind, as are the timers by which it lets a writer in, and far less than the
    /// margin of an allowance. It is looked at twice a fault, and the exact one takes five times as long.
    fn now(&self) -> u64 {
        let now = clock_gettime(ClockId::MonotonicCoarse);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }

    fn readable(&self) -> Readable {
        match self.trusted_until.load(Ordering::SeqCst) {
            NEVER => Readable::Yes,
            CLOSED => Readable::No,
            until if self.now() < until => Readable::Yes,
            _ => Readable::Later,
        }
    }

    fn is_leased(&self) -> bool {
        self.trusted_until.load(Ordering::SeqCst) != NEVER && self.readable() == Readable::Yes
    }

    fn path(&self) -> PathBuf {
        self.file.path.clone()
    }

    /// Looks at the lease, or without one at the file.
    fn look(&self, ward: &mut Ward) {
        // Before the look: the kernel's time for a writer that comes right after it begins later than this.
        let now = self.now();
        match ward.standing {
            Standing::Without if ward.changed.is_none() => {
                if let Some(how) = self.file.difference() {
                    ward.changed = Some(how);
                    ward.notices.push(SourceNotice::Changed { path: self.path(), how });
                }
            }
            Standing::Held if lease::stands(self.file.fd.as_fd()).unwrap_or(false) => {
                self.hold(ward, now);
            }
            Standing::Held => {
                ward.standing = Standing::Breaking;
                if !ward.filled {
                    let until = self.trusted_until.load(Ordering::SeqCst);
                    let remaining = Duration::from_nanos(until.saturating_sub(now));
                    ward.notices.push(SourceNotice::LeaseBreaking { path: self.path(), remaining });
                }
            }
            Standing::Without | Standing::Breaking | Standing::LetGo => {}
        }
        if ward.standing == Standing::Breaking && self.readable() != Readable::Yes {
            self.let_go(ward, SourceNotice::LeaseLost { path: self.path() });
        }
    }

    /// The lease was whole at `moment`: reads are trusted for the allowance from then on.
    fn hold(&self, ward: &mut Ward, moment: u64) {
        ward.standing = Standing::Held;
        self.trusted_until.store(moment + self.allowance.as_nanos() as u64, Ordering::SeqCst);
    }

    /// Reads fail first, and only then is the writer let in.
    fn let_go(&self, ward: &mut Ward, notice: SourceNotice) {
        self.trusted_until.store(CLOSED, Ordering::SeqCst);
        ward.standing = Standing::LetGo;
        ward.notices.push(notice);
        // Not ours any more, if the kernel was faster.
        let _ = lease::release(self.file.fd.as_fd());
    }
}

/// Starts the thread that takes the lease and keeps it. Returns when the lease is there, or is not granted.
fn start(watch: &Arc<Watch>) -> Result<JoinHandle<()>, NoLease> {
    let (tell, told) = sync_channel(1);
    let for_thread = Arc::clone(watch);
    let thread = thread::Builder::new()
        .name("latepage-lease".to_owned())
        .spawn(move || keep(&for_thread, &tell))
        .map_err(|error| NoLease::Refused(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN)))?;
    match told.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(errno)) => {
            let _ = thread.join();
            Err(match errno {
                Errno::AGAIN => NoLease::Writer,
                Errno::ACCESS => NoLease::NotOwner,
                errno => NoLease::Refused(errno),
            })
        }
        Err(_ended) => Err(NoLease::Refused(Errno::IO)),
    }
}

/// The thread's life: it keeps the lease until the source goes, or the file is another one.
fn keep(watch: &Watch, tell: &SyncSender<Result<(), Errno>>) {
    let fd = watch.file.fd.as_fd();
    let taken = Breaks::on_this_thread().and_then(|breaks| {
        let moment = watch.now();
        breaks.take(fd)?;
        watch.hold(&mut watch.ward(), moment);
        Ok(breaks)
    });
    let breaks = match taken {
        Ok(breaks) => breaks,
        Err(errno) => {
            let _ = tell.send(Err(errno));
            return;
        }
    };
    let _ = tell.send(Ok(()));
    while let Some(patience) = step(watch, &breaks) {
        // Woken, timed out or told: each time we look at everything.
        breaks.wait(patience);
    }
    // The lease goes with the last descriptor of the file, but a writer need not wait for that.
    let _ = lease::release(fd);
}

/// Looks at everything once. Yields how long to wait at most before the next look, or `None` if it is over.
fn step(watch: &Watch, breaks: &Breaks) -> Option<Duration> {
    let mut ward = watch.ward();
    if ward.ended {
        return None;
    }
    watch.look(&mut ward);
    match ward.standing {
        Standing::Breaking if ward.filled => {
            watch.let_go(&mut ward, SourceNotice::LeaseReleased { path: watch.path() });
        }
        Standing::Breaking if !lease::writer_waits(watch.file.fd.as_fd()) => renew(watch, breaks, &mut ward),
        Standing::LetGo => regain(watch, breaks, &mut ward),
        _ => {}
    }
    match ward.standing {
        _ if ward.changed.is_some() => None,
        Standing::Without => None,
        Standing::Held => Some(HEARTBEAT.min(watch.allowance / 4)),
        Standing::Breaking => Some(WHILE_BREAKING.min(watch.allowance / 4)),
        Standing::LetGo => Some(HEARTBEAT),
    }
}

/// The writer that broke the lease has gone away without having been let in. A lease once broken does not become whole
/// again, so it is let go and taken anew. Whoever comes in between is noticed: the new one is then refused, or the file
/// is not as it was. Readers wait meanwhile.
fn renew(watch: &Watch, breaks: &Breaks, ward: &mut Ward) {
    watch.trusted_until.store(RENEWING, Ordering::SeqCst);
    let _ = lease::release(watch.file.fd.as_fd());
    ward.standing = Standing::LetGo;
    regain(watch, breaks, ward);
    if ward.standing != Standing::Held {
        watch.trusted_until.store(CLOSED, Ordering::SeqCst);
        ward.notices.push(SourceNotice::LeaseLost { path: watch.path() });
    }
}

/// Takes the lease again if it is to be had. Reads go on only if the file is as it was.
fn regain(watch: &Watch, breaks: &Breaks, ward: &mut Ward) {
    let moment = watch.now();
    let taken = breaks.take(watch.file.fd.as_fd());
    // With the lease in hand nobody changes what this finds. Who wrote and put the time of modification back left his mark in the
    // other one: what is known of holes and zero pages may be as untrue as the contents.
    let touched = || watch.file.identity().is_none().then_some("its time of change (ctime) differs");
    if let Some(how) = watch.file.difference().or_else(touched) {
        ward.changed = Some(how);
        ward.notices.push(SourceNotice::Rewritten { path: watch.path(), how });
    } else if taken.is_ok() {
        watch.hold(ward, moment);
        ward.notices.push(SourceNotice::LeaseRegained { path: watch.path() });
    }
}

/// How long after a look that found the lease whole reads are trusted: the kernel's time for a writer that comes at once,
/// less a margin in which the last of them end.
fn allowance() -> Duration {
    let configured =
        fs::read_to_string("/proc/sys/fs/lease-break-time").ok().and_then(|text| text.trim().parse().ok());
    // 0 means that the kernel waits for ever. We do not.
    let given = Duration::from_secs(configured.filter(|&seconds| seconds > 0).unwrap_or(DEFAULT_BREAK_TIME));
    given - Duration::from_secs(1).min(given / 2)
}

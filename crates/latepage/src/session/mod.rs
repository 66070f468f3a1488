//! One VM being served. Only here do delivery, source and install meet.
//!
//! A fault's way: [`Session::serve`] takes a batch from the delivery, removals first; each fault claims its page, asks the
//! source, installs, settles and releases. Everything that touches the guest happens inside the session's gate (see `gate.rs`).

mod answer;
mod around;
mod batch;
mod deliveries;
mod end;
pub mod exit;
mod fail;
mod gate;
mod inside;
mod place;
mod policy;
mod populate;
mod report;
mod resolve;
mod serve;
mod steps;
#[cfg(test)]
mod successors;
#[cfg(test)]
mod tests;
mod waiting;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use crate::attachment::{Backing, Form, Hello, Notify};
use crate::delivery::channel::ChannelDelivery;
use crate::delivery::{Batch, Delivery, UffdDelivery};
use crate::install::{BitmapInstall, CopyInstall, FillInstall, Install, InstallView, MinorInstall};
use crate::memory::{Layout, Pages};
use crate::source::Source;
use crate::stats::Stats;
use crate::sys::mapping::MapError;
use crate::sys::pidfd::PidFd;
use crate::sys::uffd::Userfaultfd;
use around::Around;
use batch::Fresh;
use deliveries::Deliveries;
use gate::Gate;
use waiting::WaitingRoom;

pub use inside::{FaultWindow, Resolver, ResolverError, ResolverStats, Seat, Told, Unresolved};
pub use policy::{FaultAround, OnMissing, Placement, Policy, Population};
pub use populate::Sliced;
pub use report::{Action, End, Host, LetGo, Report};
pub use resolve::Wanted;
pub use serve::Served;

/// What a thread that serves brings along: buffers, allocated once.
pub struct Scratch {
    batch: Batch,
    /// For answers that are installed at once, inside the gate.
    bytes: Box<[u8]>,
    /// For reads that may take long, outside the gate.
    reading: Box<[u8]>,
}

impl Scratch {
    /// The most that is read from a source at a time: one page of 2 MiB.
    pub const BYTES: usize = 2 << 20;
    /// Messages taken at a time.
    const MESSAGES: usize = 64;

    /// Buffers for one thread.
    pub fn new() -> Self {
        let buffer = || vec![0; Self::BYTES].into_boxed_slice();
        Self { batch: Batch::new(Self::MESSAGES), bytes: buffer(), reading: buffer() }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// The parts of a session that only the holder of its gate touches. They end with the session.
struct Core {
    deliveries: Deliveries,
    install: Box<dyn Install>,
    waiting: WaitingRoom,
    around: Around,
    fresh: Fresh,
    /// When somebody was last released.
    served: Instant,
    /// Descriptors over the memory of a VMM's children: closing them would give the children zero pages.
    forked: Vec<OwnedFd>,
    /// Held for as long as the session: a VMM may take its closing as a sign, and its own closing is one for us.
    socket: Option<OwnedFd>,
}

/// Who a session is for, beside what the handshake says.
#[derive(Debug)]
pub struct Peer {
    /// Its process number, where it can be seen from here.
    pub pid: Option<u32>,
    /// Its process.
    pub process: Option<PidFd>,
    /// The socket of its handshake.
    pub socket: Option<OwnedFd>,
}

/// A session that could not be made: what was given for it, of which the userfaultfd must not be closed while the VM lives.
#[derive(Debug)]
pub struct NotMade {
    /// Why.
    pub error: MapError,
    /// The VM's.
    pub userfaultfd: Option<Userfaultfd>,
    /// Who it was for.
    pub peer: Peer,
    /// The name that it gave.
    pub name: Option<String>,
}

/// One VM being served.
pub struct Session {
    id: u64,
    name: String,
    pid: Option<u32>,
    form: Form,
    backing: Backing,
    /// Whether its threads post to a channel.
    posts: bool,
    /// Whether nothing but its process and its socket tells that it lives.
    by_socket: bool,
    vcpus: u32,
    layout: Layout,
    policy: Policy,
    source: Arc<dyn Source>,
    host: Arc<dyn Host>,
    pages: Pages,
    stats: Stats,
    started: Instant,
    process: Mutex<Option<PidFd>>,
    /// Pages that the guest is still owed contents for: absent or in flight.
    owed: AtomicU64,
    /// Slices of population since the VM had its last fault, as far as that counts.
    calm: AtomicU32,
    end: OnceLock<End>,
    gate: Gate<Option<Core>>,
}

impl Session {
    /// A session for a VM that has introduced itself.
    ///
    /// # Errors
    /// [`NotMade`], with everything that must be kept, where its memory cannot be mapped a second time.
    ///
    /// # Panics
    /// Where `hello` has neither a userfaultfd nor a channel with its memory, as no handshake has.
    pub fn new(
        id: u64,
        hello: Hello,
        peer: Peer,
        source: Arc<dyn Source>,
        policy: Policy,
        host: Arc<dyn Host>,
    ) -> Result<Arc<Self>, Box<NotMade>> {
        let Hello { form, name, vcpus, backing, layout, userfaultfd, memory, mut notify } = hello;
        let view = match memory.map(|memory| InstallView::map(&memory, &layout)).transpose() {
            Ok(view) => view,
            Err(error) => return Err(Box::new(NotMade { error, userfaultfd, peer, name })),
        };
        let (posts, by_socket) = (notify.is_some(), userfaultfd.is_none());
        let (pages, owed) = match notify.as_mut().and_then(|notify| notify.pages.take()) {
            Some(table) => {
                let pages = Pages::handed(table);
                let owed = pages.take_over();
                (pages, owed)
            }
            None => (Pages::new(layout.pages()), layout.pages().into()),
        };
        let (install, mut deliveries) = ways(userfaultfd, view, notify);
        if pages.is_handed() {
            // The kernel delivers a fault once: what a reader before took from the userfaultfd, and left, is raised anew.
            for region in 0..layout.regions().len() {
                deliveries.release(&layout, layout.region_pages(region));
            }
        }
        let name = name.unwrap_or_else(|| match peer.pid {
            Some(pid) => format!("vm-{pid}"),
            None => format!("session-{id}"),
        });
        Ok(Arc::new(Self {
            id,
            name,
            pid: peer.pid,
            form,
            backing,
            posts,
            by_socket,
            vcpus,
            pages,
            owed: AtomicU64::new(owed),
            calm: AtomicU32::new(0),
            stats: Stats::new(policy.trace),
            layout,
            policy,
            source,
            host,
            started: Instant::now(),
            process: Mutex::new(peer.process),
            end: OnceLock::new(),
            gate: Gate::new(Some(Core {
                deliveries,
                install,
                waiting: WaitingRoom::new(vcpus as usize + 8),
                around: Around::new(),
                fresh: Fresh::new(Scratch::MESSAGES),
                served: Instant::now(),
                forked: Vec::new(),
                socket: peer.socket,
            })),
        }))
    }

    /// Its number in its pager; never used twice.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The VM's name: its own, or made from its pid.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The VM's process number, where it can be seen from here.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// How it introduced itself.
    pub fn form(&self) -> Form {
        self.form
    }

    /// What its memory is made of.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// How many vCPUs it says it has.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Its regions.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The states of its pages.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// What it was told to do.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Where its contents come from.
    pub fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// The same, for whoever goes on with it.
    pub fn shared_source(&self) -> Arc<dyn Source> {
        Arc::clone(&self.source)
    }

    /// What it has done.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// How many pages the guest is still owed contents for.
    pub fn owed(&self) -> u64 {
        self.owed.load(Ordering::Acquire)
    }

    /// Why it is over, once it is.
    pub fn end(&self) -> Option<End> {
        self.end.get().copied()
    }

    /// Calls `look` with the VM's process; `None` where it cannot be seen from here, or the session is over.
    pub fn with_process<R>(&self, look: impl FnOnce(&PidFd) -> R) -> Option<R> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(look)
    }

    /// Whether its VM may be let go while it lives.
    pub fn may_detach(&self) -> bool {
        self.kept_because().is_none()
    }

    /// Whether it is over once the socket of its handshake is closed at the other end: there is no userfaultfd, which alone would tell
    /// that the memory lives on.
    pub fn ends_with_its_socket(&self) -> bool {
        self.by_socket
    }

    /// Why its VM must be served as long as it lives, even if it lacks nothing; `None` where it may be let go.
    pub fn kept_because(&self) -> Option<&'static str> {
        if self.posts {
            Some("its threads post to a channel, and would wait for ever once nobody reads it")
        } else if self.backing == Backing::Private {
            Some(
                "its memory is a private mapping of a file: unregistered, a range that it discards would show the file again",
            )
        } else {
            None
        }
    }

    /// Calls `look` with each descriptor that polls readable when faults wait, until it answers no; not at all once the session is
    /// over. Whether it never answered no.
    pub fn with_descriptors(&self, look: impl FnMut(BorrowedFd<'_>) -> bool) -> bool {
        self.briefly(|core| core.deliveries.descriptors().all(look)).unwrap_or(true)
    }

    /// Calls `look` with the socket of the handshake; `None` where there is none, or the session is over.
    pub fn with_socket<R>(&self, look: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        self.briefly(|core| core.socket.as_ref().map(|socket| look(socket.as_fd()))).flatten()
    }

    /// Runs a little work inside the gate, for threads that may wait for it and have no buffers to serve with: a worker that
    /// came meanwhile is asked to come again.
    fn briefly<R>(&self, work: impl FnOnce(&mut Core) -> R) -> Option<R> {
        let mut guard = self.gate.enter();
        let result = guard.as_mut().map(work);
        if self.gate.leave_marked(guard) {
            self.host.nudge(self);
        }
        result
    }

    /// Records that the session is over, the first reason winning, and asks its host to take it down.
    pub fn finish(&self, end: End) {
        if self.end.set(end).is_ok() {
            self.host.report(self, Report::Over(end));
        }
    }

    /// Takes the session down: every descriptor and mapping that it held is gone when this returns. `before` sees the
    /// deliveries' descriptors while they still are open.
    pub fn take_down(&self, before: impl FnMut(BorrowedFd<'_>)) {
        let core = self.gate.enter().take();
        if let Some(core) = core {
            core.deliveries.descriptors().for_each(before);
        }
        self.process.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn now_ns(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_nanos() as u64
    }
}

/// How pages come into a VM, and how its faults come here, by what it handed over.
fn ways(
    userfaultfd: Option<Userfaultfd>,
    view: Option<InstallView>,
    notify: Option<Notify>,
) -> (Box<dyn Install>, Deliveries) {
    let uffd = userfaultfd.map(Arc::new);
    let install: Box<dyn Install> = match (&uffd, view) {
        (Some(uffd), Some(view)) => Box::new(MinorInstall::new(Arc::clone(uffd), view)),
        (Some(uffd), None) => Box::new(CopyInstall::new(Arc::clone(uffd))),
        (None, Some(view)) => Box::new(FillInstall::new(view)),
        (None, None) => panic!("a VM that handed over neither a userfaultfd nor its memory"),
    };
    let mut deliveries: Vec<Box<dyn Delivery>> = Vec::new();
    deliveries.extend(uffd.map(|uffd| Box::new(UffdDelivery::new(uffd)) as Box<dyn Delivery>));
    let Some(Notify { reader, bitmap, .. }) = notify else { return (install, Deliveries::new(deliveries)) };
    deliveries.push(Box::new(ChannelDelivery::new(reader)));
    let install = match bitmap {
        Some(bitmap) => Box::new(BitmapInstall::new(install, bitmap)),
        None => install,
    };
    (install, Deliveries::new(deliveries))
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

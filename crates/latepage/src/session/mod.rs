//! One VM being served. Only here do delivery, source and install meet.
//!
//! A fault's way: [`Session::serve`] takes a batch from the delivery, removals first; each fault claims its page, asks the
//! source, installs, settles and releases. Everything that touches the guest happens inside the session's gate (see `gate.rs`).
//! Where a VM has several userfaultfds, each is over a shard of its memory, and each shard has a gate of its own (see `shard.rs`).

mod answer;
mod around;
mod batch;
mod deliveries;
mod end;
mod fail;
mod gate;
mod inside;
mod place;
mod policy;
mod populate;
mod report;
mod resolve;
mod serve;
mod shard;
mod steps;
#[cfg(test)]
mod successors;
#[cfg(test)]
mod tests;
mod waiting;

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

use crate::attachment::{Backing, Form, Hello, Notify};
use crate::delivery::channel::ChannelDelivery;
use crate::delivery::{Batch, Delivery, UffdDelivery};
use crate::install::{
    BitmapInstall, CopyInstall, FillInstall, Install, InstallView, MinorInstall, SharedInstall,
};
use crate::memory::{Layout, Pages, Shards};
use crate::source::Source;
use crate::stats::Stats;
use crate::sys::mapping::MapError;
use crate::sys::pidfd::PidFd;
use crate::sys::uffd::Userfaultfd;
use around::Around;
use batch::Fresh;
use deliveries::Deliveries;
use shard::Shard;
use waiting::WaitingRoom;

pub use answer::NoAnswer;
pub use inside::{
    Address, FaultWindow, Reason, Resolver, ResolverError, ResolverStats, Seat, Told, Unresolved,
};
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

/// The parts of a shard that only the holder of its gate touches. They end with the session.
struct Core {
    /// The pages that are installed here, and nowhere else.
    pages: Range<u32>,
    deliveries: Deliveries,
    install: Box<dyn Install>,
    waiting: WaitingRoom,
    around: Around,
    fresh: Fresh,
    /// When somebody was last released.
    served: Instant,
    /// Descriptors over the memory of a VMM's children: closing them would give the children zero pages.
    forked: Vec<OwnedFd>,
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

/// A session that could not be made: what was given for it, of which no userfaultfd must be closed while the VM lives.
#[derive(Debug)]
pub struct NotMade {
    /// Why.
    pub error: MapError,
    /// The VM's.
    pub userfaultfds: Vec<Userfaultfd>,
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
    /// Held for as long as the session: a VMM may take its closing as a sign, and its own closing is one for us.
    socket: Mutex<Option<OwnedFd>>,
    /// Pages that the guest is still owed contents for: absent or in flight.
    owed: AtomicU64,
    /// Slices of population since the VM had its last fault, as far as that counts.
    calm: AtomicU32,
    end: OnceLock<End>,
    /// Whether it was reported that a shard cannot be served.
    lost: AtomicBool,
    divided: Shards,
    shards: Box<[Shard]>,
    /// Shards that have not been taken down.
    up: AtomicUsize,
}

impl Session {
    /// A session for a VM that has introduced itself.
    ///
    /// # Errors
    /// [`NotMade`], with everything that must be kept, where its memory cannot be mapped a second time.
    ///
    /// # Panics
    /// Where `hello` has neither a userfaultfd for each shard nor a channel with its memory, as no handshake has.
    pub fn new(
        id: u64,
        hello: Hello,
        peer: Peer,
        source: Arc<dyn Source>,
        policy: Policy,
        host: Arc<dyn Host>,
    ) -> Result<Arc<Self>, Box<NotMade>> {
        let Hello { form, name, vcpus, backing, layout, shards: divided, userfaultfds, memory, mut notify } =
            hello;
        let view = match memory.map(|memory| InstallView::map(&memory, &layout)).transpose() {
            Ok(view) => view,
            Err(error) => return Err(Box::new(NotMade { error, userfaultfds, peer, name })),
        };
        let (posts, by_socket) = (notify.is_some(), userfaultfds.is_empty());
        let (pages, owed) = match notify.as_mut().and_then(|notify| notify.pages.take()) {
            Some(table) => {
                let pages = Pages::handed(table);
                let owed = pages.take_over();
                (pages, owed)
            }
            None => (Pages::new(layout.pages()), layout.pages().into()),
        };
        // Any of them may have to park the faults of all vCPUs; that each has is not worth room for it from the start.
        let threads = vcpus as usize / divided.len() + 8;
        let ways = ways(backing, &divided, userfaultfds, view, notify).into_iter().enumerate();
        let shards: Box<[Shard]> = ways
            .map(|(shard, (install, mut deliveries, userfaultfd))| {
                if pages.is_handed() {
                    // The kernel delivers a fault once: what a reader before took from the userfaultfd, and left, is raised anew.
                    for region in 0..layout.regions().len() {
                        deliveries.release(&layout, layout.region_pages(region));
                    }
                }
                let core = Core {
                    pages: divided.pages(shard),
                    deliveries,
                    install,
                    waiting: WaitingRoom::new(threads),
                    around: Around::new(),
                    fresh: Fresh::new(Scratch::MESSAGES),
                    served: Instant::now(),
                    forked: Vec::new(),
                };
                Shard::new(core, userfaultfd)
            })
            .collect();
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
            stats: if shards.len() == 1 { Stats::new(policy.trace) } else { Stats::shared(policy.trace) },
            layout,
            policy,
            source,
            host,
            started: Instant::now(),
            process: Mutex::new(peer.process),
            socket: Mutex::new(peer.socket),
            end: OnceLock::new(),
            lost: AtomicBool::new(false),
            divided,
            up: AtomicUsize::new(shards.len()),
            shards,
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

    /// Calls `look` with the socket of the handshake; `None` where there is none, or the session is over.
    pub fn with_socket<R>(&self, look: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.as_ref().map(|socket| look(socket.as_fd()))
    }

    /// Records that the session is over, the first reason winning, and asks its host to take it down.
    pub fn finish(&self, end: End) {
        if self.end.set(end).is_ok() {
            self.host.report(self, Report::Over(end));
        }
    }

    fn now_ns(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_nanos() as u64
    }
}

/// How pages come into a VM, how its faults come here, and the userfaultfd of both, where several shards have one each.
type Ways = (Box<dyn Install>, Deliveries, Weak<Userfaultfd>);

/// The ways of each shard, by what a VM handed over.
fn ways(
    backing: Backing,
    divided: &Shards,
    userfaultfds: Vec<Userfaultfd>,
    view: Option<InstallView>,
    notify: Option<Notify>,
) -> Vec<Ways> {
    let view = view.map(Arc::new);
    if let Some(notify) = notify {
        let (install, deliveries) = posted(userfaultfds.into_iter().next(), view, notify);
        return vec![(install, deliveries, Weak::new())];
    }
    assert_eq!(userfaultfds.len(), divided.len(), "a VM with shards and no userfaultfd for each");
    let by_userfaultfd = |(shard, userfaultfd)| {
        let uffd = Arc::new(userfaultfd);
        let delivery = UffdDelivery::over(Arc::clone(&uffd), divided.pages(shard));
        let known = Arc::downgrade(&uffd);
        let install: Box<dyn Install> = match &view {
            // Until the guest writes to it, a page of private memory is its file's.
            Some(view) if backing == Backing::Private => Box::new(MinorInstall::new(uffd, Arc::clone(view))),
            Some(view) => Box::new(SharedInstall::new(uffd, Arc::clone(view))),
            None => Box::new(CopyInstall::new(uffd)),
        };
        (install, Deliveries::new(vec![Box::new(delivery)]), known)
    };
    userfaultfds.into_iter().enumerate().map(by_userfaultfd).collect()
}

/// The same where there is a channel.
fn posted(
    userfaultfd: Option<Userfaultfd>,
    view: Option<Arc<InstallView>>,
    notify: Notify,
) -> (Box<dyn Install>, Deliveries) {
    let view = view.expect("a VM with a channel hands over its memory");
    let uffd = userfaultfd.map(Arc::new);
    let install: Box<dyn Install> = match &uffd {
        Some(uffd) => Box::new(MinorInstall::new(Arc::clone(uffd), view)),
        None => Box::new(FillInstall::new(view)),
    };
    let mut deliveries: Vec<Box<dyn Delivery>> = Vec::new();
    deliveries.extend(uffd.map(|uffd| Box::new(UffdDelivery::new(uffd)) as Box<dyn Delivery>));
    let Notify { reader, bitmap, .. } = notify;
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

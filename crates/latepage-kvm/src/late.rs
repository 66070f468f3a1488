//! Memory that the VMM itself brings, late: vCPUs' threads resolve their own exits, and a thread serves the userfaultfd over the guest
//! view, through which KVM's own accesses come, and the VMM's.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use latepage::install::{PageBitmap, Trap};
use latepage::session::{
    FaultWindow, Reason, Resolver, ResolverError, ResolverStats, Seat, Told, Unresolved,
};
use latepage::source::{FileSource, Source};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use serde::Serialize;

use crate::config::LateMemory;
use crate::control::Control;
use crate::error::VmError;
use crate::fingerprint::PAGE;
use crate::handshake::describe;
use crate::last_words;
use crate::machine::GuestKind;
use crate::memory::GuestMemory;
use crate::supply::{self, Came, Supply, SupplyReport};
use crate::sys::slots::Slots;
use crate::trap::{Attributes, TrapKind};

/// How accesses to absent pages reach whoever resolves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// By userfaultfd, all of them.
    #[default]
    Uffd,
    /// A vCPU's by a memory-fault exit, resolved on its own thread; others by userfaultfd. Those of threads by a signal, all of them.
    Exit,
    /// A vCPU's by a memory-fault exit, which its own thread posts to a pager; others by userfaultfd.
    Notify,
}

/// See the module.
pub(crate) struct Late {
    resolver: Arc<Resolver>,
    delivery: Delivery,
    memory_file: PathBuf,
    kind: Option<TrapKind>,
    /// Whether accesses come back to whoever makes them, as a signal.
    by_signal: bool,
    source: Arc<dyn Source>,
    bitmap: Option<Arc<PageBitmap>>,
    attributes: Option<Arc<Attributes>>,
    vcpus: usize,
    stop: OwnedFd,
    server: Mutex<Option<JoinHandle<()>>>,
}

/// What has been brought so far, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LateReport {
    /// How accesses reach us.
    pub delivery: Delivery,
    /// What makes a vCPU's access an exit.
    pub trap: Option<TrapKind>,
    /// Where pages come from.
    pub memory_file: PathBuf,
    /// Accesses that came back to the thread that made them: memory-fault exits, or signals.
    pub exits: u64,
    /// Faults by userfaultfd: KVM's own accesses, the VMM's, and vCPUs' where there are no exits.
    pub faults: u64,
    /// Of both, those for a page that was on its way already.
    pub joined: u64,
    /// Of both, those for a page that was there when they were looked at.
    pub present: u64,
    /// Pages filled from the memory file.
    pub filled: u64,
    /// Pages that came as zero.
    pub zero: u64,
    /// Pages that came beside one that was wanted.
    pub beside: u64,
}

impl Late {
    /// Makes all of `memory` absent. From here on every touch of the guest view waits until [`start`](Self::start).
    pub(crate) fn new(
        memory: &GuestMemory,
        config: &LateMemory,
        vcpus: usize,
        kind: GuestKind,
    ) -> Result<Self, VmError> {
        let Some(file) = memory.memfd_owned().filter(|_| memory.is_shared()) else {
            return Err(VmError::Config(format!(
                "late memory is filled through a second view, so it is shared memory; it cannot be {}",
                memory.backing()
            )));
        };
        let trap = match (config.delivery, kind) {
            (Delivery::Uffd, _) if config.trap.is_some() => {
                return Err(VmError::Config("a trap goes with the delivery exit or notify".into()));
            }
            (Delivery::Uffd, _) => None,
            (Delivery::Notify, _) => {
                return Err(VmError::Config(
                    "the delivery notify takes a pager: give its socket (--pager), or use --delivery exit"
                        .into(),
                ));
            }
            (Delivery::Exit, GuestKind::Kvm) => Some(TrapKind::choose(config.trap)?),
            (Delivery::Exit, _) if config.trap.is_some() => return Err(VmError::trap_of_threads()),
            (Delivery::Exit, _) => None,
        };
        let by_signal = config.delivery == Delivery::Exit && trap.is_none();
        let window = match config.window {
            None => FaultWindow::default(),
            Some(bytes) => FaultWindow::bytes(bytes).map_err(VmError::Config)?,
        };
        let layout = describe(memory)?;
        let bitmap = match trap {
            Some(TrapKind::Bitmap) => {
                let made =
                    PageBitmap::create(&layout).map_err(|errno| VmError::call("memfd_create", errno))?;
                let mapped = PageBitmap::map(made, &layout);
                Some(Arc::new(mapped.map_err(|error| VmError::Config(format!("the bitmap: {error}")))?))
            }
            _ => None,
        };
        let attributes = (trap == Some(TrapKind::Attributes)).then(Arc::<Attributes>::default);
        let armed: Option<Arc<dyn Trap>> = match (&bitmap, &attributes) {
            (Some(bitmap), _) => Some(Arc::clone(bitmap) as _),
            (_, Some(attributes)) => Some(Arc::clone(attributes) as _),
            (None, None) => None,
        };
        let refused = |why: String| VmError::LateMemory { path: config.memory_file.clone(), why };
        let source: Arc<dyn Source> =
            Arc::new(FileSource::open(&config.memory_file).map_err(|error| refused(error.to_string()))?);
        let kept = Arc::clone(&source);
        let resolver = match by_signal {
            true => Resolver::by_signal(layout, source, vcpus + 1, window),
            false => Resolver::new(layout, file, source, armed, vcpus + 1, window),
        };
        let resolver = resolver.map_err(|error| match error {
            ResolverError::Userfaultfd(error) => VmError::Userfaultfd(error),
            ResolverError::Register(error) => VmError::Register(error),
            ResolverError::Map(error) => VmError::Map(error),
            error @ (ResolverError::Source(_) | ResolverError::HugePages) => refused(error.to_string()),
        })?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| VmError::call("eventfd", errno))?;
        Ok(Self {
            resolver,
            delivery: config.delivery,
            memory_file: config.memory_file.clone(),
            kind: trap,
            by_signal,
            source: kept,
            bitmap,
            attributes,
            vcpus,
            stop,
            server: Mutex::default(),
        })
    }

    fn brought(&self) -> LateReport {
        let ResolverStats { exits, faults, joined, present, filled, zero, beside } = self.resolver.stats();
        LateReport {
            delivery: self.delivery,
            trap: self.kind,
            memory_file: self.memory_file.clone(),
            exits,
            faults,
            joined,
            present,
            filled,
            zero,
            beside,
        }
    }
}

impl Supply for Late {
    /// Serves the userfaultfd from now on. A page that cannot be had fails the VM.
    fn start(&self, control: &Arc<Control>) -> Result<(), VmError> {
        let stop = self.stop.try_clone().map_err(|source| VmError::thread(&source))?;
        let named = thread::Builder::new().name("late-memory".into());
        let server = if self.by_signal {
            let source = Arc::clone(&self.source);
            named.spawn(move || look_after(&*source, &stop))
        } else {
            let mut seat = self.resolver.seat(self.vcpus).expect("no vCPU has that number");
            let control = Arc::clone(control);
            named.spawn(move || {
                let served = seat.serve(stop.as_fd(), |told| match told {
                    Told::Unresolved(unresolved) => control.cannot_go_on(unresolved.to_string()),
                    // What matters of it comes as a page that cannot be had.
                    Told::Source(_) => {}
                });
                if let Err(errno) = served {
                    control.cannot_go_on(format!("the userfaultfd cannot be served any more: {errno}"));
                }
            })
        };
        let server = server.map_err(|source| VmError::thread(&source))?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(())
    }

    fn trap(&self) -> Option<TrapKind> {
        self.kind
    }

    fn bitmap(&self) -> Option<&Arc<PageBitmap>> {
        self.bitmap.as_ref()
    }

    fn arm(&self, slots: &Arc<Slots>) -> Result<(), VmError> {
        if let Some(attributes) = &self.attributes {
            attributes.attach(slots);
        }
        self.resolver.arm().map_err(|errno| VmError::Kvm { call: "KVM_SET_MEMORY_ATTRIBUTES", errno })
    }

    fn seat(&self, index: usize) -> Option<Box<dyn supply::Seat>> {
        let comes_back = self.kind.is_some() || self.by_signal;
        let seat = comes_back.then(|| self.resolver.seat(index))??;
        Some(Box::new(seat))
    }

    fn visitors(&self) -> Option<Box<dyn supply::Seat>> {
        let seat = self.by_signal.then(|| self.resolver.seat(self.vcpus))??;
        Some(Box::new(seat))
    }

    fn discard(&self, control: &Control, offset: u64, length: u64) -> Result<(), VmError> {
        for run in supply::runs(self.resolver.layout(), offset, length) {
            let (start, bytes) = (u64::from(run.start) * PAGE, run.len() as u64 * PAGE);
            self.resolver
                .discard(run, || control.memory.punch(start, bytes))
                .map_err(|errno| VmError::call("madvise(MADV_REMOVE)", errno))?;
        }
        Ok(())
    }

    fn report(&self) -> SupplyReport {
        SupplyReport::Late(self.brought())
    }
}

impl fmt::Debug for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Late").field("memory_file", &self.memory_file).finish_non_exhaustive()
    }
}

impl supply::Seat for Seat {
    fn exit(&mut self, gpa: u64, _: &AtomicBool) -> Came {
        match Seat::exit(self, gpa) {
            Ok(()) => Came::There,
            Err(unresolved) => Came::Not(unresolved.to_string()),
        }
    }

    fn touch(&mut self, address: u64) -> bool {
        let touched = Seat::touch(self, address);
        // What is no memory of the guest is somebody else's to tell of.
        if let Err(Unresolved { reason, .. }) = &touched
            && *reason != Reason::NoRegion
        {
            last_words::say(address, reason);
        }
        touched.is_ok()
    }
}

/// Has the source look after its files once a second, where nobody serves faults who does so beside that.
fn look_after(source: &dyn Source, stop: &OwnedFd) {
    const SECOND: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
    loop {
        let mut polled = [PollFd::new(stop, PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&SECOND)) {
            // What matters of it comes as a page that cannot be had.
            Ok(0) => drop(source.check()),
            Err(Errno::INTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// When nobody touches the memory any more.
impl Drop for Late {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(server) = self.server.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = server.join();
        }
    }
}

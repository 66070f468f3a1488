//! The delivery `notify`: a pager brings the memory, and the VMM's threads tell it what they want through a channel.
//!
//! ```text
//! a vCPU's thread                                        pager
//! KVM_RUN: EFAULT, KVM_EXIT_MEMORY_FAULT, gpa
//!   posts to its slot, waits there ────── channel ─────▶ takes it; claims, fills (memory file)
//!                                                        shows (CONTINUE in the guest view), clears the bit
//!   ◀──────────────────────────────────── channel ────── done: these pages
//!   clears their attribute, where that is the trap
//! KVM_RUN
//! ```
//!
//! KVM's own accesses, and the VMM's through the guest view, come by userfaultfd, which the pager serves as well. To read: the
//! channel (`docs/channel.md`), the handshake (`docs/handshake.md`, "By a channel"), [`seat`], [`handover`].

mod forward;
mod handover;
mod link;
mod seat;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use latepage::delivery::channel::Channel;
use latepage::install::{MinorInstall, PageBitmap, Trap};
use latepage::memory::PageTable;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};
use serde::Serialize;

use crate::config::NotifyMemory;
use crate::control::Control;
use crate::error::VmError;
use crate::fingerprint::PAGE;
use crate::handshake::describe;
use crate::late::Delivery;
use crate::machine::GuestKind;
use crate::memory::GuestMemory;
use crate::supply::{self, Supply, SupplyReport};
use crate::sys::slots::Slots;
use crate::trap::{Attributes, TrapKind};

use forward::{FORWARDERS, Forwarders};
use handover::Handover;
use link::Link;
use seat::{Desk, Side};

/// Slots of the channel behind the vCPUs': of who discards memory, of who else of the VMM touches it, and of those who forward faults.
const CLERK: u32 = 0;
const VISITORS: u32 = 1;
const FORWARD: u32 = 2;
const BESIDE: u32 = FORWARD + FORWARDERS;

/// See the module.
#[derive(Debug)]
pub(crate) struct Notify {
    side: Arc<Side>,
    link: Link,
    kind: Option<TrapKind>,
    bitmap: Option<Arc<PageBitmap>>,
    vcpus: u32,
    /// Whether accesses come back to whoever makes them, as a signal.
    by_signal: bool,
    /// Who tells of discards.
    clerk: Mutex<seat::Seat>,
    forwarders: Mutex<Option<Forwarders>>,
}

/// What the VMM's side of `notify` has done so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotifyReport {
    /// How accesses reach the pager.
    pub delivery: Delivery,
    /// What makes a vCPU's access an exit.
    pub trap: Option<TrapKind>,
    /// Whether the pager has no userfaultfd: everything is posted.
    pub all: bool,
    /// The pager's socket.
    pub socket: PathBuf,
    /// Accesses that came back to the thread that made them: memory-fault exits, or signals.
    pub exits: u64,
    /// Faults that were posted to the channel. An exit that was interrupted by a pause comes again, and is posted once.
    pub posted: u64,
    /// Of those, faults that came by userfaultfd: KVM's own accesses, and the VMM's.
    pub forwarded: u64,
    /// Discards that were posted, each of pages of one region.
    pub removed: u64,
    /// How often a pager was handed the VM: once, and once more after each one that went away.
    pub connected: u64,
}

impl Notify {
    /// Makes all of `memory` absent, connects, and hands it over. From here on every touch of the guest view may wait for the pager.
    pub(crate) fn new(
        memory: &GuestMemory,
        config: &NotifyMemory,
        name: &str,
        vcpus: u32,
        kind: GuestKind,
    ) -> Result<Self, VmError> {
        let Some(file) = memory.memfd_owned().filter(|_| memory.is_shared()) else {
            return Err(VmError::Config(format!(
                "with the delivery notify the pager fills the memory file, so it is shared memory; it cannot be {}: use \
                 --backing shared, or --delivery uffd",
                memory.backing()
            )));
        };
        let by_signal = kind == GuestKind::Threads;
        let trap = match by_signal {
            true if config.trap.is_some() => return Err(VmError::trap_of_threads()),
            true => None,
            false => Some(TrapKind::choose(config.trap)?),
        };
        let layout = describe(memory)?;
        let bitmap = match trap {
            Some(TrapKind::Bitmap) => {
                let made =
                    PageBitmap::create(&layout).map_err(|errno| VmError::call("memfd_create", errno))?;
                let mapped = PageBitmap::map(&made, &layout);
                let mapped = mapped.map_err(|error| VmError::Config(format!("the bitmap: {error}")))?;
                Some((Arc::new(mapped), made))
            }
            _ => None,
        };
        let attributes = (trap == Some(TrapKind::Attributes)).then(Arc::<Attributes>::default);
        let channel = Channel::new(vcpus + BESIDE, layout.pages())
            .map_err(|error| VmError::Config(format!("no channel for {vcpus} vCPUs: {error}")))?;
        let features = if by_signal { Features::SIGBUS } else { Features::empty() };
        let userfaultfd = Arc::new(Userfaultfd::create(Features::MINOR_SHMEM | features)?);
        for region in layout.regions() {
            // MINOR too: a page that is half filled is in the memory file already, and nobody may see it there.
            userfaultfd.register(region.hva, region.size, RegisterMode::MISSING | RegisterMode::MINOR)?;
        }
        let (bitmap, bitmap_file) = bitmap.unzip();
        if let Some(bitmap) = &bitmap {
            // Before the pager has it, which clears them.
            (0..layout.regions().len()).for_each(|region| bitmap.set(layout.region_pages(region)));
        }
        let view = match config.all {
            true => Some(MinorInstall::new(Arc::clone(&userfaultfd), MinorInstall::map(file, &layout)?)),
            false => None,
        };
        let pages = PageTable::create(&layout).map_err(|errno| VmError::call("memfd_create", errno))?;
        let handover = Handover {
            layout,
            channel,
            pages,
            memory: file.try_clone().map_err(|source| VmError::copy(&source))?,
            bitmap: bitmap_file,
            userfaultfd,
            hands_userfaultfd: !config.all,
            name: name.to_owned(),
            vcpus,
        };
        let desks = (0..vcpus + BESIDE).map(|_| Desk::default()).collect();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let spins = seat::spins(vcpus, cores);
        let side = Arc::new(Side { handover, view, attributes, desks, spins });
        let link = Link::connect(&config.socket, &side)?;
        let clerk = Mutex::new(seat::Seat::take(&side, vcpus + CLERK).expect("nobody has taken it"));
        let forwarders = Mutex::default();
        Ok(Self { side, link, kind: trap, bitmap, vcpus, by_signal, clerk, forwarders })
    }

    fn told(&self) -> NotifyReport {
        let sum = |of: fn(&Desk) -> u64| self.side.desks.iter().map(of).sum();
        NotifyReport {
            delivery: Delivery::Notify,
            trap: self.kind,
            all: !self.side.handover.hands_userfaultfd,
            socket: self.link.path().to_path_buf(),
            exits: sum(|desk| desk.exits.get()),
            posted: sum(|desk| desk.posted.get()),
            forwarded: sum(|desk| desk.forwarded.get()),
            removed: sum(|desk| desk.removed.get()),
            connected: self.link.connected(),
        }
    }
}

impl Supply for Notify {
    fn start(&self, control: &Arc<Control>) -> Result<(), VmError> {
        self.link.watch(control, &self.side)?;
        if !self.side.handover.hands_userfaultfd && !self.by_signal {
            let first = self.vcpus + FORWARD;
            let seats = (first..first + FORWARDERS).filter_map(|slot| seat::Seat::take(&self.side, slot));
            let started = Forwarders::start(seats.collect(), control)?;
            *self.forwarders.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
        }
        Ok(())
    }

    fn trap(&self) -> Option<TrapKind> {
        self.kind
    }

    fn bitmap(&self) -> Option<&Arc<PageBitmap>> {
        self.bitmap.as_ref()
    }

    /// Every bit has been set; attributes take a VM.
    fn arm(&self, slots: &Arc<Slots>) -> Result<(), VmError> {
        let Some(attributes) = &self.side.attributes else { return Ok(()) };
        attributes.attach(slots);
        let layout = &self.side.handover.layout;
        (0..layout.regions().len())
            .try_for_each(|region| attributes.arm(layout, layout.region_pages(region)))
            .map_err(|errno| VmError::Kvm { call: "KVM_SET_MEMORY_ATTRIBUTES", errno })
    }

    fn seat(&self, index: usize) -> Option<Box<dyn supply::Seat>> {
        let seat = seat::Seat::take(&self.side, index as u32)?;
        Some(Box::new(seat))
    }

    fn visitors(&self) -> Option<Box<dyn supply::Seat>> {
        let seat = self.by_signal.then(|| seat::Seat::take(&self.side, self.vcpus + VISITORS))??;
        Some(Box::new(seat))
    }

    /// The pager is told first, and answers once nothing of the snapshot comes there any more. Then the trap is set again, where there
    /// is one, before the hole is there: punching it takes the pages away from KVM, and the next access comes back.
    fn discard(&self, control: &Control, offset: u64, length: u64) -> Result<(), VmError> {
        let mut clerk = self.clerk.lock().unwrap_or_else(PoisonError::into_inner);
        let layout = &self.side.handover.layout;
        for run in supply::runs(layout, offset, length) {
            clerk.removed(run.clone(), || control.going_on())?;
            if let Some(bitmap) = &self.bitmap {
                bitmap.set(run.clone());
            }
            if let Some(attributes) = &self.side.attributes {
                attributes
                    .arm(layout, run.clone())
                    .map_err(|errno| VmError::Kvm { call: "KVM_SET_MEMORY_ATTRIBUTES", errno })?;
            }
            control
                .memory
                .punch(u64::from(run.start) * PAGE, run.len() as u64 * PAGE)
                .map_err(|errno| VmError::call("madvise(MADV_REMOVE)", errno))?;
        }
        Ok(())
    }

    fn report(&self) -> SupplyReport {
        SupplyReport::Notify(self.told())
    }
}

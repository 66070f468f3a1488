//! Guest memory: what backs it, and the two views of it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use latepage::sys::mapping::Mapping;
use latepage::sys::memfd;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::VmError;
use crate::layout::GuestLayout;
use crate::supply::Seat;
use crate::sys::{discard, sigbus};

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// A memfd with two shared views: the guest's, and one through which pages are installed.
    Shared,
    /// A private mapping of a memfd: what the guest writes is its own.
    Private,
    /// Anonymous memory, as Firecracker's.
    #[default]
    Anonymous,
    /// Anonymous memory in 2 MiB pages.
    Hugetlb,
    /// A private mapping of the memory file of a snapshot: how restoring by `map` backs memory. It is never asked for.
    MemoryFile,
}

impl Backing {
    /// Bytes of a page: the unit of a fault and of a discard.
    pub fn page_size(self) -> u64 {
        if self == Self::Hugetlb { 2 << 20 } else { 4096 }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Shared => "shared",
            Self::Private => "private",
            Self::Anonymous => "anonymous",
            Self::Hugetlb => "hugetlb",
            Self::MemoryFile => "memory_file",
        })
    }
}

impl FromStr for Backing {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Shared, Self::Private, Self::Anonymous, Self::Hugetlb]
            .into_iter()
            .find(|backing| backing.to_string() == name)
            .ok_or_else(|| format!("no backing is called {name:?}: shared, private, anonymous or hugetlb"))
    }
}

/// The memory of one VM, in this process.
///
/// Offsets are those of the memory file: regions follow each other without the hole (see [`GuestLayout`]).
#[derive(Debug)]
pub struct GuestMemory {
    layout: GuestLayout,
    backing: Backing,
    guest: Mapping,
    install: Option<Mapping>,
    memfd: Option<OwnedFd>,
    /// Where a thread that has no seat of its own sees to absent pages, if accesses come back to their threads.
    visitors: OnceLock<Mutex<Box<dyn Seat>>>,
}

impl GuestMemory {
    /// Memory that reads as zero, or is absent once it is registered. `reserve` takes all huge pages from the pool at once.
    ///
    /// # Errors
    /// [`VmError::Map`].
    pub fn new(layout: GuestLayout, backing: Backing, reserve: bool) -> Result<Self, VmError> {
        let bytes = layout.bytes();
        let length = bytes as usize;
        let memfd = match backing {
            Backing::Shared | Backing::Private => Some(
                memfd::create("latepage-guest", bytes)
                    .map_err(|errno| VmError::call("memfd_create", errno))?,
            ),
            Backing::Anonymous | Backing::Hugetlb => None,
            Backing::MemoryFile => unreachable!("from_file makes that"),
        };
        let (guest, install) = match &memfd {
            Some(file) if backing == Backing::Shared => {
                (Mapping::shared(file.as_fd(), 0, length)?, Some(Mapping::shared(file.as_fd(), 0, length)?))
            }
            Some(file) => (Mapping::private(file.as_fd(), 0, length)?, None),
            None if backing == Backing::Anonymous => (Mapping::anonymous(length)?, None),
            None if reserve => (Mapping::hugetlb(length)?, None),
            None => (Mapping::hugetlb_unreserved(length)?, None),
        };
        Ok(Self { layout, backing, guest, install, memfd, visitors: OnceLock::new() })
    }

    /// Memory that is a private mapping of a memory file: pages come from it when they are touched.
    ///
    /// # Errors
    /// [`VmError::Map`].
    pub(crate) fn from_file(layout: GuestLayout, file: BorrowedFd<'_>) -> Result<Self, VmError> {
        let guest = Mapping::private(file, 0, layout.bytes() as usize)?;
        Ok(Self {
            layout,
            backing: Backing::MemoryFile,
            guest,
            install: None,
            memfd: None,
            visitors: OnceLock::new(),
        })
    }

    /// Where the regions lie.
    pub fn layout(&self) -> &GuestLayout {
        &self.layout
    }

    /// What backs it.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The host-virtual address of the guest view.
    pub fn hva(&self) -> u64 {
        self.guest.address()
    }

    /// The memfd behind shared and private memory.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// The same, as it is owned.
    pub(crate) fn memfd_owned(&self) -> Option<&OwnedFd> {
        self.memfd.as_ref()
    }

    /// Whether the guest view and the install view are one memory.
    pub(crate) fn is_shared(&self) -> bool {
        self.backing == Backing::Shared
    }

    /// From here on accesses come back to the threads that make them: those that have no seat of their own share this one.
    pub(crate) fn seat_visitors(&self, seat: Box<dyn Seat>) {
        let _ = self.visitors.set(Mutex::new(seat));
    }

    fn visit<R>(&self, touch: impl FnOnce() -> R) -> R {
        match self.visitors.get() {
            Some(visitors) if !sigbus::is_seated() => {
                let mut seat = visitors.lock().unwrap_or_else(PoisonError::into_inner);
                sigbus::seated(&mut **seat, touch)
            }
            _ => touch(),
        }
    }

    /// Copies out of the guest view. Waits, as the guest does, for what a pager has not brought yet.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        self.visit(|| self.guest.read(offset as usize, into));
    }

    /// Copies into the guest view, as the guest would write.
    pub fn write(&self, offset: u64, from: &[u8]) {
        self.visit(|| self.guest.write(offset as usize, from));
    }

    /// Puts contents in before the guest runs: through the install view where there is one.
    pub(crate) fn install(&self, offset: u64, from: &[u8]) {
        self.install.as_ref().unwrap_or(&self.guest).write(offset as usize, from);
    }

    /// A word of the guest view.
    pub(crate) fn load(&self, offset: u64) -> u64 {
        self.visit(|| self.guest.load(offset as usize))
    }

    /// Stores a word in the guest view.
    pub(crate) fn store(&self, offset: u64, value: u64) {
        self.visit(|| self.guest.store(offset as usize, value));
    }

    /// Gives memory back to the host, as a balloon does: it reads as zero from then on. Waits until a pager has read of it.
    ///
    /// # Errors
    /// [`VmError::Call`] with what madvise(2) said.
    pub(crate) fn discard(&self, offset: u64, length: u64) -> Result<(), VmError> {
        let (start, bytes) = (offset as usize, length as usize);
        match self.backing {
            Backing::Shared => {
                self.punch(offset, length).map_err(|errno| VmError::call("madvise(MADV_REMOVE)", errno))
            }
            Backing::MemoryFile => discard::map_zero_over(&self.guest, offset, length)
                .map_err(|errno| VmError::call("mmap over a discarded range", errno)),
            Backing::Private | Backing::Anonymous | Backing::Hugetlb => self
                .guest
                .dont_need(start, bytes)
                .map_err(|errno| VmError::call("madvise(MADV_DONTNEED)", errno)),
        }
    }
}

impl GuestMemory {
    /// Takes shared memory out of its file, and so out of both views.
    pub(crate) fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.guest.remove(offset as usize, length as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_memory_reads_zero_whatever_backs_it() {
        let layout = GuestLayout::new(4 << 20, false).unwrap();
        for backing in [Backing::Shared, Backing::Private, Backing::Anonymous] {
            let memory = GuestMemory::new(layout.clone(), backing, true).unwrap();
            memory.store(8192, 77);
            memory.store(12288, 78);
            memory.discard(8192, 4096).unwrap();
            assert_eq!((memory.load(8192), memory.load(12288)), (0, 78), "{backing}");
        }
    }

    #[test]
    fn the_install_view_and_the_guest_view_are_the_same_memory() {
        let memory =
            GuestMemory::new(GuestLayout::new(4 << 20, false).unwrap(), Backing::Shared, true).unwrap();
        memory.install(4096, &[1; 8]);
        assert_eq!(memory.load(4096), 0x0101_0101_0101_0101);
    }

    #[test]
    fn discarding_a_mapped_memory_file_never_shows_the_file_again() {
        let file = memfd::create("memory-file", 4 << 20).unwrap();
        Mapping::shared(file.as_fd(), 0, 4 << 20).unwrap().store(8192, 77);
        let memory = GuestMemory::from_file(GuestLayout::new(4 << 20, false).unwrap(), file.as_fd()).unwrap();
        assert_eq!(memory.load(8192), 77);
        memory.discard(8192, 4096).unwrap();
        assert_eq!(memory.load(8192), 0);
    }

    #[test]
    fn backings_go_by_name() {
        for backing in [Backing::Shared, Backing::Private, Backing::Anonymous, Backing::Hugetlb] {
            assert_eq!(backing.to_string().parse(), Ok(backing));
        }
        assert!("paper".parse::<Backing>().unwrap_err().contains("paper"));
    }
}

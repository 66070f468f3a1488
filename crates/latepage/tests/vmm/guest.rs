//! Guest memory in this process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use latepage::attachment::{Backing, Form, firecracker, native, shards};
use latepage::memory::{Layout, PageSize, Region, Shards};
use latepage::sys::mapping::{MapError, Mapping};
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};
use latepage::sys::{fdpass, memfd};

use super::{HUGE, PAGE, Running, start};

/// What a guest is made of.
pub struct Guest {
    /// What the guest sees: it faults.
    pub view: Arc<Mapping>,
    /// The VMM's own copy of the userfaultfd, of the first shard where there are several.
    pub uffd: Userfaultfd,
    /// Those of the other shards.
    pub more: Vec<Userfaultfd>,
    pub shards: Shards,
    /// The memory file, where there is one.
    pub memory: Option<OwnedFd>,
    pub backing: Backing,
    pub layout: Layout,
    pub page: usize,
}

/// What a guest is asked to be.
#[derive(Clone, Copy)]
pub struct Make {
    pub backing: Backing,
    pub pages: usize,
    /// Whether the kernel tells of discards.
    pub events: bool,
    /// Modes beside those that the backing needs.
    pub also: RegisterMode,
    /// Userfaultfds.
    pub shards: usize,
}

impl Make {
    pub fn new(backing: Backing, pages: usize) -> Self {
        Self { backing, pages, events: true, also: RegisterMode::empty(), shards: 1 }
    }

    pub fn build(self) -> Guest {
        self.try_build().unwrap()
    }

    /// Fails where the pool of huge pages is too small to map anything of it.
    pub fn try_build(self) -> Result<Guest, MapError> {
        let page = if self.backing == Backing::Hugetlb { HUGE } else { PAGE };
        let length = page * self.pages;
        let file = || memfd::create("guest", length as u64).unwrap();
        let (view, memory) = match self.backing {
            Backing::Anonymous => (Mapping::anonymous(length)?, None),
            Backing::Hugetlb => (Mapping::hugetlb_unreserved(length)?, None),
            Backing::Private => {
                let file = file();
                (Mapping::private(file.as_fd(), 0, length)?, Some(file))
            }
            Backing::Shared => {
                let file = file();
                (Mapping::shared(file.as_fd(), 0, length)?, Some(file))
            }
        };
        let mut features = Features::MISSING_SHMEM | Features::MINOR_SHMEM | Features::PAGEFAULT_FLAG_WP;
        if self.events {
            features |= Features::EVENT_REMOVE;
        }
        if self.backing == Backing::Hugetlb {
            features |= Features::MISSING_HUGETLBFS;
        }
        let minor = if memory.is_some() { RegisterMode::MINOR } else { RegisterMode::empty() };
        let layout = Layout::new(vec![Region {
            gpa: Some(0),
            hva: view.address(),
            size: length as u64,
            offset: 0,
            page_size: if page == HUGE { PageSize::Huge } else { PageSize::Small },
        }])
        .unwrap();
        let divided = Shards::equal(&layout, self.shards).unwrap();
        let mode = RegisterMode::MISSING | minor | self.also;
        let mut more = shards::create(&layout, &divided, features, mode).unwrap();
        let uffd = more.remove(0);
        Ok(Guest {
            view: Arc::new(view),
            uffd,
            more,
            shards: divided,
            memory,
            backing: self.backing,
            layout,
            page,
        })
    }
}

/// Another descriptor of the same userfaultfd.
pub fn copy_of(uffd: &Userfaultfd) -> Userfaultfd {
    Userfaultfd::from_fd(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

impl Guest {
    pub fn new(backing: Backing, pages: usize) -> Self {
        Make::new(backing, pages).build()
    }

    pub fn pages(&self) -> usize {
        self.layout.pages() as usize
    }

    pub fn address(&self, page: usize) -> u64 {
        self.view.address() + (page * self.page) as u64
    }

    /// Connects to a pager, in our form where there is a name or a memory file to tell of.
    pub fn connect(&self, socket: &Path, name: &str) -> UnixStream {
        self.connect_with(socket, name, &self.userfaultfds().collect::<Vec<_>>())
    }

    /// Its userfaultfds, one for each shard.
    pub fn userfaultfds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.uffd).chain(&self.more).map(AsFd::as_fd)
    }

    /// Connects with these for its userfaultfds.
    pub fn connect_with(&self, socket: &Path, name: &str, userfaultfds: &[BorrowedFd<'_>]) -> UnixStream {
        let introduction = native::Introduction {
            name: Some(name),
            vcpus: 2,
            backing: self.backing,
            memory: self.memory.is_some(),
            layout: &self.layout,
        };
        let mut descriptors = userfaultfds.to_vec();
        descriptors.extend(self.memory.as_ref().map(AsFd::as_fd));
        let message = match self.shards.len() {
            1 => native::message(&introduction),
            _ => native::message_with_shards(&introduction, &self.shards),
        };
        say(socket, message.as_bytes(), &descriptors)
    }

    /// Connects as Firecracker does.
    pub fn connect_as(&self, form: Form, socket: &Path, name: &str) -> UnixStream {
        match form {
            Form::Latepage => self.connect(socket, name),
            Form::Firecracker => {
                say(socket, firecracker::message(&self.layout).as_bytes(), &[self.uffd.as_fd()])
            }
        }
    }

    /// Reads the first word of a page on a thread of its own.
    pub fn touch(&self, page: usize) -> Running<u64> {
        let (view, at) = (Arc::clone(&self.view), page * self.page);
        start(move || view.load(at))
    }

    /// Writes the first word of a page on a thread of its own.
    pub fn write(&self, page: usize, value: u64) -> Running<()> {
        let (view, at) = (Arc::clone(&self.view), page * self.page);
        start(move || view.store(at, value))
    }

    /// Discards pages as a balloon does: what its backing discards by.
    pub fn discard(&self, page: usize, pages: usize) -> Running<()> {
        let (view, at, length) = (Arc::clone(&self.view), page * self.page, pages * self.page);
        let shared = self.backing == Backing::Shared;
        start(move || if shared { view.remove(at, length) } else { view.dont_need(at, length) }.unwrap())
    }

    /// A whole page, as the guest sees it.
    pub fn read(&self, page: usize) -> Running<Vec<u8>> {
        let (view, at, length) = (Arc::clone(&self.view), page * self.page, self.page);
        start(move || {
            let mut bytes = vec![0; length];
            view.read(at, &mut bytes);
            bytes
        })
    }

    /// Reads all pages, on a thread of its own, in an order that `stride` (odd, no divisor of the count) makes, and returns
    /// those whose first or last word is not what `expected` says for its offset.
    pub fn verify(
        &self,
        stride: usize,
        expected: impl Fn(u64) -> u64 + Send + 'static,
    ) -> Running<Vec<usize>> {
        let (view, pages, bytes) = (Arc::clone(&self.view), self.pages(), self.page);
        start(move || {
            let wrong = |page: &usize| {
                let ends = [page * bytes, (page + 1) * bytes - 8];
                ends.into_iter().any(|at| view.load(at) != expected(at as u64))
            };
            (0..pages).map(|turn| turn * stride % pages).filter(wrong).collect()
        })
    }
}

/// Connects and sends one message.
pub fn say(socket: &Path, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    let sent = fdpass::send(&stream, bytes, descriptors).unwrap();
    assert_eq!(sent, bytes.len());
    stream
}

//! A pager of sixty lines, so that the VMM is tested by itself: one thread, one VM, one page at a time.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use latepage::attachment::{Fed, Hello, Incoming};
use latepage::sys::fdpass;
use latepage::sys::mapping::Mapping;
use latepage::sys::uffd::{InstallMode, Message, MessageBuffer, Userfaultfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// What the pager does when pages are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    Serve,
    /// Serves nothing until it is told to.
    Hold,
    /// Serves the system area, and poisons all else.
    Poison,
}

pub(crate) struct TinyPager {
    pub(crate) socket: PathBuf,
    pub(crate) go: mpsc::Sender<()>,
    thread: JoinHandle<Hello>,
}

impl TinyPager {
    pub(crate) fn start(directory: &Path, memory_file: &Path, manner: Manner) -> Self {
        let socket = directory.join("pager.sock");
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let contents = fs::read(memory_file).unwrap();
        let (go, wait) = mpsc::channel();
        Self { socket, go, thread: thread::spawn(move || serve(&listener, &contents, manner, &wait)) }
    }

    /// The handshake that came, once the VM is gone.
    pub(crate) fn end(self) -> Hello {
        self.thread.join().unwrap()
    }
}

fn serve(listener: &UnixListener, contents: &[u8], manner: Manner, wait: &mpsc::Receiver<()>) -> Hello {
    let (socket, _) = listener.accept().unwrap();
    let mut incoming = Incoming::new();
    let hello = loop {
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
        let mut buffer = [0; 4096];
        let received = fdpass::receive(&socket, &mut buffer).unwrap();
        match incoming.feed(&buffer[..received.bytes], received.descriptors) {
            Fed::More => {}
            Fed::Done(hello) => break hello,
            Fed::Refused(refusal) => panic!("{:?}", refusal.reason),
        }
    };
    if manner == Manner::Hold {
        wait.recv().unwrap();
    }
    let install =
        hello.memory.as_ref().map(|memory| Mapping::shared(memory.as_fd(), 0, contents.len()).unwrap());
    let (mut removed, mut parked, mut buffer) = (BTreeSet::new(), BTreeSet::new(), MessageBuffer::new(64));
    loop {
        let mut set = [PollFd::new(uffd(&hello), PollFlags::IN), PollFd::new(&socket, PollFlags::IN)];
        let timeout = (!parked.is_empty()).then_some(Timespec { tv_sec: 0, tv_nsec: 1_000_000 });
        poll(&mut set, timeout.as_ref()).unwrap();
        if !set[1].revents().is_empty() {
            return hello;
        }
        uffd(&hello).read(&mut buffer).unwrap();
        for message in buffer.drain() {
            match message {
                Message::PageFault { address, .. } => {
                    parked.insert(hello.layout.find_hva(address).unwrap());
                }
                Message::Remove { start, end } => {
                    hello.layout.pages_in_hva(start, end).for_each(|run| removed.extend(run))
                }
                other => panic!("{other:?}"),
            }
        }
        parked.retain(|page| {
            !resolve(&hello, contents, install.as_ref(), manner, *page, removed.contains(page))
        });
    }
}

fn uffd(hello: &Hello) -> &Userfaultfd {
    hello.userfaultfds.first().expect("a VM of these tests sends one")
}

/// Whether the page is there now.
fn resolve(
    hello: &Hello,
    contents: &[u8],
    install: Option<&Mapping>,
    manner: Manner,
    page: u32,
    removed: bool,
) -> bool {
    let place = hello.layout.place(page);
    let bytes = place.page_size.bytes() as usize;
    let snapshot = &contents[place.offset as usize..][..bytes];
    let zeros = vec![0; bytes];
    let mode = InstallMode::empty();
    let installed = match install {
        _ if manner == Manner::Poison && place.offset >= 2 << 20 => {
            uffd(hello).poison(place.hva, bytes as u64, mode)
        }
        Some(install) if !removed => {
            install.write(place.offset as usize, snapshot);
            uffd(hello).continue_(place.hva, bytes as u64, mode)
        }
        _ => uffd(hello).copy(place.hva, if removed { &zeros } else { snapshot }, mode),
    };
    match installed.stopped {
        None => true,
        Some(Errno::EXIST) => {
            uffd(hello).wake(place.hva, bytes as u64).unwrap();
            true
        }
        Some(Errno::AGAIN) => false,
        Some(other) => panic!("page {page}: {other}"),
    }
}

//! Memory that a pager brings: our userfaultfds, the handshake, and the socket that stays open for as long as the VM lives.
//!
//! In Firecracker's form all is as Firecracker does it: EVENT_REMOVE and no other feature, MISSING registration, one message with
//! one descriptor, no reply. In ours a memory file may go with it; then pages are also reported that are in it but not
//! mapped yet (MINOR), and the pager fills them through its own view.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use latepage::attachment::{Form, firecracker, native, shards};
use latepage::memory::{Layout, PageSize, Region};
use latepage::sys::fdpass;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};

use crate::control::Control;
use crate::error::VmError;
use crate::event::Event;
use crate::memory::{Backing, GuestMemory};
use crate::shards::{Divided, Room, ShardCount, divide};

/// What is needed to attach a VM to a pager.
#[derive(Clone, Debug)]
pub(crate) struct Attach<'a> {
    pub(crate) socket: &'a Path,
    pub(crate) form: Form,
    /// Whether the memory file goes with the handshake.
    pub(crate) send_memory: bool,
    pub(crate) shards: Option<ShardCount>,
    pub(crate) name: &'a str,
    pub(crate) vcpus: u32,
    /// For userfaultfds.
    pub(crate) room: Room,
}

/// The VM's end of its life with a pager. Our userfaultfds are second references to what the pager got: were the pager's the
/// last ones, its death would let every waiting vCPU through to pages of zeros.
#[derive(Debug)]
pub(crate) struct PagerLink {
    userfaultfds: Vec<Userfaultfd>,
    shards_note: Option<String>,
    socket: UnixStream,
    path: PathBuf,
    form: Form,
    leaving: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl PagerLink {
    /// Registers all of `memory`, connects and introduces the VM. From then on every touch of it may wait for the pager.
    pub(crate) fn attach(memory: &GuestMemory, attach: &Attach<'_>) -> Result<Self, VmError> {
        let layout = describe(memory)?;
        let memfd = memory.memfd().filter(|_| attach.send_memory);
        let (features, mode) = match memfd {
            Some(_) => {
                (Features::EVENT_REMOVE | Features::MINOR_SHMEM, RegisterMode::MISSING | RegisterMode::MINOR)
            }
            None => (Features::EVENT_REMOVE, RegisterMode::MISSING),
        };
        let Divided { shards, note } =
            divide(attach.shards, attach.form, attach.vcpus, &layout, attach.room)?;
        let userfaultfds = shards::create(&layout, &shards, features, mode)?;
        let failed = |source| VmError::Pager { path: attach.socket.to_path_buf(), source };
        let socket = UnixStream::connect(attach.socket).map_err(failed)?;
        let message = match attach.form {
            Form::Firecracker => firecracker::message(&layout),
            Form::Latepage => {
                let introduction = native::Introduction {
                    name: Some(attach.name),
                    vcpus: attach.vcpus,
                    backing: announced(memory.backing()),
                    memory: memfd.is_some(),
                    layout: &layout,
                };
                // Whoever knows nothing of shards takes a VM that has one.
                match shards.len() {
                    1 => native::message(&introduction),
                    _ => native::message_with_shards(&introduction, &shards),
                }
            }
        };
        let descriptors: Vec<_> = userfaultfds.iter().map(AsFd::as_fd).chain(memfd).collect();
        let sent =
            fdpass::send(&socket, message.as_bytes(), &descriptors).map_err(|errno| failed(errno.into()))?;
        if sent < message.len() {
            return Err(failed(io::Error::new(
                io::ErrorKind::WriteZero,
                "the handshake did not fit into the socket's buffer",
            )));
        }
        Ok(Self {
            userfaultfds,
            shards_note: note,
            socket,
            path: attach.socket.to_path_buf(),
            form: attach.form,
            leaving: Arc::default(),
            watcher: None,
        })
    }

    /// Tells `control` when the pager goes away: the VM then lives only on the memory that it has.
    pub(crate) fn watch(&mut self, control: &Arc<Control>) -> Result<(), VmError> {
        let failed = |source| VmError::Pager { path: self.path.clone(), source };
        let mut socket = self.socket.try_clone().map_err(failed)?;
        let (control, leaving) = (Arc::clone(control), Arc::clone(&self.leaving));
        let watcher = thread::Builder::new().name("pager-watch".into()).spawn(move || {
            let mut said = Vec::new();
            let _ = Read::by_ref(&mut socket).take(4096).read_to_end(&mut said);
            if !leaving.load(Ordering::Acquire) {
                let said = String::from_utf8_lossy(&said).trim().to_owned();
                control.events.push(Event::PagerGone { said, ns: control.now() });
            }
        });
        self.watcher = Some(watcher.map_err(failed)?);
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// How many shards the memory has, and what was done instead of what was asked for.
    pub(crate) fn shards(&self) -> (usize, Option<String>) {
        (self.userfaultfds.len(), self.shards_note.clone())
    }
}

impl Drop for PagerLink {
    fn drop(&mut self) {
        self.leaving.store(true, Ordering::Release);
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

/// The layout as the pager knows it: with our host-virtual addresses.
pub(crate) fn describe(memory: &GuestMemory) -> Result<Layout, VmError> {
    let page_size = if memory.backing() == Backing::Hugetlb { PageSize::Huge } else { PageSize::Small };
    let regions = memory.layout().regions().iter();
    let regions = regions.map(|region| Region {
        gpa: Some(region.gpa),
        hva: memory.hva() + region.offset,
        size: region.size,
        offset: region.offset,
        page_size,
    });
    Layout::new(regions.collect())
        .map_err(|error| VmError::Config(format!("this memory cannot be handed to a pager: {error}")))
}

fn announced(backing: Backing) -> latepage::attachment::Backing {
    match backing {
        Backing::Shared => latepage::attachment::Backing::Shared,
        Backing::Private | Backing::MemoryFile => latepage::attachment::Backing::Private,
        Backing::Anonymous => latepage::attachment::Backing::Anonymous,
        Backing::Hugetlb => latepage::attachment::Backing::Hugetlb,
    }
}

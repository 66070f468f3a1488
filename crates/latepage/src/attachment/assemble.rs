//! Document and descriptors, put together.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::OFlags;

use crate::delivery::channel;
use crate::install::PageBitmap;
use crate::memory::{Layout, PageTable};
use crate::sys::uffd::Userfaultfd;

use super::places::{BITMAP, CHANNEL, EVENTFD, MEMORY, PAGES, Places};
use super::refusal::{RefusalReason, one_line};
use super::{Notify, native};

/// What the descriptors of a handshake are, checked.
pub(super) struct Parts {
    /// In the order of the shards.
    pub(super) userfaultfds: Vec<Userfaultfd>,
    pub(super) memory: Option<OwnedFd>,
    pub(super) notify: Option<Notify>,
}

/// Takes what a handshake needs from its descriptors, of which there are as many as it needs. What is refused stays there, since a
/// userfaultfd among them must not be closed.
pub(super) fn put_together(
    descriptors: &mut Vec<OwnedFd>,
    places: &Places,
    layout: &Layout,
    vcpus: u32,
) -> Result<Parts, RefusalReason> {
    let at = |kind| places.of(kind).map(|place| &descriptors[place]);
    if let Some(memory) = at(MEMORY) {
        native::check_memory(memory, layout)?;
    }
    let bitmap = at(BITMAP).map(|bitmap| PageBitmap::map(bitmap, layout)).transpose()?;
    let pages = at(PAGES).map(|pages| PageTable::map(pages, layout)).transpose()?;
    check_userfaultfds(descriptors, places.userfaultfds())?;
    // Last of all: a channel counts its readers, those that are refused afterwards too.
    let notify = match (at(CHANNEL), at(EVENTFD)) {
        (Some(memory), Some(eventfd)) => {
            let bell = eventfd.try_clone().map_err(|error| RefusalReason::Copy(error.to_string()))?;
            let reader = channel::attach(memory.as_fd(), bell, layout.pages(), vcpus)?;
            if reader.generation() != 1 && pages.is_none() {
                return Err(RefusalReason::NoPages);
            }
            Some(Notify { reader, bitmap, pages })
        }
        _ => None,
    };
    let mut all: Vec<Option<OwnedFd>> = descriptors.drain(..).map(Some).collect();
    let memory = places.of(MEMORY).and_then(|place| all[place].take());
    let userfaultfds = places.userfaultfds().iter().filter_map(|place| {
        // They were looked at just now.
        all[*place].take().and_then(|descriptor| Userfaultfd::from_fd(descriptor).ok())
    });
    Ok(Parts { userfaultfds: userfaultfds.collect(), memory, notify })
}

/// Each must be one, that is set up and can be polled, and another one than those before: two readers of one would take each other's events.
fn check_userfaultfds(descriptors: &[OwnedFd], positions: &[usize]) -> Result<(), RefusalReason> {
    let mut seen: Vec<(u64, usize)> = Vec::with_capacity(positions.len());
    for position in positions {
        check_userfaultfd(&descriptors[*position], *position)?;
        // Each has an inode of its own (Linux 5.12 and later).
        let Ok(inode) = rustix::fs::fstat(&descriptors[*position]).map(|stat| stat.st_ino) else { continue };
        if let Some((_, first)) = seen.iter().find(|(other, _)| *other == inode) {
            return Err(RefusalReason::SameUserfaultfd { first: *first, second: *position });
        }
        seen.push((inode, *position));
    }
    Ok(())
}

fn check_userfaultfd(descriptor: &OwnedFd, position: usize) -> Result<(), RefusalReason> {
    let what = describe(descriptor);
    if what != "anon_inode:[userfaultfd]" {
        return Err(RefusalReason::NotUserfaultfd { position, what });
    }
    if !rustix::fs::fcntl_getfl(descriptor).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK)) {
        return Err(RefusalReason::Blocking { position });
    }
    if Userfaultfd::descriptor_polls_an_error(descriptor.as_fd()) {
        return Err(RefusalReason::NotSetUp { position });
    }
    Ok(())
}

/// What a descriptor is, for people: a path, `socket:[123]`, `anon_inode:[eventpoll]`.
fn describe(fd: &OwnedFd) -> String {
    match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(link) => one_line(&link.to_string_lossy()),
        Err(_) => "unknown".to_owned(),
    }
}

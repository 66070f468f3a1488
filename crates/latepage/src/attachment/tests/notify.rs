//! The delivery `notify`: a channel, its eventfd, the memory, and what may come with them.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use serde_json::{Value, json};

use super::super::native::{self, BesideChannel};
use super::super::{Backing, Hello, RefusalReason};
use super::{file, hello, refusal, sealed, userfaultfd};
use crate::delivery::channel::Channel;
use crate::install::PageBitmap;
use crate::memory::{Layout, PageSize, PageTable, Region};
use crate::sys::memfd;

const PAGES: u32 = 256;
const SIZE: u64 = PAGES as u64 * 4096;

fn document(descriptors: &[&str]) -> Value {
    json!({
        "version": 1, "delivery": "notify", "vcpus": 2, "descriptors": descriptors,
        "regions": [{"gpa": 0, "hva": 0x7f00_0000_0000_u64, "size": SIZE, "offset": 0, "page_size": 4096}],
    })
}

fn layout() -> Layout {
    let hva = 0x7f00_0000_0000;
    Layout::new(vec![Region { gpa: Some(0), hva, size: SIZE, offset: 0, page_size: PageSize::Small }])
        .unwrap()
}

/// A channel of so many slots and pages, as it is sent.
fn channel(slots: u32, pages: u32) -> [OwnedFd; 2] {
    let channel = Channel::new(slots, pages).unwrap();
    let (memory, bell) = channel.descriptors();
    [memory.try_clone_to_owned().unwrap(), bell.try_clone_to_owned().unwrap()]
}

fn three() -> Vec<OwnedFd> {
    let [memory, bell] = channel(2, PAGES);
    vec![memory, bell, sealed(SIZE)]
}

const THREE: [&str; 3] = ["channel", "eventfd", "memory"];

#[test]
fn a_channel_needs_no_userfaultfd_and_may_have_one_beside_it() {
    let Hello { notify, userfaultfds: none, memory, backing, .. } =
        hello(&document(&THREE).to_string(), three());
    let notify = notify.unwrap();
    assert!(none.is_empty() && memory.is_some() && notify.bitmap.is_none());
    assert_eq!((backing, notify.reader.shape().pages()), (Backing::Shared, PAGES));

    let Some(descriptor) = userfaultfd() else { return };
    let [memory, bell] = channel(3, PAGES);
    let bitmap = PageBitmap::create(&layout()).unwrap();
    let names = ["userfaultfd", "bitmap", "memory", "eventfd", "channel"];
    let sent = vec![descriptor, bitmap, sealed(SIZE), bell, memory];
    let Hello { notify, userfaultfds, .. } = hello(&document(&names).to_string(), sent);
    assert!(userfaultfds.len() == 1 && notify.unwrap().bitmap.is_some());
}

#[test]
fn what_is_sent_with_a_channel_is_understood() {
    let layout = layout();
    let introduction = native::Introduction {
        name: Some("vm"),
        vcpus: 2,
        backing: Backing::Shared,
        memory: true,
        layout: &layout,
    };
    for beside in 0..8 {
        let [bitmap, pages, also] = [1, 2, 4].map(|bit| beside & bit != 0);
        let mut sent = three();
        sent.extend(bitmap.then(|| PageBitmap::create(&layout).unwrap()));
        sent.extend(pages.then(|| PageTable::create(&layout).unwrap()));
        if also {
            let Some(descriptor) = userfaultfd() else { return };
            sent.push(descriptor);
        }
        let beside = BesideChannel { bitmap, pages, userfaultfd: also };
        let hello = hello(&native::message_with_channel(&introduction, beside), sent);
        assert_eq!((hello.layout, !hello.userfaultfds.is_empty()), (layout.clone(), also));
        let notify = hello.notify.unwrap();
        assert_eq!((notify.bitmap.is_some(), notify.pages.is_some()), (bitmap, pages));
    }
}

/// Why this is refused.
fn refused(names: &[&str], sent: Vec<OwnedFd>) -> String {
    refusal(&document(names).to_string(), sent).reason.to_string()
}

#[test]
fn descriptors_that_do_not_go_with_a_channel_are_refused_by_name() {
    for (names, says) in [
        (&["channel", "memory"][..], "there must be \"channel\", \"eventfd\" and \"memory\""),
        (&["channel", "eventfd"], "there must be \"channel\", \"eventfd\" and \"memory\""),
        (&["eventfd", "memory"], "there must be \"channel\", \"eventfd\" and \"memory\""),
        (&["userfaultfd"], "there must be \"channel\", \"eventfd\" and \"memory\""),
        (&["channel", "channel", "memory"], "no other twice"),
        (&["channel", "eventfd", "memory", "ring"], "descriptors \"ring\" is not known"),
    ] {
        let text = refused(names, vec![file()]);
        assert!(text.contains(says), "{text}");
    }
    let mut private = document(&THREE);
    private["backing"] = json!("private");
    let text = refusal(&private.to_string(), three()).reason.to_string();
    assert!(
        text.starts_with("handshake: backing \"private\" does not go with delivery \"notify\""),
        "{text}"
    );
}

#[test]
fn a_channel_that_cannot_be_used_is_refused_with_its_reason() {
    let with = |memory, bell| vec![memory, bell, sealed(SIZE)];
    let [small, bell] = channel(1, PAGES);
    let text = refused(&THREE, with(small, bell));
    assert_eq!(text, "the channel descriptor: it has 1 slots for 2 vCPUs: each needs one of its own");
    let [other, bell] = channel(2, PAGES - 1);
    let text = refused(&THREE, with(other, bell));
    assert_eq!(text, "the channel descriptor: it is a channel for 255 pages and the regions have 256");
    let [_, bell] = channel(2, PAGES);
    let text = refused(&THREE, with(memfd::create("unsealed", 4096).unwrap(), bell));
    assert!(text.starts_with("the channel descriptor: its length can still change"), "{text}");
    let [_, bell] = channel(2, PAGES);
    let text = refused(&THREE, with(memfd::create_fixed("empty", 4096).unwrap(), bell));
    assert!(text.contains("does not begin with \"latechan\""), "{text}");
    let [memory, _] = channel(2, PAGES);
    assert_eq!(
        refused(&THREE, with(memory, file())),
        "the channel descriptor: its eventfd is /dev/null, no eventfd"
    );
}

#[test]
fn a_bitmap_that_is_too_small_or_unsealed_is_refused() {
    let names = ["channel", "eventfd", "memory", "bitmap"];
    let with = |bitmap| three().into_iter().chain([bitmap]).collect();
    let text = refused(&names, with(memfd::create_fixed("small", 24).unwrap()));
    assert_eq!(text, "the bitmap descriptor: it has 24 bytes and must have 32");
    let text = refused(&names, with(memfd::create("unsealed", 32).unwrap()));
    assert!(text.starts_with("the bitmap descriptor: its length can still change"), "{text}");
    let text = refused(&names, with(read_only(32)));
    assert!(text.starts_with("the bitmap descriptor: it cannot be written"), "{text}");
    let text = refused(&names, with(file()));
    assert!(text.starts_with("the bitmap descriptor: it is no memory file"), "{text}");
}

/// Sealed as it must be, and open for reading alone.
fn read_only(bytes: u64) -> OwnedFd {
    let file = memfd::create_fixed("read-only", bytes).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::File::open(path).unwrap().into()
}

#[test]
fn a_page_table_of_another_length_or_one_that_cannot_be_kept_is_refused() {
    let names = ["channel", "eventfd", "memory", "pages"];
    let with = |pages| three().into_iter().chain([pages]).collect();
    for bytes in [PAGES - 1, PAGES + 1, 0] {
        let text = refused(&names, with(memfd::create_fixed("other", bytes.into()).unwrap()));
        assert_eq!(text, format!("the pages descriptor: it has {bytes} bytes and must have 256"));
    }
    let text = refused(&names, with(memfd::create("unsealed", PAGES.into()).unwrap()));
    assert!(text.starts_with("the pages descriptor: its length can still change"), "{text}");
    let text = refused(&names, with(read_only(PAGES.into())));
    assert!(text.starts_with("the pages descriptor: it cannot be written"), "{text}");
    let text = refused(&names, with(file()));
    assert!(text.starts_with("the pages descriptor: it is no memory file"), "{text}");
    // A VM that has no channel has no pager that could be followed.
    let uffd = json!({
        "version": 1, "delivery": "uffd", "descriptors": ["userfaultfd", "pages"],
        "regions": [{"hva": 0x7f00_0000_0000_u64, "size": SIZE, "offset": 0, "page_size": 4096}],
    });
    let text = refusal(&uffd.to_string(), vec![file(), file()]).reason.to_string();
    assert!(text.starts_with("handshake: descriptors \"pages\" is not known"), "{text}");
}

#[test]
fn a_channel_of_another_version_is_refused() {
    let [memory, bell] = channel(2, PAGES);
    // The low half of the second word.
    rustix::io::pwrite(&memory, &2_u32.to_le_bytes(), 8).unwrap();
    let text = refused(&THREE, vec![memory, bell, sealed(SIZE)]);
    assert_eq!(text, "the channel descriptor: it is a channel of version 2; this side speaks version 1");
}

#[test]
fn a_second_pager_is_refused_while_the_first_lives_and_not_afterwards() {
    let channel = Channel::new(2, PAGES).unwrap();
    let sent = || {
        let (memory, bell) = channel.descriptors();
        vec![memory.try_clone_to_owned().unwrap(), bell.as_fd().try_clone_to_owned().unwrap(), sealed(SIZE)]
    };
    let first = hello(&document(&THREE).to_string(), sent());
    let text = refused(&THREE, sent());
    assert_eq!(text, "the channel descriptor: another reader has it: a channel has one at a time");
    drop(first);
    // What the first has filled, it has told nobody.
    let text = refused(&THREE, sent());
    assert!(text.starts_with("the channel has had a reader before"), "{text}");
    let names = ["channel", "eventfd", "memory", "pages"];
    let told = sent().into_iter().chain([PageTable::create(&layout()).unwrap()]).collect();
    let second = hello(&document(&names).to_string(), told).notify.unwrap();
    assert!(second.reader.generation() > 1 && second.pages.is_some());
}

#[test]
fn a_userfaultfd_that_came_with_a_channel_is_kept_whatever_is_wrong() {
    let Some(descriptor) = userfaultfd() else { return };
    let names = ["channel", "eventfd", "memory", "userfaultfd"];
    let [_, bell] = channel(2, PAGES);
    let sent = vec![memfd::create_fixed("empty", 4096).unwrap(), bell, sealed(SIZE), descriptor];
    let refused = refusal(&document(&names).to_string(), sent);
    assert!(matches!(refused.reason, RefusalReason::Channel(_)));
    assert_eq!((refused.userfaultfds.len(), refused.layout.is_some()), (1, true));
}

//! Several userfaultfds, each over a shard of the memory.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use serde_json::{Value, json};

use super::super::{Fed, Incoming, Refusal, RefusalReason, shards};
use super::{feed, file, hello, refusal, sealed, userfaultfd};
use crate::memory::{Layout, PageSize, Region, Shards};
use crate::sys::mapping::Mapping;
use crate::sys::uffd::{Features, RegisterMode, Userfaultfd};

const SIZE: u64 = 1 << 20;

fn document(userfaultfds: usize, sizes: Value) -> Value {
    json!({
        "version": 1, "delivery": "uffd", "descriptors": vec!["userfaultfd"; userfaultfds], "shards": sizes,
        "regions": [{"hva": 0x7f00_0000_0000_u64, "size": SIZE, "offset": 0, "page_size": 4096}],
    })
}

/// So many userfaultfds, or `None` with the reason printed.
fn several(count: usize) -> Option<Vec<OwnedFd>> {
    (0..count).map(|_| userfaultfd()).collect()
}

/// A refusal of shards, of which every userfaultfd is kept.
fn refused(document: &Value, descriptors: Vec<OwnedFd>) -> String {
    let sent = descriptors.len();
    let Refusal { reason, userfaultfds, layout } = refusal(&document.to_string(), descriptors);
    assert_eq!(userfaultfds.len(), sent, "{reason}");
    assert!(layout.is_some(), "{reason}");
    reason.to_string()
}

#[test]
fn each_userfaultfd_has_its_shard_in_the_order_in_which_they_were_announced() {
    let Some(mut sent) = several(3) else { return };
    let numbers: Vec<i32> = sent.iter().map(AsRawFd::as_raw_fd).collect();
    let mut document = document(3, json!([4096, 8192, SIZE - 12288]));
    document["descriptors"] = json!(["userfaultfd", "memory", "userfaultfd", "userfaultfd"]);
    sent.insert(1, sealed(SIZE));
    let hello = hello(&document.to_string(), sent);
    assert_eq!(hello.userfaultfds.iter().map(|one| one.as_fd().as_raw_fd()).collect::<Vec<_>>(), numbers);
    assert_eq!([0, 1, 2].map(|shard| hello.shards.pages(shard)), [0..1, 1..3, 3..256]);
    assert!(hello.memory.is_some());
}

#[test]
fn a_vm_with_one_userfaultfd_may_say_so_or_leave_it_out() {
    let Some(sent) = several(1) else { return };
    assert_eq!(hello(&document(1, json!([SIZE])).to_string(), sent).shards.len(), 1);
    let mut without = document(1, json!(null));
    without.as_object_mut().unwrap().remove("shards");
    assert_eq!(hello(&without.to_string(), several(1).unwrap()).shards.len(), 1);
}

#[test]
fn shards_without_a_userfaultfd_and_userfaultfds_without_a_shard_are_refused() {
    let Some(sent) = several(2) else { return };
    let rule =
        "\"shards\" has the size of each userfaultfd's part of the regions, in the order of \"descriptors\"";
    let half = SIZE / 2;
    assert_eq!(
        refused(&document(2, json!([half, half / 2, half / 2])), sent),
        format!("handshake: 3 shards and 2 userfaultfds: {rule}")
    );
    let three = several(3).unwrap();
    assert_eq!(
        refused(&document(3, json!([half, half])), three),
        format!("handshake: 2 shards and 3 userfaultfds: {rule}")
    );
    let mut without = document(2, json!([]));
    without.as_object_mut().unwrap().remove("shards");
    assert_eq!(
        refused(&without, several(2).unwrap()),
        format!("handshake: 0 shards and 2 userfaultfds: {rule}")
    );
}

#[test]
fn shards_that_are_no_division_of_the_regions_are_refused_by_what_is_wrong() {
    let Some(sent) = several(2) else { return };
    let half = SIZE / 2;
    assert_eq!(
        refused(&document(2, json!([half, half - 4096])), sent),
        "handshake: shards: the shards end 0xff000 bytes into the regions, which have 0x100000: the rest is no userfaultfd's"
    );
    for (sizes, says) in [
        (json!([half, half + 4096]), "shard 1 goes beyond the regions"),
        (json!([half, u64::MAX]), "shard 1 goes beyond the regions"),
        (json!([0, SIZE]), "shard 0 has size 0"),
        (json!([half + 1, half - 1]), "shard 0 ends 0x80001 bytes into the regions, inside a page (4 KiB)"),
    ] {
        let text = refused(&document(2, sizes), several(2).unwrap());
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn more_shards_than_pages_or_than_there_may_be_are_refused() {
    let Some(sent) = several(3) else { return };
    let mut small = document(3, json!([4096, 4096, 4096]));
    small["regions"][0]["size"] = json!(8192);
    assert!(refused(&small, sent).contains("shard 2 goes beyond the regions, which have 0x2000 bytes"));
    let many = vec![4096; 65];
    let text = refused(&document(65, json!(many)), several(65).unwrap());
    assert!(text.contains("one for each of \"shards\" (64 at most)"), "{text}");
    let last = SIZE - 63 * 4096;
    let sizes: Vec<u64> = std::iter::repeat_n(4096, 63).chain([last]).collect();
    assert_eq!(hello(&document(64, json!(sizes)).to_string(), several(64).unwrap()).userfaultfds.len(), 64);
}

#[test]
fn the_same_userfaultfd_for_two_shards_is_refused() {
    let Some(mut sent) = several(2) else { return };
    sent.push(sent[0].try_clone().unwrap());
    let third = SIZE / 4;
    assert_eq!(
        refused(&document(3, json!([third, third, 2 * third])), sent),
        "descriptors 0 and 2 are the same userfaultfd: make one for each shard"
    );
}

#[test]
fn a_userfaultfd_that_was_never_set_up_is_refused_by_its_place_and_the_good_ones_are_kept() {
    let Some(mut sent) = several(2) else { return };
    let unset = Userfaultfd::open_by_device().or_else(|_| Userfaultfd::open_by_syscall()).unwrap();
    sent.insert(1, OwnedFd::from(unset));
    let third = SIZE / 4;
    assert_eq!(
        refused(&document(3, json!([third, third, 2 * third])), sent),
        "descriptor 1 is a userfaultfd that was never set up: call UFFDIO_API on it, and register its memory, before \
         sending it"
    );
}

#[test]
fn a_shard_whose_userfaultfd_did_not_come_is_refused_and_the_others_are_kept() {
    let Some(sent) = several(2) else { return };
    let text = document(3, json!([4096, 4096, SIZE - 8192])).to_string();
    let begun = |sent| {
        let mut incoming = Incoming::new();
        assert!(matches!(incoming.feed(text.as_bytes(), sent), Fed::More));
        incoming
    };
    for refusal in [begun(sent).closed(), begun(several(2).unwrap()).timed_out()] {
        assert_eq!(refusal.reason.to_string(), "latepage handshake with 2 descriptors; it needs 3");
        assert_eq!(refusal.userfaultfds.len(), 2);
    }
    // Something else in its place.
    let mut sent = several(2).unwrap();
    sent.push(file());
    let Fed::Refused(refusal) = feed(&text, sent) else { panic!() };
    assert!(matches!(refusal.reason, RefusalReason::NotUserfaultfd { position: 2, .. }));
    assert_eq!(refusal.userfaultfds.len(), 2);
}

#[test]
fn a_vm_with_a_channel_has_no_shards() {
    let mut notify = document(1, json!([SIZE]));
    notify["delivery"] = json!("notify");
    notify["descriptors"] = json!(["channel", "eventfd", "memory"]);
    let Fed::Refused(refusal) = feed(&notify.to_string(), vec![file(), file(), file()]) else { panic!() };
    assert_eq!(
        refusal.reason.to_string(),
        "handshake: shards with delivery \"notify\" is not known; only \"uffd\" has them"
    );
}

#[test]
fn a_vmm_gets_a_userfaultfd_for_each_shard_of_its_memory() {
    if userfaultfd().is_none() {
        return;
    }
    let memory = Mapping::anonymous(10 * 4096).unwrap();
    let hva = memory.address();
    let region = |hva, pages: u64, offset| Region {
        gpa: None,
        hva,
        size: pages * 4096,
        offset,
        page_size: PageSize::Small,
    };
    // A gap of two pages between the regions.
    let layout = Layout::new(vec![region(hva, 3, 0), region(hva + 5 * 4096, 5, 3 * 4096)]).unwrap();
    let divided = Shards::equal(&layout, 4).unwrap();
    let made = shards::create(&layout, &divided, Features::empty(), RegisterMode::MISSING).unwrap();
    assert_eq!(made.len(), 4);
    // Each over its own, and nobody over the gap: only what is registered takes a zero page.
    for (shard, userfaultfd) in made.iter().enumerate() {
        for (address, length) in divided.ranges(&layout, shard) {
            assert_eq!(
                userfaultfd.zeropage(address, length, crate::sys::uffd::InstallMode::empty()).stopped,
                None
            );
        }
    }
    let gap = made[0].zeropage(hva + 3 * 4096, 4096, crate::sys::uffd::InstallMode::empty());
    assert_eq!(gap.stopped, Some(rustix::io::Errno::NOENT));
    // Another userfaultfd has it already.
    let again = shards::create(&layout, &divided, Features::empty(), RegisterMode::MISSING).unwrap_err();
    assert!(again.to_string().starts_with("shard 0: UFFDIO_REGISTER at "), "{again}");
}

//! Our own form.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use serde_json::{Value, json};

use super::super::{Backing, Fed, Form, Incoming, RefusalReason, native};
use super::{file, hello, refusal, refused, sealed, userfaultfd};
use crate::memory::{Layout, PageSize, Region};

const SIZE: u64 = 1 << 20;

fn document() -> Value {
    json!({
        "version": 1, "delivery": "uffd", "vcpus": 2, "name": "vm-7", "descriptors": ["userfaultfd"],
        "regions": [{"gpa": 0, "hva": 0x7f00_0000_0000_u64, "size": SIZE, "offset": 0, "page_size": 4096}],
    })
}

fn with(key: &str, value: Value) -> String {
    let mut document = document();
    document[key] = value;
    document.to_string()
}

fn without(key: &str) -> String {
    let mut document = document();
    document.as_object_mut().unwrap().remove(key);
    document.to_string()
}

fn both() -> Value {
    json!(["userfaultfd", "memory"])
}

#[test]
fn a_whole_handshake_is_understood() {
    let Some(descriptor) = userfaultfd() else { return };
    let number = descriptor.as_raw_fd();
    let hello = hello(&with("descriptors", both()), vec![descriptor, sealed(SIZE)]);
    assert_eq!((hello.form, hello.name.as_deref(), hello.vcpus), (Form::Latepage, Some("vm-7"), 2));
    assert_eq!(hello.backing, Backing::Shared);
    assert_eq!(hello.userfaultfds[0].as_fd().as_raw_fd(), number);
    assert_eq!(rustix::fs::fstat(hello.memory.unwrap()).unwrap().st_size as u64, SIZE);
    assert_eq!(hello.layout.regions()[0].gpa, Some(0));
}

#[test]
fn the_descriptors_come_in_the_order_that_was_announced() {
    let Some(descriptor) = userfaultfd() else { return };
    let reversed = with("descriptors", json!(["memory", "userfaultfd"]));
    assert!(hello(&reversed, vec![sealed(SIZE), descriptor]).memory.is_some());
    let swapped = refusal(&reversed, vec![userfaultfd().unwrap(), sealed(SIZE)]);
    assert!(matches!(swapped.reason, RefusalReason::Memory(_)), "{}", swapped.reason);
    assert_eq!(swapped.userfaultfds.len(), 1);
}

#[test]
fn what_may_be_left_out_has_its_default() {
    let Some(descriptor) = userfaultfd() else { return };
    let mut document = document();
    let keys = document.as_object_mut().unwrap();
    keys.remove("name");
    keys.remove("vcpus");
    keys["regions"][0].as_object_mut().unwrap().remove("gpa");
    let hello = hello(&document.to_string(), vec![descriptor]);
    assert_eq!((hello.name, hello.vcpus, hello.backing), (None, 1, Backing::Anonymous));
    assert_eq!(hello.layout.regions()[0].gpa, None);
}

#[test]
fn what_may_not_be_left_out_is_named() {
    for key in ["version", "delivery", "descriptors", "regions"] {
        let text = refused(&without(key));
        assert!(text.contains(&format!("missing field `{key}`")), "{text}");
    }
}

#[test]
fn another_version_is_refused_before_its_keys_are() {
    let mut later = document();
    later["version"] = json!(2);
    later["channel"] = json!({});
    assert_eq!(refused(&later.to_string()), "handshake version 2 is not known; this pager speaks version 1");
    assert_eq!(
        refused(&with("version", json!("1"))),
        "handshake version \"1\" is not known; this pager speaks version 1"
    );
}

#[test]
fn unknown_keys_are_refused_by_name() {
    let text = refused(&with("populate", json!(true)));
    assert!(text.contains("unknown field `populate`"), "{text}");
    let mut document = document();
    document["regions"][0]["slot"] = json!(3);
    let text = refused(&document.to_string());
    assert!(text.contains("unknown field `slot`"), "{text}");
}

#[test]
fn a_key_said_twice_is_refused() {
    let text = refused(&document().to_string().replacen('{', r#"{"vcpus":1,"#, 1));
    assert!(text.contains("duplicate field `vcpus`"), "{text}");
}

#[test]
fn unknown_values_are_refused_by_name() {
    for (key, value, says) in [
        ("delivery", json!("exit"), "delivery \"exit\" is not known; \"uffd\" and \"notify\" are"),
        ("vcpus", json!(0), "vcpus 0 is not known"),
        ("vcpus", json!(4097), "vcpus 4097 is not known"),
        ("name", json!(""), "name \"\" is not known"),
        ("name", json!("a b"), "name \"a b\" is not known"),
        ("name", json!("../etc"), "name \"../etc\" is not known"),
        ("name", json!("x".repeat(65)), "is not known; 1 to 64 of"),
        ("backing", json!("cxl"), "backing \"cxl\" is not known"),
        ("descriptors", json!(["userfaultfd", "channel"]), "descriptors \"channel\" is not known"),
        ("descriptors", json!(["userfaultfd", "memory", "memory"]), "no other twice"),
        ("descriptors", json!(["memory"]), "there must be a \"userfaultfd\""),
        ("descriptors", json!([]), "there must be a \"userfaultfd\""),
        ("vcpus", json!(-1), "expected u32"),
        ("regions", json!({}), "expected a sequence"),
    ] {
        let text = refused(&with(key, value));
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn regions_that_are_no_layout_are_refused() {
    let mut document = document();
    document["regions"][0]["gpa"] = json!(12);
    assert!(refused(&document.to_string()).contains("not a multiple"));
    document["regions"][0]["gpa"] = json!(u64::MAX - 4095);
    assert!(refused(&document.to_string()).contains("past the end"));
    assert!(refused(&with("regions", json!([]))).contains("there is no region"));
}

#[test]
fn backing_goes_with_page_size_and_memory_or_is_refused() {
    let huge = json!([{"hva": 0x7f00_0000_0000_u64, "size": 2 << 20, "offset": 0, "page_size": 2 << 20}]);
    for (backing, descriptors, regions, says) in [
        ("hugetlb", json!(["userfaultfd"]), document()["regions"].clone(), "page_size of 2097152 only"),
        ("private", json!(["userfaultfd"]), huge.clone(), "page_size of 4096 only"),
        ("anonymous", both(), document()["regions"].clone(), "has no memory file"),
    ] {
        let mut document = document();
        document["backing"] = json!(backing);
        document["descriptors"] = descriptors;
        document["regions"] = regions;
        let text = refused(&document.to_string());
        assert!(
            text.starts_with(&format!("handshake: backing \"{backing}\"")) && text.contains(says),
            "{text}"
        );
    }
    let Some(descriptor) = userfaultfd() else { return };
    assert_eq!(hello(&with("regions", huge), vec![descriptor]).backing, Backing::Hugetlb);
    for backing in [Backing::Anonymous, Backing::Private, Backing::Shared] {
        let body = with("backing", json!(backing.name()));
        assert_eq!(hello(&body, vec![userfaultfd().unwrap()]).backing, backing);
    }
}

/// The reason why this file is refused as the VM's memory. The userfaultfd and the layout are kept.
fn refused_memory(memory: OwnedFd) -> Option<String> {
    let refusal = refusal(&with("descriptors", both()), vec![userfaultfd()?, memory]);
    assert_eq!(refusal.userfaultfds.len(), 1);
    assert!(refusal.layout.is_some());
    Some(refusal.reason.to_string())
}

#[test]
fn memory_that_its_sender_could_take_away_is_refused() {
    let unsealed = || {
        let made = rustix::fs::memfd_create("latepage-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .unwrap();
        rustix::fs::ftruncate(&made, SIZE).unwrap();
        made
    };
    for seals in [SealFlags::empty(), SealFlags::SHRINK, SealFlags::SEAL, SealFlags::GROW | SealFlags::SEAL] {
        let memory = unsealed();
        rustix::fs::fcntl_add_seals(&memory, seals).unwrap();
        let Some(text) = refused_memory(memory) else { return };
        assert!(text.starts_with("the memory descriptor: ") && text.contains("F_SEAL_SHRINK"), "{text}");
    }
    assert!(refused_memory(file()).unwrap().contains("no memory file"));
}

#[test]
fn memory_that_is_too_short_is_refused_with_both_sizes() {
    let Some(text) = refused_memory(sealed(SIZE - 4096)) else { return };
    assert!(text.contains("1044480") && text.contains("1048576"), "{text}");
}

#[test]
fn memory_that_cannot_be_written_is_refused() {
    let made =
        rustix::fs::memfd_create("latepage-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&made, SIZE).unwrap();
    rustix::fs::fcntl_add_seals(&made, SealFlags::SHRINK | SealFlags::FUTURE_WRITE | SealFlags::SEAL)
        .unwrap();
    let Some(text) = refused_memory(made) else { return };
    assert!(text.contains("cannot be written"), "{text}");
    let memory = sealed(SIZE);
    let read_only =
        OpenOptions::new().read(true).open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap();
    assert!(refused_memory(read_only.into()).unwrap().contains("cannot be written"));
}

#[test]
fn the_memory_file_may_come_later_and_is_missed_in_the_end() {
    let Some(descriptor) = userfaultfd() else { return };
    let body = with("descriptors", both());
    let mut incoming = Incoming::new();
    assert!(matches!(incoming.feed(body.as_bytes(), vec![descriptor]), Fed::More));
    assert!(matches!(incoming.feed(b"", vec![sealed(SIZE)]), Fed::Done(_)));

    let mut incoming = Incoming::new();
    assert!(matches!(incoming.feed(body.as_bytes(), vec![userfaultfd().unwrap()]), Fed::More));
    let refusal = incoming.timed_out();
    assert_eq!(refusal.reason.to_string(), "latepage handshake with 1 descriptors; it needs 2");
    assert_eq!(refusal.userfaultfds.len(), 1);
}

#[test]
fn a_refusal_after_the_regions_were_understood_says_where_the_memory_lies() {
    let Some(descriptor) = userfaultfd() else { return };
    let refusal = refusal(&with("delivery", json!("exit")), vec![descriptor]);
    assert_eq!(refusal.layout.unwrap().bytes(), SIZE);
    assert_eq!(refusal.userfaultfds.len(), 1);
}

#[test]
fn what_is_sent_is_understood() {
    let region = |hva: u64, size, offset, page_size| Region { gpa: None, hva, size, offset, page_size };
    let small = Layout::new(vec![
        Region { gpa: Some(0), ..region(0x7f00_0000_0000, SIZE, 0, PageSize::Small) },
        region(0x7e00_0000_0000, 4096, SIZE, PageSize::Small),
    ])
    .unwrap();
    let huge = Layout::new(vec![region(0x7f00_0000_0000, 2 << 20, 0, PageSize::Huge)]).unwrap();
    for backing in Backing::ALL {
        for memory in [false, true] {
            if memory && matches!(backing, Backing::Anonymous | Backing::Hugetlb) {
                continue;
            }
            let layout = if backing == Backing::Hugetlb { &huge } else { &small };
            let message = native::message(&native::Introduction {
                name: Some("vm.1_a-B"),
                vcpus: 64,
                backing,
                memory,
                layout,
            });
            let Some(descriptor) = userfaultfd() else { return };
            let mut descriptors = vec![descriptor];
            if memory {
                descriptors.push(sealed(layout.end()));
            }
            let hello = hello(&message, descriptors);
            assert_eq!(hello.layout, *layout);
            assert_eq!((hello.backing, hello.vcpus, hello.name.as_deref()), (backing, 64, Some("vm.1_a-B")));
            assert_eq!(hello.memory.is_some(), memory);
        }
    }
}

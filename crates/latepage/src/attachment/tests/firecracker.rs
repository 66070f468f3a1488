//! Firecracker's form, in all the shapes that it has had.

use super::super::{Backing, Fed, Form, Incoming, RefusalReason, firecracker};
use super::{feed, file, hello, refusal, refused, userfaultfd};
use crate::memory::{Layout, PageSize, Region};

const ONE: &str = r#"[{"base_host_virt_addr":140247643561984,"size":268435456,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;

fn layout_of(body: &str) -> Option<Layout> {
    let hello = hello(body, vec![userfaultfd()?]);
    assert_eq!((hello.form, hello.name, hello.vcpus), (Form::Firecracker, None, 1));
    assert!(hello.memory.is_none());
    Some(hello.layout)
}

#[test]
fn all_three_shapes_give_the_same_region() {
    let region =
        Region { gpa: None, hva: 0x7f8e_0000_0000, size: 2 << 20, offset: 0, page_size: PageSize::Small };
    let head = r#"{"base_host_virt_addr":140247862083584,"size":2097152,"offset":0"#;
    for tail in
        ["", r#","page_size_kib":4096"#, r#","page_size":4096"#, r#","page_size":4096,"page_size_kib":9"#]
    {
        let Some(layout) = layout_of(&format!("[{head}{tail}}}]")) else { return };
        assert_eq!(layout.regions(), [region], "{tail}");
    }
    // Bytes, whatever the key's name says.
    let Some(layout) = layout_of(&format!(r#"[{head},"page_size_kib":2097152}}]"#)) else { return };
    assert_eq!(layout.regions()[0].page_size, PageSize::Huge);
}

#[test]
fn huge_pages_mean_hugetlb_memory() {
    let Some(descriptor) = userfaultfd() else { return };
    let body = r#"[{"base_host_virt_addr":140247862083584,"size":2097152,"offset":0,"page_size":2097152}]"#;
    assert_eq!(hello(body, vec![descriptor]).backing, Backing::Hugetlb);
    assert_eq!(hello(ONE, vec![userfaultfd().unwrap()]).backing, Backing::Anonymous);
}

#[test]
fn unknown_keys_are_ignored_and_a_guest_address_is_taken() {
    let Some(layout) = layout_of(
        r#" [ {"base_host_virt_addr": 4194304, "size": 4096, "offset": 0, "gpa_start": 8192, "is_guest_memfd": false, "new": {"a": [1, {}]}} ] "#,
    ) else {
        return;
    };
    assert_eq!(layout.regions()[0].gpa, Some(8192));
}

#[test]
fn a_descriptor_may_come_before_within_or_after_the_json() {
    for at in [0, 1, ONE.len() / 2, ONE.len()] {
        let Some(descriptor) = userfaultfd() else { return };
        let (before, after) = ONE.as_bytes().split_at(at);
        let mut incoming = Incoming::new();
        assert!(matches!(incoming.feed(b"", vec![]), Fed::More));
        assert!(matches!(incoming.feed(before, vec![]), Fed::More));
        assert!(matches!(incoming.feed(b"", vec![]), Fed::More));
        let done = match incoming.feed(after, vec![descriptor]) {
            Fed::More => incoming.feed(b"", vec![]),
            done => done,
        };
        assert!(matches!(done, Fed::Done(_)), "{at}: {done:?}");
        // What comes after that is no part of it.
        assert!(matches!(incoming.feed(b"[", vec![]), Fed::Refused(_)));
    }
}

#[test]
fn without_a_descriptor_it_waits_and_is_refused_in_the_end() {
    let waiting = || {
        let mut incoming = Incoming::new();
        assert!(matches!(incoming.feed(ONE.as_bytes(), vec![]), Fed::More));
        incoming
    };
    for refusal in [waiting().closed(), waiting().timed_out()] {
        assert!(matches!(refusal.reason, RefusalReason::NoDescriptor { form: Form::Firecracker }));
        assert!(refusal.layout.is_some());
    }
}

#[test]
fn two_descriptors_are_refused_with_both_numbers_and_the_layout_kept() {
    let Some(descriptor) = userfaultfd() else { return };
    let refusal = refusal(ONE, vec![descriptor, file()]);
    assert_eq!(refusal.reason.to_string(), "firecracker handshake with 2 descriptors; it needs 1");
    assert_eq!(refusal.userfaultfds.len(), 1);
    assert_eq!(refusal.layout.unwrap().bytes(), 256 << 20);
}

#[test]
fn a_descriptor_that_is_no_userfaultfd_is_refused_by_what_it_is() {
    assert_eq!(refused(ONE), "descriptor 0 is /dev/null, no userfaultfd");
}

#[test]
fn regions_that_are_no_layout_are_refused() {
    let region = |hva: u64, size: u64, offset: u64| {
        format!(r#"{{"base_host_virt_addr":{hva},"size":{size},"offset":{offset},"page_size":4096}}"#)
    };
    let refused = |regions: &[String]| refused(&format!("[{}]", regions.join(",")));
    assert!(refused(&[]).contains("there is no region"));
    assert!(refused(&[region(4096, 0, 0)]).contains("size 0"));
    assert!(refused(&[region(4097, 4096, 0)]).contains("not a multiple"));
    assert!(refused(&[region(4096, 4096, 12)]).contains("not a multiple"));
    assert!(refused(&[region(u64::MAX - 4095, 8192, 0)]).contains("past the end"));
    assert!(refused(&[region(4096, 8192, 0), region(8192, 4096, 8192)]).contains("share"));
    assert!(refused(&[region(4096, 8192, 0), region(1 << 20, 4096, 4096)]).contains("share"));
}

#[test]
fn a_wrong_page_size_is_refused_with_those_that_are_known() {
    let text = refused(r#"[{"base_host_virt_addr":0,"size":4096,"offset":0,"page_size":16384}]"#);
    assert_eq!(text, "handshake: page_size 16384 is not known; 4096 and 2097152 are (in bytes)");
}

#[test]
fn json_that_is_not_an_array_of_regions_is_refused_with_its_place() {
    for (body, says) in [
        ("[1]", "line 1 column 2"),
        ("[{}]", "missing field `base_host_virt_addr`"),
        (r#"[{"base_host_virt_addr":-1,"size":4096,"offset":0}]"#, "expected u64"),
        (r#"[{"base_host_virt_addr":"4096","size":4096,"offset":0}]"#, "expected u64"),
        ("[}", "line 1 column 2"),
        ("[\"\u{1}\"]", "control character"),
    ] {
        let text = refused(body);
        assert!(text.starts_with("firecracker handshake: ") && text.contains(says), "{body}: {text}");
    }
    assert!(matches!(feed("[nonsense", vec![]), Fed::More));
}

#[test]
fn bytes_that_are_no_utf_8_are_refused() {
    let Fed::Refused(refusal) = Incoming::new().feed(b"[\"\xff\xfe\"]", vec![]) else { panic!() };
    assert!(matches!(refusal.reason, RefusalReason::Malformed { .. }));
}

#[test]
fn what_we_send_is_what_firecracker_sends() {
    let layout = Layout::new(vec![Region {
        gpa: Some(0),
        hva: 140_247_643_561_984,
        size: 268_435_456,
        offset: 0,
        page_size: PageSize::Small,
    }])
    .unwrap();
    assert_eq!(firecracker::message(&layout), ONE);
}

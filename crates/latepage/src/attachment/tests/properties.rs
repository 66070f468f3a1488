//! For whatever a stranger sends.

use proptest::prelude::*;

use super::super::{Backing, Fed, Incoming, firecracker, native};
use super::{sealed, userfaultfd};
use crate::memory::{Layout, PageSize, Region, Shards};

/// A layout as a VMM could have it: regions one after the other, with gaps.
fn layouts() -> impl Strategy<Value = Layout> {
    let region = (1_u64..1000, 0_u64..1000, any::<bool>());
    (prop::collection::vec(region, 1..12), any::<bool>()).prop_map(|(pieces, huge)| {
        let page_size = if huge { PageSize::Huge } else { PageSize::Small };
        let (mut hva, mut offset) = (1_u64 << 40, 0);
        let regions = pieces
            .into_iter()
            .map(|(pages, gap, with_gpa)| {
                let size = pages * page_size.bytes();
                let region = Region { gpa: with_gpa.then_some(offset), hva, size, offset, page_size };
                hva += size + gap * page_size.bytes();
                offset += size;
                region
            })
            .collect();
        Layout::new(regions).unwrap()
    })
}

/// Pieces of both forms, so that what is generated gets somewhere.
fn fragments() -> impl Strategy<Value = Vec<u8>> {
    let words: Vec<&'static [u8]> = vec![
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b"\"",
        b"\\",
        b" ",
        b"0",
        b"4096",
        b"-1",
        b"1e400",
        b"null",
        b"\"version\":1",
        b"\"regions\":[",
        b"\"base_host_virt_addr\":0",
        b"\"size\":4096",
        b"\"offset\":0",
        b"\xff",
        b"\"descriptors\":[\"userfaultfd\"]",
        b"18446744073709551616",
        b"\"delivery\":\"uffd\"",
        b"\"hva\":0",
        b"\"shards\":[4096,",
        b"\"userfaultfd\",",
    ];
    prop::collection::vec(prop::sample::select(words), 0..60).prop_map(|words| words.concat())
}

fn feed_in_parts(bytes: &[u8], parts: &[usize]) -> Fed {
    let mut incoming = Incoming::new();
    let mut rest = bytes;
    for &part in parts {
        let (now, later) = rest.split_at(part.min(rest.len()));
        match incoming.feed(now, vec![]) {
            Fed::More => rest = later,
            done => return done,
        }
    }
    incoming.feed(rest, vec![])
}

proptest! {
    #[test]
    fn whatever_bytes_come_nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000), parts in prop::collection::vec(0_usize..40, 0..40)) {
        prop_assert!(!matches!(feed_in_parts(&bytes, &parts), Fed::Done(_)));
    }

    #[test]
    fn whatever_is_put_together_from_pieces_of_handshakes_nothing_panics(bytes in fragments(), parts in prop::collection::vec(0_usize..40, 0..40)) {
        prop_assert!(!matches!(feed_in_parts(&bytes, &parts), Fed::Done(_)));
    }

    #[test]
    fn a_refusal_does_not_depend_on_how_the_bytes_were_parted(bytes in fragments(), parts in prop::collection::vec(0_usize..40, 0..40)) {
        let whole = feed_in_parts(&bytes, &[]);
        let parted = feed_in_parts(&bytes, &parts);
        prop_assert_eq!(std::mem::discriminant(&whole), std::mem::discriminant(&parted));
        if let (Fed::Refused(whole), Fed::Refused(parted)) = (whole, parted) {
            prop_assert_eq!(whole.layout, parted.layout);
        }
    }

    #[test]
    fn a_valid_handshake_in_whatever_parts_gives_the_same_hello(layout in layouts(), ours in any::<bool>(), parts in prop::collection::vec(0_usize..200, 0..20), with in 0_usize..20) {
        let backing = if layout.regions()[0].page_size == PageSize::Huge { Backing::Hugetlb } else { Backing::Anonymous };
        let message = if ours {
            native::message(&native::Introduction { name: Some("vm"), vcpus: 3, backing, memory: false, layout: &layout })
        } else {
            firecracker::message(&layout)
        };
        let Some(descriptor) = userfaultfd() else { return Ok(()) };
        let mut descriptor = Some(descriptor);
        let mut incoming = Incoming::new();
        let mut rest = message.as_bytes();
        let mut done = None;
        for (number, part) in parts.iter().copied().chain([message.len(), 0]).enumerate() {
            let (now, later) = rest.split_at(part.min(rest.len()));
            rest = later;
            let last = rest.is_empty() || number == with;
            match incoming.feed(now, last.then(|| descriptor.take()).flatten().into_iter().collect()) {
                Fed::More => {}
                Fed::Done(hello) => { done = Some(hello); break; }
                Fed::Refused(refusal) => panic!("{}", refusal.reason),
            }
        }
        let hello = done.expect("all of it was fed");
        prop_assert_eq!(hello.backing, backing);
        if ours {
            prop_assert_eq!(hello.layout, layout);
            prop_assert_eq!((hello.name.as_deref(), hello.vcpus), (Some("vm"), 3));
        } else {
            let without_gpa: Vec<Region> = layout.regions().iter().map(|region| Region { gpa: None, ..*region }).collect();
            prop_assert_eq!(hello.layout.regions(), &without_gpa[..]);
        }
    }
    #[test]
    fn whatever_the_division_each_page_has_one_userfaultfd_and_what_is_none_is_refused(
        layout in layouts(), count in 1_usize..10, sizes in prop::collection::vec(prop_oneof![0_u64..20, any::<u64>()], 0..70), memory in any::<bool>()
    ) {
        if userfaultfd().is_none() { return Ok(()) };
        let unit = layout.regions()[0].page_size.bytes();
        let memory = memory && unit == 4096;
        let backing = if unit == 4096 { Backing::Shared } else { Backing::Hugetlb };
        let introduction = native::Introduction { name: None, vcpus: 3, backing, memory, layout: &layout };
        let sent = |count| {
            let mut sent: Vec<_> = (0..count).map(|_| userfaultfd().unwrap()).collect();
            sent.extend(memory.then(|| sealed(layout.end())));
            sent
        };

        // Each from one page on, the rest to the last.
        let count = count.min(layout.pages() as usize);
        let shards = Shards::equal(&layout, count).unwrap();
        let message = native::message_with_shards(&introduction, &shards);
        match Incoming::new().feed(message.as_bytes(), sent(count)) {
            Fed::Done(hello) => {
                prop_assert_eq!((hello.userfaultfds.len(), hello.memory.is_some()), (count, memory));
                prop_assert_eq!(hello.shards, shards);
            }
            other => panic!("{other:?}"),
        }

        // Whatever sizes are said: a division, of which each page is one shard's, or a refusal that keeps all userfaultfds.
        let sizes: Vec<u64> = sizes.iter().map(|size| size.saturating_mul(unit)).collect();
        let mut document: serde_json::Value = serde_json::from_str(&message).unwrap();
        document["shards"] = serde_json::json!(sizes);
        match Incoming::new().feed(document.to_string().as_bytes(), sent(count)) {
            Fed::Done(hello) => {
                prop_assert_eq!(sizes.iter().sum::<u64>(), layout.bytes());
                let ends: Vec<u32> = (0..count).map(|shard| hello.shards.pages(shard).end).collect();
                prop_assert_eq!(ends.last(), Some(&layout.pages()));
                prop_assert!(ends.is_sorted());
            }
            Fed::Refused(refusal) => {
                let says = refusal.reason.to_string();
                prop_assert!(says.starts_with("handshake: shards: ") || says.contains(" shards and "), "{}", says);
                prop_assert_eq!(refusal.userfaultfds.len(), count);
            }
            Fed::More => panic!("all of it was fed"),
        }
    }
}

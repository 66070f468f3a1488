//! What a peer may say, and what becomes of each thing that it must not say. The descriptors are real.

mod documentation;
mod firecracker;
mod native;
mod notify;
mod properties;
mod shards;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::{Fed, Hello, Incoming, MAX_DESCRIPTORS, Refusal, RefusalReason};
use crate::sys::memfd;
use crate::sys::uffd::{Features, Userfaultfd};

/// A userfaultfd as a VMM would send it, or `None` with the reason printed.
fn userfaultfd() -> Option<OwnedFd> {
    match Userfaultfd::create(Features::empty()) {
        Ok(made) => Some(OwnedFd::from(made)),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// A descriptor of the wrong kind.
fn file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn sealed(bytes: u64) -> OwnedFd {
    memfd::create("latepage-test", bytes).unwrap()
}

fn feed(body: &str, descriptors: Vec<OwnedFd>) -> Fed {
    Incoming::new().feed(body.as_bytes(), descriptors)
}

fn hello(body: &str, descriptors: Vec<OwnedFd>) -> Hello {
    match feed(body, descriptors) {
        Fed::Done(hello) => hello,
        other => panic!("{other:?}"),
    }
}

fn refusal(body: &str, descriptors: Vec<OwnedFd>) -> Refusal {
    match feed(body, descriptors) {
        Fed::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

/// A refusal before any descriptor was looked at, as text.
fn refused(body: &str) -> String {
    let refusal = refusal(body, vec![file()]);
    assert!(refusal.userfaultfds.is_empty());
    let text = refusal.reason.to_string();
    assert!(!text.contains('\n'), "{text:?}");
    text
}

/// Whether the reading end of this pipe is closed.
fn hung_up(pipe: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::new(pipe, PollFlags::OUT)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    polled[0].revents().contains(PollFlags::ERR)
}

#[test]
fn what_is_no_json_of_either_form_is_refused_at_its_first_byte() {
    for (body, start) in
        [("hello", "\"h\""), ("\"[]\"", "\"\"\""), ("\u{feff}[]", "byte 0xef"), ("\0", "byte 0x00")]
    {
        let text = refused(body);
        assert!(text.ends_with(&format!("it starts with {start}")), "{text}");
    }
}

#[test]
fn a_megabyte_is_taken_and_a_byte_more_is_refused() {
    let mut incoming = Incoming::new();
    let spaces = vec![b' '; super::MAX_BODY];
    assert!(matches!(incoming.feed(&spaces, vec![]), Fed::More));
    let Fed::Refused(refusal) = incoming.feed(b"[", vec![]) else { panic!() };
    assert!(matches!(refusal.reason, RefusalReason::Huge));
}

#[test]
fn a_bottomless_document_is_refused_before_it_ends() {
    for opening in ["[", "[{\"a\":", "{\"regions\":["] {
        let text = refused(&opening.repeat(10_000));
        assert_eq!(text, "the handshake is nested more than 32 deep");
    }
}

#[test]
fn a_peer_that_says_nothing_or_too_little_is_refused_when_it_leaves_or_time_is_over() {
    assert!(matches!(Incoming::new().closed().reason, RefusalReason::Silent));
    assert!(matches!(Incoming::new().timed_out().reason, RefusalReason::Late { bytes: 0, descriptors: 0 }));
    for body in ["[", "[{\"base_host", "{\"version\": 1, "] {
        let begun = || {
            let mut incoming = Incoming::new();
            assert!(matches!(incoming.feed(body.as_bytes(), vec![file()]), Fed::More));
            incoming
        };
        assert!(
            matches!(begun().closed().reason, RefusalReason::Incomplete { bytes } if bytes == body.len())
        );
        assert!(
            matches!(begun().timed_out().reason, RefusalReason::Late { bytes, descriptors: 1 } if bytes == body.len())
        );
    }
}

#[test]
fn every_userfaultfd_of_a_refused_peer_is_kept_and_everything_else_closed() {
    let (Some(first), Some(second)) = (userfaultfd(), userfaultfd()) else { return };
    // A file that this test alone has: whether it is closed shows in its other end.
    let (other, watched) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut sent = [first.as_raw_fd(), second.as_raw_fd()];
    let refusal = refusal("no json", vec![first, other, second]);
    let mut kept: Vec<i32> = refusal.userfaultfds.iter().map(|kept| kept.as_fd().as_raw_fd()).collect();
    kept.sort_unstable();
    sent.sort_unstable();
    assert_eq!(kept, sent);
    assert!(hung_up(&watched));
}

#[test]
fn a_userfaultfd_is_kept_whatever_goes_wrong_and_whenever() {
    let begun = |body: &str, descriptor| {
        let mut incoming = Incoming::new();
        assert!(matches!(incoming.feed(body.as_bytes(), vec![descriptor]), Fed::More));
        incoming
    };
    let Some(descriptor) = userfaultfd() else { return };
    assert_eq!(begun("[", descriptor).closed().userfaultfds.len(), 1);
    assert_eq!(begun("{", userfaultfd().unwrap()).timed_out().userfaultfds.len(), 1);
    let refused = begun("", userfaultfd().unwrap()).refused(RefusalReason::Uid { uid: 1000 });
    assert_eq!(refused.userfaultfds.len(), 1);
    assert_eq!(refused.reason.to_string(), "peers of uid 1000 are not allowed; see --allow-uid");
    let Fed::Refused(refused) = begun("[", userfaultfd().unwrap()).feed(b"}", vec![file()]) else { panic!() };
    assert_eq!(refused.userfaultfds.len(), 1);
}

#[test]
fn more_descriptors_than_any_handshake_has_are_refused_at_once() {
    let mut incoming = Incoming::new();
    let many = MAX_DESCRIPTORS + 1;
    let Fed::Refused(refusal) = incoming.feed(b"[", (0..many).map(|_| file()).collect()) else { panic!() };
    let says = format!("{many} descriptors; no handshake has more than {MAX_DESCRIPTORS}");
    assert_eq!(refusal.reason.to_string(), says);
}

#[test]
fn what_comes_after_the_end_is_refused() {
    let text = refused("[] and more");
    assert_eq!(
        text,
        "the handshake goes on after its JSON: 8 bytes too many; send one document and nothing else"
    );
}

#[test]
fn a_log_line_quotes_a_stranger_in_one_line_of_bounded_length() {
    let nasty = format!("{{\"version\": 1, \"\\u001b[2J\\n{}\": 1}}", "x".repeat(5000));
    let text = refused(&nasty);
    assert!(text.len() < 400 && !text.chars().any(char::is_control), "{text:?}");
}

#[test]
fn a_userfaultfd_that_blocks_is_refused_and_kept() {
    let Some(descriptor) = userfaultfd() else { return };
    rustix::fs::fcntl_setfl(&descriptor, rustix::fs::OFlags::empty()).unwrap();
    let body = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}]"#;
    let refusal = refusal(body, vec![descriptor]);
    assert_eq!(
        refusal.reason.to_string(),
        "descriptor 0 is a userfaultfd that blocks: make it with O_NONBLOCK"
    );
    assert_eq!(refusal.userfaultfds.len(), 1);
    assert!(refusal.layout.is_some());
}

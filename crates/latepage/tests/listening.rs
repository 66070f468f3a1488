//! Where a pager listens, and whom it refuses: with a line that says which and why, its connection closed, nothing leaked, and
//! no VM left to hang.

mod vmm;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use latepage::attachment::{Backing, MAX_DESCRIPTORS, firecracker};
use latepage::memory::{Layout, PageSize, Region};
use latepage::pager::{Config, ListenError, Pager, What};
use latepage::session::{OnMissing, Policy};
use vmm::PAGE;
use vmm::child::{Holdings, Vmm, alone};
use vmm::guest::{Guest, copy_of, say};
use vmm::serving::{Directory, Serving, exists, policy};
use vmm::snapshot::{Snapshot, word};

const SIGKILL: i32 = 9;
const SIGBUS: i32 = 7;

fn snapshot(pages: usize) -> Arc<Snapshot> {
    Arc::new(Snapshot::new((pages * PAGE) as u64))
}

/// Not a test of its own: the process that plays a VMM in others.
#[test]
fn vmm_process() {
    vmm::child::obey();
}

/// A peer that was refused sees its connection closed.
fn closed(mut stream: UnixStream) {
    stream.set_read_timeout(Some(vmm::BOUND)).unwrap();
    match stream.read(&mut [0]) {
        Ok(0) => {}
        // What it had sent and nobody read.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("the connection is not closed: {other:?}"),
    }
}

fn listen(path: &std::path::Path) -> (Pager, Result<(), ListenError>) {
    let pager = Pager::start(Config::default()).unwrap();
    let listening = pager.listen(path, snapshot(1), policy());
    (pager, listening)
}

#[test]
fn a_path_where_someone_listens_is_left_to_him() {
    let directory = Directory::new();
    let path = directory.file("s");
    let (first, listening) = listen(&path);
    listening.unwrap();
    let (_second, refused) = listen(&path);
    assert!(matches!(refused, Err(ListenError::Live { .. })));
    // The first one still answers.
    UnixStream::connect(&path).unwrap();
    first.close();
    assert!(!exists(&path));
}

#[test]
fn a_path_of_another_kind_of_living_socket_is_left_to_it() {
    let directory = Directory::new();
    let path = directory.file("s");
    let _datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    assert!(matches!(listen(&path).1, Err(ListenError::Live { .. })));
    assert!(exists(&path));
}

#[test]
fn a_stale_socket_is_replaced() {
    let directory = Directory::new();
    let path = directory.file("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(exists(&path));
    let (pager, listening) = listen(&path);
    listening.unwrap();
    UnixStream::connect(&path).unwrap();
    drop(pager);
    assert!(!exists(&path));
}

#[test]
fn a_file_a_directory_and_a_link_are_not_replaced() {
    let directory = Directory::new();
    let (file, link) = (directory.file("file"), directory.file("link"));
    let folder = directory.file("folder");
    std::fs::write(&file, "mine").unwrap();
    std::fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink(directory.file("nowhere"), &link).unwrap();
    for (path, kind) in [(&file, "a file"), (&folder, "a directory"), (&link, "a link")] {
        let refused = listen(path).1.unwrap_err();
        assert!(matches!(refused, ListenError::NotSocket { what, .. } if what == kind), "{refused}");
        assert!(exists(path));
    }
    assert_eq!(std::fs::read_to_string(file).unwrap(), "mine");
}

#[test]
fn a_path_that_is_too_long_is_refused_with_both_lengths() {
    let directory = Directory::new();
    let path = directory.file(&"x".repeat(108));
    let refused = listen(&path).1.unwrap_err().to_string();
    assert!(
        refused.contains(&format!("{} bytes", path.as_os_str().len())) && refused.contains("107"),
        "{refused}"
    );
    let folder = directory.file("none").join("s");
    assert!(matches!(listen(&folder).1, Err(ListenError::Call { call: "bind", .. })));
}

#[test]
fn a_socket_has_the_mode_of_its_policy_and_a_path_that_became_anothers_is_left() {
    let directory = Directory::new();
    let path = directory.file("s");
    let pager = Pager::start(Config::default()).unwrap();
    pager.listen(&path, snapshot(1), Policy { mode: 0o600, ..policy() }).unwrap();
    let found = std::fs::symlink_metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "another's").unwrap();
    pager.close();
    assert!(exists(&path));
}

fn region(hva: u64, size: u64, offset: u64) -> Region {
    Region { gpa: None, hva, size, offset, page_size: PageSize::Small }
}

/// Bodies that are refused, and a word of the reason.
fn bad_handshakes() -> Vec<(String, &'static str)> {
    let mapping = |hva: u64, size: u64, offset: u64| {
        format!(r#"{{"base_host_virt_addr":{hva},"size":{size},"offset":{offset},"page_size":4096}}"#)
    };
    let array = |mappings: &[String]| format!("[{}]", mappings.join(","));
    let ours = |change: &str, region: &str| {
        format!(
            r#"{{"version":1,"delivery":"uffd","descriptors":["userfaultfd"]{change},"regions":[{{"hva":1048576,"size":4096,"offset":0,"page_size":4096{region}}}]}}"#
        )
    };
    vec![
        ("hello".to_owned(), "no JSON"),
        ("[}".to_owned(), "handshake"),
        ("[1,2]".to_owned(), "handshake"),
        ("[]".to_owned(), "region"),
        ("[".repeat(100), "nested"),
        (array(&[mapping(1 << 20, 0, 0)]), "size"),
        (array(&[mapping((1 << 20) + 5, 4096, 0)]), "multiple"),
        (array(&[mapping(1 << 20, 8192, 0), mapping((1 << 20) + 4096, 8192, 8192)]), "share"),
        (array(&[mapping(u64::MAX - 4095, 8192, 0)]), "past"),
        (array(&[mapping(1 << 20, 4096, 0)]) + "x", "goes on"),
        (array(&[mapping(1 << 20, 8 * 4096, 0)]), "262144"),
        (ours(r#","surprise":1"#, ""), "surprise"),
        (ours("", r#","surprise":1"#), "surprise"),
        (ours(r#","vcpus":0"#, ""), "vcpus"),
        (ours(r#","name":"a b""#, ""), "name"),
        (ours(r#","backing":"rock""#, ""), "rock"),
        (r#"{"version":2}"#.to_owned(), "version 2"),
    ]
}

#[test]
fn each_bad_handshake_is_refused_by_name_and_its_vm_killed() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 64);
    let mut serving = Serving::new(snapshot(64), Policy::default());
    let _socket = guest.connect(&serving.socket, "bystander");
    for (body, word) in bad_handshakes() {
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 8");
        vm.say(&format!("send {} {body}", serving.socket.display()));
        assert_eq!(vm.ended_by(), Some(SIGKILL), "{body}");
        let (reason, action) = serving.refused();
        assert!(reason.contains(word), "{body}: {reason}");
        assert_eq!((action.as_str(), reason.lines().count()), ("killed", 1), "{body}: {reason}");
    }
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
}

#[test]
fn a_huge_handshake_is_refused() {
    need_userfaultfd!();
    let mut serving = Serving::new(snapshot(8), policy());
    let mut stream = UnixStream::connect(&serving.socket).unwrap();
    let body = vec![b' '; (1 << 20) + 1];
    // It may be closed before all is said.
    let _ = stream.write_all(&body);
    let (reason, action) = serving.refused();
    assert!(reason.contains("longer than 1048576"), "{reason}");
    assert_eq!(action, "none");
    closed(stream);
}

#[test]
fn descriptors_that_are_missing_too_many_or_no_userfaultfd_are_refused() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 8);
    let policy = Policy { handshake_timeout: Duration::from_millis(100), ..policy() };
    let mut serving = Serving::new(snapshot(8), policy);
    let message = firecracker::message(&guest.layout);
    let null = std::fs::File::open("/dev/null").unwrap();
    for (descriptors, wanted) in [
        (vec![], "without a descriptor"),
        (vec![null.as_fd(), null.as_fd()], "2 descriptors"),
        (vec![null.as_fd()], "/dev/null, no userfaultfd"),
        (vec![null.as_fd(); 253], "253 descriptors"),
    ] {
        let stream = say(&serving.socket, message.as_bytes(), &descriptors);
        let (reason, action) = serving.refused();
        assert!(reason.contains(wanted), "{reason}");
        assert_eq!(action, "none");
        closed(stream);
    }
}

#[test]
fn memory_that_can_shrink_is_too_short_or_cannot_be_written_is_refused() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Shared, 8);
    let mut serving = Serving::new(snapshot(8), policy());
    let shrinkable = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&shrinkable, 8 * PAGE as u64).unwrap();
    let short = latepage::sys::memfd::create("m", 7 * PAGE as u64).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap().into();
    for (file, wanted) in
        [(shrinkable, "can still be shrunk"), (short, "28672 bytes"), (null, "no memory file")]
    {
        let bad = Guest {
            memory: Some(file),
            uffd: copy_of(&guest.uffd),
            layout: guest.layout.clone(),
            ..Guest::new(Backing::Shared, 8)
        };
        let _stream = bad.connect(&serving.socket, "vm");
        let (reason, _) = serving.refused();
        assert!(reason.contains(wanted), "{reason}");
    }
}

#[test]
fn a_vm_of_another_size_is_refused_with_both_sizes() {
    need_userfaultfd!();
    let mut serving = Serving::new(snapshot(64), Policy::default());
    for pages in [63, 65] {
        let mut vm = Vmm::start();
        vm.tell(&format!("guest anonymous {pages}"));
        vm.say(&format!("connect {} vm-{pages}", serving.socket.display()));
        let refused = serving.wait("refused", |what| matches!(what, What::Refused { .. }));
        let What::Refused { vm: Some(name), reason, action, .. } = refused else {
            panic!("no name: {refused:?}")
        };
        assert_eq!((name, action.as_str()), (format!("vm-{pages}"), "killed"));
        assert!(
            reason.contains(&(64 * PAGE).to_string()) && reason.contains(&(pages * PAGE).to_string()),
            "{reason}"
        );
    }
}

#[test]
fn a_peer_whose_uid_is_not_allowed_is_refused() {
    need_userfaultfd!();
    let uid = rustix::process::getuid().as_raw();
    let mut serving =
        Serving::new(snapshot(8), Policy { allow_uids: Some(vec![uid + 1]), ..Policy::default() });
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 8");
    vm.say(&format!("connect {} vm", serving.socket.display()));
    let (reason, _) = serving.refused();
    assert!(reason.contains(&format!("uid {uid}")), "{reason}");
    let allowed = serving.also("allowed", snapshot(8), Policy { allow_uids: Some(vec![uid]), ..policy() });
    let guest = Guest::new(Backing::Anonymous, 8);
    let _socket = guest.connect(&allowed, "vm");
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
}

#[test]
fn a_peer_that_says_nothing_or_half_is_refused_in_time() {
    need_userfaultfd!();
    let policy = Policy { handshake_timeout: Duration::from_millis(100), ..Policy::default() };
    let mut serving = Serving::new(snapshot(8), policy);
    let silent = UnixStream::connect(&serving.socket).unwrap();
    assert_eq!(serving.refused().1, "none");
    closed(silent);
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 8");
    vm.say(&format!("send {} [{{\"base_host", serving.socket.display()));
    let (reason, action) = serving.refused();
    assert!(reason.contains("in time") && action == "killed", "{reason}");
    assert_eq!(vm.ended_by(), Some(SIGKILL));
}

#[test]
fn a_peer_that_leaves_in_the_middle_is_refused() {
    need_userfaultfd!();
    let mut serving = Serving::new(snapshot(8), policy());
    drop(UnixStream::connect(&serving.socket).unwrap());
    assert!(serving.refused().0.contains("without a handshake"));
    drop(say(&serving.socket, b"[{", &[]));
    assert!(serving.refused().0.contains("after 2 bytes"));
}

#[test]
fn a_refused_peer_is_poisoned_where_the_policy_says_so_and_never_reads_zero() {
    need_userfaultfd!();
    let mut serving =
        Serving::new(snapshot(64), Policy { on_missing: OnMissing::Poison, ..Policy::default() });
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 8");
    vm.tell(&format!("send {} nonsense", serving.socket.display()));
    assert_eq!(serving.refused().1, "poisoned");
    // Its discards go on: somebody reads their events.
    assert_eq!(vm.tell("discard 0 2"), "ok");
    vm.say("touch 5");
    assert_eq!(vm.ended_by(), Some(SIGBUS));
}

#[test]
fn a_refused_peer_leaves_nothing_in_the_pager_once_it_is_dead() {
    need_userfaultfd!();
    alone("a_refused_peer_leaves_nothing_in_the_pager_once_it_is_dead", || {
        let mut serving = Serving::new(snapshot(64), Policy::default());
        serving.wait("listening", |what| matches!(what, What::Listening { .. }));
        let before = Holdings::now();
        for command in ["send", "send-unset"] {
            let mut vm = Vmm::start();
            vm.tell("guest anonymous 8");
            vm.say(&format!("{command} {} nonsense", serving.socket.display()));
            serving.refused();
            assert_eq!(vm.ended_by(), Some(SIGKILL));
            drop(vm);
            vmm::until("everything to be let go", || Holdings::now() == before);
        }
    });
}

#[test]
fn a_userfaultfd_of_a_peer_that_cannot_be_killed_is_held() {
    need_userfaultfd!();
    // A VM in the pager's own process: its faults hang rather than read zero.
    let mut guest = Guest::new(Backing::Anonymous, 8);
    let mut serving = Serving::new(snapshot(64), Policy::default());
    let stream = say(&serving.socket, b"nonsense", &[guest.uffd.as_fd()]);
    assert!(serving.refused().1.starts_with("held"));
    closed(stream);
    let mine = copy_of(&guest.uffd);
    guest.uffd = copy_of(&guest.uffd);
    let waiter = guest.touch(3);
    // Only what we put there by hand comes.
    let contents = vec![7; PAGE];
    mine.copy(guest.address(3), &contents, latepage::sys::uffd::InstallMode::empty());
    assert_eq!(waiter.join(), u64::from_ne_bytes([7; 8]));
}

#[test]
fn a_storm_of_connections_is_taken_and_everyone_served() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 64);
    let policy = Policy { handshake_timeout: Duration::from_millis(500), ..policy() };
    let mut serving = Serving::new(snapshot(64), policy);
    // More than there is room for at once; none of them says a word.
    let silent: Vec<_> = (0..400).map(|_| UnixStream::connect(&serving.socket).unwrap()).collect();
    let _socket = guest.connect(&serving.socket, "vm");
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
    for _ in 0..400 {
        serving.refused();
    }
    silent.into_iter().for_each(closed);
}

#[test]
fn a_handshake_in_single_bytes_with_its_descriptor_last_is_understood() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 64);
    let serving = Serving::new(snapshot(64), policy());
    let message = firecracker::message(&guest.layout);
    let stream = UnixStream::connect(&serving.socket).unwrap();
    let (last, bytes) = message.as_bytes().split_last().unwrap();
    for byte in bytes {
        latepage::sys::fdpass::send(&stream, &[*byte], &[]).unwrap();
    }
    latepage::sys::fdpass::send(&stream, &[*last], &[guest.uffd.as_fd()]).unwrap();
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
}

/// As many descriptors as this process may have, but for `left`.
fn fill_up(left: usize) -> Vec<std::fs::File> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = Rlimit { current: Some(200), ..getrlimit(Resource::Nofile) };
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut fill: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    fill.truncate(fill.len() - left);
    fill
}

#[test]
fn a_vm_that_comes_when_there_is_no_room_for_its_descriptors_waits_until_there_is() {
    need_userfaultfd!();
    alone("a_vm_that_comes_when_there_is_no_room_for_its_descriptors_waits_until_there_is", || {
        for left in 0..14 {
            let mut serving = Serving::new(snapshot(64), Policy::default());
            let mut vm = Vmm::start();
            vm.tell("guest anonymous 64");
            serving.wait("listening", |what| matches!(what, What::Listening { .. }));
            let fill = fill_up(left);
            vm.say(&format!("connect {} vm", serving.socket.display()));
            // With room enough it comes at once, else a warning.
            let told = serving.wait("a word", |what| {
                matches!(what, What::Warning { .. } | What::SessionStarted { .. } | What::Refused { .. })
            });
            assert!(!matches!(told, What::Refused { .. }), "with {left} left: {told:?}");
            drop(fill);
            if matches!(told, What::Warning { .. }) {
                serving.wait("its session", |what| matches!(what, What::SessionStarted { .. }));
            }
        }
    });
}

#[test]
fn a_pager_that_cannot_be_started_whole_is_not_started_at_all() {
    alone("a_pager_that_cannot_be_started_whole_is_not_started_at_all", || {
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let before = threads();
        let mut started = false;
        for left in 0..128 {
            let fill = fill_up(left);
            let pager = Pager::start(Config::default());
            drop(fill);
            started |= pager.is_ok();
            assert!(pager.is_ok() || !started, "with {left} left, and not with more");
            drop(pager);
            // A thread that was joined may be listed for a moment yet.
            while threads() > before {
                std::thread::yield_now();
            }
        }
        assert!(started);
    });
}

#[test]
fn a_peer_that_sends_more_descriptors_than_there_is_room_for_is_refused() {
    need_userfaultfd!();
    alone("a_peer_that_sends_more_descriptors_than_there_is_room_for_is_refused", || {
        let guest = Guest::new(Backing::Anonymous, 64);
        let mut serving = Serving::new(snapshot(64), Policy::default());
        let stream = UnixStream::connect(&serving.socket).unwrap();
        let many = [guest.uffd.as_fd(); 100];
        let fill = fill_up(20);
        latepage::sys::fdpass::send(&stream, b"[", &many).unwrap();
        let (reason, _) = serving.refused();
        assert!(reason.ends_with(&format!("no handshake has more than {MAX_DESCRIPTORS}")), "{reason}");
        drop(fill);
    });
}

#[test]
fn layouts_of_many_regions_are_served() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 256);
    let start = guest.view.address();
    let page = PAGE as u64;
    let regions = (0..256).rev().map(|at| region(start + at * page, page, at * page)).collect();
    let guest = Guest { layout: Layout::new(regions).unwrap(), ..guest };
    let serving = Serving::new(snapshot(256), policy());
    let _socket = guest.connect(&serving.socket, "vm");
    assert_eq!(guest.verify(77, |offset| word(offset, 0)).join(), [0; 0]);
}

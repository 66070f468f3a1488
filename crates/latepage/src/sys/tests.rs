//! The handles against the real kernel. Where there is no userfaultfd, what needs one says so and is skipped.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::fdpass::{self, MOST_DESCRIPTORS};
use super::mapping::Mapping;
use super::memfd::{self, NotSealed};
use super::pidfd::{PidFd, peer};
use super::uffd::{Features, InstallMode, Message, MessageBuffer, OwnersMemory, RegisterMode, Userfaultfd};

const PAGE: usize = 4096;

/// A userfaultfd over a fresh mapping of so many pages.
fn registered(pages: usize, features: Features, mode: RegisterMode) -> Option<(Arc<Mapping>, Userfaultfd)> {
    let uffd = match Userfaultfd::create(features) {
        Ok(uffd) => uffd,
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    let mapping = Mapping::anonymous(pages * PAGE).unwrap();
    uffd.register(mapping.address(), mapping.len() as u64, mode).unwrap();
    Some((Arc::new(mapping), uffd))
}

/// Waits until there is something to read, and reads it.
fn read(uffd: &Userfaultfd, buffer: &mut MessageBuffer) -> Vec<Message> {
    let bound = Timespec { tv_sec: 60, tv_nsec: 0 };
    let ready = rustix::event::poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&bound));
    assert_eq!(ready, Ok(1), "nothing to read");
    uffd.read(buffer).unwrap();
    buffer.drain().collect()
}

#[test]
fn a_mapping_is_aligned_so_that_huge_pages_fit() {
    for length in [1, PAGE, PAGE + 1, 3 << 20] {
        let mapping = Mapping::anonymous(length).unwrap();
        assert_eq!((mapping.address() % (2 << 20), mapping.len()), (0, length));
        mapping.write(length - 1, &[9]);
        let mut last = [0];
        mapping.read(length - 1, &mut last);
        assert_eq!(last, [9]);
    }
}

#[test]
fn a_mapping_of_nothing_or_of_too_much_is_refused() {
    assert!(Mapping::anonymous(0).is_err());
    assert!(Mapping::anonymous(usize::MAX).is_err());
    assert!(Mapping::anonymous(1 << 60).is_err());
}

#[test]
fn what_lies_outside_a_mapping_is_a_panic_and_never_reached() {
    let mapping = Mapping::anonymous(PAGE).unwrap();
    let refused = |access: &dyn Fn(&Mapping)| {
        assert!(catch_unwind(AssertUnwindSafe(|| access(&mapping))).is_err());
    };
    refused(&|mapping| mapping.read(PAGE - 1, &mut [0; 2]));
    refused(&|mapping| mapping.write(PAGE, &[1]));
    refused(&|mapping| mapping.write(usize::MAX, &[1]));
    refused(&|mapping| _ = mapping.load(PAGE));
    refused(&|mapping| mapping.store(PAGE - 4, 0));
    refused(&|mapping| _ = mapping.load(4));
    refused(&|mapping| _ = mapping.dont_need(0, 2 * PAGE));
    refused(&|mapping| _ = mapping.remove(PAGE, 1));
    // At the very edge there is nothing to reach.
    mapping.read(PAGE, &mut []);
    mapping.store(PAGE - 8, 7);
    assert_eq!(mapping.load(PAGE - 8), 7);
}

#[test]
fn shared_views_see_each_other_and_private_ones_keep_to_themselves() {
    let file = memfd::create("t", 2 * PAGE as u64).unwrap();
    let shared = Mapping::shared(file.as_fd(), 0, 2 * PAGE).unwrap();
    let second = Mapping::shared(file.as_fd(), PAGE as u64, PAGE).unwrap();
    let private = Mapping::private(file.as_fd(), 0, 2 * PAGE).unwrap();
    shared.store(PAGE, 5);
    assert_eq!((second.load(0), private.load(PAGE)), (5, 5));
    private.store(PAGE, 6);
    assert_eq!((second.load(0), private.load(PAGE)), (5, 6));
    private.dont_need(0, 2 * PAGE).unwrap();
    assert_eq!(private.load(PAGE), 5);
    shared.remove(PAGE, PAGE).unwrap();
    assert_eq!((second.load(0), private.load(PAGE)), (0, 0));
}

#[test]
fn a_memory_file_is_trusted_only_if_nobody_can_shrink_it() {
    let good = memfd::create("t", 2 * PAGE as u64).unwrap();
    memfd::check_sealed(good.as_fd(), 2 * PAGE as u64).unwrap();
    assert!(rustix::fs::ftruncate(&good, 0).is_err());
    let short = memfd::check_sealed(good.as_fd(), 2 * PAGE as u64 + 1).unwrap_err();
    assert!(matches!(short, NotSealed::Short { length: 8192, needed: 8193 }));
    let open = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&open, PAGE as u64).unwrap();
    assert!(matches!(memfd::check_sealed(open.as_fd(), 1), Err(NotSealed::Missing)));
    // Sealed against shrinking, but the seal itself is not the last word.
    rustix::fs::fcntl_add_seals(&open, rustix::fs::SealFlags::SHRINK).unwrap();
    assert!(matches!(memfd::check_sealed(open.as_fd(), 1), Err(NotSealed::Missing)));
    let device = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(memfd::check_sealed(device.as_fd(), 1), Err(NotSealed::NotMemory(_))));
}

#[test]
fn descriptors_pass_in_any_number_that_a_message_can_carry() {
    let (here, there) = UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let mut buffer = [0; 16];
    for count in [0, 1, MOST_DESCRIPTORS] {
        fdpass::send(&here, b"hello", &vec![file.as_fd(); count]).unwrap();
        let received = fdpass::receive(&there, &mut buffer).unwrap();
        assert_eq!((received.bytes, received.descriptors.len(), received.truncated), (5, count, false));
        for descriptor in &received.descriptors {
            assert!(rustix::io::fcntl_getfd(descriptor).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
    }
    assert!(fdpass::send(&here, b"hello", &vec![file.as_fd(); MOST_DESCRIPTORS + 1]).is_err());
    assert_eq!(fdpass::receive(&there, &mut buffer).unwrap_err(), Errno::AGAIN);
    drop(there);
    // No SIGPIPE: the process lives on.
    assert_eq!(fdpass::send(&here, b"hello", &[]).unwrap_err(), Errno::PIPE);
}

#[test]
fn a_peer_is_known_and_its_end_is_seen() {
    let (here, _there) = UnixStream::pair().unwrap();
    let known = peer(&here).unwrap();
    assert_eq!((known.pid, known.uid), (Some(std::process::id()), rustix::process::getuid().as_raw()));
    let myself = PidFd::of_peer(&here).unwrap();
    assert!(!myself.has_ended());
    myself.may_signal().unwrap();
    let mut child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
    let process = PidFd::open(child.id()).unwrap();
    assert!(!process.has_ended());
    process.kill().unwrap();
    child.wait().unwrap();
    assert!(process.has_ended());
    assert_eq!((process.kill(), process.may_signal()), (Err(Errno::SRCH), Err(Errno::SRCH)));
    assert_eq!(PidFd::open(0).unwrap_err(), Errno::SRCH);
    assert_eq!(PidFd::open(u32::MAX).unwrap_err(), Errno::SRCH);
}

#[test]
fn only_a_userfaultfd_is_taken_for_one() {
    let file: std::os::fd::OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    assert!(Userfaultfd::from_fd(file).is_err());
    if let Some((_, uffd)) = registered(1, Features::empty(), RegisterMode::MISSING) {
        Userfaultfd::from_fd(uffd.into()).unwrap();
    }
}

#[test]
fn a_copy_stops_where_a_page_is_and_says_how_far_it_came() {
    let Some((memory, uffd)) = registered(8, Features::empty(), RegisterMode::MISSING) else { return };
    let at = |page: usize| memory.address() + (page * PAGE) as u64;
    let contents = vec![3; 8 * PAGE];
    assert_eq!(uffd.copy(at(5), &contents[..PAGE], InstallMode::empty()).stopped, None);
    let partial = uffd.copy(at(0), &contents, InstallMode::empty());
    assert_eq!((partial.bytes, partial.stopped), (5 * PAGE as u64, Some(Errno::AGAIN)));
    let there = uffd.copy(at(5), &contents[..PAGE], InstallMode::empty());
    assert_eq!((there.bytes, there.stopped), (0, Some(Errno::EXIST)));
    let partial = uffd.zeropage(at(4), 4 * PAGE as u64, InstallMode::empty());
    assert_eq!((partial.bytes, partial.stopped), (0, Some(Errno::EXIST)));
    let rest = uffd.zeropage(at(6), 2 * PAGE as u64, InstallMode::empty());
    assert_eq!((rest.bytes, rest.stopped), (2 * PAGE as u64, None));
    assert_eq!((memory.load(0), memory.load(7 * PAGE)), (0x0303_0303_0303_0303, 0));
}

#[test]
fn many_faults_come_in_one_read() {
    const THREADS: usize = 24;
    let Some((memory, uffd)) = registered(THREADS, Features::THREAD_ID, RegisterMode::MISSING) else {
        return;
    };
    let waiters: Vec<_> = (0..THREADS)
        .map(|page| {
            let memory = Arc::clone(&memory);
            std::thread::spawn(move || memory.load(page * PAGE))
        })
        .collect();
    let mut buffer = MessageBuffer::new(THREADS);
    let mut faults = Vec::new();
    let mut most = 0;
    while faults.len() < THREADS {
        let messages = read(&uffd, &mut buffer);
        most = most.max(messages.len());
        for message in messages {
            let Message::PageFault { address, flags, thread } = message else { panic!("{message:?}") };
            assert!(thread != 0 && flags.is_empty());
            faults.push(address);
        }
    }
    faults.sort_unstable();
    let all: Vec<u64> = (0..THREADS).map(|page| memory.address() + (page * PAGE) as u64).collect();
    assert_eq!(faults, all);
    assert!(most >= 1);
    assert_eq!(uffd.read(&mut buffer), Ok(0), "what was read once never comes again");
    uffd.zeropage(memory.address(), memory.len() as u64, InstallMode::DONTWAKE);
    uffd.wake(memory.address(), memory.len() as u64).unwrap();
    for waiter in waiters {
        assert_eq!(waiter.join().unwrap(), 0);
    }
}

#[test]
fn a_discard_waits_for_its_event_to_be_read_and_refuses_installs_until_then() {
    let Some((memory, uffd)) = registered(4, Features::EVENT_REMOVE, RegisterMode::MISSING) else { return };
    assert_eq!(uffd.memory(), OwnersMemory::There);
    let contents = vec![3; PAGE];
    assert_eq!(uffd.copy(memory.address(), &contents, InstallMode::empty()).stopped, None);
    let balloon = {
        let memory = Arc::clone(&memory);
        std::thread::spawn(move || memory.dont_need(0, 2 * PAGE).unwrap())
    };
    let ready = rustix::event::poll(&mut [PollFd::new(&uffd, PollFlags::IN)], None);
    assert_eq!(ready, Ok(1));
    assert_eq!(uffd.memory(), OwnersMemory::Changing);
    let refused = uffd.copy(memory.address() + 3 * PAGE as u64, &contents, InstallMode::empty());
    assert_eq!((refused.bytes, refused.stopped), (0, Some(Errno::AGAIN)));
    assert!(!balloon.is_finished());
    // The page is still there, since the discard has not happened.
    assert_eq!(memory.load(0), 0x0303_0303_0303_0303);
    let messages = read(&uffd, &mut MessageBuffer::new(4));
    let (from, to) = (memory.address(), memory.address() + 2 * PAGE as u64);
    assert!(matches!(messages[..], [Message::Remove { start, end }] if (start, end) == (from, to)));
    balloon.join().unwrap();
    assert_eq!(uffd.memory(), OwnersMemory::There);
    assert_eq!(uffd.copy(memory.address(), &contents, InstallMode::empty()).stopped, None);
}

#[test]
fn a_userfaultfd_that_was_never_set_up_has_no_memory() {
    let Ok(unset) = Userfaultfd::open_by_device().or_else(|_| Userfaultfd::open_by_syscall()) else {
        eprintln!("skipped: no right to a userfaultfd");
        return;
    };
    assert_eq!(unset.memory(), OwnersMemory::Gone);
    assert!(unset.read(&mut MessageBuffer::new(1)).is_err());
}

/// Its creator may do that to it at any time, and a worker that waited in read(2) would serve nobody.
#[test]
fn reading_does_not_wait_even_if_the_descriptor_was_made_to_block() {
    let Some((memory, uffd)) = registered(1, Features::empty(), RegisterMode::MISSING) else { return };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    if (numbers.next(), numbers.next()) < (Some(6), Some(10)) {
        eprintln!("skipped: before Linux 6.10 only the file's own flag keeps a read from waiting");
        return;
    }
    rustix::fs::fcntl_setfl(&uffd, rustix::fs::OFlags::empty()).unwrap();
    let (send, read) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(uffd.read(&mut MessageBuffer::new(1))));
    assert_eq!(read.recv_timeout(std::time::Duration::from_secs(60)), Ok(Ok(0)));
    drop(memory);
}

#[test]
fn a_write_protected_page_tells_of_its_write_and_lets_it_through() {
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    let Some((memory, uffd)) = registered(1, Features::PAGEFAULT_FLAG_WP, mode) else { return };
    assert_eq!(uffd.copy(memory.address(), &[0; PAGE], InstallMode::WP).stopped, None);
    let writer = {
        let memory = Arc::clone(&memory);
        std::thread::spawn(move || memory.store(0, 5))
    };
    let messages = read(&uffd, &mut MessageBuffer::new(1));
    let [Message::PageFault { flags, .. }] = messages[..] else { panic!("{messages:?}") };
    assert!(flags.contains(super::uffd::FaultFlags::WP | super::uffd::FaultFlags::WRITE));
    uffd.write_protect(memory.address(), PAGE as u64, false).unwrap();
    writer.join().unwrap();
    assert_eq!(memory.load(0), 5);
}

#[test]
fn a_range_that_is_not_registered_is_told_from_one_that_is() {
    let Some((memory, uffd)) = registered(2, Features::empty(), RegisterMode::MISSING) else { return };
    uffd.unregister(memory.address(), PAGE as u64).unwrap();
    let page = [1; PAGE];
    assert_eq!(uffd.copy(memory.address(), &page, InstallMode::empty()).stopped, Some(Errno::NOENT));
    // A run that begins in it and ends outside is refused whole.
    let across = uffd.copy(memory.address() + PAGE as u64, &[1; 2 * PAGE], InstallMode::empty());
    assert_eq!((across.bytes, across.stopped), (0, Some(Errno::NOENT)));
    let error = uffd.register(memory.address() + 1, PAGE as u64, RegisterMode::MISSING).unwrap_err();
    assert!(error.to_string().starts_with("UFFDIO_REGISTER at 0x"), "{error}");
}

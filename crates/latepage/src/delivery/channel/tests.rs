//! A channel in one process: what each side learns, what is refused, and what garbage can do, which is nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};

use super::*;
use crate::sys::mapping::Mapping;
use crate::sys::memfd;

fn read(channel: &Channel) -> Result<Reader<ChannelMemory>, AttachError> {
    let (memory, bell) = channel.descriptors();
    attach(memory, bell.try_clone_to_owned().unwrap(), channel.shape().pages(), 1)
}

fn fault(page: u32) -> Request {
    Request::Fault { page, write: false, thread: 0 }
}

/// Everything that waits, by slot.
fn take_all(reader: &mut Reader<ChannelMemory>, room: usize) -> Vec<(u32, Request)> {
    let mut found = Vec::new();
    while reader.take(room, |slot, request| found.push((slot, request))) {}
    found
}

#[test]
fn what_is_posted_is_taken_once_and_completed_for_all_who_asked_for_a_page_of_the_range() {
    let channel = Channel::new(200, 64).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seats: Vec<Seat> = [0, 63, 64, 130, 199].map(|slot| channel.seat(slot).unwrap()).into();
    for (seat, page) in seats.iter_mut().zip([7, 8, 8, 40, 63]) {
        seat.post(&fault(page)).unwrap();
        assert_eq!(seat.post(&fault(page)), Err(Pending));
    }
    let found = take_all(&mut reader, 2);
    let pages: Vec<_> = found.iter().map(|(slot, request)| (*slot, request.pages().start)).collect();
    assert_eq!(pages, [(0, 7), (63, 8), (64, 8), (130, 40), (199, 63)]);
    assert!(take_all(&mut reader, 2).is_empty(), "each is handed out once");
    reader.release(&(4..9));
    reader.fail(&(40..41));
    let no_time = Some(Duration::ZERO);
    let over: Vec<Waited> = seats.iter_mut().map(|seat| seat.wait(0, no_time)).collect();
    let done = || Waited::Over(Completion::Done(4..9));
    assert_eq!(over, [done(), done(), done(), Waited::Over(Completion::Failed), Waited::TimedOut]);
    // The whole memory, by slots instead of by pages.
    reader.release(&(0..64));
    assert_eq!(seats[4].wait(0, no_time), Waited::Over(Completion::Done(0..64)));
    assert_eq!(seats[4].wait(0, no_time), Waited::Garbled, "nothing was asked");
}

#[test]
fn whoever_posts_again_and_again_is_not_ahead_of_those_who_wait_already() {
    let channel = Channel::new(200, 64).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seats: Vec<Seat> = [0, 1, 63, 64, 199].map(|slot| channel.seat(slot).unwrap()).into();
    for seat in &mut seats {
        seat.post(&fault(seat.slot() % 64)).unwrap();
    }
    let mut order = Vec::new();
    for _ in 0..3 {
        let mut taken = Vec::new();
        assert!(reader.take(2, |slot, _| taken.push(slot)));
        reader.release(&(0..64));
        for seat in seats.iter_mut().filter(|seat| taken.contains(&seat.slot())) {
            assert!(matches!(seat.wait(0, Some(Duration::ZERO)), Waited::Over(Completion::Done(_))));
            seat.post(&fault(seat.slot() % 64)).unwrap();
        }
        order.extend(taken);
    }
    assert_eq!(order, [0, 1, 63, 64, 199], "each once before one of them comes twice");
}

#[test]
fn a_request_that_makes_no_sense_is_refused_and_handed_to_nobody() {
    let channel = Channel::new(1, 8).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seat = channel.seat(0).unwrap();
    for senseless in [fault(8), fault(u32::MAX), Request::Removed(4..9), Request::Removed(3..3)] {
        seat.post(&senseless).unwrap();
        assert!(take_all(&mut reader, 8).is_empty());
        assert_eq!(seat.wait(0, None), Waited::Over(Completion::Refused));
    }
}

#[test]
fn a_removal_is_answered_when_the_reader_comes_again() {
    let channel = Channel::new(1, 8).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seat = channel.seat(0).unwrap();
    seat.post(&Request::Removed(2..5)).unwrap();
    let mut found = Vec::new();
    assert!(reader.take(8, |_, request| found.push(request)));
    assert_eq!(found, [Request::Removed(2..5)]);
    assert_eq!(seat.wait(0, Some(Duration::ZERO)), Waited::TimedOut, "it has not been seen to yet");
    assert!(!reader.take(8, |_, _| panic!("nothing was posted")));
    assert_eq!(seat.wait(0, None), Waited::Over(Completion::Done(2..5)));
}

#[test]
fn removals_of_many_pages_come_in_parts_and_faults_between_them() {
    let channel = Channel::new(3, 1000).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seats: Vec<Seat> = (0..3).map(|slot| channel.seat(slot).unwrap()).collect();
    seats[0].post(&Request::Removed(0..250)).unwrap();
    seats[1].post(&Request::Removed(900..1000)).unwrap();
    let mut take = || {
        let mut found = Vec::new();
        let more = reader.take_within(8, 100, |slot, request| found.push((slot, request)));
        (more, found)
    };
    let no_time = Some(Duration::ZERO);
    assert_eq!(take(), (true, vec![(0, Request::Removed(0..100))]));
    // Its owner gives up and asks again: that is another one, and no more are kept than there are slots.
    seats[1].abandon();
    seats[1].post(&Request::Removed(0..1000)).unwrap();
    seats[2].post(&fault(7)).unwrap();
    assert_eq!(take(), (true, vec![(0, Request::Removed(100..200))]));
    assert_eq!(take(), (true, vec![(0, Request::Removed(200..250)), (1, Request::Removed(900..950))]));
    assert_eq!(seats[0].wait(0, no_time), Waited::TimedOut, "its last part has not been seen to yet");
    let (more, found) = take();
    assert!(more && found[..2] == [(1, Request::Removed(950..1000)), (1, Request::Removed(0..50))]);
    assert_eq!(found[2..], [(2, fault(7))]);
    assert_eq!(seats[0].wait(0, no_time), Waited::Over(Completion::Done(0..250)));
    for part in 0..9 {
        let pages = 50 + part * 100..150 + part * 100;
        assert_eq!(take(), (true, vec![(1, Request::Removed(pages))]));
    }
    assert_eq!(seats[1].wait(0, no_time), Waited::TimedOut);
    assert_eq!(take(), (true, vec![(1, Request::Removed(950..1000))]));
    assert_eq!(take(), (false, vec![]));
    assert_eq!(seats[1].wait(0, no_time), Waited::Over(Completion::Done(0..1000)));
}

#[test]
fn the_bell_rings_once_for_a_reader_that_sleeps_and_not_for_one_that_does_not() {
    let channel = Channel::new(3, 8).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seats: Vec<Seat> = (0..3).map(|slot| channel.seat(slot).unwrap()).collect();
    let rung = || {
        let mut count = [0; 8];
        let read = rustix::io::read(channel.descriptors().1, &mut count);
        read.map_or(0, |_| u64::from_ne_bytes(count))
    };
    seats[0].post(&fault(1)).unwrap();
    assert_eq!(rung(), 0, "a reader that has never slept looks by itself");
    assert_eq!(take_all(&mut reader, 8).len(), 1);
    seats[1].post(&fault(2)).unwrap();
    seats[2].post(&fault(3)).unwrap();
    assert_eq!(rung(), 1);
    assert!(reader.take(8, |_, _| ()), "awake");
    seats[1].abandon();
    seats[1].post(&fault(2)).unwrap();
    assert_eq!(rung(), 0);
}

#[test]
fn a_channel_has_one_reader_until_it_is_dead_and_then_the_next_finds_what_it_left() {
    let channel = Channel::new(2, 8).unwrap();
    let mut first = read(&channel).unwrap();
    assert!(matches!(read(&channel), Err(AttachError::Taken)));
    let (mut taken, mut untouched) = (channel.seat(0).unwrap(), channel.seat(1).unwrap());
    taken.post(&fault(1)).unwrap();
    assert_eq!(take_all(&mut first, 8), [(0, fault(1))]);
    untouched.post(&fault(2)).unwrap();
    let generation = first.generation();
    drop(first);
    let mut second = read(&channel).unwrap();
    assert_eq!(second.generation(), generation + 1);
    assert_eq!(take_all(&mut second, 8), [(0, fault(1)), (1, fault(2))]);
    second.release(&(0..8));
    for seat in [&mut taken, &mut untouched] {
        assert_eq!(seat.wait(0, None), Waited::Over(Completion::Done(0..8)));
    }
}

#[test]
fn a_seat_is_given_to_one_thread_and_taken_over_from_a_dead_one() {
    let channel = Channel::new(1, 8).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut dead = channel.seat(0).unwrap();
    assert!(channel.seat(0).is_none() && channel.seat(1).is_none());
    dead.post(&fault(1)).unwrap();
    assert_eq!(take_all(&mut reader, 8).len(), 1);
    std::mem::forget(dead);
    let mut next = channel.take_over(0);
    next.post(&fault(5)).unwrap();
    reader.release(&(1..2));
    assert_eq!(next.wait(0, Some(Duration::ZERO)), Waited::TimedOut, "that was the dead one's");
    assert_eq!(take_all(&mut reader, 8), [(0, fault(5))]);
    reader.release(&(5..6));
    assert_eq!(next.wait(0, None), Waited::Over(Completion::Done(5..6)));
}

#[test]
fn a_vmm_that_replaces_another_sits_down_at_its_channel_and_the_reader_notices_nothing() {
    let before = Channel::new(2, 8).unwrap();
    let mut reader = read(&before).unwrap();
    let [mut left, mut open] = [0, 1].map(|slot| before.seat(slot).unwrap());
    left.post(&fault(1)).unwrap();
    open.post(&fault(2)).unwrap();
    assert_eq!(take_all(&mut reader, 8).len(), 2);
    let (memory, bell) = before.descriptors();
    let [memory, bell] = [memory, bell].map(|descriptor| descriptor.try_clone_to_owned().unwrap());
    // Its process is gone, in the middle of whatever its threads did.
    std::mem::forget((left, open));
    drop(before);
    let after = Channel::from_descriptors(memory, bell).unwrap();
    assert_eq!((after.shape().slots(), after.shape().pages()), (2, 8));
    let mut seat = after.seat(0).unwrap();
    assert!(after.seat(0).is_none() && after.seat(2).is_none());
    reader.release(&(1..3));
    seat.post(&fault(5)).unwrap();
    assert_eq!(take_all(&mut reader, 8), [(0, fault(5))]);
    reader.release(&(5..6));
    assert_eq!(seat.wait(0, None), Waited::Over(Completion::Done(5..6)));
    // It can be handed on to a reader, as one that was made can.
    drop(reader);
    assert_eq!(read(&after).unwrap().generation(), 2);
}

#[test]
fn what_nobody_waits_for_is_completed_without_harm() {
    let channel = Channel::new(2, 8).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seat = channel.seat(1).unwrap();
    reader.release(&(0..8));
    reader.fail(&(3..4));
    seat.post(&fault(3)).unwrap();
    // It was posted after that, and has not been taken: neither is an answer to it.
    reader.release(&(3..4));
    assert_eq!(seat.wait(0, Some(Duration::ZERO)), Waited::TimedOut);
    assert_eq!(take_all(&mut reader, 8), [(1, fault(3))]);
    reader.release(&(4..8));
    assert_eq!(seat.wait(0, Some(Duration::ZERO)), Waited::TimedOut, "other pages");
    reader.release(&(3..4));
    reader.fail(&(3..4));
    assert_eq!(seat.wait(0, None), Waited::Over(Completion::Done(3..4)), "once, and the first counts");
}

#[test]
fn who_is_released_among_others_wakes_with_the_last_of_a_few_or_when_that_is_asked_for() {
    // As many as are woken together, then a few: nobody looks but when he is woken, and a wake that lacks is a hang.
    let channel = Channel::new(8, 8).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut seats: Vec<Seat> = (0..8).map(|slot| channel.seat(slot).unwrap()).collect();
    for (threads, asks) in [(8, false), (3, true)] {
        std::thread::scope(|scope| {
            for (seat, page) in seats.iter_mut().zip(0..threads) {
                scope.spawn(move || {
                    seat.post(&fault(page)).unwrap();
                    assert_eq!(seat.wait(0, None), Waited::Over(Completion::Done(page..page + 1)));
                });
            }
            let mut taken = 0;
            while taken < threads {
                reader.take(8, |_, _| taken += 1);
            }
            (0..threads).for_each(|page| reader.release_among_others(&(page..page + 1)));
            if asks {
                reader.wake();
            }
        });
    }
}

#[test]
fn bits_of_slots_that_there_are_not_are_passed_by() {
    let channel = Channel::new(70, 8).unwrap();
    let mut reader = read(&channel).unwrap();
    let words = Mapping::shared(channel.descriptors().0, 0, channel.shape().bytes()).unwrap();
    let mut seat = channel.seat(69).unwrap();
    seat.post(&fault(3)).unwrap();
    // The top, and both leaves: docs/channel.md says where they lie.
    for at in [128, 192, 192 + 64] {
        words.store(at, u64::MAX);
    }
    assert_eq!(take_all(&mut reader, 4096), [(69, fault(3))]);
}

#[test]
fn no_channel_is_without_a_slot_or_has_more_than_its_summary_can_name() {
    for slots in [0, MOST_SLOTS + 1, u32::MAX] {
        assert!(matches!(Channel::new(slots, 8), Err(MakeError::Shape(BadShape::Slots(_)))));
    }
    assert!(matches!(Channel::new(1, 0), Err(MakeError::Shape(BadShape::NoPages))));
    let channel = Channel::new(MOST_SLOTS, u32::MAX).unwrap();
    let mut reader = read(&channel).unwrap();
    let mut last = channel.seat(MOST_SLOTS - 1).unwrap();
    last.post(&fault(u32::MAX - 1)).unwrap();
    assert_eq!(take_all(&mut reader, 1), [(MOST_SLOTS - 1, fault(u32::MAX - 1))]);
    reader.release(&(0..u32::MAX));
    assert_eq!(last.wait(0, None), Waited::Over(Completion::Done(0..u32::MAX)));
}

/// A memory file of so many bytes with these seals, and the header of a channel of one slot and eight pages.
fn forged(bytes: u64, seals: SealFlags, change: impl Fn(&mut [u64; 4])) -> OwnedFd {
    let file = rustix::fs::memfd_create("forged", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    let mut words = Header::of(Shape::new(1, 8).unwrap()).words();
    change(&mut words);
    for (offset, word) in Header::OFFSETS.into_iter().zip(words) {
        rustix::io::pwrite(&file, &word.to_le_bytes(), offset as u64).unwrap();
    }
    // What was written lies within: a file that shall be short is cut again.
    rustix::fs::ftruncate(&file, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

#[test]
fn a_memory_that_is_no_channel_or_cannot_be_trusted_is_refused_with_its_reason() {
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let bell = || rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let refused = |file: &OwnedFd, bell: OwnedFd, pages, vcpus| {
        attach(file.as_fd(), bell, pages, vcpus).unwrap_err().to_string()
    };
    assert!(attach(forged(4096, sealed, |_| ()).as_fd(), bell(), 8, 1).is_ok());
    type Change = fn(&mut [u64; 4]);
    let nothing: Change = |_| ();
    for (bytes, seals, change, says) in [
        (4096, SealFlags::empty(), nothing, "its length can still change"),
        (4096, SealFlags::SHRINK | SealFlags::SEAL, nothing, "F_SEAL_GROW"),
        (4096, sealed | SealFlags::FUTURE_WRITE, nothing, "cannot be written"),
        (64, sealed, nothing, "it has 64 bytes and must have 4096"),
        (0, sealed, nothing, "it has 0 bytes and must have 4096"),
        (8192, sealed, nothing, "it has 8192 bytes and must have 4096"),
        (4096, sealed, |words| words[2] = 100 | 8 << 32, "a channel of 100 slots has 8192"),
        (
            4096,
            sealed,
            |words| (words[2], words[3]) = (100 | 8 << 32, 8192),
            "it has 4096 bytes and must have 8192",
        ),
        (4096, sealed, |words| words[0] = 0, "does not begin with \"latechan\""),
        (4096, sealed, |words| words[1] = 2 | 64 << 32, "version 2; this side speaks version 1"),
        (
            4096,
            sealed,
            |words| words[1] = 1 | 128 << 32,
            "its slots have 128 bytes; in version 1 they have 64",
        ),
        (4096, sealed, |words| words[2] = 8 << 32, "a channel of 0 slots"),
        (4096, sealed, |words| words[2] = 4097 | 8 << 32, "a channel of 4097 slots"),
        (4096, sealed, |words| words[2] = 1, "without a page"),
    ] {
        let text = refused(&forged(bytes, seals, change), bell(), 8, 1);
        assert!(text.contains(says), "{text}");
    }
    let good = forged(4096, sealed, |_| ());
    assert_eq!(refused(&good, bell(), 9, 1), "it is a channel for 8 pages and the regions have 9");
    assert!(refused(&good, bell(), 8, 2).starts_with("it has 1 slots for 2 vCPUs"));
    assert!(refused(&good, memfd::create("no bell", 4096).unwrap(), 8, 1).ends_with("no eventfd"));
    let plain = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(refused(&plain, bell(), 8, 1).contains("no memory file"));
    // A VMM that is handed one trusts it no further.
    let replaced = |file: OwnedFd| Channel::from_descriptors(file, bell());
    assert!(replaced(good).is_ok());
    assert!(matches!(replaced(plain), Err(AttachError::NotFixed(_))));
    let other = forged(4096, sealed, |words| words[1] = 2 | 64 << 32);
    assert!(matches!(replaced(other), Err(AttachError::Header(BadHeader::Version(2)))));
    let short = forged(4096, sealed, |words| (words[2], words[3]) = (100 | 8 << 32, 8192));
    assert!(matches!(replaced(short), Err(AttachError::NotFixed(_))));
}

/// What a stranger does, and what an honest thread and the reader do meanwhile.
#[derive(Clone, Debug)]
enum Deed {
    Scribble { word: usize, value: u64 },
    Post { slot: u32, request: Request },
    Take { room: usize },
    Release { first: u32, count: u32 },
    Fail { page: u32 },
    Wait { slot: u32 },
    Abandon { slot: u32 },
    Restart,
}

const SLOTS: u32 = 70;
const PAGES: u32 = 32;

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let words = Shape::new(SLOTS, PAGES).unwrap().bytes() / 8;
    let value = prop_oneof![
        any::<u64>(),
        0_u64..16,
        (0_u64..16, 0_u64..4).prop_map(|(low, high)| low | high << 32),
        Just(u64::MAX)
    ];
    let request = prop_oneof![
        (0..PAGES + 2, any::<bool>()).prop_map(|(page, write)| Request::Fault { page, write, thread: 9 }),
        (0..PAGES + 2, 0..PAGES).prop_map(|(first, count)| Request::Removed(first..first + count)),
    ];
    let deed = prop_oneof![
        6 => (0..words, value).prop_map(|(word, value)| Deed::Scribble { word, value }),
        6 => (0..SLOTS, request).prop_map(|(slot, request)| Deed::Post { slot, request }),
        6 => (1_usize..100).prop_map(|room| Deed::Take { room }),
        3 => (0..PAGES, 1..PAGES).prop_map(|(first, count)| Deed::Release { first, count: count.min(PAGES - first) }),
        1 => (0..PAGES).prop_map(|page| Deed::Fail { page }),
        3 => (0..SLOTS).prop_map(|slot| Deed::Wait { slot }),
        1 => (0..SLOTS).prop_map(|slot| Deed::Abandon { slot }),
        1 => Just(Deed::Restart),
    ];
    prop::collection::vec(deed, 1..300)
}

proptest! {
    #[test]
    fn whatever_a_peer_scribbles_the_reader_ends_and_hands_out_nothing_but_pages_of_the_session(deeds in deeds()) {
        let channel = Channel::new(SLOTS, PAGES).unwrap();
        let mut reader = Some(read(&channel).unwrap());
        let words = Mapping::shared(channel.descriptors().0, 0, channel.shape().bytes()).unwrap();
        let mut seats: Vec<Seat> = (0..SLOTS).map(|slot| channel.seat(slot).unwrap()).collect();
        for deed in deeds {
            let reader_now = reader.as_mut().unwrap();
            match deed {
                Deed::Scribble { word, value } => words.store(word * 8, value),
                Deed::Post { slot, request } => { let _ = seats[slot as usize].post(&request); }
                Deed::Take { room } => {
                    let mut found = 0;
                    reader_now.take(room, |slot, request| {
                        assert!(slot < SLOTS && !request.pages().is_empty() && request.pages().end <= PAGES);
                        found += 1;
                    });
                    prop_assert!(found <= room.min(SLOTS as usize));
                }
                Deed::Release { first, count } => reader_now.release(&(first..first + count)),
                Deed::Fail { page } => reader_now.fail(&(page..page + 1)),
                Deed::Wait { slot } => {
                    if let Waited::Over(Completion::Done(pages)) = seats[slot as usize].wait(3, Some(Duration::ZERO)) {
                        prop_assert!(!pages.is_empty() && pages.end <= PAGES);
                    }
                }
                Deed::Abandon { slot } => seats[slot as usize].abandon(),
                Deed::Restart => {
                    drop(reader.take());
                    // A header that was written over is no channel any more: that VM has harmed itself.
                    for (offset, word) in Header::OFFSETS.into_iter().zip(Header::of(channel.shape()).words()) {
                        words.store(offset, word);
                    }
                    reader = Some(read(&channel).unwrap());
                }
            }
        }
    }
}

//! What a memory file has at hand, and what it vouches for.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use super::{HUGE, LONG, PAGE, Scrap, layout, notice, with_lease};
use crate::source::{Answer, AtHand, FileSource, Source, SourceError, SourceNotice};
use crate::sys::mapping::{Mapping, Window};

/// What is at hand of a source that has had time to look; `None` where it has no windows, of which the reason is printed.
fn surveyed(scrap: &Scrap) -> Option<FileSource> {
    let source = with_lease(scrap, LONG)?;
    if !source.wait_surveyed() {
        println!("skipped: the kernel does not tell what is in memory of {}", scrap.0.display());
        return None;
    }
    Some(source)
}

/// What a window shows, as the kernel copies it.
fn shown(window: Window<'_>) -> Vec<u8> {
    let mut bytes = vec![0xEE; window.len()];
    assert_eq!(window.copy_to(&mut bytes), Ok(window.len()));
    bytes
}

#[test]
fn what_is_in_memory_is_lent_as_it_is_and_zero_pages_among_it_are_named() {
    let contents: Vec<u8> = [1, 2, 0, 0, 3].iter().flat_map(|number| [*number; PAGE]).collect();
    let scrap = Scrap::file(&contents);
    let Some(source) = surveyed(&scrap) else { return };
    let at = |page: usize, pages| source.at_hand((page * PAGE) as u64, pages * PAGE, PAGE);
    let Some(AtHand::Contents(window)) = at(0, 5) else { panic!("{:?}", at(0, 5)) };
    assert!(shown(window) == contents[..2 * PAGE]);
    assert!(matches!(at(2, 3), Some(AtHand::Zero(bytes)) if bytes == 2 * PAGE as u64));
    assert!(matches!(at(3, 1), Some(AtHand::Zero(bytes)) if bytes == PAGE as u64));
    let Some(AtHand::Contents(window)) = at(4, 5) else { panic!("{:?}", at(4, 5)) };
    assert!(shown(window) == contents[4 * PAGE..]);
    // `ask` says the same of them.
    let mut scratch = [0xEE; 5 * PAGE];
    assert_eq!(source.ask(2 * PAGE as u64, 3 * PAGE, PAGE, &mut scratch), Ok(Answer::Zero(2 * PAGE as u64)));
    assert!(at(5, 1).is_none() && source.at_hand(!0xFFF, PAGE, PAGE).is_none());
    source.vouch().unwrap();
}

#[test]
fn what_is_mapped_for_vms_is_known_to_be_until_nobody_is_served() {
    let scrap = Scrap::numbered(64);
    let Some(source) = surveyed(&scrap) else { return };
    let mapped = |page: usize, pages| match source.at_hand((page * PAGE) as u64, pages * PAGE, PAGE) {
        Some(AtHand::Contents(window)) => window.is_known_mapped() && window.part(0..PAGE).is_known_mapped(),
        other => panic!("{other:?}"),
    };
    assert!(!mapped(0, 64), "nobody is served");
    source.admit(&layout(64 * PAGE as u64)).unwrap();
    source.wait_surveyed();
    assert!(mapped(0, 64) && mapped(63, 1));
    source.idle();
    while mapped(0, 1) {
        thread::yield_now();
    }
    assert!(!mapped(63, 1));
}

#[test]
fn a_window_of_huge_units_ends_at_one_that_is_all_zero_and_at_no_zero_page() {
    let mut contents = vec![7; 4 * HUGE];
    contents[HUGE + 5 * PAGE..HUGE + 9 * PAGE].fill(0);
    contents[HUGE - PAGE..HUGE].fill(0);
    contents[3 * HUGE..].fill(0);
    let scrap = Scrap::file(&contents);
    let Some(source) = surveyed(&scrap) else { return };
    let at = |huge: usize, units| source.at_hand((huge * HUGE) as u64, units * HUGE, HUGE);
    assert!(matches!(at(0, 4), Some(AtHand::Contents(window)) if window.len() == 3 * HUGE));
    assert!(matches!(at(0, 2), Some(AtHand::Contents(window)) if window.len() == 2 * HUGE));
    assert!(matches!(at(3, 1), Some(AtHand::Zero(bytes)) if bytes == HUGE as u64));
}

#[test]
fn holes_are_at_hand_and_units_that_are_part_hole_are_not() {
    let scrap = Scrap::path();
    let file = File::create(&scrap).unwrap();
    file.set_len(4 * HUGE as u64).unwrap();
    file.write_all_at(&[9; PAGE], (HUGE + 8 * PAGE) as u64).unwrap();
    file.write_all_at(&vec![9; HUGE], 3 * HUGE as u64).unwrap();
    drop(file);
    let Some(source) = surveyed(&scrap) else { return };
    let at = |offset: usize, length, unit| source.at_hand(offset as u64, length, unit);
    assert!(matches!(at(0, 4 * HUGE, HUGE), Some(AtHand::Zero(bytes)) if bytes == HUGE as u64));
    assert!(at(HUGE, HUGE, HUGE).is_none(), "a page of data and hole");
    assert!(matches!(at(3 * HUGE, HUGE, HUGE), Some(AtHand::Contents(window)) if window.len() == HUGE));
    assert!(matches!(at(HUGE, HUGE, PAGE), Some(AtHand::Zero(bytes)) if bytes == 8 * PAGE as u64));
    assert!(
        matches!(at(HUGE + 8 * PAGE, HUGE, PAGE), Some(AtHand::Contents(window)) if window.len() == PAGE)
    );
}

#[test]
fn what_is_not_in_memory_is_not_lent_and_is_not_read_by_looking() {
    let scrap = Scrap::numbered(64);
    let file = File::open(&scrap).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let Some(source) = surveyed(&scrap) else { return };
    if source.at_hand(0, PAGE, PAGE).is_some() {
        println!("skipped: the page cache could not be emptied");
        return;
    }
    assert!((0..64).all(|page| source.at_hand(page * PAGE as u64, PAGE, PAGE).is_none()));
    // Read by somebody, it is lent from the next look on.
    let mut scratch = [0; PAGE];
    for page in 0..64 {
        source.wait(page * PAGE as u64, PAGE, PAGE, &mut scratch).unwrap();
    }
    source.wait_surveyed();
    assert!(
        matches!(source.at_hand(0, 64 * PAGE, PAGE), Some(AtHand::Contents(window)) if window.len() == 64 * PAGE)
    );
}

#[test]
fn nothing_is_lent_of_a_file_that_others_may_write() {
    let scrap = Scrap::numbered(4);
    let writer = OpenOptions::new().write(true).open(&scrap).unwrap();
    let source = FileSource::open(&scrap).unwrap();
    source.wait_surveyed();
    // Cut within a page, a mapping would show the rest of it as zero.
    writer.set_len(2 * PAGE as u64 + 100).unwrap();
    assert!((0..4).all(|page| source.at_hand(page * PAGE as u64, PAGE, PAGE).is_none()));
}

#[test]
fn what_was_copied_while_a_writer_was_let_in_is_not_vouched_for() {
    let scrap = Scrap::numbered(2);
    let Some(source) = surveyed(&scrap) else { return };
    source.admit(&layout(2 * PAGE as u64)).unwrap();
    let writer = scrap.open_to_write();
    notice(&source, |notice| matches!(notice, SourceNotice::LeaseBreaking { .. }));
    // Held back: all is as it was.
    assert!(matches!(source.at_hand(0, PAGE, PAGE), Some(AtHand::Contents(_))));
    source.vouch().unwrap();
    source.filled();
    drop(writer.join().unwrap());
    // Let in: nothing is lent, and nothing that was is good, unless it went without having written.
    loop {
        match (source.at_hand(0, PAGE, PAGE).is_some(), source.vouch()) {
            (false, Err(SourceError::OpenedForWriting { .. })) => {}
            _ if source.has_lease() => break,
            _ => {}
        }
        if source.check().iter().any(|notice| matches!(notice, SourceNotice::LeaseRegained { .. })) {
            break;
        }
        thread::yield_now();
    }
    source.vouch().unwrap();
    assert!(matches!(source.at_hand(0, PAGE, PAGE), Some(AtHand::Contents(_))));
}

#[test]
fn a_lease_that_nobody_looked_at_for_long_is_looked_at_before_a_copy_is_vouched_for() {
    let scrap = Scrap::numbered(1);
    let Some(source) = with_lease(&scrap, Duration::ZERO) else { return };
    assert!(source.at_hand(0, PAGE, PAGE).is_none());
    // It stands, or this look has found the time over; it is never believed unseen.
    if source.vouch().is_err() {
        assert!(!source.has_lease() || source.vouch().is_err());
    }
}

#[test]
fn a_file_that_nobody_needs_can_be_evicted_and_is_then_not_thought_to_be_there() {
    let scrap = Scrap::numbered(64);
    let Some(source) = surveyed(&scrap) else { return };
    let file = File::open(&scrap).unwrap();
    file.sync_all().unwrap();
    source.admit(&layout(64 * PAGE as u64)).unwrap();
    let Some(AtHand::Contents(window)) = source.at_hand(0, 64 * PAGE, PAGE) else { panic!() };
    shown(window);
    // What was touched stays mapped while a VM may need it, and a page that is mapped is not evicted.
    let look = Mapping::read_only(file.as_fd(), 64 * PAGE).unwrap();
    let evict = || {
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut found = [0; 64];
        look.resident(0..64 * PAGE, &mut found).unwrap().iter().all(|page| page & 1 == 0)
    };
    if with_memory(&scrap) {
        println!("skipped: {} is in memory by its nature", scrap.0.display());
        return;
    }
    source.idle();
    // The thread unmaps it in its own time.
    while !evict() {
        thread::yield_now();
    }
    source.admit(&layout(64 * PAGE as u64)).unwrap();
    assert!(source.at_hand(0, PAGE, PAGE).is_none());
    assert_eq!(source.wait(0, PAGE, PAGE, &mut [0; PAGE]), Ok(Answer::Bytes(&[1; PAGE])));
}

fn with_memory(scrap: &Scrap) -> bool {
    crate::sys::file::lives_in_memory(File::open(scrap).unwrap().as_fd())
}

#[test]
fn misses_draw_what_lies_around_them_into_memory_and_it_is_right() {
    let scrap = Scrap::path();
    // Of two stretches; every ninth page is zero.
    let page = |number: usize| [if number.is_multiple_of(9) { 0 } else { number as u8 | 1 }; PAGE];
    std::fs::write(&scrap, (0..2 * HUGE / PAGE).flat_map(page).collect::<Vec<u8>>()).unwrap();
    if with_memory(&scrap) {
        println!("skipped: {} is in memory by its nature", scrap.0.display());
        return;
    }
    let file = File::open(&scrap).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let Some(source) = surveyed(&scrap) else { return };
    source.admit(&layout(2 * HUGE as u64)).unwrap();
    let mut scratch = [0; PAGE];
    for missed in [100, 300] {
        source.wait((missed * PAGE) as u64, PAGE, PAGE, &mut scratch).unwrap();
    }
    for number in 0..HUGE / PAGE {
        let found = loop {
            match source.at_hand((number * PAGE) as u64, PAGE, PAGE) {
                Some(found) => break found,
                None => thread::yield_now(),
            }
        };
        match found {
            AtHand::Zero(_) => assert!(number.is_multiple_of(9)),
            AtHand::Contents(window) => assert!(shown(window) == page(number) && !number.is_multiple_of(9)),
        }
    }
}

//! What a userfaultfd brings, sorted. Against the real kernel; skipped, with a reason, where there is no userfaultfd.
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, most of them short")]

use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::{Batch, Delivery, FaultFlags, Surprise, UffdDelivery};
use crate::memory::{Layout, PageSize, Region};
use crate::sys::mapping::Mapping;
use crate::sys::uffd::{Features, RegisterMode, Userfaultfd};

const PAGE: usize = 4096;

/// Memory of so many pages, of which the layout names all but the last.
fn made(pages: usize, features: Features) -> Option<(Arc<Mapping>, Layout, Arc<Userfaultfd>)> {
    let uffd = match Userfaultfd::create(features) {
        Ok(uffd) => Arc::new(uffd),
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    let mapping = Mapping::anonymous(pages * PAGE).unwrap();
    uffd.register(mapping.address(), mapping.len() as u64, RegisterMode::MISSING).unwrap();
    let (hva, size) = (mapping.address(), ((pages - 1) * PAGE) as u64);
    let layout =
        Layout::new(vec![Region { gpa: None, hva, size, offset: 0, page_size: PageSize::Small }]).unwrap();
    Some((Arc::new(mapping), layout, uffd))
}

fn take(delivery: &mut UffdDelivery, layout: &Layout, batch: &mut Batch) {
    batch.clear();
    delivery.take(layout, batch).unwrap();
}

fn wait(delivery: &UffdDelivery) {
    let bound = Timespec { tv_sec: 60, tv_nsec: 0 };
    let descriptor = delivery.descriptor();
    let ready = rustix::event::poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&bound));
    assert_eq!(ready, Ok(1), "nothing came");
}

#[test]
fn removals_are_told_apart_from_faults_however_they_are_mixed() {
    let Some((memory, layout, uffd)) = made(9, Features::EVENT_REMOVE) else { return };
    let mut delivery = UffdDelivery::new(Arc::clone(&uffd));
    let mut batch = Batch::new(16);
    let on = |work: fn(&Mapping)| {
        let memory = Arc::clone(&memory);
        std::thread::spawn(move || work(&memory))
    };
    let reader = on(|memory| _ = memory.load(5 * PAGE));
    wait(&delivery);
    let writer = on(|memory| memory.store(6 * PAGE, 1));
    let balloon = on(|memory| memory.dont_need(PAGE, 3 * PAGE).unwrap());
    let (mut removed, mut faults) = (Vec::new(), Vec::new());
    while removed.is_empty() || faults.len() < 2 {
        wait(&delivery);
        take(&mut delivery, &layout, &mut batch);
        removed.append(&mut batch.removed);
        faults.extend(batch.faults.iter().map(|fault| (fault.page, fault.flags)));
    }
    balloon.join().unwrap();
    faults.sort_unstable_by_key(|(page, _)| *page);
    assert_eq!((removed, faults), (vec![1..4], vec![(5, FaultFlags::empty()), (6, FaultFlags::WRITE)]));
    // The batch is empty again where nothing waits.
    take(&mut delivery, &layout, &mut batch);
    assert!(batch.removed.is_empty() && batch.faults.is_empty() && !batch.more);
    uffd.unregister(memory.address(), memory.len() as u64).unwrap();
    reader.join().unwrap();
    writer.join().unwrap();
}

#[test]
fn a_fault_outside_every_region_is_no_silent_one() {
    let Some((memory, layout, uffd)) = made(3, Features::empty()) else { return };
    let mut delivery = UffdDelivery::new(Arc::clone(&uffd));
    let mut batch = Batch::new(16);
    let stray = {
        let memory = Arc::clone(&memory);
        std::thread::spawn(move || memory.load(2 * PAGE))
    };
    wait(&delivery);
    take(&mut delivery, &layout, &mut batch);
    assert!(batch.faults.is_empty());
    let expected = memory.address() + 2 * PAGE as u64;
    assert!(matches!(batch.surprises[..], [Surprise::Stray(address)] if address == expected));
    uffd.unregister(memory.address(), memory.len() as u64).unwrap();
    stray.join().unwrap();
}

#[test]
fn a_full_batch_says_that_there_may_be_more_and_loses_none() {
    const THREADS: usize = 20;
    let Some((memory, layout, uffd)) = made(THREADS + 1, Features::empty()) else { return };
    let mut delivery = UffdDelivery::new(Arc::clone(&uffd));
    let mut batch = Batch::new(4);
    let waiters: Vec<_> = (0..THREADS)
        .map(|page| {
            let memory = Arc::clone(&memory);
            std::thread::spawn(move || memory.load(page * PAGE))
        })
        .collect();
    let mut pages = Vec::new();
    while pages.len() < THREADS {
        wait(&delivery);
        take(&mut delivery, &layout, &mut batch);
        assert_eq!(batch.more, batch.faults.len() == 4);
        pages.extend(batch.faults.iter().map(|fault| fault.page));
    }
    pages.sort_unstable();
    assert_eq!(pages, (0..THREADS as u32).collect::<Vec<_>>());
    // Released, they look again, and each faults once more.
    delivery.release(&layout, 0..THREADS as u32);
    wait(&delivery);
    take(&mut delivery, &layout, &mut batch);
    assert!(!batch.faults.is_empty());
    uffd.unregister(memory.address(), memory.len() as u64).unwrap();
    for waiter in waiters {
        waiter.join().unwrap();
    }
}

#[test]
fn a_range_that_was_unmapped_is_removed() {
    let Some((memory, layout, uffd)) = made(5, Features::EVENT_UNMAP) else { return };
    let mut delivery = UffdDelivery::new(uffd);
    let unmapper = std::thread::spawn(move || drop(Arc::into_inner(memory)));
    wait(&delivery);
    let mut batch = Batch::new(4);
    take(&mut delivery, &layout, &mut batch);
    assert_eq!(batch.removed, [0..4]);
    unmapper.join().unwrap();
}

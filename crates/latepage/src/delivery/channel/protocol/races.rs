//! loom: no post is lost, whatever the reader and the threads of the VMM do at the same time, and wherever a reader dies.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p latepage --lib --release loom_`. A wait that nobody ends is a deadlock, which
//! loom reports.

use std::ops::Range;
use std::time::Duration;

use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::layout::Shape;
use super::{Completion, Reader, Request, Seat, Shared, Waited, Woken};
use crate::memory::atomic::AtomicU64;

/// A channel's memory, and the kernel's two ways of waking: a futex for each slot, and an eventfd.
struct Memory {
    words: Vec<AtomicU64>,
    shape: Shape,
    /// The kernel looks at a futex word, and wakes, under a lock of its own.
    futexes: Vec<(Mutex<()>, Condvar)>,
    bell: (Mutex<bool>, Condvar),
}

impl Memory {
    fn new(slots: u32) -> Arc<Self> {
        let shape = Shape::new(slots, 16).unwrap();
        Arc::new(Self {
            words: (0..shape.slot(slots - 1, 56) / 8 + 1).map(|_| AtomicU64::new(0)).collect(),
            shape,
            futexes: (0..slots).map(|_| (Mutex::new(()), Condvar::new())).collect(),
            bell: (Mutex::new(false), Condvar::new()),
        })
    }

    fn futex(&self, offset: usize) -> &(Mutex<()>, Condvar) {
        &self.futexes[(offset - self.shape.slot(0, 0)) / 64]
    }

    /// The reader's sleep: until the bell has rung since the last time.
    fn sleep_until_rung(&self) {
        let mut rung = self.bell.0.lock().unwrap();
        while !*rung {
            rung = self.bell.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// One side's way to the memory. A reader that is killed between a completion and its wake is one that cannot wake.
#[derive(Clone)]
struct Side {
    memory: Arc<Memory>,
    wakes: bool,
}

impl Shared for Side {
    fn word(&self, offset: usize) -> &AtomicU64 {
        &self.memory.words[offset / 8]
    }

    fn sleep(&self, offset: usize, low: u32, timeout: Option<Duration>) -> Woken {
        assert_eq!(timeout, None);
        let (lock, condvar) = self.memory.futex(offset);
        let guard = lock.lock().unwrap();
        if self.word(offset).load(loom::sync::atomic::Ordering::SeqCst) as u32 == low {
            drop(condvar.wait(guard).unwrap());
        }
        Woken::Look
    }

    fn wake(&self, offset: usize) {
        if self.wakes {
            let (lock, condvar) = self.memory.futex(offset);
            let _guard = lock.lock().unwrap();
            condvar.notify_all();
        }
    }

    fn ring(&self) {
        let (rung, condvar) = &self.memory.bell;
        *rung.lock().unwrap() = true;
        condvar.notify_all();
    }
}

fn side(memory: &Arc<Memory>) -> Side {
    Side { memory: Arc::clone(memory), wakes: true }
}

fn seat(memory: &Arc<Memory>, slot: u32) -> Seat<Side> {
    Seat::take(side(memory), memory.shape, slot)
}

fn reader(memory: &Arc<Memory>) -> Reader<Side> {
    Reader::begin(side(memory), memory.shape)
}

fn fault(page: u32) -> Request {
    Request::Fault { page, write: false, thread: 0 }
}

/// Posts faults, one after the other, and waits for each.
fn posts(memory: &Arc<Memory>, slot: u32, pages: Range<u32>) -> thread::JoinHandle<()> {
    let memory = Arc::clone(memory);
    thread::spawn(move || {
        let mut seat = seat(&memory, slot);
        for page in pages {
            seat.post(&fault(page)).unwrap();
            match seat.wait(0, None) {
                Waited::Over(Completion::Done(filled)) => assert!(filled.contains(&page)),
                other => panic!("{other:?}"),
            }
        }
    })
}

/// Serves faults until so many have been completed, sleeping where nothing waits.
fn serve(reader: &mut Reader<Side>, memory: &Memory, mut faults: usize) {
    while faults > 0 {
        let mut pages = Vec::new();
        let more = reader.take(8, |_, request| pages.push(request.pages()));
        for page in pages {
            // More than was asked.
            reader.release(&(page.start & !1..(page.start & !1) + 2));
            faults -= 1;
        }
        if !more {
            memory.sleep_until_rung();
        }
    }
}

/// Every interleaving with so many switches from a thread that could have gone on: without a bound, minutes.
fn explore(switches: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(switches);
    builder.max_branches = 10_000;
    builder.check(model);
}

#[test]
fn loom_a_post_wakes_the_reader_however_it_falls_asleep_and_is_woken_itself() {
    explore(6, || {
        let memory = Memory::new(1);
        let vcpu = posts(&memory, 0, 1..2);
        serve(&mut reader(&memory), &memory, 1);
        vcpu.join().unwrap();
    });
}

#[test]
fn loom_a_slot_is_posted_to_again_as_soon_as_it_was_completed() {
    explore(5, || {
        let memory = Memory::new(1);
        let vcpu = posts(&memory, 0, 1..3);
        serve(&mut reader(&memory), &memory, 2);
        vcpu.join().unwrap();
    });
}

/// The same, waking once for all that were taken together.
fn serve_together(reader: &mut Reader<Side>, memory: &Memory, mut faults: usize) {
    while faults > 0 {
        let mut pages = Vec::new();
        let more = reader.take(8, |_, request| pages.push(request.pages()));
        faults -= pages.len();
        pages.iter().for_each(|page| reader.release_among_others(page));
        reader.wake();
        if !more {
            memory.sleep_until_rung();
        }
    }
}

#[test]
fn loom_nobody_who_is_woken_with_others_sleeps_on() {
    explore(3, || {
        let memory = Memory::new(2);
        let vcpus = [posts(&memory, 0, 1..2), posts(&memory, 1, 4..5)];
        serve_together(&mut reader(&memory), &memory, 2);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}

#[test]
fn loom_who_is_woken_with_others_has_perhaps_posted_again() {
    explore(4, || {
        let memory = Memory::new(1);
        let vcpu = posts(&memory, 0, 1..3);
        serve_together(&mut reader(&memory), &memory, 2);
        vcpu.join().unwrap();
    });
}

#[test]
fn loom_of_two_that_post_neither_hides_the_other() {
    explore(3, || {
        let memory = Memory::new(2);
        let vcpus = [posts(&memory, 0, 1..2), posts(&memory, 1, 4..5)];
        serve(&mut reader(&memory), &memory, 2);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}

/// How far a reader comes that is killed.
#[derive(Clone, Copy, Debug)]
enum Dies {
    AfterItCleared,
    AfterItTook,
    Asleep,
    BeforeItWoke,
    BeforeItWokeThemTogether,
}

fn killed(memory: &Arc<Memory>, dies: Dies) {
    let mut first = Reader::begin(Side { memory: Arc::clone(memory), wakes: false }, memory.shape);
    match dies {
        Dies::AfterItCleared => {
            first.gather();
        }
        Dies::AfterItTook | Dies::Asleep => {
            let _ = first.take(8, |_, _| ());
            if matches!(dies, Dies::Asleep) {
                let _ = first.take(8, |_, _| ());
            }
        }
        Dies::BeforeItWoke => {
            let mut pages = Vec::new();
            let _ = first.take(8, |_, request| pages.push(request.pages()));
            for page in pages {
                first.release(&page);
            }
        }
        Dies::BeforeItWokeThemTogether => {
            let mut pages = Vec::new();
            let _ = first.take(8, |_, request| pages.push(request.pages()));
            pages.iter().for_each(|page| first.release_among_others(page));
        }
    }
}

/// Serves until its VM has gone, which rings the bell once more.
fn serve_all(memory: &Memory, reader: &mut Reader<Side>, gone: &AtomicU64) {
    loop {
        let mut pages = Vec::new();
        let more = reader.take(8, |_, request| pages.push(request.pages()));
        pages.into_iter().for_each(|page| reader.release(&page));
        if more {
            continue;
        }
        if gone.load(loom::sync::atomic::Ordering::Acquire) == 1 {
            return;
        }
        memory.sleep_until_rung();
    }
}

#[test]
fn loom_a_reader_finds_what_the_one_before_left_wherever_that_one_died() {
    let deaths = [
        Dies::AfterItCleared,
        Dies::AfterItTook,
        Dies::Asleep,
        Dies::BeforeItWoke,
        Dies::BeforeItWokeThemTogether,
    ];
    for dies in deaths {
        explore(4, move || {
            let memory = Memory::new(1);
            let gone = Arc::new(AtomicU64::new(0));
            let vcpu = {
                let (memory, gone) = (Arc::clone(&memory), Arc::clone(&gone));
                thread::spawn(move || {
                    let mut seat = seat(&memory, 0);
                    seat.post(&fault(1)).unwrap();
                    assert!(
                        matches!(seat.wait(0, None), Waited::Over(Completion::Done(pages)) if pages.contains(&1))
                    );
                    gone.store(1, loom::sync::atomic::Ordering::Release);
                    side(&memory).ring();
                })
            };
            killed(&memory, dies);
            serve_all(&memory, &mut reader(&memory), &gone);
            vcpu.join().unwrap();
        });
    }
}

#[test]
fn loom_who_takes_a_dead_threads_seat_gets_no_answer_to_its_question() {
    explore(4, || {
        let memory = Memory::new(1);
        let vcpu = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                // It dies with its question asked, and the next one asks another.
                let mut dead = seat(&memory, 0);
                dead.post(&fault(1)).unwrap();
                let mut next = seat(&memory, 0);
                next.post(&Request::Removed(4..8)).unwrap();
                match next.wait(0, None) {
                    Waited::Over(Completion::Done(pages)) => assert_eq!(pages, 4..8),
                    other => panic!("{other:?}"),
                }
                // It gives nothing up any more: its slot is another one's.
                dead.forget();
            })
        };
        let mut reader = reader(&memory);
        let (mut stale, mut removed) = (Vec::new(), 0);
        // It takes the removal, and completes it when it comes again.
        while removed == 0 {
            let more = reader.take(8, |_, request| match request {
                Request::Fault { page, .. } => stale.push(page),
                Request::Removed(_) => removed += 1,
            });
            if !more {
                memory.sleep_until_rung();
            }
        }
        let _ = reader.take(8, |_, _| ());
        // The dead one's page comes late, while the next one looks at his answer.
        for page in stale {
            reader.release(&(page..page + 1));
        }
        vcpu.join().unwrap();
    });
}

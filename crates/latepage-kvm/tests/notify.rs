//! The delivery `notify` with guests of threads, whose accesses come back to them by a signal; and a real pager, in this process.
//! On KVM it takes one of the lab's kernels: `tests/lab/test_notify.py`.

mod machines;

use std::path::Path;
use std::sync::Arc;

use latepage::pager::{Config, Pager};
use latepage::session::{FaultAround, OnMissing, Policy, Session};
use latepage::source::FileSource;
use latepage::sys::uffd::Features;
use latepage_kvm::{
    Action, Backing, DiscardRange, Job, MemoryFrom, NotifyMemory, NotifyReport, Order, TrapKind, Vm,
};
use machines::run;
use machines::saved::{Saved, may_fault};

/// Bytes of memory, and pages of it.
const MEMORY: u64 = 16 << 20;
const ALL: u64 = MEMORY / 4096;
/// Pages that the VMM writes, at the seat of its own, before the guest can verify pages of several seeds: the seeds, and which page
/// has which.
const TABLES: u64 = 2;

fn serve(saved: &Saved, fault_around: FaultAround) -> Pager {
    let pager = Pager::start(Config { workers: Some(1), ..Config::default() }).unwrap();
    let source = Arc::new(FileSource::open(saved.file("vm.mem")).unwrap());
    let policy = Policy { fault_around, on_missing: OnMissing::Poison, ..Policy::default() };
    pager.listen(&saved.file("pager.sock"), source, policy).unwrap();
    pager
}

fn restore(saved: &Saved, all: bool) -> Vm {
    let notify = NotifyMemory { socket: saved.file("pager.sock"), trap: None, all };
    saved.restore(MemoryFrom::Notify(notify), None).unwrap()
}

fn told(vm: &Vm) -> NotifyReport {
    vm.report().notify.unwrap()
}

fn session(pager: &Pager) -> Arc<Session> {
    pager.sessions().pop().expect("the VM has shaken hands")
}

#[test]
fn every_touch_of_an_absent_page_is_posted_once_by_its_own_thread() {
    if !may_fault(Features::MINOR_SHMEM) {
        return;
    }
    let saved = Saved::new(3);
    for all in [false, true] {
        let pager = serve(&saved, FaultAround::NONE);
        let vm = restore(&saved, all);
        let report = run(&vm, Job::new(Action::Verify, 4, Order::Random));
        assert!(report.is_right(), "{report:?}");
        let first = told(&vm);
        assert_eq!((first.trap, first.all, first.forwarded, first.removed), (None, all, 0, 0));
        // Each vCPU has pages of its own: nobody comes second.
        assert_eq!((first.exits, first.posted), (report.pages + TABLES, report.pages + TABLES));
        // All is there: nothing comes back any more.
        assert!(run(&vm, Job::new(Action::Verify, 5, Order::Strided)).is_right());
        assert_eq!(told(&vm), first);
        // The host's own looks come back too, at the seat that all who have none share.
        assert!(vm.compare().unwrap().is_right());
        assert_eq!(told(&vm).posted, ALL);
        let counters = session(&pager).stats().counters.snapshot();
        assert_eq!((session(&pager).owed(), counters.bytes_installed, counters.faults), (0, MEMORY, ALL));
        drop(vm);
        pager.close();
    }
}

#[test]
fn what_came_unasked_is_answered_at_once_and_brought_once() {
    if !may_fault(Features::MINOR_SHMEM) {
        return;
    }
    let saved = Saved::new(16);
    for all in [false, true] {
        let pager = serve(&saved, FaultAround::Window(64 << 10));
        let vm = restore(&saved, all);
        // All of them want the same pages, at the same time.
        for seed in 0..4 {
            let pages = vec![(0, 512); 16];
            assert!(run(&vm, Job::new(Action::Verify, seed, Order::Random).over(pages)).is_right());
        }
        assert!(run(&vm, Job::new(Action::Verify, 4, Order::Random)).is_right());
        assert!(vm.compare().unwrap().is_right());
        let counters = session(&pager).stats().counters.snapshot();
        assert_eq!((session(&pager).owed(), counters.bytes_installed), (0, MEMORY));
        // Sixteen come with one.
        assert!(told(&vm).posted < ALL, "{:?}", told(&vm));
        drop(vm);
        pager.close();
    }
}

#[test]
fn a_page_that_the_vmm_discards_is_zero_and_never_the_snapshot_again() {
    if !may_fault(Features::MINOR_SHMEM) {
        return;
    }
    let saved = Saved::new(2);
    for all in [false, true] {
        let pager = serve(&saved, FaultAround::NONE);
        let vm = restore(&saved, all);
        run(&vm, Job::new(Action::Touch, 1, Order::Sequential).over(vec![(0, 600)]));
        let before = told(&vm);
        // Pages that came, and pages that did not.
        vm.discard(DiscardRange::Pages { first: 500, count: 500 }).unwrap();
        run(&vm, Job::new(Action::Touch, 1, Order::Sequential).over(vec![(500, 500)]));
        let after = told(&vm);
        assert_eq!((after.removed - before.removed, after.posted - before.posted), (1, 500));
        run(&vm, Job::new(Action::Dirty, 3, Order::Random).over(vec![(700, 100)]));
        assert!(run(&vm, Job::new(Action::Verify, 5, Order::Random)).is_right());
        assert!(vm.compare().unwrap().is_right());
        drop(vm);
        pager.close();
    }
}

#[test]
fn a_balloon_may_discard_while_the_guest_verifies() {
    if !may_fault(Features::MINOR_SHMEM) {
        return;
    }
    let saved = Saved::new(4);
    for all in [false, true] {
        let pager = serve(&saved, FaultAround::Window(16 << 10));
        let vm = restore(&saved, all);
        vm.run(Job::new(Action::Verify, 5, Order::Random)).unwrap();
        for step in 0..200 {
            vm.discard(DiscardRange::Pages { first: step * 17, count: 5 }).unwrap();
        }
        let report = vm.wait(None).unwrap().unwrap();
        assert!(report.is_right(), "{report:?}");
        assert!(run(&vm, Job::new(Action::Verify, 6, Order::Random)).is_right());
        assert!(vm.compare().unwrap().is_right());
        drop(vm);
        pager.close();
    }
}

#[test]
fn a_thousand_and_twenty_four_threads_wait_at_slots_of_their_own() {
    if !may_fault(Features::MINOR_SHMEM) {
        return;
    }
    let saved = Saved::new(1024);
    let pager = serve(&saved, FaultAround::NONE);
    let vm = restore(&saved, false);
    let report = run(&vm, Job::new(Action::Verify, 1, Order::Random));
    assert!(report.is_right(), "{report:?}");
    assert_eq!(told(&vm).posted, report.pages + TABLES);
    drop(vm);
    pager.close();
}

#[test]
fn what_cannot_be_is_refused_by_one_line() {
    let saved = Saved::new(1);
    let refusal = |socket: &Path, trap, backing| {
        let notify = NotifyMemory { socket: socket.to_path_buf(), trap, all: false };
        saved.restore(MemoryFrom::Notify(notify), backing).unwrap_err()
    };
    let nobody = saved.file("nobody.sock");
    let refused = refusal(&nobody, Some(TrapKind::Bitmap), None);
    assert!(
        refused.to_string().contains("goes with a guest on KVM") && refused.kind() == "usage",
        "{refused}"
    );
    let refused = refusal(&nobody, None, Some(Backing::Anonymous));
    assert!(refused.to_string().contains("cannot be anonymous") && refused.kind() == "usage", "{refused}");
    if may_fault(Features::MINOR_SHMEM) {
        let refused = refusal(&nobody, None, None).to_string();
        assert!(refused.contains("is `latepage serve` running there?"), "{refused}");
    }
}

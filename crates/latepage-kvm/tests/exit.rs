//! The delivery `exit` with guests of threads, whose accesses come back to them by a signal and are resolved there.
//! On KVM it takes one of the lab's kernels: `tests/lab/test_exit.py`.

mod machines;

use latepage::sys::uffd::Features;
use latepage_kvm::{
    Action, Delivery, DiscardRange, Job, LateMemory, LateReport, MemoryFrom, Order, TrapKind, Vm, VmError,
};
use machines::run;
use machines::saved::{Saved, may_fault};

/// Pages of its memory.
const ALL: u64 = (16 << 20) / 4096;

fn restore(saved: &Saved, window: Option<u64>, trap: Option<TrapKind>) -> Result<Vm, VmError> {
    let memory_file = saved.file("vm.mem");
    let late = LateMemory { memory_file, delivery: Delivery::Exit, trap, window };
    saved.restore(MemoryFrom::Late(late), None)
}

fn brought(vm: &Vm) -> LateReport {
    vm.report().late.unwrap()
}

#[test]
fn every_touch_of_an_absent_page_is_resolved_once_by_its_own_thread() {
    if !may_fault(Features::empty()) {
        return;
    }
    let saved = Saved::new(3);
    let vm = restore(&saved, None, None).unwrap();
    let report = run(&vm, Job::new(Action::Verify, 4, Order::Random));
    assert!(report.is_right(), "{report:?}");
    let first = brought(&vm);
    // Each vCPU has pages of its own, and the VMM wrote two tables for the job, at the seat of those who have none.
    assert_eq!((first.exits, first.faults, first.joined, first.present), (report.pages + 2, 0, 0, 0));
    assert!(run(&vm, Job::new(Action::Verify, 5, Order::Strided)).is_right());
    assert_eq!(brought(&vm), first);
    assert!(vm.compare().unwrap().is_right());
    let all = brought(&vm);
    assert_eq!((all.exits, all.filled + all.zero, all.beside), (ALL, ALL, 0));
}

#[test]
fn many_threads_want_the_same_pages_and_each_is_brought_once() {
    if !may_fault(Features::empty()) {
        return;
    }
    let saved = Saved::new(64);
    let vm = restore(&saved, Some(64 << 10), None).unwrap();
    let report = run(&vm, Job::new(Action::Verify, 1, Order::Random).over(vec![(0, 64); 64]));
    assert!(report.is_right(), "{report:?}");
    assert!(run(&vm, Job::new(Action::Verify, 4, Order::Random)).is_right());
    assert!(vm.compare().unwrap().is_right());
    let all = brought(&vm);
    assert_eq!(all.filled + all.zero, ALL, "{all:?}");
}

#[test]
fn a_balloon_may_discard_while_the_guest_verifies() {
    if !may_fault(Features::empty()) {
        return;
    }
    let saved = Saved::new(4);
    let vm = restore(&saved, Some(16 << 10), None).unwrap();
    vm.run(Job::new(Action::Verify, 5, Order::Random)).unwrap();
    for step in 0..200 {
        vm.discard(DiscardRange::Pages { first: step * 17, count: 5 }).unwrap();
    }
    let report = vm.wait(None).unwrap().unwrap();
    assert!(report.is_right(), "{report:?}");
    assert!(run(&vm, Job::new(Action::Verify, 6, Order::Random)).is_right());
    assert!(vm.compare().unwrap().is_right());
}

#[test]
fn a_trap_is_for_guests_on_kvm() {
    let refused = restore(&Saved::new(1), None, Some(TrapKind::Bitmap)).unwrap_err();
    assert!(
        refused.to_string().contains("goes with a guest on KVM") && refused.kind() == "usage",
        "{refused}"
    );
}

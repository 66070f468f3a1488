//! Sources that nobody can vouch for, and programs that say what is to come next: what they must not do to anybody else.

mod vmm;

use std::sync::Arc;

use latepage::attachment::Backing;
use latepage::pager::{Config, Following, What};
use latepage::session::{FaultAround, Policy, Population};
use latepage::source::queue::{Contents, RequestQueue, Terms};
use latepage::stats::Reason;
use vmm::child::Vmm;
use vmm::guest::Guest;
use vmm::serving::{Serving, policy, populating};
use vmm::snapshot::{Snapshot, word};
use vmm::{PAGE, until};

const SIGKILL: i32 = 9;

/// Not a test of its own: the process that plays a VMM in others.
#[test]
fn vmm_process() {
    vmm::child::obey();
}

fn one_of_each() -> Config {
    Config { workers: Some(1), readers: Some(1), populators: Some(1), ..Config::default() }
}

#[test]
fn a_source_with_a_lane_of_its_own_that_never_answers_holds_up_no_vm_of_another_and_no_end() {
    need_userfaultfd!();
    let (mut stuck, fine) = (Vmm::start(), Guest::new(Backing::Anonymous, 256));
    stuck.tell("guest anonymous 256");
    let never = Arc::new(Snapshot::new(256 * PAGE as u64).cold(0..256).with_lane(2, 1));
    let killing = Policy { population: Population::Background, ..Policy::default() };
    let mut serving = Serving::with(one_of_each(), Arc::clone(&never) as _, killing);
    // The other one's pages have to be waited for too, by the threads that all share.
    let source = Arc::new(Snapshot::new(fine.layout.end()).cold([100, 200]));
    source.thaw.open();
    let socket = serving.also("fine", source, populating());
    stuck.tell(&format!("connect {} stuck", serving.socket.display()));
    stuck.say("touch 7");
    never.waited_for.wait();
    let _fine = fine.connect(&socket, "fine");
    serving.wait("populated", |what| matches!(what, What::Populated { vm, .. } if vm == "fine"));
    assert_eq!(fine.verify(3, |offset| word(offset, 0)).join(), [0; 0]);
    assert_eq!(serving.pager.close(), ["stuck"]);
    assert_eq!(stuck.ended_by(), Some(SIGKILL));
}

#[test]
fn the_threads_of_a_lane_are_made_once_for_a_source_and_end_with_the_pager() {
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("latepage-r7.") || name.starts_with("latepage-p7.")).count()
    };
    let sources: Vec<_> = (0..7).map(|_| Arc::new(Snapshot::new(1 << 20).with_lane(3, 2))).collect();
    let serving = Serving::new(Arc::clone(&sources[0]) as _, policy());
    for (number, source) in sources.iter().enumerate().skip(1) {
        serving.also(&format!("s{number}"), Arc::clone(source) as _, policy());
        serving.also(&format!("again{number}"), Arc::clone(source) as _, policy());
    }
    until("five threads", || threads() == 5);
    serving.pager.close();
    assert_eq!(threads(), 0);
}

#[test]
fn a_source_that_panics_fails_its_page_and_no_thread() {
    need_userfaultfd!();
    for cold in [false, true] {
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 64");
        let source = Snapshot::new(64 * PAGE as u64).panicking(7);
        // On the worker, or on the only reader.
        let source = if cold { source.cold(0..64) } else { source };
        source.thaw.open();
        let policy = Policy { fault_around: FaultAround::NONE, ..Policy::default() };
        let mut serving = Serving::with(one_of_each(), Arc::new(source), policy);
        vm.tell(&format!("connect {} vm", serving.socket.display()));
        vm.say("touch 7");
        assert_eq!(vm.ended_by(), Some(SIGKILL));
        let failed = serving.ever("failed", |what| matches!(what, What::Failed { .. }));
        let What::Failed { page: Some(7), reason, .. } = failed else { panic!("{failed:?}") };
        assert!(reason.contains("panicked: page 7 makes it panic"), "{reason}");
        // Its threads go on.
        let guest = Guest::new(Backing::Anonymous, 64);
        let _socket = guest.connect(&serving.socket, "next");
        assert_eq!(guest.touch(9).join(), word(9 * PAGE as u64, 0));
    }
}

#[test]
fn a_queue_with_nobody_to_answer_keeps_a_pager_from_nothing() {
    need_userfaultfd!();
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64");
    let terms = Terms {
        name: "callback test".to_owned(),
        size: 64 * PAGE as u64,
        threads: 2,
        batch: 1 << 20,
        limit: None,
    };
    let queue = RequestQueue::new(terms);
    let mut serving = Serving::new(Arc::new(queue.source()), Policy::default());
    vm.tell(&format!("connect {} vm", serving.socket.display()));
    vm.say("touch 3");
    let session = serving.session("vm");
    until("the fault", || session.stats().snapshot().counters.later == 1);
    // Now somebody answers.
    assert!(queue.hire());
    let call = queue.take().unwrap();
    assert_eq!(call.offset, 3 * PAGE as u64);
    let contents = vec![9; call.length as usize];
    assert_eq!(queue.answer(call.id, Contents::Bytes(contents)), Ok(true));
    assert_eq!(vm.hear(), u64::from_le_bytes([9; 8]).to_string());
    vm.say("touch 40");
    until("the second fault", || session.stats().snapshot().counters.later == 2);
    assert_eq!(serving.pager.close(), ["vm"]);
    assert_eq!(queue.take(), None, "whoever answers is sent home");
}

#[test]
fn a_program_is_told_what_is_touched_and_says_what_is_next() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 256);
    let source = Arc::new(Snapshot::new(guest.layout.end()));
    let serving = Serving::new(Arc::clone(&source) as _, policy());
    let following = Following::new();
    let socket = serving.directory.file("followed");
    let policy =
        Policy { trace: 1024, fault_around: FaultAround::NONE, population: Population::None, ..policy() };
    serving.pager.listen_and_follow(&socket, source, policy, Arc::clone(&following)).unwrap();
    let _socket = guest.connect(&socket, "vm");
    let first = following.next().unwrap();
    assert!(first.entries.is_empty());
    let session = first.session;
    serving.pager.populate_next(&following, &session, [64..128, 0..8]);
    until("what was said first", || session.owed() == 256 - 72);
    for page in [200, 5, 130] {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    let mut touched = Vec::new();
    while touched.len() < 2 {
        touched.extend(following.next().unwrap().entries);
    }
    assert_eq!(touched.iter().map(|entry| entry.page).collect::<Vec<_>>(), [200, 130], "5 had come");
    assert!(touched.iter().all(|entry| entry.reason == Reason::Demand));
    following.dismiss(&session);
    serving.pager.populate_next(&following, &session, [8..32, 32..64]);
    assert_eq!(guest.verify(3, |offset| word(offset, 0)).join(), [0; 0]);
    serving.pager.close();
    assert!(following.next().is_none());
}

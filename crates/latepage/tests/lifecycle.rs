//! How a VM's session ends, how a pager does, and that nothing of either is left behind.

mod vmm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use latepage::attachment::Backing;
use latepage::pager::{Config, Pager, What};
use latepage::session::{FaultAround, OnMissing, Policy, Population};
use vmm::child::{Holdings, Vmm, alone};
use vmm::guest::Guest;
use vmm::serving::{Serving, policy, populating};
use vmm::snapshot::{Snapshot, word};
use vmm::{PAGE, start, until};

const SIGKILL: i32 = 9;
const SIGBUS: i32 = 7;

fn killing() -> Policy {
    Policy::default()
}

fn snapshot(pages: usize) -> Arc<Snapshot> {
    Arc::new(Snapshot::new((pages * PAGE) as u64))
}

/// Not a test of its own: the process that plays a VMM in others.
#[test]
fn vmm_process() {
    vmm::child::obey();
}

#[test]
fn a_vm_killed_in_a_storm_of_faults_ends_its_session_and_harms_no_other() {
    need_userfaultfd!();
    for population in [Population::None, Population::Background] {
        let guest = Guest::new(Backing::Anonymous, 4000);
        let mut serving = Serving::new(snapshot(4000), Policy { population, ..killing() });
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 4000");
        vm.tell(&format!("connect {} victim", serving.socket.display()));
        vm.tell("storm 8");
        let victim = serving.session("victim");
        until("a storm", || victim.stats().snapshot().counters.faults > 200);
        let _socket = guest.connect(&serving.socket, "other");
        let other = guest.verify(1234567, |offset| word(offset, 0));
        vm.kill();
        assert_eq!(serving.ended("victim"), "gone");
        assert_eq!(other.join(), [0; 0]);
        assert_eq!(serving.pager.sessions().len(), 1);
    }
}

#[test]
fn a_killed_vm_leaves_nothing_in_the_pager() {
    need_userfaultfd!();
    alone("a_killed_vm_leaves_nothing_in_the_pager", || {
        let mut serving =
            Serving::new(snapshot(64), Policy { population: Population::Background, ..killing() });
        serving.wait("listening", |what| matches!(what, What::Listening { .. }));
        let before = Holdings::now();
        for backing in ["anonymous", "private", "shared"] {
            let mut vm = Vmm::start();
            vm.tell(&format!("guest {backing} 64"));
            vm.tell(&format!("connect {} vm-{backing}", serving.socket.display()));
            vm.tell("touch 5");
            assert_ne!(Holdings::now(), before);
            vm.kill();
            serving.ended(&format!("vm-{backing}"));
            drop(vm);
            assert_eq!(Holdings::now(), before, "{backing}");
        }
    });
}

#[test]
fn fifty_sessions_leave_no_descriptor_no_thread_and_no_mapping_behind() {
    need_userfaultfd!();
    alone("fifty_sessions_leave_no_descriptor_no_thread_and_no_mapping_behind", || {
        let mut serving = Serving::new(snapshot(32), Policy { detach_when_full: true, ..populating() });
        serving.wait("listening", |what| matches!(what, What::Listening { .. }));
        let before = Holdings::now();
        for round in 0..5 {
            let guests: Vec<_> = (0..10)
                .map(|number| {
                    Guest::new(if number % 2 == 0 { Backing::Anonymous } else { Backing::Shared }, 32)
                })
                .collect();
            let names: Vec<_> = (0..10).map(|number| format!("vm-{round}-{number}")).collect();
            let sockets: Vec<_> =
                guests.iter().zip(&names).map(|(guest, name)| guest.connect(&serving.socket, name)).collect();
            let checks: Vec<_> =
                guests.iter().map(|guest| guest.verify(5, |offset| word(offset, 0))).collect();
            for check in checks {
                assert_eq!(check.join(), [0; 0]);
            }
            for name in &names {
                assert_eq!(serving.ended(name), "detached");
            }
            drop((sockets, guests));
        }
        assert_eq!(serving.pager.sessions().len(), 0);
        assert_eq!(Holdings::now(), before);
        let totals = serving.pager.totals().counters;
        let brought = totals.source_pages + totals.zero_pages + totals.beside_pages + totals.populated_pages;
        assert!(brought >= 50 * 32, "{totals:?}");
    });
}

#[test]
fn a_closed_pager_leaves_nothing_behind() {
    need_userfaultfd!();
    alone("a_closed_pager_leaves_nothing_behind", || {
        let before = Holdings::now();
        for _ in 0..3 {
            let guest = Guest::new(Backing::Shared, 64);
            let private = Guest::new(Backing::Private, 64);
            // Much is under way: cold pages with readers, population, faults.
            let source = Arc::new(Snapshot::new(guest.layout.end()).cold([40]));
            let mut serving = Serving::new(Arc::clone(&source) as _, populating());
            let _sockets = [guest.connect(&serving.socket, "vm"), private.connect(&serving.socket, "other")];
            serving.session("vm");
            let other = serving.session("other");
            serving.pager.populate(&other, vec![0..64; 500]);
            guest.touch(3).join();
            let waiter = guest.touch(40);
            source.waited_for.wait();
            source.thaw.open();
            waiter.join();
            serving.pager.close();
            drop((serving, other, guest, private));
        }
        assert_eq!(Holdings::now(), before);
    });
}

#[test]
fn closing_treats_vms_that_lack_memory_as_the_policy_says_and_names_them() {
    need_userfaultfd!();
    for (on_missing, signal) in [(OnMissing::Kill, SIGKILL), (OnMissing::Poison, SIGBUS)] {
        let mut serving =
            Serving::new(snapshot(64), Policy { on_missing, fault_around: FaultAround::NONE, ..killing() });
        let (mut lacking, mut full) = (Vmm::start(), Vmm::start());
        for (vm, name) in [(&mut lacking, "lacking"), (&mut full, "full")] {
            vm.tell("guest anonymous 64");
            vm.tell(&format!("connect {} {name}", serving.socket.display()));
            vm.tell("touch 0");
        }
        let session = serving.session("full");
        serving.pager.populate(&session, std::iter::once(0..64));
        assert!(serving.pager.wait_populated(&session, Some(vmm::BOUND)));
        assert_eq!(serving.pager.close(), ["lacking"]);
        if on_missing == OnMissing::Poison {
            lacking.say("touch 9");
        }
        assert_eq!(lacking.ended_by(), Some(signal));
        // The other was let go, and lives on: its discards hang nowhere.
        assert_eq!(full.tell("touch 63"), word(63 * PAGE as u64, 0).to_string());
        assert_eq!(full.tell("discard 0 64"), "ok");
        assert_eq!(full.tell("touch 63"), "0");
    }
}

/// Whoever waits for the source must not keep others from being failed closed.
#[test]
fn closing_kills_who_lacks_memory_while_population_hangs_in_its_source() {
    need_userfaultfd!();
    let source = Arc::new(Snapshot::new(64 * PAGE as u64).cold([0]));
    let mut serving =
        Serving::new(Arc::clone(&source) as _, Policy { population: Population::Background, ..killing() });
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64");
    vm.tell(&format!("connect {} vm", serving.socket.display()));
    source.waited_for.wait();
    serving.session("vm");
    let pager = serving.pager;
    let closing = start(move || pager.close());
    assert_eq!(vm.ended_by(), Some(SIGKILL));
    source.thaw.open();
    assert_eq!(closing.join(), ["vm"]);
}

#[test]
fn a_drain_brings_what_is_lacking_and_lets_each_vm_go() {
    need_userfaultfd!();
    let guests: Vec<_> = [Backing::Anonymous, Backing::Shared].map(|backing| Guest::new(backing, 500)).into();
    let mut serving = Serving::new(snapshot(500), policy());
    let _sockets: Vec<_> = guests
        .iter()
        .enumerate()
        .map(|(at, guest)| guest.connect(&serving.socket, &format!("vm-{at}")))
        .collect();
    for (at, guest) in guests.iter().enumerate() {
        serving.session(&format!("vm-{at}"));
        guest.touch(7).join();
    }
    serving.pager.drain();
    serving.wait("draining", |what| matches!(what, What::Draining { vms: 2 }));
    serving.wait("drained", |what| matches!(what, What::Drained));
    for (at, guest) in guests.iter().enumerate() {
        assert_eq!(serving.ended(&format!("vm-{at}")), "detached");
        assert_eq!(guest.verify(3, |offset| word(offset, 0)).join(), [0; 0]);
        // Nobody reads events any more, and none is raised.
        guest.discard(0, 500).join();
        assert_eq!(guest.read(499).join(), vec![0; PAGE]);
    }
    assert!(!vmm::serving::exists(&serving.socket));
    let path = serving.directory.file("new");
    assert!(serving.pager.listen(&path, snapshot(1), policy()).unwrap_err().to_string().contains("draining"));
    assert_eq!(serving.so_far().iter().filter(|what| matches!(what, What::Drained)).count(), 1);
}

#[test]
fn a_drain_waits_for_a_vm_of_private_memory_and_names_it() {
    need_userfaultfd!();
    let mut serving = Serving::new(snapshot(100), killing());
    let mut vm = Vmm::start();
    vm.tell("guest private 100");
    vm.tell(&format!("connect {} vm", serving.socket.display()));
    vm.tell("touch 7");
    serving.pager.drain();
    serving.wait("waiting-for", |what| matches!(what, What::WaitingFor { vm, .. } if vm == "vm"));
    // It is still served: what it discards reads zero.
    assert_eq!(vm.tell("discard 7 1"), "ok");
    assert_eq!(vm.tell("touch 7"), "0");
    assert_eq!(vm.tell("touch 99"), word(99 * PAGE as u64, 0).to_string());
    assert!(!serving.so_far().iter().any(|what| matches!(what, What::Drained)));
    vm.kill();
    serving.wait("drained", |what| matches!(what, What::Drained));
}

/// Its next discard waits for ever, since its memory must stay registered and nobody reads the event.
#[test]
fn closing_names_a_full_vm_that_cannot_be_let_go() {
    need_userfaultfd!();
    let mut serving = Serving::new(snapshot(4), Policy { population: Population::Background, ..killing() });
    let mut vm = Vmm::start();
    vm.tell("guest private 4");
    vm.tell(&format!("connect {} vm", serving.socket.display()));
    serving.wait("populated", |what| matches!(what, What::Populated { vm, .. } if vm == "vm"));
    assert_eq!(serving.pager.close(), ["vm"]);
    serving.wait("left", |what| matches!(what, What::Left { vm, lacking: 0 } if vm == "vm"));
    vm.kill();
}

#[test]
fn a_full_vm_is_let_go_at_once_where_the_policy_says_so() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 100);
    let mut serving = Serving::new(
        snapshot(100),
        Policy { detach_when_full: true, fault_around: FaultAround::NONE, ..policy() },
    );
    let _socket = guest.connect(&serving.socket, "vm");
    // The last page comes by a fault, not by population.
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
    assert_eq!(serving.ended("vm"), "detached");
    guest.discard(0, 100).join();
}

/// The VMM keeps its own copy of the userfaultfd: a discard whose event nobody reads hangs for ever.
#[test]
fn a_discard_that_meets_the_letting_go_never_hangs() {
    need_userfaultfd!();
    for round in 0..150 {
        let guest = Guest::new(if round % 2 == 0 { Backing::Anonymous } else { Backing::Shared }, 8);
        let mut serving = Serving::new(snapshot(8), populating());
        let _socket = guest.connect(&serving.socket, "vm");
        serving.wait("populated", |what| matches!(what, What::Populated { .. }));
        let over = Arc::new(AtomicBool::new(false));
        let balloons: Vec<_> = (0..2)
            .map(|at| {
                let (view, over, shared) =
                    (Arc::clone(&guest.view), Arc::clone(&over), guest.backing == Backing::Shared);
                start(move || {
                    while !over.load(Ordering::Acquire) {
                        let at = at * PAGE;
                        if shared { view.remove(at, PAGE) } else { view.dont_need(at, PAGE) }.unwrap();
                    }
                })
            })
            .collect();
        let session = serving.session("vm");
        until("discards under way", || session.stats().snapshot().counters.removed_pages > 1);
        serving.pager.drain();
        assert_eq!(serving.ended("vm"), "detached");
        over.store(true, Ordering::Release);
        for balloon in balloons {
            balloon.join();
        }
    }
}

#[test]
fn a_vm_that_comes_as_the_pager_drains_is_served_or_refused_and_never_lost() {
    need_userfaultfd!();
    for _ in 0..60 {
        let guests: Vec<_> = (0..4).map(|_| Guest::new(Backing::Anonymous, 16)).collect();
        let serving = Serving::new(snapshot(16), policy());
        let socket = serving.socket.clone();
        let mut serving = serving;
        let (pager, streams) = std::thread::scope(|scope| {
            let pager = &serving.pager;
            let drain = scope.spawn(move || pager.drain());
            // A path that is gone already is a refusal too.
            let streams: Vec<_> = guests
                .iter()
                .enumerate()
                .map_while(|(at, guest)| {
                    let stream = std::os::unix::net::UnixStream::connect(&socket).ok()?;
                    let message = latepage::attachment::firecracker::message(&guest.layout);
                    let descriptors = [std::os::fd::AsFd::as_fd(&guest.uffd)];
                    latepage::sys::fdpass::send(&stream, message.as_bytes(), &descriptors).ok()?;
                    Some((at, stream))
                })
                .collect();
            (drain.join(), streams)
        });
        pager.unwrap();
        serving.ever("drained", |what| matches!(what, What::Drained));
        serving.pager.close();
        let told = serving.so_far();
        let started = told.iter().filter(|what| matches!(what, What::SessionStarted { .. })).count();
        let let_go =
            told.iter().filter(|what| matches!(what, What::Ended { reason: "detached", .. })).count();
        assert_eq!(started, let_go, "{told:#?}");
        assert_eq!(told.iter().filter(|what| matches!(what, What::Drained)).count(), 1, "{told:#?}");
        drop(streams);
    }
}

#[test]
fn waiting_for_memory_ends_when_the_vm_does() {
    need_userfaultfd!();
    let mut serving = Serving::new(snapshot(64), Policy { fault_around: FaultAround::NONE, ..killing() });
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64");
    vm.tell(&format!("connect {} vm", serving.socket.display()));
    let session = serving.session("vm");
    let pager = Arc::new(serving.pager);
    let waiting = {
        let pager = Arc::clone(&pager);
        start(move || pager.wait_populated(&session, None))
    };
    vm.kill();
    assert!(!waiting.join());
}

#[test]
fn a_vm_whose_socket_is_closed_is_served_as_long_as_it_lives() {
    need_userfaultfd!();
    let mut serving = Serving::new(snapshot(64), Policy { fault_around: FaultAround::NONE, ..killing() });
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64");
    vm.tell(&format!("connect {} vm firecracker", serving.socket.display()));
    vm.tell("hang-up");
    for page in 0..64 {
        assert_eq!(vm.tell(&format!("touch {page}")), word((page * PAGE) as u64, 0).to_string());
    }
    let name = format!("vm-{}", vm.pid());
    vm.kill();
    assert_eq!(serving.ended(&name), "gone");
}

#[test]
fn two_vms_of_one_name_are_told_apart() {
    need_userfaultfd!();
    let guests = [Guest::new(Backing::Anonymous, 4), Guest::new(Backing::Anonymous, 4)];
    let mut serving = Serving::new(snapshot(4), policy());
    let _sockets = guests.each_ref().map(|guest| guest.connect(&serving.socket, "twin"));
    serving.session("twin");
    serving.session("twin#2");
}

#[test]
fn a_pager_writes_every_event_to_its_log_as_a_line_of_json() {
    need_userfaultfd!();
    let directory = vmm::serving::Directory::new();
    let path = directory.file("log");
    let log = std::fs::File::create(&path).unwrap();
    let config = Config { log: Some(log.into()), ..Config::default() };
    let guest = Guest::new(Backing::Anonymous, 8);
    let mut serving = Serving::with(config, snapshot(8), Policy { detach_when_full: true, ..populating() });
    let _socket = guest.connect(&serving.socket, "vm");
    serving.ended("vm");
    serving.pager.close();
    let text = std::fs::read_to_string(path).unwrap();
    let names: Vec<String> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["event"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(names, ["listening", "session-started", "populated", "detached", "ended"]);
}

#[test]
fn a_pager_with_nothing_to_do_opens_and_closes() {
    let pager = Pager::start(Config::default()).unwrap();
    assert_eq!(pager.close(), [""; 0]);
    drop(pager);
}

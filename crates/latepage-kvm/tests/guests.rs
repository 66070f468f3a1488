//! What guests do, on KVM and in threads.

mod machines;

use std::time::Duration;

use latepage_kvm::{Action, Backing, DiscardRange, Event, GuestKind, Job, Order, Vm, VmError};
use machines::{config, each_guest, run};

#[test]
fn what_is_filled_is_verified_in_every_order_and_on_every_backing() {
    each_guest(|guest| {
        for backing in [Backing::Shared, Backing::Private, Backing::Anonymous] {
            let vm = Vm::create(&machines::backed(config(guest, 3), backing)).unwrap();
            run(&vm, Job::new(Action::Fill, 7, Order::Strided));
            for order in [Order::Sequential, Order::Strided, Order::Random] {
                let report = run(&vm, Job::new(Action::Verify, 3, order));
                assert!(report.is_right(), "{report:?}");
                assert_eq!(report.done, vm.memory().layout().pages());
                assert!(report.marks.len() >= 5, "{:?}", report.marks);
            }
            assert!(vm.compare().unwrap().is_right());
        }
    });
}

#[test]
fn one_wrong_byte_is_found_by_number_and_one_outside_the_words_by_the_host() {
    each_guest(|guest| {
        let vm = Vm::create(&config(guest, 2)).unwrap();
        run(&vm, Job::new(Action::Fill, 7, Order::Sequential));
        let layout = vm.memory().layout();
        let mut byte = [0];
        vm.memory().read(layout.offset_of(777), &mut byte);
        vm.memory().write(layout.offset_of(777), &[byte[0] ^ 1]);
        let report = run(&vm, Job::new(Action::Verify, 1, Order::Random));
        assert_eq!((report.wrong_pages, report.wrong), (1, vec![777]));
        assert_eq!(vm.compare().unwrap().wrong, [777]);

        vm.memory().write(layout.offset_of(777), &byte);
        let free = (8..504).find(|at| {
            let mut word = [0; 8];
            vm.memory().read(layout.offset_of(5) + at * 8, &mut word);
            word == [0; 8]
        });
        vm.memory().write(layout.offset_of(5) + free.unwrap() * 8 + 3, &[1]);
        assert_eq!(run(&vm, Job::new(Action::Verify, 1, Order::Random)).wrong_pages, 0);
        assert_eq!(vm.compare().unwrap().wrong, [5]);
    });
}

#[test]
fn dirtied_and_discarded_pages_are_told_from_the_others() {
    each_guest(|guest| {
        for backing in [Backing::Shared, Backing::Private, Backing::Anonymous] {
            let vm = Vm::create(&machines::backed(config(guest, 2), backing)).unwrap();
            run(&vm, Job::new(Action::Fill, 1, Order::Sequential));
            run(&vm, Job::new(Action::Dirty, 2, Order::Random).over(vec![(100, 50), (3000, 7)]));
            vm.discard(DiscardRange::Pages { first: 120, count: 100 }).unwrap();
            let gpa = vm.memory().layout().gpa_of(3500);
            vm.discard(DiscardRange::Gpa { gpa, bytes: 8192 }).unwrap();
            let report = run(&vm, Job::new(Action::Verify, 1, Order::Random));
            assert!(report.is_right(), "{report:?}");
            let zeros = run(
                &vm,
                Job::new(Action::Verify, 1, Order::Random).over(vec![(120, 100), (3500, 2), (0, 5)]),
            );
            assert!(zeros.is_right(), "{zeros:?}");
            assert!(vm.compare().unwrap().is_right());
            let contents = vm.report().contents;
            assert_eq!(contents.iter().map(|(_, pages)| pages).sum::<u64>(), vm.memory().layout().pages());
            assert!(contents.contains(&(None, 102)) && contents.contains(&(Some(2), 27)), "{contents:?}");
        }
    });
}

#[test]
fn a_balloon_may_discard_while_the_guest_verifies() {
    each_guest(|guest| {
        let vm = Vm::create(&config(guest, 4)).unwrap();
        run(&vm, Job::new(Action::Fill, 1, Order::Sequential));
        vm.run(Job::new(Action::Verify, 5, Order::Random)).unwrap();
        for step in 0..200 {
            vm.discard(DiscardRange::Pages { first: step * 17, count: 5 }).unwrap();
        }
        let report = vm.wait(None).unwrap().unwrap();
        assert!(report.is_right(), "{report:?}");
        assert!(run(&vm, Job::new(Action::Verify, 6, Order::Random)).is_right());
        assert!(vm.compare().unwrap().is_right());
    });
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    each_guest(|guest| {
        let vm = Vm::create(&config(guest, 2)).unwrap();
        run(&vm, Job::new(Action::Fill, 1, Order::Sequential));
        vm.run(Job::new(Action::Count, 0, Order::Sequential)).unwrap();
        for _ in 0..20 {
            vm.pause().unwrap();
            let stands = vm.report().job.unwrap().done;
            assert_eq!(vm.report().status, "paused");
            assert_eq!(vm.wait(Some(Duration::ZERO)).unwrap(), None);
            assert_eq!(vm.report().job.unwrap().done, stands);
            vm.resume().unwrap();
        }
        let busy = vm.run(Job::new(Action::Touch, 0, Order::Random)).unwrap_err();
        assert!(matches!(busy, VmError::Busy(_)), "{busy}");
        vm.stop().unwrap();
        assert!(run(&vm, Job::new(Action::Verify, 2, Order::Random)).is_right());
    });
}

#[test]
fn a_job_in_the_middle_survives_any_number_of_pauses() {
    each_guest(|guest| {
        let vm = Vm::create(&config(guest, 4)).unwrap();
        for job in [Job::new(Action::Fill, 8, Order::Random), Job::new(Action::Verify, 8, Order::Random)] {
            vm.run(job).unwrap();
            while vm.wait(Some(Duration::from_millis(2))).unwrap().is_none_or(|_| vm.report().job.is_some()) {
                vm.pause().unwrap();
                vm.resume().unwrap();
            }
            let report = vm.report().last_job.unwrap();
            assert!(report.is_right() && report.done == report.pages, "{report:?}");
        }
        assert!(vm.compare().unwrap().is_right());
    });
}

#[test]
fn sixty_four_vcpus_share_the_work() {
    each_guest(|guest| {
        let vm = Vm::create(&config(guest, 64)).unwrap();
        run(&vm, Job::new(Action::Fill, 1, Order::Random));
        assert!(run(&vm, Job::new(Action::Verify, 9, Order::Random)).is_right());
    });
}

#[test]
fn events_tell_the_story_of_a_job() {
    each_guest(|guest| {
        let vm = Vm::create(&config(guest, 1)).unwrap();
        run(&vm, Job::new(Action::Fill, 1, Order::Sequential));
        let mut story = Vec::new();
        while let Some(event) = vm.next_event(Some(Duration::ZERO)) {
            story.push(event);
        }
        assert!(matches!(story[0], Event::FirstInstruction { ns } if ns > 0), "{story:?}");
        assert!(matches!(story[1], Event::Progress { done, .. } if done > 0), "{story:?}");
        assert!(matches!(story.last(), Some(Event::JobDone { .. })), "{story:?}");
    });
}

#[test]
fn what_cannot_be_is_refused_and_says_why() {
    each_guest(|guest| {
        let most = if guest == GuestKind::Kvm { 64 } else { 1024 };
        for vcpus in [0, most + 1] {
            let refused = Vm::create(&config(guest, vcpus)).unwrap_err();
            assert!(refused.to_string().contains(&format!("on {guest} it must be 1 to {most}")), "{refused}");
            assert_eq!(refused.kind(), "usage");
        }
        let vm = Vm::create(&config(guest, 1)).unwrap();
        for range in [
            DiscardRange::Gpa { gpa: 4096, bytes: 4096 },
            DiscardRange::Gpa { gpa: 2 << 20, bytes: 100 },
            DiscardRange::Gpa { gpa: (8 << 20) - 4096, bytes: 8192 },
            DiscardRange::Gpa { gpa: 5 << 30, bytes: 4096 },
            DiscardRange::Gpa { gpa: 2 << 20, bytes: 0 },
            DiscardRange::Pages { first: u64::MAX, count: 2 },
        ] {
            let refused = vm.discard(range).unwrap_err();
            assert!(matches!(refused, VmError::Range(_)), "{range:?}: {refused}");
        }
        let badly_named = latepage_kvm::VmConfig { name: "a b".into(), ..config(guest, 1) };
        assert!(Vm::create(&badly_named).unwrap_err().to_string().contains("a b"));
    });
}

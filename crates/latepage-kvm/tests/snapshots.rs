//! Saving and restoring, with memory from a file and from a pager.

mod machines;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use latepage_kvm::{
    Action, Backing, DiscardRange, Event, GuestKind, Handshake, Job, MemoryFrom, Order, RestoreConfig, Vm,
    VmError,
};
use machines::tiny_pager::{Manner, TinyPager};
use machines::{config, each_guest, run, scratch};

struct Snapshot {
    directory: PathBuf,
}

impl Snapshot {
    fn state(&self) -> PathBuf {
        self.directory.join("vm.state")
    }

    fn memory(&self) -> PathBuf {
        self.directory.join("vm.mem")
    }

    /// Of a VM that is filled, partly dirtied, and partly discarded.
    fn take(directory: &Path, guest: GuestKind) -> Self {
        let snapshot = Self { directory: directory.to_path_buf() };
        let vm = Vm::create(&config(guest, 2)).unwrap();
        run(&vm, Job::new(Action::Fill, 1, Order::Sequential));
        run(&vm, Job::new(Action::Dirty, 2, Order::Random).over(vec![(1000, 300)]));
        vm.discard(DiscardRange::Pages { first: 2000, count: 64 }).unwrap();
        let saved = vm.save(&snapshot.state(), &snapshot.memory()).unwrap();
        assert_eq!(saved.memory_bytes, fs::metadata(snapshot.memory()).unwrap().len());
        snapshot
    }

    fn restore(&self, memory: MemoryFrom, backing: Option<Backing>, guest: GuestKind) -> Result<Vm, VmError> {
        let name = Some("vm-restored".into());
        Vm::restore(&RestoreConfig { name, state_file: self.state(), memory, backing, guest, paused: false })
    }
}

/// The guest checks everything, the host every byte; the balloon and the guest's writes go on working.
fn holds_what_was_saved(vm: &Vm) {
    let report = run(vm, Job::new(Action::Verify, 4, Order::Random));
    assert!(report.is_right(), "{report:?}");
    vm.discard(DiscardRange::Pages { first: 512, count: 512 }).unwrap();
    let touched = run(vm, Job::new(Action::Verify, 4, Order::Random).over(vec![(500, 600)]));
    assert!(touched.is_right(), "{touched:?}");
    run(vm, Job::new(Action::Dirty, 3, Order::Random).over(vec![(900, 300)]));
    assert!(run(vm, Job::new(Action::Verify, 5, Order::Strided)).is_right());
    let compared = vm.compare().unwrap();
    assert!(compared.is_right(), "{compared:?}");
}

#[test]
fn a_saved_vm_is_the_same_when_read_or_mapped() {
    each_guest(|guest| {
        let directory = scratch();
        let snapshot = Snapshot::take(directory.path(), guest);
        for backing in [Backing::Shared, Backing::Private, Backing::Anonymous] {
            let from = MemoryFrom::Read { memory_file: snapshot.memory() };
            holds_what_was_saved(&snapshot.restore(from, Some(backing), guest).unwrap());
        }
        let from = MemoryFrom::Map { memory_file: snapshot.memory() };
        holds_what_was_saved(&snapshot.restore(from, None, guest).unwrap());
    });
}

#[test]
fn a_saved_vm_is_the_same_from_a_pager_with_either_handshake() {
    each_guest(|guest| {
        let directory = scratch();
        let snapshot = Snapshot::take(directory.path(), guest);
        for (handshake, backing, send_memory) in [
            (Handshake::Firecracker, Backing::Anonymous, None),
            (Handshake::Latepage, Backing::Anonymous, None),
            (Handshake::Latepage, Backing::Private, Some(false)),
            (Handshake::Latepage, Backing::Private, Some(true)),
            (Handshake::Latepage, Backing::Shared, Some(false)),
            (Handshake::Latepage, Backing::Shared, None),
        ] {
            let pager = TinyPager::start(directory.path(), &snapshot.memory(), Manner::Serve);
            let from =
                MemoryFrom::Pager { socket: pager.socket.clone(), handshake, send_memory, shards: None };
            let vm = snapshot.restore(from, Some(backing), guest).unwrap();
            holds_what_was_saved(&vm);
            drop(vm);
            let hello = pager.end();
            assert_eq!(hello.memory.is_some(), backing != Backing::Anonymous && send_memory != Some(false));
            if handshake == Handshake::Latepage {
                assert_eq!((hello.name.as_deref(), hello.vcpus), (Some("vm-restored"), 2));
            }
        }
    });
}

/// Starts a job and pauses it at its first mark of progress; none if it was over by then.
fn pause_in_the_middle(vm: &Vm, job: Job) -> Option<Job> {
    vm.pause().unwrap();
    while vm.next_event(Some(Duration::ZERO)).is_some() {}
    vm.run(Job { progress_every: Some(256), ..job }).unwrap();
    vm.resume().unwrap();
    while !matches!(vm.next_event(None), Some(Event::Progress { .. })) {}
    vm.pause().unwrap();
    let job = vm.report().job.map(|report| report.job);
    if job.is_none() {
        vm.resume().unwrap();
    }
    job
}

#[test]
fn a_job_saved_in_the_middle_goes_on_after_a_restore() {
    each_guest(|guest| {
        let directory = scratch();
        let snapshot = Snapshot { directory: directory.path().to_path_buf() };
        let vm = Vm::create(&config(guest, 2)).unwrap();
        run(&vm, Job::new(Action::Fill, 1, Order::Sequential));
        for action in [Action::Fill, Action::Verify] {
            // Threads may be through before they are paused; then once more.
            let saved = (9..)
                .find_map(|seed| pause_in_the_middle(&vm, Job::new(action, seed, Order::Random)))
                .unwrap();
            vm.save(&snapshot.state(), &snapshot.memory()).unwrap();
            let from = MemoryFrom::Read { memory_file: snapshot.memory() };
            let restored = snapshot.restore(from, None, guest).unwrap();
            let report = restored.wait(None).unwrap().unwrap();
            assert_eq!(report.job, saved);
            assert!(report.is_right() && report.done == report.pages, "{report:?}");
            assert!(restored.compare().unwrap().is_right());
            vm.resume().unwrap();
            assert!(vm.wait(None).unwrap().unwrap().is_right());
        }
    });
}

#[test]
fn zero_pages_are_holes_in_the_memory_file() {
    let directory = scratch();
    let snapshot = Snapshot { directory: directory.path().to_path_buf() };
    let vm = Vm::create(&config(GuestKind::Threads, 1)).unwrap();
    let saved = vm.save(&snapshot.state(), &snapshot.memory()).unwrap();
    let file = fs::metadata(snapshot.memory()).unwrap();
    assert_eq!(file.len(), 16 << 20);
    assert!(
        saved.data_bytes < 1 << 20 && file.blocks() * 512 < 1 << 20,
        "{saved:?}, {} blocks",
        file.blocks()
    );
}

#[test]
fn one_corrupted_byte_of_the_memory_file_is_named() {
    each_guest(|guest| {
        let directory = scratch();
        let snapshot = Snapshot::take(directory.path(), guest);
        let mut contents = fs::read(snapshot.memory()).unwrap();
        contents[(2 << 20) + 1234 * 4096] ^= 0x80;
        fs::write(snapshot.memory(), contents).unwrap();
        let from = MemoryFrom::Map { memory_file: snapshot.memory() };
        let vm = snapshot.restore(from, None, guest).unwrap();
        assert_eq!(run(&vm, Job::new(Action::Verify, 1, Order::Random)).wrong, [1234]);
        assert_eq!(vm.compare().unwrap().wrong, [1234]);
    });
}

#[test]
fn a_vm_whose_pager_is_slow_waits_for_it_even_when_it_is_paused_meanwhile() {
    each_guest(|guest| {
        let directory = scratch();
        let snapshot = Snapshot::take(directory.path(), guest);
        let pager = TinyPager::start(directory.path(), &snapshot.memory(), Manner::Hold);
        let from = MemoryFrom::Pager {
            socket: pager.socket.clone(),
            handshake: Handshake::Firecracker,
            send_memory: None,
            shards: None,
        };
        let vm = snapshot.restore(from, None, guest).unwrap();
        std::thread::scope(|scope| {
            let paused = scope.spawn(|| vm.pause());
            while vm.report().status != "paused" {
                std::thread::yield_now();
            }
            pager.go.send(()).unwrap();
            paused.join().unwrap().unwrap();
        });
        vm.resume().unwrap();
        holds_what_was_saved(&vm);
    });
}

#[test]
fn poisoned_memory_is_the_end_of_the_vm_and_never_a_zero() {
    let Ok(kvm) = GuestKind::Kvm.resolve() else {
        return eprintln!("skipped: no KVM; a stand-in would take the whole process with it");
    };
    let directory = scratch();
    let snapshot = Snapshot::take(directory.path(), kvm);
    let pager = TinyPager::start(directory.path(), &snapshot.memory(), Manner::Poison);
    let from = MemoryFrom::Pager {
        socket: pager.socket.clone(),
        handshake: Handshake::Latepage,
        send_memory: None,
        shards: None,
    };
    let vm = snapshot.restore(from, None, kvm).unwrap();
    vm.run(Job::new(Action::Touch, 1, Order::Sequential)).unwrap();
    let failed = vm.wait(None).unwrap_err();
    let first_pages =
        ["guest address 0x200000 could not be had", "guest address 0x100100000 could not be had"];
    assert!(first_pages.iter().any(|page| failed.to_string().contains(page)), "{failed}");
    assert!(matches!(vm.resume(), Err(VmError::Failed(_))));
    assert_eq!(vm.report().status, "failed");
}

#[test]
fn what_cannot_be_restored_is_refused_by_one_line_and_leaves_nothing() {
    let directory = scratch();
    let guest = GuestKind::Threads;
    let snapshot = Snapshot::take(directory.path(), guest);
    let read = || MemoryFrom::Read { memory_file: snapshot.memory() };
    let refusal = |memory| snapshot.restore(memory, None, guest).unwrap_err().to_string();
    let missing = directory.path().join("missing");
    assert!(refusal(MemoryFrom::Map { memory_file: missing.clone() }).contains("missing"));
    let pager = MemoryFrom::Pager {
        socket: missing,
        handshake: Handshake::Latepage,
        send_memory: None,
        shards: None,
    };
    assert!(refusal(pager).contains("is `latepage serve` running there?"));

    let state = fs::read_to_string(snapshot.state()).unwrap();
    for (text, why) in [
        (state.replace("\"version\":1", "\"version\":99"), "its version is 99"),
        (state.replace("latepage-vm-state", "other"), "no state file"),
        (state[..state.len() / 2].to_owned(), "no state file"),
        (state.replace("\"rbx\"", "\"rbz\""), "rbz"),
        (state.replace("\"gpa\":4294967296", "\"gpa\":4096"), "laid out"),
    ] {
        assert_ne!(text, state, "{why}");
        fs::write(snapshot.state(), text).unwrap();
        let refused = refusal(read());
        assert!(refused.contains(why) && !refused.contains('\n'), "{refused}");
    }
    fs::write(snapshot.state(), state).unwrap();
    let file = fs::OpenOptions::new().write(true).open(snapshot.memory()).unwrap();
    file.set_len(10 << 20).unwrap();
    let refused = refusal(read());
    assert!(refused.contains("10485760") && refused.contains("16777216"), "{refused}");

    let vm = Vm::create(&config(guest, 1)).unwrap();
    assert!(vm.save(&snapshot.state(), &directory.path().join("no/such/place")).is_err());
    assert!(vm.save(&snapshot.state(), &snapshot.state()).unwrap_err().kind() == "usage");
    let left: Vec<_> =
        fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

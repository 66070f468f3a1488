//! A VM whose vCPUs do not come out of the guest.

use std::fs;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;

use latepage::sys::uffd::{Features, Userfaultfd};

use super::*;
use crate::config::NotifyMemory;
use crate::guest::order::Order;

/// Its pager is one that takes nobody in.
#[test]
fn a_vm_that_could_not_be_paused_runs_on_and_says_so() {
    if let Err(error) = Userfaultfd::create(Features::SIGBUS | Features::MINOR_SHMEM) {
        return eprintln!("skipped: {error}");
    }
    let folder = std::env::temp_dir().join(format!("latepage-kvm-stuck-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let [state_file, memory_file, socket] =
        ["vm.state", "vm.mem", "pager.sock"].map(|name| folder.join(name));
    let config = VmConfig {
        name: "stuck".into(),
        memory: 4 << 20,
        split: false,
        backing: Backing::Shared,
        vcpus: 1,
        guest: GuestKind::Threads,
    };
    Vm::create(&config).unwrap().save(&state_file, &memory_file).unwrap();
    let _pager = UnixListener::bind(&socket).unwrap();
    let vm = Vm::restore(&RestoreConfig {
        name: None,
        state_file,
        memory: MemoryFrom::Notify(NotifyMemory { socket, trap: None, all: false }),
        backing: None,
        guest: GuestKind::Threads,
        paused: false,
    })
    .unwrap();
    vm.run(Job::new(Action::Touch, 1, Order::Sequential)).unwrap();
    let posted = || vm.report().notify.unwrap().posted;
    while posted() == 0 {
        std::thread::yield_now();
    }
    let paused = vm.control.pause(Duration::ZERO);
    assert!(matches!(paused, Err(VmError::Stuck { vcpus: 1, .. })), "{paused:?}");
    assert_eq!((vm.report().status, vm.control.pause.load(Ordering::Acquire)), ("running", false));
    // Nobody lets it run who ends it.
    assert!(!vm.control.quit(Duration::ZERO));
    assert_eq!((vm.report().status, vm.control.pause.load(Ordering::Acquire)), ("paused", true));
    // Its thread waits for ever: what it waits at has to stay.
    std::mem::forget(vm);
    fs::remove_dir_all(&folder).unwrap();
}

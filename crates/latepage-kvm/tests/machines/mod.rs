//! The guests that these tests run on, and what they all do.
#![allow(dead_code, reason = "each test file uses its part of it")]

pub(crate) mod saved;
pub(crate) mod tiny_pager;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use latepage_kvm::{Backing, GuestKind, Job, JobReport, Vm, VmConfig};

/// Runs a test on KVM, where this process may, and in threads.
pub(crate) fn each_guest(test: impl Fn(GuestKind)) {
    match GuestKind::Kvm.resolve() {
        Ok(kvm) => test(kvm),
        Err(why) => eprintln!("skipped on KVM: {why}"),
    }
    test(GuestKind::Threads);
}

/// A small VM in two regions.
pub(crate) fn config(guest: GuestKind, vcpus: u32) -> VmConfig {
    VmConfig {
        name: "vm-test".into(),
        memory: 16 << 20,
        split: true,
        backing: Backing::Anonymous,
        vcpus,
        guest,
    }
}

/// The same on another backing.
pub(crate) fn backed(config: VmConfig, backing: Backing) -> VmConfig {
    VmConfig { backing, ..config }
}

/// Runs a job to its end.
pub(crate) fn run(vm: &Vm, job: Job) -> JobReport {
    vm.run(job).unwrap();
    vm.wait(None).unwrap().unwrap()
}

/// A directory of the test's own, gone after it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn scratch() -> Scratch {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("latepage-kvm-{}-{number}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    Scratch(path)
}

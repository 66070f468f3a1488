//! Getting a vCPU out of KVM_RUN.

use std::io;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;

/// A way to have the vCPU of one thread leave KVM_RUN with EINTR: now, or the next time it enters.
///
/// `immediate_exit` is set first and the signal sent after it, so that no moment lies between the two in which the vCPU could
/// enter and stay.
#[derive(Debug)]
pub(crate) struct Kick {
    immediate_exit: NonNull<AtomicU8>,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is only used for atomic accesses, and the thread's id is valid everywhere; see `of_this_thread` for how long.
unsafe impl Send for Kick {}

impl Kick {
    /// For the vCPU that the calling thread runs.
    ///
    /// The value must be gone before `vcpu` is dropped and before the thread ends: `vcpu.rs` keeps it under a lock and
    /// takes it out at the end of every burst, on that thread.
    pub(crate) fn of_this_thread(vcpu: &mut VcpuFd) -> Self {
        let byte = NonNull::from(&mut vcpu.get_kvm_run().immediate_exit);
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        Self { immediate_exit: byte.cast(), thread }
    }

    /// Kicks.
    pub(crate) fn kick(&self) {
        self.set(1);
        // SAFETY: the thread lives (see `of_this_thread`), and `install_handler` has made the signal harmless.
        let _ = unsafe { libc::pthread_kill(self.thread, signal()) };
    }

    /// Lets KVM_RUN run again.
    pub(crate) fn clear(&self) {
        self.set(0);
    }

    fn set(&self, value: u8) {
        // SAFETY: the byte lies in the vCPU's shared page, which stays mapped while this value exists (see `of_this_thread`);
        // the kernel reads it at any time, hence the atomic.
        let byte = unsafe { self.immediate_exit.as_ref() };
        byte.store(value, Ordering::SeqCst);
    }
}

/// The signal: real-time, so that no library's use of the classic ones meets it.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

/// Makes the kick's signal interrupt system calls and do nothing else. Once in a process.
///
/// # Errors
/// What sigaction(2) said.
pub(crate) fn install_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static ONCE: Once = Once::new();
    let mut result = 0;
    ONCE.call_once(|| {
        // SAFETY: all-zero is a valid sigaction: no flags (not SA_RESTART: KVM_RUN must return), an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the action is initialised, the handler does nothing and so is safe in any context.
        result = unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) };
    });
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

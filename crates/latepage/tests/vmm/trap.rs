//! Accesses that trap to the thread that makes them, as a vCPU's exits do: UFFD_FEATURE_SIGBUS, and a handler that resolves.
//!
//! The only unsafe code of the tests: a signal handler, and the thread's own word of who it is.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr;
use std::sync::Once;

/// Who resolves the faults of the thread: given the address, says whether the access may be tried again.
pub type Resolve<'a> = &'a (dyn Fn(u64) -> bool + 'a);

thread_local! {
    /// Set while the thread is inside [`trapping`]. Without a destructor and set from the start: a handler may read it.
    static RESOLVE: Cell<*const Resolve<'static>> = const { Cell::new(ptr::null()) };
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler that was installed with SA_SIGINFO.
    let info = unsafe { &*info };
    // SAFETY: a SIGBUS has an address.
    let address = unsafe { info.si_addr() }.addr() as u64;
    let resolve = RESOLVE.get();
    // SAFETY: not null only within `trapping` on this very thread, which keeps what it points to alive; the signal is synchronous,
    // so that thread is in the middle of an access inside it.
    let again = !resolve.is_null() && unsafe { (*resolve)(address) };
    if !again {
        // Not ours to resolve: it comes again, and ends the process.
        // SAFETY: restoring the default action has no precondition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Runs `work`, the accesses of which trap into `resolve`.
pub fn trapping<R>(resolve: Resolve<'_>, work: impl FnOnce() -> R) -> R {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid one with an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        // Not deferred: a resolution never touches what traps.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        // SAFETY: the handler keeps to what may be done in one: atomics, system calls, its own thread's word.
        let result = unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) };
        assert_eq!(result, 0);
    });
    let pointer: *const Resolve<'_> = &resolve;
    RESOLVE.set(pointer.cast());
    let result = work();
    RESOLVE.set(ptr::null());
    result
}

//! Accesses of ordinary threads that come back to the thread that makes them, as a vCPU's exits do: a userfaultfd with
//! UFFD_FEATURE_SIGBUS, and a handler that sees to the page on that very thread.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::supply::Seat;

thread_local! {
    /// Where the thread sits, within [`seated`]. Set from the start and without a destructor: a handler may look at it.
    static SEAT: Cell<Option<*mut dyn Seat>> = const { Cell::new(None) };
}

/// What was done about a SIGBUS before us.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Whether this thread sits somewhere: its accesses come back to it.
pub(crate) fn is_seated() -> bool {
    SEAT.get().is_some()
}

/// Runs `work`, whose accesses to absent pages are seen to at `seat`. [`install_handler`] was called before.
pub(crate) fn seated<R>(seat: &mut dyn Seat, work: impl FnOnce() -> R) -> R {
    struct Leave(Option<*mut dyn Seat>);
    impl Drop for Leave {
        fn drop(&mut self) {
            SEAT.set(self.0);
        }
    }
    let pointer: *mut (dyn Seat + '_) = seat;
    // SAFETY: only the lifetime changes. The pointer is out of the thread's word again when this function ends, however it ends, and
    // nobody else has it; so it is used while `seat` is borrowed here, and never looked at by anyone else.
    let pointer: *mut (dyn Seat + 'static) = unsafe { std::mem::transmute(pointer) };
    let _leave = Leave(SEAT.replace(Some(pointer)));
    work()
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the thread's own errno, which is always there.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    // SAFETY: the kernel hands a valid siginfo to a handler that was installed with SA_SIGINFO.
    let info_now = unsafe { &*info };
    // SAFETY: a SIGBUS has an address, or anything at all if somebody sent it, which no region has.
    let address = unsafe { info_now.si_addr() }.addr() as u64;
    // Taken out for the time: a seat does not touch what comes back to it.
    let seen_to = SEAT.take().is_some_and(|seat| {
        // SAFETY: set only within `seated` on this very thread, which holds the borrow that it came from. The signal is synchronous,
        // so the thread is in the middle of `work`, which cannot reach the seat.
        let there = unsafe { (*seat).touch(address) };
        SEAT.set(Some(seat));
        there
    });
    if !seen_to {
        pass_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// What is none of ours goes to whoever was there before. By default it comes again and ends the process.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type Simple = extern "C" fn(libc::c_int);
    type Informed = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    let before = BEFORE.get().filter(|before| !matches!(before.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN));
    match before {
        Some(before) if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: that is what the field holds with this flag.
            let handler = unsafe { std::mem::transmute::<usize, Informed>(before.sa_sigaction) };
            handler(signal, info, context);
        }
        Some(before) => {
            // SAFETY: that is what the field holds without it, as it is neither of the two that are no functions.
            let handler = unsafe { std::mem::transmute::<usize, Simple>(before.sa_sigaction) };
            handler(signal);
        }
        None => {
            // SAFETY: restoring the default action has no precondition.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            // SAFETY: as in `on_sigbus`.
            let sent = unsafe { (*info).si_code } <= 0;
            if sent {
                // No access brings it again. It waits until this handler has returned.
                // SAFETY: raising a signal has no precondition.
                unsafe { libc::raise(signal) };
            }
        }
    }
}

/// Installs the handler. Once in a process; whatever handler there was is called for what is none of ours.
///
/// # Errors
/// What sigaction(2) said.
pub(crate) fn install_handler() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    // SAFETY: all-zero is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    // On the thread's own stack: a seat may go deeper than an alternate one has room.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: as above.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asking has no effect.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Before the handler may need it.
    let _ = BEFORE.set(before);
    // SAFETY: the handler keeps to what may be done in one: atomics, system calls, its own thread's word, and a seat's `touch`, which
    // promises the same.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    *installed = true;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use latepage::sys::mapping::Mapping;
    use latepage::sys::uffd::{Features, InstallMode, RegisterMode, Userfaultfd};

    use super::*;
    use crate::supply::Came;

    /// Brings zero pages, and counts them.
    #[derive(Debug)]
    struct Zeros(Arc<Userfaultfd>, u32);

    impl Seat for Zeros {
        fn exit(&mut self, _: u64, _: &AtomicBool) -> Came {
            unreachable!("no vCPU sits here")
        }

        fn touch(&mut self, address: u64) -> bool {
            self.1 += 1;
            self.0.zeropage(address & !4095, 4096, InstallMode::empty()).stopped.is_none()
        }
    }

    #[test]
    fn an_access_comes_back_to_its_own_thread_once_for_each_page() {
        let made = match Userfaultfd::create(Features::SIGBUS) {
            Ok(made) => Arc::new(made),
            Err(error) => return eprintln!("skipped: {error}"),
        };
        install_handler().unwrap();
        install_handler().unwrap();
        let memory = Mapping::anonymous(4096 * 64).unwrap();
        made.register(memory.address(), 4096 * 64, RegisterMode::MISSING).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (memory, made) = (&memory, Arc::clone(&made));
                scope.spawn(move || {
                    let mut seat = Zeros(made, 0);
                    assert!(!is_seated());
                    let sum: u64 = seated(&mut seat, || {
                        assert!(is_seated());
                        (0..32).map(|page| memory.load((thread * 16 + page % 16) * 4096 + 8)).sum()
                    });
                    assert_eq!((sum, seat.1, is_seated()), (0, 16, false));
                });
            }
        });
    }
}

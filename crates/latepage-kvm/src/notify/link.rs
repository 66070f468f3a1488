//! The connection to the pager: open for as long as both live. When the pager has gone, whoever waits in the channel goes on waiting,
//! and the first that listens at the same path is handed the same things.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use latepage::stats::Counter;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::seat::Side;
use crate::control::Control;
use crate::error::VmError;
use crate::event::Event;

/// The pauses between two looks for a successor: the first, and the longest that they grow to.
const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_millis(200);
/// A pager that lets go of the VM sooner than this has refused it, and is not asked again sooner either.
const REFUSED: Duration = Duration::from_secs(1);
/// What is kept of what a pager says.
const SAID: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    /// The connection there is, for whoever ends the VM to close.
    socket: Mutex<UnixStream>,
    leaving: AtomicBool,
    stop: OwnedFd,
    connected: Counter,
}

impl Link {
    /// Connects to the pager, and hands it the VM.
    pub(super) fn connect(path: &Path, side: &Side) -> Result<Self, VmError> {
        let failed = |source| VmError::Pager { path: path.to_path_buf(), source };
        let socket = UnixStream::connect(path).map_err(failed)?;
        side.handover.send(&socket).map_err(failed)?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| VmError::call("eventfd", errno))?;
        let connected = Counter::default();
        connected.add(1);
        let (path, socket, leaving) = (path.to_path_buf(), Mutex::new(socket), AtomicBool::new(false));
        Ok(Self {
            shared: Arc::new(Shared { path, socket, leaving, stop, connected }),
            watcher: Mutex::default(),
        })
    }

    /// Tells `control` when the pager goes away, and finds its successor, on a thread that nothing else waits for.
    pub(super) fn watch(&self, control: &Arc<Control>, side: &Arc<Side>) -> Result<(), VmError> {
        let (shared, control, side) = (Arc::clone(&self.shared), Arc::clone(control), Arc::clone(side));
        let watcher = thread::Builder::new()
            .name("pager-link".into())
            .spawn(move || shared.follow(&control, &side))
            .map_err(|source| VmError::thread(&source))?;
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = Some(watcher);
        Ok(())
    }

    /// Where pagers listen.
    pub(super) fn path(&self) -> &Path {
        &self.shared.path
    }

    /// How often a pager was handed the VM.
    pub(super) fn connected(&self) -> u64 {
        self.shared.connected.get()
    }
}

impl Shared {
    fn follow(&self, control: &Control, side: &Side) {
        loop {
            let since = Instant::now();
            let said = self.until_it_ends();
            if self.leaving.load(Ordering::Acquire) {
                return;
            }
            control.events.push(Event::PagerGone { said, ns: control.now() });
            let mut pause = if since.elapsed() < REFUSED { REFUSED } else { FIRST };
            let socket = loop {
                if self.leave_within(pause) {
                    return;
                }
                match try_connect(&self.path).and_then(|socket| side.handover.send(&socket).map(|()| socket))
                {
                    Ok(socket) => break socket,
                    Err(_) => pause = longer(pause),
                }
            };
            *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
            if self.leaving.load(Ordering::Acquire) {
                return;
            }
            self.connected.add(1);
            side.ask_again();
            control.events.push(Event::PagerBack { ns: control.now() });
        }
    }

    /// Waits for the end of the connection, and returns what the pager said before it.
    fn until_it_ends(&self) -> String {
        let copy = self.socket.lock().unwrap_or_else(PoisonError::into_inner).try_clone();
        copy.map_or_else(|_| String::new(), all_it_says)
    }

    /// Waits for so long; true as soon as the VM ends.
    fn leave_within(&self, pause: Duration) -> bool {
        let pause = Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: i64::from(pause.subsec_nanos()) };
        let mut polled = [PollFd::new(&self.stop, PollFlags::IN)];
        let _ = rustix::event::poll(&mut polled, Some(&pause));
        self.leaving.load(Ordering::Acquire)
    }
}

/// The pause after one in which nobody was found.
fn longer(pause: Duration) -> Duration {
    (pause * 2).min(LONGEST).max(pause)
}

/// Reads to the end. However much comes before it, only that is the end; the first of it is returned.
fn all_it_says(mut from: impl Read) -> String {
    let (mut said, mut buffer) = (Vec::new(), [0; 512]);
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(bytes) => said.extend_from_slice(&buffer[..bytes.min(SAID - said.len())]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&said).trim().to_owned()
}

/// Connects without ever waiting: a pager that takes nobody in is none.
fn try_connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.leaving.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        let _ = self.shared.socket.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both);
        if let Some(watcher) = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = watcher.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pager_that_says_much_has_not_gone_before_it_is_silent() {
        let much = "no ".repeat(SAID);
        let mut rest = much.as_bytes();
        assert_eq!(all_it_says(&mut rest), much[..SAID].trim());
        assert!(rest.is_empty(), "{} bytes were not read", rest.len());
        assert_eq!(all_it_says(&b"full\n"[..]), "full");
    }

    #[test]
    fn pauses_grow_and_never_shrink() {
        let ms = Duration::from_millis;
        assert_eq!([FIRST, ms(150), LONGEST, REFUSED].map(longer), [ms(20), LONGEST, LONGEST, REFUSED]);
    }
}

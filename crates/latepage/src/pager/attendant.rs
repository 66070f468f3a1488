//! The attendant: one thread that takes handshakes, watches refused peers, and looks for stalls and changed sources.
//!
//! Nothing on the path of a fault waits for it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::Shared;
use super::bell::Bell;
use super::condemned::{Condemned, sentence};
use super::events::What;
use super::follow::Following;
use super::listener::ListeningSocket;
use super::spare::Spare;
use crate::attachment::{Fed, Incoming, Refusal, RefusalReason};
use crate::session::{OnMissing, Policy};
use crate::source::{Source, SourceNotice};
use crate::sys::fdpass;
use crate::sys::pidfd::{Peer, PidFd, peer};
use crate::sys::uffd::MessageBuffer;

const BELL: u64 = 0;
/// The longest pause between two looks at stalls, leases and refused peers.
const TICK: Duration = Duration::from_secs(1);
/// While something is under way that should be noticed soon.
const SHORT_TICK: Duration = Duration::from_millis(50);
/// How long a VM whose population a program directs is looked at often, after it has touched something.
const LIVELY: Duration = Duration::from_secs(1);
/// Handshakes under way at once; further peers wait in the socket's queue.
const HANDSHAKES: usize = 256;

enum Order {
    Listen(Arc<Listener>, ListeningSocket),
    StopListening,
    Stop,
}

/// What VMs that connect at one socket get.
pub(super) struct Listener {
    pub(super) path: String,
    pub(super) source: Arc<dyn Source>,
    pub(super) policy: Policy,
    /// Who says what is populated, where it is a program.
    pub(super) following: Option<Arc<Following>>,
}

/// The side of the attendant that other threads see.
pub(super) struct Attendant {
    orders: Mutex<Vec<Order>>,
    bell: Bell,
}

impl Attendant {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { orders: Mutex::new(Vec::new()), bell: Bell::new()? })
    }

    pub(super) fn start(shared: &Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &shared.attendant.bell, epoll::EventData::new_u64(BELL), epoll::EventFlags::IN)?;
        let mut spare = Spare::default();
        spare.fill()?;
        let mut thread = Thread {
            shared: Arc::downgrade(shared),
            epoll,
            next: BELL + 1,
            entries: HashMap::new(),
            listeners: Vec::new(),
            handshakes: 0,
            paused: false,
            spare,
            warned: false,
            lively_until: Instant::now(),
            messages: MessageBuffer::new(64),
            bytes: vec![0; 64 << 10].into_boxed_slice(),
        };
        std::thread::Builder::new().name("latepage-attend".to_owned()).spawn(move || thread.run())
    }

    fn order(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        self.bell.ring();
    }

    pub(super) fn listen(&self, listener: Arc<Listener>, socket: ListeningSocket) {
        self.order(Order::Listen(listener, socket));
    }

    pub(super) fn stop_listening(&self) {
        self.order(Order::StopListening);
    }

    pub(super) fn stop(&self) {
        self.order(Order::Stop);
    }
}

/// A peer that has connected and not yet said all.
struct Handshake {
    socket: OwnedFd,
    incoming: Incoming,
    listener: Arc<Listener>,
    peer: Peer,
    process: Option<PidFd>,
    deadline: Instant,
}

enum Entry {
    Listening(Arc<Listener>, ListeningSocket),
    Handshake(Box<Handshake>),
    Condemned(Condemned),
}

struct Thread {
    shared: Weak<Shared>,
    epoll: OwnedFd,
    next: u64,
    entries: HashMap<u64, Entry>,
    /// All that ever were: their sources are served after the socket is closed.
    listeners: Vec<Arc<Listener>>,
    handshakes: usize,
    /// No peer is accepted or heard: too many handshakes, or no descriptors.
    paused: bool,
    spare: Spare,
    /// That nobody can be accepted has been said since somebody last was.
    warned: bool,
    /// VMs that are followed were busy just now: what they touch next is told soon.
    lively_until: Instant,
    messages: MessageBuffer,
    bytes: Box<[u8]>,
}

impl Thread {
    fn run(&mut self) {
        let mut events = Vec::with_capacity(64);
        let mut ticked = Instant::now();
        loop {
            events.clear();
            let tick = self.tick_length();
            let left = (ticked + tick).saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                // The epoll is ours and its buffer is good: nothing else can come.
                Err(errno) => unreachable!("epoll_wait: {errno}"),
            }
            let Some(shared) = self.shared.upgrade() else { return };
            for event in &events {
                match event.data.u64() {
                    BELL => {
                        if self.follow_orders(&shared) {
                            return;
                        }
                    }
                    token => self.attend(&shared, token),
                }
            }
            if ticked.elapsed() >= tick {
                ticked = Instant::now();
                self.tick(&shared);
            }
        }
    }

    fn tick_length(&self) -> Duration {
        let soon = |entry: &Entry| !matches!(entry, Entry::Listening(..));
        let lively = self.lively_until > Instant::now();
        let busy = lively || self.paused || self.entries.values().any(soon);
        let stall =
            self.listeners.iter().map(|listener| listener.policy.stall_warning / 4).min().unwrap_or(TICK);
        if busy { SHORT_TICK } else { stall.clamp(SHORT_TICK, TICK) }
    }

    fn follow_orders(&mut self, shared: &Arc<Shared>) -> bool {
        shared.attendant.bell.silence();
        let orders =
            std::mem::take(&mut *shared.attendant.orders.lock().unwrap_or_else(PoisonError::into_inner));
        for order in orders {
            match order {
                Order::Listen(listener, socket) => {
                    self.listeners.push(Arc::clone(&listener));
                    self.watch(Entry::Listening(listener, socket));
                }
                Order::StopListening => self.stop_listening(shared),
                Order::Stop => {
                    self.leave_word(shared);
                    return true;
                }
            }
        }
        false
    }

    /// Whoever was refused and still lives is left with nobody to answer its faults.
    fn leave_word(&self, shared: &Arc<Shared>) {
        for entry in self.entries.values() {
            if let Entry::Condemned(condemned) = entry
                && condemned.lives()
            {
                shared.events.emit(What::Warning { what: condemned.last_word() });
            }
        }
    }

    /// No peer is left behind: those who had connected are refused in words.
    fn stop_listening(&mut self, shared: &Arc<Shared>) {
        let over = |entry: &Entry| !matches!(entry, Entry::Condemned(_));
        let tokens: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| over(entry)).map(|(token, _)| *token).collect();
        for token in tokens {
            match self.entries.remove(&token) {
                Some(Entry::Listening(listener, socket)) => {
                    // From here on connect(2) fails; who is in the queue has perhaps sent his userfaultfd.
                    let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Read);
                    while let Ok(connection) =
                        rustix::net::accept_with(&socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
                    {
                        if let Some(handshake) = self.greet(shared, connection, &listener) {
                            self.refuse(shared, handshake, |incoming| {
                                incoming.refused(RefusalReason::Draining)
                            });
                        }
                    }
                }
                Some(Entry::Handshake(handshake)) => {
                    self.handshakes -= 1;
                    self.refuse(shared, *handshake, |incoming| incoming.refused(RefusalReason::Draining));
                }
                Some(Entry::Condemned(_)) | None => {}
            }
        }
    }

    fn watch(&mut self, entry: Entry) {
        let token = self.next;
        self.next += 1;
        let data = epoll::EventData::new_u64(token);
        let (incoming, edge) = (epoll::EventFlags::IN, epoll::EventFlags::IN | epoll::EventFlags::ET);
        // What cannot be watched is found by the next tick: by its deadline, or by its death.
        let _ = match &entry {
            Entry::Listening(_, socket) => epoll::add(&self.epoll, socket, data, incoming),
            Entry::Handshake(handshake) => epoll::add(&self.epoll, &handshake.socket, data, incoming),
            Entry::Condemned(condemned) => condemned
                .descriptors()
                .try_for_each(|descriptor| epoll::add(&self.epoll, descriptor, data, edge)),
        };
        self.entries.insert(token, entry);
    }

    fn attend(&mut self, shared: &Arc<Shared>, token: u64) {
        match self.entries.remove(&token) {
            Some(Entry::Listening(listener, socket)) => {
                let all = self.accept(shared, &listener, &socket);
                self.entries.insert(token, Entry::Listening(listener, socket));
                if !all {
                    self.pause(true);
                }
            }
            Some(Entry::Handshake(handshake)) => self.hear(shared, token, handshake),
            Some(Entry::Condemned(condemned)) => {
                condemned.attend(&mut self.messages);
                self.entries.insert(token, Entry::Condemned(condemned));
            }
            None => {}
        }
    }

    /// Returns whether all who waited were accepted; if not, the socket stays readable and is left alone until the next tick.
    fn accept(&mut self, shared: &Arc<Shared>, listener: &Arc<Listener>, socket: &ListeningSocket) -> bool {
        while self.handshakes < HANDSHAKES {
            if let Err(errno) = self.spare.fill() {
                self.warn_of_want(shared, "accept", errno);
                return false;
            }
            match rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(connection) => {
                    if let Some(handshake) = self.greet(shared, connection, listener) {
                        self.handshakes += 1;
                        self.watch(Entry::Handshake(Box::new(handshake)));
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => {
                    self.warned = false;
                    return true;
                }
                Err(errno) => {
                    self.warn_of_want(shared, "accept", errno);
                    return false;
                }
            }
        }
        false
    }

    /// Once, until there was room again.
    fn warn_of_want(&mut self, shared: &Shared, call: &str, errno: Errno) {
        if !std::mem::replace(&mut self.warned, true) {
            let what = format!("{call}: {errno}; trying again (open files: ulimit -n)");
            shared.events.emit(What::Warning { what });
        }
    }

    /// Stops watching for new peers and for what they say, or starts again.
    fn pause(&mut self, pause: bool) {
        self.paused = pause;
        for (token, entry) in &self.entries {
            let flags = if pause { epoll::EventFlags::empty() } else { epoll::EventFlags::IN };
            let data = epoll::EventData::new_u64(*token);
            let _ = match entry {
                Entry::Listening(_, socket) => epoll::modify(&self.epoll, socket, data, flags),
                Entry::Handshake(handshake) => epoll::modify(&self.epoll, &handshake.socket, data, flags),
                Entry::Condemned(_) => Ok(()),
            };
        }
    }

    /// Who is it? A peer that is not allowed is refused before it is listened to.
    fn greet(
        &mut self,
        shared: &Arc<Shared>,
        socket: OwnedFd,
        listener: &Arc<Listener>,
    ) -> Option<Handshake> {
        // It fails on no connected Unix socket; a peer without credentials is nobody.
        let peer = peer(&socket).unwrap_or(Peer { pid: None, uid: u32::MAX, gid: u32::MAX });
        let process = PidFd::of_peer(&socket);
        let deadline = Instant::now() + listener.policy.handshake_timeout;
        let allowed = listener.policy.allow_uids.as_ref().is_none_or(|allowed| allowed.contains(&peer.uid));
        let handshake = Handshake {
            socket,
            incoming: Incoming::new(),
            listener: Arc::clone(listener),
            peer,
            process,
            deadline,
        };
        if allowed {
            return Some(handshake);
        }
        self.refuse(shared, handshake, |incoming| incoming.refused(RefusalReason::Uid { uid: peer.uid }));
        None
    }

    /// Reads what a peer says, until it has said all, or something that is refused.
    fn hear(&mut self, shared: &Arc<Shared>, token: u64, mut handshake: Box<Handshake>) {
        loop {
            if let Err(errno) = self.spare.fill() {
                // It is heard when there is room again.
                self.entries.insert(token, Entry::Handshake(handshake));
                self.warn_of_want(shared, "a handshake", errno);
                return self.pause(true);
            }
            self.spare.make_room();
            let received = fdpass::receive(&handshake.socket, &mut self.bytes);
            // Where that fails, it is found out before the next.
            let _ = self.spare.fill();
            let received = match received {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.handshakes -= 1;
                    return self.refuse(shared, *handshake, Incoming::closed);
                }
            };
            // On a stream nothing at all means that the other end was closed.
            if received.bytes == 0 && received.descriptors.is_empty() {
                self.handshakes -= 1;
                return self.refuse(shared, *handshake, Incoming::closed);
            }
            let fed = handshake.incoming.feed(&self.bytes[..received.bytes], received.descriptors);
            match fed {
                // One that was lost may have been its userfaultfd: it is refused as if it had been.
                Fed::More if received.truncated => {
                    self.handshakes -= 1;
                    return self.refuse(shared, *handshake, |incoming| {
                        incoming.refused(RefusalReason::DescriptorsLost)
                    });
                }
                Fed::More => {}
                Fed::Done(hello) => {
                    self.handshakes -= 1;
                    let Handshake { socket, listener, peer, process, .. } = *handshake;
                    // It is the session's from here on, and the session's worker watches it.
                    let _ = epoll::delete(&self.epoll, &socket);
                    let refused = shared.admit(hello, socket, peer, process, &listener);
                    if let Some((refusal, socket, process, name)) = refused {
                        self.condemn(shared, &listener, peer, process, socket, refusal, name);
                    } else if listener.following.is_some() {
                        self.lively_until = Instant::now() + LIVELY;
                    }
                    return;
                }
                Fed::Refused(refusal) => {
                    self.handshakes -= 1;
                    let Handshake { socket, listener, peer, process, .. } = *handshake;
                    return self.condemn(shared, &listener, peer, process, socket, refusal, None);
                }
            }
        }
        self.entries.insert(token, Entry::Handshake(handshake));
    }

    fn refuse(&mut self, shared: &Arc<Shared>, handshake: Handshake, why: impl FnOnce(Incoming) -> Refusal) {
        let Handshake { socket, incoming, listener, peer, process, .. } = handshake;
        self.condemn(shared, &listener, peer, process, socket, why(incoming), None);
    }

    /// Ends the connection, and does to the peer what must be done if it has sent a userfaultfd.
    #[allow(clippy::too_many_arguments, reason = "everything that is known of a peer, taken apart once")]
    fn condemn(
        &mut self,
        shared: &Arc<Shared>,
        listener: &Listener,
        peer: Peer,
        process: Option<PidFd>,
        socket: OwnedFd,
        refusal: Refusal,
        name: Option<String>,
    ) {
        let Refusal { reason, mut userfaultfds, .. } = refusal;
        // After this the peer's send(2) fails, so that it knows; what it sent before is all that there will ever be.
        let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Read);
        while let Ok(received) = fdpass::receive(&socket, &mut self.bytes) {
            if received.bytes == 0 && received.descriptors.is_empty() {
                break;
            }
            userfaultfds.extend(
                received
                    .descriptors
                    .into_iter()
                    .filter_map(|fd| crate::sys::uffd::Userfaultfd::from_fd(fd).ok()),
            );
        }
        let on_missing = listener.policy.on_missing;
        let action = match (&reason, userfaultfds.is_empty()) {
            // What was lost is closed: there is nothing left to poison by.
            (RefusalReason::DescriptorsLost, _) => {
                sentence(OnMissing::Kill, peer.pid, process.as_ref()).to_string()
            }
            (_, true) => "none".to_owned(),
            (_, false) => sentence(on_missing, peer.pid, process.as_ref()).to_string(),
        };
        shared.events.emit(What::Refused {
            socket: listener.path.clone(),
            vm: name,
            pid: peer.pid.unwrap_or(0),
            uid: peer.uid,
            reason: reason.to_string(),
            action,
        });
        if !userfaultfds.is_empty() {
            self.watch(Entry::Condemned(Condemned::new(userfaultfds, process, on_missing, peer.pid)));
        }
    }

    fn tick(&mut self, shared: &Arc<Shared>) {
        let now = Instant::now();
        let late = |entry: &Entry| matches!(entry, Entry::Handshake(handshake) if handshake.deadline <= now);
        let dead = |entry: &Entry| matches!(entry, Entry::Condemned(condemned) if !condemned.lives());
        let over: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, entry)| late(entry) || dead(entry))
            .map(|(token, _)| *token)
            .collect();
        for token in over {
            match self.entries.remove(&token) {
                Some(Entry::Handshake(handshake)) => {
                    self.handshakes -= 1;
                    self.refuse(shared, *handshake, Incoming::timed_out);
                }
                Some(Entry::Condemned(condemned)) => condemned.descriptors().for_each(|descriptor| {
                    let _ = epoll::delete(&self.epoll, descriptor);
                }),
                _ => {}
            }
        }
        for entry in self.entries.values() {
            if let Entry::Condemned(condemned) = entry {
                condemned.attend(&mut self.messages);
            }
        }
        if std::mem::replace(&mut self.paused, false) {
            self.pause(false);
        }
        for session in shared.all_sessions() {
            session.check_stalls();
        }
        for listener in &self.listeners {
            self.look_after(shared, listener);
        }
        let followings = self.listeners.iter().filter_map(|listener| listener.following.as_ref());
        // Each is looked at: no `any`, which stops at the first.
        if followings.filter(|following| following.look()).count() > 0 {
            self.lively_until = now + LIVELY;
        }
    }

    fn look_after(&self, shared: &Arc<Shared>, listener: &Arc<Listener>) {
        let source = || listener.source.describe();
        for notice in listener.source.check() {
            let change = notice.to_string();
            let what = match notice {
                SourceNotice::LeaseBreaking { remaining, .. } => {
                    // A writer waits: what the VMs still lack is brought now.
                    shared.hurry(|session| std::ptr::addr_eq(session.source(), &*listener.source));
                    What::LeaseBreaking { source: source(), seconds: remaining.as_secs_f64(), change }
                }
                SourceNotice::NoLease { .. } | SourceNotice::ZeroMap { .. } => What::Warning { what: change },
                _ => What::SourceChanged { source: source(), change },
            };
            shared.events.emit(what);
        }
        let served =
            |session: &crate::session::Session| std::ptr::addr_eq(session.source(), &*listener.source);
        if shared.all_sessions().iter().filter(|session| served(session)).all(|session| session.owed() == 0) {
            listener.source.filled();
        }
    }
}

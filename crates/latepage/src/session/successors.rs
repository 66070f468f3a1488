//! A pager that dies at every call of its install, in every way, and the next one at the same channel: the guest writes to whatever it
//! can see, the moment that it can, and must find all of it again.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

use super::{FaultAround, Host, Peer, Policy, Report, Scratch, Session, Sliced};
use crate::attachment::{Backing, Form, Hello, Notify};
use crate::delivery::channel::{Channel, Completion, Request, Seat, Waited, attach};
use crate::install::{Install, Outcome, PageBitmap};
use crate::memory::{Layout, PageSize, PageState, PageTable, Region, Shards};
use crate::source::{Answer, Source, SourceError};
use crate::sys::mapping::{Mapping, Window};
use crate::sys::memfd;
use crate::sys::uffd::{Features, RegisterMode, Userfaultfd};

const PAGE: usize = 4096;
const PAGES: u32 = 24;

/// What the snapshot holds: every third page is zero in words, and some are said to be zero.
struct Numbered;

fn snapshot(page: u32) -> u64 {
    if page % 3 == 2 || (8..12).contains(&page) { 0 } else { u64::from(page) << 8 | 1 }
}

impl Source for Numbered {
    fn describe(&self) -> String {
        "numbered".to_owned()
    }

    fn size(&self) -> u64 {
        u64::from(PAGES) * PAGE as u64
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        _: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        let first = (offset / PAGE as u64) as u32;
        if (8..12).contains(&first) {
            return Ok(Answer::Zero(length.min((12 - first) as usize * PAGE) as u64));
        }
        for (page, bytes) in (first..).zip(scratch[..length].chunks_exact_mut(PAGE)) {
            bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&snapshot(page).to_le_bytes()));
        }
        Ok(Answer::Bytes(&scratch[..length]))
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.ask(offset, length, unit, scratch)
    }
}

struct Deaf;

impl Host for Deaf {
    fn report(&self, _: &Session, _: Report) {}

    fn read_later(&self, _: &Arc<Session>, page: u32) {
        panic!("page {page} is at hand");
    }

    fn nudge(&self, _: &Session, _: usize) {}
}

/// By what the guest sees pages.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sees {
    /// Those that it was told of.
    Told,
    /// Those whose bit is clear.
    ByBits,
    /// Those in its page table: a userfaultfd covers the others.
    ByUserfaultfd,
    /// The same, where there is a bitmap beside it.
    ByBoth,
}

/// What the guest asks for, one after another.
#[derive(Clone, Debug)]
enum Deed {
    Touch(u32),
    Discard(Range<u32>),
}

/// A guest of one vCPU, that writes to every page the moment that it sees it.
struct Guest {
    sees: Sees,
    view: Mapping,
    memory: OwnedFd,
    layout: Layout,
    channel: Channel,
    bits: PageBitmap,
    bitmap: OwnedFd,
    table: OwnedFd,
    userfaultfd: Option<Userfaultfd>,
    pagemap: std::fs::File,
    seat: Seat,
    posted: Option<Deed>,
    told: Vec<bool>,
    holds: Vec<Held>,
    writes: u64,
}

/// What a page must hold: its first word, which the guest writes once it can, and its last.
#[derive(Clone, Copy, Debug)]
struct Held {
    first: u64,
    last: u64,
    written: bool,
}

impl Held {
    fn all(word: u64) -> Self {
        Self { first: word, last: word, written: false }
    }
}

impl Guest {
    /// `None` where there is no userfaultfd, and it needs one.
    fn new(sees: Sees) -> Option<Self> {
        let length = PAGES as usize * PAGE;
        let memory = memfd::create("guest", length as u64).unwrap();
        let view = Mapping::shared(memory.as_fd(), 0, length).unwrap();
        let userfaultfd = match sees {
            Sees::Told | Sees::ByBits => None,
            Sees::ByUserfaultfd | Sees::ByBoth => {
                let made = Userfaultfd::create(Features::MISSING_SHMEM | Features::MINOR_SHMEM);
                let made = made.inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
                made.register(view.address(), length as u64, RegisterMode::MISSING | RegisterMode::MINOR)
                    .unwrap();
                Some(made)
            }
        };
        let (hva, size) = (view.address(), length as u64);
        let region = Region { gpa: None, hva, size, offset: 0, page_size: PageSize::Small };
        let layout = Layout::new(vec![region]).unwrap();
        let bitmap = PageBitmap::create(&layout).unwrap();
        let bits = PageBitmap::map(&bitmap, &layout).unwrap();
        bits.set(0..PAGES);
        let table = PageTable::create(&layout).unwrap();
        let channel = Channel::new(1, PAGES).unwrap();
        let seat = channel.seat(0).unwrap();
        let (told, holds) =
            (vec![false; PAGES as usize], (0..PAGES).map(|page| Held::all(snapshot(page))).collect());
        Some(Self {
            sees,
            view,
            memory,
            layout,
            channel,
            bits,
            bitmap,
            table,
            userfaultfd,
            pagemap: std::fs::File::open("/proc/self/pagemap").unwrap(),
            seat,
            posted: None,
            told,
            holds,
            writes: 0,
        })
    }

    fn post(&mut self, deed: Deed) {
        let request = match &deed {
            Deed::Touch(page) => Request::Fault { page: *page, write: true, thread: 0 },
            Deed::Discard(pages) => Request::Removed(pages.clone()),
        };
        self.seat.post(&request).unwrap();
        self.posted = Some(deed);
    }

    /// The pages that an access would not trap at, found out without one.
    fn seen(&self) -> Vec<u32> {
        let mapped = || {
            // An entry of 8 bytes for each page; its highest bit says that the page is there.
            let mut entries = [0; 8 * PAGES as usize];
            rustix::io::pread(&self.pagemap, &mut entries, self.view.address() / PAGE as u64 * 8).unwrap();
            entries.chunks_exact(8).map(|entry| entry[7] >> 7 == 1).collect()
        };
        let seen: Vec<bool> = match self.sees {
            Sees::Told => self.told.clone(),
            Sees::ByBits => (0..PAGES).map(|page| !self.bits.is_set(page)).collect(),
            // With a bit beside it, too: the VMM's own accesses meet no bit.
            Sees::ByUserfaultfd | Sees::ByBoth => mapped(),
        };
        (0..).zip(seen).filter(|(_, seen)| *seen).map(|(page, _)| page).collect()
    }

    /// All that it can do just now.
    fn act(&mut self) {
        match self.seat.wait(0, Some(Duration::ZERO)) {
            Waited::Over(Completion::Done(pages)) => match self.posted.take().unwrap() {
                Deed::Touch(page) => {
                    assert!(pages.contains(&page));
                    pages.for_each(|page| self.told[page as usize] = true);
                }
                Deed::Discard(pages) => {
                    self.view.remove(pages.start as usize * PAGE, pages.len() * PAGE).unwrap();
                    for page in pages {
                        self.holds[page as usize] = Held::all(0);
                        self.told[page as usize] = false;
                        if page % 2 == 0 {
                            self.bits.set(page..page + 1);
                        }
                    }
                }
            },
            Waited::TimedOut => {}
            Waited::Garbled if self.posted.is_none() => {}
            other => panic!("{other:?}"),
        }
        for page in self.seen() {
            let (at, held) = (page as usize * PAGE, &mut self.holds[page as usize]);
            let words = [at, at + PAGE - 8].map(|at| self.view.load(at));
            assert_eq!(words, [held.first, held.last], "page {page}: {held:?}");
            if !held.written {
                self.writes += 1;
                (held.first, held.written) = (u64::MAX - self.writes, true);
                self.view.store(at, held.first);
            }
        }
    }

    /// A pager's session over it, by the descriptors that every pager gets.
    fn attached(&self) -> Arc<Session> {
        let (channel, bell) = self.channel.descriptors();
        let reader = attach(channel, bell.try_clone_to_owned().unwrap(), PAGES, 1).unwrap();
        let by_bits = matches!(self.sees, Sees::ByBits | Sees::ByBoth);
        let notify = Notify {
            reader,
            bitmap: by_bits.then(|| PageBitmap::map(&self.bitmap, &self.layout).unwrap()),
            pages: Some(PageTable::map(&self.table, &self.layout).unwrap()),
        };
        let copy =
            |uffd: &Userfaultfd| Userfaultfd::from_fd(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let hello = Hello {
            form: Form::Latepage,
            name: None,
            vcpus: 1,
            backing: Backing::Shared,
            layout: self.layout.clone(),
            shards: Shards::whole(&self.layout),
            userfaultfds: self.userfaultfd.iter().map(copy).collect(),
            memory: Some(self.memory.try_clone().unwrap()),
            notify: Some(notify),
        };
        let peer = Peer { pid: None, process: None, socket: None };
        let policy = Policy { fault_around: FaultAround::Window(4 * PAGE as u64), ..Policy::default() };
        Session::new(1, hello, peer, Arc::new(Numbered), policy, Arc::new(Deaf)).unwrap()
    }
}

/// How a pager dies at a call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Dies {
    Before,
    /// With half of the pages done, or a page half written.
    Within,
    After,
}

/// What a death looks like from outside.
struct Died;

/// After so many calls of an install.
type Fate = (u32, Dies);

/// An install at a call of which its pager dies; the guest acts before and after each.
struct Mortal {
    inner: Box<dyn Install>,
    guest: Arc<Mutex<Guest>>,
    fate: Arc<Mutex<Option<Fate>>>,
}

impl Mortal {
    fn act(&self) {
        self.guest.lock().unwrap().act();
    }

    fn call(&self, within: impl FnOnce(), whole: impl FnOnce() -> Outcome) -> Outcome {
        self.act();
        let mut fate = self.fate.lock().unwrap();
        let due = fate.take_if(|(left, _)| *left == 0).map(|(_, dies)| dies);
        if let Some((left, _)) = &mut *fate {
            *left -= 1;
        }
        drop(fate);
        match due {
            Some(Dies::Before) => {}
            Some(Dies::Within) => within(),
            Some(Dies::After) | None => {
                let outcome = whole();
                self.act();
                if due.is_none() {
                    return outcome;
                }
            }
        }
        self.act();
        // Without a word: it is no failure.
        resume_unwind(Box::new(Died))
    }
}

fn half(pages: &Range<u32>) -> Range<u32> {
    pages.start..pages.start + (pages.end - pages.start) / 2
}

impl Install for Mortal {
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        let torn = || {
            let at = layout.place(first).offset + PAGE as u64 / 2;
            rustix::io::pwrite(&self.guest.lock().unwrap().memory, &[0xaa; PAGE / 2], at).unwrap();
        };
        self.call(torn, || self.inner.fill(layout, first, contents))
    }

    fn fill_window(&self, _: &Layout, _: u32, _: Window<'_>) -> Outcome {
        unreachable!("the source has no windows")
    }

    fn fill_exposes(&self) -> bool {
        self.inner.fill_exposes()
    }

    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let some = half(&pages);
        let within = || {
            if !some.is_empty() {
                self.inner.zero(layout, some);
            }
        };
        self.call(within, || self.inner.zero(layout, pages))
    }

    fn blank(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.call(|| (), || self.inner.blank(layout, pages))
    }

    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let some = half(&pages);
        let within = || {
            if !some.is_empty() {
                self.inner.expose(layout, some);
            }
        };
        self.call(within, || self.inner.expose(layout, pages))
    }

    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome {
        self.inner.unprotect(layout, page)
    }

    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.inner.poison(layout, pages)
    }

    fn detach(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.inner.detach(layout, pages)
    }

    fn has_memory(&self) -> bool {
        self.inner.has_memory()
    }

    fn knows_memory(&self) -> bool {
        self.inner.knows_memory()
    }

    fn is_changing(&self) -> bool {
        self.inner.is_changing()
    }
}

/// Pagers that serve one guest, one after another, each of which dies when its fate has come.
struct Line {
    guest: Arc<Mutex<Guest>>,
    fates: VecDeque<Fate>,
    fate: Arc<Mutex<Option<Fate>>>,
    now: Arc<Session>,
    scratch: Scratch,
}

impl Line {
    fn new(guest: Guest, fates: &[Fate]) -> Self {
        let guest = Arc::new(Mutex::new(guest));
        let mut fates = VecDeque::from(fates.to_vec());
        let fate = Arc::new(Mutex::new(fates.pop_front()));
        let now = Self::next(&guest, &fate);
        Self { guest, fates, fate, now, scratch: Scratch::new() }
    }

    fn next(guest: &Arc<Mutex<Guest>>, fate: &Arc<Mutex<Option<Fate>>>) -> Arc<Session> {
        let session = guest.lock().unwrap().attached();
        let mut gate = session.shards[0].gate.enter();
        let mut core = gate.take().unwrap();
        let (guest, fate) = (Arc::clone(guest), Arc::clone(fate));
        core.install = Box::new(Mortal { inner: core.install, guest, fate });
        *gate = Some(core);
        drop(gate);
        session
    }

    /// What `work` returns, or nothing where the pager has died meanwhile; then the next one has begun.
    fn with<R>(&mut self, work: impl FnOnce(&Arc<Session>, &mut Scratch) -> R) -> Option<R> {
        match catch_unwind(AssertUnwindSafe(|| work(&self.now, &mut self.scratch))) {
            Ok(done) => Some(done),
            Err(why) if why.is::<Died>() => {
                // Its lock goes, as with the process. It is told nothing else.
                self.now.take_down(0, |_| ());
                *self.fate.lock().unwrap() = self.fates.pop_front();
                (self.now, self.scratch) = (Self::next(&self.guest, &self.fate), Scratch::new());
                None
            }
            Err(failure) => resume_unwind(failure),
        }
    }

    fn ask(&mut self, deed: Deed) {
        self.guest.lock().unwrap().post(deed);
        for _ in 0..100 {
            self.with(|session, scratch| session.serve(0, scratch));
            let mut guest = self.guest.lock().unwrap();
            guest.act();
            if guest.posted.is_none() {
                return;
            }
        }
        panic!("it waits for ever: {:?}", self.guest.lock().unwrap().posted);
    }

    fn populate(&mut self) {
        let mut left = 0..PAGES;
        loop {
            match self.with(|session, scratch| session.populate(&mut left, scratch)) {
                Some(Sliced::Done) => return,
                Some(Sliced::More) => {}
                None => left = 0..PAGES,
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A VM's life under pagers with these fates. Whether all of them have come.
fn life(guest: Guest, fates: &[Fate]) -> bool {
    let mut line = Line::new(guest, fates);
    line.ask(Deed::Touch(0));
    line.ask(Deed::Touch(9));
    line.ask(Deed::Discard(4..7));
    line.ask(Deed::Touch(4));
    line.ask(Deed::Touch(13));
    line.ask(Deed::Discard(13..18));
    line.ask(Deed::Touch(14));
    line.populate();
    for page in 0..PAGES {
        line.ask(Deed::Touch(page));
    }
    let guest = line.guest.lock().unwrap();
    assert!(guest.holds.iter().all(|page| page.written), "all of it can be seen at last");
    let (session, states) = (&line.now, line.now.pages().count());
    assert_eq!((session.owed(), session.pages().lacking()), (0, 0));
    assert_eq!(states[PageState::Failed as usize], 0);
    line.fates.is_empty() && line.fate.lock().unwrap().is_none()
}

#[test]
fn wherever_a_pager_dies_the_next_one_overwrites_nothing_that_the_guest_has_seen() {
    let mut lives = 0;
    for sees in [Sees::Told, Sees::ByBits, Sees::ByUserfaultfd, Sees::ByBoth] {
        for dies in [Dies::Before, Dies::Within, Dies::After] {
            for calls in 0.. {
                let Some(guest) = Guest::new(sees) else { break };
                lives += 1;
                if !life(guest, &[(calls, dies)]) {
                    assert!(calls > 20, "{sees:?}: {calls} calls are the whole of it");
                    break;
                }
            }
        }
    }
    println!("{lives} lives");
}

#[test]
fn pagers_that_die_one_after_another_bring_a_vm_to_its_end_all_the_same() {
    for sees in [Sees::ByBits, Sees::ByUserfaultfd] {
        for every in 1..12 {
            let Some(guest) = Guest::new(sees) else { break };
            let fates = [Dies::Within, Dies::After, Dies::Before].map(|dies| (every, dies)).repeat(4);
            life(guest, &fates);
        }
    }
}

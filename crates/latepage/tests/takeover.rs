//! Pagers that are killed in the middle of their work, and the next ones at the same channel, which know what is there: threads that
//! write to their pages and discard them stand for vCPUs. And a VMM that scribbles over its page table.

mod vmm;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use latepage::attachment::Backing;
use latepage::attachment::native::{self, BesideChannel};
use latepage::delivery::channel::{Channel, Completion, Request, Seat, Waited};
use latepage::install::PageBitmap;
use latepage::memory::{Layout, PageSize, PageTable, Region};
use latepage::pager::{Config, Pager};
use latepage::session::{FaultAround, Policy};
use latepage::source::{Answer, Source, SourceError};
use latepage::sys::mapping::Mapping;
use latepage::sys::memfd;
use rustix::process::{Signal, getpid, kill_process};

use vmm::guest::say;
use vmm::serving::{Directory, Serving, exists, policy, populating};
use vmm::snapshot::{Snapshot, word};
use vmm::{PAGE, start};

const SOCKET: &str = "LATEPAGE_TEST_PAGER";
const REQUESTS: &str = "LATEPAGE_TEST_REQUESTS";
const POPULATES: &str = "LATEPAGE_TEST_POPULATES";
const PAGES: usize = 4096;
const VCPUS: u32 = 8;

/// A snapshot of which every eighth page has to be waited for, that kills its process when it has been asked so often.
struct Deadly {
    snapshot: Snapshot,
    left: AtomicU64,
}

impl Deadly {
    fn asked(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            // As any SIGKILL: no thread of it does anything more.
            kill_process(getpid(), Signal::KILL).unwrap();
        }
    }
}

impl Source for Deadly {
    fn describe(&self) -> String {
        "deadly".to_owned()
    }

    fn size(&self) -> u64 {
        self.snapshot.size()
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.asked();
        self.snapshot.ask(offset, length, unit, scratch)
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.asked();
        self.snapshot.wait(offset, length, unit, scratch)
    }
}

fn snapshot() -> Snapshot {
    let snapshot = Snapshot::new((PAGES * PAGE) as u64).cold((0..PAGES as u64).step_by(8));
    // Whoever waits for a page gets it, on another thread.
    snapshot.thaw.open();
    snapshot
}

/// The pager's process: does nothing unless this process was started as one. It serves until it is killed.
#[test]
fn pager_process() {
    let Some(path) = std::env::var_os(SOCKET) else { return };
    let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let source = Deadly { snapshot: snapshot(), left: AtomicU64::new(number(REQUESTS)) };
    let policy = Policy {
        fault_around: FaultAround::Window(4 * PAGE as u64),
        ..if number(POPULATES) == 1 { populating() } else { policy() }
    };
    let pager = Pager::start(Config { workers: Some(1), ..Config::default() }).unwrap();
    pager.listen(Path::new(&path), Arc::new(source), policy).unwrap();
    // The parent's end of it is closed when the parent is gone.
    let _ = std::io::stdin().read_line(&mut String::new());
    std::process::exit(0);
}

/// A pager in a process of its own.
struct PagerProcess {
    child: Child,
    socket: PathBuf,
    _directory: Directory,
}

impl PagerProcess {
    fn start(requests: u64, populates: bool) -> Self {
        let directory = Directory::new();
        let socket = directory.file("s");
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pager_process", "--test-threads=1"])
            .env(SOCKET, &socket)
            .env(REQUESTS, requests.to_string())
            .env(POPULATES, u8::from(populates).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        vmm::until("a pager's socket", || exists(&socket) && UnixStream::connect(&socket).is_ok());
        Self { child, socket, _directory: directory }
    }

    fn is_dead(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for PagerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A VM whose memory traps by a bit for each page, and that keeps its page table.
struct Vm {
    view: Mapping,
    memory: OwnedFd,
    layout: Layout,
    channel: Channel,
    bits: PageBitmap,
    bitmap: OwnedFd,
    table: OwnedFd,
    answered: AtomicU64,
}

impl Vm {
    fn new() -> Arc<Self> {
        let length = PAGES * PAGE;
        let memory = memfd::create("guest", length as u64).unwrap();
        let view = Mapping::shared(memory.as_fd(), 0, length).unwrap();
        let (hva, size) = (view.address(), length as u64);
        let region = Region { gpa: Some(0), hva, size, offset: 0, page_size: PageSize::Small };
        let layout = Layout::new(vec![region]).unwrap();
        let bitmap = PageBitmap::create(&layout).unwrap();
        let bits = PageBitmap::map(&bitmap, &layout).unwrap();
        bits.set(0..PAGES as u32);
        let table = PageTable::create(&layout).unwrap();
        let channel = Channel::new(VCPUS, PAGES as u32).unwrap();
        let answered = AtomicU64::new(0);
        Arc::new(Self { view, memory, layout, channel, bits, bitmap, table, answered })
    }

    fn connect(&self, socket: &Path, name: &str) -> UnixStream {
        let introduction = native::Introduction {
            name: Some(name),
            vcpus: VCPUS,
            backing: Backing::Shared,
            memory: true,
            layout: &self.layout,
        };
        let beside = BesideChannel { bitmap: true, pages: true, userfaultfd: false };
        let message = native::message_with_channel(&introduction, beside);
        let (channel, bell) = self.channel.descriptors();
        let sent = [channel, bell, self.memory.as_fd(), self.bitmap.as_fd(), self.table.as_fd()];
        say(socket, message.as_bytes(), &sent)
    }

    fn ask(&self, seat: &mut Seat, request: &Request) {
        seat.post(request).unwrap();
        match seat.wait(50, Some(vmm::BOUND)) {
            Waited::Over(Completion::Done(pages)) => assert!(pages.contains(&request.pages().start)),
            other => panic!("{request:?}: {other:?}"),
        }
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// Until an access would go through.
    fn trap(&self, seat: &mut Seat, page: usize) {
        while self.bits.is_set(page as u32) {
            self.ask(seat, &Request::Fault { page: page as u32, write: false, thread: 0 });
        }
    }

    /// The first word of a page, and its last.
    fn words(&self, page: usize) -> [u64; 2] {
        [page * PAGE, (page + 1) * PAGE - 8].map(|at| self.view.load(at))
    }
}

/// What the snapshot holds there.
fn original(page: usize) -> [u64; 2] {
    [page * PAGE, (page + 1) * PAGE - 8].map(|at| word(at as u64, 0))
}

/// What a vCPU writes to a page.
fn written(page: usize, number: u64) -> u64 {
    0xface << 48 | (page as u64) << 32 | number
}

/// One that reads all pages, and writes to and discards its own. What those hold at the end.
fn vcpu(vm: &Vm, slot: u32, over: &AtomicBool) -> Vec<(usize, [u64; 2])> {
    let mut seat = vm.channel.seat(slot).unwrap();
    let own = |page: usize| page as u32 % VCPUS == slot;
    let mut holds: Vec<[u64; 2]> = (0..PAGES).map(original).collect();
    let (mut random, mut writes) = (u64::from(slot) + 1, 0);
    let mut turn = |page: usize, dice: u64| {
        vm.trap(&mut seat, page);
        let found = vm.words(page);
        if !own(page) {
            let [first, last] = original(page);
            assert!(
                found[0] == first || found[0] == 0 || found[0] >> 32 == written(page, 0) >> 32,
                "page {page}: {found:x?}"
            );
            assert!(found[1] == last || found[1] == 0, "the end of page {page}: {found:x?}");
            return;
        }
        assert_eq!(found, holds[page], "page {page}, which is this vCPU's own");
        if dice < 8 {
            writes += 1;
            holds[page][0] = written(page, writes);
            vm.view.store(page * PAGE, holds[page][0]);
        } else if dice < 10 {
            vm.ask(&mut seat, &Request::Removed(page as u32..page as u32 + 1));
            vm.view.remove(page * PAGE, PAGE).unwrap();
            holds[page] = [0; 2];
            if dice == 9 {
                vm.bits.set(page as u32..page as u32 + 1);
            }
        }
    };
    while !over.load(Ordering::Relaxed) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        turn((random >> 33) as usize % PAGES, (random >> 20) % 32);
    }
    (0..PAGES).for_each(|page| turn(page, 31));
    (0..PAGES).filter(|page| own(*page)).map(|page| (page, holds[page])).collect()
}

#[test]
fn however_often_its_pager_is_killed_a_guest_finds_what_it_wrote_and_nothing_that_it_discarded() {
    let vm = Vm::new();
    let over = Arc::new(AtomicBool::new(false));
    let vcpus: Vec<_> = (0..VCPUS)
        .map(|slot| {
            let (vm, over) = (Arc::clone(&vm), Arc::clone(&over));
            start(move || vcpu(&vm, slot, &over))
        })
        .collect();
    let (mut by_request, mut by_hand) = (0, 0);
    for round in 0..24_u64 {
        // It dies at a request of its source, in the middle of a page or a run; or from outside, wherever it is after so many answers.
        // All of them together leave pages that nobody has asked for: there is always something to die at.
        let requests = if round % 3 == 2 { u64::MAX } else { 1 + round * 2 };
        let mut pager = PagerProcess::start(requests, round % 6 == 4);
        let _socket = vm.connect(&pager.socket, "vm");
        let enough =
            vm.answered.load(Ordering::Relaxed) + if requests == u64::MAX { 1 + round * 5 } else { 2000 };
        vmm::until("answers, or a death", || {
            pager.is_dead() || vm.answered.load(Ordering::Relaxed) >= enough
        });
        *(if pager.is_dead() { &mut by_request } else { &mut by_hand }) += 1;
        pager.kill();
    }
    let pager = PagerProcess::start(u64::MAX, true);
    let _socket = vm.connect(&pager.socket, "vm");
    over.store(true, Ordering::Relaxed);
    let ends: Vec<_> = vcpus.into_iter().flat_map(vmm::Running::join).collect();
    assert_eq!(ends.len(), PAGES);
    for (page, holds) in ends {
        assert_eq!(vm.words(page), holds, "page {page}");
    }
    println!("{by_request} died at a request, {by_hand} were killed from outside");
    assert!(by_request >= 8 && by_hand >= 8);
}

#[test]
fn a_vmm_that_scribbles_over_its_page_table_harms_itself_alone() {
    let source = Arc::new(snapshot());
    let mut serving = Serving::new(source.clone(), populating());
    let over = Arc::new(AtomicBool::new(false));
    let scribbled = Vm::new();
    let socket = scribbled.connect(&serving.socket, "scribbled");
    let mut busy = Vec::new();
    for slot in 0..4 {
        let (vm, over) = (Arc::clone(&scribbled), Arc::clone(&over));
        // What it is told, and when, is its own affair.
        busy.push(start(move || {
            let (mut seat, mut random) = (vm.channel.seat(slot).unwrap(), u64::from(slot) + 1);
            while !over.load(Ordering::Relaxed) {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let page = (random >> 33) as u32 % PAGES as u32;
                let request = match random >> 20 & 7 {
                    0 => Request::Removed(page..page + 1),
                    _ => Request::Fault { page, write: false, thread: slot },
                };
                seat.post(&request).unwrap();
                let _ = seat.wait(2000, Some(Duration::ZERO));
                seat.abandon();
            }
        }));
    }
    {
        let (vm, over) = (Arc::clone(&scribbled), Arc::clone(&over));
        busy.push(start(move || {
            let (table, mut random) = (Mapping::shared(vm.table.as_fd(), 0, PAGES).unwrap(), 1_u64);
            while !over.load(Ordering::Relaxed) {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // States, most of them, and bytes that are none.
                table.bytes(PAGES)[(random >> 33) as usize % PAGES]
                    .store((random >> 21) as u8 % 9, Ordering::Relaxed);
            }
        }));
    }
    let before = scribbled_faults(&mut serving);
    for name in ["first", "second"] {
        let vm = Vm::new();
        let _socket = vm.connect(&serving.socket, name);
        let readers: Vec<_> = (0..VCPUS)
            .map(|slot| {
                let vm = Arc::clone(&vm);
                start(move || {
                    let mut seat = vm.channel.seat(slot).unwrap();
                    for turn in 0..PAGES {
                        let page = (turn * 7 + slot as usize * 125) % PAGES;
                        vm.trap(&mut seat, page);
                        assert_eq!(vm.words(page), original(page), "page {page}");
                    }
                })
            })
            .collect();
        readers.into_iter().for_each(vmm::Running::join);
    }
    vmm::until("the scribbler was served meanwhile", || scribbled_faults(&mut serving) > before);
    over.store(true, Ordering::Relaxed);
    busy.into_iter().for_each(vmm::Running::join);
    let session = serving.session("scribbled");
    assert!(session.owed() <= PAGES as u64);
    assert_eq!(session.pages().count().iter().sum::<u64>(), PAGES as u64);
    drop(socket);
    assert_eq!(serving.ended("scribbled"), "gone");
}

fn scribbled_faults(serving: &mut Serving) -> u64 {
    serving.session("scribbled").stats().counters.snapshot().faults
}

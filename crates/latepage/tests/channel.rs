//! A channel between processes, whose reader is killed again and again, and whose threads die in the middle.
//!
//! `LATEPAGE_STRESS=60 cargo test --release --test channel` does so with 512 threads for a minute.

mod vmm;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use latepage::delivery::channel::{Channel, Completion, Request, Seat, Waited, attach};
use latepage::sys::mapping::Mapping;
use latepage::sys::{fdpass, memfd};
use rustix::event::{PollFd, PollFlags};

use vmm::serving::Directory;

const CONTROL: &str = "LATEPAGE_TEST_READER";
const PAGES: u32 = 1024;
/// A question and its answer for each slot, 16 bytes.
const CELL: usize = 16;

/// What a reader must say to a question.
fn answer(question: u64) -> u64 {
    question.rotate_left(17) ^ 0x5eed
}

/// The reader's process: does nothing unless this process was started as one. It reads until it is killed.
#[test]
fn reader_process() {
    let Some(path) = std::env::var_os(CONTROL) else { return };
    let socket = UnixStream::connect(path).unwrap();
    let mut descriptors = Vec::new();
    while descriptors.len() < 3 {
        rustix::event::poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
        let mut byte = [0];
        descriptors.extend(fdpass::receive(&socket, &mut byte).unwrap().descriptors);
    }
    let cells = Mapping::shared(descriptors.pop().unwrap().as_fd(), 0, CELL * 4096).unwrap();
    let bell = descriptors.pop().unwrap();
    let memory = descriptors.pop().unwrap();
    let mut reader = attach(memory.as_fd(), bell.try_clone().unwrap(), PAGES, 1).unwrap();
    let mut pages = Vec::new();
    loop {
        let more = reader.take(64, |slot, request| {
            let cell = slot as usize * CELL;
            cells.store(cell + 8, answer(cells.load(cell)));
            pages.push(request.pages().start);
        });
        for page in pages.drain(..) {
            let window = page & !7;
            reader.release(&(window..window + 8));
        }
        if !more {
            rustix::event::poll(&mut [PollFd::new(&bell, PollFlags::IN)], None).unwrap();
            let _ = rustix::io::read(&bell, &mut [0; 8]);
        }
    }
}

struct Readers {
    channel: Arc<Channel>,
    cells: OwnedFd,
    listener: UnixListener,
    directory: Directory,
    now: Option<Child>,
}

impl Readers {
    fn new(channel: &Arc<Channel>, cells: OwnedFd) -> Self {
        let directory = Directory::new();
        let listener = UnixListener::bind(directory.file("r")).unwrap();
        Self { channel: Arc::clone(channel), cells, listener, directory, now: None }
    }

    fn start(&mut self) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "reader_process", "--test-threads=1"])
            .env(CONTROL, self.directory.file("r"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (socket, _) = self.listener.accept().unwrap();
        let (memory, bell) = self.channel.descriptors();
        fdpass::send(&socket, b".", &[memory, bell, self.cells.as_fd()]).unwrap();
        self.now = Some(child);
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.now.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A vCPU: asks, waits, checks the answer, and dies now and then with a question open; the next one takes its seat.
fn vcpu(channel: &Channel, cells: &Mapping, slot: u32, over: &AtomicBool, answered: &AtomicU64) {
    let mut seat: Seat = channel.seat(slot).unwrap();
    let mut random = u64::from(slot) + 1;
    while !over.load(Ordering::Relaxed) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (page, dice) = ((random >> 33) as u32 % PAGES, (random >> 20) % 32);
        let cell = slot as usize * CELL;
        cells.store(cell, random);
        seat.post(&Request::Fault { page, write: false, thread: slot }).unwrap();
        match dice {
            0 => {
                std::mem::forget(seat);
                seat = channel.take_over(slot);
            }
            1 => match seat.wait(0, Some(Duration::ZERO)) {
                Waited::TimedOut => seat.abandon(),
                Waited::Over(Completion::Done(_)) => {}
                other => panic!("{other:?}"),
            },
            _ => match seat.wait(if dice < 8 { 200 } else { 0 }, None) {
                Waited::Over(Completion::Done(pages)) => {
                    assert!(pages.contains(&page) && pages.len() == 8, "{pages:?} for {page}");
                    assert_eq!(
                        cells.load(cell + 8),
                        answer(random),
                        "slot {slot}: another question's answer"
                    );
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                other => panic!("{other:?}"),
            },
        }
    }
}

#[test]
fn no_post_is_lost_however_often_the_reader_is_killed() {
    let seconds = std::env::var("LATEPAGE_STRESS").ok().and_then(|text| text.parse().ok());
    let threads = if seconds.is_some() { 512 } else { 48 };
    let channel = Arc::new(Channel::new(threads, PAGES).unwrap());
    let file = memfd::create("cells", (CELL * 4096) as u64).unwrap();
    let cells = Arc::new(Mapping::shared(file.as_fd(), 0, CELL * 4096).unwrap());
    let (over, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut readers = Readers::new(&channel, file);
    let vcpus: Vec<_> = (0..threads)
        .map(|slot| {
            let (channel, cells) = (Arc::clone(&channel), Arc::clone(&cells));
            let (over, answered) = (Arc::clone(&over), Arc::clone(&answered));
            vmm::start(move || vcpu(&channel, &cells, slot, &over, &answered))
        })
        .collect();
    let (begun, mut kills) = (Instant::now(), 0_u32);
    while seconds.map_or(kills < 8, |seconds| begun.elapsed() < Duration::from_secs(seconds)) {
        readers.start();
        // It dies in the middle of whatever it does after so many answers.
        let enough = answered.load(Ordering::Relaxed) + 1 + u64::from(kills % 7) * 300;
        vmm::until("answers", || answered.load(Ordering::Relaxed) >= enough);
        readers.kill();
        kills += 1;
    }
    readers.start();
    over.store(true, Ordering::Relaxed);
    for vcpu in vcpus {
        vcpu.join();
    }
    println!("{kills} readers killed, {} answers", answered.load(Ordering::Relaxed));
}

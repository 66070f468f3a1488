//! The delivery `notify` with a pager: threads that look at a page's bit before they touch it stand for vCPUs whose access traps.

mod vmm;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use latepage::attachment::Backing;
use latepage::attachment::native::{self, BesideChannel};
use latepage::delivery::channel::{Channel, Completion, Request, Seat, Waited};
use latepage::install::PageBitmap;
use latepage::memory::{Layout, PageSize, Region};
use latepage::sys::mapping::Mapping;
use latepage::sys::memfd;

use vmm::guest::say;
use vmm::serving::{Serving, policy, populating};
use vmm::snapshot::Snapshot;
use vmm::{PAGE, start};

/// A guest whose memory traps by a bit for each page, or by nothing where its VMM exposes pages itself.
struct Guest {
    view: Mapping,
    memory: OwnedFd,
    layout: Layout,
    channel: Channel,
    bitmap: Option<(PageBitmap, OwnedFd)>,
}

impl Guest {
    fn new(pages: usize, slots: u32, by_bitmap: bool) -> Arc<Self> {
        let length = pages * PAGE;
        let memory = memfd::create("guest", length as u64).unwrap();
        let view = Mapping::shared(memory.as_fd(), 0, length).unwrap();
        let (hva, size) = (view.address(), length as u64);
        let layout =
            Layout::new(vec![Region { gpa: Some(0), hva, size, offset: 0, page_size: PageSize::Small }])
                .unwrap();
        let bitmap = by_bitmap.then(|| {
            let file = PageBitmap::create(&layout).unwrap();
            let bitmap = PageBitmap::map(&file, &layout).unwrap();
            bitmap.set(0..pages as u32);
            (bitmap, file)
        });
        let channel = Channel::new(slots, pages as u32).unwrap();
        Arc::new(Self { view, memory, layout, channel, bitmap })
    }

    fn connect(&self, serving: &Serving, name: &str) -> UnixStream {
        let introduction = native::Introduction {
            name: Some(name),
            vcpus: 1,
            backing: Backing::Shared,
            memory: true,
            layout: &self.layout,
        };
        let message = native::message_with_channel(
            &introduction,
            BesideChannel { bitmap: self.bitmap.is_some(), ..BesideChannel::default() },
        );
        let (channel, bell) = self.channel.descriptors();
        let mut sent = vec![channel, bell, self.memory.as_fd()];
        sent.extend(self.bitmap.as_ref().map(|(_, file)| file.as_fd()));
        say(&serving.socket, message.as_bytes(), &sent)
    }

    /// One access of a vCPU: it traps while the page's bit is set.
    fn touch(&self, seat: &mut Seat, page: u32) -> Result<u64, Completion> {
        while self.bitmap.as_ref().is_none_or(|(bits, _)| bits.is_set(page)) {
            seat.post(&Request::Fault { page, write: false, thread: 0 }).unwrap();
            match seat.wait(50, Some(vmm::BOUND)) {
                Waited::Over(Completion::Done(pages)) => assert!(pages.contains(&page)),
                Waited::Over(other) => return Err(other),
                other => panic!("{other:?}"),
            }
            if self.bitmap.is_none() {
                // What was filled is this process's to expose, and here there is nothing to it.
                break;
            }
        }
        Ok(self.view.load(page as usize * PAGE))
    }
}

fn snapshot(pages: usize) -> Snapshot {
    Snapshot::new((pages * PAGE) as u64)
}

#[test]
fn every_vcpu_reads_the_snapshot_and_no_page_is_brought_twice() {
    const PAGES: usize = 2000;
    for by_bitmap in [true, false] {
        let source = Arc::new(snapshot(PAGES));
        let mut serving = Serving::new(source.clone(), policy());
        let guest = Guest::new(PAGES, 16, by_bitmap);
        let socket = guest.connect(&serving, "vm");
        let vcpus: Vec<_> = (0..16)
            .map(|slot| {
                let (guest, source) = (Arc::clone(&guest), Arc::clone(&source));
                start(move || {
                    let mut seat = guest.channel.seat(slot).unwrap();
                    // All of them go through all pages, each from another one on.
                    for turn in 0..PAGES {
                        let page = (turn * 7 + slot as usize * 125) % PAGES;
                        let expected = source.word((page * PAGE) as u64);
                        assert_eq!(guest.touch(&mut seat, page as u32), Ok(expected), "page {page}");
                    }
                })
            })
            .collect();
        vcpus.into_iter().for_each(vmm::Running::join);
        let session = serving.session("vm");
        let brought = session.stats().counters.snapshot().bytes_installed;
        assert_eq!((session.owed(), brought), (0, (PAGES * PAGE) as u64));
        // Full, it is kept: its threads may post still.
        assert!(session.kept_because().unwrap().contains("channel"));
        // There is no userfaultfd that would tell more than the socket does.
        drop(socket);
        assert_eq!(serving.ended("vm"), "gone");
    }
}

#[test]
fn a_thread_that_waits_goes_on_when_its_page_is_populated() {
    let source = Arc::new(snapshot(64).cold(0..64));
    let mut serving = Serving::new(source.clone(), populating());
    let guest = Guest::new(64, 1, true);
    let _socket = guest.connect(&serving, "vm");
    let vcpu = {
        let guest = Arc::clone(&guest);
        start(move || guest.touch(&mut guest.channel.seat(0).unwrap(), 60))
    };
    source.waited_for.wait();
    source.thaw.open();
    assert_eq!(vcpu.join(), Ok(source.word(60 * PAGE as u64)));
    serving.ever("populated", |what| matches!(what, latepage::pager::What::Populated { .. }));
    // It is told when the last page was filled, which is just before it is exposed.
    let (bits, _) = guest.bitmap.as_ref().unwrap();
    vmm::until("no page traps", || (0..64).all(|page| !bits.is_set(page)));
}

#[test]
fn a_page_that_the_vmm_discards_is_zero_and_never_the_snapshot_again() {
    let source = Arc::new(snapshot(64));
    let serving = Serving::new(source.clone(), policy());
    let guest = Guest::new(64, 1, true);
    let _socket = guest.connect(&serving, "vm");
    let mut seat = guest.channel.seat(0).unwrap();
    assert_eq!(guest.touch(&mut seat, 5), Ok(source.word(5 * PAGE as u64)));
    // Told, then discarded: a page that was there, and many that were not.
    seat.post(&Request::Removed(2..40)).unwrap();
    assert_eq!(seat.wait(0, Some(vmm::BOUND)), Waited::Over(Completion::Done(2..40)));
    guest.view.remove(2 * PAGE, 38 * PAGE).unwrap();
    for page in [2, 5, 16, 38] {
        assert_eq!(guest.touch(&mut seat, page), Ok(0), "page {page}");
    }
    guest.view.store(5 * PAGE, 7);
    // A fault that comes late does not take for zero what the guest has written since.
    seat.post(&Request::Removed(5..6)).unwrap();
    assert_eq!(seat.wait(0, Some(vmm::BOUND)), Waited::Over(Completion::Done(5..6)));
    seat.post(&Request::Fault { page: 5, write: false, thread: 0 }).unwrap();
    assert!(matches!(seat.wait(0, Some(vmm::BOUND)), Waited::Over(Completion::Done(_))));
    assert_eq!(guest.view.load(5 * PAGE), 7);
    assert_eq!(guest.touch(&mut seat, 1), Ok(source.word(PAGE as u64)));
}

#[test]
fn who_asks_for_a_page_that_cannot_be_had_is_told_so_and_its_bit_stays() {
    let source = Arc::new(snapshot(64).broken([5]));
    let mut serving = Serving::new(source, policy());
    let guest = Guest::new(64, 1, true);
    let _socket = guest.connect(&serving, "vm");
    let mut seat = guest.channel.seat(0).unwrap();
    for _ in 0..2 {
        assert_eq!(guest.touch(&mut seat, 5), Err(Completion::Failed));
    }
    serving.ever("failed", |what| matches!(what, latepage::pager::What::Failed { page: Some(5), .. }));
    assert!(guest.bitmap.as_ref().unwrap().0.is_set(5));
    seat.post(&Request::Fault { page: 64, write: false, thread: 0 }).unwrap();
    assert_eq!(seat.wait(0, Some(vmm::BOUND)), Waited::Over(Completion::Refused), "there is no such page");
}

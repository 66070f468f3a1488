//! What the channel costs, taken apart: one thread posts, another reads, and each says when it was where.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use latepage::delivery::channel::{Channel, Completion, Request, Waited, attach};
use latepage::install::Install;
use latepage::sys::sched::{Cores, Thread};
use latepage::sys::uffd::Features;
use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};

use super::memory::Memory;
use super::{Crowd, CrowdDelivery, word_at};
use crate::error::VmError;

const PAGE: usize = 4096;

/// How the two sides wait, and where they run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelSteps {
    /// Pages that are asked for, one after the other.
    pub pages: u32,
    /// How often who asked looks at its slot before it sleeps.
    pub owner_spins: u32,
    /// How often the reader looks for posts before it sleeps.
    pub reader_spins: u32,
    /// The cores of the two, owner first; anywhere if none.
    #[serde(default)]
    pub cores: Option<(usize, usize)>,
}

/// Medians in nanoseconds. A step that began before the one ahead of it ended counts as negative: the two sides run at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StepTimes {
    /// The owner writes its question, and rings where the reader sleeps.
    pub post: i64,
    /// From there until the reader has taken it.
    pub notice: i64,
    /// The reader fills the page.
    pub install: i64,
    /// It completes the request, and wakes where the owner sleeps.
    pub release: i64,
    /// From there until the owner goes on.
    pub wake: i64,
    /// It exposes the page (UFFDIO_CONTINUE).
    pub expose: i64,
    /// From the first to the last.
    pub all: i64,
}

impl ChannelSteps {
    /// Measures.
    ///
    /// # Errors
    /// [`VmError`]: it cannot be made.
    pub fn run(&self) -> Result<StepTimes, VmError> {
        let crowd = Crowd {
            delivery: CrowdDelivery::Notify,
            threads: 1,
            pages: self.pages,
            touches: self.pages,
            seed: 0,
            shards: 1,
            socket: None,
            memory_file: None,
            spins: 0,
        };
        let memory = Memory::absent(&crowd, Features::empty())?;
        let install = memory.install()?;
        let config = |error: &dyn std::fmt::Display| VmError::Config(format!("the channel: {error}"));
        let channel = Channel::new(1, self.pages).map_err(|error| config(&error))?;
        let (shared, bell) = channel.descriptors();
        let bell = bell.try_clone_to_owned().map_err(|source| VmError::thread(&source))?;
        let mut reader = attach(shared, bell, self.pages, 1).map_err(|error| config(&error))?;
        let mut seat = channel.seat(0).expect("nobody sits there");

        if let Some((owner, reader)) = self.cores {
            // Before anything waits for a thread that could not go where it should.
            let allowed = Cores::allowed().map_err(|errno| VmError::call("sched_getaffinity", errno))?;
            if !allowed.contains(owner) || !allowed.contains(reader) {
                return Err(VmError::Config(format!(
                    "cores {owner} and {reader}: this process may not run there"
                )));
            }
        }
        let epoch = Instant::now();
        let now = || epoch.elapsed().as_nanos() as i64;
        let over = AtomicBool::new(false);
        let seen: Mutex<Vec<[i64; 3]>> = Mutex::new(Vec::with_capacity(self.pages as usize));
        let serve = || {
            stay_on(self.cores.map(|(_, reader)| reader))?;
            let mut contents = [0u8; PAGE];
            let mut looks = 0;
            while !over.load(Ordering::Acquire) {
                let mut asked = None;
                let more = reader.take(64, |_, request| asked = Some((request, now())));
                let Some((Request::Fault { page, .. }, taken)) = asked else {
                    looks += 1;
                    if !more && looks > self.reader_spins {
                        let bell = reader.shared().bell();
                        let _ = rustix::event::poll(&mut [PollFd::new(&bell, PollFlags::IN)], None);
                        let _ = rustix::io::read(bell, &mut [0u8; 8]);
                        looks = 0;
                    }
                    continue;
                };
                looks = 0;
                contents[..8].copy_from_slice(&word_at(u64::from(page) * (PAGE / 8) as u64).to_ne_bytes());
                install.fill(&memory.layout, page, &contents);
                let filled = now();
                reader.release(&(page..page + 1));
                let released = now();
                seen.lock().expect("nobody panics here").push([taken, filled, released]);
            }
            Ok::<_, VmError>(())
        };
        let asked = thread::scope(|scope| {
            let server =
                thread::Builder::new().spawn_scoped(scope, serve).map_err(|error| VmError::thread(&error))?;
            let ask = || {
                stay_on(self.cores.map(|(owner, _)| owner))?;
                let mut times = Vec::with_capacity(self.pages as usize);
                for page in 0..self.pages {
                    let before = now();
                    let _ = seat.post(&Request::Fault { page, write: false, thread: 0 });
                    let posted = now();
                    match seat.wait(self.owner_spins, None) {
                        Waited::Over(Completion::Done(_)) => {}
                        other => return Err(VmError::Config(format!("the channel: {other:?}"))),
                    }
                    let awake = now();
                    let _ = install.expose(&memory.layout, page..page + 1);
                    times.push([before, posted, awake, now()]);
                }
                Ok(times)
            };
            let times = thread::Builder::new()
                .spawn_scoped(scope, ask)
                .map_err(|error| VmError::thread(&error))
                .and_then(|owner| owner.join().expect("it has no reason to panic"));
            over.store(true, Ordering::Release);
            let _ = rustix::io::write(channel.descriptors().1, &1u64.to_ne_bytes());
            server.join().expect("it has no reason to panic")?;
            times
        })?;
        let seen = seen.into_inner().expect("nobody panics here");
        let each = |step: fn(&[i64; 4], &[i64; 3]) -> i64| {
            let mut all: Vec<i64> = asked.iter().zip(&seen).map(|(asked, seen)| step(asked, seen)).collect();
            all.sort_unstable();
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        Ok(StepTimes {
            post: each(|asked, _| asked[1] - asked[0]),
            notice: each(|asked, seen| seen[0] - asked[1]),
            install: each(|_, seen| seen[1] - seen[0]),
            release: each(|_, seen| seen[2] - seen[1]),
            wake: each(|asked, seen| asked[2] - seen[2]),
            expose: each(|asked, _| asked[3] - asked[2]),
            all: each(|asked, _| asked[3] - asked[0]),
        })
    }
}

fn stay_on(core: Option<usize>) -> Result<(), VmError> {
    let Some(core) = core else { return Ok(()) };
    let cores: Cores = [core].into_iter().collect();
    Thread::this().run_on(&cores).map_err(|errno| VmError::call("sched_setaffinity", errno))
}

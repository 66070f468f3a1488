//! A snapshot whose pages are known by their number, and that can be cold, broken, or badly behaved.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use latepage::source::{Answer, Lane, Source, SourceError};
use rustix::io::Errno;

use super::{Latch, PAGE};

/// What a word of a page holds. Every fifth page is zero in words, every seventh a hole.
pub fn word(offset: u64, salt: u64) -> u64 {
    match offset / PAGE as u64 {
        page if page % 5 == 3 || page % 7 == 4 => 0,
        _ => (offset ^ salt).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
    }
}

/// A source for tests.
pub struct Snapshot {
    size: u64,
    salt: u64,
    /// Small pages that have to be waited for.
    cold: Mutex<BTreeSet<u64>>,
    /// Small pages that cannot be had.
    broken: Mutex<BTreeSet<u64>>,
    /// Whoever waits for a cold page waits for this.
    pub thaw: Latch,
    /// Opens when someone waits for a cold page.
    pub waited_for: Latch,
    /// How often it was asked, in either way.
    pub asked: AtomicU64,
    /// Answers shorter than a page, as no source may.
    pub short: bool,
    /// A small page at which it panics, as no source may either.
    pub panics_at: Option<u64>,
    /// On which of a pager's threads it is waited for.
    pub lane: Lane,
}

impl Snapshot {
    pub fn new(size: u64) -> Self {
        Self {
            size,
            salt: 0,
            cold: Mutex::default(),
            broken: Mutex::default(),
            thaw: Latch::default(),
            waited_for: Latch::default(),
            asked: AtomicU64::new(0),
            short: false,
            panics_at: None,
            lane: Lane::Shared,
        }
    }

    pub fn salted(size: u64, salt: u64) -> Self {
        Self { salt, ..Self::new(size) }
    }

    pub fn lying(self) -> Self {
        Self { short: true, ..self }
    }

    pub fn panicking(self, page: u64) -> Self {
        Self { panics_at: Some(page), ..self }
    }

    pub fn with_lane(self, readers: usize, populators: usize) -> Self {
        Self { lane: Lane::Own { readers, populators }, ..self }
    }

    pub fn cold(self, pages: impl IntoIterator<Item = u64>) -> Self {
        self.cold.lock().unwrap().extend(pages);
        self
    }

    pub fn broken(self, pages: impl IntoIterator<Item = u64>) -> Self {
        self.broken.lock().unwrap().extend(pages);
        self
    }

    /// What the snapshot holds at `offset`.
    pub fn word(&self, offset: u64) -> u64 {
        word(offset, self.salt)
    }

    /// How many of the small pages from `first` on, at most `pages`, are not in `set`.
    fn run(set: &Mutex<BTreeSet<u64>>, first: u64, pages: u64) -> u64 {
        set.lock().unwrap().range(first..first + pages).next().map_or(pages, |page| page - first)
    }

    fn contents<'a>(&self, offset: u64, length: usize, scratch: &'a mut [u8]) -> Answer<'a> {
        if (offset / PAGE as u64) % 7 == 4 && length == PAGE {
            return Answer::Zero(length as u64);
        }
        for (at, bytes) in scratch[..length].chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(offset + at as u64 * 8, self.salt).to_le_bytes());
        }
        Answer::Bytes(&scratch[..length])
    }

    fn answer<'a>(
        &self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
        may_wait: bool,
    ) -> Result<Answer<'a>, SourceError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.short {
            return Ok(Answer::Bytes(&scratch[..unit / 2]));
        }
        let (first, pages, per_unit) = (offset / PAGE as u64, (length / PAGE) as u64, (unit / PAGE) as u64);
        let whole = |pages: u64| pages / per_unit * per_unit;
        assert!(self.panics_at != Some(first), "page {first} makes it panic");
        let sound = whole(Self::run(&self.broken, first, pages));
        if sound == 0 {
            return Err(SourceError::Read { path: PathBuf::from("snapshot"), offset, errno: Errno::IO });
        }
        let warm = whole(Self::run(&self.cold, first, sound));
        let pages = match (warm, may_wait) {
            (0, false) => return Ok(Answer::Later),
            (0, true) => {
                self.waited_for.open();
                self.thaw.wait();
                sound
            }
            (warm, _) => warm,
        };
        Ok(self.contents(offset, pages as usize * PAGE, scratch))
    }
}

impl Source for Snapshot {
    fn describe(&self) -> String {
        "snapshot".to_owned()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.answer(offset, length, unit, scratch, false)
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.answer(offset, length, unit, scratch, true)
    }

    fn lane(&self) -> Lane {
        self.lane
    }

    fn close(&self) {
        self.thaw.open();
    }
}

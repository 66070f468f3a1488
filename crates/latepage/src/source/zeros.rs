//! Which pages of a file's data are zero: what is known of it, and the zero map that keeps it from one pager to the next.
//!
//! A zero map that is wrong would be a guest with wrong memory. So one is only used, and only made, while a read lease keeps the
//! file as it is; it names the file by all that changes when somebody writes it; and it is believed only if every byte of it is as
//! it was written, by this user. docs/scan.md has the format.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::memory::Bitmap;

use super::opened::Identity;

const MAGIC: [u8; 8] = *b"lpzeros\n";
const VERSION: u64 = 1;
/// Words before the bits: magic, version, and the file's identity.
const HEADER: usize = 2 + Identity::WORDS;
/// How old a file's last change must be before what is learnt of it is kept: within one tick of its clock a file system gives two changes one
/// time, and some have a tick of two seconds.
const SETTLED: i64 = 3;

/// What is known of a file's pages of 4 KiB.
#[derive(Debug)]
pub(super) struct Zeros {
    /// Pages of which it is known whether they are zero.
    pub(super) known: Bitmap,
    /// Those that are.
    pub(super) zero: Bitmap,
    /// How many were known when this was kept last.
    kept: AtomicU64,
}

/// Why a zero map was not believed, or could not be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum MapError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it belongs to user {0}")]
    Owner(u32),
    #[error("others may write it (mode {0:o})")]
    Mode(u32),
    #[error("{0}")]
    Content(&'static str),
}

impl Zeros {
    pub(super) fn new(pages: usize) -> Self {
        Self { known: Bitmap::new(pages), zero: Bitmap::new(pages), kept: AtomicU64::new(0) }
    }

    /// Learns what a zero map says of this very file. Whether there was one: another file's is none.
    ///
    /// # Errors
    /// Why there is one that must not be believed.
    pub(super) fn load(&self, place: &Path, of: &Identity) -> Result<bool, MapError> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(place) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(MapError::Content("it is no regular file"));
        }
        if about.uid() != rustix::process::geteuid().as_raw() {
            return Err(MapError::Owner(about.uid()));
        }
        if about.mode() & 0o022 != 0 {
            return Err(MapError::Mode(about.mode() & 0o7777));
        }
        let bits = self.known.words();
        let length = (HEADER + 2 * bits + 1) * 8;
        let mut bytes = Vec::new();
        file.take(length as u64 + 1).read_to_end(&mut bytes)?;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight"))).collect();
        if bytes.len() < HEADER * 8 || bytes[..8] != MAGIC {
            return Err(MapError::Content("it is no zero map"));
        }
        if words[1] != VERSION {
            return Err(MapError::Content("it is of another version"));
        }
        if words[2..HEADER] != of.words() {
            return Ok(false);
        }
        if bytes.len() != length {
            return Err(MapError::Content("it is cut short, or too long"));
        }
        let (body, sum) = words.split_at(words.len() - 1);
        if checksum(body) != sum[0] {
            return Err(MapError::Content("its checksum differs"));
        }
        let (known, zero) = body[HEADER..].split_at(bits);
        let spare = known.last().is_some_and(|last| last & !self.known.last_word() != 0);
        if spare || known.iter().zip(zero).any(|(known, zero)| zero & !known != 0) {
            return Err(MapError::Content("it contradicts itself"));
        }
        self.zero.merge(zero);
        self.known.merge(known);
        self.kept.store(self.known.count(), Ordering::Relaxed);
        Ok(true)
    }

    /// Whether there is more to keep than was kept last.
    pub(super) fn has_news(&self) -> bool {
        self.known.count() > self.kept.load(Ordering::Relaxed)
    }

    /// Keeps what is known of a file whose identity has not changed since that was learnt. The place changes at once or not at all.
    ///
    /// # Errors
    /// Why it could not be kept.
    pub(super) fn save(&self, place: &Path, of: &Identity, now: SystemTime) -> Result<(), MapError> {
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
        if !of.is_older_than(now - SETTLED) {
            return Err(MapError::Content(
                "the memory file was changed just now; scan it again in a few seconds",
            ));
        }
        // What is known is looked at first: of such a page it has been stored before whether it is zero.
        let known = self.known.to_words();
        let mut words = Vec::from([u64::from_le_bytes(MAGIC), VERSION]);
        words.extend(of.words());
        words.extend(&known);
        words.extend(self.zero.to_words().iter().zip(&known).map(|(zero, known)| zero & known));
        words.push(checksum(&words));
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();

        let folder = place.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let beside = beside(place);
        let written = write(&beside, &bytes).and_then(|()| fs::rename(&beside, place));
        if written.is_err() {
            let _ = fs::remove_file(&beside);
        }
        written?;
        self.kept.store(known.iter().map(|word| u64::from(word.count_ones())).sum(), Ordering::Relaxed);
        Ok(())
    }
}

/// A name that no other writer uses.
fn beside(place: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    place.with_extension(format!("{}-{number}.new", std::process::id()))
}

fn write(place: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(place)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// FNV-1a of 64 bits, by words: it finds what a disk or an editor does to a file, and is no seal against whoever may write it.
fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    })
}

//! A snapshot: the memory file and the state file. Either is there whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

use crate::error::VmError;
use crate::expectation::SavedExpectations;
use crate::fingerprint::PAGE;
use crate::guest::registers::Registers;
use crate::job::Job;
use crate::layout::Region;
use crate::memory::{Backing, GuestMemory};
use crate::system_registers::SystemRegisters;

/// What the first key of a state file says.
const FORMAT: &str = "latepage-vm-state";
/// The version that is written, and the only one that is read.
const VERSION: u64 = 1;
/// The longest state file that is read: a list of the most pages, one by one, takes a few MiB.
const STATE_LIMIT: u64 = 256 << 20;
/// Bytes of memory copied at a time.
const CHUNK: u64 = 2 << 20;

/// The state file, as JSON. `docs/vm.md` describes each key.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedState {
    format: String,
    version: u64,
    pub(crate) name: String,
    pub(crate) guest: String,
    pub(crate) programs: u64,
    pub(crate) backing: Backing,
    pub(crate) regions: Vec<Region>,
    pub(crate) vcpus: Vec<SavedVcpu>,
    /// (page of the system area, digest) for each that is not zero.
    pub(crate) system: Vec<(u64, u64)>,
    pub(crate) pages: SavedExpectations,
    pub(crate) job: Option<SavedJob>,
}

/// One vCPU.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedVcpu {
    pub(crate) registers: Registers,
    pub(crate) system: SystemRegisters,
    pub(crate) unfinished: bool,
}

/// A job in the middle.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedJob {
    pub(crate) job: Job,
    pub(crate) wrong_pages: u64,
    pub(crate) wrong: Vec<u64>,
    pub(crate) superseded: u64,
    pub(crate) discarded: Vec<(u64, u64)>,
}

impl SavedState {
    #[expect(
        clippy::too_many_arguments,
        reason = "one for each key of the file; a builder would only name them twice"
    )]
    pub(crate) fn new(
        name: String,
        guest: String,
        programs: u64,
        backing: Backing,
        regions: Vec<Region>,
        vcpus: Vec<SavedVcpu>,
        system: Vec<(u64, u64)>,
        pages: SavedExpectations,
        job: Option<SavedJob>,
    ) -> Self {
        let (format, version) = (FORMAT.to_owned(), VERSION);
        Self { format, version, name, guest, programs, backing, regions, vcpus, system, pages, job }
    }

    /// Reads a state file, and refuses what is none or of another version.
    pub(crate) fn read(path: &Path) -> Result<Self, VmError> {
        let refused = |why: String| VmError::State { path: path.to_path_buf(), why };
        let size = fs::metadata(path).map_err(VmError::file(path))?.len();
        if size > STATE_LIMIT {
            return Err(refused(format!("it has {size} bytes; no state file has that many")));
        }
        let text = fs::read(path).map_err(VmError::file(path))?;
        let value: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| refused(format!("it is no state file: {error}")))?;
        if value.get("format").and_then(|format| format.as_str()) != Some(FORMAT) {
            return Err(refused("it is no state file of latepage's VMM".into()));
        }
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(VERSION) => {}
            Some(other) => {
                return Err(refused(format!("its version is {other}, and this latepage reads {VERSION}")));
            }
            None => return Err(refused("it has no version".into())),
        }
        serde_json::from_value(value).map_err(|error| refused(error.to_string()))
    }

    /// Writes it, whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> Result<(), VmError> {
        let text = serde_json::to_vec(self).map_err(|error| VmError::file(path)(error.into()))?;
        let mut file = NewFile::create(path)?;
        file.file.write_all(&text).map_err(VmError::file(path))?;
        file.commit()
    }
}

/// A file that appears under its name only when it is complete and on the disk.
#[derive(Debug)]
struct NewFile {
    file: File,
    path: PathBuf,
    temporary: PathBuf,
    kept: bool,
}

impl NewFile {
    fn create(path: &Path) -> Result<Self, VmError> {
        let Some(name) = path.file_name() else {
            return Err(VmError::file(path)(io::Error::new(
                io::ErrorKind::InvalidInput,
                "this names no file",
            )));
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(VmError::file(path))?;
        Ok(Self { file, path: path.to_path_buf(), temporary, kept: false })
    }

    fn commit(mut self) -> Result<(), VmError> {
        self.file.sync_all().map_err(VmError::file(&self.path))?;
        fs::rename(&self.temporary, &self.path).map_err(VmError::file(&self.path))?;
        self.kept = true;
        let directory =
            self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(VmError::file(&self.path))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes guest memory, as the guest sees it, to a sparse file: pages of zeros become holes. Returns the bytes written.
///
/// `go_on` is asked every 2 MiB, and may end it: then nothing is left of the file.
pub(crate) fn write_memory(
    memory: &GuestMemory,
    path: &Path,
    go_on: impl Fn() -> Result<(), VmError>,
) -> Result<u64, VmError> {
    let new = NewFile::create(path)?;
    let bytes = memory.layout().bytes();
    new.file.set_len(bytes).map_err(VmError::file(path))?;
    let mut buffer = vec![0; CHUNK as usize];
    let mut written = 0;
    for chunk in (0..bytes).step_by(CHUNK as usize) {
        go_on()?;
        memory.read(chunk, &mut buffer);
        let mut at = chunk;
        for run in
            buffer.as_chunks::<{ PAGE as usize }>().0.chunk_by(|one, next| is_zero(one) == is_zero(next))
        {
            let run_bytes = run.as_flattened();
            if !is_zero(&run[0]) {
                new.file.write_all_at(run_bytes, at).map_err(VmError::file(path))?;
                written += run_bytes.len() as u64;
            }
            at += run_bytes.len() as u64;
        }
    }
    new.commit()?;
    Ok(written)
}

fn is_zero(page: &[u8; PAGE as usize]) -> bool {
    page.as_chunks::<8>().0.iter().all(|word| u64::from_ne_bytes(*word) == 0)
}

/// Opens a memory file that must have `bytes` bytes.
pub(crate) fn open_memory(path: &Path, bytes: u64) -> Result<File, VmError> {
    let file = File::open(path).map_err(VmError::file(path))?;
    let size = file.metadata().map_err(VmError::file(path))?.len();
    if size != bytes {
        return Err(VmError::MemoryFileSize { path: path.to_path_buf(), file: size, vm: bytes });
    }
    Ok(file)
}

/// Copies a memory file into guest memory, holes left out: what is not written there reads as zero already.
pub(crate) fn load_memory(memory: &GuestMemory, file: &File, path: &Path) -> Result<u64, VmError> {
    let bytes = memory.layout().bytes();
    let mut buffer = vec![0; CHUNK as usize];
    let (mut at, mut copied) = (0, 0);
    while at < bytes {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(VmError::file(path)(errno.into())),
        };
        let hole =
            rustix::fs::seek(file, SeekFrom::Hole(at)).map_err(|errno| VmError::file(path)(errno.into()))?;
        while at < hole.min(bytes) {
            let piece = &mut buffer[..(hole.min(bytes) - at).min(CHUNK) as usize];
            file.read_exact_at(piece, at).map_err(VmError::file(path))?;
            memory.install(at, piece);
            at += piece.len() as u64;
            copied += piece.len() as u64;
        }
    }
    Ok(copied)
}

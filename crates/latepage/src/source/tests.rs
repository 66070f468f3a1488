//! A memory file, on the real file system and with real leases.

mod at_hand;
mod zero_maps;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use super::lease::Guard;
use super::{Answer, FileSource, NoLease, Source, SourceError, SourceNotice};
use crate::memory::{Layout, PageSize, Region};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

/// A file name of this test's own, gone when the test is over.
struct Scrap(PathBuf);

impl Scrap {
    fn path() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("latepage-source-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }

    fn file(contents: &[u8]) -> Self {
        let scrap = Self::path();
        fs::write(&scrap.0, contents).unwrap();
        scrap
    }

    /// Pages that each hold their number, from 1.
    fn numbered(pages: u8) -> Self {
        Self::file(&(1..=pages).flat_map(|number| [number; PAGE]).collect::<Vec<u8>>())
    }

    /// The file opened for writing, once that is allowed. The thread ends when it has it.
    fn open_to_write(&self) -> thread::JoinHandle<File> {
        let path = self.0.clone();
        thread::spawn(move || OpenOptions::new().write(true).open(path).unwrap())
    }
}

impl AsRef<Path> for Scrap {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scrap {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0).or_else(|_| fs::remove_dir(&self.0));
    }
}

fn layout(bytes: u64) -> Layout {
    Layout::new(vec![Region { gpa: None, hva: 1 << 40, size: bytes, offset: 0, page_size: PageSize::Small }])
        .unwrap()
}

/// Waits for a notice that `wanted` likes. It comes from a thread that is at work on it.
fn notice(source: &FileSource, wanted: impl Fn(&SourceNotice) -> bool) -> SourceNotice {
    loop {
        if let Some(found) = source.check().into_iter().find(&wanted) {
            return found;
        }
        thread::yield_now();
    }
}

/// With a lease, or nothing: then the reason is printed.
fn with_lease(scrap: &Scrap, allowance: Duration) -> Option<FileSource> {
    let source =
        FileSource::open_with(scrap.0.clone(), |file| Guard::with_allowance(file, allowance), None).unwrap();
    if !source.has_lease() {
        println!("skipped: {:?}", source.check());
        return None;
    }
    Some(source)
}

const LONG: Duration = Duration::from_secs(40);

#[test]
fn every_page_reads_as_the_file_has_it() {
    let scrap = Scrap::numbered(5);
    let source = FileSource::open(&scrap).unwrap();
    assert_eq!(source.size(), 5 * PAGE as u64);
    let mut scratch = [0; 4 * PAGE];
    for page in 0..5 {
        let number = page as u8 + 1;
        let answer = source.wait((page * PAGE) as u64, PAGE, PAGE, &mut scratch).unwrap();
        assert_eq!(answer, Answer::Bytes(&[number; PAGE]));
    }
    let Answer::Bytes(bytes) = source.wait(PAGE as u64, 4 * PAGE, PAGE, &mut scratch).unwrap() else {
        panic!()
    };
    assert_eq!((bytes[0], bytes[bytes.len() - 1]), (2, 1 + (bytes.len() / PAGE) as u8));
}

#[test]
fn what_is_in_the_page_cache_is_answered_at_once() {
    let scrap = Scrap::numbered(3);
    let source = FileSource::open(&scrap).unwrap();
    let mut scratch = [0; 3 * PAGE];
    match source.ask(PAGE as u64, 2 * PAGE, PAGE, &mut scratch).unwrap() {
        Answer::Bytes(bytes) => assert!(bytes.len() % PAGE == 0 && bytes[0] == 2),
        Answer::Later => println!("skipped: the file system of {} cannot say what it has", scrap.0.display()),
        zero => panic!("{zero:?}"),
    }
}

#[test]
fn a_cold_page_is_later_and_never_waited_for() {
    let scrap = Scrap::numbered(64);
    let source = FileSource::open(&scrap).unwrap();
    let file = File::open(&scrap).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut scratch = [0; PAGE];
    match source.ask(32 * PAGE as u64, PAGE, PAGE, &mut scratch).unwrap() {
        Answer::Later => {}
        _ => println!("skipped: the page cache could not be emptied"),
    }
    assert_eq!(source.wait(32 * PAGE as u64, PAGE, PAGE, &mut scratch).unwrap(), Answer::Bytes(&[33; PAGE]));
}

#[test]
fn holes_are_zero_without_being_read_and_end_where_data_begins() {
    let scrap = Scrap::path();
    let file = File::create(&scrap).unwrap();
    file.set_len(16 * PAGE as u64).unwrap();
    file.write_all_at(&[9; PAGE], 8 * PAGE as u64).unwrap();
    drop(file);
    let source = FileSource::open(&scrap).unwrap();
    // Nothing may be written to it.
    let mut scratch = [0xEE; 16 * PAGE];
    assert_eq!(source.ask(0, 16 * PAGE, PAGE, &mut scratch).unwrap(), Answer::Zero(8 * PAGE as u64));
    assert_eq!(
        source.ask(5 * PAGE as u64, 2 * PAGE, PAGE, &mut scratch).unwrap(),
        Answer::Zero(2 * PAGE as u64)
    );
    assert_eq!(
        source.ask(9 * PAGE as u64, 16 * PAGE, PAGE, &mut scratch).unwrap(),
        Answer::Zero(7 * PAGE as u64)
    );
    assert!(scratch.iter().all(|&byte| byte == 0xEE));
    // Data ends where the next hole begins.
    assert_eq!(
        source.wait(8 * PAGE as u64, 4 * PAGE, PAGE, &mut scratch).unwrap(),
        Answer::Bytes(&[9; PAGE])
    );
}

#[test]
fn a_huge_page_of_holes_and_data_is_read_whole() {
    let scrap = Scrap::path();
    let file = File::create(&scrap).unwrap();
    file.set_len(3 * HUGE as u64).unwrap();
    file.write_all_at(&[9; PAGE], (HUGE + 8 * PAGE) as u64).unwrap();
    drop(file);
    let source = FileSource::open(&scrap).unwrap();
    let mut scratch = vec![0xEE; 3 * HUGE];
    assert_eq!(source.wait(0, 3 * HUGE, HUGE, &mut scratch).unwrap(), Answer::Zero(HUGE as u64));
    assert_eq!(source.wait(2 * HUGE as u64, HUGE, HUGE, &mut scratch).unwrap(), Answer::Zero(HUGE as u64));
    let Answer::Bytes(bytes) = source.wait(HUGE as u64, 2 * HUGE, HUGE, &mut scratch).unwrap() else {
        panic!()
    };
    assert_eq!(bytes.len(), HUGE);
    let nines = 8 * PAGE..9 * PAGE;
    assert!(bytes.iter().enumerate().all(|(at, &byte)| byte == if nines.contains(&at) { 9 } else { 0 }));
}

#[test]
fn a_path_that_is_no_memory_file_is_refused_by_name() {
    let missing = Scrap::path();
    let directory = Scrap::path();
    fs::create_dir(&directory).unwrap();
    let empty = Scrap::file(b"");
    let socket = Scrap::path();
    let _listener = UnixListener::bind(&socket).unwrap();
    let refused = |path: &Path| {
        let error = FileSource::open(path).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        error
    };
    assert!(matches!(refused(missing.as_ref()), SourceError::Missing { .. }));
    assert!(matches!(refused(directory.as_ref()), SourceError::NotRegular { kind: "a directory", .. }));
    assert!(matches!(refused(empty.as_ref()), SourceError::Empty { .. }));
    assert!(matches!(refused(socket.as_ref()), SourceError::NotRegular { .. }));
    assert!(matches!(refused(Path::new("/dev/null")), SourceError::NotRegular { .. }));
    assert!(matches!(refused(&empty.0.join("below")), SourceError::Unreadable { .. }));
}

#[test]
fn a_file_without_read_permission_is_refused() {
    let scrap = Scrap::numbered(1);
    fs::set_permissions(&scrap, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    match FileSource::open(&scrap) {
        Err(error) => assert_eq!(
            error,
            SourceError::Unreadable { path: scrap.0.clone(), errno: rustix::io::Errno::ACCESS }
        ),
        Ok(_) => println!("skipped: this user reads every file (CAP_DAC_OVERRIDE)"),
    }
}

#[test]
fn a_vm_of_another_size_is_refused_with_both_sizes() {
    let scrap = Scrap::numbered(4);
    let source = FileSource::open(&scrap).unwrap();
    source.admit(&layout(4 * PAGE as u64)).unwrap();
    for pages in [3, 5] {
        let error = source.admit(&layout(pages * PAGE as u64)).unwrap_err().to_string();
        assert!(error.contains("16384") && error.contains(&(pages as usize * PAGE).to_string()), "{error}");
    }
    assert!(matches!(
        source.wait(4 * PAGE as u64, PAGE, PAGE, &mut [0; PAGE]),
        Err(SourceError::Beyond { .. })
    ));
    assert!(matches!(source.ask(!0xFFF, PAGE, PAGE, &mut [0; PAGE]), Err(SourceError::Beyond { .. })));
}

#[test]
fn a_file_truncated_while_served_fails_there_and_nowhere_else() {
    let scrap = Scrap::numbered(4);
    // Held open for writing, so no lease stands in its way.
    let writer = OpenOptions::new().write(true).open(&scrap).unwrap();
    let source = FileSource::open(&scrap).unwrap();
    assert_eq!(source.check(), [SourceNotice::NoLease { path: scrap.0.clone(), why: NoLease::Writer }]);
    writer.set_len(2 * PAGE as u64 + 100).unwrap();
    let mut scratch = [0; 4 * PAGE];
    for page in [2, 3] {
        let offset = page * PAGE as u64;
        let failed = source.wait(offset, PAGE, PAGE, &mut scratch).unwrap_err();
        assert!(matches!(failed, SourceError::Truncated { size: 16384, .. }), "{failed}");
        assert!(!matches!(
            source.ask(offset, PAGE, PAGE, &mut scratch),
            Ok(Answer::Bytes(_) | Answer::Zero(_))
        ));
    }
    // A longer read that runs over the end still yields the pages before it.
    assert_eq!(source.wait(PAGE as u64, 3 * PAGE, PAGE, &mut scratch).unwrap(), Answer::Bytes(&[2; PAGE]));
    assert!(matches!(source.check()[..], [SourceNotice::Changed { how: "its size differs", .. }]));
    assert!(matches!(source.admit(&layout(4 * PAGE as u64)), Err(SourceError::Changed { .. })));
}

#[test]
fn a_changed_time_of_modification_is_reported_once_where_no_lease_is_granted() {
    let scrap = Scrap::numbered(2);
    let writer = OpenOptions::new().write(true).open(&scrap).unwrap();
    let source = FileSource::open(&scrap).unwrap();
    assert!(!source.has_lease());
    assert!(matches!(source.check()[..], [SourceNotice::NoLease { .. }]));
    assert!(source.check().is_empty());
    writer.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert!(matches!(
        source.check()[..],
        [SourceNotice::Changed { how: "its time of modification differs", .. }]
    ));
    assert!(source.check().is_empty());
    // The VMs that are being served go on.
    assert_eq!(source.wait(0, PAGE, PAGE, &mut [0; PAGE]).unwrap(), Answer::Bytes(&[1; PAGE]));
}

#[test]
fn a_writer_is_held_back_until_every_vm_is_full() {
    let scrap = Scrap::numbered(2);
    let Some(source) = with_lease(&scrap, LONG) else { return };
    source.admit(&layout(2 * PAGE as u64)).unwrap();
    let writer = scrap.open_to_write();
    let breaking = notice(&source, |notice| matches!(notice, SourceNotice::LeaseBreaking { .. }));
    assert!(
        matches!(breaking, SourceNotice::LeaseBreaking { remaining, .. } if remaining > LONG / 2 && remaining <= LONG)
    );
    // Held back, and all is as it was; only a further VM would come too late.
    let mut scratch = [0; PAGE];
    assert_eq!(source.wait(0, PAGE, PAGE, &mut scratch).unwrap(), Answer::Bytes(&[1; PAGE]));
    assert!(matches!(source.admit(&layout(2 * PAGE as u64)), Err(SourceError::OpenedForWriting { .. })));
    assert!(!writer.is_finished());

    source.filled();
    let mut file = writer.join().unwrap();
    // It is in, so nothing is supplied any more: neither data nor, from the map of holes, zero.
    for answer in [source.ask(0, PAGE, PAGE, &mut scratch), source.wait(0, PAGE, PAGE, &mut [0; PAGE])] {
        assert!(matches!(answer, Err(SourceError::OpenedForWriting { .. })), "{answer:?}");
    }
    file.write_all(b"another snapshot").unwrap();
    drop(file);
    notice(&source, |notice| matches!(notice, SourceNotice::Rewritten { .. }));
    assert!(matches!(source.admit(&layout(2 * PAGE as u64)), Err(SourceError::Changed { .. })));
    assert!(source.wait(0, PAGE, PAGE, &mut scratch).is_err());
}

#[test]
fn when_the_time_is_over_reads_fail_before_the_writer_is_in() {
    let scrap = Scrap::numbered(2);
    let Some(source) = with_lease(&scrap, Duration::from_millis(50)) else { return };
    source.admit(&layout(2 * PAGE as u64)).unwrap();
    let file = scrap.open_to_write().join().unwrap();
    let mut scratch = [0; PAGE];
    assert!(matches!(source.ask(0, PAGE, PAGE, &mut scratch), Err(SourceError::OpenedForWriting { .. })));
    notice(&source, |notice| matches!(notice, SourceNotice::LeaseLost { .. }));
    // It goes without having written: all is as before.
    drop(file);
    notice(&source, |notice| matches!(notice, SourceNotice::LeaseRegained { .. }));
    source.admit(&layout(2 * PAGE as u64)).unwrap();
    assert_eq!(source.wait(PAGE as u64, PAGE, PAGE, &mut scratch).unwrap(), Answer::Bytes(&[2; PAGE]));
}

#[test]
fn a_writer_that_does_not_wait_is_refused_and_changes_nothing() {
    let scrap = Scrap::numbered(1);
    let Some(source) = with_lease(&scrap, LONG) else { return };
    source.admit(&layout(PAGE as u64)).unwrap();
    let mut impatient = OpenOptions::new();
    impatient.write(true).custom_flags(libc::O_NONBLOCK);
    for _ in 0..3 {
        let refused = impatient.open(&scrap).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EWOULDBLOCK));
        notice(&source, |notice| matches!(notice, SourceNotice::LeaseRegained { .. }));
        assert_eq!(source.wait(0, PAGE, PAGE, &mut [0; PAGE]).unwrap(), Answer::Bytes(&[1; PAGE]));
        source.admit(&layout(PAGE as u64)).unwrap();
    }
}

#[test]
fn a_truncation_by_path_waits_like_a_writer() {
    let scrap = Scrap::numbered(1);
    let Some(source) = with_lease(&scrap, LONG) else { return };
    source.admit(&layout(PAGE as u64)).unwrap();
    let path = scrap.0.clone();
    let writer = thread::spawn(move || File::create(path).unwrap());
    notice(&source, |notice| matches!(notice, SourceNotice::LeaseBreaking { .. }));
    assert_eq!(source.wait(0, PAGE, PAGE, &mut [0; PAGE]).unwrap(), Answer::Bytes(&[1; PAGE]));
    source.filled();
    drop(writer.join().unwrap());
    notice(&source, |notice| matches!(notice, SourceNotice::Rewritten { how: "its size differs", .. }));
}

#[test]
fn where_nobody_is_served_a_writer_need_not_wait() {
    let scrap = Scrap::numbered(1);
    let Some(source) = with_lease(&scrap, LONG) else { return };
    drop(scrap.open_to_write().join().unwrap());
    notice(&source, |notice| matches!(notice, SourceNotice::LeaseRegained { .. }));
    source.admit(&layout(PAGE as u64)).unwrap();
}

#[test]
fn a_writer_that_puts_the_time_of_modification_back_is_found_out() {
    use std::io::Write;

    let scrap = Scrap::numbered(1);
    let Some(source) = with_lease(&scrap, LONG) else { return };
    let mut file = scrap.open_to_write().join().unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    file.write_all(&[9; 8]).unwrap();
    file.set_modified(before).unwrap();
    drop(file);
    let how = "its time of change (ctime) differs";
    notice(&source, |notice| matches!(notice, SourceNotice::Rewritten { how: found, .. } if *found == how));
    assert!(source.admit(&layout(PAGE as u64)).is_err());
}

#[test]
fn the_lease_and_its_thread_go_with_the_source() {
    let scrap = Scrap::numbered(1);
    let Some(source) = with_lease(&scrap, LONG) else { return };
    source.admit(&layout(PAGE as u64)).unwrap();
    let writer = scrap.open_to_write();
    notice(&source, |notice| matches!(notice, SourceNotice::LeaseBreaking { .. }));
    drop(source);
    writer.join().unwrap();
    // A file that is not leased opens for writing without waiting.
    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&scrap).unwrap();
}

#[test]
fn a_lease_that_nobody_looked_at_for_long_is_looked_at_by_the_reader() {
    let scrap = Scrap::numbered(1);
    // Trusted for no time at all: as if this process had been stopped ever since.
    let Some(source) = with_lease(&scrap, Duration::ZERO) else { return };
    let mut scratch = [0; PAGE];
    assert_eq!(source.ask(0, PAGE, PAGE, &mut scratch).unwrap(), Answer::Later);
    match source.wait(0, PAGE, PAGE, &mut scratch) {
        Ok(answer) => assert_eq!(answer, Answer::Bytes(&[1; PAGE])),
        Err(error) => assert!(matches!(error, SourceError::OpenedForWriting { .. }), "{error}"),
    }
}

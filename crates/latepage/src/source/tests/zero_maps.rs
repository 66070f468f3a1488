//! Zero maps: what is known of a file's zero pages, kept from one opening to the next.

use std::fs::{self, File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::{PAGE, Scrap};
use crate::source::{Answer, FileSource, Source, SourceNotice};
use crate::sys::mapping::Mapping;

/// Of a file: data, zero, zero, data, zero, and behind them a hole of three pages.
const PAGES: [u8; 5] = [1, 0, 0, 4, 0];

/// A memory file, and a folder for its zero map.
struct Mapped {
    memory: Scrap,
    folder: Scrap,
}

impl Mapped {
    /// With a map of all of it; `None` where there is no lease, which is printed.
    fn new() -> Option<Self> {
        let memory = Scrap::file(&PAGES.iter().flat_map(|number| [*number; PAGE]).collect::<Vec<u8>>());
        let file = File::options().write(true).open(&memory).unwrap();
        file.set_len(8 * PAGE as u64).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let mapped = Self { memory, folder: Scrap::path() };
        let source = mapped.open();
        if !source.has_lease() {
            println!("skipped: {:?}", source.check());
            return None;
        }
        let scan = source.scan(|_| true).unwrap();
        assert_eq!((scan.pages, scan.holes, scan.zeros), (8, 3, 3));
        // It was changed just now, so that nothing is kept of it yet.
        assert!(scan.map.unwrap_err().contains("just now"));
        mapped.save(&source);
        drop(source);
        Some(mapped)
    }

    /// Keeps what is known, as if all of this were long ago.
    fn save(&self, source: &FileSource) {
        let later = SystemTime::now() + Duration::from_secs(60);
        let (place, of) = (source.keeping.place.as_ref().unwrap(), source.file.identity().unwrap());
        source.keeping.zeros.save(place, &of, later).unwrap();
    }

    fn open(&self) -> FileSource {
        FileSource::open_keeping(&self.memory, &self.folder.0).unwrap()
    }

    fn map(&self) -> PathBuf {
        fs::read_dir(&self.folder.0).unwrap().next().expect("a map").unwrap().path()
    }

    /// What a source that is opened now has been told by the map, and says of it.
    fn told(&self) -> (u64, Vec<String>) {
        let source = self.open();
        (source.keeping.loaded, source.check().iter().map(ToString::to_string).collect())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder.0);
    }
}

#[test]
fn a_map_names_the_zero_pages_and_nothing_reads_them_any_more() {
    let Some(mapped) = Mapped::new() else { return };
    let file = File::open(&mapped.memory).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let source = mapped.open();
    assert_eq!((source.keeping.loaded, source.check()), (5, vec![]));
    let mut scratch = [0xEE; 8 * PAGE];
    let at = |page: usize| (page * PAGE) as u64;
    assert_eq!(source.ask(at(1), 7 * PAGE, PAGE, &mut scratch), Ok(Answer::Zero(at(2))));
    assert_eq!(source.wait(at(4), 4 * PAGE, PAGE, &mut scratch), Ok(Answer::Zero(at(1))));
    assert!(scratch.iter().all(|byte| *byte == 0xEE));
    assert_eq!(source.wait(at(3), PAGE, PAGE, &mut scratch), Ok(Answer::Bytes(&[4; PAGE])));
    let mode = fs::metadata(mapped.map()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_map_is_not_believed_once_anything_about_the_file_has_changed() {
    type Change = fn(&Mapped);
    let changes: [(&str, Change); 4] = [
        ("written", |mapped| {
            let file = File::options().write(true).open(&mapped.memory).unwrap();
            file.write_all_at(&[7; PAGE], PAGE as u64).unwrap();
        }),
        ("written, and its time of modification set back", |mapped| {
            let before = fs::metadata(&mapped.memory).unwrap().modified().unwrap();
            let file = File::options().write(true).open(&mapped.memory).unwrap();
            file.write_all_at(&[7; PAGE], PAGE as u64).unwrap();
            file.set_modified(before).unwrap();
        }),
        ("longer", |mapped| {
            File::options().write(true).open(&mapped.memory).unwrap().set_len(9 * PAGE as u64).unwrap();
        }),
        ("another one", |mapped| {
            let other = Scrap::path();
            fs::write(&other, vec![7; 8 * PAGE]).unwrap();
            fs::rename(&other, &mapped.memory).unwrap();
        }),
    ];
    for (how, change) in changes {
        let Some(mapped) = Mapped::new() else { return };
        change(&mapped);
        let source = mapped.open();
        assert_eq!((source.keeping.loaded, source.check()), (0, vec![]), "{how}");
        let mut scratch = [0; PAGE];
        let answer = source.wait(PAGE as u64, PAGE, PAGE, &mut scratch).unwrap();
        match how {
            "longer" => assert!(matches!(answer, Answer::Zero(_) | Answer::Bytes(_))),
            _ => assert_eq!(answer, Answer::Bytes(&[7; PAGE]), "{how}"),
        }
    }
}

#[test]
fn a_map_of_which_a_single_byte_differs_is_not_believed_and_that_is_told() {
    let Some(mapped) = Mapped::new() else { return };
    let good = fs::read(mapped.map()).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(mapped.map(), &bad).unwrap();
        let (loaded, told) = mapped.told();
        assert_eq!(loaded, 0, "byte {at}");
        // Words that name the file, it may be another one's.
        assert!(
            told.len() == 1 && told[0].contains("made again") || (16..72).contains(&at),
            "byte {at}: {told:?}"
        );
    }
    for length in [0, 1, 8, 71, good.len() - 8, good.len() - 1] {
        fs::write(mapped.map(), &good[..length]).unwrap();
        let (loaded, told) = mapped.told();
        assert_eq!((loaded, told.len()), (0, 1), "{length} bytes");
    }
    fs::write(mapped.map(), [&good[..], &[0; 8]].concat()).unwrap();
    assert_eq!(mapped.told().0, 0);
    fs::write(mapped.map(), &good).unwrap();
    assert_eq!(mapped.told(), (5, vec![]));
}

#[test]
fn a_map_that_others_may_have_written_is_not_believed() {
    let Some(mapped) = Mapped::new() else { return };
    let map = mapped.map();
    for mode in [0o620, 0o602, 0o666] {
        fs::set_permissions(&map, Permissions::from_mode(mode)).unwrap();
        let (loaded, told) = mapped.told();
        assert!(loaded == 0 && told[0].contains("others may write it"), "{told:?}");
    }
    fs::set_permissions(&map, Permissions::from_mode(0o644)).unwrap();
    assert_eq!(mapped.told(), (5, vec![]));
    // Nor is one by way of a link.
    let elsewhere = mapped.folder.0.join("elsewhere");
    fs::rename(&map, &elsewhere).unwrap();
    symlink(&elsewhere, &map).unwrap();
    let (loaded, told) = mapped.told();
    assert!(loaded == 0 && told.len() == 1, "{told:?}");
    fs::remove_file(&map).unwrap();
    fs::rename(&elsewhere, &map).unwrap();
    if rustix::fs::chown(&map, Some(rustix::fs::Uid::from_raw(65_534)), None).is_err() {
        println!("skipped: only root gives files away");
        return;
    }
    let (loaded, told) = mapped.told();
    assert!(loaded == 0 && told[0].contains("belongs to user 65534"), "{told:?}");
}

#[test]
fn a_map_that_cannot_be_written_is_told_of_once_and_all_else_goes_on() {
    let Some(mapped) = Mapped::new() else { return };
    let _ = fs::remove_dir_all(&mapped.folder.0);
    // Where the folder should be there is a file.
    fs::write(&mapped.folder, b"").unwrap();
    let source = mapped.open();
    assert!(matches!(source.check()[..], [SourceNotice::ZeroMap { .. }]), "it cannot even be looked for");
    assert!(source.scan(|_| true).unwrap().map.is_err());
    assert_eq!(source.wait(0, PAGE, PAGE, &mut [0; PAGE]), Ok(Answer::Bytes(&[1; PAGE])));
    fs::remove_file(&mapped.folder).unwrap();
}

#[test]
fn a_file_that_somebody_may_write_gets_no_map_and_uses_none() {
    let Some(mapped) = Mapped::new() else { return };
    let _writer = File::options().write(true).open(&mapped.memory).unwrap();
    let source = mapped.open();
    assert_eq!(source.keeping.loaded, 0);
    let scan = source.scan(|_| true).unwrap();
    assert_eq!((scan.pages, scan.holes, scan.zeros), (8, 3, 3));
    assert!(scan.map.unwrap_err().contains("lease"));
}

#[test]
fn a_scan_leaves_the_page_cache_as_it_was() {
    let Some(mapped) = Mapped::new() else { return };
    fs::remove_dir_all(&mapped.folder.0).unwrap();
    let file = File::open(&mapped.memory).unwrap();
    if crate::sys::file::lives_in_memory(file.as_fd()) {
        println!("skipped: {} is in memory by its nature", mapped.memory.0.display());
        return;
    }
    let look = Mapping::read_only(file.as_fd(), 8 * PAGE).unwrap();
    let cached = || {
        let mut found = [0; 8];
        look.resident(0..8 * PAGE, &mut found).unwrap().iter().filter(|page| **page & 1 == 1).count()
    };
    let source = mapped.open();
    source.wait_surveyed();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    if cached() > 0 {
        println!("skipped: the page cache could not be emptied");
        return;
    }
    let fresh = FileSource::open(&mapped.memory).unwrap();
    fresh.wait_surveyed();
    assert_eq!(fresh.scan(|_| true).unwrap().zeros, 3);
    assert_eq!(cached(), 0);
}

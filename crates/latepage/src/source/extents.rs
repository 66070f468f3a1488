//! Where a file's data lies, and where its holes: found once, when it is opened.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::sys::file;

/// The most extents that are kept (1 MiB of memory). A file in more pieces has its smallest holes counted as data: they
/// are then read, which costs time and is right all the same.
const MAX_EXTENTS: usize = 1 << 16;

/// What lies at an offset, and how far it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Data up to this offset.
    Data(u64),
    /// A hole up to this offset.
    Hole(u64),
}

/// The data of a file, in order. What lies between is holes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extents {
    /// Start and end, in bytes.
    data: Vec<(u64, u64)>,
    size: u64,
}

impl Extents {
    /// Asks the file system. One that knows no holes has data everywhere.
    pub(super) fn find(fd: BorrowedFd<'_>, size: u64) -> Result<Self, Errno> {
        let mut pieces = Pieces { data: Vec::new(), smallest_hole: 1, max: MAX_EXTENTS };
        let mut at = 0;
        while at < size {
            let start = match file::next_data(fd, at) {
                Ok(Some(start)) if start < size => start,
                Ok(_) => break,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Self { data: vec![(0, size)], size }),
                Err(errno) => return Err(errno),
            };
            let end = file::next_hole(fd, start)?.min(size);
            pieces.push(start, end);
            // A file that changes under us must not keep us here.
            at = end.max(start + 1);
        }
        Ok(Self { data: pieces.data, size })
    }

    /// The first data at `offset` or after it, from there on.
    pub(super) fn data_from(&self, offset: u64) -> Option<Range<u64>> {
        let next = self.data.partition_point(|&(_, end)| end <= offset);
        self.data.get(next).map(|&(start, end)| start.max(offset)..end)
    }

    /// What lies at `offset`, which is below the file's size. O(log extents).
    pub(super) fn at(&self, offset: u64) -> Extent {
        let next = self.data.partition_point(|&(_, end)| end <= offset);
        match self.data.get(next) {
            Some(&(start, end)) if start <= offset => Extent::Data(end),
            Some(&(start, _)) => Extent::Hole(start),
            None => Extent::Hole(self.size),
        }
    }
}

/// Extents as they are found.
struct Pieces {
    data: Vec<(u64, u64)>,
    /// Holes below this size count as data.
    smallest_hole: u64,
    max: usize,
}

impl Pieces {
    fn push(&mut self, start: u64, end: u64) {
        match self.data.last_mut() {
            Some(last) if start - last.1 < self.smallest_hole => last.1 = end,
            _ => self.data.push((start, end)),
        }
        while self.data.len() > self.max {
            self.smallest_hole *= 2;
            let smallest = self.smallest_hole;
            // `dedup_by` hands over the later one first.
            self.data.dedup_by(|next, kept| {
                let joins = next.0 - kept.1 < smallest;
                if joins {
                    kept.1 = next.1;
                }
                joins
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_and_holes_are_told_apart_at_every_offset() {
        let extents = Extents { data: vec![(10, 20), (30, 40)], size: 50 };
        let found: Vec<Extent> =
            [0, 9, 10, 19, 20, 29, 30, 39, 40, 49].map(|offset| extents.at(offset)).to_vec();
        use Extent::{Data, Hole};
        assert_eq!(
            found,
            [
                Hole(10),
                Hole(10),
                Data(20),
                Data(20),
                Hole(30),
                Hole(30),
                Data(40),
                Data(40),
                Hole(50),
                Hole(50)
            ]
        );
    }

    #[test]
    fn a_file_in_too_many_pieces_loses_its_smallest_holes_only() {
        let mut pieces = Pieces { data: Vec::new(), smallest_hole: 1, max: 4 };
        // Holes of 4096 bytes between the pieces, and one of a megabyte.
        let mut at = 0;
        for piece in 0..16 {
            pieces.push(at, at + 4096);
            at += if piece == 7 { 1 << 20 } else { 8192 };
        }
        assert!(pieces.data.len() <= 4);
        let gaps: Vec<u64> = pieces.data.windows(2).map(|pair| pair[1].0 - pair[0].1).collect();
        assert!(gaps.contains(&((1 << 20) - 4096)), "{gaps:?}");
        assert_eq!(pieces.data.first().unwrap().0, 0);
        assert_eq!(pieces.data.last().unwrap().1, at - 8192 + 4096);
    }
}

//! Which descriptors come with a handshake of ours, and in which order.

use super::refusal::{RefusalReason, one_line};
use crate::memory::Shards;

/// How a VM's faults arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By userfaultfd.
    Uffd,
    /// By a channel.
    Notify,
}

impl Way {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Uffd => "uffd",
            Self::Notify => "notify",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        [Self::Uffd, Self::Notify].into_iter().find(|way| way.name() == name)
    }

    /// What must come, and what may.
    const fn wants(self) -> (&'static [usize], &'static [usize], &'static str) {
        match self {
            Self::Uffd => (
                &[USERFAULTFD],
                &[MEMORY],
                "there must be a \"userfaultfd\", or one for each of \"shards\" (64 at most), and no other twice",
            ),
            Self::Notify => (
                &[CHANNEL, EVENTFD, MEMORY],
                &[BITMAP, PAGES, USERFAULTFD],
                "with delivery \"notify\" there must be \"channel\", \"eventfd\" and \"memory\", and no other twice",
            ),
        }
    }
}

pub(super) const USERFAULTFD: usize = 0;
pub(super) const MEMORY: usize = 1;
pub(super) const CHANNEL: usize = 2;
pub(super) const EVENTFD: usize = 3;
pub(super) const BITMAP: usize = 4;
pub(super) const PAGES: usize = 5;

const NAMES: [&str; 6] = ["userfaultfd", "memory", "channel", "eventfd", "bitmap", "pages"];

/// The place of each kind of descriptor among those that come, if it is one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Places {
    kinds: [Option<usize>; NAMES.len()],
    /// The userfaultfds', of which there may be several, in their order.
    userfaultfds: Vec<usize>,
}

impl Places {
    /// A userfaultfd and nothing else.
    pub(super) fn of_one_userfaultfd() -> Self {
        Self { kinds: [Some(0), None, None, None, None, None], userfaultfds: vec![0] }
    }

    /// Reads a list of names.
    pub(super) fn read(way: Way, names: &[String]) -> Result<Self, RefusalReason> {
        let (must, may, rule) = way.wants();
        let wrong = || RefusalReason::DescriptorList { list: one_line(&format!("{names:?}")), rule };
        let (mut kinds, mut userfaultfds) = ([None; NAMES.len()], Vec::new());
        for (place, name) in names.iter().enumerate() {
            let kind = NAMES
                .iter()
                .position(|known| known == name)
                .filter(|kind| must.contains(kind) || may.contains(kind));
            let Some(kind) = kind else {
                let known = match way {
                    Way::Uffd => "\"userfaultfd\" and \"memory\" are",
                    Way::Notify => {
                        "\"channel\", \"eventfd\", \"memory\", \"bitmap\", \"pages\" and \"userfaultfd\" are"
                    }
                };
                let value = one_line(&format!("{name:?}"));
                return Err(RefusalReason::Value { key: "descriptors", value, known });
            };
            let again = kinds[kind].replace(place).is_some();
            if kind == USERFAULTFD {
                userfaultfds.push(place);
            }
            let several = kind == USERFAULTFD && way == Way::Uffd && userfaultfds.len() <= Shards::MOST;
            if again && !several {
                return Err(wrong());
            }
        }
        if must.iter().any(|kind| kinds[*kind].is_none()) {
            return Err(wrong());
        }
        Ok(Self { kinds, userfaultfds })
    }

    /// Where a kind of descriptor is; of a userfaultfd, where one is.
    pub(super) fn of(&self, kind: usize) -> Option<usize> {
        self.kinds[kind]
    }

    /// Where the userfaultfds are, in their order.
    pub(super) fn userfaultfds(&self) -> &[usize] {
        &self.userfaultfds
    }

    /// How many descriptors there are.
    pub(super) fn count(&self) -> usize {
        self.kinds[MEMORY..].iter().flatten().count() + self.userfaultfds.len()
    }

    /// The names of these kinds, as a handshake lists them.
    pub(super) fn names(kinds: &[usize]) -> Vec<String> {
        kinds.iter().map(|kind| NAMES[*kind].to_owned()).collect()
    }
}

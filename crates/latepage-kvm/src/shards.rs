//! How many userfaultfds a VM has over its memory, where a pager brings it: as many as asked for, or as suit its vCPUs.

use std::fs;

use latepage::attachment::{Form, shards};
use latepage::memory::{Layout, Shards};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use crate::error::VmError;

/// How many userfaultfds, each over a shard of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "shards are a number, 1 to 64, or \"auto\"")]
pub enum ShardCount {
    /// So many.
    Count(usize),
    /// As many as suit it.
    Word(Auto),
}

/// The word for as many as suit it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    /// One for each 16 vCPUs.
    Auto,
}

/// What became of what was asked for.
#[derive(Debug)]
pub(crate) struct Divided {
    pub(crate) shards: Shards,
    /// What was done instead of what `auto` stands for, and why.
    pub(crate) note: Option<String>,
}

/// Descriptors that this process may still have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    free: u64,
    allowed: u64,
}

impl Room {
    /// What a VM opens after its userfaultfds, beside its vCPUs: its connections, KVM, and some for whoever else is in the process.
    const OTHERS: u64 = 16;

    /// Room for userfaultfds now, in a VM whose vCPUs take so many descriptors later. Where nobody can tell, there is enough.
    pub(crate) fn now(vcpus: u64) -> Self {
        let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let open = fs::read_dir("/proc/self/fd").map_or(0, |open| open.count() as u64);
        Self { free: allowed.saturating_sub(open + vcpus + Self::OTHERS), allowed }
    }
}

/// Divides a VM's memory among its userfaultfds.
pub(crate) fn divide(
    wanted: Option<ShardCount>,
    form: Form,
    vcpus: u32,
    layout: &Layout,
    room: Room,
) -> Result<Divided, VmError> {
    let one = "Firecracker's handshake has one userfaultfd";
    let (count, note) = match (wanted, form) {
        (None, _) => (1, None),
        (Some(ShardCount::Count(count)), Form::Firecracker) if count != 1 => {
            return Err(VmError::Config(format!("{one}, not {count}; use --handshake latepage")));
        }
        (Some(ShardCount::Count(count)), _) => (count, None),
        (Some(ShardCount::Word(Auto::Auto)), _) => {
            let (wanted, suited) = (vcpus.div_ceil(shards::VCPUS) as usize, shards::suited(vcpus, layout));
            match form {
                Form::Firecracker if wanted > 1 => {
                    (1, Some(format!("{one}: 1 shard, where {vcpus} vCPUs call for {wanted}")))
                }
                _ if room.free < suited as u64 && suited > 1 => {
                    let (most, Room { allowed, .. }) = (room.free.max(1) as usize, room);
                    let note = format!(
                        "{most} shard{} where {vcpus} vCPUs call for {wanted}: {allowed} descriptors are allowed (ulimit -n)",
                        if most == 1 { "" } else { "s" }
                    );
                    (most, Some(note))
                }
                _ if suited < wanted => {
                    let pages = layout.pages();
                    let note =
                        format!("{suited} shards for {pages} pages, where {vcpus} vCPUs call for {wanted}");
                    (suited, Some(note))
                }
                _ => (suited, None),
            }
        }
    };
    let shards = Shards::equal(layout, count).map_err(|error| VmError::Config(error.to_string()))?;
    Ok(Divided { shards, note })
}

#[cfg(test)]
mod tests {
    use super::*;
    use latepage::memory::{PageSize, Region};

    const ENOUGH: Room = Room { free: 1000, allowed: 1024 };
    const AUTO: Option<ShardCount> = Some(ShardCount::Word(Auto::Auto));

    fn layout(pages: u64, page_size: PageSize) -> Layout {
        let region =
            Region { gpa: None, hva: 1 << 40, size: pages * page_size.bytes(), offset: 0, page_size };
        Layout::new(vec![region]).unwrap()
    }

    fn small() -> Layout {
        layout(4096, PageSize::Small)
    }

    fn divided(
        wanted: Option<ShardCount>,
        form: Form,
        vcpus: u32,
        layout: &Layout,
    ) -> (usize, Option<String>) {
        let Divided { shards, note } = divide(wanted, form, vcpus, layout, ENOUGH).unwrap();
        (shards.len(), note)
    }

    #[test]
    fn auto_is_one_for_each_sixteen_vcpus_and_nobody_who_did_not_ask_has_more_than_one() {
        for (vcpus, shards) in [(1, 1), (16, 1), (17, 2), (64, 4)] {
            assert_eq!(divided(AUTO, Form::Latepage, vcpus, &small()), (shards, None));
            assert_eq!(divided(None, Form::Latepage, vcpus, &small()), (1, None));
        }
        assert_eq!(divided(Some(ShardCount::Count(64)), Form::Latepage, 1, &small()), (64, None));
    }

    #[test]
    fn auto_says_what_it_did_instead() {
        let (count, note) = divided(AUTO, Form::Firecracker, 64, &small());
        let says = "Firecracker's handshake has one userfaultfd: 1 shard, where 64 vCPUs call for 4";
        assert_eq!((count, note.as_deref()), (1, Some(says)));
        assert_eq!(divided(AUTO, Form::Firecracker, 2, &small()), (1, None));
        let (count, note) = divided(AUTO, Form::Latepage, 64, &layout(3, PageSize::Huge));
        assert_eq!((count, note.as_deref()), (3, Some("3 shards for 3 pages, where 64 vCPUs call for 4")));
    }

    #[test]
    fn auto_is_no_more_than_there_are_descriptors_for_and_says_so() {
        let divided = |wanted, free, layout: &Layout| {
            let Divided { shards, note } =
                divide(wanted, Form::Latepage, 64, layout, Room { free, allowed: 40 }).unwrap();
            (shards.len(), note.unwrap_or_default())
        };
        let says = "3 shards where 64 vCPUs call for 4: 40 descriptors are allowed (ulimit -n)";
        assert_eq!(divided(AUTO, 3, &small()), (3, says.to_owned()));
        let says = "1 shard where 64 vCPUs call for 4: 40 descriptors are allowed (ulimit -n)";
        assert_eq!(divided(AUTO, 0, &small()), (1, says.to_owned()));
        assert_eq!(divided(AUTO, 4, &small()), (4, String::new()));
        // The tighter of two limits is told.
        let says = "3 shards for 3 pages, where 64 vCPUs call for 4";
        assert_eq!(divided(AUTO, 3, &layout(3, PageSize::Huge)), (3, says.to_owned()));
        // Whoever names a number gets it, or an error.
        assert_eq!(divided(Some(ShardCount::Count(64)), 0, &small()), (64, String::new()));
        assert_eq!(divided(None, 0, &small()), (1, String::new()));
    }

    #[test]
    fn what_cannot_be_is_refused_in_words() {
        let refused = |count, form, layout: &Layout| {
            divide(Some(ShardCount::Count(count)), form, 2, layout, ENOUGH).unwrap_err().to_string()
        };
        let says = "Firecracker's handshake has one userfaultfd, not 2; use --handshake latepage";
        assert_eq!(refused(2, Form::Firecracker, &small()), says);
        assert_eq!(refused(0, Form::Latepage, &small()), "0 shards; a VM has 1 to 64");
        assert_eq!(refused(65, Form::Latepage, &small()), "65 shards; a VM has 1 to 64");
        let says = "9 shards for 8 pages: each has one page at least, so ask for 8 at most";
        assert_eq!(refused(9, Form::Latepage, &layout(8, PageSize::Huge)), says);
    }

    #[test]
    fn a_configuration_has_a_number_or_the_word() {
        let read = serde_json::from_str::<ShardCount>;
        assert_eq!(read("3").unwrap(), ShardCount::Count(3));
        assert_eq!(read("\"auto\"").unwrap(), ShardCount::Word(Auto::Auto));
        for wrong in ["\"many\"", "-1", "1.5", "[]"] {
            let says = read(wrong).unwrap_err().to_string();
            assert_eq!(says, "shards are a number, 1 to 64, or \"auto\"", "{wrong}");
        }
    }
}

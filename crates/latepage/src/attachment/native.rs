//! Our own form of the handshake: an object with a version. Unknown keys and unknown values are refused by name, so that a
//! VMM that asks for more than this pager can do learns it at once.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{OFlags, SealFlags};
use serde::{Deserialize, Serialize};

use crate::memory::{Layout, PageSize, Region, Shards};
use crate::sys::memfd;

use super::firecracker::page_size;
use super::places::{BITMAP, CHANNEL, EVENTFD, MEMORY, PAGES, Places, USERFAULTFD, Way};
use super::refusal::{RefusalReason, Rejected, one_line};
use super::{Backing, Form};

/// The version of the protocol that this pager speaks.
pub const VERSION: u64 = 1;

/// The longest name of a VM, in characters.
pub const MAX_NAME: usize = 64;

/// The most virtual CPUs of a VM (KVM on x86_64 has at most 4096: CONFIG_KVM_MAX_NR_VCPUS).
pub const MAX_VCPUS: u32 = 4096;

/// The document. Values that are words are checked after the parser, which could not name the ones that are known.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u64,
    delivery: String,
    #[serde(default = "one")]
    vcpus: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backing: Option<String>,
    descriptors: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shards: Option<Vec<u64>>,
    regions: Vec<RegionEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RegionEntry {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gpa: Option<u64>,
    hva: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

/// Read on its own and first: what a later version adds must not be refused as an unknown key.
#[derive(Debug, Deserialize)]
struct AnyVersion {
    version: Option<serde_json::Value>,
}

/// What a VMM says of a VM: the sending side of this form.
#[derive(Debug, Clone, Copy)]
pub struct Introduction<'a> {
    /// The VM's name: 1 to [`MAX_NAME`] of the characters `A-Z a-z 0-9 . _ -`.
    pub name: Option<&'a str>,
    /// How many virtual CPUs it has, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// What its memory is made of.
    pub backing: Backing,
    /// Whether the memory file goes with the message, after the userfaultfd.
    pub memory: bool,
    /// Where its memory lies.
    pub layout: &'a Layout,
}

/// The message for this VM. Its userfaultfd goes with it, then, if announced, its memory file, in one sendmsg(2).
///
/// ```
/// use latepage::attachment::{Backing, native};
/// use latepage::memory::{Layout, PageSize, Region};
///
/// let layout = Layout::new(vec![Region { gpa: Some(0), hva: 0x7f00_0000_0000, size: 4096, offset: 0, page_size: PageSize::Small }])?;
/// let introduction =
///     native::Introduction { name: Some("vm-7"), vcpus: 2, backing: Backing::Shared, memory: true, layout: &layout };
/// assert!(native::message(&introduction).starts_with(r#"{"version":1,"delivery":"uffd","vcpus":2,"name":"vm-7""#));
/// # Ok::<(), latepage::memory::LayoutError>(())
/// ```
pub fn message(introduction: &Introduction<'_>) -> String {
    let kinds = [USERFAULTFD, MEMORY];
    let kinds = &kinds[..if introduction.memory { 2 } else { 1 }];
    written(introduction, Way::Uffd, kinds, None)
}

/// The message for a VM with a userfaultfd for each of these shards. With it go, in one sendmsg(2): the userfaultfds, in the order of
/// the shards, then, if announced, its memory file. [`shards::create`](super::shards::create) makes them.
///
/// ```
/// use latepage::attachment::{Backing, native};
/// use latepage::memory::{Layout, PageSize, Region, Shards};
///
/// let layout = Layout::new(vec![Region { gpa: Some(0), hva: 0x7f00_0000_0000, size: 12288, offset: 0, page_size: PageSize::Small }])?;
/// let introduction =
///     native::Introduction { name: None, vcpus: 64, backing: Backing::Shared, memory: true, layout: &layout };
/// let message = native::message_with_shards(&introduction, &Shards::equal(&layout, 2)?);
/// assert!(message.contains(r#""descriptors":["userfaultfd","userfaultfd","memory"],"shards":[4096,8192]"#));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn message_with_shards(introduction: &Introduction<'_>, shards: &Shards) -> String {
    let mut kinds = vec![USERFAULTFD; shards.len()];
    kinds.extend(introduction.memory.then_some(MEMORY));
    let sizes = (0..shards.len()).map(|shard| shards.bytes(introduction.layout, shard)).collect();
    written(introduction, Way::Uffd, &kinds, Some(sizes))
}

/// Which descriptors come beside a channel's own and the memory file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BesideChannel {
    /// The bitmap whose bits the pager clears.
    pub bitmap: bool,
    /// The page table, by which the next pager knows what this one has done.
    pub pages: bool,
    /// A userfaultfd for what no channel carries.
    pub userfaultfd: bool,
}

/// The message for a VM whose threads post their faults to a channel. With it go, in one sendmsg(2): the channel's two descriptors, the
/// memory file, then what is announced of [`BesideChannel`], in its order.
///
/// ```
/// use latepage::attachment::{Backing, native};
/// use latepage::memory::{Layout, PageSize, Region};
///
/// let layout = Layout::new(vec![Region { gpa: Some(0), hva: 0x7f00_0000_0000, size: 4096, offset: 0, page_size: PageSize::Small }])?;
/// let introduction =
///     native::Introduction { name: None, vcpus: 2, backing: Backing::Shared, memory: true, layout: &layout };
/// let beside = native::BesideChannel { bitmap: true, pages: true, ..Default::default() };
/// let message = native::message_with_channel(&introduction, beside);
/// assert!(message.contains(r#""delivery":"notify""#));
/// assert!(message.contains(r#""descriptors":["channel","eventfd","memory","bitmap","pages"]"#));
/// # Ok::<(), latepage::memory::LayoutError>(())
/// ```
pub fn message_with_channel(introduction: &Introduction<'_>, beside: BesideChannel) -> String {
    let BesideChannel { bitmap, pages, userfaultfd } = beside;
    let mut kinds = vec![CHANNEL, EVENTFD, MEMORY];
    kinds.extend(bitmap.then_some(BITMAP));
    kinds.extend(pages.then_some(PAGES));
    kinds.extend(userfaultfd.then_some(USERFAULTFD));
    written(introduction, Way::Notify, &kinds, None)
}

fn written(introduction: &Introduction<'_>, way: Way, kinds: &[usize], shards: Option<Vec<u64>>) -> String {
    let document = Document {
        version: VERSION,
        delivery: way.name().to_owned(),
        vcpus: introduction.vcpus,
        name: introduction.name.map(str::to_owned),
        backing: Some(introduction.backing.name().to_owned()),
        descriptors: Places::names(kinds),
        shards,
        regions: introduction.layout.regions().iter().map(RegionEntry::from).collect(),
    };
    serde_json::to_string(&document).expect("strings and numbers always serialize")
}

/// The document, checked.
#[derive(Debug)]
pub(super) struct Announcement {
    pub(super) name: Option<String>,
    pub(super) vcpus: u32,
    pub(super) backing: Backing,
    pub(super) layout: Layout,
    pub(super) shards: Shards,
    /// Which descriptors come with it.
    pub(super) places: Places,
}

/// Reads the document, once it is whole.
pub(super) fn parse(body: &[u8]) -> Result<Announcement, Rejected> {
    let malformed = |error: serde_json::Error| RefusalReason::Malformed {
        form: Form::Latepage,
        message: one_line(&error.to_string()),
    };
    let any: AnyVersion = serde_json::from_slice(body).map_err(malformed)?;
    if let Some(version) = any.version.filter(|version| version.as_u64() != Some(VERSION)) {
        return Err(RefusalReason::Version { version: one_line(&version.to_string()), known: VERSION }.into());
    }
    let document: Document = serde_json::from_slice(body).map_err(malformed)?;

    // The regions first: a refusal for anything else can then say where the VM's memory lies.
    let regions = document.regions.iter().map(RegionEntry::region).collect::<Result<_, _>>()?;
    let layout = Layout::new(regions).map_err(RefusalReason::from)?;
    match check(&document, &layout) {
        Ok((backing, places, shards)) => {
            Ok(Announcement { name: document.name, vcpus: document.vcpus, backing, layout, shards, places })
        }
        Err(reason) => Err(Rejected { reason, layout: Some(Box::new(layout)) }),
    }
}

/// Checks all but the regions: yields the backing, the places of the descriptors, and the shards.
fn check(document: &Document, layout: &Layout) -> Result<(Backing, Places, Shards), RefusalReason> {
    let Some(way) = Way::from_name(&document.delivery) else {
        return Err(unknown("delivery", &document.delivery, "\"uffd\" and \"notify\" are"));
    };
    if !(1..=MAX_VCPUS).contains(&document.vcpus) {
        return Err(RefusalReason::Value {
            key: "vcpus",
            value: document.vcpus.to_string(),
            known: "1 to 4096 are",
        });
    }
    if let Some(name) = document.name.as_deref().filter(|name| !is_name(name)) {
        return Err(unknown("name", name, "1 to 64 of A-Z a-z 0-9 . _ - are"));
    }
    let places = Places::read(way, &document.descriptors)?;
    let memory = places.of(MEMORY).is_some();
    let backing = match document.backing.as_deref() {
        None => implied(layout, memory),
        Some(name) => Backing::from_name(name).ok_or_else(|| {
            unknown("backing", name, "\"anonymous\", \"private\", \"shared\" and \"hugetlb\" are")
        })?,
    };
    check_backing(backing, layout, memory)?;
    if way == Way::Notify && backing != Backing::Shared {
        let why = "does not go with delivery \"notify\": pages are filled through the memory file, and must show in \"shared\" mappings of it";
        return Err(RefusalReason::Backing { backing, why });
    }
    let shards = shards(document.shards.as_deref(), way, places.userfaultfds().len(), layout)?;
    Ok((backing, places, shards))
}

/// How the regions are divided among the userfaultfds.
fn shards(
    sizes: Option<&[u64]>,
    way: Way,
    userfaultfds: usize,
    layout: &Layout,
) -> Result<Shards, RefusalReason> {
    match sizes {
        Some(_) if way == Way::Notify => Err(RefusalReason::Value {
            key: "shards",
            value: "with delivery \"notify\"".to_owned(),
            known: "only \"uffd\" has them",
        }),
        None if userfaultfds <= 1 => Ok(Shards::whole(layout)),
        sizes => {
            let sizes = sizes.unwrap_or_default();
            if sizes.len() != userfaultfds {
                return Err(RefusalReason::ShardCount { shards: sizes.len(), userfaultfds });
            }
            Ok(Shards::of_sizes(layout, sizes)?)
        }
    }
}

fn is_name(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(known)
}

/// What the memory is made of where the VMM does not say.
fn implied(layout: &Layout, memory: bool) -> Backing {
    if layout.regions().iter().any(|region| region.page_size == PageSize::Huge) {
        Backing::Hugetlb
    } else if memory {
        Backing::Shared
    } else {
        Backing::Anonymous
    }
}

fn check_backing(backing: Backing, layout: &Layout, memory: bool) -> Result<(), RefusalReason> {
    let expected = if backing == Backing::Hugetlb { PageSize::Huge } else { PageSize::Small };
    let why = if layout.regions().iter().any(|region| region.page_size != expected) {
        match expected {
            PageSize::Huge => "goes with a page_size of 2097152 only",
            PageSize::Small => "goes with a page_size of 4096 only; pages of 2 MiB are \"hugetlb\"",
        }
    } else if memory && backing == Backing::Anonymous {
        "has no memory file: leave \"memory\" out of the descriptors, or say \"shared\" or \"private\""
    } else if memory && backing == Backing::Hugetlb {
        "takes no memory file: huge pages are copied in; leave \"memory\" out of the descriptors"
    } else {
        return Ok(());
    };
    Err(RefusalReason::Backing { backing, why })
}

/// Whether the memory file can be mapped and written without fear of its sender.
pub(super) fn check_memory(memory: &OwnedFd, layout: &Layout) -> Result<(), RefusalReason> {
    memfd::check_sealed(memory.as_fd(), layout.end())?;
    // It has seals, so it is a memory file, and these two cannot fail but for want of kernel memory.
    let access = rustix::fs::fcntl_getfl(memory).unwrap_or(OFlags::empty());
    let seals = rustix::fs::fcntl_get_seals(memory).unwrap_or(SealFlags::empty());
    if access & OFlags::ACCMODE != OFlags::RDWR
        || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
    {
        return Err(RefusalReason::MemoryNotWritable);
    }
    Ok(())
}

fn unknown(key: &'static str, value: &str, known: &'static str) -> RefusalReason {
    RefusalReason::Value { key, value: one_line(&format!("{value:?}")), known }
}

fn one() -> u32 {
    1
}

impl RegionEntry {
    fn region(&self) -> Result<Region, RefusalReason> {
        Ok(Region {
            gpa: self.gpa,
            hva: self.hva,
            size: self.size,
            offset: self.offset,
            page_size: page_size(self.page_size)?,
        })
    }
}

impl From<&Region> for RegionEntry {
    fn from(region: &Region) -> Self {
        Self {
            gpa: region.gpa,
            hva: region.hva,
            size: region.size,
            offset: region.offset,
            page_size: region.page_size.bytes(),
        }
    }
}

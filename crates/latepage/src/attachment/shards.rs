//! For VMMs: a userfaultfd for each shard of a guest's memory.
//!
//! One userfaultfd has one queue, which its readers and every thread that faults share; past some 64 waiting threads most of the time
//! goes there. Several, each over a shard of the memory, have a queue each, and a pager serves them side by side.

use crate::memory::{Layout, Shards, ShardsError};
use crate::sys::uffd::{CreateError, Features, RegisterMode, UffdError, Userfaultfd};

/// The number of vCPUs for which another userfaultfd pays.
pub const VCPUS: u32 = 16;

/// Why there are no userfaultfds. What had been made is closed, and where that was registered already, its absent pages are the kernel's
/// own again: zero for whoever touches them.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// The memory cannot be divided so.
    #[error(transparent)]
    Shards(#[from] ShardsError),
    /// One could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// One could not be registered over its shard.
    #[error("shard {shard}: {source}")]
    Register {
        /// Which, from 0.
        shard: usize,
        /// What was said.
        source: UffdError,
    },
}

/// How many shards suit a VM of so many vCPUs: one for each 16, one at least, and no more than there are pages.
///
/// ```
/// # use latepage::memory::{Layout, PageSize, Region};
/// # let region = Region { gpa: None, hva: 4096, size: 1 << 30, offset: 0, page_size: PageSize::Small };
/// # let layout = Layout::new(vec![region])?;
/// use latepage::attachment::shards;
///
/// assert_eq!([1, 16, 17, 64, 512, 4096].map(|vcpus| shards::suited(vcpus, &layout)), [1, 1, 2, 4, 32, 64]);
/// # Ok::<(), latepage::memory::LayoutError>(())
/// ```
pub fn suited(vcpus: u32, layout: &Layout) -> usize {
    (vcpus.div_ceil(VCPUS) as usize).clamp(1, Shards::MOST).min(layout.pages() as usize)
}

/// Makes a userfaultfd for each shard of this process's memory, and registers each over its own.
///
/// Call it before any vCPU runs, or anybody else touches the memory: what is touched before is there as it is, and where a shard cannot
/// be registered, what was touched by then stays.
///
/// Send all of them, with [`message_with_shards`](super::native::message_with_shards), and keep a copy of each.
///
/// ```no_run
/// # // A userfaultfd takes rights that a test of the documentation may not have.
/// # use latepage::memory::{Layout, PageSize, Region, Shards};
/// # use latepage::sys::mapping::Mapping;
/// # use latepage::sys::uffd::{Features, RegisterMode};
/// use latepage::attachment::shards;
///
/// let memory = Mapping::anonymous(64 << 20)?;
/// let region = Region { gpa: Some(0), hva: memory.address(), size: 64 << 20, offset: 0, page_size: PageSize::Small };
/// let layout = Layout::new(vec![region])?;
/// let divided = Shards::equal(&layout, shards::suited(512, &layout))?;
/// let userfaultfds = shards::create(&layout, &divided, Features::EVENT_REMOVE, RegisterMode::MISSING)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ShardError`].
pub fn create(
    layout: &Layout,
    shards: &Shards,
    features: Features,
    mode: RegisterMode,
) -> Result<Vec<Userfaultfd>, ShardError> {
    let all = (0..shards.len()).map(|_| Userfaultfd::create(features)).collect::<Result<Vec<_>, _>>()?;
    for (shard, userfaultfd) in all.iter().enumerate() {
        for (address, length) in shards.ranges(layout, shard) {
            let registered = userfaultfd.register(address, length, mode);
            registered.map_err(|source| ShardError::Register { shard, source })?;
        }
    }
    Ok(all)
}

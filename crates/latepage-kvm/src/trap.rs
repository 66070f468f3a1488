//! Memory-fault exits: which kind of them this kernel has, and the one that only a VMM can make.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes};
use latepage::install::Trap;
use latepage::memory::Layout;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::VmError;
use crate::probe;
use crate::sys::slots::Slots;

/// `KVM_X86_SW_PROTECTED_VM`: the VM type whose ordinary slots may have attributes.
pub(crate) const SW_PROTECTED_VM: u64 = 1;
/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`: the page has the attribute PRIVATE.
pub(crate) const EXIT_PRIVATE: u64 = 1 << 3;
/// `KVM_MEMORY_EXIT_FLAG_USERFAULT`, of the same patches as the slot's flag: the page's bit is set.
pub(crate) const EXIT_USERFAULT: u64 = 1 << 4;

/// What makes a vCPU's access to an absent page an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrapKind {
    /// A bit for each page (KVM Userfault).
    Bitmap,
    /// The memory attribute PRIVATE.
    Attributes,
}

impl fmt::Display for TrapKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Bitmap => "bitmap",
            Self::Attributes => "attributes",
        })
    }
}

impl FromStr for TrapKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Bitmap, Self::Attributes]
            .into_iter()
            .find(|kind| kind.to_string() == name)
            .ok_or_else(|| format!("no trap is called {name:?}: bitmap or attributes"))
    }
}

impl TrapKind {
    /// The one that was asked for, or the best that this kernel has: each is tried on a VM of one page.
    ///
    /// # Errors
    /// [`VmError::NoExits`] with what lacks.
    pub fn choose(asked: Option<Self>) -> Result<Self, VmError> {
        let mut why = Vec::new();
        for kind in [Self::Bitmap, Self::Attributes] {
            if asked.is_some_and(|asked| asked != kind) {
                continue;
            }
            let tried = match kind {
                Self::Bitmap => probe::exit_by_userfault(),
                Self::Attributes => probe::exit_by_attributes(),
            };
            match tried {
                Ok(()) => return Ok(kind),
                Err(error) => why.push(format!("by {kind}: {error} ({})", kind.needs())),
            }
        }
        Err(VmError::NoExits { why: why.join("; ") })
    }

    fn needs(self) -> &'static str {
        match self {
            Self::Bitmap => "KVM Userfault: only some vendors' kernels carry these patches",
            Self::Attributes => "needs Linux 6.8 built with CONFIG_KVM_SW_PROTECTED_VM=y",
        }
    }
}

/// Marks absent pages as private: an access to memory that has no private side is an exit. A mark that is set takes the page away from
/// KVM at once, mapped or not.
#[derive(Debug, Default)]
pub(crate) struct Attributes {
    slots: OnceLock<Arc<Slots>>,
}

impl Attributes {
    /// The VM whose pages they are.
    pub(crate) fn attach(&self, slots: &Arc<Slots>) {
        let _ = self.slots.set(Arc::clone(slots));
    }

    fn set(&self, layout: &Layout, pages: Range<u32>, attributes: u32) -> Result<(), Errno> {
        let place = layout.place(pages.start);
        let (Some(slots), Some(address)) = (self.slots.get(), place.gpa) else { return Err(Errno::NODEV) };
        let size = u64::from(pages.end - pages.start) * place.page_size.bytes();
        let attributes =
            kvm_memory_attributes { address, size, attributes: attributes.into(), ..Default::default() };
        slots.vm.set_memory_attributes(attributes).map_err(|error| Errno::from_raw_os_error(error.errno()))
    }
}

impl Trap for Attributes {
    fn arm(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.set(layout, pages, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    }

    fn disarm(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.set(layout, pages, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traps_go_by_name() {
        for kind in [TrapKind::Bitmap, TrapKind::Attributes] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("net".parse::<TrapKind>().unwrap_err().contains("net"));
    }

    #[test]
    fn a_kernel_without_a_trap_is_told_what_it_lacks() {
        for asked in [Some(TrapKind::Bitmap), Some(TrapKind::Attributes), None] {
            let Err(refused) = TrapKind::choose(asked) else { continue };
            let refused = refused.to_string();
            for kind in [TrapKind::Bitmap, TrapKind::Attributes] {
                let named = asked.is_none_or(|asked| asked == kind);
                assert_eq!(refused.contains(&format!("by {kind}:")), named, "{refused}");
            }
        }
    }
}

//! What every VMM has already: a snapshot, guest memory, a VM, a vCPU. Nothing here knows of late memory.

use std::error::Error;
use std::path::Path;

use kvm_ioctls::{VcpuFd, VmFd};
use latepage::memory::{Layout, LayoutError, PageSize, Region};
use latepage::sys::mapping::Mapping;

/// Pages of the guest.
pub(crate) const PAGES: u32 = 64;
/// Its memory.
pub(crate) const BYTES: usize = PAGES as usize * 4096;

/// Real mode, at address 0: adds up the last word of each page, says the sum, and halts.
const PROGRAM: [u8; 23] = [
    0x31, 0xDB, // xor bx, bx
    0x31, 0xC0, // xor ax, ax
    0x8E, 0xD8, // next: mov ds, ax
    0x03, 0x1E, 0xFE, 0x0F, // add bx, [0xFFE]
    0x05, 0x00, 0x01, // add ax, 0x100
    0x3D, 0x00, 0x40, // cmp ax, 0x4000
    0x75, 0xF2, // jne next
    0x89, 0xD8, // mov ax, bx
    0xE7, 0xE9, // out 0xE9, ax
    0xF4, // hlt
];

/// Writes the snapshot that the guest wakes up from.
pub(crate) fn write_snapshot(path: &Path) -> std::io::Result<()> {
    let mut bytes = vec![0; BYTES];
    bytes[..PROGRAM.len()].copy_from_slice(&PROGRAM);
    for page in 0..PAGES {
        let end = (page as usize + 1) * 4096;
        bytes[end - 2..end].copy_from_slice(&word(page).to_le_bytes());
    }
    std::fs::write(path, bytes)
}

/// The last word of a page.
fn word(page: u32) -> u16 {
    (page as u16 + 1).wrapping_mul(0x9E37)
}

/// What the guest says if all of its memory was what the snapshot holds.
pub(crate) fn expected() -> u16 {
    (0..PAGES).map(word).fold(0, u16::wrapping_add)
}

/// One region at address 0, seen by the guest through `view`.
pub(crate) fn layout(view: &Mapping) -> Result<Layout, LayoutError> {
    let (hva, size) = (view.address(), BYTES as u64);
    Layout::new(vec![Region { gpa: Some(0), hva, size, offset: 0, page_size: PageSize::Small }])
}

/// The vCPU, as the snapshot has it.
pub(crate) fn vcpu(vm: &VmFd) -> Result<VcpuFd, Box<dyn Error>> {
    let vcpu = vm.create_vcpu(0)?;
    let mut system = vcpu.get_sregs()?;
    (system.cs.base, system.cs.selector) = (0, 0);
    vcpu.set_sregs(&system)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (0, 2);
    vcpu.set_regs(&registers)?;
    Ok(vcpu)
}

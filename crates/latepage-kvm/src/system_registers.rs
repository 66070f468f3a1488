//! The system registers of a vCPU: long mode, paging by our tables, flat segments, no interrupts.

use serde::{Deserialize, Serialize};

use crate::layout::LEVEL4;

/// A segment, with the descriptor behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Segment {
    pub(crate) base: u64,
    pub(crate) limit: u32,
    pub(crate) selector: u16,
    pub(crate) kind: u8,
    pub(crate) present: u8,
    pub(crate) dpl: u8,
    pub(crate) db: u8,
    pub(crate) s: u8,
    pub(crate) l: u8,
    pub(crate) g: u8,
    pub(crate) avl: u8,
    pub(crate) unusable: u8,
}

/// The base and the limit of a descriptor table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Table {
    pub(crate) base: u64,
    pub(crate) limit: u16,
}

/// All that KVM_GET_SREGS gives and a guest of ours has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SystemRegisters {
    pub(crate) cs: Segment,
    pub(crate) ds: Segment,
    pub(crate) es: Segment,
    pub(crate) fs: Segment,
    pub(crate) gs: Segment,
    pub(crate) ss: Segment,
    pub(crate) tr: Segment,
    pub(crate) ldt: Segment,
    pub(crate) gdt: Table,
    pub(crate) idt: Table,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) cr8: u64,
    pub(crate) efer: u64,
    pub(crate) apic_base: u64,
}

impl Default for SystemRegisters {
    fn default() -> Self {
        let data = Segment {
            limit: u32::MAX,
            selector: 0x10,
            kind: 0x3, // read, write, accessed
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Segment::default()
        };
        let code = Segment { selector: 0x8, kind: 0xb, db: 0, l: 1, ..data };
        // A processor in long mode has a task register, whether it uses it or not.
        let task = Segment { limit: 0x67, selector: 0x18, kind: 0xb, present: 1, ..Segment::default() };
        let none = Segment { kind: 0x2, unusable: 1, ..Segment::default() };
        Self {
            cs: code,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: task,
            ldt: none,
            gdt: Table::default(),
            idt: Table::default(),
            cr0: 0x8001_0031, // paging, write protection, native errors, extension type, protected mode
            cr2: 0,
            cr3: LEVEL4,
            cr4: 0x20, // physical address extension
            cr8: 0,
            efer: 0x500, // long mode, enabled and active
            apic_base: 0xFEE0_0800,
        }
    }
}

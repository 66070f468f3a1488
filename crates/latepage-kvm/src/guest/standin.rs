//! Threads standing in for vCPUs where there is no /dev/kvm: the same programs in Rust, over the same registers.
//!
//! A stand-in touches the guest view as a vCPU does, so its faults are as real; only the instructions are not the guest's.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Program;
use super::port;
use super::registers::Registers;
use crate::fingerprint::words;
use crate::layout::{CLASSES, GuestLayout};
use crate::memory::GuestMemory;

/// Why a stand-in stopped.
pub(crate) enum Stop {
    /// It was told to pause.
    Paused,
    /// Its program is over.
    Done,
    /// Its registers are not those of a program's start: they were saved by KVM in the middle of a page.
    Unknown,
}

/// Runs the program at rip until it is over or `pause` is set. `out` is called for each write to a port.
pub(crate) fn run(
    memory: &GuestMemory,
    registers: &mut Registers,
    pause: &AtomicBool,
    mut out: impl FnMut(u16, &Registers),
) -> Stop {
    let Some(program) = Program::at(registers.rip) else { return Stop::Unknown };
    let layout = memory.layout();
    loop {
        if pause.load(Ordering::Acquire) {
            return Stop::Paused;
        }
        match program {
            Program::Hello => {
                out(port::HELLO, registers);
                return Stop::Done;
            }
            Program::Count => {
                registers.rbx += 1 << 16;
                out(port::PROGRESS, registers);
                continue;
            }
            _ => {}
        }
        let Some(page) = next_page(program, memory, registers) else {
            out(port::DONE, registers);
            return Stop::Done;
        };
        visit(program, memory, layout, registers, page, &mut out);
        registers.rbx += 1;
        if registers.rbx.is_multiple_of(256) {
            out(port::PROGRESS, registers);
        }
    }
}

fn next_page(program: Program, memory: &GuestMemory, registers: &mut Registers) -> Option<u64> {
    if matches!(program, Program::FillList | Program::VerifyList | Program::TouchList | Program::SayList) {
        if registers.r8 >= registers.r12 {
            return None;
        }
        let mut entry = [0; 4];
        memory.read(registers.r9 + 4 * registers.r8, &mut entry);
        registers.r8 += 1;
        return Some(u64::from(u32::from_le_bytes(entry)));
    }
    let mut walk = registers.walk();
    let page = walk.next();
    registers.set_walk(&walk);
    page.map(|page| registers.r15 + page)
}

fn visit(
    program: Program,
    memory: &GuestMemory,
    layout: &GuestLayout,
    registers: &mut Registers,
    page: u64,
    out: &mut impl FnMut(u16, &Registers),
) {
    let offset = layout.offset_of(page);
    registers.rdi = layout.gpa_of(page);
    if matches!(program, Program::VerifyMixed | Program::VerifyList) {
        let mut class = [0; 1];
        memory.read(CLASSES + page, &mut class);
        registers.r14 = memory.load(CLASSES - 4096 + 8 * u64::from(class[0]));
    }
    match program {
        Program::Say | Program::SayList => {
            registers.rax = memory.load(offset) & 0xFF;
            out(port::SAID, registers);
        }
        Program::Touch | Program::TouchList => registers.rax = memory.load(offset),
        Program::Fill | Program::FillList => {
            for (at, value) in words(registers.r14, page) {
                memory.store(offset + 8 * at as u64, value);
            }
        }
        _ => {
            if words(registers.r14, page)
                .iter()
                .any(|(at, value)| memory.load(offset + 8 * *at as u64) != *value)
            {
                out(port::WRONG, registers);
            }
        }
    }
}

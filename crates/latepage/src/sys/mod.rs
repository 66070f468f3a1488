//! The crate's only unsafe code: one safe handle for each kind of kernel object.
//!
//! Numbers and layouts come from the kernel's uapi headers (`linux/userfaultfd.h`, `asm-generic/ioctl.h`) and are asserted at
//! compile time against the formula that they come from. Everything above this room is safe Rust.
#![allow(unsafe_code)]

pub mod buffer;
pub mod fdpass;
pub mod file;
pub mod futex;
pub mod lease;
pub mod mapping;
pub mod memfd;
pub mod pidfd;
pub mod probe;
pub mod ring;
pub mod sched;
#[cfg(test)]
mod tests;
pub mod uffd;
mod uffd_abi;

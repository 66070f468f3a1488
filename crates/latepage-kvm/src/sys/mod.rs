//! The crate's only unsafe code: what KVM needs and `latepage::sys` does not have.
#![allow(unsafe_code)]

pub(crate) mod discard;
pub(crate) mod guest_code;
pub(crate) mod kick;
pub(crate) mod sigbus;
pub(crate) mod slots;
pub(crate) mod trial;

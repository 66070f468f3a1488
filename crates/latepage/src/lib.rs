//! latepage supplies a virtual machine's memory late: page by page, at the moment the guest touches it.
//!
//! This crate is the data plane. It knows nothing of Python, and the author of a VMM can use it as it is. The rooms, and
//! who may call whom:
//!
//! ```text
//! sys <- memory <- delivery, source, install <- session, attachment <- pager        (stats is a leaf)
//! ```
//!
//! - [`sys`]: the crate's only unsafe code: userfaultfd, mappings, descriptors.
//! - [`memory`]: regions, the layout, and the table of page states.
//! - [`delivery`]: how faults reach us; [`source`]: where contents come from; [`install`]: how contents get into the guest.
//! - [`session`]: one VM. Only it brings delivery, source and install together.
//! - [`attachment`]: what a VMM says at the socket.
//! - [`pager`]: many sessions, their threads, and the end of each.
//! - [`stats`]: counters, latency histograms and the trace ring.

pub mod memory;
pub mod stats;

#[cfg(not(loom))]
pub mod attachment;
#[cfg(not(loom))]
pub mod delivery;
#[cfg(not(loom))]
pub mod install;
#[cfg(not(loom))]
pub mod pager;
#[cfg(not(loom))]
pub mod session;
#[cfg(not(loom))]
pub mod source;
#[cfg(not(loom))]
pub mod sys;

/// The gate alone, for loom: the rest of a session is made of system calls.
#[cfg(loom)]
#[allow(dead_code, reason = "loom's tests use some of it")]
#[path = "session/gate.rs"]
mod gate;

/// The channel's protocol alone, for loom: the rest of it is made of system calls.
#[cfg(loom)]
#[allow(dead_code, unreachable_pub, unused_imports, reason = "loom's tests use some of it")]
#[path = "delivery/channel/protocol/mod.rs"]
mod channel_protocol;

/// What threads that resolve their own faults wait for each other by, for loom.
#[cfg(loom)]
#[allow(dead_code, reason = "loom's tests use some of it")]
#[path = "session/inside"]
mod inside {
    #[cfg(test)]
    mod races;
    mod stay;
    mod turns;
    mod word;
}

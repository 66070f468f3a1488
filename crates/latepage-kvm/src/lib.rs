//! The reference VMM of latepage: a real VMM on /dev/kvm, small enough to read in an evening.
//!
//! It runs guests that do nothing but write, check and touch pages, saves and restores them, and lets a pager bring their
//! memory. It is latepage's demo, its test bench, and an example for authors of VMMs. A way to read it: [`layout`],
//! `guest/programs.s`, `vcpu`, `control`, `vm`; for those who want a pager under their own VMM, `handshake` alone.
//!
//! ```
//! use latepage_kvm::{Action, Backing, GuestKind, Job, Order, Vm, VmConfig};
//!
//! let config = VmConfig {
//!     name: "vm-7".into(),
//!     memory: 8 << 20,
//!     split: false,
//!     backing: Backing::Shared,
//!     vcpus: 2,
//!     guest: GuestKind::Auto,
//! };
//! let vm = Vm::create(&config)?;
//! vm.run(Job::new(Action::Fill, 7, Order::Sequential))?;
//! vm.wait(None)?;
//! vm.run(Job::new(Action::Verify, 1, Order::Random))?;
//! assert!(vm.wait(None)?.is_some_and(|report| report.is_right()));
//! assert!(vm.compare()?.is_right());
//! # Ok::<(), latepage_kvm::VmError>(())
//! ```

pub mod api;
mod config;
mod control;
pub mod crowd;
mod error;
mod event;
mod expectation;
pub mod fingerprint;
mod guest;
mod handshake;
mod job;
mod last_words;
mod late;
pub mod layout;
mod machine;
mod memory;
mod notify;
pub mod probe;
mod report;
mod restore;
mod server;
mod shards;
mod snapshot;
mod supply;
mod sys;
mod system_registers;
mod trap;
mod vcpu;
mod vm;

pub use config::{DiscardRange, Handshake, LateMemory, MemoryFrom, NotifyMemory, RestoreConfig, VmConfig};
pub use error::VmError;
pub use event::Event;
pub use guest::order::{Order, STRIDE, Walk};
pub use job::{Action, Job, JobReport, WRONG_LISTED};
pub use late::{Delivery, LateReport};
pub use machine::GuestKind;
pub use memory::{Backing, GuestMemory};
pub use notify::NotifyReport;
pub use report::{Comparison, Report, SaveReport};
pub use server::ApiServer;
pub use shards::{Auto, ShardCount};
pub use trap::TrapKind;
pub use vm::Vm;

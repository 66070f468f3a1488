//! Counters: one list, from which the atomic ones, their plain snapshot and their names all come.

use crate::memory::atomic::{AtomicU64, Ordering};

/// A count that only grows. Any thread may add to it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        // Relaxed: a count orders nothing else.
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($name:ident: $meaning:literal,)*) => {
        /// What a session has done. Each counter is a field; `add()` counts, from any thread.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $meaning] pub $name: Counter,)*
        }

        impl Counters {
            /// The counters' names, in order: the fields' own, the docs' and the metrics'.
            pub const NAMES: [&'static str; [$(stringify!($name)),*].len()] = [$(stringify!($name)),*];
            /// What each counter counts, in the order of the names.
            pub const MEANINGS: [&'static str; Self::NAMES.len()] = [$($meaning),*];

            /// The counts now, as plain numbers. Others may count meanwhile.
            pub fn snapshot(&self) -> CountersSnapshot {
                CountersSnapshot { $($name: self.$name.get(),)* }
            }
        }

        /// What a session has done, or several together, as plain numbers.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct CountersSnapshot {
            $(#[doc = $meaning] pub $name: u64,)*
        }

        impl CountersSnapshot {
            /// Adds another session's counts to these.
            pub fn merge(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }

            /// Each counter's name and count, in the order of [`Counters::NAMES`].
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                Counters::NAMES.into_iter().zip([$(self.$name),*])
            }
        }
    };
}

counters! {
    faults: "Faults delivered to us, of every kind.",
    writes: "Faults by a write to an absent page.",
    write_protects: "Faults by a write to a write-protected page.",
    minors: "Faults on a page whose contents are in the page cache but that the guest does not map yet.",
    joined: "Faults on a page that someone was bringing already: they only waited.",
    present: "Faults on a page that the guest already had.",
    source_pages: "Pages installed with contents from the source because a fault asked for them.",
    zero_pages: "Pages installed as zero, for whatever reason: a hole, zero contents, or removed before.",
    beside_pages: "Pages brought in beside a faulting one (fault-around).",
    beside_touched: "Of those, the pages that the guest is known to have touched afterwards.",
    populated_pages: "Pages brought in by population, before anyone asked.",
    removed_pages: "Pages that the VMM discarded.",
    bytes_installed: "Bytes of guest memory installed, zero pages included.",
    later: "Faults that the source could not answer at once and that went to an I/O thread.",
    ring_reads: "Reads that were made for them by io_uring.",
    shared_reads: "Faults for which another VM's read was under way already, which did for them too.",
    retries: "Installs that the kernel asked to try again (EAGAIN).",
    already_there: "Installs that found the page already there (EEXIST).",
    failures: "Pages that could not be had.",
    stalls: "Faults that grew older than the stall limit.",
    reads: "read(2) calls on userfaultfds.",
}

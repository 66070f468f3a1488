//! Placement: where a worker runs, and how it waits.
//!
//! Sleeping on one core and being woken from another is nearly all of what a fault costs (docs/performance.md). A worker that
//! shares the core of the thread that faults pays for neither: that thread sleeps while it is served. So a thread of its own,
//! the scout, looks at VMs that fault a lot: which of their threads do, and on which cores. From that [`decide`] makes a
//! [`Stance`] for each worker, and the scout has the worker run there. Workers themselves do nothing for it.

mod cores;
mod scout;
mod tasks;

use std::time::Duration;

use crate::session::Placement;
use crate::stats::GapsSnapshot;

pub(super) use cores::Machine;
pub(super) use scout::Scout;
use tasks::{Look, Sleeper};

/// The longest that a worker spins after a fault where the user has said that it shall.
const SPIN: Duration = Duration::from_micros(200);

/// On which cores a worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum On {
    /// Any that the process may run on.
    Any,
    /// Any of a NUMA node.
    Node(usize),
    /// This one.
    Core(usize),
}

/// Where a worker runs, and how long it spins before it blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stance {
    pub(super) on: On,
    pub(super) spin: Duration,
}

impl Stance {
    /// Wherever the kernel likes, asleep while nothing is to be done.
    pub(super) const BLOCK: Self = Self { on: On::Any, spin: Duration::ZERO };

    /// What `latepage_workers` calls it.
    pub(super) const fn name(self) -> &'static str {
        match self.on {
            On::Core(_) => "core",
            On::Any | On::Node(_) if self.spin.is_zero() => "block",
            On::Any | On::Node(_) => "spin",
        }
    }
}

/// The stance of a worker most of whose work comes from one VM, of which `look` is what can be seen of its threads, and `restless` says
/// that the scheduler does not leave them on their cores; and the thread that
/// it follows from core to core, if it does.
fn decide(
    placement: Placement,
    look: Option<&Look>,
    restless: bool,
    gaps: &GapsSnapshot,
    machine: &Machine,
) -> (Stance, Option<u32>) {
    let anywhere = || look.and_then(|look| machine.common_node(look.cores())).map_or(On::Any, On::Node);
    let asleep = || Stance { on: anywhere(), spin: Duration::ZERO };
    let join = |sleeper: Sleeper| {
        let stance = Stance { on: On::Core(sleeper.core), spin: Duration::ZERO };
        machine.may_use(sleeper.core).then_some((stance, Some(sleeper.thread)))
    };
    match placement {
        Placement::Block => (asleep(), None),
        Placement::Spin => (Stance { spin: SPIN, ..asleep() }, None),
        Placement::Core(core) if machine.may_use(core) => {
            (Stance { on: On::Core(core), spin: Duration::ZERO }, None)
        }
        Placement::SameCore => look.and_then(Look::busiest).and_then(join).unwrap_or((asleep(), None)),
        // A core that is not there has been told of, and is as good as no wish.
        Placement::Auto | Placement::Core(_) => {
            look.filter(|_| !restless).and_then(Look::alone).and_then(join).unwrap_or_else(|| {
                // Whoever spins takes a core from somebody unless one is to spare.
                let busy = look.map_or(1, Look::threads);
                let spare = busy < machine.allowed().len() && machine.has_idle_core();
                let spin = if spare { gaps.spin_that_pays() } else { Duration::ZERO };
                (Stance { spin, ..asleep() }, None)
            })
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const PAYS: GapsSnapshot = GapsSnapshot { counts: [1000, 10, 0, 0, 0, 0, 1] };
    const SELDOM: GapsSnapshot = GapsSnapshot { counts: [1, 0, 0, 0, 0, 10, 1000] };

    fn look(threads: &[(u64, usize)]) -> Look {
        let sleepers = threads.iter().zip(1..);
        Look::of(sleepers.map(|(&(sleeps, core), thread)| Sleeper { thread, sleeps, core }).collect())
    }

    fn stance(placement: Placement, look: Option<&Look>, gaps: &GapsSnapshot, machine: &Machine) -> Stance {
        decide(placement, look, false, gaps, machine).0
    }

    fn on(core: usize) -> Stance {
        Stance { on: On::Core(core), spin: Duration::ZERO }
    }

    #[test]
    fn auto_joins_the_one_thread_that_faults() {
        let machine = Machine::fake(&[&[0, 1, 2, 3]], 4);
        for others in [&[][..], &[(9, 1)], &[(3, 1), (3, 2)]] {
            let threads = [&[(100, 3)], others].concat();
            assert_eq!(
                decide(Placement::Auto, Some(&look(&threads)), false, &SELDOM, &machine),
                (on(3), Some(1))
            );
        }
    }

    #[test]
    fn auto_does_not_run_after_a_thread_that_will_not_stay() {
        let machine = Machine::fake(&[&[0, 1, 2, 3]], 2);
        let one = look(&[(100, 3)]);
        let (spinning, follows) = decide(Placement::Auto, Some(&one), true, &PAYS, &machine);
        assert!(spinning.on == On::Any && spinning.spin > Duration::ZERO && follows.is_none());
        let same = decide(Placement::SameCore, Some(&one), true, &PAYS, &machine);
        assert_eq!(same, (on(3), Some(1)), "as the user says");
    }

    #[test]
    fn auto_spins_where_several_fault_often_and_a_core_is_to_spare() {
        let machine = Machine::fake(&[&[0, 1, 2, 3]], 2);
        let two = look(&[(100, 3), (90, 1)]);
        let spinning = stance(Placement::Auto, Some(&two), &PAYS, &machine);
        assert_eq!(spinning.on, On::Any);
        assert!(spinning.spin > Duration::ZERO);
        assert_eq!(
            stance(Placement::Auto, Some(&two), &SELDOM, &machine),
            Stance::BLOCK,
            "it would spin for nothing"
        );
        let four = look(&[(9, 0), (9, 1), (9, 2), (9, 3)]);
        assert_eq!(stance(Placement::Auto, Some(&four), &PAYS, &machine), Stance::BLOCK, "no core is left");
        let busy = Machine::fake(&[&[0, 1, 2, 3]], 0);
        assert_eq!(stance(Placement::Auto, Some(&two), &PAYS, &busy), Stance::BLOCK, "others need them all");
        assert!(
            stance(Placement::Auto, None, &PAYS, &machine).spin > Duration::ZERO,
            "a VM that cannot be seen"
        );
    }

    #[test]
    fn what_the_user_says_is_done_where_it_can_be() {
        let machine = Machine::fake(&[&[0, 1, 2, 3]], 0);
        let two = look(&[(100, 3), (90, 1)]);
        assert_eq!(stance(Placement::Block, Some(&two), &PAYS, &machine), Stance::BLOCK);
        assert_eq!(stance(Placement::Spin, None, &SELDOM, &machine), Stance { on: On::Any, spin: SPIN });
        assert_eq!(stance(Placement::SameCore, Some(&two), &PAYS, &machine), on(3));
        assert_eq!(stance(Placement::SameCore, None, &PAYS, &machine), Stance::BLOCK);
        assert_eq!(
            stance(Placement::SameCore, Some(&look(&[(9, 7)])), &PAYS, &machine),
            Stance::BLOCK,
            "not ours"
        );
        assert_eq!(stance(Placement::Core(2), Some(&two), &PAYS, &machine), on(2));
        assert_eq!(stance(Placement::Core(8), Some(&look(&[(9, 1)])), &PAYS, &machine), on(1), "as auto");
    }

    #[test]
    fn a_worker_stays_on_the_node_of_the_vm_that_it_serves() {
        let machine = Machine::fake(&[&[0, 1], &[2, 3]], 0);
        let far = look(&[(100, 3), (90, 2)]);
        assert_eq!(stance(Placement::Block, Some(&far), &PAYS, &machine).on, On::Node(1));
        let both = look(&[(100, 0), (90, 2)]);
        assert_eq!(stance(Placement::Block, Some(&both), &PAYS, &machine).on, On::Any);
    }
}

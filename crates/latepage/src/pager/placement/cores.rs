//! The machine as far as placement goes: which cores there are for us, on which NUMA nodes, and whether one is idle.

use std::path::Path;

use crate::sys::sched::Cores;

/// The cores that this process may use.
#[derive(Debug)]
pub(in crate::pager) struct Machine {
    allowed: Cores,
    /// The allowed ones of each NUMA node; one node where the kernel tells of none.
    nodes: Vec<Cores>,
    #[cfg(all(test, not(loom)))]
    idle: Option<usize>,
}

impl Machine {
    /// This one.
    pub(in crate::pager) fn this() -> Self {
        let allowed = Cores::allowed().unwrap_or_else(|_| Cores::none());
        let nodes = nodes(Path::new("/sys/devices/system/node"), &allowed);
        Self {
            allowed,
            nodes,
            #[cfg(all(test, not(loom)))]
            idle: None,
        }
    }

    /// Those that this process may run on.
    pub(in crate::pager) fn allowed(&self) -> &Cores {
        &self.allowed
    }

    /// The allowed ones of a node.
    pub(super) fn node(&self, node: usize) -> &Cores {
        self.nodes.get(node).unwrap_or(&self.allowed)
    }

    pub(in crate::pager) fn may_use(&self, core: usize) -> bool {
        self.allowed.contains(core)
    }

    /// The node that all these cores are on, where the machine has more than one.
    pub(super) fn common_node(&self, cores: impl Iterator<Item = usize>) -> Option<usize> {
        if self.nodes.len() < 2 {
            return None;
        }
        let mut nodes = cores.map(|core| self.nodes.iter().position(|node| node.contains(core)));
        let first = nodes.next()??;
        nodes.all(|node| node == Some(first)).then_some(first)
    }

    /// Whether fewer threads want to run than there are cores, as far as the kernel says: /proc/loadavg counts whoever runs now.
    pub(super) fn has_idle_core(&self) -> bool {
        #[cfg(all(test, not(loom)))]
        if let Some(idle) = self.idle {
            return idle > 0;
        }
        let running = std::fs::read_to_string("/proc/loadavg").ok().and_then(|line| running(&line));
        running.is_some_and(|running| running <= self.allowed.len())
    }
}

/// The threads that run or could, whoever looks among them: the first part of the fourth field.
fn running(loadavg: &str) -> Option<usize> {
    loadavg.split_ascii_whitespace().nth(3)?.split('/').next()?.parse().ok()
}

fn nodes(folder: &Path, allowed: &Cores) -> Vec<Cores> {
    let of = |node: usize| std::fs::read_to_string(folder.join(format!("node{node}/cpulist"))).ok();
    let mut nodes: Vec<Cores> = (0..)
        .map_while(of)
        .map(|list| numbers(&list).filter(|core| allowed.contains(*core)).collect::<Cores>())
        .collect();
    if nodes.is_empty() {
        nodes.push(*allowed);
    }
    nodes
}

/// The numbers of a list as the kernel writes it: `0-3,8`.
fn numbers(list: &str) -> impl Iterator<Item = usize> + '_ {
    list.trim()
        .split(',')
        .filter_map(|part| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            Some(from.parse::<usize>().ok()?..=to.parse::<usize>().ok()?.min(Cores::MOST))
        })
        .flatten()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    impl Machine {
        /// One with these nodes, and so many idle cores.
        pub(in crate::pager) fn fake(nodes: &[&[usize]], idle: usize) -> Self {
            let nodes: Vec<Cores> = nodes.iter().map(|node| node.iter().copied().collect()).collect();
            let allowed = nodes.iter().flat_map(Cores::iter).collect();
            Self { allowed, nodes, idle: Some(idle) }
        }
    }

    #[test]
    fn the_kernels_lists_are_read() {
        assert_eq!(numbers("0-2,8,10-11\n").collect::<Vec<_>>(), [0, 1, 2, 8, 10, 11]);
        assert_eq!(numbers("\n").count(), 0, "a node of memory alone");
        assert_eq!(running("0.20 0.18 0.12 3/80 11206\n"), Some(3));
        assert_eq!(running("what"), None);
    }

    #[test]
    fn this_machine_has_cores_and_they_are_on_nodes() {
        let machine = Machine::this();
        assert!(!machine.allowed().is_empty());
        assert!(machine.allowed().iter().all(|core| machine.nodes.iter().any(|node| node.contains(core))));
    }
}

//! What can be seen of a VM's threads: who goes to sleep most, and on which core it ran last (proc(5)).

use std::collections::HashMap;
use std::fs;

/// A thread has a part in a VM's faults from this share of all sleeps on: one of so many.
const PART: u64 = 8;

/// The threads of a VM that have gone to sleep since it was looked at before, with their cores, the most often first.
#[derive(Clone, Debug, Default)]
pub(in crate::pager) struct Look {
    threads: Vec<(u64, usize)>,
}

impl Look {
    /// Of pairs: how often a thread went to sleep, and its core.
    pub(super) fn of(threads: impl Iterator<Item = (u64, usize)>) -> Self {
        let mut threads: Vec<_> = threads.collect();
        threads.sort_unstable_by_key(|(sleeps, _)| std::cmp::Reverse(*sleeps));
        let all: u64 = threads.iter().map(|(sleeps, _)| sleeps).sum();
        threads.retain(|(sleeps, _)| *sleeps > 0 && sleeps * PART >= all);
        Self { threads }
    }

    /// Threads that have a part in it.
    pub(super) fn threads(&self) -> usize {
        self.threads.len()
    }

    /// Their cores.
    pub(super) fn cores(&self) -> impl Iterator<Item = usize> + '_ {
        self.threads.iter().map(|(_, core)| *core)
    }

    /// The core of the one that has the largest part.
    pub(super) fn busiest(&self) -> Option<usize> {
        self.cores().next()
    }

    /// The core of the one that has no equal: three quarters of all are its.
    pub(super) fn alone(&self) -> Option<usize> {
        let all: u64 = self.threads.iter().map(|(sleeps, _)| sleeps).sum();
        let (most, core) = self.threads.first()?;
        (most * 4 >= all * 3).then_some(*core)
    }
}

/// The threads of one process, as they were when they were looked at last.
#[derive(Debug)]
pub(super) struct Tasks {
    pid: u32,
    sleeps: HashMap<u32, u64>,
}

impl Tasks {
    pub(super) fn new(pid: u32) -> Self {
        Self { pid, sleeps: HashMap::new() }
    }

    /// Looks once more. `None` where its threads cannot be seen: another user's under hidepid, or it is gone.
    ///
    /// Every fault puts its thread to sleep: who faults most is who sleeps most often.
    pub(super) fn look(&mut self) -> Option<Look> {
        let folder = format!("/proc/{}/task", self.pid);
        let mut seen = HashMap::with_capacity(self.sleeps.len());
        let mut threads = Vec::new();
        for entry in fs::read_dir(&folder).ok()? {
            let name = entry.ok()?.file_name();
            let Some(thread) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // One that ends meanwhile is nobody.
            let Some(slept) = read(&folder, thread, "status").and_then(|text| sleeps(&text)) else {
                continue;
            };
            seen.insert(thread, slept);
            let since = slept.saturating_sub(self.sleeps.get(&thread).copied().unwrap_or(slept));
            if since > 0
                && let Some(core) = read(&folder, thread, "stat").and_then(|text| last_core(&text))
            {
                threads.push((since, core));
            }
        }
        self.sleeps = seen;
        Some(Look::of(threads.into_iter()))
    }
}

fn read(folder: &str, thread: u32, file: &str) -> Option<String> {
    fs::read_to_string(format!("{folder}/{thread}/{file}")).ok()
}

/// How often a thread went to sleep of its own accord.
fn sleeps(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
    line.trim().parse().ok()
}

/// Field 39 of stat. The second one is a name in parentheses, and may hold anything.
fn last_core(stat: &str) -> Option<usize> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(36)?.parse().ok()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_the_kernel_are_read() {
        assert_eq!(
            sleeps("Name:\tvcpu\nvoluntary_ctxt_switches:\t57\nnonvoluntary_ctxt_switches:\t9\n"),
            Some(57)
        );
        // Each field is its own number, as proc(5) counts them.
        let stat = (3..=52).fold("7 (a ) b)".to_owned(), |line, field| format!("{line} {field}"));
        assert_eq!(last_core(&stat), Some(39));
        assert_eq!((sleeps(""), last_core("7 (cut")), (None, None));
    }

    #[test]
    fn only_threads_with_a_part_in_it_count() {
        let look = Look::of([(1, 5), (100, 2), (0, 4), (60, 1)].into_iter());
        assert_eq!(look.cores().collect::<Vec<_>>(), [2, 1]);
        assert_eq!((look.busiest(), look.alone(), look.threads()), (Some(2), None, 2));
        assert_eq!(Look::of([(100, 2), (30, 1)].into_iter()).alone(), Some(2));
        assert_eq!(Look::of(std::iter::empty()).alone(), None);
    }

    #[test]
    fn a_thread_that_sleeps_and_wakes_is_seen() {
        let mut tasks = Tasks::new(std::process::id());
        tasks.look().unwrap();
        // Each word wakes the other one.
        let (ping, pinged) = std::sync::mpsc::channel::<()>();
        let (pong, ponged) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            for () in pinged {
                if pong.send(()).is_err() {
                    break;
                }
            }
        });
        for _ in 0..200 {
            ping.send(()).unwrap();
            ponged.recv().unwrap();
        }
        assert!(tasks.look().unwrap().threads() > 0);
        drop(ping);
        other.join().unwrap();
        assert!(Tasks::new(u32::MAX >> 1).look().is_none(), "there is no such process");
    }
}

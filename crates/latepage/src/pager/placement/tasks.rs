//! What can be seen of a VM's threads: who goes to sleep most, and on which core it ran last (proc(5)).

use std::collections::HashMap;
use std::fs;

/// A thread has a part in a VM's faults from this share of all sleeps on: one of so many.
const PART: u64 = 8;

/// The threads of a VM that have gone to sleep since it was looked at before, with their cores, the most often first.
#[derive(Clone, Debug, Default)]
pub(in crate::pager) struct Look {
    threads: Vec<Sleeper>,
}

/// A thread that has gone to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sleeper {
    /// Its number.
    pub(super) thread: u32,
    /// How often it did.
    pub(super) sleeps: u64,
    /// The core that it ran on last.
    pub(super) core: usize,
}

impl Look {
    pub(super) fn of(mut threads: Vec<Sleeper>) -> Self {
        threads.sort_unstable_by_key(|thread| std::cmp::Reverse(thread.sleeps));
        let all: u64 = threads.iter().map(|thread| thread.sleeps).sum();
        threads.retain(|thread| thread.sleeps > 0 && thread.sleeps * PART >= all);
        Self { threads }
    }

    /// Threads that have a part in it.
    pub(super) fn threads(&self) -> usize {
        self.threads.len()
    }

    /// Their cores.
    pub(super) fn cores(&self) -> impl Iterator<Item = usize> + '_ {
        self.threads.iter().map(|thread| thread.core)
    }

    /// The one that has the largest part.
    pub(super) fn busiest(&self) -> Option<Sleeper> {
        self.threads.first().copied()
    }

    /// The one that has no equal: three quarters of all are its.
    pub(super) fn alone(&self) -> Option<Sleeper> {
        let all: u64 = self.threads.iter().map(|thread| thread.sleeps).sum();
        self.busiest().filter(|first| first.sleeps * 4 >= all * 3)
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
                threads.push(Sleeper { thread, sleeps: since, core });
            }
        }
        self.sleeps = seen;
        Some(Look::of(threads))
    }

    /// Where one of its threads ran last: a hundredth of what a look costs where there are many.
    pub(super) fn core_of(&self, thread: u32) -> Option<usize> {
        last_core(&read(&format!("/proc/{}/task", self.pid), thread, "stat")?)
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
        let look = |threads: &[(u64, usize)]| {
            let sleepers = threads.iter().zip(1..);
            Look::of(sleepers.map(|(&(sleeps, core), thread)| Sleeper { thread, sleeps, core }).collect())
        };
        let two = look(&[(1, 5), (100, 2), (0, 4), (60, 1)]);
        assert_eq!(two.cores().collect::<Vec<_>>(), [2, 1]);
        assert_eq!((two.busiest(), two.alone()), (Some(Sleeper { thread: 2, sleeps: 100, core: 2 }), None));
        assert_eq!(look(&[(100, 2), (30, 1)]).alone().map(|sleeper| sleeper.core), Some(2));
        assert_eq!(look(&[]).alone(), None);
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
        let busiest = tasks.look().unwrap().busiest().unwrap();
        assert!(tasks.core_of(busiest.thread).is_some());
        drop(ping);
        other.join().unwrap();
        assert!(Tasks::new(u32::MAX >> 1).look().is_none(), "there is no such process");
    }
}

//! Where a thread may run, and before whom.

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::CpuSet;

/// A set of cores, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cores(CpuSet);

impl Cores {
    /// The most cores that a set can name: their numbers are below this.
    pub const MOST: usize = CpuSet::MAX_CPU;

    /// No core.
    pub fn none() -> Self {
        Self(CpuSet::new())
    }

    /// Those that this process may run on.
    ///
    /// # Errors
    /// The errno of sched_getaffinity(2): EINVAL where the machine has more than [`MOST`](Self::MOST).
    pub fn allowed() -> Result<Self, Errno> {
        rustix::thread::sched_getaffinity(None).map(Self)
    }

    /// Whether it has that core.
    pub fn contains(&self, core: usize) -> bool {
        core < Self::MOST && self.0.is_set(core)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.count() as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..Self::MOST).filter(|core| self.contains(*core))
    }
}

impl FromIterator<usize> for Cores {
    /// Those of these numbers; [`MOST`](Self::MOST) and above are left out.
    fn from_iter<I: IntoIterator<Item = usize>>(numbers: I) -> Self {
        let mut set = CpuSet::new();
        numbers.into_iter().filter(|core| *core < Self::MOST).for_each(|core| set.set(core));
        Self(set)
    }
}

/// A thread of this process, by the number that the kernel gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(Pid);

impl Thread {
    /// The one that calls.
    pub fn this() -> Self {
        Self(rustix::thread::gettid())
    }

    /// Has it run on these cores only.
    ///
    /// # Errors
    /// The errno of sched_setaffinity(2): EINVAL where none of them is there and allowed, ESRCH where the thread is gone.
    pub fn run_on(self, cores: &Cores) -> Result<(), Errno> {
        rustix::thread::sched_setaffinity(Some(self.0), &cores.0)
    }

    /// Where it may run.
    ///
    /// # Errors
    /// The errno of sched_getaffinity(2): EINVAL where the machine has more than [`Cores::MOST`], ESRCH where the thread is gone.
    pub fn cores(self) -> Result<Cores, Errno> {
        rustix::thread::sched_getaffinity(Some(self.0)).map(Cores)
    }

    /// Puts it into the real-time class SCHED_FIFO: 1 is the lowest priority there, 99 the highest.
    ///
    /// # Errors
    /// The errno of sched_setscheduler(2): EPERM without CAP_SYS_NICE or a large enough RLIMIT_RTPRIO.
    pub fn real_time(self, priority: u8) -> Result<(), Errno> {
        let parameter = libc::sched_param { sched_priority: i32::from(priority) };
        // SAFETY: the kernel reads one parameter, which outlives the call.
        let result =
            unsafe { libc::sched_setscheduler(self.0.as_raw_nonzero().get(), libc::SCHED_FIFO, &parameter) };
        if result == 0 { Ok(()) } else { Err(last_error()) }
    }

    /// Gives it a nice value, from -20, which is served first, to 19.
    ///
    /// # Errors
    /// The errno of setpriority(2): EACCES for a lower value than it had, without CAP_SYS_NICE or a large enough RLIMIT_NICE.
    pub fn nice(self, value: i8) -> Result<(), Errno> {
        rustix::process::setpriority_process(Some(self.0), i32::from(value))
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_it_was_made_of() {
        let set: Cores = [3, 0, Cores::MOST, usize::MAX].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 3]);
        assert_eq!((set.len(), set.is_empty(), Cores::none().is_empty()), (2, false, true));
        assert!(!set.contains(Cores::MOST));
    }

    #[test]
    fn a_thread_runs_where_it_is_told_to_and_nowhere_that_is_not_there() {
        let allowed = Cores::allowed().unwrap();
        std::thread::spawn(move || {
            let last = allowed.iter().last().unwrap();
            Thread::this().run_on(&[last].into_iter().collect()).unwrap();
            assert_eq!(Cores::allowed().unwrap().iter().collect::<Vec<_>>(), [last]);
            let missing = [Cores::MOST - 1].into_iter().collect();
            assert_eq!(Thread::this().run_on(&missing), Err(Errno::INVAL));
        })
        .join()
        .unwrap();
    }
}

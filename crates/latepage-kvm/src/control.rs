//! What the threads of one VM share: who may run, how far the job is, what every page should hold.
//!
//! One lock, taken when a vCPU enters or leaves the guest and at each of its reports (every 256 pages), never while guest
//! memory is touched: whoever touches it may wait for a pager.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::VmError;
use crate::event::{Event, Events};
use crate::expectation::Expectations;
use crate::fingerprint::{PAGE, WORDS, render};
use crate::guest::Program;
use crate::guest::registers::Registers;
use crate::job::{Action, Job, JobReport, WRONG_LISTED};
use crate::memory::GuestMemory;
use crate::sys::kick::Kick;
use crate::system_registers::SystemRegisters;

/// The lot of one vCPU.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) registers: Registers,
    pub(crate) system: SystemRegisters,
    /// It has a program to run or to go on with.
    pub(crate) unfinished: bool,
    /// It has said hello since the VM was created or restored.
    greeted: bool,
    in_guest: bool,
    kick: Option<Kick>,
    /// Where KVM is to keep its clock, which it has not been told yet.
    pub(crate) clock: Option<u64>,
}

impl Slot {
    pub(crate) fn new(registers: Registers, system: SystemRegisters, unfinished: bool) -> Self {
        Self { registers, system, unfinished, greeted: false, in_guest: false, kick: None, clock: None }
    }
}

/// A job that runs, or waits for its VM to be resumed.
#[derive(Debug)]
pub(crate) struct ActiveJob {
    pub(crate) report: JobReport,
    /// What pages will hold when it is over, if it writes.
    pub(crate) after: Option<Expectations>,
    /// Pages discarded since it began, as (first, count).
    pub(crate) discarded: Vec<(u64, u64)>,
    pub(crate) next_mark: u64,
    pub(crate) mark_every: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) running: bool,
    quit: bool,
    pub(crate) slots: Vec<Slot>,
    pub(crate) job: Option<ActiveJob>,
    pub(crate) last: Option<JobReport>,
    pub(crate) expectations: Expectations,
    pub(crate) failed: Option<String>,
    pub(crate) first_instruction: Option<u64>,
}

/// How a vCPU came out of the guest.
#[derive(Debug)]
pub(crate) enum Left {
    /// It was kicked; it may go on from these registers.
    Paused(Registers),
    /// Its program is over.
    Done(Registers),
    /// It said hello.
    Greeted,
    /// It cannot go on.
    Failed(String),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) events: Events,
    /// Set while stand-ins should leave their programs.
    pub(crate) pause: AtomicBool,
    origin: u64,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while pages are being discarded.
    discarding: Mutex<()>,
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Control {
    pub(crate) fn new(
        memory: Arc<GuestMemory>,
        origin: u64,
        running: bool,
        slots: Vec<Slot>,
        expectations: Expectations,
        job: Option<ActiveJob>,
    ) -> Result<Self, VmError> {
        let state = State {
            running,
            quit: false,
            slots,
            job,
            last: None,
            expectations,
            failed: None,
            first_instruction: None,
        };
        let pause = AtomicBool::new(!running);
        let (state, changed, discarding) = (Mutex::new(state), Condvar::new(), Mutex::new(()));
        Ok(Self { memory, events: Events::new()?, pause, origin, state, changed, discarding })
    }

    /// Nanoseconds since the VM began to be created or restored.
    pub(crate) fn now(&self) -> u64 {
        monotonic() - self.origin
    }

    /// When the VM began to be created or restored.
    pub(crate) fn origin(&self) -> u64 {
        self.origin
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless the VM has failed.
    pub(crate) fn working(&self) -> Result<MutexGuard<'_, State>, VmError> {
        let state = self.lock();
        match &state.failed {
            Some(why) => Err(VmError::Failed(why.clone())),
            None => Ok(state),
        }
    }

    /// For whatever takes long: an error once the VM has failed or is being ended.
    pub(crate) fn going_on(&self) -> Result<(), VmError> {
        if self.working()?.quit {
            return Err(VmError::Failed("it was ended".into()));
        }
        Ok(())
    }

    // ---- the vCPU's side ----

    /// Waits until vCPU `index` has something to run, and returns its registers; none when the VM ends.
    pub(crate) fn enter(&self, index: usize, mut kick: Option<Kick>) -> Option<Registers> {
        let mut state = self.lock();
        loop {
            if state.quit {
                return None;
            }
            let running = state.running;
            let slot = &mut state.slots[index];
            if running && (slot.unfinished || !slot.greeted) {
                slot.in_guest = true;
                slot.kick = kick.take();
                return Some(if slot.greeted { slot.registers } else { Registers::plain(Program::Hello) });
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Where KVM is to keep the clock of vCPU `index`, if it has not been told yet.
    pub(crate) fn take_clock(&self, index: usize) -> Option<u64> {
        self.lock().slots[index].clock.take()
    }

    /// The guest says that the page at a guest-physical address begins with that byte.
    pub(crate) fn said(&self, gpa: u64, byte: u8) {
        let Some(page) = self.memory.layout().page_of_gpa(gpa) else { return };
        let history = self.lock().expectations.history(page).to_vec();
        let mut expected = [0; WORDS];
        render(&history, page, &mut expected);
        if expected[0].to_le_bytes()[0] != byte {
            self.wrong(gpa);
        }
    }

    /// Takes note of how vCPU `index` came out. From here on it cannot be kicked.
    pub(crate) fn leave(&self, index: usize, left: Left, system: Option<SystemRegisters>) {
        let mut state = self.lock();
        let slot = &mut state.slots[index];
        slot.in_guest = false;
        if let Some(kick) = slot.kick.take() {
            kick.clear();
        }
        if let Some(system) = system {
            slot.system = system;
        }
        match left {
            // Where it was paused while it said hello, it will say it again.
            Left::Paused(registers) if slot.greeted => slot.registers = registers,
            Left::Paused(_) => {}
            Left::Done(registers) => {
                slot.registers = registers;
                slot.unfinished = false;
                self.finish(&mut state);
            }
            Left::Greeted => slot.greeted = true,
            Left::Failed(why) => self.fail(&mut state, why),
        }
        self.changed.notify_all();
    }

    /// The first sign of life.
    pub(crate) fn hello(&self) {
        let ns = self.now();
        let mut state = self.lock();
        if state.first_instruction.is_none() {
            state.first_instruction = Some(ns);
            self.events.push(Event::FirstInstruction { ns });
        }
    }

    /// vCPU `index` has come as far as `registers` say.
    pub(crate) fn progress(&self, index: usize, registers: &Registers) {
        let ns = self.now();
        let mut state = self.lock();
        state.slots[index].registers.rbx = registers.rbx;
        let done = state.slots.iter().map(|slot| slot.registers.rbx).sum();
        let Some(job) = &mut state.job else { return };
        job.report.done = done;
        if job.next_mark <= done {
            job.report.marks.push((done, ns));
            job.next_mark = (done / job.mark_every + 1) * job.mark_every;
            self.events.push(Event::Progress { done, pages: job.report.pages, ns });
        }
    }

    /// A vCPU found the page at a guest-physical address wrong.
    pub(crate) fn wrong(&self, gpa: u64) {
        let ns = self.now();
        let Some(page) = self.memory.layout().page_of_gpa(gpa) else { return };
        let mut state = self.lock();
        let Some(job) = &state.job else { return };
        if job.discarded.iter().any(|(first, count)| (*first..first + count).contains(&page)) {
            // Somebody discarded the page while the guest looked at it: it must hold what it should hold now.
            drop(state);
            let settled = self.settle_discards();
            let history = self.lock().expectations.history(page).to_vec();
            let right = page_is(&self.memory, page, &history);
            drop(settled);
            state = self.lock();
            if right {
                if let Some(job) = &mut state.job {
                    job.report.superseded += 1;
                }
                return;
            }
        }
        let Some(job) = &mut state.job else { return };
        job.report.wrong_pages += 1;
        if job.report.wrong.len() < WRONG_LISTED {
            job.report.wrong.push(page);
            self.events.push(Event::WrongPage { page, ns });
        }
    }

    /// Keeps discards out, or waits until one is over.
    pub(crate) fn settle_discards(&self) -> MutexGuard<'_, ()> {
        self.discarding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, state: &mut State) {
        if state.slots.iter().any(|slot| slot.unfinished) {
            return;
        }
        if let Some(mut job) = state.job.take() {
            job.report.done = state.slots.iter().map(|slot| slot.registers.rbx).sum();
            self.end_job(state, job);
        }
    }

    fn end_job(&self, state: &mut State, mut job: ActiveJob) {
        job.report.ended_ns = Some(self.now());
        if let Some(after) = job.after {
            state.expectations = after;
        }
        state.last = Some(job.report.clone());
        self.events.push(Event::JobDone { report: job.report });
    }

    fn fail(&self, state: &mut State, why: String) {
        if state.failed.is_none() {
            self.events.push(Event::Failed { error: why.clone(), ns: self.now() });
            state.failed = Some(why);
        }
        self.stop_guest(state);
    }

    /// A thread that is no vCPU's has found that the VM cannot go on.
    pub(crate) fn cannot_go_on(&self, why: String) {
        let mut state = self.lock();
        self.fail(&mut state, why);
        self.changed.notify_all();
    }

    fn stop_guest(&self, state: &mut State) {
        state.running = false;
        self.pause.store(true, Ordering::Release);
        state.slots.iter().filter_map(|slot| slot.kick.as_ref()).for_each(Kick::kick);
    }

    // ---- the VM's side ----

    /// Stops the guest and waits until every vCPU has left it. Where one has not, the guest runs on as it did.
    pub(crate) fn pause(&self, limit: Duration) -> Result<(), VmError> {
        let mut state = self.lock();
        let mut ran = state.running;
        self.stop_guest(&mut state);
        let deadline = Instant::now() + limit;
        loop {
            if state.running {
                // Somebody let it run meanwhile.
                ran = true;
                self.stop_guest(&mut state);
            }
            let inside = state.slots.iter().filter(|slot| slot.in_guest).count();
            if inside == 0 {
                break;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                if ran && !state.quit && state.failed.is_none() {
                    self.let_run(&mut state);
                }
                return Err(VmError::Stuck { vcpus: inside, seconds: limit.as_secs() });
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match &state.failed {
            Some(why) => Err(VmError::Failed(why.clone())),
            None => Ok(()),
        }
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) -> Result<(), VmError> {
        self.let_run(&mut *self.working()?);
        Ok(())
    }

    fn let_run(&self, state: &mut State) {
        state.running = true;
        self.pause.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// Has the vCPUs run a job; their registers are ready.
    pub(crate) fn start(&self, job: ActiveJob, registers: Vec<Registers>) {
        let mut state = self.lock();
        for (slot, registers) in state.slots.iter_mut().zip(registers) {
            slot.registers = registers;
            slot.unfinished = true;
        }
        state.job = Some(job);
        self.changed.notify_all();
    }

    /// Ends the job as it stands. The guest must be paused.
    pub(crate) fn drop_job(&self) {
        let mut state = self.lock();
        state.slots.iter_mut().for_each(|slot| slot.unfinished = false);
        if let Some(mut job) = state.job.take() {
            job.report.done = state.slots.iter().map(|slot| slot.registers.rbx).sum();
            self.end_job(&mut state, job);
        }
        self.changed.notify_all();
    }

    /// Waits until no job runs, and returns the report of the last; none if that takes longer than `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Result<Option<JobReport>, VmError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = self.lock();
        loop {
            if let Some(why) = &state.failed {
                return Err(VmError::Failed(why.clone()));
            }
            if state.job.is_none() {
                return Ok(state.last.clone());
            }
            if state.quit {
                return Err(VmError::Failed("it was ended".into()));
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()) else { return Ok(None) };
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Has all vCPU threads end; true if they have left the guest within `limit`.
    pub(crate) fn quit(&self, limit: Duration) -> bool {
        self.lock().quit = true;
        self.changed.notify_all();
        !matches!(self.pause(limit), Err(VmError::Stuck { .. }))
    }
}

/// Whether page `page` holds, byte for byte, what `history` makes of it. Reads the guest view.
pub(crate) fn page_is(memory: &GuestMemory, page: u64, history: &[u64]) -> bool {
    let mut expected = [0; WORDS];
    render(history, page, &mut expected);
    let mut found = [0; PAGE as usize];
    memory.read(memory.layout().offset_of(page), &mut found);
    found.chunks_exact(8).zip(expected).all(|(found, expected)| found == expected.to_le_bytes())
}

impl ActiveJob {
    /// A job that begins now.
    pub(crate) fn begin(job: Job, pages: u64, started_ns: u64, after: Option<Expectations>) -> Self {
        let counted = 1 << 24;
        let tenth = if job.action == Action::Count { counted } else { pages.div_ceil(10) };
        let mark_every = job.progress_every.unwrap_or(tenth).max(1);
        let report = JobReport {
            job,
            pages,
            done: 0,
            wrong_pages: 0,
            wrong: Vec::new(),
            superseded: 0,
            started_ns,
            ended_ns: None,
            marks: Vec::new(),
        };
        Self { report, after, discarded: Vec::new(), next_mark: mark_every, mark_every }
    }
}

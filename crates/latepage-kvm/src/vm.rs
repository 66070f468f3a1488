//! A VM: created or restored, given jobs, paused, saved, discarded from, and compared with what it should hold.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use latepage::attachment::Form;

use crate::config::{DiscardRange, MemoryFrom, RestoreConfig, VmConfig};
use crate::control::{ActiveJob, Control, Slot, monotonic, page_is};
use crate::error::VmError;
use crate::event::Event;
use crate::expectation::Expectations;
use crate::fingerprint::PAGE;
use crate::guest::order::Walk;
use crate::guest::registers::Registers;
use crate::guest::{Program, system};
use crate::handshake::PagerLink;
use crate::job::{Action, Job, JobReport, WRONG_LISTED, slices};
use crate::late::Late;
use crate::layout::{CLASSES, CLASSES_LIMIT, GuestLayout, LIST, SEEDS, SYSTEM};
use crate::machine::{GuestKind, Machine};
use crate::memory::{Backing, GuestMemory};
use crate::notify::Notify;
use crate::report::{Comparison, Report, SaveReport};
use crate::restore::{attach, restore_memory, resume_job};
use crate::snapshot::{self, SavedJob, SavedState, SavedVcpu};
use crate::supply::{Supply, SupplyReport};
use crate::system_registers::SystemRegisters;

/// How long vCPUs may take to leave the guest: one that waits for memory leaves when it gets it.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// The same when the VM ends, and waits no longer for anything.
const QUIT_LIMIT: Duration = Duration::from_secs(1);
/// The most vCPUs on KVM, and the most threads that stand in for them.
const VCPUS: u32 = 64;
const THREADS: u32 = 1024;

/// A VM. Dropping it ends it.
#[derive(Debug)]
pub struct Vm {
    name: String,
    control: Arc<Control>,
    machine: Option<Machine>,
    link: Option<PagerLink>,
    supply: Option<Arc<dyn Supply>>,
    ready_ns: u64,
    /// Held by what must not meet another of its kind: starting a job, saving, discarding, comparing. Holds the digests of the
    /// pages of the system area that are not zero.
    system: Mutex<BTreeMap<u64, u64>>,
}

impl Vm {
    /// Creates a VM with zeroed memory. It runs, and waits for jobs.
    ///
    /// # Errors
    /// [`VmError`]: what was asked for cannot be, or the machine lacks it.
    pub fn create(config: &VmConfig) -> Result<Self, VmError> {
        let origin = monotonic();
        check_name(&config.name)?;
        let kind = config.guest.resolve()?;
        check_vcpus(config.vcpus, kind)?;
        let layout = GuestLayout::new(config.memory, config.split)?;
        let memory = Arc::new(GuestMemory::new(layout, config.backing, true)?);
        let mut digests = BTreeMap::new();
        for (gpa, bytes) in system::pages(memory.layout()) {
            memory.install(gpa, &bytes);
            note_digests(&mut digests, gpa, &bytes);
        }
        let expectations = Expectations::new(memory.layout().pages());
        let slot = || Slot::new(Registers::plain(Program::Hello), SystemRegisters::default(), false);
        let slots = (0..config.vcpus).map(|_| slot()).collect();
        let control = Control::new(memory, origin, true, slots, expectations, None)?;
        Self::start(config.name.clone(), kind, control, (None, None), digests)
    }

    /// Restores a VM. Unless it shall stay paused, it goes on with the job in whose middle it was saved.
    ///
    /// # Errors
    /// [`VmError`]: a file is missing or not what it should be, the pager is not there, or the machine lacks something.
    pub fn restore(config: &RestoreConfig) -> Result<Self, VmError> {
        let origin = monotonic();
        let path = &config.state_file;
        let refused = |why: String| VmError::State { path: path.clone(), why };
        let state = SavedState::read(path)?;
        let name = config.name.clone().unwrap_or(state.name);
        check_name(&name)?;
        let vcpus = state.vcpus.len() as u32;
        let kind = config.guest.resolve()?;
        check_vcpus(vcpus, kind).map_err(|error| refused(error.to_string()))?;
        if state.programs != system::identity() {
            return Err(refused(
                "it was saved with other guest programs; restore it with the latepage that saved it".into(),
            ));
        }
        let layout = GuestLayout::from_regions(state.regions).map_err(refused)?;
        let expectations = Expectations::restore(state.pages, layout.pages()).map_err(refused)?;
        let job =
            state.job.map(|saved| resume_job(saved, &layout, &expectations)).transpose().map_err(refused)?;
        let saved = match state.backing {
            Backing::MemoryFile => Backing::Private,
            other => other,
        };
        let memory = Arc::new(restore_memory(config, layout, saved)?);
        let link = attach(config, &memory, &name, vcpus, kind)?;
        let supply: Option<Arc<dyn Supply>> = match &config.memory {
            MemoryFrom::Late(late) => Some(Arc::new(Late::new(&memory, late, vcpus as usize, kind)?)),
            MemoryFrom::Notify(notify) => Some(Arc::new(Notify::new(&memory, notify, &name, vcpus, kind)?)),
            _ => None,
        };
        let slots: Vec<Slot> =
            state.vcpus.iter().map(|vcpu| Slot::new(vcpu.registers, vcpu.system, vcpu.unfinished)).collect();
        let control = Control::new(memory, origin, !config.paused, slots, expectations, job)?;
        Self::start(name, kind, control, (link, supply), state.system.into_iter().collect())
    }

    fn start(
        name: String,
        kind: GuestKind,
        control: Control,
        (mut link, supply): (Option<PagerLink>, Option<Arc<dyn Supply>>),
        digests: BTreeMap<u64, u64>,
    ) -> Result<Self, VmError> {
        let control = Arc::new(control);
        if let Some(link) = &mut link {
            link.watch(&control)?;
        }
        if let Some(supply) = &supply {
            supply.start(&control)?;
        }
        let ready_ns = control.now();
        let machine = Some(Machine::start(kind, &control, supply.as_deref())?);
        Ok(Self { name, control, machine, link, supply, ready_ns, system: Mutex::new(digests) })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.control.memory
    }

    /// Whether KVM runs the guest or threads stand in.
    pub fn guest(&self) -> GuestKind {
        self.machine.as_ref().map_or(GuestKind::Threads, Machine::kind)
    }

    fn operation(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.system.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a job, and does not wait for it. A paused VM begins with it when it is resumed.
    ///
    /// # Errors
    /// [`VmError::Job`], [`VmError::Busy`] while another runs, [`VmError::Failed`].
    pub fn run(&self, job: Job) -> Result<(), VmError> {
        let mut digests = self.operation();
        let layout = self.memory().layout();
        job.check(layout).map_err(VmError::Job)?;
        let (after, expectations, vcpus) = {
            let state = self.control.working()?;
            if let Some(active) = &state.job {
                return Err(VmError::Busy(format!("it runs a job ({:?}) already", active.report.job.action)));
            }
            let after = after(&job, layout, &state.expectations).map_err(VmError::Job)?;
            (after, state.expectations.clone(), state.slots.len())
        };
        let registers = self.prepare(&job, vcpus, &expectations, &mut digests)?;
        let pages = job.size(layout);
        self.control.start(ActiveJob::begin(job, pages, self.control.now(), after), registers);
        Ok(())
    }

    /// Puts a job's lists into guest memory, and makes the registers of every vCPU.
    fn prepare(
        &self,
        job: &Job,
        vcpus: usize,
        expectations: &Expectations,
        digests: &mut BTreeMap<u64, u64>,
    ) -> Result<Vec<Registers>, VmError> {
        let layout = self.memory().layout();
        let list = job.list(vcpus);
        let uniform = expectations.uniform().filter(|_| list.is_none());
        let program = match (job.action, list.is_some(), uniform.is_some()) {
            (Action::Count, ..) => return Ok(vec![Registers::plain(Program::Count); vcpus]),
            (Action::Fill | Action::Dirty, false, _) => Program::Fill,
            (Action::Fill | Action::Dirty, true, _) => Program::FillList,
            (Action::Verify, false, true) => Program::Verify,
            (Action::Verify, false, false) => Program::VerifyMixed,
            (Action::Verify, true, _) => Program::VerifyList,
            (Action::Touch, false, _) => Program::Touch,
            (Action::Touch, true, _) => Program::TouchList,
            (Action::Say, false, _) => Program::Say,
            (Action::Say, true, _) => Program::SayList,
        };
        if matches!(program, Program::VerifyMixed | Program::VerifyList) {
            if layout.pages() > CLASSES_LIMIT {
                return Err(VmError::Job(
                    "the guest checks pages of different contents in up to 4 GiB; compare them".into(),
                ));
            }
            let seeds =
                (0..=u8::MAX).flat_map(|class| expectations.spread_seed(class).to_le_bytes()).collect();
            self.write_system(SEEDS, seeds, digests);
            self.write_system(CLASSES, expectations.classes().to_vec(), digests);
        }
        let seed = match (job.action, uniform) {
            (Action::Verify, Some(class)) => expectations.spread_seed(class),
            _ => crate::fingerprint::spread(job.seed),
        };
        let slices = slices(job.size(layout), vcpus);
        let Some(list) = list else {
            return Ok(slices
                .map(|(first, count)| {
                    Registers::walking(program, layout, seed, first, &Walk::new(job.order, job.seed, count))
                })
                .collect());
        };
        self.write_system(LIST, list.iter().flat_map(|page| page.to_le_bytes()).collect(), digests);
        Ok(slices.map(|(first, count)| Registers::listed(program, layout, seed, first, count)).collect())
    }

    /// Writes whole pages of the system area through the guest view, as a device would.
    fn write_system(&self, gpa: u64, mut bytes: Vec<u8>, digests: &mut BTreeMap<u64, u64>) {
        bytes.resize(bytes.len().next_multiple_of(PAGE as usize), 0);
        self.memory().write(gpa, &bytes);
        note_digests(digests, gpa, &bytes);
    }

    /// Waits until no job runs, and returns the report of the last; none if that takes longer than `timeout`, or none ever ran.
    ///
    /// # Errors
    /// [`VmError::Failed`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<JobReport>, VmError> {
        self.control.wait(timeout)
    }

    /// Takes every vCPU out of the guest.
    ///
    /// # Errors
    /// [`VmError::Stuck`] if some wait for memory that does not come, [`VmError::Failed`].
    pub fn pause(&self) -> Result<(), VmError> {
        self.control.pause(PAUSE_LIMIT)
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// [`VmError::Failed`].
    pub fn resume(&self) -> Result<(), VmError> {
        self.control.resume()
    }

    /// Ends the job as far as it is, counting for ever above all.
    ///
    /// # Errors
    /// [`VmError::Busy`] in the middle of a job that writes: nobody would know what its pages hold. As [`pause`](Self::pause).
    pub fn stop(&self) -> Result<(), VmError> {
        let _operation = self.operation();
        self.while_paused(|| {
            let writes = self.control.lock().job.as_ref().is_some_and(|job| job.after.is_some());
            if writes {
                return Err(VmError::Busy(
                    "a job that writes is not stopped in the middle; wait for it".into(),
                ));
            }
            self.control.drop_job();
            Ok(())
        })
    }

    /// Has KVM write the time of a vCPU (struct pvclock_vcpu_time_info, 32 bytes) to that guest-physical address and keep it there, as
    /// a guest's kernel asks it to. KVM writes when the vCPU next runs. A running VM is paused for the moment.
    ///
    /// # Errors
    /// [`VmError::Config`]: there is no such vCPU or memory, or no KVM. As [`pause`](Self::pause).
    pub fn clock(&self, vcpu: usize, gpa: u64) -> Result<(), VmError> {
        let _operation = self.operation();
        let inside = self.memory().layout().offset_of_gpa(gpa).is_some() && gpa % PAGE <= PAGE - 32;
        if self.guest() != GuestKind::Kvm || !inside || !gpa.is_multiple_of(4) {
            return Err(VmError::Config(format!(
                "no clock can be kept at {gpa:#x} by a guest on {}: it takes KVM and 32 bytes of one page",
                self.guest()
            )));
        }
        self.while_paused(|| {
            let mut state = self.control.lock();
            let slot = state.slots.get_mut(vcpu);
            slot.ok_or_else(|| VmError::Config(format!("there is no vCPU {vcpu}")))?.clock = Some(gpa);
            Ok(())
        })
    }

    fn while_paused<T>(&self, act: impl FnOnce() -> Result<T, VmError>) -> Result<T, VmError> {
        let was_running = self.control.working()?.running;
        let result = self.pause().and_then(|()| act());
        if was_running {
            self.resume()?;
        }
        result
    }

    /// Saves the VM to a memory file and a state file, each whole or not at all. A running VM is paused for the time.
    ///
    /// All of its memory is read, and so brought in first if a pager has it.
    ///
    /// # Errors
    /// [`VmError::File`]; as [`pause`](Self::pause).
    pub fn save(&self, state_file: &Path, memory_file: &Path) -> Result<SaveReport, VmError> {
        if state_file == memory_file {
            return Err(VmError::Config("the state file and the memory file must be two files".into()));
        }
        let digests = self.operation();
        let began = self.control.now();
        self.while_paused(|| {
            let data_bytes = snapshot::write_memory(self.memory(), memory_file, || self.control.going_on())?;
            self.saved_state(&digests).write(state_file)?;
            Ok(SaveReport {
                memory_bytes: self.memory().layout().bytes(),
                data_bytes,
                ns: self.control.now() - began,
            })
        })
    }

    fn saved_state(&self, digests: &BTreeMap<u64, u64>) -> SavedState {
        let state = self.control.lock();
        let vcpus = state.slots.iter().map(|slot| SavedVcpu {
            registers: slot.registers,
            system: slot.system,
            unfinished: slot.unfinished,
        });
        let job = state.job.as_ref().map(|active| SavedJob {
            job: active.report.job.clone(),
            wrong_pages: active.report.wrong_pages,
            wrong: active.report.wrong.clone(),
            superseded: active.report.superseded,
            discarded: active.discarded.clone(),
        });
        SavedState::new(
            self.name.clone(),
            self.guest().to_string(),
            system::identity(),
            self.memory().backing(),
            self.memory().layout().regions().to_vec(),
            vcpus.collect(),
            digests.iter().map(|(page, digest)| (*page, *digest)).collect(),
            state.expectations.save(),
            job,
        )
    }

    /// Gives pages back to the host, as a balloon does; they read as zero from then on. The guest may run meanwhile. Waits until
    /// a pager has taken note.
    ///
    /// # Errors
    /// [`VmError::Range`]; [`VmError::Busy`] where a job is writing those pages; [`VmError::Call`].
    pub fn discard(&self, range: DiscardRange) -> Result<(), VmError> {
        let _operation = self.operation();
        let (first, count) = self.pages_of(range).map_err(VmError::Range)?;
        let pages = first..first + count;
        {
            let mut state = self.control.working()?;
            if let Some(job) = &mut state.job {
                let written = job.report.job.written(self.memory().layout());
                if written.iter().any(|(start, count)| *start < pages.end && start + count > pages.start) {
                    return Err(VmError::Busy("a job is writing those pages; wait for it".into()));
                }
                job.discarded.push((first, count));
            }
        }
        // A vCPU that meets the page half gone asks what it should hold: it shall get an answer only when that is settled.
        let _settling = self.control.settle_discards();
        let (offset, length) = (self.memory().layout().offset_of(first), count * PAGE);
        match &self.supply {
            Some(supply) => supply.discard(&self.control, offset, length)?,
            None => self.memory().discard(offset, length)?,
        }
        let mut state = self.control.lock();
        state.expectations.zero(pages.clone());
        if let Some(after) = state.job.as_mut().and_then(|job| job.after.as_mut()) {
            after.zero(pages);
        }
        Ok(())
    }

    fn pages_of(&self, range: DiscardRange) -> Result<(u64, u64), String> {
        let layout = self.memory().layout();
        let (first, count) = match range {
            DiscardRange::Pages { first, count } => (first, count),
            DiscardRange::Gpa { gpa, bytes } => {
                let page =
                    layout.page_of_gpa(gpa).ok_or_else(|| format!("no fingerprint page is at {gpa:#x}"))?;
                let last = gpa.checked_add(bytes.max(1) - 1).and_then(|last| layout.page_of_gpa(last));
                if last.is_none_or(|last| last - page != (bytes.max(1) - 1) / PAGE) {
                    return Err(format!("{gpa:#x}+{bytes:#x} does not lie in one region"));
                }
                if !gpa.is_multiple_of(PAGE) || !bytes.is_multiple_of(PAGE) {
                    return Err(format!("{gpa:#x}+{bytes:#x} are no whole pages of 4096 bytes"));
                }
                (page, bytes / PAGE)
            }
        };
        if count == 0 || first.checked_add(count).is_none_or(|end| end > layout.pages()) {
            return Err(format!("pages {first}+{count} are not all among the VM's {} pages", layout.pages()));
        }
        let unit = self.memory().backing().page_size() / PAGE;
        if !first.is_multiple_of(unit) || !count.is_multiple_of(unit) {
            return Err(format!(
                "with {} memory, first and count must be multiples of {unit} pages",
                self.memory().backing()
            ));
        }
        Ok((first, count))
    }

    /// Compares every byte of guest memory, through the guest view, with what it should be.
    ///
    /// # Errors
    /// [`VmError::Busy`] while a job writes.
    pub fn compare(&self) -> Result<Comparison, VmError> {
        let digests = self.operation();
        let expectations = {
            let state = self.control.working()?;
            if state.job.as_ref().is_some_and(|job| job.after.is_some()) {
                return Err(VmError::Busy("a job is writing; compare when it is over".into()));
            }
            state.expectations.clone()
        };
        let pages = self.memory().layout().pages();
        let mut found = Comparison { pages, wrong_pages: 0, wrong: Vec::new(), wrong_system: Vec::new() };
        for page in 0..pages {
            self.control.going_on()?;
            if !page_is(self.memory(), page, expectations.history(page)) {
                found.wrong_pages += 1;
                if found.wrong.len() < WRONG_LISTED {
                    found.wrong.push(page);
                }
            }
        }
        let zero = system::digest(&[0; PAGE as usize]);
        let mut bytes = [0; PAGE as usize];
        for page in 0..SYSTEM / PAGE {
            self.memory().read(page * PAGE, &mut bytes);
            if system::digest(&bytes) != *digests.get(&page).unwrap_or(&zero) {
                found.wrong_system.push(page * PAGE);
            }
        }
        Ok(found)
    }

    /// The VM at a glance.
    pub fn report(&self) -> Report {
        let mut pager = self.link.as_ref().map(|link| (link.path().to_path_buf(), link.form().name()));
        let (late, notify) = match self.supply.as_ref().map(|supply| supply.report()) {
            Some(SupplyReport::Late(late)) => (Some(late), None),
            Some(SupplyReport::Notify(notify)) => (None, Some(notify)),
            None => (None, None),
        };
        if let Some(notify) = &notify {
            pager = Some((notify.socket.clone(), Form::Latepage.name()));
        }
        let state = self.control.lock();
        Report {
            name: self.name.clone(),
            pid: std::process::id(),
            guest: self.guest().name(),
            status: match (&state.failed, state.running) {
                (Some(_), _) => "failed",
                (None, true) => "running",
                (None, false) => "paused",
            },
            error: state.failed.clone(),
            vcpus: state.slots.len(),
            backing: self.memory().backing(),
            memory: self.memory().layout().bytes(),
            pages: self.memory().layout().pages(),
            contents: state.expectations.summary(),
            pager,
            shards: self.link.as_ref().map(PagerLink::shards),
            late,
            notify,
            origin_monotonic_ns: self.control.origin(),
            ready_ns: self.ready_ns,
            first_instruction_ns: state.first_instruction,
            job: state.job.as_ref().map(|job| job.report.clone()),
            last_job: state.last.clone(),
        }
    }

    /// The next event, if one is there or comes within `timeout`; without a timeout it waits for ever.
    pub fn next_event(&self, timeout: Option<Duration>) -> Option<Event> {
        self.control.events.take(timeout)
    }

    /// A descriptor that is readable while events wait.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.control.events.descriptor()
    }

    /// Ends the guest, and every wait for it. Nothing else can be done with the VM but looking at it.
    pub fn end(&self) {
        self.control.quit(QUIT_LIMIT);
    }

    /// Has whoever takes the events learn that the VM shall end.
    pub fn ask_to_quit(&self) {
        self.control.events.push(Event::Quit);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let Some(machine) = self.machine.take() else { return };
        if self.control.quit(QUIT_LIMIT) {
            machine.join();
        } else {
            // Some vCPU waits for memory. Closing our userfaultfd could let it through to zeros; it stays until the process ends.
            std::mem::forget(self.link.take());
            std::mem::forget(self.supply.take());
        }
    }
}

fn note_digests(digests: &mut BTreeMap<u64, u64>, gpa: u64, bytes: &[u8]) {
    for (page, bytes) in (gpa / PAGE..).zip(bytes.chunks(PAGE as usize)) {
        digests.insert(page, system::digest(bytes));
    }
}

fn check_vcpus(vcpus: u32, kind: GuestKind) -> Result<(), VmError> {
    let most = if kind == GuestKind::Threads { THREADS } else { VCPUS };
    if (1..=most).contains(&vcpus) {
        return Ok(());
    }
    Err(VmError::Vcpus { vcpus, guest: kind.name(), most })
}

fn check_name(name: &str) -> Result<(), VmError> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if (1..=64).contains(&name.len()) && name.bytes().all(known) {
        return Ok(());
    }
    Err(VmError::Config(format!("a VM's name is 1 to 64 of A-Z a-z 0-9 . _ -, and {name:?} is not")))
}

/// What pages hold after a job; none for one that does not write.
pub(crate) fn after(
    job: &Job,
    layout: &GuestLayout,
    now: &Expectations,
) -> Result<Option<Expectations>, String> {
    if !job.action.writes() {
        return Ok(None);
    }
    let mut after = now.clone();
    let pages = job.written(layout).into_iter().flat_map(|(first, count)| first..first + count);
    after
        .write(pages, job.seed)
        .map_err(|_| "the VM's pages have 255 different histories already; fill it first".to_owned())?;
    Ok(Some(after))
}

#[cfg(test)]
mod tests;

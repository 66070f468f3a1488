//! What sessions tell their pager, and have it do.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Shared;
use super::events::What;
use super::pool::Job;
use crate::session::{Host, Report, Session};

impl Host for Shared {
    fn report(&self, session: &Session, report: Report) {
        let vm = || session.name().to_owned();
        let at = |page| session.layout().place(page).hva;
        match report {
            Report::Full => {
                let counters = session.stats().counters.snapshot();
                self.events.emit(What::Populated {
                    vm: vm(),
                    seconds: session.started().elapsed().as_secs_f64(),
                    faults: counters.faults,
                    failed: counters.failures,
                });
                // Under the lock, so that nobody who waits falls between looking and sleeping.
                drop(self.sessions());
                self.changed.notify_all();
                if session.policy().detach_when_full && session.may_detach()
                    || self.draining.load(Ordering::Acquire)
                {
                    self.let_go(session);
                }
            }
            Report::Failed { hva, page, reason, action } => {
                self.events.emit(What::Failed {
                    vm: vm(),
                    address: hva,
                    page,
                    reason,
                    action: action.to_string(),
                });
            }
            Report::PopulationStopped { page, reason } => {
                self.events.emit(What::PopulationStopped { vm: vm(), address: at(page), reason });
                if self.draining.load(Ordering::Acquire) {
                    let reason =
                        "its memory cannot be had from the source; what it has is served until it ends";
                    self.events.emit(What::WaitingFor { vm: vm(), reason });
                }
            }
            Report::Stalled { hva, age } => {
                self.events.emit(What::Stall { vm: vm(), address: hva, age: age.as_secs_f64() });
            }
            Report::NoMemory { hva } => {
                self.events.emit(What::NoMemory { vm: vm(), address: hva });
                if self.draining.load(Ordering::Acquire) {
                    let reason = "the machine has no page for it";
                    self.events.emit(What::WaitingFor { vm: vm(), reason });
                }
            }
            Report::Surprise(what) => self.events.emit(What::Surprise { vm: vm(), what }),
            Report::Over(_) => {
                for (worker, _) in self.workers_of(session) {
                    worker.take_down(session.id());
                }
            }
        }
    }

    fn read_later(&self, session: &Arc<Session>, page: u32) {
        let lane = self.lanes.of(session);
        let shared = Arc::ptr_eq(&lane.readers, &self.lanes.shared().readers);
        // A source with a lane of its own is no file.
        if !(shared && self.cold.get().is_some_and(|cold| cold.submit(session, page))) {
            lane.readers.submit(Job::Read(Arc::clone(session), page));
        }
    }

    fn nudge(&self, session: &Session, shard: usize) {
        if let Some(worker) = self.worker(session.id(), shard) {
            worker.look_at(session.id(), shard);
        }
    }
}

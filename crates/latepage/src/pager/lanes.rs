//! Which threads wait for which source: most share a few, and one that may take long, or never answer, has its own.

use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use super::pool::Pool;
use crate::session::Session;
use crate::source::{Lane as Wanted, Source};

/// The threads that wait for a source.
#[derive(Clone)]
pub(super) struct Lane {
    /// They read what faults wait for.
    pub(super) readers: Arc<Pool>,
    /// They bring pages before anyone asks.
    pub(super) populators: Arc<Pool>,
}

impl Lane {
    fn stop(&self) {
        self.readers.stop();
        self.populators.stop();
    }
}

/// All lanes of a pager.
pub(super) struct Lanes {
    shared: Lane,
    own: RwLock<Vec<(Arc<dyn Source>, Lane)>>,
}

impl Lanes {
    pub(super) fn new(shared: Lane) -> Self {
        Self { shared, own: RwLock::new(Vec::new()) }
    }

    /// Starts the threads of a source that wants its own and does not have them yet, and returns those. One caller at a time.
    ///
    /// # Errors
    /// What the start of a thread said. None is left then.
    pub(super) fn open(&self, source: &Arc<dyn Source>) -> std::io::Result<Vec<JoinHandle<()>>> {
        let Wanted::Own { readers, populators } = source.lane() else { return Ok(Vec::new()) };
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        if own.iter().any(|(known, _)| Arc::ptr_eq(known, source)) {
            return Ok(Vec::new());
        }
        let number = own.len() + 1;
        // Workers look here on their way to a reader: nobody keeps them for as long as a thread takes to start.
        drop(own);
        // A thread's name has 15 bytes.
        let (readers, mut threads) = Pool::start(&format!("r{number}."), readers)?;
        let (populators, more) = match Pool::start(&format!("p{number}."), populators) {
            Ok(started) => started,
            Err(error) => {
                readers.stop();
                return Err(error);
            }
        };
        threads.extend(more);
        let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
        own.push((Arc::clone(source), Lane { readers, populators }));
        Ok(threads)
    }

    /// The lane that most sources share.
    pub(super) fn shared(&self) -> &Lane {
        &self.shared
    }

    /// The lane of a session's source.
    pub(super) fn of(&self, session: &Session) -> Lane {
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        let same = |source: &dyn Source| std::ptr::addr_eq(source, session.source());
        own.iter().find(|(source, _)| same(&**source)).map_or(&self.shared, |(_, lane)| lane).clone()
    }

    /// Ends all threads, and has those come back that wait for a source of their own.
    pub(super) fn stop(&self) {
        self.shared.stop();
        let own = std::mem::take(&mut *self.own.write().unwrap_or_else(PoisonError::into_inner));
        for (source, lane) in own {
            lane.stop();
            source.close();
        }
    }
}

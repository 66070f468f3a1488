//! Who wants to hear of every VM: each session is handed to him when it begins, however soon it is over.

use std::sync::{Arc, Mutex, PoisonError};

use crate::session::Session;

/// The sessions that began, or lived already, since this was asked for ([`Pager::arrivals`](super::Pager::arrivals)).
///
/// It holds them until they are taken.
#[derive(Default)]
pub struct Arrivals(Mutex<Vec<Arc<Session>>>);

impl Arrivals {
    /// Those that nobody has taken yet, oldest first. Each is given once.
    pub fn take(&self) -> Vec<Arc<Session>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn add(&self, session: &Arc<Session>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(session));
    }
}

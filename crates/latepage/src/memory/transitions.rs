//! The states of a page, and every step from one to another: one table, which the code follows and `docs/pages.md` prints.

use std::fmt;

/// How many states a page has.
pub const STATES: usize = 7;
/// How many kinds of step there are.
pub const STEPS: usize = 7;

/// What has become of a page. Stored as one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageState {
    /// Nobody has asked for it yet: its contents are the source's.
    Absent = 0,
    /// Someone is bringing its contents from the source.
    InFlight = 1,
    /// Its contents are in place, but the guest may not see them yet. From here it is only ever exposed, never written again.
    Filled = 2,
    /// The guest has it.
    Present = 3,
    /// The VMM has discarded it: it is never again what the source holds.
    Removed = 4,
    /// It was removed, and someone is installing zero for it.
    Clearing = 5,
    /// It could not be had. Nothing leads out of here: whoever touches it gets what the policy says for such a page.
    Failed = 6,
}

impl PageState {
    /// Every state, in the order of its byte.
    pub const ALL: [Self; STATES] = [
        Self::Absent,
        Self::InFlight,
        Self::Filled,
        Self::Present,
        Self::Removed,
        Self::Clearing,
        Self::Failed,
    ];

    /// The state's name, as in docs and metrics: `"in flight"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::InFlight => "in flight",
            Self::Filled => "filled",
            Self::Present => "present",
            Self::Removed => "removed",
            Self::Clearing => "clearing",
            Self::Failed => "failed",
        }
    }

    /// Whether the page is still owed to the guest: absent, in flight or clearing.
    pub const fn is_lacking(self) -> bool {
        matches!(self, Self::Absent | Self::InFlight | Self::Clearing)
    }

    /// The state of a byte of the table. One that is no state can only be a stranger's writing, in a table that he shares: that page
    /// cannot be had.
    pub(crate) fn of(byte: u8) -> Self {
        Self::ALL.get(usize::from(byte)).copied().unwrap_or(Self::Failed)
    }
}

impl fmt::Display for PageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What someone may do to a page. Each is one atomic step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// For a fault: take the page, if nobody has.
    Claim,
    /// For pages that nobody waits for (fault-around, population): take the page, if it is still the source's.
    ClaimAbsent,
    /// The owner has put the contents in place.
    Filled,
    /// The guest can see the page.
    Settle,
    /// The owner gives the page back, having put nothing in place.
    Abandon,
    /// The VMM has discarded the page.
    Remove,
    /// The page cannot be had.
    Fail,
}

impl Step {
    /// Every step, in the order of the table's rows.
    pub const ALL: [Self; STEPS] =
        [Self::Claim, Self::ClaimAbsent, Self::Filled, Self::Settle, Self::Abandon, Self::Remove, Self::Fail];

    /// The name of the method of [`Pages`](super::Pages) that takes this step.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::ClaimAbsent => "claim_absent",
            Self::Filled => "filled",
            Self::Settle => "settle",
            Self::Abandon => "abandon",
            Self::Remove => "remove",
            Self::Fail => "fail",
        }
    }

    /// The state that this step most often finds, and moves a page out of.
    pub(crate) const fn usual(self) -> PageState {
        match self {
            Self::Claim | Self::ClaimAbsent => PageState::Absent,
            Self::Filled | Self::Settle | Self::Abandon | Self::Fail => PageState::InFlight,
            Self::Remove => PageState::Present,
        }
    }

    /// What this step makes of a page in `state`, or `None` where it leaves the page as it is.
    pub const fn from(self, state: PageState) -> Option<PageState> {
        let next = TRANSITIONS[self as usize][state as usize];
        if next as u8 == state as u8 { None } else { Some(next) }
    }
}

/// What each step (row) makes of a page in each state (column). A page that is left as it is keeps the column's state.
#[rustfmt::skip]
pub const TRANSITIONS: [[PageState; STATES]; STEPS] = {
    use PageState::*;
    [   // from:         Absent    InFlight  Filled    Present   Removed   Clearing  Failed
        /* Claim       */ [InFlight, InFlight, Filled,   Present,  Clearing, Clearing, Failed],
        /* ClaimAbsent */ [InFlight, InFlight, Filled,   Present,  Removed,  Clearing, Failed],
        /* Filled      */ [Absent,   Filled,   Filled,   Present,  Removed,  Clearing, Failed],
        /* Settle      */ [Absent,   Present,  Present,  Present,  Removed,  Present,  Failed],
        /* Abandon     */ [Absent,   Absent,   Filled,   Present,  Removed,  Removed,  Failed],
        /* Remove      */ [Removed,  Removed,  Removed,  Removed,  Removed,  Removed,  Failed],
        /* Fail        */ [Failed,   Failed,   Failed,   Present,  Failed,   Failed,   Failed],
    ]
};

/// What a fault learns when it claims its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Claim {
    /// The page is the caller's now: contents from the source, then `settle`, `abandon` or `fail`.
    Fill,
    /// The page is the caller's now: zero, then `settle`, `abandon` or `fail`.
    Clear,
    /// Someone else is bringing it; his release will wake this waiter too.
    Wait,
    /// The contents are in place: expose them (again).
    Expose,
    /// The guest has the page, or had it until a discard took it away that the kernel had announced before: expose it again, or
    /// install zero (EEXIST says that it is there), and wake the waiter. A wake alone could go round for ever.
    Present,
    /// The page cannot be had: treat the waiter as the policy says.
    Failed,
}

impl Claim {
    /// What a claim answers that found the page in `state`.
    pub const fn found(state: PageState) -> Self {
        match state {
            PageState::Absent => Self::Fill,
            PageState::Removed => Self::Clear,
            PageState::InFlight | PageState::Clearing => Self::Wait,
            PageState::Filled => Self::Expose,
            PageState::Present => Self::Present,
            PageState::Failed => Self::Failed,
        }
    }
}

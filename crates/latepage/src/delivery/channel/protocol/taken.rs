//! Which slots wait for which page: the reader's own list, in memory that no peer can write.

const NONE: u32 = u32::MAX;

/// A slot that was taken, and by which of its posts.
#[derive(Clone, Copy, Debug)]
struct Entry {
    page: u32,
    number: u32,
    next: u32,
}

/// A table of chains, with room for every slot from the start: nothing is allocated later, whatever comes.
#[derive(Debug)]
pub(super) struct Taken {
    chains: Vec<u32>,
    entries: Vec<Option<Entry>>,
    count: u32,
}

impl Taken {
    pub(super) fn new(slots: u32) -> Self {
        Self {
            chains: vec![NONE; (slots as usize * 2).next_power_of_two()],
            entries: vec![None; slots as usize],
            count: 0,
        }
    }

    fn chain(&self, page: u32) -> usize {
        // Pages side by side come apart (Knuth's multiplicative hash; the table has at most 2 to the 13th chains).
        (page.wrapping_mul(0x9e37_79b1) >> 16) as usize & (self.chains.len() - 1)
    }

    /// Notes that a slot waits for a page. What was noted of the slot before is forgotten: its owner has posted anew.
    pub(super) fn insert(&mut self, slot: u32, page: u32, number: u32) {
        self.remove(slot);
        let chain = self.chain(page);
        self.entries[slot as usize] = Some(Entry { page, number, next: self.chains[chain] });
        self.chains[chain] = slot;
        self.count += 1;
    }

    fn remove(&mut self, slot: u32) {
        let Some(gone) = self.entries[slot as usize].take() else { return };
        self.count -= 1;
        let chain = self.chain(gone.page);
        let mut at = self.chains[chain];
        if at == slot {
            self.chains[chain] = gone.next;
            return;
        }
        while let Some(entry) = self.entries.get_mut(at as usize).and_then(Option::as_mut) {
            if entry.next == slot {
                entry.next = gone.next;
                return;
            }
            at = entry.next;
        }
    }

    /// A slot that waits for the page, taken off the list, and its post's number.
    pub(super) fn pop(&mut self, page: u32) -> Option<(u32, u32)> {
        let mut at = self.chains[self.chain(page)];
        while let Some(entry) = self.entries.get(at as usize).copied().flatten() {
            if entry.page == page {
                self.remove(at);
                return Some((at, entry.number));
            }
            at = entry.next;
        }
        None
    }

    /// What a slot waits for, taken off the list if it is a page of these.
    pub(super) fn pop_slot(&mut self, slot: u32, pages: &std::ops::Range<u32>) -> Option<(u32, u32)> {
        let entry = self.entries[slot as usize].filter(|entry| pages.contains(&entry.page))?;
        self.remove(slot);
        Some((slot, entry.number))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

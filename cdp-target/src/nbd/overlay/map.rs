//! Which blocks of a volume an overlay has, in memory; and which pages of the map on disk say something older.

use super::format::PAGE_BLOCKS;
use cdp_protocol::units::{Block, Extent};
use roaring::RoaringBitmap;
use std::collections::BTreeSet;

/// What an overlay says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Nothing: it is as the point has it.
    Untouched = 0,
    /// It has its content.
    Written = 1,
    /// It is zeros.
    Zero = 2,
}

/// The map of a volume.
#[derive(Default)]
pub(super) struct Map {
    written: RoaringBitmap,
    zero: RoaringBitmap,
    changed: BTreeSet<u32>,
}

impl Map {
    /// What it says of `extent`: runs in order that cover it, each other than the one before.
    pub(super) fn states(&self, extent: Extent) -> Vec<(Extent, State)> {
        let (first, last) = (extent.start.0, (extent.end() - 1) as u32);
        if self.written.range_cardinality(first..=last) + self.zero.range_cardinality(first..=last) == 0 {
            return vec![(extent, State::Untouched)];
        }
        let mut runs: Vec<(Extent, State)> = Vec::new();
        let mut push = |start: u64, end: u64, state: State| match runs.last_mut() {
            Some((run, known)) if *known == state => run.count += (end - start) as u32,
            _ if start < end => {
                let run = Extent::new(Block(start as u32), (end - start) as u32).expect("a part of an extent");
                runs.push((run, state));
            }
            _ => {}
        };
        let mut next = u64::from(first);
        for (block, state) in self.touched(first, last) {
            push(next, u64::from(block), State::Untouched);
            next = u64::from(block) + 1;
            push(u64::from(block), next, state);
        }
        push(next, extent.end(), State::Untouched);
        runs
    }

    /// Blocks that are not untouched, in order.
    fn touched(&self, first: u32, last: u32) -> impl Iterator<Item = (u32, State)> + '_ {
        let (mut written, mut zero) = (self.written.range(first..=last), self.zero.range(first..=last));
        let (mut next_written, mut next_zero) = (written.next(), zero.next());
        std::iter::from_fn(move || match (next_written, next_zero) {
            (Some(block), other) if other.is_none_or(|other| block < other) => {
                next_written = written.next();
                Some((block, State::Written))
            }
            (_, Some(block)) => {
                next_zero = zero.next();
                Some((block, State::Zero))
            }
            (_, None) => None,
        })
    }

    /// Changes blocks; gives whether any of them had content.
    pub(super) fn set(&mut self, extent: Extent, state: State) -> bool {
        let blocks = extent.start.0..=(extent.end() - 1) as u32;
        let len = u64::from(extent.count);
        let had_content = self.written.range_cardinality(blocks.clone()) > 0;
        let (into, from) = match state {
            State::Written => (&mut self.written, &mut self.zero),
            State::Zero => (&mut self.zero, &mut self.written),
            State::Untouched => unreachable!("nothing is ever taken back"),
        };
        // Content written over content is no change of the map.
        if into.range_cardinality(blocks.clone()) < len {
            from.remove_range(blocks.clone());
            into.insert_range(blocks.clone());
            self.changed.extend(blocks.start() / PAGE_BLOCKS..=blocks.end() / PAGE_BLOCKS);
        }
        had_content
    }

    /// A block as a page of the map had it.
    pub(super) fn load(&mut self, block: u32, state: State) {
        match state {
            State::Written => self.written.insert(block),
            State::Zero => self.zero.insert(block),
            State::Untouched => false,
        };
    }

    /// The pages that changed since this was asked last.
    pub(super) fn take_changed(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.changed)
    }

    /// The blocks of a page that are not untouched, by their numbers within it.
    pub(super) fn page(&self, page: u32) -> impl Iterator<Item = (u32, State)> + '_ {
        let first = page * PAGE_BLOCKS;
        let last = first.saturating_add(PAGE_BLOCKS - 1);
        self.touched(first, last).map(move |(block, state)| (block - first, state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u32 = 3 * PAGE_BLOCKS;

    fn change() -> impl Strategy<Value = (u32, u32, bool)> {
        (0..BLOCKS, prop_oneof![1..20_u32, 1..BLOCKS], any::<bool>())
    }

    proptest! {
        /// Against an array of states.
        #[test]
        fn a_map_says_what_was_set_last(changes in prop::collection::vec(change(), 0..20), window in change()) {
            let (mut map, mut plain) = (Map::default(), vec![State::Untouched; BLOCKS as usize]);
            for (start, count, is_zero) in changes {
                let extent = Extent::new(Block(start), count.min(BLOCKS - start)).expect("within");
                let state = if is_zero { State::Zero } else { State::Written };
                let blocks = start as usize..extent.end() as usize;
                let had = plain[blocks.clone()].contains(&State::Written);
                let differs = plain[blocks.clone()].iter().any(|known| *known != state);
                prop_assert_eq!(map.set(extent, state), had);
                let pages = start / PAGE_BLOCKS..=(extent.end() - 1) as u32 / PAGE_BLOCKS;
                let pages: Vec<_> = pages.filter(|_| differs).collect();
                prop_assert_eq!(map.take_changed().into_iter().collect::<Vec<_>>(), pages);
                plain[blocks].fill(state);
            }
            let window = Extent::new(Block(window.0), window.1.min(BLOCKS - window.0)).expect("within");
            let mut next = u64::from(window.start.0);
            let mut before = None;
            for (run, state) in map.states(window) {
                prop_assert_eq!((u64::from(run.start.0), Some(state) != before), (next, true));
                prop_assert!(run.blocks().all(|block| plain[block.0 as usize] == state));
                (next, before) = (run.end(), Some(state));
            }
            prop_assert_eq!(next, window.end());
            let page: Vec<_> = map.page(1).collect();
            let first = PAGE_BLOCKS as usize;
            let expected = plain[first..2 * first].iter().copied().enumerate().map(|(at, state)| (at as u32, state));
            let expected: Vec<_> = expected.filter(|(_, state)| *state != State::Untouched).collect();
            prop_assert_eq!(page, expected);
        }
    }
}

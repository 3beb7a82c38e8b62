//! Which points were removed: ranges of epochs, few however many the points.
//!
//! The commits of removed points stay, so that the chain is whole; only nobody can restore them.

use cdp_protocol::units::Epoch;

/// Ranges of epochs, both ends within, by rising number, neither touching nor overlapping.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Removed(Vec<(Epoch, Epoch)>);

impl Removed {
    /// From ranges; `None` where one is turned round or they are not in order.
    #[must_use]
    pub fn new(ranges: Vec<(Epoch, Epoch)>) -> Option<Self> {
        let in_order = ranges.windows(2).all(|pair| pair[0].1.0.saturating_add(1) < pair[1].0.0);
        (in_order && ranges.iter().all(|(first, last)| first <= last)).then_some(Self(ranges))
    }

    /// The ranges.
    #[must_use]
    pub fn ranges(&self) -> &[(Epoch, Epoch)] {
        &self.0
    }

    /// Whether the point was removed.
    #[must_use]
    pub fn contains(&self, epoch: Epoch) -> bool {
        let at = self.0.partition_point(|(_, last)| *last < epoch);
        self.0.get(at).is_some_and(|(first, _)| *first <= epoch)
    }

    /// The part of them within a range.
    pub fn within(&self, first: Epoch, last: Epoch) -> impl Iterator<Item = (Epoch, Epoch)> + '_ {
        let from = self.0.partition_point(|(_, end)| *end < first);
        let inside = self.0[from..].iter().take_while(move |(start, _)| *start <= last);
        inside.map(move |(start, end)| ((*start).max(first), (*end).min(last)))
    }

    /// With the epochs from `first` to `last` among them.
    pub fn insert(&mut self, first: Epoch, last: Epoch) {
        let from = self.0.partition_point(|(_, end)| end.0.saturating_add(1) < first.0);
        let to = self.0.partition_point(|(start, _)| start.0 <= last.0.saturating_add(1));
        let touched = &self.0[from..to.max(from)];
        let first = touched.first().map_or(first, |(start, _)| first.min(*start));
        let last = touched.last().map_or(last, |(_, end)| last.max(*end));
        self.0.splice(from..to.max(from), [(first, last)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn ranges_are_a_set_of_epochs(ranges in prop::collection::vec((0u64..60, 0u64..12), 0..20)) {
            let (mut removed, mut oracle) = (Removed::default(), BTreeSet::new());
            for (first, len) in ranges {
                removed.insert(Epoch(first), Epoch(first + len));
                oracle.extend(first..=first + len);
            }
            prop_assert!(Removed::new(removed.ranges().to_vec()).is_some());
            for epoch in 0..90 {
                prop_assert_eq!(removed.contains(Epoch(epoch)), oracle.contains(&epoch), "{}", epoch);
            }
            for (first, last) in [(0, 89), (10, 20), (7, 7), (71, 80)] {
                let within: Vec<u64> = removed.within(Epoch(first), Epoch(last)).flat_map(|(from, to)| from.0..=to.0).collect();
                let expected: Vec<u64> = oracle.range(first..=last).copied().collect();
                prop_assert_eq!(within, expected);
            }
        }
    }

    #[test]
    fn ranges_out_of_order_are_refused() {
        let new = |ranges: &[(u64, u64)]| Removed::new(ranges.iter().map(|(a, b)| (Epoch(*a), Epoch(*b))).collect());
        assert!(new(&[(1, 2), (4, 4)]).is_some());
        for wrong in [&[(2, 1)][..], &[(1, 2), (2, 3)], &[(1, 2), (3, 4)], &[(5, 6), (1, 2)]] {
            assert!(new(wrong).is_none(), "{wrong:?}");
        }
    }
}

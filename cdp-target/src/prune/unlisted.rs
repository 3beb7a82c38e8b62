//! Points that nobody can list, because the segment that has them is gone or damaged: they stay, and with them what they need.
//!
//! A missing file reads as an empty index. To take its points for numbers that were never points would be to remove them without a word.

use crate::journal::GroupView;
use cdp_protocol::units::Epoch;

/// The points of a segment that cannot all be listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unlisted {
    /// The segment.
    pub(super) segment: u64,
    /// What was not removed of the numbers it had, as ranges, both ends within; never empty.
    pub(super) points: Vec<(Epoch, Epoch)>,
}

impl Unlisted {
    /// Whether the number is one of them.
    pub(super) fn has(&self, epoch: Epoch) -> bool {
        self.points.iter().any(|(first, last)| (*first..=*last).contains(&epoch))
    }
}

/// Segments of which not all points can be listed that may still be wanted, the oldest first.
pub(super) fn unlisted(view: &GroupView) -> Vec<Unlisted> {
    let unlisted = view.unlisted().into_iter().map(|(segment, range)| {
        let removed = view.manifest().removed.within(range.first, range.last);
        Unlisted { segment, points: without(range.first, range.last, removed) }
    });
    unlisted.filter(|unlisted| !unlisted.points.is_empty()).collect()
}

/// What is left of a range without those within it.
fn without(first: Epoch, last: Epoch, removed: impl Iterator<Item = (Epoch, Epoch)>) -> Vec<(Epoch, Epoch)> {
    let mut left = Vec::new();
    let mut from = Some(first);
    for (start, end) in removed {
        left.extend(from.zip(start.0.checked_sub(1).map(Epoch)).filter(|(from, below)| from <= below));
        from = end.0.checked_add(1).map(Epoch);
    }
    left.extend(from.filter(|from| *from <= last).map(|from| (from, last)));
    left
}

#[cfg(test)]
mod tests {
    use super::without;
    use cdp_protocol::units::Epoch;

    #[test]
    fn what_is_left_of_a_range_is_what_was_not_removed() {
        let left = |removed: &[(u64, u64)]| {
            let removed = removed.iter().map(|(first, last)| (Epoch(*first), Epoch(*last)));
            let left = without(Epoch(10), Epoch(20), removed);
            left.into_iter().map(|(first, last)| (first.0, last.0)).collect::<Vec<_>>()
        };
        assert_eq!(left(&[]), [(10, 20)]);
        assert_eq!(left(&[(10, 20)]), []);
        assert_eq!(left(&[(10, 12), (15, 15), (20, 20)]), [(13, 14), (16, 19)]);
        assert_eq!(left(&[(12, 20)]), [(10, 11)]);
    }
}

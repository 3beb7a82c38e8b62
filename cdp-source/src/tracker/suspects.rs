//! What a lost completion could have hurt.
//!
//! A lost completion can only hurt a write that was in flight across a flip: its issue mark is in what was drained since the last
//! flip at which nothing was in flight. That is kept, for a minute at least (no write is in flight for longer), and joins
//! the cut at which a completion is found to be lost. A false alarm costs re-reading those blocks, nothing else. Does not
//! judge (`trust` does).

use super::trust::Verdict;
use roaring::RoaringBitmap;
use std::time::Duration;

/// How long suspects are kept at least, where no flip is quiet.
const SUSPECT_FOR: Duration = Duration::from_secs(60);
/// What was drained since the last flip at which nothing was in flight, or in the last minute or two; by volume.
pub(super) struct Suspects {
    recent: Vec<RoaringBitmap>,
    older: Vec<RoaringBitmap>,
    turned: Duration,
}

impl Suspects {
    pub(super) fn new(volumes: usize, now: Duration) -> Self {
        let none = vec![RoaringBitmap::new(); volumes];
        Self { recent: none.clone(), older: none, turned: now }
    }

    /// What a predecessor left: a write of it may have been in flight when this one began.
    pub(super) fn add(&mut self, left: &[RoaringBitmap]) {
        for (recent, left) in self.recent.iter_mut().zip(left) {
            *recent |= left;
        }
    }

    /// The suspects of a volume: of no epoch any more, and not to be forgotten by an agent's death.
    pub(super) fn of(&self, volume: usize) -> RoaringBitmap {
        &self.recent[volume] | &self.older[volume]
    }

    /// Takes in what a flip drained. Gives what has to join its cut, where a completion was lost or may have been.
    pub(super) fn flipped(
        &mut self,
        drained: &[RoaringBitmap],
        verdict: &Verdict,
        now: Duration,
    ) -> Option<Vec<RoaringBitmap>> {
        let age = now.saturating_sub(self.turned);
        let joining = if verdict.lost {
            Some((0..drained.len()).map(|volume| self.of(volume)).collect())
        } else if age >= SUSPECT_FOR * 2 && !verdict.clean && !verdict.quiet {
            Some(self.older.clone())
        } else {
            None
        };
        if verdict.quiet {
            *self = Self::new(drained.len(), now);
            return joining;
        }
        if age >= SUSPECT_FOR * 2 || age >= SUSPECT_FOR && verdict.clean {
            let none = vec![RoaringBitmap::new(); drained.len()];
            self.older = std::mem::replace(&mut self.recent, none);
            self.turned = now;
        }
        for (recent, drained) in self.recent.iter_mut().zip(drained) {
            *recent |= drained;
        }
        joining
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_secs(1);

    fn verdict(lost: bool, quiet: bool) -> Verdict {
        Verdict { lost, quiet, clean: true, doubt: None }
    }

    #[test]
    fn suspects_are_kept_until_a_quiet_flip_and_join_where_a_completion_was_lost() {
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut suspects = Suspects::new(1, AT);
        assert_eq!(suspects.flipped(&blocks(&[1]), &verdict(false, false), AT), None);
        assert_eq!(suspects.flipped(&blocks(&[2]), &verdict(true, false), AT), Some(blocks(&[1])));
        assert_eq!(suspects.flipped(&blocks(&[3]), &verdict(true, true), AT), Some(blocks(&[1, 2])));
        assert_eq!(suspects.flipped(&blocks(&[4]), &verdict(true, false), AT), Some(blocks(&[])));
    }

    #[test]
    fn suspects_that_were_never_cleared_join_before_they_are_given_up() {
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut suspects = Suspects::new(1, AT);
        let hidden = Verdict { clean: false, ..verdict(false, false) };
        let at = |seconds: u64| AT + Duration::from_secs(seconds);
        suspects.flipped(&blocks(&[1]), &hidden, at(0));
        assert_eq!(suspects.flipped(&blocks(&[2]), &hidden, at(119)), None);
        assert_eq!(suspects.flipped(&blocks(&[3]), &hidden, at(120)), Some(blocks(&[])));
        assert_eq!(suspects.of(0), blocks(&[1, 2, 3])[0]);
        assert_eq!(suspects.flipped(&blocks(&[4]), &hidden, at(240)), Some(blocks(&[1, 2])));
    }

    #[test]
    fn suspects_are_kept_for_a_minute_at_least_and_two_at_most() {
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut suspects = Suspects::new(1, AT);
        let at = |seconds: u64| AT + Duration::from_secs(seconds);
        suspects.flipped(&blocks(&[1]), &verdict(false, false), at(0));
        suspects.flipped(&blocks(&[2]), &verdict(false, false), at(60));
        assert_eq!(suspects.flipped(&blocks(&[3]), &verdict(true, false), at(119)), Some(blocks(&[1, 2])));
        suspects.flipped(&blocks(&[4]), &verdict(false, false), at(120));
        assert_eq!(suspects.flipped(&blocks(&[]), &verdict(true, false), at(121)), Some(blocks(&[2, 3, 4])));
    }
}

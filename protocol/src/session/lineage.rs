//! The lineage of a group: which points a source may stand at and still be of the history that goes on.
//!
//! In the journal points follow one another in a line, each naming the one before. What they describe is a tree: a restored
//! source that stands at 10 while the journal is at 11 gets a new generation, and its 12 follows 11 in the journal but 10 in
//! truth. 11 is then a line that was left: nobody may go on from it, or two histories would be mixed. So each generation is
//! recorded as it begins: after which point of the journal, and from which place its source went on.
//!
//! The generation a source claims counts as much as its point: once granted a new one it compares everything with the
//! journal's newest point and stands *there*, whatever line that point is of. Pure; the journal keeps the lines.

use crate::units::{Epoch, Generation};

/// A place in the tree: a point, and the generation whose line it is seen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Place {
    /// The generation.
    pub generation: Generation,
    /// The point.
    pub epoch: Epoch,
}

/// How a generation began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Line {
    /// Which.
    pub generation: Generation,
    /// The newest point of the journal then: what its source compared everything with.
    pub after: Option<Epoch>,
    /// Where its source went on from; `None` where it knew no point.
    pub from: Option<Place>,
}

/// The generations of a group, as far as they are recorded, rising.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Lineage(Vec<Line>);

impl Lineage {
    /// A lineage of recorded lines; `None` where they do not rise, or one goes on from a generation that is not below it.
    #[must_use]
    pub fn new(lines: Vec<Line>) -> Option<Self> {
        let rises = lines.is_sorted_by(|before, after| before.generation < after.generation);
        let goes_on = |line: &Line| line.from.is_none_or(|from| from.generation < line.generation);
        (rises && lines.iter().all(goes_on)).then_some(Self(lines))
    }

    /// The lines.
    #[must_use]
    pub fn lines(&self) -> &[Line] {
        &self.0
    }

    /// A generation begins.
    ///
    /// # Panics
    /// Where it is not above those before it.
    pub fn begin(&mut self, line: Line) {
        assert!(self.0.last().is_none_or(|last| last.generation < line.generation), "generations only rise");
        self.0.push(line);
    }

    /// Where a source stands that was last granted `claimed` and whose newest point is `epoch`, made in `made_in`.
    #[must_use]
    pub fn place(&self, claimed: Generation, epoch: Epoch, made_in: Generation) -> Place {
        let adopted = claimed > made_in && self.line(claimed).is_some_and(|line| line.after == Some(epoch));
        Place { generation: if adopted { claimed } else { made_in }, epoch }
    }

    /// Whether a place is of the history that the generation `present` goes on with.
    #[must_use]
    pub fn holds(&self, present: Generation, place: Place) -> bool {
        let (mut generation, mut newest) = (present, Epoch(u64::MAX));
        loop {
            if place.generation >= generation {
                return place.generation == generation && place.epoch <= newest;
            }
            match self.line(generation) {
                Some(Line { from: Some(from), .. }) => (generation, newest) = (from.generation, from.epoch),
                Some(Line { from: None, .. }) => return false,
                // From before lines were recorded: all that came before is taken for one line.
                None => return place.epoch <= newest,
            }
        }
    }

    /// The point whose content a source at `place` had: where a generation began, that is where its source came from.
    #[must_use]
    pub fn origin(&self, place: Place) -> Option<Epoch> {
        match self.line(place.generation).filter(|line| line.after == Some(place.epoch)) {
            Some(line) => line.from.and_then(|from| self.origin(from)),
            None => Some(place.epoch),
        }
    }

    fn line(&self, generation: Generation) -> Option<&Line> {
        self.0.binary_search_by_key(&generation, |line| line.generation).ok().map(|at| &self.0[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert_eq, proptest};
    use std::collections::BTreeSet;

    const fn place(generation: u64, epoch: u64) -> Place {
        Place { generation: Generation(generation), epoch: Epoch(epoch) }
    }

    fn line(generation: u64, after: u64, from: Option<Place>) -> Line {
        Line { generation: Generation(generation), after: (after > 0).then_some(Epoch(after)), from }
    }

    /// 1 to 11 in generation 1; a copy of 10 gets 2 and makes 12; one of 12 that lost 13 gets 3 and makes 14.
    fn told() -> Lineage {
        let lines = vec![line(1, 0, None), line(2, 11, Some(place(1, 10))), line(3, 13, Some(place(2, 12)))];
        Lineage::new(lines).expect("rising")
    }

    #[test]
    fn what_a_line_left_is_not_held_though_the_journal_has_it() {
        let lineage = told();
        // The generation that goes on, the one claimed, the point, the one it was made in; whether it is held.
        let table = [
            (1, 1, 11, 1, true),
            (2, 1, 10, 1, true),
            (2, 1, 11, 1, false),
            (2, 2, 11, 1, true),
            (2, 2, 12, 2, true),
            (3, 2, 12, 2, true),
            (3, 2, 13, 2, false),
            (3, 3, 13, 2, true),
            (3, 2, 11, 1, true),
            (3, 1, 11, 1, false),
            (3, 1, 9, 1, true),
        ];
        for (number, (present, claimed, epoch, made_in, expected)) in table.into_iter().enumerate() {
            let at = lineage.place(Generation(claimed), Epoch(epoch), Generation(made_in));
            assert_eq!(lineage.holds(Generation(present), at), expected, "row {number}");
        }
        assert_eq!(lineage.origin(place(2, 11)), Some(Epoch(10)), "it compared with 11, and came from 10");
        assert_eq!(lineage.origin(place(3, 14)), Some(Epoch(14)));
    }

    #[test]
    fn before_lines_were_recorded_all_is_one_line_and_who_knows_nothing_leaves_all() {
        assert!(Lineage::default().holds(Generation(4), place(2, 7)));
        let later = Lineage::new(vec![line(5, 20, Some(place(4, 15)))]).expect("rising");
        assert!(later.holds(Generation(5), place(3, 15)) && !later.holds(Generation(5), place(4, 16)));
        let fresh = Lineage::new(vec![line(1, 0, None), line(2, 9, None)]).expect("rising");
        assert!(!fresh.holds(Generation(2), place(1, 9)) && fresh.holds(Generation(2), place(2, 9)));
        assert_eq!(fresh.origin(place(2, 9)), None);
        assert_eq!(Lineage::new(vec![line(2, 9, Some(place(2, 9)))]), None);
        assert_eq!(Lineage::new(vec![line(2, 9, None), line(1, 0, None)]), None);
    }

    proptest! {
        /// Against sets: each place's ancestors as a set of places, grown step by step.
        #[test]
        fn a_place_is_held_exactly_where_it_is_an_ancestor(choices in proptest::collection::vec(any::<(bool, usize)>(), 1..60)) {
            let mut lineage = Lineage::default();
            lineage.begin(line(1, 0, None));
            let mut present = place(1, 0);
            let mut ancestors = vec![(present, BTreeSet::from([(1, 0)]))];
            for (splits, which) in choices {
                let newest = present.epoch;
                if splits {
                    let (from, of_it) = ancestors[which % ancestors.len()].clone();
                    let generation = Generation(present.generation.0 + 1);
                    lineage.begin(Line { generation, after: Some(newest), from: Some(from) });
                    present = Place { generation, epoch: newest };
                    ancestors.push((present, of_it));
                } else {
                    let of_it = ancestors.last().expect("one at least").1.clone();
                    present.epoch = Epoch(newest.0 + 1);
                    ancestors.push((present, of_it));
                }
                ancestors.last_mut().expect("just pushed").1.insert((present.generation.0, present.epoch.0));
            }
            let of_present = &ancestors.last().expect("one at least").1;
            for (at, _) in &ancestors {
                prop_assert_eq!(lineage.holds(present.generation, *at), of_present.contains(&(at.generation.0, at.epoch.0)));
            }
        }
    }
}

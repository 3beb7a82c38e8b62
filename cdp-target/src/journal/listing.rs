//! The points of a history: all of them, a page of them, how many there are, the newest.
//!
//! What is asked for every few seconds costs no walk over all points: a sealed segment does not change, so it is counted
//! once and two numbers of it are kept.

use super::index::CommitEntry;
use super::manifest::{PointRange, SealedSegment};
use super::{GroupView, JournalError, Point};
use crate::points::{PointTimes, point_time};
use cdp_protocol::units::{Epoch, Timestamp};

/// How far a history has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overview {
    /// How many points there are.
    pub points: u64,
    /// The newest, and its time as points are listed: never before that of an older one.
    pub newest: Option<(Point, Timestamp)>,
}

/// A point that there was, and the point itself where it was not removed.
pub(crate) struct KnownPoint {
    /// Its number.
    pub(crate) epoch: Epoch,
    /// What its time is made of.
    pub(crate) times: PointTimes,
    /// Nothing of one that was removed.
    pub(crate) point: Option<Point>,
}

/// The points of a segment in short.
#[derive(Clone, Default)]
pub(super) struct Tally {
    points: u64,
    /// The latest time of a point, removed ones too: it never goes back.
    time: Option<Timestamp>,
    /// Which of them were removed then.
    removed: Vec<(Epoch, Epoch)>,
}

impl Tally {
    fn of(commits: &[CommitEntry], removed: Vec<(Epoch, Epoch)>) -> Self {
        let time = commits.iter().fold(None, |before, commit| {
            let times = PointTimes { cut: commit.cut_time(), received: commit.received };
            Some(point_time(times, before))
        });
        let is_removed = |epoch| removed.iter().any(|(first, last)| (*first..=*last).contains(&epoch));
        let points = commits.iter().filter(|commit| !is_removed(commit.head.epoch)).count() as u64;
        Self { points, time, removed }
    }

    fn add(&mut self, other: &Self) {
        self.points += other.points;
        self.time = self.time.max(other.time);
    }
}

impl GroupView {
    /// The points that were not removed, oldest first. A segment that cannot be read gives an error in its place, and the iterator
    /// goes on.
    #[must_use]
    pub fn points(&self) -> impl DoubleEndedIterator<Item = Result<Point, JournalError>> + '_ {
        self.all_points().filter_map(|known| known.map(|known| known.point).transpose())
    }

    /// The same with those that were removed: their times bound those of the ones behind them.
    pub(crate) fn all_points(&self) -> impl DoubleEndedIterator<Item = Result<KnownPoint, JournalError>> + '_ {
        let reaches = self.reaches();
        let known = move |commit: &CommitEntry| {
            let epoch = commit.head.epoch;
            let times = PointTimes { cut: commit.cut_time(), received: commit.received };
            // They may be half a million, most of them removed: of those nothing else is made.
            KnownPoint { epoch, times, point: (!self.is_removed(epoch)).then(|| self.to_point(commit, &reaches)) }
        };
        self.segments().flat_map(move |number| match self.index(number) {
            Ok(index) => index.commits().iter().map(|commit| Ok(known(commit))).collect(),
            Err(error) => vec![Err(error)],
        })
    }

    /// Up to `max` points above `after`, oldest first; reads only the segments that have them.
    ///
    /// # Errors
    /// Where one of these segments cannot be read.
    pub fn points_after(&self, after: Epoch, max: usize) -> Result<Vec<Point>, JournalError> {
        let reaches = self.reaches();
        let mut points = Vec::new();
        for number in self.segments_after(after) {
            let mut commits = self.commits_of(number, after, usize::MAX)?;
            commits.retain(|commit| !self.is_removed(commit.head.epoch));
            commits.truncate(max - points.len());
            points.extend(commits.iter().map(|commit| self.to_point(commit, &reaches)));
            if points.len() == max {
                break;
            }
        }
        Ok(points)
    }

    /// The numbers of the points above `after` that were not removed, oldest first; reads only the segments that have them.
    ///
    /// # Errors
    /// Where one of these segments cannot be read.
    pub(crate) fn epochs_after(&self, after: Epoch) -> Result<Vec<Epoch>, JournalError> {
        let mut epochs = Vec::new();
        for number in self.segments_after(after) {
            let index = self.index(number)?;
            let newer = index.commits().iter().map(|commit| commit.head.epoch).filter(|epoch| *epoch > after);
            epochs.extend(newer.filter(|epoch| !self.is_removed(*epoch)));
        }
        Ok(epochs)
    }

    /// The newest point.
    ///
    /// # Errors
    /// Where the segment that has it cannot be read.
    pub fn newest(&self) -> Result<Option<Point>, JournalError> {
        for number in self.segments().rev() {
            let last = self.index(number)?.commits().last().cloned();
            if let Some(commit) = last {
                return Ok(Some(self.to_point(&commit, &self.reaches())));
            }
        }
        Ok(None)
    }

    /// How many points there are, and the newest.
    ///
    /// # Errors
    /// Where a segment that was not counted yet cannot be read.
    pub fn overview(&self) -> Result<Overview, JournalError> {
        let mut tally = Tally::default();
        for sealed in &self.manifest().sealed {
            tally.add(&self.sealed_tally(sealed)?);
        }
        let open = self.index(self.manifest().open)?;
        let commits = open.commits();
        let range = commits.first().zip(commits.last()).map(|(first, last)| (first.head.epoch, last.head.epoch));
        let removed = range.map(|(first, last)| self.manifest().removed.within(first, last).collect());
        tally.add(&Tally::of(commits, removed.unwrap_or_default()));
        drop(open);
        Ok(Overview { points: tally.points, newest: self.newest()?.zip(tally.time) })
    }

    fn sealed_tally(&self, sealed: &SealedSegment) -> Result<Tally, JournalError> {
        let within = |points: PointRange| self.manifest().removed.within(points.first, points.last).collect();
        let removed: Vec<_> = sealed.points.map(within).unwrap_or_default();
        let caches = self.shelf().caches;
        if let Some(tally) = caches.tally(sealed.id()).filter(|tally| tally.removed == removed) {
            return Ok(tally);
        }
        let tally = Tally::of(self.index(sealed.number)?.commits(), removed);
        if !self.shelf().is_missing(sealed.id()) {
            caches.keep_tally(sealed.id(), tally.clone());
        }
        Ok(tally)
    }

    /// Bytes of the parts that a commit takes in. A segment that cannot be read counts nothing.
    pub(super) fn part_bytes(&self, commit: &CommitEntry) -> u64 {
        let epoch = commit.head.epoch;
        if commit.record.as_ref().is_none_or(|record| record.parts.is_none()) {
            return 0;
        }
        let caches = self.shelf().caches;
        if let Some(bytes) = caches.part_bytes(epoch) {
            return bytes;
        }
        let newest = self.segment_of(epoch).unwrap_or(self.manifest().open);
        let (mut bytes, mut all_read) = (0, true);
        for number in self.segments().rev().skip_while(|number| *number > newest) {
            let Ok(runs) = self.index(number).map(|index| index.runs().to_vec()) else {
                all_read = false;
                continue;
            };
            for (at, run) in runs.iter().enumerate() {
                let is_part = run.epoch == epoch && run.attempt != commit.attempt;
                let taken = is_part.then(|| self.includes(number, run, at + 1 == runs.len(), epoch));
                all_read &= !matches!(taken, Some(Err(_)));
                bytes += if matches!(taken, Some(Ok(true))) { run.bytes } else { 0 };
            }
            if runs.first().is_some_and(|run| run.epoch < epoch) {
                break;
            }
        }
        if all_read {
            caches.keep_part_bytes(epoch, bytes);
        }
        bytes
    }

    fn segments(&self) -> impl DoubleEndedIterator<Item = u64> + '_ {
        self.manifest().sealed.iter().map(|sealed| sealed.number).chain([self.manifest().open])
    }

    /// The segments that may have points above `after`.
    fn segments_after(&self, after: Epoch) -> impl Iterator<Item = u64> + '_ {
        let is_newer = move |sealed: &&SealedSegment| sealed.points.is_some_and(|points| points.last > after);
        let sealed = self.manifest().sealed.iter().filter(is_newer).map(|sealed| sealed.number);
        sealed.chain([self.manifest().open])
    }

    /// Up to `max` commits of a segment above `after`.
    fn commits_of(&self, number: u64, after: Epoch, max: usize) -> Result<Vec<CommitEntry>, JournalError> {
        let index = self.index(number)?;
        let commits = index.commits();
        let newer = commits.partition_point(|commit| commit.head.epoch <= after);
        Ok(commits[newer..].iter().take(max).cloned().collect())
    }
}

//! The points of a history: all of them, a page of them, how many there are, the newest.
//!
//! What is asked for every few seconds costs no walk over all points: a sealed segment does not change, so it is counted
//! once and two numbers of it are kept.

use super::index::CommitEntry;
use super::manifest::SealedSegment;
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

/// The points of a segment in short.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    points: u64,
    /// The latest time of a point.
    time: Option<Timestamp>,
}

impl Tally {
    fn of(commits: &[CommitEntry]) -> Self {
        let time = commits.iter().fold(None, |before, commit| {
            let times = PointTimes { cut: commit.cut_time(), received: commit.received };
            Some(point_time(times, before))
        });
        Self { points: commits.len() as u64, time }
    }

    fn with(self, other: Self) -> Self {
        Self { points: self.points + other.points, time: self.time.max(other.time) }
    }
}

impl GroupView {
    /// All points, oldest first. A segment that cannot be read gives an error in its place, and the iterator goes on.
    #[must_use]
    pub fn points(&self) -> impl DoubleEndedIterator<Item = Result<Point, JournalError>> + '_ {
        let reaches = self.reaches();
        self.segments().flat_map(move |number| {
            let points: Vec<_> = match self.commits_of(number, Epoch(0), usize::MAX) {
                Ok(commits) => commits.iter().map(|commit| Ok(self.to_point(commit, &reaches))).collect(),
                Err(error) => vec![Err(error)],
            };
            points
        })
    }

    /// Up to `max` points above `after`, oldest first; reads only the segments that have them.
    ///
    /// # Errors
    /// Where one of these segments cannot be read.
    pub fn points_after(&self, after: Epoch, max: usize) -> Result<Vec<Point>, JournalError> {
        let older = |sealed: &&SealedSegment| sealed.points.is_none_or(|points| points.last <= after);
        let sealed = self.manifest().sealed.iter().filter(|sealed| !older(sealed)).map(|sealed| sealed.number);
        let reaches = self.reaches();
        let mut points = Vec::new();
        for number in sealed.chain([self.manifest().open]) {
            let commits = self.commits_of(number, after, max - points.len())?;
            points.extend(commits.iter().map(|commit| self.to_point(commit, &reaches)));
            if points.len() == max {
                break;
            }
        }
        Ok(points)
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
            tally = tally.with(self.sealed_tally(sealed)?);
        }
        tally = tally.with(Tally::of(self.index(self.manifest().open)?.commits()));
        Ok(Overview { points: tally.points, newest: self.newest()?.zip(tally.time) })
    }

    fn sealed_tally(&self, sealed: &SealedSegment) -> Result<Tally, JournalError> {
        let caches = self.shelf().caches;
        if let Some(tally) = caches.tally(sealed.number) {
            return Ok(tally);
        }
        let tally = Tally::of(self.index(sealed.number)?.commits());
        if !self.shelf().is_missing(sealed.number) {
            caches.keep_tally(sealed.number, tally);
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

    /// Up to `max` commits of a segment above `after`.
    fn commits_of(&self, number: u64, after: Epoch, max: usize) -> Result<Vec<CommitEntry>, JournalError> {
        let index = self.index(number)?;
        let commits = index.commits();
        let newer = commits.partition_point(|commit| commit.head.epoch <= after);
        Ok(commits[newer..].iter().take(max).cloned().collect())
    }
}

//! What the target does for its points by itself and at an operator's word: checkpoints, pruning, pins and labels.
//!
//! Builder, prune, hold and clock of retention are the product's; this stands for who calls them. A build may be broken off, or
//! be taken by the journal only after more has come in; either may die at any call.

use std::sync::{Arc, mpsc};

use cdp_protocol::units::{Epoch, Head, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::random::SimRandom;
use cdp_target::checkpoint::builder::{Builder, building, end};
use cdp_target::journal::change::Change;
use cdp_target::journal::file::FileId;
use cdp_target::journal::{GroupView, JournalError, Point};
use cdp_target::maintenance::{ClockError, hold, keep_clock, retention_clock};
use cdp_target::prune::{CHUNK_BYTES_MAX, Owner, Prune, PruneError};
use cdp_target::receiver::{GroupWriter, StoreError};
use cdp_target::restore::keyring::Keyring;
use cdp_target::retention::Ladder;

use super::super::check::Depth;
use super::super::kept::{Due, Said};
use super::super::model::{Model, key};
use super::super::sabotage::Sabotage;
use super::super::trace::trace;
use super::{Process, Target};

const DAY_S: u64 = 86_400;

/// Who looks after the points, and how.
pub(crate) struct Upkeep {
    random: SimRandom,
    ladder: Ladder,
    segment_bytes_max: u64,
    /// What comes at last: apart, so that what came before stays a seed's own.
    at_last: SimRandom,
}

/// What it came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Care {
    pub(crate) checkpoints: u64,
    pub(crate) prunes: u64,
}

impl Upkeep {
    /// With a ladder of few points: simulated hours pass seldom.
    pub(crate) fn new(seed: u64, segment_bytes_max: u64) -> Self {
        let random = SimRandom::new(seed);
        let of = |spans: &[u64]| spans[random.below(spans.len() as u64) as usize];
        let ladder = Ladder {
            every_s: of(&[0, 4, 60, 3600]),
            hourly_s: of(&[0, 3600, 12 * 3600, 3 * DAY_S]),
            daily_s: of(&[0, 3 * DAY_S, 10 * DAY_S]),
            weekly_s: of(&[0, 30 * DAY_S]),
        };
        Self { random, ladder, segment_bytes_max, at_last: SimRandom::new(seed ^ 0x0a71_a570) }
    }
}

/// The group's writer, asked from beside it as `Maintenance` and the commands do.
struct Writer<'a> {
    process: &'a mut Process,
    /// Looks at the files, as a command does that runs beside the server.
    is_beside: bool,
}

impl Owner for Writer<'_> {
    fn adopt(&mut self, change: &Change) -> Result<Arc<GroupView>, JournalError> {
        let change = change.clone();
        self.process.with_writer(move |writer| writer.adopt(&change))?;
        self.process.upkeep_view(self.is_beside)
    }

    fn is_leased(&mut self) -> Result<bool, JournalError> {
        self.process.with_writer(|writer| Ok(writer.oldest_lease().is_some()))
    }
}

impl Process {
    fn with_writer<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn GroupWriter) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, JournalError> {
        let (sender, answer) = mpsc::channel();
        self.steps.with_writer(move |writer| drop(sender.send(writer.and_then(work))));
        let answer = answer.recv().expect("the group has done the work");
        answer.map_err(|error| match error {
            StoreError::Failed(error) => match error.downcast::<JournalError>() {
                Ok(error) => *error,
                Err(error) => JournalError::Refused(error.to_string()),
            },
            error => JournalError::Poisoned { cause: error.to_string(), full: matches!(error, StoreError::Full(_)) },
        })
    }

    fn upkeep_view(&self, is_beside: bool) -> Result<Arc<GroupView>, JournalError> {
        let view = self.groups.view(Target::place()).filter(|_| !is_beside);
        view.map_or_else(|| GroupView::open(Arc::clone(&self.storage), &Target::group_folder()).map(Arc::new), Ok)
    }

    /// Whether every acked point is known, the removed ones too: the chain is whole.
    pub(super) fn check_lineage(&mut self, model: &Model, depth: Depth) -> Result<(), String> {
        let at = match depth {
            Depth::Everything => None,
            Depth::Sample(other) => Some(other as usize % model.acked.len().max(1)),
        };
        for (_, head) in model.acked.iter().copied().enumerate().filter(|(index, _)| at.is_none_or(|at| at == *index)) {
            match self.with_writer(move |writer| writer.made_in(head)) {
                Ok(Some(_)) => {}
                Ok(None) => return Err(format!("{} was acked and is not known any more", head.epoch)),
                Err(error) => return Err(format!("whether {} was made cannot be told: {error}", head.epoch)),
            }
        }
        Ok(())
    }
}

impl Target {
    /// Has the points looked after.
    pub(crate) fn look_after(&mut self, upkeep: Upkeep) {
        self.upkeep = Some(upkeep);
    }

    /// Whatever an operator or the server itself thinks of next.
    pub(crate) fn care(&mut self, model: &mut Model) -> Result<Care, String> {
        let Some(upkeep) = self.upkeep.take() else { return Ok(Care::default()) };
        let done = self.next_care(&upkeep, model);
        self.upkeep = Some(upkeep);
        done
    }

    /// Once nothing goes wrong any more a prune is done as the ladder says.
    pub(crate) fn care_at_last(&mut self, model: &mut Model) -> Result<Care, String> {
        let Some(upkeep) = self.upkeep.take().filter(|_| !self.is_hurt) else { return Ok(Care::default()) };
        if let Some(process) = &mut self.process {
            process.built = None;
        }
        // Few segments at a time, so that some give way and others between them do not.
        let chunk_bytes_max = 1 + upkeep.at_last.below(20_000);
        let done = self.prune(&upkeep, model, false, chunk_bytes_max);
        self.upkeep = Some(upkeep);
        done
    }

    /// Reads everything once more while packs above the floor are rotten: the journal has what they are made of. Gives how many were.
    pub(crate) fn read_round_packs(&mut self, model: &mut Model) -> Result<u64, String> {
        let Some((upkeep, view)) = self.upkeep.as_ref().zip(self.view()).filter(|_| !self.is_hurt) else {
            return Ok(0);
        };
        let floor = view.manifest().floor;
        let is_above = |file: FileId| matches!(file, FileId::Slice(slice) if Some(slice.epoch) > floor);
        let (random, folder) = (&upkeep.at_last, Self::group_folder());
        let chosen = view.packs().into_iter().filter(|pack| is_above(pack.id) && random.below(3) > 0);
        let rotten: Vec<_> = chosen.map(|pack| (pack.id.path(&folder), random.below(8 * pack.len))).collect();
        let flip = || rotten.iter().for_each(|(path, bit)| self.disk.flip_bit(path, *bit));
        flip();
        trace(|| format!("rotten: {rotten:?}"));
        let checked = if rotten.is_empty() { Ok(()) } else { self.check_beside(model, Depth::Everything) };
        flip();
        checked.map(|()| rotten.len() as u64).map_err(|why| format!("{why}, with {rotten:?} rotten"))
    }

    fn next_care(&mut self, upkeep: &Upkeep, model: &mut Model) -> Result<Care, String> {
        let Some(process) = &mut self.process else { return Ok(Care::default()) };
        if model.acked.is_empty() {
            return Ok(Care::default());
        }
        if let Some(built) = process.built.take() {
            let mut writer = Writer { process, is_beside: false };
            let taken = writer.adopt(&Change::Checkpoint(built)).and_then(|_| self.end_build());
            return self.excuse("a checkpoint is taken", taken, false).map(|_| Care::default());
        }
        match upkeep.random.below(10) {
            0..4 => self.checkpoint(upkeep),
            4..8 => self.prune(upkeep, model, upkeep.random.below(4) == 0, CHUNK_BYTES_MAX),
            _ => self.mark(upkeep, model).map(|()| Care::default()),
        }
    }

    fn end_build(&self) -> Result<(), JournalError> {
        let process = self.process.as_ref().expect("it is up");
        end(process.storage.as_ref(), &Self::group_folder())
    }

    /// A failure that the disk explains, or being interrupted, is none.
    fn excuse<T>(&mut self, what: &str, done: Result<T, JournalError>, interrupted: bool) -> Result<Option<T>, String> {
        if let (Err(_), Some(process)) = (&done, &mut self.process) {
            process.is_unsure = true;
        }
        if let Err(error) = &done {
            trace(|| format!("{what}: {error}"));
        }
        match done {
            Ok(done) => Ok(Some(done)),
            Err(
                JournalError::Io { .. }
                | JournalError::Full { .. }
                | JournalError::Poisoned { .. }
                | JournalError::NotRead(_),
            ) => Ok(None),
            Err(JournalError::Interrupted) if interrupted => Ok(None),
            Err(_) if self.is_hurt || self.disk.is_down() => Ok(None),
            Err(error) => Err(format!("{what}: {error}")),
        }
    }

    /// A checkpoint at a listed point; where one was begun mostly that one is gone on with.
    fn checkpoint(&mut self, upkeep: &Upkeep) -> Result<Care, String> {
        let process = self.process.as_ref().expect("it is up");
        let (random, storage, folder) = (&upkeep.random, Arc::clone(&process.storage), Self::group_folder());
        let view = process.upkeep_view(random.below(2) == 0);
        let Some(view) = self.excuse("the group is opened", view, false)? else { return Ok(Care::default()) };
        let epochs: Vec<Epoch> = view.points().filter_map(|point| Some(point.ok()?.epoch)).collect();
        let Some(drawn) = epochs.get(random.below(epochs.len().max(1) as u64) as usize) else {
            return Ok(Care::default());
        };
        let Ok(Some(_hold)) = hold(storage.as_ref(), &folder) else { return Ok(Care::default()) };
        let begun = building(storage.as_ref(), &folder).filter(|begun| epochs.contains(begun));
        let epoch = begun.filter(|_| random.below(4) > 0).unwrap_or(*drawn);
        let keyring = Keyring::from(&key());
        let keys = Some(&keyring).filter(|_| random.below(4) > 0);
        let mut left = if random.below(4) == 0 { random.below(12) } else { u64::MAX };
        let now = Timestamp(self.clock.wall_ms());
        trace(|| format!("target builds a checkpoint at {epoch}, {} steps, with the key: {}", left, keys.is_some()));
        let built = Builder { view: &view, keys, random: &self.random, now }.build(
            epoch,
            &mut steps(&mut left),
            &mut |_, _| {},
        );
        let Some(built) = self.excuse(&format!("checkpoint at {epoch}"), built, left == 0)? else {
            return Ok(Care::default());
        };
        trace(|| format!("target has built {built:?}"));
        drop(view);
        let process = self.process.as_mut().expect("it is up");
        if random.below(3) == 0 {
            process.built = Some(built);
        } else {
            let taken = Writer { process, is_beside: false }.adopt(&Change::Checkpoint(built));
            let taken = taken.and_then(|_| self.end_build());
            self.excuse("a checkpoint is taken", taken, false)?;
        }
        Ok(Care { checkpoints: 1, prunes: 0 })
    }

    /// Prunes; `interrupted`: breaks it off somewhere.
    fn prune(
        &mut self,
        upkeep: &Upkeep,
        model: &mut Model,
        interrupted: bool,
        chunk_bytes_max: u64,
    ) -> Result<Care, String> {
        let (random, folder, wall) = (&upkeep.random, Self::group_folder(), Timestamp(self.clock.wall_ms()));
        let process = self.process.as_mut().expect("it is up");
        let is_beside = random.below(2) == 0;
        let Ok(view) = process.upkeep_view(is_beside) else { return Ok(Care::default()) };
        let listed: Result<Vec<Point>, _> = view.points().collect();
        let Ok(listed) = listed else { return Ok(Care::default()) };
        let Some(newest) = listed.last() else { return Ok(Care::default()) };
        let Ok(Some(_hold)) = hold(process.storage.as_ref(), &folder) else { return Ok(Care::default()) };
        let clock = match retention_clock(&view, wall, random.below(3) == 0) {
            Ok(clock) => clock,
            Err(ClockError::Jump(_) | ClockError::Journal(_)) => return Ok(Care::default()),
        };
        if keep_clock(&view, clock).is_err() {
            return Ok(Care::default());
        }
        let due =
            if self.is_hurt { None } else { Some(model.prune(&upkeep.ladder, &listed, head(newest), clock.now.0)?) };
        let keyring = Keyring::from(&key());
        let keep_only_newest = random.below(2) == 0;
        let prune = Prune {
            ladder: &upkeep.ladder,
            now: clock.now,
            wall,
            keys: Some(&keyring).filter(|_| random.below(4) > 0),
            random: &self.random,
            segment_bytes_max: upkeep.segment_bytes_max,
            chunk_bytes_max,
            checkpoint_share: 0.5,
            keep_only_newest,
        };
        let mut left = if interrupted { random.below(12) } else { u64::MAX };
        trace(|| format!("target prunes as of {}, {left} steps, with the key: {}", clock.now.0, prune.keys.is_some()));
        let mut owner = Writer { process, is_beside };
        let (view, sabotaged) = match self.sabotage.removes(&view, &prune) {
            Some(change) => match owner.adopt(&change) {
                Ok(view) => (view, true),
                Err(_) => return Ok(Care::default()),
            },
            None => (view, false),
        };
        let done = match prune.run(view, &mut owner, &mut steps(&mut left), &mut |_, _| {}) {
            Err(PruneError::OnlyNewest(_)) if sabotaged || due.as_ref().is_none_or(Due::may_be_refused) => {
                if let Some(due) = &due {
                    model.kept.refused(due);
                }
                return Ok(Care::default());
            }
            Err(PruneError::OnlyNewest(points)) => return Err(format!("a prune of {points} points is refused")),
            Err(PruneError::Journal(error)) => Err(error),
            Ok(done) => Ok(done),
        };
        trace(|| format!("target has pruned: {done:?}"));
        let Some(done) = self.excuse("prune", done, left == 0)? else { return Ok(Care::default()) };
        if let Some(due) = due.filter(|_| self.sabotage != Sabotage::PruneBySourceClock) {
            due.check(done.points)?;
        }
        if upkeep.random.below(2) == 0 {
            self.disk.clear_faults();
            self.check(model, Depth::Sample(upkeep.random.next()))?;
        }
        Ok(Care { checkpoints: u64::from(done.base.is_some()), prunes: 1 })
    }

    /// An operator pins or names a point, or takes that back.
    fn mark(&mut self, upkeep: &Upkeep, model: &mut Model) -> Result<(), String> {
        let random = &upkeep.random;
        let process = self.process.as_mut().expect("it is up");
        let Ok(view) = process.upkeep_view(false) else { return Ok(()) };
        let points: Vec<Point> = view.points().filter_map(Result::ok).collect();
        let Some(point) = points.get(random.below(points.len().max(1) as u64) as usize) else { return Ok(()) };
        let (epoch, is_set, is_pin) = (point.epoch, random.below(2) == 0, random.below(2) == 0);
        let label = format!("l{epoch}");
        let done = process.with_writer(move |writer| {
            if is_pin {
                writer.pin(epoch, is_set)
            } else {
                writer.label(epoch, Some(label.as_str()).filter(|_| is_set))
            }
        });
        let marks = model.kept.marks(point.hash);
        let said = if is_pin { &mut marks.pinned } else { &mut marks.labelled };
        *said = match (&done, is_set) {
            (Err(_), _) => Said::Maybe,
            (Ok(()), true) => Said::Yes,
            (Ok(()), false) => Said::No,
        };
        trace(|| format!("an operator marks {epoch}: pin {is_pin}, set {is_set}: {done:?}"));
        self.excuse("mark", done, false).map(drop)
    }
}

impl Due {
    /// Whether so little would stay that a prune has to be asked for it.
    fn may_be_refused(&self) -> bool {
        !self.keeps_some && self.go.len() >= 2
    }

    /// A prune that was done has removed all that goes, but what may be held.
    fn check(&self, removed: u64) -> Result<(), String> {
        let most = self.go.len();
        if ((most - self.unsure.len()) as u64..=most as u64).contains(&removed) {
            return Ok(());
        }
        Err(format!("{removed} points were removed, and {most} go, {} of which may be held", self.unsure.len()))
    }
}

const fn head(point: &Point) -> Head {
    Head { epoch: point.epoch, hash: point.hash }
}

/// Lets `left` steps be done.
fn steps(left: &mut u64) -> impl FnMut(u64) -> bool + '_ {
    move |_| {
        *left = left.saturating_sub(1);
        *left > 0
    }
}

//! `restore`: puts a volume back to a point.
//!
//! Looks first, as long as it takes, and writes nothing; only then what is there is kept as a point (`keeping`), and the volume is
//! written. Whatever ends it in between, the same command goes on.

mod keeping;
mod report;
mod source;

use super::failure::UserError;
use super::{RestoreArgs, run};
use crate::config::{Config, GroupConfig, VolumeConfig};
use crate::digests::KnownDigests;
use crate::probe::{self, Probe};
use crate::reader::{self, BlockReader, ReadTarget};
use crate::restore::compare::{self, Old, RestoreError, Side, Subject};
use crate::restore::disk::{self, Disk};
use crate::restore::fetch;
use crate::restore::line::{LineError, PointLine, PointSource};
use crate::restore::marker::Restoring;
use crate::restore::{Plan, Progress};
use crate::state::StateFolder;
use crate::tracker::device::Device;
use anyhow::{Context, Result};
use cdp_protocol::message::PointSummary;
use cdp_protocol::recall::{Answer, Question};
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{BLOCK_BYTES, GroupId, Head, VolumeSlot, blocks_in};
use cdp_seams::clock::{Clock, SystemClock};
use keeping::Keeping;
use report::{Bar, Done, Estimate, Outcome};
use roaring::RoaringBitmap;
use source::Origin;
use std::process::ExitCode;
use std::time::Duration;

/// Tries in a row to have the line back.
const LINE_TRIES: u32 = 8;
/// Before the first of them; doubles with each.
const LINE_PAUSE: Duration = Duration::from_secs(1);
/// Points that a target may list: more than are kept in a lifetime.
const POINTS_MAX: usize = 1 << 20;
/// Blocks that a dry run fetches to tell what the line carries: 1 MiB.
const SAMPLE_BLOCKS: u64 = 256;

/// What the command is about.
struct Job<'a> {
    state: &'a StateFolder,
    args: &'a RestoreArgs,
    config: Config,
    group: GroupId,
    key: DataKey,
    volume: VolumeConfig,
    /// Where the point is asked back from.
    from: Origin,
}

pub(super) fn restore(state: &StateFolder, args: &RestoreArgs) -> Result<ExitCode> {
    let job = Job::of(state, args)?;
    let _lock = if args.dry_run { None } else { Some(state.lock_restore()?) };
    let begun = Restoring::load(state, &args.group)?;
    if let Some(begun) = begun.as_ref().filter(|begun| !job.goes_on(begun)) {
        let error = UserError::new(format!("another restore is not over: {}", begun.describe()));
        return Err(error.hint(format!("finish it first: {}", begun.command(&args.group))).into());
    }
    let same = begun.as_ref().filter(|begun| begun.at == args.at);
    let at = same.map_or_else(|| args.at.clone(), |begun| begun.epoch.to_string());
    let mut line = job.open(&at)?;
    let point = line.point().clone();
    let of_point = point.volumes.iter().find(|volume| volume.slot == job.volume.slot).cloned();
    let of_point = of_point.ok_or_else(|| {
        let text = format!("point {} has no volume {}: it was protected later", point.head.epoch, args.volume);
        UserError::new(text).hint("cdp-source points lists the points")
    })?;
    let done = if args.dry_run { job.look(&mut *line, &of_point) } else { job.run(line, &of_point, begun) }?;
    report::print(args, &point, &done)
}

/// The points that the target holds, asked on a line of our own.
pub(super) fn points(state: &StateFolder, group: &str) -> Result<Vec<PointSummary>> {
    let facts = state.group(group)?.ok_or_else(|| {
        UserError::new(format!("no group named {group:?} is protected")).hint("cdp-source protect NAME=DEVICE")
    })?;
    let mut line = PointLine::open(run::load(state)?, facts.group, "latest")?;
    line.ask(VolumeSlot(0), Question::Points)?;
    let mut all: Vec<PointSummary> = Vec::new();
    while let Some(piece) = line.next_piece()? {
        let Answer::Points { points } = piece else { return Err(LineError::Answer("it is of something else").into()) };
        if all.len() + points.len() > POINTS_MAX {
            return Err(LineError::Answer("it lists more points than there can be").into());
        }
        all.extend(points);
    }
    Ok(all)
}

impl<'a> Job<'a> {
    fn of(state: &'a StateFolder, args: &'a RestoreArgs) -> Result<Self> {
        let config = state.config()?;
        let (from, group) = match &args.from {
            Some(path) => Origin::images(state, &args.group, path)?,
            None => Origin::target(state, &args.group)?,
        };
        let key = state.data_key(&args.group)?;
        let volumes = config.groups.get(&args.group).map(|group| group.volumes.as_slice()).unwrap_or_default();
        let configured = volumes.iter().find(|volume| volume.name == args.volume).cloned();
        let volume = match configured {
            None if from.is_image() && args.to.is_some() => from.volume(state, group, &key, args)?,
            None => {
                let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
                let error = UserError::new(format!("group {} has no volume named {:?}", args.group, args.volume));
                let error = match names.as_slice() {
                    [] if from.is_image() => error.hint("--to names the device to restore to"),
                    [] => error.hint("cdp-source status lists what is protected"),
                    names => error.hint(format!("it has {}", names.join(", "))),
                };
                return Err(error.into());
            }
            Some(volume) => volume,
        };
        Ok(Self { state, args, config, group, key, volume, from })
    }

    /// Opens the point that `at` names.
    fn open(&self, at: &str) -> Result<Box<dyn PointSource>> {
        self.from.open(self, at)
    }

    /// Whether a restore that was begun is of the same volume and to the same device: it is gone on with, or another point chosen.
    fn goes_on(&self, begun: &Restoring) -> bool {
        begun.slot == self.volume.slot && begun.to == self.args.to
    }

    fn subject(&self) -> Subject<'_> {
        Subject { group: self.group, slot: self.volume.slot, key: &self.key }
    }

    /// The digests of the volume; only where it is restored in place: another device is another's content.
    fn known(&self, size_bytes: u64) -> Option<KnownDigests> {
        let folder = self.state.digests(&self.args.group);
        let known =
            KnownDigests::open(self.state.storage(), &folder, self.group, self.volume.slot, blocks_in(size_bytes));
        // An image does not tell what was sent after it.
        known.filter(|_| self.args.to.is_none() && !self.from.is_image())
    }

    /// What is to be written to, looked at.
    fn place(&self) -> Result<Probe> {
        let storage = &**self.state.storage();
        let Some(to) = &self.args.to else { return Ok(probe::probe(storage, &self.volume.device)?) };
        let probe = probe::probe(storage, to)?;
        let of = |(group, config): (&String, &GroupConfig)| {
            let is_it = |volume: &&VolumeConfig| {
                probe::probe(storage, &volume.device).is_ok_and(|other| other.overlaps(&probe))
            };
            config.volumes.iter().find(is_it).map(|volume| format!("{group}/{}", volume.name))
        };
        if let Some(owner) = self.config.groups.iter().find_map(of) {
            let error = UserError::new(format!("{} is protected as {owner}", to.display()));
            return Err(error.hint("without --to a volume is restored in place").into());
        }
        Ok(probe)
    }

    /// Reads the volume's own device, mounted or not.
    fn own_reader(&self, size_bytes: u64) -> Result<Box<dyn BlockReader>> {
        let probe = probe::probe(&**self.state.storage(), &self.volume.device)?;
        let target = if probe.is_block() {
            Device::inspect(&probe.device)?.read_target()
        } else {
            disk::whole(&probe.device, probe.size_bytes)
        };
        let size_bytes = size_bytes.min(target.size_bytes);
        Ok(reader::open(&[ReadTarget { size_bytes, ..target }])?)
    }

    /// The old volume, where it can be read.
    fn old(&self, size_bytes: u64) -> Option<Box<dyn BlockReader>> {
        self.args.to.as_ref().filter(|_| !self.volume.device.as_os_str().is_empty())?;
        self.own_reader(size_bytes)
            .inspect_err(|error| eprintln!("the old volume is no source of blocks: {error:#}"))
            .ok()
    }

    /// A dry run: what differs, and what the line carries of it.
    fn look(&self, line: &mut dyn PointSource, of_point: &Volume) -> Result<Outcome> {
        let size_bytes = of_point.size_bytes;
        let probe = self.place()?;
        if probe.size_bytes < size_bytes {
            let device = probe.device;
            return Err(
                disk::DiskError::TooSmall { device, size_bytes: probe.size_bytes, needed_bytes: size_bytes }.into()
            );
        }
        let mut reader = match &self.args.to {
            Some(_) => reader::open(&[disk::whole(&probe.device, size_bytes)])?,
            None => self.own_reader(size_bytes)?,
        };
        let mut bar = Bar::new(&self.args.volume);
        let mut plan = self.compare(&mut Side::Reader(&mut *reader), size_bytes, line, &mut bar)?;
        bar.clear();
        let clock = SystemClock::new();
        let began = clock.monotonic();
        let sample: RoaringBitmap = spread(&plan.fetch, SAMPLE_BLOCKS);
        let (sample_bytes, _) = fetch::sample(line, &self.subject(), &sample, &mut plan)?;
        let estimate = Estimate::of(&plan, &sample, sample_bytes, clock.monotonic().saturating_sub(began));
        let (device, line_bytes, image) = (probe.device, line.received_bytes(), self.from.image());
        Ok(Outcome { plan, device, image, line_bytes, done: Done::Looked(estimate) })
    }

    fn compare(&self, side: &mut Side<'_>, size_bytes: u64, line: &mut dyn PointSource, bar: &mut Bar) -> Result<Plan> {
        let (known, mut old, subject) = (self.known(size_bytes), self.old(size_bytes), self.subject());
        let writes = matches!(side, Side::Disk(_));
        let mut on_progress = |progress: Progress| bar.show(progress);
        let (asked, unkept) = compare::candidates(
            side.reader(),
            blocks_in(size_bytes),
            known.as_ref(),
            line,
            &subject,
            &mut on_progress,
        )?;
        let old = old.as_deref_mut().map(|reader| Old { reader, writes });
        Ok(compare::plan(side, (&asked, &unkept), old, line, &subject, &mut on_progress)?)
    }

    fn run(&self, mut line: Box<dyn PointSource>, of_point: &Volume, begun: Option<Restoring>) -> Result<Outcome> {
        let size_bytes = of_point.size_bytes;
        let clock = SystemClock::new();
        let probe = self.place()?;
        let mut keeping = Keeping::new(self.state, self.args, begun)?;
        if self.args.to.is_some() {
            keeping.refuse_content(&probe)?;
        }
        let mut disk = Disk::open(&**self.state.storage(), &probe, size_bytes)?;
        let point = line.point().head;
        let marker = keeping.marker(self.volume.slot, point.epoch, clock.wall_ms());
        if self.args.to.is_some() {
            // What an old volume has is written while it is compared.
            keeping.begin(self.state, &self.args.group, &marker)?;
        }
        let mut bar = Bar::new(&self.args.volume);
        let mut plan = self.compare(&mut Side::Disk(&mut disk), size_bytes, &mut *line, &mut bar)?;
        bar.clear();
        if self.args.to.is_none() {
            self.refuse_sealed(&mut *line, &mut plan, &keeping)?;
            keeping.refuse_lost(point.epoch, &plan)?;
        }
        let outcome = plan.clone();
        if plan.differing_blocks() > 0 && self.args.to.is_none() {
            keeping.keep(self.state, &self.args.group, &plan, marker)?;
        }
        let mut bar = Bar::new(&self.args.volume);
        let (from, compared_bytes) = (clock.monotonic(), line.received_bytes());
        let fetched_bytes = self.write(&mut disk, &mut plan, line, &mut bar);
        bar.clear();
        let fetched_bytes = fetched_bytes.context(keeping.cut_off())?;
        disk.sync()?;
        if self.args.to.is_none() && !self.args.accept_lost && plan.lost_blocks() > outcome.lost_blocks() {
            let blocks = plan.lost_blocks();
            let text = format!("{blocks} blocks of point {} cannot be had; {}", point.epoch, keeping.cut_off());
            return Err(UserError::new(text)
                .hint("--at another point; or --accept-lost, which leaves these as they are")
                .into());
        }
        // The last byte is durable: the volume is the point's, as far as that could be had.
        keeping.end(self.state, &self.args.group)?;
        let seconds = clock.monotonic().saturating_sub(from).as_secs_f64();
        let done = Done::Restored { kept: keeping.kept(), fetched_bytes, seconds };
        let plan = Plan { lost: plan.lost, ..outcome };
        let (image, line_bytes) = (self.from.image(), compared_bytes + fetched_bytes);
        Ok(Outcome { plan, device: probe.device, image, line_bytes, done })
    }

    /// Tries some of what was compared blindly: where none of it opens with the group's key, nothing is overwritten for it.
    fn refuse_sealed(&self, line: &mut dyn PointSource, plan: &mut Plan, keeping: &Keeping<'_>) -> Result<()> {
        let sample = spread(&plan.sealed, SAMPLE_BLOCKS);
        if sample.is_empty() {
            return Ok(());
        }
        let (_, opened_blocks) = fetch::sample(line, &self.subject(), &sample, plan)?;
        if opened_blocks > 0 {
            return Ok(());
        }
        let bytes = plan.sealed.len() * BLOCK_BYTES as u64;
        let text = format!("{bytes} bytes of the point do not open with this machine's key; {}", keeping.cut_off());
        Err(UserError::new(text)
            .hint("--at another point; or `cdp-target export`, where the key of the machine before is")
            .into())
    }

    /// Writes what the plan names; comes back on another line where one is lost. Gives the bytes that came over the line.
    fn write(
        &self,
        disk: &mut Disk,
        plan: &mut Plan,
        line: Box<dyn PointSource>,
        bar: &mut Bar,
    ) -> Result<u64, RestoreError> {
        let (subject, head, before) = (self.subject(), line.point().head, plan.zero.len());
        let mut on_progress = |progress: Progress| bar.show(progress);
        fetch::write_zeros(disk, plan, &mut on_progress)?;
        let (mut line, mut bytes, mut tries) = (line, 0, 0);
        let all = before + plan.fetch.len();
        loop {
            let (left, from) = (plan.fetch.len(), line.received_bytes());
            let fetched = fetch::fetch(disk, plan, all - left, &mut *line, &subject, &mut on_progress);
            bytes += line.received_bytes() - from;
            let error = match fetched {
                Ok(()) => return Ok(bytes),
                Err(RestoreError::Line(error)) if error.is_lost() => error,
                Err(error) => return Err(error),
            };
            if plan.fetch.len() < left {
                tries = 0;
            }
            line = self.another_line(error, head, &mut tries)?;
        }
    }

    /// Another line, with the same point open on it.
    fn another_line(
        &self,
        mut error: LineError,
        head: Head,
        tries: &mut u32,
    ) -> Result<Box<dyn PointSource>, LineError> {
        let Origin::Target(identity) = &self.from else { return Err(error) };
        while *tries < LINE_TRIES {
            eprintln!("{error}; trying again");
            std::thread::sleep(LINE_PAUSE * 2_u32.pow((*tries).min(5)));
            *tries += 1;
            match PointLine::open((**identity).clone(), self.group, &head.epoch.to_string()) {
                Ok(line) if line.point().head == head => return Ok(Box::new(line)),
                Ok(_) => return Err(LineError::Answer("another point has this number now")),
                Err(other) if other.is_lost() => error = other,
                Err(other) => return Err(other),
            }
        }
        Err(error)
    }
}

/// So many of the blocks, from all over.
fn spread(blocks: &RoaringBitmap, count: u64) -> RoaringBitmap {
    let step = (blocks.len() / count).max(1) as usize;
    blocks.iter().step_by(step).take(count as usize).collect()
}

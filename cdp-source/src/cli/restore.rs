//! `restore`: puts a volume back to a point, or a machine's whole disk (`machine`).
//!
//! Looks first, as long as it takes, and writes nothing; only then what is there is kept as a point (`keeping`), and the volume is
//! written. Whatever ends it in between, the same command goes on.

mod keeping;
mod machine;
mod report;

use super::failure::UserError;
use super::{RestoreArgs, layout, run};
use crate::config::{Config, GroupConfig, VolumeConfig};
use crate::connect::Identity;
use crate::digests::KnownDigests;
use crate::probe::{self, Probe};
use crate::reader::{self, BlockReader, ReadTarget};
use crate::restore::compare::{self, Old, RestoreError, Side, Subject};
use crate::restore::disk::{self, Disk};
use crate::restore::fetch;
use crate::restore::line::{LineError, PointLine};
use crate::restore::marker::Restoring;
use crate::restore::{Plan, Progress};
use crate::state::StateFolder;
use crate::tracker::device::Device;
use anyhow::{Context, Result};
use cdp_protocol::message::PointSummary;
use cdp_protocol::recall::{Answer, OpenedPoint, Question};
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{BLOCK_BYTES, GroupId, Head, VolumeSlot, blocks_in};
use cdp_seams::clock::{Clock, SystemClock};
use keeping::Keeping;
use machine::Machine;
use report::{Bar, Done, Estimate, Outcome};
use roaring::RoaringBitmap;
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

/// Whose points the command is about, and where they go.
struct Office<'a> {
    state: &'a StateFolder,
    args: &'a RestoreArgs,
    config: Config,
    identity: Identity,
    group: GroupId,
    /// The volume as it is protected here; none where a disk is put back, which may be another machine's.
    own: Option<VolumeConfig>,
}

/// The same with a volume of an open point, and the key to it.
struct Job<'a> {
    office: Office<'a>,
    volume: Volume,
    key: DataKey,
}

pub(super) fn restore(state: &StateFolder, args: &RestoreArgs) -> Result<ExitCode> {
    let office = Office::of(state, args)?;
    let _lock = if args.dry_run { None } else { Some(state.lock_restore()?) };
    let begun = Restoring::load(state, &args.group)?;
    if let Some(begun) = begun.as_ref().filter(|begun| !office.goes_on(begun)) {
        let error = UserError::new(format!("another restore is not over: {}", begun.describe()));
        return Err(error.hint(format!("finish it first: {}", begun.command(&args.group))).into());
    }
    let same = begun.as_ref().filter(|begun| begun.at == args.at);
    let at = same.map_or_else(|| args.at.clone(), |begun| begun.epoch.to_string());
    let mut line = PointLine::open(office.identity.clone(), office.group, &at)?;
    let point = line.point().clone();
    let (volume, key) = (office.volume_of(&point)?, office.key(&mut line)?);
    let job = Job { office, volume, key };
    let begun = begun.filter(|begun| begun.slot == job.volume.slot);
    let done = if args.dry_run { job.look(&mut line) } else { job.run(line, begun) }?;
    report::print(state, args, &point, &done)
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

impl<'a> Office<'a> {
    fn of(state: &'a StateFolder, args: &'a RestoreArgs) -> Result<Self> {
        let config = state.config()?;
        let identity = run::load(state)?;
        if args.disk.is_some() {
            let group = machine::group(state, &identity, &args.group)?;
            return Ok(Self { state, args, config, identity, group, own: None });
        }
        let name = args.volume.as_deref().unwrap_or_default();
        let volumes = config.groups.get(&args.group).map(|group| group.volumes.as_slice()).unwrap_or_default();
        let volume = volumes.iter().find(|volume| volume.name == name).cloned().ok_or_else(|| {
            let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
            let error = UserError::new(format!("group {} has no volume named {name:?}", args.group));
            match names.as_slice() {
                [] => error.hint("cdp-source status lists what is protected"),
                names => error.hint(format!("it has {}", names.join(", "))),
            }
        })?;
        let facts = state.group(&args.group)?.with_context(|| format!("group {} has no state", args.group))?;
        Ok(Self { state, args, config, identity, group: facts.group, own: Some(volume) })
    }

    /// Whether a restore that was begun is of the same volume and to the same device: it is gone on with, or another point chosen.
    fn goes_on(&self, begun: &Restoring) -> bool {
        let is_same_volume = match &self.own {
            Some(volume) => begun.slot == volume.slot,
            None => self.args.volume.as_ref().is_none_or(|name| *name == begun.volume),
        };
        let is_disk = self.args.disk.is_some();
        is_same_volume && begun.is_disk == is_disk && begun.to.as_deref() == self.args.other_device()
    }

    /// The volume as the point has it.
    fn volume_of(&self, point: &OpenedPoint) -> Result<Volume> {
        let Some(own) = &self.own else { return machine::volume_of(point, self.args.volume.as_deref()) };
        let of_point = point.volumes.iter().find(|volume| volume.slot == own.slot).cloned();
        of_point.ok_or_else(|| {
            let text = format!("point {} has no volume {}: it was protected later", point.head.epoch, own.name);
            UserError::new(text).hint("cdp-source points lists the points").into()
        })
    }

    /// The key that the point's content is told under.
    fn key(&self, line: &mut PointLine) -> Result<DataKey> {
        match &self.own {
            Some(_) => Ok(self.state.data_key(&self.args.group)?),
            None => machine::key(self.state, &self.args.group, line),
        }
    }
}

impl Job<'_> {
    fn subject(&self) -> Subject<'_> {
        Subject { group: self.office.group, slot: self.volume.slot, key: &self.key }
    }

    /// The digests of the volume; only where it is restored in place: another device is another's content.
    fn known(&self, size_bytes: u64) -> Option<KnownDigests> {
        let Office { state, args, group, .. } = &self.office;
        let folder = state.digests(&args.group);
        let known = KnownDigests::open(state.storage(), &folder, *group, self.volume.slot, blocks_in(size_bytes));
        known.filter(|_| args.other_device().is_none())
    }

    /// What is to be written to, looked at.
    fn place(&self) -> Result<Probe> {
        let Office { state, args, config, own, .. } = &self.office;
        let storage = &**state.storage();
        let to = match (args.other_device(), own) {
            (None, Some(own)) => return Ok(probe::probe(storage, &own.device)?),
            (to, _) => to.context("a device to write to")?,
        };
        let probe = probe::probe(storage, to)?;
        if args.disk.is_some() {
            layout::refuse_pieces(&probe, "--to restores a volume by itself to a device")?;
        }
        let of = |(group, config): (&String, &GroupConfig)| {
            let is_it = |volume: &&VolumeConfig| {
                probe::probe(storage, &volume.device).is_ok_and(|other| other.overlaps(&probe))
            };
            config.volumes.iter().find(is_it).map(|volume| format!("{group}/{}", volume.name))
        };
        if let Some(owner) = config.groups.iter().find_map(of) {
            let error = UserError::new(format!("{} is protected as {owner}", to.display()));
            return Err(error.hint("without --to or --disk a volume is restored in place").into());
        }
        Ok(probe)
    }

    /// Reads the volume's own device, mounted or not.
    fn own_reader(&self, size_bytes: u64) -> Result<Box<dyn BlockReader>> {
        let own = self.office.own.as_ref().context("a volume of this machine")?;
        let probe = probe::probe(&**self.office.state.storage(), &own.device)?;
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
        self.office.args.to.as_ref()?;
        self.own_reader(size_bytes)
            .inspect_err(|error| eprintln!("the old volume is no source of blocks: {error:#}"))
            .ok()
    }

    /// A dry run: what differs, and what the line carries of it.
    fn look(&self, line: &mut PointLine) -> Result<Outcome> {
        let size_bytes = self.volume.size_bytes;
        let probe = self.place()?;
        disk::refuse_small(&probe, size_bytes)?;
        let mut reader = match self.office.args.other_device() {
            Some(_) => reader::open(&[disk::whole(&probe.device, size_bytes)])?,
            None => self.own_reader(size_bytes)?,
        };
        let machine = self.machine(line, &probe)?;
        let mut bar = Bar::new(&self.volume.name);
        let mut plan = self.compare(&mut Side::Reader(&mut *reader), line, &mut bar)?;
        bar.clear();
        let clock = SystemClock::new();
        let began = clock.monotonic();
        let sample: RoaringBitmap = spread(&plan.fetch, SAMPLE_BLOCKS);
        let (sample_bytes, _) = fetch::sample(line, &self.subject(), &sample, &mut plan)?;
        let estimate = Estimate::of(&plan, &sample, sample_bytes, clock.monotonic().saturating_sub(began));
        let (volume, line_bytes) = (self.volume.name.clone(), line.received_bytes());
        Ok(Outcome { volume, plan, device: probe.device, line_bytes, machine, done: Done::Looked(estimate) })
    }

    /// What a whole disk is at the point, where one is put back.
    fn machine(&self, line: &mut PointLine, probe: &Probe) -> Result<Option<Machine>> {
        if self.office.args.disk.is_none() {
            return Ok(None);
        }
        Machine::look(line, &self.subject(), self.volume.size_bytes, probe).map(Some)
    }

    fn compare(&self, side: &mut Side<'_>, line: &mut PointLine, bar: &mut Bar) -> Result<Plan> {
        let size_bytes = self.volume.size_bytes;
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

    fn run(&self, mut line: PointLine, begun: Option<Restoring>) -> Result<Outcome> {
        let Office { state, args, .. } = &self.office;
        let clock = SystemClock::new();
        let probe = self.place()?;
        disk::refuse_small(&probe, self.volume.size_bytes)?;
        let is_in_place = args.other_device().is_none();
        let mut keeping = Keeping::new(state, args, &self.volume.name, begun)?;
        if !is_in_place {
            keeping.refuse_content(&probe)?;
        }
        // Of a whole disk all is opened: something is to stand at its end.
        let size_bytes = if args.disk.is_some() { probe.size_bytes } else { self.volume.size_bytes };
        let mut disk = Disk::open(&**state.storage(), &probe, size_bytes)?;
        if args.disk.is_some() && keeping.overwrites_nothing() {
            machine::refuse_unknown(&mut disk)?;
        }
        let mut machine = self.machine(&mut line, &probe)?;
        let point = line.point().head;
        let marker = keeping.marker(self.volume.slot, point.epoch, clock.wall_ms());
        if !is_in_place {
            // What an old volume has is written while it is compared.
            keeping.begin(state, &args.group, &marker)?;
        }
        let mut bar = Bar::new(&self.volume.name);
        let mut plan = self.compare(&mut Side::Disk(&mut disk), &mut line, &mut bar)?;
        bar.clear();
        if is_in_place {
            self.refuse_sealed(&mut line, &mut plan, &keeping)?;
            keeping.refuse_lost(point.epoch, &plan)?;
        }
        let outcome = plan.clone();
        if plan.differing_blocks() > 0 && is_in_place {
            keeping.keep(state, &args.group, &plan, marker)?;
        }
        let mut bar = Bar::new(&self.volume.name);
        let (from, compared_bytes) = (clock.monotonic(), line.received_bytes());
        let fetched_bytes = self.write(&mut disk, &mut plan, line, &mut bar);
        bar.clear();
        let fetched_bytes = fetched_bytes.context(keeping.cut_off())?;
        disk.sync()?;
        if is_in_place && !args.accept_lost && plan.lost_blocks() > outcome.lost_blocks() {
            let blocks = plan.lost_blocks();
            let text = format!("{blocks} blocks of point {} cannot be had; {}", point.epoch, keeping.cut_off());
            return Err(UserError::new(text)
                .hint("--at another point; or --accept-lost, which leaves these as they are")
                .into());
        }
        if let Some(machine) = &mut machine {
            machine.finish(&mut disk, self.volume.size_bytes)?;
        }
        // The last byte is durable: the volume is the point's, as far as that could be had.
        keeping.end(state, &args.group)?;
        let seconds = clock.monotonic().saturating_sub(from).as_secs_f64();
        let done = Done::Restored { kept: keeping.kept(), fetched_bytes, seconds };
        let (volume, line_bytes) = (self.volume.name.clone(), compared_bytes + fetched_bytes);
        let plan = Plan { lost: plan.lost, ..outcome };
        Ok(Outcome { volume, plan, device: probe.device, line_bytes, machine, done })
    }

    /// Tries some of what was compared blindly: where none of it opens with the group's key, nothing is overwritten for it.
    fn refuse_sealed(&self, line: &mut PointLine, plan: &mut Plan, keeping: &Keeping<'_>) -> Result<()> {
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
    fn write(&self, disk: &mut Disk, plan: &mut Plan, line: PointLine, bar: &mut Bar) -> Result<u64, RestoreError> {
        let (subject, head, before) = (self.subject(), line.point().head, plan.zero.len());
        let mut on_progress = |progress: Progress| bar.show(progress);
        fetch::write_zeros(disk, plan, &mut on_progress)?;
        let (mut line, mut bytes, mut tries) = (line, 0, 0);
        let all = before + plan.fetch.len();
        loop {
            let (left, from) = (plan.fetch.len(), line.received_bytes());
            let fetched = fetch::fetch(disk, plan, all - left, &mut line, &subject, &mut on_progress);
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
    fn another_line(&self, mut error: LineError, head: Head, tries: &mut u32) -> Result<PointLine, LineError> {
        while *tries < LINE_TRIES {
            eprintln!("{error}; trying again");
            std::thread::sleep(LINE_PAUSE * 2_u32.pow((*tries).min(5)));
            *tries += 1;
            match PointLine::open(self.office.identity.clone(), self.office.group, &head.epoch.to_string()) {
                Ok(line) if line.point().head == head => return Ok(line),
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

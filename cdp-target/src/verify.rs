//! Re-reads a group's journal and proves what its points stand on, frame by frame.
//!
//! Checks every frame's checksums and that the frames follow one another, every index against its hash; with the key also
//! that records were made by its holder and that every seal opens. Names each damage with its place and the points that
//! need it; where a repair stands for it, and opens, it is told apart and nothing is wrong. Never writes.

use crate::journal::file::FileId;
use crate::journal::walk::Visit;
use crate::journal::{Damage as FoundDamage, GroupView, JournalError};
use crate::restore::keyring::Keyring;
use cdp_protocol::codec::is_authentic;
use cdp_protocol::frame::{Encoding, Frame, Kind};
use cdp_protocol::record::{Begin, Commit, PartEnd};
use cdp_protocol::units::Epoch;

/// Something that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The file, below the group's folder.
    pub file: String,
    /// Where in it.
    pub offset: u64,
    /// The blocks that were there, as far as the index tells.
    pub blocks: Vec<DamagedBlocks>,
    /// What is wrong.
    pub what: String,
    /// The points that need it; none where everything can still be read.
    pub points: Vec<Epoch>,
}

/// Blocks that stand on what is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DamagedBlocks {
    /// The volume's slot.
    pub volume: u16,
    /// The first.
    pub start: u32,
    /// How many.
    pub count: u32,
}

/// What was checked and what is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// Segments walked.
    pub segments: u64,
    /// Packs of checkpoints walked.
    pub packs: u64,
    /// Frames checked.
    pub frames: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Points found.
    pub points: u64,
    /// What is wrong.
    pub damages: Vec<Damage>,
    /// Damaged frames that a repair stands for.
    pub healed: Vec<Healed>,
}

/// A damaged frame that can be read all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Healed {
    /// The segment.
    pub segment: u64,
    /// Where in its file.
    pub offset: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.damages.is_empty()
    }
}

/// How far a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read.
    pub bytes: u64,
    /// Bytes there are.
    pub bytes_total: u64,
}

/// Checks the journal as `view` shows it. `keys` also open every seal; `at` reports only what that point needs.
///
/// # Errors
/// Where the storage fails; a segment that is missing is a damage, not an error.
pub fn verify(
    view: &GroupView,
    keys: Option<&Keyring>,
    at: Option<Epoch>,
    progress: &mut dyn FnMut(Progress),
) -> Result<VerifyReport, JournalError> {
    let mut report = VerifyReport::default();
    let mut found: Vec<FoundDamage> = Vec::new();
    let bytes_total = view.bytes() + view.packs().iter().map(|pack| pack.len).sum::<u64>();
    for segment in view.segments_from(0) {
        let file = view.file_id(segment);
        let mut visitor = Visitor { keys, file, frames: 0, damages: Vec::new() };
        let walked = view.walk(segment, &mut visitor)?;
        found.extend(walked.damages);
        report.bytes += walked.bytes;
        found.append(&mut visitor.damages);
        report.segments += 1;
        report.frames += visitor.frames;
        progress(Progress { bytes: report.bytes, bytes_total });
    }
    for sealed in view.packs() {
        let mut visitor = Visitor { keys, file: sealed.id, frames: 0, damages: Vec::new() };
        let walked = view.walk_file(&sealed, &mut visitor)?;
        found.extend(walked.damages);
        found.append(&mut visitor.damages);
        report.packs += 1;
        report.frames += visitor.frames;
        report.bytes += walked.bytes;
        progress(Progress { bytes: report.bytes, bytes_total });
    }
    found.extend(view.bad_images()?);
    for known in view.damages() {
        let place = |damage: &FoundDamage| (damage.segment, damage.slice, damage.offset);
        if !found.iter().any(|damage| place(damage) == place(known)) {
            found.push(known.clone());
        }
    }
    let (healed, found): (Vec<_>, Vec<_>) = found.into_iter().partition(|damage| is_healed(view, keys, damage));
    report.healed = healed
        .iter()
        .map(|FoundDamage { segment, offset, .. }| Healed { segment: *segment, offset: *offset })
        .collect();
    let mut epochs: Vec<Epoch> = view.points().filter_map(Result::ok).map(|point| point.epoch).collect();
    report.points = epochs.len() as u64;
    // Of points that cannot be listed any more, the manifest knows the first and the last of each segment.
    epochs.extend(view.unlisted().iter().flat_map(|(_, points)| [points.first, points.last]));
    epochs.sort_unstable();
    epochs.dedup();
    report.damages = found.iter().map(|damage| named(view, damage, &epochs)).collect();
    if let Some(at) = at {
        report.damages.retain(|damage| damage.points.contains(&at));
    }
    Ok(report)
}

/// Whether what stands for a damage is whole, and opens where there are keys.
fn is_healed(view: &GroupView, keys: Option<&Keyring>, damage: &FoundDamage) -> bool {
    let repair = view.repair_of(damage);
    repair.is_some_and(|repair| keys.is_none_or(|keys| keys.open(&repair.frame()).is_ok()))
}

fn named(view: &GroupView, damage: &FoundDamage, epochs: &[Epoch]) -> Damage {
    let reach = view.reach(damage);
    let hit =
        |epoch: &&Epoch| reach.is_some_and(|(first, last)| first <= **epoch && last.is_none_or(|last| **epoch <= last));
    let points = epochs.iter().filter(hit).copied().collect();
    let blocks = view.blocks_at(damage).into_iter();
    let blocks =
        blocks.map(|(slot, extent)| DamagedBlocks { volume: slot.0, start: extent.start.0, count: extent.count });
    Damage {
        file: view.name_of(damage),
        offset: damage.offset,
        blocks: blocks.collect(),
        what: damage.describe(),
        points,
    }
}

/// Checks with the key what a walk cannot.
struct Visitor<'a> {
    keys: Option<&'a Keyring>,
    file: FileId,
    frames: u64,
    damages: Vec<FoundDamage>,
}

impl Visit for Visitor<'_> {
    fn frame(&mut self, frame: &Frame<'_>, offset: u64) {
        self.frames += 1;
        let Some(keys) = self.keys else { return };
        let header = &frame.header;
        let mac_at = match header.kind {
            Kind::Synced => return,
            Kind::Begin => Begin::decode(frame.payload).ok().map(|(_, mac_at)| mac_at),
            Kind::PartEnd => PartEnd::decode(frame.payload).ok().map(|(_, mac_at)| mac_at),
            Kind::Commit => Commit::decode(frame.payload).ok().map(|(_, mac_at)| mac_at),
            Kind::Extents => return self.seal(frame, offset, keys),
        };
        if !mac_at.is_some_and(|mac_at| keys.any(|key| is_authentic(frame, mac_at, key))) {
            self.damage(frame, offset, "the record was not made by a holder of the key");
        }
    }
}

impl Visitor<'_> {
    fn seal(&mut self, frame: &Frame<'_>, offset: u64, keys: &Keyring) {
        if frame.header.encoding == Encoding::Lost {
            return;
        }
        if let Err(error) = keys.open(frame) {
            self.damage(frame, offset, &error.to_string());
        }
    }

    fn damage(&mut self, frame: &Frame<'_>, offset: u64, what: &str) {
        self.damages.push(FoundDamage {
            offset,
            len: frame.bytes.len() as u64,
            first_epoch: Some(frame.header.epoch),
            ..FoundDamage::of(self.file, what.to_owned())
        });
    }
}

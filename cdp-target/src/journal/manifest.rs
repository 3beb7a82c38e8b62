//! The manifest: what a group is, which segments it has, and what its operator said about its points.
//!
//! Owns its bytes (`docs/format/manifest.md`) and its replacement: always whole, never in part. The file holds two equal
//! copies, so that one spot of rot does not take the group's identity and key with it. A newer version is refused.

mod fields;

use super::bytes::{FieldError, Input, put_long};
use super::file::{FileId, Sealed, SliceId};
use super::removed::Removed;
use super::{GroupIdentity, JournalError};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::session::lineage::Lineage;
use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{Epoch, Generation, GroupId, Head, Timestamp};
use cdp_seams::storage::{Storage, read_all, replace};
use fields::{
    put_checkpoint, put_claim, put_count, put_damage, put_envelope, put_epoch, put_line, put_option, put_sealed,
    take_checkpoint, take_claim, take_damage, take_envelope, take_epoch, take_line, take_option, take_sealed,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// First bytes of a manifest.
pub const MAGIC: [u8; 8] = *b"CDPMANIF";
/// The layout described here.
///
/// Version 1 ends with the damages: no lineage, no forks, one envelope. Version 2 has no points removed and no checkpoints.
pub const VERSION: u16 = 3;
/// The longest manifest, in bytes.
const BYTES_MAX: u64 = 256 * 1024 * 1024;

/// A sealed segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SealedSegment {
    /// Its number.
    pub number: u64,
    /// 0 as its source wrote it; else the change of the manifest that it was rewritten for.
    pub revision: u64,
    /// Bytes of the file.
    pub len: u64,
    /// Where its frames end.
    pub frames_end: u64,
    /// BLAKE3 of its footer.
    pub footer_hash: [u8; 32],
    /// The points in it, if it has any.
    pub points: Option<PointRange>,
    /// The newest epoch whose frames it has; `Epoch(u64::MAX)` where that was not written down.
    pub newest_run: Epoch,
}

impl SealedSegment {
    /// The file.
    #[must_use]
    pub const fn id(&self) -> FileId {
        FileId::Segment { number: self.number, revision: self.revision }
    }

    /// As a file of frames.
    #[must_use]
    pub const fn sealed(&self) -> Sealed {
        let Self { len, frames_end, footer_hash, points, .. } = *self;
        Sealed { id: self.id(), len, frames_end, footer_hash, points }
    }

    /// What stands behind the segment in a file that has `len` bytes: of no use to anybody, and not ours.
    #[must_use]
    pub fn surplus(&self, len: u64) -> Option<Damage> {
        let surplus = len.checked_sub(self.len).filter(|surplus| *surplus > 0)?;
        let what = format!("{surplus} bytes stand behind the segment's end");
        Some(Damage { offset: self.len, len: surplus, ..Damage::of(self.id(), what) })
    }
}

/// Points of a segment, in short: what finds a point without reading every segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PointRange {
    /// The first.
    pub first: Epoch,
    /// The last.
    pub last: Epoch,
    /// The earliest cut time among them.
    pub earliest: Timestamp,
    /// The latest cut time among them.
    pub latest: Timestamp,
}

/// A full image at one point, readable without the journal before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Checkpoint {
    /// The point.
    pub epoch: Epoch,
    /// When it was made.
    pub made: Timestamp,
    /// Bytes of one of the two copies in its image index.
    pub index_len: u64,
    /// BLAKE3 of one of them.
    pub index_hash: [u8; 32],
    /// Bytes of its packs, shared ones too.
    pub held_bytes: u64,
    /// Bytes of them that the image needs.
    pub needed_bytes: u64,
    /// Blocks that were lost before it was made.
    pub lost_blocks: u64,
}

/// Bytes below the proven offset that are not what was written.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The segment; 0 where it is in a checkpoint's pack.
    pub segment: u64,
    /// The pack, where it is in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<SliceId>,
    /// Where it begins.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// The first point that may need them; `None` where no point does.
    pub first_epoch: Option<Epoch>,
    /// Whether the extents are unknown: any block from that point on may be hit.
    pub any_block: bool,
    /// What it is.
    pub what: String,
}

impl Damage {
    /// A damage of a file that no point needs, of no bytes yet.
    #[must_use]
    pub const fn of(file: FileId, what: String) -> Self {
        let (segment, slice) = match file {
            FileId::Segment { number, .. } => (number, None),
            FileId::Slice(slice) => (0, Some(slice)),
        };
        Self { segment, slice, offset: 0, len: 0, first_epoch: None, any_block: false, what }
    }

    /// Whether it is in that file.
    #[must_use]
    pub fn is_in(&self, file: FileId) -> bool {
        match file {
            FileId::Segment { number, .. } => self.slice.is_none() && self.segment == number,
            FileId::Slice(slice) => self.slice == Some(slice),
        }
    }

    /// The file, as people read it.
    #[must_use]
    pub fn place(&self) -> String {
        self.slice.map_or_else(|| format!("segment {}", self.segment), |slice| slice.to_string())
    }

    /// What it is, and how far it reaches where that cannot be told.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { what, any_block, .. } = self;
        if *any_block { format!("{what}; extents unknown: every later point may be affected") } else { what.clone() }
    }
}

/// What the operator said about a point.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Mark {
    /// Its name; an empty one takes away the name it was cut with.
    pub label: Option<String>,
    /// Whether it is kept from pruning.
    pub pinned: bool,
}

/// The manifest's content.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Manifest {
    /// Who the group is.
    pub identity: GroupIdentity,
    /// The generation granted last.
    pub generation: Generation,
    /// Why nothing is taken any more, where that is so.
    pub frozen: Option<String>,
    /// Sealed segments, by rising number.
    pub sealed: Vec<SealedSegment>,
    /// Number of the open segment.
    pub open: u64,
    /// The header of the open segment, byte for byte.
    #[serde(skip)]
    pub open_header: Vec<u8>,
    /// Labels and pins.
    pub marks: BTreeMap<Epoch, Mark>,
    /// Damage that recovery found.
    pub damages: Vec<Damage>,
    /// How the generations follow one another.
    pub lineage: Lineage,
    /// Sources whose history is another one than ours, and that wait for an operator's word.
    pub forks: Vec<Fork>,
    /// What an operator said about such sources.
    pub ruling: Ruling,
    /// Envelopes of the data keys before the present one: older points need them.
    #[serde(skip)]
    pub older_envelopes: Vec<Envelope>,
    /// Counts the changes that took files away: who reads by an older manifest may still need them.
    pub change: u64,
    /// Points that were removed.
    pub removed: Removed,
    /// The checkpoint below which the journal has no content any more.
    pub floor: Option<Epoch>,
    /// Full images, by rising epoch.
    pub checkpoints: Vec<Checkpoint>,
}

/// A source whose history is not of the one that goes on.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Fork {
    /// Where it stands.
    pub claim: Claim,
    /// The machine it runs on, as it says.
    pub host: String,
    /// When it came first, by the target's clock.
    pub at: Timestamp,
}

/// Why a manifest cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not a manifest.
    #[error("no manifest magic")]
    Magic,
    /// Written by a newer program.
    #[error("manifest format version {0}, this program reads up to {VERSION}")]
    Version(u16),
    /// Cut short or too long.
    #[error("manifest has the wrong length")]
    Length,
    /// Damaged.
    #[error("manifest checksum mismatch")]
    Checksum,
    /// The checksum holds but a field is impossible.
    #[error("manifest: {0}")]
    Field(#[from] FieldError),
}

/// Where the manifest of the group in `folder` is.
#[must_use]
pub fn path(folder: &Path) -> PathBuf {
    folder.join("manifest")
}

impl Manifest {
    /// Reads the manifest of the group in `folder`; tells whether one of its two copies is damaged.
    ///
    /// # Errors
    /// Where it cannot be read, both copies are damaged, or it is of a newer version.
    pub fn read(storage: &dyn Storage, folder: &Path) -> Result<(Self, bool), JournalError> {
        let path = path(folder);
        let bytes = read_all(storage, &path, BYTES_MAX).map_err(JournalError::io("read", &path))?;
        Self::decode_file(&bytes).map_err(|source| JournalError::Manifest { path, source })
    }

    /// Replaces the manifest of the group in `folder`.
    ///
    /// # Errors
    /// As the storage says; the old one or the new one is then in place.
    pub fn write(&self, storage: &dyn Storage, folder: &Path) -> Result<(), JournalError> {
        let path = path(folder);
        let copy = self.encode();
        replace(storage, &path, &[copy.as_slice(), &copy].concat()).map_err(JournalError::io("replace", &path))
    }

    /// Parses a file of two copies.
    ///
    /// # Errors
    /// Where neither copy is valid: what is wrong with the first.
    pub fn decode_file(bytes: &[u8]) -> Result<(Self, bool), ManifestError> {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        match (Self::decode(first), Self::decode(second)) {
            (Ok(manifest), Ok(other)) => Ok((manifest.clone(), manifest != other)),
            (Ok(manifest), Err(_)) | (Err(_), Ok(manifest)) => Ok((manifest, true)),
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// Where the histories end that there are: ours, whose newest point is `head`, and those of the forked sources, with
    /// what is known of these.
    pub fn histories(&self, head: Option<Head>) -> impl Iterator<Item = (Claim, Option<&Fork>)> {
        let ours = head.map(|head| Claim { generation: self.generation, head });
        ours.map(|ours| (ours, None)).into_iter().chain(self.forks.iter().map(|fork| (fork.claim, Some(fork))))
    }

    /// One copy's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        let identity = &self.identity;
        out.extend_from_slice(&identity.group.0);
        put_long(&mut out, identity.office.as_bytes());
        put_long(&mut out, identity.name.as_bytes());
        put_envelope(&mut out, &identity.envelope);
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        put_option(&mut out, self.frozen.as_deref());
        out.extend_from_slice(&self.open.to_le_bytes());
        put_long(&mut out, &self.open_header);
        out.extend_from_slice(&(self.sealed.len() as u32).to_le_bytes());
        self.sealed.iter().for_each(|segment| put_sealed(&mut out, segment));
        out.extend_from_slice(&(self.marks.len() as u32).to_le_bytes());
        for (epoch, mark) in &self.marks {
            out.extend_from_slice(&epoch.0.to_le_bytes());
            put_option(&mut out, mark.label.as_deref());
            out.push(u8::from(mark.pinned));
        }
        out.extend_from_slice(&(self.damages.len() as u32).to_le_bytes());
        self.damages.iter().for_each(|damage| put_damage(&mut out, damage));
        self.put_history(&mut out);
        self.put_images(&mut out);
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out
    }

    /// Parses one copy.
    ///
    /// # Errors
    /// Where it is none, damaged, or of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() < MAGIC.len() + 8 + 32 {
            return Err(ManifestError::Length);
        }
        if bytes[..8] != MAGIC {
            return Err(ManifestError::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if !(1..=VERSION).contains(&version) {
            return Err(ManifestError::Version(version));
        }
        let (summed, sum) = bytes.split_at(bytes.len() - 32);
        if blake3::hash(summed).as_bytes() != sum {
            return Err(ManifestError::Checksum);
        }
        if bytes[10..16] != [0; 6] {
            return Err(FieldError("reserved bytes").into());
        }
        let mut input = Input::new(&summed[16..]);
        let manifest = Self::take(&mut input, version)?;
        input.finish()?;
        Ok(manifest)
    }

    fn take(input: &mut Input<'_>, version: u16) -> Result<Self, FieldError> {
        let group = GroupId(input.array()?);
        let (office, name) = (input.text()?, input.text()?);
        let envelope = take_envelope(input)?;
        let identity = GroupIdentity { group, office, name, envelope };
        let generation = Generation(input.u64()?);
        let frozen = take_option(input)?;
        let open = input.u64()?;
        let open_header = input.long()?.to_vec();
        let mut sealed = Vec::new();
        for _ in 0..input.u32()? {
            let before = sealed.last().map_or(0, |before: &SealedSegment| before.number);
            sealed.push(Some(take_sealed(input, version)?).filter(|next| next.number > before).ok_or(SEALED_ORDER)?);
        }
        let mut marks = BTreeMap::new();
        for _ in 0..input.u32()? {
            let epoch = Epoch(input.u64()?);
            if marks.last_key_value().is_some_and(|(last, _)| *last >= epoch) {
                return Err(FieldError("order of the marks"));
            }
            marks.insert(epoch, Mark { label: take_option(input)?, pinned: input.flag()? });
        }
        let damages = (0..input.u32()?).map(|_| take_damage(input, version)).collect::<Result<_, _>>()?;
        let (lineage, forks, ruling, older_envelopes) = Default::default();
        let (change, removed, floor, checkpoints) = Default::default();
        let mut manifest = Self {
            identity,
            generation,
            frozen,
            sealed,
            open,
            open_header,
            marks,
            damages,
            lineage,
            forks,
            ruling,
            older_envelopes,
            change,
            removed,
            floor,
            checkpoints,
        };
        if version > 1 {
            manifest.take_history(input)?;
        }
        if version > 2 {
            manifest.take_images(input)?;
        }
        Ok(manifest)
    }

    /// What version 1 did not have.
    fn put_history(&self, out: &mut Vec<u8>) {
        put_count(out, self.lineage.lines().len());
        self.lineage.lines().iter().for_each(|line| put_line(out, line));
        put_count(out, self.forks.len());
        for fork in &self.forks {
            put_claim(out, &fork.claim);
            put_long(out, fork.host.as_bytes());
            out.extend_from_slice(&fork.at.0.to_le_bytes());
        }
        out.push(u8::from(self.ruling.chosen.is_some()));
        self.ruling.chosen.iter().for_each(|claim| put_claim(out, claim));
        put_count(out, self.ruling.left.len());
        self.ruling.left.iter().for_each(|claim| put_claim(out, claim));
        put_count(out, self.older_envelopes.len());
        self.older_envelopes.iter().for_each(|envelope| put_envelope(out, envelope));
    }

    fn take_history(&mut self, input: &mut Input<'_>) -> Result<(), FieldError> {
        let lines = (0..input.u32()?).map(|_| take_line(input)).collect::<Result<_, _>>()?;
        self.lineage = Lineage::new(lines).ok_or(FieldError("lineage"))?;
        for _ in 0..input.u32()? {
            let (claim, host) = (take_claim(input)?, input.text()?);
            self.forks.push(Fork { claim, host, at: Timestamp(input.i64()?) });
        }
        self.ruling.chosen = if input.flag()? { Some(take_claim(input)?) } else { None };
        self.ruling.left = (0..input.u32()?).map(|_| take_claim(input)).collect::<Result<_, _>>()?;
        self.older_envelopes = (0..input.u32()?).map(|_| take_envelope(input)).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// What version 2 did not have.
    fn put_images(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.change.to_le_bytes());
        put_count(out, self.removed.ranges().len());
        for (first, last) in self.removed.ranges() {
            out.extend_from_slice(&first.0.to_le_bytes());
            out.extend_from_slice(&last.0.to_le_bytes());
        }
        put_epoch(out, self.floor);
        put_count(out, self.checkpoints.len());
        self.checkpoints.iter().for_each(|checkpoint| put_checkpoint(out, checkpoint));
    }

    fn take_images(&mut self, input: &mut Input<'_>) -> Result<(), FieldError> {
        self.change = input.u64()?;
        let ranges = (0..input.u32()?).map(|_| Ok((Epoch(input.u64()?), Epoch(input.u64()?))));
        self.removed = Removed::new(ranges.collect::<Result<_, FieldError>>()?).ok_or(FieldError("removed points"))?;
        self.floor = take_epoch(input)?;
        for _ in 0..input.u32()? {
            let checkpoint = take_checkpoint(input)?;
            if self.checkpoints.last().is_some_and(|before| before.epoch >= checkpoint.epoch) {
                return Err(FieldError("order of the checkpoints"));
            }
            self.checkpoints.push(checkpoint);
        }
        let has_floor = |floor| self.checkpoints.iter().any(|checkpoint| checkpoint.epoch == floor);
        if self.floor.is_none_or(has_floor) { Ok(()) } else { Err(FieldError("floor")) }
    }

    /// The newest checkpoint at or before `epoch`.
    #[must_use]
    pub fn checkpoint_before(&self, epoch: Epoch) -> Option<&Checkpoint> {
        self.checkpoints.iter().rev().find(|checkpoint| checkpoint.epoch <= epoch)
    }
}

const SEALED_ORDER: FieldError = FieldError("order of the segments");

//! What the frames without extents carry: begin, part end, commit, synced.
//!
//! Owns their byte layout (`docs/format/records.md`). Begin, part end and commit end with a keyed BLAKE3 over the frame's
//! header and the record before it, so that only a holder of the group's data key can make them; whoever has no key
//! still reads them. A commit is built when its epoch is sent: it names its predecessor, so the points form a chain.

pub mod layouts;
pub mod volume_meters;

use crate::limits::{NAME_BYTES_MAX, VOLUMES_MAX};
use crate::units::{AttemptId, Class, Epoch, FrameHash, Head, KeyId, Timestamp, VolumeSlot};
use layouts::Layouts;
use volume_meters::VolumeMeters;

/// Bytes of a record's keyed hash.
pub const MAC_BYTES: usize = 32;

/// Starts an attempt: which key it is under, and what the group consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begin {
    /// The data key of the attempt.
    pub key: KeyId,
    /// The group's volumes, by rising slot.
    pub volumes: Vec<Volume>,
}

/// A volume as an epoch knows it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// Its place in the group.
    pub slot: VolumeSlot,
    /// Its size in bytes, not always whole blocks.
    pub size_bytes: u64,
    /// Its name.
    pub name: String,
}

/// Frames of one attempt, counted and hashed: what a part end or a commit vouches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameList {
    /// Frames of the attempt before this record, its `Begin` included.
    pub count: u64,
    /// The running BLAKE3 over their hashes, in order (`codec::FrameListHasher`).
    pub hash: FrameHash,
}

/// The parts of an epoch so far: each part end names the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PartChain {
    /// Number of parts.
    pub count: u32,
    /// Hash of the last one's `PartEnd` frame.
    pub hash: FrameHash,
}

/// Ends a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartEnd {
    /// The part before it in this epoch.
    pub predecessor: Option<PartChain>,
    /// The part's frames.
    pub frames: FrameList,
}

/// Ends an epoch and makes it a recovery point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The point before it; `None` for the first of a group.
    pub predecessor: Option<Predecessor>,
    /// The epoch's own frames.
    pub frames: FrameList,
    /// The acked parts that belong to it.
    pub parts: Option<PartChain>,
    /// The lowest epoch number merged into it; its own where nothing was.
    pub first_epoch: Epoch,
    /// Set where the source went on from an older point: that point's number.
    pub after_rollback_to: Option<Epoch>,
    /// How much applications may rely on it.
    pub class: Class,
    /// The instant of the cut, by the source's clock.
    pub cut_time: Timestamp,
    /// What the cut and the epoch amounted to.
    pub meters: Meters,
    /// A name given to the point when it was cut.
    pub label: Option<String>,
    /// What became of each volume since the point before, by rising slot; empty in commits of programs that did not count it.
    pub volumes: Vec<(VolumeSlot, VolumeMeters)>,
    /// How disks are laid out, where that is not as it was told last.
    pub layouts: Layouts,
}

/// The point before, and the attempt that made it: tells its frames even where its commit is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predecessor {
    /// Number and hash of its commit.
    pub head: Head,
    /// Its attempt.
    pub attempt: AttemptId,
}

/// What a cut and its epoch amounted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Meters {
    /// Rounds the cut needed.
    pub cut_rounds: u32,
    /// From the first flip to the validation, in microseconds.
    pub cut_us: u64,
    /// Blocks found dirty.
    pub dirty_blocks: u64,
    /// Blocks sent with content.
    pub content_blocks: u64,
    /// Blocks sent as holes.
    pub hole_blocks: u64,
    /// Blocks the device could not read: above zero, the point carries a warning.
    pub unreadable_blocks: u64,
    /// Bytes of the epoch's frames before the commit.
    pub frame_bytes: u64,
    /// Blocks captured again since the point before because writes to them may have been missed.
    pub recaptured_blocks: u64,
}

/// The target's proof that everything before an offset of a segment was durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Synced {
    /// Number of the segment it stands in.
    pub segment: u64,
    /// Everything before this offset of the segment was synced.
    pub offset: u64,
    /// The newest point then.
    pub head: Option<Head>,
    /// The target's clock when it was written: one stands before every commit, so that its receive time is on disk too.
    pub time: Timestamp,
}

/// Why a payload is not the record its frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Too few or too many bytes.
    #[error("record has the wrong length")]
    Length,
    /// A field that no program of ours writes.
    #[error("record field {0} is not valid")]
    Field(&'static str),
}

impl Begin {
    /// The record's bytes, without the keyed hash.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.key.0.to_vec();
        out.extend_from_slice(&(self.volumes.len() as u16).to_le_bytes());
        for volume in &self.volumes {
            out.extend_from_slice(&volume.slot.0.to_le_bytes());
            out.extend_from_slice(&volume.size_bytes.to_le_bytes());
            put_text(&mut out, &volume.name);
        }
        out
    }

    /// Parses a payload; gives the record and where its keyed hash begins.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(payload: &[u8]) -> Result<(Self, usize), RecordError> {
        let mut input = Input::new(payload)?;
        let key = KeyId(input.array()?);
        let count = usize::from(input.u16()?);
        if count > VOLUMES_MAX {
            return Err(RecordError::Field("volume count"));
        }
        let mut volumes: Vec<Volume> = Vec::with_capacity(count);
        for _ in 0..count {
            let volume = Volume { slot: VolumeSlot(input.u16()?), size_bytes: input.u64()?, name: input.text()? };
            if volumes.last().is_some_and(|last| last.slot >= volume.slot) {
                return Err(RecordError::Field("volume slot order"));
            }
            if volume.size_bytes > crate::units::VOLUME_BYTES_MAX || !crate::limits::is_name(&volume.name) {
                return Err(RecordError::Field("volume"));
            }
            volumes.push(volume);
        }
        Ok((Self { key, volumes }, input.finish()?))
    }
}

impl PartEnd {
    /// The record's bytes, without the keyed hash.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_parts(&mut out, self.predecessor);
        put_frames(&mut out, self.frames);
        out
    }

    /// Parses a payload; gives the record and where its keyed hash begins.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(payload: &[u8]) -> Result<(Self, usize), RecordError> {
        let mut input = Input::new(payload)?;
        let record = Self { predecessor: input.parts()?, frames: input.frames()? };
        Ok((record, input.finish()?))
    }
}

impl Commit {
    /// The record's bytes, without the keyed hash.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.push(u8::from(self.predecessor.is_some()));
        if let Some(predecessor) = self.predecessor {
            put_head(&mut out, predecessor.head);
            out.extend_from_slice(&predecessor.attempt.0);
        }
        put_frames(&mut out, self.frames);
        put_parts(&mut out, self.parts);
        out.extend_from_slice(&self.first_epoch.0.to_le_bytes());
        out.push(u8::from(self.after_rollback_to.is_some()));
        out.extend_from_slice(&self.after_rollback_to.unwrap_or_default().0.to_le_bytes());
        out.push(self.class as u8);
        out.extend_from_slice(&self.cut_time.0.to_le_bytes());
        let meters = &self.meters;
        out.extend_from_slice(&meters.cut_rounds.to_le_bytes());
        for number in [
            meters.cut_us,
            meters.dirty_blocks,
            meters.content_blocks,
            meters.hole_blocks,
            meters.unreadable_blocks,
            meters.frame_bytes,
            meters.recaptured_blocks,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        put_text(&mut out, self.label.as_deref().unwrap_or(""));
        volume_meters::put(&mut out, &self.volumes, !self.layouts.is_empty());
        layouts::put(&mut out, &self.layouts);
        out
    }

    /// Parses a payload; gives the record and where its keyed hash begins.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(payload: &[u8]) -> Result<(Self, usize), RecordError> {
        let mut input = Input::new(payload)?;
        let predecessor = if input.flag()? {
            Some(Predecessor { head: input.head()?, attempt: AttemptId(input.array()?) })
        } else {
            None
        };
        let frames = input.frames()?;
        let parts = input.parts()?;
        let first_epoch = Epoch(input.u64()?);
        let rolled_back = input.flag()?;
        let after_rollback_to = Epoch(input.u64()?);
        if !rolled_back && after_rollback_to.0 != 0 {
            return Err(RecordError::Field("rollback"));
        }
        let class = match input.u8()? {
            0 => Class::Crash,
            1 => Class::Filesystem,
            2 => Class::Application,
            _ => return Err(RecordError::Field("class")),
        };
        let cut_time = Timestamp(input.u64()? as i64);
        let meters = Meters {
            cut_rounds: input.u32()?,
            cut_us: input.u64()?,
            dirty_blocks: input.u64()?,
            content_blocks: input.u64()?,
            hole_blocks: input.u64()?,
            unreadable_blocks: input.u64()?,
            frame_bytes: input.u64()?,
            recaptured_blocks: input.u64()?,
        };
        let label = Some(input.text()?).filter(|label| !label.is_empty());
        let volumes = volume_meters::take(&mut input)?;
        let layouts = layouts::take(&mut input)?;
        let record = Self {
            predecessor,
            frames,
            parts,
            first_epoch,
            after_rollback_to: rolled_back.then_some(after_rollback_to),
            class,
            cut_time,
            meters,
            label,
            volumes,
            layouts,
        };
        Ok((record, input.finish()?))
    }
}

impl Synced {
    /// The record's bytes. It carries no keyed hash: the target has no key to make one.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.segment.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.push(u8::from(self.head.is_some()));
        if let Some(head) = self.head {
            put_head(&mut out, head);
        }
        out.extend_from_slice(&self.time.0.to_le_bytes());
        out
    }

    /// Parses a payload.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(payload: &[u8]) -> Result<Self, RecordError> {
        let mut input = Input { bytes: payload, at: 0 };
        let segment = input.u64()?;
        let offset = input.u64()?;
        let head = if input.flag()? { Some(input.head()?) } else { None };
        let time = Timestamp(input.u64()? as i64);
        input.finish()?;
        Ok(Self { segment, offset, head, time })
    }
}

fn put_head(out: &mut Vec<u8>, head: Head) {
    out.extend_from_slice(&head.epoch.0.to_le_bytes());
    out.extend_from_slice(&head.hash.0);
}

fn put_frames(out: &mut Vec<u8>, frames: FrameList) {
    out.extend_from_slice(&frames.count.to_le_bytes());
    out.extend_from_slice(&frames.hash.0);
}

fn put_parts(out: &mut Vec<u8>, parts: Option<PartChain>) {
    out.extend_from_slice(&parts.map_or(0, |parts| parts.count).to_le_bytes());
    out.extend_from_slice(&parts.map_or([0; 32], |parts| parts.hash.0));
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    assert!(text.len() <= NAME_BYTES_MAX, "names are checked where they come in");
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

/// Reads a record from its start; every read is checked.
struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    /// The payload without its keyed hash.
    fn new(payload: &'a [u8]) -> Result<Self, RecordError> {
        let len = payload.len().checked_sub(MAC_BYTES).ok_or(RecordError::Length)?;
        Ok(Self { bytes: &payload[..len], at: 0 })
    }

    const fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }

    fn finish(self) -> Result<usize, RecordError> {
        if self.is_at_end() { Ok(self.at) } else { Err(RecordError::Length) }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], RecordError> {
        let taken = self.bytes[self.at..].get(..len).ok_or(RecordError::Length)?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    fn u8(&mut self) -> Result<u8, RecordError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, RecordError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, RecordError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, RecordError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, RecordError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(RecordError::Field("flag")),
        }
    }

    fn text(&mut self) -> Result<String, RecordError> {
        let len = usize::from(self.u8()?);
        if len > NAME_BYTES_MAX {
            return Err(RecordError::Field("text length"));
        }
        String::from_utf8(self.take(len)?.to_vec()).map_err(|_| RecordError::Field("text"))
    }

    fn head(&mut self) -> Result<Head, RecordError> {
        Ok(Head { epoch: Epoch(self.u64()?), hash: FrameHash(self.array()?) })
    }

    fn frames(&mut self) -> Result<FrameList, RecordError> {
        Ok(FrameList { count: self.u64()?, hash: FrameHash(self.array()?) })
    }

    fn parts(&mut self) -> Result<Option<PartChain>, RecordError> {
        let count = self.u32()?;
        let hash = FrameHash(self.array()?);
        if count == 0 && hash.0 != [0; 32] {
            return Err(RecordError::Field("parts"));
        }
        Ok((count > 0).then_some(PartChain { count, hash }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Layout, Table};

    fn with_mac(mut record: Vec<u8>) -> Vec<u8> {
        record.extend_from_slice(&[0; MAC_BYTES]);
        record
    }

    fn commit() -> Commit {
        Commit {
            predecessor: Some(Predecessor {
                head: Head { epoch: Epoch(4), hash: FrameHash([1; 32]) },
                attempt: AttemptId([2; 16]),
            }),
            frames: FrameList { count: 8, hash: FrameHash([3; 32]) },
            parts: Some(PartChain { count: 2, hash: FrameHash([4; 32]) }),
            first_epoch: Epoch(5),
            after_rollback_to: Some(Epoch(1)),
            class: Class::Filesystem,
            cut_time: Timestamp(-1),
            meters: Meters { cut_rounds: 2, cut_us: 3, dirty_blocks: 4, recaptured_blocks: 5, ..Meters::default() },
            label: Some("before-upgrade".into()),
            volumes: vec![],
            layouts: vec![],
        }
    }

    #[test]
    fn records_decode_to_what_was_encoded() {
        let bytes = with_mac(commit().encode());
        assert_eq!(Commit::decode(&bytes), Ok((commit(), bytes.len() - MAC_BYTES)));
        let volumes = vec![Volume { slot: VolumeSlot(2), size_bytes: 5000, name: "data".into() }];
        let begin = Begin { key: KeyId([9; 8]), volumes };
        assert_eq!(Begin::decode(&with_mac(begin.encode())).map(|(begin, _)| begin), Ok(begin));
        let end = PartEnd { predecessor: None, frames: commit().frames };
        assert_eq!(PartEnd::decode(&with_mac(end.encode())).map(|(end, _)| end), Ok(end));
        let head = Some(Head { epoch: Epoch(4), hash: FrameHash([1; 32]) });
        let synced = Synced { segment: 3, offset: 4096, head, time: Timestamp(-5) };
        assert_eq!(Synced::decode(&synced.encode()), Ok(synced));
    }

    #[test]
    fn no_length_but_the_right_one_is_taken() {
        let bytes = with_mac(commit().encode());
        for len in 0..bytes.len() {
            assert!(Commit::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
        assert!(Commit::decode(&[bytes, vec![0]].concat()).is_err());
        let layout = Layout {
            sector_bytes: 512,
            size_bytes: 1 << 20,
            table: Table::None,
            has_boot_code: false,
            partitions: vec![],
        };
        let laid_out = Commit { layouts: vec![(VolumeSlot(2), layout)], ..commit() };
        let bytes = with_mac(laid_out.encode());
        assert_eq!(Commit::decode(&bytes), Ok((laid_out, bytes.len() - MAC_BYTES)));
        for len in (0..bytes.len()).filter(|len| *len != commit().encode().len() + MAC_BYTES) {
            assert!(Commit::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
        let of_before = commit().encode();
        let counted = Commit { volumes: vec![(VolumeSlot(2), VolumeMeters::default())], ..commit() };
        let bytes = with_mac(counted.encode());
        assert_eq!(Commit::decode(&bytes), Ok((counted, bytes.len() - MAC_BYTES)));
        for len in (0..bytes.len()).filter(|len| *len != of_before.len() + MAC_BYTES) {
            assert!(Commit::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
    }
}

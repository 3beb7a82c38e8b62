//! Which acked point a group's digests are of, and which of them are not to be believed (`docs/format/digests.md`).
//!
//! Replaced as a whole, all or nothing. Of a damaged one nothing is believed.

use super::volume::REGION_BLOCKS;
use cdp_protocol::units::{Epoch, FrameHash, GroupId, Head, Timestamp, VolumeSlot};
use cdp_seams::storage::{self, Storage};
use roaring::RoaringBitmap;
use std::io;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 4] = *b"CDPS";
const VERSION: u8 = 2;
/// Without proofs over the line.
const VERSION_LOCAL_PROOFS: u8 = 1;
/// More than the bitmaps of 64 volumes of 1 TiB take in which every other block is unsure.
const STATE_BYTES_MAX: u64 = 2 << 30;
const CRC_BYTES: usize = 4;

/// What is kept of a group's digests beside the slots.
#[derive(Debug, PartialEq)]
pub(super) struct State {
    pub(super) group: GroupId,
    /// Which files of slots belong to it.
    pub(super) era: [u8; 16],
    /// The acked point that the slots are of; nothing is known without one.
    pub(super) base: Option<Head>,
    pub(super) volumes: Vec<Kept>,
}

/// What is kept of a volume.
#[derive(Debug, PartialEq)]
pub(super) struct Kept {
    pub(super) slot: VolumeSlot,
    pub(super) blocks: u64,
    /// Blocks whose slot is not to be believed.
    pub(super) unsure: RoaringBitmap,
    /// When each region of 64 MiB was proved; zero where it never was.
    pub(super) proved: Vec<Timestamp>,
    /// The same, over the line.
    pub(super) proved_there: Vec<Timestamp>,
}

impl State {
    pub(super) fn load(storage: &dyn Storage, folder: &Path) -> io::Result<Self> {
        let bytes = storage::read_all(storage, &path(folder), STATE_BYTES_MAX)?;
        Self::decode(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "their state is damaged"))
    }

    /// Puts it in the place of the one before, durably.
    pub(super) fn store(mut self, storage: &dyn Storage, folder: &Path) -> io::Result<()> {
        for volume in &mut self.volumes {
            volume.unsure.optimize();
        }
        storage::replace(storage, &path(folder), &self.encode())
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.push(VERSION);
        out.push(u8::from(self.base.is_some()));
        out.extend_from_slice(&(self.volumes.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.group.0);
        out.extend_from_slice(&self.era);
        let base = self.base.unwrap_or(Head { epoch: Epoch(0), hash: FrameHash([0; 32]) });
        out.extend_from_slice(&base.epoch.0.to_le_bytes());
        out.extend_from_slice(&base.hash.0);
        for Kept { slot, blocks, unsure, proved, proved_there } in &self.volumes {
            out.extend_from_slice(&slot.0.to_le_bytes());
            out.extend_from_slice(&blocks.to_le_bytes());
            out.extend_from_slice(&(unsure.serialized_size() as u64).to_le_bytes());
            unsure.serialize_into(&mut out).expect("memory takes what is written to it");
            for time in proved.iter().chain(proved_there) {
                out.extend_from_slice(&time.0.to_le_bytes());
            }
        }
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (summed, crc) = bytes.split_at(bytes.len().checked_sub(CRC_BYTES)?);
        if crc != crc32fast::hash(summed).to_le_bytes() {
            return None;
        }
        let mut input = summed;
        let [magic @ .., version, has_base] = take::<6>(&mut input)?;
        if magic != MAGIC || ![VERSION, VERSION_LOCAL_PROOFS].contains(&version) || has_base > 1 {
            return None;
        }
        let volumes = u16::from_le_bytes(take(&mut input)?);
        let (group, era) = (GroupId(take(&mut input)?), take(&mut input)?);
        let base = Head { epoch: Epoch(u64::from_le_bytes(take(&mut input)?)), hash: FrameHash(take(&mut input)?) };
        let mut state = Self { group, era, base: Some(base).filter(|_| has_base == 1), volumes: Vec::new() };
        for _ in 0..volumes {
            let slot = VolumeSlot(u16::from_le_bytes(take(&mut input)?));
            let blocks = u64::from_le_bytes(take(&mut input)?);
            let len = usize::try_from(u64::from_le_bytes(take(&mut input)?)).ok()?;
            let (bitmap, rest) = input.split_at_checked(len)?;
            input = rest;
            let unsure = RoaringBitmap::deserialize_from(bitmap).ok()?;
            if unsure.max().is_some_and(|last| u64::from(last) >= blocks) {
                return None;
            }
            let regions = usize::try_from(blocks.div_ceil(REGION_BLOCKS.into())).ok()?;
            let proved = take_times(&mut input, regions)?;
            let proved_there = match version {
                VERSION_LOCAL_PROOFS => vec![Timestamp(0); regions],
                _ => take_times(&mut input, regions)?,
            };
            state.volumes.push(Kept { slot, blocks, unsure, proved, proved_there });
        }
        input.is_empty().then_some(state)
    }
}

fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, rest) = input.split_first_chunk::<N>()?;
    *input = rest;
    Some(*bytes)
}

fn take_times(input: &mut &[u8], count: usize) -> Option<Vec<Timestamp>> {
    let (times, rest) = input.split_at_checked(count.checked_mul(8)?)?;
    *input = rest;
    Some(times.as_chunks::<8>().0.iter().map(|time| Timestamp(i64::from_le_bytes(*time))).collect())
}

fn path(folder: &Path) -> PathBuf {
    folder.join("state")
}

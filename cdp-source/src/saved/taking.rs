//! Taking the record up when the volumes are tracked anew.
//!
//! Everything here is asked once the programs mark every write: what was written before that, since the machine was started, the
//! kernel has counted; what is written afterwards is marked.

use super::hold::Hold;
use super::proofs::Proofs;
use super::{Found, Saved, nature, samples, untouched};
use crate::agent::status::rfc3339;
use crate::reader;
use crate::tracker::device::Device;
use crate::tracker::identity::Identity;
use crate::tracker::{Left, LeftBehind};
use cdp_protocol::seal::DigestKey;
use cdp_protocol::session::memo::MEMO_BYTES_MAX;
use cdp_protocol::units::VolumeSlot;
use cdp_seams::storage::{self, Storage};
use roaring::RoaringBitmap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the last stop left, taken out of the state folder.
pub struct TakeUp {
    /// The record, or why there is none that could be believed.
    record: Result<Saved, String>,
    storage: Arc<dyn Storage>,
    memo: PathBuf,
    proofs: Proofs,
    digest_key: DigestKey,
}

impl TakeUp {
    /// Takes the record out of the group's `folder`: it is gone from there, whatever becomes of it. `memo`: the file that the group's memo is kept in.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>, folder: &Path, memo: &Path, digest_key: DigestKey) -> Self {
        let none = || "the agent was not stopped before that, or had no time to save what was dirty".to_owned();
        let record = Saved::take(&*storage, folder).and_then(|record| record.ok_or_else(none));
        let proofs = Proofs::new(Arc::clone(&storage), folder);
        Self { record, storage, memo: memo.to_owned(), proofs, digest_key }
    }

    /// Why the record is not of the very tracking that the state folder names, and of what is remembered of the target.
    fn unfit(&self, saved: &Saved, before: &Identity) -> Option<String> {
        let memo = storage::read_all(&*self.storage, &self.memo, MEMO_BYTES_MAX as u64);
        if saved.group != before.group || saved.tracker != before.tracker || saved.boot != before.boot {
            Some("the record of the last stop is of another tracking than the last one".to_owned())
        } else if memo.ok().as_ref() != Some(&saved.memo) {
            Some("the record of the last stop does not fit what is remembered of the target's points".to_owned())
        } else {
            None
        }
    }

    fn look(&self, saved: &Saved, slot: VolumeSlot, device: &Device) -> Result<RoaringBitmap, String> {
        let volume = saved.volumes.iter().find(|volume| volume.slot == slot);
        let found = volume.ok_or("it was not in the group when the agent was stopped")?.found.as_ref();
        let found = found.map_err(|reason| format!("at the stop of the agent: {reason}"))?;
        self.compare(found, device)?;
        // Before it is tracked as clean: a crash behind it leaves an audit that has nothing to find.
        self.proofs.demand(slot).map_err(|error| format!("it cannot be kept that it is to be audited: {error}"))?;
        Ok(found.dirty.clone())
    }

    /// Why the device may not be just what it was; it is held meanwhile.
    fn compare(&self, found: &Found, device: &Device) -> Result<(), String> {
        if found.size_bytes != device.size_bytes() {
            return Err(format!("it had {} bytes at the stop and has {}", found.size_bytes, device.size_bytes()));
        }
        let nature = nature::of(device);
        if found.nature != nature {
            return Err(format!("it is another device: {nature}; at the stop: {}", found.nature));
        }
        let hold = Hold::take(device)?;
        if let Some(reason) = untouched::why_not(device) {
            return Err(reason);
        }
        let blocks: RoaringBitmap = found.samples.iter().map(|(block, _)| block.0).collect();
        let mut reader =
            reader::open(&[device.read_target()]).map_err(|error| format!("it cannot be read: {error}"))?;
        let sampled = samples::read(&mut *reader, 0, &blocks, &|bytes| self.digest_key.digest(bytes))?;
        drop(hold);
        match sampled.iter().zip(&found.samples).find(|(is, was)| is != was) {
            Some(((block, _), _)) => Err(format!("it was written to since the stop: block {block} is another")),
            None => Ok(()),
        }
    }
}

impl LeftBehind for TakeUp {
    fn left(&self, before: &Identity, devices: &[(VolumeSlot, &Device)]) -> Result<Left, String> {
        let saved = self.record.as_ref().map_err(Clone::clone)?;
        if let Some(reason) = self.unfit(saved, before) {
            return Err(reason);
        }
        let volumes = devices.iter().map(|(slot, device)| self.look(saved, *slot, device)).collect();
        Ok(Left { stopped: rfc3339(saved.saved_at), volumes })
    }
}

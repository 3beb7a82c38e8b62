//! Saving the record when the agent is stopped.
//!
//! Each volume is held, what was written by way of its page cache is synced, and the tracking is flipped until nothing was in flight
//! at a flip: from there on nobody writes but who had the device open before. What is dirty is asked before and after the samples are
//! read, so that such a write is noticed while this lasts. A write after it is for the checks of the next start, and its audit.

use super::hold::Hold;
use super::{Found, Saved, SavedVolume, nature, samples};
use crate::reader::BlockReader;
use crate::tracker::device::Device;
use crate::tracker::{Parting, Tracker, TrackerError};
use cdp_protocol::seal::Digest;
use cdp_protocol::units::{Timestamp, blocks_in};
use cdp_seams::clock::Clock;
use cdp_seams::random::Random;
use cdp_seams::storage::Storage;
use roaring::RoaringBitmap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a flip is waited for at which nothing is in flight.
const QUIET_WITHIN: Duration = Duration::from_secs(2);

/// Where a group's record goes, and what saving it takes.
pub struct Saver {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
}

/// What a group saves its record of.
pub struct Leaving<'a> {
    /// Watches its volumes.
    pub tracker: &'a mut dyn Tracker,
    /// Reads them.
    pub reader: &'a mut dyn BlockReader,
    /// Its memo, as it is kept beside the record.
    pub memo: Vec<u8>,
    /// Makes digests.
    pub digest: &'a dyn Fn(&[u8]) -> Digest,
    /// Takes what flips give.
    pub marked: &'a mut dyn FnMut(&[RoaringBitmap]),
}

impl Saver {
    /// One that saves in `folder`.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>, folder: &Path, clock: Arc<dyn Clock>, random: Arc<dyn Random>) -> Self {
        Self { storage, folder: folder.to_owned(), clock, random }
    }

    /// Saves the record, with the volumes that nobody has mounted; gives it, or `None` for a tracking that no other boot could go on from.
    ///
    /// # Errors
    /// Why there is none, in a line.
    pub fn save(&self, mut leaving: Leaving<'_>) -> Result<Option<Saved>, String> {
        let Some(Parting { devices, .. }) = leaving.tracker.parting() else { return Ok(None) };
        let holds: Vec<_> = devices.iter().map(held).collect();
        let quiet = if holds.iter().any(Result::is_ok) { self.wait_for_quiet(&mut leaving) } else { Ok(()) };
        let Leaving { tracker, reader, memo, digest, .. } = leaving;
        let Some(before) = tracker.parting() else { return Ok(None) };
        let (tracker_name, boot) = (before.identity.tracker.clone(), before.identity.boot.clone());
        let mut volumes = Vec::new();
        for (index, (hold, device)) in holds.iter().zip(before.devices).enumerate() {
            let found = hold.as_ref().map_err(Clone::clone).and_then(|_| {
                quiet.clone()?;
                let chosen = samples::choose(blocks_in(device.size_bytes()), &*self.random);
                let samples = samples::read(&mut *reader, index, &chosen, digest)?;
                let mut dirty = before.dirty[index].clone();
                dirty.optimize();
                Ok(Found { size_bytes: device.size_bytes(), nature: nature::of(device), dirty, samples })
            });
            volumes.push(SavedVolume { slot: before.identity.volumes[index].slot, found });
        }
        let is_answered = before.is_answered;
        let Some(after) = tracker.parting() else { return Ok(None) };
        let after_is_answered = after.is_answered;
        for ((volume, before), after) in volumes.iter_mut().zip(&before.dirty).zip(&after.dirty) {
            if volume.found.is_ok() && before != after {
                volume.found = Err("it was written to meanwhile".to_owned());
            }
            if volume.found.is_ok() && !(is_answered && after_is_answered) {
                volume.found = Err("something was written of which nobody knows where".to_owned());
            }
        }
        let saved_at = Timestamp(self.clock.wall_ms());
        let saved = Saved { group: before.identity.group, tracker: tracker_name, boot, saved_at, memo, volumes };
        // Before this is durable there is no record, and nobody has let go of a volume.
        saved.store(&*self.storage, &self.folder).map_err(|error| format!("write it: {error}"))?;
        drop(holds);
        Ok(Some(saved))
    }

    /// Flips until one stands at which nothing was in flight, so that all that was ever written is marked.
    fn wait_for_quiet(&self, leaving: &mut Leaving<'_>) -> Result<(), String> {
        let deadline = self.clock.monotonic() + QUIET_WITHIN;
        loop {
            let mut reason = "its disk was busy".to_owned();
            match leaving.tracker.flip() {
                Ok(marked) => {
                    (leaving.marked)(&marked);
                    let is_settled = leaving.tracker.settle().is_ok_and(|is_settled| is_settled);
                    if is_settled && leaving.tracker.was_quiet() && leaving.tracker.report().trust.doubt.is_none() {
                        return Ok(());
                    }
                }
                Err(error @ (TrackerError::Stragglers(_) | TrackerError::InDoubt(_))) => reason = error.to_string(),
                Err(error) => return Err(error.to_string()),
            }
            if self.clock.monotonic() >= deadline {
                return Err(reason);
            }
            std::thread::yield_now();
        }
    }
}

fn held(device: &Device) -> Result<Hold, String> {
    let hold = Hold::take(device)?;
    hold.sync()?;
    Ok(hold)
}

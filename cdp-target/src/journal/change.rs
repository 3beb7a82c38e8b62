//! Changes of a group's store that were prepared elsewhere: a checkpoint that was built, points to remove, segments rewritten.
//!
//! The files are written, synced and named before; here the manifest alone changes, on the group's own thread, in an instant.
//! Whoever prepared it looked at an older manifest: a change that does not fit the present one is refused, and prepared anew. So is one
//! that names a file which is not there as it was written: it came late, and the file was swept away or replaced meanwhile.

use super::JournalError;
use super::file::{FileId, Sealed};
use super::manifest::{Checkpoint, Manifest, SealedSegment};
use super::sealed::Shelf;
use crate::checkpoint::index::{ImageIndex, SliceContent, copies};
use cdp_protocol::units::Epoch;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};

/// A change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A checkpoint was built; another one at the same point gives way.
    Checkpoint(Checkpoint),
    /// Points are removed.
    Remove {
        /// Ranges of epochs, both ends within; those that are no points are passed over.
        removed: Vec<(Epoch, Epoch)>,
    },
    /// Checkpoints are given up, and the journal's content below one of the others.
    Release {
        /// The checkpoints.
        checkpoints: Vec<Epoch>,
        /// Below this checkpoint nobody reads the journal any more.
        floor: Option<Epoch>,
    },
    /// Segments next to each other give way to others with what is still needed of them.
    Rewrite {
        /// Number and revision of those that go.
        replaced: Vec<(u64, u64)>,
        /// Those that take their place.
        by: Vec<SealedSegment>,
    },
}

impl Change {
    /// Refuses it where a file that it names is not there as it was written. What `manifest` names already is not looked at.
    ///
    /// # Errors
    /// `Stale` where one is not; or where the storage fails.
    pub(super) fn check_files(&self, files: &Shelf<'_>, manifest: &Manifest) -> Result<(), JournalError> {
        match self {
            Self::Checkpoint(checkpoint) => check_image(files, manifest, checkpoint),
            Self::Rewrite { by, .. } => by.iter().try_for_each(|new| check_file(files, &new.sealed())),
            Self::Remove { .. } | Self::Release { .. } => Ok(()),
        }
    }

    /// Forgets damages of packs that no checkpoint has any more: they go with their checkpoint, and nobody reads them again.
    pub(super) fn forget_damages(&self, files: &Shelf<'_>, manifest: &mut Manifest) -> Result<(), JournalError> {
        let may_go = matches!(self, Self::Checkpoint(_) | Self::Release { .. });
        if may_go
            && manifest.damages.iter().any(|damage| damage.slice.is_some())
            && let Some(named) = named(files, manifest)?
        {
            manifest.damages.retain(|damage| damage.slice.is_none_or(|slice| named.contains(&FileId::Slice(slice))));
        }
        Ok(())
    }

    /// Applies it; `newest` is the newest durable point.
    ///
    /// # Errors
    /// `Stale`, and nothing changed, where it does not fit.
    pub(super) fn apply(&self, manifest: &mut Manifest, newest: Option<Epoch>) -> Result<(), JournalError> {
        match self {
            Self::Checkpoint(checkpoint) => {
                if manifest.floor.is_some_and(|floor| checkpoint.epoch < floor) {
                    return stale("the checkpoint is below what the journal still has");
                }
                if manifest.floor == Some(checkpoint.epoch) && checkpoint.lost_blocks > 0 {
                    return stale(
                        "the checkpoint lacks blocks, and below the one that it would replace there is nothing",
                    );
                }
                manifest.checkpoints.retain(|known| known.epoch != checkpoint.epoch);
                let at = manifest.checkpoints.partition_point(|known| known.epoch < checkpoint.epoch);
                manifest.checkpoints.insert(at, *checkpoint);
            }
            Self::Remove { removed } => remove(manifest, removed, newest)?,
            Self::Release { checkpoints, floor } => release(manifest, checkpoints, *floor)?,
            Self::Rewrite { replaced, by } => rewrite(manifest, replaced, by)?,
        }
        manifest.change += 1;
        Ok(())
    }
}

fn stale<T>(what: &str) -> Result<T, JournalError> {
    Err(JournalError::Stale(what.to_owned()))
}

fn check_file(files: &Shelf<'_>, sealed: &Sealed) -> Result<(), JournalError> {
    if files.is_there(sealed)? { Ok(()) } else { stale(&format!("{} is not there as it was written", sealed.id)) }
}

fn check_image(files: &Shelf<'_>, manifest: &Manifest, checkpoint: &Checkpoint) -> Result<(), JournalError> {
    let Shelf { storage, folder, group, .. } = *files;
    let gone = || stale(&format!("the image index of checkpoint {} is not there as it was written", checkpoint.epoch));
    if copies(storage, folder, checkpoint)? < 2 {
        return gone();
    }
    let Some(image) = ImageIndex::open(storage, folder, group, checkpoint)? else { return gone() };
    let known = crate::checkpoint::packs(storage, folder, manifest);
    let known: HashMap<FileId, Sealed> = known.into_iter().map(|sealed| (sealed.id, sealed)).collect();
    for record in image.records() {
        let (_, _, record) = record.map_err(JournalError::io("read", &checkpoint.path(folder)))?;
        let Some(record) = record else { return gone() };
        if let SliceContent::Pack { sealed, .. } = record.content
            && known.get(&sealed.id) != Some(&sealed)
        {
            check_file(files, &sealed)?;
        }
    }
    Ok(())
}

/// The packs of all checkpoints; `None` where an image index cannot be read, and they cannot all be known.
fn named(files: &Shelf<'_>, manifest: &Manifest) -> Result<Option<HashSet<FileId>>, JournalError> {
    let Shelf { storage, folder, group, .. } = *files;
    let mut named = HashSet::new();
    for checkpoint in &manifest.checkpoints {
        let Some(image) = ImageIndex::open(storage, folder, group, checkpoint)? else { return Ok(None) };
        for record in image.records() {
            let (_, _, record) = record.map_err(JournalError::io("read", &checkpoint.path(folder)))?;
            match record.map(|record| record.content) {
                None => return Ok(None),
                Some(SliceContent::Zero) => {}
                Some(SliceContent::Pack { sealed, .. }) => {
                    named.insert(sealed.id);
                }
            }
        }
    }
    Ok(Some(named))
}

fn remove(manifest: &mut Manifest, removed: &[(Epoch, Epoch)], newest: Option<Epoch>) -> Result<(), JournalError> {
    let hits = |epoch: Epoch| removed.iter().any(|(first, last)| (*first..=*last).contains(&epoch));
    if removed.iter().any(|(first, last)| first > last || newest.is_none_or(|newest| *last >= newest)) {
        return stale("the newest point is never removed");
    }
    let is_held =
        |mark: &super::manifest::Mark| mark.pinned || mark.label.as_ref().is_some_and(|label| !label.is_empty());
    if let Some((epoch, _)) = manifest.marks.iter().find(|(epoch, mark)| hits(**epoch) && is_held(mark)) {
        return stale(&format!("point {epoch} was pinned or labelled meanwhile"));
    }
    for (first, last) in removed {
        manifest.removed.insert(*first, *last);
    }
    manifest.marks.retain(|epoch, _| !hits(*epoch));
    Ok(())
}

fn release(manifest: &mut Manifest, checkpoints: &[Epoch], floor: Option<Epoch>) -> Result<(), JournalError> {
    let floor = floor.max(manifest.floor);
    let stays =
        |epoch: Epoch| manifest.checkpoints.iter().any(|known| known.epoch == epoch) && !checkpoints.contains(&epoch);
    if let Some(floor) = floor {
        let below = floor.0.checked_sub(1).map(Epoch);
        let kept = below
            .is_some_and(|below| manifest.removed.within(Epoch(0), below).collect::<Vec<_>>() != [(Epoch(0), below)]);
        if !stays(floor) || kept {
            return stale("a kept point needs what is below the checkpoint");
        }
    }
    manifest.checkpoints.retain(|known| !checkpoints.contains(&known.epoch));
    manifest.floor = floor;
    Ok(())
}

fn rewrite(manifest: &mut Manifest, replaced: &[(u64, u64)], by: &[SealedSegment]) -> Result<(), JournalError> {
    let Some(from) = manifest.sealed.iter().position(|known| Some(&(known.number, known.revision)) == replaced.first())
    else {
        return stale("a segment was rewritten meanwhile");
    };
    let known = manifest.sealed[from..].iter().map(|known| (known.number, known.revision));
    if !known.take(replaced.len()).eq(replaced.iter().copied()) {
        return stale("a segment was rewritten meanwhile");
    }
    let numbers = replaced.iter().map(|(number, _)| *number);
    let in_order = by.windows(2).all(|pair| pair[0].number < pair[1].number);
    let inside = by.iter().all(|new| numbers.clone().any(|number| number == new.number));
    if !in_order || !inside {
        return stale("the new segments do not fit where the old ones stand");
    }
    // Every frame that is needed was read and verified: what was damaged had a repair, or nobody needs it.
    manifest.damages.retain(|damage| damage.slice.is_some() || !numbers.clone().any(|number| number == damage.segment));
    manifest.sealed.splice(from..from + replaced.len(), by.iter().copied());
    Ok(())
}

//! What is changed of a group beside its history: who it is, which generation goes on, what an operator said, which files there are.
//!
//! Invariant: each change is a manifest that takes the place of the one before, whole, and readers see it after that alone. A failure
//! is final, as everywhere in the journal.

use super::change::Change;
use super::file::FileId;
use super::manifest::{Damage, Fork, Manifest, Mark, SealedSegment};
use super::{GroupIdentity, GroupJournal, JournalError};
use cdp_protocol::session::lineage::{Line, Lineage};
use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{Epoch, Generation, Head};
use std::collections::HashSet;

/// Forks that wait for an operator at a time; of more the first are enough to decide by.
const FORKS_MAX: usize = 16;
/// Damages that the manifest names.
const DAMAGES_MAX: usize = 256;
/// Histories that were left, and whose sources are refused without freezing the group again.
const LEFT_MAX: usize = 256;

impl GroupJournal {
    /// Who the group is.
    #[must_use]
    pub const fn identity(&self) -> &GroupIdentity {
        &self.manifest.identity
    }

    /// Why the group takes nothing, where that is so.
    #[must_use]
    pub fn frozen(&self) -> Option<&str> {
        self.manifest.frozen.as_deref()
    }

    /// In which generation a durable point was made; `None` for one that is not here.
    ///
    /// # Errors
    /// Where the segment that has it cannot be read.
    pub fn made_in(&self, point: Head) -> Result<Option<Generation>, JournalError> {
        let commit = self.view.commit(point.epoch)?.filter(|commit| commit.head == point);
        Ok(commit.map(|commit| commit.generation))
    }

    /// How the generations follow one another.
    #[must_use]
    pub const fn lineage(&self) -> &Lineage {
        &self.manifest.lineage
    }

    /// What an operator said about forks.
    #[must_use]
    pub const fn ruling(&self) -> &Ruling {
        &self.manifest.ruling
    }

    /// Changes who the group is; the group's id stays, and so do the envelopes of data keys that older points need.
    ///
    /// # Errors
    /// Where the manifest cannot be replaced.
    pub fn set_identity(&mut self, identity: GroupIdentity) -> Result<(), JournalError> {
        assert_eq!(identity.group, self.manifest.identity.group, "a journal belongs to one group for ever");
        self.change(|manifest| {
            let key = identity.envelope.key;
            let before = std::mem::replace(&mut manifest.identity, identity);
            // The same key may be sealed anew; another one takes its place, and may be one that was there before.
            manifest.older_envelopes.retain(|envelope| envelope.key != key);
            if before.envelope.key != key {
                manifest.older_envelopes.push(before.envelope);
            }
        })
    }

    /// Begins a generation; durable when it returns. The forks that were resolved are history then.
    ///
    /// # Errors
    /// Where it is not above the one granted last, or the manifest cannot be replaced.
    pub fn begin(&mut self, line: Line) -> Result<(), JournalError> {
        let (wanted, granted) = (line.generation, self.place.chain.generation());
        if wanted <= granted {
            return Err(JournalError::Generation { wanted, granted });
        }
        self.change(|manifest| {
            manifest.generation = wanted;
            manifest.lineage.begin(line);
            manifest.ruling.chosen = None;
            manifest.forks.clear();
        })?;
        self.place.chain.grant(wanted);
        Ok(())
    }

    /// Takes nothing any more, until `resolve`: a source's history is another one.
    ///
    /// # Errors
    /// Where the manifest cannot be replaced.
    pub fn freeze(&mut self, reason: &str, fork: Option<Fork>) -> Result<(), JournalError> {
        let known = |fork: &Fork| self.manifest.forks.iter().any(|known| known.claim == fork.claim);
        let fork = fork.filter(|fork| !known(fork) && self.manifest.forks.len() < FORKS_MAX);
        if self.manifest.frozen.is_some() && fork.is_none() {
            return Ok(());
        }
        self.change(|manifest| {
            manifest.frozen.get_or_insert_with(|| reason.to_owned());
            manifest.forks.extend(fork);
        })
    }

    /// Ends a fork: the history that ends at `text` goes on with the next source that may; the others are left. Nothing of any
    /// is removed. `text` is an epoch, with `GENERATION/` before it and the start of its hash behind a colon as far as needed.
    ///
    /// # Errors
    /// Where the group is not forked, no history or several end there, or the manifest cannot be replaced.
    pub fn resolve(&mut self, text: &str) -> Result<Claim, JournalError> {
        let claims: Vec<Claim> = self.manifest.histories(self.synced_head()).map(|(claim, _)| claim).collect();
        let chosen = choose(&claims, text, self.manifest.frozen.is_some() || self.manifest.ruling.chosen.is_some())?;
        self.change(|manifest| {
            manifest.frozen = None;
            manifest.ruling.chosen = Some(chosen);
            manifest.ruling.left.retain(|left| !claims.contains(left));
            manifest.ruling.left.extend(claims.iter().filter(|claim| **claim != chosen));
            let surplus = manifest.ruling.left.len().saturating_sub(LEFT_MAX);
            manifest.ruling.left.drain(..surplus);
        })?;
        Ok(chosen)
    }

    /// Names a point, or takes its name away.
    ///
    /// # Errors
    /// Where there is no such point, or the manifest cannot be replaced.
    pub fn label(&mut self, epoch: Epoch, label: Option<&str>) -> Result<(), JournalError> {
        self.mark(epoch, |mark| mark.label = Some(label.unwrap_or_default().to_owned()))
    }

    /// Keeps a point from pruning, or no longer.
    ///
    /// # Errors
    /// Where there is no such point, or the manifest cannot be replaced.
    pub fn pin(&mut self, epoch: Epoch, pinned: bool) -> Result<(), JournalError> {
        self.mark(epoch, |mark| mark.pinned = pinned)
    }

    /// What a reading of a whole sealed segment or pack found takes the place of what was known of it, as far as there is room: of more
    /// the first are enough. Nothing, where the file has given way to another meanwhile.
    ///
    /// # Errors
    /// Where the manifest cannot be replaced.
    pub fn note_damages(&mut self, file: FileId, found: &[Damage]) -> Result<(), JournalError> {
        if !self.view.sealed_files().iter().any(|sealed| sealed.id == file) {
            return Ok(());
        }
        let (known, mut damages): (Vec<_>, Vec<_>) =
            self.manifest.damages.iter().cloned().partition(|damage| damage.is_in(file));
        if known == found {
            self.look_again();
            return Ok(());
        }
        let room = DAMAGES_MAX.saturating_sub(damages.len());
        damages.extend(found.iter().take(room).cloned());
        self.change(|manifest| manifest.damages = damages)
    }

    /// Gives what was prepared elsewhere its place.
    ///
    /// # Errors
    /// `Stale`, and nothing changed, where it does not fit any more or names files that are gone; or where the manifest cannot be replaced.
    pub fn adopt(&mut self, change: &Change) -> Result<(), JournalError> {
        self.check()?;
        change.check_files(&self.view.shelf(), &self.manifest)?;
        if matches!(change, Change::Checkpoint(_)) {
            self.prove_durably()?;
        }
        let newest = self.open.synced_head.map(|head| head.epoch);
        let mut changed = self.manifest.clone();
        change.apply(&mut changed, newest)?;
        change.forget_damages(&self.view.shelf(), &mut changed)?;
        self.leases.retain(|(_, lease)| lease.strong_count() > 0);
        self.leases.push((self.manifest.change, self.view.lease()));
        let before = self.named_files(change);
        self.change(|manifest| *manifest = changed)?;
        // What is kept open takes its room on the disk, whether it has a name or not.
        before.difference(&self.named_files(change)).for_each(|file| self.caches.forget(*file));
        Ok(())
    }

    /// The files that the manifest names, as far as the change may do away with them: to tell packs is to read image indexes.
    fn named_files(&self, change: &Change) -> HashSet<FileId> {
        let segments = self.manifest.sealed.iter().map(SealedSegment::id);
        let releases = matches!(change, Change::Release { checkpoints, .. } if !checkpoints.is_empty());
        let packs = if releases { self.view.packs() } else { Vec::new() };
        segments.chain(packs.iter().map(|pack| pack.id)).collect()
    }

    /// The oldest change of the manifest that a view here may still go by; `None` where all go by the present one.
    #[must_use]
    pub fn oldest_lease(&self) -> Option<u64> {
        let held = self.leases.iter().filter(|(_, lease)| lease.strong_count() > 0);
        held.map(|(change, _)| *change).min()
    }

    /// Has readers look anew for what stands beside the manifest: repairs. Not of a journal that stopped: what it has in memory may
    /// be half of a change.
    pub fn look_again(&mut self) {
        if self.poisoned.is_none() {
            self.publish();
        }
    }

    fn mark(&mut self, epoch: Epoch, set: impl FnOnce(&mut Mark)) -> Result<(), JournalError> {
        self.view.listed(epoch)?.ok_or(JournalError::NoPoint(epoch))?;
        self.change(|manifest| set(manifest.marks.entry(epoch).or_default()))
    }

    fn change(&mut self, set: impl FnOnce(&mut Manifest)) -> Result<(), JournalError> {
        self.check()?;
        set(&mut self.manifest);
        // A crash leaves the old manifest or the new one; after a failure nobody knows which.
        let written = self.manifest.write(self.storage.as_ref(), &self.folder);
        self.latch(written)?;
        self.publish();
        Ok(())
    }
}

/// The one history that `text` names.
fn choose(claims: &[Claim], text: &str, is_forked: bool) -> Result<Claim, JournalError> {
    if !is_forked {
        return Err(JournalError::NotForked);
    }
    let (place, prefix) = text.split_once(':').unwrap_or((text, ""));
    let (generation, epoch) = place.split_once('/').map_or((None, place), |(of, epoch)| (Some(of), epoch));
    let named = |claim: &&Claim| {
        generation.is_none_or(|of| claim.generation.to_string() == of)
            && claim.head.epoch.to_string() == epoch
            && claim.head.hash.to_string().starts_with(&prefix.to_lowercase())
    };
    match claims.iter().filter(named).collect::<Vec<_>>().as_slice() {
        [one] => Ok(**one),
        found => Err(JournalError::NoHistory {
            named: text.to_owned(),
            is_ambiguous: !found.is_empty(),
            known: claims.iter().copied().map(short_claim).collect(),
        }),
    }
}

/// The end of a history as people read and write it: generation, epoch and enough of the hash. The generation belongs to it:
/// a source that was granted one stands at the journal's newest point, and so may the one that made the point.
#[must_use]
pub fn short_claim(claim: Claim) -> String {
    let Claim { generation, head } = claim;
    let hash = head.hash.to_string();
    format!("{generation}/{}:{}", head.epoch, hash.get(..12).unwrap_or(&hash))
}

//! What the target holds of each block, as a digest, so that what has not changed after all is not sent.
//!
//! Invariant: a block is said to be unchanged only if its digest is that of the group's newest acked point, and nothing is under
//! way for it: no captured epoch that is not acked, no acked part that no epoch has taken in (a block that goes A, B, A must
//! not be left at B). What cannot be vouched for is unknown, and unknown is always sent.
//!
//! On disk the digests are as of one acked point, the **base**, but for the blocks that the state names as unsure (`state`,
//! `slots`). What was acked since is kept in memory and written now and then, in one go. So nothing is written for an epoch,
//! and an idle volume stays idle, though this folder lies on it. After a death the target is asked what it was sent after
//! the base; those blocks are unknown. A target that does not have the base, or cannot tell, leaves nothing known. Every failure
//! here costs bytes on the line and no more.

mod known;
mod learning;
mod slots;
mod state;
mod told;
mod under_way;
mod volume;

use crate::audit::Found;
use crate::capture::{BlockContent, Capture};
use crate::reader;
use cdp_protocol::record::Volume;
use cdp_protocol::seal::{Digest, DigestKey};
use cdp_protocol::units::{AttemptId, Block, Extent, GroupId, Head, Timestamp, VolumeSlot, blocks_in};
use cdp_seams::random::{self, Random};
use cdp_seams::storage::Storage;
pub use known::KnownDigests;
pub use learning::Learning;
use roaring::RoaringBitmap;
pub use slots::slots_path;
use slots::{RUN_BLOCKS_MAX, Slot, SlotFile};
use state::State;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
pub use told::Told;
pub use under_way::Replacement;
use under_way::UnderWay;
use volume::VolumeDigests;

/// Digests in memory at which they are written at once: about 4 MiB of them.
const YOUNG_DIGESTS_MAX: usize = 1 << 16;
/// Holes in memory at which they are written at once: 16 MiB of slots.
const YOUNG_HOLES_MAX: u64 = 1 << 20;
/// So many are written after `FEW_AFTER`, fewer only after `ANY_AFTER`: what is not written costs its blocks after a power cut, and what
/// is written makes an idle volume less so.
const FEW_DIGESTS: u64 = 1024;
const FEW_AFTER: Duration = Duration::from_secs(60);
const ANY_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The digests of a group's blocks.
pub struct Digests {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    group: GroupId,
    key: DigestKey,
    volumes: Vec<VolumeDigests>,
    phase: Phase,
    /// The acked point that what is known is of.
    head: Option<Head>,
    /// The one that the files are of.
    base: Option<Head>,
    under_way: VecDeque<UnderWay>,
    /// The target holds parts that no point has taken in, and that an agent before may have sent.
    has_parts: bool,
    /// Regions were proved since they were written last.
    has_new_proofs: bool,
    /// When they were written last.
    written_at: Duration,
}

/// Whether anything is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The group was not opened yet.
    Unopened,
    /// The target is asked what it was sent after `head`, and has told so many pages of it.
    Asking(u32),
    /// The digests are those of `head`.
    Ready,
    /// They cannot be kept.
    Off,
}

/// What comparing a block has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The target holds it.
    Same,
    /// It was not known what the target holds: this.
    Learnt,
    /// The target holds something else.
    Differs,
    /// It is on its way.
    NotNow,
}

impl Digests {
    /// Takes up what is in `folder`, which is made where it is missing. Where that is of another group, or damaged, nothing is known.
    #[must_use]
    pub fn open(
        storage: Arc<dyn Storage>,
        folder: &Path,
        group: GroupId,
        key: DigestKey,
        volumes: &[Volume],
        random: &dyn Random,
    ) -> Self {
        let none = |volume: &Volume| VolumeDigests::new(volume.slot, blocks_in(volume.size_bytes));
        let mut digests = Self {
            storage,
            folder: folder.to_owned(),
            group,
            key,
            volumes: volumes.iter().map(none).collect(),
            phase: Phase::Unopened,
            head: None,
            base: None,
            under_way: VecDeque::new(),
            has_parts: false,
            has_new_proofs: false,
            written_at: Duration::ZERO,
        };
        let taken_up = digests.take_up().or_else(|why| {
            tracing::info!(%group, why, "the digests of this group's blocks are made anew");
            digests.start_over(random::array(random)).map_err(|error| error.to_string())
        });
        if let Err(error) = taken_up {
            digests.off("cannot be made", &error);
        }
        digests
    }

    /// No digests: everything is sent.
    #[cfg(any(test, feature = "sim"))]
    #[must_use]
    pub fn none(storage: Arc<dyn Storage>, key: DigestKey) -> Self {
        Self {
            storage,
            folder: PathBuf::new(),
            group: GroupId::default(),
            key,
            volumes: Vec::new(),
            phase: Phase::Off,
            head: None,
            base: None,
            under_way: VecDeque::new(),
            has_parts: false,
            has_new_proofs: false,
            written_at: Duration::ZERO,
        }
    }

    /// Takes up what is on disk, or tells why it is of no use.
    fn take_up(&mut self) -> Result<(), String> {
        let state = State::load(&*self.storage, &self.folder).map_err(|error| error.to_string())?;
        if state.group != self.group {
            return Err("they are another group's".into());
        }
        let mut kept = state.volumes;
        let is_ours =
            |volume: &VolumeDigests| kept.iter().any(|kept| (kept.slot, kept.blocks) == (volume.slot, volume.blocks));
        if !self.volumes.iter().any(is_ours) {
            return Err("they are of none of its volumes".into());
        }
        for volume in &mut self.volumes {
            let slot = volume.slot;
            let failed = |error| format!("volume {slot}: {error}");
            let at = kept.iter().position(|kept| (kept.slot, kept.blocks) == (volume.slot, volume.blocks));
            let place = (&*self.storage, self.folder.as_path(), volume.slot, volume.blocks);
            if let Some(kept) = at.map(|at| kept.swap_remove(at)) {
                volume.file = Some(SlotFile::open(place, &state.era).map_err(failed)?);
                (volume.unsure, volume.proved, volume.proved_there) = (kept.unsure, kept.proved, kept.proved_there);
            } else {
                // One that came to the group since.
                volume.know_nothing();
                volume.file = Some(SlotFile::make(place, &state.era).map_err(failed)?);
            }
        }
        (self.head, self.base) = (state.base, state.base);
        Ok(())
    }

    /// Forgets everything. The state goes first: files of an older one are of another era, and not believed.
    fn start_over(&mut self, era: [u8; 16]) -> io::Result<()> {
        self.storage.create_dir_all(&self.folder)?;
        (self.head, self.base) = (None, None);
        self.under_way.clear();
        for volume in &mut self.volumes {
            *volume = VolumeDigests::new(volume.slot, volume.blocks);
            volume.know_nothing();
        }
        self.state(era, false).store(&*self.storage, &self.folder)?;
        for volume in &mut self.volumes {
            let place = (&*self.storage, self.folder.as_path(), volume.slot, volume.blocks);
            volume.file = Some(SlotFile::make(place, &era)?);
        }
        self.storage.sync_dir(&self.folder)
    }

    /// The target took the group up, at this newest point. `has_parts`: whether it holds parts that its newest point has not taken
    /// in, and that go on.
    pub fn opened(&mut self, head: Option<Head>, has_parts: bool) {
        self.has_parts = has_parts;
        match self.phase {
            Phase::Off => {}
            // What is known is known of this very point.
            Phase::Ready if self.head == head => {}
            Phase::Unopened if self.head == head && head.is_some() && !has_parts => self.phase = Phase::Ready,
            _ if self.head.is_some() && head.is_some() => self.phase = Phase::Asking(0),
            _ => self.know_nothing(head),
        }
    }

    /// The point after which the target is being asked what it was sent.
    #[must_use]
    pub fn asking(&self) -> Option<Head> {
        self.head.filter(|_| matches!(self.phase, Phase::Asking(_)))
    }

    /// A page of what the target was sent after `since`; with the last one, `head` is the point that all else is known of.
    pub fn changed(
        &mut self,
        since: Head,
        slot: VolumeSlot,
        extents: &[Extent],
        page: u32,
        is_last: bool,
        head: Option<Head>,
    ) {
        let Phase::Asking(next) = self.phase else { return };
        // Where pages are missing, the question is asked again.
        if self.head != Some(since) || page != next && page != 0 {
            return;
        }
        self.forget(slot, extents);
        if self.has_parts {
            // Any of them may be of a part: what is on the disk is then no point's yet, and never will be if the part is void.
            self.volumes
                .iter_mut()
                .filter(|volume| volume.slot == slot)
                .for_each(|volume| volume.hold_in_parts(extents));
        }
        (self.phase, self.head) = if is_last { (Phase::Ready, head) } else { (Phase::Asking(page + 1), self.head) };
    }

    /// The target cannot tell what it was sent: nothing is known.
    pub fn changed_unknown(&mut self, since: Head, head: Option<Head>) {
        if self.asking() == Some(since) {
            self.know_nothing(head);
        }
    }

    /// Nothing is known, and what comes is of point `head` on.
    fn know_nothing(&mut self, head: Option<Head>) {
        tracing::debug!(group = %self.group, "what the target holds of each block is not known: all of it is sent");
        for volume in &mut self.volumes {
            volume.know_nothing();
            if self.has_parts {
                volume.hold_all_in_parts();
            }
        }
        (self.phase, self.head) = (Phase::Ready, head);
    }

    /// These blocks are unknown: the target has lost them, or was sent others since.
    pub fn forget(&mut self, slot: VolumeSlot, extents: &[Extent]) {
        let Some(volume) = self.volumes.iter_mut().find(|volume| volume.slot == slot) else { return };
        for extent in extents {
            volume.forget(*extent);
        }
    }

    /// Takes those blocks out of a capture that the target holds already, and gives them.
    pub fn take_out_unchanged(&mut self, capture: &mut Capture) -> Vec<RoaringBitmap> {
        let mut unchanged = vec![RoaringBitmap::new(); capture.volumes.len()];
        if self.phase != Phase::Ready {
            return unchanged;
        }
        for (at, same) in unchanged.iter_mut().enumerate() {
            match self.unchanged_of(capture, at) {
                Ok(blocks) => *same = blocks,
                Err(error) => {
                    self.off("cannot be read", &error.to_string());
                    break;
                }
            }
        }
        capture.take_out(&unchanged);
        unchanged
    }

    fn unchanged_of(&self, capture: &Capture, at: usize) -> io::Result<RoaringBitmap> {
        let (volume, captured) = (&self.volumes[at], &capture.volumes[at]);
        let mut may_be = captured.blocks().clone();
        #[cfg(feature = "sabotage")]
        let is_looked_at = !sabotage::passes_over_under_way();
        #[cfg(not(feature = "sabotage"))]
        let is_looked_at = true;
        if is_looked_at {
            may_be -= &volume.in_parts;
            self.under_way.iter().for_each(|under_way| may_be -= &under_way.blocks[at]);
        }
        let mut same = RoaringBitmap::new();
        for extent in reader::runs(&may_be, RUN_BLOCKS_MAX) {
            for (block, slot) in extent.blocks().zip(volume.slots(extent)?) {
                let is_same = match (slot, captured.block(block)) {
                    (Slot::Hole, BlockContent::Zero) => true,
                    (Slot::Digest(held), BlockContent::Bytes(bytes)) => held == self.key.digest(bytes),
                    _ => false,
                };
                if is_same {
                    same.insert(block.0);
                }
            }
        }
        Ok(same)
    }

    /// Whether anything may be known.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// The digest of a block's content.
    #[must_use]
    pub fn digest(&self, block: &[u8]) -> Digest {
        self.key.digest(block)
    }

    /// Blocks of each volume.
    #[must_use]
    pub fn volume_blocks(&self) -> Vec<u64> {
        self.volumes.iter().map(|volume| volume.blocks).collect()
    }

    /// The first block at or behind `from` of which nothing is known.
    #[must_use]
    pub fn next_unknown(&self, volume: usize, from: u32) -> Option<u32> {
        self.volumes[volume].next_unknown(from)
    }

    /// Holds what a block that nobody writes to was found to hold, as of a flip at which nothing was in flight, against what the target
    /// holds; learns it where that is not known.
    pub fn compare(&mut self, volume: usize, block: Block, found: Found, now: Timestamp) -> Answer {
        let is_under_way = |under_way: &UnderWay| under_way.blocks[volume].contains(block.0);
        if self.phase != Phase::Ready || self.under_way.iter().any(is_under_way) {
            return Answer::NotNow;
        }
        match self.volumes[volume].compare(block, found) {
            Ok(answer) => {
                self.has_new_proofs |= self.volumes[volume].prove(block, answer, now);
                answer
            }
            Err(error) => {
                self.off("cannot be read", &error.to_string());
                Answer::NotNow
            }
        }
    }

    /// When the region was proved that was not for longest; `None` while one never was. One that ends in a block that is `skipped`
    /// never is, and does not count.
    #[must_use]
    pub fn oldest_proof(&self, skipped: &[RoaringBitmap]) -> Option<Timestamp> {
        let proofs = self.volumes.iter().zip(skipped).flat_map(|(volume, skipped)| volume.proofs(skipped));
        proofs.min().filter(|time| time.0 > 0)
    }

    /// A part is durable. Its digests are those of the point that takes it in, once that is acked.
    pub fn part_acked(&mut self, attempt: AttemptId) {
        let Some(at) = self.under_way.iter().position(|under_way| under_way.attempt == attempt) else { return };
        if let Some(part) = self.under_way.remove(at) {
            for (volume, blocks) in self.volumes.iter_mut().zip(&*part.blocks) {
                volume.in_parts |= blocks;
            }
            self.take_in(&part);
        }
    }

    /// A point is acked, with all before it.
    pub fn acked(&mut self, head: Head) {
        let is_done = |under_way: &UnderWay| under_way.epoch <= head.epoch;
        while self.under_way.front().is_some_and(is_done)
            && let Some(under_way) = self.under_way.pop_front()
        {
            self.take_in(&under_way);
        }
        self.has_parts = false;
        for volume in &mut self.volumes {
            volume.in_parts.clear();
        }
        // While it is asked what came after an older point, the answer tells of this one's blocks as well.
        if self.phase == Phase::Ready {
            self.head = Some(head);
        }
    }

    /// Nothing that is under way will be part of a point.
    pub fn void(&mut self) {
        for under_way in std::mem::take(&mut self.under_way) {
            for (volume, blocks) in self.volumes.iter_mut().zip(&*under_way.blocks) {
                // It may have become a point unheard.
                volume.forget_all(blocks);
            }
        }
        self.has_parts = false;
        for volume in &mut self.volumes {
            let parts = std::mem::take(&mut volume.in_parts);
            volume.forget_all(&parts);
        }
    }

    /// Writes what was acked since the last time, if it is time to.
    pub fn write_if_due(&mut self, now: Duration) {
        let digests: usize = self.volumes.iter().map(|volume| volume.young.len()).sum();
        let holes: u64 = self.volumes.iter().map(|volume| volume.young_holes.len()).sum();
        let since = now.saturating_sub(self.written_at);
        let is_due = digests >= YOUNG_DIGESTS_MAX
            || holes >= YOUNG_HOLES_MAX
            || digests as u64 + holes >= FEW_DIGESTS && since >= FEW_AFTER
            || (self.head != self.base || self.has_new_proofs) && since >= ANY_AFTER;
        if is_due {
            self.written_at = now;
            self.write();
        }
    }

    /// Writes what was acked since the last time.
    ///
    /// A crash before the second state leaves the first: of the old base, with every block unsure that was being written.
    pub fn write(&mut self) {
        let is_new = self.head != self.base || self.has_new_proofs;
        if self.phase != Phase::Ready || !is_new && self.volumes.iter().all(VolumeDigests::is_written) {
            return;
        }
        self.has_new_proofs = false;
        if let Err(error) = self.try_write() {
            self.off("cannot be written", &error.to_string());
        }
    }

    fn try_write(&mut self) -> io::Result<()> {
        let era = self.volumes.first().and_then(|volume| volume.file.as_ref()).map_or([0; 16], |file| file.era);
        if !self.volumes.iter().all(VolumeDigests::is_written) {
            self.state(era, true).store(&*self.storage, &self.folder)?;
            for volume in &mut self.volumes {
                volume.write()?;
            }
        }
        self.base = self.head;
        self.state(era, false).store(&*self.storage, &self.folder)
    }

    /// The state of this moment. `is_writing`: what is young is being written, and may be or not.
    fn state(&self, era: [u8; 16], is_writing: bool) -> State {
        let kept = |volume: &VolumeDigests| {
            let mut unsure = &volume.unsure | &volume.in_parts;
            if is_writing {
                unsure |= volume.young.keys().copied().collect::<RoaringBitmap>();
                unsure |= &volume.young_holes;
            }
            let (proved, proved_there) = (volume.proved.clone(), volume.proved_there.clone());
            state::Kept { slot: volume.slot, blocks: volume.blocks, unsure, proved, proved_there }
        };
        State { group: self.group, era, base: self.base, volumes: self.volumes.iter().map(kept).collect() }
    }

    /// Digests are not kept any more: everything is sent. What is on disk is of the old base, with what the target was sent since
    /// it is of use to the next agent.
    fn off(&mut self, what: &str, error: &str) {
        tracing::warn!(
            group = %self.group,
            folder = %self.folder.display(),
            error,
            "the digests {what}: until this agent's next start, blocks are sent that have not changed"
        );
        self.phase = Phase::Off;
        self.under_way.clear();
        for volume in &mut self.volumes {
            volume.know_nothing();
        }
    }
}

#[cfg(test)]
mod tests;

/// What is left out on purpose, to see whether tests notice.
#[cfg(feature = "sabotage")]
pub mod sabotage {
    use std::cell::Cell;

    thread_local! {
        static PASSES_OVER: Cell<bool> = const { Cell::new(false) };
    }

    /// On this thread, what is under way does not keep a block from being called unchanged, or does again.
    pub fn set_pass_over_under_way(passes_over: bool) {
        PASSES_OVER.set(passes_over);
    }

    pub(super) fn passes_over_under_way() -> bool {
        PASSES_OVER.get()
    }
}

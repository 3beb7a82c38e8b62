//! Healing: blocks whose frame is damaged are asked again from the source, and put in its place where they are what was lost.
//!
//! Owns which damages are looked at and when, and what was asked for on which connection. The proof is `proof`'s. Only
//! groups that are open are looked at: their sources are who could send. Where a block had been changed meanwhile the old
//! points stay damaged, and are named; those from the epoch on that carries it again are whole. Nothing is ever taken away.

mod proof;

pub use proof::{Outcome, heal};

use crate::journal::{Damage, GroupView};
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::store::GroupPlace;
use cdp_protocol::limits::MESSAGE_EXTENTS_MAX;
use cdp_protocol::units::{Extent, Timestamp, VolumeSlot};
use cdp_seams::clock::Clock;
use cdp_seams::random::Random;
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often it is looked what came.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A damage whose blocks do not come is looked at less and less often, down to this.
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// Messages to a group's source at a time; what does not fit is asked for at the next look.
const MESSAGES_MAX: usize = 16;

/// A group that a server has open.
pub struct OpenGroup {
    /// The office's name.
    pub office: String,
    /// Where the group is.
    pub place: GroupPlace,
    /// What is durable of it.
    pub view: Arc<GroupView>,
    /// Since when its source is connected, if it is: tells one connection from the next.
    pub connected_since: Option<Timestamp>,
}

/// What is asked of a source: blocks of a volume, as many as fit a message.
pub type Ask<'a> = dyn Fn(&OpenGroup, VolumeSlot, Vec<Extent>) + 'a;

/// What the healer works on and with.
pub struct Tools<'a> {
    /// The groups that are open.
    pub open: &'a dyn Fn() -> Vec<OpenGroup>,
    /// A group's keys, out of escrow; or why they cannot be had, in a line.
    pub keys: &'a dyn Fn(&OpenGroup) -> Result<Keyring, String>,
    /// Asks a group's source, if it is connected.
    pub ask: &'a Ask<'a>,
    /// Repairs were written: readers are to look anew.
    pub healed: &'a dyn Fn(&OpenGroup),
    /// Time.
    pub clock: &'a dyn Clock,
    /// Ids of attempts.
    pub random: &'a dyn Random,
}

/// Heals what can be healed.
#[derive(Default)]
pub struct Healer {
    known: HashMap<(GroupPlace, u64, u64), Known>,
}

/// What is known of a damage that is not healed.
#[derive(Clone, Copy, Default)]
struct Known {
    /// Nothing that may still come would heal it.
    is_lost: bool,
    /// The connection on which its blocks were asked for.
    asked: Option<Timestamp>,
    next: Duration,
    pause: Duration,
}

impl Healer {
    /// Looks until the other end of `ended` is dropped.
    pub fn run(mut self, tools: &Tools<'_>, ended: &Receiver<()>) {
        while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            self.look(tools);
        }
    }

    /// Heals what is proved by now, and asks for what is not.
    pub fn look(&mut self, tools: &Tools<'_>) {
        let groups = (tools.open)();
        let is_damaged = |key: &(GroupPlace, u64, u64)| {
            let group = groups.iter().find(|group| group.place == key.0);
            group.is_none_or(|group| unhealed(group).any(|damage| (damage.segment, damage.offset) == (key.1, key.2)))
        };
        self.known.retain(|key, _| is_damaged(key));
        for group in &groups {
            self.look_at(tools, group);
        }
    }

    fn look_at(&mut self, tools: &Tools<'_>, group: &OpenGroup) {
        let now = tools.clock.monotonic();
        let due: Vec<&Damage> = unhealed(group).filter(|damage| self.is_due(group, damage, now)).collect();
        if due.is_empty() {
            return;
        }
        let keys = match (tools.keys)(group) {
            Ok(keys) => keys,
            Err(error) => {
                let (office, id) = (&group.office, group.place.group);
                tracing::warn!(office, group = %id, error, "nothing is healed: the keys cannot be had");
                for damage in due {
                    self.put_off(group, damage, now);
                }
                return;
            }
        };
        let mut wanted = Wanted::default();
        let mut healed = 0;
        for damage in due {
            match heal(&group.view, damage, &keys, tools.random) {
                Ok(outcome) => healed += u64::from(self.note(group, damage, outcome, &mut wanted, now)),
                Err(error) => {
                    let (office, id, error) = (&group.office, group.place.group, one_line(&error));
                    let Damage { segment, offset, .. } = damage;
                    tracing::error!(office, group = %id, segment, offset, error, "cannot be healed for now");
                    self.put_off(group, damage, now);
                }
            }
        }
        if healed > 0 {
            crate::metrics::healed(healed);
            (tools.healed)(group);
        }
        for (volume, extents) in wanted.messages() {
            (tools.ask)(group, volume, extents);
        }
    }

    /// Whether a damage is worth a look: one that waits is looked at again when it is time, or when its source came back.
    fn is_due(&self, group: &OpenGroup, damage: &Damage, now: Duration) -> bool {
        let known = self.known.get(&key(group, damage)).copied().unwrap_or_default();
        let is_new_line = group.connected_since.is_some() && known.asked != group.connected_since;
        !known.is_lost && (known.next <= now || is_new_line)
    }

    /// Takes in what became of a damage; whether it is healed.
    fn note(
        &mut self,
        group: &OpenGroup,
        damage: &Damage,
        outcome: Outcome,
        wanted: &mut Wanted,
        now: Duration,
    ) -> bool {
        let (office, id, Damage { segment, offset, .. }) = (&group.office, group.place.group, damage);
        match outcome {
            Outcome::Healed { blocks } => {
                tracing::info!(office, group = %id, segment, offset, blocks, "healed: a repair stands for the damaged frame");
                self.known.remove(&key(group, damage));
                return true;
            }
            Outcome::Lost(why) => {
                tracing::warn!(office, group = %id, segment, offset, why, "not healed: the points that need it stay damaged");
                self.known.entry(key(group, damage)).or_default().is_lost = true;
            }
            Outcome::Waiting { volume, blocks } => {
                let known = self.known.entry(key(group, damage)).or_default();
                if group.connected_since.is_some()
                    && known.asked != group.connected_since
                    && wanted.add(volume, &blocks)
                {
                    tracing::info!(office, group = %id, segment, offset, blocks = blocks.len(), "damaged: its blocks are asked again");
                    (known.asked, known.pause) = (group.connected_since, Duration::ZERO);
                }
                self.put_off(group, damage, now);
            }
        }
        false
    }

    fn put_off(&mut self, group: &OpenGroup, damage: &Damage, now: Duration) {
        let known = self.known.entry(key(group, damage)).or_default();
        known.next = now + known.pause;
        known.pause = (2 * known.pause).clamp(LOOK_EVERY, PAUSE_MAX);
    }
}

/// Blocks to be asked for, as far as they fit the messages of one look.
#[derive(Default)]
struct Wanted {
    volumes: BTreeMap<VolumeSlot, RoaringBitmap>,
    extents: usize,
}

impl Wanted {
    /// Adds blocks; `false` where there is no room for them any more.
    fn add(&mut self, volume: VolumeSlot, blocks: &RoaringBitmap) -> bool {
        self.extents += proof::to_extents(blocks).len();
        // The blocks of one frame always fit: an empty look is never too small for them.
        if self.extents > MESSAGES_MAX * MESSAGE_EXTENTS_MAX && !self.volumes.is_empty() {
            return false;
        }
        *self.volumes.entry(volume).or_default() |= blocks;
        true
    }

    fn messages(self) -> Vec<(VolumeSlot, Vec<Extent>)> {
        let mut messages = Vec::new();
        for (volume, blocks) in self.volumes {
            let extents = proof::to_extents(&blocks);
            messages.extend(extents.chunks(MESSAGE_EXTENTS_MAX).map(|extents| (volume, extents.to_vec())));
        }
        messages
    }
}

/// Damages that may be of content, and that nothing stands for.
fn unhealed(group: &OpenGroup) -> impl Iterator<Item = &Damage> {
    let may_be_content = |damage: &&Damage| damage.first_epoch.is_some() && !damage.any_block;
    group.view.damages().iter().filter(may_be_content).filter(|damage| !group.view.is_healed(damage))
}

const fn key(group: &OpenGroup, damage: &Damage) -> (GroupPlace, u64, u64) {
    (group.place, damage.segment, damage.offset)
}

//! What a group leaves behind when the agent ends: the saved change record, for a start after a clean reboot.

use super::Group;
use crate::saved::SavedVolume;
use crate::saved::saving::Leaving;

impl Group {
    /// Saves what is dirty, if the group has volumes that are watched. Whatever keeps it from that costs a comparison of the
    /// volumes after a reboot.
    pub(super) fn leave(&mut self) {
        let (Some(saver), Some(devices)) = (&self.setup.saver, &mut self.devices) else { return };
        let group = &self.setup.facts.name;
        let (ledger, digests) = (&mut self.ledger, &self.setup.digests);
        let leaving = Leaving {
            tracker: &mut *devices.tracker,
            reader: &mut *devices.reader,
            memo: self.memo.encode(),
            digest: &|bytes| digests.digest(bytes),
            marked: &mut |marked| ledger.carry_more(marked),
        };
        match saver.save(leaving) {
            Ok(record) => record.iter().flat_map(|record| &record.volumes).for_each(|volume| say(group, volume)),
            Err(reason) => {
                tracing::warn!(
                    group,
                    reason,
                    "nothing is saved for the next boot: the volumes are compared in whole then"
                );
            }
        }
    }
}

fn say(group: &str, SavedVolume { slot, found }: &SavedVolume) {
    match found {
        Ok(found) => tracing::info!(group, %slot, dirty_blocks = found.dirty.len(), "saved for the next boot"),
        Err(reason) => tracing::info!(group, %slot, reason, "compared in whole in the next boot"),
    }
}

//! `restore --disk`: a machine's whole disk, put back onto an empty one from a rescue system that knows nothing but the office's identity.
//!
//! The disk is put back block by block, as any volume is. What is done besides: the layout is told before anything is written, a disk that
//! counts in other sectors is refused, and on a larger disk the copy of a GUID partition table is moved to its end. Needs no agent and no BPF.

use crate::cli::failure::UserError;
use crate::cli::layout as told;
use crate::connect::Identity;
use crate::layout::{self, Found, grow};
use crate::probe::Probe;
use crate::restore::compare::Subject;
use crate::restore::disk::Disk;
use crate::restore::fetch;
use crate::restore::line::PointLine;
use crate::state::StateFolder;
use crate::tracker::device::Device;
use anyhow::{Context, Result};
use cdp_protocol::layout::Table;
use cdp_protocol::recall::OpenedPoint;
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{GroupId, SECTOR_BYTES};
use serde_json::{Value, json};
use std::path::Path;

/// Sizes of sectors that disks have.
const SECTORS: [u32; 2] = [512, 4096];
/// Bytes at the start of a disk that have to be zeros for it to be empty, where no content is known.
const EMPTY_BYTES: usize = 1 << 20;

/// The group of that name: of this machine, or as the target told it when this one joined.
pub(super) fn group(state: &StateFolder, identity: &Identity, name: &str) -> Result<GroupId> {
    let own = state.group(name)?.map(|facts| facts.group);
    own.or_else(|| identity.target.groups.get(name).copied()).ok_or_else(|| {
        let known: Vec<&str> = identity.target.groups.keys().map(String::as_str).collect();
        let error = UserError::new(format!("the office had no group named {name:?} when this machine joined"));
        match known.as_slice() {
            [] => error.hint("`cdp-target enroll OFFICE --replace` makes the bundle that new hardware joins with"),
            known => error.hint(format!("it had {}: say which with --group", known.join(", "))),
        }
        .into()
    })
}

/// The volume of the point that is put back.
pub(super) fn volume_of(point: &OpenedPoint, name: Option<&str>) -> Result<Volume> {
    let names: Vec<&str> = point.volumes.iter().map(|volume| volume.name.as_str()).collect();
    let names = names.join(", ");
    let found = match (name, point.volumes.as_slice()) {
        (None, [one]) => Some(one),
        (None, _) => {
            let error = UserError::new(format!("point {} has several volumes: {names}", point.head.epoch));
            return Err(error.hint("say which: cdp-source restore --disk DEVICE --at POINT VOLUME").into());
        }
        (Some(name), volumes) => volumes.iter().find(|volume| volume.name == name),
    };
    found.cloned().ok_or_else(|| {
        let text = format!("point {} has no volume named {:?}", point.head.epoch, name.unwrap_or_default());
        UserError::new(text).hint(format!("it has {names}")).into()
    })
}

/// The key that content is told under: the target's, which seals it anew; else this machine's own.
pub(super) fn key(state: &StateFolder, group: &str, line: &mut PointLine) -> Result<DataKey> {
    if line.point().has_key
        && let Some(key) = line.key()?
    {
        return Ok(key);
    }
    if state.group(group)?.is_some() {
        return Ok(state.data_key(group)?);
    }
    let error = UserError::new("the target does not have the group's key, and neither has this machine");
    Err(error
        .hint("put the state folder of the machine before in place of this one, or its data.key and group.toml")
        .into())
}

/// What a disk is at the point, and what was done besides.
pub(super) struct Machine {
    sector_bytes: u32,
    /// Its layout; else why that is not known.
    found: Result<Found, String>,
    finished: Option<Finished>,
}

struct Finished {
    /// Whether the copy of the table was moved to the end; else why not.
    is_moved: Result<bool, &'static str>,
    /// Bytes behind the last partition.
    unused_bytes: u64,
    /// Why the kernel does not know the partitions yet.
    unread: Option<String>,
}

impl Machine {
    /// Looks at the point, and whether it can be put back onto the disk.
    pub(super) fn look(line: &mut PointLine, subject: &Subject<'_>, size_bytes: u64, probe: &Probe) -> Result<Self> {
        let sector_bytes = sector_bytes(probe)?;
        let mut sectors = vec![sector_bytes];
        sectors.extend(SECTORS.into_iter().filter(|other| *other != sector_bytes));
        let has_key = line.point().has_key;
        let mut read = |offset: u64, buffer: &mut [u8]| fetch::read_at(line, subject, offset, buffer);
        let found = if has_key {
            layout::look(&mut read, size_bytes, &sectors).map_err(|error| format!("it cannot be read: {error}"))
        } else {
            Err("the target does not have the key".to_owned())
        };
        if let Ok(Found { layout, .. }) = &found
            && matches!(layout.table, Table::Gpt(_))
            && layout.sector_bytes != sector_bytes
        {
            let (device, counted) = (probe.device.display(), layout.sector_bytes);
            let text = format!(
                "{device} has sectors of {sector_bytes} bytes, the point's partition table counts in {counted}"
            );
            return Err(UserError::new(text)
                .hint("no machine would find its partitions: take a disk like the one before")
                .into());
        }
        Ok(Self { sector_bytes, found, finished: None })
    }

    /// Does what is to be done once every block is there, durably.
    pub(super) fn finish(&mut self, disk: &mut Disk, old_bytes: u64) -> Result<()> {
        let size_bytes = disk.size_bytes();
        let mut read = |offset: u64, buffer: &mut [u8]| disk.read_at(offset, buffer);
        let found = layout::look(&mut read, size_bytes, &[self.sector_bytes]).context("read what was written")?;
        let writes =
            grow::moved(&mut read, (old_bytes, size_bytes), self.sector_bytes).context("read what was written")?;
        let is_moved = writes.as_ref().map(|writes| !writes.is_empty()).map_err(|why| *why);
        for write in writes.unwrap_or_default() {
            // A crash in between leaves a whole table, and the marker: the same command begins with the comparison again.
            disk.write_at(write.offset, &write.bytes)?;
            disk.sync()?;
        }
        let end_bytes = if found.layout.partitions.is_empty() { old_bytes } else { found.end_bytes() };
        let unread = disk.read_partitions().err().map(|error| format!("{:#}", anyhow::Error::new(error)));
        let unread = unread.filter(|_| disk.is_block() && found.layout.table != Table::None);
        let unused_bytes = size_bytes.saturating_sub(end_bytes);
        self.finished = Some(Finished { is_moved, unused_bytes, unread });
        Ok(())
    }

    /// In lines, for people.
    pub(super) fn text(&self) -> String {
        let mut lines = match &self.found {
            Ok(found) => vec![told::text(found, |_| String::new())],
            Err(why) => vec![format!("  its layout is not known: {why}")],
        };
        if let Some(Finished { is_moved, unused_bytes, .. }) = &self.finished {
            match is_moved {
                Ok(true) => lines.push("  the copy of its partition table was moved to the end of the disk".to_owned()),
                Ok(false) => {}
                Err(why) => {
                    lines.push(format!(
                        "  warning: no copy of its partition table stands at the end of the disk: {why}"
                    ));
                }
            }
            if *unused_bytes > EMPTY_BYTES as u64 {
                lines.push(format!(
                    "  {unused_bytes} bytes behind the last partition are in none: growpart or parted gives them to it"
                ));
            }
        }
        lines.join("\n")
    }

    /// The next steps, on stderr.
    pub(super) fn hints(&self, state: &Path, device: &Path) {
        let Some(Finished { unread, .. }) = &self.finished else { return };
        let (device, state) = (device.display(), state.display());
        if let Some(why) = unread {
            eprintln!("hint: the kernel does not know the partitions yet ({why}): partx --update {device}");
        }
        eprintln!(
            "hint: its agent has the certificate of the machine before: mount it below /mnt, then: cp -a {state}/identity/. /mnt/var/lib/cdp-source/identity/"
        );
    }

    /// As a document.
    pub(super) fn document(&self) -> Value {
        let finished = self.finished.as_ref();
        json!({
            "layout": self.found.as_ref().ok().map(told::document),
            "layout_unknown": self.found.as_ref().err(),
            "table_moved": finished.map(|finished| finished.is_moved == Ok(true)),
            "unused_bytes": finished.map(|finished| finished.unused_bytes),
            "partitions_read": finished.map(|finished| finished.unread.is_none()),
        })
    }
}

/// Refuses a disk that is not empty, though nobody here knows what is on it.
pub(super) fn refuse_unknown(disk: &mut Disk) -> Result<()> {
    let mut head = vec![0; EMPTY_BYTES.min(disk.size_bytes() as usize)];
    let read = disk.read_at(0, &mut head);
    read.with_context(|| format!("read {}", disk.device().display()))?;
    if cdp_protocol::codec::is_zero(&head) {
        return Ok(());
    }
    let error =
        UserError::new(format!("{} is not empty: it begins with what is not known here", disk.device().display()));
    Err(error.hint("--discard-current overwrites it").into())
}

/// Bytes of a device's sectors; 512 for an image file.
fn sector_bytes(probe: &Probe) -> Result<u32> {
    if !probe.is_block() {
        return Ok(SECTOR_BYTES as u32);
    }
    let device = Device::inspect(&probe.device)?;
    device.sector_bytes().with_context(|| format!("ask for the sectors of {}", probe.device.display()))
}

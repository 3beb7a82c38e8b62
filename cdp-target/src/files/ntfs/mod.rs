//! NTFS, read only.
//!
//! A reader of our own: why is said in `docs/decisions/2026-11-27-readers-of-file-systems.md`. Its log is not replayed; `warnings` says where it would have to be.
//! A node is named by its reference: the number of its record, and how often that was used.

mod folder;
mod lznt1;
mod record;
mod reparse;
mod stream;
#[cfg(test)]
mod tests;

use super::text::utf8_of;
use super::tree::{
    Attribute as Extended, Content, Entry, Id, Kind, LINK_BYTES_MAX, Moment, Node, Tree, TreeError, is_same_but_case,
};
use super::volume::{Shared, le};
use record::{Attribute, Body, Record, kind};
use reparse::{Reparse, reparse, unix_link};
use stream::{File, Stream};

const ROOT: Id = 5;
const LOG_RECORD: u64 = 2;
const VOLUME_RECORD: u64 = 3;
const READ_ONLY: u64 = 0x1;
const SYSTEM: u64 = 0x4;

/// A file system.
pub(crate) struct Ntfs {
    bytes: Shared,
    record_bytes: u64,
    cluster_bytes: u64,
    /// The master file table.
    table: Stream,
}

fn damaged(what: &str) -> TreeError {
    TreeError::Damaged(what.to_owned())
}

impl Ntfs {
    /// Opens one.
    ///
    /// # Errors
    /// Where it is none, or cannot be read.
    pub(crate) fn open(bytes: Shared) -> Result<Self, TreeError> {
        let mut boot = [0; 512];
        bytes.read(0, &mut boot)?;
        let (sector, per_cluster) = (le::<2>(&boot, 11), le::<1>(&boot, 13));
        let sectors = if per_cluster > 128 { 1 << (256 - per_cluster).min(20) } else { per_cluster };
        let cluster_bytes = sector * sectors;
        let is_well = (512..=4096).contains(&sector)
            && sector.is_power_of_two()
            && cluster_bytes.is_power_of_two()
            && cluster_bytes <= 2 << 20;
        let record_bytes = match le::<1>(&boot, 64) {
            clusters @ 1..=127 => clusters * cluster_bytes,
            power => 1 << (256 - power).min(20),
        };
        if !is_well || !(512..=65_536).contains(&record_bytes) {
            return Err(damaged("the sizes in its first sector cannot be"));
        }
        let start = le::<8>(&boot, 48).checked_mul(cluster_bytes);
        let mut first = vec![0; record_bytes as usize];
        bytes.read(start.ok_or_else(|| damaged("its table of files lies nowhere"))?, &mut first)?;
        let own = Record::parse(first, cluster_bytes)?.own()?;
        let table = data(&own).cloned().ok_or_else(|| damaged("its table of files has no content"))?;
        let Body::Away(table) = table.body else { return Err(damaged("its table of files is too short")) };
        let mut ntfs = Self { bytes, record_bytes, cluster_bytes, table };
        // Where the table itself stands in several records, the first ones tell of the others.
        let (_, whole) = ntfs.file(0)?;
        if let Some(Attribute { body: Body::Away(table), .. }) = data(&whole) {
            ntfs.table = table.clone();
        }
        Ok(ntfs)
    }

    /// The record of a number.
    fn record(&self, number: u64) -> Result<Record, TreeError> {
        let offset = number
            .checked_mul(self.record_bytes)
            .filter(|at| at.saturating_add(self.record_bytes) <= self.table.size_bytes);
        let mut bytes = vec![0; self.record_bytes as usize];
        self.table.read(
            self,
            offset.ok_or_else(|| damaged("a name leads behind the end of the table of files"))?,
            &mut bytes,
        )?;
        Record::parse(bytes, self.cluster_bytes)
    }

    /// The label.
    pub(crate) fn label(&self) -> Option<String> {
        let (_, attributes) = self.file(VOLUME_RECORD).ok()?;
        let Body::Here(raw) = &attributes.iter().find(|attribute| attribute.kind == kind::LABEL)?.body else {
            return None;
        };
        Some(super::tree::shown(&utf8_of(raw))).filter(|label| !label.is_empty())
    }

    fn is_dirty(&self) -> bool {
        let Ok((_, attributes)) = self.file(VOLUME_RECORD) else { return true };
        let volume = attributes.iter().find(|attribute| attribute.kind == kind::VOLUME);
        matches!(volume.map(|volume| &volume.body), Some(Body::Here(value)) if le::<2>(value, 10) & 1 != 0)
    }

    /// Whether the log says that somebody had the file system in use.
    fn is_logged(&self) -> bool {
        let Ok((_, attributes)) = self.file(LOG_RECORD) else { return true };
        let mut page = [0; 512];
        match data(&attributes).map(|log| &log.body) {
            Some(Body::Away(log)) if log.read(self, 0, &mut page).is_ok() => {}
            _ => return true,
        }
        let area = le::<2>(&page, 24) as usize;
        // Emptied, or nobody has it, or it says that it is clean.
        page.starts_with(b"RSTR") && le::<2>(&page, area + 12) != 0xffff && le::<2>(&page, area + 14) & 2 == 0
    }

    /// Where a link leads that is a file of a certain content.
    fn unix_link(&self, attributes: &[Attribute]) -> Option<Vec<u8>> {
        let data = data(attributes).filter(|data| data.body.len() <= 2 * LINK_BYTES_MAX + 8)?;
        unix_link(&data.body.whole(self, 2 * LINK_BYTES_MAX + 8).ok()?)
    }

    /// What a file with these attributes is, beside its name.
    fn nature(&self, attributes: &[Attribute]) -> Option<Reparse> {
        let is_system = information(attributes).is_some_and(|value| le::<4>(value, 32) & SYSTEM != 0);
        reparse(attributes).or_else(|| is_system.then(|| self.unix_link(attributes).map(Reparse::Link)).flatten())
    }
}

/// The content of a file, which has no name.
fn data(attributes: &[Attribute]) -> Option<&Attribute> {
    attributes.iter().find(|attribute| attribute.kind == kind::DATA && attribute.name.is_empty())
}

fn information(attributes: &[Attribute]) -> Option<&[u8]> {
    match &attributes.iter().find(|attribute| attribute.kind == kind::INFORMATION)?.body {
        Body::Here(value) => Some(value),
        Body::Away(_) => None,
    }
}

/// A time of 100 ns since 1601.
fn moment(ticks: u64) -> Moment {
    const EPOCH: i64 = 11_644_473_600;
    let seconds = (ticks / 10_000_000) as i64 - EPOCH;
    Moment { seconds, nanoseconds: (ticks % 10_000_000) as u32 * 100 }
}

impl Tree for Ntfs {
    fn root(&self) -> Id {
        ROOT
    }

    fn node(&self, id: Id) -> Result<Node, TreeError> {
        let (is_folder, attributes) = self.file(id)?;
        let times = information(&attributes);
        let nature = self.nature(&attributes);
        let data = data(&attributes);
        let kind = match (&nature, is_folder) {
            (Some(Reparse::Link(_)), _) => Kind::Link,
            (_, true) => Kind::Folder,
            (_, false) => Kind::File,
        };
        let note = match (data.map(|data| &data.body), &nature) {
            (_, Some(Reparse::Other(_))) => Some("reparse point"),
            (Some(Body::Away(stream)), _) if stream.is_encrypted => Some("encrypted"),
            (Some(Body::Away(stream)), _) if stream.unit_clusters > 0 => Some("compressed"),
            _ if times.is_some_and(|value| le::<4>(value, 32) & READ_ONLY != 0) => Some("read-only"),
            _ => None,
        };
        Ok(Node {
            kind,
            size_bytes: data.map_or(0, |data| data.body.len()),
            mode: None,
            owner: None,
            modified: times.map(|value| moment(le::<8>(value, 8))),
            accessed: times.map(|value| moment(le::<8>(value, 24))),
            note,
        })
    }

    fn list(&self, id: Id) -> Result<Vec<Entry>, TreeError> {
        let (is_folder, attributes) = self.file(id)?;
        if is_folder { folder::list(self, &attributes) } else { Err(TreeError::NotAFolder) }
    }

    fn link(&self, id: Id) -> Result<Vec<u8>, TreeError> {
        let (_, attributes) = self.file(id)?;
        match self.nature(&attributes) {
            Some(Reparse::Link(target)) => Ok(target),
            _ => Err(damaged("it is no symbolic link")),
        }
    }

    fn open(&self, id: Id) -> Result<Box<dyn Content + '_>, TreeError> {
        let (is_folder, attributes) = self.file(id)?;
        match self.nature(&attributes) {
            Some(Reparse::Link(_)) => return Err(TreeError::Special("a symbolic link")),
            _ if is_folder => return Err(TreeError::IsAFolder),
            Some(Reparse::Other(tag)) => {
                let what = format!(
                    "it is a reparse point (tag {tag:#x}): its content lies elsewhere, and only Windows knows where"
                );
                return Err(TreeError::Unsupported(what));
            }
            None => {}
        }
        Ok(Box::new(match data(&attributes).map(|data| data.body.clone()) {
            None => File::Here { value: Vec::new(), at: 0 },
            Some(Body::Here(value)) => File::Here { value, at: 0 },
            Some(Body::Away(stream)) if stream.is_encrypted => return Err(TreeError::Encrypted),
            Some(Body::Away(stream)) => File::Away { ntfs: self, stream, at: 0, unit: Vec::new(), unit_at: 0 },
        }))
    }

    fn attributes(&self, _id: Id) -> Result<(Vec<Extended>, bool), TreeError> {
        // Rights are those of Windows, and other streams have no place here.
        Ok((Vec::new(), false))
    }

    fn is_named(&self, asked: &[u8], name: &[u8]) -> bool {
        is_same_but_case(asked, name)
    }

    fn warnings(&self) -> Vec<String> {
        if self.is_dirty() || self.is_logged() {
            let text = "its file system was in use, and the log of NTFS is not replayed: what was changed in the last seconds may be there in part";
            return vec![text.to_owned()];
        }
        Vec::new()
    }
}

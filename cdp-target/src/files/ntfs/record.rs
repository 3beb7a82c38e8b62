//! Records of the master file table, and the attributes that a file has in all its records.
//!
//! Invariant: what is said of lengths and places is held against the bytes that are there, before anything is taken from them.

use super::stream::{Run, Stream};
use super::{Ntfs, damaged};
use crate::files::tree::{Id, TreeError};
use crate::files::volume::le;

/// Kinds of attributes.
pub(super) mod kind {
    pub(crate) const INFORMATION: u64 = 0x10;
    pub(crate) const LIST: u64 = 0x20;
    pub(crate) const LABEL: u64 = 0x60;
    pub(crate) const VOLUME: u64 = 0x70;
    pub(crate) const DATA: u64 = 0x80;
    pub(crate) const INDEX_ROOT: u64 = 0x90;
    pub(crate) const INDEX: u64 = 0xa0;
    pub(crate) const BITMAP: u64 = 0xb0;
    pub(crate) const REPARSE: u64 = 0xc0;
}

/// Bytes of a list of attributes, at most, by the format.
const LIST_BYTES_MAX: u64 = 256 << 10;
/// Runs of one attribute, at most: 64 MiB of memory.
const RUNS_MAX: usize = 4 << 20;
const SECTOR: usize = 512;

/// An attribute with all of it.
#[derive(Clone, Debug)]
pub(super) struct Attribute {
    pub(super) kind: u64,
    pub(super) name: Vec<u8>,
    pub(super) body: Body,
}

/// Where an attribute's value is.
#[derive(Clone, Debug)]
pub(super) enum Body {
    /// In the record.
    Here(Vec<u8>),
    /// In clusters of its own.
    Away(Stream),
}

/// A record that is in use.
pub(super) struct Record {
    pub(super) is_folder: bool,
    sequence: u64,
    base: u64,
    attributes: Vec<(u64, Attribute)>,
}

/// The number in a reference.
pub(super) const fn number(reference: Id) -> u64 {
    reference & 0xffff_ffff_ffff
}

/// Puts the ends of sectors back, which hold a mark that tells torn writes.
///
/// # Errors
/// Where a sector has another mark: it is of another write.
pub(super) fn unfix(block: &mut [u8], magic: [u8; 4]) -> Result<(), TreeError> {
    if !block.starts_with(&magic) {
        return Err(damaged("a record of it has no magic number"));
    }
    let (at, count) = (le::<2>(block, 4) as usize, le::<2>(block, 6) as usize);
    let sectors = block.len() / SECTOR;
    let marks = block.get(at..).and_then(|rest| rest.get(..2 * (sectors + 1))).map(<[u8]>::to_vec);
    let marks = marks.filter(|_| count == sectors + 1).ok_or_else(|| damaged("a record of it has no marks"))?;
    for (sector, kept) in marks[2..].chunks_exact(2).enumerate() {
        let end = &mut block[(sector + 1) * SECTOR - 2..][..2];
        if end != &marks[..2] {
            return Err(damaged("a record of it is torn"));
        }
        end.copy_from_slice(kept);
    }
    Ok(())
}

impl Record {
    /// Takes a record apart.
    ///
    /// # Errors
    /// Where it is none that is in use, or makes no sense.
    pub(super) fn parse(mut bytes: Vec<u8>, cluster_bytes: u64) -> Result<Self, TreeError> {
        unfix(&mut bytes, *b"FILE")?;
        let flags = le::<2>(&bytes, 22);
        if flags & 1 == 0 {
            return Err(damaged("a name leads to a record that is not in use"));
        }
        let (mut at, mut attributes) = (le::<2>(&bytes, 20) as usize, Vec::new());
        while at + 16 <= bytes.len() && le::<4>(&bytes, at) != 0xffff_ffff {
            let len = le::<4>(&bytes, at + 4) as usize;
            let raw = bytes.get(at..).and_then(|rest| rest.get(..len)).filter(|raw| raw.len() >= 24);
            attributes
                .push(attribute(raw.ok_or_else(|| damaged("an attribute is longer than its record"))?, cluster_bytes)?);
            at += len;
        }
        Ok(Self {
            is_folder: flags & 2 != 0,
            sequence: le::<2>(&bytes, 16),
            base: number(le::<8>(&bytes, 32)),
            attributes,
        })
    }

    /// Its attributes alone, without those in other records.
    pub(super) fn own(self) -> Result<Vec<Attribute>, TreeError> {
        merge(self.attributes)
    }
}

/// An attribute as it stands in a record, with the first cluster that it is about.
fn attribute(raw: &[u8], cluster_bytes: u64) -> Result<(u64, Attribute), TreeError> {
    let wrong = || damaged("an attribute makes no sense");
    let name = raw.get(le::<2>(raw, 10) as usize..).and_then(|rest| rest.get(..2 * le::<1>(raw, 9) as usize));
    let (kind, name, flags) = (le::<4>(raw, 0), name.ok_or_else(wrong)?.to_vec(), le::<2>(raw, 12));
    if le::<1>(raw, 8) == 0 {
        let value = raw.get(le::<2>(raw, 20) as usize..).and_then(|rest| rest.get(..le::<4>(raw, 16) as usize));
        return Ok((0, Attribute { kind, name, body: Body::Here(value.ok_or_else(wrong)?.to_vec()) }));
    }
    if raw.len() < 64 {
        return Err(wrong());
    }
    let first = le::<8>(raw, 16);
    if le::<8>(raw, 48) > i64::MAX as u64 {
        return Err(wrong());
    }
    let runs = runs(raw.get(le::<2>(raw, 32) as usize..).ok_or_else(wrong)?, first)?;
    let stream = Stream {
        runs,
        size_bytes: le::<8>(raw, 48),
        initialized_bytes: le::<8>(raw, 56).min(le::<8>(raw, 48)),
        is_encrypted: flags & 0x4000 != 0,
        unit_clusters: if flags & 0xff != 0 { 1 << le::<2>(raw, 34).min(16) } else { 0 },
        cluster_bytes,
    };
    Ok((first, Attribute { kind, name, body: Body::Away(stream) }))
}

/// Decodes runs of clusters; the first one is cluster `at` of its attribute.
fn runs(raw: &[u8], mut at: u64) -> Result<Vec<Run>, TreeError> {
    let wrong = || damaged("its runs of clusters make no sense");
    let (mut place, mut runs, mut rest) = (0_i64, Vec::new(), raw);
    while let Some((head, behind)) = rest.split_first() {
        let (len, offset) = (usize::from(head & 15), usize::from(head >> 4));
        if *head == 0 {
            break;
        }
        if len == 0 || len > 8 || offset > 8 || behind.len() < len + offset || runs.len() >= RUNS_MAX {
            return Err(wrong());
        }
        let mut clusters = [0; 8];
        clusters[..len].copy_from_slice(&behind[..len]);
        let clusters = u64::from_le_bytes(clusters);
        let is_negative = offset > 0 && behind[len + offset - 1] & 0x80 != 0;
        let mut moved = [if is_negative { 0xff } else { 0 }; 8];
        moved[..offset].copy_from_slice(&behind[len..len + offset]);
        place = place.checked_add(i64::from_le_bytes(moved)).filter(|place| *place >= 0).ok_or_else(wrong)?;
        let end = at.checked_add(clusters).filter(|end| *end < 1 << 52).ok_or_else(wrong)?;
        if clusters > 0 {
            runs.push(Run { at, cluster: (offset > 0).then_some(place as u64), clusters });
        }
        at = end;
        rest = &behind[len + offset..];
    }
    Ok(runs)
}

/// Puts together the parts of attributes that stand in several records.
fn merge(mut parts: Vec<(u64, Attribute)>) -> Result<Vec<Attribute>, TreeError> {
    parts.sort_by(|(at, left), (other, right)| (left.kind, &left.name, at).cmp(&(right.kind, &right.name, other)));
    let mut merged: Vec<Attribute> = Vec::new();
    for (_, part) in parts {
        let before = merged.last_mut().filter(|before| before.kind == part.kind && before.name == part.name);
        match (before.map(|before| &mut before.body), part.body) {
            (Some(Body::Away(whole)), Body::Away(stream)) => {
                if whole.runs.len() + stream.runs.len() > RUNS_MAX {
                    return Err(damaged("an attribute has too many runs of clusters"));
                }
                whole.runs.extend(stream.runs);
            }
            (_, body) => merged.push(Attribute { kind: part.kind, name: part.name, body }),
        }
    }
    Ok(merged)
}

impl Ntfs {
    /// A file's record and all its attributes.
    ///
    /// # Errors
    /// Where there is none, or it cannot be read.
    pub(super) fn file(&self, reference: Id) -> Result<(bool, Vec<Attribute>), TreeError> {
        let own = number(reference);
        let mut record = self.record(own)?;
        let sequence = reference >> 48;
        if record.base != 0 || (sequence != 0 && sequence != record.sequence) {
            return Err(damaged("a name leads to a record that is another file's"));
        }
        let mut attributes = std::mem::take(&mut record.attributes);
        let list = attributes.iter().position(|(_, attribute)| attribute.kind == kind::LIST);
        if let Some(list) = list {
            let list = attributes.swap_remove(list).1.body.whole(self, LIST_BYTES_MAX)?;
            for other in records(&list, own) {
                let more = self.record(other)?;
                if more.base != own {
                    return Err(damaged("a file has an attribute in another file's record"));
                }
                attributes.extend(more.attributes);
            }
        }
        Ok((record.is_folder, merge(attributes)?))
    }
}

/// The other records that a list of attributes names, each once.
fn records(list: &[u8], own: u64) -> Vec<u64> {
    let (mut at, mut records) = (0, Vec::new());
    while at + 26 <= list.len() {
        let len = le::<2>(list, at + 4) as usize;
        if len < 26 {
            break;
        }
        records.push(number(le::<8>(list, at + 16)));
        at += len;
    }
    records.sort_unstable();
    records.dedup();
    records.retain(|record| *record != own);
    records
}

impl Body {
    /// All of a value that is small.
    ///
    /// # Errors
    /// Where it is longer than `max`, or cannot be read.
    pub(super) fn whole(&self, ntfs: &Ntfs, max: u64) -> Result<Vec<u8>, TreeError> {
        match self {
            Self::Here(value) => Ok(value.clone()),
            Self::Away(stream) if stream.size_bytes > max => Err(damaged("an attribute is longer than one can be")),
            Self::Away(stream) => {
                let mut value = vec![0; stream.size_bytes as usize];
                stream.read(ntfs, 0, &mut value)?;
                Ok(value)
            }
        }
    }

    /// Bytes of the value.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Here(value) => value.len() as u64,
            Self::Away(stream) => stream.size_bytes,
        }
    }
}

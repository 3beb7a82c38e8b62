//! Folders: the names in an index, each with the file it names.
//!
//! The blocks of an index that are in use are read one after the other, whatever their tree says: so no ring of them is gone round.

use super::record::{Attribute, Body, kind, number, unfix};
use super::{Ntfs, damaged};
use crate::files::text::utf8_of;
use crate::files::tree::{ENTRIES_MAX, Entry, TreeError};
use crate::files::volume::le;

/// Name of the index of names, in UTF-16.
const NAMES: &[u8] = b"$\0I\x003\x000\0";
/// Records of the file system itself.
const OWN_RECORDS: u64 = 16;
/// Bytes of a bitmap of blocks, at most.
const BITMAP_BYTES_MAX: u64 = 16 << 20;
const DOS_NAME: u64 = 2;

/// The entries of a folder with these attributes.
///
/// # Errors
/// Where they cannot be read.
pub(super) fn list(ntfs: &Ntfs, attributes: &[Attribute]) -> Result<Vec<Entry>, TreeError> {
    let of_names = |kind| attributes.iter().find(|attribute| attribute.kind == kind && attribute.name == NAMES);
    let root = of_names(kind::INDEX_ROOT).ok_or_else(|| damaged("a folder has no index"))?;
    let Body::Here(root) = &root.body else { return Err(damaged("a folder's index begins elsewhere")) };
    let mut names = Names::default();
    names.collect(root, 16)?;
    if let Some(Attribute { body: Body::Away(blocks), .. }) = of_names(kind::INDEX) {
        let block_bytes = le::<4>(root, 8);
        if !block_bytes.is_power_of_two() || !(512..=65_536).contains(&block_bytes) {
            return Err(damaged("a folder's index has blocks of no size"));
        }
        let used = match of_names(kind::BITMAP) {
            Some(bitmap) => bitmap.body.whole(ntfs, BITMAP_BYTES_MAX)?,
            None => return Err(damaged("a folder's index does not say what of it is used")),
        };
        let is_used = |number: u64| used.get((number / 8) as usize).is_some_and(|byte| byte >> (number % 8) & 1 == 1);
        let count = (blocks.size_bytes / block_bytes).min(used.len() as u64 * 8);
        for number in (0..count).filter(|number| is_used(*number)) {
            let mut block = vec![0; block_bytes as usize];
            blocks.read(ntfs, number * block_bytes, &mut block)?;
            unfix(&mut block, *b"INDX")?;
            names.collect(&block, 24)?;
        }
    }
    Ok(names.entries())
}

#[derive(Default)]
struct Names {
    entries: Vec<Entry>,
    /// Short names, with the files they name.
    short: Vec<(u64, Vec<u8>)>,
}

impl Names {
    /// Adds the names of a node whose header stands at `header`.
    fn collect(&mut self, node: &[u8], header: usize) -> Result<(), TreeError> {
        let wrong = || damaged("an entry of a folder makes no sense");
        let (first, end) = (le::<4>(node, header) as usize, le::<4>(node, header + 4) as usize);
        let node = node.get(header..).and_then(|node| node.get(..end)).ok_or_else(wrong)?;
        let mut at = first;
        while at + 16 <= node.len() {
            let (len, key, flags) =
                (le::<2>(node, at + 8) as usize, le::<2>(node, at + 10) as usize, le::<2>(node, at + 12));
            if flags & 2 != 0 {
                return Ok(());
            }
            let name =
                node.get(at + 16..).and_then(|rest| rest.get(..key)).filter(|name| name.len() >= 66 && len >= 16 + key);
            self.add(le::<8>(node, at), name.ok_or_else(wrong)?)?;
            at += len;
        }
        Err(damaged("a node of a folder does not end"))
    }

    fn add(&mut self, id: u64, key: &[u8]) -> Result<(), TreeError> {
        let raw = key.get(66..).and_then(|rest| rest.get(..2 * le::<1>(key, 64) as usize));
        let raw = raw.ok_or_else(|| damaged("a name is longer than its entry"))?;
        let name = utf8_of(raw);
        if self.entries.len() + self.short.len() >= ENTRIES_MAX {
            return Err(damaged("a folder has too many entries"));
        }
        match le::<1>(key, 65) {
            _ if number(id) < OWN_RECORDS => {}
            DOS_NAME => self.short.push((id, name)),
            _ => self.entries.push(Entry { name, short: None, id }),
        }
        Ok(())
    }

    /// The entries, those with two names once.
    fn entries(mut self) -> Vec<Entry> {
        self.short.sort_unstable();
        for entry in &mut self.entries {
            let found = self.short.binary_search_by_key(&entry.id, |(id, _)| *id);
            entry.short = found.ok().map(|at| self.short[at].1.clone());
        }
        self.entries
    }
}

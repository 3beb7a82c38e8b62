//! What a power cut could leave, each of it: the changes that are pending, and the disk with any of them on it.
//!
//! Owns the list of what is pending: a sector that was written, a length, a name. Which of them are kept is the caller's to
//! say, one bit each; `power_cut` draws among the same, and tears sectors besides.

use super::{Change, Content, Dirty, Disk, Folder, SECTOR_BYTES, SimStorage, locked};
use crate::random::SimRandom;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// A change that is not durable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Pending {
    /// The change of this number in a folder.
    Name(PathBuf, usize),
    /// A file's length, as its last change left it.
    Length(usize),
    /// A sector of a file.
    Sector(usize, usize),
}

impl SimStorage {
    /// How many changes are pending.
    #[must_use]
    pub fn pending(&self) -> usize {
        locked(&self.0).pending().len()
    }

    /// The disk after a power cut that came to keep the pending changes whose bit in `kept` is set, restarted. The first is
    /// bit 0. This one stays as it is.
    #[must_use]
    pub fn image(&self, kept: u64) -> Self {
        let disk = locked(&self.0);
        let is_kept = |(at, _): &(usize, Pending)| kept >> at & 1 != 0;
        let kept: BTreeSet<Pending> =
            disk.pending().into_iter().enumerate().filter(is_kept).map(|(_, pending)| pending).collect();
        let folders = disk.folders.iter().map(|(path, folder)| (path.clone(), folder.image(path, &kept))).collect();
        let files = disk.files.iter().enumerate().map(|(number, file)| file.image(number, &kept)).collect();
        Self(Arc::new(Mutex::new(Disk {
            random: SimRandom::new(0),
            files,
            folders,
            calls: 0,
            faults: BTreeMap::new(),
            fails_from: None,
            life: 0,
            is_down: false,
            free_bytes: u64::MAX,
        })))
    }

    /// A number that tells apart what is durable under names: two disks with the same one hold the same.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let disk = locked(&self.0);
        let mut hasher = DefaultHasher::new();
        for (path, folder) in &disk.folders {
            path.hash(&mut hasher);
            for (name, file) in &folder.durable {
                (name, &disk.files[*file].durable).hash(&mut hasher);
            }
        }
        hasher.finish()
    }
}

impl Disk {
    fn pending(&self) -> Vec<Pending> {
        let mut pending = Vec::new();
        for (path, folder) in &self.folders {
            pending.extend((0..folder.changes.len()).map(|change| Pending::Name(path.clone(), change)));
        }
        for (number, file) in self.files.iter().enumerate() {
            pending.extend(file.pending(number));
        }
        pending
    }
}

impl Folder {
    fn image(&self, path: &std::path::Path, kept: &BTreeSet<Pending>) -> Self {
        let mut durable = self.durable.clone();
        let mut stopped: Vec<&PathBuf> = Vec::new();
        for (number, Change(change)) in self.changes.iter().enumerate() {
            let is_held = change.iter().any(|(name, _)| stopped.contains(&name))
                || !kept.contains(&Pending::Name(path.to_owned(), number));
            for (name, file) in change {
                match file {
                    // Changes of one name keep their order.
                    _ if is_held => stopped.push(name),
                    Some(file) => drop(durable.insert(name.clone(), *file)),
                    None => drop(durable.remove(name)),
                }
            }
        }
        Self { now: durable.clone(), durable, changes: Vec::new() }
    }
}

impl Content {
    fn pending(&self, number: usize) -> impl Iterator<Item = Pending> {
        let mut sectors = BTreeSet::new();
        for change in &self.changes {
            if let Dirty::Written { offset, len } = change {
                sectors.extend(offset / SECTOR_BYTES..(offset + len).div_ceil(SECTOR_BYTES));
            }
        }
        // One that holds on the disk what it was written with is the same either way.
        sectors.retain(|sector| of(&self.cache, *sector) != of(&self.durable, *sector));
        let length =
            (!self.changes.is_empty() && self.cache.len() != self.durable.len()).then_some(Pending::Length(number));
        length.into_iter().chain(sectors.into_iter().map(move |sector| Pending::Sector(number, sector)))
    }

    fn image(&self, number: usize, kept: &BTreeSet<Pending>) -> Self {
        let mut durable = self.durable.clone();
        if kept.contains(&Pending::Length(number)) {
            durable.resize(self.cache.len(), 0);
        }
        for pending in kept {
            let Pending::Sector(of, sector) = pending else { continue };
            let (from, to) = (sector * SECTOR_BYTES, ((sector + 1) * SECTOR_BYTES).min(self.cache.len()));
            if *of == number && from < to {
                durable.resize(durable.len().max(to), 0);
                durable[from..to].copy_from_slice(&self.cache[from..to]);
            }
        }
        Self { cache: durable.clone(), durable, changes: Vec::new() }
    }
}

/// What a file has of a sector.
fn of(bytes: &[u8], sector: usize) -> Option<&[u8]> {
    bytes.get(sector * SECTOR_BYTES..)?.chunks(SECTOR_BYTES).next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Storage, read_all};
    use std::collections::HashSet;
    use std::path::Path;

    #[test]
    fn every_subset_of_what_is_pending_is_an_image() {
        let storage = SimStorage::new(1);
        storage.create_dir_all(Path::new("/d")).expect("made");
        let file = storage.create_new(Path::new("/d/f")).expect("made");
        file.write_at(&[1; 3 * SECTOR_BYTES], 0).expect("written");
        // A name, a length, three sectors.
        assert_eq!(storage.pending(), 5);
        let images: Vec<SimStorage> = (0..32).map(|kept| storage.image(kept)).collect();
        let nothing = images.iter().filter(|image| image.open(Path::new("/d/f")).is_err()).count();
        assert_eq!(nothing, 16, "without the name there is no file");
        assert_eq!(read_all(&images[0b00001], Path::new("/d/f"), 1 << 20).expect("a file"), []);
        assert_eq!(read_all(&images[0b00011], Path::new("/d/f"), 1 << 20).expect("a file"), [0; 3 * SECTOR_BYTES]);
        let one = read_all(&images[0b01001], Path::new("/d/f"), 1 << 20).expect("a file");
        assert_eq!((one[0], one[SECTOR_BYTES], one.len()), (0, 1, 2 * SECTOR_BYTES));
        let distinct: HashSet<u64> = images.iter().map(SimStorage::fingerprint).collect();
        // No name; or a length that was kept (8), or that of the last sector kept (8), of which one is the same.
        assert_eq!(distinct.len(), 1 + 8 + 4);
        assert_eq!(storage.pending(), 5, "as it was");
    }
}

//! A disk in memory that loses, tears, reorders and fails what it may, driven by a seed.
//!
//! Keeps apart what programs see (the page cache) and what is on the disk: per file the synced content and the writes
//! since, per folder the durable names and the changes since. `power_cut` decides by the seed what of that came to be:
//! any subset of the sectors of any write, in any order, torn sectors with garbage, a length without its data; any
//! subset of name changes that keeps the order on one name. Calls are counted, so that a cut or an error can be set at any of them;
//! after a cut every call fails until `restart`. Knows no permissions, links or mounts.

mod image;

use super::{Storage, StorageFile};
use crate::random::SimRandom;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes that a disk writes as one.
const SECTOR_BYTES: usize = 512;
/// Bytes that the page cache writes as one, mostly.
const PAGE_BYTES: usize = 4096;

/// A disk in memory. Clones are the same disk.
#[derive(Clone)]
pub struct SimStorage(Arc<Mutex<Disk>>);

/// An error to come, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails with this kind of error; a write may have written a part before.
    Error(io::ErrorKind),
    /// The call is the last before a power cut: it may have begun.
    PowerCut,
    /// The call is the last of its process: it may have begun. What was not synced stays in the page cache.
    Death,
    /// The process ends before the call: it does not happen, and everything stays as it is.
    End,
}

struct Disk {
    random: SimRandom,
    files: Vec<Content>,
    folders: BTreeMap<PathBuf, Folder>,
    calls: u64,
    faults: BTreeMap<u64, Fault>,
    /// From this call on every one fails with this.
    fails_from: Option<(u64, io::ErrorKind)>,
    /// Which life of the machine it is; handles of an earlier one fail.
    life: u64,
    is_down: bool,
    free_bytes: u64,
}

/// Names of a folder: files by their number.
#[derive(Default)]
struct Folder {
    durable: BTreeMap<PathBuf, usize>,
    now: BTreeMap<PathBuf, usize>,
    changes: Vec<Change>,
}

/// Names given (`Some`) and taken (`None`) in one step; a rename is both.
struct Change(Vec<(PathBuf, Option<usize>)>);

/// Content of a file.
#[derive(Default)]
struct Content {
    /// What programs read.
    cache: Vec<u8>,
    /// What is on the disk.
    durable: Vec<u8>,
    /// Changes since the last sync, oldest first. What a failed sync dropped is in `cache` and in neither of the others.
    changes: Vec<Dirty>,
}

/// A change to a file that is not durable. What was written is read from the cache, as the kernel would.
#[derive(Clone, Copy)]
enum Dirty {
    Written { offset: usize, len: usize },
    Cut { len: usize },
}

struct SimFile {
    disk: Arc<Mutex<Disk>>,
    file: usize,
    life: u64,
}

fn down() -> io::Error {
    io::Error::other("the machine is down")
}

fn locked(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimStorage {
    /// An empty disk whose misfortunes follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut folders = BTreeMap::new();
        folders.insert(PathBuf::from("/"), Folder::default());
        Self(Arc::new(Mutex::new(Disk {
            random: SimRandom::new(seed),
            files: Vec::new(),
            folders,
            calls: 0,
            faults: BTreeMap::new(),
            fails_from: None,
            life: 0,
            is_down: false,
            free_bytes: u64::MAX,
        })))
    }

    /// Calls made so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        locked(&self.0).calls
    }

    /// Lets call number `call` (the first is 0) have a fault.
    pub fn fault_at(&self, call: u64, fault: Fault) {
        locked(&self.0).faults.insert(call, fault);
    }

    /// Lets call number `call` and all after it fail.
    pub fn fail_from(&self, call: u64, kind: io::ErrorKind) {
        locked(&self.0).fails_from = Some((call, kind));
    }

    /// Takes back all faults to come.
    pub fn clear_faults(&self) {
        let mut disk = locked(&self.0);
        disk.faults.clear();
        disk.fails_from = None;
    }

    /// Whether the power was cut and not restored.
    #[must_use]
    pub fn is_down(&self) -> bool {
        locked(&self.0).is_down
    }

    /// Sets what `free_bytes` says: a write that makes a file longer by more than this fails. Writing uses none of it up.
    pub fn set_free_bytes(&self, free_bytes: u64) {
        locked(&self.0).free_bytes = free_bytes;
    }

    /// Cuts the power now: what was not durable is lost, whole or in part.
    pub fn power_cut(&self) {
        locked(&self.0).power_cut();
    }

    /// Ends the process that uses it: its handles are dead, what it has written is not.
    pub fn process_death(&self) {
        locked(&self.0).die();
    }

    /// Brings the machine up again after a power cut or the death of its process. Handles from before stay dead.
    pub fn restart(&self) {
        locked(&self.0).is_down = false;
    }

    /// Flips a bit of a file at rest; it reads so from now on and survives a power cut.
    ///
    /// # Panics
    /// Where there is no such file.
    pub fn flip_bit(&self, path: &Path, bit: u64) {
        let mut disk = locked(&self.0);
        let file = disk.find(path).expect("a file to flip a bit of");
        let content = &mut disk.files[file];
        for bytes in [&mut content.cache, &mut content.durable] {
            if let Some(byte) = bytes.get_mut((bit / 8) as usize) {
                *byte ^= 1 << (bit % 8);
            }
        }
    }

    /// Length of a file; 0 where there is none. Not counted as a call.
    #[must_use]
    pub fn file_len(&self, path: &Path) -> u64 {
        let disk = locked(&self.0);
        disk.find(path).map_or(0, |file| disk.files[file].cache.len() as u64)
    }
}

impl Disk {
    /// Counts a call; gives the fault that was set for it.
    fn call(&mut self) -> io::Result<Option<Fault>> {
        if self.is_down {
            return Err(down());
        }
        let for_good = self.fails_from.filter(|(from, _)| self.calls >= *from).map(|(_, kind)| Fault::Error(kind));
        let fault = self.faults.remove(&self.calls).or(for_good);
        self.calls += 1;
        if fault == Some(Fault::End) {
            self.die();
            return Err(down());
        }
        Ok(fault)
    }

    /// A call that either happens whole or not at all; gives the end that comes after it.
    fn atomic_call(&mut self) -> io::Result<Option<Fault>> {
        match self.call()? {
            None => Ok(None),
            Some(Fault::Error(kind)) => Err(kind.into()),
            // Whether it was still done nobody saw.
            end if self.random.below(2) == 0 => Ok(end),
            end => self.finish(end, None),
        }
    }

    /// Ends a call that may have been the last.
    fn finish<T>(&mut self, end: Option<Fault>, value: T) -> io::Result<T> {
        match end {
            None | Some(Fault::Error(_)) => return Ok(value),
            Some(Fault::PowerCut) => self.power_cut(),
            Some(Fault::Death | Fault::End) => self.die(),
        }
        Err(down())
    }

    /// No handle of this life is good for anything any more.
    fn die(&mut self) {
        self.is_down = true;
        self.life += 1;
    }

    fn find(&self, path: &Path) -> Option<usize> {
        self.folders.get(path.parent()?)?.now.get(&name(path)).copied()
    }

    fn change(&mut self, path: &Path, change: Vec<(PathBuf, Option<usize>)>) -> io::Result<()> {
        let folder = self.folders.get_mut(path.parent().unwrap_or(path)).ok_or(io::ErrorKind::NotFound)?;
        for (name, file) in &change {
            match file {
                Some(file) => folder.now.insert(name.clone(), *file),
                None => folder.now.remove(name),
            };
        }
        folder.changes.push(Change(change));
        Ok(())
    }

    fn power_cut(&mut self) {
        self.die();
        for folder in self.folders.values_mut() {
            folder.power_cut(&self.random);
        }
        for file in &mut self.files {
            file.power_cut(&self.random);
        }
    }
}

impl Folder {
    /// Any subset of the changes happened, in order; those on one name only up to some point.
    fn power_cut(&mut self, random: &SimRandom) {
        let mut stopped: Vec<PathBuf> = Vec::new();
        for Change(change) in std::mem::take(&mut self.changes) {
            let held = change.iter().any(|(name, _)| stopped.contains(name)) || random.below(2) == 0;
            for (name, file) in change {
                match file {
                    _ if held => stopped.push(name),
                    Some(file) => {
                        self.durable.insert(name, file);
                    }
                    None => {
                        self.durable.remove(&name);
                    }
                }
            }
        }
        self.now.clone_from(&self.durable);
    }
}

impl Content {
    fn write(&mut self, bytes: &[u8], offset: usize) {
        let end = offset + bytes.len();
        if end > self.cache.len() {
            self.cache.resize(end, 0);
        }
        self.cache[offset..end].copy_from_slice(bytes);
        self.changes.push(Dirty::Written { offset, len: bytes.len() });
    }

    fn set_len(&mut self, len: usize) {
        self.cache.resize(len, 0);
        self.changes.push(Dirty::Cut { len });
    }

    fn sync(&mut self) {
        for change in std::mem::take(&mut self.changes) {
            match change {
                Dirty::Written { offset, len } => self.keep(offset, offset + len),
                Dirty::Cut { len } => self.durable.resize(len, 0),
            }
        }
    }

    /// The kernel forgets that the pages were dirty; they still read as written.
    fn fail_sync(&mut self) {
        self.changes.clear();
    }

    /// Each change since the last sync came to be whole, not at all, or in some of its sectors.
    fn power_cut(&mut self, random: &SimRandom) {
        for change in std::mem::take(&mut self.changes) {
            match (change, random.below(5)) {
                (_, 0) => {}
                (Dirty::Cut { len }, _) => self.durable.resize(len, 0),
                (Dirty::Written { offset, len }, 1) => self.keep(offset, offset + len),
                // The length came to be, the data did not.
                (Dirty::Written { offset, len }, 2) => {
                    let end = (offset + len).min(self.cache.len()).max(self.durable.len());
                    self.durable.resize(end, 0);
                }
                (Dirty::Written { offset, len }, 3) => {
                    let kept = random.below(len as u64 + 1) as usize / SECTOR_BYTES * SECTOR_BYTES;
                    self.keep(offset, offset + kept);
                }
                (Dirty::Written { offset, len }, _) => self.tear(offset, offset + len, random),
            }
        }
        self.cache.clone_from(&self.durable);
    }

    /// Puts what was written from `from` to `to` on the disk.
    fn keep(&mut self, from: usize, to: usize) {
        let to = to.min(self.cache.len());
        if from >= to {
            return;
        }
        if self.durable.len() < to {
            self.durable.resize(to, 0);
        }
        self.durable[from..to].copy_from_slice(&self.cache[from..to]);
    }

    /// Some sectors or pages came to be, some did not, a few hold garbage.
    fn tear(&mut self, from: usize, to: usize, random: &SimRandom) {
        let unit = if random.below(4) == 0 { PAGE_BYTES } else { SECTOR_BYTES };
        let mut at = from;
        while at < to {
            let end = ((at / unit + 1) * unit).min(to);
            match random.below(8) {
                0..=3 => self.keep(at, end),
                4 if end <= self.durable.len() => {}
                4 | 5 => {
                    // A sector is written whole, so only one that is being written may be torn: bytes that were durable in it
                    // stay, for the disk has them in its buffer.
                    self.keep(at, end);
                    let end = end.min(self.durable.len());
                    if at < end {
                        let garbage = random.next().to_le_bytes();
                        let torn = self.durable[at..end].iter_mut();
                        torn.zip(garbage.iter().cycle()).for_each(|(byte, garbage)| *byte = *garbage);
                    }
                }
                _ => {}
            }
            at = end;
        }
    }
}

fn name(path: &Path) -> PathBuf {
    path.file_name().map(PathBuf::from).unwrap_or_default()
}

impl SimStorage {
    fn handle(&self, disk: &Disk, file: usize) -> Box<dyn StorageFile> {
        Box::new(SimFile { disk: Arc::clone(&self.0), file, life: disk.life })
    }

    fn open_any(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        let file = disk.find(path).ok_or(io::ErrorKind::NotFound)?;
        let handle = self.handle(&disk, file);
        disk.finish(end, handle)
    }
}

impl Storage for SimStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        if disk.find(path).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = disk.files.len();
        disk.files.push(Content::default());
        disk.change(path, vec![(name(path), Some(file))])?;
        let handle = self.handle(&disk, file);
        disk.finish(end, handle)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.open_any(path)
    }

    fn open_write(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.open_any(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        assert_eq!(from.parent(), to.parent(), "this disk renames within a folder");
        let file = disk.find(from).ok_or(io::ErrorKind::NotFound)?;
        disk.change(from, vec![(name(to), Some(file)), (name(from), None)])?;
        disk.finish(end, ())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        disk.find(path).ok_or(io::ErrorKind::NotFound)?;
        disk.change(path, vec![(name(path), None)])?;
        disk.finish(end, ())
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        for folder in path.ancestors() {
            disk.folders.entry(folder.to_owned()).or_default();
        }
        disk.finish(end, ())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        let folder = disk.folders.get(path).ok_or(io::ErrorKind::NotFound)?;
        let within = disk.folders.keys().filter(|folder| folder.parent() == Some(path));
        let mut names: Vec<PathBuf> = folder.now.keys().cloned().chain(within.map(|folder| name(folder))).collect();
        names.sort();
        disk.finish(end, names)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        let folder = disk.folders.get_mut(path).ok_or(io::ErrorKind::NotFound)?;
        folder.changes.clear();
        folder.durable.clone_from(&folder.now);
        disk.finish(end, ())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        let mut disk = locked(&self.0);
        let end = disk.atomic_call()?;
        let free_bytes = disk.free_bytes;
        disk.finish(end, free_bytes)
    }
}

impl SimFile {
    fn disk(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let disk = locked(&self.disk);
        if disk.life == self.life { Ok(disk) } else { Err(down()) }
    }
}

impl StorageFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut disk = self.disk()?;
        let end = disk.atomic_call()?;
        let content = &disk.files[self.file].cache;
        let from = content.len().min(offset as usize);
        let read = buffer.len().min(content.len() - from);
        buffer[..read].copy_from_slice(&content[from..from + read]);
        disk.finish(end, read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut disk = self.disk()?;
        let fault = disk.call()?;
        let grown = (offset + bytes.len() as u64).saturating_sub(disk.files[self.file].cache.len() as u64);
        if fault.is_none() && grown > disk.free_bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = match fault {
            None => bytes.len(),
            Some(_) => disk.random.below(bytes.len() as u64 + 1) as usize,
        };
        if written > 0 {
            disk.files[self.file].write(&bytes[..written], offset as usize);
        }
        match fault {
            None => Ok(()),
            Some(Fault::Error(kind)) => Err(kind.into()),
            end => disk.finish(end, ()),
        }
    }

    fn len(&self) -> io::Result<u64> {
        let mut disk = self.disk()?;
        let end = disk.atomic_call()?;
        let len = disk.files[self.file].cache.len() as u64;
        disk.finish(end, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.disk()?;
        let end = disk.atomic_call()?;
        disk.files[self.file].set_len(len as usize);
        disk.finish(end, ())
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.disk()?;
        match disk.call()? {
            None => {
                disk.files[self.file].sync();
                Ok(())
            }
            Some(Fault::Error(kind)) => {
                disk.files[self.file].fail_sync();
                Err(kind.into())
            }
            end => {
                if disk.random.below(2) == 0 {
                    disk.files[self.file].sync();
                }
                disk.finish(end, ())
            }
        }
    }

    fn try_lock(&self) -> io::Result<bool> {
        let mut disk = self.disk()?;
        let end = disk.atomic_call()?;
        disk.finish(end, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_in(storage: &SimStorage, content: &[u8]) -> Box<dyn StorageFile> {
        storage.create_dir_all(Path::new("/d")).expect("made");
        let file = storage.create_new(Path::new("/d/f")).expect("made");
        file.write_at(content, 0).expect("written");
        file
    }

    fn after_cut(storage: &SimStorage) -> Option<Vec<u8>> {
        storage.power_cut();
        storage.restart();
        crate::storage::read_all(storage, Path::new("/d/f"), 1 << 20).ok()
    }

    #[test]
    fn what_was_synced_with_its_name_survives_and_nothing_else_is_sure() {
        let (mut lost_name, mut lost_data, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let storage = SimStorage::new(seed);
            let file = file_in(&storage, &[1; 2048]);
            file.sync().expect("synced");
            storage.sync_dir(Path::new("/d")).expect("synced");
            assert_eq!(after_cut(&storage), Some(vec![1; 2048]));
            let storage = SimStorage::new(seed);
            let file = file_in(&storage, &[1; 2048]);
            file.sync().expect("synced");
            lost_name += u32::from(after_cut(&storage).is_none());
            let storage = SimStorage::new(seed);
            file_in(&storage, &[1; 2048]);
            storage.sync_dir(Path::new("/d")).expect("synced");
            let left = after_cut(&storage).expect("its name is durable");
            lost_data += u32::from(left.is_empty());
            torn += u32::from(!left.is_empty() && left != [1; 2048]);
        }
        assert!(lost_name > 50 && lost_data > 20 && torn > 50, "{lost_name} {lost_data} {torn}");
    }

    #[test]
    fn a_failed_sync_drops_pages_that_still_read_well_and_a_second_sync_says_ok() {
        let storage = SimStorage::new(1);
        let file = file_in(&storage, b"old");
        file.sync().expect("synced");
        storage.sync_dir(Path::new("/d")).expect("synced");
        file.write_at(b"new", 0).expect("written");
        storage.fault_at(storage.calls(), Fault::Error(io::ErrorKind::Other));
        assert!(file.sync().is_err());
        file.sync().expect("the lie");
        let mut read = [0; 3];
        file.read_at(&mut read, 0).expect("read");
        assert_eq!(&read, b"new");
        assert_eq!(after_cut(&storage).as_deref(), Some(b"old".as_slice()));
    }

    #[test]
    fn writing_again_what_a_failed_sync_dropped_makes_it_durable() {
        let storage = SimStorage::new(1);
        let file = file_in(&storage, b"old");
        storage.sync_dir(Path::new("/d")).expect("synced");
        storage.fault_at(storage.calls(), Fault::Error(io::ErrorKind::Other));
        assert!(file.sync().is_err());
        file.write_at(b"old", 0).expect("written");
        file.sync().expect("synced");
        assert_eq!(after_cut(&storage).as_deref(), Some(b"old".as_slice()));
    }

    #[test]
    fn a_cut_at_a_call_ends_all_calls_until_the_restart() {
        let storage = SimStorage::new(3);
        let file = file_in(&storage, b"x");
        storage.fault_at(storage.calls(), Fault::PowerCut);
        assert!(file.sync().is_err());
        assert!(storage.is_down());
        assert!(storage.list(Path::new("/d")).is_err());
        storage.restart();
        assert!(storage.list(Path::new("/d")).is_ok());
        assert!(file.len().is_err(), "a handle from before the cut");
    }
}

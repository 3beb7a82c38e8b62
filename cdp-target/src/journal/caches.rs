//! What the readers of a group keep of its files, and what they found out about them.
//!
//! Each cache has its own bounds and its own lock, held to look and to keep, never to read. Nothing here is needed: what is not kept
//! is read again.

use super::file::{FileId, SliceId};
use super::index::Summary;
use super::listing::Tally;
use super::sealed::{Extents, Touched};
use crate::checkpoint::index::ImageIndex;
use crate::open_files;
use cdp_protocol::units::Epoch;
use cdp_seams::storage::StorageFile;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

/// Memory for summaries, and for which blocks a segment touches, each, in bytes.
const CACHE_BYTES_MAX: usize = 32 << 20;
/// Memory for extents, in bytes: those of a month of small points take 90 MB.
const EXTENTS_BYTES_MAX: usize = 64 << 20;
/// Image indexes kept open.
const IMAGES_MAX: usize = 64;

/// What readers of one group share.
pub(crate) struct Caches {
    /// By their bytes.
    pub(super) summaries: Cache<Summary>,
    /// By their bytes.
    pub(super) touched: Cache<Touched>,
    /// By their bytes.
    pub(super) extents: Cache<Extents>,
    /// By their number.
    pub(super) files: Cache<Box<dyn StorageFile>>,
    /// Files whose index does not verify, in some part: nothing of it is believed.
    distrusted: Mutex<HashSet<FileId>>,
    /// Two numbers a segment: never dropped.
    tallies: Mutex<HashMap<FileId, Tally>>,
    /// Bytes of the parts of a point, by its epoch, where it has any: the first copy, and long outages.
    part_bytes: Mutex<HashMap<Epoch, u64>>,
    /// Image indexes, open, by their hash.
    images: Mutex<HashMap<[u8; 32], Arc<ImageIndex>>>,
    /// Packs in which a frame was met that is not what was written: read past where anything else has the content.
    bad_slices: Mutex<HashSet<SliceId>>,
    /// How often the storage failed a read that was then told as damage: it may succeed another time.
    failed_reads: AtomicU64,
}

impl Default for Caches {
    fn default() -> Self {
        Self {
            summaries: Cache::new(CACHE_BYTES_MAX),
            touched: Cache::new(CACHE_BYTES_MAX),
            extents: Cache::new(EXTENTS_BYTES_MAX),
            files: Cache::new(open_files::per_group()),
            distrusted: Mutex::default(),
            tallies: Mutex::default(),
            part_bytes: Mutex::default(),
            images: Mutex::default(),
            bad_slices: Mutex::default(),
            failed_reads: AtomicU64::new(0),
        }
    }
}

impl Caches {
    pub(super) fn is_distrusted(&self, file: FileId) -> bool {
        locked(&self.distrusted).contains(&file)
    }

    pub(super) fn distrust(&self, file: FileId) {
        locked(&self.distrusted).insert(file);
    }

    pub(super) fn tally(&self, file: FileId) -> Option<Tally> {
        locked(&self.tallies).get(&file).cloned()
    }

    pub(super) fn part_bytes(&self, epoch: Epoch) -> Option<u64> {
        locked(&self.part_bytes).get(&epoch).copied()
    }

    pub(super) fn image(&self, hash: &[u8; 32]) -> Option<Arc<ImageIndex>> {
        locked(&self.images).get(hash).map(Arc::clone)
    }

    pub(super) fn keep_image(&self, hash: [u8; 32], image: &Arc<ImageIndex>) {
        let mut images = locked(&self.images);
        if images.len() >= IMAGES_MAX {
            images.clear();
        }
        images.insert(hash, Arc::clone(image));
    }

    pub(crate) fn is_bad(&self, slice: SliceId) -> bool {
        locked(&self.bad_slices).contains(&slice)
    }

    pub(crate) fn note_bad(&self, slice: SliceId) {
        locked(&self.bad_slices).insert(slice);
    }

    /// A file of this name is written anew: nothing that was read of the one before is good for it.
    pub(crate) fn forget(&self, file: FileId) {
        self.summaries.remove(file);
        self.touched.remove(file);
        self.extents.remove(file);
        self.files.remove(file);
        locked(&self.distrusted).remove(&file);
    }

    pub(crate) fn forget_bad(&self, slice: SliceId) {
        locked(&self.bad_slices).remove(&slice);
    }

    pub(crate) fn note_failed_read(&self) {
        self.failed_reads.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn failed_reads(&self) -> u64 {
        self.failed_reads.load(Ordering::Relaxed)
    }

    pub(super) fn keep_part_bytes(&self, epoch: Epoch, bytes: u64) {
        locked(&self.part_bytes).insert(epoch, bytes);
    }

    pub(super) fn keep_tally(&self, file: FileId, tally: Tally) {
        locked(&self.tallies).insert(file, tally);
    }
}

/// Values by file, within a bound on what they take in all; the longest unused going first. Looking something up keeps nobody else from it:
/// one read of a block asks for what every segment touches.
pub(super) struct Cache<T> {
    values: RwLock<Values<T>>,
    uses: AtomicU64,
    size_max: usize,
}

struct Values<T> {
    by_file: HashMap<FileId, Kept<T>>,
    size: usize,
}

struct Kept<T> {
    value: Arc<T>,
    /// Which of the uses was its last.
    used: AtomicU64,
    size: usize,
}

impl<T> Cache<T> {
    fn new(size_max: usize) -> Self {
        let values = RwLock::new(Values { by_file: HashMap::new(), size: 0 });
        Self { values, uses: AtomicU64::new(0), size_max }
    }

    pub(super) fn find(&self, file: FileId) -> Option<Arc<T>> {
        let values = self.values.read().unwrap_or_else(PoisonError::into_inner);
        let kept = values.by_file.get(&file)?;
        kept.used.store(self.next_use(), Ordering::Relaxed);
        Some(Arc::clone(&kept.value))
    }

    /// Keeps a value of a size; one that is larger than the bound stands alone.
    pub(super) fn keep(&self, file: FileId, value: &Arc<T>, size: usize) {
        let mut values = self.changed();
        values.remove(file);
        while values.size + size > self.size_max
            && let Some(oldest) = values.longest_unused()
        {
            values.remove(oldest);
        }
        values.size += size;
        let used = AtomicU64::new(self.next_use());
        values.by_file.insert(file, Kept { value: Arc::clone(value), used, size });
    }

    fn remove(&self, file: FileId) {
        self.changed().remove(file);
    }

    fn next_use(&self) -> u64 {
        self.uses.fetch_add(1, Ordering::Relaxed)
    }

    fn changed(&self) -> RwLockWriteGuard<'_, Values<T>> {
        self.values.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Values<T> {
    fn longest_unused(&self) -> Option<FileId> {
        let kept = self.by_file.iter().min_by_key(|(_, kept)| kept.used.load(Ordering::Relaxed));
        kept.map(|(file, _)| *file)
    }

    fn remove(&mut self, file: FileId) {
        self.size -= self.by_file.remove(&file).map_or(0, |kept| kept.size);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_keeps_what_was_used_last_within_its_bound() {
        let cache = Cache::<u64>::new(100);
        let size = |cache: &Cache<u64>| {
            let values = cache.changed();
            (values.by_file.len(), values.size)
        };
        let file = |number: u64| FileId::Segment { number, revision: 0 };
        for number in 0..200 {
            cache.keep(file(number), &Arc::new(number), 10);
            assert!(size(&cache).0 <= 10 && size(&cache).1 <= 100);
            assert!(number == 0 || cache.find(file(0)).is_some(), "used again and again");
        }
        assert_eq!(cache.find(file(199)).as_deref(), Some(&199));
        assert_eq!(cache.find(file(150)), None);
        cache.keep(file(199), &Arc::new(199), 10);
        assert_eq!(size(&cache), (10, 100), "counted once");
        cache.keep(file(500), &Arc::new(500), 1000);
        assert_eq!(size(&cache), (1, 1000), "one that is larger than all stands alone");
    }
}

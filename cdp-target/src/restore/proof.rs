//! What stands in an image already, by hash: to go on with a broken export, and to name the file that was written.
//!
//! Invariant: only what was read again, and is by its hash what was written, counts. Several threads read, a stride each at a time.

use super::image::{Begun, one_line};
use super::progress::Line;
use super::tree_hash::{LEAF_BYTES, LeafHasher, STRIDE_BYTES, TreeHash, Value};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Reads bytes at an offset.
pub(crate) type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> io::Result<()> + Sync + 'a;

/// Bytes that are to be proved.
pub(crate) struct Stored<'a> {
    /// Reads them.
    pub(crate) read_at: &'a ReadAt<'a>,
    /// How many there are.
    pub(crate) size_bytes: u64,
    /// Threads that read.
    pub(crate) threads: u64,
    /// Ends it where it turns true.
    pub(crate) stop: &'a AtomicBool,
}

impl Stored<'_> {
    /// The hash of all of them.
    ///
    /// # Errors
    /// As the system says; `Interrupted` where it was stopped.
    pub(crate) fn hash(&self, progress: &(dyn Fn(u64) + Sync)) -> io::Result<blake3::Hash> {
        let strides = self.size_bytes.div_ceil(STRIDE_BYTES);
        let mut tree = TreeHash::default();
        for (_, leaves) in self.strides(strides, progress)? {
            for leaf in leaves {
                tree.push(leaf);
            }
        }
        if self.stop.load(Ordering::Relaxed) { Err(io::ErrorKind::Interrupted.into()) } else { Ok(tree.root()) }
    }

    /// How far, in whole strides, they are what `lines` says was written.
    pub(crate) fn prove(&self, lines: &[Line], progress: &(dyn Fn(u64) + Sync)) -> Begun {
        let strides = self.size_bytes.div_ceil(STRIDE_BYTES).min(lines.len() as u64);
        let read = self.strides(strides, progress).unwrap_or_else(|error| {
            tracing::warn!(error = one_line(&error), "what was broken off cannot be read: beginning anew");
            Vec::new()
        });
        let mut begun = Begun::default();
        for ((_, leaves), line) in read.into_iter().zip(lines) {
            let mut stride = TreeHash::default();
            for leaf in &leaves {
                stride.push(*leaf);
            }
            if stride.stride() != line.value {
                break;
            }
            for leaf in leaves {
                begun.hash.push(leaf);
            }
            begun.content_bytes += line.content_bytes;
        }
        begun
    }

    /// The leaves of the first strides, in order.
    fn strides(&self, strides: u64, progress: &(dyn Fn(u64) + Sync)) -> io::Result<Vec<(u64, Vec<Value>)>> {
        let next = AtomicU64::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let stride = next.fetch_add(1, Ordering::Relaxed);
                if stride >= strides || self.stop.load(Ordering::Relaxed) {
                    return Ok(done);
                }
                done.push((stride, self.stride(stride)?));
                progress(STRIDE_BYTES.min(self.size_bytes - stride * STRIDE_BYTES));
            }
        };
        let read: io::Result<Vec<Vec<_>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads.max(1)).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|thread| thread.join().expect("a reader does not panic")).collect()
        });
        let mut read: Vec<_> = read?.into_iter().flatten().collect();
        read.sort_unstable_by_key(|(stride, _)| *stride);
        Ok(read)
    }

    fn stride(&self, stride: u64) -> io::Result<Vec<Value>> {
        let end = self.size_bytes.min((stride + 1) * STRIDE_BYTES);
        let mut buffer = vec![0; LEAF_BYTES as usize];
        let mut leaves = Vec::new();
        let mut offset = stride * STRIDE_BYTES;
        while offset < end {
            let leaf = &mut buffer[..LEAF_BYTES.min(end - offset) as usize];
            (self.read_at)(offset, leaf)?;
            let mut hasher = LeafHasher::new(offset, self.size_bytes);
            hasher.update(leaf);
            leaves.push(hasher.finish());
            offset += leaf.len() as u64;
        }
        Ok(leaves)
    }
}

//! Compresses clusters for a qcow2 image, each on its own.

use super::{CLUSTER_BYTES, SECTOR_BYTES};
use std::io;
use zstd::bulk::Compressor;

/// zstd's own default.
const LEVEL: i32 = 3;

/// A cluster of the disk, as it goes into a compressed image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Zeros: not in the file.
    Zero,
    /// Content that does not become smaller, whole.
    Plain(Vec<u8>),
    /// A zstd frame.
    Packed(Vec<u8>),
}

/// A thread's compressor.
pub(crate) struct Packer(Compressor<'static>);

impl Packer {
    /// # Errors
    /// Where there is no memory for it.
    pub(crate) fn new() -> io::Result<Self> {
        Compressor::new(LEVEL).map(Self)
    }

    /// The clusters of `bytes`, which begin with a cluster; the last one filled up with zeros.
    pub(crate) fn pack(&mut self, bytes: &[u8]) -> Vec<Cluster> {
        bytes.chunks(CLUSTER_BYTES as usize).map(|cluster| self.cluster(cluster)).collect()
    }

    fn cluster(&mut self, bytes: &[u8]) -> Cluster {
        if bytes.iter().all(|byte| *byte == 0) {
            return Cluster::Zero;
        }
        let mut whole = bytes.to_vec();
        whole.resize(CLUSTER_BYTES as usize, 0);
        match self.0.compress(&whole) {
            // One that is not smaller by a sector at least would only cost its reader time.
            Ok(packed) if packed.len() as u64 + SECTOR_BYTES < CLUSTER_BYTES => Cluster::Packed(packed),
            Ok(_) | Err(_) => Cluster::Plain(whole),
        }
    }
}

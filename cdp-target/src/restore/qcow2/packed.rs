//! A qcow2 image of compressed clusters.
//!
//! Invariant: clusters are appended in the order of the disk; L2 tables between them, once they are full; the counts behind them. The
//! L1 table and the refcount table stand in front, in room kept for them, and are written last, the header behind everything
//! else: what was broken off is no qcow2 image. Two bytes are kept for each cluster of the file, 32 MiB a TiB.

use super::packer::Cluster;
use super::{CLUSTER_BYTES, COMPRESSED, COPIED, COUNTS, ENTRIES, Header, SECTOR_BYTES, clusters_in, encode_table};
use crate::restore::output::Output;
use std::io;

/// Where in the entry of a compressed cluster its further sectors are counted.
const SECTORS_SHIFT: u32 = 62 - (super::CLUSTER_BITS - 8);

/// An image over the file or device that it goes to.
pub(crate) struct PackedQcow2 {
    inner: Box<dyn Output>,
    size_bytes: u64,
    /// Length of the file so far.
    at: u64,
    /// How often each cluster of the file is referred to.
    counts: Vec<u16>,
    l1: Vec<u64>,
    /// The table that is being filled.
    l2: Vec<u64>,
}

impl PackedQcow2 {
    /// An image of a disk of so many bytes.
    pub(crate) fn new(inner: Box<dyn Output>, size_bytes: u64) -> Self {
        let at = front_bytes(size_bytes);
        let counts = vec![1; (at / CLUSTER_BYTES) as usize];
        Self { inner, size_bytes, at, counts, l1: Vec::new(), l2: Vec::new() }
    }

    /// Notes that what stands at `offset` is referred to.
    fn count(&mut self, offset: u64, len: u64) {
        let last = (offset + len - 1) / CLUSTER_BYTES;
        self.counts.resize(self.counts.len().max(last as usize + 1), 0);
        for count in &mut self.counts[(offset / CLUSTER_BYTES) as usize..=last as usize] {
            *count += 1;
        }
    }

    /// Appends whole clusters where one begins; gives the offset.
    fn append_clusters(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let offset = self.at.next_multiple_of(CLUSTER_BYTES);
        self.inner.write(offset, bytes)?;
        self.count(offset, bytes.len() as u64);
        self.at = offset + bytes.len() as u64;
        Ok(offset)
    }

    /// Appends a compressed cluster; gives its entry.
    fn append_packed(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let (offset, end) = (self.at, self.at + bytes.len() as u64);
        self.inner.write(offset, bytes)?;
        // It is read by sectors, to the end of its last one.
        let further = (end - 1) / SECTOR_BYTES - offset / SECTOR_BYTES;
        self.count(offset, end.next_multiple_of(SECTOR_BYTES) - offset);
        self.at = end;
        Ok(COMPRESSED | further << SECTORS_SHIFT | offset)
    }

    /// Ends the L2 table that is being filled.
    fn end_table(&mut self) -> io::Result<()> {
        let table = std::mem::take(&mut self.l2);
        let is_empty = table.iter().all(|entry| *entry == 0);
        let entry = if is_empty { 0 } else { COPIED | self.append_clusters(&encode_table(table))? };
        self.l1.push(entry);
        Ok(())
    }

    /// Writes what is known only at the end, but for the header.
    fn end(&mut self) -> io::Result<Header> {
        if !self.l2.is_empty() {
            self.end_table()?;
        }
        let first = self.at.div_ceil(CLUSTER_BYTES);
        // The blocks of counts count themselves.
        let mut blocks = 1;
        while blocks * COUNTS < first + blocks {
            blocks += 1;
        }
        self.counts.resize((first + blocks) as usize, 1);
        let mut bytes: Vec<u8> = self.counts.iter().flat_map(|count| count.to_be_bytes()).collect();
        bytes.resize((blocks * CLUSTER_BYTES) as usize, 0);
        self.inner.write(first * CLUSTER_BYTES, &bytes)?;
        self.at = (first + blocks) * CLUSTER_BYTES;
        let table_clusters = counts_table_clusters(self.size_bytes);
        let table = (0..blocks).map(|block| (first + block) * CLUSTER_BYTES);
        // All of its room: on a device anything may stand there.
        let mut table = encode_table(table);
        table.resize((table_clusters * CLUSTER_BYTES) as usize, 0);
        self.inner.write(CLUSTER_BYTES, &table)?;
        let l1_offset = (1 + table_clusters) * CLUSTER_BYTES;
        let l1_entries = self.l1.len() as u64;
        self.inner.write(l1_offset, &encode_table(std::mem::take(&mut self.l1)))?;
        Ok(Header {
            size_bytes: self.size_bytes,
            l1_offset,
            l1_entries,
            counts_offset: CLUSTER_BYTES,
            counts_clusters: table_clusters,
            is_packed: true,
        })
    }
}

/// What stands in front: header, refcount table, L1 table.
pub(crate) const fn front_bytes(size_bytes: u64) -> u64 {
    let l1 = clusters_in(size_bytes).div_ceil(ENTRIES).div_ceil(ENTRIES);
    (1 + counts_table_clusters(size_bytes) + l1) * CLUSTER_BYTES
}

/// Room for a refcount table of any image of a disk of so many bytes: its clusters, as many again for all tables.
const fn counts_table_clusters(size_bytes: u64) -> u64 {
    (2 * clusters_in(size_bytes)).div_ceil(COUNTS).div_ceil(ENTRIES) + 1
}

impl Output for PackedQcow2 {
    fn write(&mut self, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a compressed image takes clusters"))
    }

    fn zero(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a compressed image takes clusters"))
    }

    fn is_packed(&self) -> bool {
        true
    }

    fn cluster(&mut self, cluster: &Cluster) -> io::Result<()> {
        let entry = match cluster {
            Cluster::Zero => 0,
            Cluster::Plain(bytes) => COPIED | self.append_clusters(bytes)?,
            Cluster::Packed(bytes) => self.append_packed(bytes)?,
        };
        self.l2.push(entry);
        if self.l2.len() as u64 == ENTRIES { self.end_table() } else { Ok(()) }
    }

    fn read_file_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buffer)
    }

    fn file_bytes(&self) -> u64 {
        self.at
    }

    fn sync(&mut self) -> io::Result<()> {
        let header = self.end()?;
        // A crash before the second sync leaves no header, or one with everything that it names behind it.
        self.inner.sync()?;
        self.inner.write(0, &header.encode())?;
        self.inner.sync()
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        self.inner.publish()
    }
}

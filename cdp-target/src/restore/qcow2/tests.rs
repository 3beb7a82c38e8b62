//! Images read back by a naive reader that follows the format's own words, and counts every reference.

use super::packed::PackedQcow2;
use super::packer::Packer;
use super::plain::PlainQcow2;
use super::plan::Plan;
use super::{CLUSTER_BYTES, COUNTS, ENTRIES};
use crate::restore::output::Output;
use proptest::prelude::{ProptestConfig, Strategy as _, any, prop, prop_assert, prop_assert_eq, proptest};
use roaring::RoaringBitmap;
use std::io;
use std::sync::{Arc, Mutex};

/// A file in memory; one that can only be appended to where `is_pipe`.
#[derive(Clone, Default)]
struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    is_pipe: bool,
}

impl Memory {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.bytes.lock().expect("no thread panicked"))
    }
}

impl Output for Memory {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.bytes.lock().expect("no thread panicked");
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        assert!(!self.is_pipe || start == file.len(), "a pipe takes what follows, at {start}");
        let len = file.len().max(end);
        file.resize(len, 0xee);
        file[start..end].copy_from_slice(bytes);
        Ok(())
    }
    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write(offset, &vec![0; len as usize])
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let file = self.bytes.lock().expect("no thread panicked");
        buffer.copy_from_slice(&file[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn publish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

/// A file, and how often each of its clusters is referred to.
struct File<'a> {
    bytes: &'a [u8],
    found: Vec<u16>,
}

impl File<'_> {
    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(*self.bytes[at as usize..].first_chunk().expect("within the file"))
    }

    fn half(&self, at: u64) -> u64 {
        u64::from(u32::from_be_bytes(*self.bytes[at as usize..].first_chunk().expect("within the file")))
    }

    fn refer(&mut self, offset: u64, len: u64) {
        for cluster in offset / CLUSTER_BYTES..=(offset + len - 1) / CLUSTER_BYTES {
            self.found[cluster as usize] += 1;
        }
    }

    fn table(&mut self, offset: u64, entries: u64) -> Vec<u64> {
        assert_eq!(offset % CLUSTER_BYTES, 0);
        self.refer(offset, entries * 8);
        (0..entries).map(|at| self.word(offset + at * 8)).collect()
    }

    /// The cluster that an L2 entry names.
    fn cluster(&mut self, entry: u64) -> Vec<u8> {
        if entry == 0 {
            return vec![0; CLUSTER_BYTES as usize];
        }
        if entry >> 62 == 1 {
            let offset = entry & ((1 << 54) - 1);
            let len = ((entry >> 54 & 0xff) + 1) * 512 - offset % 512;
            self.refer(offset, len);
            let mut content = vec![0; CLUSTER_BYTES as usize];
            let packed = &self.bytes[offset as usize..(offset + len) as usize];
            let frame = zstd::zstd_safe::find_frame_compressed_size(packed).expect("a frame");
            let len = zstd::bulk::decompress_to_buffer(&packed[..frame], &mut content).expect("zstd");
            assert_eq!(len as u64, CLUSTER_BYTES);
            return content;
        }
        let offset = entry & !(1 << 63);
        assert_eq!((entry >> 63, offset % CLUSTER_BYTES), (1, 0));
        self.refer(offset, CLUSTER_BYTES);
        self.bytes[offset as usize..][..CLUSTER_BYTES as usize].to_vec()
    }
}

/// The disk in a file; every cluster of it has to be counted as often as it is referred to.
fn disk(bytes: &[u8]) -> Vec<u8> {
    assert_eq!(bytes.len() as u64 % CLUSTER_BYTES, 0);
    let mut file = File { bytes, found: vec![0; bytes.len() / CLUSTER_BYTES as usize] };
    assert_eq!((file.half(0), file.half(4), file.half(20)), (0x5146_49fb, 3, 16));
    assert_eq!((file.half(96), file.half(100)), (4, 112));
    file.refer(0, CLUSTER_BYTES);
    let (size, l1_entries, l1_offset) = (file.word(24), file.half(36), file.word(40));
    let mut disk = Vec::new();
    for table in file.table(l1_offset, l1_entries) {
        let entries = if table == 0 { vec![0; ENTRIES as usize] } else { file.table(table & !(1 << 63), ENTRIES) };
        for entry in entries {
            if (disk.len() as u64) < size {
                disk.extend(file.cluster(entry));
            } else {
                assert_eq!(entry, 0, "nothing stands behind the disk's end");
            }
        }
    }
    disk.truncate(size as usize);
    let (offset, clusters) = (file.word(48), file.half(56));
    let blocks = (0..clusters).flat_map(|at| file.table(offset + at * CLUSTER_BYTES, ENTRIES)).collect::<Vec<_>>();
    for block in blocks.iter().filter(|block| **block != 0) {
        file.refer(*block, CLUSTER_BYTES);
    }
    for (cluster, found) in file.found.iter().enumerate() {
        let block = blocks[cluster / COUNTS as usize];
        let at = block as usize + cluster % COUNTS as usize * 2;
        let counted = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        assert_eq!(counted, *found, "cluster {cluster} of the file");
    }
    disk
}

/// A disk of clusters with so many bytes of content each, the last one cut.
fn content(kinds: &[(u16, bool)], short: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, (len, is_noise)) in kinds.iter().enumerate() {
        let noise = blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof();
        let mut cluster = vec![0; CLUSTER_BYTES as usize];
        if *is_noise {
            let mut noise = noise;
            noise.fill(&mut cluster[..*len as usize]);
        } else {
            cluster[..*len as usize].fill(number as u8 | 1);
        }
        bytes.extend(cluster);
    }
    bytes.truncate(bytes.len() - short as usize);
    bytes
}

fn plain(bytes: &[u8], memory: &Memory) -> Vec<u8> {
    let clusters = bytes.chunks(CLUSTER_BYTES as usize);
    let is_held = |(number, cluster): (usize, &[u8])| cluster.iter().any(|byte| *byte != 0).then_some(number as u32);
    let held: RoaringBitmap = clusters.enumerate().filter_map(is_held).collect();
    let plan = Plan::with(bytes.len() as u64, held.clone());
    let mut image = PlainQcow2::new(Box::new(memory.clone()), plan.clone());
    image.begin().expect("begun");
    // In pieces that do not end where clusters do.
    for (number, piece) in bytes.chunks(100 * 4096).enumerate() {
        let offset = number as u64 * 100 * 4096;
        for (at, part) in piece.chunks(4096).enumerate() {
            let offset = offset + at as u64 * 4096;
            if held.contains((offset / CLUSTER_BYTES) as u32) && part.iter().any(|byte| *byte != 0) {
                image.write(offset, part).expect("written");
            } else {
                image.zero(offset, part.len() as u64).expect("written");
            }
        }
    }
    image.sync().expect("synced");
    let mut again = vec![0; bytes.len()];
    image.read_at(0, &mut again).expect("read");
    assert!(again == bytes, "it is read back as it was written");
    let file = memory.take();
    assert_eq!(file.len() as u64, plan.file_bytes());
    file
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let memory = Memory::default();
    let mut image = PackedQcow2::new(Box::new(memory.clone()), bytes.len() as u64);
    image.begin().expect("begun");
    let mut packer = Packer::new().expect("memory");
    for cluster in packer.pack(bytes) {
        image.cluster(&cluster).expect("written");
    }
    image.sync().expect("synced");
    assert_eq!(image.file_bytes(), memory.bytes.lock().expect("no thread panicked").len() as u64);
    memory.take()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn an_image_holds_the_disk_and_counts_its_clusters(
        kinds in prop::collection::vec((prop::sample::select(vec![0_u16, 0, 1, 4096, 30_000, 65_535]), any::<bool>()), 1..60),
        short in (0_u64..128).prop_map(|sectors| sectors * 512),
    ) {
        let bytes = content(&kinds, short);
        for is_pipe in [false, true] {
            let file = plain(&bytes, &Memory { is_pipe, ..Memory::default() });
            prop_assert!(disk(&file) == bytes, "the plain image differs");
        }
        let file = packed(&bytes);
        prop_assert!(disk(&file) == bytes, "the compressed image differs");
        prop_assert_eq!(file[104], 1);
    }
}

#[test]
fn a_disk_of_several_tables_holds_only_those_with_content() {
    let size = 3 * ENTRIES * CLUSTER_BYTES + 4096;
    let held: RoaringBitmap = [1, 2, 2 * ENTRIES as u32, 3 * ENTRIES as u32].into_iter().collect();
    let plan = Plan::with(size, held);
    let memory = Memory::default();
    let mut image = PlainQcow2::new(Box::new(memory.clone()), plan.clone());
    image.begin().expect("begun");
    for (cluster, fill) in [(1, 1), (2, 2), (2 * ENTRIES, 3)] {
        image.write(cluster * CLUSTER_BYTES, &vec![fill; CLUSTER_BYTES as usize]).expect("written");
    }
    image.write(3 * ENTRIES * CLUSTER_BYTES, &[4; 4096]).expect("written");
    image.sync().expect("synced");
    let file = memory.take();
    assert_eq!(file.len() as u64, plan.file_bytes());
    // Header, refcount table, a block of counts, L1, three L2 tables, four clusters.
    assert_eq!(file.len() as u64 / CLUSTER_BYTES, 11);
    let disk = disk(&file);
    assert_eq!(disk.len() as u64, size);
    assert_eq!((disk[CLUSTER_BYTES as usize], disk[(2 * ENTRIES * CLUSTER_BYTES) as usize]), (1, 3));
    assert_eq!(disk[disk.len() - 4096..], [4; 4096]);
}

#[test]
fn content_that_the_plan_does_not_know_is_an_error() {
    let mut image = PlainQcow2::new(Box::new(Memory::default()), Plan::with(1 << 20, RoaringBitmap::new()));
    image.begin().expect("begun");
    assert!(image.write(0, &[1]).is_err());
}

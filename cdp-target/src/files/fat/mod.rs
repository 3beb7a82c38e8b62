//! FAT12, FAT16 and FAT32, read only.
//!
//! A node is named by the place of its entry; the topmost folder by 0, where no entry can lie. Invariant: a chain of clusters ends, or is an
//! error: none is longer than the file system has clusters.

mod name;
#[cfg(test)]
mod tests;
mod time;

use super::tree::{Attribute, Content, ENTRIES_MAX, Entry, Id, Kind, Node, Piece, Tree, TreeError, is_same_but_case};
use super::volume::{Shared, le};
use name::LongName;

const ENTRY_BYTES: usize = 32;
const READ_ONLY: u64 = 0x01;
const VOLUME_LABEL: u64 = 0x08;
const FOLDER: u64 = 0x10;
const LONG_NAME: u64 = 0x0f;
/// Entries of a folder that FAT allows.
const FOLDER_BYTES_MAX: u64 = 65_536 * ENTRY_BYTES as u64;

/// How wide the entries of the table are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Twelve,
    Sixteen,
    ThirtyTwo,
}

/// A file system.
pub(crate) struct Fat {
    bytes: Shared,
    width: Width,
    table: u64,
    /// Where cluster 2 begins.
    clusters: u64,
    cluster_bytes: u64,
    /// Number of clusters.
    count: u64,
    root: Root,
    is_dirty: bool,
}

/// Takes an entry and its place; gives whether it has enough.
type Take<'a> = dyn FnMut(u64, &[u8]) -> Result<bool, TreeError> + 'a;

#[derive(Clone, Copy, Debug)]
enum Root {
    Area { offset: u64, bytes: u64 },
    Cluster(u64),
}

fn damaged(what: impl Into<String>) -> TreeError {
    TreeError::Damaged(what.into())
}

impl Fat {
    /// Opens one.
    ///
    /// # Errors
    /// Where it is none, or cannot be read.
    pub(crate) fn open(bytes: Shared) -> Result<Self, TreeError> {
        let mut boot = [0; 512];
        bytes.read(0, &mut boot)?;
        let field = |at| le::<2>(&boot, at);
        let (sector, per_cluster) = (field(11), le::<1>(&boot, 13));
        let (reserved, tables, root_entries) = (field(14), le::<1>(&boot, 16), field(17));
        let sectors = if field(19) != 0 { field(19) } else { le::<4>(&boot, 32) };
        let table_sectors = if field(22) != 0 { field(22) } else { le::<4>(&boot, 36) };
        let is_well = sector.is_power_of_two()
            && (512..=4096).contains(&sector)
            && per_cluster.is_power_of_two()
            && reserved > 0
            && (1..=4).contains(&tables)
            && table_sectors > 0;
        if !is_well {
            return Err(damaged("the sizes in its first sector cannot be"));
        }
        let root_sectors = (root_entries * ENTRY_BYTES as u64).div_ceil(sector);
        let root_start = reserved + tables * table_sectors;
        let data = root_start + root_sectors;
        let count = sectors.checked_sub(data).ok_or_else(|| damaged("its tables are longer than it"))? / per_cluster;
        if sectors * sector > bytes.size_bytes() {
            return Err(damaged(format!(
                "it is larger than where it lies, {} of {} bytes",
                sectors * sector,
                bytes.size_bytes()
            )));
        }
        let width = match count {
            0..4085 => Width::Twelve,
            4085..65_525 => Width::Sixteen,
            _ => Width::ThirtyTwo,
        };
        let root = match width {
            Width::ThirtyTwo => Root::Cluster(le::<4>(&boot, 44)),
            _ => Root::Area { offset: root_start * sector, bytes: root_entries * ENTRY_BYTES as u64 },
        };
        let state = if width == Width::ThirtyTwo { 65 } else { 37 };
        Ok(Self {
            width,
            table: reserved * sector,
            clusters: data * sector,
            cluster_bytes: per_cluster * sector,
            count: count.min(table_sectors * sector * 8 / width.bits()),
            root,
            is_dirty: le::<1>(&boot, state) & 1 != 0,
            bytes,
        })
    }

    /// The cluster behind one; `None` at the end.
    fn next(&self, cluster: u64) -> Result<Option<u64>, TreeError> {
        let (at, len) = match self.width {
            Width::Twelve => (cluster + cluster / 2, 2),
            Width::Sixteen => (cluster * 2, 2),
            Width::ThirtyTwo => (cluster * 4, 4),
        };
        let mut entry = [0; 4];
        self.bytes.read(self.table + at, &mut entry[..len])?;
        let entry = le::<4>(&entry, 0);
        let (next, end) = match self.width {
            Width::Twelve => (if cluster.is_multiple_of(2) { entry & 0xfff } else { entry >> 4 }, 0xff8),
            Width::Sixteen => (entry, 0xfff8),
            Width::ThirtyTwo => (entry & 0x0fff_ffff, 0x0fff_fff8),
        };
        match next {
            next if next >= end => Ok(None),
            next if self.is_cluster(next) => Ok(Some(next)),
            _ => Err(damaged(format!("behind cluster {cluster} of a chain comes {next}, which is none"))),
        }
    }

    const fn is_cluster(&self, cluster: u64) -> bool {
        cluster >= 2 && cluster - 2 < self.count
    }

    const fn offset(&self, cluster: u64) -> u64 {
        self.clusters + (cluster - 2) * self.cluster_bytes
    }

    /// An entry as it stands on the disk.
    fn entry(&self, id: Id) -> Result<[u8; ENTRY_BYTES], TreeError> {
        let mut entry = [0; ENTRY_BYTES];
        self.bytes.read(id, &mut entry)?;
        Ok(entry)
    }

    /// The first cluster of what an entry names; `None` where it has none.
    fn first_cluster(&self, entry: &[u8]) -> Result<Option<u64>, TreeError> {
        let high = if self.width == Width::ThirtyTwo { le::<2>(entry, 20) << 16 } else { 0 };
        match le::<2>(entry, 26) | high {
            0 => Ok(None),
            cluster if self.is_cluster(cluster) => Ok(Some(cluster)),
            cluster => Err(damaged(format!("an entry begins at cluster {cluster}, which is none"))),
        }
    }

    /// Goes through the raw entries of a folder, with their places, until `take` has enough.
    fn each_entry(&self, folder: Id, take: &mut Take<'_>) -> Result<(), TreeError> {
        let first = match (folder, self.root) {
            (0, Root::Area { offset, bytes }) => {
                self.each_in(offset, bytes, take)?;
                return Ok(());
            }
            (0, Root::Cluster(cluster)) if self.is_cluster(cluster) => Some(cluster),
            (0, Root::Cluster(_)) => return Err(damaged("its topmost folder begins nowhere")),
            (id, _) => {
                let entry = self.entry(id)?;
                if le::<1>(&entry, 11) & FOLDER == 0 {
                    return Err(TreeError::NotAFolder);
                }
                self.first_cluster(&entry)?
            }
        };
        let (mut cluster, mut bytes) = (first, 0);
        while let Some(at) = cluster {
            bytes += self.cluster_bytes;
            if bytes > FOLDER_BYTES_MAX + self.cluster_bytes {
                return Err(damaged("a folder is longer than one can be: its chain of clusters is a ring"));
            }
            if self.each_in(self.offset(at), self.cluster_bytes, take)? {
                return Ok(());
            }
            cluster = self.next(at)?;
        }
        Ok(())
    }

    /// The entries of one run; gives whether it was enough.
    fn each_in(&self, offset: u64, bytes: u64, take: &mut Take<'_>) -> Result<bool, TreeError> {
        let mut run = vec![0; bytes as usize];
        self.bytes.read(offset, &mut run)?;
        for (number, entry) in (0..).zip(run.chunks_exact(ENTRY_BYTES)) {
            if entry[0] == 0 || take(offset + number * ENTRY_BYTES as u64, entry)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Width {
    const fn bits(self) -> u64 {
        match self {
            Self::Twelve => 12,
            Self::Sixteen => 16,
            Self::ThirtyTwo => 32,
        }
    }
}

impl Tree for Fat {
    fn root(&self) -> Id {
        0
    }

    fn node(&self, id: Id) -> Result<Node, TreeError> {
        let none = Node {
            kind: Kind::Folder,
            size_bytes: 0,
            mode: None,
            owner: None,
            modified: None,
            accessed: None,
            note: None,
        };
        if id == 0 {
            return Ok(none);
        }
        let entry = self.entry(id)?;
        let attributes = le::<1>(&entry, 11);
        let kind = if attributes & FOLDER != 0 { Kind::Folder } else { Kind::File };
        Ok(Node {
            kind,
            size_bytes: if kind == Kind::File { le::<4>(&entry, 28) } else { 0 },
            modified: time::moment(le::<2>(&entry, 24), le::<2>(&entry, 22)),
            accessed: time::moment(le::<2>(&entry, 18), 0),
            note: (attributes & READ_ONLY != 0).then_some("read-only"),
            ..none
        })
    }

    fn list(&self, id: Id) -> Result<Vec<Entry>, TreeError> {
        let (mut entries, mut long) = (Vec::new(), LongName::default());
        self.each_entry(id, &mut |place, entry| {
            let attributes = le::<1>(entry, 11);
            if entry[0] == 0xe5 {
                long = LongName::default();
            } else if attributes & 0x3f == LONG_NAME {
                long.push(entry);
            } else if attributes & VOLUME_LABEL != 0 || entry[0] == b'.' {
                long = LongName::default();
            } else {
                let short = name::short(entry);
                let (name, short) = match std::mem::take(&mut long).finish(entry) {
                    Some(name) => (name, Some(short.into_bytes())),
                    None => (short.into_bytes(), None),
                };
                entries.push(Entry { name, short, id: place });
            }
            if entries.len() > ENTRIES_MAX { Err(damaged("a folder has too many entries")) } else { Ok(false) }
        })?;
        Ok(entries)
    }

    fn link(&self, _id: Id) -> Result<Vec<u8>, TreeError> {
        Err(TreeError::Unsupported("FAT has no symbolic links".into()))
    }

    fn open(&self, id: Id) -> Result<Box<dyn Content + '_>, TreeError> {
        if self.node(id)?.kind == Kind::Folder {
            return Err(TreeError::IsAFolder);
        }
        let entry = self.entry(id)?;
        let left = le::<4>(&entry, 28);
        Ok(Box::new(File { fat: self, cluster: self.first_cluster(&entry)?, within: 0, left, clusters: 0 }))
    }

    fn attributes(&self, _id: Id) -> Result<(Vec<Attribute>, bool), TreeError> {
        Ok((Vec::new(), true))
    }

    fn is_named(&self, asked: &[u8], name: &[u8]) -> bool {
        is_same_but_case(asked, name)
    }

    fn warnings(&self) -> Vec<String> {
        let text = "its file system was in use: FAT has no journal, and what was written last may be there in part";
        if self.is_dirty { vec![text.to_owned()] } else { Vec::new() }
    }
}

/// A file's content.
struct File<'a> {
    fat: &'a Fat,
    cluster: Option<u64>,
    within: u64,
    left: u64,
    clusters: u64,
}

impl Content for File<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<Piece, TreeError> {
        if self.left == 0 || buffer.is_empty() {
            return Ok(Piece::End);
        }
        let fat = self.fat;
        if self.within == fat.cluster_bytes {
            let cluster = self.cluster.ok_or_else(|| damaged("its chain of clusters is shorter than it"))?;
            (self.cluster, self.within) = (fat.next(cluster)?, 0);
            self.clusters += 1;
        }
        let first = self.cluster.ok_or_else(|| damaged("its chain of clusters is shorter than it"))?;
        // Clusters that lie one behind the other are read together.
        let wanted = self.left.min(buffer.len() as u64);
        let (mut last, mut len) = (first, fat.cluster_bytes - self.within);
        while len < wanted {
            match fat.next(last)? {
                Some(next) if next == last + 1 => (last, len) = (next, len + fat.cluster_bytes),
                _ => break,
            }
        }
        let len = len.min(wanted);
        fat.bytes.read_content(fat.offset(first) + self.within, &mut buffer[..len as usize])?;
        let end = self.within + len;
        let moved = (end - 1) / fat.cluster_bytes;
        (self.cluster, self.within) = (Some(first + moved), end - moved * fat.cluster_bytes);
        self.left -= len;
        Ok(Piece::Bytes(len as usize))
    }
}

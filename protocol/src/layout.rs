//! How a disk is laid out: its partition table, and what stands in each partition.
//!
//! Owns the record's byte layout (`docs/format/layout.md`). It describes and decides nothing: whatever it says, a disk is put back block by
//! block. Nothing of a file system but its kind is in it, since whoever has no key reads it too.

use crate::units::SECTOR_BYTES;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

/// Partitions that are told of: more than anybody's table has.
pub const PARTITIONS_MAX: usize = 128;
/// Bytes of a partition's name: 36 letters of a GUID partition table's, as UTF-8.
pub const PARTITION_NAME_BYTES_MAX: usize = 108;
/// Bytes of a layout: a full table.
pub const LAYOUT_BYTES_MAX: usize = HEAD_BYTES + PARTITIONS_MAX * (PARTITION_BYTES + PARTITION_NAME_BYTES_MAX);

const VERSION: u8 = 1;
const HEAD_BYTES: usize = 33;
const PARTITION_BYTES: usize = 55;
/// The largest sector a disk may have.
const SECTOR_BYTES_MAX: u32 = 65_536;

/// How a disk is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of a sector, as the disk counts them: a table's numbers are in these.
    pub sector_bytes: u32,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Its table.
    pub table: Table,
    /// Whether there is code in the first sector, for a BIOS to start.
    pub has_boot_code: bool,
    /// Its partitions, in the table's order.
    pub partitions: Vec<Partition>,
}

/// A partition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// None.
    None,
    /// In the first sector, with the disk's signature.
    Mbr([u8; 4]),
    /// A GUID partition table, with the disk's GUID as it stands there.
    Gpt([u8; 16]),
}

impl Table {
    /// For people.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::None => "no partition table",
            Self::Mbr(_) => "MBR partition table",
            Self::Gpt(_) => "GPT partition table",
        }
    }
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number.
    pub number: u32,
    /// Its first byte on the disk.
    pub start_bytes: u64,
    /// Its length.
    pub size_bytes: u64,
    /// Its type: a GUID as it stands in the table, or the byte of an MBR and zeros.
    pub kind: [u8; 16],
    /// Its own GUID; zeros in an MBR.
    pub id: [u8; 16],
    /// Whether a BIOS starts from it.
    pub is_active: bool,
    /// What stands in it.
    pub content: Content,
    /// Its name; empty in an MBR.
    pub name: String,
}

/// What stands in a partition, or on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Content {
    /// Nothing that is known here.
    Unknown = 0,
    /// ext2, ext3 or ext4.
    Ext = 1,
    /// XFS.
    Xfs = 2,
    /// btrfs.
    Btrfs = 3,
    /// NTFS.
    Ntfs = 4,
    /// FAT.
    Fat = 5,
    /// A swap area.
    Swap = 6,
    /// A LUKS container.
    Luks = 7,
    /// A physical volume of LVM.
    Lvm = 8,
    /// A member of an md RAID.
    Md = 9,
}

impl Content {
    /// All of them, each at its number.
    pub const ALL: [Self; 10] = [
        Self::Unknown,
        Self::Ext,
        Self::Xfs,
        Self::Btrfs,
        Self::Ntfs,
        Self::Fat,
        Self::Swap,
        Self::Luks,
        Self::Lvm,
        Self::Md,
    ];

    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "no known content",
            Self::Ext => "ext2/3/4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Ntfs => "ntfs",
            Self::Fat => "vfat",
            Self::Swap => "swap",
            Self::Luks => "LUKS",
            Self::Lvm => "LVM physical volume",
            Self::Md => "md RAID member",
        }
    }
}

impl Layout {
    /// The record's bytes. What no record has room for is left out: partitions behind the last that there may be, the end of a name.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (table, id) = match self.table {
            Table::None => (0, [0; 16]),
            Table::Mbr(signature) => {
                let mut id = [0; 16];
                id[..4].copy_from_slice(&signature);
                (1, id)
            }
            Table::Gpt(id) => (2, id),
        };
        let partitions = &self.partitions[..self.partitions.len().min(PARTITIONS_MAX)];
        let mut out = vec![VERSION, table, u8::from(self.has_boot_code)];
        out.extend_from_slice(&self.sector_bytes.to_le_bytes());
        out.extend_from_slice(&self.size_bytes.to_le_bytes());
        out.extend_from_slice(&id);
        out.extend_from_slice(&(partitions.len() as u16).to_le_bytes());
        for partition in partitions {
            out.extend_from_slice(&partition.number.to_le_bytes());
            out.extend_from_slice(&partition.start_bytes.to_le_bytes());
            out.extend_from_slice(&partition.size_bytes.to_le_bytes());
            out.extend_from_slice(&partition.kind);
            out.extend_from_slice(&partition.id);
            out.extend_from_slice(&[u8::from(partition.is_active), partition.content as u8]);
            let name = shortened(&partition.name);
            out.push(name.len() as u8);
            out.extend_from_slice(name.as_bytes());
        }
        out
    }

    /// Parses a record; `None` where the bytes are none, or one of another version.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = bytes;
        let [version, table, has_boot_code] = take(&mut input)?;
        if version != VERSION || has_boot_code > 1 {
            return None;
        }
        let sector_bytes = u32::from_le_bytes(take(&mut input)?);
        let is_sector = sector_bytes.is_power_of_two() && sector_bytes <= SECTOR_BYTES_MAX;
        if !is_sector || u64::from(sector_bytes) < SECTOR_BYTES {
            return None;
        }
        let size_bytes = u64::from_le_bytes(take(&mut input)?);
        let id: [u8; 16] = take(&mut input)?;
        let [signature @ .., _, _, _, _, _, _, _, _, _, _, _, _] = id;
        let table = match table {
            0 if id == [0; 16] => Table::None,
            1 if id[4..] == [0; 12] => Table::Mbr(signature),
            2 => Table::Gpt(id),
            _ => return None,
        };
        let count = usize::from(u16::from_le_bytes(take(&mut input)?));
        if count > PARTITIONS_MAX {
            return None;
        }
        let partitions = (0..count).map(|_| Partition::decode(&mut input)).collect::<Option<Vec<_>>>()?;
        let layout = Self { sector_bytes, size_bytes, table, has_boot_code: has_boot_code == 1, partitions };
        input.is_empty().then_some(layout)
    }
}

/// As commands tell it (`docs/json.md`).
impl Serialize for Layout {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (table, id) = match self.table {
            Table::None => (None, None),
            Table::Mbr(signature) => (Some("mbr"), Some(crate::hex::encode(&signature))),
            Table::Gpt(id) => (Some("gpt"), Some(guid_text(&id))),
        };
        let document = json!({
            "sector_bytes": self.sector_bytes,
            "size_bytes": self.size_bytes,
            "table": table,
            "id": id,
            "boot_code": self.has_boot_code,
            "partitions": self.partitions.iter().map(Partition::to_json).collect::<Vec<Value>>(),
        });
        document.serialize(serializer)
    }
}

impl Partition {
    fn to_json(&self) -> Value {
        json!({
            "number": self.number,
            "start_bytes": self.start_bytes,
            "size_bytes": self.size_bytes,
            "type": self.kind_name(),
            "id": Some(guid_text(&self.id)).filter(|_| self.id != [0; 16]),
            "active": self.is_active,
            "content": Some(self.content.name()).filter(|_| self.content != Content::Unknown),
            "name": self.name,
        })
    }

    fn decode(input: &mut &[u8]) -> Option<Self> {
        let number = u32::from_le_bytes(take(input)?);
        let (start_bytes, size_bytes) = (u64::from_le_bytes(take(input)?), u64::from_le_bytes(take(input)?));
        start_bytes.checked_add(size_bytes)?;
        let (kind, id) = (take(input)?, take(input)?);
        let [is_active, content, name_len] = take(input)?;
        let content = *Content::ALL.get(usize::from(content))?;
        let (name, rest) = input.split_at_checked(usize::from(name_len))?;
        *input = rest;
        if is_active > 1 || name.len() > PARTITION_NAME_BYTES_MAX {
            return None;
        }
        let name = std::str::from_utf8(name).ok()?.to_owned();
        Some(Self { number, start_bytes, size_bytes, kind, id, is_active: is_active == 1, content, name })
    }

    /// The first byte behind it.
    #[must_use]
    pub const fn end_bytes(&self) -> u64 {
        self.start_bytes.saturating_add(self.size_bytes)
    }

    /// Its type, for people: a name where it is a common one.
    #[must_use]
    pub fn kind_name(&self) -> String {
        const GUIDS: &[(&str, &str)] = &[
            ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "EFI system"),
            ("21686148-6449-6e6f-744e-656564454649", "BIOS boot"),
            ("0fc63daf-8483-4772-8e79-3d69d8477de4", "Linux file system"),
            ("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", "Linux swap"),
            ("e6d6d379-f507-44c2-a23c-238f2a3df928", "Linux LVM"),
            ("a19d880f-05fc-4d3b-a006-743f0f84911e", "Linux RAID"),
            ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "Linux root (x86-64)"),
            ("bc13c2ff-59e6-4262-a352-b275fd6f7172", "Linux extended boot"),
            ("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", "Windows data"),
            ("e3c9e316-0b5c-4db8-817d-f92df00215ae", "Windows reserved"),
        ];
        const BYTES: &[(u8, &str)] = &[
            (0x07, "Windows data"),
            (0x0b, "FAT"),
            (0x0c, "FAT"),
            (0x82, "Linux swap"),
            (0x83, "Linux file system"),
            (0x8e, "Linux LVM"),
            (0xef, "EFI system"),
            (0xfd, "Linux RAID"),
        ];
        if self.kind[1..] == [0; 15] {
            let known = BYTES.iter().find(|(byte, _)| *byte == self.kind[0]);
            return known.map_or_else(|| format!("type {:#04x}", self.kind[0]), |(_, name)| (*name).to_owned());
        }
        let guid = guid_text(&self.kind);
        let known = GUIDS.iter().find(|(known, _)| *known == guid);
        known.map_or_else(|| format!("type {guid}"), |(_, name)| (*name).to_owned())
    }
}

/// A GUID as people write it: its first three fields are little-endian.
#[must_use]
pub fn guid_text(guid: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| crate::hex::encode(bytes);
    let turned = |from: usize, to: usize| hex(&guid[from..to].iter().rev().copied().collect::<Vec<u8>>());
    format!("{}-{}-{}-{}-{}", turned(0, 4), turned(4, 6), turned(6, 8), hex(&guid[8..10]), hex(&guid[10..]))
}

/// As much of a name as a record has room for.
fn shortened(name: &str) -> &str {
    let end = (0..=PARTITION_NAME_BYTES_MAX.min(name.len())).rev().find(|end| name.is_char_boundary(*end));
    &name[..end.unwrap_or(0)]
}

fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, rest) = input.split_first_chunk::<N>()?;
    *input = rest;
    Some(*bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        let partition = |number: u32, kind: [u8; 16], content, name: &str| Partition {
            number,
            start_bytes: u64::from(number) << 20,
            size_bytes: 1 << 20,
            kind,
            id: [number as u8; 16],
            is_active: number == 2,
            content,
            name: name.to_owned(),
        };
        let efi = [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
        Layout {
            sector_bytes: 512,
            size_bytes: 8 << 20,
            table: Table::Gpt([7; 16]),
            has_boot_code: true,
            partitions: vec![partition(1, efi, Content::Fat, "EFI"), partition(2, [9; 16], Content::Ext, "Wurzel ä")],
        }
    }

    #[test]
    fn a_layout_is_these_bytes_and_no_other_length_is_taken() {
        let bytes = layout().encode();
        assert_eq!(
            bytes.len(),
            HEAD_BYTES + 2 * PARTITION_BYTES + "EFIWurzel ä".len(),
            "as docs/format/layout.md says"
        );
        assert_eq!(bytes[..15], [1, 2, 1, 0, 2, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0]);
        assert_eq!(Layout::decode(&bytes), Some(layout()));
        for len in 0..bytes.len() {
            assert_eq!(Layout::decode(&bytes[..len]), None, "cut to {len}");
        }
        assert_eq!(Layout::decode(&[bytes, vec![0]].concat()), None);
    }

    #[test]
    fn what_no_program_of_ours_writes_is_refused() {
        let bytes = layout().encode();
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            Layout::decode(&bytes)
        };
        let partition = HEAD_BYTES;
        for (at, byte, what) in [
            (0, 2, "version"),
            (1, 3, "table"),
            (2, 2, "boot code"),
            (3, 1, "sector"),
            (32, 1, "count"),
            (partition + 52, 2, "active"),
            (partition + 53, 10, "content"),
        ] {
            assert_eq!(with(at, byte), None, "{what}");
        }
        assert_eq!(with(1, 1), None, "an MBR has a signature of four bytes");
    }

    #[test]
    fn too_much_is_left_out_and_what_is_left_is_read_back() {
        let mut full = layout();
        full.partitions[1].name = "ä".repeat(100);
        full.partitions = vec![full.partitions[1].clone(); 300];
        let bytes = full.encode();
        assert!(bytes.len() <= LAYOUT_BYTES_MAX);
        let read = Layout::decode(&bytes).expect("a layout");
        assert_eq!((read.partitions.len(), read.partitions[0].name.len()), (PARTITIONS_MAX, 108));
    }

    #[test]
    fn a_document_has_the_names_that_scripts_rely_on() {
        let document = serde_json::to_value(layout()).expect("a document");
        assert_eq!((&document["table"], &document["sector_bytes"]), (&json!("gpt"), &json!(512)));
        let first = &document["partitions"][0];
        assert_eq!(
            (&first["type"], &first["content"], &first["name"]),
            (&json!("EFI system"), &json!("vfat"), &json!("EFI"))
        );
        assert_eq!(first["id"], "01010101-0101-0101-0101-010101010101");
    }

    #[test]
    fn types_are_named_where_they_are_common() {
        let [efi, other] = [0, 1].map(|at| layout().partitions[at].kind_name());
        assert_eq!(efi, "EFI system");
        assert_eq!(other, "type 09090909-0909-0909-0909-090909090909");
        let byte = |byte: u8| {
            let mut kind = [0; 16];
            kind[0] = byte;
            Partition { kind, ..layout().partitions[0].clone() }.kind_name()
        };
        assert_eq!([byte(0x83), byte(0x42)], ["Linux file system", "type 0x42"]);
    }
}

//! What a device-mapper device is made of: its table, by a hash.
//!
//! A table can be replaced under a device that keeps its number, its size and its sequence number (`lvconvert --merge`, a reload
//! onto other extents): marks made under one table are worth nothing under another. Asked for as `dmsetup table` does, by
//! `DM_TABLE_STATUS` (include/uapi/linux/dm-ioctl.h). Keeps the hash alone: the table of a crypt target may show its key.
//! The kernel this was written on has no device-mapper: what is tested is the reading of answers made up by the header's rules.

#![allow(unsafe_code, reason = "an ioctl has no safe wrapper")]

use super::device::DeviceNumber;
use super::kernel_file::strange;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// `struct dm_ioctl`: its size, and where the fields stand that are used here.
const HEADER_BYTES: usize = 312;
const VERSION: [u32; 3] = [4, 0, 0];
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEVICE: usize = 40;
const FLAG_STATUS_TABLE: u32 = 1 << 4;
const FLAG_BUFFER_FULL: u32 = 1 << 8;
/// `struct dm_target_spec`: first sector (8), sectors (8), status (4), where the next one stands (4), name (16).
const SPEC_BYTES: usize = 40;
const SPEC_NEXT: usize = 20;
const SPEC_NAME: usize = 24;
/// `_IOWR(0xfd, 12, struct dm_ioctl)`.
const DM_TABLE_STATUS: u64 = 0xc000_fd0c | (HEADER_BYTES as u64) << 16;
/// Tables are asked for with more and more room, up to this.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// The table of a device, to be asked for again and again.
pub(super) struct DmTable {
    control: OwnedFd,
    device: DeviceNumber,
}

impl DmTable {
    /// That of `disk`, if it is a device-mapper device.
    pub(super) fn open(disk: DeviceNumber) -> io::Result<Option<Self>> {
        if rustix::fs::stat(disk.sysfs().join("dm")).is_err() {
            return Ok(None);
        }
        let control =
            rustix::fs::open(Path::new("/dev/mapper/control"), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Some(Self { control, device: disk }))
    }

    /// BLAKE3 of the table, in hexadecimal.
    pub(super) fn hash(&self) -> io::Result<String> {
        let mut room = 16 << 10;
        while room <= ANSWER_BYTES_MAX {
            let mut answer = request(self.device, room);
            // SAFETY: the buffer is as long as its own `data_size` says, and the kernel writes within it.
            let result =
                unsafe { libc::ioctl(self.control.as_raw_fd(), DM_TABLE_STATUS as libc::Ioctl, answer.as_mut_ptr()) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
            if let Some(hash) = read_answer(&answer)? {
                return Ok(hash);
            }
            room *= 4;
        }
        Err(io::ErrorKind::FileTooLarge.into())
    }
}

fn request(device: DeviceNumber, room: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES + room];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    VERSION.iter().enumerate().for_each(|(index, part)| put(index * 4, &part.to_ne_bytes()));
    put(DATA_SIZE, &((HEADER_BYTES + room) as u32).to_ne_bytes());
    put(DATA_START, &(HEADER_BYTES as u32).to_ne_bytes());
    put(FLAGS, &FLAG_STATUS_TABLE.to_ne_bytes());
    // As user space knows device numbers (`huge_encode_dev`).
    put(DEVICE, &rustix::fs::makedev(device.major, device.minor).to_ne_bytes());
    bytes
}

/// The table's hash; `None` where there was too little room.
fn read_answer(answer: &[u8]) -> io::Result<Option<String>> {
    if field(answer, FLAGS)? & FLAG_BUFFER_FULL != 0 {
        return Ok(None);
    }
    let targets = answer.get(field(answer, DATA_START)? as usize..).ok_or_else(strange)?;
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    for _ in 0..field(answer, TARGET_COUNT)? {
        let spec = targets.get(at..at + SPEC_BYTES).ok_or_else(strange)?;
        let next = field(spec, SPEC_NEXT)? as usize;
        let parameters = targets.get(at + SPEC_BYTES..next).and_then(|bytes| bytes.split(|byte| *byte == 0).next());
        let parameters = parameters.ok_or_else(strange)?;
        // Place, kind and parameters, each of a known length: no two tables have the same bytes. A multipath target's parameters
        // change whenever a path comes or goes, and lead to the same content.
        hasher.update(&spec[..16]).update(&spec[SPEC_NAME..]);
        let parameters = if spec[SPEC_NAME..].starts_with(b"multipath\0") { &[] } else { parameters };
        hasher.update(&(parameters.len() as u64).to_le_bytes()).update(parameters);
        at = next;
    }
    Ok(Some(hasher.finalize().to_hex().to_string()))
}

fn field(bytes: &[u8], at: usize) -> io::Result<u32> {
    let field = bytes.get(at..).and_then(|bytes| bytes.first_chunk()).ok_or_else(strange)?;
    Ok(u32::from_ne_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceNumber = DeviceNumber { major: 253, minor: 1 };

    /// An answer as `retrieve_status` of drivers/md/dm-ioctl.c makes it: each spec at a multiple of 8, and what follows it in `next`.
    fn answer(targets: &[(u64, u64, &str, &str)]) -> Vec<u8> {
        let mut bytes = request(DEVICE, 0);
        bytes[TARGET_COUNT..TARGET_COUNT + 4].copy_from_slice(&(targets.len() as u32).to_ne_bytes());
        for (start, length, name, parameters) in targets {
            let next = (bytes.len() - HEADER_BYTES + SPEC_BYTES + parameters.len() + 1).next_multiple_of(8);
            let mut spec = [start.to_ne_bytes(), length.to_ne_bytes()].concat();
            spec.extend_from_slice(&[0; 4]);
            spec.extend_from_slice(&(next as u32).to_ne_bytes());
            spec.extend_from_slice(name.as_bytes());
            spec.resize(SPEC_BYTES, 0);
            bytes.extend_from_slice(&spec);
            bytes.extend_from_slice(parameters.as_bytes());
            bytes.resize(HEADER_BYTES + next, 0);
        }
        bytes
    }

    #[test]
    fn another_table_has_another_hash() {
        let two = [(0, 8192, "linear", "8:16 2048"), (8192, 1024, "linear", "8:32 2048")];
        let hash = |targets: &[_]| read_answer(&answer(targets)).expect("read").expect("whole");
        assert_eq!(hash(&two), hash(&two));
        let others = [
            [(0, 8192, "linear", "8:16 4096"), two[1]],
            [(0, 4096, "linear", "8:16 2048"), two[1]],
            [(0, 8192, "snapshot-merge", "8:16 2048"), two[1]],
            [two[1], two[0]],
        ];
        assert!(others.iter().all(|other| hash(other) != hash(&two)));
        assert_ne!(hash(&two[..1]), hash(&two));
    }

    #[test]
    fn the_paths_of_a_multipath_target_may_come_and_go() {
        let hash = |parameters| read_answer(&answer(&[(0, 8192, "multipath", parameters)])).expect("read");
        assert_eq!(
            hash("1 queue_if_no_path 0 1 1 service-time 0 2 2 8:16 1 1 8:32 1 1"),
            hash("0 0 1 1 service-time 0 1 2 8:16 1 1")
        );
    }

    #[test]
    fn too_little_room_is_said_and_answers_cut_short_are_refused() {
        let whole = answer(&[(0, 8192, "linear", "8:16 2048")]);
        let mut full = whole.clone();
        full[FLAGS..FLAGS + 4].copy_from_slice(&FLAG_BUFFER_FULL.to_ne_bytes());
        assert_eq!(read_answer(&full).expect("read"), None);
        for len in 0..whole.len() {
            assert!(read_answer(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn what_is_no_device_mapper_device_has_no_table() {
        assert!(DmTable::open(DeviceNumber { major: 1, minor: 3 }).expect("asked").is_none());
    }
}

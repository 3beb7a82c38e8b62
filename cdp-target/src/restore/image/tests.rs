//! Images of a made-up point: compared byte by byte, to files, streams and, where there are the rights, a loop device.

use super::{Begun, BlockSource, Export, ExportError, Exported, Piece, SourceError};
use crate::restore::output::{self, Allowed, Needs, Output, OutputError};
use crate::restore::progress::Line;
use crate::restore::proof::Stored;
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, VolumeSlot, blocks_in};
use cdp_seams::storage::{Storage, SystemStorage};
use proptest::prelude::{ProptestConfig, Strategy as _, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Is {
    Bytes(u8),
    Zero,
    Unreadable,
    Damaged,
}

/// One entry a block.
struct Made(Vec<Is>);

impl BlockSource for Made {
    fn read(
        &self,
        _slot: VolumeSlot,
        extent: Extent,
        out: &mut dyn FnMut(Extent, Piece<'_>),
    ) -> Result<(), SourceError> {
        for block in extent.blocks() {
            let one = Extent::new(block, 1).expect("one");
            match self.0[block.0 as usize] {
                Is::Bytes(byte) => out(one, Piece::Bytes(&[byte; BLOCK_BYTES])),
                Is::Zero => out(one, Piece::Zero),
                Is::Unreadable => out(one, Piece::Unreadable),
                Is::Damaged => return Err("frame damaged".into()),
            }
        }
        Ok(())
    }

    fn content(&self, _slot: VolumeSlot, extent: Extent, out: &mut dyn FnMut(Extent)) -> Result<(), SourceError> {
        let is_hole = |block: &Block| self.0[block.0 as usize] == Is::Zero;
        extent.blocks().filter(|block| !is_hole(block)).for_each(|block| out(Extent::new(block, 1).expect("one")));
        Ok(())
    }
}

impl Made {
    fn bytes(&self, size_bytes: u64) -> Vec<u8> {
        let byte = |is: &Is| if let Is::Bytes(byte) = is { *byte } else { 0 };
        let mut bytes: Vec<u8> = self.0.iter().flat_map(|is| [byte(is); BLOCK_BYTES]).collect();
        bytes.truncate(size_bytes as usize);
        bytes
    }

    fn export(&self, size_bytes: u64, output: &mut dyn Output, allow_damaged: bool) -> Result<Exported, ExportError> {
        assert_eq!(blocks_in(size_bytes), self.0.len() as u64);
        let stop = AtomicBool::new(false);
        Export {
            sources: &[self, self],
            slot: VolumeSlot(0),
            size_bytes,
            allow_damaged,
            stop: &stop,
            progress: &|_| (),
        }
        .run(output)
    }
}

fn storage() -> Arc<dyn Storage> {
    Arc::new(SystemStorage)
}

const NEW: Allowed = Allowed { force: false, going_on: false };
const FORCE: Allowed = Allowed { force: true, going_on: false };

const fn needs(size_bytes: u64) -> Needs {
    Needs { size_bytes, content_bytes_max: size_bytes }
}

#[expect(clippy::disallowed_methods, reason = "looks at what the export left")]
fn content(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("read")
}

#[expect(clippy::disallowed_methods, reason = "prepares what is in the export's way")]
fn put(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("written");
}

fn names(folder: &Path) -> usize {
    SystemStorage.list(folder).expect("listed").len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn an_image_is_the_volume_byte_by_byte(
        runs in prop::collection::vec((1_usize..200, prop_oneof![
            3 => any::<u8>().prop_map(Is::Bytes), 3 => prop::strategy::Just(Is::Zero),
            1 => prop::strategy::Just(Is::Unreadable), 1 => prop::strategy::Just(Is::Damaged)]), 1..8),
        short in 0_u64..BLOCK_BYTES as u64,
    ) {
        let made = Made(runs.into_iter().flat_map(|(count, is)| std::iter::repeat_n(is, count)).collect());
        let size_bytes = (made.0.len() * BLOCK_BYTES) as u64 - short;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image.raw");
        let mut output = output::open(&storage(), &path, needs(size_bytes), NEW).expect("new");
        let exported = made.export(size_bytes, output.as_mut(), true).expect("damage allowed");
        output.publish().expect("published");
        let expected = made.bytes(size_bytes);
        prop_assert!(content(&path) == expected, "the file differs");
        prop_assert_eq!(exported.hash, blake3::hash(&expected));
        let mut bad = vec![false; made.0.len()];
        for range in &exported.bad {
            for block in range.offset / BLOCK_BYTES as u64..blocks_in(range.offset + range.len) {
                bad[block as usize] = true;
            }
        }
        let expected_bad: Vec<bool> = made.0.iter().map(|is| matches!(is, Is::Unreadable | Is::Damaged)).collect();
        prop_assert_eq!(bad, expected_bad);
        prop_assert_eq!(names(folder.path()), 1);
    }
}

#[test]
fn damage_is_refused_unless_allowed_and_leaves_nothing() {
    for bad in [Is::Unreadable, Is::Damaged] {
        let made = Made([vec![Is::Bytes(1); 300], vec![bad; 2], vec![Is::Zero; 9]].concat());
        let size_bytes = 311 * BLOCK_BYTES as u64;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image.raw");
        let mut output = output::open(&storage(), &path, needs(size_bytes), NEW).expect("new");
        let error = made.export(size_bytes, output.as_mut(), false).expect_err("damaged");
        assert!(matches!(error, ExportError::Damaged { offset, .. } if offset == 300 * BLOCK_BYTES as u64), "{error}");
        drop(output);
        assert_eq!(names(folder.path()), 0, "no part of the image stays");
    }
}

#[test]
fn holes_take_no_space_and_an_end_comes_at_once() {
    let mut blocks = vec![Is::Zero; 4096];
    blocks[5] = Is::Bytes(7);
    let made = Made(blocks);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image.raw");
    let size_bytes = 16 << 20;
    let mut output = output::open(&storage(), &path, needs(size_bytes), NEW).expect("new");
    let exported = made.export(size_bytes, output.as_mut(), false).expect("whole");
    output.publish().expect("published");
    assert_eq!(exported.content_bytes, BLOCK_BYTES as u64);
    let allocated = rustix::fs::stat(&path).expect("there").st_blocks * 512;
    assert!(allocated <= 64 * 1024, "{allocated} bytes allocated");

    let mut output = output::open(&storage(), &path, needs(size_bytes), FORCE).expect("forced");
    let stop = AtomicBool::new(true);
    let export = Export {
        sources: &[&made],
        slot: VolumeSlot(0),
        size_bytes,
        allow_damaged: false,
        stop: &stop,
        progress: &|_| (),
    };
    assert!(matches!(export.run(output.as_mut()), Err(ExportError::Interrupted)));
    drop(output);
    assert_eq!(names(folder.path()), 1);
    assert_eq!(blake3::hash(&content(&path)), exported.hash, "the old image stays");
}

/// Ends an export once so many bytes are done, and gives what was noted of them.
fn broken_off(made: &Made, output: &mut dyn Output, begun: Begun, bytes: u64) -> Vec<Line> {
    let size_bytes = made.0.len() as u64 * BLOCK_BYTES as u64 - 512;
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut lines = Vec::new();
    let export = Export {
        sources: &[made, made, made],
        slot: VolumeSlot(0),
        size_bytes,
        allow_damaged: true,
        stop: &stop,
        progress: &|len| {
            let done = done.fetch_add(len, Ordering::Relaxed) + len;
            stop.store(done >= bytes, Ordering::Relaxed);
        },
    };
    let ended = export.go_on(output, begun, &mut |line| lines.push(line));
    assert!(matches!(ended, Err(ExportError::Interrupted)) || bytes > size_bytes, "{ended:?}");
    lines
}

#[test]
fn what_was_broken_off_anywhere_is_gone_on_with_as_far_as_it_is_proved() {
    let is = |block: usize| match block / 100 % 3 {
        0 => Is::Bytes((block / 7) as u8),
        1 => Is::Zero,
        _ => Is::Bytes(5),
    };
    let made = Made((0..5200).map(is).collect());
    let size_bytes = made.0.len() as u64 * BLOCK_BYTES as u64 - 512;
    let expected = made.bytes(size_bytes);
    let folder = tempfile::tempdir().expect("a folder");
    for (number, (mib, spoilt, proved)) in
        [(0, None, 0), (7, None, 0), (8, None, 8), (17, None, 16), (17, Some(9), 8), (17, Some(3), 0), (20, None, 16)]
            .into_iter()
            .enumerate()
    {
        let path = folder.path().join(format!("{number}.raw"));
        let mut output = output::open(&storage(), &path, needs(size_bytes), NEW).expect("new");
        let lines = broken_off(&made, output.as_mut(), Begun::default(), mib << 20);
        if let Some(at) = spoilt {
            output.write(at << 20, &[0xee]).expect("written");
        }
        output.keep();
        drop(output);
        let going_on = Allowed { force: false, going_on: true };
        let mut output = output::open(&storage(), &path, needs(size_bytes), going_on).expect("it is there");
        let stop = AtomicBool::new(false);
        let read_at = |offset: u64, buffer: &mut [u8]| output.read_at(offset, buffer);
        let begun = Stored { read_at: &read_at, size_bytes, threads: 2, stop: &stop }.prove(&lines, &|_| ());
        assert_eq!(begun.bytes(), proved << 20, "broken off after {mib} MiB, spoilt at {spoilt:?}");
        let export = Export {
            sources: &[&made, &made],
            slot: VolumeSlot(0),
            size_bytes,
            allow_damaged: false,
            stop: &stop,
            progress: &|_| (),
        };
        let mut more = Vec::new();
        let exported = export.go_on(output.as_mut(), begun, &mut |line| more.push(line)).expect("whole");
        output.publish().expect("published");
        assert!(content(&path) == expected, "broken off after {mib} MiB: the file differs");
        assert_eq!(exported.hash, blake3::hash(&expected));
        let held = made.0.iter().filter(|is| **is != Is::Zero).count() as u64 * BLOCK_BYTES as u64;
        assert_eq!(exported.content_bytes, held - if made.0[5199] == Is::Zero { 0 } else { 512 });
        assert_eq!(more.len() as u64, 3 - proved / 8, "a line for each stride");
    }
}

#[test]
fn what_is_bad_has_no_line_and_is_told_again() {
    let mut blocks = vec![Is::Bytes(1); 5200];
    blocks[2500] = Is::Damaged;
    let made = Made(blocks);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image.raw");
    let size_bytes = 5200 * BLOCK_BYTES as u64 - 512;
    let mut output = output::open(&storage(), &path, needs(size_bytes), NEW).expect("new");
    let lines = broken_off(&made, output.as_mut(), Begun::default(), u64::MAX);
    assert_eq!(lines.len(), 1, "up to the stride with the bad block");
}

#[test]
fn what_exists_is_not_overwritten() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image.raw");
    let made = Made(vec![Is::Bytes(9)]);
    let mut output = output::open(&storage(), &path, needs(4096), NEW).expect("new");
    made.export(4096, output.as_mut(), false).expect("whole");
    put(&path, b"came meanwhile");
    assert!(output.publish().is_err(), "the name was taken meanwhile");
    assert_eq!(content(&path), b"came meanwhile");

    assert!(matches!(output::open(&storage(), &path, needs(4096), NEW), Err(OutputError::Exists(_))));
    assert!(matches!(output::open(&storage(), folder.path(), needs(4096), FORCE), Err(OutputError::IsFolder(_))));
    let huge = output::open(&storage(), &folder.path().join("x"), needs(1 << 60), NEW);
    assert!(matches!(huge, Err(OutputError::TooSmall { .. })));

    let mut output = output::open(&storage(), &path, needs(4096), FORCE).expect("forced");
    made.export(4096, output.as_mut(), false).expect("whole");
    output.publish().expect("replaced");
    assert_eq!(content(&path), [9; 4096]);
    assert_eq!(names(folder.path()), 1);
}

/// A loop device over a file, detached at the end.
struct Loop(String);

impl Loop {
    fn attach(file: &Path) -> Option<Self> {
        let output = std::process::Command::new("losetup").args(["-f", "--show"]).arg(file).output().ok()?;
        output.status.success().then(|| Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn on_a_device_holes_replace_what_was_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("disk");
    put(&file, &vec![0xee; 2 << 20]);
    let Some(device) = Loop::attach(&file) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let path = Path::new(&device.0);
    let mut blocks = vec![Is::Zero; 300];
    blocks[0] = Is::Bytes(1);
    blocks[299] = Is::Bytes(2);
    let made = Made(blocks);
    let size_bytes = 300 * BLOCK_BYTES as u64 - 512;
    assert!(matches!(output::open(&storage(), path, needs(size_bytes), NEW), Err(OutputError::NotBlank(_))));
    assert!(matches!(output::open(&storage(), path, needs(4 << 20), FORCE), Err(OutputError::TooSmall { .. })));
    let mut output = output::open(&storage(), path, needs(size_bytes), FORCE).expect("forced");
    let in_use = output::open(&storage(), path, needs(size_bytes), FORCE);
    assert!(matches!(in_use, Err(OutputError::InUse { mounted_at: None, .. })));
    made.export(size_bytes, output.as_mut(), false).expect("whole");
    output.publish().expect("published");
    let disk = content(path);
    assert!(disk[..size_bytes as usize] == made.bytes(size_bytes), "the device differs");
    assert!(disk[size_bytes as usize..].iter().all(|byte| *byte == 0xee), "beyond the image nothing changes");
}

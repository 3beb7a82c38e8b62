//! One suite for all readers, on real files and over hostile sources of bytes.

use super::pread::{PositionedRead, PreadReader};
use super::target::{ReadTarget, Window};
use super::uring::UringReader;
use super::{BlockReader, OpenError, READ_BLOCKS_MAX, ReadRequest, read_blocks, requests_of};
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, blocks_in};
use cdp_seams::random::SimRandom;
use rustix::io::Errno;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

/// Bytes that differ everywhere.
fn image(size_bytes: usize) -> Vec<u8> {
    let random = SimRandom::new(size_bytes as u64);
    let mut bytes = vec![0; size_bytes];
    cdp_seams::random::Random::fill(&random, &mut bytes);
    bytes
}

/// A file with `image`, on the file system of the build, which is more likely to have `O_DIRECT` than the one of `/tmp`.
fn file(image: &[u8]) -> tempfile::NamedTempFile {
    let folder = std::env::current_exe().expect("a test has a path");
    let mut file = tempfile::NamedTempFile::new_in(folder.parent().expect("in a folder")).expect("a file");
    file.write_all(image).expect("written");
    file.as_file().sync_all().expect("synced");
    file
}

fn targets(file: &tempfile::NamedTempFile, image: &[u8]) -> [ReadTarget; 2] {
    let node = file.path().to_owned();
    let whole = ReadTarget { node: node.clone(), offset_bytes: 0, size_bytes: image.len() as u64 };
    [whole, ReadTarget { node, offset_bytes: 3 * 4096, size_bytes: 17 * 4096 + 512 }]
}

fn block_of(volume: &[u8], block: Block) -> Vec<u8> {
    let rest = &volume[block.to_bytes() as usize..];
    let mut bytes = rest[..rest.len().min(BLOCK_BYTES)].to_vec();
    bytes.resize(BLOCK_BYTES, 0);
    bytes
}

/// What every reader has to do. `volumes` is what they hold.
fn conforms(reader: &mut dyn BlockReader, volumes: &[&[u8]]) {
    reader.read(&[], &mut |_, _| panic!("nothing was asked")).expect("nothing to do");
    every_request_is_answered_once_and_rightly(reader, volumes);
    a_request_beyond_the_end_fails_alone(reader, volumes);
    a_panic_of_the_caller_leaves_it_usable(reader, volumes);
    every_request_is_answered_once_and_rightly(reader, volumes);
    for (volume, bytes) in volumes.iter().enumerate() {
        let blocks = (0..blocks_in(bytes.len() as u64) as u32).filter(|block| block % 5 != 3).collect();
        let mut seen = roaring::RoaringBitmap::new();
        read_blocks(reader, &requests_of(volume, &blocks), &mut |index, block, result| {
            assert_eq!(index, volume);
            assert!(seen.insert(block.0), "{block} twice");
            assert_eq!(result.expect("read"), block_of(bytes, block));
        })
        .expect("read");
        assert_eq!(seen, blocks);
    }
}

fn every_request_is_answered_once_and_rightly(reader: &mut dyn BlockReader, volumes: &[&[u8]]) {
    let random = SimRandom::new(5);
    let requests: Vec<ReadRequest> = (0..150)
        .map(|_| {
            let volume = random.below(volumes.len() as u64) as usize;
            let blocks = blocks_in(volumes[volume].len() as u64);
            let start = random.below(blocks);
            let count = 1 + random.below((blocks - start).min(u64::from(READ_BLOCKS_MAX)));
            ReadRequest { volume, extent: Extent { start: Block(start as u32), count: count as u32 } }
        })
        .collect();
    let mut answers = vec![0; requests.len()];
    reader
        .read(&requests, &mut |index, result| {
            answers[index] += 1;
            let ReadRequest { volume, extent } = requests[index];
            let expected: Vec<u8> = extent.blocks().flat_map(|block| block_of(volumes[volume], block)).collect();
            assert!(result.expect("read") == expected, "{:?} is not what the volume holds", requests[index]);
        })
        .expect("read");
    assert!(answers.iter().all(|answers| *answers == 1), "{answers:?}");
}

fn a_request_beyond_the_end_fails_alone(reader: &mut dyn BlockReader, volumes: &[&[u8]]) {
    let last = blocks_in(volumes[0].len() as u64) as u32 - 1;
    let one = |start, count| ReadRequest { volume: 0, extent: Extent { start: Block(start), count } };
    let requests = [one(0, 1), one(last, 2), one(0, READ_BLOCKS_MAX + 1), one(last, 1)];
    let mut answers = [None; 4];
    reader.read(&requests, &mut |index, result| answers[index] = Some(result.is_ok())).expect("read");
    assert_eq!(answers, [Some(true), Some(false), Some(false), Some(true)]);
}

fn a_panic_of_the_caller_leaves_it_usable(reader: &mut dyn BlockReader, volumes: &[&[u8]]) {
    let blocks = (0..blocks_in(volumes[0].len() as u64) as u32).collect();
    let requests = requests_of(0, &blocks);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        reader.read(&requests, &mut |index, _| assert!(index == usize::MAX, "on purpose"))
    }));
    assert!(outcome.is_err());
}

#[test]
fn the_uring_reader_conforms() {
    let image = image(300 * 4096 + 1536);
    let file = file(&image);
    let targets = targets(&file, &image);
    match UringReader::open(&targets) {
        Ok(mut reader) => conforms(&mut reader, &[&image, &image[3 * 4096..][..17 * 4096 + 512]]),
        Err(reason @ (OpenError::Direct(_) | OpenError::Uring(_))) => eprintln!("skipped: {reason}"),
        Err(error) => panic!("{error}"),
    }
}

/// A loop device over a file, for as long as it lives.
struct LoopDevice {
    node: std::path::PathBuf,
}

impl LoopDevice {
    /// `None` where there are no loop devices for us.
    fn over(file: &tempfile::NamedTempFile) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().ok()?;
        let node = String::from_utf8(output.stdout).ok()?.trim().into();
        output.status.success().then_some(Self { node })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.node).status();
    }
}

#[test]
fn both_readers_conform_on_a_device_whose_partition_starts_at_sector_63() {
    let image = image(200 * 4096 + 63 * 512 + 1024);
    let file = file(&image);
    let Some(device) = LoopDevice::over(&file) else { return eprintln!("skipped: no loop device to be had") };
    let targets =
        [(0, image.len()), (63 * 512, 200 * 4096 + 1024), (63 * 512, 90 * 4096 + 512)].map(|(offset, size)| {
            ReadTarget { node: device.node.clone(), offset_bytes: offset as u64, size_bytes: size as u64 }
        });
    let windows: Vec<&[u8]> =
        targets.iter().map(|target| &image[target.offset_bytes as usize..][..target.size_bytes as usize]).collect();
    conforms(&mut UringReader::open(&targets).expect("opened"), &windows);
    let mut reader = PreadReader::open(&targets).expect("opened");
    assert!(reader.is_direct(), "a device is always read directly");
    conforms(&mut reader, &windows);
}

#[test]
fn the_pread_reader_conforms() {
    let image = image(300 * 4096 + 1536);
    let file = file(&image);
    let mut reader = PreadReader::open(&targets(&file, &image)).expect("opened");
    conforms(&mut reader, &[&image, &image[3 * 4096..][..17 * 4096 + 512]]);
}

#[test]
fn a_reader_over_one_byte_a_call_with_interruptions_conforms() {
    struct Dribble(Vec<u8>, u32);
    impl PositionedRead for Dribble {
        fn pread(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            self.1 += 1;
            if self.1.is_multiple_of(3) {
                return Err(Errno::INTR.into());
            }
            buffer[0] = self.0[offset as usize];
            Ok(1)
        }
    }
    let image = image(40 * 4096 + 700);
    let window = Window { offset_bytes: 0, size_bytes: image.len() as u64, granule_bytes: 1 };
    conforms(&mut PreadReader::over_source(Box::new(Dribble(image.clone(), 0)), window), &[&image]);
}

#[test]
fn only_the_blocks_at_fault_are_given_as_errors() {
    struct Scratched(Vec<u8>);
    impl PositionedRead for Scratched {
        fn pread(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let scratches = [11 * 4096 + 100, 50 * 4096];
            if scratches.iter().any(|at| (offset..offset + buffer.len() as u64).contains(at)) {
                return Err(Errno::IO.into());
            }
            buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
            Ok(buffer.len())
        }
    }
    let image = image(64 * 4096);
    let window = Window { offset_bytes: 0, size_bytes: image.len() as u64, granule_bytes: 512 };
    let mut reader = PreadReader::over_source(Box::new(Scratched(image.clone())), window);
    let (mut bad, mut good) = (Vec::new(), 0);
    read_blocks(&mut reader, &requests_of(0, &(0..64).collect()), &mut |_, block, result| match result {
        Ok(bytes) => {
            assert_eq!(bytes, block_of(&image, block));
            good += 1;
        }
        Err(error) => {
            assert!(super::is_medium_error(&error));
            bad.push(block.0);
        }
    })
    .expect("read");
    assert_eq!((bad.as_slice(), good), ([11, 50].as_slice(), 62));
}

#[test]
fn what_a_file_has_lost_since_it_was_opened_is_an_error_and_never_zeros() {
    let image = image(64 * 4096);
    let file = file(&image);
    let targets = [ReadTarget { node: file.path().to_owned(), offset_bytes: 0, size_bytes: image.len() as u64 }];
    let mut readers: Vec<Box<dyn BlockReader>> = vec![Box::new(PreadReader::open(&targets).expect("opened"))];
    readers.extend(UringReader::open(&targets).ok().map(|reader| Box::new(reader) as Box<dyn BlockReader>));
    file.as_file().set_len(40 * 4096).expect("cut");
    for reader in &mut readers {
        let mut lost = Vec::new();
        read_blocks(reader.as_mut(), &requests_of(0, &(0..64).collect()), &mut |_, block, result| {
            if result.is_err() {
                lost.push(block.0);
            }
        })
        .expect("read");
        lost.sort_unstable();
        assert_eq!(lost, (40..64).collect::<Vec<u32>>());
    }
}

#[test]
fn a_target_that_cannot_be_is_refused() {
    let file = file(&image(8192));
    let target = |node: &std::path::Path, offset_bytes, size_bytes| {
        [ReadTarget { node: node.to_owned(), offset_bytes, size_bytes }]
    };
    let refusal = |targets: &[ReadTarget]| super::open(targets).err().expect("refused");
    assert!(matches!(refusal(&target(file.path(), 0, 8193)), OpenError::Size { len_bytes: 8192, .. }));
    assert!(matches!(refusal(&target(file.path(), 100, 4096)), OpenError::Offset { .. }));
    assert!(matches!(refusal(&target("/dev/null".as_ref(), 0, 0)), OpenError::Kind(_)));
    assert!(matches!(refusal(&target("/dev/no such".as_ref(), 0, 0)), OpenError::Io { step: "open", .. }));
    assert!(super::open(&target(file.path(), 4096, 4096)).is_ok());
}

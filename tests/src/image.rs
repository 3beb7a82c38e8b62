//! What an exported image has to stand: journal replay, checker, mount, comparison.

use crate::loop_device::{LoopDevice, Mount};
use crate::process::tool;
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

/// Replays the journal of an ext4 image and checks it; mounts it below `folder` and calls `look` with its root.
pub fn check_ext4<T>(image: &Path, folder: &Path, look: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let text = image.to_str().context("a path of text")?;
    let preen = Command::new("e2fsck").args(["-f", "-p", text]).output()?;
    // 0: clean; 1: the journal was replayed and orphans were put in order. Anything else needs a person.
    if !matches!(preen.status.code(), Some(0 | 1)) {
        bail!("e2fsck -p: {}: {}", preen.status, String::from_utf8_lossy(&preen.stdout));
    }
    tool("e2fsck", &["-f", "-n", text])?;
    let device = LoopDevice::attach(image)?;
    let mount = Mount::new(device.node(), &folder.join("mounted"), "rw")?;
    let seen = look(mount.folder())?;
    mount.unmount()?;
    Ok(seen)
}

/// Bytes compared at a time.
const CHUNK: usize = 1 << 20;

/// Fails with the first difference between a device (read past the page cache) and an image.
pub fn assert_same(device: &Path, image: &Path) -> Result<()> {
    tool("sync", &[])?;
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let mut left = File::options().read(true).custom_flags(direct).open(device)?;
    let mut right = File::open(image)?;
    let (left_len, right_len) = (left.seek(SeekFrom::End(0))?, right.seek(SeekFrom::End(0))?);
    ensure!(left_len == right_len, "{} has {left_len} bytes, the image {right_len}", device.display());
    left.rewind()?;
    right.rewind()?;
    let mut room = vec![0_u8; CHUNK + 4096];
    let start = room.as_ptr().align_offset(4096);
    let mut other = vec![0_u8; CHUNK];
    let mut offset = 0;
    while offset < left_len {
        let len = CHUNK.min((left_len - offset) as usize);
        let buffer = &mut room[start..start + len];
        left.read_exact(buffer).with_context(|| format!("read {} at {offset}", device.display()))?;
        right.read_exact(&mut other[..len])?;
        if let Some(at) = buffer.iter().zip(&other).position(|(left, right)| left != right) {
            let at = offset + at as u64;
            bail!("{} and the image differ at byte {at} (block {})", device.display(), at / 4096);
        }
        offset += len as u64;
    }
    Ok(())
}

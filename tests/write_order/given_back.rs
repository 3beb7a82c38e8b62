//! Writes that are given back before they become requests, as `io_uring` has them when a queue is full: not waited for.

#![allow(clippy::disallowed_methods, reason = "tests use real files")]

use crate::board::Board;
use crate::cutter::{BOUND, Cutter, Outcome};
use crate::layout::{Layout, VOLUME_BYTES};
use crate::raw::{RawDisk, WriteRing};
use crate::{alone, in_memory};
use anyhow::{Context, Result, ensure};
use cdp_tests::loop_device::LoopDevice;
use std::path::{Path, PathBuf};

/// Writes in flight; the queue takes far fewer.
const DEPTH: usize = 64;
const QUEUE: usize = 4;
const WRITES: usize = 4096;
const LENGTH: usize = 4096;

/// How many requests a queue takes. It stays as it is put when the device gets another file, so it is put back.
struct Requests {
    path: PathBuf,
    before: String,
}

impl Requests {
    fn set(node: &Path, number: usize) -> Result<Self> {
        let name = node.file_name().context("a node has a name")?;
        let path = Path::new("/sys/block").join(name).join("queue/nr_requests");
        let before = std::fs::read_to_string(&path)?;
        std::fs::write(&path, number.to_string())?;
        Ok(Self { path, before })
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.before);
    }
}

fn write_at_depth(node: &Path) -> Result<()> {
    let mut ring = WriteRing::new(RawDisk::open(node)?, DEPTH, LENGTH)?;
    let mut idle: Vec<usize> = (0..DEPTH).collect();
    let mut started = 0;
    while started < WRITES || ring.is_busy() {
        while let Some(slot) = idle.pop_if(|_| started < WRITES) {
            let offset = (started * LENGTH) as u64 % VOLUME_BYTES;
            ring.start(slot, offset, LENGTH, |buffer| buffer.fill(started as u8))?;
            started += 1;
        }
        idle.extend(ring.wait()?);
    }
    Ok(())
}

#[test]
fn writes_that_were_given_back_are_taken_off_what_was_issued() -> Result<()> {
    if !cdp_tests::privileged("writes_that_were_given_back_are_taken_off_what_was_issued") {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let _requests = Requests::set(device.node(), QUEUE)?;
    let (board, layout) = (Board::default(), Layout::nobody());
    let mut cutter = Cutter::open(device.node(), &layout, crate::as_it_is)?;
    ensure!(cutter.come_to_rest(&board)? == Outcome::Unchanged, "nobody writes yet");
    let before = cutter.disk();
    write_at_depth(device.node())?;
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "what was written is captured");
    let now = cutter.disk();
    let written = (WRITES * LENGTH / 512) as u64;
    ensure!(now.completed - before.completed == written, "{before:?}, then {now:?}");
    ensure!(now.issued - before.issued == written, "given back and not taken off: {before:?}, then {now:?}");
    ensure!(cutter.come_to_rest(&board)? == Outcome::Unchanged, "nobody writes any more");
    cutter.equals(device.node())
}

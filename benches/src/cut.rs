//! How long a cut takes, against the number of dirty blocks, on a volume that is otherwise at rest.

use crate::median;
use crate::tracker::{attach, detach};
use anyhow::{Context, Result, bail};
use cdp_protocol::units::BLOCK_BYTES;
use cdp_seams::clock::SystemClock;
use cdp_source::cut::{Cut, CutLimits, cut};
use cdp_source::reader;
use cdp_source::tracker::Tracker;
use cdp_tests::loop_device::LoopDevice;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const VOLUME_BYTES: u64 = 1 << 30;
const ROUNDS: usize = 5;

pub(crate) fn run(folder: &Path) -> Result<()> {
    let device = LoopDevice::new(&folder.join("cut.img"), VOLUME_BYTES)?;
    let mut tracker = attach(device.node(), folder)?;
    let target = tracker.devices()[0].read_target();
    let mut reader = reader::open(&[target]).context("open the volume")?;
    let clock = SystemClock::new();
    let limits = CutLimits { bound: Duration::from_secs(15), blocks_max: 1 << 20 };
    // The first flip of a new tracking gives every block; they are not what is measured.
    tracker.take_recovered();
    println!("\n| dirty blocks | cut, median of {ROUNDS}, ms | blocks a second |\n|---|---|---|");
    for dirty in [1_u64, 100, 1_000, 10_000, 50_000] {
        let mut times = Vec::new();
        for round in 0..ROUNDS as u64 {
            scatter(&device, dirty, round)?;
            let mut carry = vec![<_>::default(); 1];
            match cut(&mut tracker, reader.as_mut(), &clock, &mut carry, &limits)? {
                Cut::Captured(capture) => times.push(capture.meters.cut_us as f64 / 1e3),
                _ => bail!("no capture of {dirty} blocks"),
            }
        }
        println!("| {dirty} | {:.2} | {:.0} |", median(&times), dirty as f64 / median(&times) * 1e3);
    }
    drop(reader);
    detach(tracker, folder)
}

/// Writes `count` blocks at scattered places.
fn scatter(device: &LoopDevice, count: u64, round: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(device.node())?;
    let blocks = VOLUME_BYTES / BLOCK_BYTES as u64;
    let content = cdp_tests::files::content(round + 1, BLOCK_BYTES);
    for number in 0..count {
        // An odd multiplier walks every block once.
        let block = (number * 40_503 + round) % blocks;
        file.write_all_at(&content, block * BLOCK_BYTES as u64)?;
    }
    Ok(file.sync_all()?)
}

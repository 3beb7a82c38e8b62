//! What becomes of changed blocks on the line: bytes sent of bytes changed, by each way to compress them, and what that takes.
//!
//! The blocks are real ones (`workload`): those of a volume that differ from one point to the next. Each way (`way`) packs them
//! into frames as the source does, and all that a point costs beside its content is counted with it: headers, extents,
//! digests, tags, begin and commit. The first half of the points is what a dictionary is trained on, and what
//! has been sent before; the second half is measured.

mod way;
mod workload;

use anyhow::Result;
use std::path::Path;
use way::{Packed, Way};
use workload::Workload;

/// Everything that is tried.
const WAYS: [Way; 16] = [
    Way::Lz4,
    Way::Zstd(1),
    Way::Zstd(3),
    Way::Zstd(6),
    Way::Zstd(9),
    Way::Zstd(12),
    Way::Zstd(19),
    Way::Dictionary(1),
    Way::Dictionary(3),
    Way::Dictionary(9),
    Way::OldContent(1),
    Way::OldContent(3),
    Way::OldContent(9),
    Way::SentContent(1),
    Way::SentContent(3),
    Way::SentContent(9),
];

pub(crate) fn run(folder: &Path) -> Result<()> {
    for workload in
        [workload::pgbench(folder)?, workload::log(folder, true)?, workload::log(folder, false)?, workload::noise()]
    {
        print(&workload)?;
    }
    Ok(())
}

fn print(workload: &Workload) -> Result<()> {
    let (before, measured) = workload.points.split_at(workload.points.len() / 2);
    let blocks: usize = measured.iter().map(Vec::len).sum();
    println!(
        "\n| {}: {} points, {:.0} blocks each | sent : changed | kB a point | CPU ms a MiB, packed | unpacked |",
        workload.name,
        measured.len(),
        blocks as f64 / measured.len() as f64
    );
    println!("|---|---|---|---|---|");
    for way in WAYS {
        let Packed { sent, changed, packing, unpacking } = way.pack(before, measured)?;
        let mib = changed as f64 / f64::from(1 << 20);
        println!(
            "| {way} | {:.4} | {:.2} | {:.2} | {:.2} |",
            sent as f64 / changed as f64,
            sent as f64 / measured.len() as f64 / 1e3,
            packing.as_secs_f64() * 1e3 / mib,
            unpacking.as_secs_f64() * 1e3 / mib
        );
    }
    Ok(())
}

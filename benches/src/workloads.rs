//! What changes on a volume while programs work, what the tracker finds dirty of it, and what goes over the line: end to end.
//!
//! Each load writes to an ext4 of its own (`loads`) in an office of its own (`office`), whose line is thin, so that the agent packs as
//! it would there. What changed is what differs between consecutive points, block by block, as they are exported again.

mod loads;
mod office;

use anyhow::Result;
use office::Figures;
use std::path::Path;

/// A load, and what is wanted of it.
struct Load {
    name: &'static str,
    run: fn(&Path) -> Result<Figures>,
    aim: &'static str,
    /// What the aim is about.
    judged: fn(&Figures) -> String,
}

const LOADS: [Load; 9] = [
    Load {
        name: "pgbench, 200 transactions/s, 5 s", run: loads::pgbench, aim: "sent : changed ≤ 0.09", judged: ratio
    },
    Load { name: "SQLite, a commit after the other, 5 s", run: loads::sqlite, aim: "", judged: ratio },
    Load { name: "a mail spool, 10 messages/s, 5 s", run: loads::mail, aim: "", judged: ratio },
    Load { name: "a log line a second, synced, 1 s", run: loads::log, aim: "≤ 2 kB a point", judged: a_point },
    Load {
        name: "256 KiB of noise a second, in place, 5 s",
        run: loads::noise,
        aim: "sent : changed ≤ 1.01",
        judged: ratio,
    },
    Load { name: "128 MiB deleted, `fstrim`", run: loads::fstrim, aim: "", judged: ratio },
    Load { name: "`cp` of 64 MiB over its copy", run: loads::copy, aim: "sent < 1 % of 64 MiB", judged: of_copy },
    Load { name: "the same once more", run: loads::copy_again, aim: "", judged: of_copy },
    Load {
        name: "in place (`dd conv=notrunc`)",
        run: loads::copy_in_place,
        aim: "sent < 1 % of 64 MiB",
        judged: of_copy,
    },
];

pub(crate) fn run(folder: &Path) -> Result<()> {
    let line = office::LINE_BITS_PER_S as f64 / 1e6;
    let columns =
        "points | changed, kB a point | dirtied | sent | on the line, UDP and IP | packed in the end | aim | ";
    println!("\n| on a line of {line} Mb/s | {columns} |\n|---|---|---|---|---|---|---|---|---|");
    for load in LOADS {
        let figures = (load.run)(folder)?;
        let a_point = |bytes: u64| format!("{:.1}", bytes as f64 / figures.points as f64 / 1e3);
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            load.name,
            figures.points,
            a_point(figures.changed),
            a_point(figures.dirtied),
            a_point(figures.sent),
            a_point(figures.line),
            figures.packing,
            load.aim,
            (load.judged)(&figures)
        );
    }
    Ok(())
}

fn ratio(figures: &Figures) -> String {
    format!("{:.4}", figures.sent as f64 / figures.changed as f64)
}

fn a_point(figures: &Figures) -> String {
    format!("{:.2} kB", figures.sent as f64 / figures.points as f64 / 1e3)
}

fn of_copy(figures: &Figures) -> String {
    format!("{:.2} %", 100.0 * figures.sent as f64 / loads::COPIED_BYTES as f64)
}

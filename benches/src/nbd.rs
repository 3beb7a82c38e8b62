//! A point served as a disk against `qemu-nbd` with the same image as compressed qcow2: random reads, and the whole of it in order.
//!
//! The history is made by the target's own writer: a first copy and then points that write a few blocks here and there, as a volume in
//! use has it, in frames of zstd 3; the qcow2 is one image, compressed by zstd. Both are read by the same clients in turn, their files in
//! the page cache.

mod store;

use crate::median;
use anyhow::{Context, Result, ensure};
use cdp_tests::process::{Daemon, program, run as run_command, tool, wait_for};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
const SECONDS: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests under way at once.
const DEPTHS: [u32; 2] = [1, 16];

/// Reads of an export; gives how many a second.
type Measure = dyn Fn(&str) -> Result<f64>;

/// How a server of the image is read.
struct Way {
    name: String,
    aim: &'static str,
    measure: Box<Measure>,
}

pub(crate) fn run(folder: &Path) -> Result<()> {
    let (data, raw, qcow2) = (folder.join("nbd-store"), folder.join("image.raw"), folder.join("image.qcow2"));
    store::make(&data)?;
    let raw_text = raw.to_str().context("a path of text")?;
    let export = ["export", "branch/main/data", "--at", "latest", "--output", raw_text];
    run_command(Command::new(program("cdp-target")).args(export).env("CDP_TARGET_DATA", &data))?;
    let packed = ["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", raw_text];
    tool("qemu-img", &[&packed[..], &[qcow2.to_str().context("a path of text")?]].concat())?;
    println!(
        "\nThe image: {} MiB; as qcow2 of zstd {} MiB; the store with {} points {} MiB.",
        store::BYTES >> 20,
        std::fs::metadata(&qcow2)?.len() >> 20,
        store::POINTS,
        crate::scale::folder_bytes(&data)? >> 20
    );
    let short = first_bytes(&data, folder)?;
    let (ours, theirs) = (Served::ours(&data, folder)?, Served::theirs(&qcow2, folder)?);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &ours.uri, &theirs.uri])?;
    println!("\n| median of {ROUNDS} pairs | `qemu-nbd`, qcow2 | `cdp-target nbd` | ratio, pair by pair | aim |");
    println!("|---|---|---|---|---|");
    for way in ways() {
        let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            of_theirs.push((way.measure)(&theirs.uri)?);
            of_ours.push((way.measure)(&ours.uri)?);
        }
        let ratios: Vec<f64> = of_ours.iter().zip(&of_theirs).map(|(ours, theirs)| ours / theirs).collect();
        let spread = ratios.iter().fold((f64::MAX, 0_f64), |(low, high), ratio| (low.min(*ratio), high.max(*ratio)));
        println!(
            "| {} | {:.0} | {:.0} | {:.2} ({:.2} to {:.2}) | {} |",
            way.name,
            median(&of_theirs),
            median(&of_ours),
            median(&ratios),
            spread.0,
            spread.1,
            way.aim
        );
    }
    println!("| from the command to the first byte, {} points, ms | | {short:.0} | | 1000 |", store::POINTS);
    let peak = ours.daemon.peak_memory()? >> 20;
    ours.daemon.stop()?;
    store::lengthen(&data)?;
    let long = first_bytes(&data, folder)?;
    println!("| from the command to the first byte, {} points, ms | | {long:.0} | | 1000 |", store::LONG_POINTS);
    println!("\nPeak of the server: {peak} MiB.");
    Ok(())
}

/// The median of what it takes from the start of a server to the first bytes of the newest point, in milliseconds.
fn first_bytes(data: &Path, folder: &Path) -> Result<f64> {
    let rounds = (0..ROUNDS).map(|round| first_byte(data, &folder.join(format!("first-{round}.sock"))));
    Ok(median(&rounds.collect::<Result<Vec<_>>>()?))
}

fn ways() -> Vec<Way> {
    let random = |depth: u32| Way {
        name: format!("random reads of 4 KiB, {depth} at once, a second"),
        aim: "≥ 1.0",
        measure: Box::new(move |uri| fio(uri, "randread", 4, depth)),
    };
    let mut ways: Vec<Way> = DEPTHS.map(random).into();
    ways.push(Way {
        name: "in order, 64 KiB, one at once, MiB/s".to_owned(),
        aim: "≥ 1.0",
        measure: Box::new(|uri| Ok(fio(uri, "read", 64, 1)? / 16.0)),
    });
    ways.push(Way {
        name: "the whole by `nbdcopy`, 4 connections, MiB/s".to_owned(),
        aim: "≥ 1.0",
        measure: Box::new(whole),
    });
    ways
}

/// Reads a second.
fn fio(uri: &str, how: &str, kib: u32, depth: u32) -> Result<f64> {
    let mut command = Command::new("fio");
    command.args(["--name=reads", "--ioengine=nbd", &format!("--uri={uri}"), &format!("--rw={how}")]);
    command.args([format!("--bs={kib}k"), format!("--iodepth={depth}"), format!("--size={}", store::BYTES)]);
    command.args(["--time_based", &format!("--runtime={SECONDS}"), "--output-format=json"]);
    let output = run_command(&mut command)?;
    let report: Value = serde_json::from_str(output.get(output.find('{').unwrap_or(0)..).unwrap_or(""))?;
    report["jobs"][0]["read"]["iops"].as_f64().context("iops in fio's report")
}

/// MiB a second.
fn whole(uri: &str) -> Result<f64> {
    let start = Instant::now();
    tool("nbdcopy", &["--connections=4", "--requests=16", uri, "null:"])?;
    Ok((store::BYTES >> 20) as f64 / start.elapsed().as_secs_f64())
}

/// A server that runs.
struct Served {
    daemon: Daemon,
    uri: String,
}

impl Served {
    fn ours(data: &Path, folder: &Path) -> Result<Self> {
        let socket = folder.join("ours.sock");
        let mut daemon = Daemon::start(&mut ours(data, &socket))?;
        daemon.wait_for_line("listening on", PATIENCE)?;
        Ok(Self { daemon, uri: format!("nbd+unix:///data?socket={}", socket.display()) })
    }

    fn theirs(qcow2: &Path, folder: &Path) -> Result<Self> {
        let socket: PathBuf = folder.join("theirs.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["--read-only", "--format=qcow2", "--persistent", "--shared=8", "--export-name=data"]);
        command.arg(format!("--socket={}", socket.display())).arg(qcow2);
        let daemon = Daemon::start(&mut command)?;
        wait_for("qemu-nbd's socket", PATIENCE, || Ok(UnixStream::connect(&socket).ok().map(drop)))?;
        Ok(Self { daemon, uri: format!("nbd+unix:///data?socket={}", socket.display()) })
    }
}

fn ours(data: &Path, socket: &Path) -> Command {
    let mut command = Command::new(program("cdp-target"));
    command.args(["nbd", "branch/main", "--at", "latest", "--listen", &format!("unix:{}", socket.display())]);
    command.env("CDP_TARGET_DATA", data);
    command
}

/// From the start of the server to the first bytes of the newest point at a client, in milliseconds.
fn first_byte(data: &Path, socket: &Path) -> Result<f64> {
    let start = Instant::now();
    let daemon = Daemon::start(&mut ours(data, socket))?;
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) if start.elapsed() < PATIENCE => std::thread::park_timeout(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    };
    let name = [&[0, 0, 0, 3], b"IHAVEOPT".as_slice(), &1_u32.to_be_bytes(), &4_u32.to_be_bytes(), b"data"].concat();
    stream.write_all(&name)?;
    let request = [&0x2560_9513_u32.to_be_bytes(), [0_u8; 20].as_slice(), &4096_u32.to_be_bytes()].concat();
    stream.write_all(&request)?;
    let mut answer = vec![0; 18 + 10 + 16 + 4096];
    stream.read_exact(&mut answer)?;
    let taken = start.elapsed().as_secs_f64() * 1e3;
    ensure!(answer[32..36] == [0; 4], "it is read");
    daemon.stop()?;
    Ok(taken)
}

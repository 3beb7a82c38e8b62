//! How the kernel gets the tracker's maps and programs, and what is said where it refuses them.
//!
//! Owns the sizes of the maps, the tables of what is tracked, and the words of a refusal: they name the map or the program,
//! tell how much memory was wanted, and that `scan` works without. Does not clear up after a refusal (`instance` does).

use super::TrackerError;
use super::bitmap::{Place, SPAN_WORDS, SharedWords};
use super::device::{Device, DeviceKind};
use super::instance::{CONTROL_WORDS, PROGRAMS, disks_of, other, words_of};
use super::memory::kernel_memory_bytes;
use aya::maps::{HashMap, Map, MapError};
use aya::programs::links::FdLink;
use aya::programs::{BtfTracePoint, ProgramError};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use cdp_protocol::limits::VOLUMES_MAX;
use std::error::Error;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// Bytes of a disk's name, filled up with zeros.
const DISK_NAME_BYTES: usize = 32;
/// How often a program is loaded whose verification is interrupted.
const LOAD_TRIES: u32 = 10;
/// Which word of `control` counts the paths.
const CONTROL_PATHS: usize = 2;
/// Words of a record of `volumes`.
const VOLUME_WORDS: usize = 8;
/// Bios of bio-based disks that may be on their way at once: their ranges take about 2 MiB.
const RANGES_MAX: u32 = 16 * 1024;

/// Loads the object's maps, in the sizes this group and this machine need.
pub(super) fn load(object: &[u8], places: &[Place], devices: &[Device], cpus: usize) -> Result<Ebpf, TrackerError> {
    let words = u32::try_from(words_of(places)).expect("64 volumes of 16 TiB have 2^30 words");
    let spans = words / SPAN_WORDS as u32;
    let mut loader = EbpfLoader::new();
    for name in ["dirty_0", "dirty_1", "holes", "unacked"] {
        loader.map_max_entries(name, words);
    }
    for name in ["summary_0", "summary_1"] {
        loader.map_max_entries(name, spans);
    }
    if devices.iter().any(|device| device.kind == DeviceKind::Bio) {
        loader.map_max_entries("ranges", RANGES_MAX);
    }
    loader.map_max_entries("gates", cpus as u32);
    loader.map_max_entries("tallies", (cpus * VOLUMES_MAX) as u32);
    loader.load(object).map_err(|error| refused_maps(error, devices))
}

fn refused_maps(error: EbpfError, devices: &[Device]) -> TrackerError {
    let EbpfError::MapError(MapError::CreateError { name, io_error }) = error else {
        return TrackerError::Io { step: "load the tracker's programs and maps".to_owned(), source: other(error) };
    };
    let sizes: Vec<u64> = devices.iter().map(Device::size_bytes).collect();
    let wanted = kernel_memory_bytes(&sizes).div_ceil(1 << 20);
    TrackerError::Unsupported {
        step: format!("make the tracker's map `{name}`"),
        reason: format!(
            "the kernel refuses it: {io_error}; tracking these volumes takes up to {wanted} MiB of the kernel's memory; \
             the `scan` tracker works without"
        ),
    }
}

/// The kernel's table of windows, sorted by disk, and where each disk's begin in it.
pub(super) fn fill_tables(ebpf: &mut Ebpf, places: &[Place], devices: &[Device]) -> io::Result<()> {
    let Some(Map::Array(volumes)) = ebpf.map("volumes") else {
        return Err(io::Error::other("the object has no table of volumes"));
    };
    let table = SharedWords::map(volumes.fd().as_fd(), VOLUMES_MAX * VOLUME_WORDS)?;
    let disks = ebpf.map_mut("disks").ok_or_else(|| io::Error::other("the object has no table of disks"))?;
    let mut disks: HashMap<_, u32, [u32; 4]> = HashMap::try_from(disks).map_err(other)?;
    let mut row = 0;
    for (index, disk) in disks_of(devices).into_iter().enumerate() {
        let first = row;
        for (device, place) in devices.iter().zip(places).filter(|(device, _)| device.disk == disk) {
            let bit_shift = u64::from(place.bit_shift());
            let record = [device.start.0, device.length.0, place.bits(), place.word_base as u64, bit_shift];
            record.iter().enumerate().for_each(|(field, value)| table.store(row * VOLUME_WORDS + field, *value));
            row += 1;
        }
        let bio_based = devices.iter().any(|device| device.disk == disk && device.kind == DeviceKind::Bio);
        let record = [first as u32, (row - first) as u32, index as u32, u32::from(bio_based)];
        disks.insert(disk.to_kernel(), record, 0).map_err(other)?;
    }
    fill_paths(ebpf, devices)
}

/// The hidden disks that requests to a tracked disk complete on, by name; how many there are stands last, since the
/// programs look at nothing else where there are none.
fn fill_paths(ebpf: &mut Ebpf, devices: &[Device]) -> io::Result<()> {
    let paths = ebpf.map_mut("paths").ok_or_else(|| io::Error::other("the object has no table of paths"))?;
    let mut paths: HashMap<_, [u8; DISK_NAME_BYTES], u32> = HashMap::try_from(paths).map_err(other)?;
    let mut count = 0;
    for device in devices {
        for path in &device.paths {
            let mut name = [0; DISK_NAME_BYTES];
            let place = name.get_mut(..path.len()).ok_or_else(|| io::Error::other("a disk's name is too long"))?;
            place.copy_from_slice(path.as_bytes());
            paths.insert(name, device.disk.to_kernel(), 0).map_err(other)?;
            count += 1;
        }
    }
    let Some(Map::Array(control)) = ebpf.map("control") else {
        return Err(io::Error::other("the object has no control"));
    };
    SharedWords::map(control.fd().as_fd(), CONTROL_WORDS)?.store(CONTROL_PATHS, count);
    Ok(())
}

/// Attaches the programs, and pins them and their links in `folder`.
pub(super) fn attach(ebpf: &mut Ebpf, folder: &Path) -> Result<(), TrackerError> {
    let read = |error| TrackerError::Io { step: "read the kernel's types".to_owned(), source: other(error) };
    let btf = Btf::from_sys_fs().map_err(read)?;
    for (name, tracepoint) in PROGRAMS {
        attach_one(ebpf, folder, &btf, (name, tracepoint)).map_err(|error| refused_program(name, &*error))?;
    }
    Ok(())
}

fn attach_one(
    ebpf: &mut Ebpf,
    folder: &Path,
    btf: &Btf,
    (name, tracepoint): (&str, &str),
) -> Result<(), Box<dyn Error>> {
    let program = ebpf.program_mut(name).ok_or_else(|| io::Error::other("the object does not have it"))?;
    let program: &mut BtfTracePoint = program.try_into()?;
    load_program(program, tracepoint, btf)?;
    program.pin(folder.join(format!("{name}_program")))?;
    let link = program.attach()?;
    let link: FdLink = program.take_link(link)?.into();
    link.pin(folder.join(format!("{name}_link")))?;
    Ok(())
}

/// The verifier gives up when a signal is pending (kernel/bpf/verifier.c, `do_check`), which says nothing of the program.
fn load_program(program: &mut BtfTracePoint, tracepoint: &str, btf: &Btf) -> Result<(), ProgramError> {
    let mut tries_left = LOAD_TRIES - 1;
    loop {
        match program.load(tracepoint, btf) {
            Err(ProgramError::LoadError { io_error, .. })
                if tries_left > 0 && io_error.kind() == io::ErrorKind::WouldBlock =>
            {
                tries_left -= 1;
            }
            done => return done,
        }
    }
}

/// How the lines begin that the verifier ends with, whatever it thinks of a program.
const VERIFIER_STATISTICS: [&str; 3] = ["processed ", "verification time ", "stack depth "];

/// What the verifier says of a program that it refuses is many pages; its last words but the statistics are the reason.
fn refused_program(name: &str, error: &(dyn Error + 'static)) -> TrackerError {
    let why = match error.downcast_ref::<ProgramError>() {
        Some(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            tracing::debug!(program = name, log, "refused by the verifier");
            let is_reason =
                |line: &&str| !line.is_empty() && !VERIFIER_STATISTICS.iter().any(|of| line.starts_with(of));
            let last = log.lines().rev().map(str::trim).find(is_reason);
            format!("{io_error} ({})", last.unwrap_or("the verifier does not say why"))
        }
        _ => error.to_string(),
    };
    TrackerError::Unsupported {
        step: format!("load and attach the tracker's program `{name}`"),
        reason: format!("the kernel refuses it: {why}; the `scan` tracker works without"),
    }
}

//! Exporting a volume against copying the same image: `cp`, on the same disk, both to a file that is synced, by turns.

use crate::median;
use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::tool;
use cdp_tests::site::Site;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const VOLUME_BYTES: u64 = 2 << 30;
const ROUNDS: usize = 5;

/// How content is made: what compresses to about half, and what does not.
#[derive(Clone, Copy)]
enum Content {
    Half,
    Noise,
}

pub(crate) fn run(folder: &Path) -> Result<()> {
    println!("\n## Export\n");
    println!("| content | way | MB/s of the image, median of {ROUNDS} | of `cp` |");
    println!("|---|---|---|---|");
    for (name, content) in [("half compressible", Content::Half), ("incompressible", Content::Noise)] {
        measure(folder, name, content)?;
    }
    Ok(())
}

fn measure(folder: &Path, name: &str, content: Content) -> Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    let device = LoopDevice::new(&folder.path().join("volume.img"), VOLUME_BYTES)?;
    FileSystem::Ext4.make(device.node())?;
    let mount = FileSystem::Ext4.mount(device.node(), &folder.path().join("live"))?;
    fill(&mount.folder().join("file"), content)?;
    mount.unmount()?;
    let mut site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.start_source()?;
    site.wait_for_points(1, Duration::from_secs(600))?;
    let epoch = site.point_now()?;
    site.stop_source()?;
    let image = folder.path().join("image");
    site.export("data", epoch, &image)?;
    let target = folder.path().join("again");
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        times[0].push(timed(&target, || copy(&image, &target))?);
        for (way, options) in [(1, &[][..]), (2, &["--format", "qcow2"]), (3, &["--format", "qcow2", "--compress"])] {
            let target_text = target.to_str().context("a path of text")?;
            let epoch = epoch.to_string();
            let export = ["export", "office/main/data", "--at", &epoch, "--output", target_text, "--no-manifest"];
            times[way].push(timed(&target, || site.target(&[&export[..], options].concat()).map(drop))?);
        }
    }
    let bytes = image_bytes(&image)?;
    let speed = |way: usize| bytes as f64 / median(&times[way]) / 1e6;
    for (way, said) in ["`cp --sparse=always`, `sync`", "raw", "qcow2", "qcow2 --compress"].into_iter().enumerate() {
        println!("| {name} | {said} | {:.0} | {:.2} |", speed(way), speed(way) / speed(0));
    }
    site.stop_target()?;
    Ok(())
}

/// Seconds that `work` takes with nothing of the files in memory; what it wrote is removed.
fn timed(target: &Path, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    tool("sync", &[])?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let start = Instant::now();
    work()?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(fs::metadata(target)?.len() > 0, "it is written");
    fs::remove_file(target)?;
    Ok(seconds)
}

fn copy(image: &Path, target: &Path) -> Result<()> {
    let status = Command::new("cp").arg("--sparse=always").args([image, target]).status()?;
    ensure!(status.success(), "cp failed");
    Ok(File::open(target)?.sync_all()?)
}

/// Bytes of an image that are no holes.
fn image_bytes(image: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(image)?.blocks() * 512)
}

/// A file of three quarters of the volume.
fn fill(path: &Path, content: Content) -> Result<()> {
    use std::io::Write;
    let mut file = File::create(path)?;
    let random = cdp_seams::random::SimRandom::new(1);
    let mut block = vec![0; 1 << 20];
    for _ in 0..VOLUME_BYTES / 4 * 3 / (1 << 20) {
        match content {
            Content::Noise => {
                block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
            }
            Content::Half => {
                for page in block.chunks_mut(4096) {
                    let (noise, text) = page.split_at_mut(2048);
                    noise.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
                    text.chunks_mut(64).for_each(|line| line.fill(random.next() as u8));
                }
            }
        }
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

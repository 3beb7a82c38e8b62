//! The programs against each other without root: an image file, the scan tracker, real processes, real QUIC.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::content;
use cdp_tests::process::{program, run};
use cdp_tests::site::{PATIENCE, Site};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

const IMAGE_BYTES: usize = 8 << 20;

fn site_with_image(folder: &Path) -> Result<(Site, std::path::PathBuf)> {
    let image = folder.join("volume.img");
    let mut bytes = content(1, IMAGE_BYTES - 1000);
    bytes[2 << 20..3 << 20].fill(0);
    std::fs::write(&image, &bytes)?;
    let mut site = Site::new(folder)?;
    site.source(&["protect", &format!("data={}", image.display())])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    Ok((site, image))
}

#[test]
fn an_image_file_is_protected_and_any_point_comes_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut site, image) = site_with_image(folder.path())?;
    let first = site.point_now()?;
    let original = std::fs::read(&image)?;
    let mut file = std::fs::File::options().write(true).open(&image)?;
    file.seek(SeekFrom::Start(5_000))?;
    file.write_all(b"a few bytes that change two blocks")?;
    file.sync_all()?;
    let second = site.point_now()?;
    let changed = std::fs::read(&image)?;
    ensure!(second > first && changed != original, "a new point for the change");
    for (epoch, expected) in [(first, &original), (second, &changed)] {
        let output = folder.path().join(format!("point-{epoch}.img"));
        site.export("data", epoch, &output)?;
        ensure!(std::fs::read(&output)? == *expected, "point {epoch}");
    }
    let stdout = Command::new(program("cdp-target"))
        .args(["export", "office/main/data", "--at", &first.to_string(), "--output", "-"])
        .env("CDP_TARGET_DATA", &site.data)
        .output()?;
    ensure!(stdout.stdout == original, "the same on stdout");
    site.target(&["label", "office/main", &second.to_string(), "after-change"])?;
    let output = folder.path().join("labelled.img");
    let text = output.to_str().context("a path of text")?;
    site.target(&["export", "office/main/data", "--at", "after-change", "--output", text])?;
    ensure!(std::fs::read(&output)? == changed, "the labelled point");
    site.verify()?;
    site.stop_source()?;
    site.stop_target()?;
    // Without a server the store reads just the same.
    ensure!(site.points()?.iter().any(|point| point.epoch == first), "points without a server");
    Ok(())
}

#[test]
fn both_ends_may_die_and_come_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut site, image) = site_with_image(folder.path())?;
    for round in 0..5_u64 {
        let before = site.point_now()?;
        if round % 2 == 0 {
            site.kill_target()?;
        } else {
            site.kill_source()?;
        }
        let mut file = std::fs::File::options().write(true).open(&image)?;
        file.seek(SeekFrom::Start(round * 100_000))?;
        file.write_all(&content(round + 10, 10_000))?;
        if round % 2 == 0 {
            site.start_target()?;
        } else {
            site.start_source()?;
        }
        cdp_tests::process::wait_for("the agent to be connected", PATIENCE, || {
            let status = site.source_status().ok();
            Ok(status.filter(|status| status["state"] == "continuous"))
        })?;
        let after = site.point_now()?;
        ensure!(after > before, "{after} after {before}");
        let output = folder.path().join(format!("round-{round}.img"));
        site.export("data", after, &output)?;
        ensure!(std::fs::read(&output)? == std::fs::read(&image)?, "round {round}");
    }
    Ok(())
}

#[test]
fn two_installations_share_no_secret() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for name in ["one", "two"] {
        let data = folder.path().join(name);
        run(Command::new(program("cdp-target"))
            .args(["init", "--listen", "127.0.0.1:0"])
            .env("CDP_TARGET_DATA", &data))?;
        let authority = data.join("authority");
        let mut files = 0;
        for entry in std::fs::read_dir(&authority)? {
            let path = entry?.path();
            let bytes = std::fs::read(&path)?;
            if path.extension().is_some_and(|extension| extension == "key" || extension == "pem") {
                ensure!(!seen.contains(&bytes), "{} is the same in both", path.display());
                seen.push(bytes);
                files += 1;
            }
        }
        ensure!(files >= 3, "keys and certificates in {}", authority.display());
    }
    Ok(())
}

//! The programs against each other without root: an image file, the scan tracker, real processes, real QUIC.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::content;
use cdp_tests::metrics::{scrape, serve};
use cdp_tests::process::{program, run, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

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
        wait_for("the agent to be connected", PATIENCE, || {
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

#[test]
fn a_clean_end_of_the_agent_is_seen_at_the_target_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut site, _image) = site_with_image(folder.path())?;
    let state = |site: &Site| -> Result<Value> {
        let status: Value = serde_json::from_str(&site.target(&["status", "--json"])?)?;
        Ok(status["offices"][0]["groups"][0]["state"].clone())
    };
    ensure!(state(&site)? == "connected");
    site.stop_source()?;
    // A connection that just falls silent is believed alive for 45 s.
    wait_for("the office to be gone", Duration::from_secs(5), || Ok((state(&site)? == "disconnected").then_some(())))
}

#[test]
fn a_point_that_is_not_committed_in_time_is_an_error_that_says_so() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut site, _image) = site_with_image(folder.path())?;
    site.stop_target()?;
    let began = Instant::now();
    let output = Command::new(program("cdp-source"))
        .args(["point", "--wait", "--timeout", "1s"])
        .env("CDP_SOURCE_STATE", &site.state)
        .output()?;
    let error = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1), "{}: {error}", output.status);
    ensure!(error.contains("no point of group main was committed at the target within 1 s"), "{error}");
    ensure!(error.contains("hint: cdp-source status"), "{error}");
    ensure!((Duration::from_secs(1)..PATIENCE).contains(&began.elapsed()), "after {:?}", began.elapsed());
    ensure!(output.stdout.is_empty(), "no point is named");
    Ok(())
}

/// Metrics that `docs/metrics.md` names with this beginning.
fn documented(beginning: &str) -> Vec<String> {
    const PAGE: &str = include_str!("../docs/metrics.md");
    let names = PAGE.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    names.map(|(name, _)| name.to_owned()).filter(|name| name.starts_with(beginning)).collect()
}

#[test]
fn both_programs_serve_the_metrics_that_are_documented() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut site, _image) = site_with_image(folder.path())?;
    site.stop_source()?;
    site.stop_target()?;
    let mut served = Vec::new();
    for (file, beginning) in
        [(site.state.join("source.toml"), "cdp_source_"), (site.data.join("target.toml"), "cdp_target_")]
    {
        let mut names = documented(beginning);
        // No images are made here: `local_image` looks for those.
        names.retain(|name| !name.contains("_local_image_"));
        served.push((serve(&file)?, names));
    }
    site.start_target()?;
    site.start_source()?;
    // Nothing has changed since: without a point that is asked for there is no cut to tell of.
    wait_for("a point", PATIENCE, || Ok(site.point_now().ok()))?;
    // Nor is there anything to tell of drills before the first.
    site.target(&["drill", "office/main"])?;
    for (address, names) in served {
        ensure!(names.len() > 5, "the page names them: {names:?}");
        let mut missing = names.clone();
        let all_there = wait_for("all metrics", PATIENCE, || {
            let page = scrape(&address).unwrap_or_default();
            missing = names.iter().filter(|name| !page.contains(&format!("\n{name}"))).cloned().collect();
            Ok((page.starts_with("HTTP/1.1 200") && missing.is_empty()).then_some(()))
        });
        all_there.with_context(|| format!("{address} does not serve {missing:?}"))?;
    }
    Ok(())
}

//! The audit over the line, with the real programs: the target proves what it holds, wherever it stands, and no alarm is false.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::noise;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::wait_for;
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;

const VOLUME_BYTES: u64 = 16 << 20;
const BLOCKS: u64 = VOLUME_BYTES / 4096;

/// Writes noise to places that only `seed` gives.
fn scribble(device: &Path, seed: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(device)?;
    let mut bytes = vec![0; 64 << 10];
    for at in 0..16 {
        noise(seed * 16 + at, &mut bytes);
        file.write_all_at(&bytes, (seed * 977 + at * 241) % (BLOCKS - 16) * 4096)?;
    }
    Ok(file.sync_all()?)
}

fn audit(site: &Site) -> Result<Value> {
    Ok(site.source_status()?["audit"].clone())
}

/// Waits until as many blocks more were proved at the target, while the volume is written to; and no alarm came of it.
fn proved_once_more(site: &Site, device: &Path, seed: u64) -> Result<()> {
    let number = |audit: &Value, key: &str| audit[key].as_u64().with_context(|| format!("{key} in {audit}"));
    let before = number(&audit(site)?, "target_proved_blocks")?;
    scribble(device, seed)?;
    let told = wait_for("a round of the audit over the line", PATIENCE, || {
        let audit = audit(site)?;
        Ok((number(&audit, "target_proved_blocks")? >= before + BLOCKS).then_some(audit))
    })?;
    let (bytes, differing) = (number(&told, "target_bytes")?, number(&told, "target_differing_blocks")?);
    eprintln!("{} blocks proved at the target, in {bytes} bytes", told["target_proved_blocks"]);
    ensure!(differing == 0 && told["target_difference"].is_null(), "a false alarm: {told}");
    Ok(())
}

#[test]
fn the_target_proves_what_it_holds_from_journal_and_checkpoint() -> Result<()> {
    if !cdp_tests::privileged("the_target_proves_what_it_holds_from_journal_and_checkpoint") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let mut site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.set_group_option("interval_ms = 100")?;
    site.set_group_option("audit_interval_s = 10")?;
    scribble(device.node(), 1)?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    proved_once_more(&site, device.node(), 2)?;
    site.target(&["checkpoint", "office/main"])?;
    proved_once_more(&site, device.node(), 3)?;
    let dated =
        wait_for("a date of proof", PATIENCE, || Ok(audit(&site)?["oldest_target_proof"].as_str().map(str::to_owned)))?;
    // The date outlives the agent.
    site.stop_source()?;
    site.start_source()?;
    let kept = wait_for("the agent's status", PATIENCE, || {
        let proof = audit(&site).ok().map(|audit| audit["oldest_target_proof"].clone());
        Ok(proof.filter(Value::is_string))
    })?;
    ensure!(kept.as_str() >= Some(dated.as_str()), "{kept} after {dated}");
    site.verify()
}

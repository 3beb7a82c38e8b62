//! A mounted disk that is in no group is told of, until somebody says that this is meant.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

const MIB: u64 = 1 << 20;

fn mounted(file: &Path, size_bytes: u64, folder: &Path) -> Result<(LoopDevice, Mount)> {
    let device = LoopDevice::new(file, size_bytes)?;
    tool("mkfs.ext4", &["-q", "-F", device.node().to_str().context("a path of text")?])?;
    let mount = Mount::new(device.node(), folder, "rw")?;
    Ok((device, mount))
}

/// Puts a line over everything that is in the office's configuration.
fn configure(site: &Site, line: &str) -> Result<()> {
    let path = site.state.join("source.toml");
    let text = fs::read_to_string(&path)?;
    Ok(fs::write(&path, format!("{line}\n{text}"))?)
}

/// The agent's entry for what is mounted on a folder.
fn told(site: &Site, folder: &Path) -> Result<Option<Value>> {
    let document: Value = serde_json::from_str(&site.source(&["status", "--json"])?)?;
    let list = document["unprotected"].as_array().with_context(|| format!("a list in {document}"))?;
    let is_it = |entry: &&Value| entry["mounted_on"][0].as_str() == folder.to_str();
    Ok(list.iter().find(is_it).cloned())
}

/// What `doctor` says of it: grade and text.
fn examined(site: &Site, folder: &Path) -> Result<Option<(String, String)>> {
    let document: Value = serde_json::from_str(&site.source(&["doctor", "--json"])?)?;
    let subject = format!("file system {}", folder.display());
    let finding = document["findings"].as_array().context("findings")?.iter().find(|entry| entry["subject"] == subject);
    let text = |value: &Value| value.as_str().map(str::to_owned).context("text");
    finding.map(|entry| Ok((text(&entry["grade"])?, text(&entry["found"])?))).transpose()
}

/// How many the metrics say there are, once they say so.
fn counted(address: &str) -> Result<u64> {
    wait_for("the metric", PATIENCE, || {
        let Ok(mut stream) = TcpStream::connect(address) else { return Ok(None) };
        write!(stream, "GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        let value = page.lines().find_map(|line| line.strip_prefix("cdp_source_unprotected_file_systems "));
        Ok(value.map(str::parse).transpose()?)
    })
}

#[test]
fn a_mounted_disk_in_no_group_is_told_of_until_it_is_to_be_left() -> Result<()> {
    if !cdp_tests::privileged("a_mounted_disk_in_no_group_is_told_of_until_it_is_to_be_left") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let (protected, outer) = mounted(&path("protected.img"), 64 * MIB, &path("protected"))?;
    let (forgotten, other) = mounted(&path("forgotten.img"), 16 * MIB, &path("forgotten"))?;
    // An image on the protected volume, mounted: what is written to it is written to the volume.
    let (image, inner) = mounted(&outer.folder().join("inner.img"), 16 * MIB, &path("inner"))?;
    let mut site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", protected.node().display())])?;
    let metrics = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    configure(&site, &format!("metrics_listen = \"{metrics}\""))?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    let entry = told(&site, other.folder())?.context("the forgotten disk is not told of")?;
    ensure!(entry["device"].as_str() == forgotten.node().to_str() && entry["file_system"] == "ext4", "{entry}");
    ensure!(
        told(&site, outer.folder())?.is_none() && told(&site, inner.folder())?.is_none(),
        "what is held is told of"
    );
    let text = site.source(&["status"])?;
    ensure!(text.contains(&format!("not protected: {}, ext4 on", other.folder().display())), "{text}");
    ensure!(counted(&metrics)? >= 1, "the metric counts it");
    let (grade, found) = examined(&site, other.folder())?.context("doctor does not name it")?;
    ensure!(grade == "warn" && found.starts_with("not protected: ext4 on"), "{grade}: {found}");
    let log = site.source_daemon().log();
    ensure!(log.contains("a mounted file system is in no group"), "{log}");

    site.stop_source()?;
    for named in [other.folder(), forgotten.node()] {
        let before = fs::read_to_string(site.state.join("source.toml"))?;
        configure(&site, &format!("leave_unprotected = [\"{}\"]", named.display()))?;
        site.start_source()?;
        site.wait_for_points(1, PATIENCE)?;
        wait_for("the agent to answer", PATIENCE, || Ok(told(&site, other.folder()).ok().filter(Option::is_none)))
            .with_context(|| format!("{} is to be left", named.display()))?;
        let (grade, found) = examined(&site, other.folder())?.context("doctor names it all the same")?;
        ensure!(grade == "ok" && found.contains("left so"), "{grade}: {found}");
        site.stop_source()?;
        fs::write(site.state.join("source.toml"), before)?;
    }
    inner.unmount()?;
    drop(image);
    other.unmount()?;
    outer.unmount()
}

//! A target and an office, run as a user runs them: by their commands.

use crate::process::{Daemon, program, run, wait_for};
use crate::relay::Relay;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long a step of the programs may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A target and one office below a folder.
pub struct Site {
    /// The folder of the target's store.
    pub data: PathBuf,
    /// The folder of the office's state.
    pub state: PathBuf,
    /// Where the target listens.
    pub address: String,
    target: Option<Daemon>,
    source: Option<Daemon>,
}

/// A recovery point as `points --json` lists it.
#[derive(Clone, Debug)]
pub struct Point {
    /// Its number.
    pub epoch: u64,
    /// The instant of the cut, RFC 3339.
    pub time: String,
    /// Duration of the cut, in milliseconds.
    pub cut_ms: f64,
    /// Rounds of the cut.
    pub cut_rounds: u64,
    /// The whole document.
    pub document: Value,
}

impl Site {
    /// Initialises a store below `folder`, starts it, enrolls an office named `office` and lets it join.
    pub fn new(folder: &Path) -> Result<Self> {
        Self::new_with_store(folder, &folder.join("target"))
    }

    /// The same with the store in a folder of its own.
    pub fn new_with_store(folder: &Path, store: &Path) -> Result<Self> {
        let (site, bundle) = Self::enrolled(folder, store)?;
        site.source(&["join", &bundle])?;
        Ok(site)
    }

    /// The same, and with a line between the two that can be made thin, and that counts.
    pub fn new_behind_a_line(folder: &Path, store: &Path) -> Result<(Self, Relay)> {
        let (site, bundle) = Self::enrolled(folder, store)?;
        let relay = Relay::new(&site.address)?;
        site.source(&["join", &bundle, "--target", relay.address()])?;
        Ok((site, relay))
    }

    /// A target that runs and knows an office, and the bundle by which that joins.
    fn enrolled(folder: &Path, store: &Path) -> Result<(Self, String)> {
        let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut site = Self {
            data: store.to_owned(),
            state: folder.join("source"),
            address: format!("127.0.0.1:{port}"),
            target: None,
            source: None,
        };
        site.target(&["init", "--listen", &site.address])?;
        let bundle = folder.join("office.bundle");
        let bundle_text = bundle.to_str().context("a path of text")?;
        site.target(&["enroll", "office", "--output", bundle_text])?;
        site.start_target()?;
        Ok((site, bundle_text.to_owned()))
    }

    /// Runs a command of `cdp-target`.
    pub fn target(&self, arguments: &[&str]) -> Result<String> {
        run(Command::new(program("cdp-target")).args(arguments).env("CDP_TARGET_DATA", &self.data))
    }

    /// Runs a command of `cdp-source`.
    pub fn source(&self, arguments: &[&str]) -> Result<String> {
        run(Command::new(program("cdp-source")).args(arguments).env("CDP_SOURCE_STATE", &self.state))
    }

    /// Starts the server and waits until it listens.
    pub fn start_target(&mut self) -> Result<()> {
        let mut command = Command::new(program("cdp-target"));
        let mut daemon = Daemon::start(command.arg("serve").env("CDP_TARGET_DATA", &self.data))?;
        daemon.wait_for_line("listening on", PATIENCE)?;
        self.target = Some(daemon);
        Ok(())
    }

    /// Starts the agent.
    pub fn start_source(&mut self) -> Result<()> {
        let mut command = Command::new(program("cdp-source"));
        command.arg("run").env("CDP_SOURCE_STATE", &self.state);
        self.source = Some(Daemon::start(&mut command)?);
        Ok(())
    }

    /// Starts the agent with a log of what the filter says.
    pub fn start_source_logging(&mut self, filter: &str) -> Result<()> {
        let mut command = Command::new(program("cdp-source"));
        command.arg("run").env("CDP_SOURCE_STATE", &self.state).env("CDP_LOG", filter);
        self.source = Some(Daemon::start(&mut command)?);
        Ok(())
    }

    /// Starts the agent where the kernel's boot id is what the file `boot_id` says, as after a restart of the machine.
    pub fn start_source_booted(&mut self, boot_id: &Path) -> Result<()> {
        const SCRIPT: &str = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$1\" run";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", SCRIPT]).arg(boot_id).arg(program("cdp-source"));
        self.source = Some(Daemon::start(command.env("CDP_SOURCE_STATE", &self.state))?);
        Ok(())
    }

    /// Another machine of the same target: its state is in `state`, nothing of it runs yet. To be dropped before this one.
    #[must_use]
    pub fn beside(&self, state: PathBuf) -> Self {
        Self { data: self.data.clone(), state, address: self.address.clone(), target: None, source: None }
    }

    /// Starts the agent where the kernel's BPF file system is an empty one of its own, as on another machine.
    pub fn start_source_apart(&mut self) -> Result<()> {
        const SCRIPT: &str = "mount -t bpf bpf /sys/fs/bpf && exec \"$0\" run";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", SCRIPT]).arg(program("cdp-source"));
        self.source = Some(Daemon::start(command.env("CDP_SOURCE_STATE", &self.state))?);
        Ok(())
    }

    /// The server that runs.
    pub fn target_daemon(&mut self) -> &mut Daemon {
        self.target.as_mut().expect("the server was started")
    }

    /// The agent that runs.
    pub fn source_daemon(&mut self) -> &mut Daemon {
        self.source.as_mut().expect("the agent was started")
    }

    /// `kill -9` of the server.
    pub fn kill_target(&mut self) -> Result<()> {
        self.target.take().context("the server runs")?.kill()
    }

    /// `kill -9` of the agent.
    pub fn kill_source(&mut self) -> Result<()> {
        self.source.take().context("the agent runs")?.kill()
    }

    /// Ends the server cleanly.
    pub fn stop_target(&mut self) -> Result<()> {
        self.target.take().context("the server runs")?.stop()
    }

    /// Ends the agent cleanly.
    pub fn stop_source(&mut self) -> Result<()> {
        self.source.take().context("the agent runs")?.stop()
    }

    /// All recovery points, oldest first.
    pub fn points(&self) -> Result<Vec<Point>> {
        let document: Value = serde_json::from_str(&self.target(&["points", "office/main", "--json"])?)?;
        let list = document.as_array().or_else(|| document["points"].as_array()).context("a list of points")?;
        list.iter().filter(|entry| entry["epoch"].is_u64()).map(point).collect()
    }

    /// A recovery point cut now and committed; gives its number.
    pub fn point_now(&self) -> Result<u64> {
        let document: Value = serde_json::from_str(&self.source(&["point", "--wait", "--json"])?)?;
        document["epoch"].as_u64().with_context(|| format!("an epoch in {document}"))
    }

    /// Waits until there are at least `count` points.
    pub fn wait_for_points(&self, count: usize, deadline: Duration) -> Result<Vec<Point>> {
        wait_for(&format!("{count} points"), deadline, || Ok(self.points().ok().filter(|points| points.len() >= count)))
            .with_context(|| self.source(&["status", "--json"]).unwrap_or_default())
    }

    /// Exports `volume` at `epoch` into a new file.
    pub fn export(&self, volume: &str, epoch: u64, output: &Path) -> Result<()> {
        let (volume, epoch) = (format!("office/main/{volume}"), epoch.to_string());
        self.target(&[
            "export",
            &volume,
            "--at",
            &epoch,
            "--output",
            output.to_str().context("a path of text")?,
            "--no-manifest",
        ])
        .map(drop)
    }

    /// The group's entry in the agent's status.
    pub fn source_status(&self) -> Result<Value> {
        let document: Value = serde_json::from_str(&self.source(&["status", "--json"])?)?;
        let group = document["groups"].get(0).cloned();
        group.with_context(|| format!("a group in {document}"))
    }

    /// Sets keys in the office's `source.toml` group table, before the agent starts.
    pub fn set_group_option(&self, line: &str) -> Result<()> {
        let path = self.state.join("source.toml");
        let text = std::fs::read_to_string(&path)?;
        let (head, tail) = text.split_once("[groups.main]\n").with_context(|| format!("a group table in {text}"))?;
        let key = line.split('=').next().unwrap_or(line).trim();
        let tail: Vec<&str> =
            tail.lines().filter(|entry| entry.split('=').next().map(str::trim) != Some(key)).collect();
        std::fs::write(&path, format!("{head}[groups.main]\n{line}\n{}\n", tail.join("\n")))?;
        Ok(())
    }

    /// Where the agent pins the tracking of the group, once the target knows the group.
    #[must_use]
    pub fn pins(&self) -> Option<PathBuf> {
        self.all_pins().into_iter().next()
    }

    /// The same for all groups, by the ids the target's folders have.
    fn all_pins(&self) -> Vec<PathBuf> {
        let groups = entries(&self.data.join("offices")).into_iter().flat_map(|office| entries(&office.join("groups")));
        groups.filter_map(|group| Some(Path::new("/sys/fs/bpf/cdp").join(group.file_name()?))).collect()
    }

    /// Checks with `cdp-target verify` that everything stored is whole.
    pub fn verify(&self) -> Result<()> {
        let report = self.target(&["verify", "office/main", "--json"])?;
        ensure!(!report.is_empty(), "verify prints a report");
        Ok(())
    }
}

/// What the agents pinned is taken down: nobody tracks these volumes any more.
impl Drop for Site {
    fn drop(&mut self) {
        self.source = None;
        self.target = None;
        for pins in self.all_pins() {
            let _ = std::fs::remove_dir_all(pins);
        }
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).map_or_else(|_| Vec::new(), |list| list.flatten().map(|entry| entry.path()).collect())
}

fn point(entry: &Value) -> Result<Point> {
    Ok(Point {
        epoch: entry["epoch"].as_u64().context("epoch")?,
        time: entry["time"].as_str().context("time")?.to_owned(),
        cut_ms: entry["cut_ms"].as_f64().context("cut_ms")?,
        cut_rounds: entry["cut_rounds"].as_u64().context("cut_rounds")?,
        document: entry.clone(),
    })
}

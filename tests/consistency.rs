//! More than a power cut leaves: points with frozen file systems and with hooks around them, by the commands a user has.
//!
//! File systems are frozen under a disk that takes its time for reads, so that no cut validates while somebody writes. The examples of
//! `packaging/hooks` are tried on the databases they are for.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, bail, ensure};
use cdp_tests::fuse_file::{Answer, Backing, Change, FuseFile};
use cdp_tests::image::check_ext4;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::postgres::{self, Postgres};
use cdp_tests::process::{Daemon, as_user, run, tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::{JoinHandle, park_timeout};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// The line of an agent that has just frozen a file system.
const FROZEN: &str = "capturing: frozen";

/// A disk in memory whose reads take as long as is said.
#[derive(Clone)]
struct SlowReads {
    content: Arc<RwLock<Vec<u8>>>,
    read_ms: Arc<AtomicU64>,
}

impl SlowReads {
    fn new(size_bytes: u64) -> Self {
        Self { content: Arc::new(RwLock::new(vec![0; size_bytes as usize])), read_ms: Arc::default() }
    }
}

impl Backing for SlowReads {
    fn read(&self, offset: usize, len: usize, out: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let due = Instant::now() + Duration::from_millis(self.read_ms.load(Ordering::Relaxed));
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            park_timeout(left);
        }
        out(&self.content.read().expect("no holder panics")[offset..offset + len]);
        Ok(())
    }

    fn change(&self, change: Change, answer: Answer) {
        let mut content = self.content.write().expect("no holder panics");
        if let Some(place) = content.get_mut(change.offset..change.offset + change.len) {
            match &change.bytes {
                Some(bytes) => place.copy_from_slice(bytes),
                None => place.fill(0),
            }
        }
        answer.done();
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the same few blocks of a file over and over, each through to the disk.
struct Hot {
    writes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Hot {
    fn start(file: &Path) -> Result<Self> {
        fs::write(file, vec![1; 2 * BLOCK])?;
        tool("sync", &[])?;
        let through = rustix::fs::OFlags::DSYNC.bits() as i32;
        let file = fs::File::options().write(true).custom_flags(through).open(file)?;
        let (writes, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (counter, asked) = (Arc::clone(&writes), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !asked.load(Ordering::Relaxed) {
                let number = counter.load(Ordering::Relaxed);
                file.write_all_at(&[number as u8; BLOCK], number % 2 * BLOCK as u64)?;
                counter.store(number + 1, Ordering::Relaxed);
            }
            Ok(())
        });
        Ok(Self { writes, stop, thread })
    }

    /// Waits until writes go through again: more than could have been under way.
    fn goes_on(&self, deadline: Duration) -> Result<()> {
        let before = self.writes.load(Ordering::Relaxed);
        wait_for("writes to go on", deadline, || Ok((self.writes.load(Ordering::Relaxed) > before + 2).then_some(())))
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
    }
}

/// An office whose cuts do not validate, and may freeze. Fields go in this order.
struct Frost {
    site: Site,
    hot: Option<Hot>,
    mount: Option<Mount>,
    device: Option<LoopDevice>,
    file: Option<FuseFile>,
    disk: SlowReads,
    folder: tempfile::TempDir,
}

impl Frost {
    fn new(freeze_deadline_ms: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let disk = SlowReads::new(32 * MIB);
        let file = FuseFile::mount(&folder.path().join("slow"), 32 * MIB, disk.clone())?;
        let device = LoopDevice::attach(file.path())?;
        // Nothing is to be written but what the test writes: reads are few then, and each takes long.
        let whole = "lazy_itable_init=0,lazy_journal_init=0";
        tool("mkfs.ext4", &["-q", "-F", "-E", whole, device.node().to_str().context("a path of text")?])?;
        let mount = Mount::new(device.node(), &folder.path().join("live"), "rw,noatime")?;
        let mut site = Site::new(folder.path())?;
        site.source(&["protect", &format!("data={}", device.node().display())])?;
        for option in ["interval_ms = 50", "cut_bound_ms = 1", &format!("freeze_deadline_ms = {freeze_deadline_ms}")] {
            site.set_group_option(option)?;
        }
        site.start_source()?;
        site.wait_for_points(1, PATIENCE)?;
        site.stop_source()?;
        let hot = Hot::start(&mount.folder().join("hot"))?;
        site.set_group_option("freeze = 'fallback'")?;
        Ok(Self { site, hot: Some(hot), mount: Some(mount), device: Some(device), file: Some(file), disk, folder })
    }

    /// From now on a read takes so long.
    fn read_takes(&self, ms: u64) {
        self.disk.read_ms.store(ms, Ordering::Relaxed);
    }

    fn hot(&self) -> &Hot {
        self.hot.as_ref().expect("it writes until the end")
    }

    fn is_frozen(&self) -> bool {
        let folder = self.folder.path().join("live").display().to_string();
        // To thaw what is not frozen is an error.
        tool("fsfreeze", &["--unfreeze", &folder]).is_ok()
    }

    /// An agent that says when it has frozen the file system, which it must not where its log may lie there.
    fn start_telling(&mut self) -> Result<()> {
        self.site.start_source_logging("info,cdp_source::agent::group::capturing=debug")
    }

    /// Waits until it has. Cuts take as long as their reads.
    fn wait_until_frozen(&mut self) -> Result<()> {
        self.site.source_daemon().wait_for_line(FROZEN, 3 * PATIENCE).map(drop)
    }

    /// The agent's process, once it can be asked.
    fn agent(&self) -> Result<Pid> {
        wait_for("the agent's process", PATIENCE, || {
            let document: Value = serde_json::from_str(&self.site.source(&["status", "--json"])?)?;
            Ok(document["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32)))
        })
    }

    /// What the watchdog says goes where the agent's own log goes.
    fn wait_for_watchdog(&mut self, text: &str) -> Result<()> {
        let log = self.site.source_daemon();
        wait_for(text, PATIENCE, || Ok(log.log().contains(text).then_some(())))
    }

    fn end(mut self) -> Result<()> {
        self.read_takes(0);
        self.hot.take().map_or(Ok(()), Hot::stop)?;
        self.mount.take().map_or(Ok(()), Mount::unmount)
    }
}

impl Drop for Frost {
    fn drop(&mut self) {
        self.read_takes(0);
        // Whatever went wrong, the writer is let go, and nobody holds the disk.
        let _ = self.site.kill_source();
        let _ = self.is_frozen();
        if let Some(hot) = self.hot.take() {
            let _ = hot.stop();
        }
        drop(self.mount.take());
        if let Some(device) = self.device.take() {
            let _ = device.detach();
        }
        drop(self.file.take());
        // The kernel lets the file go a moment after the device.
        let slow = self.folder.path().join("slow").display().to_string();
        let _ = wait_for("the disk's file to be free", PATIENCE, || {
            let is_gone = tool("mountpoint", &["-q", &slow]).is_err() || tool("umount", &[&slow]).is_ok();
            Ok(is_gone.then_some(()))
        });
    }
}

/// No cut validates while the blocks are written; the file system is frozen for an instant, the point is of class `filesystem`,
/// its journal has nothing to replay, and writes go on.
#[test]
fn where_no_cut_validates_a_point_is_made_with_the_file_system_frozen() -> Result<()> {
    if !cdp_tests::privileged("where_no_cut_validates_a_point_is_made_with_the_file_system_frozen") {
        return Ok(());
    }
    let mut frost = Frost::new(10_000)?;
    frost.read_takes(20);
    frost.site.start_source()?;
    let is_of = |entry: &Value, class: &str| entry["class"] == class;
    let frozen = wait_for("points of class filesystem", PATIENCE, || {
        let points = frost.site.points()?;
        let found: Vec<_> = points.into_iter().filter(|point| is_of(&point.document, "filesystem")).collect();
        Ok((found.len() > 2).then_some(found))
    })?;
    frost.hot().goes_on(PATIENCE)?;
    let status = frost.site.source_status()?;
    ensure!(status["freezes"].as_u64() >= Some(3) && status["freeze_failure"].is_null(), "{status}");
    let text = frost.site.source(&["status"])?;
    ensure!(text.contains("file systems frozen for a cut: "), "{text}");
    eprintln!("{text}");
    frost.site.stop_source()?;
    ensure!(!frost.is_frozen(), "the last freeze has not ended");
    let image = frost.folder.path().join("point.img");
    frost.site.export("data", frozen[0].epoch, &image)?;
    let text = image.to_str().context("a path of text")?;
    let superblock = tool("dumpe2fs", &["-h", text])?;
    ensure!(!superblock.contains("needs_recovery"), "the journal has something to replay: {superblock}");
    tool("e2fsck", &["-f", "-n", text])?;
    frost.end()
}

/// `kill -9` of the agent while the file system is frozen: the watchdog thaws at once, long before the deadline.
#[test]
fn a_killed_agent_leaves_nothing_frozen() -> Result<()> {
    if !cdp_tests::privileged("a_killed_agent_leaves_nothing_frozen") {
        return Ok(());
    }
    let mut frost = Frost::new(60_000)?;
    frost.read_takes(300);
    frost.start_telling()?;
    let pid = frost.agent()?;
    frost.wait_until_frozen()?;
    kill_process(pid, Signal::KILL)?;
    frost.hot().goes_on(Duration::from_secs(20))?;
    frost.wait_for_watchdog("thawed: the agent has died")?;
    frost.site.kill_source()?;
    ensure!(!frost.is_frozen(), "it is still frozen");
    frost.end()
}

/// An agent that does not go on while the file system is frozen: the watchdog thaws at the deadline, and what was cut is not called
/// a point of a frozen file system.
#[test]
fn at_the_deadline_it_is_thawed_whatever_the_agent_does() -> Result<()> {
    if !cdp_tests::privileged("at_the_deadline_it_is_thawed_whatever_the_agent_does") {
        return Ok(());
    }
    let mut frost = Frost::new(2000)?;
    frost.read_takes(300);
    frost.start_telling()?;
    let pid = frost.agent()?;
    frost.wait_until_frozen()?;
    kill_process(pid, Signal::STOP)?;
    let stopped = Instant::now();
    let went_on = frost.hot().goes_on(Duration::from_secs(30));
    eprintln!("writes went on {:?} after the agent was stopped", stopped.elapsed());
    kill_process(pid, Signal::CONT)?;
    went_on?;
    frost.wait_for_watchdog("thawed: the deadline has passed")?;
    frost.read_takes(20);
    frost.site.source_daemon().wait_for_line("it was thawed at the deadline", PATIENCE)?;
    frost.end()
}

fn hook(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the workspace");
    root.join("packaging/hooks").join(name).display().to_string()
}

fn asked_point(site: &Site, label: &str) -> Result<Value> {
    Ok(serde_json::from_str(&site.source(&["point", "--label", label, "--wait", "--json"])?)?)
}

fn epoch_of(point: &Value) -> Result<u64> {
    point["epoch"].as_u64().with_context(|| format!("an epoch in {point}"))
}

/// A volume with a folder that belongs to `user`, in an office that protects it.
struct Hosted {
    site: Site,
    mount: Mount,
    _device: LoopDevice,
    folder: tempfile::TempDir,
}

impl Hosted {
    fn new(user: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let device = LoopDevice::new(&folder.path().join("disk.img"), 384 * MIB)?;
        tool("mkfs.ext4", &["-q", "-F", device.node().to_str().context("a path of text")?])?;
        let mount = Mount::new(device.node(), &folder.path().join("live"), "rw")?;
        let site = Site::new(folder.path())?;
        site.source(&["protect", &format!("data={}", device.node().display())])?;
        tool("chown", &[user, mount.folder().to_str().context("a path of text")?])?;
        Ok(Self { site, mount, _device: device, folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Points around a checkpoint under load: PostgreSQL recovers from each with all that was committed before, and where it does not
/// run the point is made all the same, of class `crash`.
#[test]
fn a_point_with_the_postgresql_hook_recovers() -> Result<()> {
    const TEST: &str = "a_point_with_the_postgresql_hook_recovers";
    if !cdp_tests::privileged(TEST) {
        return Ok(());
    }
    let Some(programs) = postgres::programs(TEST) else { return Ok(()) };
    let mut hosted = Hosted::new(postgres::USER)?;
    let data = hosted.mount.folder().join("data");
    let settings = "shared_buffers = '16MB'\nmax_wal_size = '64MB'\nmin_wal_size = '32MB'\nlog_checkpoints = on\n";
    Postgres::init(&programs, &data, settings)?;
    let sockets = hosted.path("run").display().to_string();
    hosted.site.set_group_option(&format!("hooks.pre_cut = ['{}', '--host={sockets}']", hook("postgresql")))?;
    hosted.site.set_group_option("hooks.deadline_ms = 60000")?;
    hosted.site.start_source()?;
    hosted.site.wait_for_points(1, PATIENCE)?;
    let postgres = Postgres::start(&programs, &data, &hosted.path("run"))?;
    postgres.tool("pgbench", &["-i", "-q", "-s", "2"])?;
    postgres.sql("create table marks(number integer primary key)")?;
    let mut load = Daemon::start(&mut postgres.command("pgbench", &["-c", "2", "-T", "300"]))?;
    let mut points = Vec::new();
    for number in 1..=3 {
        postgres.sql(&format!("insert into marks values({number})"))?;
        let point = asked_point(&hosted.site, &format!("mark-{number}"))?;
        ensure!(point["class"] == "application" && point["warning"].is_null(), "{point}");
        points.push((number, epoch_of(&point)?));
    }
    ensure!(load.is_running()?, "pgbench has ended: {}", load.log());
    load.kill()?;
    ensure!(postgres.log().contains("checkpoint starting: immediate force wait"), "{}", postgres.log());
    eprintln!("{}", hosted.site.source(&["status"])?);
    postgres.stop()?;
    let point = asked_point(&hosted.site, "without")?;
    let warning = point["warning"].as_str().unwrap_or_default();
    ensure!(point["class"] == "crash" && warning.starts_with("the pre-cut hook ended with status"), "{point}");
    for (number, epoch) in points {
        let image = hosted.path("point.img");
        hosted.site.export("data", epoch, &image)?;
        check_ext4(&image, hosted.folder.path(), |root| {
            let restored = Postgres::start(&programs, &root.join("data"), &hosted.path("run-restored"))?;
            ensure!(restored.log().contains("automatic recovery in progress"), "{}", restored.log());
            let marks = restored.sql("select count(*) from marks")?;
            ensure!(marks == number.to_string(), "{marks} marks at the point behind the mark {number}");
            // What pgbench moves stays as much as it was in all.
            let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)";
            let sums = restored.sql(sums)?;
            ensure!(sums == "t" || sums.is_empty(), "the accounts do not add up: {sums}");
            restored.stop()
        })
        .with_context(|| format!("point {epoch}"))?;
        fs::remove_file(&image)?;
    }
    let hosted_site = &mut hosted.site;
    hosted_site.stop_source()
}

/// `MyISAM` tables, written to without pause, are closed and whole in a point that is cut under the read lock, and writes go on after it.
#[test]
fn a_point_with_the_mariadb_hook_has_whole_tables() -> Result<()> {
    const TEST: &str = "a_point_with_the_mariadb_hook_has_whole_tables";
    if !cdp_tests::privileged(TEST) || !cdp_tests::has(TEST, "/usr/sbin/mariadbd") {
        return Ok(());
    }
    let mut hosted = Hosted::new("mysql")?;
    let data = hosted.mount.folder().join("data").display().to_string();
    let socket = hosted.path("live/mariadb.sock").display().to_string();
    tool("mariadb-install-db", &["--no-defaults", "--user=mysql", &format!("--datadir={data}"), "--skip-test-db"])?;
    let options = [
        "--no-defaults",
        &format!("--datadir={data}"),
        &format!("--socket={socket}"),
        "--skip-networking",
        "--innodb-buffer-pool-size=16M",
        "--innodb-log-file-size=8M",
    ];
    let mut server = Daemon::start(&mut as_user("mysql", Path::new("/usr/sbin/mariadbd"), &options))?;
    server.wait_for_line("ready for connections", PATIENCE)?;
    let client = [format!("--socket={socket}"), "--batch".to_owned(), "--skip-column-names".to_owned()];
    let sql = |text: &str| run(Command::new("mariadb").arg("--no-defaults").args(&client).args(["-e", text]));
    sql(
        "create database shop; create table shop.log(id integer auto_increment primary key, word varchar(200), index(word)) engine=myisam",
    )?;
    let command = |name: &str| format!("hooks.{name} = ['{}', '--no-defaults', '--socket={socket}']", hook("mariadb"));
    hosted.site.set_group_option(&command("pre_cut"))?;
    hosted.site.set_group_option(&command("post_cut"))?;
    hosted.site.start_source()?;
    hosted.site.wait_for_points(1, PATIENCE)?;
    let writes = "delimiter //\ncreate procedure shop.write_on() begin while true do insert into shop.log(word) values(repeat(uuid(), 5)); end while; end//";
    run(Command::new("mariadb").arg("--no-defaults").args(&client).args(["-e", writes]))?;
    let mut load =
        Daemon::start(Command::new("mariadb").arg("--no-defaults").args(&client).args(["-e", "call shop.write_on()"]))?;
    let count = || -> Result<u64> { Ok(sql("select count(*) from shop.log")?.trim().parse()?) };
    wait_for("rows", PATIENCE, || Ok((count()? > 100).then_some(())))?;
    for round in 0..3 {
        let rows = count()?;
        let point = asked_point(&hosted.site, &format!("round-{round}"))?;
        ensure!(point["class"] == "application" && point["warning"].is_null(), "{point}");
        let post_cut = wait_for("post-cut", PATIENCE, || {
            let run = hosted.site.source_status()?["hooks"]["post_cut"].clone();
            Ok(run.is_object().then_some(run))
        })?;
        ensure!(post_cut["exit_status"] == 0, "{post_cut}");
        let after = count()?;
        wait_for("writes to go on", PATIENCE, || Ok((count()? > after).then_some(())))?;
        let image = hosted.path("point.img");
        hosted.site.export("data", epoch_of(&point)?, &image)?;
        check_ext4(&image, hosted.folder.path(), |root| {
            let table = root.join("data/shop/log.MYI").display().to_string();
            let said = run(Command::new("myisamchk").arg("--extend-check").arg(&table))?;
            ensure!(!said.contains("warning") && !said.contains("error"), "{said}");
            let records = said.lines().find_map(|line| line.strip_prefix("Data records:"));
            let records = records.and_then(|line| line.split_whitespace().next()).context("records")?;
            ensure!(records.parse::<u64>()? >= rows, "{records} records, {rows} before the point was asked for");
            Ok(())
        })?;
        fs::remove_file(&image)?;
    }
    if !load.is_running()? {
        bail!("the writer has ended: {}", load.log());
    }
    eprintln!("{}", hosted.site.source(&["status"])?);
    load.kill()?;
    hosted.site.stop_source()?;
    server.stop()
}

#[test]
fn the_plain_hook_has_everything_written_back() -> Result<()> {
    if !cdp_tests::privileged("the_plain_hook_has_everything_written_back") {
        return Ok(());
    }
    let mut hosted = Hosted::new("root")?;
    let live = hosted.mount.folder().to_owned();
    hosted.site.set_group_option(&format!("hooks.pre_cut = ['{}', '{}']", hook("plain"), live.display()))?;
    hosted.site.set_group_option(&format!("hooks.post_cut = ['{}']", hook("plain")))?;
    hosted.site.start_source()?;
    hosted.site.wait_for_points(1, PATIENCE)?;
    fs::write(live.join("letter"), "not synced by whoever wrote it")?;
    let point = asked_point(&hosted.site, "written")?;
    ensure!(point["class"] == "application", "{point}");
    let image = hosted.path("point.img");
    hosted.site.export("data", epoch_of(&point)?, &image)?;
    let letter = check_ext4(&image, hosted.folder.path(), |root| Ok(fs::read_to_string(root.join("letter"))?))?;
    ensure!(letter == "not synced by whoever wrote it", "{letter}");
    let post_cut = wait_for("post-cut", PATIENCE, || {
        let run = hosted.site.source_status()?["hooks"]["post_cut"].clone();
        Ok(run.is_object().then_some(run))
    })?;
    ensure!(post_cut["output"] == format!("group main: point {}", point["epoch"]), "{post_cut}");
    hosted.site.stop_source()
}

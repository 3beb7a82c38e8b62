//! PostgreSQL writes, and every point cut meanwhile is a database that recovers, checks clean and adds up.
//!
//! The points are exported, mounted, and started as a user would after a disaster. `CDP_POSTGRESQL_POINTS` is how many. Needs
//! root, kernel BTF, loop devices and PostgreSQL; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::image::check_ext4;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::postgres::{self, Postgres};
use cdp_tests::process::{Daemon, tool};
use cdp_tests::site::{PATIENCE, Point, Site};
use cdp_tests::sqlite::{Committed, now_ms};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

const TEST: &str = "every_point_under_pgbench_recovers_and_adds_up";
const VOLUME_BYTES: u64 = 384 << 20;
/// Points that are started, where nothing else is said.
const POINTS: usize = 10;
/// Points that are made at least, one a second: those that are started are spread over them.
const POINTS_MADE_MIN: usize = 15;
/// Small buffers and short checkpoints: data files are written all the time, and not only the log.
const SETTINGS: &str =
    "shared_buffers = '16MB'\nmax_wal_size = '64MB'\nmin_wal_size = '32MB'\ncheckpoint_timeout = '30s'\n";
/// A thousand accounts with a thousand each, and what was moved between them.
const LEDGER: &str = "
    create table ledger(account integer primary key, balance bigint not null);
    insert into ledger select account, 1000 from generate_series(1, 1000) account;
    create table transfers(number bigserial primary key, giver integer not null, taker integer not null, amount bigint not null);
    create index transfers_giver on transfers(giver);
    create table marks(number bigint primary key);";
/// A transaction of `pgbench`'s; accounts in one order, so that none waits for another in a circle.
const TRANSFER: &str = "
    \\set one random(1, 1000)
    \\set other random(1, 1000)
    \\set amount random(-100, 100)
    begin;
    update ledger set balance = balance - :amount where account = least(:one, :other);
    update ledger set balance = balance + :amount where account = greatest(:one, :other);
    insert into transfers(giver, taker, amount) values(least(:one, :other), greatest(:one, :other), :amount);
    end;";
/// What is wrong with the ledger: nothing, in a row of zeros.
const LEDGER_ERRORS: &str = "
    select abs((select sum(balance) from ledger) - 1000000)
         + (select count(*) from ledger left join
              (select account, sum(amount) as moved from
                 (select giver as account, -amount as amount from transfers union all select taker, amount from transfers) as sides
               group by account) as movements using (account)
            where balance <> 1000 + coalesce(moved, 0))";
/// What `pgbench` moves stays as much as it was in all.
const BENCH_ERRORS: &str = "
    select count(*) from (values ((select sum(abalance) from pgbench_accounts)), ((select sum(bbalance) from pgbench_branches)),
         ((select sum(tbalance) from pgbench_tellers))) as sums(sum)
    where sum <> (select coalesce(sum(delta), 0) from pgbench_history)";

/// Transfers and `pgbench`'s own transactions, until there are `count` points; gives when which mark was committed.
fn load(site: &Site, postgres: &Postgres, folder: &Path, count: usize) -> Result<Vec<Committed>> {
    let script = folder.join("transfer.sql");
    fs::write(&script, TRANSFER)?;
    let transfer = script.to_str().context("a path of text")?;
    let arguments = ["-n", "-c", "6", "-R", "600", "-T", "3600", "-b", "tpcb-like@1", "-f", &format!("{transfer}@2")];
    let mut running = Daemon::start(&mut postgres.command("pgbench", &arguments))?;
    let deadline = now_ms() + PATIENCE.as_millis() as i64 + 3000 * count as i64;
    let mut marks = Vec::new();
    let mut counter = 0;
    while site.points()?.len() < count {
        ensure!(now_ms() < deadline, "{} of {count} points: {}", site.points()?.len(), site.source_status()?);
        ensure!(running.is_running()?, "pgbench has ended: {}", running.log());
        counter += 1;
        postgres.sql(&format!("insert into marks values({counter})"))?;
        marks.push(Committed { counter, at_ms: now_ms() });
        std::thread::park_timeout(Duration::from_millis(200));
    }
    ensure!(running.is_running()?, "pgbench has ended: {}", running.log());
    running.kill()?;
    Ok(marks)
}

/// Starts the database of a restored folder and asks it whether all is well; gives the number of transfers it holds.
fn recovers(programs: &Path, root: &Path, sockets: &Path, due: i64) -> Result<u64> {
    let restored = Postgres::start(programs, &root.join("data"), sockets)?;
    let log = restored.log();
    ensure!(log.contains("automatic recovery in progress"), "it was not running: {log}");
    restored.tool("pg_amcheck", &["--install-missing", "--heapallindexed", "--rootdescend"])?;
    for (what, errors) in [("the ledger", LEDGER_ERRORS), ("pgbench", BENCH_ERRORS)] {
        let found = restored.sql(errors)?;
        ensure!(found == "0", "{what} does not add up: {found}");
    }
    let newest: i64 = restored.sql("select coalesce(max(number), 0) from marks")?.parse()?;
    ensure!(newest >= due, "mark {newest} is the newest, {due} was committed before the cut");
    let transfers = restored.sql("select count(*) from transfers")?.parse()?;
    restored.stop()?;
    Ok(transfers)
}

fn began_ms(point: &Point) -> Result<i64> {
    let instant: jiff::Timestamp = point.time.parse()?;
    Ok(instant.as_millisecond() - point.cut_ms.ceil() as i64)
}

#[test]
fn every_point_under_pgbench_recovers_and_adds_up() -> Result<()> {
    if !cdp_tests::privileged(TEST) {
        return Ok(());
    }
    let Some(programs) = postgres::programs(TEST) else { return Ok(()) };
    let wanted = std::env::var("CDP_POSTGRESQL_POINTS").map_or(Ok(POINTS), |number| number.parse())?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let device = LoopDevice::new(&path("disk.img"), VOLUME_BYTES)?;
    tool("mkfs.ext4", &["-q", "-F", device.node().to_str().context("a path of text")?])?;
    let mount = Mount::new(device.node(), &path("live"), "rw")?;
    Postgres::init(&programs, &mount.folder().join("data"), SETTINGS)?;
    let postgres = Postgres::start(&programs, &mount.folder().join("data"), &path("run"))?;
    postgres.tool("pgbench", &["-i", "-q", "-s", "2"])?;
    postgres.sql(LEDGER)?;

    let mut site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.start_source()?;
    let before = site.wait_for_points(1, PATIENCE)?.len();
    let marks = load(&site, &postgres, folder.path(), before + wanted.max(POINTS_MADE_MIN))?;
    site.stop_source()?;
    postgres.stop()?;

    let points = site.points()?.split_off(before);
    let sample: Vec<&Point> = points.iter().step_by((points.len() / wanted).max(1)).take(wanted).collect();
    ensure!(sample.len() == wanted, "{} points in all", points.len());
    let mut transfers = 0;
    for point in sample {
        let image = path("point.img");
        site.export("data", point.epoch, &image)?;
        let began_ms = began_ms(point)?;
        let due = marks.iter().rev().find(|mark| mark.at_ms < began_ms).map_or(0, |mark| mark.counter);
        let found = check_ext4(&image, folder.path(), |root| recovers(&programs, root, &path("restored"), due));
        let found = found.with_context(|| format!("point {}", point.epoch))?;
        ensure!(found >= transfers, "{found} transfers at point {}, {transfers} before", point.epoch);
        transfers = found;
        fs::remove_file(&image)?;
    }
    eprintln!("{wanted} of {} points started; {transfers} transfers in the last, {} marks", points.len(), marks.len());
    ensure!(transfers > 0, "nothing was moved");
    mount.unmount()
}

//! Checkpoints and pruning as an operator meets them: with a server and without, previews, refusals, the audit log, readers beside.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;

use cdp_target::journal::JournalLimits;
use cli_support::{GROUP, Server, Store, program};
use serde_json::json;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Stdio};

/// Points are kept for ever by the day and not otherwise: of a filled store the first and the newest stay.
fn daily(store: &Store) {
    let config = store.data().join("target.toml");
    let text = std::fs::read_to_string(&config).expect("configured");
    let set = text.lines().map(|line| match line.split(" = ").next() {
        Some("retention.every_s" | "retention.hourly_s" | "retention.weekly_s") => {
            format!("{} = 0", line.split(" = ").next().unwrap_or_default())
        }
        Some("retention.daily_s") => "retention.daily_s = 3000000000".to_owned(),
        _ => line.to_owned(),
    });
    let set: Vec<String> = set.collect();
    assert!(set.iter().any(|line| line == "retention.daily_s = 3000000000"), "{text}");
    std::fs::write(&config, set.join("\n") + "\n").expect("written");
}

fn group_folder(store: &Store) -> PathBuf {
    let offices = std::fs::read_dir(store.data().join("offices")).expect("listed");
    let office = offices.map(|entry| entry.expect("an entry").path()).next().expect("an office");
    office.join(format!("groups/{GROUP}"))
}

fn epochs(store: &Store) -> Vec<u64> {
    let listed = store.json(&["points", "paris/main", "--json"]);
    let points = listed["points"].as_array().expect("points");
    points.iter().map(|point| point["epoch"].as_u64().expect("a number")).collect()
}

/// Exports a point; compares it.
fn exported(store: &Store, epoch: &str, image: &[u8]) {
    let file = store.path(&format!("{epoch}.raw"));
    store.done(&["export", "paris/main/root", "--at", epoch, "--output", file.to_str().expect("text"), "--force"]);
    assert!(std::fs::read(&file).expect("exported") == image, "point {epoch} differs");
}

/// Puts another value in the configuration.
fn set(store: &Store, key: &str, value: &str) {
    let config = store.data().join("target.toml");
    let text = std::fs::read_to_string(&config).expect("configured");
    let is_key = |line: &str| line.split(" = ").next() == Some(key);
    assert!(text.lines().any(is_key), "{key} in {text}");
    let lines = text.lines().map(|line| if is_key(line) { format!("{key} = {value}") } else { line.to_owned() });
    std::fs::write(&config, lines.collect::<Vec<_>>().join("\n") + "\n").expect("written");
}

#[test]
fn points_go_as_the_ladder_says_with_a_server_and_without() {
    for with_server in [true, false] {
        let store = Store::new();
        let images = store.fill_within(JournalLimits { segment_bytes_max: 3000 });
        daily(&store);
        let server = with_server.then(|| Server::start(&store));
        let made = store.json(&["checkpoint", "paris/main", "--at", "2", "--json"]);
        assert_eq!((&made["epoch"], &made["lost_blocks"]), (&2.into(), &0.into()));
        assert_eq!(made["held_bytes"], made["needed_bytes"]);
        let said = store.done(&["checkpoint", "paris/main"]);
        assert!(said.starts_with("checkpoint of paris/main at point 3 (2026-11-10T00:03:00.000Z): "), "{said}");

        let preview = store.json(&["prune", "paris/main", "--dry-run", "--accept-clock", "--json"]);
        assert_eq!(preview["kept"], 2);
        let goes = json!([{
            "epoch": 2, "time": "2026-11-10T00:02:00.000Z", "received": "2026-11-10T00:02:00.200Z",
            "reason": "1 stands for its day"
        }]);
        assert_eq!(preview["removed"], goes);
        let said = store.done(&["prune", "paris/main", "--dry-run", "--accept-clock"]);
        assert!(said.contains("1 points of paris/main would go, 2 stay; about "), "{said}");
        assert!(said.contains("the ladder as configured"), "{said}");
        assert_eq!(epochs(&store), [1, 2, 3], "nothing went");

        let done = store.json(&["prune", "paris/main", "--accept-clock", "--json"]);
        assert_eq!((&done["points"], &done["kept"], &done["leased"]), (&1.into(), &2.into(), &false.into()));
        assert_eq!(epochs(&store), [1, 3]);
        store.refused(&["export", "paris/main/root", "--at", "2", "--output", "x"], &["there is no point 2"]);
        exported(&store, "1", &images[0]);
        exported(&store, "3", &images[2]);
        store.done(&["verify", "paris/main"]);
        let audit = std::fs::read_to_string(group_folder(&store).join("audit.log")).expect("there");
        let line: serde_json::Value = serde_json::from_str(audit.trim_end()).expect("one line of JSON");
        assert_eq!((&line["removed"], &line["reason"]), (&2.into(), &"1 stands for its day".into()));
        let again = store.done(&["prune", "paris/main"]);
        assert!(again.starts_with("0 points of paris/main removed, 2 stay"), "{again}");
        if let Some(server) = server {
            server.end();
        }
        // What it left opens again.
        let server = Server::start(&store);
        assert_eq!(epochs(&store), [1, 3]);
        server.end();
    }
}

#[test]
fn what_is_pinned_or_labelled_stays_and_settings_that_leave_nothing_are_refused() {
    let store = Store::new();
    let images = store.fill();
    daily(&store);
    store.done(&["pin", "paris/main", "2"]);
    let done = store.json(&["prune", "paris/main", "--accept-clock", "--json"]);
    assert_eq!((&done["points"], &done["kept"]), (&0.into(), &3.into()));
    store.done(&["unpin", "paris/main", "2"]);
    let config = store.data().join("target.toml");
    let text = std::fs::read_to_string(&config).expect("configured");
    std::fs::write(&config, text.replace("retention.daily_s = 3000000000", "retention.daily_s = 0")).expect("written");
    for preview in
        [&["prune", "paris/main", "--accept-clock"][..], &["prune", "paris/main", "--accept-clock", "--dry-run"]]
    {
        store.refused(preview, &["all 3 points but the newest", "--keep-only-newest"]);
    }
    assert_eq!(epochs(&store), [1, 2, 3], "nothing went");
    store.done(&["prune", "paris/main", "--accept-clock", "--keep-only-newest"]);
    assert_eq!(epochs(&store), [3]);
    exported(&store, "3", &images[2]);
    store.done(&["verify", "paris/main"]);
}

#[test]
fn the_newest_point_that_is_whole_stays_where_what_came_behind_it_is_damaged() {
    let store = Store::new();
    let images = store.fill_within(JournalLimits { segment_bytes_max: 1 });
    daily(&store);
    store.done(&["prune", "paris/main", "--accept-clock"]);
    assert_eq!(epochs(&store), [1, 3]);
    let mut segments = std::fs::read_dir(group_folder(&store).join("journal")).expect("listed").flatten();
    let content = segments.find_map(|segment| {
        let described = store.json(&["inspect", segment.path().to_str().expect("text"), "--json"]);
        let mut frames = described["frames"].as_array().expect("frames").iter();
        let frame = frames.find(|frame| frame["epoch"] == 3 && frame["blocks"].as_u64() > Some(0))?;
        Some((segment.path(), frame["offset"].as_u64().expect("a number") as usize + 120))
    });
    let (segment, inside) = content.expect("the content of point 3");
    let mut bytes = std::fs::read(&segment).expect("read");
    bytes[inside] ^= 1;
    std::fs::write(&segment, bytes).expect("written");
    set(&store, "scrub_interval_s", "1");
    let server = Server::start(&store);
    let start = std::time::Instant::now();
    while !store.done(&["points", "paris/main"]).contains("damaged") {
        assert!(start.elapsed().as_secs() < 30, "the damage is waited for in vain");
        std::thread::park_timeout(std::time::Duration::from_millis(50));
    }
    server.end();
    // By the ladder alone nothing stays but the newest that it sees: 2, which went.
    set(&store, "retention.daily_s", "0");
    store.done(&["prune", "paris/main", "--accept-clock", "--keep-only-newest"]);
    assert_eq!(epochs(&store), [1, 3]);
    exported(&store, "1", &images[0]);
}

#[test]
fn whoever_lists_points_holds_what_it_reads() {
    for command in [
        &["points", "paris/main"][..],
        &["label", "paris/main", "2", "before-upgrade"],
        &["pin", "paris/main", "2"],
        &["checkpoint", "paris/main"],
        &["prune", "paris/main", "--dry-run", "--accept-clock"],
    ] {
        let store = Store::new();
        store.fill();
        daily(&store);
        let leases = group_folder(&store).join("leases");
        assert!(!leases.exists());
        store.done(command);
        let left = std::fs::read_dir(&leases).expect("a lease was taken").count();
        assert_eq!(left, 0, "{command:?}: it went with its reader");
    }
}

#[test]
fn a_clock_that_jumped_removes_nothing() {
    let store = Store::new();
    store.fill();
    daily(&store);
    store.done(&["prune", "paris/main", "--accept-clock"]);
    // As if that had been 40 days ago.
    let clock = group_folder(&store).join("retention-clock");
    let now = std::fs::metadata(&clock).and_then(|file| file.modified()).expect("just written");
    let now_ms = now.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_millis() as u64;
    std::fs::write(&clock, format!("{{\"now\":{}}}", now_ms - 40 * 86_400_000)).expect("written");
    store.refused(&["prune", "paris/main"], &["moved on by 40 days", "--accept-clock"]);
    store.refused(&["prune", "paris/main", "--dry-run"], &["moved on by 40 days"]);
    store.done(&["prune", "paris/main", "--accept-clock"]);
    store.done(&["prune", "paris/main"]);
}

/// An export that has begun: its first bytes came, and it waits for us to take more.
struct Export(Child);

impl Export {
    fn begin(store: &Store, epoch: &str) -> (Self, Vec<u8>) {
        let mut child = program()
            .args(["export", "paris/main/root", "--at", epoch, "--output", "-"])
            .env("CDP_TARGET_DATA", store.data())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let mut first = vec![0; 4096];
        child.stdout.as_mut().expect("piped").read_exact(&mut first).expect("the first block");
        (Self(child), first)
    }

    fn finish(mut self, mut image: Vec<u8>) -> Vec<u8> {
        self.0.stdout.take().expect("piped").read_to_end(&mut image).expect("the rest");
        assert!(self.0.wait().expect("it ends").success());
        image
    }
}

#[test]
fn an_export_while_prune_runs_holds_what_it_reads() {
    for with_server in [true, false] {
        let store = Store::new();
        let images = store.fill_with_noise(6);
        daily(&store);
        let server = with_server.then(|| Server::start(&store));
        // The pipe holds 64 KiB of its 2.4 MB: it cannot end before we read.
        let (export, first) = Export::begin(&store, "2");
        let done = store.json(&["prune", "paris/main", "--accept-clock", "--json"]);
        assert_eq!((&done["points"], &done["leased"]), (&4.into(), &true.into()));
        assert_eq!(epochs(&store), [1, 6], "the point is gone for everybody else");
        assert!(export.finish(first) == images[1], "the export is of point 2, whole");
        let done = store.json(&["prune", "paris/main", "--json"]);
        assert_eq!(done["leased"], false);
        assert!(done["bytes_after"].as_u64() < done["bytes_before"].as_u64(), "{done}");
        exported(&store, "1", &images[0]);
        exported(&store, "6", &images[5]);
        store.done(&["verify", "paris/main"]);
        drop(server);
    }
}

//! The program as an operator meets it: exit status, error and hint for what goes wrong, and what goes right.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;

use cdp_protocol::bundle::Bundle;
use cdp_protocol::escrow;
use cdp_protocol::frame;
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{
    self, Instance, OpenGroup, PROTOCOL_VERSION, RefusalReason, SourceMessage, TargetMessage, Verdict,
};
use cdp_protocol::record::Predecessor;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Epoch, Generation, GroupId, Head, KeyId, Timestamp, VolumeSlot,
};
use cdp_seams::clock::SystemClock;
use cdp_seams::line::{Control, Line, read_packet, write_packet};
use cdp_seams::storage::SystemStorage;
use cdp_source::connect::{Identity, QuicConnector};
use cdp_source::join::join;
use cdp_target::journal::JournalLimits;
use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use tokio::io::AsyncWriteExt;

use cli_support::{
    BLOCKS, GROUP, SIZE_BYTES, Server, Store, epoch_frames, epoch_frames_like, program, refused, volume,
};

#[test]
fn a_command_line_that_is_wrong_is_said_in_two_lines() {
    let store = Store { folder: tempfile::tempdir().expect("a folder") };
    for (arguments, word) in [
        (&[][..], "no command given"),
        (&["statsu"], "status"),
        (&["points"], "OFFICE/GROUP"),
        (&["points", "paris"], "OFFICE/GROUP"),
        (&["points", "paris/main/root"], "without a volume"),
        (&["export", "paris/main", "--at", "latest"], "--output"),
        (&["export", "paris/main", "--at", "latest", "--output", "x", "--format", "vmdk"], "qcow2"),
        (&["enroll", "paris", "--output", "x", "--expires", "soon"], "24h"),
        (&["init", "--listen", "here"], "here"),
        (&["init", "--name", "a b"], "a host name"),
        (&["prunes", "paris/main"], "prune"),
        (&["status"], "is no store of cdp-target"),
    ] {
        store.refused(arguments, &[word]);
    }
    assert!(store.done(&["--help"]).contains("export"));
    assert!(store.done(&["--version"]).starts_with("cdp-target "));
}

#[test]
fn a_store_is_not_made_over_anything_and_not_opened_when_it_is_newer() {
    let store = Store::new();
    store.refused(&["init"], &["is not empty"]);
    let status = store.json(&["status", "--json"]);
    assert_eq!(status["offices"], Value::Array(vec![]));
    assert_eq!(status["listening"], Value::Null);

    let config = store.data().join("target.toml");
    let text = std::fs::read_to_string(&config).expect("configured");
    std::fs::write(&config, format!("{text}segment_byte_max = 5\n")).expect("written");
    let line = format!("target.toml: line {}: unknown key `segment_byte_max`", text.lines().count() + 1);
    store.refused(&["status"], &[&line, "`segment_bytes_max`"]);
    std::fs::write(&config, text).expect("written");

    let marker = store.data().join("store.json");
    let text = std::fs::read_to_string(&marker).expect("there");
    std::fs::write(&marker, text.replace("\"version\": 1", "\"version\": 9")).expect("written");
    store.refused(&["serve"], &["has format 9", "reads up to 1"]);
}

#[test]
fn an_office_is_enrolled_once_and_its_bundle_never_overwritten() {
    let store = Store::new();
    let file = store.path("paris.bundle");
    let output = file.to_str().expect("text");
    store.refused(&["enroll", "paris", "--output", output], &["port 0"]);
    assert!(!file.exists(), "an empty bundle is worse than none");
    let bundle = store.enroll("paris");
    assert_eq!(bundle.targets, ["backup.example:7443"]);
    store.refused(&["enroll", "paris", "--output", output], &["write bundle"]);
    let other = store.path("other");
    store.refused(&["enroll", "lyon", "--output", other.to_str().expect("text"), "--replace"], &["lyon"]);
    store.refused(&["enroll", "a b", "--output", other.to_str().expect("text")], &["a b"]);
    assert!(!other.exists());
    assert_eq!(store.json(&["status", "--json"])["offices"][0]["state"], "invited");
}

#[test]
fn points_of_a_source_whose_clock_went_back_a_day_stay_in_order_and_their_times_are_doubtful() {
    const DAY_MS: i64 = 24 * 3600 * 1000;
    let store = Store::new();
    store.fill_with_a_clock_set_back(DAY_MS);
    let document = store.json(&["points", "paris/main", "--json"]);
    let points = document["points"].as_array().expect("a list");
    let texts = |key: &str| -> Vec<&str> { points.iter().map(|point| point[key].as_str().unwrap_or("none")).collect() };
    let (times, cut_times) = (texts("time"), texts("cut_time"));
    assert!(times.is_sorted() && !cut_times.is_sorted(), "{times:?}, {cut_times:?}");
    let doubt = |cut_time: &&str| format!("its time is doubtful: the source's clock said {cut_time}");
    let doubts: Vec<String> = cut_times[2..].iter().map(doubt).collect();
    assert_eq!(texts("warning"), ["none", "none", &doubts[0], &doubts[1]]);
    assert!(store.done(&["points", "paris/main"]).contains("its time is doubtful"));
}

#[test]
fn points_are_listed_named_and_exported() {
    let store = Store::new();
    let images = store.fill();
    let listed = store.json(&["points", "paris/main", "--json"]);
    let points = listed["points"].as_array().expect("points");
    assert_eq!(points.len(), 3);
    assert_eq!((&points[1]["epoch"], &points[1]["time"]), (&2.into(), &"2026-11-10T00:02:00.000Z".into()));
    assert_eq!((&points[1]["cut_ms"], &points[1]["cut_rounds"]), (&1.5.into(), &2.into()));
    let until =
        ["points", "paris/main", "--since", "2026-11-10T00:02:00Z", "--until", "2026-11-10T00:02:30Z", "--json"];
    assert_eq!(store.json(&until)["points"].as_array().expect("points").len(), 1);
    assert_eq!(store.done(&["points", "paris/main"]).lines().count(), 4);

    for (index, at) in ["1", "2026-11-10T00:02:59Z", "latest"].into_iter().enumerate() {
        let file = store.path(&format!("{index}.raw"));
        let output = file.to_str().expect("text");
        let exported = store.json(&["export", "paris/main/root", "--at", at, "--output", output, "--json"]);
        assert!(std::fs::read(&file).expect("exported") == images[index], "point {at} differs");
        let hash = blake3::hash(&images[index]).to_hex().to_string();
        assert_eq!(exported["images"][0]["blake3"], hash.as_str());
        assert_eq!(exported["epoch"], index + 1);
    }
    let streamed = store.run(&["export", "paris/main/root", "--at", "2", "--output", "-"]);
    assert!(streamed.status.success() && streamed.stdout == images[1], "stdout differs");
    let folder = store.path("all");
    store.done(&["export", "paris/main", "--at", "3", "--output", folder.to_str().expect("text")]);
    assert!(std::fs::read(folder.join("root.raw")).expect("exported") == images[2], "the group's image differs");

    store.done(&["label", "paris/main", "2", "before-upgrade"]);
    store.done(&["label", "paris/main", "2", "before-upgrade"]);
    store.refused(&["label", "paris/main", "3", "before-upgrade"], &["point 2's"]);
    let labelled = store.json(&["points", "paris/main", "--json"]);
    assert_eq!(labelled["points"][1]["label"], "before-upgrade");
    assert_eq!(labelled["points"][1]["pinned"], false);
    for (verb, pinned) in [("pin", true), ("pin", true), ("unpin", false), ("unpin", false), ("pin", true)] {
        store.done(&[verb, "paris/main", "before-upgrade"]);
        assert_eq!(store.json(&["points", "paris/main", "--json"])["points"][1]["pinned"], pinned, "{verb}");
    }
    let output = store.path("labelled.raw");
    store.done(&["export", "paris/main/root", "--at", "before-upgrade", "--output", output.to_str().expect("text")]);
    assert!(std::fs::read(&output).expect("exported") == images[1], "the labelled point differs");
}

#[test]
fn what_is_asked_for_wrongly_is_refused_and_changes_nothing() {
    let store = Store::new();
    store.fill();
    let taken = store.path("taken.raw");
    std::fs::write(&taken, b"mine").expect("written");
    let (taken_path, new) = (taken.to_str().expect("text"), store.path("new.raw"));
    let new = new.to_str().expect("text");
    let export = |group, at, output| ["export", group, "--at", at, "--output", output];
    for (arguments, words) in [
        (&export("paris/main/root", "2026-11-10T00:00:30Z", new)[..], &["there is none before", "after is 1 ("][..]),
        (&export("paris/main/root", "4", new), &["no point 4", "nearest before is 3 (2026-11-10T00:03:00.000Z)"]),
        (&export("paris/main/root", "2036-11-10T00:00:00Z", new), &["in the future"]),
        (&export("paris/main/root", "2026-11-10T00:02:00", new), &["needs its zone"]),
        (&export("paris/main/root", "99999999d", new), &["beyond the calendar"]),
        (&export("paris/main/root", "?", new), &["`?` is no point"]),
        (&export("paris/main/root", "nightly", new), &["no point `nightly`"]),
        (&export("paris/main/boot", "latest", new), &["no volume boot", "root"]),
        (&export("paris/mian", "latest", new), &["no group mian", "did you mean main?"]),
        (&export("pariss/main", "latest", new), &["no office pariss", "did you mean paris?"]),
        (&export("paris/main/root", "latest", taken_path), &["taken.raw exists", "--force"]),
        (&export("paris/main", "latest", taken_path), &["is no folder"]),
        (&export("paris/main", "latest", "-"), &["does not go to stdout"]),
        (&export("paris/main/root", "latest", "/proc/none/x"), &["/proc/none", "a folder that exists"]),
        (&["label", "paris/main", "2", "12"], &["a number"]),
        (&["label", "paris/main", "2", "10m"], &["an age"]),
        (&["label", "paris/main", "2", "latest"], &["the newest point"]),
        (&["label", "paris/main", "2", "2026-11-10"], &["a time"]),
        (&["label", "paris/main", "9", "x"], &["no point 9"]),
        (&["pin", "paris/main", "9"], &["pin point 9 of paris/main", "no point 9"]),
        (&["unpin", "paris/main", "nightly"], &["no point `nightly`"]),
        (&["points", "paris/main", "--since", "yesterday"], &["yesterday"]),
    ] {
        store.refused(arguments, words);
    }
    assert_eq!(std::fs::read(&taken).expect("there"), b"mine");
    assert!(!Path::new(new).exists());
    let left: Vec<_> =
        std::fs::read_dir(store.folder.path()).expect("listed").map(|entry| entry.expect("entry")).collect();
    assert_eq!(left.len(), 3, "the store, the bundle, the file in the way: {left:?}");
    store.done(&["export", "paris/main/root", "--at", "latest", "--output", taken_path, "--force"]);
    assert_eq!(std::fs::metadata(&taken).expect("there").len(), SIZE_BYTES);
}

#[test]
fn a_flipped_bit_is_found_named_and_not_exported() {
    let store = Store::new();
    let images = store.fill();
    assert!(store.done(&["verify", "paris/main"]).contains("nothing is wrong"));
    let office = store.json(&["status", "--json"])["offices"][0]["id"].as_str().expect("an id").to_owned();
    let folder = store.data().join(format!("offices/{office}/groups/{GROUP}"));
    let manifest = store.json(&["inspect", folder.join("manifest").to_str().expect("text"), "--json"]);
    assert_eq!((&manifest["file"], &manifest["identity"]["name"]), (&"manifest".into(), &"main".into()));
    let segment =
        std::fs::read_dir(folder.join("journal")).expect("listed").next().expect("one").expect("entry").path();
    let path = segment.to_str().expect("text");
    let described = store.json(&["inspect", path, "--json"]);
    let frames = described["frames"].as_array().expect("frames");
    let content = frames.iter().find(|frame| frame["blocks"] == 21 && frame["epoch"] == 2).expect("its content");
    let offset = content["offset"].as_u64().expect("a number") + content["bytes"].as_u64().expect("a number") - 40;

    let mut bytes = std::fs::read(&segment).expect("there");
    bytes[offset as usize] ^= 1;
    std::fs::write(&segment, bytes).expect("written");
    let output = store.run(&["verify", "paris/main", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: verify paris/main: 1 damaged place"));
    let report: Value = serde_json::from_slice(&output.stdout).expect("json");
    assert_eq!(report["damages"][0]["points"], serde_json::json!([2, 3]), "3 still needs half of it");
    assert!(store.done(&["verify", "paris/main", "--at", "1"]).contains("nothing is wrong"));

    let file = store.path("x.raw");
    let export = ["export", "paris/main/root", "--at", "2", "--output", file.to_str().expect("text")];
    store.refused(&export, &["--allow-damaged"]);
    assert!(!file.exists());
    let output = store.run(&[&export[..], &["--allow-damaged", "--json"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("bad: root offset=81920 len="), "{output:?}");
    let mut expected = images[1].clone();
    expected[20 * BLOCK_BYTES..40 * BLOCK_BYTES].fill(0);
    let len = expected.len();
    expected[len - 2048..].fill(0);
    assert!(std::fs::read(&file).expect("exported") == expected, "all but what is damaged");
    let store_json = store.data().join("store.json");
    store.refused(&["inspect", store_json.to_str().expect("text")], &["no segment, pack, image index or manifest"]);
}

#[test]
fn a_server_reads_its_store_again_and_names_what_rotted() {
    let store = Store::new();
    store.fill_within(JournalLimits { segment_bytes_max: 1 });
    let config = store.data().join("target.toml");
    let text = std::fs::read_to_string(&config).expect("configured");
    let often = text.replace("scrub_interval_s = 2419200", "scrub_interval_s = 1");
    assert_ne!(often, text);
    std::fs::write(&config, often).expect("written");
    let _server = Server::start(&store);
    let points = || store.json(&["points", "paris/main", "--json"])["points"].take();
    let eventually = |what: &str, is_so: &dyn Fn(&Value) -> bool| {
        let start = std::time::Instant::now();
        while !is_so(&points()) {
            assert!(start.elapsed().as_secs() < 30, "{what} is waited for in vain: {}", points());
            std::thread::park_timeout(std::time::Duration::from_millis(50));
        }
    };
    let is_verified = |points: &Value, at: usize| points[at]["verified"].is_string();
    eventually("reading all again", &|points| (0..3).all(|at| is_verified(points, at)));

    let office = store.json(&["status", "--json"])["offices"][0]["id"].as_str().expect("an id").to_owned();
    let journal = store.data().join(format!("offices/{office}/groups/{GROUP}/journal"));
    let mut segments = std::fs::read_dir(journal).expect("listed").map(|entry| entry.expect("entry").path());
    let content_of_point_2 = |segment: PathBuf| {
        let described = store.json(&["inspect", segment.to_str().expect("text"), "--json"]);
        let mut frames = described["frames"].as_array().expect("frames").iter();
        let frame = frames.rfind(|frame| frame["blocks"] == 21 && frame["epoch"] == 2)?;
        Some((segment, frame["offset"].as_u64().expect("a number") as usize + 120))
    };
    let (segment, inside) = segments.find_map(content_of_point_2).expect("the content of point 2");
    let mut bytes = std::fs::read(&segment).expect("read");
    bytes[inside] ^= 1;
    std::fs::write(&segment, &bytes).expect("written");
    eventually("the damage", &|points| points[1]["warning"].as_str().is_some_and(|text| text.contains("damaged")));
    let damaged = points();
    assert!(is_verified(&damaged, 0), "nothing of it is damaged: {damaged}");
    assert!(!is_verified(&damaged, 1) && !is_verified(&damaged, 2), "they stand on what is damaged: {damaged}");

    bytes[inside] ^= 1;
    std::fs::write(&segment, bytes).expect("written");
    eventually("what was put back", &|points| {
        (0..3).all(|at| is_verified(points, at) && points[at]["warning"].is_null())
    });
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let store = Store::new();
    store.fill();
    let mut child = program()
        .args(["export", "paris/main/root", "--at", "latest", "--output", "-"])
        .env("CDP_TARGET_DATA", store.data())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    child.wait().expect("it ends");
    assert_eq!(said, "", "quiet");
}

#[test]
fn one_server_serves_a_store_and_commands_work_beside_it() {
    let store = Store::new();
    store.fill();
    let server = Server::start(&store);
    let output = store.run(&["serve"]);
    refused(&output, &["serve"], &["is in use by another server", &format!("(pid {})", server.child.id())]);

    let status = store.json(&["status", "--json"]);
    assert_eq!(status["listening"], server.address.as_str());
    let group = &status["offices"][0]["groups"][0];
    assert_eq!(
        (&group["name"], &group["state"], &group["points"]),
        (&"main".into(), &"disconnected".into(), &3.into())
    );
    assert!(group["live_rpo_ms"].as_i64().expect("known") > 0);

    store.done(&["pin", "paris/main", "3"]);
    assert_eq!(store.json(&["points", "paris/main", "--json"])["points"][2]["pinned"], true);
    store.done(&["label", "paris/main", "3", "beside"]);
    assert_eq!(store.json(&["points", "paris/main", "--json"])["points"][2]["label"], "beside");
    let bundle = store.path("lyon.bundle");
    store.done(&["enroll", "lyon", "--output", bundle.to_str().expect("text")]);
    let bundle = Bundle::parse(&std::fs::read(&bundle).expect("written")).expect("a bundle");
    let port = server.address.rsplit(':').next().expect("a port");
    assert_eq!(bundle.targets, [format!("backup.example:{port}")], "the port that port 0 became");
    store.refused(
        &["enroll", "rome", "--output", store.path("x").to_str().expect("text"), "--replace"],
        &["enroll office rome", "no office rome to replace"],
    );

    server.end();
    assert_eq!(store.json(&["status", "--json"])["listening"], Value::Null);
    store.done(&["label", "paris/main", "1", "after"]);
}

/// A source's end of a connection, by hand.
struct Source {
    line: Box<dyn Line>,
    control: Control,
}

impl Source {
    async fn connect(bundle: &Bundle, server: &Server, state: &Path) -> Self {
        let clock = Arc::new(SystemClock::new());
        let text = bundle.to_text();
        join(text.as_bytes(), Some(&server.address), Arc::new(SystemStorage), state, clock.clone())
            .await
            .expect("joined");
        let identity = Identity::load(&SystemStorage, state).expect("an identity");
        let line = QuicConnector::new(identity, clock).expect("usable").line().await.expect("admitted");
        let control = line.open_control().await.expect("open");
        let mut source = Self { line, control };
        let hello = SourceMessage::Hello { version: PROTOCOL_VERSION, software: "test".into(), time: Timestamp(0) };
        assert!(matches!(source.ask(&hello).await, TargetMessage::Welcome { .. }));
        source
    }

    async fn ask(&mut self, message: &SourceMessage) -> TargetMessage {
        write_packet(&mut *self.control.send, &message::encode(message)).await.expect("sent");
        self.next().await
    }

    async fn next(&mut self) -> TargetMessage {
        let bytes = read_packet(&mut *self.control.receive, MESSAGE_BYTES_MAX).await.expect("an answer");
        message::decode(&bytes).expect("a message")
    }
}

fn open_group(group: GroupId, key: &DataKey, bundle: &Bundle) -> SourceMessage {
    SourceMessage::OpenGroup(OpenGroup {
        group,
        name: "main".into(),
        generation: None,
        acked: vec![],
        sent: vec![],
        parts: None,
        parts_sent: vec![],
        anew: false,
        instance: Instance::default(),
        envelope: escrow::seal(&group, KeyId([1; 8]), key, &bundle.escrow_public).expect("sealed"),
        volumes: vec![volume()],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_was_acked_is_listed_beside_the_server_and_outlives_its_kill() {
    let store = Store::new();
    let mut server = Server::start(&store);
    let file = store.path("paris.bundle");
    store.done(&["enroll", "paris", "--output", file.to_str().expect("text")]);
    let bundle = Bundle::parse(&std::fs::read(&file).expect("written")).expect("a bundle");
    let state = store.path("state");
    std::fs::create_dir(&state).expect("made");
    let mut source = Source::connect(&bundle, &server, &state).await;
    let key = DataKey::new([3; 32]);
    let TargetMessage::GroupOpened(opened) = source.ask(&open_group(GROUP, &key, &bundle)).await else {
        panic!("the group is not opened");
    };
    assert_eq!((opened.generation, opened.verdict), (Generation(1), Verdict::New));
    let refused = source.ask(&open_group(GroupId([8; 16]), &key, &bundle)).await;
    assert!(matches!(refused, TargetMessage::GroupRefused { reason: RefusalReason::NameTaken, .. }), "{refused:?}");

    let mut frames = source.line.open_frames().await.expect("open");
    let bytes = [GROUP.0.to_vec(), epoch_frames(&key, 1, None).concat()].concat();
    frames.write_all(&bytes).await.expect("sent");
    frames.flush().await.expect("sent");
    let acked = source.next().await;
    assert!(matches!(acked, TargetMessage::Acked { head, .. } if head.epoch == Epoch(1)), "{acked:?}");

    let group = &store.json(&["status", "--json"])["offices"][0]["groups"][0];
    assert_eq!((&group["state"], &group["watermarks"]["acked"]), (&"connected".into(), &1.into()));
    store.done(&["label", "paris/main", "latest", "first"]);
    assert_eq!(store.json(&["points", "paris/main", "--json"])["points"][0]["label"], "first");
    server.child.kill().expect("it runs");
    server.child.wait().expect("it ends");
    let output = store.path("first.raw");
    store.done(&["export", "paris/main/root", "--at", "first", "--output", output.to_str().expect("text")]);
    let mut image = vec![0; SIZE_BYTES as usize];
    image[10 * BLOCK_BYTES..30 * BLOCK_BYTES].fill(1);
    let len = image.len();
    image[len - 2048..].fill(1);
    assert!(std::fs::read(&output).expect("exported") == image, "the acked point differs");
    let server = Server::start(&store);
    assert_eq!(store.json(&["status", "--json"])["offices"][0]["groups"][0]["points"], 1);
    server.end();
}

/// The whole way: the server finds the damage when it starts, asks the source that comes, and heals with what it sends.
#[tokio::test(flavor = "multi_thread")]
async fn what_rotted_is_asked_of_the_source_and_healed_by_what_it_sends() {
    let store = Store::new();
    let images = store.fill();
    let bundle = Bundle::parse(&std::fs::read(store.path("paris.bundle")).expect("written")).expect("a bundle");
    let journal = store.data().join(format!("offices/{}/groups/{GROUP}/journal", bundle.office));
    let segment = std::fs::read_dir(journal).expect("listed").next().expect("one").expect("entry").path();
    let described = store.json(&["inspect", segment.to_str().expect("text"), "--json"]);
    let mut frames = described["frames"].as_array().expect("frames").iter();
    let lost = frames.rfind(|frame| frame["blocks"] == 21 && frame["epoch"] == 3).expect("the content of point 3");
    let offset = lost["offset"].as_u64().expect("a number");
    let mut bytes = std::fs::read(&segment).expect("there");
    bytes[offset as usize + 120] ^= 1;
    std::fs::write(&segment, bytes).expect("written");

    let server = Server::start(&store);
    let state = store.path("state");
    std::fs::create_dir(&state).expect("made");
    let mut source = Source::connect(&bundle, &server, &state).await;
    let key = DataKey::new([3; 32]);
    let mut head = None;
    for epoch in 1..=3 {
        let frames = epoch_frames(&key, epoch, head);
        let hash = frame::hash(frames.last().expect("a commit"));
        head = Some(Predecessor { head: Head { epoch: Epoch(epoch.into()), hash }, attempt: AttemptId([epoch; 16]) });
    }
    let SourceMessage::OpenGroup(request) = open_group(GROUP, &key, &bundle) else { panic!("another message") };
    let acked = head.map(|before| before.head).into_iter().collect();
    let request = SourceMessage::OpenGroup(OpenGroup { generation: Some(Generation(1)), acked, ..request });
    let TargetMessage::GroupOpened(opened) = source.ask(&request).await else { panic!("the group is not opened") };
    assert_eq!(opened.verdict, Verdict::Continue);
    let question = source.next().await;
    let extents = vec![(Block(30), 20), (Block(BLOCKS - 1), 1)];
    assert_eq!(question, TargetMessage::SendAgain { group: GROUP, volume: VolumeSlot(0), extents });
    assert!(!store.run(&["verify", "paris/main"]).status.success(), "nothing came yet");

    let mut frames = source.line.open_frames().await.expect("open");
    let bytes = [GROUP.0.to_vec(), epoch_frames_like(&key, 4, 3, head).concat()].concat();
    frames.write_all(&bytes).await.expect("sent");
    frames.flush().await.expect("sent");
    let acked = source.next().await;
    assert!(matches!(acked, TargetMessage::Acked { head, .. } if head.epoch == Epoch(4)), "{acked:?}");
    let start = std::time::Instant::now();
    let healed = format!("healed: segment 1 offset {offset}\nnothing is wrong\n");
    loop {
        let output = store.run(&["verify", "paris/main"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() && text.ends_with(&healed) {
            break;
        }
        assert!(start.elapsed().as_secs() < 30, "healing is waited for in vain: {output:?}");
        std::thread::park_timeout(std::time::Duration::from_millis(200));
    }
    let report = store.json(&["verify", "paris/main", "--json"]);
    assert_eq!(report["healed"], serde_json::json!([{ "segment": 1, "offset": offset }]));
    let listed = store.json(&["points", "paris/main", "--json"]);
    assert!(listed["points"].as_array().expect("points").iter().all(|point| point["warning"].is_null()), "{listed}");
    for (epoch, image) in ["1", "2", "3"].iter().zip(&images) {
        let file = store.path(&format!("{epoch}.raw"));
        store.done(&["export", "paris/main/root", "--at", epoch, "--output", file.to_str().expect("text")]);
        assert!(std::fs::read(&file).expect("exported") == *image, "point {epoch} differs");
    }
    server.end();
}

/// A loop device with a mounted file system, gone at the end.
struct Mounted {
    device: String,
    at: PathBuf,
}

impl Mounted {
    /// `None` where this machine does not let us.
    fn new(folder: &Path) -> Option<Self> {
        let file = folder.join("disk");
        std::fs::File::create(&file).ok()?.set_len(16 << 20).ok()?;
        let run = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        run("mkfs.ext4", &["-q", file.to_str()?])?;
        let device = run("losetup", &["-f", "--show", file.to_str()?])?;
        let mounted = Self { device, at: folder.join("mnt") };
        std::fs::create_dir(&mounted.at).ok()?;
        run("mount", &[&mounted.device, mounted.at.to_str()?])?;
        Some(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).output();
        let _ = Command::new("losetup").args(["-d", &self.device]).output();
    }
}

#[test]
fn a_mounted_device_is_refused_even_by_force() {
    let store = Store::new();
    store.fill();
    let folder = tempfile::tempdir().expect("a folder");
    let Some(mounted) = Mounted::new(folder.path()) else {
        eprintln!("skipped: this machine gives no loop device, no mkfs.ext4 or no mount");
        return;
    };
    let at = format!("is in use: mounted at {}", mounted.at.display());
    let arguments = ["export", "paris/main/root", "--at", "latest", "--output", &mounted.device, "--force"];
    store.refused(&arguments, &[&at, "--force does not help"]);
}

//! Drills over real file systems: what is well passes, what was broken on purpose fails and is named, and of the store nothing changes.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;

use cli_support::{GROUP, Server, Store, program};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const MIB: usize = 1 << 20;

/// Whether the program is there; missing only where the whole run may pass over it.
fn has(program: &str) -> bool {
    let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|at| Path::new(at).join(program).exists());
    assert!(found || std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "no {program}");
    if !found {
        eprintln!("skipped: no {program}");
    }
    found
}

fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output().ok()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        eprintln!("{program} {arguments:?}: {said}");
    }
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// A file system made by `mkfs`.
fn made(store: &Store, mkfs: &[&str], mib: usize) -> Vec<u8> {
    let path = store.path("made");
    std::fs::File::create(&path).expect("made").set_len((mib * MIB) as u64).expect("sized");
    tool(mkfs[0], &[&mkfs[1..], &[text(&path)]].concat()).expect("a file system");
    std::fs::read(&path).expect("there")
}

fn ext4(store: &Store) -> Vec<u8> {
    let files = store.path("files");
    std::fs::create_dir_all(&files).expect("made");
    for number in 0..50 {
        std::fs::write(files.join(format!("{number}.txt")), vec![b'x'; number * 1000]).expect("written");
    }
    made(store, &["mkfs.ext4", "-q", "-d", text(&files)], 16)
}

/// The group's folder.
fn group_folder(store: &Store) -> PathBuf {
    let office = store.json(&["status", "--json"])["offices"][0]["id"].as_str().expect("an id").to_owned();
    store.data().join(format!("offices/{office}/groups/{GROUP}"))
}

/// Every file of the store's history, by hash: all but reports, leases and the scratch folder.
fn history(folder: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).expect("listed") {
        let path = entry.expect("an entry").path();
        match path.file_name().and_then(|name| name.to_str()) {
            Some("drills" | "leases" | "scratch") => {}
            _ if path.is_dir() => files.extend(history(&path)),
            _ => {
                files.insert(path.clone(), blake3::hash(&std::fs::read(&path).expect("read")));
            }
        }
    }
    files
}

/// What is left in the scratch folder.
fn left(store: &Store) -> usize {
    std::fs::read_dir(store.data().join("scratch")).expect("listed").count()
}

/// A drill that has to fail, with its report.
fn failed(store: &Store, more: &[&str], words: &[&str]) -> Value {
    let arguments = [&["drill", "paris/main", "--json"], more].concat();
    let Output { status, stdout, stderr } = store.run(&arguments);
    let said = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    let report: Value = serde_json::from_slice(&stdout).expect("a report");
    assert_eq!(report["passed"], false);
    assert_eq!(left(store), 0, "the images are gone");
    report
}

/// A disk with a partition table and `file_system` in its second partition.
fn disk(store: &Store, table: &str, file_system: &[u8]) -> Vec<u8> {
    let path = store.path("disk");
    std::fs::File::create(&path).expect("made").set_len(20 * MIB as u64).expect("sized");
    let mut child = Command::new("/usr/sbin/sfdisk")
        .args(["--quiet", text(&path)])
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk starts");
    let script = format!("label: {table}\nstart=2048, size=2048\nstart=4096, size=32768\n");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), script.as_bytes()).expect("written");
    assert!(child.wait().expect("it ends").success());
    let mut bytes = std::fs::read(&path).expect("there");
    bytes[4096 * 512..4096 * 512 + file_system.len()].copy_from_slice(file_system);
    bytes
}

#[test]
fn a_good_point_passes_and_the_store_stays_what_it_was() {
    if !(has("mkfs.ext4") && has("e2fsck") && has("sfdisk")) {
        return;
    }
    let store = Store::new();
    let root = ext4(&store);
    let (gpt, mbr) = (disk(&store, "gpt", &root), disk(&store, "dos", &root));
    let swap = vec![0; MIB];
    store.fill_with_volumes(&[vec![("root", &root), ("gpt", &gpt), ("mbr", &mbr), ("blank", &swap)]]);
    store.done(&["points", "paris/main"]);
    let before = history(&store.data());
    let report = store.json(&["drill", "paris/main", "--json"]);
    assert_eq!(history(&store.data()), before, "a drill changes nothing of the history");
    assert_eq!(left(&store), 0, "the images are gone");
    assert_eq!(
        (&report["passed"], &report["failures"], &report["epoch"]),
        (&true.into(), &serde_json::json!([]), &1.into())
    );
    let volumes = report["volumes"].as_array().expect("volumes");
    for (volume, bytes) in volumes.iter().zip([&root, &gpt, &mbr, &swap]) {
        assert_eq!(volume["blake3"], blake3::hash(bytes).to_hex().to_string());
    }
    let checked = |volume: usize, place: usize| {
        let place = &report["volumes"][volume]["places"][place];
        (place["partition"].clone(), place["kind"].clone(), place["result"].clone())
    };
    assert_eq!(checked(0, 0), (Value::Null, "ext".into(), "passed".into()));
    assert_eq!((&volumes[1]["table"], &volumes[2]["table"]), (&"gpt".into(), &"mbr".into()));
    for volume in [1, 2] {
        assert_eq!(checked(volume, 0), (1.into(), "blank".into(), "not_checked".into()));
        assert_eq!(checked(volume, 1), (2.into(), "ext".into(), "passed".into()));
    }
    // It is kept, and told by the status.
    let kept: Vec<PathBuf> = std::fs::read_dir(group_folder(&store).join("drills"))
        .expect("listed")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert_eq!(kept.len(), 2, "a document and a page: {kept:?}");
    let page = kept.iter().find(|path| path.extension().is_some_and(|ending| ending == "txt")).expect("a page");
    assert!(std::fs::read_to_string(page).expect("text").contains("point 1 of 2026-11-10T00:01:00.000Z: passed"));
    let group = &store.json(&["status", "--json"])["offices"][0]["groups"][0];
    assert_eq!((&group["last_drill"]["passed"], &group["last_drill"]["epoch"]), (&true.into(), &1.into()));
    assert_eq!(group["drill_overdue"], false);
    assert!(store.done(&["status"]).contains("passed 0."));
}

#[test]
fn what_was_broken_on_purpose_fails_and_is_named() {
    if !(has("mkfs.ext4") && has("e2fsck") && has("debugfs")) {
        return;
    }
    let store = Store::new();
    let good = ext4(&store);
    let path = store.path("made");
    // An inode that a folder names, cleared before the cut.
    tool("debugfs", &["-w", "-R", "clri 7.txt", text(&path)]).expect("broken");
    let broken = std::fs::read(&path).expect("there");
    store.fill_with_volumes(&[vec![("root", &good)], vec![("root", &broken)]]);
    assert_eq!(store.json(&["drill", "paris/main", "--at", "1", "--json"])["passed"], true);
    let report = failed(&store, &[], &["volume root: its file system has errors (e2fsck -fn ended with 4)", "kept in"]);
    let place = &report["volumes"][0]["places"][0];
    assert_eq!(place["result"], "failed");
    assert!(place["output"].as_str().expect("text").contains("7.txt"), "{place}");
    let status = store.done(&["status"]);
    assert!(status.contains("FAILED") && status.contains("drill of point 2: volume root: its file system"), "{status}");

    // A damaged frame of the store: what cannot be read is named, and nothing else is looked at.
    let journal = group_folder(&store).join("journal");
    let segment = std::fs::read_dir(journal).expect("listed").next().expect("one").expect("an entry").path();
    let described = store.json(&["inspect", text(&segment), "--json"]);
    let frames = described["frames"].as_array().expect("frames");
    let content = frames
        .iter()
        .find(|frame| {
            frame["blocks"].as_u64().is_some_and(|blocks| blocks > 0)
                && frame["bytes"].as_u64() > Some(1000)
                && frame["epoch"] == 1
        })
        .expect("content");
    let mut bytes = std::fs::read(&segment).expect("there");
    let at = content["offset"].as_u64().expect("a number") + content["bytes"].as_u64().expect("a number") / 2;
    bytes[at as usize] ^= 1;
    std::fs::write(&segment, bytes).expect("written");
    let report = failed(&store, &["--at", "1"], &["volume root: bytes ", "cannot be read", "checksum"]);
    assert_eq!(
        (&report["volumes"][0]["blake3"], &report["volumes"][0]["places"]),
        (&Value::Null, &serde_json::json!([]))
    );
    assert!(report["not_checked"][0].as_str().expect("text").contains("it is damaged"));
}

#[test]
fn what_only_a_backup_could_mend_fails() {
    if !(has("mkfs.ext4") && has("dumpe2fs")) {
        return;
    }
    let store = Store::new();
    let good = ext4(&store);
    let (mut superblock, mut descriptors) = (good.clone(), good.clone());
    // How many inodes and blocks there are, and the block behind the superblock's.
    superblock[1024..1024 + 16].fill(0);
    let block = 1024 << u32::from_le_bytes(*good[1024 + 24..].first_chunk().expect("a superblock"));
    let at = if block == 1024 { 2048 } else { block };
    descriptors[at..at + block].fill(0);
    store.fill_with_volumes(&[vec![("root", &superblock)], vec![("root", &descriptors)]]);
    for at in ["1", "2"] {
        let report =
            failed(&store, &["--at", at], &["its superblock or group descriptors cannot be used (dumpe2fs -h"]);
        let place = &report["volumes"][0]["places"][0];
        assert!(place["output"].as_str().is_some_and(|output| output.contains("dumpe2fs: ")), "{place}");
    }
}

#[test]
fn content_behind_zeros_is_said_to_be_unchecked() {
    let store = Store::new();
    let mut hidden = vec![0; MIB];
    hidden[700_000] = 1;
    let mut protective = vec![0; MIB];
    protective[446 + 4] = 0xee;
    protective[446 + 8..446 + 16].copy_from_slice(&[1, 0, 0, 0, 0xff, 7, 0, 0]);
    protective[510..512].copy_from_slice(&[0x55, 0xaa]);
    store.fill_with_volumes(&[
        vec![("root", hidden.as_slice()), ("blank", &vec![0; MIB])],
        vec![("root", protective.as_slice()), ("blank", &vec![0; MIB])],
    ]);
    let report = store.json(&["drill", "paris/main", "--at", "1", "--json"]);
    let not_checked = report["not_checked"].as_array().expect("a list");
    assert_eq!(not_checked.len(), 1, "{report}");
    let line = not_checked[0].as_str().expect("text");
    assert!(line.starts_with("volume root: it begins with zeros, though it has content"), "{line}");
    failed(&store, &["--at", "2"], &["volume root: its GUID partition table is gone"]);
}

/// A file system that is mounted, unmounted at the end.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

#[test]
fn what_a_mount_would_mend_by_itself_is_no_failure() {
    if !(has("mkfs.ext4") && has("e2fsck")) {
        return;
    }
    let store = Store::new();
    ext4(&store);
    let (path, at) = (store.path("made"), store.path("mnt"));
    std::fs::create_dir(&at).expect("made");
    if tool("mount", &["-o", "loop", text(&path), text(&at)]).is_none() {
        assert!(std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "no mount");
        eprintln!("skipped: nothing can be mounted here");
        return;
    }
    let mounted = Mounted(at.clone());
    // A file that is deleted while it is open, and changes that only the journal has.
    let open = std::fs::File::create(at.join("open")).expect("made");
    std::os::unix::fs::FileExt::write_all_at(&open, &[7; 100_000], 0).expect("written");
    open.sync_all().expect("synced");
    std::fs::remove_file(at.join("open")).expect("removed");
    std::fs::create_dir(at.join("made-late")).expect("made");
    std::fs::File::open(&at).expect("a folder").sync_all().expect("synced");
    let point = std::fs::read(&path).expect("there");
    drop((open, mounted));
    let flags = u32::from_le_bytes(*point[1024 + 96..].first_chunk().expect("a superblock"));
    assert_ne!(flags & 4, 0, "its journal is to be replayed");
    store.fill_with_volumes(&[vec![("root", &point)]]);
    let report = store.json(&["drill", "paris/main", "--json"]);
    assert_eq!(report["volumes"][0]["places"][0]["result"], "passed");
    assert_eq!(
        report["volumes"][0]["blake3"],
        blake3::hash(&point).to_hex().to_string(),
        "the point itself is not replayed"
    );
}

#[test]
fn each_file_system_is_checked_by_its_own_tool() {
    if !(has("mkfs.xfs") && has("xfs_repair") && has("mkfs.btrfs") && has("btrfs")) {
        return;
    }
    let store = Store::new();
    let xfs = made(&store, &["mkfs.xfs", "-q"], 300);
    let btrfs = made(&store, &["mkfs.btrfs", "-q"], 120);
    let mut broken = xfs.clone();
    // The magic of the first free space header, behind the superblock.
    broken[512..516].copy_from_slice(b"NONE");
    store.fill_with_volumes(&[vec![("xfs", &xfs), ("btrfs", &btrfs)], vec![("xfs", &broken)]]);
    let report = store.json(&["drill", "paris/main", "--at", "1", "--json"]);
    for (volume, kind) in [(0, "xfs"), (1, "btrfs")] {
        let place = &report["volumes"][volume]["places"][0];
        assert_eq!((&place["kind"], &place["result"]), (&kind.into(), &"passed".into()), "{place}");
    }
    failed(&store, &["--at", "2"], &["volume xfs: its file system has errors (xfs_repair -n"]);
}

/// A script of the operator's.
fn script(store: &Store, name: &str, lines: &str) -> PathBuf {
    let path = store.path(name);
    std::fs::write(&path, format!("#!/bin/sh\n{lines}\n")).expect("written");
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("executable");
    path
}

#[test]
fn a_script_sees_the_images_and_is_bounded() {
    let store = Store::new();
    let images = store.fill();
    let drill = |script: &Path| [&["--script"], &[text(script)][..]].concat().join(" ");
    let hash = script(
        &store,
        "good",
        "set -e\ncmp root.raw ../../../expected\necho $CDP_DRILL_OFFICE/$CDP_DRILL_GROUP $CDP_DRILL_EPOCH $CDP_DRILL_VOLUMES\ntest $CDP_DRILL_FOLDER/root.raw -ef root.raw\necho changed > root.raw\nmkdir -p a/b; touch a/b/c",
    );
    std::fs::write(store.path("expected"), &images[2]).expect("written");
    let good = store.json(&["drill", "paris/main", "--json", "--script", text(&hash)]);
    assert_eq!(
        (&good["script"]["result"], &good["script"]["output"]),
        (&"passed".into(), &"paris/main 3 root\n".into())
    );
    assert!(drill(&hash).contains("good"));
    let bad = script(&store, "bad", "echo it is not there >&2; exit 7");
    let report = failed(&store, &["--script", text(&bad)], &["bad: it ended with 7"]);
    assert_eq!((&report["script"]["exit"], &report["script"]["output"]), (&7.into(), &"it is not there\n".into()));
    let hangs = script(&store, "hangs", "echo begun; sleep 1000 & sleep 1000");
    let report = failed(&store, &["--script", text(&hangs), "--script-timeout", "1s"], &["it was not over in 1 s"]);
    assert_eq!((&report["script"]["exit"], &report["script"]["output"]), (&Value::Null, &"begun\n".into()));
    let loud = script(&store, "loud", "yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa | head -c 20000000; exit 1");
    let report = failed(&store, &["--script", text(&loud)], &["ended with 1"]);
    assert!(report["script"]["output"].as_str().expect("text").len() < 20_000);
    store.refused(&["drill", "paris/main", "--script", "/no/such"], &["cannot be run"]);
    store.refused(&["drill", "paris/main", "--at", "9"], &["no point 9"]);
    assert_eq!(left(&store), 0);
}

#[test]
fn an_interrupted_drill_leaves_nothing() {
    let store = Store::new();
    store.fill();
    let begun = store.path("begun");
    let waits = script(&store, "waits", &format!("touch {}; sleep 1000", text(&begun)));
    let child = program()
        .args(["drill", "paris/main", "--script", text(&waits)])
        .env("CDP_TARGET_DATA", store.data())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let start = std::time::Instant::now();
    while !begun.exists() {
        assert!(start.elapsed().as_secs() < 60, "the script is waited for in vain");
        std::thread::park_timeout(std::time::Duration::from_millis(20));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT)
        .expect("it runs");
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("interrupted"), "{ended:?}");
    assert_eq!(left(&store), 0);
    assert!(!group_folder(&store).join("drills").exists(), "it has no result");
}

#[test]
fn a_server_drills_by_itself_and_says_when_it_is_overdue() {
    let store = Store::new();
    store.fill();
    let config = store.data().join("target.toml");
    let written = std::fs::read_to_string(&config).expect("configured");
    let often = written.replace("drill_interval_s = 0", "drill_interval_s = 1");
    assert_ne!(often, written);
    std::fs::write(&config, often).expect("written");
    let group = || store.json(&["status", "--json"])["offices"][0]["groups"][0].take();
    assert_eq!((&group()["last_drill"], &group()["drill_overdue"]), (&Value::Null, &true.into()));
    assert!(store.done(&["status"]).contains("OVERDUE, never"));
    let server = Server::start(&store);
    let start = std::time::Instant::now();
    while group()["last_drill"]["passed"] != true {
        assert!(start.elapsed().as_secs() < 60, "a drill is waited for in vain: {}", group());
        std::thread::park_timeout(std::time::Duration::from_millis(50));
    }
    server.end();
}

/// A disk that says `text` on its first serial port when a BIOS starts it, and rests then.
fn speaking_disk(store: &Store, text: &str) -> Vec<u8> {
    let mut disk = disk(store, "dos", &[]);
    let code = [
        0x31, 0xc0, 0x8e, 0xd8, // ds = 0
        0xbe, 0x15, 0x7c, // si = the text
        0xac, 0x84, 0xc0, 0x74, 0x06, // while the next byte is none of zero
        0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // give it to COM1
        0xf4, 0xeb, 0xfd, // rest
    ];
    disk[..code.len()].copy_from_slice(&code);
    disk[code.len()..code.len() + text.len()].copy_from_slice(text.as_bytes());
    disk
}

#[test]
fn a_disk_is_booted_and_has_to_come_up() {
    if !(has("qemu-system-x86_64") && has("sfdisk")) {
        return;
    }
    let store = Store::new();
    let speaking = speaking_disk(&store, "office login: ");
    store.fill_with_volumes(&[vec![("disk", &speaking), ("data", &[7; MIB])]]);
    let before = history(&store.data());
    let expecting = ["--json", "--boot", "5m", "--boot-expect", "login:"];
    let report = store.json(&[&["drill", "paris/main"], &expecting[..]].concat());
    let boot = &report["boot"];
    assert_eq!((&boot["result"], &boot["screenshot"]), (&"passed".into(), &true.into()), "{boot}");
    assert_eq!(boot["console"], "office login: ");
    let drills = group_folder(&store).join("drills");
    let names: Vec<PathBuf> =
        std::fs::read_dir(&drills).expect("there").map(|entry| entry.expect("one").path()).collect();
    let picture = names.iter().find(|path| path.extension().is_some_and(|ending| ending == "png")).expect("a picture");
    assert!(std::fs::read(picture).expect("read").starts_with(b"\x89PNG"));
    let page = picture.with_extension("txt");
    assert!(std::fs::read_to_string(page).expect("read").contains("boot: passed"));
    // What was to come does not, and what is to come is not said.
    let report =
        failed(&store, &["--boot", "1s", "--boot-expect", "Password:"], &["\"Password:\" did not stand", "boot:"]);
    assert_eq!(report["boot"]["result"], "failed");
    let report = store.json(&["drill", "paris/main", "--json", "--boot", "1s"]);
    assert_eq!(report["boot"]["result"], "not_checked");
    assert!(report["not_checked"].to_string().contains("look at the screenshot"), "{report}");
    assert_eq!(history(&store.data()), before, "a machine that runs changes nothing of the history");
    assert_eq!(left(&store), 0, "the images are gone");
}

#[test]
fn what_cannot_be_booted_is_said_to_be_unchecked() {
    let store = Store::new();
    store.fill_with_volumes(&[vec![("data", &[7; MIB])]]);
    let report = store.json(&["drill", "paris/main", "--json", "--boot", "1m", "--boot-expect", "login:"]);
    assert!(report["not_checked"].to_string().contains("no volume is a disk"), "{report}");
    for (arguments, word) in [
        (&["--boot-expect", "login:"][..], "add --boot"),
        (&["--boot", "1m", "--boot-expect", ""], "nothing is expected"),
    ] {
        let Output { status, stderr, .. } = store.run(&[&["drill", "paris/main"], arguments].concat());
        let said = String::from_utf8_lossy(&stderr);
        assert!(status.code() == Some(1) && said.contains(word), "{said}");
    }
}

#[test]
fn a_script_has_the_volumes_as_exports_too() {
    if !has("nbdcopy") {
        return;
    }
    let store = Store::new();
    let data: Vec<u8> = (0..MIB).map(|at| (at / 4096) as u8).collect();
    store.fill_with_volumes(&[vec![("data", &data)]]);
    let lines = "nbdcopy \"nbd+unix:///data?socket=$CDP_DRILL_SOCKET\" copied\ncmp copied data.raw\necho the same";
    let script = script(&store, "compare", lines);
    let report = store.json(&["drill", "paris/main", "--json", "--script", text(&script)]);
    assert_eq!(report["script"]["output"], "the same\n", "{report}");
    assert!(!report["not_checked"].to_string().contains("exports"), "{report}");
    assert_eq!(left(&store), 0);
}

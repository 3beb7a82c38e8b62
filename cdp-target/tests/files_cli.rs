//! How single files are asked for: paths, partitions, what is refused, and what a damaged or hostile file system does.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod files_support;

use cli_support::{GROUP, Store, program};
use files_support::{Image, assert_clean, can_mount, command, has, pattern, text};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// An ext4 of the files in a folder of the store, without checksums, so that it can be changed by hand.
fn ext4(store: &Store, mib: u64, fill: impl Fn(&Path)) -> Vec<u8> {
    let from = store.path("from");
    std::fs::create_dir_all(&from).expect("made");
    fill(&from);
    let image = Image::new(&store.path("image"), mib);
    image.mkfs(&["mkfs.ext4", "-q", "-F", "-L", "office", "-O", "^metadata_csum", "-d", text(&from)]);
    image.bytes()
}

fn some_files(at: &Path) {
    std::fs::create_dir_all(at.join("srv/books")).expect("made");
    std::fs::write(at.join("srv/books/ledger"), b"sum 0\n").expect("written");
    std::fs::write(at.join("srv/notes"), vec![b'n'; 5000]).expect("written");
    std::os::unix::fs::symlink("books/ledger", at.join("srv/newest")).expect("made");
}

const ARGUMENTS: [&str; 4] = ["files", "paris/main/root", "--at", "latest"];

fn files<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&ARGUMENTS[..], more].concat()
}

#[test]
fn files_are_listed_printed_and_copied() {
    if !(has("mkfs.ext4") && can_mount()) {
        return;
    }
    let store = Store::new();
    let image = ext4(&store, 16, some_files);
    store.fill_with_volumes(&[vec![("root", &image)]]);
    let listed = store.done(&files(&["ls", "srv"]));
    let lines: Vec<&str> = listed.lines().collect();
    assert!(lines[0].starts_with("MODE") && lines[0].ends_with("NAME"), "{listed}");
    assert!(lines[1].starts_with("drwx") && lines[1].ends_with("books/"), "{listed}");
    assert!(lines[2].starts_with("lrwx") && lines[2].ends_with("newest -> books/ledger"), "{listed}");
    assert!(lines[3].contains(" 5000 ") && lines[3].contains("+00:00  notes"), "{listed}");
    let all = store.done(&files(&["ls", "-R"]));
    assert!(all.starts_with("/:\n") && all.contains("\n\n/srv/books:\nMODE"), "{all}");
    let document = store.json(&files(&["ls", "-R", "--json", "/srv"]));
    assert_eq!(
        (&document["file_system"], &document["partition"], &document["epoch"]),
        (&"ext4".into(), &Value::Null, &1.into())
    );
    let paths: Vec<&str> =
        document["entries"].as_array().expect("a list").iter().filter_map(|entry| entry["path"].as_str()).collect();
    assert_eq!(paths, ["/srv/books", "/srv/newest", "/srv/notes", "/srv/books/ledger"]);
    let ledger = &document["entries"][3];
    assert_eq!((&ledger["kind"], &ledger["bytes"], &ledger["error"]), (&"file".into(), &6.into(), &Value::Null));
    assert_eq!(store.done(&files(&["cat", "/srv/newest", "srv/../srv//books/./ledger"])), "sum 0\nsum 0\n");

    let (new, folder) = (store.path("new"), store.path("folder"));
    std::fs::create_dir(&folder).expect("made");
    assert!(store.done(&files(&["cp", "srv/books/ledger", text(&new)])).contains("copied 1 file, 6 B, to"));
    assert_eq!(std::fs::read(&new).expect("there"), b"sum 0\n");
    store.refused(&files(&["cp", "srv/notes", text(&new)]), &["`new` exists", "--force"]);
    assert_eq!(std::fs::read(&new).expect("there"), b"sum 0\n");
    store.done(&files(&["cp", "--force", "srv/notes", text(&new)]));
    assert_eq!(std::fs::read(&new).expect("there").len(), 5000);
    let copied = store.json(&files(&["cp", "-r", "srv", text(&folder), "--json"]));
    assert_eq!(
        (&copied["files"], &copied["folders"], &copied["links"], &copied["failed"]),
        (&2.into(), &2.into(), &1.into(), &0.into())
    );
    assert_eq!(std::fs::read_link(folder.join("srv/newest")).expect("there"), Path::new("books/ledger"));
    // What is there stays, what is missing comes.
    std::fs::remove_file(folder.join("srv/notes")).expect("removed");
    std::fs::write(folder.join("srv/own"), b"mine").expect("written");
    store.refused(&files(&["cp", "-r", "srv", text(&folder)]), &["`srv` exists"]);
    store.done(&files(&["cp", "-r", "--force", "srv", text(&folder)]));
    assert!(folder.join("srv/own").exists() && folder.join("srv/notes").exists());

    for (arguments, words) in [
        (&["cat", "srv/none"][..], "there is no such file or folder"),
        (&["cat", "srv"], "it is a folder"),
        (&["cp", "srv", "/tmp/x"], "it is a folder"),
        (&["ls", "srv/notes/x"], "it is no folder"),
        (&["cp", "srv/notes", "/no/such/folder/x"], "/no/such/folder/x"),
        (&["--partition", "2", "ls"], "there is no partition 2"),
    ] {
        store.refused(
            &files(arguments),
            &[words, "srv"].into_iter().take(1 + usize::from(arguments.contains(&"srv"))).collect::<Vec<_>>(),
        );
    }
    store.refused(&["files", "paris/main/none", "--at", "latest", "ls"], &["none", "root"]);
    store.refused(&["files", "paris/main", "--at", "9", "ls"], &["no point 9"]);
    // A reader that has enough is no error.
    let mut child = program()
        .args(files(&["ls", "-R"]))
        .env("CDP_TARGET_DATA", store.data())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}

/// A disk with a partition table, and file systems in its partitions.
fn disk(store: &Store, table: &str, partitions: &[(usize, &[u8])]) -> Vec<u8> {
    let path = store.path("disk");
    std::fs::File::create(&path).expect("made").set_len(48 * MIB as u64).expect("sized");
    let mut child =
        Command::new("/usr/sbin/sfdisk").args(["--quiet", text(&path)]).stdin(Stdio::piped()).spawn().expect("started");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), table.as_bytes()).expect("written");
    assert!(child.wait().expect("it ends").success());
    let mut bytes = std::fs::read(&path).expect("there");
    for (sector, content) in partitions {
        bytes[sector * 512..sector * 512 + content.len()].copy_from_slice(content);
    }
    bytes
}

#[test]
fn partitions_are_seen_through_and_told_where_one_has_to_be_named() {
    if !(can_mount() && ["mkfs.ext4", "sfdisk", "mkfs.vfat", "mkfs.ntfs"].into_iter().all(has)) {
        return;
    }
    let store = Store::new();
    let root = ext4(&store, 16, some_files);
    let made = |mkfs: &[&str], mib| {
        let image = Image::new(&store.path("image"), mib);
        image.mkfs(mkfs);
        image.bytes()
    };
    let boot = made(&["mkfs.vfat", "-n", "BOOT"], 4);
    let windows =
        made(&["mkfs.ntfs", "-q", "-Q", "-F", "-L", "Daten", "-p", "0", "-H", "0", "-S", "0", "-s", "512"], 8);
    let gpt = disk(
        &store,
        "label: gpt\nstart=2048, size=8192\nstart=12288, size=32768\nstart=49152, size=16384\n",
        &[(2048, &boot), (12_288, &root), (49_152, &windows)],
    );
    // Two of which are within an extended one; only one has files.
    let mbr = disk(
        &store,
        "label: dos\nstart=2048, size=2048\nstart=8192, size=80000, type=5\nstart=10240, size=2048\nstart=20480, size=32768\n",
        &[(20_480, &root)],
    );
    store.fill_with_volumes(&[vec![("gpt", &gpt), ("mbr", &mbr)]]);
    let listed = store.done(&["files", "paris/main/gpt", "--at", "1", "ls"]);
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["PARTITION", "SIZE", "FILE_SYSTEM", "LABEL"]);
    assert_eq!(
        lines[1..],
        [["1", "4.0", "MiB", "fat", "BOOT"], ["2", "16.0", "MiB", "ext4", "office"], ["3", "8.0", "MiB", "ntfs", "-"]]
    );
    let document = store.json(&["files", "paris/main/gpt", "--at", "1", "ls", "--json"]);
    assert_eq!(
        (&document["partitions"][1]["label"], &document["partitions"][1]["offset"]),
        (&"office".into(), &(12_288 * 512).into())
    );
    let which = &["several partitions have files", "1 (fat `BOOT`), 2 (ext4 `office`), 3 (ntfs)", "--partition"];
    store.refused(&["files", "paris/main/gpt", "--at", "1", "ls", "/srv"], which);
    store.refused(&["files", "paris/main/gpt", "--at", "1", "cat", "srv/notes"], which);
    assert_eq!(
        store.done(&["files", "paris/main/gpt", "--at", "1", "cat", "--partition", "2", "srv/books/ledger"]),
        "sum 0\n"
    );
    store.refused(
        &["files", "paris/main/gpt", "--at", "1", "--partition", "7", "ls"],
        &["there is no partition 7; there are 1 (fat"],
    );
    assert_eq!(store.done(&["files", "paris/main/mbr", "--at", "1", "cat", "srv/books/ledger"]), "sum 0\n");
    let document = store.json(&["files", "paris/main/mbr", "--at", "1", "ls", "--json"]);
    assert_eq!(document["partition"], 6, "the second within the extended one");
    store.refused(&["files", "paris/main/mbr", "--at", "1", "--partition", "1", "ls"], &["partition 1 is blank"]);
}

/// Names and links that would lead out of the mount, or of the destination.
#[test]
fn nothing_is_read_outside_of_the_mount_or_written_outside_of_the_destination() {
    if !(has("mkfs.ext4") && can_mount()) {
        return;
    }
    let store = Store::new();
    let (outside, secret) = (store.path("outside"), store.path("secret"));
    std::fs::create_dir(&outside).expect("made");
    std::fs::write(&secret, b"of this machine").expect("written");
    let mut image = ext4(&store, 16, |at| {
        for (folder, name) in [("dots", "..Xescape"), ("slash", "slaXsh"), ("nul", "nulX"), ("good", "plain")] {
            std::fs::create_dir(at.join(folder)).expect("made");
            std::fs::write(at.join(folder).join(name), name).expect("written");
        }
        // A link, and a folder that will have its name.
        std::fs::create_dir(at.join("twins")).expect("made");
        std::os::unix::fs::symlink(&outside, at.join("twins/twin1")).expect("made");
        std::fs::create_dir(at.join("twins/twin2")).expect("made");
        std::fs::write(at.join("twins/twin2/evil"), b"evil").expect("written");
        std::fs::write(at.join("hostname"), b"of the office").expect("written");
        let up = "../".repeat(40);
        for (link, target) in [
            ("good/absolute", text(&secret).to_owned()),
            ("good/up", format!("{up}{}", text(&secret))),
            ("good/magic", format!("/proc/self/root{}", text(&secret))),
            ("good/within", format!("{up}hostname")),
            ("good/ring", "ring".to_owned()),
        ] {
            std::os::unix::fs::symlink(target, at.join(link)).expect("made");
        }
    });
    for (from, to) in
        [(&b"..Xescape"[..], &b"../escape"[..]), (b"slaXsh", b"sla/sh"), (b"nulX", b"nul\0"), (b"twin2", b"twin1")]
    {
        // The names stand in a folder; the contents of the files in blocks of their own.
        let places: Vec<usize> = (8..image.len() - from.len())
            .filter(|at| image[*at..].starts_with(from) && image[*at - 2] as usize == from.len())
            .collect();
        assert_eq!(places.len(), 1, "{}", String::from_utf8_lossy(from));
        image[places[0]..places[0] + to.len()].copy_from_slice(to);
    }
    store.fill_with_volumes(&[vec![("root", &image)]]);
    for path in ["good/absolute", "good/up", "good/magic"] {
        store.refused(&files(&["cat", path]), &["there is no such file or folder"]);
    }
    store.refused(&files(&["cat", "good/ring"]), &["there are too many symbolic links on its way"]);
    store.refused(&files(&["cat", text(&secret)]), &["there is no such file or folder"]);
    assert_eq!(store.done(&files(&["cat", "good/within", "../../hostname"])), "of the officeof the office");
    let copied = store.path("copied");
    for force in [&[][..], &["--force"]] {
        let output = store.run(&files(&[&["cp", "-r", "/", text(&copied)], force].concat()));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        // The kernel gives no name with a slash, and of one with a zero what is in front of it.
        for word in ["copy /dots: ", "copy /slash: ", "copy /nul/nul: ", "could not be copied"] {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
        assert_eq!(std::fs::read(copied.join("good/plain")).expect("the rest is copied"), b"plain");
        assert_eq!(std::fs::read_link(copied.join("good/absolute")).expect("as it is"), secret);
        assert_eq!(std::fs::read_dir(&outside).expect("listed").count(), 0);
        assert!(!store.path("escape").exists() && !copied.join("escape").exists());
        std::fs::remove_dir_all(&copied).expect("removed");
    }
}

/// The segment of the group, and the frames in it.
fn frames(store: &Store) -> (PathBuf, Vec<Value>) {
    let office = store.json(&["status", "--json"])["offices"][0]["id"].as_str().expect("an id").to_owned();
    let journal = store.data().join(format!("offices/{office}/groups/{GROUP}/journal"));
    let segment = std::fs::read_dir(journal).expect("listed").next().expect("one").expect("an entry").path();
    let described = store.json(&["inspect", text(&segment), "--json"]);
    (segment, described["frames"].as_array().expect("frames").clone())
}

#[test]
fn lost_blocks_are_named_and_the_rest_is_given() {
    if !(has("mkfs.ext4") && can_mount()) {
        return;
    }
    let store = Store::new();
    let image = ext4(&store, 32, |at| {
        std::fs::create_dir(at.join("srv")).expect("made");
        std::fs::write(at.join("srv/large"), pattern(12 * MIB, 1)).expect("written");
        std::fs::write(at.join("srv/small"), b"whole").expect("written");
    });
    store.fill_with_volumes(&[vec![("root", &image)]]);
    let (segment, frames) = frames(&store);
    let large: Vec<&Value> = frames.iter().filter(|frame| frame["bytes"].as_u64() > Some(100_000)).collect();
    let frame = large[large.len() / 2];
    let mut bytes = std::fs::read(&segment).expect("there");
    bytes[(frame["offset"].as_u64().expect("a number") + frame["bytes"].as_u64().expect("a number") / 2) as usize] ^= 1;
    std::fs::write(&segment, bytes).expect("written");

    let scratch = store.path("scratch");
    let output = command(&store, &scratch, &["cat", "srv/large"]).output().expect("started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in [
        "read srv/large of paris/main/root",
        "of it cannot be read: input/output error",
        "offset=",
        "hint: `cdp-target verify`",
    ] {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    let whole = pattern(12 * MIB, 1);
    let same = whole.iter().zip(&output.stdout).take_while(|(one, other)| one == other).count();
    assert_eq!(same, output.stdout.len(), "what is in front of it is given, and no zeros: {said}");
    assert!(same > 0 && same < whole.len(), "{same} bytes are in front of it: {said}");
    let copied = store.path("copied");
    let output = store.run(&files(&["cp", "-r", "srv", text(&copied)]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: copy srv/large: byte "), "{said}");
    let names: Vec<_> =
        std::fs::read_dir(&copied).expect("listed").map(|entry| entry.expect("an entry").file_name()).collect();
    assert_eq!(names, ["small"], "nothing is left of what is not whole");
    assert_clean(&scratch);
}

#[test]
fn an_interrupted_copy_leaves_no_half_file() {
    if !(has("mkfs.ext4") && can_mount()) {
        return;
    }
    let store = Store::new();
    let image = ext4(&store, 96, |at| std::fs::write(at.join("large"), vec![b'x'; 80 * MIB]).expect("written"));
    store.fill_with_volumes(&[vec![("root", &image)]]);
    let folder = store.path("folder");
    std::fs::create_dir(&folder).expect("made");
    let scratch = store.path("scratch");
    let mut command = command(&store, &scratch, &["cp", "large", text(&folder)]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    let (pid, start) = (Pid::from_child(&child), Instant::now());
    while std::fs::read_dir(&folder).expect("listed").count() == 0 {
        assert!(start.elapsed() < Duration::from_secs(120), "a file is waited for in vain");
        std::thread::yield_now();
    }
    // Stopped while it is told: it has no time to be ready before.
    for signal in [Signal::STOP, Signal::INT, Signal::CONT] {
        kill_process(pid, signal).expect("it runs");
    }
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("interrupted"), "{ended:?}");
    assert_eq!(std::fs::read_dir(&folder).expect("listed").count(), 0);
    assert_clean(&scratch);
    assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0);
}

#[test]
fn what_has_no_files_says_what_it_is() {
    let store = Store::new();
    let (mut swap, mut luks) = (vec![0; MIB], vec![0; MIB]);
    swap[4086..4096].copy_from_slice(b"SWAPSPACE2");
    luks[..6].copy_from_slice(b"LUKS\xba\xbe");
    store.fill_with_volumes(&[vec![("swap", &swap), ("luks", &luks), ("blank", &vec![0; MIB])]]);
    for (volume, words) in [
        ("swap", "volume swap is a swap area"),
        ("luks", "volume luks is encrypted (LUKS)"),
        ("blank", "volume blank is blank"),
    ] {
        store.refused(&["files", &format!("paris/main/{volume}"), "--at", "latest", "cat", "x"], &[words]);
    }
}

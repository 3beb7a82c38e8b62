//! Images as an operator gets them, held against QEMU's own tools; broken off at many places and gone on with.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;

use cli_support::{Store, program};
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const MIB: usize = 1 << 20;

/// Whether `program` is there; missing only where the whole run may pass over it.
fn has(program: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    assert!(there || std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "no {program}");
    if !there {
        eprintln!("skipped: no {program}");
    }
    there
}

/// Holes, what compresses and what does not, by turns; ends within a cluster.
fn content(mib: usize) -> Vec<u8> {
    let mut bytes = vec![0; mib * MIB - 7 * 512];
    for (at, part) in bytes.chunks_mut(96 * 1024).enumerate() {
        match at % 4 {
            0 => part.fill(at as u8 | 1),
            1 => blake3::Hasher::new().update(&at.to_le_bytes()).finalize_xof().fill(part),
            _ => {}
        }
    }
    bytes
}

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// QEMU finds nothing wrong with the image, and the disk in it to be what the raw image has.
fn is_image_of(image: &Path, raw: &Path) {
    assert!(qemu_img(&["check", "-f", "qcow2", text(image)]).contains("No errors were found"));
    let compared = qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(image), text(raw)]);
    assert!(compared.contains("Images are identical"), "{compared}");
}

fn manifest(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a manifest")).expect("JSON")
}

#[test]
fn a_qcow2_image_is_what_qemu_takes_for_the_raw_one() {
    if !has("qemu-img") {
        return;
    }
    let store = Store::new();
    let bytes = content(9);
    store.fill_with_volumes(&[vec![("root", &bytes)]]);
    let raw = store.path("root.raw");
    store.done(&["export", "paris/main/root", "--at", "1", "--output", text(&raw)]);
    assert!(std::fs::read(&raw).expect("exported") == bytes, "the raw image differs");
    let hash = blake3::hash(&bytes).to_hex().to_string();
    let of_raw = manifest(&store.path("root.raw.json"));
    assert_eq!(
        (&of_raw["images"][0]["blake3"], &of_raw["images"][0]["file_blake3"]),
        (&hash.as_str().into(), &hash.as_str().into())
    );

    let mut sizes = Vec::new();
    for (name, compress) in [("plain.qcow2", &[][..]), ("packed.qcow2", &["--compress"])] {
        let image = store.path(name);
        let export =
            ["export", "paris/main/root", "--at", "1", "--format", "qcow2", "--output", text(&image), "--json"];
        let told = store.json(&[&export[..], compress].concat());
        is_image_of(&image, &raw);
        let file = std::fs::read(&image).expect("exported");
        let of_image = manifest(&store.path(&format!("{name}.json")));
        assert_eq!(of_image["images"][0]["blake3"], hash.as_str());
        assert_eq!(of_image["images"][0]["file_blake3"], blake3::hash(&file).to_hex().to_string());
        assert_eq!(of_image["images"][0]["file_bytes"], file.len());
        assert_eq!(of_image["images"][0]["path"], name, "without its folder");
        assert_eq!((&told["images"][0]["path"], &told["commit"]), (&text(&image).into(), &of_image["commit"]));
        assert_eq!(
            (&of_image["office"], &of_image["class"], &of_image["epoch"]),
            (&"paris".into(), &"crash".into(), &1.into())
        );
        let information: Value =
            serde_json::from_str(&qemu_img(&["info", "--output=json", text(&image)])).expect("JSON");
        assert_eq!(information["virtual-size"], bytes.len());
        let packing = if compress.is_empty() { "zlib" } else { "zstd" };
        assert_eq!(information["format-specific"]["data"]["compression-type"], packing);
        sizes.push(file.len());
    }
    assert!(sizes[0] < 8 * MIB, "what is zeros is not in it: {sizes:?}");
    assert!(sizes[1] < 4 * MIB, "half of the content compresses: {sizes:?}");

    let streamed = store.run(&["export", "paris/main/root", "--at", "1", "--format", "qcow2", "--output", "-"]);
    assert!(streamed.status.success(), "{streamed:?}");
    assert!(
        streamed.stdout == std::fs::read(store.path("plain.qcow2")).expect("exported"),
        "through a pipe it is the same"
    );
}

#[test]
fn a_whole_group_has_one_manifest_and_it_is_not_replaced_unasked() {
    let store = Store::new();
    let (first, second) = (content(2), content(1));
    store.fill_with_volumes(&[vec![("root", &first), ("data", &second)]]);
    let folder = store.path("all");
    let export = ["export", "paris/main", "--at", "latest", "--output", text(&folder)];
    store.done(&export);
    let written = manifest(&folder.join("manifest.json"));
    for (at, (name, bytes)) in [("root", &first), ("data", &second)].into_iter().enumerate() {
        assert!(std::fs::read(folder.join(format!("{name}.raw"))).expect("exported") == *bytes, "{name} differs");
        assert_eq!(written["images"][at]["path"], format!("{name}.raw"));
        assert_eq!(written["images"][at]["blake3"], blake3::hash(bytes).to_hex().to_string());
    }
    for name in ["root.raw", "data.raw"] {
        std::fs::remove_file(folder.join(name)).expect("removed");
    }
    store.refused(&export, &["manifest.json exists", "--force"]);
    assert_eq!(std::fs::read_dir(&folder).expect("listed").count(), 1, "nothing was written");
    store.done(&[&export[..], &["--force"]].concat());
    let alone = store.path("alone.raw");
    let export = ["export", "paris/main/data", "--at", "latest", "--output", text(&alone)];
    store.done(&[&export[..], &["--no-manifest"]].concat());
    assert!(!store.path("alone.raw.json").exists());
    let elsewhere = store.path("elsewhere.json");
    store.done(&[&export[..], &["--force", "--manifest", text(&elsewhere)]].concat());
    assert_eq!(manifest(&elsewhere)["images"][0]["volume"], "data");
    let (raw, piped) = (["--compress"], ["--compress", "--format", "qcow2"]);
    store.refused(&[&export[..], &raw].concat(), &["--compress is of qcow2"]);
    store.refused(
        &[&["export", "paris/main/data", "--at", "1", "--output", "-"][..], &piped].concat(),
        &["not to stdout"],
    );
    store.refused(&[&export[..], &["--resume"], &piped].concat(), &["cannot be gone on with"]);
}

/// An export that runs until its record has so many strides, and is then ended by `signal`.
fn broken_off(
    store: &Store,
    arguments: &[&str],
    record: &Path,
    strides: u64,
    signal: rustix::process::Signal,
) -> Output {
    let child = program()
        .args(arguments)
        .env("CDP_TARGET_DATA", store.data())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let start = std::time::Instant::now();
    while std::fs::metadata(record).map_or(0, |file| file.len()) < 96 + 44 * strides {
        assert!(start.elapsed().as_secs() < 60, "the record is waited for in vain");
        std::thread::yield_now();
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).expect("it runs");
    child.wait_with_output().expect("it ends")
}

/// A store with a volume of many strides, and another point of it.
fn large() -> (Store, Vec<u8>) {
    let store = Store::new();
    let bytes = content(160);
    let mut other = bytes.clone();
    other[MIB] ^= 1;
    store.fill_with_volumes(&[vec![("root", &bytes)], vec![("root", &other)]]);
    (store, bytes)
}

fn record_of(path: &Path) -> (PathBuf, PathBuf) {
    let name = path.file_name().expect("a name").to_str().expect("text");
    let partial = path.with_file_name(format!(".{name}.partial"));
    let record = path.with_file_name(format!(".{name}.partial.record"));
    (partial, record)
}

#[test]
fn a_killed_export_is_gone_on_with_and_only_what_is_proved_is_kept() {
    let (store, bytes) = large();
    let image = store.path("root.raw");
    let (partial, record) = record_of(&image);
    let export = ["export", "paris/main/root", "--at", "1", "--output", text(&image), "--resume"];
    for strides in [1, 7, 13] {
        let ended = broken_off(&store, &export, &record, strides, rustix::process::Signal::KILL);
        assert_eq!(ended.status.signal(), Some(9), "{ended:?}");
        assert!(!image.exists() && partial.exists(), "what is not whole has no name");
    }
    // By the operator, too: it says how to go on.
    let ended = broken_off(&store, &export, &record, 15, rustix::process::Signal::INT);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(
        said.contains("going on behind ") && said.contains("interrupted\nhint: ") && said.contains("--resume"),
        "{said}"
    );
    // Another point is not mixed in.
    let mut other = export;
    other[3] = "2";
    store.refused(&other, &["is of point 1", "number"]);
    assert!(partial.exists() && record.exists());
    // What is there and was changed is not believed.
    let file = std::fs::OpenOptions::new().write(true).open(&partial).expect("there");
    let hole = 242 * 96 * 1024;
    assert_eq!(bytes[hole..hole + 96 * 1024], [0; 96 * 1024]);
    for at in [20 * MIB, hole + 7] {
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xee; 5], at as u64).expect("written");
    }
    let ended = store.run(&export);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && said.contains("going on behind 16.0 MiB"), "{said}");
    assert!(std::fs::read(&image).expect("exported") == bytes, "the image differs");
    assert!(!partial.exists() && !record.exists(), "nothing is left");
    assert_eq!(
        manifest(&store.path("root.raw.json"))["images"][0]["blake3"],
        blake3::hash(&bytes).to_hex().to_string()
    );
}

#[test]
fn a_killed_qcow2_export_is_gone_on_with() {
    if !has("qemu-img") {
        return;
    }
    let (store, bytes) = large();
    let (image, raw) = (store.path("root.qcow2"), store.path("raw"));
    let (partial, record) = record_of(&image);
    let export = ["export", "paris/main/root", "--at", "1", "--format", "qcow2", "--output", text(&image), "--resume"];
    let ended = broken_off(&store, &export, &record, 9, rustix::process::Signal::KILL);
    assert_eq!(ended.status.signal(), Some(9), "{ended:?}");
    // Its tables, five clusters of them, and whatever stands behind 24 MiB of it, zeros among them.
    let file = std::fs::OpenOptions::new().write(true).open(&partial).expect("there");
    for (at, len) in [(0, 5 << 16), (24 * MIB, 40 * MIB)] {
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xee; len], at as u64).expect("written");
    }
    let ended = store.run(&export);
    assert!(ended.status.success() && String::from_utf8_lossy(&ended.stderr).contains("going on behind"), "{ended:?}");
    std::fs::write(&raw, &bytes).expect("written");
    is_image_of(&image, &raw);
    let told = &manifest(&store.path("root.qcow2.json"))["images"][0];
    assert_eq!(told["blake3"], blake3::hash(&bytes).to_hex().to_string());
    assert_eq!(told["file_blake3"], blake3::hash(&std::fs::read(&image).expect("there")).to_hex().to_string());
}

#[test]
fn without_resume_an_export_begins_anew_and_two_do_not_write_one_file() {
    let (store, bytes) = large();
    let image = store.path("root.raw");
    let (partial, record) = record_of(&image);
    let export = ["export", "paris/main/root", "--at", "1", "--output", text(&image)];
    broken_off(&store, &export, &record, 2, rustix::process::Signal::KILL);
    let held = std::fs::File::open(&partial).expect("there");
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("locked");
    store.refused(&export, &["another export writes"]);
    drop(held);
    let ended = store.run(&export);
    assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
    assert!(std::fs::read(&image).expect("exported") == bytes, "the image differs");
}

/// A loop device over a file, detached at the end.
struct Loop(String);

impl Loop {
    fn new(file: &Path, mib: u64) -> Option<Self> {
        std::fs::File::create(file).expect("made").set_len(mib << 20).expect("sized");
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output().ok()?;
        let there = output.status.success();
        assert!(there || std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "no loop device");
        there.then(|| Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_device_is_gone_on_with_only_where_what_is_on_it_is_ours() {
    let (store, bytes) = large();
    let Some(device) = Loop::new(&store.path("disk"), 200) else {
        eprintln!("skipped: no loop device");
        return;
    };
    let record = store.data().join(format!("exports/{}.record", device.0.trim_start_matches('/').replace('/', "-")));
    let export = ["export", "paris/main/root", "--at", "1", "--output", &device.0];
    let ended = broken_off(&store, &export, &record, 5, rustix::process::Signal::KILL);
    assert_eq!(ended.status.signal(), Some(9));
    store.refused(&export, &["is not blank"]);
    // Refused, the record of what is there stays.
    let resume = [&export[..], &["--resume"]].concat();
    let ended = broken_off(&store, &resume, &record, 9, rustix::process::Signal::INT);
    assert!(String::from_utf8_lossy(&ended.stderr).contains("going on behind"), "{ended:?}");
    let disk = std::fs::OpenOptions::new().read(true).write(true).open(&device.0).expect("a device");
    let mut first = vec![0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&disk, &mut first, 0).expect("read");
    std::os::unix::fs::FileExt::write_all_at(&disk, &[0x5a; 4096], 0).expect("written");
    store.refused(&resume, &["is not blank"]);
    std::os::unix::fs::FileExt::write_all_at(&disk, &first, 0).expect("written");
    drop(disk);
    let ended = store.run(&resume);
    assert!(ended.status.success() && String::from_utf8_lossy(&ended.stderr).contains("going on behind"), "{ended:?}");
    assert!(std::fs::read(&device.0).expect("a device")[..bytes.len()] == bytes, "the device differs");
    assert!(!record.exists());

    if has("qemu-img") {
        let raw = store.path("raw");
        std::fs::write(&raw, &bytes).expect("written");
        for packing in [&[][..], &["--compress"]] {
            let qcow2 = [&export[..], &["--format", "qcow2", "--force"], packing].concat();
            store.done(&qcow2);
            is_image_of(Path::new(&device.0), &raw);
        }
    }
    let Some(small) = Loop::new(&store.path("small"), 159) else { return };
    let mut export = export;
    export[5] = &small.0;
    store.refused(&export, &["has room for 166723584 bytes"]);
}

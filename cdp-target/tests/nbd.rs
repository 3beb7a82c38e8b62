//! Points as disks, for clients that nobody here wrote: libnbd's, QEMU's, nbdkit and fio.

#![allow(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod nbd_support;

use cli_support::{GROUP, SIZE_BYTES, Server, Store};
use nbd_support::{NbdServer, Raw, client, client_fails, has, request};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("one JSON document")
}

/// Offsets, lengths and kinds of a map.
fn map(uri: &str) -> Vec<(u64, u64, u64)> {
    let document = json(&client("nbdinfo", &["--map", "--json", uri]));
    let number = |entry: &Value, key: &str| entry[key].as_u64().expect("a number");
    let entries = document.as_array().expect("a list");
    entries.iter().map(|entry| (number(entry, "offset"), number(entry, "length"), number(entry, "type"))).collect()
}

#[test]
fn every_point_is_a_disk_for_libnbd() {
    if !has("points for libnbd", "nbdcopy") {
        return;
    }
    let store = Store::new();
    let images = store.fill();
    let server = NbdServer::start(&store, "latest", &[]);
    assert_eq!(server.document["exports"][0]["uri"], server.uri("root"));
    assert_eq!(server.document["epoch"], 3);
    let listed = json(&client("nbdinfo", &["--list", "--json", &server.uri("")]));
    assert_eq!(
        (&listed["exports"][0]["export-name"], listed["exports"].as_array().map(Vec::len)),
        (&"root".into(), Some(1))
    );
    let export = &listed["exports"][0];
    assert_eq!(
        (&export["export-size"], &export["is_read_only"], &export["can_multi_conn"]),
        (&SIZE_BYTES.into(), &true.into(), &true.into())
    );
    let copy = store.path("copy.img");
    let copy_text = copy.to_str().expect("text");
    for (export, image) in
        [("root", 2), ("", 2), ("root@1", 0), ("root@2", 1), ("root@latest", 2), ("root@2026-11-10T00:02:30Z", 1)]
    {
        client("nbdcopy", &["--connections=4", &server.uri(export), copy_text]);
        assert!(std::fs::read(&copy).expect("copied") == images[image], "{export} is point {}", image + 1);
    }
    // Blocks 10 to 50 and the last one have content.
    let block = 4096;
    let rest = SIZE_BYTES - 599 * block;
    let content =
        [(0, 10 * block, 3), (10 * block, 40 * block, 0), (50 * block, 549 * block, 3), (599 * block, rest, 0)];
    assert_eq!(map(&server.uri("root")), content);
    for unknown in ["boot", "root@9", "root@", "root@1@2", "root@2h@", "@"] {
        client_fails("nbdinfo", &[&server.uri(unknown)]);
    }
    server.end();
}

/// What an export reads as.
fn content(store: &Store, uri: &str) -> Vec<u8> {
    let file = store.path("content.img");
    client("nbdcopy", &["--connections=4", uri, text(&file)]);
    std::fs::read(&file).expect("copied")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

fn segment(store: &Store) -> PathBuf {
    let offices = std::fs::read_dir(store.data().join("offices")).expect("listed");
    let office = offices.map(|entry| entry.expect("an entry").path()).next().expect("an office");
    office.join(format!("groups/{GROUP}/journal/0000000000000001.seg"))
}

#[test]
fn qemu_nbdkit_and_fio_read_what_libnbd_does() {
    if !["qemu-img", "nbdkit", "fio"].iter().all(|program| has("points for other clients", program)) {
        return;
    }
    let store = Store::new();
    let images = store.fill_with_noise(3);
    let server = NbdServer::start(&store, "latest", &[]);
    let (image, copy) = (store.path("image.raw"), store.path("copy.qcow2"));
    for (export, epoch) in [("root", 2), ("root@1", 0)] {
        std::fs::write(&image, &images[epoch]).expect("written");
        let uri = server.uri(export);
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&image)]);
        client("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&copy)]);
        client("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&copy), text(&image)]);
        let map = json(&client("qemu-img", &["map", "-f", "raw", "--output=json", &uri]));
        let first = &map.as_array().expect("a list")[0];
        let (len, data) = (&first["length"], &first["data"]);
        assert_eq!((len, data), (&(300 * 4096).into(), &true.into()), "{map}");
        let through = format!("nbdcopy \"$uri\" {}", image.display());
        client("nbdkit", &["-U", "-", "nbd", &uri, "--run", &through]);
        assert!(std::fs::read(&image).expect("copied") == images[epoch], "{export} through nbdkit");
    }
    let uri = format!("--uri={}", server.uri("root"));
    for how in ["randread", "read"] {
        let how = format!("--rw={how}");
        let engine = ["--name=reads", "--ioengine=nbd", &uri, &how, "--bs=4k", "--size=2M", "--iodepth=16"];
        let report = client("fio", &[&engine[..], &["--loops=3", "--output-format=json"]].concat());
        let report = json(&report[report.find('{').expect("a report")..]);
        assert_eq!((&report["jobs"][0]["error"], &report["jobs"][0]["read"]["total_ios"]), (&0.into(), &1536.into()));
    }
    server.end();
}

/// What `qemu-io` is told to write, and the same on an image: whole blocks, parts of them, discards, zeros.
fn write(uri: &str, image: &mut [u8]) {
    let fills = [(0x11, 0, 65_536), (0x22, 100_352, 512), (0x33, 123_457, 7_777), (0x44, SIZE_BYTES - 1000, 1000)];
    let mut commands = Vec::new();
    for (byte, offset, len) in fills {
        commands.push(format!("write -P {byte} {offset} {len}"));
        image[offset as usize..(offset + len) as usize].fill(byte);
    }
    let zeros =
        [("discard", 8192, 8192), ("write -z", 32_768, 8192), ("write -z -u", 49_152, 3000), ("write -z -f", 500, 100)];
    for (how, offset, len) in zeros {
        commands.push(format!("{how} {offset} {len}"));
        image[offset..offset + len].fill(0);
    }
    commands.push("flush".to_owned());
    let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    let said = client("qemu-io", &[&["-f", "raw", uri], &commands[..]].concat());
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
}

#[test]
fn an_overlay_is_written_to_and_survives_a_kill() {
    if !has("an overlay", "qemu-io") {
        return;
    }
    let store = Store::new();
    let images = store.fill();
    let overlay = store.path("overlay");
    let writable = ["--writable", text(&overlay)];
    let server = NbdServer::start(&store, "2", &writable);
    assert_eq!(server.document["exports"][0]["writable"], true);
    let mut image = images[1].clone();
    write(&server.uri("root"), &mut image);
    assert!(content(&store, &server.uri("root")) == image);
    assert!(content(&store, &server.uri("root@2")) == images[1], "the point itself stays");
    client_fails("qemu-io", &["-f", "raw", &server.uri("root@2"), "-c", "write 0 4k"]);

    let another = format!("unix:{}", store.path("another.sock").display());
    let second = ["nbd", "paris/main", "--at", "2", "--listen", &another, "--writable", text(&overlay)];
    store.refused(&second, &["overlay", "is in use by another server"]);
    server.kill();

    let other = ["nbd", "paris/main", "--at", "3", "--listen", &another, "--writable", text(&overlay)];
    store.refused(&other, &["is of point 2 (", "not of point 3 ("]);
    let server = NbdServer::start(&store, "2", &writable);
    assert!(content(&store, &server.uri("root")) == image, "after the kill");
    // 8 KiB were discarded in the midst of what was written; `write -z` alone asks for zeros that have their room.
    let map = map(&server.uri("root"));
    assert_eq!(map[..3], [(0, 8192, 0), (8192, 8192, 3), (16_384, 147_456, 0)], "{map:?}");

    // A whole image over it, by four connections.
    let source = store.path("source.raw");
    std::fs::write(&source, &images[2]).expect("written");
    client("nbdcopy", &["--connections=4", "--flush", "--requests=16", text(&source), &server.uri("root")]);
    assert!(content(&store, &server.uri("root")) == images[2]);
    server.end();
    let server = NbdServer::start(&store, "2", &writable);
    assert!(content(&store, &server.uri("root")) == images[2], "after the end");
}

#[test]
fn over_tcp_only_an_admitted_certificate_reads() {
    if !has("points over TLS", "nbdinfo") {
        return;
    }
    let store = Store::new();
    let images = store.fill();
    let (mine, others) = (store.path("mine"), store.path("others"));
    let start = |credentials: &Path| {
        let more = ["--listen", "127.0.0.1:0", "--credentials", text(credentials)];
        NbdServer::start_at(&store, "latest", &more, PathBuf::new())
    };
    drop(start(&others));
    let server = start(&mine);
    let uri = server.document["exports"][0]["uri"].as_str().expect("text").to_owned();
    assert!(uri.starts_with("nbds://127.0.0.1:") && uri.ends_with(text(&mine)), "{uri}");
    assert!(content(&store, &uri) == images[2]);
    let address = server.document["listen"].as_str().expect("text").to_owned();
    let (_, port) = address.rsplit_once(':').expect("a port");
    let credentials = format!("tls-creds-x509,id=c,dir={},endpoint=client", mine.display());
    let options = format!("driver=nbd,host=127.0.0.1,port={port},export=root@1,tls-creds=c");
    let info = client("qemu-img", &["info", "--object", &credentials, "--image-opts", &options]);
    assert!(info.contains(&format!("({SIZE_BYTES} bytes)")), "{info}");

    let with_others = uri.replace(text(&mine), text(&others));
    client_fails("nbdinfo", &[&with_others]);
    client_fails("nbdinfo", &[&format!("nbd://{address}/root")]);
    client_fails("nbdinfo", &["--list", &format!("nbd://{address}")]);
    let (server_only, ca) = (store.path("ca"), mine.join("ca-cert.pem"));
    std::fs::create_dir(&server_only).expect("made");
    std::fs::copy(ca, server_only.join("ca-cert.pem")).expect("copied");
    client_fails("nbdinfo", &[&uri.replace(text(&mine), text(&server_only))]);
    assert!(content(&store, &uri) == images[2], "and goes on with the one that is admitted");
    for wrong in [["--listen", "0.0.0.0:0", "--plain"], ["--listen", "unix:/tmp/x", "--plain"]] {
        store.refused(&[&["nbd", "paris/main", "--at", "1"], &wrong[..]].concat(), &["--plain"]);
    }
}

#[test]
fn a_point_that_goes_while_it_is_read_stays_readable() {
    let store = Store::new();
    let images = store.fill_with_noise(12);
    let server = NbdServer::start(&store, "latest", &[]);
    let mut raw = Raw::with_export(&server.socket, "root@2", false);
    // By the default ladder the newest of the day stays.
    let pruned = store.json(&["prune", "paris/main", "--accept-clock", "--json"]);
    assert_eq!(pruned["leased"], true, "{pruned}");
    let listed = store.json(&["points", "paris/main", "--json"]);
    assert!(listed["points"].as_array().expect("points").iter().all(|point| point["epoch"] != 2), "{listed}");
    for offset in (0..SIZE_BYTES).step_by(1 << 20) {
        let len = (SIZE_BYTES - offset).min(1 << 20);
        raw.request(0, 0, offset, len as u32);
        assert_eq!(raw.simple(), 0, "at {offset}");
        assert!(raw.take(len as usize) == images[1][offset as usize..(offset + len) as usize], "at {offset}");
    }
    server.end();
    let done = store.json(&["prune", "paris/main", "--accept-clock", "--json"]);
    assert_eq!(done["leased"], false, "the lease has gone with the server: {done}");
}

#[test]
fn a_point_under_an_overlay_is_pinned_and_there_after_a_prune() {
    for has_server in [false, true] {
        let store = Store::new();
        let images = store.fill_with_noise(12);
        let receiver = has_server.then(|| Server::start(&store));
        let overlay = store.path("overlay");
        let writable = ["--writable", text(&overlay)];
        let server = NbdServer::start(&store, "2", &writable);
        let said = server.says("pinned: ");
        assert!(said.contains("point 2 of paris/main") && said.contains("`cdp-target unpin paris/main 2`"), "{said}");
        let write = [request(1, 1, 0, 4096), vec![7; 4096]].concat();
        let mut raw = Raw::with_export(&server.socket, "root", false);
        raw.say(&write);
        assert_eq!(raw.simple(), 0);
        drop(raw);
        server.end();
        receiver.into_iter().for_each(Server::end);
        store.json(&["prune", "paris/main", "--accept-clock", "--json"]);
        let listed = store.json(&["points", "paris/main", "--json"]);
        let points = listed["points"].as_array().expect("points");
        let point = |epoch: u64| points.iter().find(|point| point["epoch"] == epoch);
        assert_eq!(point(2).map(|point| &point["pinned"]), Some(&true.into()), "{listed}");
        assert!(point(3).is_none(), "the ladder was at work: {listed}");
        let server = NbdServer::start(&store, "2", &writable);
        let mut raw = Raw::with_export(&server.socket, "root", false);
        raw.request(0, 0, 0, 8192);
        assert_eq!(raw.simple(), 0);
        assert!(raw.take(8192) == [&[7; 4096], &images[1][4096..8192]].concat(), "what was written, over its point");
        server.end();
    }
}

#[test]
fn a_damaged_block_is_an_error_and_never_zeros() {
    let store = Store::new();
    let images = store.fill();
    let file = segment(&store);
    let described = store.json(&["inspect", text(&file), "--json"]);
    let frames = described["frames"].as_array().expect("frames");
    let content = frames.iter().find(|frame| frame["blocks"] == 21 && frame["epoch"] == 2).expect("its content");
    let offset = content["offset"].as_u64().expect("a number") + content["bytes"].as_u64().expect("a number") - 40;
    let mut bytes = std::fs::read(&file).expect("a segment");
    bytes[offset as usize] ^= 1;
    std::fs::write(&file, &bytes).expect("written");
    let server = NbdServer::start(&store, "latest", &[]);
    let (mut simple, mut structured) =
        (Raw::with_export(&server.socket, "root", false), Raw::with_export(&server.socket, "root", true));
    let mut bad = Vec::new();
    for block in 0..50_u64 {
        simple.request(0, 0, block * 4096, 4096);
        structured.request(0, 0, block * 4096, 4096);
        let (error, chunks) = (simple.simple(), structured.structured());
        if error == 0 {
            let expected = &images[2][block as usize * 4096..][..4096];
            assert!(simple.take(4096) == expected, "block {block}");
        } else {
            assert_eq!((error, chunks.len(), chunks[0].0), (5, 1, 0x8002), "block {block}: EIO, and where");
            bad.push(block);
        }
    }
    assert_eq!(bad, (20..30).collect::<Vec<_>>(), "what point 3 has of point 2");
    let line = server.says("a block cannot be read");
    for word in ["root", "offset=81920", "reason="] {
        assert!(line.contains(word), "{line}");
    }
    // A read across it fails as a whole; one beside it does not.
    simple.request(0, 0, 0, 50 * 4096);
    assert_eq!(simple.simple(), 5);
    simple.request(0, 0, 50 * 4096, 4096);
    assert_eq!((simple.simple(), simple.take(4096)), (0, vec![0; 4096]));
}

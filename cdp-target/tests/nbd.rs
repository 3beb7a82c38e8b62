//! Points as disks, for clients that nobody here wrote: libnbd's, QEMU's, nbdkit and fio.

#![allow(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod nbd_support;

use cli_support::{SIZE_BYTES, Store};
use nbd_support::{NbdServer, client, client_fails, has};
use serde_json::Value;

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

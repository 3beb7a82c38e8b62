//! Clients that lie, stall, flood and go away, by sockets of their own; what others get meanwhile.

#![allow(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod nbd_support;

use cli_support::{SIZE_BYTES, Store};
use nbd_support::{DEADLINE, GO, LIST, NbdServer, Raw, SET_META, STRUCTURED, request, string};
use std::io::{ErrorKind, Write};
use std::time::Instant;

const INVALID: u32 = (1 << 31) + 3;
const UNSUPPORTED: u32 = (1 << 31) + 1;
const POLICY: u32 = (1 << 31) + 2;
const UNKNOWN: u32 = (1 << 31) + 6;
const TOO_BIG: u32 = (1 << 31) + 9;
const EINVAL: u32 = 22;

/// The server serves an honest client.
fn serves(server: &NbdServer, image: &[u8]) {
    let mut raw = Raw::with_export(&server.socket, "root", false);
    raw.request(0, 0, 10 * 4096, 8192);
    assert_eq!((raw.simple(), raw.take(8192)), (0, image[10 * 4096..12 * 4096].to_vec()));
}

fn filled() -> (Store, Vec<u8>, NbdServer) {
    let store = Store::new();
    let image = store.fill().pop().expect("three images");
    let server = NbdServer::start(&store, "latest", &[]);
    (store, image, server)
}

#[test]
fn options_that_lie_are_answered_or_end_the_connection() {
    let (_store, image, server) = filled();
    let mut raw = Raw::greeted(&server.socket);
    raw.say(&[0, 0, 0, 1]);
    let lying_name = [100_u32.to_be_bytes().as_slice(), b"root", &[0, 0]].concat();
    let lying_infos = [string("root"), vec![0xff, 0xff]].concat();
    let lying_queries = [string("root"), vec![0xff; 4]].concat();
    let table: [(u32, Vec<u8>, u32); 13] = [
        (77, b"unheard of".to_vec(), UNSUPPORTED),
        (u32::MAX, vec![], UNSUPPORTED),
        (5, vec![], POLICY),
        (LIST, b"x".to_vec(), INVALID),
        (GO, vec![], INVALID),
        (GO, lying_name, INVALID),
        (GO, lying_infos, INVALID),
        (GO, [string("boot"), vec![0, 0]].concat(), UNKNOWN),
        (GO, [string("root@yesterday!"), vec![0, 0]].concat(), UNKNOWN),
        (GO, [string("\u{0}"), vec![0, 0]].concat(), INVALID),
        (SET_META, [string("root"), vec![0; 4]].concat(), INVALID),
        (9, lying_queries, INVALID),
        (GO, vec![0; 70_000], TOO_BIG),
    ];
    for (number, data, expected) in table {
        let answers = raw.ask(number, &data);
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].0, expected, "option {number} with {} bytes", data.len());
        assert!(std::str::from_utf8(&answers[0].1).is_ok_and(|words| !words.is_empty()), "it says why");
    }
    // What was refused left nothing behind.
    assert_eq!(raw.ask(STRUCTURED, &[]), [(1, vec![])]);
    assert_eq!(raw.ask(LIST, &[]).len(), 2);
    assert_eq!(raw.ask(2, b"bye"), [(1, vec![])]);
    assert!(raw.is_ended());

    let endings: [(&str, Vec<u8>); 6] = [
        ("flags that nobody offered", vec![0, 0, 0, 0xff]),
        ("an option without its magic", [&[0, 0, 0, 1], b"IHAVENOT".as_slice(), &[0; 8]].concat()),
        ("4 GiB of an option", [&[0, 0, 0, 1], b"IHAVEOPT".as_slice(), &[0, 0, 0, 7], &[0xff; 4]].concat()),
        (
            "an export's name that is none",
            [&[0, 0, 0, 1], b"IHAVEOPT".as_slice(), &[0, 0, 0, 1, 0, 0, 0, 1, 0xff]].concat(),
        ),
        (
            "an export that is not there",
            [&[0, 0, 0, 1], b"IHAVEOPT".as_slice(), &[0, 0, 0, 1, 0, 0, 0, 1, b'x']].concat(),
        ),
        ("garbage", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
    ];
    for (what, bytes) in endings {
        let mut raw = Raw::greeted(&server.socket);
        // It may end before all of it was said.
        let _ = raw.0.write_all(&bytes);
        assert!(raw.is_ended(), "{what}");
        serves(&server, &image);
    }
}

#[test]
fn requests_that_lie_are_answered_or_end_the_connection() {
    let (_store, image, server) = filled();
    let mut raw = Raw::with_export(&server.socket, "root", false);
    for (kind, flags, offset, len, expected) in [
        (0, 0, SIZE_BYTES, 1, EINVAL),
        (0, 0, SIZE_BYTES - 1, 2, EINVAL),
        (0, 0, u64::MAX, u32::MAX, EINVAL),
        (0, 0, 0, u32::MAX, EINVAL),
        (0, 1 << 9, 0, 4096, EINVAL),
        (0, 1 << 2, 0, 4096, EINVAL),
        (3, 0, u64::MAX, 7, 0),
        (4, 0, 0, 4096, 1),
        (5, 0, 0, 1 << 20, 0),
        (5, 0, SIZE_BYTES, 1, EINVAL),
        (6, 0, 0, 4096, 1),
        (7, 0, 0, 4096, EINVAL),
        (8, 0, 0, 4096, EINVAL),
        (u16::MAX, u16::MAX, u64::MAX, u32::MAX, EINVAL),
    ] {
        raw.request(kind, flags, offset, len);
        assert_eq!(raw.simple(), expected, "command {kind}, flags {flags}, {len} bytes at {offset}");
    }
    // A write to what is read-only brings its content all the same.
    raw.say(&[request(1, 0, 0, 100_000), vec![7; 100_000]].concat());
    assert_eq!(raw.simple(), 1);
    raw.request(0, 0, 0, 0);
    assert_eq!(raw.simple(), 0);

    let mut structured = Raw::with_export(&server.socket, "root", true);
    structured.request(0, 0, SIZE_BYTES, 1);
    let chunks = structured.structured();
    assert_eq!((chunks[0].0, chunks.len()), (0x8001, 1), "an error, without content");
    structured.request(0, 1 << 2, 0, 65_536);
    let chunks = structured.structured();
    assert_eq!((chunks[0].0, chunks.len(), &chunks[0].1[8..]), (1, 1, &image[..65_536]), "in one piece");
    structured.request(7, 1 << 3, 0, u32::MAX);
    assert_eq!(structured.structured()[0].0, 0x8001, "beyond the end");
    structured.request(7, 1 << 3, 0, SIZE_BYTES as u32);
    assert_eq!(structured.structured()[0].1.len(), 4 + 8, "one run");

    for (what, bytes) in
        [("no magic", vec![0; 28]), ("a write of 4 GiB", request(1, 0, 0, u32::MAX)), ("garbage", vec![0xa5; 4096])]
    {
        let mut raw = Raw::with_export(&server.socket, "root", false);
        let _ = raw.0.write_all(&bytes);
        assert!(raw.is_ended(), "{what}");
        serves(&server, &image);
    }
}

#[test]
fn whoever_goes_in_the_middle_takes_nothing_along() {
    let (store, image, server) = filled();
    let whole = [&[0, 0, 0, 3], b"IHAVEOPT".as_slice(), &[0, 0, 0, 7, 0, 0, 0, 10], &string("root"), &[0, 0]].concat();
    for len in 0..whole.len() {
        let mut raw = Raw::greeted(&server.socket);
        raw.say(&whole[..len]);
    }
    drop(server);
    let overlay = store.path("overlay");
    let server = NbdServer::start(&store, "latest", &["--writable", overlay.to_str().expect("text")]);
    let write = [request(1, 0, 10 * 4096, 8192), vec![7; 8192]].concat();
    for len in (0..write.len()).step_by(997) {
        let mut raw = Raw::with_export(&server.socket, "root", false);
        raw.say(&write[..len]);
    }
    serves(&server, &image);
}

#[test]
fn a_thousand_connections_are_refused_and_those_there_are_go_on() {
    let (_store, image, server) = filled();
    let mut honest = Raw::with_export(&server.socket, "root", false);
    let mut there = Vec::new();
    let mut refused = 0;
    for _ in 0..1000 {
        let Ok(stream) = std::os::unix::net::UnixStream::connect(&server.socket) else {
            refused += 1;
            continue;
        };
        there.push(stream);
    }
    honest.request(0, 0, 10 * 4096, 4096);
    assert_eq!((honest.simple(), honest.take(4096)), (0, image[10 * 4096..11 * 4096].to_vec()));
    assert!(there.len() > 200, "{refused} were not even let in");
    drop(there);
    // They have gone: one more is let in, once the server has noticed.
    let start = Instant::now();
    loop {
        let mut raw = Raw::connected(&server.socket);
        let mut greeting = [0; 18];
        if std::io::Read::read_exact(&mut raw.0, &mut greeting).is_ok() && raw.0.write_all(&[0, 0, 0, 3]).is_ok() {
            let answers = raw.ask(LIST, &[]);
            match answers[0].0 {
                2 => break,
                other => assert_eq!(other, POLICY, "it hears that there is no room"),
            }
        }
        assert!(start.elapsed() < DEADLINE, "there is room again");
    }
    serves(&server, &image);
}

#[test]
fn strangers_take_no_place_of_those_who_are_served() {
    let (_store, image, server) = filled();
    // Whoever says nothing gives way, however many there are.
    let silent: Vec<Raw> = (0..100).map(|_| Raw::connected(&server.socket)).collect();
    // Whoever is served has its place; the next one hears that there is none, and gets one once somebody goes.
    let mut readers: Vec<Raw> = (0..64).map(|_| Raw::with_export(&server.socket, "root", false)).collect();
    let mut next = Raw::greeted(&server.socket);
    next.say(&[0, 0, 0, 3]);
    assert_eq!(next.ask(LIST, &[])[0].0, POLICY);
    readers[0].request(0, 0, 10 * 4096, 4096);
    assert_eq!((readers[0].simple(), readers[0].take(4096)), (0, image[10 * 4096..11 * 4096].to_vec()));
    drop(readers.pop());
    let start = Instant::now();
    while next.ask(LIST, &[])[0].0 == POLICY {
        assert!(start.elapsed() < DEADLINE, "there is room again");
        std::thread::yield_now();
    }
    drop(silent);
}

#[test]
fn whoever_never_reads_holds_up_nobody() {
    let store = Store::new();
    let images = store.fill_with_noise(1);
    let server = NbdServer::start(&store, "latest", &[]);
    let mut deaf = Vec::new();
    for structured in [true, false, true, false] {
        let mut raw = Raw::with_export(&server.socket, "root", structured);
        raw.0.set_nonblocking(true).expect("set");
        // Until nothing more is taken of it.
        let asked = request(0, 0, 0, SIZE_BYTES as u32);
        let mut count = 0;
        loop {
            match raw.0.write(&asked) {
                Ok(written) if written == asked.len() => count += 1,
                Ok(_) => break,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        assert!(count > 8, "{count} requests");
        deaf.push(raw);
    }
    for _ in 0..10 {
        serves(&server, &images[0]);
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 256 << 10, "{kib} KiB");
    // And the server ends all the same.
    let start = Instant::now();
    server.end();
    assert!(start.elapsed() < DEADLINE);
}

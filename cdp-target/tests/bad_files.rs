//! Segments that are not what they were: another group's, renamed, cut at every length, empty, grown, gone.
//!
//! The rest of the store is served; what is hit is named; nothing that is wrong is ever exported. What the program says of it
//! stands in `what_a_command_says`.

#![expect(clippy::disallowed_methods, reason = "puts what is no file in place")]

mod journal_support;
mod whole_store;

use cdp_protocol::frame;
use cdp_protocol::units::GroupId;
use cdp_target::journal::segment::Header;
use journal_support::GROUP;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use whole_store::{Made, Outcome};

/// The same segment as if it were another group's: valid in itself, and none of our business.
fn of_another_group(segment: &[u8]) -> Vec<u8> {
    let other = GroupId([8; 16]);
    let (header, mut at) = Header::decode(segment).expect("a header");
    let mut bytes = Header { group: other, ..header }.encode();
    while let Ok(frame) = frame::decode(&GROUP, &segment[at..]) {
        bytes.extend_from_slice(&frame::encode(&other, &frame.header, frame.payload));
        at += frame.bytes.len();
    }
    bytes.extend_from_slice(&segment[at..]);
    assert_eq!(bytes.len(), segment.len());
    bytes
}

#[test]
fn segments_that_do_not_belong_where_they_are() {
    let made = Made::new();
    let segments = made.segments();
    let [first, second, open] = segments.as_slice() else { panic!("three segments") };
    let other = of_another_group(&second.1);
    let changes: Vec<(&str, &Path, Vec<u8>)> = vec![
        ("another group's", &second.0, other),
        ("another group's, open", &open.0, of_another_group(&open.1)),
        ("the first in place of the second", &second.0, first.1.clone()),
        ("the second in place of the first", &first.0, second.1.clone()),
        ("a sealed one in place of the open one", &open.0, second.1.clone()),
        ("the open one in place of a sealed one", &second.0, open.1.clone()),
        ("empty", &second.0, vec![]),
        ("empty, open", &open.0, vec![]),
        ("grown by zeros", &second.0, [&second.1[..], &[0; 5000]].concat()),
        ("grown by zeros, open", &open.0, [&open.1[..], &[0; 5000]].concat()),
        ("grown by garbage, open", &open.0, [&open.1[..], &[0xa5; 5000]].concat()),
        ("grown by itself, open", &open.0, [&open.1[..], &open.1[..]].concat()),
        ("no segment at all", &first.0, b"#!/bin/sh\nexit 1\n".to_vec()),
    ];
    for (what, path, bytes) in changes {
        made.put_back(|files| drop(files.insert(path.to_owned(), bytes)));
        let is_open = path == open.0;
        let outcome = made.judge(path, is_open);
        println!("{what}: {outcome:?}");
        assert!(
            is_open || matches!(outcome, Outcome::Blocks | Outcome::Coarse | Outcome::Noticed),
            "{what}: {outcome:?}"
        );
        assert!(!what.starts_with("grown") || !is_open || outcome == Outcome::Harmless, "{what}: {outcome:?}");
    }
}

/// All that is hit is named.
const fn is_named(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Blocks | Outcome::Coarse)
}

#[test]
fn segments_that_are_gone() {
    let made = Made::new();
    let segments = made.segments();
    for (at, (path, _)) in segments.iter().enumerate() {
        made.put_back(|files| drop(files.remove(path)));
        let outcome = made.judge(path, false);
        assert!(is_named(outcome), "segment {}: {outcome:?}", at + 1);
        made.put_back(|files| {
            let bytes = files.remove(path).expect("there");
            files.insert(path.with_extension("seg.old"), bytes);
        });
        assert!(is_named(made.judge(path, false)), "segment {} renamed", at + 1);
    }
}

#[test]
fn segments_that_are_no_files() {
    let made = Made::new();
    let segments = made.segments();
    for (at, (path, _)) in segments.iter().enumerate() {
        let is_open = at + 1 == segments.len();
        for (tool, arguments) in [("mkdir", &[][..]), ("mkfifo", &[]), ("ln", &["-s", "/dev/zero"])] {
            made.put_back(|files| drop(files.remove(path)));
            let made_it = Command::new(tool).args(arguments).arg(path).status().expect("the tool starts");
            assert!(made_it.success(), "{tool}");
            let outcome = made.judge(path, false);
            println!("{tool} for segment {}: {outcome:?}", at + 1);
            assert!(is_named(outcome) || (is_open && outcome == Outcome::Refused), "{tool}: {outcome:?}");
            std::fs::remove_dir(path).or_else(|_| std::fs::remove_file(path)).expect("removed");
        }
    }
}

#[test]
fn segments_cut_at_every_length() {
    let made = Made::new();
    let every = ["CDP_EVERY_BYTE", "CDP_EVERY_BIT"].into_iter().any(|name| std::env::var_os(name).is_some());
    let segments = made.segments();
    for (at, (path, bytes)) in segments.iter().enumerate() {
        let is_open = at + 1 == segments.len();
        let mut outcomes: BTreeMap<Outcome, u32> = BTreeMap::new();
        for len in (0..bytes.len()).step_by(if every { 1 } else { 23 }) {
            made.put_back(|files| files.get_mut(path).expect("there").truncate(len));
            let outcome = made.judge(path, is_open);
            let fits = if is_open {
                matches!(outcome, Outcome::Shorter | Outcome::Harmless)
            } else {
                matches!(outcome, Outcome::Blocks | Outcome::Coarse | Outcome::Noticed)
            };
            assert!(fits, "segment {} cut to {len}: {outcome:?}", at + 1);
            *outcomes.entry(outcome).or_default() += 1;
        }
        println!("segment {}: {outcomes:?}", at + 1);
    }
}

/// Runs a command on the store; gives its status, stdout and stderr.
fn run(made: &Made, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_cdp-target"))
        .args(arguments)
        .env("CDP_TARGET_DATA", made.folder.path())
        .output()
        .expect("the program starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// What is done to a segment (`None`: it is removed), and words of what `verify` says then.
type Change = (&'static str, Option<Vec<u8>>, &'static str);

#[test]
fn what_a_command_says() {
    let made = Made::new();
    let segments = made.segments();
    let second = &segments[1];
    let oldest = made.points[0].head.epoch.0;
    let first_point = oldest.to_string();
    let changes: [Change; 4] = [
        ("gone", None, "the segment is missing"),
        ("empty", Some(vec![]), "cut off"),
        ("cut", Some(second.1[..3000].to_vec()), "cut off"),
        ("another group's", Some(of_another_group(&second.1)), "segment's header is damaged"),
    ];
    for (what, bytes, words) in changes {
        made.put_back(|files| match bytes {
            Some(bytes) => drop(files.insert(second.0.clone(), bytes)),
            None => drop(files.remove(&second.0)),
        });
        let (status, report, error) = run(&made, &["verify", "branch/main"]);
        assert_eq!(status, Some(1), "{what}: {error}");
        assert!(report.contains(words) || error.contains(words), "{what}: {words:?} is not in\n{report}\n{error}");
        let (status, listed, error) = run(&made, &["points", "branch/main", "--json"]);
        assert_eq!(status, Some(0), "{what}: points: {error}");
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("json");
        let listed = listed["points"].as_array().expect("points");
        assert!(listed.iter().any(|point| point["epoch"] == oldest), "{what}: older ones are listed");
        let output = made.folder.path().join("image");
        let output = output.to_str().expect("text");
        let first = ["export", "branch/main/v0", "--at", &first_point, "--output", output, "--force"];
        let (status, _, error) = run(&made, &first);
        let not_covered = error.contains("not covered") || error.contains("never sent");
        assert!(status == Some(0) || not_covered, "{what}: an older point is served: {error}");
        let (status, _, error) =
            run(&made, &["export", "branch/main/v0", "--at", "latest", "--output", output, "--force"]);
        assert_eq!(status, Some(1), "{what}: {error}");
        assert!(error.lines().any(|line| line.starts_with("hint: ")), "{what}: {error}");
        println!("{what}:\n{report}{error}");
    }
}

//! House rules that no compiler knows.

#![allow(clippy::disallowed_methods, reason = "reads the source tree")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the workspace")
}

fn files_below(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            files_below(&path, ending, found);
        } else if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
}

fn rust_files() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for folder in ["protocol", "cdp-source", "cdp-target", "tests", "benches"] {
        files_below(&root().join(folder), "rs", &mut found);
    }
    assert!(found.len() > 50, "the tree is where it is expected");
    found.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).expect("text"))).collect()
}

#[test]
fn every_file_says_what_it_owns_and_none_has_two_nouns() {
    for (path, text) in rust_files() {
        let path = path.display();
        assert!(text.starts_with("//! "), "{path}: starts with what it owns");
        let lines = text.lines().count();
        assert!(lines <= 1000, "{path}: {lines} lines are two files");
    }
}

#[test]
fn nothing_is_left_for_later() {
    for (path, text) in rust_files() {
        for word in ["todo", "unimplemented", "dbg"].map(|word| format!("{word}!(")) {
            assert!(!text.contains(&word), "{}: {word}", path.display());
        }
        for sleep in ["thread::sle", "time::sle"].map(|start| format!("{start}ep(")) {
            let uses = text.matches(&sleep).count();
            assert!(uses <= allowed_sleeps(&path), "{}: {sleep} is no way to wait for something", path.display());
        }
        assert!(!text.contains(&format!("#[{}", "ignore")), "{}: a test is run or it is not there", path.display());
    }
}

/// Where time itself is the event that is waited for: back-off and intervals.
fn allowed_sleeps(path: &Path) -> usize {
    let name = path.strip_prefix(root()).expect("below the root").display().to_string();
    match name.as_str() {
        "cdp-source/src/agent/mod.rs" => 2,
        "cdp-source/src/cli/restore.rs"
        | "cdp-source/src/cli/image.rs"
        | "cdp-source/src/control.rs"
        | "cdp-target/src/control.rs"
        | "cdp-target/src/cli/context.rs" => 1,
        _ => 0,
    }
}

#[test]
fn the_protocol_touches_no_socket_no_file_and_no_clock() {
    let manifest = std::fs::read_to_string(root().join("protocol/Cargo.toml")).expect("a manifest");
    for word in ["tokio", "quinn", "cdp-seams"] {
        assert!(!manifest.contains(word), "protocol depends on {word}");
    }
    let mut found = Vec::new();
    files_below(&root().join("protocol/src"), "rs", &mut found);
    for path in found {
        let text = std::fs::read_to_string(&path).expect("text");
        for word in ["std::fs", "std::net", "std::time", "std::io"] {
            assert!(!text.contains(word), "{}: {word}", path.display());
        }
    }
}

#[test]
fn unsafe_code_stands_only_where_the_architecture_says() {
    let architecture = std::fs::read_to_string(root().join("docs/architecture.md")).expect("docs");
    for (path, text) in rust_files() {
        let name = path.strip_prefix(root()).expect("below the root").display().to_string();
        let allows = ["allow", "expect"].iter().any(|word| text.contains(&format!("{word}(unsafe_code")));
        if allows {
            assert!(
                architecture.contains(&format!("`{name}`")),
                "{name} has unsafe code that docs/architecture.md does not name"
            );
        }
    }
}

#[test]
fn every_locked_version_is_at_or_above_its_floor() {
    let floors: toml::Table =
        std::fs::read_to_string(root().join("tests/floors.toml")).expect("floors").parse().expect("TOML");
    let lock: toml::Table =
        std::fs::read_to_string(root().join("Cargo.lock")).expect("a lock file").parse().expect("TOML");
    let mut locked: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in lock["package"].as_array().expect("packages") {
        let (name, version) = (package["name"].as_str().expect("name"), package["version"].as_str().expect("version"));
        locked.entry(name).or_default().push(version);
    }
    for (name, floor) in floors["floors"].as_table().expect("floors") {
        let floor = floor["version"].as_str().expect("version");
        for version in locked.get(name.as_str()).unwrap_or_else(|| panic!("{name} is no longer used: remove its floor"))
        {
            assert!(parse(version) >= parse(floor), "{name} {version} is below its floor {floor}");
        }
    }
    for (name, exact) in floors["exact"].as_table().expect("exact versions") {
        assert_eq!(locked[name.as_str()], [exact["version"].as_str().expect("version")], "{name}");
    }
}

#[test]
fn a_floor_above_the_lock_is_noticed() {
    assert!(parse("0.11.9") < parse("0.11.19") && parse("1.0.0") > parse("0.99.99"));
}

fn parse(version: &str) -> Vec<u64> {
    let numbers = version.split(['-', '+']).next().expect("a version");
    numbers.split('.').map(|number| number.parse().expect("a number")).collect()
}

/// Names and descriptions of a crate's metrics, as rows of a table.
fn metric_rows(path: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(path)).expect("the constants");
    let (mut rows, mut described) = (Vec::new(), String::new());
    for line in text.lines() {
        if let Some(description) = line.strip_prefix("/// ") {
            description.clone_into(&mut described);
        } else if let Some((_, name)) = line.strip_prefix("pub const ").and_then(|line| line.split_once(": &str = ")) {
            rows.push(format!("| `{}` | {described} |", name.trim_matches(['"', ';'])));
        }
    }
    rows
}

#[test]
fn the_page_of_metrics_has_each_metric_once_and_no_other() {
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).expect("the page");
    let written: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let constants: Vec<String> =
        ["cdp-source/src/metrics.rs", "cdp-target/src/metrics.rs"].into_iter().flat_map(metric_rows).collect();
    assert!(constants.len() > 20, "the constants are where they are expected");
    assert_eq!(written, constants, "docs/metrics.md has to be, in this order:\n{}", constants.join("\n"));
}

#[test]
fn the_top_level_is_what_was_agreed() {
    let agreed =
        ["Cargo.lock", "Cargo.toml", "README.md", "benches", "cdp-source", "cdp-target", "clippy.toml", "deny.toml"];
    let more = ["docs", "packaging", "protocol", "rustfmt.toml", "scripts", "tests"];
    for entry in std::fs::read_dir(root()).expect("the root") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        let hidden = name.starts_with('.') || name == "target" || name == "proptest-regressions";
        assert!(hidden || agreed.contains(&name.as_str()) || more.contains(&name.as_str()), "{name} is not agreed");
    }
}

#[test]
fn every_field_of_a_shown_document_is_described() {
    let page = std::fs::read_to_string(root().join("docs/json.md")).expect("docs");
    let mut documents = 0;
    for section in page.split("\n## ").skip(1) {
        let (described, shown): (Vec<_>, Vec<_>) =
            section.split("```").enumerate().partition(|(at, _)| at.is_multiple_of(2));
        let described: String = described.into_iter().map(|(_, text)| text).collect();
        let words: Vec<&str> = described
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .filter(|word| !word.is_empty())
            .collect();
        for (_, block) in shown {
            let (command, document) = block.trim_start().split_once('\n').expect("a command and its document");
            let document: serde_json::Value =
                serde_json::from_str(document).unwrap_or_else(|error| panic!("{command}: {error}"));
            let mut fields = Vec::new();
            fields_of(&document, &mut fields);
            for field in fields {
                assert!(words.contains(&field.as_str()), "{command}: nothing says what {field} is");
            }
            documents += 1;
        }
    }
    assert!(documents >= 11, "{documents} documents");
}

/// Names of all fields, but for those that are numbers: keys of a map.
fn fields_of(value: &serde_json::Value, fields: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(object) => {
            for (name, value) in object {
                fields.extend(Some(name.clone()).filter(|name| name.parse::<u64>().is_err()));
                fields_of(value, fields);
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| fields_of(value, fields)),
        _ => {}
    }
}

//! One flipped bit anywhere in a whole store: refused with the file's name, or the points named that it hits, or harmless.
//!
//! As `verify` and `export` see it: store, authority, catalogue, keys out of escrow, then every point. What is refused
//! names the file. What opens says of offices, keys and points what it said before the flip, but for points that are named as
//! damaged; and what is served of those is right or an error.

mod journal_support;
mod whole_store;

use cdp_seams::random::SimRandom;
use std::collections::BTreeMap;
use std::path::Path;
use whole_store::{Made, Outcome, is_derived, is_segment};

/// Every byte where `CDP_EVERY_BYTE` or `CDP_EVERY_BIT` is set; otherwise one in so many.
fn stride(path: &Path) -> u64 {
    let is_set = |name| std::env::var_os(name).is_some();
    if is_set("CDP_EVERY_BYTE") || is_set("CDP_EVERY_BIT") {
        1
    } else if is_segment(path) || is_derived(path) {
        12
    } else {
        3
    }
}

#[test]
fn every_byte_of_a_store() {
    flip_all(&Made::new());
}

/// Packs, image index, rewritten segments: none of them has a byte that nobody looks at.
#[test]
fn every_byte_of_a_store_that_was_pruned() {
    let made = Made::pruned();
    let kinds = made.files.iter().filter(|(path, _)| is_derived(path)).filter_map(|(path, _)| path.extension());
    let kinds: std::collections::BTreeSet<_> = kinds.collect();
    assert_eq!(kinds.len(), 3, "packs, an image index, rewritten segments: {kinds:?}");
    flip_all(&made);
}

fn flip_all(made: &Made) {
    let random = SimRandom::new(11);
    let every = std::env::var_os("CDP_EVERY_BIT").is_some();
    let (mut flips, mut outcomes) = (0, BTreeMap::<String, BTreeMap<Outcome, u32>>::new());
    for (path, bytes) in &made.files {
        let name = path.strip_prefix(made.folder.path()).expect("below the store").display().to_string();
        let of_file = outcomes.entry(name).or_default();
        let stride = stride(path);
        for byte in (random.below(stride)..bytes.len() as u64).step_by(stride as usize) {
            let first = if every { 0 } else { random.below(8) };
            for bit in first..if every { 8 } else { first + 1 } {
                made.put_back(|files| files.get_mut(path).expect("a file")[byte as usize] ^= 1 << bit);
                let outcome = made.judge(path, false);
                let has_to_notice = is_derived(path) || (is_segment(path) && byte < made.last_proof_at);
                let may_be = outcome != Outcome::Harmless || !has_to_notice;
                assert!(may_be, "{} byte {byte} bit {bit}: not noticed", path.display());
                *of_file.entry(outcome).or_default() += 1;
                flips += 1;
            }
        }
    }
    for (name, outcomes) in &outcomes {
        println!("{name}: {outcomes:?}");
    }
    println!("{flips} flips: each refused by name, its points named, or harmless");
}

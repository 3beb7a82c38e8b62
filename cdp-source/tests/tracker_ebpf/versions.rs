//! What an older version of this program left pinned: other programs on the same maps, or other maps.

use crate::loop_device::RawDisk;
use crate::{Group, MIB, blocks, starts_over};
use aya::maps::{Array, Map, MapData};
use cdp_source::tracker::Tracker;
use roaring::RoaringBitmap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Bytes of the map `identity`: a length, then JSON.
const IDENTITY_BYTES: usize = 16384;
/// Blocks that each writer goes through, one after the other; and how many writers there are.
const ROUND: u32 = 16 * 1024;
const WRITERS: u32 = 3;

/// Makes the tracking in `pins` one of an older version, in its map and in the state folder.
fn rewrite(group: &Group, pins: &Path, key: &str, value: &serde_json::Value) {
    let record = group.folder.path().join(format!("state/tracker-{}.json", group.id));
    let mut identity: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&record).expect("read")).expect("an identity");
    assert!(identity[key] != *value && !identity[key].is_null());
    identity[key] = value.clone();
    let json = serde_json::to_vec(&identity).expect("text");
    std::fs::write(&record, &json).expect("written");
    let mut bytes = [0; IDENTITY_BYTES];
    bytes[..8].copy_from_slice(&(json.len() as u64).to_ne_bytes());
    bytes[8..8 + json.len()].copy_from_slice(&json);
    let map = Map::Array(MapData::from_pin(pins.join("identity")).expect("pinned"));
    let mut map: Array<_, [u8; IDENTITY_BYTES]> = map.try_into().expect("an array");
    map.set(0, bytes, 0).expect("set");
}

#[test]
fn maps_of_an_older_layout_start_over_and_are_removed() {
    starts_over("has layout 1", |group, pins, _| rewrite(group, pins, "layout", &1.into()));
}

#[test]
fn older_programs_are_replaced_under_load_without_losing_a_write() {
    const TAKE_OVERS: usize = 4;
    let Some(mut group) = Group::new() else { return };
    let captured = blocks(WRITERS * ROUND..WRITERS * ROUND + 256);
    let node = group.add_device(u64::from(WRITERS * ROUND) * 4096 + MIB);
    let mut tracker = group.open_clean(&[&node]);
    tracker.set_memo(b"head").expect("kept");
    // Captured and not acked: it has to be there after each.
    RawDisk::open(&node).write(u64::from(WRITERS * ROUND) * 4096, MIB, 1);
    assert_eq!(tracker.flip().expect("flipped"), std::slice::from_ref(&captured));

    let (stop, round) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (written, found) = std::thread::scope(|scope| {
        let write = |writer: u32| {
            let (disk, mut written) = (RawDisk::open(&node), Vec::new());
            // Seldom a block twice, so that no other write stands in for one that is lost.
            for block in (writer * ROUND..(writer + 1) * ROUND).cycle() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let from = round.load(Ordering::SeqCst);
                disk.write(u64::from(block) * 4096, 4096, 1);
                written.push((block, from, round.load(Ordering::SeqCst)));
            }
            written
        };
        let writers: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(move || write(writer))).collect();
        // Joined also when something below panics.
        let stop_at_end = StopAtEnd(&stop);
        let mut found = Vec::new();
        for _ in 0..TAKE_OVERS {
            let old = tracker.pin_folder().to_owned();
            drop(tracker);
            rewrite(&group, &old, "program", &"an older one".into());
            tracker = group.open(&[&node]);
            assert_eq!((tracker.report().started_over, tracker.report().first_copy), (None, None));
            assert_eq!(tracker.memo().expect("read"), b"head");
            assert!(tracker.pin_folder() != old && !old.exists(), "the new one is there, the old one is gone");
            let mut set = tracker.take_recovered().remove(0);
            assert!(captured.is_subset(&set));
            set |= tracker.flip().expect("flipped").remove(0);
            tracker.retain_unacked(std::slice::from_ref(&captured)).expect("acked");
            found.push(set);
            round.fetch_add(1, Ordering::SeqCst);
        }
        drop(stop_at_end);
        let written: Vec<_> = writers.into_iter().flat_map(|writer| writer.join().expect("ended")).collect();
        found.push(tracker.flip().expect("flipped").remove(0));
        (written, found)
    });
    assert!(written.len() > 100, "{} writes", written.len());
    for (block, from, until) in &written {
        let until = (until + 1).min(TAKE_OVERS);
        let is_found = found[*from..=until].iter().any(|set: &RoaringBitmap| set.contains(*block));
        assert!(is_found, "block {block}, written between take-overs {from} and {until}");
    }
    eprintln!("{} writes over {TAKE_OVERS} take-overs", written.len());
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

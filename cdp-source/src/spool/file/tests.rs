//! The file on a disk that is smaller than it may be.

use super::*;
use cdp_seams::storage::sim::{Fault, SimStorage};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

fn opened(disk: &SimStorage) -> SpoolFile {
    SpoolFile::open(Arc::new(disk.clone()), Path::new("/spool"), Layout::of(1 << 30)).expect("made")
}

/// Writes pieces of a MiB, at most `most`, until there is no room. Gives how many there was room for.
fn fill(file: &mut SpoolFile, for_merging: bool, most: usize) -> usize {
    let frames = [Bytes::from(vec![7; MIB as usize])];
    let mut written = (0..most).map(|_| file.write(&frames, for_merging).expect("a full disk is no failure"));
    written.by_ref().take_while(Option::is_some).count()
}

#[test]
fn where_the_disk_says_that_it_has_no_more_an_eighth_of_what_there_is_stays_for_merging() {
    let disk = SimStorage::new(1);
    let mut file = opened(&disk);
    // Twice 64 MiB leave as much free as the file has, three times do not.
    disk.set_free_bytes(220 * MIB);
    assert_eq!(fill(&mut file, false, 500), 112);
    assert_eq!(file.free_bytes(), 16 * MIB, "what could come is not counted");
    assert_eq!(fill(&mut file, true, 500), 16);
    disk.set_free_bytes(u64::MAX);
    assert_eq!(fill(&mut file, false, 1), 1, "there is room again");
}

#[test]
fn where_the_disk_is_full_unawares_it_is_the_same() {
    let disk = SimStorage::new(2);
    let mut file = opened(&disk);
    assert_eq!(fill(&mut file, false, 56), 56);
    // It says how much is free, and then does not give it.
    disk.fault_at(disk.calls() + 1, Fault::Error(io::ErrorKind::StorageFull));
    assert_eq!(fill(&mut file, false, 1), 0);
    assert_eq!(file.free_bytes(), 8 * MIB);
    disk.set_free_bytes(0);
    assert_eq!(fill(&mut file, true, 500), 8);
}

//! The newest acked point, whose proof did not reach the disk: shown as soon as somebody may recover it.

#![expect(clippy::disallowed_methods, reason = "cuts a file of the real file system")]

mod journal_support;

use cdp_protocol::frame::{self, Kind};
use cdp_protocol::units::{OfficeId, Timestamp};
use cdp_seams::storage::{Storage, SystemStorage};
use cdp_target::catalog::open_group;
use cdp_target::config::{Config, LISTEN_DEFAULT};
use cdp_target::journal::segment::{self, Header};
use cdp_target::journal::{GroupJournal, JournalLimits};
use cdp_target::store::{self, GroupPlace, Store, StoreError};
use journal_support::{GROUP, Source, identity};
use std::path::Path;
use std::sync::Arc;

/// Cuts the last frame off, which is a proof.
fn cut_the_last_proof(path: &Path) {
    let bytes = std::fs::read(path).expect("read");
    let mut at = Header::decode(&bytes).expect("a header").1;
    let mut last = None;
    while let Ok(frame) = frame::decode(&GROUP, &bytes[at..]) {
        last = Some((at, frame.header.kind));
        at += frame.bytes.len();
    }
    let (at, kind) = last.expect("a frame");
    assert_eq!(kind, Kind::Synced, "the last frame is a proof");
    std::fs::File::options().write(true).open(path).and_then(|file| file.set_len(at as u64)).expect("cut");
}

#[test]
fn the_newest_acked_point_is_shown_though_its_proof_was_lost() {
    let folder = tempfile::tempdir().expect("a folder");
    let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
    let config = Config::new(LISTEN_DEFAULT, vec![]);
    store::init(&storage, folder.path(), &config, Timestamp(0), |_| Ok::<_, StoreError>("5".repeat(32))).expect("made");
    let store = Store::open(Arc::clone(&storage), folder.path()).expect("opened");
    let place = GroupPlace { office: OfficeId([1; 16]), group: GROUP };
    let group_folder = store.group_folder(place);
    let mut journal = GroupJournal::create(storage, &group_folder, identity(), JournalLimits::default()).expect("made");
    let mut source = Source::new(4);
    source.grant(&mut journal).expect("granted");
    for _ in 0..3 {
        source.make(false, 2);
        let frames = source.attempt.as_ref().map_or(0, |attempt| attempt.frames.len());
        source.send(&mut journal, 0, frames).expect("sent");
        source.sync(&mut journal).expect("synced");
    }
    drop(journal);
    cut_the_last_proof(&segment::path(&group_folder, 1));
    let newest = |store: &Store| {
        let group = open_group(store, place).expect("opened");
        let points = group.points().expect("listed");
        (points.last().map(|point| point.epoch), group.view().unproven_bytes() > 0)
    };
    let epochs: Vec<_> = source.points.iter().map(|point| Some(point.head.epoch)).collect();

    let server = store.lock().expect("free");
    assert_eq!(newest(&store), (epochs[1], true), "a server runs: what it has not proven is on its way");
    drop(server);
    assert_eq!(newest(&store), (epochs[2], false), "no server runs: it is recovered");
    let server = store.lock().expect("free");
    assert_eq!(newest(&store), (epochs[2], false), "and stays");
    drop(server);
}

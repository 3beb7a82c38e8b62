//! Which images stay, and that nothing is written where the marker is not.
#![expect(clippy::disallowed_methods, reason = "folders are taken away, which is a matter of the real file system")]

use super::*;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{AttemptId, Class, Epoch, KeyId};
use cdp_seams::storage::SystemStorage;
use proptest::prelude::{prop_assert, proptest};

const GROUP: GroupId = GroupId([3; 16]);

fn storage() -> Arc<dyn Storage> {
    Arc::new(SystemStorage)
}

fn footer(epoch: u64) -> Footer {
    Footer {
        group: GROUP,
        attempt: AttemptId([4; 16]),
        key: KeyId([5; 8]),
        epoch: Epoch(epoch),
        cut_time: Timestamp(1_700_000_000_000 + epoch as i64 * 60_000),
        made: Timestamp(1_700_000_000_000),
        class: Class::Crash,
        label: None,
        volumes: Vec::new(),
    }
}

/// An image of no volumes.
fn publish(folder: &ImageFolder, key: &DataKey, epoch: u64) -> PathBuf {
    let Begun { file, .. } = folder.begin().expect("begun");
    let footer = footer(epoch);
    let header = super::super::format::Header {
        group: GROUP,
        attempt: footer.attempt,
        generation: cdp_protocol::units::Generation(1),
    };
    let bytes = [header.encode(), footer.encode(key)].concat();
    file.write_at(&bytes, 0).expect("written");
    folder.publish(&footer, bytes.len() as u64, Checked::at(footer.made, None)).expect("published")
}

proptest! {
    #[test]
    fn the_newest_whole_image_and_the_best_never_go_and_so_many_whole_ones_stay(
        unreadable in proptest::collection::vec(proptest::option::of(0..3_u64), 0..20),
        keep in 0..6_usize,
    ) {
        let gone = to_remove(&unreadable, keep);
        let newest = unreadable.iter().position(Option::is_some);
        prop_assert!(newest.is_none_or(|newest| !gone.contains(&newest)));
        let stays = |at: &usize| unreadable[*at].is_some() && !gone.contains(at);
        let (left, whole) = ((0..unreadable.len()).filter(stays).count(), unreadable.iter().flatten().count());
        let wanted = whole.min(keep.max(1));
        prop_assert!(left == wanted || left == wanted + 1, "{left} of {whole} are left");
        let fewest = |blocks: &mut dyn Iterator<Item = u64>| blocks.min();
        let kept = fewest(&mut (0..unreadable.len()).filter(stays).filter_map(|at| unreadable[at]));
        prop_assert!(kept == fewest(&mut unreadable.iter().flatten().copied()), "none that is kept lacks as little");
    }
}

#[test]
fn a_folder_is_made_ready_once_and_is_one_groups() {
    let place = tempfile::tempdir().expect("a folder");
    let missing = place.path().join("nowhere");
    assert!(init(&storage(), &missing, &[], ("main", GROUP)).is_err() && !missing.exists());
    let path = init(&storage(), place.path(), &[], ("main", GROUP)).expect("ready");
    assert_eq!(init(&storage(), place.path(), &[], ("main", GROUP)).expect("ready"), path);
    let other = init(&storage(), place.path(), &[], ("main", GroupId([9; 16])));
    assert!(matches!(other, Err(ImageError::OtherGroup { .. })));
    assert!(matches!(ImageFolder::open(storage(), &path, GroupId([9; 16])), Err(ImageError::OtherGroup { .. })));
    for (given, name) in [(place.path(), "main"), (path.as_path(), "main")] {
        assert_eq!(find(&SystemStorage, given, name).expect("found"), (path.clone(), GROUP));
    }
    assert!(matches!(find(&SystemStorage, place.path(), "other"), Err(ImageError::NoMarker(_))));
    for garbage in ["", "{}", "null", r#"{"version":2,"group":"main","group_id":"03030303030303030303030303030303"}"#] {
        std::fs::write(path.join(MARKER), garbage).expect("written");
        assert!(ImageFolder::open(storage(), &path, GROUP).is_err(), "{garbage}");
        assert!(init(&storage(), place.path(), &[], ("main", GROUP)).is_err(), "{garbage}");
    }
}

#[test]
fn nothing_is_written_once_the_marker_is_gone_or_another() {
    let place = tempfile::tempdir().expect("a folder");
    let key = DataKey::new([1; 32]);
    let path = init(&storage(), place.path(), &[], ("main", GROUP)).expect("ready");
    let folder = ImageFolder::open(storage(), &path, GROUP).expect("open");
    let Begun { path: partial, .. } = folder.begin().expect("begun");
    // What was mounted is gone, and what was under it is there.
    let away = place.path().join("away");
    std::fs::rename(&path, &away).expect("moved");
    std::fs::create_dir(&path).expect("made");
    assert!(matches!(folder.check(), Err(ImageError::NoMarker(_))));
    assert!(folder.begin().is_err() && folder.clean().is_err() && folder.prune(&key, 1, Path::new("x")).is_err());
    assert!(folder.publish(&footer(1), 0, Checked::at(Timestamp(0), None)).is_err());
    std::fs::copy(away.join(MARKER), path.join(MARKER)).expect("copied");
    assert!(folder.check().is_err(), "another file of the same content is another folder");
    assert_eq!(std::fs::read_dir(&path).expect("listed").count(), 1, "nothing was written to it");
    assert!(away.join(partial.file_name().expect("a name")).exists());
}

#[test]
fn old_images_go_with_their_manifests_and_what_is_not_ours_stays() {
    let place = tempfile::tempdir().expect("a folder");
    let (key, other_key) = (DataKey::new([1; 32]), DataKey::new([2; 32]));
    let path = init(&storage(), place.path(), &[], ("main", GROUP)).expect("ready");
    let folder = ImageFolder::open(storage(), &path, GROUP).expect("open");
    let made: Vec<PathBuf> = (1..=4).map(|epoch| publish(&folder, &key, epoch)).collect();
    assert!(!path.join(PARTIAL).exists() && !path.join(TABLE).exists());
    std::fs::write(path.join("foreign.cdpimage"), "of somebody else").expect("written");
    let listing = folder.list(&key).expect("listed");
    let epochs: Vec<u64> = listing.images.iter().map(|listed| listed.footer.epoch.0).collect();
    assert_eq!((epochs, listing.unreadable.len()), (vec![4, 3, 2, 1], 1));
    assert!(listing.images.iter().all(|listed| listed.checked.is_some() && !listed.is_damaged()));
    assert_eq!(folder.list(&other_key).expect("listed").unreadable.len(), 5, "another key opens none");
    // The newest is found damaged: two whole ones stay behind it.
    let mut newest = folder.list(&key).expect("listed").images.remove(0);
    newest.checked = Some(Checked::at(Timestamp(0), Some("rot".into())));
    folder.write_manifest(&newest).expect("written");
    assert_eq!(folder.prune(&key, 2, &made[3]).expect("pruned"), [made[0].clone()]);
    assert!(!made[0].with_extension("json").exists() && made[1].with_extension("json").exists());
    assert!(path.join("foreign.cdpimage").exists());
    assert!(folder.prune(&key, 2, &made[3]).expect("pruned").is_empty());
    // The clock was set back: what was just made seems to be the oldest, and stays.
    assert_eq!(folder.prune(&key, 1, &made[1]).expect("pruned"), [made[3].clone(), made[2].clone()]);
    assert!(made[1].exists());
}

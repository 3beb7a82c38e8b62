//! Changes that reach a group's writer late: after whoever prepared them has gone on to prepare another.

mod journal_support;

use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::SimStorage;
use cdp_seams::storage::{Storage, read_all};
use cdp_target::checkpoint::builder::Builder;
use cdp_target::journal::change::Change;
use cdp_target::journal::file::FileId;
use cdp_target::journal::manifest::SealedSegment;
use cdp_target::journal::{Damage, GroupJournal, GroupView, JournalError, JournalLimits};
use cdp_target::prune::{CHUNK_BYTES_MAX, Owner, Prune, PruneError, Pruned};
use cdp_target::restore::keyring::Keyring;
use cdp_target::retention::Ladder;
use cdp_target::verify::verify;
use journal_support::{Source, identity, image_cells, key};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 5000 };
const HOUR_MS: i64 = 3_600_000;
const LADDER: Ladder = Ladder { every_s: 3 * 3600, hourly_s: 6 * 3600, daily_s: 86_400, weekly_s: 0 };

/// A history over segments of a few frames.
fn history(seed: u64) -> (SimStorage, GroupJournal, Source) {
    let disk = SimStorage::new(seed);
    let mut journal =
        GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), LIMITS).expect("made");
    let mut source = Source::new(seed);
    while source.points.len() < 24 {
        source.time += HOUR_MS * 2 / 3;
        source.step(&mut journal).expect("no fault is set");
    }
    source.sync(&mut journal).expect("no fault is set");
    (disk, journal, source)
}

/// A writer whose answer does not come: the first rewriting sent to it waits, and the caller is told that it failed.
struct Late<'a> {
    journal: &'a mut GroupJournal,
    waiting: Option<Change>,
    /// Whether what waits is to be taken before what comes next.
    takes_it: bool,
    /// Whether somebody reads by an older manifest.
    is_leased: bool,
}

impl Owner for Late<'_> {
    fn adopt(&mut self, change: &Change) -> Result<Arc<GroupView>, JournalError> {
        if matches!(change, Change::Rewrite { .. }) {
            if !self.takes_it {
                self.waiting = Some(change.clone());
                return Err(JournalError::Refused("no answer in time".to_owned()));
            }
            if let Some(waiting) = self.waiting.take() {
                self.journal.adopt(&waiting)?;
            }
        }
        self.journal.adopt(change)?;
        Ok(self.journal.view())
    }

    fn is_leased(&mut self) -> Result<bool, JournalError> {
        Ok(self.is_leased)
    }
}

fn prune(owner: &mut Late<'_>, now: i64, random: u64) -> Result<Pruned, PruneError> {
    let (keyring, random): (Keyring, _) = ((&key()).into(), SimRandom::new(random));
    let prune = Prune {
        ladder: &LADDER,
        now: Timestamp(now),
        wall: Timestamp(now),
        keys: Some(&keyring),
        random: &random,
        segment_bytes_max: LIMITS.segment_bytes_max,
        chunk_bytes_max: CHUNK_BYTES_MAX,
        checkpoint_share: 0.5,
        keep_only_newest: true,
    };
    prune.run(owner.journal.view(), owner, &mut |_| true, &mut |_, _| {})
}

/// Every point that is listed is as it was sent, and nothing is damaged.
fn is_sound(disk: &SimStorage, source: &Source) {
    let view = Arc::new(GroupView::open(Arc::new(disk.clone()), Path::new(FOLDER)).expect("a view"));
    let listed: Vec<Epoch> = view.points().map(|point| point.expect("a point").epoch).collect();
    assert!(listed.len() > 2, "{listed:?}");
    for epoch in listed {
        let model = source.points.iter().find(|point| point.head.epoch == epoch).expect("it was sent");
        assert_eq!(image_cells(&view, epoch).expect("an image"), *model.cells, "point {epoch}");
    }
    let keys: Keyring = (&key()).into();
    assert_eq!(verify(&view, Some(&keys), None, &mut |_| {}).expect("verified").damages, vec![]);
}

#[test]
fn a_rewriting_that_is_taken_late_finds_its_own_files() {
    for seed in 0..8 {
        let (disk, mut journal, source) = history(seed);
        // An export holds an older manifest: the next try removes nothing.
        let mut owner = Late { journal: &mut journal, waiting: None, takes_it: false, is_leased: true };
        let refused = prune(&mut owner, source.time, 1).expect_err("no answer comes");
        assert!(matches!(refused, PruneError::Journal(JournalError::Refused(_))), "{refused}");
        assert!(owner.waiting.is_some(), "seed {seed}: nothing was rewritten");
        // The second try writes the same segments, and what the first one sent is taken just before what it sends.
        owner.takes_it = true;
        let refused = prune(&mut owner, source.time, 2).expect_err("the first try has its place");
        assert!(matches!(refused, PruneError::Journal(JournalError::Stale(_))), "{refused}");
        is_sound(&disk, &source);
        owner.is_leased = false;
        prune(&mut owner, source.time, 3).expect("pruned");
        is_sound(&disk, &source);
    }
}

#[test]
fn a_rewriting_whose_files_were_swept_away_is_refused() {
    for seed in 0..8 {
        let (disk, mut journal, source) = history(seed);
        let mut owner = Late { journal: &mut journal, waiting: None, takes_it: false, is_leased: false };
        prune(&mut owner, source.time, 1).expect_err("no answer comes");
        owner.takes_it = true;
        let refused = prune(&mut owner, source.time, 2).expect_err("the first try is taken first");
        assert!(refused.to_string().contains("is not there as it was written"), "{refused}");
        is_sound(&disk, &source);
        prune(&mut owner, source.time, 3).expect("pruned");
        is_sound(&disk, &source);
    }
}

#[test]
fn damage_of_a_file_that_gave_way_meanwhile_is_not_noted() {
    let (disk, mut journal, source) = history(4);
    let before: Vec<FileId> = journal.view().manifest().sealed.iter().map(SealedSegment::id).collect();
    let mut owner = Late { journal: &mut journal, waiting: None, takes_it: true, is_leased: false };
    prune(&mut owner, source.time, 1).expect("pruned");
    let now: Vec<FileId> = journal.view().manifest().sealed.iter().map(SealedSegment::id).collect();
    let gone: Vec<FileId> = before.into_iter().filter(|id| !now.contains(id)).collect();
    assert!(!gone.is_empty(), "segments were rewritten");
    // Whoever read without a lease met what was swept away.
    for id in gone {
        let missing = Damage { first_epoch: Some(Epoch(0)), ..Damage::of(id, "the segment is missing".to_owned()) };
        journal.note_damages(id, &[missing]).expect("passed over");
    }
    assert_eq!(journal.view().damages(), []);
    let rotten = Damage { first_epoch: Some(Epoch(0)), ..Damage::of(now[0], "rot".to_owned()) };
    journal.note_damages(now[0], std::slice::from_ref(&rotten)).expect("noted");
    assert_eq!(journal.view().damages(), [rotten]);
    drop(disk);
}

/// What may have become of a file.
fn damaged(disk: &SimStorage, path: &Path, check: &mut dyn FnMut(&str)) {
    let whole = read_all(disk, path, 1 << 30).expect("read");
    let mut flipped = whole.clone();
    let at = whole.len() - 30;
    flipped[at] ^= 1;
    let cut = whole[..whole.len() - 1].to_vec();
    for (what, bytes) in [("gone", None), ("flipped", Some(flipped)), ("cut", Some(cut)), ("whole", Some(whole))] {
        disk.remove(path).unwrap_or_else(|error| assert_eq!(error.kind(), std::io::ErrorKind::NotFound));
        if let Some(bytes) = bytes {
            let file = disk.create_new(path).expect("made");
            file.write_at(&bytes, 0).expect("written");
        }
        if what != "whole" {
            check(what);
        }
    }
}

#[test]
fn a_change_that_names_what_is_not_there_is_refused_and_changes_nothing() {
    let (disk, mut journal, source) = history(3);
    let mut owner = Late { journal: &mut journal, waiting: None, takes_it: false, is_leased: true };
    prune(&mut owner, source.time, 1).expect_err("no answer comes");
    let rewriting = owner.waiting.expect("it was sent");
    let Change::Rewrite { by, .. } = &rewriting else { panic!("{rewriting:?}") };
    let mut named: Vec<(Change, PathBuf)> = Vec::new();
    named.extend(by.iter().map(|sealed| (rewriting.clone(), sealed.id().path(Path::new(FOLDER)))));

    let (view, keyring): (_, Keyring) = (journal.view(), (&key()).into());
    let random = SimRandom::new(5);
    let builder = Builder { view: &view, keys: Some(&keyring), random: &random, now: Timestamp(5) };
    let newest = source.points.last().expect("points").head.epoch;
    let made = builder.build(newest, &mut |_| true, &mut |_, _| {}).expect("built");
    named.push((Change::Checkpoint(made), made.path(Path::new(FOLDER))));
    let packs = disk.list(&Path::new(FOLDER).join("packs")).expect("listed").into_iter();
    let of_newest = packs.filter(|name| name.to_string_lossy().ends_with(&format!("{:016x}.pack", newest.0)));
    named.extend(of_newest.map(|name| (Change::Checkpoint(made), Path::new(FOLDER).join("packs").join(name))));
    assert!(named.len() > by.len() + 1, "it has packs of its own");

    let before = journal.view().manifest().clone();
    for (change, path) in &named {
        damaged(&disk, path, &mut |what| {
            let refused = journal.adopt(change);
            assert!(matches!(refused, Err(JournalError::Stale(_))), "{} {what}: {refused:?}", path.display());
            assert_eq!(*journal.view().manifest(), before);
        });
    }
    journal.adopt(&Change::Checkpoint(made)).expect("all is there");
    journal.adopt(&rewriting).expect("all is there");
    is_sound(&disk, &source);
}

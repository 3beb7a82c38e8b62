//! A whole store of one office and one group, and the judge of what becomes of it when its files are not what they were.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(unreachable_pub, reason = "a module of several test programs")]
#![allow(clippy::disallowed_methods, reason = "puts files of its own in place, thousands of times")]

use crate::journal_support::{
    BLOCKS, GROUP, ModelPoint, Source, cells_of, damaged_blocks, identity, key, prune_to_newest,
};
use cdp_protocol::escrow;
use cdp_protocol::frame::{self, Kind};
use cdp_protocol::units::{Epoch, KeyId, Timestamp};
use cdp_seams::clock::SimClock;
use cdp_seams::random::SimRandom;
use cdp_seams::storage::{Storage, SystemStorage};
use cdp_target::authority::Authority;
use cdp_target::catalog::Catalog;
use cdp_target::config::{Config, LISTEN_DEFAULT};
use cdp_target::enroll::Invite;
use cdp_target::journal::segment::Header;
use cdp_target::journal::{GroupIdentity, GroupJournal, JournalLimits};
use cdp_target::store::{self, GroupPlace, Store};
use cdp_target::verify::verify;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 6_000 };

/// A store of one office and one group, and what it has to say.
pub struct Made {
    pub folder: tempfile::TempDir,
    /// By path below it.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    pub points: Vec<ModelPoint>,
    said: Said,
    /// Where the last frame of the open segment begins: a proof, which the next start writes again.
    pub last_proof_at: u64,
}

/// What a store says of itself, but for its points.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    store: String,
    config: String,
    offices: String,
    server: Vec<u8>,
    authority: Vec<u8>,
    endpoint: [u8; 32],
}

/// What a flip came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Refused, and the file named.
    Refused,
    /// Exactly the points were named of which blocks are lost.
    Blocks,
    /// Exactly the one point was named whose own record it hit; its blocks are all served.
    Record,
    /// All points were named of which blocks are lost, and later ones that may have lost some: nothing tells any more.
    Coarse,
    /// Damage that no point needs was named.
    Noticed,
    /// The newest points are gone, as if they had never come: their source tells.
    Shorter,
    /// Everything as it was.
    Harmless,
}

fn random() -> Arc<SimRandom> {
    Arc::new(SimRandom::new(3))
}

fn clock() -> Arc<SimClock> {
    Arc::new(SimClock::new(1_800_000_000_000))
}

fn open_authority(store: &Store) -> Result<Authority, String> {
    let opened = Authority::open(Arc::clone(store.storage()), clock(), random(), &store.authority_folder());
    opened.map_err(|error| chain(&error))
}

/// An error with all it stands on.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

impl Made {
    /// The same every time, but for keys.
    pub fn new() -> Self {
        Self::of_kind(false)
    }

    /// The same after a prune: a checkpoint that others stand on, segments that were rewritten, and a few points that were pinned.
    pub fn pruned() -> Self {
        Self::of_kind(true)
    }

    fn of_kind(is_pruned: bool) -> Self {
        let folder = in_memory();
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        let config = Config::new(LISTEN_DEFAULT, vec!["backup.example.org".into()]);
        store::init(&storage, folder.path(), &config, Timestamp(0), |folder| {
            let made = Authority::create(Arc::clone(&storage), clock(), random(), folder, &config.names).expect("made");
            Ok::<_, store::StoreError>(made.store().to_string())
        })
        .expect("made");
        let store = Store::open(Arc::clone(&storage), folder.path()).expect("opened");
        let mut authority = open_authority(&store).expect("opened");
        let invite = Invite {
            office: "branch",
            targets: &["backup.example.org:7443".into()],
            valid_for: Duration::from_secs(3600),
            replace: false,
        };
        let bundle = authority.invite(&invite).expect("invited");
        let envelope = escrow::seal(&GROUP, KeyId([1; 8]), &key(), &bundle.escrow_public).expect("sealed");
        let place = GroupPlace { office: bundle.office, group: GROUP };
        let identity = GroupIdentity { envelope, ..identity() };
        let mut journal = GroupJournal::create(storage, &store.group_folder(place), identity, LIMITS).expect("made");
        let mut source = Source::new(5);
        source.grant(&mut journal).expect("granted");
        for step in 0..8 {
            source.make(step % 5 == 3, 3);
            let frames = source.attempt.as_ref().map_or(0, |attempt| attempt.frames.len());
            source.send(&mut journal, 0, frames).expect("sent");
            source.sync(&mut journal).expect("synced");
        }
        if is_pruned {
            prune(&mut journal, &source);
            source.points.retain(|point| !journal.view().is_removed(point.head.epoch));
        }
        drop(journal);
        let said = said(&store, &open_authority(&store).expect("opened"));
        let mut files = Vec::new();
        files_below(folder.path(), &mut files);
        let open = &files.iter().rfind(|(path, _)| is_segment(path)).expect("a segment").1;
        let last_proof_at = last_proof_at(open);
        Self { folder, files, points: source.points, said, last_proof_at }
    }

    /// The folder of the group.
    pub fn group_folder(&self) -> &Path {
        let manifest = self.files.iter().find(|(path, _)| path.ends_with("manifest"));
        manifest.and_then(|(path, _)| path.parent()).expect("a group")
    }

    /// The segments, by number.
    pub fn segments(&self) -> Vec<&(PathBuf, Vec<u8>)> {
        self.files.iter().filter(|(path, _)| is_segment(path)).collect()
    }

    /// Puts all files back, but for what `change` does to them.
    pub fn put_back(&self, change: impl FnOnce(&mut BTreeMap<PathBuf, Vec<u8>>)) {
        // Recovery may have left others.
        let _ = std::fs::remove_dir_all(self.folder.path().join("offices"));
        let mut files: BTreeMap<PathBuf, Vec<u8>> = self.files.iter().cloned().collect();
        change(&mut files);
        for folder in ["aside", "journal"] {
            std::fs::create_dir_all(self.group_folder().join(folder)).expect("made");
        }
        for (path, bytes) in &files {
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, bytes).expect("written");
        }
    }

    /// Opens the store, which differs from what it was in `path`, and holds all it says against what it was.
    ///
    /// `may_end_earlier`: what is missing at the end cannot be told from what was never there; its source tells.
    pub fn judge(&self, path: &Path, may_end_earlier: bool) -> Outcome {
        match self.look(path, may_end_earlier) {
            Ok(outcome) => outcome,
            Err(refused) => {
                let name = path.file_name().expect("a name").to_string_lossy();
                let is_named = refused.contains(&*name) || refused.contains("this program");
                assert!(is_named, "{}: {refused}", path.display());
                Outcome::Refused
            }
        }
    }

    fn look(&self, path: &Path, may_end_earlier: bool) -> Result<Outcome, String> {
        let place = path.display();
        let store = Store::open(Arc::new(SystemStorage), self.folder.path()).map_err(|error| chain(&error))?;
        let authority = open_authority(&store)?;
        let mut now = said(&store, &authority);
        if path.ends_with("target.toml") {
            // An operator's text: what is valid in it is what was meant.
            now.config.clone_from(&self.said.config);
        }
        assert_eq!(now, self.said, "{place}: something else is said than before, silently");
        let catalog = Catalog::new(&store, authority);
        let group = catalog.group("branch", "main").map_err(|error| chain(&error))?;
        let keys = catalog.keys(&group).map_err(|error| chain(&error))?;
        let view = group.view();
        let report = verify(view, Some(&keys), None, &mut |_| {}).map_err(|error| chain(&error))?;
        let listed: BTreeMap<Epoch, bool> = view
            .points()
            .map(|point| point.map(|point| (point.epoch, point.damaged.is_some())))
            .collect::<Result<_, _>>()
            .map_err(|error| chain(&error))?;
        let mut named: BTreeSet<Epoch> = report.damages.iter().flat_map(|damage| &damage.points).copied().collect();
        named.extend(listed.iter().filter(|(_, damaged)| **damaged).map(|(epoch, _)| *epoch));
        let mut hit = BTreeSet::new();
        for point in &self.points {
            let epoch = point.head.epoch;
            let whole = view.image(epoch, &keys).is_ok_and(|image| {
                let cells = (0..BLOCKS.len()).map(|volume| cells_of(&image, volume)).collect();
                damaged_blocks(&cells, &point.cells).is_empty()
            });
            if !whole {
                hit.insert(epoch);
            }
            let is_told = listed.contains_key(&epoch) || !report.is_clean() || may_end_earlier;
            assert!(is_told, "{place}: point {epoch} vanished silently");
        }
        let listed_and_hit: BTreeSet<Epoch> = hit.iter().filter(|epoch| listed.contains_key(epoch)).copied().collect();
        assert!(listed_and_hit.is_subset(&named), "{place}: {hit:?} are hit, {named:?} named");
        assert!(listed.len() <= self.points.len(), "{place}: a point that nobody made");
        if may_end_earlier {
            let whole = self.points.iter().filter(|point| !named.contains(&point.head.epoch));
            let there: Vec<bool> = whole.map(|point| !hit.contains(&point.head.epoch)).collect();
            assert!(there.is_sorted_by(|earlier, later| earlier >= later), "{place}: points are missing in the middle");
            return Ok(if there.contains(&false) { Outcome::Shorter } else { Outcome::Harmless });
        }
        Ok(match (report.is_clean() && named.is_empty(), named == hit) {
            (true, _) => Outcome::Harmless,
            (false, true) if hit.is_empty() => Outcome::Noticed,
            (false, true) => Outcome::Blocks,
            (false, false) if report.damages.iter().any(|damage| damage.what.contains("extents unknown")) => {
                Outcome::Coarse
            }
            (false, false) => {
                assert!(hit.is_empty() && named.len() == 1, "{place}: {named:?} named, {hit:?} hit: {report:?}");
                let is_record =
                    |what: &str| ["Commit", "Begin", "record", "commit"].iter().any(|word| what.contains(word));
                let records = report.damages.iter().filter(|damage| !damage.points.is_empty());
                assert!(
                    records.clone().count() == 1 && records.clone().all(|damage| is_record(&damage.what)),
                    "{report:?}"
                );
                Outcome::Record
            }
        })
    }
}

fn said(store: &Store, authority: &Authority) -> Said {
    let server = authority.server();
    Said {
        store: format!("{} {}", store.id(), authority.store()),
        config: format!("{:?}", store.config()),
        offices: format!("{:?}", authority.offices()),
        server: [server.certificate.as_ref(), server.key.secret_der()].concat(),
        authority: authority.certificate().to_vec(),
        endpoint: authority.endpoint_secret(),
    }
}

fn last_proof_at(segment: &[u8]) -> u64 {
    let (mut at, mut last) = (Header::decode(segment).expect("a header").1, None);
    while let Ok(frame) = frame::decode(&GROUP, &segment[at..]) {
        last = Some((at as u64, frame.header.kind));
        at += frame.bytes.len();
    }
    let (at, kind) = last.expect("a frame");
    assert_eq!(kind, Kind::Synced);
    at
}

/// Leaves the newest point, and two that are pinned.
fn prune(journal: &mut GroupJournal, source: &Source) {
    let pinned = [2, 4].map(|at: usize| source.points[at].head.epoch);
    for epoch in pinned {
        journal.pin(epoch, true).expect("pinned");
    }
    let now = Timestamp(source.time + 1000);
    let done = prune_to_newest(journal, now, &SimRandom::new(4), LIMITS.segment_bytes_max);
    assert!(done.base == Some(pinned[0]) && done.rewritten_segments > 0, "{done:?}");
}

/// A folder that costs no disk anything, where there is one.
fn in_memory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a folder")
}

fn files_below(folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).expect("listed") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files_below(&path, files);
        } else {
            files.push((path.clone(), std::fs::read(&path).expect("read")));
        }
    }
    files.sort();
}

/// Whether the file is of the target's own making: a rewritten segment, a pack, an image index.
pub fn is_derived(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["thin", "pack", "image"].iter().any(|known| extension == *known))
}

pub fn is_segment(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "seg")
}

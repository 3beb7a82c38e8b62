//! One flipped bit anywhere in a whole store: refused with the file's name, or the points named that it hits, or harmless.
//!
//! As `verify` and `export` see it: store, authority, catalogue, keys out of escrow, then every point. What is refused
//! names the file. What opens says of offices, keys and points what it said before the flip, but for points that are named as
//! damaged; and what is served of those is right or an error.

#![expect(clippy::disallowed_methods, reason = "puts files of its own in place, thousands of times")]

mod journal_support;

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
use journal_support::{BLOCKS, GROUP, ModelPoint, Source, cells_of, damaged_blocks, identity, key};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 6_000 };

/// A store of one office and one group, and what it has to say.
struct Made {
    folder: tempfile::TempDir,
    /// By path below it.
    files: Vec<(PathBuf, Vec<u8>)>,
    points: Vec<ModelPoint>,
    said: Said,
    /// Where the last frame of the open segment begins: a proof, which the next start writes again.
    last_proof_at: u64,
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
enum Outcome {
    /// Refused, and the file named.
    Refused,
    /// Exactly the points were named of which blocks are lost.
    Blocks,
    /// Exactly the one point was named whose own record it hit; its blocks are all served.
    Record,
    /// Damage that no point needs was named.
    Noticed,
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
    fn new() -> Self {
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
        drop(journal);
        let said = said(&store, &open_authority(&store).expect("opened"));
        let mut files = Vec::new();
        files_below(folder.path(), &mut files);
        let open = &files.iter().rfind(|(path, _)| is_segment(path)).expect("a segment").1;
        let last_proof_at = last_proof_at(open);
        Self { folder, files, points: source.points, said, last_proof_at }
    }

    /// Puts all files back, but with a bit flipped in one.
    fn put_back(&self, damaged: &Path, bit: u64) {
        // Recovery may have left others.
        let _ = std::fs::remove_dir_all(self.folder.path().join("offices"));
        for (path, bytes) in &self.files {
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            let mut bytes = bytes.clone();
            if path == damaged {
                bytes[bit as usize / 8] ^= 1 << (bit % 8);
            }
            std::fs::write(path, &bytes).expect("written");
        }
        for folder in
            self.files.iter().filter(|(path, _)| path.ends_with("manifest")).filter_map(|(path, _)| path.parent())
        {
            std::fs::create_dir_all(folder.join("aside")).expect("made");
        }
    }

    fn flip(&self, path: &Path, bit: u64) -> Outcome {
        self.put_back(path, bit);
        let place = format!("{} byte {} bit {}", path.display(), bit / 8, bit % 8);
        match self.judge(path, &place) {
            Ok(outcome) => outcome,
            Err(refused) => {
                let name = path.file_name().expect("a name").to_string_lossy();
                let is_named = refused.contains(&*name) || refused.contains("this program");
                assert!(is_named, "{place}: {refused}");
                Outcome::Refused
            }
        }
    }

    fn judge(&self, path: &Path, place: &str) -> Result<Outcome, String> {
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
            let is_told = listed.contains_key(&epoch) || !report.is_clean();
            assert!(is_told, "{place}: point {epoch} vanished silently");
        }
        let listed_and_hit: BTreeSet<Epoch> = hit.iter().filter(|epoch| listed.contains_key(epoch)).copied().collect();
        assert!(listed_and_hit.is_subset(&named), "{place}: {hit:?} are hit, {named:?} named");
        assert!(listed.len() <= self.points.len(), "{place}: a point that nobody made");
        Ok(match (report.is_clean() && named.is_empty(), named == hit) {
            (true, _) => Outcome::Harmless,
            (false, true) if hit.is_empty() => Outcome::Noticed,
            (false, true) => Outcome::Blocks,
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

/// Every byte where `CDP_EVERY_BIT` is set; otherwise one in so many.
fn stride(path: &Path) -> u64 {
    let every = std::env::var_os("CDP_EVERY_BIT").is_some();
    if every {
        1
    } else if is_segment(path) {
        12
    } else {
        3
    }
}

fn is_segment(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "seg")
}

#[test]
fn every_byte_of_a_store() {
    let made = Made::new();
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
                let outcome = made.flip(path, byte * 8 + bit);
                let may_be = outcome != Outcome::Harmless || !is_segment(path) || byte >= made.last_proof_at;
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

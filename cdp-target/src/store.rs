//! The store's folder: what is where in it, which format it has, and who may write.
//!
//! ```text
//! store.json    format and id; written last by `init`, so a folder without it is no store
//! target.toml   configuration
//! authority/    certificate authority, escrow key, register of offices
//! offices/<office id>/groups/<group id>/    one group's journal each; ids, never names
//! lock          held exclusively while serving, and while a command writes
//! serve.sock    control socket of the running server
//! ```
//!
//! Invariant: whoever changes anything below the folder holds the lock. Readers take none: they open beside a server.

use crate::config::{CONFIG_BYTES_MAX, CONFIG_FILE, Config, ConfigError};
use crate::journal::manifest;
use crate::kept;
use crate::points::Instant;
use cdp_protocol::units::{GroupId, OfficeId, Timestamp};
use cdp_seams::storage::{Storage, StorageFile, read_all, replace};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version of the folder's format that this program writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;
const FORMAT_NAME: &str = "cdp-target store";
const MARKER_FILE: &str = "store.json";
const LOCK_FILE: &str = "lock";
const SOCKET_FILE: &str = "serve.sock";
const AUTHORITY_FOLDER: &str = "authority";
const OFFICES_FOLDER: &str = "offices";
const GROUPS_FOLDER: &str = "groups";
const MARKER_BYTES_MAX: u64 = 64 * 1024;

/// An open store.
#[derive(Clone)]
pub struct Store {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    id: String,
    config: Config,
}

/// The right to change the store, until dropped.
pub struct StoreLock {
    _file: Box<dyn StorageFile>,
}

/// A group's place in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupPlace {
    /// The office it belongs to.
    pub office: OfficeId,
    /// The group.
    pub group: GroupId,
}

#[derive(Serialize, Deserialize)]
struct Marker {
    format: String,
    version: u32,
    store: String,
    created: String,
}

/// Why a store cannot be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// `init` onto something.
    #[error("folder {} is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// No marker.
    #[error("{} is no store of cdp-target", .0.display())]
    NotAStore(PathBuf),
    /// Written by a newer program.
    #[error("store {} has format {found}, this program reads up to {FORMAT_VERSION}", .folder.display())]
    Newer {
        /// The store.
        folder: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The marker does not parse.
    #[error("{} is damaged", .0.display())]
    Marker(PathBuf, #[source] serde_json::Error),
    /// The configuration is refused.
    #[error("{}", .0.display())]
    Config(PathBuf, #[source] ConfigError),
    /// Another process holds the lock.
    #[error("store {} is in use by another server{}", .folder.display(), .pid.map_or_else(String::new, |pid| format!(" (pid {pid})")))]
    InUse {
        /// The store.
        folder: PathBuf,
        /// The process, where it could be read.
        pid: Option<u32>,
    },
    /// The system refused.
    #[error("{verb} {}", .path.display())]
    System {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn system(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::System { verb, path: path.to_owned(), source }
}

/// Makes a store in an empty or missing folder. `fill` puts into the folder `authority` what belongs there, and gives the
/// store's id.
///
/// The marker is written last: a crash before leaves a folder that is no store, and that `init` refuses as not empty.
///
/// # Errors
/// Where the folder is not empty, or the system refuses. An error of `fill` is passed on.
pub fn init<E: From<StoreError>>(
    storage: &Arc<dyn Storage>,
    folder: &Path,
    config: &Config,
    now: Timestamp,
    fill: impl FnOnce(&Path) -> Result<String, E>,
) -> Result<(), E> {
    match storage.list(folder) {
        Ok(names) if !names.is_empty() => return Err(StoreError::NotEmpty(folder.to_owned()).into()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(system("list folder", folder)(error).into()),
    }
    for name in ["", AUTHORITY_FOLDER, OFFICES_FOLDER] {
        let path = folder.join(name);
        storage.create_dir_all(&path).map_err(system("make folder", &path))?;
    }
    let store = fill(&folder.join(AUTHORITY_FOLDER))?;
    let path = folder.join(CONFIG_FILE);
    replace(storage.as_ref(), &path, config.to_text().as_bytes()).map_err(system("write", &path))?;
    let marker =
        Marker { format: FORMAT_NAME.to_owned(), version: FORMAT_VERSION, store, created: Instant(now).to_string() };
    let mut text = serde_json::to_vec_pretty(&marker).expect("text and numbers");
    text.push(b'\n');
    let path = folder.join(MARKER_FILE);
    Ok(kept::write(storage.as_ref(), &path, &text).map_err(system("write", &path))?)
}

impl Store {
    /// Opens a store to read; takes no lock.
    ///
    /// # Errors
    /// Where it is none, has a newer format, or a configuration that is refused.
    pub fn open(storage: Arc<dyn Storage>, folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join(MARKER_FILE);
        // A newer program need not know of copies: its word is taken, also where the copy has another.
        if let Ok(bytes) = read_all(storage.as_ref(), &path, MARKER_BYTES_MAX)
            && let Err(error @ StoreError::Newer { .. }) = read_marker(&bytes, folder, &path)
        {
            return Err(error);
        }
        let bytes = kept::read(storage.as_ref(), &path, MARKER_BYTES_MAX).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => StoreError::NotAStore(folder.to_owned()),
            _ => system("read", &path)(error),
        })?;
        let id = read_marker(&bytes, folder, &path)?;
        let path = folder.join(CONFIG_FILE);
        let bytes = read_all(storage.as_ref(), &path, CONFIG_BYTES_MAX).map_err(system("read", &path))?;
        let config = Config::parse(&bytes).map_err(|error| StoreError::Config(path, error))?;
        Ok(Self { storage, folder: folder.to_owned(), id, config })
    }

    /// Mends the marker or its copy, where one of them is not as it should be. For the one writer.
    ///
    /// # Errors
    /// As the system says.
    pub fn mend(&self) -> Result<(), StoreError> {
        let path = self.folder.join(MARKER_FILE);
        if kept::mend(self.storage.as_ref(), &path, MARKER_BYTES_MAX).map_err(system("mend", &path))? {
            tracing::warn!(path = %path.display(), "this file or its copy was missing or damaged, and is written anew");
        }
        Ok(())
    }

    /// The configuration, as it was when the store was opened.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The store's random id, in hexadecimal.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The store's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the store lies on.
    #[must_use]
    pub const fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Folder of the certificate authority.
    #[must_use]
    pub fn authority_folder(&self) -> PathBuf {
        self.folder.join(AUTHORITY_FOLDER)
    }

    /// The control socket of a running server.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET_FILE)
    }

    /// Folder of a group's journal.
    #[must_use]
    pub fn group_folder(&self, place: GroupPlace) -> PathBuf {
        self.groups_folder(place.office).join(place.group.to_string())
    }

    fn groups_folder(&self, office: OfficeId) -> PathBuf {
        self.folder.join(OFFICES_FOLDER).join(office.to_string()).join(GROUPS_FOLDER)
    }

    /// All groups of an office, by id. Names that are no ids are passed over, and folders without a manifest: what a crash
    /// leaves of a group that was being made.
    ///
    /// # Errors
    /// Where the folder cannot be listed.
    pub fn groups(&self, office: OfficeId) -> Result<Vec<GroupPlace>, StoreError> {
        let folder = self.groups_folder(office);
        let names = match self.storage.list(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(system("list folder", &folder))?,
        };
        let ids = names.iter().filter_map(|name| name.to_str()?.parse().ok());
        let places = ids.map(|group| GroupPlace { office, group });
        let is_made = |place: &GroupPlace| {
            let manifest = manifest::path(&self.group_folder(*place));
            !matches!(self.storage.open(&manifest), Err(error) if error.kind() == io::ErrorKind::NotFound)
        };
        Ok(places.filter(is_made).collect())
    }

    /// Takes the lock: nobody else serves or changes the store until it is dropped.
    ///
    /// # Errors
    /// `InUse` where another process has it.
    pub fn lock(&self) -> Result<StoreLock, StoreError> {
        let path = self.folder.join(LOCK_FILE);
        let file = match self.storage.open_write(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match self.storage.create_new(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.storage.open_write(&path),
                other => other,
            },
            other => other,
        }
        .map_err(system("open", &path))?;
        if !file.try_lock().map_err(system("lock", &path))? {
            return Err(StoreError::InUse { folder: self.folder.clone(), pid: read_pid(file.as_ref()) });
        }
        // For whoever is refused; not durable and not needed: the lock itself goes with this process.
        let written = file.set_len(0).and_then(|()| file.write_at(std::process::id().to_string().as_bytes(), 0));
        if let Err(error) = written {
            tracing::debug!(path = %path.display(), %error, "the lock does not say who has it");
        }
        Ok(StoreLock { _file: file })
    }
}

/// The store's id, once the format is known to be ours.
fn read_marker(bytes: &[u8], folder: &Path, path: &Path) -> Result<String, StoreError> {
    /// What a marker of any version has.
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u32,
    }
    let damaged = |error| StoreError::Marker(path.to_owned(), error);
    let head: Head = serde_json::from_slice(bytes).map_err(damaged)?;
    if head.format != FORMAT_NAME {
        return Err(StoreError::NotAStore(folder.to_owned()));
    }
    if head.version > FORMAT_VERSION {
        return Err(StoreError::Newer { folder: folder.to_owned(), found: head.version });
    }
    let marker: Marker = serde_json::from_slice(bytes).map_err(damaged)?;
    Ok(marker.store)
}

fn read_pid(file: &dyn StorageFile) -> Option<u32> {
    let mut text = [0; 16];
    let len = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..len]).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LISTEN_DEFAULT;
    use cdp_seams::storage::SystemStorage;

    fn made() -> (tempfile::TempDir, Arc<dyn Storage>) {
        let folder = tempfile::tempdir().expect("a folder");
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        again(&storage, folder.path()).expect("made");
        (folder, storage)
    }

    fn again(storage: &Arc<dyn Storage>, folder: &Path) -> Result<(), StoreError> {
        let config = Config::new(LISTEN_DEFAULT, vec![]);
        init(storage, folder, &config, Timestamp(0), |_| Ok::<_, StoreError>("5".repeat(32)))
    }

    #[test]
    fn a_store_is_made_once_and_opened_with_one_writer() {
        let (folder, storage) = made();
        assert!(matches!(again(&storage, folder.path()), Err(StoreError::NotEmpty(_))));
        let store = Store::open(Arc::clone(&storage), folder.path()).expect("opened");
        assert_eq!(store.id().len(), 32);
        let lock = store.lock().expect("free");
        let pid = std::process::id();
        assert!(matches!(store.lock(), Err(StoreError::InUse { pid: Some(found), .. }) if found == pid));
        drop(lock);
        store.lock().expect("free again");
    }

    #[test]
    fn what_is_no_store_or_a_newer_one_is_refused() {
        let (folder, storage) = made();
        let open = || Store::open(Arc::clone(&storage), folder.path()).map(|_| ()).map_err(|error| error.to_string());
        let put = |name: &str, text: &str| {
            kept::write(storage.as_ref(), &folder.path().join(name), text.as_bytes()).expect("written");
        };
        put("store.json", "{\"format\":\"cdp-target store\",\"version\":7,\"more\":{}}");
        assert!(open().expect_err("newer").ends_with("has format 7, this program reads up to 1"));
        put("store.json", "{\"format\":\"something\",\"version\":1}");
        assert!(open().expect_err("other").ends_with("is no store of cdp-target"));
        put("store.json", "{\"form");
        assert!(open().expect_err("damaged").ends_with("store.json is damaged"));
        let elsewhere = Store::open(Arc::clone(&storage), Path::new("/proc/self/none"));
        assert!(matches!(elsewhere, Err(StoreError::NotAStore(_))));
    }

    #[test]
    fn groups_are_found_by_their_ids() {
        let (folder, storage) = made();
        let store = Store::open(Arc::clone(&storage), folder.path()).expect("opened");
        let office = OfficeId([1; 16]);
        assert_eq!(store.groups(office).expect("none"), []);
        let place = GroupPlace { office, group: GroupId([2; 16]) };
        storage.create_dir_all(&store.group_folder(place)).expect("made");
        assert_eq!(store.groups(office).expect("none"), [], "a crash came before the manifest");
        storage.create_new(&manifest::path(&store.group_folder(place))).expect("made");
        storage.create_dir_all(&store.groups_folder(office).join("lost+found")).expect("made");
        assert_eq!(store.groups(office).expect("one"), [place]);
    }
}

//! The state folder: configuration, identity, and what each group has to remember.
//!
//! ```text
//! source.toml               what the operator says (`config`)
//! identity/                 certificate and key of the office (`join`)
//! groups/NAME/group.toml    group id, key's name, escrow envelope, next slot, sizes of the volumes
//! groups/NAME/data.key      the data key, mode 0600
//! groups/NAME/tracking/     what the group's tracker keeps, and what a stop leaves for the next boot (`saved`)
//! groups/NAME/digests/      what the target holds of each block (`digests`)
//! groups/NAME/spool/        what the line has not taken (`spool`)
//! groups/NAME/restoring.json  a volume that is neither old nor new (`restore/marker`)
//! lock, changes.lock        one agent at a time; one change of the configuration at a time
//! restore.lock              one restore at a time
//! run.sock                  the agent's control socket
//! ```
//!
//! Invariant: nothing here is written for an epoch or on a clock, because the folder may lie on a protected volume and an
//! idle volume has to stay idle. A data key is durable before any file names it, and is never made again.

use crate::agent::group::KeptMemo;
use crate::config::{CONFIG_BYTES_MAX, Config, ConfigError};
use cdp_protocol::escrow::{self, Envelope, EscrowError};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::memo::{MEMO_BYTES_MAX, Memo};
use cdp_protocol::units::{GroupId, KeyId, VolumeSlot};
use cdp_seams::random::{self, Random};
use cdp_seams::storage::{self, Storage, StorageFile};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

const GROUP_FILE_BYTES_MAX: u64 = 1 << 20;
const KEY_BYTES: usize = 32;

/// The state folder.
#[derive(Clone)]
pub struct StateFolder {
    storage: Arc<dyn Storage>,
    root: PathBuf,
}

/// What a group has to remember besides the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupState {
    /// The group's id.
    pub group: GroupId,
    /// Name of its data key.
    pub key: KeyId,
    /// The slot that the next new volume gets.
    pub next_slot: u16,
    /// Hash of the escrow key that the envelope is sealed to, in hexadecimal.
    pub escrow_key_hash: String,
    /// The data key, sealed to the target.
    pub envelope: Envelope,
    /// Sizes in bytes when the volumes were protected, by slot.
    #[serde(default)]
    pub size_bytes: BTreeMap<String, u64>,
}

/// Held by the one agent of a state folder, or by the one command that changes it.
pub struct Lock {
    _file: Box<dyn StorageFile>,
}

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file cannot be read or written.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file is damaged.
    #[error("read {}: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Others than the owner may read a secret.
    #[error("read {}: others than its owner may read the key", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
    },
    /// Another agent or command holds the lock.
    #[error("lock {}: held by process {pid}", path.display())]
    Locked {
        /// Which lock.
        path: PathBuf,
        /// Who holds it, as far as is known.
        pid: String,
    },
    /// The data key cannot be put into escrow.
    #[error("seal the data key to the target")]
    Escrow(#[from] EscrowError),
}

impl StateError {
    /// The next step, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config(error) => error.hint(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run it as root, or name a folder of your own with --state".into())
            }
            Self::Exposed { path } => Some(format!("chmod 600 {}", path.display())),
            Self::Locked { .. } => Some("one agent serves one state folder; stop the other one first".into()),
            _ => None,
        }
    }

    /// Whether the user, not this program, has to change something.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        matches!(self, Self::Config(_) | Self::Exposed { .. } | Self::Locked { .. })
    }
}

impl StateFolder {
    /// The folder `root`, which need not exist yet.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>, root: &Path) -> Self {
        Self { storage, root: root.to_owned() }
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder with every link followed; as it was given where that cannot be told.
    #[must_use]
    pub fn real_root(&self) -> PathBuf {
        std::fs::canonicalize(&self.root).unwrap_or_else(|_| self.root.clone())
    }

    /// Where its files are kept.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The agent's control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.root.join("run.sock")
    }

    /// What the tracker of a group keeps.
    #[must_use]
    pub fn tracking(&self, group: &str) -> PathBuf {
        self.root.join("groups").join(group).join("tracking")
    }

    /// The digests of a group's blocks.
    #[must_use]
    pub fn digests(&self, group: &str) -> PathBuf {
        self.root.join("groups").join(group).join("digests")
    }

    /// What a group's line has not taken.
    #[must_use]
    pub fn spool(&self, group: &str) -> PathBuf {
        self.root.join("groups").join(group).join("spool")
    }

    /// The configuration's text; empty where there is none.
    ///
    /// # Errors
    /// Where it cannot be read or is no text.
    pub fn config_text(&self) -> Result<String, StateError> {
        let path = self.root.join("source.toml");
        let bytes = match storage::read_all(&*self.storage, &path, CONFIG_BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
            other => other.map_err(failed("read", &path))?,
        };
        String::from_utf8(bytes).map_err(|_| StateError::Damaged { path, reason: "not UTF-8".into() })
    }

    /// The configuration; the default where there is none.
    ///
    /// # Errors
    /// Where it cannot be read or is not valid.
    pub fn config(&self) -> Result<Config, StateError> {
        self.parse(&self.config_text()?)
    }

    /// Puts another text in the configuration's place, all or nothing. It has to be valid.
    ///
    /// # Errors
    /// Where it is not valid or cannot be written.
    pub fn replace_config(&self, text: &str) -> Result<(), StateError> {
        self.parse(text)?;
        self.make(&self.root.clone())?;
        let path = self.root.join("source.toml");
        storage::replace(&*self.storage, &path, text.as_bytes()).map_err(failed("write", &path))
    }

    fn parse(&self, text: &str) -> Result<Config, StateError> {
        let config = Config::parse(text)?;
        for root in [&self.root, &self.real_root()] {
            config.refuse_excludes_in(root)?;
        }
        Ok(config)
    }

    /// Becomes the one agent of the folder.
    ///
    /// # Errors
    /// `Locked` where there is one.
    pub fn lock_agent(&self) -> Result<Lock, StateError> {
        self.lock("lock")
    }

    /// Becomes the one command that changes the folder.
    ///
    /// # Errors
    /// `Locked` where there is one.
    pub fn lock_changes(&self) -> Result<Lock, StateError> {
        self.lock("changes.lock")
    }

    /// Becomes the one restore of the folder.
    ///
    /// # Errors
    /// `Locked` where there is one.
    pub fn lock_restore(&self) -> Result<Lock, StateError> {
        self.lock("restore.lock")
    }

    /// Becomes the one that makes a local image of the group.
    ///
    /// # Errors
    /// `Locked` where there is one.
    pub fn lock_images(&self, group: &str) -> Result<Lock, StateError> {
        self.lock(&format!("groups/{group}/local-image.lock"))
    }

    /// The group's state, `None` before its first volume.
    ///
    /// # Errors
    /// Where it is damaged or cannot be read.
    pub fn group(&self, name: &str) -> Result<Option<GroupState>, StateError> {
        let path = self.group_file(name);
        let bytes = match storage::read_all(&*self.storage, &path, GROUP_FILE_BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed("read", &path))?,
        };
        let damaged = |reason: String| StateError::Damaged { path: path.clone(), reason };
        let text = String::from_utf8(bytes).map_err(|_| damaged("not UTF-8".into()))?;
        toml::from_str(&text).map(Some).map_err(|error| damaged(error.to_string().trim_end().to_owned()))
    }

    /// Keeps the group's state.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn set_group(&self, name: &str, state: &GroupState) -> Result<(), StateError> {
        let path = self.group_file(name);
        let text = toml::to_string(state).expect("a group's state is plain TOML");
        storage::replace(&*self.storage, &path, text.as_bytes()).map_err(failed("write", &path))
    }

    /// Makes a group: its data key, the envelope for the target with the escrow key `escrow_public`, and its id, unless the
    /// target knows the group already from the hardware before.
    ///
    /// A crash after the key and before the state leaves a key that nothing names; the next call replaces it.
    ///
    /// # Errors
    /// Where a file cannot be written, or the escrow key is none.
    pub fn make_group(
        &self,
        name: &str,
        random: &dyn Random,
        escrow_public: &[u8],
        known: Option<GroupId>,
    ) -> Result<GroupState, StateError> {
        self.make(&self.root.join("groups").join(name))?;
        let data_key = DataKey::new(random::array::<KEY_BYTES>(random));
        let group = known.unwrap_or_else(|| GroupId(random::array(random)));
        let key = KeyId(random::array(random));
        let envelope = escrow::seal(&group, key, &data_key, escrow_public)?;
        let path = self.key_file(name);
        storage::replace(&*self.storage, &path, data_key.expose()).map_err(failed("write", &path))?;
        let state = GroupState {
            group,
            key,
            next_slot: 0,
            escrow_key_hash: escrow_key_hash(escrow_public),
            envelope,
            size_bytes: BTreeMap::new(),
        };
        self.set_group(name, &state)?;
        Ok(state)
    }

    /// Seals the data key again where the office has joined another target since.
    ///
    /// # Errors
    /// Where a file cannot be read or written, or the escrow key is none.
    pub fn renew_envelope(&self, name: &str, state: &mut GroupState, escrow_public: &[u8]) -> Result<(), StateError> {
        let hash = escrow_key_hash(escrow_public);
        if state.escrow_key_hash == hash {
            return Ok(());
        }
        state.envelope = escrow::seal(&state.group, state.key, &self.data_key(name)?, escrow_public)?;
        state.escrow_key_hash = hash;
        self.set_group(name, state)
    }

    /// The group's data key.
    ///
    /// # Errors
    /// Where it cannot be read, is damaged, or others than the owner may read it.
    pub fn data_key(&self, name: &str) -> Result<DataKey, StateError> {
        let path = self.key_file(name);
        refuse_exposed(&path)?;
        let bytes = storage::read_all(&*self.storage, &path, KEY_BYTES as u64 + 1).map_err(failed("read", &path))?;
        let bytes = Zeroizing::new(bytes);
        let key = <[u8; KEY_BYTES]>::try_from(bytes.as_slice());
        key.map(DataKey::new).map_err(|_| StateError::Damaged { path, reason: "not a key of 32 bytes".into() })
    }

    /// The memo of a group that is kept beside the tracker's.
    #[must_use]
    pub fn kept_memo(&self, name: &str) -> MemoFile {
        MemoFile { storage: Arc::clone(&self.storage), path: self.kept_memo_path(name) }
    }

    /// Where it is.
    #[must_use]
    pub fn kept_memo_path(&self, name: &str) -> PathBuf {
        self.tracking(name).join("memo")
    }

    /// Makes a folder in here.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn make(&self, folder: &Path) -> Result<(), StateError> {
        self.storage.create_dir_all(folder).map_err(failed("make folder", folder))
    }

    fn group_file(&self, name: &str) -> PathBuf {
        self.root.join("groups").join(name).join("group.toml")
    }

    fn key_file(&self, name: &str) -> PathBuf {
        self.root.join("groups").join(name).join("data.key")
    }

    fn lock(&self, name: &str) -> Result<Lock, StateError> {
        self.make(&self.root.clone())?;
        let path = self.root.join(name);
        let file = match self.storage.create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.storage.open_write(&path),
            other => other,
        };
        let file = file.map_err(failed("open", &path))?;
        if !file.try_lock().map_err(failed("lock", &path))? {
            let pid = storage::read_all(&*self.storage, &path, 64).unwrap_or_default();
            let pid = String::from_utf8_lossy(&pid).trim().to_owned();
            return Err(StateError::Locked { path, pid: if pid.is_empty() { "unknown".into() } else { pid } });
        }
        let pid = format!("{}\n", std::process::id());
        file.set_len(0).and_then(|()| file.write_at(pid.as_bytes(), 0)).map_err(failed("write", &path))?;
        Ok(Lock { _file: file })
    }
}

impl GroupState {
    /// Size of a volume when it was protected.
    #[must_use]
    pub fn protected_size_bytes(&self, slot: VolumeSlot) -> Option<u64> {
        self.size_bytes.get(&slot.to_string()).copied()
    }

    /// Keeps the size of a volume.
    pub fn set_protected_size_bytes(&mut self, slot: VolumeSlot, size_bytes: u64) {
        self.size_bytes.insert(slot.to_string(), size_bytes);
    }
}

/// A group's memo in a file. It is kept on a new generation and at a clean end, so an idle volume that holds it stays idle.
pub struct MemoFile {
    storage: Arc<dyn Storage>,
    path: PathBuf,
}

impl MemoFile {
    /// The memo that is kept at `path`.
    #[must_use]
    pub const fn new(storage: Arc<dyn Storage>, path: PathBuf) -> Self {
        Self { storage, path }
    }
}

impl KeptMemo for MemoFile {
    fn load(&self) -> Result<Memo, String> {
        let bytes = match storage::read_all(&*self.storage, &self.path, MEMO_BYTES_MAX as u64) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Memo::default()),
            // Whatever is longer than a memo is none, today and tomorrow.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Vec::from(*b"?"),
            Err(error) => {
                let path = self.path.display();
                return Err(format!(
                    "read what is kept of the group in {path}: {error}; without that file everything is compared"
                ));
            }
        };
        Ok(Memo::decode(&bytes).unwrap_or_else(|error| {
            tracing::warn!(path = %self.path.display(), %error, "the kept memo is damaged");
            Memo::default()
        }))
    }

    fn keep(&self, memo: &Memo) {
        if let Err(error) = storage::replace(&*self.storage, &self.path, &memo.encode()) {
            tracing::warn!(path = %self.path.display(), %error, "the memo is not kept beside the tracker's");
        }
    }
}

fn escrow_key_hash(public: &[u8]) -> String {
    blake3::hash(public).to_hex().to_string()
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

/// A key that others may read is no secret any more. (A simulated file has no mode.)
fn refuse_exposed(path: &Path) -> Result<(), StateError> {
    use std::os::unix::fs::PermissionsExt as _;
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => {
            Err(StateError::Exposed { path: path.to_owned() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::escrow::EscrowKey;
    use cdp_seams::random::SystemRandom;
    use cdp_seams::storage::SystemStorage;
    use cdp_seams::storage::sim::SimStorage;
    use std::os::unix::fs::PermissionsExt as _;

    fn state() -> (tempfile::TempDir, StateFolder) {
        let folder = tempfile::tempdir().expect("a folder");
        let state = StateFolder::new(Arc::new(SystemStorage), &folder.path().join("state"));
        (folder, state)
    }

    #[test]
    fn a_group_keeps_its_id_and_key_and_the_target_can_open_the_envelope() {
        let (_folder, state) = state();
        let (first, first_public) = EscrowKey::generate().expect("a key");
        let (second, second_public) = EscrowKey::generate().expect("a key");
        assert_eq!(state.group("main").expect("read"), None);
        let mut made = state.make_group("main", &SystemRandom, &first_public, None).expect("made");
        made.next_slot = 3;
        made.set_protected_size_bytes(VolumeSlot(2), 4096);
        state.set_group("main", &made).expect("kept");
        assert_eq!(state.group("main").expect("read"), Some(made.clone()));
        let key = state.data_key("main").expect("key");
        assert_eq!(first.open(&made.group, &made.envelope).expect("opened").expose(), key.expose());

        state.renew_envelope("main", &mut made, &first_public).expect("nothing to do");
        assert!(first.open(&made.group, &made.envelope).is_ok());
        state.renew_envelope("main", &mut made, &second_public).expect("sealed again");
        assert_eq!(second.open(&made.group, &made.envelope).expect("opened").expose(), key.expose());
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let (_folder, state) = state();
        let (_, public) = EscrowKey::generate().expect("a key");
        state.make_group("main", &SystemRandom, &public, None).expect("made");
        let path = state.key_file("main");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("mode set");
        assert!(matches!(state.data_key("main"), Err(StateError::Exposed { .. })));
    }

    #[test]
    fn a_second_agent_is_refused_and_told_by_whom() {
        let (_folder, state) = state();
        let first = state.lock_agent().expect("locked");
        let Err(StateError::Locked { pid, .. }) = state.lock_agent() else { panic!("locked twice") };
        assert_eq!(pid, std::process::id().to_string());
        drop(first);
        assert!(state.lock_agent().is_ok());
    }

    #[test]
    fn a_full_disk_is_an_error_and_what_was_there_stays() {
        let disk = SimStorage::new(3);
        let state = StateFolder::new(Arc::new(disk.clone()), Path::new("/state"));
        let (_, public) = EscrowKey::generate().expect("a key");
        state.make(state.root()).expect("made");
        let made = state.make_group("main", &SystemRandom, &public, None).expect("made");
        state.replace_config("# mine\n").expect("written");
        state.make(&state.tracking("main")).expect("made");
        let kept = state.kept_memo("main");
        let memo = Memo { generation: Some(cdp_protocol::units::Generation(5)), ..Memo::default() };
        kept.keep(&memo);

        disk.set_free_bytes(0);
        let changed = GroupState { next_slot: made.next_slot + 1, ..made.clone() };
        let refused = [
            state.set_group("main", &changed).expect_err("no room"),
            state.replace_config("# mine, and more than there is room for\n").expect_err("no room"),
            state.make_group("other", &SystemRandom, &public, None).expect_err("no room"),
        ];
        for error in refused {
            let full = matches!(&error, StateError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull);
            assert!(full, "{error:?}");
        }
        kept.keep(&Memo { generation: Some(cdp_protocol::units::Generation(6)), ..Memo::default() });
        assert_eq!(state.group("main").expect("read"), Some(made));
        assert_eq!(state.config_text().expect("read"), "# mine\n");
        assert_eq!(kept.load(), Ok(memo));

        disk.set_free_bytes(1 << 20);
        state.set_group("main", &changed).expect("there is room again");
        assert_eq!(state.group("main").expect("read"), Some(changed));
    }

    #[test]
    fn an_invalid_configuration_is_not_written() {
        let (_folder, state) = state();
        assert_eq!(state.config().expect("default"), Config::default());
        state.replace_config("# mine\n").expect("written");
        assert!(state.replace_config("nonsense = 1").is_err());
        assert_eq!(state.config_text().expect("read"), "# mine\n");
    }

    #[test]
    fn a_kept_memo_that_cannot_be_read_now_is_not_taken_for_none() {
        use cdp_seams::storage::sim::{Fault, SimStorage};
        let disk = SimStorage::new(1);
        disk.create_dir_all(Path::new("/state")).expect("made");
        let kept = MemoFile::new(Arc::new(disk.clone()), PathBuf::from("/state/memo"));
        assert_eq!(kept.load(), Ok(Memo::default()), "nothing was kept yet");
        let memo = Memo { generation: Some(cdp_protocol::units::Generation(3)), ..Memo::default() };
        kept.keep(&memo);
        for call in 0..3 {
            disk.fault_at(disk.calls() + call, Fault::Error(io::ErrorKind::Other));
            assert!(kept.load().is_err_and(|reason| reason.contains("/state/memo")), "call {call}");
            disk.clear_faults();
        }
        assert_eq!(kept.load(), Ok(memo));
    }
}

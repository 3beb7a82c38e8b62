//! `source.toml`: what the operator says.
//!
//! Owns reading it strictly (an unknown key is an error that names the closest known one) and changing it in place, so
//! that an operator's comments stay. A slot, once written, belongs to that volume for ever; which slot is next is kept
//! in the group's own folder (`state`), because a removed volume leaves no trace here.

mod local_image;

use crate::cut::CutLimits;
use crate::packing::Setting;
use cdp_protocol::limits::{VOLUMES_MAX, is_name};
use cdp_protocol::units::VolumeSlot;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

pub use local_image::{LocalImageConfig, TimeOfDay};

/// Bytes the file may have.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

const ROOT_KEYS: &[&str] = &["metrics_listen", "packing", "leave_unprotected", "groups"];
const GROUP_KEYS: &[&str] = &[
    "interval_ms",
    "cut_bound_ms",
    "capture_bytes_max",
    "audit_interval_s",
    "exclude",
    "spool_bytes_max",
    "spool_points_max",
    "freeze",
    "freeze_deadline_ms",
    "hooks",
    "local_image",
    "volumes",
];
const HOOKS_KEYS: &[&str] = &["pre_cut", "post_cut", "deadline_ms", "every_s"];
const VOLUME_KEYS: &[&str] = &["name", "slot", "device", "tracker"];
const MIB: u64 = 1 << 20;
/// Files that a group may leave out: each is looked at twice a cut.
const EXCLUDES_MAX: usize = 64;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Config {
    /// Where metrics are served in Prometheus' text format; not at all by default.
    pub metrics_listen: Option<SocketAddr>,
    /// How content is packed: `auto`, `lz4`, or `zstd-1` to `zstd-19`.
    #[serde(default)]
    pub packing: Setting,
    /// Devices, or where they are mounted, that are in no group on purpose.
    #[serde(default)]
    pub leave_unprotected: Vec<PathBuf>,
    /// The groups by name.
    #[serde(default)]
    pub groups: BTreeMap<String, GroupConfig>,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct GroupConfig {
    /// Milliseconds from cut to cut.
    #[serde(default = "default_interval_ms")]
    pub interval_ms: u64,
    /// In so many seconds every block that nobody writes to is read once and held against its digest.
    #[serde(default = "default_audit_interval_s")]
    pub audit_interval_s: u64,
    /// Milliseconds a cut may try to validate; a quarter of the interval by default, and not below 100.
    pub cut_bound_ms: Option<u64>,
    /// Bytes of blocks that one cut may hold in memory; what is more goes in parts.
    #[serde(default = "default_capture_bytes_max")]
    pub capture_bytes_max: u64,
    /// Files that are not captured where they are written: they stand as holes in the points.
    #[serde(default)]
    pub exclude: Vec<PathBuf>,
    /// Bytes on the disk for what the line does not take; 0: none.
    #[serde(default = "default_spool_bytes_max")]
    pub spool_bytes_max: u64,
    /// Points that may wait for the line; older ones are merged.
    #[serde(default = "default_spool_points_max")]
    pub spool_points_max: u64,
    /// Whether its file systems may be frozen for a cut.
    #[serde(default)]
    pub freeze: FreezePolicy,
    /// Milliseconds after which what is frozen is thawed, whatever happens.
    #[serde(default = "default_deadline_ms")]
    pub freeze_deadline_ms: u64,
    /// Programs that are run around the cut of a point that is asked for.
    pub hooks: Option<HooksConfig>,
    /// Full images on a disk or share at the office.
    pub local_image: Option<LocalImageConfig>,
    /// Its volumes.
    #[serde(default)]
    pub volumes: Vec<VolumeConfig>,
}

/// Whether file systems may be frozen for a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FreezePolicy {
    /// They are not: where no cut validates, there is no point.
    #[default]
    Never,
    /// After three cuts in a row that did not validate, for the fourth.
    Fallback,
}

/// The programs around a cut: each a path and its arguments, no shell.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct HooksConfig {
    /// Makes the application hold still, and ends when it does.
    pub pre_cut: Vec<String>,
    /// Lets it go; none where pre-cut leaves nothing behind.
    #[serde(default)]
    pub post_cut: Vec<String>,
    /// Milliseconds that each may take, and that the application is held still at most between them.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
    /// Seconds from one point with hooks that nobody asked for to the next; 0: none but those that are asked for.
    #[serde(default)]
    pub every_s: u64,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct VolumeConfig {
    /// Its name within the group.
    pub name: String,
    /// Its place in the group; never reused.
    pub slot: VolumeSlot,
    /// The block device or image file.
    pub device: PathBuf,
    /// What watches it.
    #[serde(default)]
    pub tracker: TrackerChoice,
}

/// What watches a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TrackerChoice {
    /// eBPF for a block device where the kernel can, `scan` otherwise.
    #[default]
    Auto,
    /// eBPF or nothing.
    Ebpf,
    /// Comparing digests of the whole volume.
    Scan,
}

impl TrackerChoice {
    /// As it is written in the file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::Scan => "scan",
        }
    }
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, or a value of the wrong kind. The message has line and column.
    #[error("read source.toml: {}", .0.to_string().trim_end())]
    Toml(#[from] toml::de::Error),
    /// The file cannot be changed in place.
    #[error("change source.toml: {}", .0.to_string().trim_end())]
    Edit(#[from] toml_edit::TomlError),
    /// A key that means nothing.
    #[error("read source.toml: unknown key `{key}` in {place}")]
    UnknownKey {
        /// The key.
        key: String,
        /// Where it stands.
        place: String,
        /// The known key that is closest.
        closest: &'static str,
    },
    /// A value out of its range, or two that contradict each other.
    #[error("read source.toml: {0}")]
    Value(String),
}

impl ConfigError {
    /// The next step, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKey { closest, .. } => Some(format!("did you mean `{closest}`?")),
            _ => None,
        }
    }
}

/// Four weeks.
const fn default_audit_interval_s() -> u64 {
    28 * 24 * 3600
}

const fn default_deadline_ms() -> u64 {
    10_000
}

const fn default_interval_ms() -> u64 {
    1000
}

const fn default_capture_bytes_max() -> u64 {
    32 * MIB
}

const fn default_spool_bytes_max() -> u64 {
    1024 * MIB
}

const fn default_spool_points_max() -> u64 {
    1000
}

impl GroupConfig {
    /// Milliseconds a cut may try to validate.
    #[must_use]
    pub fn cut_bound_ms(&self) -> u64 {
        let interval = Duration::from_millis(self.interval_ms);
        self.cut_bound_ms.unwrap_or_else(|| CutLimits::default_bound(interval).as_millis() as u64)
    }

    /// A group without volumes.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            interval_ms: default_interval_ms(),
            audit_interval_s: default_audit_interval_s(),
            cut_bound_ms: None,
            capture_bytes_max: default_capture_bytes_max(),
            exclude: Vec::new(),
            spool_bytes_max: default_spool_bytes_max(),
            spool_points_max: default_spool_points_max(),
            freeze: FreezePolicy::default(),
            freeze_deadline_ms: default_deadline_ms(),
            hooks: None,
            local_image: None,
            volumes: Vec::new(),
        }
    }

    fn check(&self, group: &str) -> Result<(), ConfigError> {
        let refuse = |what: String| Err(ConfigError::Value(format!("groups.{group}: {what}")));
        if !is_name(group) {
            return refuse("a name is 1 to 64 of a-z A-Z 0-9 . _ - and starts with a letter, digit or _".into());
        }
        if !(10..=31_536_000).contains(&self.audit_interval_s) {
            return refuse(format!("audit_interval_s = {} is not within 10 to 31536000", self.audit_interval_s));
        }
        if !(20..=86_400_000).contains(&self.interval_ms) {
            return refuse(format!("interval_ms = {} is not within 20 to 86400000", self.interval_ms));
        }
        if !(1..=60_000).contains(&self.cut_bound_ms()) {
            return refuse(format!("cut_bound_ms = {} is not within 1 to 60000", self.cut_bound_ms()));
        }
        if !(MIB..=4096 * MIB).contains(&self.capture_bytes_max) {
            return refuse(format!(
                "capture_bytes_max = {} is not within 1048576 to 4294967296",
                self.capture_bytes_max
            ));
        }
        if self.spool_bytes_max != 0 && !(64 * MIB..=1024 * 1024 * MIB).contains(&self.spool_bytes_max) {
            return refuse(format!(
                "spool_bytes_max = {} is neither 0 nor within 67108864 to 1099511627776",
                self.spool_bytes_max
            ));
        }
        if !(16..=10_000).contains(&self.spool_points_max) {
            return refuse(format!("spool_points_max = {} is not within 16 to 10000", self.spool_points_max));
        }
        if !(100..=60_000).contains(&self.freeze_deadline_ms) {
            return refuse(format!("freeze_deadline_ms = {} is not within 100 to 60000", self.freeze_deadline_ms));
        }
        if let Some(hooks) = &self.hooks {
            hooks.check().or_else(refuse)?;
        }
        if let Some(local_image) = &self.local_image {
            local_image.check().or_else(refuse)?;
        }
        if self.exclude.len() > EXCLUDES_MAX {
            return refuse(format!("exclude has {} files, at most {EXCLUDES_MAX} are allowed", self.exclude.len()));
        }
        if let Some(path) = self.exclude.iter().find(|path| !path.is_absolute()) {
            return refuse(format!("exclude: {} is no absolute path", path.display()));
        }
        if self.volumes.len() > VOLUMES_MAX {
            return refuse(format!("{} volumes, at most {VOLUMES_MAX} are allowed", self.volumes.len()));
        }
        let (mut names, mut slots) = (BTreeSet::new(), BTreeSet::new());
        for volume in &self.volumes {
            if !is_name(&volume.name) {
                return refuse(format!("volume name {:?} is not valid", volume.name));
            }
            if !names.insert(&volume.name) {
                return refuse(format!("two volumes are named {:?}", volume.name));
            }
            if !slots.insert(volume.slot) {
                return refuse(format!("two volumes have slot {}", volume.slot));
            }
            if !volume.device.is_absolute() {
                return refuse(format!(
                    "device {} of volume {:?} is no absolute path",
                    volume.device.display(),
                    volume.name
                ));
            }
        }
        Ok(())
    }
}

impl HooksConfig {
    fn check(&self) -> Result<(), String> {
        if self.pre_cut.is_empty() {
            return Err("hooks.pre_cut is empty".into());
        }
        for (name, command) in [("pre_cut", &self.pre_cut), ("post_cut", &self.post_cut)] {
            if command.first().is_some_and(|program| !program.starts_with('/')) {
                return Err(format!("hooks.{name} does not begin with the absolute path of a program"));
            }
        }
        if !(100..=600_000).contains(&self.deadline_ms) {
            return Err(format!("hooks.deadline_ms = {} is not within 100 to 600000", self.deadline_ms));
        }
        if self.every_s != 0 && !(60..=31_536_000).contains(&self.every_s) {
            return Err(format!("hooks.every_s = {} is neither 0 nor within 60 to 31536000", self.every_s));
        }
        Ok(())
    }
}

impl Config {
    /// Parses and checks the file's text.
    ///
    /// # Errors
    /// Where it is not TOML, or has an unknown key, a value of the wrong kind or out of range.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let raw: toml::Table = toml::from_str(text)?;
        check_all_keys(&raw)?;
        let mut config: Self = toml::from_str(text)?;
        if let Some(path) = config.leave_unprotected.iter().find(|path| !path.is_absolute()) {
            return Err(ConfigError::Value(format!("leave_unprotected: {} is no absolute path", path.display())));
        }
        for (name, group) in &mut config.groups {
            group.volumes.sort_by_key(|volume| volume.slot);
            group.check(name)?;
        }
        Ok(config)
    }

    /// Refuses files of the state folder `root` among what is to be left out: configuration, keys and certificates are part of the
    /// points, and digests and spool are left out anyway.
    ///
    /// # Errors
    /// Where there is one.
    pub fn refuse_excludes_in(&self, root: &Path) -> Result<(), ConfigError> {
        let mut files =
            self.groups.iter().flat_map(|(group, config)| config.exclude.iter().map(move |path| (group, path)));
        let Some((group, path)) = files.find(|(_, path)| path.starts_with(root)) else { return Ok(()) };
        let path = path.display();
        Err(ConfigError::Value(format!(
            "groups.{group}: exclude: {path} lies in the state folder; its digests and its spool are left out anyway, nothing else of it ever is"
        )))
    }
}

fn check_all_keys(root: &toml::Table) -> Result<(), ConfigError> {
    check_keys(root, ROOT_KEYS, "the file")?;
    for (group, content) in root.get("groups").and_then(toml::Value::as_table).into_iter().flatten() {
        let Some(table) = content.as_table() else { continue };
        check_keys(table, GROUP_KEYS, &format!("[groups.{group}]"))?;
        if let Some(hooks) = table.get("hooks").and_then(toml::Value::as_table) {
            check_keys(hooks, HOOKS_KEYS, &format!("[groups.{group}.hooks]"))?;
        }
        if let Some(local_image) = table.get("local_image").and_then(toml::Value::as_table) {
            check_keys(local_image, local_image::KEYS, &format!("[groups.{group}.local_image]"))?;
        }
        for volume in table.get("volumes").and_then(toml::Value::as_array).into_iter().flatten() {
            if let Some(table) = volume.as_table() {
                check_keys(table, VOLUME_KEYS, &format!("[[groups.{group}.volumes]]"))?;
            }
        }
    }
    Ok(())
}

fn check_keys(table: &toml::Table, known: &[&'static str], place: &str) -> Result<(), ConfigError> {
    let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
    let closest = known.iter().copied().min_by_key(|name| strsim::damerau_levenshtein(name, key));
    Err(ConfigError::UnknownKey {
        key: key.clone(),
        place: place.to_owned(),
        closest: closest.expect("every table has known keys"),
    })
}

/// The file's text with `volume` added to `group`; everything else stays as it was.
///
/// # Errors
/// Where the text is no TOML.
pub fn with_volume(text: &str, group: &str, volume: &VolumeConfig) -> Result<String, ConfigError> {
    let mut document: DocumentMut = text.parse()?;
    let mut table = Table::new();
    table.insert("name", value(volume.name.as_str()));
    table.insert("slot", value(i64::from(volume.slot.0)));
    table.insert("device", value(volume.device.to_string_lossy().into_owned()));
    table.insert("tracker", value(volume.tracker.name()));
    let groups = document.entry("groups").or_insert_with(implicit_table);
    let groups = groups.as_table_mut().ok_or_else(|| inline_table("groups"))?;
    let entry = groups.entry(group).or_insert_with(new_group);
    let entry = entry.as_table_mut().ok_or_else(|| inline_table("a group"))?;
    let volumes = entry.entry("volumes").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
    volumes.as_array_of_tables_mut().ok_or_else(|| inline_table("volumes"))?.push(table);
    Ok(document.to_string())
}

/// The file's text without the volume `name` of `group`.
///
/// # Errors
/// Where the text is no TOML.
pub fn without_volume(text: &str, group: &str, name: &str) -> Result<String, ConfigError> {
    let mut document: DocumentMut = text.parse()?;
    let volumes = document
        .get_mut("groups")
        .and_then(|groups| groups.get_mut(group))
        .and_then(|group| group.get_mut("volumes"))
        .ok_or_else(|| ConfigError::Value(format!("groups.{group} has no volumes")))?;
    let volumes = volumes.as_array_of_tables_mut().ok_or_else(|| inline_table("volumes"))?;
    volumes.retain(|volume| volume.get("name").and_then(Item::as_str) != Some(name));
    Ok(document.to_string())
}

fn implicit_table() -> Item {
    let mut table = Table::new();
    table.set_implicit(true);
    Item::Table(table)
}

fn new_group() -> Item {
    let mut table = Table::new();
    table.insert("interval_ms", value(default_interval_ms() as i64));
    Item::Table(table)
}

fn inline_table(what: &str) -> ConfigError {
    ConfigError::Value(format!("{what} is written inline; write it as a [table] so that it can be changed"))
}

#[cfg(test)]
mod tests;

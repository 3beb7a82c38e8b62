//! `target.toml`: what an operator may set.
//!
//! Owns the keys, their defaults and bounds, and the errors that name a line. An unknown key is an error, never ignored.
//! It reads and writes text; where the file is, is `store`'s.

use crate::retention::Ladder;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Name of the file within the store's folder.
pub const CONFIG_FILE: &str = "target.toml";
/// Bytes the file may have.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Where the server listens unless told otherwise.
pub const LISTEN_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 7443);

const SEGMENT_BYTES_DEFAULT: u64 = 64 << 20;
const SEGMENT_BYTES_RANGE: RangeInclusive<u64> = (1 << 20)..=(4 << 30);
const NAMES_MAX: usize = 32;
/// Four weeks.
const SCRUB_INTERVAL_DEFAULT_S: u64 = 28 * 24 * 3600;
/// A week.
const CHECKPOINT_INTERVAL_DEFAULT_S: u64 = 7 * 24 * 3600;
const CHECKPOINT_SHARE_DEFAULT: f64 = 0.5;
const CHECKPOINT_SHARE_RANGE: RangeInclusive<f64> = 0.05..=10.0;
const PRUNE_INTERVAL_DEFAULT_S: u64 = 3600;
const MAINTENANCE_BYTES_PER_S_DEFAULT: u64 = 16 << 20;
const MAINTENANCE_BYTES_PER_S_MIN: u64 = 64 << 10;
/// An hour.
const DRILL_SCRIPT_TIMEOUT_DEFAULT_S: u64 = 3600;
/// Ten years.
const INTERVAL_MAX_S: u64 = 10 * 366 * 24 * 3600;
/// A hundred years.
const RUNG_MAX_S: u64 = 100 * 366 * 24 * 3600;

/// The store's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Address and UDP port the server listens on; port 0 takes any free one.
    #[serde(default = "listen_default")]
    pub listen: SocketAddr,
    /// Names and addresses by which offices reach this server; they stand in bundles and in the server's certificate.
    #[serde(default)]
    pub names: Vec<String>,
    /// Size at which a journal segment is sealed, in bytes.
    #[serde(default = "segment_bytes_default")]
    pub segment_bytes_max: u64,
    /// How often everything is read again and checked, in seconds; 0: never.
    #[serde(default = "scrub_interval_default")]
    pub scrub_interval_s: u64,
    /// How often a checkpoint of a group is made, in seconds; 0: never.
    #[serde(default = "checkpoint_interval_default")]
    pub checkpoint_interval_s: u64,
    /// A checkpoint is also made when the journal since the last one exceeds this share of the image.
    #[serde(default = "checkpoint_share_default")]
    pub checkpoint_share: f64,
    /// How often points that are too old are removed, in seconds; 0: never without a command.
    #[serde(default = "prune_interval_default")]
    pub prune_interval_s: u64,
    /// Bytes that pruning and checkpoints in the background may read and write per second. The scrub has a pace of its own.
    #[serde(default = "maintenance_default")]
    pub maintenance_bytes_per_s: u64,
    /// Address and TCP port of the metrics exporter; none runs unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// How often each group's newest point is drilled, in seconds; 0: only by command.
    #[serde(default)]
    pub drill_interval_s: u64,
    /// Where a drill has room for its images; `scratch` in the store unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_folder: Option<PathBuf>,
    /// The program that checks a drill's images; none unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_script: Option<PathBuf>,
    /// How long it may take, in seconds.
    #[serde(default = "drill_script_timeout_default")]
    pub drill_script_timeout_s: u64,
    /// How long the machine has to come up that a drill boots from the images, in seconds; 0: none is booted.
    #[serde(default)]
    pub drill_boot_s: u64,
    /// What stands on its serial console then; nothing is expected unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_boot_expect: Option<String>,
    /// How long points are kept.
    #[serde(default)]
    pub retention: Ladder,
}

/// The key that is a table.
const RETENTION: &str = "retention";
/// All others, for the error about one that is not among them.
const KEYS: [&str; 19] = [
    "listen",
    "names",
    "segment_bytes_max",
    "scrub_interval_s",
    "checkpoint_interval_s",
    "checkpoint_share",
    "prune_interval_s",
    "maintenance_bytes_per_s",
    "metrics_listen",
    "drill_interval_s",
    "drill_folder",
    "drill_script",
    "drill_script_timeout_s",
    "drill_boot_s",
    "drill_boot_expect",
    "retention.every_s",
    "retention.hourly_s",
    "retention.daily_s",
    "retention.weekly_s",
];

/// Why a configuration is refused. Lines count from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Bytes that are no UTF-8.
    #[error("not UTF-8 text")]
    NotText,
    /// Not TOML, or a value of the wrong kind.
    #[error("line {line}: {message}")]
    Syntax {
        /// Where.
        line: usize,
        /// What the parser said, in one line.
        message: String,
    },
    /// A key that does not exist.
    #[error("line {line}: unknown key `{key}`, the closest known one is `{closest}`")]
    UnknownKey {
        /// Where.
        line: usize,
        /// The key.
        key: String,
        /// The key that was probably meant.
        closest: &'static str,
    },
    /// A value out of its range.
    #[error("line {line}: {key} = {value}: {allowed}")]
    Value {
        /// Where.
        line: usize,
        /// The key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        allowed: String,
    },
}

const fn listen_default() -> SocketAddr {
    LISTEN_DEFAULT
}

const fn segment_bytes_default() -> u64 {
    SEGMENT_BYTES_DEFAULT
}

const fn scrub_interval_default() -> u64 {
    SCRUB_INTERVAL_DEFAULT_S
}

const fn checkpoint_interval_default() -> u64 {
    CHECKPOINT_INTERVAL_DEFAULT_S
}

const fn checkpoint_share_default() -> f64 {
    CHECKPOINT_SHARE_DEFAULT
}

const fn prune_interval_default() -> u64 {
    PRUNE_INTERVAL_DEFAULT_S
}

const fn drill_script_timeout_default() -> u64 {
    DRILL_SCRIPT_TIMEOUT_DEFAULT_S
}

const fn maintenance_default() -> u64 {
    MAINTENANCE_BYTES_PER_S_DEFAULT
}

impl Config {
    /// The defaults, for a server that is reached by `names`.
    #[must_use]
    pub const fn new(listen: SocketAddr, names: Vec<String>) -> Self {
        Self {
            listen,
            names,
            segment_bytes_max: SEGMENT_BYTES_DEFAULT,
            scrub_interval_s: SCRUB_INTERVAL_DEFAULT_S,
            checkpoint_interval_s: CHECKPOINT_INTERVAL_DEFAULT_S,
            checkpoint_share: CHECKPOINT_SHARE_DEFAULT,
            prune_interval_s: PRUNE_INTERVAL_DEFAULT_S,
            maintenance_bytes_per_s: MAINTENANCE_BYTES_PER_S_DEFAULT,
            metrics_listen: None,
            drill_interval_s: 0,
            drill_folder: None,
            drill_script: None,
            drill_script_timeout_s: DRILL_SCRIPT_TIMEOUT_DEFAULT_S,
            drill_boot_s: 0,
            drill_boot_expect: None,
            retention: Ladder::DEFAULT,
        }
    }

    /// Parses the file's bytes.
    ///
    /// # Errors
    /// The first thing that is wrong, with its line.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let text = std::str::from_utf8(bytes).map_err(|_| ConfigError::NotText)?;
        let syntax = |error: &toml::de::Error| ConfigError::Syntax {
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: error.message().replace('\n', ", "),
        };
        let table = DeTable::parse(text).map_err(|error| syntax(&error))?;
        let keys = keys_of(table.get_ref());
        if let Some((key, offset)) = keys.iter().find(|(key, _)| key != RETENTION && !KEYS.contains(&key.as_str())) {
            return Err(ConfigError::UnknownKey {
                line: line_of(text, *offset),
                key: key.clone(),
                closest: closest_key(key),
            });
        }
        let config: Self = toml::from_str(text).map_err(|error| syntax(&error))?;
        let line = |name: &str| {
            let key = keys.iter().find(|(key, _)| key == name);
            key.map_or(1, |(_, offset)| line_of(text, *offset))
        };
        config.check(&line)?;
        Ok(config)
    }

    fn check(&self, line: &dyn Fn(&str) -> usize) -> Result<(), ConfigError> {
        let wrong = |key: &'static str, value: String, allowed: &str| {
            Err(ConfigError::Value { line: line(key), key, value, allowed: allowed.to_owned() })
        };
        if !SEGMENT_BYTES_RANGE.contains(&self.segment_bytes_max) {
            let allowed = format!("{} to {} bytes", SEGMENT_BYTES_RANGE.start(), SEGMENT_BYTES_RANGE.end());
            return wrong("segment_bytes_max", self.segment_bytes_max.to_string(), &allowed);
        }
        if let Some((key, value, max)) = self.lengths_of_time().into_iter().find(|(_, value, max)| value > max) {
            return wrong(key, value.to_string(), &format!("0 to {max} seconds"));
        }
        if !CHECKPOINT_SHARE_RANGE.contains(&self.checkpoint_share) {
            let allowed = format!("{} to {}", CHECKPOINT_SHARE_RANGE.start(), CHECKPOINT_SHARE_RANGE.end());
            return wrong("checkpoint_share", self.checkpoint_share.to_string(), &allowed);
        }
        if self.maintenance_bytes_per_s < MAINTENANCE_BYTES_PER_S_MIN {
            let allowed = format!("at least {MAINTENANCE_BYTES_PER_S_MIN} bytes per second");
            return wrong("maintenance_bytes_per_s", self.maintenance_bytes_per_s.to_string(), &allowed);
        }
        let paths = [("drill_folder", &self.drill_folder), ("drill_script", &self.drill_script)];
        let relative = |(_, path): &(_, &Option<PathBuf>)| path.as_ref().is_some_and(|path| !path.is_absolute());
        if let Some((key, Some(path))) = paths.into_iter().find(relative) {
            return wrong(key, path.display().to_string(), "an absolute path");
        }
        if self.names.len() > NAMES_MAX {
            return wrong("names", format!("{} names", self.names.len()), "at most 32 names");
        }
        if let Some(name) = self.names.iter().find(|name| !is_host(name)) {
            return wrong("names", format!("{name:?}"), "a host name or an IP address, without a port");
        }
        if self.metrics_listen.is_some_and(|listen| listen.port() == 0) {
            return wrong("metrics_listen", "port 0".to_owned(), "a fixed port");
        }
        Ok(())
    }

    /// Every length of time: its key, its value and the most it may be, in seconds.
    const fn lengths_of_time(&self) -> [(&'static str, u64, u64); 10] {
        [
            ("scrub_interval_s", self.scrub_interval_s, INTERVAL_MAX_S),
            ("checkpoint_interval_s", self.checkpoint_interval_s, INTERVAL_MAX_S),
            ("prune_interval_s", self.prune_interval_s, INTERVAL_MAX_S),
            ("drill_interval_s", self.drill_interval_s, INTERVAL_MAX_S),
            ("drill_script_timeout_s", self.drill_script_timeout_s, INTERVAL_MAX_S),
            ("drill_boot_s", self.drill_boot_s, INTERVAL_MAX_S),
            ("retention.every_s", self.retention.every_s, RUNG_MAX_S),
            ("retention.hourly_s", self.retention.hourly_s, RUNG_MAX_S),
            ("retention.daily_s", self.retention.daily_s, RUNG_MAX_S),
            ("retention.weekly_s", self.retention.weekly_s, RUNG_MAX_S),
        ]
    }

    /// Where offices reach the server when it listens on `port`, each `HOST:PORT`.
    #[must_use]
    pub fn targets(&self, port: u16) -> Vec<String> {
        let names = if self.names.is_empty() { &["localhost".to_owned()] } else { self.names.as_slice() };
        let target = |name: &String| match name.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]:{port}"),
            _ => format!("{name}:{port}"),
        };
        names.iter().map(target).collect()
    }

    /// The file's text, with a line on each key. The ladder's keys are dotted, so that a key added at the end of the file is
    /// not taken for one of the ladder's.
    #[must_use]
    pub fn to_text(&self) -> String {
        let names: Vec<String> = self.names.iter().map(|name| format!("{name:?}")).collect();
        format!(
            "# Configuration of cdp-target. An unknown key is an error. Restart `cdp-target serve` after a change.\n\n\
             # Address and UDP port the server listens on.\n\
             listen = \"{}\"\n\n\
             # Names and addresses by which offices reach this server; they go into new bundles.\n\
             names = [{}]\n\n\
             # Size at which a journal segment is sealed, in bytes.\n\
             segment_bytes_max = {}\n\n\
             # How often everything is read again and checked, in seconds; 0: never.\n\
             scrub_interval_s = {}\n\n\
             # How often a checkpoint (an image that needs no older journal) is made, in seconds; 0: never.\n\
             checkpoint_interval_s = {}\n\n\
             # A checkpoint is also made when the journal since the last one exceeds this share of the image.\n\
             checkpoint_share = {:?}\n\n\
             # How often points that are no longer to be kept are removed, in seconds; 0: only by `cdp-target prune`.\n\
             prune_interval_s = {}\n\n\
             # Bytes per second that the server's own upkeep may read and write.\n\
             maintenance_bytes_per_s = {}\n\n\
             # How often each group's newest point is restored for real and checked, in seconds; 0: only by `cdp-target drill`.\n\
             drill_interval_s = {}\n\n\
             # A folder with room for the images of a drill, which are gone at its end; `scratch` in the store unless set.\n\
             {}\n\n\
             # A program that checks them, and how long it may take, in seconds.\n\
             {}\n\
             drill_script_timeout_s = {}\n\n\
             # How long a machine has that is booted from them, in seconds (0: none is), and what stands on its serial console then.\n\
             drill_boot_s = {}\n\
             {}\n\n\
             # Up to which age, in seconds, points are kept: every one, the first of an hour, of a day, of a week; 0: none.\n\
             retention.every_s = {}\n\
             retention.hourly_s = {}\n\
             retention.daily_s = {}\n\
             retention.weekly_s = {}\n\n\
             # Address and TCP port of the Prometheus exporter; none runs unless this is set.\n\
             {}\n",
            self.listen,
            names.join(", "),
            self.segment_bytes_max,
            self.scrub_interval_s,
            self.checkpoint_interval_s,
            self.checkpoint_share,
            self.prune_interval_s,
            self.maintenance_bytes_per_s,
            self.drill_interval_s,
            path_line("drill_folder", self.drill_folder.as_deref(), "/var/tmp"),
            path_line("drill_script", self.drill_script.as_deref(), "/usr/local/sbin/check-images"),
            self.drill_script_timeout_s,
            self.drill_boot_s,
            self.drill_boot_expect.as_ref().map_or_else(
                || "# drill_boot_expect = \"login:\"".to_owned(),
                |text| format!("drill_boot_expect = {text:?}")
            ),
            self.retention.every_s,
            self.retention.hourly_s,
            self.retention.daily_s,
            self.retention.weekly_s,
            self.metrics_listen.map_or_else(
                || "# metrics_listen = \"127.0.0.1:9743\"".to_owned(),
                |listen| format!("metrics_listen = \"{listen}\"")
            ),
        )
    }
}

/// The line of a key that is a path; commented out where it is not set.
fn path_line(key: &str, path: Option<&Path>, example: &str) -> String {
    match path {
        Some(path) => format!("{key} = {:?}", path.to_string_lossy()),
        None => format!("# {key} = {example:?}"),
    }
}

/// Whether `name` may be a host's name or address in a certificate.
#[must_use]
pub fn is_host(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.parse::<IpAddr>().is_ok() || (name.len() <= 253 && name.split('.').all(label))
}

/// The keys of the file, those of the ladder as `retention.KEY`, each with its place in the text.
fn keys_of(table: &DeTable<'_>) -> Vec<(String, usize)> {
    let mut keys = Vec::new();
    for (key, value) in table {
        match value.get_ref() {
            DeValue::Table(rungs) if key.get_ref() == RETENTION => {
                keys.extend(rungs.keys().map(|rung| (format!("{RETENTION}.{}", rung.get_ref()), rung.span().start)));
            }
            _ => keys.push((key.get_ref().to_string(), key.span().start)),
        }
    }
    keys
}

/// The known key nearest to `key` by edits, in whatever table it stands.
fn closest_key(key: &str) -> &'static str {
    let in_table = |key: &str| key.contains('.');
    let name = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let edits =
        |known: &&str| (strsim::damerau_levenshtein(&name(known), &name(key)), in_table(known) != in_table(key));
    KEYS.into_iter().min_by_key(edits).expect("there are keys")
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut config = Config::new(LISTEN_DEFAULT, vec!["backup.example".into(), "10.0.0.1".into()]);
        assert_eq!(Config::parse(config.to_text().as_bytes()), Ok(config.clone()));
        config.metrics_listen = Some(([127, 0, 0, 1], 9743).into());
        config.checkpoint_interval_s = 1;
        config.drill_interval_s = 8;
        config.drill_folder = Some("/var/tmp/a b\"c".into());
        config.drill_script = Some("/x".into());
        config.drill_script_timeout_s = 9;
        config.drill_boot_s = 10;
        config.drill_boot_expect = Some("a \"login:\"".into());
        config.checkpoint_share = 2.0;
        config.prune_interval_s = 3;
        config.maintenance_bytes_per_s = 1 << 32;
        config.retention = Ladder { every_s: 4, hourly_s: 5, daily_s: 6, weekly_s: 7 };
        assert_eq!(Config::parse(config.to_text().as_bytes()), Ok(config));
        assert_eq!(Config::parse(b""), Ok(Config::new(LISTEN_DEFAULT, Vec::new())));
    }

    #[test]
    fn the_ladder_may_be_a_table_of_which_a_part_is_set() {
        let expected = Config {
            retention: Ladder { hourly_s: 7200, weekly_s: 0, ..Ladder::DEFAULT },
            checkpoint_share: 1.0,
            ..Config::new(LISTEN_DEFAULT, Vec::new())
        };
        let text = "checkpoint_share = 1\n[retention]\nhourly_s = 7200\nweekly_s = 0\n";
        assert_eq!(Config::parse(text.as_bytes()), Ok(expected.clone()));
        let inline = "retention = { hourly_s = 7200, weekly_s = 0 }\ncheckpoint_share = 1.0";
        assert_eq!(Config::parse(inline.as_bytes()), Ok(expected));
        assert_eq!(Config::parse(b"[retention]\n"), Ok(Config::new(LISTEN_DEFAULT, Vec::new())));
    }

    #[test]
    fn every_key_is_written_once_and_known() {
        let mut config = Config::new(LISTEN_DEFAULT, Vec::new());
        config.metrics_listen = Some(LISTEN_DEFAULT);
        config.drill_folder = Some("/x".into());
        config.drill_script = Some("/y".into());
        config.drill_boot_expect = Some("login:".into());
        let text = config.to_text();
        let table = DeTable::parse(&text).expect("TOML");
        let written: Vec<String> = keys_of(table.get_ref()).into_iter().map(|(key, _)| key).collect();
        assert_eq!(written.len(), KEYS.len());
        assert!(KEYS.iter().all(|key| written.iter().any(|written| written == key)), "{written:?}");
    }

    #[test]
    fn targets_are_names_with_the_port() {
        let names = ["backup.example".to_owned(), "10.0.0.1".to_owned(), "fd00::1".to_owned()];
        let config = Config::new(LISTEN_DEFAULT, names.to_vec());
        assert_eq!(config.targets(7443), ["backup.example:7443", "10.0.0.1:7443", "[fd00::1]:7443"]);
        assert_eq!(Config::new(LISTEN_DEFAULT, Vec::new()).targets(1), ["localhost:1"]);
    }

    #[test]
    fn an_error_names_the_line_and_what_is_allowed() {
        for (text, expected) in [
            ("names = []\nlisen = \"x\"\n", "line 2: unknown key `lisen`, the closest known one is `listen`"),
            ("segment_bytes = 5", "line 1: unknown key `segment_bytes`, the closest known one is `segment_bytes_max`"),
            ("\n[names]\nx = 1", "line 2: "),
            ("listen = \"10.0.0.1\"", "line 1: invalid socket address syntax"),
            ("listen = \"[::]:1\"\nlisten = \"[::]:2\"", "line 2: duplicate key"),
            ("listen = ", "line 1: "),
            ("segment_bytes_max = -1", "line 1: "),
            ("\n\nsegment_bytes_max = 0", "line 3: segment_bytes_max = 0: 1048576 to 4294967296 bytes"),
            ("scrub_interval_s = 400000000", "line 1: scrub_interval_s = 400000000: 0 to 316224000 seconds"),
            ("checkpoint_interval_s = 400000000", "line 1: checkpoint_interval_s = 400000000: 0 to 316224000 seconds"),
            ("prune_interval_s = 400000000", "line 1: prune_interval_s = 400000000: 0 to 316224000 seconds"),
            ("drill_script = \"x\"", "line 1: drill_script = x: an absolute path"),
            ("checkpoint_share = 0.04", "line 1: checkpoint_share = 0.04: 0.05 to 10"),
            ("checkpoint_share = 11", "line 1: checkpoint_share = 11: 0.05 to 10"),
            ("checkpoint_share = nan", "line 1: checkpoint_share = NaN: 0.05 to 10"),
            (
                "maintenance_bytes_per_s = 65535",
                "line 1: maintenance_bytes_per_s = 65535: at least 65536 bytes per second",
            ),
            (
                "[retention]\nevery_s = 1\nhourly = 5\n",
                "line 3: unknown key `retention.hourly`, the closest known one is `retention.hourly_s`",
            ),
            (
                "\nretention.weekly_s = 1\nretention.dayly_s = 5\n",
                "line 3: unknown key `retention.dayly_s`, the closest known one is `retention.daily_s`",
            ),
            (
                "[retention]\nmetrics_listen = 5\n",
                "line 2: unknown key `retention.metrics_listen`, the closest known one is `metrics_listen`",
            ),
            ("daily_s = 5", "line 1: unknown key `daily_s`, the closest known one is `retention.daily_s`"),
            (
                "[retention]\n\nweekly_s = 3162240001",
                "line 3: retention.weekly_s = 3162240001: 0 to 3162240000 seconds",
            ),
            ("[retention]\nevery_s = \"1 d\"", "line 2: invalid type"),
            ("retention = 5", "line 1: invalid type"),
            ("names = [\"a:1\"]", "line 1: names = \"a:1\": a host name or an IP address, without a port"),
            ("metrics_listen = \"127.0.0.1:0\"", "line 1: metrics_listen = port 0: a fixed port"),
        ] {
            let error = Config::parse(text.as_bytes()).expect_err(text).to_string();
            assert!(error.starts_with(expected), "{text:?} gave {error:?}");
            assert!(!error.contains('\n'), "{error:?} is one line");
        }
        assert_eq!(Config::parse(&[0xff, 0xfe]), Err(ConfigError::NotText));
    }
}

//! `target.toml`: what an operator may set.
//!
//! Owns the keys, their defaults and bounds, and the errors that name a line. An unknown key is an error, never ignored.
//! It reads and writes text; where the file is, is `store`'s.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use toml::de::DeTable;

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
const SCRUB_INTERVAL_MAX_S: u64 = 10 * 366 * 24 * 3600;

/// The store's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Address and TCP port of the metrics exporter; none runs unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
}

/// All keys, for the error about one that is not among them.
const KEYS: [&str; 5] = ["listen", "names", "segment_bytes_max", "scrub_interval_s", "metrics_listen"];

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

impl Config {
    /// The defaults, for a server that is reached by `names`.
    #[must_use]
    pub const fn new(listen: SocketAddr, names: Vec<String>) -> Self {
        Self {
            listen,
            names,
            segment_bytes_max: SEGMENT_BYTES_DEFAULT,
            scrub_interval_s: SCRUB_INTERVAL_DEFAULT_S,
            metrics_listen: None,
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
        for key in table.get_ref().keys() {
            if !KEYS.contains(&&**key.get_ref()) {
                return Err(ConfigError::UnknownKey {
                    line: line_of(text, key.span().start),
                    key: key.get_ref().to_string(),
                    closest: closest_key(key.get_ref()),
                });
            }
        }
        let config: Self = toml::from_str(text).map_err(|error| syntax(&error))?;
        let line = |name: &str| {
            let key = table.get_ref().keys().find(|key| key.get_ref() == name);
            key.map_or(1, |key| line_of(text, key.span().start))
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
        if self.scrub_interval_s > SCRUB_INTERVAL_MAX_S {
            let allowed = format!("0 to {SCRUB_INTERVAL_MAX_S} seconds");
            return wrong("scrub_interval_s", self.scrub_interval_s.to_string(), &allowed);
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

    /// The file's text, with a line on each key.
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
             # Address and TCP port of the Prometheus exporter; none runs unless this is set.\n\
             {}\n",
            self.listen,
            names.join(", "),
            self.segment_bytes_max,
            self.scrub_interval_s,
            self.metrics_listen.map_or_else(
                || "# metrics_listen = \"127.0.0.1:9743\"".to_owned(),
                |listen| format!("metrics_listen = \"{listen}\"")
            ),
        )
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

/// The known key nearest to `key` by edits.
fn closest_key(key: &str) -> &'static str {
    KEYS.into_iter().min_by_key(|known| strsim::damerau_levenshtein(known, key)).expect("there are keys")
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
        assert_eq!(Config::parse(config.to_text().as_bytes()), Ok(config));
        assert_eq!(Config::parse(b""), Ok(Config::new(LISTEN_DEFAULT, Vec::new())));
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

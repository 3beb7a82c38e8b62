//! What several commands take: the store's folder, a group's path, a length of time.

use cdp_protocol::limits::is_name;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The store a command works on.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct DataFolder {
    /// Folder of the store.
    #[arg(long = "data", value_name = "DIR", env = "CDP_TARGET_DATA", default_value = "/var/lib/cdp-target")]
    pub(super) folder: PathBuf,
}

/// `OFFICE/GROUP` or `OFFICE/GROUP/VOLUME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GroupPath {
    /// The office's name.
    pub(super) office: String,
    /// The group's name.
    pub(super) group: String,
    /// The volume's name, where one is meant.
    pub(super) volume: Option<String>,
}

impl FromStr for GroupPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        if !parts.iter().all(|part| is_name(part)) {
            return Err("it is written OFFICE/GROUP, with names of a-z A-Z 0-9 . _ -".to_owned());
        }
        let (office, group, volume) = match parts[..] {
            [office, group] => (office, group, None),
            [office, group, volume] => (office, group, Some(volume.to_owned())),
            _ => return Err("it is written OFFICE/GROUP or OFFICE/GROUP/VOLUME".to_owned()),
        };
        Ok(Self { office: office.to_owned(), group: group.to_owned(), volume })
    }
}

impl std::fmt::Display for GroupPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.office, self.group)?;
        self.volume.as_ref().map_or(Ok(()), |volume| write!(f, "/{volume}"))
    }
}

/// The path of a whole group.
///
/// # Errors
/// Where it names a volume, or is none.
pub(super) fn whole_group(text: &str) -> Result<GroupPath, String> {
    let path: GroupPath = text.parse()?;
    if path.volume.is_some() { Err("it is written OFFICE/GROUP, without a volume".to_owned()) } else { Ok(path) }
}

/// A length of time: a number and one of `s m h d`.
///
/// # Errors
/// Where it is none, or zero, or above ten years.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "it is a number and s, m, h or d, as in 30m or 24h, up to 3650d".to_owned();
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 86400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let seconds = number.checked_mul(unit).filter(|seconds| (1..=3650 * 86400).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_group_or_a_volume() {
        let path: GroupPath = "paris/main/root".parse().expect("a path");
        assert_eq!(
            (path.office.as_str(), path.group.as_str(), path.volume.as_deref()),
            ("paris", "main", Some("root"))
        );
        assert_eq!(path.to_string(), "paris/main/root");
        assert!(whole_group("paris/main").is_ok());
        for wrong in ["", "paris", "paris/", "/main", "a/b/c/d", "a/../b", "a b/c"] {
            assert!(wrong.parse::<GroupPath>().is_err(), "{wrong:?}");
        }
        assert!(whole_group("paris/main/root").is_err());
    }

    #[test]
    fn a_length_of_time_has_a_unit_and_bounds() {
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86400)));
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        for wrong in ["", "24", "h", "0h", "-1h", "1.5h", "1ü", "99999999999999999999d", "3651d"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }
}

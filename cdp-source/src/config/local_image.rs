//! `local_image` of a group: full images on a disk or share at the office.

use serde::{Deserialize, Deserializer};
use std::path::PathBuf;

/// Its keys.
pub(super) const KEYS: &[&str] = &["folder", "every_s", "at", "keep", "bytes_per_s"];

/// Where images of a group are kept, and when they are made.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct LocalImageConfig {
    /// On a disk or share that is no protected volume; made ready by `image init`.
    pub folder: PathBuf,
    /// Seconds from one to the next.
    #[serde(default = "default_every_s")]
    pub every_s: u64,
    /// The time of day at which one is begun, UTC; whenever it is due where there is none.
    pub at: Option<TimeOfDay>,
    /// How many are kept.
    #[serde(default = "default_keep")]
    pub keep: usize,
    /// Bytes of the volumes that are read in a second at most; 0: as many as there are.
    #[serde(default = "default_bytes_per_s")]
    pub bytes_per_s: u64,
}

/// A time of day, to the minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeOfDay {
    minutes: u16,
}

const fn default_every_s() -> u64 {
    7 * 24 * 3600
}

const fn default_keep() -> usize {
    4
}

const fn default_bytes_per_s() -> u64 {
    50_000_000
}

impl TimeOfDay {
    /// Of `HH:MM`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (hours, minutes) = text.split_once(':')?;
        let is_number = |text: &&str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = |text: &str| Some(text).filter(is_number)?.parse::<u16>().ok();
        let (hours, minutes) = (number(hours)?, number(minutes)?);
        (hours < 24 && minutes < 60).then_some(Self { minutes: hours * 60 + minutes })
    }

    /// Milliseconds since midnight.
    #[must_use]
    pub fn ms(self) -> i64 {
        i64::from(self.minutes) * 60_000
    }
}

impl<'de> Deserialize<'de> for TimeOfDay {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let error = || serde::de::Error::custom(format!("{text:?} is no time of day as \"02:00\""));
        Self::parse(&text).ok_or_else(error)
    }
}

impl LocalImageConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        if !self.folder.is_absolute() {
            return Err(format!("local_image.folder: {} is no absolute path", self.folder.display()));
        }
        if !(60..=31_536_000).contains(&self.every_s) {
            return Err(format!("local_image.every_s = {} is not within 60 to 31536000", self.every_s));
        }
        if !(1..=1000).contains(&self.keep) {
            return Err(format!("local_image.keep = {} is not within 1 to 1000", self.keep));
        }
        if self.bytes_per_s != 0 && self.bytes_per_s < 1_000_000 {
            return Err(format!("local_image.bytes_per_s = {} is neither 0 nor at least 1000000", self.bytes_per_s));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_strictly_and_the_rest_has_its_default() {
        let parse = |lines: &str| crate::config::Config::parse(&format!("[groups.main]\n{lines}\n"));
        let config = parse("local_image.folder = \"/mnt/usb\"").expect("a folder is enough");
        let config = config.groups["main"].local_image.clone().expect("it is there");
        assert_eq!((config.every_s, config.at, config.keep, config.bytes_per_s), (604_800, None, 4, 50_000_000));
        let typo = parse("local_image = { folder = \"/mnt\", eevry_s = 60 }").expect_err("a typo");
        assert!(typo.to_string().contains("eevry_s") && typo.hint().is_some_and(|hint| hint.contains("every_s")));
        for wrong in [
            "keep = 1",
            "folder = \"mnt\"",
            "folder = \"/mnt\", every_s = 59",
            "folder = \"/mnt\", keep = 0",
            "folder = \"/mnt\", bytes_per_s = 4096",
            "folder = \"/mnt\", at = \"2am\"",
        ] {
            assert!(parse(&format!("local_image = {{ {wrong} }}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_time_of_day_is_one_of_a_day() {
        assert_eq!(TimeOfDay::parse("02:30").map(TimeOfDay::ms), Some(9_000_000));
        assert_eq!(TimeOfDay::parse("23:59").map(TimeOfDay::ms), Some(86_340_000));
        for text in ["", "2:30", "24:00", "12:60", "12", "+2:00", "02:00:00", "-1:00"] {
            assert_eq!(TimeOfDay::parse(text), None, "{text}");
        }
    }
}

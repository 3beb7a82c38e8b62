//! Names of recovery points, and what other texts name a point by.
//!
//! Owns the rule both sides hold a label to: one that could be read as a number, an age, a time or `latest` would name another point at
//! the other end. Does not read those (the target does).

use crate::limits::is_name;

/// What a text looks like, whether or not it is a good one of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The newest point.
    Latest,
    /// An epoch.
    Number,
    /// So long ago.
    Age,
    /// An instant.
    Time,
    /// None of these: a label, if anything.
    Other,
}

/// Why a text is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// It could be taken for something else.
    #[error("`{0}` can be read as {1}, so it cannot be a label")]
    ReadsAs(String, &'static str),
    /// It has characters that a label may not have, or is too long, or empty.
    #[error("`{0}` cannot be a label: 1 to 64 of a-z A-Z 0-9 . _ -, not starting with a dot or a dash")]
    Characters(String),
}

impl Reading {
    /// How a text reads.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let rest = &text[digits..];
        // 2026-1…, 20261122T10…, 10:15: digits and then what dates and times go on with.
        let looks_like_time = digits > 0
            && (rest.starts_with(':')
                || (digits >= 4
                    && rest.starts_with(['T', 't'])
                    && rest[1..].starts_with(|c: char| c.is_ascii_digit()))
                || (digits == 4 && rest.starts_with('-') && rest[1..].starts_with(|c: char| c.is_ascii_digit())));
        match rest {
            _ if text.eq_ignore_ascii_case("latest") => Self::Latest,
            "" if digits > 0 => Self::Number,
            _ if digits > 0 && age_unit_ms(rest).is_some() => Self::Age,
            _ if looks_like_time => Self::Time,
            _ => Self::Other,
        }
    }
}

/// Milliseconds of a unit of ages: `s`, `m`, `h`, `d`, `w`.
#[must_use]
pub fn age_unit_ms(unit: &str) -> Option<i64> {
    match unit {
        "s" => Some(1000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        "w" => Some(604_800_000),
        _ => None,
    }
}

/// Checks a name that is to become a label.
///
/// # Errors
/// Where it reads as a number, a time, an age or `latest`, or has characters that a label may not have.
pub fn check_label(text: &str) -> Result<(), LabelError> {
    let reads_as = match Reading::of(text) {
        Reading::Latest => "the newest point",
        Reading::Number => "a number",
        Reading::Age => "an age",
        Reading::Time => "a time",
        Reading::Other if is_name(text) => return Ok(()),
        Reading::Other => return Err(LabelError::Characters(text.to_owned())),
    };
    Err(LabelError::ReadsAs(text.to_owned(), reads_as))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_that_names_a_point_in_another_way_is_refused() {
        for label in [
            "",
            "7",
            "latest",
            "LATEST",
            "10m",
            "3d",
            "2026-11-22",
            "2026-11-22T10:00:00Z",
            "20261122T1015",
            "10:15",
            "a/b",
            " a",
            "a\n",
            "Latest build",
            "10 minutes",
            "ä",
        ] {
            assert!(check_label(label).is_err(), "{label:?}");
        }
        for label in ["before-upgrade", "v2", "m10", "10minutes", "2026.11"] {
            assert!(check_label(label).is_ok(), "{label:?}");
        }
    }
}

//! Naming an image by its point: a number, `latest`, a label, a time, an age, as points are named at the target.
//!
//! A time or an age is the newest image at or before it. Where there is none, the error names the nearest.

use super::ImageError;
use super::folder::Listed;
use crate::agent::status::rfc3339;
use cdp_protocol::label::{Reading, age_unit_ms};
use cdp_protocol::units::Timestamp;

/// The image that `at` names among some, newest first; ages count from `now`.
///
/// # Errors
/// Where there is none, or the text names nothing.
pub fn find<'a>(images: &'a [Listed], at: &str, now: Timestamp) -> Result<&'a Listed, ImageError> {
    let found = match Reading::of(at) {
        Reading::Latest => images.first(),
        Reading::Number => images.iter().find(|listed| listed.footer.epoch.to_string() == at),
        Reading::Other => images.iter().find(|listed| listed.footer.label.as_deref() == Some(at)),
        Reading::Age | Reading::Time => {
            let time = instant(at, now).ok_or_else(|| ImageError::Folder(format!("`{at}` is no time or age")))?;
            let before = images.iter().find(|listed| listed.footer.cut_time <= time);
            Some(before.ok_or_else(|| none_before(images, time))?)
        }
    };
    found.ok_or_else(|| {
        let there: Vec<String> = images.iter().take(8).map(named).collect();
        let there =
            if there.is_empty() { "there is none at all".to_owned() } else { format!("there is {}", there.join(", ")) };
        ImageError::Folder(format!("there is no image of point {at}; {there}"))
    })
}

fn named(listed: &Listed) -> String {
    format!("{} ({})", listed.footer.epoch, rfc3339(listed.footer.cut_time))
}

fn none_before(images: &[Listed], time: Timestamp) -> ImageError {
    let after =
        images.last().map_or_else(String::new, |listed| format!("; the nearest after is of point {}", named(listed)));
    ImageError::Folder(format!("there is no image at or before {}{after}", rfc3339(time)))
}

fn instant(text: &str, now: Timestamp) -> Option<Timestamp> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if let Some(unit_ms) = age_unit_ms(unit) {
        let age = number.parse::<i64>().ok()?.checked_mul(unit_ms)?;
        return now.0.checked_sub(age).map(Timestamp);
    }
    text.parse::<jiff::Timestamp>().ok().map(|time| Timestamp(time.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local_image::format::Footer;
    use cdp_protocol::units::{AttemptId, Class, Epoch, GroupId, KeyId};
    use std::path::PathBuf;

    fn listed(epoch: u64, ms: i64, label: Option<&str>) -> Listed {
        let footer = Footer {
            group: GroupId([1; 16]),
            attempt: AttemptId([2; 16]),
            key: KeyId([3; 8]),
            epoch: Epoch(epoch),
            cut_time: Timestamp(ms),
            made: Timestamp(ms + 1),
            class: Class::Crash,
            label: label.map(str::to_owned),
            volumes: Vec::new(),
        };
        Listed { path: PathBuf::from("x"), bytes: 1, footer, checked: None }
    }

    #[test]
    fn an_image_is_named_as_points_are_and_a_time_is_the_newest_before_it() {
        let images = [listed(30, 300_000, Some("weekly")), listed(20, 200_000, None), listed(10, 100_000, None)];
        let epoch = |at: &str| find(&images, at, Timestamp(310_000)).map(|found| found.footer.epoch.0).ok();
        let names = ["latest", "20", "weekly", "1970-01-01T00:04:00Z", "1m", "3m", "10", "2m"];
        assert_eq!(names.map(epoch), [30, 20, 30, 20, 20, 10, 10, 10].map(Some));
        for none in ["21", "1970-01-01T00:01:00Z", "1h", "monthly", "1970-13-01T00:00:00Z", "99999999999999999999d"] {
            assert_eq!(epoch(none), None, "{none}");
        }
        let error = find(&images, "1h", Timestamp(310_000)).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("the nearest after is of point 10"), "{error}");
        assert!(find(&[], "latest", Timestamp(0)).is_err());
    }
}

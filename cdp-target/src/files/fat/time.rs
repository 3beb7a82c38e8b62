//! The times of FAT: the local time of whoever wrote them, without a zone. They are taken for this machine's.

use crate::files::tree::Moment;

/// A date and a time of two seconds; `None` where there is none.
pub(super) fn moment(date: u64, time: u64) -> Option<Moment> {
    if date == 0 {
        return None;
    }
    let year = 1980 + (date >> 9) as i16;
    let date = jiff::civil::Date::new(year, (date >> 5 & 15) as i8, (date & 31) as i8).ok()?;
    let time = jiff::civil::Time::new((time >> 11) as i8, (time >> 5 & 63) as i8, ((time & 31) * 2) as i8, 0).ok()?;
    let at = date.to_datetime(time).to_zoned(jiff::tz::TimeZone::system()).ok()?.timestamp();
    Some(Moment { seconds: at.as_second(), nanoseconds: 0 })
}

//! What a group's history tells of the bytes its ladder will need: how much comes in, and what a point costs on each rung.
//!
//! Looks at the newest week, segment by segment: the blocks written in an hour, a day, a week each count once.

use crate::forecast::{Forecast, RungCost, Usage, forecast, ladder_bytes};
use crate::journal::{GroupView, JournalError};
use crate::retention::{Ladder, Rung};
use cdp_protocol::units::{Epoch, Timestamp};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;

/// How far back it is looked, in milliseconds: a week.
const SPAN_MS: i64 = 7 * 24 * 3600 * 1000;

type Blocks = BTreeMap<u16, RoaringBitmap>;

/// Blocks that were written within a window of one rung, and what windows before it came to.
#[derive(Default)]
struct Window {
    at: Option<i64>,
    blocks: Blocks,
    windows: u64,
    counted: u64,
}

impl Window {
    fn close(&mut self) {
        if self.at.take().is_some() {
            self.windows += 1;
            self.counted += self.blocks.values().map(RoaringBitmap::len).sum::<u64>();
            self.blocks.clear();
        }
    }

    fn mean(&self) -> f64 {
        self.counted as f64 / self.windows.max(1) as f64
    }
}

/// What is to be expected of a group whose file system has `free_bytes` left.
///
/// # Errors
/// Where a segment cannot be read.
pub fn forecast_of(
    view: &GroupView,
    ladder: &Ladder,
    now: Timestamp,
    free_bytes: u64,
) -> Result<Forecast, JournalError> {
    let received = received(view, Timestamp(now.0.saturating_sub(SPAN_MS)))?;
    let mut windows: [Window; 4] = std::array::from_fn(|_| Window::default());
    let (mut bytes, mut blocks) = (0_u64, 0_u64);
    for number in view.segments_from(0) {
        let is_old = view
            .sealed_segment(number)
            .and_then(|sealed| sealed.points)
            .is_some_and(|points| received.first_key_value().is_none_or(|(first, _)| points.last < *first));
        if is_old {
            continue;
        }
        let mut frame = None;
        for (epoch, entry) in view.included(number)? {
            // What is on its way to the next point counts to it; what was there at first is the image, and no change.
            let Some((_, at)) = received.range(epoch..).next().filter(|_| epoch > first_of(&received)) else {
                continue;
            };
            blocks += u64::from(entry.extent.count);
            if frame != Some(entry.frame_offset) {
                frame = Some(entry.frame_offset);
                bytes += u64::from(entry.frame_len);
            }
            for (rung, window) in Rung::ALL.into_iter().zip(&mut windows) {
                let step_ms = (rung.step_s() as i64 * 1000).max(1);
                let place = if rung == Rung::Every { epoch.0 as i64 } else { at.0.div_euclid(step_ms) };
                if window.at != Some(place) {
                    window.close();
                    window.at = Some(place);
                }
                let range = entry.extent.start.0..=(entry.extent.end() - 1) as u32;
                window.blocks.entry(entry.slot.0).or_default().insert_range(range);
            }
        }
    }
    windows.iter_mut().for_each(Window::close);
    let per_block = bytes as f64 / blocks.max(1) as f64;
    let span_s = span_s(&received);
    let costs: [RungCost; 4] = std::array::from_fn(|at| {
        let step_s = match Rung::ALL[at].step_s() {
            0 => (span_s / windows[at].windows.max(1) as f64).ceil() as u64,
            step_s => step_s,
        };
        RungCost { step_s, bytes_per_point: (windows[at].mean() * per_block) as u64 }
    });
    let image_bytes = image_bytes(view)?;
    let usage = Usage {
        incoming_bytes_per_s: if span_s > 0.0 { bytes as f64 / span_s } else { 0.0 },
        store_bytes: super::sweep::held_bytes(view)?,
        free_bytes,
    };
    Ok(forecast(now, &usage, ladder_bytes(ladder, image_bytes, &costs)))
}

/// When the points since `from` were received; at least the two newest.
fn received(view: &GroupView, from: Timestamp) -> Result<BTreeMap<Epoch, Timestamp>, JournalError> {
    let mut received = BTreeMap::new();
    for number in view.segments_from(0).collect::<Vec<_>>().into_iter().rev() {
        let index = view.index(number)?;
        let mut is_over = false;
        for commit in index.commits().iter().rev() {
            is_over = commit.received < from && received.len() >= 2;
            if is_over {
                break;
            }
            received.insert(commit.head.epoch, commit.received);
        }
        if is_over {
            break;
        }
    }
    Ok(received)
}

fn first_of(received: &BTreeMap<Epoch, Timestamp>) -> Epoch {
    received.first_key_value().map_or(Epoch(0), |(first, _)| *first)
}

fn span_s(received: &BTreeMap<Epoch, Timestamp>) -> f64 {
    let (first, last) = (received.first_key_value(), received.last_key_value());
    first.zip(last).map_or(0.0, |((_, first), (_, last))| last.0.saturating_sub(first.0) as f64 / 1000.0)
}

/// What a full image takes: by the newest checkpoint, else by the first point.
fn image_bytes(view: &GroupView) -> Result<u64, JournalError> {
    if let Some(checkpoint) = view.manifest().checkpoints.last() {
        return Ok(checkpoint.needed_bytes);
    }
    Ok(view.points().next().transpose()?.map_or(0, |first| first.bytes))
}

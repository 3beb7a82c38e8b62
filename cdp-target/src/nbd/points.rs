//! The points that are open: the one that is served by default, and others as clients name them.
//!
//! Invariant: an open point's files are held by a lease, so that no prune takes them away; and no more than `POINTS_MAX` are open beside
//! the first: of those that nobody reads the longest unused gives way, and where all are read the next is refused.

use super::exports::ExportError;
use crate::authority::Authority;
use crate::catalog::{Catalog, Group};
use crate::journal::lease::Lease;
use crate::points::{PointName, PointTimes, point_time};
use crate::restore::frames::FrameCache;
use crate::restore::point::PointImage;
use crate::store::Store;
use cdp_protocol::units::{Epoch, FrameHash, GroupId, Timestamp};
use cdp_seams::clock::Clock;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Points open at once, beside the one that is served by default.
pub const POINTS_MAX: usize = 16;
/// Memory for decoded frames, of all points together.
const FRAMES_BYTES_MAX: usize = 256 << 20;
/// What is known of the group is good for so long: many clients that name points at once look once.
const FRESH: Duration = Duration::from_secs(1);

/// A point that is open.
pub struct OpenPoint {
    /// Its content.
    pub image: PointImage,
    /// Hash of its commit.
    pub hash: FrameHash,
    /// Its time, as points are listed.
    pub time: Timestamp,
    /// What is damaged that it needs.
    pub damaged: Option<String>,
    history: Arc<History>,
}

impl OpenPoint {
    /// Its number.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.image.epoch()
    }

    /// Whose it is.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.history.group.place().group
    }
}

/// The group as it was at a moment, and the lease on it.
struct History {
    number: u64,
    group: Group,
    opened: Duration,
    _lease: Option<Lease>,
}

/// The points of a group.
pub struct Points {
    store: Store,
    catalog: Catalog,
    office: String,
    group: String,
    clock: Arc<dyn Clock>,
    frames: Arc<FrameCache>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    newest: Option<Arc<History>>,
    histories: u64,
    /// The longest unused first.
    points: Vec<Arc<OpenPoint>>,
}

impl Points {
    /// The points of a group; none is open.
    #[must_use]
    pub fn new(store: &Store, authority: Authority, office: &str, group: &str, clock: Arc<dyn Clock>) -> Self {
        Self {
            catalog: Catalog::new(store, authority),
            store: store.clone(),
            office: office.to_owned(),
            group: group.to_owned(),
            clock,
            frames: Arc::new(FrameCache::new(FRAMES_BYTES_MAX)),
            open: Mutex::default(),
        }
    }

    /// Opens a point that does not count among the others.
    ///
    /// # Errors
    /// Where there is none of that name, or it cannot be read.
    pub fn open(&self, name: &str) -> Result<Arc<OpenPoint>, ExportError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = PointName::parse(name, Timestamp(self.clock.wall_ms()))?;
        let history = self.history(&mut open)?;
        self.opened(&history, &wanted)
    }

    /// The point that a client names, opened where it is not.
    ///
    /// # Errors
    /// Where there is none of that name, it cannot be read, or too many others are being read.
    pub fn find(&self, name: &str) -> Result<Arc<OpenPoint>, ExportError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = PointName::parse(name, Timestamp(self.clock.wall_ms()))?;
        if let PointName::Epoch(epoch) = wanted
            && let Some(point) = open.used(epoch)
        {
            return Ok(point);
        }
        let history = self.history(&mut open)?;
        let epoch = epoch_of(&history.group, &wanted)?;
        if let Some(point) = open.used(epoch) {
            return Ok(point);
        }
        open.make_room()?;
        let point = self.opened(&history, &PointName::Epoch(epoch))?;
        open.points.push(Arc::clone(&point));
        Ok(point)
    }

    /// The group as it is now.
    fn history(&self, open: &mut Open) -> Result<Arc<History>, ExportError> {
        let now = self.clock.monotonic();
        if let Some(known) = open.newest.as_ref().filter(|known| now.saturating_sub(known.opened) < FRESH) {
            return Ok(Arc::clone(known));
        }
        let group = self.catalog.group(&self.office, &self.group)?;
        let (group, lease) = group.held(&self.store)?;
        open.histories += 1;
        let history = History { number: open.histories, group, opened: now, _lease: lease };
        Ok(Arc::clone(open.newest.insert(Arc::new(history))))
    }

    fn opened(&self, history: &Arc<History>, wanted: &PointName) -> Result<Arc<OpenPoint>, ExportError> {
        let (group, epoch) = (&history.group, epoch_of(&history.group, wanted)?);
        let keys = self.catalog.keys(group)?;
        let image = group.view().image(epoch, keys)?.sharing(&self.frames, history.number);
        let point = group.view().point(epoch)?.ok_or(crate::journal::JournalError::NoPoint(epoch))?;
        let time = point_time(PointTimes { cut: point.cut_time, received: point.received }, None);
        let (hash, damaged, history) = (point.hash, point.damaged, Arc::clone(history));
        Ok(Arc::new(OpenPoint { image, hash, time, damaged, history }))
    }
}

impl Open {
    /// A point that is open, as the last that was used.
    fn used(&mut self, epoch: Epoch) -> Option<Arc<OpenPoint>> {
        let at = self.points.iter().position(|point| point.epoch() == epoch)?;
        let point = self.points.remove(at);
        self.points.push(Arc::clone(&point));
        Some(point)
    }

    fn make_room(&mut self) -> Result<(), ExportError> {
        if self.points.len() < POINTS_MAX {
            return Ok(());
        }
        let unread = self.points.iter().position(|point| Arc::strong_count(point) == 1);
        self.points.remove(unread.ok_or(ExportError::TooMany)?);
        Ok(())
    }
}

/// The number of the point that is meant. Where its number or its being the newest says so, the others are not listed.
fn epoch_of(group: &Group, wanted: &PointName) -> Result<Epoch, ExportError> {
    match wanted {
        PointName::Epoch(epoch) if group.view().point(*epoch)?.is_some() => return Ok(*epoch),
        PointName::Latest => {
            if let Some((newest, _)) = group.overview()?.newest {
                return Ok(newest.epoch);
            }
        }
        _ => {}
    }
    Ok(wanted.find(&group.points()?)?.epoch)
}

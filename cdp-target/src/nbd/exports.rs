//! What a server gives: each volume of the group under its name, as of the point it was started with, and as `VOLUME@POINT` as of any
//! other.
//!
//! Invariant: a name means one volume at one point for as long as a connection lasts. Only the exports without a point take writes.

use super::disk::Disk;
use super::overlay::Overlay;
use super::points::{OpenPoint, Points};
use crate::catalog::CatalogError;
use crate::journal::JournalError;
use crate::points::{Instant, NoSuchPoint, PointNameError};
use std::sync::Arc;

/// Exports of a group.
pub struct Exports {
    points: Points,
    /// The point that is meant where none is named.
    point: Arc<OpenPoint>,
    overlay: Option<Arc<Overlay>>,
}

/// Why there is no such export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// No such volume.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Not the name of a point.
    #[error(transparent)]
    PointName(#[from] PointNameError),
    /// No such point.
    #[error(transparent)]
    NoSuchPoint(#[from] NoSuchPoint),
    /// The group cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// As many points are open as may be.
    #[error("{} other points are being read: end one of their readers first", super::points::POINTS_MAX)]
    TooMany,
}

impl ExportError {
    /// Whether it is for want of such a thing, rather than that it cannot be had.
    pub(super) const fn is_unknown(&self) -> bool {
        let no_volume = matches!(self, Self::Catalog(CatalogError::NoVolume { .. }));
        no_volume || matches!(self, Self::PointName(_) | Self::NoSuchPoint(_) | Self::Journal(JournalError::NoPoint(_)))
    }
}

impl Exports {
    /// The exports of `points`, with `point` as the one that is meant where none is named.
    #[must_use]
    pub const fn new(points: Points, point: Arc<OpenPoint>, overlay: Option<Arc<Overlay>>) -> Self {
        Self { points, point, overlay }
    }

    /// The point that is meant where none is named.
    #[must_use]
    pub const fn point(&self) -> &Arc<OpenPoint> {
        &self.point
    }

    /// Names of the volumes.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.point.image.volumes().iter().map(|volume| volume.name.as_str()).collect()
    }

    /// A line for people about the point that is meant where none is named.
    #[must_use]
    pub fn description(&self) -> String {
        describe(&self.point, self.overlay.is_some())
    }

    /// The export of a name. The empty name is the volume, where there is one only.
    ///
    /// # Errors
    /// Where there is none, or it cannot be opened.
    pub fn find(&self, name: &str) -> Result<Disk, ExportError> {
        let (volume, point) = match name.split_once('@') {
            Some((volume, point)) => (volume, Some(point)),
            None => (name, None),
        };
        let (point, overlay) = match point {
            Some(point) => (self.points.find(point)?, None),
            None => (Arc::clone(&self.point), self.overlay.as_ref()),
        };
        let volumes = point.image.volumes();
        let found = match (volume, volumes) {
            ("", [only]) => Some(only),
            _ => volumes.iter().find(|known| known.name == volume),
        };
        let Some(found) = found.cloned() else {
            let known = volumes.iter().map(|volume| volume.name.clone()).collect();
            return Err(CatalogError::NoVolume { name: volume.to_owned(), known }.into());
        };
        let overlay = overlay.map(|overlay| overlay.volume(found.slot));
        let description = describe(&point, overlay.is_some());
        Ok(Disk::new(point, found, overlay, description))
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// As the overlay says.
    pub fn flush(&self) -> Result<(), super::overlay::OverlayError> {
        self.overlay.as_ref().map_or(Ok(()), |overlay| overlay.flush())
    }
}

fn describe(point: &OpenPoint, is_writable: bool) -> String {
    let how = if is_writable { ", with an overlay" } else { "" };
    let damaged = if point.damaged.is_some() { ", damaged" } else { "" };
    format!("point {} of {}{how}{damaged}", point.epoch(), Instant(point.time))
}

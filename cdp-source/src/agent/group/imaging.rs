//! What the group does for a local image of itself: it hands over what it captures, and closes the image with a point.
//!
//! Invariant: from its begin on every capture goes through the tee before anything is left out of it, in the order in which they are made.
//! Costs a copy of what is captured, and never a wait.

use super::Group;
use crate::capture::Capture;
use crate::local_image::tee::{Begun, Closing, ImageRequest, NotBegun};
use cdp_protocol::units::{Class, Epoch, Timestamp};

impl Group {
    pub(super) fn image(&mut self, request: ImageRequest) {
        match request {
            ImageRequest::Begin { tee, reply } => {
                let begun = self.begin_image();
                let is_begun = begun.is_ok();
                // Who asked may be gone, and its end of the tee with it.
                if reply.send(begun).is_ok() && is_begun {
                    self.image = Some(tee);
                }
            }
            ImageRequest::Name => _ = self.image.take_if(|tee| !tee.name()),
        }
    }

    fn begin_image(&self) -> Result<Begun, NotBegun> {
        let later = |reason: &str| NotBegun::Later(reason.to_owned());
        if let Some(reason) = self.no_points_because().filter(|_| !self.is_only_put_off()) {
            return Err(NotBegun::Later(format!("no points are made: {reason}")));
        }
        let (Some(open), Some(devices)) = (self.open, &self.devices) else {
            return Err(later("the target has not been reached yet"));
        };
        if !devices.tracker.sees_conflicts() {
            let reason = "its volumes are compared, not tracked (tracker scan): an image of them would not be exact";
            return Err(NotBegun::Never(reason.to_owned()));
        }
        if self.captured_epoch.is_none() && !open.has_point || self.is_too_large() {
            return Err(later("the first copy, or a large backlog, is under way"));
        }
        let (generation, epoch) = (open.generation, Epoch(open.next_epoch.0.saturating_sub(1)));
        Ok(Begun { generation, epoch, volumes: self.setup.facts.volumes.clone() })
    }

    /// Everything that is captured, before what the target holds already is left out.
    pub(super) fn tee(&mut self, capture: &Capture) {
        self.image.take_if(|tee| !tee.push(capture));
    }

    /// The point is made that was asked for to close the image: the volumes are as of its instant.
    pub(super) fn close_image(&mut self, epoch: Epoch, cut_time: Timestamp, class: Class, label: Option<String>) {
        let skipped = self.ledger.skipped.clone();
        let closing = Closing { epoch, cut_time, class, label, skipped };
        self.image = self.image.take().and_then(|tee| tee.close(closing));
    }
}

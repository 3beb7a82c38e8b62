//! The choice at work: asked before each attempt is encoded, and told after it. Shared by the groups of an agent.

use super::{Choice, Setting};
use cdp_protocol::packer::Packing;
use cdp_seams::clock::Clock;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::debug;

/// What the line carries, in bytes a second, as far as it is known.
type LineRate = Box<dyn Fn() -> Option<f64> + Send + Sync>;

/// Says in which way to pack.
pub struct Chooser(How);

enum How {
    Always(Packing),
    Measured { clock: Arc<dyn Clock>, line: LineRate, choice: Mutex<Choice> },
}

impl Chooser {
    /// By the operator's setting, and where that leaves it open by what `line` says and `clock` measures.
    pub fn new(
        setting: Setting,
        clock: Arc<dyn Clock>,
        line: impl Fn() -> Option<f64> + Send + Sync + 'static,
    ) -> Self {
        match setting {
            Setting::Always(packing) => Self(How::Always(packing)),
            Setting::Auto => Self(How::Measured { clock, line: Box::new(line), choice: Mutex::default() }),
        }
    }

    /// Encodes by `encode`, which gives the bytes of frames beside what it made of `content_bytes`.
    pub(crate) fn encode<T>(&self, content_bytes: u64, encode: impl FnOnce(Packing) -> (u64, T)) -> T {
        let (clock, line, choice) = match &self.0 {
            How::Always(packing) => return encode(*packing).1,
            How::Measured { clock, line, choice } => (clock, line, choice),
        };
        // Figures are all there is, and any are as good.
        let lock = || choice.lock().unwrap_or_else(PoisonError::into_inner);
        let line = line();
        let packing = {
            let mut choice = lock();
            let before = choice.choose(None);
            let packing = choice.choose(line);
            if packing != before {
                debug!(?packing, line_bytes_per_s = line, "packs in another way");
            }
            packing
        };
        let start = clock.monotonic();
        let (frame_bytes, made) = encode(packing);
        lock().encoded(packing, content_bytes, frame_bytes, clock.monotonic().saturating_sub(start));
        made
    }
}

impl Default for Chooser {
    /// zstd 3 always: where nothing is measured.
    fn default() -> Self {
        Self(How::Always(Choice::default().choose(None)))
    }
}

impl fmt::Debug for Chooser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            How::Always(packing) => write!(f, "always {packing:?}"),
            How::Measured { choice, .. } => choice.fmt(f),
        }
    }
}

//! Bits that flip at rest while the source is there: found by the scrub, asked again, sent again by the source's own state
//! machine, and healed where it still has what was lost.

use cdp_protocol::frame::{self, Frame};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::read_all;
use cdp_target::journal::segment;
use cdp_target::restore::keyring::Keyring;
use cdp_target::verify::{Healed, VerifyReport, verify};

use super::super::check::Depth;
use super::super::model::{GROUP, key};
use super::super::sabotage::Sabotage;
use super::{LineFaults, Manner, ROUNDS_MAX, Simulation};

/// Bits that flip in one history.
const FLIPS: u64 = 6;

/// A frame of content in a segment of the target.
struct Content {
    segment: u64,
    offset: u64,
    header: frame::Header,
    /// Whether no frame behind it has any of its blocks.
    is_newest: bool,
}

/// Writes a history, lets bits of its sealed frames flip one after the other, each time until nothing more comes of it. Gives how
/// many frames were healed, and how many were not because a block of them had been changed.
///
/// # Errors
/// What a point holds that it should not, or does not hold that it should.
pub(crate) fn rot_under_a_living_source(seed: u64) -> Result<(u64, u64), String> {
    let mut simulation = Simulation::new(SimRandom::new(seed), Sabotage::None, Manner::Plain);
    (simulation.line, simulation.flips_left) = (LineFaults::default(), 0);
    simulation.target.start();
    for _ in 0..12 {
        simulation.source.world.set_quiet(false);
        simulation.source.world.run(25);
        simulation.settle()?;
    }
    simulation.target.check(&mut simulation.model, Depth::Everything)?;
    let (mut healed, mut lost) = (Vec::new(), 0);
    for number in 0..FLIPS {
        let Some(content) = simulation.some_content(&healed, number < FLIPS / 2) else { continue };
        let (segment, offset) = (content.segment, content.offset);
        simulation.flip_in(&content);
        if simulation.target.scrub() == 0 {
            return Err(format!("a flipped bit of segment {segment} at {offset} is not found"));
        }
        simulation.target.is_hurt = true;
        let named = simulation.verify();
        // A part's frame whose blocks its own point has from later ones.
        let is_needed = named.damages.iter().any(|damage| damage.offset == offset && !damage.points.is_empty());
        if content.is_newest && !is_needed {
            return Err(format!("no point is named for segment {segment} at {offset}: {named:?}"));
        }
        simulation.settle()?;
        let report = simulation.verify();
        if report.healed.contains(&Healed { segment, offset }) {
            healed.push((segment, offset));
        } else if content.is_newest {
            return Err(format!("the source has what was lost of segment {segment} at {offset}: {report:?}"));
        } else {
            lost += 1;
            // Of the blocks that came again every point from there on is whole.
            let newest = simulation.model.acked.last().map(|head| head.epoch);
            if report.damages.iter().any(|damage| damage.points.last() == newest.as_ref()) {
                return Err(format!("the newest point is still damaged: {report:?}"));
            }
        }
        if lost == 0 {
            // As if nothing had ever been damaged: all points are listed without a warning, and hold what they held.
            simulation.target.is_hurt = false;
            if !report.damages.is_empty() {
                return Err(format!("all is healed, and something is wrong: {report:?}"));
            }
        }
        simulation.target.check(&mut simulation.model, Depth::Everything)?;
        simulation.target.check_beside(&mut simulation.model, Depth::Sample(0))?;
    }
    Ok((healed.len() as u64, lost))
}

impl Simulation {
    /// Nothing is written any more, and all there is becomes a point.
    fn settle(&mut self) -> Result<(), String> {
        self.source.world.set_quiet(true);
        self.source.world.run(20_000);
        let media = self.source.world.media();
        let mut idle = 0;
        for _ in 0..ROUNDS_MAX {
            self.round()?;
            let is_done = self.source.is_idle() && self.model.newest().is_some_and(|newest| **newest == media);
            idle = if is_done { idle + 1 } else { 0 };
            // What is asked again makes it busy once more, and what came is looked at some time after.
            if idle == 40 {
                return Ok(());
            }
        }
        Err(format!("no progress: {}", self.source.standing()))
    }

    /// A frame of content in a sealed segment, of which nothing is wrong yet; `is_newest`: one whose blocks the source still has.
    fn some_content(&self, healed: &[(u64, u64)], is_newest: bool) -> Option<Content> {
        let view = self.target.view()?;
        let is_hurt = |content: &Content| {
            let at = (content.segment, content.offset);
            healed.contains(&at) || view.damages().iter().any(|damage| (damage.segment, damage.offset) == at)
        };
        let sealed: Vec<u64> = view.manifest().sealed.iter().map(|sealed| sealed.number).collect();
        let mut frames: Vec<Content> = Vec::new();
        for number in sealed.iter().copied().chain([view.manifest().open]) {
            let bytes = read_all(&self.target.disk, &segment::path(&self.target.folder(), number), 1 << 30).ok()?;
            let mut at = 0;
            while at < bytes.len() {
                let Ok(frame) = frame::decode(&GROUP, &bytes[at..]) else {
                    at += 1;
                    continue;
                };
                note(&mut frames, number, at as u64, &frame);
                at += frame.bytes.len();
            }
        }
        frames.retain(|content| {
            content.header.encoding.has_content()
                && sealed.contains(&content.segment)
                && content.is_newest == is_newest
                && !is_hurt(content)
        });
        let chosen = self.random.below(frames.len().max(1) as u64) as usize;
        frames.into_iter().nth(chosen)
    }

    fn flip_in(&self, content: &Content) {
        let header = &content.header;
        let content_bits = 8 * u64::from(header.payload_len - header.digests_len);
        let bit = 8 * (content.offset + header.header_len() as u64) + self.random.below(content_bits);
        self.target.disk.flip_bit(&segment::path(&self.target.folder(), content.segment), bit);
    }

    fn verify(&self) -> VerifyReport {
        let view = self.target.view().expect("the server has it open");
        verify(&view, Some(&Keyring::from(&key())), None, &mut |_| {}).expect("no fault is set")
    }
}

/// Takes in a frame; those before it that share a block with it are the newest no more.
fn note(frames: &mut Vec<Content>, segment: u64, offset: u64, frame: &Frame<'_>) {
    let header = &frame.header;
    if header.extents.is_empty() {
        return;
    }
    for before in frames.iter_mut().filter(|before| before.header.volume == header.volume) {
        let shares = |extent: &cdp_protocol::units::Extent| {
            let meets = |other: &cdp_protocol::units::Extent| {
                u64::from(extent.start.0) < other.end() && u64::from(other.start.0) < extent.end()
            };
            before.header.extents.iter().any(meets)
        };
        before.is_newest &= !header.extents.iter().any(shares);
    }
    frames.push(Content { segment, offset, header: header.clone(), is_newest: true });
}

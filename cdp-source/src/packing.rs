//! Which way to pack: the one by which what changed is soonest at the target, on the line and the processors as they are.
//!
//! Arithmetic only. What is said: how long encoding took and what it came to, and what the line carries. What is measured of one
//! way is carried over to the others by a table (`scripts/bench packing`): a machine that takes twice as long for one takes
//! twice as long for all, and content that one way does not shrink no other does. A way is left only for one that is clearly
//! better, so figures that waver do not change it back and forth.

mod chooser;

pub use chooser::Chooser;

use cdp_protocol::packer::{Level, Packing};
use std::time::Duration;

/// A way to pack, and what it takes and gives on blocks that a database changes.
struct Way {
    packing: Packing,
    /// Nanoseconds a byte.
    cost: f64,
    /// Bytes of frames of a byte of content.
    ratio: f64,
}

const fn way(packing: Packing, cost: f64, ratio: f64) -> Way {
    Way { packing, cost, ratio }
}

/// From the fastest to the tightest. Levels beyond take three times the time, and give less than a hundredth.
const WAYS: [Way; 5] = [
    way(Packing::Lz4, 0.5, 0.172),
    way(Packing::zstd(1), 0.73, 0.104),
    way(Packing::zstd(3), 0.91, 0.0909),
    way(Packing::zstd(6), 4.8, 0.0834),
    way(Packing::zstd(9), 7.1, 0.0831),
];
/// Where it starts, before anything is known.
const START: usize = 2;
const _: () = assert!(matches!(WAYS[START].packing, Packing::Zstd(level) if level.number() == 3));
/// Nanoseconds a byte that sealing and digests take, whatever the way.
const SEALING: f64 = 0.7;
/// A way is left for one that takes at most this share of its time.
const BETTER: f64 = 0.98;
/// Content from which figures are taken: less is mostly what is around it.
const CONTENT_BYTES_MIN: u64 = 256 << 10;
/// Content whose figures count as much as all before it.
const HALF_BYTES: f64 = (4 << 20) as f64;

/// How to pack, as an operator says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub enum Setting {
    /// By what is measured.
    #[default]
    Auto,
    /// Always in this way.
    Always(Packing),
}

impl TryFrom<String> for Setting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let level = || text.strip_prefix("zstd-").and_then(|level| level.parse().ok()).and_then(Level::new);
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "lz4" => Ok(Self::Always(Packing::Lz4)),
            _ => level().map(|level| Self::Always(Packing::Zstd(level))).ok_or_else(|| {
                format!("packing = {text:?} is none of \"auto\", \"lz4\", \"zstd-1\" to \"zstd-{}\"", Level::MAX)
            }),
        }
    }
}

/// What is known, and which way follows from it.
#[derive(Debug)]
pub struct Choice {
    current: usize,
    /// How long encoding takes, of what the table says.
    pace: f64,
    /// How content shrinks: 1 as in the table, 0 not at all.
    shrinking: f64,
}

impl Default for Choice {
    fn default() -> Self {
        Self { current: START, pace: 1.0, shrinking: 1.0 }
    }
}

impl Choice {
    /// Content was encoded: how, to how many bytes of frames, and in what time.
    pub fn encoded(&mut self, packing: Packing, content_bytes: u64, frame_bytes: u64, took: Duration) {
        let Some(way) = WAYS.iter().find(|way| way.packing == packing) else { return };
        if content_bytes < CONTENT_BYTES_MIN || frame_bytes == 0 {
            return;
        }
        let content = content_bytes as f64;
        let share = content / (content + HALF_BYTES);
        let pace = took.as_secs_f64() * 1e9 / content / (SEALING + way.cost);
        let shrinking = (frame_bytes as f64 / content).min(1.0).ln() / way.ratio.ln();
        self.pace += share * (pace - self.pace);
        self.shrinking += share * (shrinking - self.shrinking);
    }

    /// The way to pack what comes next, on a line that carries `line` bytes a second, as far as that is known.
    pub fn choose(&mut self, line: Option<f64>) -> Packing {
        if let Some(line) = line.filter(|line| *line > 0.0) {
            let best = (0..WAYS.len()).min_by(|a, b| self.time(*a, line).total_cmp(&self.time(*b, line)));
            let best = best.expect("there are ways");
            if self.time(best, line) <= BETTER * self.time(self.current, line) {
                self.current = best;
            }
        }
        WAYS[self.current].packing
    }

    /// Nanoseconds until a byte of content is packed and carried.
    fn time(&self, index: usize, line: f64) -> f64 {
        let way = &WAYS[index];
        self.pace * (SEALING + way.cost) + way.ratio.powf(self.shrinking) * 1e9 / line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Packing::Lz4;

    const MIB: u64 = 1 << 20;
    const KILOBIT: f64 = 125.0;

    fn zstd(level: u8) -> Packing {
        Packing::zstd(level)
    }

    /// A choice that has seen much content of this kind: its ratio with zstd 3, and the machine's pace.
    fn seen(ratio: f64, pace: f64) -> Choice {
        let mut choice = Choice::default();
        for _ in 0..20 {
            let took = Duration::from_secs_f64(pace * (SEALING + WAYS[START].cost) * 64.0 * MIB as f64 / 1e9);
            choice.encoded(zstd(3), 64 * MIB, (ratio * 64.0 * MIB as f64) as u64, took);
        }
        choice
    }

    #[test]
    fn the_level_rises_as_the_line_gets_thinner() {
        let lines = [10e6, 1e6, 100e3, 10e3, 1e3, 256.0].map(|kilobits| kilobits * KILOBIT);
        for (what, ratio, pace, expected) in [
            ("a database", 0.09, 1.0, [Lz4, zstd(1), zstd(3), zstd(6), zstd(9), zstd(9)]),
            ("the same, a fifth of the speed", 0.09, 5.0, [Lz4, Lz4, zstd(3), zstd(3), zstd(6), zstd(6)]),
            ("files that shrink to a half", 0.5, 1.0, [Lz4, zstd(3), zstd(3), zstd(3), zstd(9), zstd(9)]),
            ("noise", 1.0, 1.0, [Lz4, Lz4, zstd(3), zstd(3), zstd(3), zstd(3)]),
        ] {
            let chosen = lines.map(|line| seen(ratio, pace).choose(Some(line)));
            assert_eq!(chosen, expected, "{what}");
        }
    }

    #[test]
    fn before_anything_is_known_it_is_zstd_3() {
        assert_eq!(Choice::default().choose(None), zstd(3));
        assert_eq!(Choice::default().choose(Some(0.0)), zstd(3));
    }

    #[test]
    fn a_line_that_wavers_does_not_change_the_way_back_and_forth() {
        for line in [3e6, 300e3, 30e3, 3e3].map(|kilobits| kilobits * KILOBIT) {
            let mut choice = Choice::default();
            choice.choose(Some(line));
            let chosen = [1.0, 1.02, 0.98, 1.02, 0.98].map(|factor| choice.choose(Some(line * factor)));
            assert!(chosen.windows(2).filter(|pair| pair[0] != pair[1]).count() <= 1, "{line}: {chosen:?}");
        }
    }

    #[test]
    fn it_comes_back_to_what_a_database_needs_after_noise() {
        let mut choice = seen(1.0, 0.2);
        for _ in 0..4 {
            let packing = choice.choose(Some(KILOBIT * 10e3));
            let way = WAYS.iter().find(|way| way.packing == packing).expect("one of them");
            let took = Duration::from_secs_f64((SEALING + way.cost) * 16.0 * MIB as f64 / 1e9);
            choice.encoded(packing, 16 * MIB, (way.ratio * 16.0 * MIB as f64) as u64, took);
        }
        assert_eq!(choice.choose(Some(KILOBIT * 10e3)), zstd(6));
    }

    #[test]
    fn a_few_blocks_are_no_evidence() {
        let mut choice = Choice::default();
        for _ in 0..1000 {
            choice.encoded(zstd(3), 8192, 8192, Duration::from_millis(3));
        }
        assert_eq!((choice.pace.to_bits(), choice.shrinking.to_bits()), (1_f64.to_bits(), 1_f64.to_bits()));
    }

    #[test]
    fn a_setting_is_one_of_the_ways() {
        let parse = |text: &str| Setting::try_from(text.to_owned());
        assert_eq!(parse("auto"), Ok(Setting::Auto));
        assert_eq!(parse("lz4"), Ok(Setting::Always(Lz4)));
        assert_eq!(parse("zstd-19"), Ok(Setting::Always(zstd(19))));
        for text in ["", "zstd", "zstd-0", "zstd-20", "zstd--1", "gzip", "lz4-1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}

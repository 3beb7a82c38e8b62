//! Compressing one frame after the other, and knowing when it is of no use.
//!
//! Content that does not shrink comes in stretches (films, archives, encrypted files). After a few frames that did not, only
//! samples of the next are tried, taken at other places each time, until one shrinks. What is given back is shorter than
//! the content or nothing. Which way to compress is said from outside. Does not frame or seal.

use crate::frame::Encoding;
use crate::limits::CONTENT_BLOCKS_MAX;
use crate::units::BLOCK_BYTES;
use zstd::zstd_safe::{CCtx, CParameter};

/// Frames in a row that did not shrink after which samples decide.
const FUTILE_MAX: u32 = 4;
/// One of so many blocks is a sample.
const SAMPLE_EVERY: usize = 8;
const _: () = assert!(CONTENT_BLOCKS_MAX >= SAMPLE_EVERY, "a full frame has samples");

/// How content is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Packing {
    /// The fastest.
    Lz4,
    /// The tighter the higher the level, and the slower.
    Zstd(Level),
}

/// A level of zstd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// Levels go from 1 up to this one. The ones beyond need more memory than a frame of 128 KiB has use for.
    pub const MAX: u8 = 19;

    /// A level, where there is such a one.
    #[must_use]
    pub const fn new(level: u8) -> Option<Self> {
        if level >= 1 && level <= Self::MAX { Some(Self(level)) } else { None }
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }
}

impl Packing {
    /// zstd at `level`, which has to be one.
    #[must_use]
    pub const fn zstd(level: u8) -> Self {
        Self::Zstd(Level::new(level).expect("a level from 1 to 19"))
    }

    const fn encoding(self) -> Encoding {
        match self {
            Self::Lz4 => Encoding::Lz4,
            Self::Zstd(_) => Encoding::Zstd,
        }
    }

    /// What a sample is tried with: whether it shrinks at all is soon seen, but lz4 does not see what zstd would.
    const fn for_samples(self) -> Self {
        match self {
            Self::Lz4 => Self::Lz4,
            Self::Zstd(_) => Self::zstd(1),
        }
    }
}

/// Memory and evidence for compressing one frame after the other.
pub struct Packer {
    packing: Packing,
    table: lz4_flex::block::CompressTable,
    /// Made when it is first needed.
    zstd: Option<CCtx<'static>>,
    packed: Vec<u8>,
    /// Frames tried in a row that did not shrink.
    futile: u32,
    /// Where the next samples are taken from.
    turn: usize,
}

impl Default for Packer {
    fn default() -> Self {
        Self::new(Packing::Lz4)
    }
}

impl Packer {
    /// One that packs in this way until it is told another.
    #[must_use]
    pub fn new(packing: Packing) -> Self {
        let table = lz4_flex::block::CompressTable::large();
        Self { packing, table, zstd: None, packed: Vec::new(), futile: 0, turn: 0 }
    }

    /// Packs in this way from now on.
    pub const fn set_packing(&mut self, packing: Packing) {
        self.packing = packing;
    }

    /// `content` compressed, and how, where that is shorter and worth trying.
    pub(crate) fn pack(&mut self, content: &[u8]) -> Option<(Encoding, &[u8])> {
        if self.futile >= FUTILE_MAX && !self.a_sample_shrinks(content) {
            return None;
        }
        let len = self.compress(content, self.packing);
        let shrinks = len < content.len();
        self.futile = if shrinks { 0 } else { self.futile.saturating_add(1) };
        shrinks.then(|| (self.packing.encoding(), &self.packed[..len]))
    }

    fn a_sample_shrinks(&mut self, content: &[u8]) -> bool {
        self.turn = (self.turn + 1) % SAMPLE_EVERY;
        // A short frame may have no block at that place; its first one is its sample then.
        let first = if self.turn * BLOCK_BYTES < content.len() { self.turn } else { 0 };
        let packing = self.packing.for_samples();
        let mut samples = content.chunks_exact(BLOCK_BYTES).skip(first).step_by(SAMPLE_EVERY);
        samples.any(|sample| self.compress(sample, packing) < sample.len())
    }

    fn compress(&mut self, content: &[u8], packing: Packing) -> usize {
        let bound = match packing {
            Packing::Lz4 => lz4_flex::block::get_maximum_output_size(content.len()),
            Packing::Zstd(_) => zstd::zstd_safe::compress_bound(content.len()),
        };
        if self.packed.len() < bound {
            self.packed.resize(bound, 0);
        }
        match packing {
            Packing::Lz4 => lz4_flex::block::compress_into_with_table(content, &mut self.packed, &mut self.table)
                .expect("the buffer has the bound's size"),
            Packing::Zstd(level) => {
                let zstd = self.zstd.get_or_insert_with(CCtx::create);
                zstd.set_parameter(CParameter::CompressionLevel(level.0.into())).expect("zstd has the level");
                zstd.compress2(&mut self.packed[..], content).expect("the buffer has the bound's size")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(blocks: usize) -> Vec<u8> {
        let mut noise = vec![0; blocks * BLOCK_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        noise
    }

    fn text(blocks: usize) -> Vec<u8> {
        b"the same line again\n".repeat(7000)[..blocks * BLOCK_BYTES].to_vec()
    }

    const WAYS: [Packing; 3] = [Packing::Lz4, Packing::zstd(1), Packing::zstd(Level::MAX)];

    fn after_much_noise(packing: Packing) -> Packer {
        let mut packer = Packer::new(packing);
        for _ in 0..2 * FUTILE_MAX {
            assert!(packer.pack(&noise(CONTENT_BLOCKS_MAX)).is_none());
        }
        packer
    }

    #[test]
    fn what_does_not_shrink_is_soon_only_sampled() {
        assert_eq!(WAYS.map(|way| after_much_noise(way).futile), [FUTILE_MAX; 3]);
    }

    #[test]
    fn what_shrinks_is_compressed_at_once_however_much_did_not() {
        for (way, blocks) in WAYS.into_iter().flat_map(|way| [1, 2, 9, CONTENT_BLOCKS_MAX].map(|blocks| (way, blocks)))
        {
            let mut packer = after_much_noise(way);
            let (encoding, shorter) = packer.pack(&text(blocks)).expect("it shrinks");
            assert!(encoding == way.encoding() && shorter.len() < blocks * BLOCK_BYTES / 4);
            assert_eq!(packer.futile, 0);
        }
    }

    #[test]
    fn a_single_block_that_shrinks_is_found_within_a_turn_of_samples() {
        for way in WAYS {
            let mut packer = after_much_noise(way);
            let mut content = noise(CONTENT_BLOCKS_MAX);
            content[13 * BLOCK_BYTES..14 * BLOCK_BYTES].copy_from_slice(&text(1));
            assert!((0..SAMPLE_EVERY).any(|_| packer.pack(&content).is_some()));
        }
    }

    #[test]
    fn what_only_zstd_shrinks_is_not_passed_over() {
        // Letters drawn at random: nothing repeats, but each is told in six bits.
        let letters: Vec<u8> = noise(CONTENT_BLOCKS_MAX).iter().map(|byte| b'0' + byte % 64).collect();
        assert!(Packer::default().pack(&letters).is_none());
        let mut packer = after_much_noise(Packing::zstd(3));
        assert!(packer.pack(&letters).is_some_and(|(_, packed)| packed.len() < letters.len() * 4 / 5));
    }

    #[test]
    fn a_higher_level_is_no_longer() {
        let lines: Vec<u8> =
            (0..9000).flat_map(|line: u32| format!("{line} {}\n", line * line % 977).into_bytes()).collect();
        let content = &lines[..16 * BLOCK_BYTES];
        let mut packer = Packer::default();
        let mut len = |packing| {
            packer.set_packing(packing);
            packer.pack(content).map(|(_, packed)| packed.len())
        };
        let lens = [Packing::Lz4, Packing::zstd(1), Packing::zstd(9), Packing::zstd(19)].map(&mut len);
        assert!(lens.is_sorted_by(|shorter, longer| shorter > longer), "{lens:?}");
        assert_eq!(len(Packing::Lz4), lens[0], "and back again");
        assert_eq!([0, 20].map(Level::new), [None, None]);
    }
}

//! Where the chains and the other writers work on a volume.
//!
//! Owns the mix: one block rewritten flat out, sectors of one block, scattered blocks, records across block boundaries, long
//! records, records that take away, several chains in one thread. Does no I/O.

use crate::record::{CHAINS_MAX, Chain, Operation};
use std::ops::Range;
use std::time::Duration;

/// Bytes of every volume: not a multiple of 4 KiB where the device's sectors allow that.
pub(crate) const VOLUME_BYTES: u64 = 24 << 20;
/// Sectors of a block.
const BLOCK: u64 = 8;
const KIB: u64 = 2;
const MIB: u64 = 1024 * KIB;

/// Hot blocks rest for this long: written flat out they make cuts of many rounds, and so few cuts.
const HOT: Duration = Duration::from_micros(200);
/// On a device that writes in the writer's own time, and never lets it wait, all rest.
const IN_MEMORY: Duration = Duration::from_millis(1);

/// Who writes where; in sectors of the volume.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// Chains that have a thread each.
    pub(crate) alone: Vec<Chain>,
    /// Chains that one thread keeps in flight all at once.
    pub(crate) at_depth: Vec<Chain>,
    /// Written through the page cache.
    pub(crate) buffered: Range<u64>,
    /// Written through a mapping.
    pub(crate) mapped: Range<u64>,
}

/// Hands out places one after the other.
struct Plan {
    next_sector: u64,
    next_index: usize,
}

impl Plan {
    fn chain(&mut self, name: &'static str, slots: u64, stride: u64, lengths: &'static [u64]) -> Chain {
        let first_sector = self.area(slots * stride).start;
        self.next_index += 1;
        assert!(self.next_index <= CHAINS_MAX, "a header has room for all chains");
        let index = self.next_index - 1;
        Chain { index, name, first_sector, stride, slots, lengths, fourth: Operation::Write, rest: Duration::ZERO }
    }

    fn area(&mut self, sectors: u64) -> Range<u64> {
        let start = self.next_sector;
        self.next_sector = (start + sectors).next_multiple_of(BLOCK);
        start..start + sectors
    }
}

impl Layout {
    /// The mix for a device whose sectors have `sector_bytes`: 512, or 4096.
    pub(crate) fn new(sector_bytes: u64) -> Self {
        let unit = sector_bytes / 512;
        let mut plan = Plan { next_sector: 0, next_index: 0 };
        let one_unit: &[u64] = if unit == 1 { &[1] } else { &[BLOCK] };
        let mut across = plan.chain("across blocks", 31, 24, &[BLOCK]);
        // Half a block further: every record covers two blocks in part.
        across.first_sector += if unit == 1 { 3 } else { 0 };
        let mut alone = vec![
            across,
            Chain { rest: HOT, ..plan.chain("one block", 1, BLOCK, &[BLOCK]) },
            Chain { rest: HOT, ..plan.chain("sectors of a block", 8, unit, one_unit) },
            plan.chain("scattered blocks", 64, 64 * KIB, &[BLOCK]),
            plan.chain("long", 6, MIB, &[64 * KIB, 128 * KIB, 256 * KIB, MIB, 512 * KIB, 64 * KIB]),
        ];
        // Odd numbers of slots: every slot is written and taken away in turn.
        let ragged: &[u64] = if unit == 1 {
            &[BLOCK, 64 * KIB, 3 * BLOCK + 5, 32 * BLOCK + 1, BLOCK - 1]
        } else {
            &[BLOCK, 64 * KIB, 3 * BLOCK, 32 * BLOCK]
        };
        for (name, fourth) in
            [("discards", Operation::Discard), ("zeroes", Operation::ZeroOut), ("holes", Operation::PunchHole)]
        {
            let mut chain = plan.chain(name, 7, 256 * KIB, ragged);
            chain.first_sector += u64::from(unit == 1);
            alone.push(Chain { fourth, ..chain });
        }
        let at_depth = (0..8).map(|_| plan.chain("at depth", 16, 16 * KIB, &[BLOCK, 16 * KIB, BLOCK, 8 * KIB]));
        let mut at_depth: Vec<Chain> = at_depth.collect();
        if unit != 1 {
            alone.iter_mut().chain(&mut at_depth).for_each(|chain| chain.rest = IN_MEMORY);
        }
        let (buffered, mapped) = (plan.area(2 * MIB), plan.area(MIB));
        assert!(mapped.end * 512 <= VOLUME_BYTES, "the volume holds them all");
        Self { alone, at_depth, buffered, mapped }
    }

    /// Two layouts that are this one together.
    pub(crate) fn halves(&self) -> (Self, Self) {
        let of = |odd: usize| self.alone.iter().skip(odd).step_by(2).cloned().collect();
        let nothing = 0..0;
        (
            Self { alone: of(0), at_depth: Vec::new(), buffered: nothing.clone(), mapped: self.mapped.clone() },
            Self { alone: of(1), at_depth: self.at_depth.clone(), buffered: self.buffered.clone(), mapped: nothing },
        )
    }

    /// The same as whoever writes through the disk sees it, on which the volume begins at `sector`.
    pub(crate) fn behind(mut self, sector: u64) -> Self {
        self.alone.iter_mut().chain(&mut self.at_depth).for_each(|chain| chain.first_sector += sector);
        for area in [&mut self.buffered, &mut self.mapped] {
            *area = area.start + sector..area.end + sector;
        }
        self
    }

    /// One block rewritten flat out, and nobody else.
    pub(crate) fn one_block() -> Self {
        let mut plan = Plan { next_sector: 0, next_index: 0 };
        let alone = vec![plan.chain("one block", 1, BLOCK, &[BLOCK])];
        Self { alone, at_depth: Vec::new(), buffered: 0..0, mapped: 0..0 }
    }

    /// Single blocks all over the volume, eight in flight.
    pub(crate) fn scattered() -> Self {
        let mut plan = Plan { next_sector: 0, next_index: 0 };
        let at_depth = (0..8).map(|_| plan.chain("scattered", 256, 8 * KIB, &[BLOCK])).collect();
        Self { alone: Vec::new(), at_depth, buffered: 0..0, mapped: 0..0 }
    }

    /// Nobody.
    pub(crate) fn nobody() -> Self {
        Self { alone: Vec::new(), at_depth: Vec::new(), buffered: 0..0, mapped: 0..0 }
    }

    /// All chains, by their index.
    pub(crate) fn chains(&self) -> Vec<Chain> {
        self.alone.iter().chain(&self.at_depth).cloned().collect()
    }
}

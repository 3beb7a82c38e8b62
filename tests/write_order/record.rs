//! A record on the disk, and the chain it belongs to.
//!
//! A chain issues record *n* only after record *n - 1* has completed, so that a disk at an instant τ holds all of its
//! records up to some *k* (as far as later ones of the same chain did not overwrite them) and any part of *k + 1*, nothing
//! else. Where a record lies, how long it is and whether it writes or takes away follows from its number alone: what a place must
//! hold is known for every *k*. Every sector of a record has the whole header, so that each says by itself what it is. Does no I/O.

use std::time::Duration;

/// Bytes of a sector.
pub(crate) const SECTOR_BYTES: usize = 512;
/// A prime; spreads the slots of a chain over its area.
const SPREAD: u64 = 167;
/// Chains that a header has room for.
pub(crate) const CHAINS_MAX: usize = 24;

const MAGIC: [u8; 8] = *b"cdp-link";
/// Magic, chain, sector, number; then what the others had finished.
const SEEN_AT: usize = 8 + 4 + 4 + 8;
const FILL_AT: usize = SEEN_AT + CHAINS_MAX * 8;
const CRC_AT: usize = SECTOR_BYTES - 4;

/// The newest finished record of every chain when a record was made.
pub(crate) type Seen = [u64; CHAINS_MAX];

/// What a record does to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Writes its header into every sector.
    Write,
    /// `BLKDISCARD`: the place is zeros.
    Discard,
    /// `BLKZEROOUT`: the same, and the space is kept.
    ZeroOut,
    /// `fallocate` that punches a hole: zeros by a command of the device or not at all.
    PunchHole,
}

/// Sectors of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
}

/// Where a chain's records go.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub(crate) index: usize,
    pub(crate) name: &'static str,
    /// The first sector of slot 0.
    pub(crate) first_sector: u64,
    /// Sectors from one slot to the next.
    pub(crate) stride: u64,
    /// Record *n* goes to slot *n* mod this, which is no multiple of `SPREAD`.
    pub(crate) slots: u64,
    /// Sectors of a record, by its slot, over and over.
    pub(crate) lengths: &'static [u64],
    /// What every fourth record does.
    pub(crate) fourth: Operation,
    /// How long the writer rests between two records.
    pub(crate) rest: Duration,
}

impl Chain {
    /// The slot record `number` goes to.
    pub(crate) const fn slot(&self, number: u64) -> u64 {
        number % self.slots
    }

    /// Sectors of the records in `slot`.
    pub(crate) fn length(&self, slot: u64) -> u64 {
        self.lengths[slot as usize % self.lengths.len()]
    }

    /// The first sector of `slot`: neighbours in number are none on the disk.
    pub(crate) const fn start_of(&self, slot: u64) -> u64 {
        self.first_sector + slot * SPREAD % self.slots * self.stride
    }

    /// Where record `number` goes.
    pub(crate) fn place(&self, number: u64) -> Place {
        let slot = self.slot(number);
        Place { sector: self.start_of(slot), sectors: self.length(slot) }
    }

    /// What record `number` does.
    pub(crate) const fn operation(&self, number: u64) -> Operation {
        if number % 4 == 3 { self.fourth } else { Operation::Write }
    }

    /// What a sector in the place of record `number` says when it is done: its number, or 0 for zeros.
    pub(crate) fn shows(&self, number: u64) -> u64 {
        if self.operation(number) == Operation::Write { number } else { 0 }
    }

    /// What the sectors of `slot` say when records up to `last` are done and no other.
    pub(crate) fn shows_in(&self, slot: u64, last: u64) -> u64 {
        let back = (last + self.slots - slot) % self.slots;
        // Number 0 is the state before the first record: zeros.
        if back >= last { 0 } else { self.shows(last - back) }
    }
}

/// What a sector was found to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Zeros,
    Record {
        number: u64,
        seen: Seen,
    },
    /// Nothing that anybody wrote, or wrote here; in a word.
    Garbage(&'static str),
}

/// Fills `buffer` with record `number` of `chain`.
pub(crate) fn encode(chain: &Chain, number: u64, seen: &Seen, buffer: &mut [u8]) {
    for (index, sector) in buffer.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        sector[..8].copy_from_slice(&MAGIC);
        sector[8..12].copy_from_slice(&(chain.index as u32).to_le_bytes());
        sector[12..16].copy_from_slice(&(index as u32).to_le_bytes());
        sector[16..24].copy_from_slice(&number.to_le_bytes());
        for (place, seen) in sector[SEEN_AT..FILL_AT].chunks_exact_mut(8).zip(seen) {
            place.copy_from_slice(&seen.to_le_bytes());
        }
        sector[FILL_AT..CRC_AT].fill(number as u8);
        let crc = crc32fast::hash(&sector[..CRC_AT]);
        sector[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// What `sector` holds, which is sector `index` of `slot` of `chain`.
pub(crate) fn decode(chain: &Chain, slot: u64, index: u64, sector: &[u8]) -> Found {
    if sector.iter().all(|byte| *byte == 0) {
        return Found::Zeros;
    }
    let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
    let half = |at: usize| u64::from(u32::from_le_bytes(sector[at..at + 4].try_into().expect("four bytes")));
    if sector[..8] != MAGIC {
        return Found::Garbage("no record");
    }
    if half(CRC_AT) != u64::from(crc32fast::hash(&sector[..CRC_AT])) {
        return Found::Garbage("a torn sector");
    }
    let number = word(16);
    if half(8) != chain.index as u64 || half(12) != index || chain.slot(number) != slot {
        return Found::Garbage("a record of another place");
    }
    if chain.operation(number) != Operation::Write {
        return Found::Garbage("a record that takes away and writes nothing");
    }
    let mut seen = [0; CHAINS_MAX];
    seen.iter_mut().enumerate().for_each(|(chain, seen)| *seen = word(SEEN_AT + chain * 8));
    Found::Record { number, seen }
}

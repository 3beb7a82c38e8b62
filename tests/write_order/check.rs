//! The oracle: whether an image can be what a disk held at one instant.
//!
//! Owns what every sector of the chains was last captured to hold. Invariants it holds an image against, for some *k* of
//! each chain: records up to *k* are there whole, record *k + 1* in any part, nothing else (so no record is torn that was not in
//! flight, and none is missing); every record that is there has what it names; all that was finished before the instant is
//! there, and nothing that was issued after it. It is told of blocks, never of what should be in them.

use crate::record::{CHAINS_MAX, Chain, Found, SECTOR_BYTES, Seen, decode};
use std::fmt;

/// What the writers knew around an instant: finished before it, issued by the time it was over.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Around {
    pub(crate) finished: Seen,
    pub(crate) issued: Seen,
}

/// Why an image is none that a disk ever held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// A sector holds what nobody wrote there.
    Garbage { chain: &'static str, sector: u64, what: &'static str },
    /// No *k* fits: a record is torn that was not in flight, or an older one is where it should be.
    Broken { chain: &'static str, newest: u64, slot: u64, sector: u64, due: u64, found: u64 },
    /// A record is there, and one that it names is not.
    Order { chain: &'static str, number: u64, names: &'static str, due: u64, found: u64 },
    /// Finished before the instant, and not there.
    Lost { chain: &'static str, finished: u64, found: u64 },
    /// Issued after the instant, and there.
    Early { chain: &'static str, issued: u64, found: u64 },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// The place of a sector in a chain.
#[derive(Clone, Copy)]
struct Owner {
    chain: u32,
    slot: u32,
    index: u32,
}

/// What was captured of one chain.
struct Captured {
    chain: Chain,
    /// By slot and sector: the number of the record, 0 for zeros.
    shown: Vec<Vec<u64>>,
    /// By slot: the newest record ever captured there, and what it names.
    named: Vec<(u64, Seen)>,
}

/// The chains as captured so far.
pub(crate) struct Oracle {
    owners: Vec<Option<Owner>>,
    captured: Vec<Captured>,
    garbage: Option<Violation>,
}

impl Oracle {
    /// Over a volume of `sectors` that holds zeros.
    pub(crate) fn new(chains: Vec<Chain>, sectors: u64) -> Self {
        let mut owners = vec![None; sectors as usize];
        for chain in &chains {
            for slot in 0..chain.slots {
                for index in 0..chain.length(slot) {
                    let owner = Owner { chain: chain.index as u32, slot: slot as u32, index: index as u32 };
                    let before = owners[(chain.start_of(slot) + index) as usize].replace(owner);
                    assert!(before.is_none(), "a sector has one owner");
                }
            }
        }
        let captured = chains.into_iter().map(Captured::new).collect();
        Self { owners, captured, garbage: None }
    }

    /// Takes in the content of a captured block, which begins at `sector`.
    pub(crate) fn put(&mut self, sector: u64, bytes: &[u8]) {
        for (sector, bytes) in (sector..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            let Some(Some(owner)) = self.owners.get(sector as usize).copied() else { continue };
            let captured = &mut self.captured[owner.chain as usize];
            match decode(&captured.chain, owner.slot.into(), owner.index.into(), bytes) {
                Found::Zeros => captured.show(owner, 0),
                Found::Record { number, seen } => {
                    captured.show(owner, number);
                    let named = &mut captured.named[owner.slot as usize];
                    if number >= named.0 {
                        *named = (number, seen);
                    }
                }
                Found::Garbage(what) => {
                    self.garbage = Some(Violation::Garbage { chain: captured.chain.name, sector, what });
                }
            }
        }
    }

    /// Holds what was captured against what a disk can hold at one instant.
    pub(crate) fn check(&self, around: &Around) -> Result<(), Violation> {
        if let Some(garbage) = &self.garbage {
            return Err(garbage.clone());
        }
        let mut whole = [0; CHAINS_MAX];
        for captured in &self.captured {
            whole[captured.chain.index] = captured.newest_whole()?;
        }
        for captured in &self.captured {
            let (index, chain) = (captured.chain.index, captured.chain.name);
            let (newest, seen) = captured.newest();
            // What a chain names never shrinks: the newest record names the most.
            for other in self.captured.iter().filter(|other| other.chain.index != index) {
                let (due, found) = (seen[other.chain.index], whole[other.chain.index]);
                if found < due {
                    return Err(Violation::Order { chain, number: newest, names: other.chain.name, due, found });
                }
            }
            if whole[index] < around.finished[index] {
                return Err(Violation::Lost { chain, finished: around.finished[index], found: whole[index] });
            }
            if newest > around.issued[index] {
                return Err(Violation::Early { chain, issued: around.issued[index], found: newest });
            }
        }
        Ok(())
    }

    /// The newest record of each chain that the image shows.
    pub(crate) fn newest(&self) -> Vec<u64> {
        self.captured.iter().map(|captured| captured.newest().0).collect()
    }
}

impl Captured {
    fn new(chain: Chain) -> Self {
        let shown = (0..chain.slots).map(|slot| vec![0; chain.length(slot) as usize]).collect();
        let named = vec![(0, [0; CHAINS_MAX]); chain.slots as usize];
        Self { chain, shown, named }
    }

    fn show(&mut self, owner: Owner, number: u64) {
        self.shown[owner.slot as usize][owner.index as usize] = number;
    }

    /// The newest record of which anything is there, and what it names.
    fn newest(&self) -> (u64, Seen) {
        let newest = self.shown.iter().flatten().copied().max().unwrap_or(0);
        let named = self.named[self.chain.slot(newest) as usize];
        if named.0 == newest { named } else { (newest, [0; CHAINS_MAX]) }
    }

    /// The highest *k* that fits what is there.
    fn newest_whole(&self) -> Result<u64, Violation> {
        let (newest, _) = self.newest();
        // A record that takes away has no number to show: it may have followed the newest.
        let above = if self.chain.shows(newest + 1) == 0 { newest + 1 } else { newest };
        let mut misfit = None;
        for last in (newest.saturating_sub(1)..=above).rev() {
            match self.misfit(last) {
                None => return Ok(last),
                found if last == newest => misfit = found,
                found => misfit = misfit.or(found),
            }
        }
        let (slot, sector, due, found) = misfit.expect("each candidate had one");
        Err(Violation::Broken { chain: self.chain.name, newest, slot, sector, due, found })
    }

    /// The first sector that cannot be there when `last` is the newest whole record.
    fn misfit(&self, last: u64) -> Option<(u64, u64, u64, u64)> {
        let in_flight = (self.chain.slot(last + 1), self.chain.shows(last + 1));
        for (slot, sectors) in (0..).zip(&self.shown) {
            let due = self.chain.shows_in(slot, last);
            let fits = |found: u64| found == due || (slot, found) == in_flight;
            if let Some(sector) = sectors.iter().position(|found| !fits(*found)) {
                return Some((slot, sector as u64, due, sectors[sector]));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Operation, encode};
    use std::time::Duration;

    /// Two chains of three slots with two blocks a record; the second takes away at every fourth.
    fn chains() -> Vec<Chain> {
        let chain = |index: usize, fourth: Operation| Chain {
            index,
            name: ["first", "second"][index],
            first_sector: index as u64 * 64,
            stride: 16,
            slots: 3,
            lengths: &[16],
            fourth,
            rest: Duration::ZERO,
        };
        vec![chain(0, Operation::Write), chain(1, Operation::Discard)]
    }

    fn oracle() -> Oracle {
        Oracle::new(chains(), 128)
    }

    /// Puts sectors `part` of record `number`.
    fn put(oracle: &mut Oracle, chain: usize, number: u64, seen: [u64; 2], part: std::ops::Range<usize>) {
        let chain = &chains()[chain];
        let mut bytes = vec![0; 16 * SECTOR_BYTES];
        let mut all = [0; CHAINS_MAX];
        all[..2].copy_from_slice(&seen);
        if chain.operation(number) == Operation::Write {
            encode(chain, number, &all, &mut bytes);
        }
        let bytes = &bytes[part.start * SECTOR_BYTES..part.end * SECTOR_BYTES];
        oracle.put(chain.place(number).sector + part.start as u64, bytes);
    }

    fn around(finished: u64, issued: u64) -> Around {
        let mut around = Around { issued: [u64::MAX; CHAINS_MAX], ..Around::default() };
        (around.finished[0], around.issued[0]) = (finished, issued);
        around
    }

    const ANY: Around = Around { finished: [0; CHAINS_MAX], issued: [u64::MAX; CHAINS_MAX] };

    #[test]
    fn a_record_in_flight_may_be_torn_and_no_other() {
        let mut oracle = oracle();
        assert_eq!(oracle.check(&ANY), Ok(()));
        (1..=4).for_each(|number| put(&mut oracle, 0, number, [0, 0], 0..16));
        put(&mut oracle, 0, 5, [0, 0], 3..5);
        assert_eq!(oracle.check(&around(4, 5)), Ok(()));
        assert!(matches!(oracle.check(&around(5, 5)), Err(Violation::Lost { finished: 5, found: 4, .. })));
        assert!(matches!(oracle.check(&around(4, 4)), Err(Violation::Early { issued: 4, found: 5, .. })));
        put(&mut oracle, 0, 6, [0, 0], 0..16);
        assert!(matches!(oracle.check(&ANY), Err(Violation::Broken { newest: 6, slot: 2, due: 5, found: 2, .. })));
    }

    #[test]
    fn a_record_that_is_missing_is_noticed() {
        let mut oracle = oracle();
        put(&mut oracle, 0, 1, [0, 0], 0..16);
        put(&mut oracle, 0, 3, [0, 0], 0..16);
        assert!(matches!(oracle.check(&ANY), Err(Violation::Broken { newest: 3, slot: 2, due: 2, found: 0, .. })));
    }

    #[test]
    fn what_a_record_names_must_be_there() {
        let mut oracle = oracle();
        put(&mut oracle, 1, 1, [0, 0], 0..16);
        put(&mut oracle, 0, 1, [0, 1], 0..1);
        assert_eq!(oracle.check(&ANY), Ok(()));
        put(&mut oracle, 0, 1, [0, 1], 0..16);
        put(&mut oracle, 0, 2, [0, 2], 7..8);
        let missing = Violation::Order { chain: "first", number: 2, names: "second", due: 2, found: 1 };
        assert_eq!(oracle.check(&ANY), Err(missing));
        put(&mut oracle, 1, 2, [1, 0], 0..16);
        assert_eq!(oracle.check(&ANY), Ok(()));
    }

    #[test]
    fn what_was_taken_away_may_be_gone_and_must_be_when_more_follows() {
        let mut oracle = oracle();
        (1..=2).for_each(|number| put(&mut oracle, 1, number, [0, 0], 0..16));
        (4..=6).for_each(|number| put(&mut oracle, 1, number, [0, 0], 0..16));
        assert_eq!(oracle.check(&ANY), Ok(()), "record 3 was taken away by itself, and 6 is over it");
        put(&mut oracle, 1, 7, [0, 0], 0..9);
        assert!(matches!(oracle.check(&ANY), Ok(())), "record 7 takes away: what it took shows 4 no more");
        put(&mut oracle, 1, 8, [0, 0], 0..16);
        assert!(matches!(oracle.check(&ANY), Err(Violation::Broken { slot: 1, due: 0, found: 4, .. })));
        put(&mut oracle, 1, 7, [0, 0], 0..16);
        assert_eq!(oracle.check(&ANY), Ok(()));
    }

    #[test]
    fn what_nobody_wrote_is_noticed() {
        let garbage = |bytes: &mut dyn FnMut(&mut [u8])| {
            let mut oracle = oracle();
            let mut sector = vec![0; SECTOR_BYTES];
            encode(&chains()[0], 1, &[0; CHAINS_MAX], &mut sector);
            bytes(&mut sector);
            oracle.put(chains()[0].place(1).sector, &sector);
            match oracle.check(&ANY) {
                Err(Violation::Garbage { what, .. }) => what,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(garbage(&mut |sector| sector[400] ^= 1), "a torn sector");
        assert_eq!(garbage(&mut |sector| sector[..256].fill(0)), "no record");
        assert_eq!(
            garbage(&mut |sector| encode(&chains()[0], 2, &[0; CHAINS_MAX], sector)),
            "a record of another place"
        );
    }
}

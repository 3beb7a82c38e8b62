//! The mapped change record: bitmaps the kernel's programs and this process share.
//!
//! Owns the mapping of BPF arrays into memory and all access to their words, which is by atomics only. Invariants: a
//! word is in `unacked` before it leaves the drained bitmap, and a summary bit is cleared only after its words, so that
//! a process killed at any point leaves every mark where its successor finds it. Does not know parities or gates.
#![allow(unsafe_code, reason = "memory shared with the kernel is reached through raw pointers")]

use cdp_protocol::units::Block;
use memmap2::{MmapOptions, MmapRaw};
use roaring::RoaringBitmap;
use std::borrow::Cow;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits in a word.
const WORD_BITS: u64 = 64;
/// A block has 2^3 sectors, a granule 2^2 blocks.
const SECTORS_A_BLOCK_SHIFT: u32 = 3;
const GRANULE_SHIFT: u32 = 2;
/// 8 TiB; a larger volume has granules.
const BLOCKS_BEFORE_GRANULES: u64 = 1 << 31;
/// Words a summary word stands for: a span, 1 GiB of a volume at a block a bit.
pub(super) const SPAN_WORDS: usize = 4096;
/// Words a summary bit stands for.
const GROUP_WORDS: usize = 64;
/// Words of the filter of issued writes.
pub(super) const ISSUED_WORDS: usize = 1 << 15;

/// An array of 64-bit words shared with the kernel.
pub(super) struct SharedWords {
    map: MmapRaw,
    words: usize,
}

impl SharedWords {
    /// Maps the first `words` words of the BPF array behind `fd`, which has at least as many.
    pub(super) fn map(fd: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(words * size_of::<u64>()).map_raw(fd.as_raw_fd())?;
        Ok(Self { map, words })
    }

    #[cfg(test)]
    fn anonymous(words: usize) -> Self {
        let map = MmapOptions::new().len(words * size_of::<u64>()).map_anon().expect("memory");
        Self { map: map.into(), words }
    }

    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "word {index} of {}", self.words);
        let first = self.map.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY: `index` is below the number of words mapped (asserted).
        let word = unsafe { first.add(index) };
        // SAFETY: mapped for as long as `self`, aligned (page start plus whole words), and never reached otherwise than
        // by atomics, here or in the kernel.
        unsafe { &*word }
    }

    /// The word at `index`.
    pub(super) fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::SeqCst)
    }

    /// Puts `value` at `index`.
    pub(super) fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::SeqCst);
    }

    /// Sets bits of the word at `index`.
    pub(super) fn set(&self, index: usize, bits: u64) {
        self.word(index).fetch_or(bits, Ordering::SeqCst);
    }

    /// Clears all words.
    pub(super) fn clear(&self) {
        for index in 0..self.words {
            if self.word(index).load(Ordering::Relaxed) != 0 {
                self.word(index).store(0, Ordering::Relaxed);
            }
        }
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Bytes from word `index` on; the count of them is in the word itself, at most `bytes_max`.
    pub(super) fn counted_bytes(&self, index: usize, bytes_max: usize) -> Option<Vec<u8>> {
        let len = usize::try_from(self.load(index)).ok().filter(|len| *len <= bytes_max)?;
        let words = (0..len.div_ceil(8)).flat_map(|word| self.load(index + 1 + word).to_le_bytes());
        Some(words.take(len).collect())
    }

    /// Puts the count of `bytes`, then `bytes`, from word `index` on.
    pub(super) fn put_counted_bytes(&self, index: usize, bytes: &[u8]) {
        for (word, chunk) in bytes.chunks(8).enumerate() {
            let mut value = [0; 8];
            value[..chunk.len()].copy_from_slice(chunk);
            self.store(index + 1 + word, u64::from_le_bytes(value));
        }
        self.store(index, bytes.len() as u64);
    }

    /// Clears bits of the word at `index`.
    pub(super) fn unset(&self, index: usize, bits: u64) {
        self.word(index).fetch_and(!bits, Ordering::SeqCst);
    }

    /// Puts 0 at `index` if `seen` is there; whether it was.
    pub(super) fn clear_if(&self, index: usize, seen: u64) -> bool {
        self.word(index).compare_exchange(seen, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Takes 1 off the word at `index`.
    pub(super) fn decrement(&self, index: usize) {
        self.word(index).fetch_sub(1, Ordering::SeqCst);
    }

    /// Moves the word at `index` out, having put it into `unacked` first.
    fn take_word(&self, index: usize, unacked: &Self) -> u64 {
        let mut found = self.load(index);
        while found != 0 {
            unacked.set(index, found);
            match self.word(index).compare_exchange(found, 0, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => break,
                Err(now) => found = now,
            }
        }
        found
    }
}

/// Where a volume's words are in the group's bitmaps. It begins and ends with a span, so that no summary word is shared.
///
/// A bit stands for a block; for four of them (a granule of 16 KiB) where the volume is larger than 8 TiB. Outside of
/// this file there are only blocks: what comes out is all blocks of a granule, what goes in is rounded outward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// First word; a multiple of `SPAN_WORDS`.
    pub(super) word_base: usize,
    /// Blocks of the volume.
    pub(super) blocks: u64,
}

impl Place {
    /// Words it takes, a multiple of `SPAN_WORDS`.
    pub(super) fn words(&self) -> usize {
        (self.bits().div_ceil(WORD_BITS) as usize).next_multiple_of(SPAN_WORDS)
    }

    /// Bits it takes.
    pub(super) fn bits(&self) -> u64 {
        self.blocks.div_ceil(1 << self.granule_shift())
    }

    /// A bit stands for 2 to this many sectors.
    pub(super) const fn bit_shift(&self) -> u32 {
        SECTORS_A_BLOCK_SHIFT + self.granule_shift()
    }

    const fn granule_shift(&self) -> u32 {
        if self.blocks > BLOCKS_BEFORE_GRANULES { GRANULE_SHIFT } else { 0 }
    }

    fn spans(&self) -> std::ops::Range<usize> {
        let first = self.word_base / SPAN_WORDS;
        first..first + self.words() / SPAN_WORDS
    }

    /// First bit of a span, counted from the volume's start.
    fn first_bit(&self, span: usize) -> u64 {
        ((span * SPAN_WORDS) - self.word_base) as u64 * WORD_BITS
    }

    /// All blocks of the volume.
    pub(super) fn all(&self) -> RoaringBitmap {
        let mut all = RoaringBitmap::new();
        if let Some(last) = self.blocks.checked_sub(1) {
            all.insert_range(0..=last as u32);
        }
        all
    }

    fn to_blocks(self, bits: RoaringBitmap) -> RoaringBitmap {
        let shift = self.granule_shift();
        if shift == 0 {
            return bits;
        }
        let mut blocks = RoaringBitmap::new();
        let mut runs = bits.iter();
        while let Some(run) = runs.next_range() {
            let end = ((u64::from(*run.end()) + 1) << shift).min(self.blocks);
            blocks.insert_range(run.start() << shift..=(end - 1) as u32);
        }
        blocks
    }

    fn to_bits(self, blocks: &RoaringBitmap) -> Cow<'_, RoaringBitmap> {
        let shift = self.granule_shift();
        if shift == 0 {
            return Cow::Borrowed(blocks);
        }
        let mut bits = RoaringBitmap::new();
        let mut runs = blocks.iter();
        while let Some(run) = runs.next_range() {
            bits.insert_range(run.start() >> shift..=run.end() >> shift);
        }
        Cow::Owned(bits)
    }

    /// The word and the bit in it that stand for a block.
    fn bit(&self, block: Block) -> (usize, u32) {
        let bit = block.0 >> self.granule_shift();
        (self.word_base + bit as usize / WORD_BITS as usize, bit % WORD_BITS as u32)
    }
}

/// Whether the filter has the block: its word is turned, its bit stays.
pub(super) fn filter_has(issued: &SharedWords, place: &Place, block: Block) -> bool {
    let (word, bit) = place.bit(block);
    issued.load(issued_index(word)) >> bit & 1 != 0
}

fn issued_index(word: usize) -> usize {
    let region = (word / ISSUED_WORDS) as u64;
    let turn = region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - ISSUED_WORDS.trailing_zeros());
    (word ^ turn as usize) % ISSUED_WORDS
}

/// Takes the bits of `blocks` out of `words`.
pub(super) fn forget(words: &SharedWords, place: &Place, blocks: &RoaringBitmap) {
    let bits = place.to_bits(blocks);
    for span in place.spans() {
        if let Some(gone) = span_words(&bits, place.first_bit(span)) {
            for (word, gone) in gone.iter().enumerate() {
                if words.load(span * SPAN_WORDS + word) & gone != 0 {
                    words.unset(span * SPAN_WORDS + word, *gone);
                }
            }
        }
    }
}

/// Which of `blocks` have their bit in `words`.
pub(super) fn which_have(words: &SharedWords, place: &Place, blocks: &RoaringBitmap) -> RoaringBitmap {
    let bits = place.to_bits(blocks);
    let mut found = RoaringBitmap::new();
    for span in place.spans() {
        let Some(mut asked) = span_words(&bits, place.first_bit(span)) else { continue };
        for (word, asked) in asked.iter_mut().enumerate().filter(|(_, asked)| **asked != 0) {
            *asked &= words.load(span * SPAN_WORDS + word);
        }
        if asked.iter().any(|word| *word != 0) {
            found |= bits_of(&asked, place.first_bit(span));
        }
    }
    place.to_blocks(found) & blocks
}

/// Moves what `dirty` holds of the volume into `unacked`, and gives it. Nothing marks `dirty` meanwhile.
pub(super) fn drain(dirty: &SharedWords, summary: &SharedWords, unacked: &Unacked, place: &Place) -> RoaringBitmap {
    let mut drained = RoaringBitmap::new();
    for span in place.spans() {
        let groups = summary.load(span);
        if groups == 0 {
            continue;
        }
        let mut words = vec![0; SPAN_WORDS];
        for group in (0..64).filter(|group| groups >> group & 1 != 0) {
            let first = group * GROUP_WORDS;
            for (word, taken) in words[first..first + GROUP_WORDS].iter_mut().enumerate() {
                *taken = dirty.take_word(span * SPAN_WORDS + first + word, &unacked.words);
            }
        }
        summary.word(span).fetch_and(!groups, Ordering::SeqCst);
        drained |= bits_of(&words, place.first_bit(span));
    }
    place.to_blocks(drained)
}

/// What `dirty` holds of the volume, left where it is.
pub(super) fn peek(dirty: &SharedWords, place: &Place) -> RoaringBitmap {
    let mut found = RoaringBitmap::new();
    for span in place.spans() {
        let words: Vec<u64> = (0..SPAN_WORDS).map(|word| dirty.load(span * SPAN_WORDS + word)).collect();
        if words.iter().any(|word| *word != 0) {
            found |= bits_of(&words, place.first_bit(span));
        }
    }
    place.to_blocks(found)
}

fn bits_of(words: &[u64], first_bit: u64) -> RoaringBitmap {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    RoaringBitmap::from_lsb0_bytes(first_bit as u32, &bytes)
}

/// The pinned bitmap of what was drained and is not acked. Only this process writes it.
pub(super) struct Unacked {
    words: SharedWords,
}

impl Unacked {
    pub(super) fn new(words: SharedWords) -> Self {
        Self { words }
    }

    /// What it holds of the volume.
    pub(super) fn blocks(&self, place: &Place) -> RoaringBitmap {
        peek(&self.words, place)
    }

    /// Adds blocks of the volume.
    pub(super) fn add(&self, place: &Place, blocks: &RoaringBitmap) {
        let bits = place.to_bits(blocks);
        for span in place.spans() {
            if let Some(words) = span_words(&bits, place.first_bit(span)) {
                for (word, bits) in words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
                    self.words.set(span * SPAN_WORDS + word, *bits);
                }
            }
        }
    }

    /// Makes it exactly `blocks` for the volume.
    pub(super) fn retain(&self, place: &Place, blocks: &RoaringBitmap) {
        let bits = place.to_bits(blocks);
        for span in place.spans() {
            let words = span_words(&bits, place.first_bit(span));
            for word in 0..SPAN_WORDS {
                let wanted = words.as_ref().map_or(0, |words| words[word]);
                let index = span * SPAN_WORDS + word;
                // Plain loads where nothing changes: most of a large volume is untouched.
                if self.words.word(index).load(Ordering::Relaxed) != wanted {
                    self.words.store(index, wanted);
                }
            }
        }
    }
}

/// The words of a span; `None` where no bit of it is set.
fn span_words(bits: &RoaringBitmap, first_bit: u64) -> Option<Vec<u64>> {
    let first = first_bit as u32;
    let last = (first_bit + SPAN_WORDS as u64 * WORD_BITS - 1) as u32;
    let count = bits.range_cardinality(first..=last);
    if count == 0 {
        return None;
    }
    if count == SPAN_WORDS as u64 * WORD_BITS {
        return Some(vec![u64::MAX; SPAN_WORDS]);
    }
    let mut words = vec![0; SPAN_WORDS];
    for bit in bits.range(first..=last) {
        let offset = bit - first;
        words[offset as usize / 64] |= 1 << (offset % 64);
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy, prop_assert, prop_assert_eq, proptest};
    use std::collections::BTreeSet;

    const SPAN_BLOCKS: u64 = SPAN_WORDS as u64 * WORD_BITS;

    struct Record {
        dirty: SharedWords,
        summary: SharedWords,
        unacked: Unacked,
    }

    impl Record {
        fn new(spans: usize) -> Self {
            let words = || SharedWords::anonymous(spans * SPAN_WORDS);
            Self { dirty: words(), summary: SharedWords::anonymous(spans), unacked: Unacked::new(words()) }
        }

        fn mark(&self, place: &Place, block: u64) {
            let word = place.word_base + (block / 64) as usize;
            self.dirty.set(word, 1 << (block % 64));
            self.summary.set(word / SPAN_WORDS, 1 << (word / GROUP_WORDS % 64));
        }
    }

    fn volume_blocks() -> impl Strategy<Value = (u64, BTreeSet<u64>)> {
        (1..3 * SPAN_BLOCKS).prop_flat_map(|blocks| {
            (proptest::strategy::Just(blocks), proptest::collection::btree_set(0..blocks, 0..200))
        })
    }

    fn bitmap(blocks: &BTreeSet<u64>) -> RoaringBitmap {
        blocks.iter().map(|block| *block as u32).collect()
    }

    proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]

        #[test]
        fn a_drain_gives_each_mark_once_and_unacked_has_it((blocks, marked) in volume_blocks()) {
            let place = Place { word_base: SPAN_WORDS, blocks };
            let other = Place { word_base: 0, blocks: 10 };
            let record = Record::new(4);
            record.mark(&other, 9);
            for block in &marked {
                record.mark(&place, *block);
            }
            let drained = drain(&record.dirty, &record.summary, &record.unacked, &place);
            prop_assert_eq!(&drained, &bitmap(&marked));
            prop_assert_eq!(record.unacked.blocks(&place), drained);
            prop_assert!(drain(&record.dirty, &record.summary, &record.unacked, &place).is_empty());
            prop_assert_eq!(peek(&record.dirty, &other), bitmap(&BTreeSet::from([9])));
        }

        #[test]
        fn unacked_becomes_exactly_the_union((blocks, before) in volume_blocks(), (_, after) in volume_blocks()) {
            let place = Place { word_base: 0, blocks };
            let record = Record::new(3);
            record.unacked.add(&place, &bitmap(&before));
            prop_assert_eq!(record.unacked.blocks(&place), bitmap(&before));
            let after = bitmap(&after.into_iter().filter(|block| *block < blocks).collect());
            record.unacked.retain(&place, &after);
            prop_assert_eq!(record.unacked.blocks(&place), after);
        }
    }

    #[test]
    fn all_blocks_of_a_volume_are_retained_and_given_back() {
        let place = Place { word_base: SPAN_WORDS, blocks: SPAN_BLOCKS + 77 };
        let record = Record::new(3);
        record.unacked.retain(&place, &place.all());
        assert_eq!(record.unacked.blocks(&place), place.all());
        assert_eq!(place.all().len(), SPAN_BLOCKS + 77);
        record.unacked.retain(&place, &RoaringBitmap::new());
        assert!(record.unacked.blocks(&place).is_empty());
    }

    #[test]
    fn a_volume_above_8_tib_has_granules_of_four_blocks() {
        let place = Place { word_base: 0, blocks: (1 << 31) + 2 };
        assert_eq!((place.bits(), place.bit_shift()), ((1 << 29) + 1, 5));
        assert_eq!(Place { word_base: 0, blocks: 1 << 31 }.bit_shift(), 3);
        assert_eq!(place.to_bits(&RoaringBitmap::from([3, 4, 9])).as_ref(), &RoaringBitmap::from([0, 1, 2]));
        let blocks = place.to_blocks(RoaringBitmap::from([1, 1 << 29]));
        assert_eq!(blocks, RoaringBitmap::from([4, 5, 6, 7, 1 << 31, (1 << 31) + 1]), "clipped to the volume");
        assert_eq!(place.to_blocks(place.to_bits(&place.all()).into_owned()), place.all());
    }

    #[test]
    fn the_filter_gives_each_word_of_a_region_one_of_its_own() {
        for region in [0, 1, 77] {
            let indexes: BTreeSet<usize> =
                (0..ISSUED_WORDS).map(|word| issued_index(region * ISSUED_WORDS + word)).collect();
            assert_eq!(indexes.len(), ISSUED_WORDS);
        }
        assert_eq!(issued_index(5), 5);
        assert_ne!(issued_index(ISSUED_WORDS + 5), 5);
    }

    #[test]
    fn what_is_forgotten_is_not_found() {
        let place = Place { word_base: SPAN_WORDS, blocks: SPAN_BLOCKS };
        let words = SharedWords::anonymous(2 * SPAN_WORDS);
        for block in [0, 1, 70] {
            words.set(SPAN_WORDS + block / 64, 1 << (block % 64));
        }
        let asked = RoaringBitmap::from([0, 1, 2, 70, 71]);
        assert_eq!(which_have(&words, &place, &asked), RoaringBitmap::from([0, 1, 70]));
        forget(&words, &place, &RoaringBitmap::from([1, 2]));
        assert_eq!(which_have(&words, &place, &asked), RoaringBitmap::from([0, 70]));
    }

    #[test]
    fn counted_bytes_come_back_and_a_count_past_the_place_is_refused() {
        let words = SharedWords::anonymous(8);
        words.put_counted_bytes(1, b"nine byte");
        assert_eq!(words.counted_bytes(1, 16).as_deref(), Some(b"nine byte".as_slice()));
        assert_eq!(words.counted_bytes(1, 8), None);
    }
}

//! From a capture to the frames of an attempt: holes merged, content packed, compressed and sealed on a bounded pool.
//!
//! Owns the pool's threads and the order: frames come out by sequence, whatever thread made them. Content is copied once,
//! out of the capture to where its frame is made. Memory beyond capture and frames: two packings of 128 KiB
//! waiting and one in work for each thread. Does not end the attempt: what follows the last extents is decided when it is sent.

use crate::capture::{BlockContent, Capture, CapturedVolume};
use crate::packing::Chooser;
use bytes::Bytes;
use cdp_protocol::codec::{Draft, FrameListHasher, Sealer};
use cdp_protocol::frame::{self, Encoding};
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, CONTENT_BYTES_MAX, EXTENTS_MAX, HOLE_BLOCKS_MAX};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::record::{Begin, FrameList, Meters};
use cdp_protocol::seal::Digest;
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Block, Epoch, Extent, FrameHash, Sequence, VolumeSlot};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// The frames of an attempt, all but its end.
#[derive(Clone, Debug)]
pub struct EncodedAttempt {
    /// The epoch they belong to.
    pub epoch: Epoch,
    /// The sealing run.
    pub attempt: AttemptId,
    /// `Begin` and `Extents`, by sequence from 0.
    pub frames: Vec<Bytes>,
    /// Their count and hash, for the end.
    pub list: FrameList,
    /// What the cut and the frames amount to.
    pub meters: Meters,
    /// Bytes of all frames.
    pub bytes: u64,
    /// The digests of the blocks with content.
    pub digests: Vec<BlockDigests>,
    /// What each volume's frames came to, in the capture's order.
    pub volumes: Vec<FrameMeters>,
}

/// What a volume's frames came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameMeters {
    /// Their bytes.
    pub bytes: u64,
    /// Blocks with content that packing did not make shorter.
    pub incompressible_blocks: u64,
}

/// Digests of blocks of one volume.
#[derive(Clone, Debug)]
pub struct BlockDigests {
    /// The volume.
    pub volume: VolumeSlot,
    /// Each block's.
    pub blocks: Vec<(Block, Digest)>,
}

/// Encodes captures on its threads. May be shared by the groups of an agent.
pub struct Encoder {
    way: Way,
    chooser: Chooser,
    threads: Vec<JoinHandle<()>>,
}

/// Where frames are made.
enum Way {
    /// By the pool, which ends when this is closed.
    Pool(Option<SyncSender<Job>>),
    /// By whoever asks, at once: for simulations, in which nothing may happen beside.
    #[cfg(any(test, feature = "sim"))]
    Inline(Box<Mutex<Packer>>),
}

/// One frame to be made.
struct Job {
    sealer: Arc<Sealer>,
    volume: VolumeSlot,
    sequence: Sequence,
    extents: Vec<Extent>,
    packing: Packing,
    work: Work,
    made: Sender<Made>,
}

enum Work {
    Content(Draft),
    Bare(Encoding),
}

/// A frame that was made.
struct Made {
    /// Its volume, where it is one of extents.
    volume: Option<VolumeSlot>,
    incompressible_blocks: u64,
    sequence: Sequence,
    hash: FrameHash,
    frame: Bytes,
    digests: Option<BlockDigests>,
}

impl Encoder {
    /// Starts `threads` threads (at least one), which live as long as the encoder.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let (jobs, queue) = sync_channel(2 * threads);
        let queue = Arc::new(Mutex::new(queue));
        let start = |number| {
            let queue = Arc::clone(&queue);
            let builder = std::thread::Builder::new().name(format!("encode-{number}"));
            builder.spawn(move || serve(&queue)).expect("the system has a thread to give")
        };
        Self { way: Way::Pool(Some(jobs)), chooser: Chooser::default(), threads: (0..threads).map(start).collect() }
    }

    /// Packs as `chooser` says, and tells it what that came to.
    #[must_use]
    pub fn choosing(mut self, chooser: Chooser) -> Self {
        self.chooser = chooser;
        self
    }

    /// An encoder without threads: whoever asks makes the frames.
    #[cfg(any(test, feature = "sim"))]
    #[must_use]
    pub fn inline() -> Self {
        Self { way: Way::Inline(Box::default()), chooser: Chooser::default(), threads: Vec::new() }
    }

    /// Whether it has no threads.
    pub(crate) const fn is_inline(&self) -> bool {
        !matches!(self.way, Way::Pool(_))
    }

    /// Encodes `capture` as the attempt of `sealer`, which must not have sealed anything yet. `slots` are the volumes'
    /// places in the group, in the capture's order. Blocks until all frames are made.
    #[must_use]
    pub fn encode(
        &self,
        capture: &Capture,
        slots: &[VolumeSlot],
        begin: &Begin,
        sealer: Arc<Sealer>,
    ) -> EncodedAttempt {
        assert_eq!(capture.volumes.len(), slots.len(), "every volume has a slot");
        self.chooser.encode(capture.meters.content_blocks * BLOCK_BYTES as u64, |packing| {
            let made = self.encode_with(packing, capture, slots, begin, sealer);
            (made.bytes, made)
        })
    }

    fn encode_with(
        &self,
        packing: Packing,
        capture: &Capture,
        slots: &[VolumeSlot],
        begin: &Begin,
        sealer: Arc<Sealer>,
    ) -> EncodedAttempt {
        let (made, finished) = channel();
        let begin = Bytes::from(sealer.begin(begin));
        let _ = made.send(Made {
            volume: None,
            incompressible_blocks: 0,
            sequence: Sequence(0),
            hash: frame::hash(&begin),
            frame: begin,
            digests: None,
        });
        let (epoch, attempt) = (sealer.epoch(), sealer.attempt());
        let mut plan = Plan { way: &self.way, packing, sealer, made, volume: VolumeSlot(0), next: Sequence(1) };
        for (volume, slot) in capture.volumes.iter().zip(slots) {
            plan.volume = *slot;
            plan.add(volume);
        }
        let count = plan.next.0 as usize;
        drop(plan);
        let made: Vec<Made> = finished.iter().collect();
        assert_eq!(made.len(), count, "every frame is made, or a thread of the pool has panicked");
        let volumes = slots.iter().map(|slot| FrameMeters::of(*slot, &made)).collect();
        EncodedAttempt { volumes, ..collect(epoch, attempt, capture.meters, made) }
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        match &mut self.way {
            Way::Pool(jobs) => *jobs = None,
            #[cfg(any(test, feature = "sim"))]
            Way::Inline(_) => {}
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already, and whoever waited for its frame too.
            let _ = thread.join();
        }
    }
}

/// A thread of the pool: makes frames until the encoder is gone.
fn serve(queue: &Mutex<Receiver<Job>>) {
    let mut packer = Packer::default();
    loop {
        // Nothing is done under the lock but to wait, so a poisoned one is as good.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        make(job, &mut packer);
    }
}

fn make(job: Job, packer: &mut Packer) {
    let Job { sealer, volume, sequence, extents, packing, work, made } = job;
    packer.set_packing(packing);
    let (mut incompressible_blocks, mut digests) = (0, None);
    let frame = match work {
        Work::Content(draft) => {
            let blocks: Vec<Block> = extents.iter().flat_map(|extent| extent.blocks()).collect();
            let (frame, found, encoding) = sealer.digested_content_of(packer, volume, sequence, extents, draft);
            incompressible_blocks = if encoding == Encoding::Raw { blocks.len() as u64 } else { 0 };
            digests = Some(BlockDigests { volume, blocks: blocks.into_iter().zip(found).collect() });
            frame
        }
        Work::Bare(encoding) => sealer.bare(encoding, volume, sequence, extents).into(),
    };
    let hash = frame::hash(&frame);
    // The receiver is gone only if the one who waits has panicked.
    let _ = made.send(Made { volume: Some(volume), incompressible_blocks, sequence, hash, frame, digests });
}

impl FrameMeters {
    /// What the frames of a volume come to.
    fn of(volume: VolumeSlot, made: &[Made]) -> Self {
        let made = made.iter().filter(|made| made.volume == Some(volume));
        made.fold(Self::default(), |sum, made| Self {
            bytes: sum.bytes + made.frame.len() as u64,
            incompressible_blocks: sum.incompressible_blocks + made.incompressible_blocks,
        })
    }
}

/// Puts the frames in order.
fn collect(epoch: Epoch, attempt: AttemptId, mut meters: Meters, mut made: Vec<Made>) -> EncodedAttempt {
    made.sort_unstable_by_key(|made| made.sequence);
    let mut hasher = FrameListHasher::default();
    for made in &made {
        hasher.push(&made.hash);
    }
    let bytes = made.iter().map(|made| made.frame.len() as u64).sum();
    meters.frame_bytes = bytes;
    let (frames, digests): (Vec<Bytes>, Vec<_>) = made.into_iter().map(|made| (made.frame, made.digests)).unzip();
    let digests = digests.into_iter().flatten().collect();
    EncodedAttempt { epoch, attempt, frames, list: hasher.list(), meters, bytes, digests, volumes: Vec::new() }
}

/// Decides which blocks share a frame, and numbers the frames.
struct Plan<'a> {
    way: &'a Way,
    packing: Packing,
    sealer: Arc<Sealer>,
    made: Sender<Made>,
    volume: VolumeSlot,
    next: Sequence,
}

impl Plan<'_> {
    fn add(&mut self, volume: &CapturedVolume) {
        let (mut holes, mut unreadable) = (Vec::new(), Vec::new());
        let (mut extents, mut draft) = (Vec::new(), None::<Draft>);
        for (block, held) in volume.iter() {
            match held {
                BlockContent::Zero => self.add_bare(&mut holes, block, Encoding::Hole),
                BlockContent::Unreadable => self.add_bare(&mut unreadable, block, Encoding::Unreadable),
                BlockContent::Bytes(bytes) => {
                    append(&mut extents, block, CONTENT_BLOCKS_MAX as u32);
                    let content = draft.get_or_insert_default();
                    content.push(bytes);
                    if content.content().len() == CONTENT_BYTES_MAX
                        && let Some(full) = draft.take()
                    {
                        self.make(std::mem::take(&mut extents), Work::Content(full));
                    }
                }
            }
        }
        if let Some(draft) = draft {
            self.make(extents, Work::Content(draft));
        }
        for (extents, encoding) in [(holes, Encoding::Hole), (unreadable, Encoding::Unreadable)] {
            if !extents.is_empty() {
                self.make(extents, Work::Bare(encoding));
            }
        }
    }

    /// Adds a block without content; a list that would become too long goes into a frame first.
    fn add_bare(&mut self, extents: &mut Vec<Extent>, block: Block, encoding: Encoding) {
        append(extents, block, HOLE_BLOCKS_MAX);
        if extents.len() > EXTENTS_MAX {
            let rest = extents.split_off(EXTENTS_MAX);
            self.make(std::mem::replace(extents, rest), Work::Bare(encoding));
        }
    }

    fn make(&mut self, extents: Vec<Extent>, work: Work) {
        let (sealer, made) = (Arc::clone(&self.sealer), self.made.clone());
        let job = Job { sealer, volume: self.volume, sequence: self.next, extents, packing: self.packing, work, made };
        self.next.0 += 1;
        match self.way {
            Way::Pool(jobs) => {
                let jobs = jobs.as_ref().expect("there until the encoder is dropped");
                assert!(
                    jobs.send(job).is_ok(),
                    "the pool lives as long as the encoder, unless all its threads panicked"
                );
            }
            #[cfg(any(test, feature = "sim"))]
            Way::Inline(packer) => make(job, &mut packer.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// Adds a block behind the last extent, or to it.
fn append(extents: &mut Vec<Extent>, block: Block, blocks_max: u32) {
    match extents.last_mut() {
        Some(last) if last.end() == u64::from(block.0) && last.count < blocks_max => last.count += 1,
        _ => extents.push(Extent { start: block, count: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::codec::open_content;
    use cdp_protocol::seal::DataKey;
    use cdp_protocol::units::{Generation, GroupId, KeyId};
    use cdp_seams::random::{Random, SimRandom};
    use std::collections::BTreeMap;

    const GROUP: GroupId = GroupId([3; 16]);
    const SLOTS: [VolumeSlot; 2] = [VolumeSlot(4), VolumeSlot(9)];

    type Image = BTreeMap<(VolumeSlot, u32), Option<Vec<u8>>>;

    /// Encodes and opens again: every block that the frames hold, `None` where it is unreadable.
    fn round_trip(capture: &Capture, pool: &Encoder) -> (EncodedAttempt, Image) {
        let key = DataKey::new([8; 32]);
        let sealer = Sealer::new(GROUP, Epoch(5), Generation(2), AttemptId([6; 16]), &key);
        let begin = Begin { key: KeyId([1; 8]), volumes: vec![] };
        let encoded = pool.encode(capture, &SLOTS, &begin, Arc::new(sealer));
        let mut image = Image::new();
        let mut hasher = FrameListHasher::default();
        for (index, bytes) in encoded.frames.iter().enumerate() {
            let frame = frame::decode(&GROUP, bytes).expect("a frame");
            let header = &frame.header;
            assert_eq!((header.sequence, header.attempt), (Sequence(index as u64), encoded.attempt));
            hasher.push(&frame.hash());
            if index == 0 {
                assert_eq!(header.kind, frame::Kind::Begin);
                continue;
            }
            let content = open_content(&frame, &key.attempt_key(&header.attempt)).expect("opens");
            let blocks = header.extents.iter().flat_map(|extent| extent.blocks());
            for (at, block) in blocks.enumerate() {
                let held = match header.encoding {
                    Encoding::Unreadable => None,
                    Encoding::Hole => Some(vec![0; BLOCK_BYTES]),
                    _ => Some(content[at * BLOCK_BYTES..][..BLOCK_BYTES].to_vec()),
                };
                assert!(image.insert((header.volume, block.0), held).is_none(), "{block} twice");
            }
        }
        assert_eq!(hasher.list(), encoded.list);
        assert_eq!(encoded.bytes, encoded.frames.iter().map(|frame| frame.len() as u64).sum::<u64>());
        (encoded, image)
    }

    #[test]
    fn every_block_comes_back_from_the_frames() {
        let random = SimRandom::new(1);
        let mut capture = Capture::new(2);
        let mut expected = Image::new();
        for (volume, slot) in SLOTS.into_iter().enumerate() {
            for block in (0..4000).filter(|_| random.below(3) > 0) {
                let mut bytes = vec![0; BLOCK_BYTES];
                match random.below(8) {
                    0 => {
                        capture.volumes[volume].put_unreadable(Block(block));
                        expected.insert((slot, block), None);
                        continue;
                    }
                    1..4 => {}
                    4 => random.fill(&mut bytes),
                    _ => bytes.fill(block as u8 | 1),
                }
                capture.volumes[volume].put(Block(block), &bytes);
                expected.insert((slot, block), Some(bytes));
            }
        }
        capture.count();
        for encoder in [Encoder::new(1), Encoder::new(3), Encoder::inline()] {
            let (encoded, image) = round_trip(&capture, &encoder);
            assert!(image == expected, "the frames hold something else");
            assert_eq!(encoded.meters.frame_bytes, encoded.bytes);
            assert_eq!(encoded.meters.dirty_blocks, expected.len() as u64);
            let begin = encoded.frames[0].len() as u64;
            assert_eq!(encoded.volumes.iter().map(|volume| volume.bytes).sum::<u64>() + begin, encoded.bytes);
        }
    }

    #[test]
    fn holes_take_few_extents_and_content_full_frames() {
        let mut capture = Capture::new(2);
        for block in 0..HOLE_BLOCKS_MAX + 10 {
            capture.volumes[0].put(Block(block), &[0; BLOCK_BYTES]);
        }
        for block in 0..65 {
            capture.volumes[1].put(Block(2 * block), &[7; BLOCK_BYTES]);
        }
        let (encoded, _) = round_trip(&capture, &Encoder::new(2));
        let header = |index: usize| frame::decode_header(&GROUP, &encoded.frames[index]).expect("a header");
        assert_eq!(header(1).extents.iter().map(|extent| extent.count).collect::<Vec<_>>(), [HOLE_BLOCKS_MAX, 10]);
        assert_eq!((2..5).map(|index| header(index).blocks()).collect::<Vec<_>>(), [32, 32, 1]);
        assert_eq!(encoded.list.count, 5);
    }

    #[test]
    fn many_scattered_holes_are_spread_over_frames() {
        let mut capture = Capture::new(2);
        for block in 0..=2 * EXTENTS_MAX as u32 {
            capture.volumes[0].put(Block(2 * block), &[0; BLOCK_BYTES]);
        }
        let (encoded, image) = round_trip(&capture, &Encoder::new(1));
        assert_eq!((encoded.list.count, image.len()), (4, 2 * EXTENTS_MAX + 1));
    }

    #[test]
    fn groups_share_the_threads_and_not_the_frames() {
        let pool = Encoder::new(2);
        std::thread::scope(|scope| {
            for number in 1..=4u8 {
                let pool = &pool;
                scope.spawn(move || {
                    let mut capture = Capture::new(1);
                    for block in 0..300 {
                        capture.volumes[0].put(Block(block), &[number; BLOCK_BYTES]);
                    }
                    let key = DataKey::new([number; 32]);
                    let attempt = AttemptId([number; 16]);
                    let sealer = Sealer::new(GROUP, Epoch(number.into()), Generation(1), attempt, &key);
                    let begin = Begin { key: KeyId([1; 8]), volumes: vec![] };
                    let encoded = pool.encode(&capture, &SLOTS[..1], &begin, Arc::new(sealer));
                    assert_eq!((encoded.epoch, encoded.list.count), (Epoch(number.into()), 11));
                    for bytes in &encoded.frames[1..] {
                        let frame = frame::decode(&GROUP, bytes).expect("a frame");
                        let content = open_content(&frame, &key.attempt_key(&attempt)).expect("its own key");
                        assert!(content.iter().all(|byte| *byte == number));
                    }
                });
            }
        });
    }

    #[test]
    fn an_empty_capture_is_a_begin_alone() {
        let (encoded, image) = round_trip(&Capture::new(2), &Encoder::new(1));
        assert_eq!((encoded.list.count, image.len()), (1, 0));
    }
}

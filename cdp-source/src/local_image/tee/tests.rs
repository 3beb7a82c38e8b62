//! What is handed over, held against a volume that is just remembered.

use super::*;
use cdp_protocol::units::Block;
use proptest::prelude::{Strategy, any, prop_assert, proptest};
use std::collections::BTreeMap;

const BLOCKS: u32 = 12;

/// What happens while an image is made.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A block is written to.
    Write(u32, u8),
    /// What was written is captured; so many bytes wait already.
    Capture(bool),
    /// The maker reads a block.
    Read(u32),
    /// The maker takes what was handed over.
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    let block = 0..BLOCKS;
    (0..8_u8, block, any::<u8>(), any::<bool>()).prop_map(|(kind, block, fill, is_full)| match kind {
        0..3 => Step::Write(block, fill),
        3 | 4 => Step::Capture(is_full),
        5 | 6 => Step::Read(block),
        _ => Step::Take,
    })
}

/// A volume, its tracker, and the two who read it.
struct World {
    volume: Vec<u8>,
    dirty: RoaringBitmap,
    tee: Option<Tee>,
    taken: Taken,
    image: BTreeMap<u32, u8>,
}

impl World {
    fn new() -> Self {
        let (tee, taken) = pair(1);
        let dirty = RoaringBitmap::from_iter([1, 2, 3]);
        Self { volume: vec![1; BLOCKS as usize], dirty, tee: Some(tee), taken, image: BTreeMap::new() }
    }

    fn capture(&mut self, is_full: bool) {
        let mut capture = Capture::new(1);
        for block in std::mem::take(&mut self.dirty) {
            // Zero is a hole.
            capture.volumes[0].put(Block(block), &[self.volume[block as usize]; BLOCK_BYTES]);
        }
        let tee = self.tee.as_mut().expect("not closed yet");
        let waiting = if is_full { QUEUED_BYTES_MAX } else { 0 };
        tee.queued_bytes.fetch_add(waiting, Ordering::Relaxed);
        assert!(tee.push(&capture));
        tee.queued_bytes.fetch_sub(waiting, Ordering::Relaxed);
    }

    fn read(&mut self, block: u32) {
        self.image.insert(block, self.volume[block as usize]);
    }

    /// Takes all that happened; gives whether a point has closed the image.
    fn take(&mut self) -> bool {
        let mut is_closed = false;
        while let Ok(event) = self.taken.events.try_recv() {
            match event {
                ImageEvent::Captured(volumes, bytes) => {
                    for (block, held) in volumes[0].iter() {
                        let fill = if let crate::capture::BlockContent::Bytes(bytes) = held { bytes[0] } else { 0 };
                        self.image.insert(block.0, fill);
                    }
                    self.taken.done(bytes);
                }
                ImageEvent::Named(named) => named[0].iter().for_each(|block| self.read(block)),
                ImageEvent::Closed(_) => is_closed = true,
                ImageEvent::NotClosed => {}
            }
        }
        is_closed
    }
}

fn closing() -> Closing {
    let (epoch, cut_time, class) = (Epoch(1), Timestamp(0), Class::Crash);
    Closing { epoch, cut_time, class, label: None, skipped: Vec::new() }
}

proptest! {
    /// In whatever order blocks are written, captured, read, and taken, and whatever does not fit: the image is the volume at the instant of the
    /// point that closes it.
    #[test]
    fn a_closed_image_is_the_volume(steps in proptest::collection::vec(step(), 0..120), is_full in any::<bool>()) {
        let mut world = World::new();
        for step in steps {
            match step {
                Step::Write(block, fill) => {
                    world.volume[block as usize] = fill % 3;
                    world.dirty.insert(block);
                }
                Step::Capture(is_full) => world.capture(is_full),
                Step::Read(block) => world.read(block),
                Step::Take => _ = world.take(),
            }
        }
        // The rest of the pass, and then points until one closes it.
        (0..BLOCKS).for_each(|block| world.read(block));
        world.capture(is_full);
        let mut rounds = 0;
        loop {
            prop_assert!(world.tee.as_mut().is_some_and(Tee::name));
            world.take();
            world.capture(is_full && rounds == 0);
            world.tee = world.tee.take().and_then(|tee| tee.close(closing()));
            if world.take() {
                break;
            }
            rounds += 1;
            prop_assert!(rounds < 3, "it is closed some time");
        }
        prop_assert!(world.tee.is_none());
        let image: Vec<u8> = world.image.into_values().collect();
        prop_assert!(image == world.volume, "{image:?}, and {:?}", world.volume);
    }
}

#[test]
fn who_is_gone_is_handed_nothing_more() {
    let (mut tee, taken) = pair(1);
    drop(taken);
    assert!(!tee.name());
    let mut capture = Capture::new(1);
    capture.volumes[0].put(Block(1), &[7; BLOCK_BYTES]);
    assert!(!tee.push(&capture));
    assert!(tee.close(closing()).is_none());
}

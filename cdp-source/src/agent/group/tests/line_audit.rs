//! A target that tells something else than it was sent: found by what it says, and healed by being sent the blocks again.

use super::{Bench, GROUP, KEY, SIZE_BYTES, SLOT, Target};
use crate::agent::status::AuditStatus;
use cdp_protocol::codec::{Draft, Sealer, is_zero};
use cdp_protocol::frame;
use cdp_protocol::holding::{Held, Holding};
use cdp_protocol::message::{TargetMessage, Verdict};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Epoch, Extent, Generation, Head, Sequence, VolumeSlot};
use std::time::Duration;

const BLOCKS: u64 = (SIZE_BYTES / BLOCK_BYTES) as u64;

/// Blocks of an image as a store tells them, each in a frame of its own.
fn holdings(image: &[u8], blocks: Extent) -> Vec<Holding> {
    let sealer = Sealer::new(GROUP, Epoch(1), Generation(1), AttemptId([9; 16]), &DataKey::new(KEY));
    let held = |block: cdp_protocol::units::Block| {
        let content = &image[block.to_bytes() as usize..][..BLOCK_BYTES];
        if is_zero(content) {
            return Held::Hole;
        }
        let mut draft = Draft::default();
        draft.push(content);
        let extents = vec![Extent { start: block, count: 1 }];
        let bytes = sealer.content_of(&mut Packer::new(Packing::Lz4), SLOT, Sequence(1), extents, draft);
        Held::of(&frame::decode(&GROUP, &bytes).expect("a frame"))
    };
    blocks.blocks().map(|block| Holding { count: 1, held: held(block) }).collect()
}

impl Target {
    /// Answers what is asked of some blocks.
    pub(super) fn tell_digests(&mut self, head: Head, volume: VolumeSlot, blocks: Extent) {
        let is_newest = self.points.last().is_some_and(|(newest, ..)| *newest == head);
        let mut image = self.image.clone();
        for (block, content) in &self.stale {
            image[*block as usize * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(content);
        }
        // As much as fits an answer, as a store does.
        let fits = Extent { count: blocks.count.min(100), ..blocks };
        let holdings = if is_newest { holdings(&image, fits) } else { Vec::new() };
        self.hear(&TargetMessage::Digests { group: GROUP, head, volume, start: blocks.start, holdings });
    }
}

#[test]
fn an_older_content_at_the_target_is_found_over_the_line_and_sent_again() {
    let mut bench = Bench::new();
    bench.audit_interval = Duration::from_secs(1);
    bench.answer(Verdict::New);
    let running = bench.start();
    running.acked_point(None);
    let older = bench.image()[1000 * BLOCK_BYTES..][..BLOCK_BYTES].to_vec();
    bench.write(1000, 0xaa);
    bench.write(2000, 0);
    drop(bench.target.until("a point", |target| target.points.last().is_some_and(|point| point.2 == bench.image())));
    let audit = |wanted: &str, is_so: &dyn Fn(&AuditStatus) -> bool| {
        drop(bench.target.until(wanted, |_| is_so(&running.status().audit)));
        running.status().audit
    };
    let honest = audit("all of it is proved", &|audit| audit.target_proved_blocks >= BLOCKS + 100);
    assert_eq!((honest.target_differing_blocks, honest.target_difference), (0, None), "no false alarm");
    assert!(honest.oldest_target_proof.is_some() && honest.target_bytes > 0);

    // Block 1000 as it was, block 2000 as it never was, and block 4000 of the very content that it has.
    let same = bench.image()[4000 * BLOCK_BYTES..][..BLOCK_BYTES].to_vec();
    bench.target.change(|target| {
        target.stale.extend([(1000, older), (2000, vec![7; BLOCK_BYTES]), (4000, same)]);
    });
    drop(bench.target.until("both are sent again", |target| target.stale.len() == 1));
    let found = audit("both are told", &|audit| audit.target_differing_blocks == 2);
    let difference = found.target_difference.expect("the last one");
    assert!(difference.slot == SLOT && difference.blocks == 1 && [1000, 2000].contains(&difference.first_block));
    let again = audit("another round", &|audit| audit.target_proved_blocks >= found.target_proved_blocks + BLOCKS);
    assert_eq!(again.target_differing_blocks, 2, "what was sent again is as it should be");
    let target = bench.target.lock();
    assert!(target.image == bench.image() && target.points.len() <= 5, "{} points", target.points.len());
    drop(target);
    running.stop();
}

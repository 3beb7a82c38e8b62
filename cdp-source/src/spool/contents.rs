//! What the frames of one attempt hold, proved by the list that its end vouches for.
//!
//! Bytes that come back from a disk are those that were written there or are called damaged: nothing else is opened, sent or merged.

use crate::agent::ledger::Blocks;
use crate::encoder::BlockDigests;
use bytes::Bytes;
use cdp_protocol::codec::{self, FrameListHasher};
use cdp_protocol::frame::{self, Encoding, Frame, Kind};
use cdp_protocol::record::FrameList;
use cdp_protocol::seal::{AttemptKey, DataKey};
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Block, GroupId, VolumeSlot};
use roaring::RoaringBitmap;

/// Of which group the frames are, and what opens them.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// The group.
    pub group: GroupId,
    /// Its volumes' places, in the order of all sets of blocks.
    pub slots: &'a [VolumeSlot],
    /// Its key.
    pub data_key: &'a DataKey,
}

/// What an attempt holds.
#[derive(Debug)]
pub struct Contents {
    /// Its blocks.
    pub blocks: Blocks,
    /// Those of them that the device could not read.
    pub unreadable: Blocks,
    /// The digests of those with content.
    pub digests: Vec<BlockDigests>,
}

/// What a block in the spool holds.
pub(super) enum Held<'a> {
    Bytes(&'a [u8]),
    Zero,
    Unreadable,
}

impl Keys<'_> {
    /// Decodes frames that are to be all of `attempt` but its end; `None` where they are not those of `list`.
    pub(super) fn frames<'b>(&self, attempt: AttemptId, list: FrameList, bytes: &'b [Bytes]) -> Option<Vec<Frame<'b>>> {
        let mut hasher = FrameListHasher::default();
        let mut frames = Vec::with_capacity(bytes.len());
        for bytes in bytes {
            let frame = frame::decode(&self.group, bytes).ok().filter(|frame| frame.header.attempt == attempt)?;
            hasher.push(&frame.hash());
            frames.push(frame);
        }
        (hasher.list() == list).then_some(frames)
    }

    /// What these frames hold; `None` where that cannot be told.
    pub(super) fn contents(&self, attempt: AttemptId, frames: &[Frame<'_>]) -> Option<Contents> {
        let key = self.data_key.attempt_key(&attempt);
        let none = vec![RoaringBitmap::new(); self.slots.len()];
        let mut contents = Contents { blocks: none.clone(), unreadable: none, digests: Vec::new() };
        for frame in frames.iter().filter(|frame| frame.header.kind == Kind::Extents) {
            let header = &frame.header;
            let volume = self.volume(header.volume)?;
            let blocks = || header.extents.iter().flat_map(|extent| extent.blocks());
            contents.blocks[volume].extend(blocks().map(|block| block.0));
            if header.encoding == Encoding::Unreadable {
                contents.unreadable[volume].extend(blocks().map(|block| block.0));
            } else if header.encoding.has_content() {
                let digests = codec::open_digests(frame, &key).ok()?;
                contents.digests.push(BlockDigests { volume: header.volume, blocks: blocks().zip(digests).collect() });
            }
        }
        Some(contents)
    }

    /// Gives every block of a frame of extents; `None` where its content cannot be had.
    pub(super) fn each_block(
        &self,
        frame: &Frame<'_>,
        key: &AttemptKey,
        mut give: impl FnMut(usize, Block, Held<'_>),
    ) -> Option<()> {
        let header = &frame.header;
        let volume = self.volume(header.volume)?;
        let content = codec::open_content(frame, key).ok()?;
        let mut bytes = content.chunks_exact(BLOCK_BYTES);
        for block in header.extents.iter().flat_map(|extent| extent.blocks()) {
            let held = match header.encoding {
                Encoding::Hole => Held::Zero,
                Encoding::Unreadable => Held::Unreadable,
                _ => Held::Bytes(bytes.next()?),
            };
            give(volume, block, held);
        }
        Some(())
    }

    fn volume(&self, slot: VolumeSlot) -> Option<usize> {
        self.slots.iter().position(|known| *known == slot)
    }
}

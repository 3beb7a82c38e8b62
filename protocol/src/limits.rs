//! Bounds of everything a peer or a disk can declare. Checked before anything is allocated.

use crate::units::BLOCK_BYTES;

/// Content of one frame, in bytes: 32 blocks compressed as one.
pub const CONTENT_BYTES_MAX: usize = 128 * 1024;
/// Blocks with content in one frame.
pub const CONTENT_BLOCKS_MAX: usize = CONTENT_BYTES_MAX / BLOCK_BYTES;
/// Extents in one frame (of holes; a frame with content has at most one extent a block).
pub const EXTENTS_MAX: usize = 1024;
/// Blocks of one hole or unreadable extent: 64 MiB, a slice. Bounds how far back an index looks.
pub const HOLE_BLOCKS_MAX: u32 = 16 * 1024;
/// Bytes of one frame's payload: content that did not compress, its tag, the digests and their tag, or a commit.
pub const PAYLOAD_BYTES_MAX: usize = CONTENT_BYTES_MAX + 8 * 1024;
/// Groups of an office at the target, all connections and all time taken together: each has a folder and a thread.
pub const OFFICE_GROUPS_MAX: usize = 64;
/// Volumes in a group.
pub const VOLUMES_MAX: usize = 64;
/// Bytes of a name: office, group, volume, label.
pub const NAME_BYTES_MAX: usize = 64;
/// Extents that one message may name: 8 bytes each, half a message.
pub const MESSAGE_EXTENTS_MAX: usize = 4096;
/// Bytes of one control message.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Whether `name` may name an office, a group or a volume: 1 to 64 of `a-z A-Z 0-9 . _ -`, not starting with a dot or a dash.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    fits && plain && !name.starts_with(['.', '-'])
}

//! BLAKE3 of an image, in leaves that threads hash on their own.
//!
//! Invariant: the root is what `blake3::hash` gives of the whole image. A leaf's value is bound to its place in the image and to
//! its content. Nothing is kept of the content but 32 bytes a stride.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

/// Bytes of a leaf; the image's last one may be shorter.
pub(crate) const LEAF_BYTES: u64 = 1 << 20;
/// Leaves of a stride: what a broken export is gone on from, and proved by.
pub(crate) const STRIDE_LEAVES: u64 = 8;
/// Bytes of a stride.
pub(crate) const STRIDE_BYTES: u64 = STRIDE_LEAVES * LEAF_BYTES;
/// Zeros to hash.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The value of a leaf, or of several that form a subtree.
pub(crate) type Value = ChainingValue;

/// Hashes a leaf.
pub(crate) struct LeafHasher {
    hasher: Hasher,
    is_only: bool,
}

impl LeafHasher {
    /// For the leaf at `offset`, a multiple of [`LEAF_BYTES`], of an image of so many bytes.
    pub(crate) fn new(offset: u64, size_bytes: u64) -> Self {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(offset);
        Self { hasher, is_only: size_bytes <= LEAF_BYTES }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    pub(crate) fn update_zeros(&mut self, len: u64) {
        let mut left = len;
        while left > 0 {
            let piece = left.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..piece as usize]);
            left -= piece;
        }
    }

    /// The leaf's value; where it is the whole image, the root.
    pub(crate) fn finish(&self) -> Value {
        if self.is_only { *self.hasher.finalize().as_bytes() } else { self.hasher.finalize_non_root() }
    }
}

/// Puts leaves together, in the order of the image.
#[derive(Clone, Debug, Default)]
pub(crate) struct TreeHash {
    strides: Vec<Value>,
    /// Of the last stride, which may be whole.
    leaves: Vec<Value>,
}

impl TreeHash {
    /// Takes the next leaf.
    pub(crate) fn push(&mut self, leaf: Value) {
        if self.leaves.len() as u64 == STRIDE_LEAVES {
            self.strides.push(subtree(&self.leaves));
            self.leaves.clear();
        }
        self.leaves.push(leaf);
    }

    /// How many leaves there are.
    pub(crate) fn count(&self) -> u64 {
        self.strides.len() as u64 * STRIDE_LEAVES + self.leaves.len() as u64
    }

    /// The value of the last stride, as far as it is there; one leaf at least.
    pub(crate) fn stride(&self) -> Value {
        subtree(&self.leaves)
    }

    /// The hash of the image.
    pub(crate) fn root(mut self) -> blake3::Hash {
        if self.strides.is_empty() {
            return root(&self.leaves);
        }
        self.strides.push(subtree(&self.leaves));
        root(&self.strides)
    }
}

/// Where the left subtree ends: at the largest power of two below the whole.
fn split(values: &[Value]) -> (&[Value], &[Value]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

fn subtree(values: &[Value]) -> Value {
    if let [value] = values {
        return *value;
    }
    let (left, right) = split(values);
    merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
}

fn root(values: &[Value]) -> blake3::Hash {
    match values {
        [] => blake3::hash(b""),
        [only] => blake3::Hash::from_bytes(*only),
        _ => {
            let (left, right) = split(values);
            merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LEAF_BYTES, LeafHasher, STRIDE_LEAVES, TreeHash};
    use proptest::prelude::{ProptestConfig, any, prop_assert_eq, proptest};

    /// The same by leaves.
    fn by_leaves(bytes: &[u8]) -> TreeHash {
        let mut tree = TreeHash::default();
        for (at, leaf) in bytes.chunks(LEAF_BYTES as usize).enumerate() {
            let mut hasher = LeafHasher::new(at as u64 * LEAF_BYTES, bytes.len() as u64);
            if leaf.iter().all(|byte| *byte == 0) {
                hasher.update_zeros(leaf.len() as u64);
            } else {
                leaf.chunks(100_000).for_each(|part| hasher.update(part));
            }
            tree.push(hasher.finish());
        }
        tree
    }

    #[test]
    fn lengths_about_leaves_and_strides() {
        for leaves in [0, 1, 2, 3, STRIDE_LEAVES - 1, STRIDE_LEAVES, STRIDE_LEAVES + 1, 2 * STRIDE_LEAVES, 35] {
            for (more, fill) in [(0, 7), (1, 9), (LEAF_BYTES - 1, 0)] {
                let bytes = vec![fill; (leaves * LEAF_BYTES + more) as usize];
                let tree = by_leaves(&bytes);
                assert_eq!(tree.count(), (leaves * LEAF_BYTES + more).div_ceil(LEAF_BYTES));
                assert_eq!(tree.root(), blake3::hash(&bytes), "{leaves} leaves and {more} bytes");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn the_root_is_the_hash_of_the_whole(len in 0_usize..40 << 20, seed in any::<u8>()) {
            let bytes: Vec<u8> = (0..len).map(|at| (at / 1000) as u8 ^ seed).collect();
            prop_assert_eq!(by_leaves(&bytes).root(), blake3::hash(&bytes));
        }
    }
}

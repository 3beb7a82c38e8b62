//! ext that is damaged on purpose.

use super::Ext;
use crate::files::hostile::{Open, damage, files, made, read_all};
use crate::files::tree::{TreeError, find};
use crate::files::volume::memory::memory;

const OPEN: Open = |bytes| Ext::open(bytes).map(|tree| Box::new(tree) as _);

#[test]
fn whatever_is_damaged_the_reader_ends() {
    let folder = files();
    let from = folder.path().to_str().expect("text");
    for features in
        ["^metadata_csum,^has_journal", "^extents,^metadata_csum,^64bit", "inline_data,^metadata_csum", "metadata_csum"]
    {
        let mkfs = ["mkfs.ext4", "-q", "-b", "1024", "-O", features, "-d", from];
        let Some(image) = made(4096, &[&mkfs]) else { return };
        let tree = OPEN(memory(image.clone())).expect("it is well");
        let (nodes, errors) = read_all(tree.as_ref());
        assert!(nodes > 30 && errors.is_empty(), "{nodes}, {errors:?}");
        damage(&image, OPEN, if features == "metadata_csum" { 300 } else { 1000 });
    }
}

#[test]
fn a_folder_that_lies_within_itself_is_told() {
    let folder = files();
    let from = folder.path().to_str().expect("text");
    let mkfs = ["mkfs.ext4", "-q", "-b", "1024", "-d", from];
    let ring = ["debugfs", "-w", "-R", "link etc etc/deep/ring", "@"];
    let Some(image) = made(4096, &[&mkfs, &ring]) else { return };
    let tree = OPEN(memory(image)).expect("it is well");
    let (_, errors) = read_all(tree.as_ref());
    let [TreeError::Damaged(what)] = errors.as_slice() else { panic!("{errors:?}") };
    assert_eq!(what, "the folder lies within itself");
    // A path that goes round is a path.
    find(tree.as_ref(), b"etc/deep/ring/deep/ring/deep/../deep", true).expect("there");
    assert!(matches!(find(tree.as_ref(), b"etc/deep/../../../../etc/none", true), Err(TreeError::NotFound)));
    assert!(matches!(find(tree.as_ref(), b"large/x", true), Err(TreeError::NotAFolder)));
}

#[test]
fn an_inode_that_was_changed_does_not_match_its_checksum() {
    let folder = files();
    let from = folder.path().to_str().expect("text");
    let mkfs = ["mkfs.ext4", "-q", "-b", "1024", "-O", "metadata_csum", "-d", from];
    let Some(image) = made(4096, &[&mkfs]) else { return };
    let tree = OPEN(memory(image.clone())).expect("it is well");
    let node = tree.node(find(tree.as_ref(), b"large", true).expect("there")).expect("well");
    // Its size, where the inode says it.
    let size = (node.size_bytes as u32).to_le_bytes();
    let at = image.windows(4).position(|bytes| bytes == size).expect("there");
    let mut bad = image;
    bad[at] ^= 1;
    let tree = OPEN(memory(bad)).expect("the rest is well");
    let (_, errors) = read_all(tree.as_ref());
    assert!(errors.iter().any(|error| error.to_string().contains("does not match its checksum")), "{errors:?}");
}

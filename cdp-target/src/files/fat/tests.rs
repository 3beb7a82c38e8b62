//! FAT that is damaged on purpose.

use super::Fat;
use crate::files::hostile::{Open, damage, files, made, read_all};
use crate::files::tree::find;
use crate::files::volume::memory::memory;

const OPEN: Open = |bytes| Fat::open(bytes).map(|tree| Box::new(tree) as _);

fn image(width: &str, kib: u64) -> Option<Vec<u8>> {
    let folder = files();
    let path = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    let (etc, large) = (path("etc"), path("large"));
    made(kib, &[&["mkfs.vfat", "-F", width], &["mcopy", "-s", "-i", "@", &etc, &large, "::"]])
}

#[test]
fn whatever_is_damaged_the_reader_ends() {
    for (width, kib) in [("12", 2 << 10), ("16", 16 << 10), ("32", 40 << 10)] {
        let Some(image) = image(width, kib) else { return };
        let tree = OPEN(memory(image.clone())).expect("it is well");
        let (nodes, errors) = read_all(tree.as_ref());
        assert!(nodes > 30 && errors.is_empty(), "{width}: {nodes}, {errors:?}");
        damage(&image, OPEN, 300);
    }
}

#[test]
fn a_chain_that_is_a_ring_ends() {
    let Some(mut image) = image("16", 16 << 10) else { return };
    let tree = OPEN(memory(image.clone())).expect("it is well");
    // The first cluster of the folder, as its entry says it; and the table, in which that cluster follows itself.
    let entry = find(tree.as_ref(), b"etc", true).expect("there") as usize;
    let cluster = usize::from(u16::from_le_bytes([image[entry + 26], image[entry + 27]]));
    let table = usize::from(u16::from_le_bytes([image[14], image[15]]))
        * usize::from(u16::from_le_bytes([image[11], image[12]]));
    image[table + 2 * cluster..][..2].copy_from_slice(&(cluster as u16).to_le_bytes());
    // No entry of it is the last one.
    let per_cluster = usize::from(image[13]) * 512;
    let data = entry / 512 * 512 + usize::from(u16::from_le_bytes([image[17], image[18]])) * 32;
    let start = data + (cluster - 2) * per_cluster;
    for at in (start..start + per_cluster).step_by(32).filter(|at| image[*at] == 0).collect::<Vec<_>>() {
        image[at] = 0xe5;
    }
    let tree = OPEN(memory(image)).expect("it is well");
    let (_, errors) = read_all(tree.as_ref());
    assert!(errors.iter().any(|error| error.to_string().contains("is a ring")), "{errors:?}");
}

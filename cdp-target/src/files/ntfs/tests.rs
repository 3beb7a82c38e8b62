//! NTFS that is damaged on purpose.

use super::Ntfs;
use crate::files::hostile::{Open, damage, files, made, read_all};
use crate::files::volume::memory::memory;

const OPEN: Open = |bytes| Ntfs::open(bytes).map(|tree| Box::new(tree) as _);

#[test]
fn whatever_is_damaged_the_reader_ends() {
    let folder = files();
    let from = folder.path().join("large");
    let from = from.to_str().expect("text");
    let mkfs = ["mkfs.ntfs", "-q", "-Q", "-F", "-p", "0", "-H", "0", "-S", "0", "-s", "512"];
    let copies: Vec<String> = (0..12).map(|number| format!("a file with a long name {number}")).collect();
    let mut tools: Vec<Vec<&str>> = vec![mkfs.to_vec()];
    tools.extend(copies.iter().map(|name| vec!["ntfscp", "-q", "@", from, name]));
    let tools: Vec<&[&str]> = tools.iter().map(Vec::as_slice).collect();
    let Some(image) = made(6 << 10, &tools) else { return };
    let tree = OPEN(memory(image.clone())).expect("it is well");
    let (nodes, errors) = read_all(tree.as_ref());
    assert!(nodes >= 13 && errors.is_empty(), "{nodes}, {errors:?}");
    damage(&image, OPEN, 1500);
}

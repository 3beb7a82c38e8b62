//! Single files out of file systems of Windows: each is held against what was written.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod files_support;

use cli_support::Store;
use files_support::{Facts, Image, assert_clean, can_mount, command, has, kernel_has, pattern, text, tool};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system that `ntfs-3g` has mounted, unmounted at the end.
struct Ntfs3g(PathBuf);

impl Ntfs3g {
    fn new(image: &Path, at: &Path, options: &str) -> Self {
        std::fs::create_dir_all(at).expect("made");
        tool("ntfs-3g", &["-o", options, text(image), text(at)]);
        Self(at.to_owned())
    }
}

impl Drop for Ntfs3g {
    fn drop(&mut self) {
        let ended = Command::new("umount").arg(&self.0).output().expect("umount");
        assert!(ended.status.success() || std::thread::panicking(), "{ended:?}");
    }
}

/// Files of all lengths, a folder of several blocks, holes, and room that was never written over what was deleted.
fn fill(at: &Path) {
    let write = |name: &str, content: &[u8]| std::fs::write(at.join(name), content).expect("written");
    std::fs::create_dir_all(at.join("Program Files/Größe")).expect("made");
    write("Program Files/Größe/Config.ini", &pattern(5000, 3));
    write("tiny.txt", b"x");
    write("empty", b"");
    write("deleted", &vec![0xdd; 4_000_000]);
    tool("sync", &["-f", text(at)]);
    std::fs::remove_file(at.join("deleted")).expect("removed");
    write("large.bin", &pattern(3_000_000, 1));
    let behind = std::fs::File::create(at.join("grown")).expect("made");
    behind.write_all_at(&pattern(10_000, 2), 0).expect("written");
    behind.set_len(700_000).expect("sized");
    let sparse = std::fs::File::create(at.join("sparse")).expect("made");
    sparse.write_all_at(&pattern(3000, 4), 5_000_000).expect("written");
    sparse.set_len(9_000_000).expect("sized");
    for number in 0..300 {
        write(
            &format!("Program Files/{number:03} a name that takes some room, so that a folder has several blocks"),
            &pattern(number, 5),
        );
    }
}

#[test]
fn files_of_ntfs_come_out_as_they_were_written() {
    if !(has("mkfs.ntfs") && has("ntfs-3g") && can_mount()) {
        return;
    }
    let store = Store::new();
    let (at, scratch, copied) = (store.path("mnt"), store.path("scratch"), store.path("copied"));
    let image = Image::new(&store.path("image"), 64);
    image.mkfs(&["mkfs.ntfs", "-q", "-Q", "-F", "-L", "Daten", "-p", "0", "-H", "0", "-S", "0", "-s", "512"]);
    let mounted = Ntfs3g::new(&image.path, &at, "compression");
    fill(&at);
    std::fs::create_dir(at.join("packed")).expect("made");
    // Files that are made in it are compressed.
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(at.join("packed"), "system.ntfs_attrib", &0x810_u32.to_le_bytes(), flags).expect("set");
    for (name, content) in [
        ("words", "all work and no play makes a dull boy\n".repeat(20_000).into_bytes()),
        ("noise", pattern(300_000, 9)),
        ("mixed", [pattern(70_000, 8), vec![0; 200_000], vec![b'x'; 100_000], pattern(1000, 7)].concat()),
    ] {
        std::fs::write(at.join("packed").join(name), content).expect("written");
    }
    // In so many pieces that its list of attributes and runs goes over several records.
    let pieces = std::fs::File::create(at.join("pieces")).expect("made");
    for number in (0..1500_u64).rev() {
        pieces.write_all_at(&pattern(4096, number), number * 16_384).expect("written");
    }
    drop(pieces);
    std::os::unix::fs::symlink("tiny.txt", at.join("link")).expect("made");
    let facts = Facts::of(&at).of_any_file_system();
    drop(mounted);
    store.fill_with_volumes(&[vec![("root", &image.bytes())]]);
    let output = command(&store, &scratch, &["cp", "-r", "/", text(&copied)]).output().expect("started");
    let (said, done) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success() && done.contains("1 link"), "{said} {done}");
    assert!(kernel_has("ntfs3") || said.contains("ntfs-3g reads it, without its log"), "{said}");
    facts.assert_same(&Facts::of(&copied).of_any_file_system(), "ntfs");
    let mode = std::fs::metadata(copied.join("tiny.txt")).expect("there").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "it has no owner: it is nobody else's");
    let listed = command(&store, &scratch, &["ls", "/", "--json"]).output().expect("started");
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert_eq!((&listed["file_system"], &listed["entries"][0]["name"]), (&"ntfs".into(), &"Program Files".into()));
    assert_clean(&scratch);
    assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0);
}

#[test]
fn fat_of_all_widths_is_read_as_it_was_written_where_the_kernel_has_it() {
    if !(has("mkfs.vfat") && has("mcopy") && can_mount()) {
        return;
    }
    for (width, mib) in [("12", 8), ("16", 64), ("32", 64)] {
        let store = Store::new();
        let from = store.path("from");
        std::fs::create_dir_all(from.join("Mixed Case Folder")).expect("made");
        std::fs::create_dir_all(from.join("LOWER/deep")).expect("made");
        for (name, content) in [
            ("README.TXT", pattern(100, 1)),
            ("a long name with Größe.config", pattern(3000, 2)),
            ("Mixed Case Folder/large.bin", pattern(2_000_000, 3)),
            ("LOWER/deep/x", Vec::new()),
        ] {
            std::fs::write(from.join(name), content).expect("written");
        }
        for number in 0..200 {
            std::fs::write(from.join(format!("LOWER/file number {number}.txt")), pattern(number * 11, 4))
                .expect("written");
        }
        let image = Image::new(&store.path("image"), mib);
        image.mkfs(&["mkfs.vfat", "-F", width, "-n", "BOOT"]);
        for entry in std::fs::read_dir(&from).expect("listed") {
            tool("mcopy", &["-s", "-m", "-i", text(&image.path), text(&entry.expect("an entry").path()), "::"]);
        }
        store.fill_with_volumes(&[vec![("root", &image.bytes())]]);
        let (copied, scratch) = (store.path("copied"), store.path("scratch"));
        let copy = command(&store, &scratch, &["cp", "-r", "/", text(&copied)]).output().expect("started");
        if kernel_has("vfat") {
            assert!(copy.status.success(), "{copy:?}");
            let facts = Facts::of(&from).of_any_file_system();
            facts.assert_same(&Facts::of(&copied).of_any_file_system(), width);
            let cat = command(&store, &scratch, &["cat", "readme.txt", "/ALONGN~1.CON"]).output().expect("started");
            assert_eq!(cat.stdout, [pattern(100, 1), pattern(3000, 2)].concat(), "in any case, by the short name, too");
        } else {
            cli_support::refused(&copy, &["cp"], &["the kernel of this machine has no vfat", "cdp-target nbd"]);
            assert!(!copied.exists());
        }
        assert_clean(&scratch);
        assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0);
    }
}

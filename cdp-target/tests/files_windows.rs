//! Single files out of file systems of Windows, held against what their own tools read.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod files_support;

use cli_support::Store;
use files_support::{Image, assert_same_content, can_mount, has, pattern, text, tool};
use std::os::unix::fs::FileExt;
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
fn ntfs_is_read_as_ntfs_3g_reads_it() {
    if !(has("mkfs.ntfs") && has("ntfs-3g") && can_mount()) {
        return;
    }
    let (store, at) = (Store::new(), PathBuf::new());
    let at = store.path("mnt").join(at);
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
    drop(mounted);
    store.fill_with_volumes(&[vec![("data", &image.bytes())]]);
    let copied = store.path("copied");
    let said = store.done(&["files", "paris/main/data", "--at", "latest", "cp", "-r", "/", text(&copied)]);
    assert!(said.contains("1 link"), "{said}");
    let mounted = Ntfs3g::new(&image.path, &at, "ro");
    assert_same_content(&at, &copied, "ntfs");
    drop(mounted);
    let files = |arguments: &[&str]| store.done(&[&["files", "paris/main/data", "--at", "latest"], arguments].concat());
    // Upper and lower case are one, as they are there.
    assert_eq!(files(&["cat", "TINY.TXT"]), "x");
    let listed = store.json(&["files", "paris/main", "--at", "latest", "ls", "/packed", "--json"]);
    assert_eq!(
        (&listed["file_system"], &listed["entries"][2]["note"]),
        (&"ntfs".into(), &"compressed".into()),
        "{listed}"
    );
    assert!(!files(&["ls"]).contains("$MFT"), "what is the file system's own is not listed");
}

#[test]
fn fat_of_all_widths_is_read_as_it_was_written() {
    if !(has("mkfs.vfat") && has("mcopy")) {
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
        store.fill_with_volumes(&[vec![("boot", &image.bytes())]]);
        let copied = store.path("copied");
        store.done(&["files", "paris/main/boot", "--at", "latest", "cp", "-r", "/", text(&copied)]);
        // Times are of two seconds, and those of folders of when they were copied: they are not compared.
        files_support::assert_same_bytes(&from, &copied, width);
        let cat = |path: &str| store.run(&["files", "paris/main/boot", "--at", "latest", "cat", path]).stdout;
        assert_eq!(cat("readme.txt"), pattern(100, 1));
        assert_eq!(cat("/ALONGN~1.CON"), pattern(3000, 2), "by its short name");
    }
}

//! Single files out of points of file systems that were in use: each file is held against what was written.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod files_support;

use cli_support::Store;
use files_support::{Facts, Image, Mounted, assert_clean, can_mount, command, has, pattern, text, tool};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

/// Fills a file system with what readers get wrong.
fn fill(at: &Path, size: usize) {
    let write = |name: &str, content: &[u8]| std::fs::write(at.join(name), content).expect("written");
    std::fs::create_dir_all(at.join("etc/deep/er")).expect("made");
    write("etc/small", b"x");
    write("etc/deep/er/some.conf", &pattern(5000, 3));
    write("empty", b"");
    write("large", &pattern(size, 1));
    // Holes, and room that was taken and never written, over what was deleted.
    write("deleted", &vec![0xdd; size]);
    std::fs::File::open(at.join("deleted")).expect("there").sync_all().expect("synced");
    std::fs::remove_file(at.join("deleted")).expect("removed");
    tool("sync", &["-f", text(at)]);
    let taken = std::fs::File::create(at.join("taken")).expect("made");
    // Not every file system takes room beforehand.
    let _ = rustix::fs::fallocate(&taken, rustix::fs::FallocateFlags::empty(), 0, size as u64);
    taken.write_all_at(&pattern(10_000, 2), 20_000).expect("written");
    taken.set_len(size as u64 - 5).expect("sized");
    let sparse = std::fs::File::create(at.join("sparse")).expect("made");
    for offset in [4096, 700_000, 5_000_000] {
        sparse.write_all_at(&pattern(3000, 4), offset).expect("written");
    }
    sparse.set_len(20_000_000).expect("sized");
    for number in 0..300 {
        write(
            &format!("etc/deep/{number:03} a name that takes some room, so that a folder has several blocks"),
            &pattern(number, 5),
        );
    }
}

/// What only file systems of Unix have.
fn fill_unix(at: &Path) {
    symlink("small", at.join("etc/short-link")).expect("made");
    symlink("/etc/deep/er/some.conf", at.join("absolute-link")).expect("made");
    symlink(format!("{}small", "deep/../".repeat(21)), at.join("etc/long-link")).expect("made");
    symlink("nowhere", at.join("broken-link")).expect("made");
    std::fs::write(at.join(std::ffi::OsStr::from_bytes(b"no\xfftext\x1b[2J")), b"bytes").expect("written");
    let set =
        |name: &str, mode| std::fs::set_permissions(at.join(name), std::fs::Permissions::from_mode(mode)).expect("set");
    set("etc/small", 0o4750);
    set("etc/deep", 0o1777);
    std::os::unix::fs::chown(at.join("etc/small"), Some(70_000), Some(80_000)).expect("given");
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(at.join("etc/small"), "user.origin", b"the office", flags).expect("set");
    rustix::fs::setxattr(at.join("etc"), "user.large", &pattern(900, 6), flags).expect("set");
    // Version 2; owner, user 1234, group, mask, others.
    let entries = [(1_u16, 7_u16, u32::MAX), (2, 6, 1234), (4, 5, u32::MAX), (0x10, 7, u32::MAX), (0x20, 4, u32::MAX)];
    let entry = |(tag, rights, id): &(u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let list = [vec![2, 0, 0, 0], entries.iter().flat_map(entry).collect()].concat();
    rustix::fs::setxattr(at.join("etc/deep/er"), "system.posix_acl_access", &list, flags).expect("set");
    tool("mkfifo", &[text(&at.join("pipe"))]);
}

/// Files made, renamed, grown and removed, so that the journal is gone round in several times and has revoked blocks.
fn churn(at: &Path, rounds: usize) {
    for round in 0..rounds {
        let folder = at.join(format!("round{}", round % 7));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).expect("made");
        for number in 0..40 {
            std::fs::write(folder.join(format!("f{number}")), pattern(number * 700, round as u64)).expect("written");
        }
        let (from, to) = (folder.join("f3"), at.join(format!("moved{}", round % 5)));
        std::fs::rename(from, to).expect("renamed");
        std::fs::File::open(&folder).expect("a folder").sync_all().expect("synced");
    }
}

/// A file system of `mkfs` in use, as a point of it would be: what is in it but for the folder `late`, and its bytes.
fn in_use(store: &Store, kind: &str, mkfs: &[&str], mib: u64) -> (Facts, Vec<u8>) {
    let (image, at) = (Image::new(&store.path("image"), mib), store.path("mnt"));
    image.mkfs(mkfs);
    let _mounted = Mounted::new(&image.path, &at, kind, "rw");
    fill(&at, 1_000_000);
    fill_unix(&at);
    churn(&at, 20);
    rustix::fs::syncfs(std::fs::File::open(&at).expect("a folder")).expect("synced");
    let facts = Facts::of(&at);
    // What only the log has.
    std::fs::create_dir(at.join("late")).expect("made");
    std::fs::write(at.join("late/file"), b"late").expect("written");
    for path in ["late/file", "late", ""] {
        std::fs::File::open(at.join(path)).expect("there").sync_all().expect("synced");
    }
    (facts, image.bytes())
}

#[test]
fn each_file_comes_out_as_it_was_written_from_file_systems_in_use() {
    if !can_mount() || !["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"].into_iter().all(has) {
        return;
    }
    for (kind, mkfs, mib) in [
        ("ext2", &["mkfs.ext2", "-q", "-F", "-b", "1024"][..], 48),
        ("ext3", &["mkfs.ext3", "-q", "-F", "-b", "1024", "-J", "size=1"], 48),
        ("ext4", &["mkfs.ext4", "-q", "-F", "-J", "size=4"], 48),
        ("ext4", &["mkfs.ext4", "-q", "-F", "-O", "inline_data", "-I", "256"], 48),
        ("xfs", &["mkfs.xfs", "-q", "-f"], 300),
        ("btrfs", &["mkfs.btrfs", "-q", "-f"], 128),
    ] {
        let store = Store::new();
        let (facts, point) = in_use(&store, kind, mkfs, mib);
        store.fill_with_volumes(&[vec![("root", &point)]]);
        let (copied, scratch) = (store.path("copied"), store.path("scratch"));
        let output = command(&store, &scratch, &["cp", "-r", "/", text(&copied)]).output().expect("started");
        let (said, done) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success(), "{kind}: {said}");
        assert!(done.contains("4 links") && done.contains("1 devices, sockets and pipes were left out"), "{done}");
        let has_log = matches!(kind, "ext3" | "ext4" | "xfs");
        assert!(!has_log || said.contains("its log was replayed into a scratch file"), "{kind}: {said}");
        assert_eq!(std::fs::read(copied.join("late/file")).expect("of the log"), b"late", "{kind}");
        facts.assert_same(&Facts::of(&copied).without("late"), &format!("{mkfs:?}"));
        // What was taken and never written is no room of the copy's.
        let sparse = std::fs::metadata(copied.join("sparse")).expect("there");
        assert!(std::os::unix::fs::MetadataExt::blocks(&sparse) * 512 < sparse.len() / 4, "{kind}: {sparse:?}");
        assert_clean(&scratch);
        assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0, "{kind}");
    }
}

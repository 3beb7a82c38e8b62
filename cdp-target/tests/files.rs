//! Single files out of points, from file systems that were really made: read without being mounted, and held against what the kernel reads.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod files_support;

use cli_support::Store;
use files_support::{Image, Mounted, assert_same, can_mount, has, pattern, text, tool};
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

#[test]
fn each_kind_of_ext_is_read_as_the_kernel_reads_it() {
    if !(has("mkfs.ext4") && can_mount()) {
        return;
    }
    for (kind, options) in [
        ("ext2", &[][..]),
        ("ext2", &["-b", "1024"]),
        ("ext3", &["-J", "size=4"]),
        ("ext4", &[]),
        ("ext4", &["-b", "1024", "-J", "size=4"]),
        ("ext4", &["-O", "inline_data"]),
        ("ext4", &["-O", "^metadata_csum,^64bit,^flex_bg"]),
        ("ext4", &["-O", "meta_bg,^resize_inode", "-b", "1024"]),
        ("ext4", &["-O", "bigalloc", "-C", "16384"]),
        ("ext4", &["-I", "128"]),
    ] {
        let store = Store::new();
        let image = Image::new(&store.path("image"), 64);
        image.mkfs(&[&[&format!("mkfs.{kind}"), "-q", "-F"], options].concat());
        let at = store.path("mnt");
        {
            let mounted = Mounted::new(&image.path, &at, kind, "rw");
            fill(&at, 3_000_000);
            fill_unix(&at);
            drop(mounted);
        }
        let point = image.bytes();
        store.fill_with_volumes(&[vec![("root", &point)]]);
        let copied = store.path("copied");
        let said = store.done(&["files", "paris/main/root", "--at", "latest", "cp", "-r", "/", text(&copied)]);
        assert!(said.contains("4 links") && said.contains("1 devices, sockets and pipes were left out"), "{said}");
        let _mounted = Mounted::new(&image.path, &at, kind, "ro");
        assert_same(&at, &copied, &format!("{kind} {options:?}"));
    }
}

/// A point of a file system in use, its journal gone round in: what is read has to be what the kernel has after a replay.
#[test]
fn a_journal_that_was_not_replayed_is_replayed_in_memory() {
    if !(has("mkfs.ext4") && can_mount()) {
        return;
    }
    for (kind, options) in [
        ("ext4", &["-J", "size=4", "-b", "1024"][..]),
        ("ext4", &["-J", "size=4"]),
        ("ext4", &["-O", "^metadata_csum,^64bit", "-J", "size=4"]),
        ("ext3", &["-b", "1024", "-J", "size=1"]),
    ] {
        let store = Store::new();
        let image = Image::new(&store.path("image"), 48);
        image.mkfs(&[&[&format!("mkfs.{kind}"), "-q", "-F"], options].concat());
        let at = store.path("mnt");
        let mounted = Mounted::new(&image.path, &at, kind, "rw");
        fill(&at, 500_000);
        let mut points = Vec::new();
        for _ in 0..4 {
            churn(&at, 9);
            points.push(image.bytes());
        }
        drop(mounted);
        let volumes: Vec<_> = points.iter().map(|point| vec![("root", point.as_slice())]).collect();
        store.fill_with_volumes(&volumes);
        for (number, point) in (1..).zip(&points) {
            let flags = u32::from_le_bytes(*point[1024 + 96..].first_chunk().expect("a superblock"));
            assert_ne!(flags & 4, 0, "its journal is to be replayed");
            let copied = store.path(&format!("copied{number}"));
            let at_point = number.to_string();
            store.done(&["files", "paris/main", "--at", &at_point, "cp", "-r", "/", text(&copied)]);
            // The kernel replays it on a copy.
            std::fs::write(&image.path, point).expect("written");
            let _mounted = Mounted::new(&image.path, &at, kind, "rw");
            assert_same(&at, &copied, &format!("{kind} {options:?}, point {number}"));
        }
    }
}

//! Small files without which everything else is worth nothing: kept twice, and known by a hash.
//!
//! `NAME` holds the bytes as others may read them (PEM, JSON, a key); `NAME.copy` holds the same behind their BLAKE3
//! (`docs/format/kept.md`). A copy that verifies is believed, whatever the file beside it says: one flipped bit in the escrow
//! key would take every backup with it, one in the registry an office. Where there is no copy, as older programs left it, or it
//! does not verify, the file is believed. Reading writes nothing; `mend` does.

use cdp_seams::storage::{Storage, read_all, replace};
use std::io;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// First bytes of a copy.
pub const MAGIC: [u8; 8] = *b"CDPKEPT1";
/// Bytes before the content.
pub const HEADER_BYTES: usize = MAGIC.len() + 32;

/// What was found of a file and its copy.
struct Found {
    bytes: Zeroizing<Vec<u8>>,
    /// What is wrong with one of the two, though the bytes are good.
    trouble: Option<&'static str>,
}

/// Where the copy of `path` is.
#[must_use]
pub fn copy_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().expect("a file has a name").to_owned();
    name.push(".copy");
    path.with_file_name(name)
}

/// The bytes of a copy.
#[must_use]
pub fn encode(content: &[u8]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new([&MAGIC, blake3::hash(content).as_bytes().as_slice(), content].concat())
}

/// The content of a copy that verifies.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<&[u8]> {
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (hash, content) = rest.split_first_chunk::<32>()?;
    (*magic == MAGIC && blake3::hash(content) == *hash).then_some(content)
}

/// Puts `bytes` in the place of the file and of its copy.
///
/// The copy goes first. A crash before it leaves both as they were; after it, the file is behind its copy, which is believed,
/// and is mended at the next start.
///
/// # Errors
/// As the file system says.
pub fn write(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(storage, &copy_of(path), &encode(bytes))?;
    replace(storage, path, bytes)
}

/// Reads a file of at most `bytes_max`, from its copy where that verifies. Says in the log what is wrong with one of them.
///
/// # Errors
/// As the file system says of the file, where there is no copy to take its place.
pub fn read(storage: &dyn Storage, path: &Path, bytes_max: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let found = find(storage, path, bytes_max)?;
    if let Some(trouble) = found.trouble {
        tracing::warn!(path = %path.display(), "{trouble}");
    }
    Ok(found.bytes)
}

/// Writes the file and its copy anew where one of them is not as it should be; tells whether it did. For the one writer.
///
/// # Errors
/// As the file system says.
pub fn mend(storage: &dyn Storage, path: &Path, bytes_max: u64) -> io::Result<bool> {
    let found = find(storage, path, bytes_max)?;
    let is_whole = found.trouble.is_none() && storage.open(&copy_of(path)).is_ok();
    if !is_whole {
        write(storage, path, &found.bytes)?;
    }
    Ok(!is_whole)
}

fn find(storage: &dyn Storage, path: &Path, bytes_max: u64) -> io::Result<Found> {
    let file = read_all(storage, path, bytes_max).map(Zeroizing::new);
    let copy = match read_all(storage, &copy_of(path), bytes_max + HEADER_BYTES as u64).map(Zeroizing::new) {
        Ok(copy) => copy,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found { bytes: file?, trouble: None }),
        Err(_) => return Ok(Found { bytes: file?, trouble: Some("its copy cannot be read; the file is taken") }),
    };
    let Some(content) = decode(&copy) else {
        return Ok(Found { bytes: file?, trouble: Some("its copy is damaged; the file is taken") });
    };
    let trouble = match &file {
        Ok(file) if file.as_slice() == content => None,
        Ok(_) => Some("damaged, or changed by hand; its copy is taken"),
        Err(_) => Some("cannot be read; its copy is taken"),
    };
    Ok(Found { bytes: Zeroizing::new(content.to_vec()), trouble })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::storage::sim::{Fault, SimStorage};

    const PATH: &str = "/store/key";

    fn disk() -> SimStorage {
        let disk = SimStorage::new(1);
        disk.create_dir_all(Path::new("/store")).expect("made");
        disk
    }

    fn put(disk: &SimStorage, path: &Path, bytes: &[u8]) {
        replace(disk, path, bytes).expect("written");
    }

    #[test]
    fn a_bit_of_either_is_mended_from_the_other() {
        let (path, copy) = (Path::new(PATH), copy_of(Path::new(PATH)));
        for damaged in [path, &copy] {
            let len = if damaged == path { 6 } else { 6 + HEADER_BYTES as u64 };
            for bit in 0..len * 8 {
                let disk = disk();
                write(&disk, path, b"secret").expect("written");
                disk.flip_bit(damaged, bit);
                assert_eq!(*read(&disk, path, 100).expect("read"), b"secret", "{} bit {bit}", damaged.display());
                assert!(mend(&disk, path, 100).expect("mended"));
                assert!(!mend(&disk, path, 100).expect("nothing to mend"));
                assert_eq!(read_all(&disk, path, 100).expect("read"), b"secret");
            }
        }
    }

    #[test]
    fn either_may_be_missing_but_not_both() {
        let (path, copy) = (Path::new(PATH), copy_of(Path::new(PATH)));
        let disk = disk();
        assert_eq!(read(&disk, path, 100).expect_err("none").kind(), io::ErrorKind::NotFound);
        put(&disk, path, b"old");
        assert_eq!(*read(&disk, path, 100).expect("as older programs left it"), b"old");
        assert!(mend(&disk, path, 100).expect("the copy is made"));
        disk.remove(path).expect("removed");
        assert_eq!(*read(&disk, path, 100).expect("read"), b"old");
        disk.remove(&copy).expect("removed");
        assert!(read(&disk, path, 100).is_err());
    }

    #[test]
    fn a_crash_anywhere_leaves_the_old_or_the_new() {
        let path = Path::new(PATH);
        let mut seen = [0, 0];
        for calls in 0..20 {
            for seed in 0..20 {
                let disk = SimStorage::new(seed);
                disk.create_dir_all(Path::new("/store")).expect("made");
                write(&disk, path, b"old").expect("written");
                disk.fault_at(disk.calls() + calls, Fault::PowerCut);
                let is_written = write(&disk, path, b"newer").is_ok();
                disk.clear_faults();
                disk.power_cut();
                disk.restart();
                let now = read(&disk, path, 100).expect("read");
                assert!(*now == b"newer" || (*now == b"old" && !is_written), "{calls}: {now:?}");
                seen[usize::from(*now == b"newer")] += 1;
                mend(&disk, path, 100).expect("mended");
                assert_eq!(read_all(&disk, path, 100).expect("read"), *now);
            }
        }
        assert!(seen[0] > 0 && seen[1] > 0);
    }
}

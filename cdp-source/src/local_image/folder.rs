//! A folder of images: which there are, which of them stay, and whether it is the folder at all.
//!
//! Everything of a group lies in `FOLDER/GROUP`, with a marker that `init` puts there once. Without it nothing is written: a mount point whose disk
//! or share is gone is an empty folder like any other. Nothing is made but `init`'s folder, and nothing removed but images of the group, what was left
//! of one half made, and their manifests.

use super::format::{Footer, FormatError};
use super::reader::ImageFile;
use super::{ImageError, failed};
use crate::agent::status::rfc3339;
use crate::unprotected;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{BLOCK_BYTES, GroupId, Timestamp};
use cdp_seams::storage::{self, Storage, StorageFile};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const VERSION: u32 = 1;
const MARKER: &str = "images.json";
const PARTIAL: &str = "making.partial";
const TABLE: &str = "making.table";
const SUFFIX: &str = "cdpimage";
const JSON_BYTES_MAX: u64 = 1 << 20;

/// The marker.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    version: u32,
    group: String,
    group_id: GroupId,
}

/// A group's images.
pub struct ImageFolder {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    group: GroupId,
    /// The marker as it was: file system and inode.
    marker: Option<(u64, u64)>,
}

/// The files of an image that is begun.
pub struct Begun {
    /// The image.
    pub file: Box<dyn StorageFile>,
    /// Its table.
    pub table: Box<dyn StorageFile>,
    /// Where the image is, until it has its name.
    pub path: PathBuf,
}

/// An image that is there.
pub struct Listed {
    /// Its file.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: u64,
    /// What it is of.
    pub footer: Footer,
    /// What came of it when it was read again last.
    pub checked: Option<Checked>,
}

/// What came of reading an image again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// When, RFC 3339.
    pub time: String,
    /// What is damaged; `None` where it is whole.
    pub damage: Option<String>,
}

/// What is in a folder.
#[derive(Default)]
pub struct Listing {
    /// The images, newest first.
    pub images: Vec<Listed>,
    /// What has an image's name and cannot be read as one.
    pub unreadable: Vec<(PathBuf, ImageError)>,
}

/// Makes a folder ready for a group's images; gives where they will be.
///
/// # Errors
/// Where there is no such folder, it lies on a protected volume, or it is another group's.
pub fn init(
    storage: &Arc<dyn Storage>,
    folder: &Path,
    volumes: &[PathBuf],
    (name, group): (&str, GroupId),
) -> Result<PathBuf, ImageError> {
    if !folder.is_dir() {
        return Err(ImageError::Folder(format!(
            "{} is no folder: make it, or mount what it lies on",
            folder.display()
        )));
    }
    refuse_protected(&**storage, folder, volumes)?;
    let path = folder.join(name);
    match read_marker(&**storage, &path) {
        Ok(marker) if marker.group_id == group => return Ok(path),
        Ok(marker) => {
            return Err(ImageError::OtherGroup { path, found: marker.group_id, wanted: group });
        }
        Err(ImageError::NoMarker(_)) => {}
        Err(error) => return Err(error),
    }
    storage.create_dir_all(&path).map_err(failed("make folder", &path))?;
    let marker = Marker { version: VERSION, group: name.to_owned(), group_id: group };
    let text = serde_json::to_string_pretty(&marker).expect("a marker is plain JSON");
    // A crash before it is in place leaves a folder without a marker, which is made ready again.
    let marker = path.join(MARKER);
    storage::replace(&**storage, &marker, text.as_bytes()).map_err(failed("write", &marker))?;
    Ok(path)
}

/// An image on a volume that it is of would go with it, and dirty it while it is made.
///
/// # Errors
/// Where the folder lies on one of the volumes.
pub fn refuse_protected(storage: &dyn Storage, folder: &Path, volumes: &[PathBuf]) -> Result<(), ImageError> {
    let Some(volume) = unprotected::lies_on(storage, folder, volumes) else { return Ok(()) };
    let (folder, volume) = (folder.display(), volume.display());
    Err(ImageError::Folder(format!(
        "{folder} lies on {volume}, which is protected: images belong on another disk or a share"
    )))
}

fn read_marker(storage: &dyn Storage, folder: &Path) -> Result<Marker, ImageError> {
    let path = folder.join(MARKER);
    let bytes = match storage::read_all(storage, &path, JSON_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ImageError::NoMarker(path)),
        other => other.map_err(failed("read", &path))?,
    };
    let marker = serde_json::from_slice::<Marker>(&bytes).ok();
    let damaged = || ImageError::Damaged { path: path.clone(), what: "it is no marker of a folder of images".into() };
    let marker = marker.ok_or_else(damaged)?;
    let version = u16::try_from(marker.version).unwrap_or(u16::MAX);
    let newer = || ImageError::Format { path: path.clone(), reason: FormatError::Version(version) };
    (marker.version == VERSION).then_some(marker).ok_or_else(newer)
}

/// The group whose images are in `folder`, and where, as the marker says: of the folder that is configured, or of the group's own.
///
/// # Errors
/// Where there is no marker.
pub fn find(storage: &dyn Storage, folder: &Path, name: &str) -> Result<(PathBuf, GroupId), ImageError> {
    match read_marker(storage, &folder.join(name)) {
        Ok(marker) => Ok((folder.join(name), marker.group_id)),
        Err(ImageError::NoMarker(missing)) => match read_marker(storage, folder) {
            Ok(marker) => Ok((folder.to_owned(), marker.group_id)),
            Err(ImageError::NoMarker(_)) => Err(ImageError::NoMarker(missing)),
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    }
}

impl ImageFolder {
    /// The images of a group at `path`, where its marker is.
    ///
    /// # Errors
    /// Where the marker is missing, damaged or another group's.
    pub fn open(storage: Arc<dyn Storage>, path: &Path, group: GroupId) -> Result<Self, ImageError> {
        let marker = read_marker(&*storage, path)?;
        if marker.group_id != group {
            return Err(ImageError::OtherGroup { path: path.to_owned(), found: marker.group_id, wanted: group });
        }
        let marker = identity(&path.join(MARKER));
        Ok(Self { storage, path: path.to_owned(), group, marker })
    }

    /// Whether it is still the folder that was opened, and not what was under it.
    ///
    /// # Errors
    /// Where it is not.
    pub fn check(&self) -> Result<(), ImageError> {
        let marker = self.path.join(MARKER);
        let now = identity(&marker);
        if now.is_some() && now == self.marker { Ok(()) } else { Err(ImageError::NoMarker(marker)) }
    }

    /// Begins an image: removes what is left of one that was not finished, and gives the files of the image and its table.
    ///
    /// # Errors
    /// Where the folder is gone, or they cannot be made.
    pub fn begin(&self) -> Result<Begun, ImageError> {
        self.clean()?;
        let (partial, table) = (self.path.join(PARTIAL), self.path.join(TABLE));
        let file = self.storage.create_new(&partial).map_err(failed("make", &partial))?;
        let table_file = self.storage.create_new(&table).map_err(failed("make", &table))?;
        Ok(Begun { file, table: table_file, path: partial })
    }

    /// Removes what is left of an image that was not finished.
    ///
    /// # Errors
    /// Where the folder is gone, or a file cannot be removed.
    pub fn clean(&self) -> Result<(), ImageError> {
        self.check()?;
        [PARTIAL, TABLE].iter().try_for_each(|name| self.remove(&self.path.join(name)))
    }

    fn remove(&self, path: &Path) -> Result<(), ImageError> {
        match self.storage.remove(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(failed("remove", path)),
        }
    }

    /// The image that was begun is finished, durable and proved: it gets its name. Gives its file.
    ///
    /// A crash before the folder's sync leaves the partial or the image, whole either way; a table that is left goes with the next image.
    ///
    /// # Errors
    /// Where the folder is gone, or cannot be written.
    pub fn publish(&self, footer: &Footer, bytes: u64, checked: Checked) -> Result<PathBuf, ImageError> {
        self.check()?;
        let time: String = rfc3339(footer.cut_time).chars().filter(|c| !matches!(c, '-' | ':')).take(15).collect();
        let path = self.path.join(format!("{time}Z-{}.{SUFFIX}", footer.epoch));
        let listed = Listed { path: path.clone(), bytes, footer: footer.clone(), checked: Some(checked) };
        self.write_manifest(&listed)?;
        let partial = self.path.join(PARTIAL);
        self.storage.rename(&partial, &path).map_err(failed("name", &path))?;
        self.storage.sync_dir(&self.path).map_err(failed("sync", &self.path))?;
        self.remove(&self.path.join(TABLE))?;
        Ok(path)
    }

    /// Writes what is told of an image in the file beside it.
    ///
    /// # Errors
    /// Where the folder is gone, or cannot be written.
    pub fn write_manifest(&self, listed: &Listed) -> Result<(), ImageError> {
        self.check()?;
        let path = listed.path.with_extension("json");
        let mut text = serde_json::to_string_pretty(&listed.document()).expect("a manifest is plain JSON");
        text.push('\n');
        storage::replace(&*self.storage, &path, text.as_bytes()).map_err(failed("write", &path))
    }

    /// The images that are there.
    ///
    /// # Errors
    /// Where the folder cannot be read.
    pub fn list(&self, key: &DataKey) -> Result<Listing, ImageError> {
        let mut listing = Listing::default();
        let names = self.storage.list(&self.path).map_err(failed("list", &self.path))?;
        for name in names.into_iter().filter(|name| name.extension().is_some_and(|suffix| suffix == SUFFIX)) {
            let path = self.path.join(name);
            match self.look(&path, key) {
                Ok(listed) => listing.images.push(listed),
                Err(error) => listing.unreadable.push((path, error)),
            }
        }
        listing.images.sort_by_key(|listed| std::cmp::Reverse((listed.footer.cut_time.0, listed.footer.epoch)));
        Ok(listing)
    }

    fn look(&self, path: &Path, key: &DataKey) -> Result<Listed, ImageError> {
        let image = ImageFile::open(&*self.storage, path, self.group, key)?;
        let checked = storage::read_all(&*self.storage, &path.with_extension("json"), JSON_BYTES_MAX).ok();
        let checked = checked.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let checked = checked.and_then(|value| serde_json::from_value(value.get("checked")?.clone()).ok());
        Ok(Listed { path: path.to_owned(), bytes: image.len_bytes()?, footer: image.footer().clone(), checked })
    }

    /// Removes images that are too many, `just_made` not being one of them; gives their files. What cannot be read as an image of the group is left.
    ///
    /// # Errors
    /// Where the folder is gone, or one cannot be removed.
    pub fn prune(&self, key: &DataKey, keep: usize, just_made: &Path) -> Result<Vec<PathBuf>, ImageError> {
        self.check()?;
        let mut images = self.list(key)?.images;
        // Whatever its time says: a clock that was set back must not make it the oldest.
        images.sort_by_key(|listed| listed.path != just_made);
        let unreadable: Vec<Option<u64>> =
            images.iter().map(|listed| Some(listed.unreadable_blocks()).filter(|_| !listed.is_damaged())).collect();
        let mut gone = Vec::new();
        for at in to_remove(&unreadable, keep) {
            let path = &images[at].path;
            self.remove(path)?;
            self.remove(&path.with_extension("json"))?;
            gone.push(path.clone());
        }
        Ok(gone)
    }
}

/// Which of some images go, newest first, each with the blocks that the device could not read, `None` where it is damaged: those that have at
/// least `keep` newer ones that are whole. So the newest whole one never does; nor does the newest of those that lack the fewest blocks: images of a dying
/// disk do not push out the last good one.
#[must_use]
pub fn to_remove(unreadable: &[Option<u64>], keep: usize) -> Vec<usize> {
    let fewest = unreadable.iter().flatten().min();
    let best = unreadable.iter().position(|blocks| blocks.as_ref() == fewest && blocks.is_some());
    let mut newer = 0;
    let mut gone = Vec::new();
    for (at, blocks) in unreadable.iter().enumerate() {
        if newer >= keep.max(1) && best != Some(at) {
            gone.push(at);
        }
        newer += usize::from(blocks.is_some());
    }
    gone
}

impl Listed {
    /// Whether it was found damaged when it was read again last.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.checked.as_ref().is_some_and(|checked| checked.damage.is_some())
    }

    /// Blocks that the device could not read, of all volumes.
    #[must_use]
    pub fn unreadable_blocks(&self) -> u64 {
        self.footer.volumes.iter().map(|entry| entry.unreadable_blocks).sum()
    }

    /// What is told of it, as JSON.
    #[must_use]
    pub fn document(&self) -> Value {
        let Self { path, bytes, footer, checked } = self;
        let volumes: Vec<Value> = footer
            .volumes
            .iter()
            .map(|entry| {
                json!({
                    "name": entry.volume.name,
                    "slot": entry.volume.slot,
                    "size_bytes": entry.volume.size_bytes,
                    "content_bytes": entry.content_blocks * BLOCK_BYTES as u64,
                    "unreadable_bytes": entry.unreadable_blocks * BLOCK_BYTES as u64,
                    "blake3": blake3::Hash::from(entry.image_hash).to_hex().to_string(),
                })
            })
            .collect();
        json!({
            "image": path.file_name().map(|name| name.to_string_lossy()),
            "group_id": footer.group,
            "epoch": footer.epoch,
            "time": rfc3339(footer.cut_time),
            "class": footer.class,
            "label": footer.label,
            "made": rfc3339(footer.made),
            "bytes": bytes,
            "volumes": volumes,
            "checked": checked,
        })
    }
}

impl Checked {
    /// It was found whole, or so damaged.
    #[must_use]
    pub fn at(time: Timestamp, damage: Option<String>) -> Self {
        Self { time: rfc3339(time), damage }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::stat(path).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests;

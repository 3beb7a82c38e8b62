//! Removing the files that nobody needs any more: not the manifest, and no reader of an older one.
//!
//! What is ours and what is not is told by the name alone; a file of any other name is left alone. Crash-safe without a list: what
//! the manifest does not name is nobody's. The caller alone builds packs meanwhile.

use crate::checkpoint::builder::building;
use crate::checkpoint::index;
use crate::journal::file::{FileId, checkpoints, packs};
use crate::journal::manifest::Checkpoint;
use crate::journal::{GroupView, JournalError, Manifest, lease, repairs};
use cdp_seams::storage::Storage;
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

/// Removes what is nobody's; `false` where somebody still reads by an older manifest, and nothing was removed.
/// `leased`: a view of the server does.
///
/// # Errors
/// As the storage says.
pub fn sweep(view: &GroupView, leased: bool) -> Result<bool, JournalError> {
    let (storage, folder) = view.place();
    let storage = storage.as_ref();
    let (manifest, _) = Manifest::read(storage, folder)?;
    let oldest = lease::oldest(storage, folder).map_err(JournalError::io("look at leases of", folder))?;
    if leased || oldest.is_some_and(|oldest| oldest < manifest.change) {
        return Ok(false);
    }
    for stale in repairs::stale(storage, folder, &manifest).map_err(JournalError::io("look at repairs of", folder))? {
        storage.remove(&stale).map_err(JournalError::io("remove", &stale))?;
    }
    sweep_folder(storage, &folder.join("journal"), &|name| is_stale_segment(name, &manifest))?;
    if let Some(named) = named_packs(view, &manifest)? {
        let building = building(storage, folder);
        sweep_folder(storage, &packs(folder), &|name| {
            let of_build = building.is_some_and(|epoch| name.ends_with(&format!("-{:016x}.pack", epoch.0)));
            (has_kind(name, "pack") && !named.contains(name) && !of_build) || name.ends_with(".pack.new")
        })?;
        sweep_folder(storage, &checkpoints(folder), &|name| {
            let is_of =
                |checkpoint: &Checkpoint| checkpoint.path(Path::new("")).file_name().is_some_and(|of| of == name);
            has_kind(name, "image") && !manifest.checkpoints.iter().any(is_of)
        })?;
    }
    Ok(true)
}

/// Names of the packs of all checkpoints; `None` where an image index cannot be read, and they cannot all be known.
fn named_packs(view: &GroupView, manifest: &Manifest) -> Result<Option<HashSet<String>>, JournalError> {
    let (storage, folder) = view.place();
    for checkpoint in &manifest.checkpoints {
        let opened = index::ImageIndex::open(storage.as_ref(), folder, manifest.identity.group, checkpoint)?;
        let Some(image) = opened else { return Ok(None) };
        for record in image.records() {
            let (_, _, record) = record.map_err(JournalError::io("read", &checkpoint.path(folder)))?;
            if record.is_none() {
                return Ok(None);
            }
        }
    }
    let packs = crate::checkpoint::packs(storage.as_ref(), folder, manifest);
    Ok(Some(packs.into_iter().map(|pack| file_name(pack.id)).collect()))
}

fn file_name(file: FileId) -> String {
    let path = file.path(Path::new(""));
    path.file_name().expect("a file has a name").to_string_lossy().into_owned()
}

/// Whether a name in the journal's folder is that of a segment that was rewritten, or of one that nothing came of.
fn is_stale_segment(name: &str, manifest: &Manifest) -> bool {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let known = |number: u64, revision: u64| {
        manifest.sealed.iter().any(|sealed| (sealed.number, sealed.revision) == (number, revision))
    };
    if let Some(number) = name.strip_suffix(".seg").filter(|number| number.len() == 16).and_then(hex) {
        return number < manifest.open && !known(number, 0);
    }
    let thin = name.strip_suffix(".new").unwrap_or(name).strip_suffix(".thin").and_then(|name| name.split_once('.'));
    let thin = thin.and_then(|(number, revision)| Some((hex(number)?, hex(revision)?)));
    thin.is_some_and(|(number, revision)| has_kind(name, "new") || !known(number, revision))
}

fn has_kind(name: &str, kind: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| extension == kind)
}

fn sweep_folder(storage: &dyn Storage, folder: &Path, is_stale: &dyn Fn(&str) -> bool) -> Result<(), JournalError> {
    let names = match storage.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed.map_err(JournalError::io("list", folder))?,
    };
    let stale: Vec<PathBuf> = names.into_iter().filter(|name| name.to_str().is_some_and(is_stale)).collect();
    for name in &stale {
        let path = folder.join(name);
        storage.remove(&path).map_err(JournalError::io("remove", &path))?;
    }
    if stale.is_empty() { Ok(()) } else { storage.sync_dir(folder).map_err(JournalError::io("sync folder", folder)) }
}

/// Bytes of the group's segments, packs and image indexes on the disk, whether or not anything names them.
///
/// # Errors
/// As the storage says.
pub fn held_bytes(view: &GroupView) -> Result<u64, JournalError> {
    let (storage, folder) = view.place();
    let mut bytes = 0;
    for folder in [folder.join("journal"), packs(folder), checkpoints(folder)] {
        let names = match storage.list(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            listed => listed.map_err(JournalError::io("list", &folder))?,
        };
        for name in names {
            let path = folder.join(name);
            match storage.open(&path) {
                // It went meanwhile, or is no file.
                Err(error) if crate::journal::is_no_file(&error) => {}
                opened => {
                    let file = opened.map_err(JournalError::io("open", &path))?;
                    bytes += file.len().map_err(JournalError::io("look at", &path))?;
                }
            }
        }
    }
    Ok(bytes)
}

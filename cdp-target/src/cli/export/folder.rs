//! The folder of a whole group's images: goes again where it was made for an export that failed.

use super::Arguments;
use crate::cli::context;
use crate::cli::failure::Failure;
use crate::restore::output::OutputError;
use std::path::PathBuf;

/// A folder that is not kept yet.
pub(super) struct FolderGuard(Option<PathBuf>);

impl FolderGuard {
    /// Makes the folder where it is not there.
    pub(super) fn prepare(arguments: &Arguments) -> Result<Self, Failure> {
        let folder = &arguments.output;
        if arguments.group.volume.is_some() {
            return Ok(Self(None));
        }
        match rustix::fs::stat(folder) {
            Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() => return Ok(Self(None)),
            Ok(_) => {
                return Err(Failure::mistake(format!("{} is no folder", folder.display()))
                    .hint("a whole group goes into a folder; OFFICE/GROUP/VOLUME names one volume"));
            }
            Err(_) => {}
        }
        let made = context::storage().create_dir_all(folder);
        made.map_err(|source| OutputError::System { verb: "make folder", path: folder.clone(), source })?;
        Ok(Self(Some(folder.clone())))
    }

    /// It stays.
    pub(super) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for FolderGuard {
    fn drop(&mut self) {
        if let Some(folder) = &self.0 {
            // Refused where something is in it, which is right.
            let _ = rustix::fs::rmdir(folder);
        }
    }
}

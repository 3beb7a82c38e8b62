//! Where a restore asks its point back from: the target over a line, or a local image.
//!
//! From an image nothing is needed but the group's key: no configuration, no identity, no agent. Which group it is says the state folder, or,
//! on a machine that has the key and nothing else, the images' own marker; that the key is theirs is proved by the first byte that is read.

use super::Office;
use crate::cli::RestoreArgs;
use crate::cli::failure::UserError;
use crate::cli::run;
use crate::config::{TrackerChoice, VolumeConfig};
use crate::connect::Identity;
use crate::local_image::ImageError;
use crate::local_image::folder::{self, ImageFolder, Listed};
use crate::local_image::named;
use crate::local_image::reader::{self, ImageFile};
use crate::local_image::source::ImagePoint;
use crate::restore::line::{LineError, PointLine, PointSource};
use crate::state::StateFolder;
use anyhow::{Context, Result};
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{GroupId, Timestamp};
use cdp_seams::clock::{Clock, SystemClock};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a point is asked back from.
pub(super) enum Origin {
    /// The target, as this office.
    Target(Box<Identity>),
    /// The images of a group's folder, or one image.
    Images {
        /// The folder or the image.
        path: PathBuf,
        /// The image that was opened.
        image: RefCell<Option<PathBuf>>,
    },
}

impl Origin {
    pub(super) fn target(state: &StateFolder, group: &str) -> Result<(Self, GroupId)> {
        let identity = run::load(state)?;
        let facts = state.group(group)?.with_context(|| format!("group {group} has no state"))?;
        Ok((Self::Target(Box::new(identity)), facts.group))
    }

    pub(super) fn images(state: &StateFolder, group: &str, path: &Path) -> Result<(Self, GroupId)> {
        let storage = &**state.storage();
        let (path, found) = if path.is_dir() {
            folder::find(storage, path, group)?
        } else {
            (path.to_owned(), reader::group_of(storage, path)?)
        };
        let known = state.group(group)?.map(|facts| facts.group);
        if let Some(wanted) = known.filter(|known| *known != found) {
            return Err(ImageError::OtherGroup { path, found, wanted }.into());
        }
        Ok((Self::Images { path, image: RefCell::default() }, found))
    }

    pub(super) const fn is_image(&self) -> bool {
        matches!(self, Self::Images { .. })
    }

    /// The image that was opened.
    pub(super) fn image(&self) -> Option<PathBuf> {
        match self {
            Self::Target(_) => None,
            Self::Images { image, .. } => image.borrow().clone(),
        }
    }

    /// A volume that the image knows and this machine does not: it has no device here.
    pub(super) fn volume(&self, state: &StateFolder, group: GroupId, args: &RestoreArgs) -> Result<VolumeConfig> {
        let listed = self.find(state, group, &state.data_key(&args.group)?, &args.at)?;
        let name = args.volume.as_deref().unwrap_or_default();
        let volumes = &listed.footer.volumes;
        let found = volumes.iter().find(|entry| entry.volume.name == name).map(|entry| &entry.volume);
        let found = found.ok_or_else(|| {
            let names: Vec<&str> = volumes.iter().map(|entry| entry.volume.name.as_str()).collect();
            UserError::new(format!("the image has no volume named {name:?}"))
                .hint(format!("it has {}", names.join(", ")))
        })?;
        let (name, slot) = (found.name.clone(), found.slot);
        Ok(VolumeConfig { name, slot, device: PathBuf::new(), tracker: TrackerChoice::Auto })
    }

    fn find(&self, state: &StateFolder, group: GroupId, key: &DataKey, at: &str) -> Result<Listed> {
        let Self::Images { path, .. } = self else { anyhow::bail!("the target has no images") };
        let now = Timestamp(SystemClock::new().wall_ms());
        let mut images = if path.is_dir() {
            let listing = ImageFolder::open(Arc::clone(state.storage()), path, group)?.list(key)?;
            for (path, error) in &listing.unreadable {
                eprintln!("warning: {} is passed over: {error}", path.display());
            }
            listing.images
        } else {
            let image = ImageFile::open(&**state.storage(), path, group, key)?;
            vec![Listed {
                path: path.clone(),
                bytes: image.len_bytes()?,
                footer: image.footer().clone(),
                checked: None,
            }]
        };
        let found = named::find(&images, at, now)?.path.clone();
        let at = images.iter().position(|listed| listed.path == found).context("it was just found")?;
        Ok(images.swap_remove(at))
    }

    pub(super) fn open(&self, office: &Office<'_>, at: &str) -> Result<Box<dyn PointSource>> {
        match self {
            Self::Target(identity) => {
                let opened = PointLine::open((**identity).clone(), office.group, at);
                if opened.as_ref().is_err_and(LineError::is_lost)
                    && let Some(config) =
                        office.config.groups.get(&office.args.group).and_then(|group| group.local_image.as_ref())
                {
                    let folder = config.folder.display();
                    eprintln!("a local image may do: --from {folder}; `cdp-source image ls` lists them");
                }
                Ok(Box::new(opened?))
            }
            Self::Images { image, .. } => {
                let key = office.state.data_key(&office.args.group)?;
                let listed = self.find(office.state, office.group, &key, at)?;
                if let Some(damage) = listed.checked.and_then(|checked| checked.damage) {
                    eprintln!("warning: the image was found damaged: {damage}");
                }
                let opened = ImageFile::open(&**office.state.storage(), &listed.path, office.group, &key)?;
                image.replace(Some(listed.path));
                Ok(Box::new(ImagePoint::new(opened)))
            }
        }
    }
}

//! A point that is open, the partition that is meant, and its file system, mounted.
//!
//! Invariant: what is attached to the kernel for it ends with it, and where a signal ends us.

use super::{Arguments, What};
use crate::catalog::CatalogError;
use crate::cli::arguments::GroupPath;
use crate::cli::context;
use crate::cli::failure::Failure;
use crate::cli::nbd::refused;
use crate::drill::probe::Kind;
use crate::files::attach::{Attached, Source, remove_leftovers};
use crate::files::partition::{Partition, partitions};
use crate::files::tree::Tree;
use crate::nbd::Disk;
use crate::nbd::points::{OpenPoint, Points};
use crate::points::Instant;
use cdp_protocol::record::Volume;
use cdp_protocol::units::Epoch;
use cdp_seams::clock::{Clock, SystemClock};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A point that is open.
pub(super) struct Session<'a> {
    arguments: &'a Arguments,
    points: Points,
    pub(super) point: Arc<OpenPoint>,
    pub(super) volume: Volume,
    pub(super) partitions: Vec<Partition>,
    clock: Arc<dyn Clock>,
}

/// The file system that is meant.
pub(super) struct Opened {
    // In this order: what is attached ends when nobody reads it any more.
    pub(super) tree: Tree,
    _attached: Attached,
    pub(super) partition: Partition,
    /// Turns true when the operator ends the command.
    pub(super) stop: Arc<AtomicBool>,
}

impl<'a> Session<'a> {
    /// Opens the point, and looks at the volume.
    pub(super) fn open(arguments: &'a Arguments) -> Result<Self, Failure> {
        let store = context::open(&arguments.data)?;
        let authority = context::authority(&store)?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let GroupPath { office, group, volume } = &arguments.volume;
        let points = Points::new(&store, authority, office, group, Arc::clone(&clock));
        let point = points.open(&arguments.at).map_err(refused)?;
        let volume = find(point.image.volumes(), volume.as_deref())?;
        if let Some(what) = &point.damaged {
            eprintln!("warning: point {} is damaged, and what is missing cannot be read: {what}", point.epoch());
        }
        let disk = Disk::of_point(Arc::clone(&point), volume.clone());
        let (partitions, broken) = partitions(&disk)?;
        warn(&broken);
        Ok(Self { arguments, points, point, volume, partitions, clock })
    }

    pub(super) fn office(&self) -> &str {
        &self.arguments.volume.office
    }

    pub(super) fn group(&self) -> &str {
        &self.arguments.volume.group
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.point.epoch()
    }

    pub(super) fn time(&self) -> Instant {
        Instant(self.point.time)
    }

    /// The partition that is meant, where that can be told.
    pub(super) fn chosen(&self) -> Option<&Partition> {
        let mut with_files = self.partitions.iter().filter(|partition| partition.has_files());
        match (self.arguments.partition, with_files.next(), with_files.next()) {
            (Some(number), ..) => self.partitions.iter().find(|partition| partition.place.partition == Some(number)),
            (None, Some(only), None) => Some(only),
            // It says of itself why it has none.
            (None, None, _) if self.partitions.len() == 1 => self.partitions.first(),
            _ => None,
        }
    }

    /// Whether the operator named one.
    pub(super) const fn is_named(&self) -> bool {
        self.arguments.partition.is_some()
    }

    /// Opens the file system that is meant.
    pub(super) fn file_system(self) -> Result<Opened, Failure> {
        let Some(partition) = self.chosen().cloned() else { return Err(self.none_chosen()) };
        let place = partition.place;
        let what = match place.kind {
            Kind::Swap => Some("a swap area, which has no files"),
            Kind::Blank => Some("blank"),
            Kind::Luks => Some("encrypted (LUKS), and its keys are not part of a point"),
            Kind::Lvm => Some("a physical volume of LVM"),
            _ => None,
        };
        if let Some(what) = what {
            let hint = "serve the point as a disk and look at it with the tools it needs: `cdp-target nbd --help`";
            return Err(Failure::mistake(format!("{} is {what}", self.place_name(&partition))).hint(hint));
        }
        self.attached(partition)
    }

    /// Has the kernel read it.
    fn attached(self, partition: Partition) -> Result<Opened, Failure> {
        let folder = tempfile::Builder::new().prefix("cdp-files.").tempdir()?;
        let stop = if matches!(self.arguments.what, What::Cp(_)) {
            context::stop_on_signal(Path::new(""))
        } else {
            // Who reads our output may not go on reading: so nobody waits for that.
            let path = folder.path().to_owned();
            context::on_signal(move || {
                remove_leftovers(&path);
                std::process::exit(1);
            });
            Arc::default()
        };
        let storage = context::storage();
        let source = Source {
            points: self.points,
            point: self.point,
            volume: &self.volume.name,
            place: partition.place,
            storage: storage.as_ref(),
            clock: self.clock,
        };
        let (attached, tree) = Attached::attach(source, folder)?;
        warn(attached.warnings());
        Ok(Opened { tree, _attached: attached, partition, stop })
    }

    fn place_name(&self, partition: &Partition) -> String {
        match partition.place.partition {
            Some(number) => format!("partition {number}"),
            None => format!("volume {}", self.volume.name),
        }
    }

    /// Why none is meant, with those that there are.
    fn none_chosen(&self) -> Failure {
        let mut known = String::new();
        for partition in &self.partitions {
            let number = partition.place.partition.unwrap_or(0);
            let label = partition.label.as_ref().map_or_else(String::new, |label| format!(" `{label}`"));
            let comma = if known.is_empty() { "" } else { ", " };
            write!(known, "{comma}{number} ({}{label})", partition.file_system).expect("text takes anything");
        }
        let line = match self.arguments.partition {
            Some(number) if known.is_empty() => format!("there is no partition {number}: the volume has none"),
            Some(number) => format!("there is no partition {number}; there are {known}"),
            None if known.is_empty() => "there is no partition in it".to_owned(),
            None if self.partitions.iter().any(Partition::has_files) => {
                format!("several partitions have files: {known}")
            }
            None => format!("no partition has files: {known}"),
        };
        Failure::mistake(line).hint("say which with --partition NUMBER; `ls` without a path lists them")
    }
}

fn warn<T: std::fmt::Display>(lines: &[T]) {
    for line in lines {
        eprintln!("warning: {line}");
    }
}

fn find(volumes: &[Volume], name: Option<&str>) -> Result<Volume, CatalogError> {
    let found = match (name, volumes) {
        (None, [only]) => Some(only),
        _ => volumes.iter().find(|volume| Some(volume.name.as_str()) == name),
    };
    found.cloned().ok_or_else(|| CatalogError::NoVolume {
        name: name.unwrap_or_default().to_owned(),
        known: volumes.iter().map(|volume| volume.name.clone()).collect(),
    })
}

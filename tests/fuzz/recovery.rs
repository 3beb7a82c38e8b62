//! Whole files of a group's folder: what `inspect` says of them, and what recovery and readers make of them.

use crate::history::{DATA_KEY, GROUP, mend_frame};
use crate::store::{MANIFEST, OPEN, SEALED, SegmentHeader};
use crate::{Check, Format};
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{Block, Extent, VolumeSlot};
use cdp_seams::storage::sim::SimStorage;
use cdp_seams::storage::{Storage, replace};
use cdp_target::inspect::inspect;
use cdp_target::journal::{GroupJournal, JournalLimits, Manifest, segment};
use cdp_target::verify::verify;
use std::path::Path;
use std::sync::Arc;

/// What reading a segment takes: a window, and a few frames.
const WINDOW_BYTES: usize = 8 << 20;

fn disk_with(files: &[(&Path, &[u8])]) -> Arc<SimStorage> {
    let disk = Arc::new(SimStorage::new(1));
    for folder in ["/group/journal", "/group/aside"] {
        disk.create_dir_all(Path::new(folder)).expect("made");
    }
    for (path, bytes) in files {
        replace(&*disk, path, bytes).expect("written");
    }
    disk
}

/// Puts the sums of a segment's header and of all its frames in order.
fn mend_segment(bytes: &mut [u8]) {
    let Some(mut at) = SegmentHeader::mend_at_start(bytes) else { return };
    while let Some(len) = bytes.get_mut(at..).and_then(|rest| mend_frame(&GROUP, rest)) {
        at += len;
    }
}

/// A segment, as `inspect` describes it.
pub(crate) struct SegmentFile;

impl Format for SegmentFile {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        vec![SEALED.to_vec(), OPEN.to_vec(), MANIFEST.to_vec()]
    }

    fn mend(bytes: &mut [u8]) {
        if bytes.starts_with(&segment::MAGIC) {
            mend_segment(bytes);
        }
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let path = Path::new("/group/journal/1.seg");
        let disk = disk_with(&[(path, bytes)]);
        let described = inspect(&*disk, path).ok()?;
        Some(format!("{described:?}").into_bytes())
    }

    fn memory_max(len: usize) -> usize {
        WINDOW_BYTES + 64 * len
    }
}

/// A group whose open segment is what it is: recovered, verified, read.
pub(crate) struct RecoveredGroup;

impl Format for RecoveredGroup {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        vec![OPEN.to_vec(), SEALED.to_vec()]
    }

    fn mend(bytes: &mut [u8]) {
        mend_segment(bytes);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let folder = Path::new("/group");
        let (manifest, _) = Manifest::decode_file(MANIFEST).expect("a manifest");
        let sealed = segment::path(folder, 1);
        let open = segment::path(folder, manifest.open);
        let disk = disk_with(&[(&folder.join("manifest"), MANIFEST), (&sealed, SEALED), (&open, bytes)]);
        let limits = JournalLimits { segment_bytes_max: 5000 };
        let (journal, _) = GroupJournal::open(disk, folder, limits).expect("whatever it holds, the group opens");
        let view = journal.view();
        // Of the segments between these two there is none: their points are not listed.
        let points: Vec<_> = view.points().map(|point| point.expect("a point")).collect();
        verify(&view, None, None, &mut |_| {}).expect("damage is reported, not an error");
        for point in &points {
            let Ok(image) = view.image(point.epoch, &DataKey::new(DATA_KEY)) else { continue };
            let first = Extent::new(Block(0), 8).expect("an extent");
            let _damaged_or_not = image.read_blocks(VolumeSlot(0), first, &mut |_, _| {});
        }
        Some(format!("{points:?}").into_bytes())
    }

    fn memory_max(len: usize) -> usize {
        2 * WINDOW_BYTES + 1024 * len
    }
}

//! Saving what is dirty and taking it up again, with a power cut at every call to the state folder.
//!
//! The volume is real and so is the tracking; the state folder is simulated. A boot is another boot id, no pins, and the device made anew.

use super::*;
use cdp_protocol::seal::{DataKey, DigestKey};
use cdp_seams::clock::SystemClock;
use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_seams::storage::{Storage, replace};
use cdp_source::reader;
use cdp_source::saved::saving::{Leaving, Saver};
use cdp_source::saved::taking::TakeUp;
use cdp_source::tracker::device::Device;
use loop_device::run;

const ADD: u32 = 0x4c80;
const REMOVE: u32 = 0x4c81;
const STATE: &str = "/state";
const MEMO: &[u8] = b"what is remembered";
/// Blocks that are dirty at each stop.
const DIRTY: std::ops::Range<u32> = 700..720;

fn key() -> DigestKey {
    DataKey::new([3; 32]).digest_key()
}

/// A machine with one disk and a simulated state folder.
struct Machine {
    group: Group,
    node: PathBuf,
    disk: SimStorage,
    boots: u32,
}

impl Machine {
    fn new(seed: u64, number: u32) -> Option<Self> {
        let group = Group::new()?;
        let node = PathBuf::from(format!("/dev/loop{number}"));
        let file = group.folder.path().join("disk");
        std::fs::File::create_new(&file).and_then(|file| file.set_len(VOLUME_BYTES)).expect("a file");
        let disk = SimStorage::new(seed);
        disk.create_dir_all(Path::new(STATE)).expect("made");
        replace(&disk, &Path::new(STATE).join("memo"), MEMO).expect("kept");
        let machine = Self { group, node, disk, boots: 0 };
        machine.plug();
        Some(machine)
    }

    /// A call of `/dev/loop-control` (linux/loop.h): whether it succeeded.
    fn loop_control(&self, call: u32) -> bool {
        let number = self.node.display().to_string().replace("/dev/loop", "");
        let script = format!("open(F, '+<', '/dev/loop-control') && defined ioctl(F, {call}, {number}) or die $!");
        let done = std::process::Command::new("perl").args(["-e", &script]).output().expect("started");
        done.status.success()
    }

    fn plug(&self) {
        // What a test that was killed has left.
        self.loop_control(REMOVE);
        assert!(self.loop_control(ADD), "{} is made", self.node.display());
        run("losetup", &[&self.node.to_string_lossy(), &self.group.folder.path().join("disk").to_string_lossy()]);
    }

    fn unplug(&self) {
        run("losetup", &["--detach", &self.node.to_string_lossy()]);
        // It is detached once nobody has it open.
        assert!((0..100).any(|_| self.loop_control(REMOVE)), "{} is removed", self.node.display());
    }

    /// Another boot: nothing is pinned, and the disk's counts begin anew.
    fn boot(&mut self) {
        self.boots += 1;
        std::fs::remove_dir_all(self.group.pinned()).expect("pins removed");
        self.unplug();
        self.plug();
    }

    fn options(&self) -> EbpfOptions {
        let boot = self.group.folder.path().join(format!("boot-{}", self.boots));
        std::fs::write(&boot, format!("boot {}", self.boots)).expect("written");
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let mut options =
            EbpfOptions::new(self.group.id, vec![(VolumeSlot(0), self.node.clone())], STATE.into(), storage);
        options.boot_id_path = boot;
        options
    }

    /// An agent is started.
    fn start(&self) -> Result<EbpfTracker, TrackerError> {
        let mut options = self.options();
        let (storage, folder) = (Arc::clone(&options.storage), Path::new(STATE));
        options.left_behind = Some(Arc::new(TakeUp::new(storage, folder, &folder.join("memo"), key())));
        EbpfTracker::open(&options)
    }

    /// An agent is stopped, with `DIRTY` not acked.
    fn stop(&self, mut tracker: EbpfTracker) -> Result<bool, String> {
        tracker.take_recovered();
        tracker.flip().map_err(|error| error.to_string())?;
        tracker.retain_unacked(&[blocks(DIRTY)]).map_err(|error| error.to_string())?;
        let targets: Vec<_> = tracker.devices().iter().map(Device::read_target).collect();
        let mut reader = reader::open(&targets).expect("opened");
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let saver = Saver::new(storage, Path::new(STATE), Arc::new(SystemClock::new()), Arc::new(SystemRandom));
        let leaving = Leaving {
            tracker: &mut tracker,
            reader: &mut *reader,
            memo: MEMO.to_vec(),
            digest: &|bytes| key().digest(bytes),
            marked: &mut |_| (),
        };
        let record = saver.save(leaving)?.expect("an eBPF tracking can be left");
        Ok(record.volumes[0].found.is_ok())
    }

    /// Writes behind everybody's back, where nothing is sampled but by chance: what a record that is believed twice would miss.
    fn write(&self) {
        RawDisk::open(&self.node).write(9000 * 4096, 4096, 0xab);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(std::process::Command::new("losetup").arg("--detach").arg(&self.node).output());
        self.loop_control(REMOVE);
    }
}

/// What the tracking begins with: what was dirty at the stop, or everything.
fn is_taken_up(tracker: &mut EbpfTracker) -> bool {
    let recovered = tracker.take_recovered();
    let is_taken_up = tracker.report().taken_up.is_some();
    let expected = if is_taken_up { blocks(DIRTY) } else { blocks(0..VOLUME_BLOCKS) };
    assert_eq!(recovered, [expected]);
    assert_eq!(is_taken_up, tracker.report().started_over.is_none());
    is_taken_up
}

#[test]
fn what_was_dirty_at_a_stop_is_taken_up_once() {
    let Some(mut machine) = Machine::new(1, 3001) else { return };
    let tracker = machine.start().expect("tracked");
    assert_eq!(machine.stop(tracker), Ok(true));
    machine.boot();
    let mut tracker = machine.start().expect("tracked");
    assert!(is_taken_up(&mut tracker));
    assert!(machine.disk.open(Path::new("/state/unproved-0")).is_ok());
    drop(tracker);
    // A power cut: nothing was saved since.
    machine.boot();
    assert!(!is_taken_up(&mut machine.start().expect("tracked")));
}

/// The power is cut at each call that saving makes. What was dirty is taken up then, or everything is.
#[test]
fn a_power_cut_while_it_is_saved_costs_no_more_than_a_comparison() {
    let (mut kept, mut lost) = (0, 0);
    for call in 0.. {
        let Some(mut machine) = Machine::new(call, 3002) else { return };
        let tracker = machine.start().expect("tracked");
        machine.disk.fault_at(machine.disk.calls() + call, Fault::PowerCut);
        let saved = machine.stop(tracker);
        let was_cut = machine.disk.is_down();
        machine.disk.clear_faults();
        machine.disk.restart();
        machine.boot();
        let is_taken_up = is_taken_up(&mut machine.start().expect("tracked"));
        assert!(is_taken_up || saved.is_err(), "call {call}: it was saved");
        if !was_cut {
            println!("cut at {call} calls: taken up {kept} times, compared {lost} times");
            assert!(is_taken_up && lost > 3, "{lost}");
            return;
        }
        (kept, lost) = if is_taken_up { (kept + 1, lost) } else { (kept, lost + 1) };
    }
}

/// The power is cut at each call of a start that takes it up; then the disk is written to with no agent there, and the machine started
/// once more. A record that was used, or may have been, is not believed again; one that never was may be.
#[test]
fn a_power_cut_while_it_is_taken_up_lets_nothing_be_believed_later() {
    let (mut before, mut after) = (0, 0);
    for call in 0.. {
        let Some(mut machine) = Machine::new(call, 3003) else { return };
        let tracker = machine.start().expect("tracked");
        assert_eq!(machine.stop(tracker), Ok(true));
        machine.boot();
        machine.disk.fault_at(machine.disk.calls() + call, Fault::PowerCut);
        let started = machine.start();
        let was_cut = machine.disk.is_down();
        let has_started = started.is_ok();
        drop(started);
        machine.disk.clear_faults();
        if !was_cut {
            machine.disk.power_cut();
        }
        machine.disk.restart();
        if has_started {
            // It was tracked, and what was written is lost with the power.
            machine.write();
        }
        machine.boot();
        let is_taken_up = is_taken_up(&mut machine.start().expect("tracked"));
        assert!(!(has_started && is_taken_up), "call {call}: it was believed twice");
        if !was_cut {
            println!("cut at {call} calls: taken up later {before} times, compared {after} times");
            assert!(has_started && before > 0 && after > 5, "{before} {after}");
            return;
        }
        (before, after) = if is_taken_up { (before + 1, after) } else { (before, after + 1) };
    }
}

#[test]
fn a_state_folder_that_takes_nothing_costs_a_comparison() {
    let Some(mut machine) = Machine::new(4, 3004) else { return };
    let tracker = machine.start().expect("tracked");
    machine.disk.set_free_bytes(0);
    assert!(machine.stop(tracker).is_err_and(|reason| reason.contains("write it")), "there is no room");
    machine.disk.set_free_bytes(u64::MAX);
    machine.boot();
    let mut tracker = machine.start().expect("tracked");
    assert!(!is_taken_up(&mut tracker));
    machine.disk.fail_from(machine.disk.calls(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(machine.stop(tracker).is_err(), "nothing can be written");
    machine.disk.clear_faults();
    machine.boot();
    assert!(!is_taken_up(&mut machine.start().expect("tracked")));
    // And one that is read-only when it is to be taken up.
    let tracker = machine.start().expect("tracked");
    assert_eq!(machine.stop(tracker), Ok(true));
    machine.boot();
    machine.disk.fail_from(machine.disk.calls() + 3, std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(machine.start().is_err(), "no tracking is named");
    machine.disk.clear_faults();
    assert!(is_taken_up(&mut machine.start().expect("tracked")), "nothing was tracked, nor written, since");
}

/// Somebody has the volume open without holding it, and writes while the record is saved; or holds it.
#[test]
fn a_volume_that_somebody_holds_is_not_saved() {
    let Some(mut machine) = Machine::new(5, 3005) else { return };
    let tracker = machine.start().expect("tracked");
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
    let held = rustix::fs::open(&machine.node, flags, rustix::fs::Mode::empty()).expect("held");
    assert_eq!(machine.stop(tracker), Ok(false), "it is in use");
    drop(held);
    machine.boot();
    let mut tracker = machine.start().expect("tracked");
    let reason = tracker.report().started_over.expect("compared");
    assert!(reason.contains("in use as part of something else"), "{reason}");
    assert!(!is_taken_up(&mut tracker));
}

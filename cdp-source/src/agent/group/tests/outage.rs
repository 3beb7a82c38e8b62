//! A line that is down for long: what waits, what becomes of it, and what comes after.

mod office;

use crate::agent::status::{GroupPhase, GroupStatus};
use crate::sim::SimTracker;
use crate::spool::SpoolLimits;
use crate::tracker::Tracker as _;
use cdp_protocol::message::Verdict;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::units::Generation;
use cdp_seams::storage::Storage as _;
use cdp_seams::storage::sim::Fault;
use office::{Office, Point};
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

const FRAMES: &str = "/spool/frames";
/// A 64th of the spool's size, in whole pages.
const INDEX_BYTES: u64 = 12 * (1 << 20) / 64;
/// So little that everything that waits goes to the file.
const TIGHT: SpoolLimits = SpoolLimits { bytes_max: 12 << 20, points_max: 40, memory_bytes_max: 0, window_epochs: 2 };

/// 30 days in steps of ten minutes.
#[test]
fn after_an_outage_of_30_days_every_point_that_was_kept_is_exact_and_nothing_is_copied_anew() {
    const STEPS: u64 = 30 * 24 * 6;
    let limits = SpoolLimits { window_epochs: 8, memory_bytes_max: 16 << 10, ..TIGHT };
    let mut office = Office::new(1, limits);
    office.wire.lock().cut();
    let (before, first) = (office.points(), office.status().captured_epoch.expect("a point"));
    for _ in 0..STEPS {
        office.world.pass(Duration::from_secs(600));
        office.second();
        let status = office.status();
        assert!(status.unacked_epochs <= limits.points_max, "{} points wait", status.unacked_epochs);
        assert!(office.disk.file_len(Path::new(FRAMES)) <= limits.bytes_max);
        assert_eq!(status.spool.failure, None);
    }
    let status = office.status();
    let captured = status.captured_epoch.expect("a point").0 - first.0;
    assert!(captured > STEPS * 9 / 10, "{captured} of {STEPS} points were cut");
    assert!(status.spool.merged_points > captured - limits.points_max, "{:?}", status.spool);
    office.end_well();
    let far = office.wire.lock();
    let points = &far.points[before..];
    assert!(points.len() as u64 <= limits.points_max + 2, "{} points", points.len());
    assert!(points.len() as u64 > limits.points_max / 2, "{} points", points.len());
    assert_eq!((far.voided, far.chain.generation()), (0, Generation(1)), "no new generation, no full resync");
    for point in points {
        let mut came = point.came.clone();
        came.sort_unstable();
        came.dedup();
        assert_eq!(came.len(), point.came.len(), "{} carries a block twice", point.head.epoch);
        let meters = &point.commit.meters;
        assert_eq!(came.len() as u64, meters.content_blocks + meters.hole_blocks, "{}", point.head.epoch);
    }
    // Every number is named by one point, and the older a point the longer it stands for.
    for pair in points.windows(2) {
        assert_eq!(pair[1].commit.first_epoch.0, pair[0].head.epoch.0 + 1);
    }
    let span = |point: &Point| point.head.epoch.0 - point.commit.first_epoch.0;
    let (older, newer): (u64, u64) = points[8..].iter().enumerate().fold((0, 0), |(older, newer), (at, point)| {
        if at < points.len() / 2 - 4 { (older + span(point), newer) } else { (older, newer + span(point)) }
    });
    assert!(older > 3 * newer, "older points stand for {older}, newer ones for {newer}");
}

/// A line that is down while the agent lives, dies and lives on; `fault`: at which call to the disk, and which. Gives how many calls
/// there were, how the group stood at the end of it, and whether the spool ever said that it cannot be written.
fn scenario(seed: u64, fault: Option<(u64, Fault)>) -> (u64, GroupStatus, bool) {
    let mut office = Office::new(seed, SpoolLimits { points_max: 8, ..TIGHT });
    office.wire.lock().cut();
    let calls = office.disk.calls();
    if let Some((call, fault)) = fault {
        office.disk.fault_at(calls + call, fault);
    }
    let mut has_failed = false;
    for second in 0..24 {
        office.second();
        has_failed |= office.status().spool.failure.is_some();
        if office.agent.is_none() {
            office.die(matches!(fault, Some((_, Fault::PowerCut))));
        }
        if second == 16 {
            office.die(false);
        }
    }
    let (calls, status) = (office.disk.calls() - calls, office.status());
    office.disk.clear_faults();
    let is_lost = status.rescan_percent.is_some() || office.agent.as_ref().is_some_and(|(group, _)| group.memo_is_kept);
    office.world.set_quiet(true);
    office.world.run(5000);
    office.wire.lock().connect(if is_lost { Verdict::TargetBehind } else { Verdict::Continue });
    office.settle();
    assert!(office.wire.lock().image == office.world.media(), "the target holds something else");
    (calls, status, has_failed)
}

#[test]
fn a_death_at_any_call_to_the_spool_leaves_exact_points_and_nothing_missing() {
    let (calls, status, _) = scenario(2, None);
    assert!(status.spool.waiting_points > 2 && status.spool.spooled_bytes > 0, "{:?}", status.spool);
    assert!(calls > 60, "{calls} calls");
    for call in 0..calls {
        scenario(2, Some((call, Fault::Death)));
        scenario(2, Some((call, Fault::End)));
    }
}

#[test]
fn a_power_cut_at_any_call_to_the_spool_leaves_a_rescan_and_nothing_missing() {
    let (calls, ..) = scenario(3, None);
    for call in 0..calls {
        scenario(3, Some((call, Fault::PowerCut)));
    }
}

#[test]
fn a_disk_that_fails_or_is_full_leaves_the_group_going_on_from_memory() {
    let (calls, ..) = scenario(4, None);
    let mut failures = 0;
    for call in 0..calls {
        for kind in [ErrorKind::StorageFull, ErrorKind::ReadOnlyFilesystem] {
            let (_, _, has_failed) = scenario(4, Some((call, Fault::Error(kind))));
            failures += u64::from(has_failed);
        }
    }
    assert!(failures > 10, "{failures} failures were told");
}

#[test]
fn a_successor_goes_on_with_what_waits_and_makes_points_before_the_line_is_back() {
    let mut office = Office::new(5, TIGHT);
    office.wire.lock().cut();
    (0..12).for_each(|_| office.second());
    let (waiting, captured) = (office.status().unacked_epochs, office.status().captured_epoch);
    assert!(waiting > 6, "{waiting} points wait");
    office.die(false);
    // The newest was in memory alone.
    assert_eq!(office.status().unacked_epochs, waiting - 1);
    (0..5).for_each(|_| office.second());
    assert!(office.status().captured_epoch > captured, "points are made without a line");
    let before = office.points();
    office.end_well();
    assert!(office.points() - before >= waiting as usize + 3, "{} points came", office.points() - before);
    // Once all of it is sent nothing is written any more.
    let calls = office.disk.calls();
    (0..30).for_each(|_| office.second());
    assert!(office.disk.calls() - calls < 10, "{} calls", office.disk.calls() - calls);
}

#[test]
fn a_spool_of_another_history_or_damaged_is_thrown_away() {
    let frames = Path::new(FRAMES);
    for what in ["another history", "a flipped bit", "no file"] {
        let mut office = Office::new(6, TIGHT);
        office.wire.lock().cut();
        (0..12).for_each(|_| office.second());
        office.agent = None;
        match what {
            "another history" => {
                let mut tracker = SimTracker::attach(&office.world);
                let mut memo = Memo::decode(&tracker.memo().expect("simulated")).expect("a memo");
                memo.sent.clear();
                memo.acked.truncate(0);
                tracker.set_memo(&memo.encode()).expect("simulated");
            }
            // Somewhere in the first slab.
            "a flipped bit" => office.disk.flip_bit(frames, 8 * ((4096 + 2 * INDEX_BYTES) + 300)),
            _ => office.disk.remove(frames).expect("removed"),
        }
        office.start();
        assert_eq!(office.status().spool.waiting_points, 0, "{what}");
        office.end_well();
    }
}

#[test]
fn what_rots_in_the_spool_while_it_waits_is_captured_again() {
    let mut office = Office::new(7, TIGHT);
    office.wire.lock().cut();
    (0..12).for_each(|_| office.second());
    let waiting = office.status().spool.waiting_points;
    assert!(waiting > 4);
    let slabs_at = 4096 + 2 * INDEX_BYTES;
    for slab in 0..12 {
        office.disk.flip_bit(Path::new(FRAMES), 8 * (slabs_at + slab * 65536 + 300));
    }
    office.end_well();
    assert!(office.status().spool.waiting_points == 0);
    assert_eq!(office.wire.lock().voided, 0, "what was handed over before stands");
}

#[test]
fn blocks_that_go_back_to_what_they_were_while_points_wait_are_not_left_out() {
    // Most writes put one of three contents back; exactness is checked at each point, and at the end.
    for seed in 10..30 {
        let mut office = Office::new(seed, SpoolLimits { points_max: 6, ..TIGHT });
        for _ in 0..4 {
            office.wire.lock().cut();
            (0..10).for_each(|_| office.second());
            office.wire.lock().connect(Verdict::Continue);
            (0..4).for_each(|_| office.second());
        }
        office.end_well();
    }
}

#[test]
fn a_folder_that_is_gone_leaves_the_group_going_on_from_memory_and_what_waits_is_captured_again() {
    let mut office = Office::new(8, TIGHT);
    office.wire.lock().cut();
    (0..12).for_each(|_| office.second());
    assert!(office.status().spool.spooled_bytes > 0);
    office.disk.fail_from(office.disk.calls(), ErrorKind::NotFound);
    let captured = office.status().captured_epoch;
    (0..12).for_each(|_| office.second());
    let status = office.status();
    assert!(status.spool.failure.is_some(), "{:?}", status.spool);
    // As many as memory has room for are in the file already.
    assert!(status.unacked_epochs <= 16 && status.captured_epoch >= captured, "{status:?}");
    office.end_well();
    assert_eq!(office.wire.lock().voided, 0);
}

#[test]
fn what_was_left_when_the_tracking_started_over_is_never_taken_up_behind_newer_points() {
    let mut office = Office::new(9, TIGHT);
    office.wire.lock().cut();
    (0..14).for_each(|_| office.second());
    assert!(office.status().spool.spooled_bytes > 0);
    // A clean end of the machine: the memo is kept and so are the files, and the tracking is gone.
    office.kept = Memo::decode(&SimTracker::attach(&office.world).memo().expect("simulated")).expect("a memo");
    office.agent = None;
    office.world.power_loss();
    office.start();
    office.wire.lock().connect(Verdict::Continue);
    office.settle();
    // The next agent writes to the spool for the first time, and dies.
    office.wire.lock().cut();
    while office.status().spool.spooled_bytes == 0 {
        office.second();
    }
    office.die(false);
    office.end_well();
}

#[test]
fn what_is_too_much_for_one_cut_becomes_points_while_the_line_is_down() {
    let limits = SpoolLimits { bytes_max: 64 << 20, memory_bytes_max: 16 << 10, ..TIGHT };
    let (mut captured, mut of_parts) = (0, 0);
    for seed in 40..60 {
        let mut office = Office::with_cuts_of(8, seed, limits);
        office.wire.lock().cut();
        let (before, first) = (office.points(), office.status().captured_epoch.expect("a point"));
        for _ in 0..12 {
            office.world.run(500);
            office.second();
        }
        captured += office.status().captured_epoch.expect("a point").0 - first.0;
        // Each is held against the instant of its cut.
        office.end_well();
        let far = office.wire.lock();
        of_parts += far.points[before..].iter().filter(|point| point.commit.parts.is_some()).count();
    }
    println!("{captured} points in 240 seconds, {of_parts} of them of parts");
    assert!(captured > 160 && of_parts > 80, "{captured} points, {of_parts} of them of parts");
}

#[test]
fn while_the_target_takes_nothing_for_now_points_wait_for_it() {
    let mut office = Office::new(30, TIGHT);
    office.wire.lock().put_off();
    (0..12).for_each(|_| office.second());
    let status = office.status();
    assert!(status.unacked_epochs > 6 && status.spool.spooled_bytes > 0, "{status:?}");
    assert_eq!(status.state, GroupPhase::Stalled);
    assert!(status.reason.is_some_and(|reason| reason.contains("no room")));
    // So they do of an agent that has not heard yet what the target holds.
    office.die(false);
    office.wire.lock().is_up = true;
    office.wire.lock().put_off();
    let captured = office.status().captured_epoch;
    (0..6).for_each(|_| office.second());
    assert!(office.status().captured_epoch > captured, "{:?}", office.status());
    let (before, waiting) = (office.points(), office.status().unacked_epochs);
    office.wire.lock().connect(Verdict::Continue);
    office.end_well();
    assert!(office.points() - before >= waiting as usize, "{} of {waiting} came", office.points() - before);
    assert_eq!(office.wire.lock().voided, 0);
}

/// Memory takes all that waits here, so nothing but a restore has it written.
const ROOMY: SpoolLimits = SpoolLimits { memory_bytes_max: 8 << 20, window_epochs: 8, ..TIGHT };

#[test]
fn what_a_restore_overwrites_outlives_the_agent_before_it_is_told_that_points_are_held() {
    for is_up in [false, true] {
        let mut office = Office::new(5, ROOMY);
        if is_up {
            // The line is there, and takes all that it is given; no word comes back.
            office.second();
            office.wire.lock().is_up = false;
        } else {
            office.wire.lock().cut();
        }
        office.second();
        let status = office.status();
        let kept = status.captured_epoch.expect("a point");
        assert!(
            status.acked_epoch < Some(kept) && status.spool.spooled_bytes == 0,
            "it is in memory alone: {status:?}"
        );
        assert_eq!(office.hold(), Some("data is being restored".into()));
        office.die(false);
        assert_eq!(office.status().captured_epoch, Some(kept), "the successor has it, and holds its points");
        office.second();
        assert_eq!(office.status().captured_epoch, Some(kept));
        office.release();
        office.end_well();
        let far = office.wire.lock();
        assert!(far.points.iter().any(|point| point.head.epoch == kept), "{kept} is at the target");
    }
}

#[test]
fn where_it_cannot_outlive_the_agent_whoever_restores_is_told_so() {
    for limits in [SpoolLimits { bytes_max: 0, ..ROOMY }, ROOMY] {
        let mut office = Office::new(6, limits);
        assert_eq!(office.hold(), Some("data is being restored".into()), "all of it is at the target");
        office.release();
        office.wire.lock().cut();
        office.second();
        assert!(office.status().captured_epoch > office.status().acked_epoch, "the restore was over without a word");
        office.disk.fault_at(office.disk.calls(), Fault::Error(ErrorKind::Other));
        let word = office.hold().expect("it holds all the same");
        assert!(word.contains("spool"), "{word}");
        office.disk.clear_faults();
        office.release();
        office.end_well();
    }
}

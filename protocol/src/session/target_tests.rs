//! The machine of `session::target`, step by step.

use super::*;
use crate::escrow::Envelope;
use crate::message::{Instance, encode};
use crate::units::{FrameHash, KeyId};
use std::convert::Infallible;

const GROUP: GroupId = GroupId([1; 16]);

fn head(epoch: u64) -> Head {
    Head { epoch: Epoch(epoch), hash: FrameHash([epoch as u8; 32]) }
}

fn request(generation: u64, acked: &[u64], sent: &[u64]) -> OpenGroup {
    OpenGroup {
        group: GROUP,
        name: "main".into(),
        generation: (generation > 0).then_some(Generation(generation)),
        acked: acked.iter().map(|epoch| head(*epoch)).collect(),
        sent: sent.iter().map(|epoch| head(*epoch)).collect(),
        parts: None,
        parts_sent: vec![],
        anew: false,
        instance: Instance::default(),
        envelope: Envelope { key: KeyId::default(), encapsulated: vec![], sealed: vec![] },
        volumes: vec![],
    }
}

/// A target whose journal has points 1 to `newest`, all of generation 1.
fn judged(newest: u64, generation: u64, request: &OpenGroup) -> Judgement {
    let lineage = Lineage::default();
    judged_in(&lineage, &Ruling::default(), &[], newest, generation, request)
}

/// The same with the generations of some points, and what was decided before.
fn judged_in(
    lineage: &Lineage,
    ruling: &Ruling,
    made: &[(u64, u64)],
    newest: u64,
    generation: u64,
    request: &OpenGroup,
) -> Judgement {
    let head = |epoch: u64| head(epoch);
    let standing = Standing {
        head: (newest > 0).then(|| head(newest)),
        parts: None,
        generation: Generation(generation),
        same_process: false,
        lineage,
        ruling,
    };
    let mut made_in = |asked: Head| {
        let known = asked.epoch.0 <= newest && asked == head(asked.epoch.0);
        let of = made.iter().find(|(epoch, _)| *epoch == asked.epoch.0).map_or(1, |(_, generation)| *generation);
        Ok::<_, Infallible>(known.then_some(Generation(of)))
    };
    judge(&standing, request, &mut made_in).expect("infallible")
}

/// A judgement in short: verdict, generation, the lost; or the refusal.
fn short(judgement: Judgement) -> Result<(Verdict, u64, Vec<u64>), RefusalReason> {
    match judgement {
        Judgement::Open { verdict, generation, begins, lost } => {
            if let Some(line) = begins {
                assert_eq!(line.generation, generation);
            }
            Ok((verdict, generation.0, lost.iter().map(|epoch| epoch.0).collect()))
        }
        Judgement::Refuse(reason) => Err(reason),
    }
}

type Short = Result<(Verdict, u64, Vec<u64>), RefusalReason>;
type Row = (u64, u64, u64, &'static [u64], &'static [u64], Short);

#[test]
fn histories_are_judged_by_this_table() {
    let open = |verdict, generation, lost: &[u64]| Ok((verdict, generation, lost.to_vec()));
    let to = |epoch: u64| Verdict::Rollback { to: Some(Epoch(epoch)) };
    let nothing = Verdict::Rollback { to: None };
    let fork = || Err(RefusalReason::Fork);
    // The target's newest point and generation; the source's generation, acked, sent; what comes of it.
    let table: [Row; 21] = [
        (0, 0, 0, &[], &[], open(Verdict::New, 1, &[])),
        (0, 0, 4, &[3, 2], &[], open(Verdict::New, 5, &[3, 2])),
        (0, 1, 0, &[], &[], open(Verdict::New, 2, &[])),
        (0, 1, 1, &[], &[], open(Verdict::Continue, 1, &[])),
        (0, 1, 1, &[], &[1], open(Verdict::Continue, 1, &[])),
        (0, 1, 1, &[2], &[], open(Verdict::TargetBehind, 2, &[2])),
        (5, 1, 1, &[5, 4], &[], open(Verdict::Continue, 1, &[])),
        (5, 1, 1, &[4, 3], &[5], open(Verdict::Continue, 1, &[])),
        (5, 1, 1, &[4, 3], &[6, 5], open(Verdict::Continue, 1, &[])),
        (5, 1, 1, &[], &[5], open(Verdict::Continue, 1, &[])),
        (5, 3, 1, &[5], &[], open(Verdict::Continue, 4, &[])),
        (5, 1, 3, &[5], &[], open(Verdict::Continue, 4, &[])),
        (5, 1, 1, &[3, 2], &[], open(to(3), 2, &[])),
        (5, 1, 1, &[3, 2], &[4], open(to(4), 2, &[])),
        (5, 1, 1, &[3, 2], &[99], open(to(3), 2, &[])),
        (5, 2, 1, &[3, 2], &[], open(to(3), 3, &[])),
        (5, 1, 0, &[], &[], open(nothing, 2, &[])),
        (5, 1, 1, &[7, 6, 5], &[8], open(Verdict::TargetBehind, 2, &[7, 6])),
        (5, 1, 1, &[7, 6], &[], fork()),
        (5, 2, 1, &[7, 6], &[], fork()),
        (5, 2, 3, &[99], &[98], fork()),
    ];
    for (number, (newest, granted, claimed, acked, sent, expected)) in table.into_iter().enumerate() {
        assert_eq!(short(judged(newest, granted, &request(claimed, acked, sent))), expected, "row {number}");
    }
}

/// 1 to 11 were made in generation 1; a copy of 10 got 2 and made 12 and 13.
fn branched() -> (Lineage, [(u64, u64); 2]) {
    let line = |generation, after, from| Line { generation: Generation(generation), after, from };
    let at_10 = Place { generation: Generation(1), epoch: Epoch(10) };
    let lines = vec![line(1, None, None), line(2, Some(Epoch(11)), Some(at_10))];
    (Lineage::new(lines).expect("rising"), [(12, 2), (13, 2)])
}

/// The target's newest point; the source's generation, acked, sent; what comes of it.
type LineageRow<'a> = (u64, u64, &'a [u64], &'a [u64], Short);

#[test]
fn only_what_is_of_the_lineage_goes_on() {
    let (lineage, made) = branched();
    let to = |epoch: u64| Ok((Verdict::Rollback { to: Some(Epoch(epoch)) }, 3, vec![]));
    let fork = || Err(RefusalReason::Fork);
    let table: [LineageRow<'_>; 12] = [
        (13, 2, &[13, 12], &[], Ok((Verdict::Continue, 2, vec![]))),
        (13, 2, &[12, 11], &[], to(12)),
        (13, 2, &[12, 11], &[13], Ok((Verdict::Continue, 2, vec![]))),
        // Granted 2, died before its first point: it has compared with 11, and came from 10.
        (13, 2, &[11, 10], &[], to(10)),
        (13, 1, &[10, 9], &[], to(10)),
        (13, 1, &[9], &[], to(9)),
        // The original, whose line was left at 10.
        (13, 1, &[11, 10], &[], fork()),
        (13, 1, &[10, 9], &[11], to(10)),
        (13, 1, &[99, 10], &[], fork()),
        // Before the copy has made its first point the original's newest is the journal's, and still of a line that was left.
        (11, 1, &[11, 10], &[], fork()),
        (11, 2, &[11, 10], &[], Ok((Verdict::Continue, 2, vec![]))),
        (11, 1, &[10], &[], to(10)),
    ];
    for (number, (newest, claimed, acked, sent, expected)) in table.into_iter().enumerate() {
        let judged = judged_in(&lineage, &Ruling::default(), &made, newest, 2, &request(claimed, acked, sent));
        assert_eq!(short(judged), expected, "row {number}");
    }
}

#[test]
fn a_new_generation_says_where_it_goes_on_from() {
    let (lineage, made) = branched();
    let begins = |request: &OpenGroup| match judged_in(&lineage, &Ruling::default(), &made, 13, 2, request) {
        Judgement::Open { begins: Some(line), .. } => (line.after.map(|epoch| epoch.0), line.from),
        other => panic!("{other:?}"),
    };
    let at = |generation, epoch| Some(Place { generation: Generation(generation), epoch: Epoch(epoch) });
    assert_eq!(begins(&request(2, &[12], &[])), (Some(13), at(2, 12)));
    assert_eq!(begins(&request(2, &[11, 10], &[])), (Some(13), at(2, 11)), "as generation 2 began");
    assert_eq!(begins(&request(1, &[10], &[])), (Some(13), at(1, 10)));
    assert_eq!(begins(&request(0, &[], &[])), (Some(13), None));
    assert_eq!(begins(&OpenGroup { anew: true, ..request(2, &[13], &[]) }), (Some(13), at(2, 13)), "asked for");
}

/// What was chosen and left; the source's generation and acked; what comes of it.
type RulingRow<'a> = (Option<(u64, u64)>, &'a [Claim], u64, &'a [u64], Short);

#[test]
fn a_ruling_is_followed_by_this_table() {
    let (lineage, made) = branched();
    let claim = |generation, epoch| Claim { generation: Generation(generation), head: head(epoch) };
    let left = || Err(RefusalReason::Left);
    let rollback = |to: Option<u64>| Ok((Verdict::Rollback { to: to.map(Epoch) }, 3, vec![]));
    let table: [RulingRow<'_>; 16] = [
        (Some((1, 11)), &[claim(2, 13)], 1, &[11, 10], rollback(Some(11))),
        (Some((1, 11)), &[claim(2, 13)], 2, &[13, 12], left()),
        (Some((2, 13)), &[claim(1, 11)], 2, &[13, 12], Ok((Verdict::Continue, 3, vec![]))),
        (Some((2, 13)), &[claim(1, 11)], 1, &[11, 10], left()),
        // One that stands before the chosen place, in its lineage: put back from a backup, or granted and dead before it stored it.
        (Some((1, 11)), &[claim(2, 13)], 1, &[10], rollback(Some(10))),
        (Some((1, 11)), &[claim(2, 13)], 1, &[9, 8], rollback(Some(9))),
        (Some((2, 13)), &[claim(1, 11)], 2, &[12], rollback(Some(12))),
        (Some((2, 13)), &[claim(1, 11)], 1, &[10], rollback(Some(10))),
        (Some((1, 11)), &[claim(2, 13)], 2, &[12], left()),
        // New hardware.
        (Some((1, 11)), &[claim(2, 13)], 0, &[], rollback(None)),
        (Some((2, 40)), &[claim(2, 13)], 0, &[], rollback(None)),
        // One that the journal never had.
        (Some((7, 40)), &[claim(2, 13)], 7, &[40, 12], Ok((Verdict::Rollback { to: Some(Epoch(12)) }, 8, vec![]))),
        (Some((2, 40)), &[claim(2, 13)], 2, &[40, 39], rollback(None)),
        (Some((2, 40)), &[claim(2, 13)], 2, &[12], left()),
        // Long after.
        (None, &[claim(1, 11)], 1, &[11, 10], left()),
        (None, &[claim(1, 11)], 2, &[13], Ok((Verdict::Continue, 2, vec![]))),
    ];
    for (number, (chosen, left, claimed, acked, expected)) in table.into_iter().enumerate() {
        let chosen = chosen.map(|(generation, epoch)| claim(generation, epoch));
        let ruling = Ruling { chosen, left: left.to_vec() };
        let judged = judged_in(&lineage, &ruling, &made, 13, 2, &request(claimed, acked, &[]));
        assert_eq!(short(judged), expected, "row {number}");
    }
}

/// Before the copy has made a point both stand at the journal's newest: the original at 11, the copy after comparing with it.
#[test]
fn of_two_that_stand_at_one_point_the_chosen_goes_on() {
    let (lineage, _) = branched();
    let claim = |generation| Claim { generation: Generation(generation), head: head(11) };
    let judged = |chosen: u64, left: u64, claimed: u64, acked: &[u64]| {
        let ruling = Ruling { chosen: Some(claim(chosen)), left: vec![claim(left)] };
        short(judged_in(&lineage, &ruling, &[], 11, 2, &request(claimed, acked, &[])))
    };
    let goes_on = || Ok((Verdict::Continue, 3, vec![]));
    let left = || Err(RefusalReason::Left);
    assert_eq!([judged(1, 2, 1, &[11, 10]), judged(1, 2, 2, &[11, 10])], [goes_on(), left()]);
    assert_eq!([judged(2, 1, 2, &[11, 10]), judged(2, 1, 1, &[11, 10])], [goes_on(), left()]);
    let never_left = Ruling { chosen: Some(claim(2)), left: vec![] };
    assert_eq!(
        short(judged_in(&lineage, &never_left, &[], 11, 2, &request(1, &[11, 10], &[]))),
        left(),
        "not an ancestor"
    );
    let to_10 = Ok((Verdict::Rollback { to: Some(Epoch(10)) }, 3, vec![]));
    assert_eq!([judged(1, 2, 1, &[10]), judged(2, 1, 1, &[10])], [to_10.clone(), to_10]);
}

#[test]
fn parts_another_process_does_not_know_of_are_not_gone_on_with() {
    let chain = |count| PartChain { count, hash: FrameHash([count as u8; 32]) };
    let (lineage, ruling) = (Lineage::default(), Ruling::default());
    let judged = |held: u32, known: u32, same_process| {
        let some = |count: u32| (count > 0).then(|| (Epoch(6), chain(count)));
        let (generation, head) = (Generation(1), Some(head(5)));
        let standing =
            Standing { head, parts: some(held), generation, same_process, lineage: &lineage, ruling: &ruling };
        let request = OpenGroup { parts: some(known), ..request(1, &[5], &[]) };
        let judged = judge(&standing, &request, &mut |_| Ok::<_, Infallible>(Some(Generation(1))));
        short(judged.expect("infallible")).expect("opened").1
    };
    assert_eq!(judged(3, 3, false), 1, "an agent that crashed and comes back");
    assert_eq!(judged(3, 2, true), 1, "an ack that was not heard");
    for (held, known) in [(3, 2), (3, 0), (2, 3), (0, 3)] {
        assert_eq!(judged(held, known, false), 2, "{held} held, {known} known");
    }
}

/// The target has died with an ack that its source did not hear, and knows no process any more.
#[test]
fn parts_whose_acks_were_lost_with_the_target_are_gone_on_with() {
    let chain = |epoch: u64, count: u32| (Epoch(epoch), PartChain { count, hash: FrameHash([count as u8; 32]) });
    let judged = |newest: u64, held: Option<_>, heard: Option<_>, sent: &[(Epoch, PartChain)]| {
        let (lineage, ruling) = (Lineage::default(), Ruling::default());
        let (generation, head, same_process) = (Generation(1), Some(head(newest)), false);
        let standing = Standing { head, parts: held, generation, same_process, lineage: &lineage, ruling: &ruling };
        let request = OpenGroup { parts: heard, parts_sent: sent.to_vec(), ..request(1, &[5], &[6]) };
        let judged = judge(&standing, &request, &mut |_| Ok::<_, Infallible>(Some(Generation(1))));
        short(judged.expect("infallible")).expect("opened").1
    };
    let part = |count| chain(6, count);
    assert_eq!(judged(5, Some(part(1)), None, &[part(1)]), 1, "the first part's");
    assert_eq!(judged(5, Some(part(3)), Some(part(2)), &[part(3), part(4)]), 1, "a later one's");
    assert_eq!(judged(5, Some(part(4)), Some(part(2)), &[part(3), part(4)]), 1, "two of them");
    assert_eq!(judged(6, None, Some(part(2)), &[]), 1, "that of the point that took them in");
    assert_eq!(judged(6, Some(chain(7, 9)), Some(part(2)), &[chain(7, 9)]), 1, "and of a part after it");
    assert_eq!(judged(5, Some(part(1)), Some(part(2)), &[part(3)]), 2, "a part that was acked is lost");
    assert_eq!(judged(5, None, Some(part(2)), &[part(3)]), 2, "all of them are");
    assert_eq!(judged(5, Some(part(9)), Some(part(2)), &[part(3)]), 2, "another's");
    assert_eq!(judged(5, Some(chain(7, 3)), Some(part(2)), &[part(3)]), 2, "of another epoch");
    assert_eq!(judged(6, Some(chain(7, 1)), Some(part(2)), &[]), 2, "another's, after the point");
}

#[test]
fn messages_are_followed_by_this_table() {
    let now = Timestamp(7);
    let hello = |version| encode(&SourceMessage::Hello { version, software: "s".into(), time: Timestamp(1) });
    let ping = encode(&SourceMessage::Ping);
    let opening = encode(&SourceMessage::OpenGroup(request(0, &[], &[])));
    let unchanged = encode(&SourceMessage::Unchanged { group: GROUP, epoch: Epoch(1), as_of: now });
    let list = encode(&SourceMessage::ListPoints { request: 1, group: GROUP, after: None });

    for first in [&ping, &opening, &unchanged, &list, &vec![], &vec![0xff; 40]] {
        assert!(matches!(TargetSession::new("t").receive(first, now), Err(TargetRefusal::NoHello)));
    }
    let refusal = TargetSession::new("t").receive(&hello(2), now).expect_err("another version");
    let TargetMessage::Refused { reason, versions } = refusal.message() else { panic!("no refusal") };
    assert_eq!(versions, [PROTOCOL_VERSION]);
    assert!(reason.contains("version 2") && reason.contains("speaks 1"), "{reason}");

    let mut session = TargetSession::new("t");
    let welcome = TargetMessage::Welcome { version: PROTOCOL_VERSION, software: "t".into(), time: now };
    assert_eq!(session.receive(&hello(1), now).expect("hello"), TargetAction::Reply(welcome));
    assert_eq!(session.receive(&ping, now).expect("ping"), TargetAction::Reply(TargetMessage::Pong));
    assert!(matches!(session.receive(&unchanged, now), Err(TargetRefusal::NotOpen(GROUP))));
    assert!(matches!(session.receive(&list, now), Err(TargetRefusal::NotOpen(GROUP))));
    assert!(matches!(session.receive(&opening, now), Ok(TargetAction::Open(_))));
    assert!(matches!(session.receive(&opening, now), Ok(TargetAction::Open(_))), "again, after a busy");
    assert!(matches!(session.receive(&unchanged, now), Ok(TargetAction::Unchanged { .. })));
    assert!(matches!(session.receive(&list, now), Ok(TargetAction::ListPoints { .. })));
    assert!(matches!(session.receive(&hello(1), now), Err(TargetRefusal::SecondHello)));
    assert!(matches!(session.receive(&[9; 3], now), Err(TargetRefusal::Message(_))));
}

#[test]
fn requests_beyond_their_bounds_are_refused() {
    let good = request(1, &[3, 2], &[4]);
    assert!(check(&good).is_ok());
    let part = PartChain { count: 1, hash: FrameHash([1; 32]) };
    let long: Vec<u64> = (1..=17).rev().collect();
    let bad = [
        OpenGroup { name: "../x".into(), ..good.clone() },
        OpenGroup { generation: Some(Generation(0)), ..good.clone() },
        OpenGroup { instance: Instance { host: "h".repeat(65), process: [0; 16] }, ..good.clone() },
        request(1, &long, &[]),
        request(1, &[], &long[..9]),
        request(1, &[2, 3], &[]),
        request(1, &[], &[3, 3]),
        OpenGroup { parts_sent: vec![(Epoch(4), part); PARTS_SENT_MAX + 1], ..good.clone() },
        OpenGroup { parts_sent: vec![(Epoch(4), PartChain { count: 0, ..part })], ..good.clone() },
    ];
    for request in bad {
        assert!(matches!(check(&request), Err(TargetRefusal::Field(_))), "{request:?}");
    }
    let mut session = TargetSession::new("t");
    let hello = encode(&SourceMessage::Hello { version: 1, software: String::new(), time: Timestamp(1) });
    session.receive(&hello, Timestamp(0)).expect("hello");
    for number in 0..=GROUPS_MAX {
        let request = OpenGroup { group: GroupId([number as u8; 16]), ..good.clone() };
        let result = session.receive(&encode(&SourceMessage::OpenGroup(request)), Timestamp(0));
        assert_eq!(result.is_ok(), number < GROUPS_MAX, "group {number}");
    }
}

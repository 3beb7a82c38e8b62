//! The machine of `session::target`, step by step.

use super::*;
use crate::escrow::Envelope;
use crate::message::encode;
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
        envelope: Envelope { key: KeyId::default(), encapsulated: vec![], sealed: vec![] },
        volumes: vec![],
    }
}

/// The target's chain is the points 1 to `newest`.
fn judged(newest: u64, generation: u64, held: bool, request: &OpenGroup) -> Judgement {
    let standing = Standing { head: (newest > 0).then(|| head(newest)), generation: Generation(generation), held };
    let mut in_chain = |asked: Head| Ok::<_, Infallible>(asked.epoch.0 <= newest && asked == head(asked.epoch.0));
    judge(&standing, request, &mut in_chain).expect("infallible")
}

fn open(verdict: Verdict, generation: u64, lost: &[u64]) -> Judgement {
    Judgement::Open { verdict, generation: Generation(generation), lost: lost.iter().copied().map(Epoch).collect() }
}

type Row = (u64, u64, u64, &'static [u64], &'static [u64], Judgement);

#[test]
fn histories_are_judged_by_this_table() {
    let to = |epoch: u64| Verdict::Rollback { to: Some(Epoch(epoch)) };
    let nothing = Verdict::Rollback { to: None };
    let fork = Judgement::Refuse(RefusalReason::Fork);
    let fenced = Judgement::Refuse(RefusalReason::Fenced);
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
        (5, 1, 1, &[7, 6], &[], fork.clone()),
        (5, 2, 1, &[7, 6], &[], fenced.clone()),
        (5, 2, 3, &[99], &[98], fork),
    ];
    for (number, (newest, granted, claimed, acked, sent, expected)) in table.into_iter().enumerate() {
        assert_eq!(judged(newest, granted, false, &request(claimed, acked, sent)), expected, "row {number}");
    }
    // While the holder of a generation lives, a lower one is kept out; the same one may come back.
    assert_eq!(judged(5, 2, true, &request(1, &[3], &[])), fenced);
    assert_eq!(judged(5, 2, true, &request(2, &[5], &[])), open(Verdict::Continue, 2, &[]));
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
    let long: Vec<u64> = (1..=17).rev().collect();
    let bad = [
        OpenGroup { name: "../x".into(), ..good.clone() },
        OpenGroup { generation: Some(Generation(0)), ..good.clone() },
        request(1, &long, &[]),
        request(1, &[], &long[..9]),
        request(1, &[2, 3], &[]),
        request(1, &[], &[3, 3]),
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

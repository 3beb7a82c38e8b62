//! The machine of `session::source`, step by step.

use super::*;
use crate::codec::FrameListHasher;
use crate::message::{Instance, Resume};
use crate::record::Begin;
use crate::seal::DataKey;
use crate::session::chain::{Chain, Step};
use crate::units::{BLOCK_BYTES, Block, Extent, KeyId, VolumeSlot};

const GROUP: GroupId = GroupId([1; 16]);

fn facts() -> GroupFacts {
    let volumes = vec![Volume { slot: VolumeSlot(0), size_bytes: 1 << 20, name: "root".into() }];
    let envelope = Envelope { key: KeyId::default(), encapsulated: vec![], sealed: vec![] };
    GroupFacts { group: GROUP, name: "main".into(), instance: Instance::default(), envelope, volumes }
}

fn outgoing(epoch: u64, attempt: u8, generation: u64, commit: bool) -> Outgoing {
    let attempt = AttemptId([attempt; 16]);
    let sealer = Sealer::new(GROUP, Epoch(epoch), Generation(generation), attempt, &DataKey::new([7; 32]));
    let begin = Begin { key: KeyId::default(), volumes: facts().volumes };
    let extents = vec![Extent { start: Block(3), count: 1 }];
    let frames: Vec<Bytes> = vec![
        sealer.begin(&begin).into(),
        sealer.content(VolumeSlot(0), Sequence(1), extents.clone(), &[9; BLOCK_BYTES]).into(),
        sealer.content(VolumeSlot(0), Sequence(2), extents, &[epoch as u8; BLOCK_BYTES]).into(),
    ];
    let mut list = FrameListHasher::default();
    for bytes in &frames {
        list.push(&frame::hash(bytes));
    }
    let draft = CommitDraft {
        class: Class::Crash,
        cut_time: Timestamp(5),
        meters: Meters::default(),
        first_epoch: Epoch(epoch),
        after_rollback_to: None,
        label: None,
        volumes: vec![],
        layouts: Vec::new(),
    };
    let bytes = frames.iter().map(|bytes| bytes.len() as u64).sum();
    let end = if commit { End::Commit(draft) } else { End::Part };
    Outgoing { epoch: Epoch(epoch), attempt, frames, list: list.list(), bytes, end, sealer: Arc::new(sealer) }
}

/// A target that is nothing but its chain.
fn opened(chain: &Chain, verdict: Verdict) -> GroupOpened {
    let resume = |open: &crate::session::chain::OpenAttempt| Resume {
        epoch: open.epoch,
        attempt: open.attempt,
        next: open.next,
    };
    GroupOpened {
        group: GROUP,
        generation: chain.generation(),
        verdict,
        head: chain.head(),
        parts: chain.parts(),
        resume: chain.open().map(resume),
    }
}

fn started() -> (SourceSession, Chain) {
    let mut chain = Chain::default();
    chain.grant(Generation(1));
    let mut session = SourceSession::new(facts(), Memo::default());
    assert_eq!(session.next_frame(), Next::Nothing);
    let events = session.line_up(&opened(&chain, Verdict::New)).expect("opens");
    assert!(matches!(events.as_slice(), [SourceEvent::Opened { verdict: Verdict::New, .. }]));
    (session, chain)
}

/// Lets up to `frames` frames pass; gives what the target made of them.
fn pump(session: &mut SourceSession, chain: &mut Chain, frames: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    while steps.len() < frames {
        match session.next_frame() {
            Next::Frame(bytes) => {
                let frame = frame::decode(&GROUP, &bytes).expect("a frame");
                steps.push(chain.step(&frame, frame.hash()).expect("follows"));
            }
            Next::Committing(head) => {
                assert_eq!(session.next_frame(), Next::Nothing, "held until it is stored");
                session.proceed(Head { epoch: Epoch(999), ..head });
                assert_eq!(session.next_frame(), Next::Nothing, "another's name means nothing");
                assert_eq!(session.memo().sent.first(), Some(&head));
                session.proceed(head);
            }
            Next::Nothing => break,
        }
    }
    steps
}

fn acks(steps: &[Step]) -> Vec<TargetMessage> {
    let ack = |step: &Step| match step {
        Step::Committed(head, _) => Some(TargetMessage::Acked { group: GROUP, head: *head }),
        Step::PartEnded(attempt, parts) => {
            Some(TargetMessage::PartAcked { group: GROUP, attempt: *attempt, parts: *parts })
        }
        _ => None,
    };
    steps.iter().filter_map(ack).collect()
}

#[test]
fn parts_and_epochs_go_in_order_without_waiting_for_acks() {
    let (mut session, mut chain) = started();
    session.submit(outgoing(1, 1, 1, false));
    session.submit(outgoing(1, 2, 1, true));
    session.submit(outgoing(2, 3, 1, true));
    let steps = pump(&mut session, &mut chain, usize::MAX);
    assert_eq!(steps.len(), 12);
    let messages = acks(&steps);
    assert_eq!(messages.len(), 3);
    assert_eq!(session.queued(), 3);
    let events: Vec<_> = messages.iter().flat_map(|message| session.message(message).expect("an ack")).collect();
    assert!(matches!(events[0], SourceEvent::PartAcked { .. }));
    assert!(matches!(events[2], SourceEvent::Acked(Head { epoch: Epoch(2), .. })));
    assert_eq!((session.queued(), session.memo().head()), (0, chain.head().map(|(head, _)| head)));
    for message in &messages[1..] {
        assert_eq!(session.message(message), Ok(vec![]), "an ack heard twice");
    }
}

#[test]
fn wherever_the_line_breaks_only_what_is_missing_goes_again() {
    for heard in [false, true] {
        for cut in 0..=12 {
            let (mut session, mut chain) = started();
            session.submit(outgoing(1, 1, 1, false));
            session.submit(outgoing(1, 2, 1, true));
            session.submit(outgoing(2, 3, 1, true));
            let before = pump(&mut session, &mut chain, cut);
            let heard = if heard { acks(&before) } else { vec![] };
            let mut events: Vec<_> = heard.iter().flat_map(|ack| session.message(ack).expect("an ack")).collect();
            session.line_down();
            assert_eq!(session.next_frame(), Next::Nothing);
            events.extend(session.line_up(&opened(&chain, Verdict::Continue)).expect("goes on"));
            let after = pump(&mut session, &mut chain, usize::MAX);
            assert_eq!(before.len() + after.len(), 12, "cut after {cut}: nothing twice");
            assert!(!after.contains(&Step::Duplicate));
            events.extend(acks(&after).iter().flat_map(|ack| session.message(ack).expect("an ack")));
            let points = events.iter().filter(|event| matches!(event, SourceEvent::Acked(_))).count();
            let parts = events.iter().filter(|event| matches!(event, SourceEvent::PartAcked { .. })).count();
            assert_eq!((points, parts, session.queued()), (2, 1, 0), "cut after {cut}: each acked once");
        }
    }
}

#[test]
fn a_target_that_forgot_its_unfinished_attempt_gets_it_from_the_begin() {
    let (mut session, mut chain) = started();
    session.submit(outgoing(1, 1, 1, true));
    pump(&mut session, &mut chain, 2);
    let mut restarted = Chain::at(chain.head(), chain.generation(), chain.parts());
    session.line_up(&opened(&restarted, Verdict::Continue)).expect("goes on");
    assert_eq!(pump(&mut session, &mut restarted, usize::MAX).len(), 4);
}

#[test]
fn a_higher_generation_voids_what_was_submitted() {
    let (mut session, mut chain) = started();
    session.submit(outgoing(1, 1, 1, true));
    pump(&mut session, &mut chain, usize::MAX);
    chain = Chain::default();
    chain.grant(Generation(2));
    let events = session.line_up(&opened(&chain, Verdict::TargetBehind)).expect("opens");
    assert!(matches!(events.as_slice(), [SourceEvent::Voided, SourceEvent::Opened { generation: Generation(2), .. }]));
    session.submit(outgoing(1, 1, 1, true));
    assert_eq!((session.queued(), session.next_frame()), (0, Next::Nothing), "the lower generation is passed over");
    session.submit(outgoing(1, 2, 2, true));
    assert_eq!(acks(&pump(&mut session, &mut chain, usize::MAX)).len(), 1);
}

#[test]
fn a_point_whose_ack_was_lost_is_one_under_a_new_generation_too() {
    let (mut session, mut chain) = started();
    session.submit(outgoing(1, 1, 1, true));
    session.submit(outgoing(2, 2, 1, true));
    pump(&mut session, &mut chain, 4);
    chain.grant(Generation(2));
    let events = session.line_up(&opened(&chain, Verdict::Continue)).expect("opens");
    let expected = [SourceEvent::Acked(chain.head().expect("a point").0), SourceEvent::Voided];
    assert_eq!(events[..2], expected);
}

#[test]
fn what_was_not_sent_cannot_be_acked() {
    let (mut session, mut chain) = started();
    session.submit(outgoing(1, 1, 1, true));
    pump(&mut session, &mut chain, 2);
    let strange = Head { epoch: Epoch(1), hash: crate::units::FrameHash([9; 32]) };
    assert!(session.message(&TargetMessage::Acked { group: GROUP, head: strange }).is_err());
    let lost = Chain::at(Some((strange, AttemptId([9; 16]))), Generation(1), None);
    assert!(session.line_up(&opened(&lost, Verdict::Continue)).is_err());
    assert!(session.open_group().anew, "a new generation is asked for");
    assert_eq!(session.next_frame(), Next::Nothing);
    let mut granted = chain.clone();
    granted.grant(Generation(2));
    let events = session.line_up(&opened(&granted, Verdict::Continue)).expect("opens");
    assert_eq!(events.first(), Some(&SourceEvent::Voided));
}

#[test]
fn busy_and_refused_hold_everything_back() {
    let (mut session, chain) = started();
    session.submit(outgoing(1, 1, 1, true));
    for message in [
        TargetMessage::Busy { group: GROUP, reason: "full".into(), retry_after_ms: 5 },
        TargetMessage::GroupRefused { group: GROUP, reason: RefusalReason::Fork },
    ] {
        assert_eq!(session.message(&message).expect("followed").len(), 1);
        assert_eq!(session.next_frame(), Next::Nothing);
        session.line_up(&opened(&chain, Verdict::Continue)).expect("opens");
        assert!(matches!(session.next_frame(), Next::Frame(_)));
    }
}

#[test]
fn no_more_commits_are_under_way_than_the_memo_holds() {
    let (mut session, mut chain) = started();
    let count = SENT_MAX as u64 + 2;
    (1..=count).for_each(|epoch| session.submit(outgoing(epoch, epoch as u8, 1, true)));
    let steps = pump(&mut session, &mut chain, usize::MAX);
    assert_eq!(acks(&steps).len(), SENT_MAX);
    for ack in acks(&steps) {
        session.message(&ack).expect("an ack");
    }
    assert_eq!(acks(&pump(&mut session, &mut chain, usize::MAX)).len(), 2);
}

#[test]
fn a_target_that_lost_acked_parts_contradicts_what_is_remembered() {
    let (mut session, mut chain) = started();
    session.submit(outgoing(1, 1, 1, false));
    session.submit(outgoing(1, 2, 1, false));
    let steps = pump(&mut session, &mut chain, 4);
    let older = chain.clone();
    let steps = [steps, pump(&mut session, &mut chain, usize::MAX)].concat();
    for ack in acks(&steps) {
        session.message(&ack).expect("an ack");
    }
    let memo = session.memo().clone();
    assert_eq!(memo.parts, chain.parts());
    let comes_back = |chain: &Chain| {
        let mut session = SourceSession::new(facts(), memo.clone());
        let lined_up = session.line_up(&opened(chain, Verdict::Continue)).is_ok();
        (lined_up, session)
    };
    let (lined_up, session) = comes_back(&chain);
    assert!(lined_up && !session.open_group().anew, "as it was left");
    for lost in [older, Chain::at(None, Generation(1), None)] {
        let (lined_up, mut session) = comes_back(&lost);
        assert!(!lined_up, "a contradiction");
        assert!(session.open_group().anew);
        let mut granted = lost;
        granted.grant(Generation(2));
        let events = session.line_up(&opened(&granted, Verdict::Continue)).expect("opens");
        assert!(matches!(events.last(), Some(SourceEvent::Opened { is_new: true, parts: None, .. })), "{events:?}");
        assert!(!session.open_group().anew);
    }
}

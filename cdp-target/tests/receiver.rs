//! The receiver over real QUIC and a real store: offices kept apart, takeover, several groups on a line, parts, lists.

mod source_support;
mod support;

use cdp_protocol::limits::OFFICE_GROUPS_MAX;
use cdp_protocol::message::{RefusalReason, SourceMessage, TargetMessage, Verdict};
use cdp_protocol::recall::{Answer, Asked, QUESTION_EXTENTS_MAX, Question};
use cdp_protocol::units::{Block, Epoch, Generation, GroupId, Timestamp, VolumeSlot};
use cdp_seams::clock::Clock;
use source_support::{Enrolled, Group, Site, Source};
use support::{now_ms, within};

const HOUR_MS: i64 = 3_600_000;

/// A source of `office`, and its group with one point.
async fn with_a_point(site: &Site, office: &Enrolled) -> (Source, Group) {
    let mut group = Group::new(1, "main");
    let mut source = Source::connect(office, site.clock.wall_ms()).await;
    source.open(&mut group).await;
    source.send_point(&mut group).await;
    (source, group)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_office_reaches_no_group_of_another() {
    let site = Site::start();
    let (north, south) = (site.office("north").await, site.office("south").await);
    let (mut owner, mut theirs) = with_a_point(&site, &north).await;

    let mut thief = Source::connect(&south, site.clock.wall_ms()).await;
    let mut same_id = Group::new(1, "main");
    same_id.cut_time = Timestamp(5);
    let opened = thief.open(&mut same_id).await;
    assert_eq!((opened.verdict, opened.head), (Verdict::New, None), "a group of its own, of the same id and name");
    assert_eq!(thief.list(&same_id, None).await.0, [], "nothing of the other office's is listed");
    let head = thief.send_point(&mut same_id).await;
    assert_ne!(Some(head), theirs.head());

    // Claiming to stand where the other office's group does helps nothing: no such point is known here.
    let mut claims = Group::new(2, "other");
    claims.pretend(&theirs);
    let opened = thief.open(&mut claims).await;
    assert_eq!((opened.head, opened.resume), (None, None));

    let (points, _) = owner.list(&theirs, None).await;
    assert_eq!(points.iter().map(|point| point.epoch).collect::<Vec<_>>(), [Epoch(1)], "the owner's is as it was");
    assert_eq!(owner.open(&mut theirs).await.head.map(|(head, _)| head), theirs.head());
    assert_eq!(site.groups(&north), [GroupId([1; 16])]);
    assert_eq!(site.groups(&south), [GroupId([1; 16]), GroupId([2; 16])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_not_opened_cannot_be_listed() {
    let site = Site::start();
    let (north, south) = (site.office("north").await, site.office("south").await);
    let (mut owner, mut theirs) = with_a_point(&site, &north).await;
    let mut thief = Source::connect(&south, site.clock.wall_ms()).await;
    thief.say(&SourceMessage::ListPoints { request: 1, group: theirs.id, after: None }).await;
    within(thief.line.closed()).await;
    assert_eq!(site.groups(&south), []);
    owner.send_point(&mut theirs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_is_read_by_its_own_office_alone_and_within_bounds() {
    let site = Site::start();
    let (north, south) = (site.office("north").await, site.office("south").await);
    let (_owner, theirs) = with_a_point(&site, &north).await;
    let open = |at: &str| SourceMessage::OpenPoint { group: theirs.id, at: at.to_owned() };
    let ask = |question| SourceMessage::AskPoint(Asked { request: 5, volume: VolumeSlot(0), question });
    let content = || Question::Content { extents: vec![(Block(1), 1)] };

    let threads = site.threads();
    let mut thief = Source::connect(&south, site.clock.wall_ms()).await;
    thief.say(&open("latest")).await;
    let refused = thief.next().await;
    assert!(matches!(&refused, TargetMessage::PointRefused { reason } if reason.contains("no group")), "{refused:?}");
    assert_eq!(site.threads(), threads, "nothing is started for a group that is not there");

    // The group is not open on this connection: a point is read beside whoever has it.
    let mut reader = Source::connect(&north, site.clock.wall_ms()).await;
    reader.say(&open("latest")).await;
    let opened = reader.next().await;
    let TargetMessage::PointOpened(point) = opened else { panic!("{opened:?}") };
    assert_eq!((Some(point.head), point.has_key), (theirs.head(), false), "its envelope is nobody's");
    reader.say(&ask(content())).await;
    let told = reader.next().await;
    assert!(matches!(told, TargetMessage::Answer { request: 5, answer: Answer::Frame { .. } }), "{told:?}");
    assert_eq!(reader.next().await, TargetMessage::Answer { request: 5, answer: Answer::Done });
    reader.say(&open("latest")).await;
    within(reader.line.closed()).await;

    let beyond = Question::Holdings { extents: vec![(Block(0), u32::MAX)] };
    for (first, message) in [(None, ask(content())), (Some(open("9")), ask(beyond)), (None, open(&"9".repeat(129)))] {
        let mut hostile = Source::connect(&north, site.clock.wall_ms()).await;
        if let Some(first) = first {
            hostile.say(&first).await;
            let refused = hostile.next().await;
            let nearest = "the nearest before is 1";
            assert!(
                matches!(&refused, TargetMessage::PointRefused { reason } if reason.contains(nearest)),
                "{refused:?}"
            );
        }
        hostile.say(&message).await;
        within(hostile.line.closed()).await;
    }

    // One that asks and asks and reads nothing.
    let mut deaf = Source::connect(&north, site.clock.wall_ms()).await;
    deaf.say(&open("latest")).await;
    assert!(matches!(deaf.next().await, TargetMessage::PointOpened(_)));
    let all = Question::Content { extents: vec![(Block(1), 1); QUESTION_EXTENTS_MAX] };
    for _ in 0..200 {
        if deaf.try_say(&ask(all.clone())).await.is_err() {
            break;
        }
    }
    within(deaf.line.closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_hours_apart_connect_and_make_points() {
    let site = Site::start();
    for (name, hours) in [("ahead", 9), ("behind", -9)] {
        let office = site.office(name).await;
        let shifted = now_ms() + hours * HOUR_MS;
        let mut source = Source::connect(&office, shifted).await;
        let apart = source.welcome_time.0 - shifted;
        assert!((apart + hours * HOUR_MS).abs() < HOUR_MS, "the welcome tells the target's clock: {apart}");
        let mut group = Group::new(1, "main");
        group.cut_time = Timestamp(shifted);
        source.open(&mut group).await;
        source.send_point(&mut group).await;
        let (points, _) = source.list(&group, None).await;
        assert_eq!(points[0].cut_time, Timestamp(shifted), "the cut's own time is kept as it was said");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_broke_is_gone_on_with_by_the_same_process() {
    let site = Site::start();
    let office = site.office("north").await;
    let (first, mut group) = with_a_point(&site, &office).await;
    let mut second = Source::connect(&office, site.clock.wall_ms()).await;
    let opened = second.open(&mut group).await;
    assert_eq!((opened.verdict, opened.generation), (Verdict::Continue, Generation(1)));
    within(first.line.closed()).await;
    second.send_point(&mut group).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_process_takes_over_and_the_one_before_is_told_whenever_it_asks() {
    let site = Site::start();
    let office = site.office("north").await;
    let mut original = Group::new(1, "main");
    let mut first = Source::connect(&office, site.clock.wall_ms()).await;
    first.open(&mut original).await;
    first.send_point(&mut original).await;
    // A copy that was started right after it was made: nothing is here that it does not know.
    let mut copy = original.copied(2);
    let mut second = Source::connect(&office, site.clock.wall_ms()).await;
    let opened = second.open(&mut copy).await;
    assert_eq!((opened.verdict, opened.generation), (Verdict::Continue, Generation(1)));
    let TargetMessage::GroupRefused { reason: told @ RefusalReason::Superseded { .. }, .. } = first.next().await else {
        panic!("not told")
    };
    assert_eq!(told, RefusalReason::Superseded { by: "test".into(), at: Timestamp(site.clock.wall_ms()) });
    second.send_point(&mut copy).await;

    // It did not hear it, and comes again; then it is started anew, and its history is judged.
    assert_eq!(first.try_open(&original).await, Err(told));
    original.process = [3; 16];
    let opened = first.open(&mut original).await;
    assert_eq!((opened.verdict, opened.generation), (Verdict::Rollback { to: Some(Epoch(1)) }, Generation(2)));
    assert!(matches!(
        second.next().await,
        TargetMessage::GroupRefused { reason: RefusalReason::Superseded { .. }, .. }
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_an_older_point_leaves_the_originals_line_and_the_original_is_a_fork() {
    let site = Site::start();
    let office = site.office("north").await;
    let mut original = Group::new(1, "main");
    let mut first = Source::connect(&office, site.clock.wall_ms()).await;
    first.open(&mut original).await;
    first.send_points(&mut original, 2).await;
    let mut copy = original.copied(2);
    first.send_point(&mut original).await;

    let mut second = Source::connect(&office, site.clock.wall_ms()).await;
    let opened = second.open(&mut copy).await;
    assert_eq!((opened.verdict, opened.generation), (Verdict::Rollback { to: Some(Epoch(2)) }, Generation(2)));
    copy.adopt(&opened);
    second.send_point(&mut copy).await;

    original.process = [3; 16];
    let mut third = Source::connect(&office, site.clock.wall_ms()).await;
    assert_eq!(third.try_open(&original).await, Err(RefusalReason::Fork), "3 was left when 4 went on from 2");
    let told = loop {
        // Both are stopped: neither history is to grow before somebody has decided.
        match second.next().await {
            TargetMessage::GroupRefused { reason, .. } => break reason,
            other => assert!(matches!(other, TargetMessage::Acked { .. }), "{other:?}"),
        }
    };
    assert_eq!(told, RefusalReason::Fork);
    assert_eq!(second.try_open(&copy).await, Err(RefusalReason::Fork));

    // The original's history is to go on; the copy is refused from then on, and freezes nothing.
    let chosen = site.resolve(&office, &original, "3").await.expect("resolved");
    assert_eq!(chosen.head, original.head().expect("three points"));
    assert_eq!(second.try_open(&copy).await, Err(RefusalReason::Left));
    let opened = third.open(&mut original).await;
    assert_eq!((opened.verdict, opened.generation), (Verdict::Rollback { to: Some(Epoch(3)) }, Generation(3)));
    assert_eq!(opened.head.map(|(head, _)| head), copy.head(), "what it compares with");
    original.adopt(&opened);
    assert_eq!(third.send_point(&mut original).await.epoch, Epoch(5));
    assert_eq!(second.try_open(&copy.copied(4)).await, Err(RefusalReason::Left), "started anew");
    let (points, _) = third.list(&original, None).await;
    assert_eq!(points.len(), 5, "nothing of either history is gone");
    third.send_point(&mut original).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_at_one_point_is_resolved_by_its_generations() {
    let site = Site::start();
    let office = site.office("north").await;
    let mut original = Group::new(1, "main");
    let mut first = Source::connect(&office, site.clock.wall_ms()).await;
    first.open(&mut original).await;
    first.send_points(&mut original, 2).await;
    let mut copy = original.copied(2);
    first.send_point(&mut original).await;

    // Put back at 2 and granted a generation, the copy stands at 3, as the original does: it has made no point yet.
    let mut second = Source::connect(&office, site.clock.wall_ms()).await;
    let opened = second.open(&mut copy).await;
    copy.adopt(&opened);
    original.process = [3; 16];
    let mut third = Source::connect(&office, site.clock.wall_ms()).await;
    assert_eq!(third.try_open(&original).await, Err(RefusalReason::Fork));

    let told = second.next().await;
    assert!(matches!(told, TargetMessage::GroupRefused { reason: RefusalReason::Fork, .. }), "{told:?}");

    let error = site.resolve(&office, &original, "3").await.expect_err("both end at 3").to_string();
    assert!(error.contains("more than one") && error.contains("2/3:") && error.contains("1/3:"), "{error}");
    let chosen = site.resolve(&office, &original, "1/3").await.expect("resolved");
    assert_eq!((chosen.generation, Some(chosen.head)), (Generation(1), original.head()));
    assert_eq!(second.try_open(&copy).await, Err(RefusalReason::Left));
    let opened = third.open(&mut original).await;
    assert_eq!((opened.verdict, opened.generation), (Verdict::Continue, Generation(3)));
    original.adopt(&opened);
    assert_eq!(third.send_point(&mut original).await.epoch, Epoch(4));
    assert_eq!(second.try_open(&copy.copied(4)).await, Err(RefusalReason::Left), "started anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_share_a_line_with_parts_lists_and_unchanged() {
    let site = Site::start();
    let office = site.office("north").await;
    let mut source = Source::connect(&office, site.clock.wall_ms()).await;
    let mut groups: Vec<Group> = (1..=4).map(|id| Group::new(id, &format!("group{id}"))).collect();
    for group in &mut groups {
        assert_eq!(source.open(group).await.verdict, Verdict::New);
    }
    for round in 1..=3_u64 {
        for group in &mut groups {
            let count = source.send_part(group).await;
            assert_eq!(count, 1);
            assert_eq!(source.send_part(group).await, 2);
            assert_eq!(source.send_point(group).await.epoch, Epoch(round));
        }
    }
    for group in &groups {
        let (points, more) = source.list(group, None).await;
        assert_eq!(points.iter().map(|point| point.epoch.0).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(!more && points.iter().all(|point| point.bytes > 0));
        let (points, _) = source.list(group, Some(Epoch(2))).await;
        assert_eq!(points.iter().map(|point| point.epoch.0).collect::<Vec<_>>(), [3]);
        assert_eq!(source.list(group, Some(Epoch(3))).await.0, []);
    }

    let unchanged = |group: &Group, epoch| SourceMessage::Unchanged { group: group.id, epoch, as_of: Timestamp(77) };
    source.say(&unchanged(&groups[0], Epoch(3))).await;
    source.say(&unchanged(&groups[1], Epoch(2))).await;
    // The lists go through the groups' own queues: what was said before is known then.
    source.list(&groups[0], None).await;
    source.list(&groups[1], None).await;
    let told = |group: &Group| site.live(group.id).unchanged.map(|word| (word.epoch, word.as_of));
    assert_eq!(told(&groups[0]), Some((Epoch(3), Timestamp(77))));
    assert_eq!(told(&groups[1]), None, "a word about another point than the newest says nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_comes_in_pages() {
    let site = Site::start();
    let office = site.office("north").await;
    let mut source = Source::connect(&office, site.clock.wall_ms()).await;
    let mut group = Group::new(1, "main");
    source.open(&mut group).await;
    source.send_points(&mut group, 600).await;
    let (mut after, mut pages, mut listed) = (None, 0, 0);
    loop {
        let (points, more) = source.list(&group, after).await;
        pages += 1;
        listed += points.len();
        after = points.last().map(|point| point.epoch);
        if !more {
            break;
        }
    }
    assert_eq!((pages, listed, after), (3, 600, Some(Epoch(600))));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_office_gets_no_more_groups_by_coming_back() {
    let site = Site::start();
    let (hostile, honest) = (site.office("hostile").await, site.office("honest").await);
    let mut first = Group::new(1, "group1");
    let mut refused = 0;
    for ids in (1..=OFFICE_GROUPS_MAX as u8 + 20).collect::<Vec<_>>().chunks(21) {
        let mut source = Source::connect(&hostile, site.clock.wall_ms()).await;
        for id in ids {
            match source.try_open(&Group::new(*id, &format!("group{id}"))).await {
                Ok(opened) => assert_eq!(opened.verdict, Verdict::New),
                Err(RefusalReason::Failed(reason)) => {
                    assert_eq!(reason, format!("the office has {OFFICE_GROUPS_MAX} groups, and may have no more"));
                    refused += 1;
                }
                Err(reason) => panic!("{reason:?}"),
            }
        }
        source.line.close("next");
    }
    assert_eq!((refused, site.groups(&hostile).len()), (20, OFFICE_GROUPS_MAX), "across connections");

    // What it has it keeps, another office is not touched, and what was refused leaves nothing behind.
    let mut source = Source::connect(&hostile, site.clock.wall_ms()).await;
    source.open(&mut first).await;
    source.send_point(&mut first).await;
    with_a_point(&site, &honest).await;
    support::eventually("the threads of refused groups are gone", || site.threads() <= OFFICE_GROUPS_MAX + 1).await;
}

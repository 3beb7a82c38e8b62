//! Parts that an agent before had sent: what they hold is on the volume, and in no point yet.

use super::*;

/// What an agent finds that comes after one of which the target holds a part with block 5 and another content; `tell` is the target's answer
/// to what it was sent since the newest point.
fn successor(tell: impl Fn(&mut Digests)) -> Digests {
    let mut bench = Bench::new();
    bench.capture(&all(1));
    bench.ack(true);
    bench.digests.write();
    bench.capture(&BTreeMap::from([(5, 2)]));
    bench.ack_part();
    bench.digests.write();
    let mut again = open(&bench.disk, GROUP, BLOCKS);
    again.opened(Some(head(1)), true);
    assert!(again.asking().is_some(), "which blocks the parts hold is to be told");
    tell(&mut again);
    again
}

/// Nobody writes to block 5, so that the volume is looked at there; then the part is void, and the block put back to what the point has.
fn learns_nothing_of_the_part(mut digests: Digests) {
    let found = Found::Content(key().digest(&content(2)));
    assert_eq!(digests.compare(0, Block(5), found, Timestamp(77)), Answer::NotNow);
    digests.void();
    digests.opened(Some(head(1)), false);
    let mut capture = capture(&BTreeMap::from([(5, 2)]));
    let unchanged = digests.take_out_unchanged(&mut capture);
    assert!(unchanged[0].is_empty(), "the target's point does not hold what the part did: {unchanged:?}");
}

#[test]
fn a_volume_is_not_learnt_from_where_a_part_of_an_agent_before_lies() {
    let extents = [Extent { start: Block(5), count: 1 }];
    learns_nothing_of_the_part(successor(|digests| {
        digests.changed(head(1), SLOT, &extents, 0, true, Some(head(1)));
    }));
}

#[test]
fn nor_where_it_is_not_known_where_they_lie() {
    learns_nothing_of_the_part(successor(|digests| digests.changed_unknown(head(1), Some(head(1)))));
}

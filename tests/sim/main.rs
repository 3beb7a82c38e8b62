//! The whole system from one seed: source, line, target, clocks and disks, with the product's own code and nothing beside it.
//!
//! `scripts/soak` goes on with it for as long as wanted.
//!
//! `CDP_SIM_SEEDS` says how many seeds, `CDP_SIM_SEED` which is the first; a failure prints the command that repeats it.
//! What a seed once found stays in `KNOWN_BAD`.

mod check;
mod kept;
mod ladder;
mod line;
mod model;
mod run;
mod sabotage;
mod source;
mod tally;
mod target;
mod trace;

use run::{Manner, found, replay, rot_under_a_living_source};
use sabotage::Sabotage;
use tally::Tally;

/// Seeds that once found something, and what: histories in which nobody looks after the points.
const KNOWN_BAD: [(u64, &str); 5] = [
    (5, "parts were acked, nothing was written behind them, and the point before was called unchanged"),
    (53, "a commit under way was forgotten where the target had no point yet, and its ack made a fork of it"),
    (691, "a commit was lost on the line, and the ack of the part behind it was taken for one of the point"),
    (712, "a kept memo that could not be read once was taken for none, and its return for a fork"),
    (15102, "a segment without header and index told of the point before it as of one of its own, damaged"),
];

/// The same, of those in which somebody does.
const KNOWN_BAD_TENDED: [(u64, &str); 10] = [
    (1624, "a point was lost with rot, another was given its number and read from the checkpoint of the first"),
    (7558, "the same, in another place"),
    (6126, "two reads failed while a checkpoint was built, and it called their blocks lost"),
    (
        10165,
        "a part of a pack was not read once, and older frames of the journal were put behind the pack's in the next",
    ),
    (16752, "a segment could not give way, and what had been gathered of it was written behind newer content"),
    (16961, "the point that a checkpoint is of was lost with rot, and what was written after it was not looked for"),
    (16049, "a rewritten segment of nothing but commits ended the search for older content"),
    (20220, "a checkpoint's packs were written over by another build at its point"),
    (28385, "the same, because a read of one failed"),
    (129_545, "a journal that had stopped in the middle of a change showed half of it"),
];

/// The same, of sources that keep digests.
const KNOWN_BAD_THRIFTY: [(u64, &str); 4] = [
    (216_137, "what came behind a point that had been removed could not be read, and the newest that stood was to go"),
    (350_441, "a checkpoint was looked at while its point was lost, and stood for another that got its number"),
    (552_791, "an agent learnt what a part of the one before held as the newest point's, and the part became void"),
    (408_057, "a target had lost a point, its source put the one before in front of it, and was refused for ever"),
];

/// The same, of sources that have a spool.
const KNOWN_BAD_SPOOLING: [(u64, &str); 6] = [
    (
        204_586,
        "a part that had waited was counted as if the target had none of its epoch, and left out by the next agent",
    ),
    (
        453_578,
        "a point was made under the number of one that an agent before had sent, and taken for acked with that one",
    ),
    (461_646, "the same"),
    (530_030, "the same"),
    (546_322, "the same"),
    (480_486, "the same, after what had been taken up was given up because the spool's disk was full"),
];

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn seeds() {
    let (first, count) = (env("CDP_SIM_SEED", 1), env("CDP_SIM_SEEDS", 1000));
    let mut total = Tally::default();
    for seed in first..first + count {
        total += found(seed, Sabotage::None, Manner::of(seed))
            .unwrap_or_else(|why| panic!("seed {seed}: {why}; {}", replay(seed)));
    }
    println!("{} crashes simulated, 0 losses: {total:?}", total.crashes());
    // The run means something only if everything happened in it.
    let each = [total.target_ends, total.source_ends, total.line_cuts, total.recoveries, total.points];
    let upkeep = [total.checkpoints, total.prunes, total.removed, total.rotten_packs].map(|events| 2 * events);
    assert!(count < 100 || each.iter().chain(&upkeep).all(|events| *events > count), "{total:?}");
}

#[test]
fn what_rots_is_asked_again_and_healed_where_the_source_still_has_it() {
    let mut total = (0, 0);
    for seed in 1..=100 {
        let (healed, lost) = rot_under_a_living_source(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        total = (total.0 + healed, total.1 + lost);
    }
    println!("{} frames healed, {} whose blocks had been changed", total.0, total.1);
    assert!(total.0 > 50 && total.1 > 50, "{total:?}: both happen");
}

#[test]
fn what_was_found_once_is_not_found_again() {
    for (seed, what) in KNOWN_BAD {
        found(seed, Sabotage::None, Manner::Plain).unwrap_or_else(|why| panic!("seed {seed}: {what}: {why}"));
    }
    let known: [(_, &[_]); 3] = [
        (Manner::Tended, &KNOWN_BAD_TENDED),
        (Manner::Thrifty, &KNOWN_BAD_THRIFTY),
        (Manner::Spooling, &KNOWN_BAD_SPOOLING),
    ];
    for (manner, known) in known {
        for (seed, what) in known {
            found(*seed, Sabotage::None, manner).unwrap_or_else(|why| panic!("{what}: {why}; {}", replay(*seed)));
        }
    }
}

#[test]
fn sabotage_is_found_within_a_thousand_seeds() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let finds: Vec<_> = Sabotage::ALL
        .iter()
        .map(|sabotage| {
            (sabotage, (1..=1000).find_map(|seed| Some((seed, found(seed, *sabotage, Manner::of(seed)).err()?))))
        })
        .collect();
    std::panic::set_hook(hook);
    for (sabotage, found) in finds {
        let (seed, why) = found.unwrap_or_else(|| panic!("{sabotage:?} is not found"));
        println!("{sabotage:?}: found with seed {seed}: {why}");
    }
}

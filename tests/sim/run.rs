//! One simulation: everything from one seed, step by step, with whatever can go wrong; then rest, and the whole checked.
//!
//! The seed chooses the next event among all that could happen: a message arrives, the group hears of it, a cut is made, a
//! sync returns, a checkpoint is built, points are removed, somebody dies. Nothing runs beside it, so a seed is a history that can be had again.

mod heal;

use std::panic::catch_unwind;
use std::time::Duration;

use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::Fault;
use cdp_source::cut::CutLimits;
use cdp_source::sim::Profile;
use cdp_source::spool::SpoolLimits;
use cdp_target::journal::JournalLimits;

use super::check::Depth;
use super::line::{LineFaults, OnStream, Wire, next};
use super::model::Model;
use super::sabotage::Sabotage;
use super::source::Source;
use super::tally::Tally;
use super::target::{Care, Target, Upkeep};

pub(crate) use heal::rot_under_a_living_source;

/// Rounds of rest within which everything has to be acked.
const ROUNDS_MAX: u32 = 400;
/// How many of 1000 events are of those who look after the points.
const UPKEEP_PERMILLE: u64 = 15;
/// Wires that may be half alive beside the newest.
const WIRES_MAX: usize = 3;

/// A simulation under way.
struct Simulation {
    random: SimRandom,
    source: Source,
    target: Target,
    wires: Vec<Wire>,
    connections: u64,
    model: Model,
    line: LineFaults,
    /// Whether whole messages were lost or came twice.
    is_lossy: bool,
    /// How many of 1000 events are misfortunes.
    harm_permille: u64,
    /// How many bits may still be flipped.
    flips_left: u64,
    /// The group is frozen until an operator resolves it.
    is_frozen: bool,
    /// Times a connection is tried in vain yet: with a spool a line may be down for long.
    outage: u64,
    is_spooling: bool,
    /// Events until the target's disk answers again.
    stalled: u64,
    /// When the target's points are looked after; none where they never are. Apart, so that the rest of a seed's history is its own.
    upkeep: Option<SimRandom>,
    tally: Tally,
}

/// How the two ends go about it. A seed is another history in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Everything marked is sent, and nobody looks after the points.
    Plain,
    /// Everything marked is sent; checkpoints are built and points removed.
    Tended,
    /// The same, and the source keeps digests: what it put back is not sent.
    Thrifty,
    /// The same again, and what the line does not take waits in a spool.
    Spooling,
}

impl Manner {
    /// Of the seeds that are gone through, every other one is thrifty; of the others every other one has a spool as well.
    pub(crate) const fn of(seed: u64) -> Self {
        match seed % 4 {
            0 => Self::Tended,
            2 => Self::Spooling,
            _ => Self::Thrifty,
        }
    }

    const fn is_thrifty(self) -> bool {
        matches!(self, Self::Thrifty | Self::Spooling)
    }
}

/// What a seed finds; a panic of the product is a find too.
///
/// # Errors
/// What was lost.
pub(crate) fn found(seed: u64, sabotage: Sabotage, manner: Manner) -> Result<Tally, String> {
    catch_unwind(|| run(seed, sabotage, manner)).unwrap_or_else(|why| {
        let text = why.downcast_ref::<String>().map(String::as_str).or_else(|| why.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("without a word")))
    })
}

/// The command that repeats a seed.
pub(crate) fn replay(seed: u64) -> String {
    format!(
        "repeat it with\n  CDP_SIM_TRACE=1 CDP_SIM_SEED={seed} CDP_SIM_SEEDS=1 cargo test -p cdp-tests --test sim -- --exact seeds --nocapture"
    )
}

/// Simulates what `seed` says, wrong in the way of `sabotage`.
///
/// # Errors
/// What was lost or never can be.
fn run(seed: u64, sabotage: Sabotage, manner: Manner) -> Result<Tally, String> {
    #[cfg(feature = "sabotage")]
    cdp_protocol::session::chain::sabotage::set_unchecked(sabotage == Sabotage::ChainUnchecked);
    #[cfg(feature = "sabotage")]
    cdp_source::digests::sabotage::set_pass_over_under_way(sabotage == Sabotage::UnderWayPassedOver);
    let random = SimRandom::new(seed);
    let mut simulation = Simulation::new(random, sabotage, manner);
    if manner != Manner::Plain {
        simulation.look_after(seed);
    }
    let steps = 300 + simulation.random.below(900);
    for step in 0..steps {
        simulation.step().map_err(|why| format!("step {step}: {why}"))?;
    }
    simulation.rest()?;
    simulation.tally += simulation.source.tally;
    Ok(simulation.tally)
}

fn profile(random: &SimRandom, manner: Manner) -> Profile {
    let repeat_permille = if manner.is_thrifty() { 200 + random.below(700) } else { 0 };
    Profile {
        repeat_permille,
        // The second volume ends within a block.
        sectors: vec![8 * (4 + random.below(20) as u32), 8 * (2 + random.below(6) as u32) + 3],
        issue_permille: 10 + random.below(120),
        in_flight_max: 1 + random.below(12) as usize,
        write_sectors_max: 1 + random.below(24) as u32,
        hot_permille: random.below(700),
        slow_permille: random.below(300),
        held_up_permille: random.below(200),
    }
}

impl Simulation {
    fn new(random: SimRandom, sabotage: Sabotage, manner: Manner) -> Self {
        let profile = profile(&random, manner);
        let limits = CutLimits { bound: Duration::from_millis(random.below(20)), blocks_max: 4 + random.below(30) };
        let model = Model::new(&profile.sectors);
        let mut source = Source::new(random.next(), profile, limits, sabotage.of_tracker());
        if manner.is_thrifty() {
            source.save_bytes();
        }
        if manner == Manner::Spooling {
            source.let_wait(SpoolLimits {
                bytes_max: [2, 4, 12][random.below(3) as usize] << 20,
                points_max: 3 + random.below(10),
                memory_bytes_max: random.below(20_000),
                window_epochs: 1 + random.below(4) as usize,
            });
        }
        let limits = JournalLimits { segment_bytes_max: 1500 + random.below(20_000) };
        let target = Target::new(random.next(), limits, sabotage);
        let line = match random.below(3) {
            0 => LineFaults { lost_permille: random.below(30), twice_permille: random.below(30) },
            _ => LineFaults::default(),
        };
        let is_lossy = line.lost_permille + line.twice_permille > 0;
        let harm_permille = 2 + random.below(50);
        let flips_left = if random.below(8) == 0 { 1 + random.below(3) } else { 0 };
        let (wires, tally) = (Vec::new(), Tally::default());
        Self {
            random,
            source,
            target,
            wires,
            connections: 0,
            model,
            line,
            is_lossy,
            harm_permille,
            flips_left,
            is_frozen: false,
            outage: 0,
            is_spooling: manner == Manner::Spooling,
            stalled: 0,
            upkeep: None,
            tally,
        }
    }

    /// The next event. One that has nothing to do does nothing.
    fn step(&mut self) -> Result<(), String> {
        self.tally.steps += 1;
        self.stalled = self.stalled.saturating_sub(1);
        if self.upkeep.as_ref().is_some_and(|random| random.below(1000) < UPKEEP_PERMILLE) {
            self.care()?;
        }
        if self.random.below(1000) < self.harm_permille {
            return self.harm();
        }
        let times = 1 + self.random.below(6);
        match self.random.below(100) {
            0..35 => return (0..times).try_for_each(|_| self.deliver()),
            35..60 => return (0..times).try_for_each(|_| self.pump()),
            60..70 => self.hear(),
            70..80 => self.act(),
            80..84 => self.write(),
            84..92 => return self.sync(),
            _ => return self.connect(),
        }
        Ok(())
    }

    /// The target's points are looked after, from now on.
    fn look_after(&mut self, seed: u64) {
        let random = SimRandom::new(seed ^ 0x1add_e500);
        self.target.look_after(Upkeep::new(random.next(), 1500 + random.below(20_000)));
        self.upkeep = Some(random);
    }

    /// Hours pass, or somebody looks after the points.
    fn care(&mut self) -> Result<(), String> {
        let random = self.upkeep.as_ref().expect("it is looked after");
        if random.below(4) == 0 {
            let time = Duration::from_secs(60 * random.below([60, 24 * 60, 5 * 24 * 60][random.below(3) as usize]));
            self.source.world.pass(time);
            self.target.clock.advance(time);
            return Ok(());
        }
        if !self.target_works() {
            return Ok(());
        }
        let cared = self.target.care(&mut self.model)?;
        self.count(cared);
        self.target.answer(&mut self.wires, &mut self.model)?;
        self.after_target()
    }

    const fn count(&mut self, cared: Care) {
        self.tally.checkpoints += cared.checkpoints;
        self.tally.prunes += cared.prunes;
    }

    fn harm(&mut self) -> Result<(), String> {
        match self.random.below(10) {
            0..2 => self.cut_line(),
            2..5 => self.harm_source(),
            5..9 => return self.harm_target(),
            _ => self.turn_clocks(),
        }
        Ok(())
    }

    /// Something arrives.
    fn deliver(&mut self) -> Result<(), String> {
        if self.wires.is_empty() {
            return Ok(());
        }
        let at = self.random.below(self.wires.len() as u64) as usize;
        match self.random.below(3) {
            0 => self.source_hears(at),
            1 => self.target_hears(),
            _ => self.frame(at),
        }
    }

    fn source_hears(&mut self, at: usize) -> Result<(), String> {
        let wire = &mut self.wires[at];
        let Some(bytes) = next(&mut wire.to_source, self.line, &self.random) else { return Ok(()) };
        // A line that loses messages makes the target say what it cannot have been sent.
        let may_contradict = self.target.is_hurt || self.is_lossy;
        match self.source.receive(&bytes, wire, may_contradict) {
            // Rot took the newest commit and what names it: whether the source stands there nobody can tell any more.
            Err(_) if self.target.is_hurt => self.is_frozen = true,
            heard => heard?,
        }
        if self.source.is_superseded() {
            return Err("the only process there is was told that another took the group over".into());
        }
        Ok(())
    }

    /// Control messages of an older connection come before those of a newer one: between the two lies the start of a process,
    /// or a wait.
    fn target_hears(&mut self) -> Result<(), String> {
        let waiting = |wire: &Wire| !wire.target_gone && !wire.to_target.is_empty();
        let Some(at) = self.wires.iter().position(waiting) else { return Ok(()) };
        if !self.target_works() {
            return Ok(());
        }
        // A request that came twice would be granted twice: no stream does that, and a source that heard both answers would
        // look like two.
        let faults = LineFaults { twice_permille: 0, ..self.line };
        let Some(bytes) = next(&mut self.wires[at].to_target, faults, &self.random) else { return Ok(()) };
        self.target.receive(&bytes, &mut self.wires, at, &mut self.model)?;
        self.after_target()
    }

    fn frame(&mut self, at: usize) -> Result<(), String> {
        let wire = &mut self.wires[at];
        if wire.target_gone || !self.target.is_up() || self.stalled > 0 {
            return Ok(());
        }
        let first_is_mark = matches!(wire.frames.front(), Some(OnStream::Opened));
        let faults = if first_is_mark { LineFaults::default() } else { self.line };
        let Some(on_stream) = next(&mut wire.frames, faults, &self.random) else { return Ok(()) };
        self.target.frame(on_stream, &mut self.wires, at, &mut self.model)?;
        self.after_target()
    }

    const fn target_works(&self) -> bool {
        self.target.is_up() && self.stalled == 0
    }

    fn sync(&mut self) -> Result<(), String> {
        if !self.target_works() {
            return Ok(());
        }
        self.target.sync(&mut self.wires, &mut self.model)?;
        if self.target.is_hurt {
            self.target.scrub();
            self.target.heal(&mut self.wires, &mut self.model)?;
        }
        self.after_target()
    }

    /// Whether the target's end came with what it was just doing.
    fn after_target(&mut self) -> Result<(), String> {
        if self.target.is_up() && self.target.disk.is_down() {
            self.tally.target_ends += 1;
            self.end_target();
            self.restart_target()?;
        }
        self.wires.retain(|wire| !wire.is_over());
        Ok(())
    }

    fn pump(&mut self) -> Result<(), String> {
        self.source.pump(self.wires.last_mut(), &mut self.model)
    }

    fn hear(&mut self) {
        let heard = self.source.hear();
        self.survived(heard);
    }

    /// Time passes, and the group does what is due.
    fn act(&mut self) {
        let time = Duration::from_millis(self.random.below(1500));
        self.source.world.pass(time);
        self.target.clock.advance(time);
        let acted = self.source.act();
        self.survived(acted);
    }

    fn survived(&mut self, done: Result<(), Option<u64>>) {
        if let Err(wire) = done {
            self.tally.source_ends += 1;
            self.source_gone(wire);
        }
    }

    fn write(&self) {
        self.source.world.run(self.random.below(200));
    }

    fn connect(&mut self) -> Result<(), String> {
        if !self.source.is_up() {
            self.source.start();
            return Ok(());
        }
        if self.source.wants_line() && self.outage > 0 {
            self.outage -= 1;
        } else if self.source.wants_line() && self.target.is_up() && self.wires.len() < WIRES_MAX {
            self.connections += 1;
            let mut wire = Wire::new(self.connections);
            self.source.connect(&mut wire);
            self.wires.push(wire);
        } else if let Some(wire) = self.wires.last_mut() {
            self.source.ask_again(wire);
        }
        // What one end has closed the other notices at last.
        if let Some(wire) = self.wires.iter_mut().find(|wire| wire.target_gone && !wire.source_gone) {
            wire.source_gone = true;
            let number = wire.number;
            self.source.line_down(number);
        }
        if let Some(at) = self.wires.iter().position(|wire| wire.source_gone && !wire.target_gone)
            && self.random.below(2) == 0
        {
            self.target.close(&mut self.wires[at]);
            return self.after_target();
        }
        Ok(())
    }

    fn cut_line(&mut self) {
        if let Some(wire) = self.wires.last_mut().filter(|wire| !wire.source_gone) {
            self.tally.line_cuts += 1;
            wire.breaks(&self.random);
            let number = wire.number;
            self.source.line_down(number);
        }
        if self.is_spooling {
            self.outage = self.random.below(40);
        }
    }

    fn source_gone(&mut self, wire: Option<u64>) {
        for wire in self.wires.iter_mut().filter(|held| Some(held.number) == wire) {
            wire.breaks(&self.random);
        }
    }

    fn harm_source(&mut self) {
        if !self.source.is_up() {
            return;
        }
        let wire = match self.random.below(10) {
            0..5 => return self.source.world.mortality.die_in(self.random.below(40)),
            5..7 => return self.source.harm_disk(),
            7 => self.source.kill(),
            8 => self.source.power_loss(),
            _ => self.source.stop(),
        };
        self.tally.source_ends += 1;
        self.source_gone(wire);
    }

    fn harm_target(&mut self) -> Result<(), String> {
        if !self.target.is_up() {
            return self.restart_target();
        }
        if self.flips_left > 0 && self.random.below(4) == 0 && self.target.hurt(self.random.next()) {
            self.flips_left -= 1;
            self.tally.flips += 1;
            return Ok(());
        }
        let in_calls = self.target.disk.calls() + self.random.below(25);
        match self.random.below(13) {
            0..5 => self.target.disk.fault_at(in_calls, Fault::PowerCut),
            5 => self.target.disk.fault_at(in_calls, Fault::Death),
            6 => self.target.disk.fault_at(in_calls, Fault::Error(std::io::ErrorKind::Other)),
            7 => self.target.disk.fault_at(in_calls, Fault::Error(std::io::ErrorKind::StorageFull)),
            8 => {
                let room = if self.random.below(2) == 0 { u64::MAX } else { self.random.below(4000) };
                self.target.disk.set_free_bytes(room);
            }
            9 => self.stalled = self.random.below(100),
            10 => {
                self.target.disk.process_death();
                return self.after_target();
            }
            _ => {
                self.target.disk.power_cut();
                return self.after_target();
            }
        }
        Ok(())
    }

    fn end_target(&mut self) {
        for number in self.target.end() {
            for wire in self.wires.iter_mut().filter(|wire| wire.number == number) {
                wire.target_gone = true;
                wire.frames.clear();
                wire.to_target.clear();
                if !wire.source_gone {
                    wire.source_gone = true;
                    self.source.line_down(number);
                }
            }
        }
        // A connection that the server had not seen yet has nobody at its other end either.
        for wire in &mut self.wires {
            wire.target_gone = true;
            if !wire.source_gone {
                wire.source_gone = true;
                self.source.line_down(wire.number);
            }
        }
        self.wires.clear();
    }

    /// Starts the target again; it may end once more on the way. What it recovered is checked.
    fn restart_target(&mut self) -> Result<(), String> {
        self.target.disk.clear_faults();
        while self.random.below(4) == 0 {
            let fault = if self.random.below(3) == 0 { Fault::Death } else { Fault::PowerCut };
            self.target.disk.fault_at(self.target.disk.calls() + self.random.below(30), fault);
            self.target.start();
            self.target.disk.clear_faults();
            if self.target.disk.is_down() {
                self.tally.target_ends += 1;
            }
            self.target.end();
        }
        self.target.check_beside(&mut self.model, Depth::Sample(0))?;
        self.target.start();
        if !self.target.is_up() {
            return Err("a server does not start on a sound disk".into());
        }
        self.tally.recoveries += 1;
        self.target.check(&mut self.model, Depth::Sample(self.random.next()))
    }

    fn turn_clocks(&mut self) {
        let apart_ms = [0, 3_600_000, -3_600_000, 86_400_000 * 400, -86_400_000 * 400];
        let chosen = apart_ms[self.random.below(apart_ms.len() as u64) as usize];
        if self.random.below(2) == 0 {
            self.source.world.set_wall_offset_ms(chosen);
        } else {
            self.target.clock.set_wall_ms(1_700_000_000_000 + chosen);
        }
    }

    /// Nothing goes wrong any more and nothing is written: all there is becomes a point, and everything is checked.
    fn rest(&mut self) -> Result<(), String> {
        (self.line, self.stalled, self.is_spooling) = (LineFaults::default(), 0, false);
        self.outage = 0;
        self.source.spare();
        self.target.disk.clear_faults();
        self.target.disk.set_free_bytes(u64::MAX);
        self.source.world.set_quiet(true);
        self.source.world.run(20_000);
        if !self.target.is_up() {
            self.restart_target()?;
        }
        // What was lost on the old line is asked for no more: a silent line is given up.
        self.cut_line();
        let media = self.source.world.media();
        for _ in 0..ROUNDS_MAX {
            self.round()?;
            if self.is_frozen {
                self.tally.frozen += 1;
                return self.target.check(&mut self.model, Depth::Everything);
            }
            if self.source.is_idle() && self.model.newest().is_some_and(|newest| **newest == media) {
                self.tally.points += self.model.acked.len() as u64;
                let cared = self.target.care_at_last(&mut self.model)?;
                self.count(cared);
                self.tally.removed += self.model.kept.gone() as u64;
                self.target.check(&mut self.model, Depth::Everything)?;
                self.tally.rotten_packs += self.target.read_round_packs(&mut self.model)?;
                return Ok(());
            }
        }
        Err(format!("no progress: {}", self.source.standing()))
    }

    fn round(&mut self) -> Result<(), String> {
        self.connect()?;
        self.act();
        for _ in 0..60 {
            self.pump()?;
            for at in (0..self.wires.len()).rev() {
                if at < self.wires.len() {
                    self.source_hears(at)?;
                }
                if at < self.wires.len() {
                    self.frame(at)?;
                }
            }
            self.target_hears()?;
            self.hear();
        }
        self.sync()
    }
}

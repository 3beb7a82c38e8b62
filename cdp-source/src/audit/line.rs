//! The audit over the line: which blocks the target is asked about next, and within how many bytes.
//!
//! Each block of each volume once a round, as far as a share of what the line carries allows. One question is under way at a time.
//! Arithmetic only; asks nothing itself, and does not say what becomes of an answer.

use cdp_protocol::holding::QUESTION_BLOCKS_MAX;
use cdp_protocol::units::{Block, Extent};
use std::time::Duration;

/// The share of what the line carries that the audit may take.
const LINE_SHARE: f64 = 0.01;
/// What a line is taken to carry before anything is known of it: 1 Mbit/s.
const LINE_BYTES_PER_S_UNKNOWN: f64 = 125_000.0;
/// Bytes that are saved up at most: one answer.
const SAVED_BYTES_MAX: f64 = 64.0 * 1024.0;
/// Bytes of a question, and of an answer beside its holdings.
const QUESTION_BYTES: usize = 256;
/// When a question is asked once more that no answer has come to: the line may have gone.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// Blocks of one volume that the target is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The volume, by its place in the group.
    pub volume: usize,
    /// The blocks.
    pub blocks: Extent,
}

/// Where the audit over the line stands.
#[derive(Debug)]
pub struct LineAudit {
    /// The next block of the round.
    next: (usize, u64),
    /// Blocks that the round may ask about.
    blocks: f64,
    /// Bytes that may be taken from the line; below zero after an answer that was longer than what was saved up.
    bytes: f64,
    at: Option<Duration>,
    asked: Option<(Question, Duration)>,
}

impl LineAudit {
    /// One that begins there: where it was longest that anything was proved.
    #[must_use]
    pub const fn new(next: (usize, u64)) -> Self {
        Self { next, blocks: 0.0, bytes: 0.0, at: None, asked: None }
    }

    /// What to ask now, if anything, so that every block of volumes of these sizes is asked about once in `round`, or as often as the line
    /// allows.
    pub fn question(
        &mut self,
        sizes: &[u64],
        round: Duration,
        line_bytes_per_s: Option<f64>,
        now: Duration,
    ) -> Option<Question> {
        let all: u64 = sizes.iter().sum();
        let since = now.saturating_sub(self.at.replace(now).unwrap_or(now)).as_secs_f64();
        let most = f64::from(QUESTION_BLOCKS_MAX);
        self.blocks = (self.blocks + all as f64 * since / round.as_secs_f64()).min(2.0 * most);
        let line = line_bytes_per_s.unwrap_or(LINE_BYTES_PER_S_UNKNOWN);
        self.bytes = (self.bytes + LINE_SHARE * line * since).min(SAVED_BYTES_MAX);
        if self.asked.is_some_and(|(_, at)| now < at + ASK_AGAIN) {
            return None;
        }
        if all == 0 || self.blocks < most.min(all as f64) || self.bytes < QUESTION_BYTES as f64 {
            return None;
        }
        let question = self.next_question(sizes)?;
        self.bytes -= QUESTION_BYTES as f64;
        self.asked = Some((question, now));
        Some(question)
    }

    fn next_question(&mut self, sizes: &[u64]) -> Option<Question> {
        // Once around, and the first volume again.
        for _ in 0..=sizes.len() {
            let (volume, from) = self.next;
            match sizes.get(volume) {
                Some(size) if from < *size => {
                    let count = (size - from).min(QUESTION_BLOCKS_MAX.into()) as u32;
                    return Some(Question { volume, blocks: Extent::new(Block(from as u32), count)? });
                }
                Some(_) => self.next = (volume + 1, 0),
                None => self.next = (0, 0),
            }
        }
        None
    }

    /// The question that waits for an answer.
    #[must_use]
    pub fn asked(&self) -> Option<Question> {
        self.asked.map(|(question, _)| question)
    }

    /// It was answered, in so many bytes, for so many of its first blocks; none where the answer is of no use.
    pub fn answered(&mut self, blocks: u32, bytes: usize) {
        let Some((question, _)) = self.asked.take() else { return };
        self.bytes -= bytes as f64;
        // An answer of no use is not asked for at once again.
        self.blocks -= f64::from(if blocks == 0 { question.blocks.count } else { blocks });
        self.next = (question.volume, u64::from(question.blocks.start.0) + u64::from(blocks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEEK: Duration = Duration::from_secs(7 * 86_400);

    /// A round on a line: blocks and bytes that were asked for in `time`.
    fn run(sizes: &[u64], line: Option<f64>, time: Duration, bytes_a_block: usize) -> (u64, f64) {
        let (mut audit, mut blocks, mut bytes) = (LineAudit::new((0, 0)), 0, 0.0);
        for second in 0..time.as_secs() {
            if let Some(question) = audit.question(sizes, 4 * WEEK, line, Duration::from_secs(second)) {
                let answer = question.blocks.count as usize * bytes_a_block;
                audit.answered(question.blocks.count, answer);
                blocks += u64::from(question.blocks.count);
                bytes += (answer + QUESTION_BYTES) as f64;
            }
        }
        (blocks, bytes)
    }

    #[test]
    fn every_block_is_asked_about_once_in_a_round_where_the_line_allows() {
        let sizes = [3 << 20, 0, 1 << 20];
        let (blocks, _) = run(&sizes, Some(1e6), 4 * WEEK, 21);
        let all: u64 = sizes.iter().sum();
        assert!(blocks <= all && blocks + 2 * u64::from(QUESTION_BLOCKS_MAX) >= all, "{blocks} of {all}");
    }

    #[test]
    fn no_more_than_a_hundredth_of_the_line_is_taken() {
        // 64 TiB, for which no line of these has a hundredth to give.
        let day = Duration::from_secs(86_400);
        for (line, rate) in [(Some(10_000.0), 10_000.0), (Some(2e6), 2e6), (None, LINE_BYTES_PER_S_UNKNOWN)] {
            let (_, bytes) = run(&[1 << 32; 4], line, day, 90);
            let budget = 0.01 * rate * day.as_secs_f64();
            assert!(bytes <= budget + SAVED_BYTES_MAX, "{bytes} of {budget} at {rate}");
            assert!(bytes >= 0.8 * budget, "{bytes} of {budget} at {rate}: it is made use of");
        }
    }

    #[test]
    fn the_round_goes_on_behind_what_was_answered_and_begins_again() {
        let mut audit = LineAudit::new((1, 1000));
        let sizes = [100, 1200];
        let mut at = Duration::ZERO;
        let mut ask = |audit: &mut LineAudit| {
            at += Duration::from_secs(3600);
            audit.question(&sizes, Duration::from_secs(3600), None, at).expect("an hour is a round").blocks
        };
        assert!(audit.question(&sizes, WEEK, None, Duration::ZERO).is_none(), "nothing is saved up yet");
        let blocks = ask(&mut audit);
        assert_eq!((blocks.start, blocks.count, audit.asked().map(|asked| asked.volume)), (Block(1000), 200, Some(1)));
        audit.answered(50, 100);
        assert_eq!(ask(&mut audit), Extent { start: Block(1050), count: 150 });
        audit.answered(0, 100);
        assert_eq!(ask(&mut audit), Extent { start: Block(1050), count: 150 }, "of no use: once more");
        audit.answered(150, 100);
        assert_eq!(ask(&mut audit), Extent { start: Block(0), count: 100 });
    }

    #[test]
    fn a_question_without_an_answer_is_asked_again_after_a_minute() {
        let mut audit = LineAudit::new((0, 0));
        let round = Duration::from_secs(10);
        let mut ask = |at: u64| audit.question(&[100], round, None, Duration::from_secs(at)).is_some();
        assert_eq!([ask(0), ask(10), ask(20), ask(69), ask(70)], [false, true, false, false, true]);
    }
}

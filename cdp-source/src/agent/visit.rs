//! A short visit to the target besides the agent's own line, for `doctor`: whether it talks to us, and its clock.
//!
//! A visit says hello and asks; it opens no group and changes nothing.

use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{self, PROTOCOL_VERSION, SourceMessage, TargetMessage};
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::Clock;
use cdp_seams::line::{Control, Line, read_packet, write_packet};
use std::io;
use std::time::Duration;
use tokio::time::timeout;

const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// Why a visit gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    /// The line broke.
    #[error("ask the target: the line broke")]
    Line(#[from] io::Error),
    /// The answer does not decode.
    #[error("ask the target: the answer does not decode")]
    Message(#[from] message::MessageError),
    /// The target refused to talk.
    #[error("the target refused: {0}")]
    Refused(String),
    /// No answer, or another than was asked for.
    #[error("the target did not answer what was asked")]
    NoAnswer,
}

/// Our clock minus the target's, in milliseconds; rough.
///
/// # Errors
/// Where the target does not answer.
pub async fn target_clock_ahead_ms(line: &dyn Line, clock: &dyn Clock) -> Result<i64, VisitError> {
    let time = hello(line, clock).await?;
    Ok(clock.wall_ms().saturating_sub(time.0))
}

async fn hello(line: &dyn Line, clock: &dyn Clock) -> Result<Timestamp, VisitError> {
    let mut control = line.open_control().await?;
    let software = concat!("cdp-source ", env!("CARGO_PKG_VERSION")).to_owned();
    let time = Timestamp(clock.wall_ms());
    say(&mut control, &SourceMessage::Hello { version: PROTOCOL_VERSION, software, time }).await?;
    match hear(&mut control).await? {
        TargetMessage::Welcome { time, .. } => Ok(time),
        TargetMessage::Refused { reason, .. } => Err(VisitError::Refused(reason)),
        _ => Err(VisitError::NoAnswer),
    }
}

async fn say(control: &mut Control, message: &SourceMessage) -> io::Result<()> {
    write_packet(&mut *control.send, &message::encode(message)).await
}

async fn hear(control: &mut Control) -> Result<TargetMessage, VisitError> {
    let read = timeout(ANSWER_WAIT, read_packet(&mut *control.receive, MESSAGE_BYTES_MAX));
    let bytes = read.await.map_err(|_| VisitError::NoAnswer)??;
    Ok(message::decode(&bytes)?)
}

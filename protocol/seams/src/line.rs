//! The line: one connection between a source and a target, as messages and frames see it.
//!
//! Both ends are authenticated before a `Line` exists. It carries one control stream both ways, and a stream of frames
//! from the source to the target for each group; a stream keeps its order, two streams have none between them. Once a
//! line is closed or broken every stream of it fails. What the bytes mean is not its business.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// A future behind a pointer, so that the traits here can stand behind one as well.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
/// Where bytes go to.
pub type SendStream = Box<dyn AsyncWrite + Send + Unpin>;
/// Where bytes come from.
pub type ReceiveStream = Box<dyn AsyncRead + Send + Unpin>;

/// A stream of frames, at the source's end.
pub trait FrameSend: AsyncWrite + Send + Unpin {
    /// Hands over bytes from the front of `bytes`, without a copy where the transport can share them. Waits until there is
    /// room for some, takes them off `bytes` and gives their number. Dropped before that, it has taken nothing.
    ///
    /// # Errors
    /// Where the stream fails.
    fn hand_over<'a>(&'a mut self, bytes: &'a mut Bytes) -> BoxFuture<'a, io::Result<usize>>;
}

/// Where frames go to.
pub type FrameStream = Box<dyn FrameSend>;

/// The stream of control messages.
pub struct Control {
    /// To the other side.
    pub send: SendStream,
    /// From the other side.
    pub receive: ReceiveStream,
}

/// One authenticated connection. Dropping it closes it.
pub trait Line: Send + Sync {
    /// Opens the control stream: the source, once, before anything else. The target sees it with the first bytes.
    ///
    /// # Errors
    /// Where the line is closed or broken.
    fn open_control(&self) -> BoxFuture<'_, io::Result<Control>>;

    /// Waits for the control stream: the target.
    ///
    /// # Errors
    /// Where the line is closed or broken.
    fn accept_control(&self) -> BoxFuture<'_, io::Result<Control>>;

    /// Opens a stream of frames: the source. Its first 16 bytes are the group's id.
    ///
    /// # Errors
    /// Where the line is closed or broken.
    fn open_frames(&self) -> BoxFuture<'_, io::Result<FrameStream>>;

    /// Waits for the next stream of frames: the target. May be dropped and called again.
    ///
    /// # Errors
    /// Where the line is closed or broken.
    fn accept_frames(&self) -> BoxFuture<'_, io::Result<ReceiveStream>>;

    /// Closes the line at once; the other side may be told `reason` (at most a few hundred bytes of text).
    fn close(&self, reason: &str);

    /// Closes the line as `close` does and waits until the other side was told, as far as this side can see to that: a few
    /// round trips. For whoever ends right after it, and would take the word down with it.
    fn end<'a>(&'a self, reason: &'a str) -> BoxFuture<'a, ()> {
        self.close(reason);
        Box::pin(std::future::ready(()))
    }

    /// Waits until the line is closed by either side or broken.
    fn closed(&self) -> BoxFuture<'_, ()>;

    /// The round trip as the transport measures it, if it does.
    fn round_trip(&self) -> Option<Duration> {
        None
    }
}

/// Writes `bytes` behind their length.
///
/// # Errors
/// Where the stream fails.
pub async fn write_packet(send: &mut (dyn AsyncWrite + Send + Unpin), bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).expect("messages are far below 4 GiB");
    let mut packet = Vec::with_capacity(4 + bytes.len());
    packet.extend_from_slice(&len.to_le_bytes());
    packet.extend_from_slice(bytes);
    send.write_all(&packet).await?;
    send.flush().await
}

/// Reads bytes behind their length, at most `bytes_max` of them. Not to be dropped half-way: the place would be lost.
///
/// # Errors
/// Where the stream fails or ends, or the length is beyond its bound; nothing is allocated for such a one.
pub async fn read_packet(receive: &mut (dyn AsyncRead + Send + Unpin), bytes_max: usize) -> io::Result<Vec<u8>> {
    let len = receive.read_u32_le().await? as usize;
    if len > bytes_max {
        let reason = format!("a message of {len} bytes, at most {bytes_max} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let mut bytes = vec![0; len];
    receive.read_exact(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(feature = "sim")]
pub use sim::{Cut, SimLine, sim_line};

#[cfg(feature = "sim")]
mod sim;

//! The line: one connection between a source and a target, as messages and frames see it.
//!
//! Both ends are authenticated before a `Line` exists. It carries one control stream both ways, and a stream of frames
//! from the source to the target for each group; a stream keeps its order, two streams have none between them. Once a
//! line is closed or broken every stream of it fails. What the bytes mean is not its business.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

/// A future behind a pointer, so that the traits here can stand behind one as well.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
/// Where bytes go to.
pub type SendStream = Box<dyn AsyncWrite + Send + Unpin>;
/// Where bytes come from.
pub type ReceiveStream = Box<dyn AsyncRead + Send + Unpin>;

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
    fn open_frames(&self) -> BoxFuture<'_, io::Result<SendStream>>;

    /// Waits for the next stream of frames: the target. May be dropped and called again.
    ///
    /// # Errors
    /// Where the line is closed or broken.
    fn accept_frames(&self) -> BoxFuture<'_, io::Result<ReceiveStream>>;

    /// Closes the line at once; the other side may be told `reason` (at most a few hundred bytes of text).
    fn close(&self, reason: &str);

    /// Waits until the line is closed by either side or broken.
    fn closed(&self) -> BoxFuture<'_, ()>;

    /// The round trip as the transport measures it, if it does.
    fn round_trip(&self) -> Option<Duration> {
        None
    }
}

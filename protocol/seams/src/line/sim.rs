//! A line in memory that breaks after a given number of bytes.
//!
//! What was written before the break is lost or still read, as `Cut::delivers` says; a real line may do either. Bytes of all
//! streams and both directions count against the same number, so every byte of a session is a place where it can break.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, SimplexStream, WriteHalf, simplex};
use tokio::sync::{Mutex, mpsc, watch};

use super::{BoxFuture, Control, FrameSend, FrameStream, Line, ReceiveStream};

/// Bytes a stream holds between its two ends: about what a small flow-control window does.
const STREAM_BYTES: usize = 64 * 1024;
/// Streams opened and not accepted.
const STREAMS_MAX: usize = 64;

/// Where a line breaks.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Bytes that get onto the line, in both directions together.
    pub after_bytes: u64,
    /// Whether what is on its way when the line breaks can still be read.
    pub delivers: bool,
}

impl Cut {
    /// A line that does not break by itself.
    pub const NEVER: Self = Self { after_bytes: u64::MAX, delivers: true };
}

/// One end of a simulated line.
pub struct SimLine {
    wire: Arc<Wire>,
    controls: Ends<Control>,
    frames: Ends<ReceiveStream>,
}

struct Ends<T> {
    to_peer: mpsc::Sender<T>,
    from_peer: Mutex<mpsc::Receiver<T>>,
}

/// What both ends share.
struct Wire {
    broken: watch::Sender<bool>,
    bytes_left: AtomicU64,
    bytes_sent: AtomicU64,
    delivers: bool,
}

/// A line: the source's end and the target's.
#[must_use]
pub fn sim_line(cut: Cut) -> (SimLine, SimLine) {
    let wire = Arc::new(Wire {
        broken: watch::Sender::new(false),
        bytes_left: cut.after_bytes.into(),
        bytes_sent: 0.into(),
        delivers: cut.delivers,
    });
    let (controls_a, controls_b) = ends();
    let (frames_a, frames_b) = ends();
    let one = SimLine { wire: wire.clone(), controls: controls_a, frames: frames_a };
    (one, SimLine { wire, controls: controls_b, frames: frames_b })
}

fn ends<T>() -> (Ends<T>, Ends<T>) {
    let (to_b, from_a) = mpsc::channel(STREAMS_MAX);
    let (to_a, from_b) = mpsc::channel(STREAMS_MAX);
    (Ends { to_peer: to_b, from_peer: from_b.into() }, Ends { to_peer: to_a, from_peer: from_a.into() })
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the simulated line is broken")
}

impl SimLine {
    /// Bytes both ends have put on the line.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.wire.bytes_sent.load(Ordering::SeqCst)
    }

    /// Something that breaks the line when it is called, wherever the line itself has gone.
    pub fn breaker(&self) -> impl Fn() + Send + Sync + use<> {
        let wire = self.wire.clone();
        move || {
            wire.broken.send_replace(true);
        }
    }

    fn pipe(&self) -> (ReceiveStream, Box<SimSend>) {
        let (read, write) = simplex(STREAM_BYTES);
        let receive = SimReceive { wire: self.wire.clone(), read, broken: self.wire.wait() };
        let send = SimSend { wire: self.wire.clone(), write, broken: self.wire.wait() };
        (Box::new(receive), Box::new(send))
    }

    async fn hand_over<T>(&self, ends: &Ends<T>, stream: T) -> io::Result<()> {
        if *self.wire.broken.borrow() {
            return Err(broken());
        }
        ends.to_peer.send(stream).await.map_err(|_| broken())
    }

    async fn take<T>(&self, ends: &Ends<T>) -> io::Result<T> {
        let mut from_peer = ends.from_peer.lock().await;
        tokio::select! {
            biased;
            stream = from_peer.recv() => stream.ok_or_else(broken),
            () = self.wire.wait() => Err(broken()),
        }
    }
}

impl Line for SimLine {
    fn open_control(&self) -> BoxFuture<'_, io::Result<Control>> {
        Box::pin(async {
            let (their_receive, send) = self.pipe();
            let (receive, their_send) = self.pipe();
            self.hand_over(&self.controls, Control { send: their_send, receive: their_receive }).await?;
            Ok(Control { send, receive })
        })
    }

    fn accept_control(&self) -> BoxFuture<'_, io::Result<Control>> {
        Box::pin(self.take(&self.controls))
    }

    fn open_frames(&self) -> BoxFuture<'_, io::Result<FrameStream>> {
        Box::pin(async {
            let (receive, send) = self.pipe();
            self.hand_over(&self.frames, receive).await?;
            Ok(send as FrameStream)
        })
    }

    fn accept_frames(&self) -> BoxFuture<'_, io::Result<ReceiveStream>> {
        Box::pin(self.take(&self.frames))
    }

    fn close(&self, _reason: &str) {
        self.wire.broken.send_replace(true);
    }

    fn closed(&self) -> BoxFuture<'_, ()> {
        self.wire.wait()
    }
}

impl Drop for SimLine {
    fn drop(&mut self) {
        self.wire.broken.send_replace(true);
    }
}

impl Wire {
    fn wait(&self) -> BoxFuture<'static, ()> {
        let mut watched = self.broken.subscribe();
        Box::pin(async move {
            // An error says that nobody is left who could break it.
            let _ = watched.wait_for(|broken| *broken).await;
        })
    }
}

struct SimSend {
    wire: Arc<Wire>,
    write: WriteHalf<SimplexStream>,
    broken: BoxFuture<'static, ()>,
}

impl AsyncWrite for SimSend {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if *self.wire.broken.borrow() {
            return Poll::Ready(Err(broken()));
        }
        let left = self.wire.bytes_left.load(Ordering::SeqCst);
        if left == 0 && !bytes.is_empty() {
            self.wire.broken.send_replace(true);
            return Poll::Ready(Err(broken()));
        }
        let fits = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match Pin::new(&mut self.write).poll_write(context, &bytes[..fits]) {
            Poll::Ready(Ok(written)) => {
                let after = |left: u64| Some(left.saturating_sub(written as u64));
                let _ = self.wire.bytes_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, after);
                self.wire.bytes_sent.fetch_add(written as u64, Ordering::SeqCst);
                Poll::Ready(Ok(written))
            }
            Poll::Pending => self.broken.as_mut().poll(context).map(|()| Err(broken())),
            error @ Poll::Ready(Err(_)) => error,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(context)
    }
}

impl FrameSend for SimSend {
    fn hand_over<'a>(&'a mut self, bytes: &'a mut Bytes) -> BoxFuture<'a, io::Result<usize>> {
        Box::pin(async {
            let taken = self.write(bytes).await?;
            bytes.advance(taken);
            Ok(taken)
        })
    }
}

impl Drop for SimSend {
    fn drop(&mut self) {
        // The half of a pipe does not end it when it is dropped; ending it never waits.
        let _ = Pin::new(&mut self.write).poll_shutdown(&mut Context::from_waker(std::task::Waker::noop()));
    }
}

struct SimReceive {
    wire: Arc<Wire>,
    read: ReadHalf<SimplexStream>,
    broken: BoxFuture<'static, ()>,
}

impl AsyncRead for SimReceive {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if *self.wire.broken.borrow() && !self.wire.delivers {
            return Poll::Ready(Err(broken()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.read).poll_read(context, buffer) {
            Poll::Pending => self.broken.as_mut().poll(context).map(|()| Err(broken())),
            // A stream dropped because the line broke has no orderly end.
            Poll::Ready(Ok(())) if buffer.filled().len() == before && *self.wire.broken.borrow() => {
                Poll::Ready(Err(broken()))
            }
            read @ Poll::Ready(_) => read,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn a_line_carries_exactly_as_many_bytes_as_it_may() {
        for after_bytes in 0..20 {
            let (source, target) = sim_line(Cut { after_bytes, delivers: true });
            let mut send = source.open_frames().await.expect("opens");
            let mut receive = target.accept_frames().await.expect("comes");
            let written = send.write_all(&[7; 20]).await;
            assert!(written.is_err());
            let mut bytes = Vec::new();
            assert!(receive.read_to_end(&mut bytes).await.is_err(), "no orderly end");
            assert_eq!((bytes.len() as u64, source.bytes_sent()), (after_bytes, after_bytes));
            source.closed().await;
            assert!(target.accept_control().await.is_err());
        }
    }

    #[tokio::test]
    async fn both_ways_and_the_end_of_a_stream() {
        let (source, target) = sim_line(Cut::NEVER);
        let mut ours = source.open_control().await.expect("opens");
        let mut theirs = target.accept_control().await.expect("comes");
        ours.send.write_all(b"hello").await.expect("written");
        drop(ours.send);
        let mut text = String::new();
        theirs.receive.read_to_string(&mut text).await.expect("an orderly end");
        assert_eq!(text, "hello");
        theirs.send.write_all(b"x").await.expect("written");
        assert_eq!(ours.receive.read_u8().await.expect("read"), b'x');
        target.close("done");
        assert!(ours.receive.read_u8().await.is_err());
    }
}

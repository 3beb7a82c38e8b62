//! A group's encoding thread: captures in, attempts ready to leave out, in the same order.
//!
//! It lets the group read the next part while the last one is encoded. At most one capture waits, so a group holds at most
//! three captures at a time: being read, waiting, being encoded.

use crate::capture::Capture;
use crate::encoder::{BlockDigests, EncodedAttempt, Encoder, FrameMeters};
use cdp_protocol::codec::Sealer;
use cdp_protocol::record::Begin;
use cdp_protocol::session::source::{End, Outgoing};
use cdp_protocol::units::VolumeSlot;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// A capture to be encoded.
pub(crate) struct Job {
    pub(crate) capture: Capture,
    pub(crate) sealer: Arc<Sealer>,
    pub(crate) end: End,
}

/// An attempt that is ready to leave.
pub struct Encoded {
    /// The attempt.
    pub outgoing: Outgoing,
    /// The digests of its blocks with content.
    pub digests: Vec<BlockDigests>,
    /// What each volume's frames came to.
    pub frames: Vec<FrameMeters>,
}

/// The thread. It ends when it is dropped, after what it is at.
pub(crate) struct Encoding(Way);

enum Way {
    Thread {
        jobs: Option<SyncSender<Job>>,
        thread: Option<JoinHandle<()>>,
    },
    /// Without one, where the encoder has none either.
    Inline(Box<dyn Fn(Job) + Send>),
}

impl Encoding {
    /// Starts the thread for a group; `done` is called for each attempt, on that thread.
    pub(crate) fn start(
        encoder: Arc<Encoder>,
        slots: Vec<VolumeSlot>,
        begin: Begin,
        done: impl Fn(Encoded) + Send + 'static,
    ) -> Self {
        if encoder.is_inline() {
            return Self(Way::Inline(Box::new(move |job| {
                done(encode(job, &encoder, &slots, &begin));
            })));
        }
        let (jobs, queue) = sync_channel(1);
        let builder = std::thread::Builder::new().name("encode-group".into());
        let thread = builder
            .spawn(move || serve(&queue, &encoder, &slots, &begin, done))
            .expect("the system has a thread to give");
        Self(Way::Thread { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Hands over a capture; waits where one is waiting already.
    ///
    /// # Panics
    /// Where the thread has died of a panic.
    pub(crate) fn submit(&self, job: Job) {
        match &self.0 {
            Way::Thread { jobs, .. } => {
                let jobs = jobs.as_ref().expect("there until it is dropped");
                assert!(jobs.send(job).is_ok(), "the encoding thread lives as long as its group");
            }
            Way::Inline(encode) => encode(job),
        }
    }
}

impl Drop for Encoding {
    fn drop(&mut self) {
        if let Way::Thread { jobs, thread } = &mut self.0 {
            *jobs = None;
            // A thread that panicked has said so already.
            let _ = thread.take().map(JoinHandle::join);
        }
    }
}

fn serve(queue: &Receiver<Job>, encoder: &Encoder, slots: &[VolumeSlot], begin: &Begin, done: impl Fn(Encoded)) {
    for job in queue {
        done(encode(job, encoder, slots, begin));
    }
}

fn encode(job: Job, encoder: &Encoder, slots: &[VolumeSlot], begin: &Begin) -> Encoded {
    let Job { capture, sealer, mut end } = job;
    let made = encoder.encode(&capture, slots, begin, Arc::clone(&sealer));
    drop(capture);
    let EncodedAttempt { epoch, attempt, frames, list, meters, bytes, digests, volumes } = made;
    if let End::Commit(draft) = &mut end {
        draft.meters = meters;
    }
    Encoded { outgoing: Outgoing { epoch, attempt, frames, list, bytes, end, sealer }, digests, frames: volumes }
}

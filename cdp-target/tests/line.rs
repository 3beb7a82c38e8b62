//! The line over real QUIC: control and frames arrive as they were sent, through windows that are larger than a stranger's.

mod support;

use cdp_seams::line::{BoxFuture, Line};
use cdp_seams::quic::{FRAME_STREAMS_MAX, STRANGER_WINDOW_BYTES};
use cdp_target::enroll::Admitted;
use cdp_target::listener::{ListenerLimits, Serve};
use support::{Target, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// Answers each control byte, and tells the length and sum of each stream of frames.
struct Sums(mpsc::UnboundedSender<(usize, u64)>);

impl Serve for Sums {
    fn serve(&self, _office: Admitted, line: Box<dyn Line>) -> BoxFuture<'static, ()> {
        let sums = self.0.clone();
        Box::pin(async move {
            let mut control = line.accept_control().await.expect("a control stream");
            let asked = control.receive.read_u8().await.expect("a byte");
            control.send.write_u8(asked + 1).await.expect("an answer");
            while let Ok(mut frames) = line.accept_frames().await {
                let sums = sums.clone();
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    frames.read_to_end(&mut bytes).await.expect("all of it");
                    let sum = bytes.iter().map(|&byte| u64::from(byte)).sum();
                    sums.send((bytes.len(), sum)).expect("the test listens");
                });
            }
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn control_and_frames_of_every_group_cross_the_line() {
    let (sender, mut sums) = mpsc::unbounded_channel();
    let target = Target::start_serving(ListenerLimits::default(), std::sync::Arc::new(Sums(sender)));
    let office = target.office("north").await;
    let line = within(office.connect()).await.expect("connected");
    let mut control = line.open_control().await.expect("the control stream");
    control.send.write_u8(41).await.expect("asked");
    assert_eq!(within(control.receive.read_u8()).await.expect("answered"), 42);

    let frame = vec![3; 1024 * 1024];
    assert!(frame.len() > STRANGER_WINDOW_BYTES as usize);
    let mut open = Vec::new();
    for _ in 0..FRAME_STREAMS_MAX {
        open.push(within(line.open_frames()).await.expect("a stream for each group"));
    }
    for mut stream in open.drain(..) {
        within(stream.write_all(&frame)).await.expect("sent");
        stream.shutdown().await.expect("finished");
    }
    for _ in 0..FRAME_STREAMS_MAX {
        let sum = within(sums.recv()).await.expect("received");
        assert_eq!(sum, (frame.len(), frame.len() as u64 * 3));
    }
    // A finished stream gives its place back.
    let mut again = within(line.open_frames()).await.expect("one more");
    again.write_all(&frame).await.expect("sent");
    again.shutdown().await.expect("finished");
    assert_eq!(within(sums.recv()).await.expect("received").0, frame.len());
}

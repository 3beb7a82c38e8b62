//! Makes one image: a pass over the volumes, what was captured meanwhile, a point that closes it, and the proof.
//!
//! One thread, which may block on the images' disk as long as that likes: nobody waits for it. Memory: a piece of 2 MiB, and what the group's
//! `tee` holds. What ends it early leaves a partial, which is removed here, or by the next that is begun.
//!
//! Why the image is the point's: a block that was written after it was read here was marked, and so captured by a point behind that read,
//! at the latest by the one that closes the image; captures come through the tee, or are named there and read again. What is read again here holds at least
//! what was captured before it. Of volumes that are compared instead of tracked there
//! are no images: a block that changed and changed back between two comparisons would be in no capture.

use super::check;
use super::folder::{self, Checked, ImageFolder, refuse_protected};
use super::format::Footer;
use super::reader::ImageFile;
use super::status::{ImagePhase, LastImage};
use super::tee::{self, Closing, ImageEvent, ImageRequest, Taken};
use super::writer::{ImageWriter, Start};
use super::{ImageError, failed};
use crate::agent::group::{Input, PointRequest};
use crate::agent::ledger::Blocks;
use crate::capture::Capture;
use crate::config::LocalImageConfig;
use crate::control::Reply;
use crate::probe;
use crate::reader::{self, BlockReader, ReadRequest, ReadTarget};
use crate::restore::disk;
use crate::state::{GroupState, StateError, StateFolder};
use crate::tracker::device::Device;
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Block, Extent, Timestamp, blocks_in};
use cdp_seams::clock::Clock;
use cdp_seams::random::{self, Random};
use roaring::RoaringBitmap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;
use tokio::sync::oneshot;

/// Blocks that are read at a time: 2 MiB.
const PIECE_BLOCKS: u32 = 512;
/// How often it is looked whether to stop, while nothing happens.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Rounds after which the volumes are written faster than their image can follow.
const ROUNDS_MAX: u32 = 64;

/// What an image is made of, and with.
pub struct Making<'a> {
    /// The state folder.
    pub state: &'a StateFolder,
    /// The group's name.
    pub group: &'a str,
    /// Its id and its key's name.
    pub facts: &'a GroupState,
    /// Its key.
    pub key: &'a DataKey,
    /// Where, and how fast.
    pub config: &'a LocalImageConfig,
    /// The volumes' devices, by slot as the group has them.
    pub devices: &'a [PathBuf],
    /// Every protected device: none of them may hold the image.
    pub protected: &'a [PathBuf],
    /// The group's thread.
    pub inputs: &'a Sender<Input>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// The image's attempt.
    pub random: Arc<dyn Random>,
    /// Set when it is to end.
    pub stop: &'a AtomicBool,
    /// Told how far it is: bytes done of so many.
    pub progress: &'a dyn Fn(ImagePhase, u64, u64),
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// It cannot be begun now; later it can.
    #[error("{0}")]
    NotYet(String),
    /// The agent ends, or takes up another configuration.
    #[error("the agent is stopping")]
    Stopped,
    /// There is none of this group.
    #[error("{0}")]
    Never(String),
    /// The image, its disk or its folder.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A volume cannot be read.
    #[error("read the volumes: {0}")]
    Volume(String),
    /// No point closes it.
    #[error("no point closes the image: {0}")]
    NoPoint(String),
    /// Blocks are written faster than they can be read again.
    #[error("the volumes are written faster than the image's disk takes it")]
    TooFast,
}

impl Making<'_> {
    /// Makes it, and removes those that are too many.
    ///
    /// # Errors
    /// Where there is none. Older images are as they were.
    pub fn make(&self) -> Result<LastImage, MakeError> {
        let lock = match self.state.lock_images(self.group) {
            Err(StateError::Locked { pid, .. }) => {
                return Err(MakeError::NotYet(format!("process {pid} makes one already")));
            }
            other => other.map_err(|error| MakeError::NotYet(format!("{:#}", anyhow::Error::new(error))))?,
        };
        let storage = self.state.storage();
        let path = self.config.folder.join(self.group);
        let folder = ImageFolder::open(Arc::clone(storage), &path, self.facts.group)?;
        refuse_protected(&**storage, &path, self.protected)?;
        let from = self.clock.monotonic();
        let made = self.make_in(&folder);
        if made.is_err() {
            // What cannot be removed now is by the next.
            let _ = folder.clean();
        }
        drop(lock);
        let (path, footer, bytes) = made?;
        match folder.prune(self.key, self.config.keep, &path) {
            Ok(gone) => gone.iter().for_each(|path| {
                tracing::info!(group = self.group, path = %path.display(), "an older local image is removed");
            }),
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::new(error));
                tracing::warn!(group = self.group, error, "older local images are not removed");
            }
        }
        let seconds = self.clock.monotonic().saturating_sub(from).as_secs_f64();
        let unreadable_blocks = footer.volumes.iter().map(|entry| entry.unreadable_blocks).sum();
        let (epoch, time, made) = (footer.epoch, footer.cut_time, footer.made);
        Ok(LastImage { epoch, time, made, bytes, seconds, path, unreadable_blocks })
    }

    fn make_in(&self, place: &ImageFolder) -> Result<(PathBuf, Footer, u64), MakeError> {
        let (tee, taken) = tee::pair(self.devices.len());
        let begun = self.begin(tee)?;
        let reader = self.reader(&begun.volumes)?;
        let attempt = AttemptId(random::array(&*self.random));
        let tee::Begun { generation, epoch, volumes } = begun;
        let start = Start { group: self.facts.group, attempt, generation, epoch, volumes };
        let folder::Begun { file, table, path: partial } = place.begin()?;
        let writer = ImageWriter::new(file, &partial, table, &start, self.key)?;
        let mut work = Work { making: self, taken, reader, writer, volumes: &start.volumes };
        work.read_all()?;
        let closing = work.close()?;
        let Work { mut writer, .. } = work;
        for (volume, skipped) in closing.skipped.iter().enumerate() {
            writer.put_zeros(volume, skipped)?;
        }
        let mut footer = Footer {
            group: self.facts.group,
            attempt,
            key: self.facts.key,
            epoch: closing.epoch,
            cut_time: closing.cut_time,
            made: Timestamp(0),
            class: closing.class,
            label: closing.label,
            volumes: writer.index()?,
        };
        self.prove(&partial, &mut footer)?;
        footer.made = Timestamp(self.clock.wall_ms());
        writer.finish(&footer, self.key)?;
        // As whoever restores from it will.
        let image = ImageFile::open(&**self.state.storage(), &partial, self.facts.group, self.key)?;
        let bytes = image.len_bytes()?;
        let path = place.publish(&footer, bytes, Checked::at(footer.made, None))?;
        Ok((path, footer, bytes))
    }

    fn begin(&self, tee: tee::Tee) -> Result<tee::Begun, MakeError> {
        let (reply, answer) = channel();
        self.say(Input::Image(ImageRequest::Begin { tee, reply }))?;
        loop {
            match answer.recv_timeout(LOOK_EVERY) {
                Ok(begun) => {
                    return begun.map_err(|refusal| match refusal {
                        tee::NotBegun::Later(reason) => MakeError::NotYet(reason),
                        tee::NotBegun::Never(reason) => MakeError::Never(reason),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(MakeError::Stopped),
                Err(RecvTimeoutError::Timeout) => self.look()?,
            }
        }
    }

    fn say(&self, input: Input) -> Result<(), MakeError> {
        self.inputs.send(input).map_err(|_| MakeError::Stopped)
    }

    /// Whether to go on.
    fn look(&self) -> Result<(), MakeError> {
        if self.stop.load(Ordering::Relaxed) { Err(MakeError::Stopped) } else { Ok(()) }
    }

    /// Reads the devices past the page cache, as the group does, and beside it.
    fn reader(&self, volumes: &[Volume]) -> Result<Box<dyn BlockReader>, MakeError> {
        let target = |(device, volume): (&PathBuf, &Volume)| {
            let probe = probe::probe(&**self.state.storage(), device)?;
            let target = if probe.is_block() {
                Device::inspect(&probe.device)?.read_target()
            } else {
                disk::whole(&probe.device, probe.size_bytes)
            };
            Ok(ReadTarget { size_bytes: volume.size_bytes, ..target })
        };
        let targets: anyhow::Result<Vec<ReadTarget>> = self.devices.iter().zip(volumes).map(target).collect();
        let reader = targets.and_then(|targets| Ok(reader::open(&targets)?));
        reader.map_err(|error| MakeError::Volume(format!("{error:#}")))
    }

    /// Reads what was written, and notes the hash of each volume's image.
    fn prove(&self, partial: &Path, footer: &mut Footer) -> Result<(), MakeError> {
        let file = self.state.storage().open(partial).map_err(failed("open", partial))?;
        let mut image = ImageFile::of(file, partial, footer.clone());
        let all = bytes_of(footer.volumes.iter().map(|entry| &entry.volume));
        let mut on_blocks = |blocks: u64| {
            (self.progress)(ImagePhase::Verifying, blocks * BLOCK_BYTES as u64, all);
            self.look().is_ok()
        };
        let found = check::examine(&mut image, self.key, &mut on_blocks)?.ok_or(MakeError::Stopped)?;
        for (entry, found) in footer.volumes.iter_mut().zip(found) {
            if (entry.content_blocks, entry.unreadable_blocks) != (found.content_blocks, found.unreadable_blocks) {
                let what = format!("volume {} has other blocks than were written", entry.volume.name);
                return Err(ImageError::Damaged { path: partial.to_owned(), what }.into());
            }
            entry.image_hash = found.image_hash;
        }
        Ok(())
    }
}

/// An image that is written.
struct Work<'a> {
    making: &'a Making<'a>,
    taken: Taken,
    reader: Box<dyn BlockReader>,
    writer: ImageWriter,
    volumes: &'a [Volume],
}

/// What does not just go into the image.
enum Told {
    Named(Blocks),
    Closed(Closing),
    NotClosed,
}

impl Work<'_> {
    /// Every block of the volumes once, in order, no faster than is allowed.
    fn read_all(&mut self) -> Result<(), MakeError> {
        let (all, mut before) = (bytes_of(self.volumes), 0);
        let from = self.making.clock.monotonic();
        for volume in 0..self.volumes.len() {
            let blocks = blocks_in(self.volumes[volume].size_bytes);
            for start in (0..blocks).step_by(PIECE_BLOCKS as usize) {
                let count = (blocks - start).min(PIECE_BLOCKS.into()) as u32;
                let extent = Extent { start: Block(start as u32), count };
                self.read(volume, reader::runs(extent.blocks().map(|block| block.0), reader::READ_BLOCKS_MAX))?;
                before += extent.to_bytes();
                (self.making.progress)(ImagePhase::Reading, before.min(all), all);
                self.pace(from, before)?;
            }
        }
        Ok(())
    }

    /// Waits until so many bytes may have been read, and takes what comes meanwhile.
    fn pace(&mut self, from: Duration, bytes: u64) -> Result<(), MakeError> {
        loop {
            self.making.look()?;
            let may = due_after(bytes, self.making.config.bytes_per_s);
            let left = (from + may).saturating_sub(self.making.clock.monotonic());
            match self.next(left.min(LOOK_EVERY))? {
                None if left <= LOOK_EVERY => return Ok(()),
                _ => {}
            }
        }
    }

    fn read(&mut self, volume: usize, extents: Vec<Extent>) -> Result<(), MakeError> {
        let requests: Vec<ReadRequest> = extents.into_iter().map(|extent| ReadRequest { volume, extent }).collect();
        let (mut capture, mut failure) = (Capture::new(self.volumes.len()), None);
        let read = reader::read_blocks(&mut *self.reader, &requests, &mut |volume, block, result| match result {
            Ok(bytes) => capture.volumes[volume].put(block, bytes),
            Err(error) if reader::is_medium_error(&error) => capture.volumes[volume].put_unreadable(block),
            Err(error) => failure = Some(error),
        });
        if let Some(error) = read.err().or(failure) {
            return Err(MakeError::Volume(format!("volume {}: {error}", self.volumes[volume].name)));
        }
        Ok(self.writer.put(volume, &capture.volumes[volume])?)
    }

    /// Reads again what did not fit, until a point comes behind which nothing is left.
    fn close(&mut self) -> Result<Closing, MakeError> {
        let all = bytes_of(self.volumes);
        for _ in 0..ROUNDS_MAX {
            (self.making.progress)(ImagePhase::Closing, all, all);
            let named = self.named()?;
            if named.iter().any(|blocks| !blocks.is_empty()) {
                self.read_again(&named)?;
            } else if let Some(closing) = self.point()? {
                return Ok(closing);
            }
        }
        Err(MakeError::TooFast)
    }

    fn named(&mut self) -> Result<Blocks, MakeError> {
        self.making.say(Input::Image(ImageRequest::Name))?;
        loop {
            if let Some(Told::Named(blocks)) = self.next(LOOK_EVERY)? {
                return Ok(blocks);
            }
        }
    }

    fn read_again(&mut self, named: &[RoaringBitmap]) -> Result<(), MakeError> {
        for (volume, blocks) in named.iter().enumerate() {
            let extents = reader::runs(blocks, reader::READ_BLOCKS_MAX);
            for extents in extents.chunks((PIECE_BLOCKS / reader::READ_BLOCKS_MAX) as usize) {
                self.read(volume, extents.to_vec())?;
                // What is captured meanwhile is taken at once, so that it fits.
                self.next(Duration::ZERO)?;
            }
        }
        Ok(())
    }

    /// Has a point made; `None` where it could not close the image.
    fn point(&mut self) -> Result<Option<Closing>, MakeError> {
        let (reply, mut answer) = oneshot::channel();
        let request = PointRequest { label: None, wait: false, closes_image: true, reply };
        self.making.say(Input::Point(request))?;
        let all = bytes_of(self.volumes);
        loop {
            (self.making.progress)(ImagePhase::Closing, all, all);
            match self.next(LOOK_EVERY)? {
                Some(Told::Closed(closing)) => return Ok(Some(closing)),
                Some(Told::NotClosed) => return Ok(None),
                _ => {}
            }
            if let Ok(Reply::Failed { message, .. }) = answer.try_recv() {
                return Err(MakeError::NoPoint(message));
            }
        }
    }

    /// Takes what happens, for so long or until something is told; what was captured goes into the image.
    fn next(&mut self, wait: Duration) -> Result<Option<Told>, MakeError> {
        let mut wait = wait;
        loop {
            self.making.look()?;
            match self.taken.events.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(MakeError::Stopped),
                Ok(ImageEvent::Named(blocks)) => return Ok(Some(Told::Named(blocks))),
                Ok(ImageEvent::Closed(closing)) => return Ok(Some(Told::Closed(closing))),
                Ok(ImageEvent::NotClosed) => return Ok(Some(Told::NotClosed)),
                Ok(ImageEvent::Captured(volumes, bytes)) => {
                    for (volume, captured) in volumes.iter().enumerate() {
                        self.writer.put(volume, captured)?;
                    }
                    self.taken.done(bytes);
                    wait = Duration::ZERO;
                }
            }
        }
    }
}

fn bytes_of<'a>(volumes: impl IntoIterator<Item = &'a Volume>) -> u64 {
    volumes.into_iter().map(|volume| volume.size_bytes).sum()
}

/// How long so many bytes take at that speed; 0 is no bound.
fn due_after(bytes: u64, bytes_per_s: u64) -> Duration {
    if bytes_per_s == 0 { Duration::ZERO } else { Duration::from_secs_f64(bytes as f64 / bytes_per_s as f64) }
}

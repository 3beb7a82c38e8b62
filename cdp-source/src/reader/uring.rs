//! Reads through `io_uring`: `O_DIRECT` into a fixed pool of registered, aligned buffers, many in flight.
//!
//! Invariant: from submission to completion a buffer belongs to its slot's operation, and nothing else touches it; the
//! slots belong to the reader, and the reader is not gone before the last completion is in. A `done` that panics or a call
//! that ends early changes nothing about that: the next call, or the drop, waits first.

#![allow(unsafe_code, reason = "the kernel writes into buffers while no Rust code may look at them")]

use super::aligned::AlignedBuffer;
use super::target::{Caching, OpenError, Progress, ReadTarget, Span, TargetFile};
use super::{BlockReader, READ_BLOCKS_MAX, ReadDone, ReadRequest};
use cdp_protocol::units::BLOCK_BYTES;
use cdp_seams::pulse;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;
use std::io;
use std::os::fd::AsRawFd;

/// Reads in flight at most, a buffer each: 4 MiB, below the locked memory a plain user has (8 MiB).
pub const IN_FLIGHT_MAX: u16 = 32;
/// Bytes of a buffer: one request of `READ_BLOCKS_MAX`.
const BUFFER_BYTES: usize = READ_BLOCKS_MAX as usize * BLOCK_BYTES;
/// Times one operation is tried again after EINTR or EAGAIN.
const RETRIES_MAX: u32 = 64;

/// Reads many requests at a time. The ring is declared, and so dropped, before the buffers.
pub struct UringReader {
    ring: IoUring,
    slots: Vec<Slot>,
    volumes: Vec<TargetFile>,
    is_registered: bool,
}

/// A buffer, and the operation that owns it while the kernel may write to it.
struct Slot {
    buffer: AlignedBuffer,
    operation: Option<Operation>,
}

#[derive(Clone, Copy)]
struct Operation {
    request: usize,
    volume: usize,
    span: Span,
    done: usize,
    retries: u32,
}

impl UringReader {
    /// Opens the volumes; their order is that of the requests' `volume`.
    ///
    /// # Errors
    /// Where a node cannot be opened with `O_DIRECT`, is too small, or there is no `io_uring`.
    pub fn open(targets: &[ReadTarget]) -> Result<Self, OpenError> {
        let volumes =
            targets.iter().map(|target| TargetFile::open(target, Caching::Direct)).collect::<Result<_, _>>()?;
        let ring = IoUring::new(u32::from(IN_FLIGHT_MAX)).map_err(OpenError::Uring)?;
        let new_slot = |_| Slot { buffer: AlignedBuffer::new(BUFFER_BYTES), operation: None };
        let mut slots: Vec<Slot> = (0..IN_FLIGHT_MAX).map(new_slot).collect();
        let is_registered = register(&ring, &mut slots);
        if !is_registered {
            tracing::info!("read buffers are not registered: the limit of locked memory is too low");
        }
        Ok(Self { ring, slots, volumes, is_registered })
    }

    fn in_flight(&self) -> bool {
        self.slots.iter().any(|slot| slot.operation.is_some())
    }

    /// Waits for whatever is still in flight and forgets it.
    fn drain(&mut self) -> io::Result<()> {
        while self.in_flight() {
            self.wait()?;
        }
        Ok(())
    }

    /// Submits what is queued and gives what has completed: slot, operation and result. The slots are idle again. May give
    /// nothing.
    fn wait(&mut self) -> io::Result<Vec<(usize, Operation, i32)>> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if is_passing(error.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
        let slots = &mut self.slots;
        let completed = self.ring.completion().map(|entry| {
            let slot = entry.user_data() as usize;
            let operation = slots[slot].operation.take().expect("a slot completes once for each start");
            (slot, operation, entry.result())
        });
        Ok(completed.collect())
    }

    /// Puts an operation into an idle slot and queues it. From here the kernel owns the slot's buffer.
    fn start(&mut self, index: usize, operation: Operation) -> io::Result<()> {
        let volume = &self.volumes[operation.volume];
        let slot = &mut self.slots[index];
        let descriptor = types::Fd(volume.file.as_raw_fd());
        let address = slot.buffer.as_mut_ptr().wrapping_add(operation.done);
        let len = (operation.span.asked - operation.done) as u32;
        let offset = operation.span.offset + operation.done as u64;
        let entry: squeue::Entry = if self.is_registered {
            opcode::ReadFixed::new(descriptor, address, len, index as u16).offset(offset).build()
        } else {
            opcode::Read::new(descriptor, address, len).offset(offset).build()
        };
        slot.operation = Some(operation);
        // SAFETY: descriptor and buffer live until the completion: both belong to this reader, which waits for it before
        // either is dropped; `asked` is within the buffer, and nobody looks at the buffer while `operation` is set.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(index as u64)) };
        if pushed.is_err() {
            slot.operation = None;
            return Err(io::Error::other("the submission queue has fewer entries than there are slots"));
        }
        Ok(())
    }

    /// Takes a completion: goes on with the rest in the same slot, or gives the result and leaves the slot idle (then `true`).
    fn complete(
        &mut self,
        index: usize,
        operation: Operation,
        result: i32,
        done: &mut ReadDone<'_>,
    ) -> io::Result<bool> {
        pulse::beat();
        let step = match u32::try_from(result) {
            Ok(got) => self.volumes[operation.volume].window.progress(operation.span, operation.done, got as usize),
            Err(_) if is_passing(Some(-result)) && operation.retries < RETRIES_MAX => {
                Ok(Progress::From(operation.done))
            }
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        match step {
            Ok(Progress::From(from)) => {
                self.start(index, Operation { done: from, retries: operation.retries + 1, ..operation })?;
                return Ok(false);
            }
            Ok(Progress::Complete) => {
                let buffer = &mut self.slots[index].buffer;
                buffer[operation.span.wanted..operation.span.whole].fill(0);
                done(operation.request, Ok(&buffer[..operation.span.whole]));
            }
            Err(error) => done(operation.request, Err(error)),
        }
        Ok(true)
    }
}

impl BlockReader for UringReader {
    fn read(&mut self, requests: &[ReadRequest], done: &mut ReadDone<'_>) -> io::Result<()> {
        self.drain()?;
        let mut idle: Vec<usize> = (0..self.slots.len()).collect();
        let mut waiting = requests.iter().enumerate();
        loop {
            while let Some(slot) = idle.pop() {
                let Some((index, request)) = waiting.next() else {
                    idle.push(slot);
                    break;
                };
                match self.volumes[request.volume].window.span(request.extent) {
                    Ok(span) => {
                        let operation = Operation { request: index, volume: request.volume, span, done: 0, retries: 0 };
                        self.start(slot, operation)?;
                    }
                    Err(error) => {
                        done(index, Err(error));
                        idle.push(slot);
                    }
                }
            }
            if idle.len() == self.slots.len() {
                return Ok(());
            }
            for (slot, operation, result) in self.wait()? {
                if self.complete(slot, operation, result, done)? {
                    idle.push(slot);
                }
            }
        }
    }
}

impl Drop for UringReader {
    fn drop(&mut self) {
        if let Err(error) = self.drain() {
            // The kernel may still write to the buffers: they are never given back.
            tracing::error!(%error, "reads in flight could not be waited for; their buffers are given up");
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// Registers every slot's buffer under the slot's index; `false` where the kernel does not let us lock the memory.
fn register(ring: &IoUring, slots: &mut [Slot]) -> bool {
    let vectors: Vec<libc::iovec> = slots
        .iter_mut()
        .map(|slot| libc::iovec { iov_base: slot.buffer.as_mut_ptr().cast(), iov_len: BUFFER_BYTES })
        .collect();
    // SAFETY: the buffers are not moved or freed while the ring lives: the reader drops the ring first.
    unsafe { ring.submitter().register_buffers(&vectors) }.is_ok()
}

/// Whether an error only says: not now.
fn is_passing(code: Option<i32>) -> bool {
    let passing = [Errno::INTR, Errno::AGAIN, Errno::BUSY];
    passing.iter().any(|errno| code == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::units::{Block, Extent};
    use std::io::Write;

    #[test]
    fn what_is_in_flight_is_waited_for_before_its_buffer_is_used_again_or_given_back() {
        let folder = std::env::current_exe().expect("a test has a path");
        let mut file = tempfile::NamedTempFile::new_in(folder.parent().expect("in a folder")).expect("a file");
        file.write_all(&vec![7; BUFFER_BYTES]).expect("written");
        let target = ReadTarget { node: file.path().to_owned(), offset_bytes: 0, size_bytes: BUFFER_BYTES as u64 };
        let mut reader = match UringReader::open(&[target]) {
            Ok(reader) => reader,
            Err(reason @ (OpenError::Direct(_) | OpenError::Uring(_))) => return eprintln!("skipped: {reason}"),
            Err(error) => panic!("{error}"),
        };
        let span = reader.volumes[0].window.span(Extent { start: Block(0), count: READ_BLOCKS_MAX }).expect("within");
        let start_all = |reader: &mut UringReader| {
            for slot in 0..usize::from(IN_FLIGHT_MAX) {
                let operation = Operation { request: slot, volume: 0, span, done: 0, retries: 0 };
                reader.start(slot, operation).expect("queued");
            }
        };
        start_all(&mut reader);
        assert!(reader.in_flight());
        reader.drain().expect("all in");
        assert!(!reader.in_flight());
        assert!(reader.slots.iter().all(|slot| slot.buffer.iter().all(|byte| *byte == 7)));
        start_all(&mut reader);
        reader.ring.submit().expect("submitted");
        assert!(reader.in_flight());
        drop(reader);
    }
}

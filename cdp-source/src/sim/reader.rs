//! A reader over the simulated world: several requests in flight, in any order, a sector at a time.

use super::{SECTOR, World, fill_sector};
use crate::reader::{BlockReader, ReadDone, ReadRequest};
use cdp_protocol::units::BLOCK_SECTORS;
use rustix::io::Errno;
use std::io;
use std::sync::Arc;

/// Requests in flight at most.
const IN_FLIGHT_MAX: usize = 8;

/// Reads the world's media while its writers go on.
pub struct SimReader {
    world: Arc<World>,
    /// In how many of 1000 sectors read a step passes meanwhile.
    pub step_permille: u64,
    /// Fails the next call as a whole with this error.
    pub failure: Option<Errno>,
}

struct Operation {
    index: usize,
    bytes: Vec<u8>,
    /// Sectors not yet read, in the order they will be.
    waiting: Vec<usize>,
}

impl SimReader {
    /// A reader of all volumes.
    #[must_use]
    pub fn new(world: &Arc<World>) -> Self {
        Self { world: Arc::clone(world), step_permille: 300, failure: None }
    }

    fn pass_time(&self, steps_max: u64) {
        if self.world.random.below(1000) < self.step_permille {
            self.world.run(1 + self.world.random.below(steps_max));
        }
    }

    fn start(&self, index: usize, request: ReadRequest) -> Operation {
        let sectors = request.extent.count as usize * BLOCK_SECTORS as usize;
        let turn = self.world.random.below(sectors as u64) as usize;
        let mut waiting: Vec<usize> = (0..sectors).collect();
        waiting.rotate_left(turn);
        Operation { index, bytes: vec![0; sectors * SECTOR], waiting }
    }

    fn read_sector(&self, operation: &mut Operation, request: ReadRequest) {
        let at = operation.waiting.pop().expect("an operation in flight has sectors to read");
        let sector = (u64::from(request.extent.start.0) * BLOCK_SECTORS) as usize + at;
        if let Some(number) = self.world.lock().media[request.volume].get(sector) {
            fill_sector(&mut operation.bytes[at * SECTOR..][..SECTOR], *number);
        }
    }

    fn is_readable(&self, request: ReadRequest) -> bool {
        let state = self.world.lock();
        request.extent.blocks().all(|block| !state.unreadable[request.volume].contains(block.0))
    }
}

impl BlockReader for SimReader {
    fn read(&mut self, requests: &[ReadRequest], done: &mut ReadDone<'_>) -> io::Result<()> {
        self.world.mortality.call();
        if let Some(failure) = self.failure.take() {
            return Err(failure.into());
        }
        let mut waiting = requests.iter().enumerate();
        let mut in_flight: Vec<Operation> = Vec::new();
        loop {
            while in_flight.len() < IN_FLIGHT_MAX {
                let Some((index, request)) = waiting.next() else { break };
                in_flight.push(self.start(index, *request));
            }
            if in_flight.is_empty() {
                return Ok(());
            }
            self.pass_time(2);
            let chosen = self.world.random.below(in_flight.len() as u64) as usize;
            let request = requests[in_flight[chosen].index];
            self.read_sector(&mut in_flight[chosen], request);
            if in_flight[chosen].waiting.is_empty() {
                let operation = in_flight.swap_remove(chosen);
                self.world.mortality.call();
                self.pass_time(4);
                let is_readable = self.is_readable(request);
                done(operation.index, if is_readable { Ok(&operation.bytes) } else { Err(Errno::IO.into()) });
            }
        }
    }
}

//! A group in single steps, for simulations: what its thread does, without the thread.
//!
//! Decides nothing. Whoever steps it takes the place of `run`: says when time has passed and hands over what has happened.

use super::opening::open_once;
use super::{Ending, Group, GroupSetup, Input};
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

/// A group without its thread.
pub struct GroupSteps {
    group: Group,
    inputs: Receiver<Input>,
}

impl GroupSteps {
    /// Opens the group's volumes and takes it up. `sender` is the other end of `inputs`, which only what is encoded comes back by.
    ///
    /// # Errors
    /// Where they cannot be opened now: the thread would try again.
    pub fn start(mut setup: GroupSetup, inputs: Receiver<Input>, sender: Sender<Input>) -> Result<Self, String> {
        let (devices, memo, is_kept) = open_once(&mut setup)?;
        Ok(Self { group: Group::new(setup, devices, (memo, is_kept), sender), inputs })
    }

    /// Takes one thing that has happened, and then what came back by the channel.
    pub fn take(&mut self, input: Input) {
        self.group.take(input);
        self.take_encoded();
    }

    /// Does what is due at this time.
    pub fn act(&mut self) {
        self.group.act();
        self.take_encoded();
        self.group.publish();
    }

    /// For how long nothing is due.
    #[must_use]
    pub fn wait(&self) -> Duration {
        self.group.wait()
    }

    /// A clean end.
    pub fn finish(self) {
        self.group.finish(Ending::Agent);
    }

    fn take_encoded(&mut self) {
        while let Ok(input) = self.inputs.try_recv() {
            self.group.take(input);
        }
    }
}

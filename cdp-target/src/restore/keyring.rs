//! The data keys of a group: the present one, and those that older points were sealed under.
//!
//! A frame does not say which key it is under, its attempt's `Begin` does, which may lie in another segment. So the keys are
//! tried, newest first: a seal opens under the right one only, and a group has as many keys as it had machines.

use cdp_protocol::codec::{ContentError, open_content};
use cdp_protocol::frame::Frame;
use cdp_protocol::seal::DataKey;

/// A group's data keys, newest first; one at least.
#[derive(Clone)]
pub struct Keyring(Vec<DataKey>);

impl Keyring {
    /// The present key, and those before it, newest first.
    #[must_use]
    pub fn new(present: DataKey, older: impl IntoIterator<Item = DataKey>) -> Self {
        Self([present].into_iter().chain(older).collect())
    }

    /// The content of a frame, verified.
    ///
    /// # Errors
    /// Where it opens under none of the keys: what is wrong under the newest.
    pub fn open(&self, frame: &Frame<'_>) -> Result<Vec<u8>, ContentError> {
        let attempt = &frame.header.attempt;
        let mut opened = self.0.iter().map(|key| open_content(frame, &key.attempt_key(attempt)));
        let newest = opened.next().expect("there is one key at least");
        newest.or_else(|error| opened.find_map(Result::ok).ok_or(error))
    }

    /// The present key: what is sealed anew is sealed under it.
    #[must_use]
    pub fn present(&self) -> &DataKey {
        &self.0[0]
    }

    /// What `find` gives for one of the keys, the newest first.
    pub fn find<T>(&self, find: impl FnMut(&DataKey) -> Option<T>) -> Option<T> {
        self.0.iter().find_map(find)
    }

    /// Whether `holds` is true of any of the keys.
    pub fn any(&self, holds: impl FnMut(&DataKey) -> bool) -> bool {
        self.0.iter().any(holds)
    }
}

impl From<&DataKey> for Keyring {
    fn from(key: &DataKey) -> Self {
        Self::new(key.clone(), [])
    }
}

impl From<&Self> for Keyring {
    fn from(keys: &Self) -> Self {
        keys.clone()
    }
}

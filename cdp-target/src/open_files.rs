//! How many files this process may have open, and how many of them a group's readers may keep.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::sync::OnceLock;

/// Groups that may each have their share at once; beside them there are sockets, and the files that are written.
const SHARES: u64 = 1024;
/// Open files that a group's readers keep: enough for the packs of a checkpoint of 32 GiB, or for the segments of some months.
const PER_GROUP_MAX: u64 = 512;
/// The least that is of use.
const PER_GROUP_MIN: u64 = 16;

/// Asks for as many open files as the system lets this process have: the usual limit of 1024 is soon reached.
pub fn allow() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Files that a group's readers may keep open, by the limit there was when it was asked first.
pub(crate) fn per_group() -> usize {
    static FILES: OnceLock<usize> = OnceLock::new();
    *FILES.get_or_init(|| share(getrlimit(Resource::Nofile).current))
}

/// A group's share of a limit; `None` is none.
fn share(limit: Option<u64>) -> usize {
    limit.map_or(PER_GROUP_MAX, |limit| (limit / SHARES).clamp(PER_GROUP_MIN, PER_GROUP_MAX)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_its_share_and_no_less_than_is_of_use() {
        assert_eq!([None, Some(1 << 20), Some(100 << 10), Some(1024)].map(share), [512, 512, 100, 16]);
    }
}

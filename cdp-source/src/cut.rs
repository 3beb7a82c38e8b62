//! The optimistic cut: the content of all changed blocks of a group as of one instant, without a freeze.

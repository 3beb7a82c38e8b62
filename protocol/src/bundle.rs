//! The one-time bundle that `enroll` writes and `join` redeems.

//! `source.toml`.

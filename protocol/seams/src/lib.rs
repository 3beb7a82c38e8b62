//! The seams: everything outside the program that can fail, lie or drift, behind small traits.
//!
//! Each trait has a real implementation and, with the feature `sim`, a simulated one driven by a seed. `clippy.toml` forbids the
//! direct calls everywhere else. The reader of protected volumes (`cdp-source`, `reader`) and the tracker are seams of their own.

pub mod clock;
pub mod line;
pub mod pulse;
#[cfg(feature = "quic")]
pub mod quic;
pub mod random;
pub mod service;
pub mod storage;
#[cfg(feature = "quic")]
pub mod tls;

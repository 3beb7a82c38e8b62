//! The line over QUIC.

//! A machine's whole disk: protected, lost, and put back onto an empty one by a rescue system that has nothing but a bundle.
//!
//! The rescue system is a process without the BPF file system and without the rights to BPF, with a state folder of its own. Needs root,
//! kernel BTF and loop devices, and QEMU for what boots; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

mod boots;
mod empty_disk;
mod machine;
mod replaced;

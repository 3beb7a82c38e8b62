//! Part of the target: journal/writer.

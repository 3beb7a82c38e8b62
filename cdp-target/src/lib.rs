//! The offsite end: receives, journals, and gives any recovery point back.

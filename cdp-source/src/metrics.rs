//! Names of the metrics.

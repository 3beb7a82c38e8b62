//! Opens the line to the target with the office's certificate.

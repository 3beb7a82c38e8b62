//! What a protected device is: disk, window, size, sequence.

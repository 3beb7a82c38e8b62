//! A capture becomes the frames of an attempt.

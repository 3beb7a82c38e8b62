//! A disk that loses, tears and lies.

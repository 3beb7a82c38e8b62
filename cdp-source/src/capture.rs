//! What a cut took: the content of its blocks.

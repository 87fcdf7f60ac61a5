//! What must hold for any bytes: of a file, and of what is imported. Each function takes a
//! fuzzer's bytes and panics when something does not hold; `fuzz/` calls them.

#![allow(missing_docs, clippy::missing_panics_doc, reason = "called by fuzz/ and nobody else")]

use crate::sqlite::fuzzing;

/// A column of a block: two bytes say how many rows, one which column, the rest is what is
/// between its version and its sum.
pub fn store_column(bytes: &[u8]) {
    fuzzing::column(bytes);
}

/// A batch as it stands in the file before it is a block: the bytes behind its sum.
pub fn store_batch(bytes: &[u8]) {
    fuzzing::batch(bytes);
}

/// What is imported: each line is an event or is counted, and events come out of a block as
/// they went in.
pub fn store_export(bytes: &[u8]) {
    fuzzing::export(bytes);
}

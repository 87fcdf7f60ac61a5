//! Questions, answered by scanning columns, whatever backend has them.
//!
//! A backend shows a [`Fold`](seam::Fold) its events as [chunks](chunk::Chunk) of columns;
//! which of them a fold reads it says before. What is asked of a chunk is asked of whole
//! columns, so that nothing is decided for each row that could be for each value.
//!
//! | file | what it holds |
//! |---|---|
//! | `seam` | what a backend does for questions |
//! | `chunk`, `table`, `shred` | columns, and events taken apart into them |
//! | `owners` | whose devices and users are |
//! | `whole` | what is found out about a chunk once for all questions |
//! | `select`, `counts`, `groups`, `sums`, `visits`, `funnels`, `names`, `lone`, `answer` | the questions |

// Only a backend that streams asks beforehand what is wanted.
#![cfg_attr(not(feature = "postgres"), allow(dead_code))]

pub(crate) mod answer;
pub(crate) mod chunk;
pub(crate) mod counts;
pub(crate) mod funnels;
mod groups;
pub(crate) mod lone;
pub(crate) mod names;
pub(crate) mod owners;
pub(crate) mod seam;
mod select;
pub(crate) mod shred;
mod sums;
pub(crate) mod table;
mod visits;
pub(crate) mod whole;

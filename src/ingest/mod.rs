//! The front doors: one file for each. A front door turns its wire into a
//! [`Draft`](crate::admission::Draft), hands it to admission, and turns the
//! answer into a reply. It never calls a provider and never waits for one.

pub(crate) mod codec;
pub(crate) mod grpc;
mod observe;
mod refusal;
pub(crate) mod server;

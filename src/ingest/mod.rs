//! The front doors: one file for each. A front door turns its wire into a
//! [`Draft`](crate::admission::Draft), hands it to admission, and turns the
//! answer into a reply. It never calls a provider and never waits for one.

mod batch;
mod codec;
mod draft;
pub(crate) mod grpc;
mod observe;
mod refusal;
pub(crate) mod server;
pub(crate) mod service;
pub(crate) mod settings;
pub(crate) mod tls;
pub(crate) mod unary;
mod wire;

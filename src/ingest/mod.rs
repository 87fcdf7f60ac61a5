//! The front doors: one file for each. A front door turns its wire into a
//! [`Draft`](crate::admission::draft::Draft), hands it to admission, and turns the
//! answer into a reply. It never calls a provider and never waits for one.

pub(crate) mod answer;
mod batch;
pub(crate) mod budget;
mod codec;
mod draft;
mod fields;
pub(crate) mod grpc;
mod limits;
mod message;
mod observe;
mod refusal;
pub(crate) mod server;
pub(crate) mod service;
pub(crate) mod settings;
pub(crate) mod tls;
mod wire;

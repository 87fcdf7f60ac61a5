//! The front doors: a folder for each. A front door turns its wire into a
//! [`Draft`](crate::admission::draft::Draft), hands it to admission, and turns the
//! answer into a reply. It never calls a provider and never waits for one.

pub(crate) mod budget;
mod call_body;
pub(crate) mod client_address;
pub(crate) mod connections;
pub(crate) mod grpc;
mod gzip;
pub(crate) mod http;
mod limits;
pub(crate) mod settings;
pub(crate) mod tls;

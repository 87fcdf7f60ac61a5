//! The gRPC front door: `analytics.v1.AnalyticsService`.

pub(crate) mod answer;
mod asking;
mod batch;
mod codec;
mod draft;
mod fields;
pub(crate) mod front_door;
mod message;
mod observe;
mod refusal;
pub(crate) mod server;
pub(crate) mod service;
mod wire;

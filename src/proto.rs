//! The generated messages, client and server of `proto/`.

/// Package `analytics.v1`.
pub mod v1 {
    #![allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all, reason = "generated")]
    tonic::include_proto!("analytics.v1");

    /// All descriptors, for server reflection.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/analytics_descriptor.bin"));
}

//! In place of `redis` where it is not built in: there is none, and so nothing that could be
//! asked of it.

use std::{convert::Infallible, time::Duration};

use analytics_relay_providers::Secret;

use super::{cache::Known, report::Question};
use crate::telemetry::SharedCacheMetrics;

#[derive(Debug)]
pub(super) enum SharedCache {}

pub(super) struct Found {
    pub(super) known: Option<Known>,
    pub(super) generation: String,
}

impl SharedCache {
    pub(super) fn new(_url: &Secret, _metrics: SharedCacheMetrics) -> Option<Self> {
        None
    }

    pub(super) fn is_connected(&self) -> bool {
        match *self {}
    }

    pub(super) async fn get(&self, _question: &Question, _key: &str) -> Option<Found> {
        match *self {}
    }

    pub(super) fn put(&self, _key: &str, _generation: String, _known: &Known, _for: Duration) {
        match *self {}
    }

    pub(super) fn forget(&self, _tenant: &str) {
        match *self {}
    }

    pub(super) async fn tend(&self) -> Infallible {
        match *self {}
    }
}

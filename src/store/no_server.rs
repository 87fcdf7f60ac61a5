//! In place of `server` where PostgreSQL is not built in: there is none, and so nothing that
//! could be asked of it.

use std::{convert::Infallible, io::Write, sync::Arc};

use analytics_relay_providers::Secret;
use analytics_relay_store::{
    Store, StoreError,
    lines::{ExportReport, Wanted},
};

use super::{
    error::OpenError,
    settings::StoreSettings,
    status::{Connections, ServerStats},
};

const NOT_BUILT_IN: &str =
    "got postgres://***, want sqlite:<file>: this relay is built without the store in PostgreSQL";

#[derive(Debug, Clone)]
pub(crate) struct Server(Infallible);

impl Server {
    pub(super) async fn open(_settings: &StoreSettings, _url: &Secret) -> Result<Self, OpenError> {
        Err(OpenError::Wrong(NOT_BUILT_IN.to_owned()))
    }

    pub(super) fn store(&self) -> Arc<dyn Store> {
        match self.0 {}
    }

    pub(super) async fn close(&self) {
        match self.0 {}
    }

    pub(super) async fn look(&self) -> Result<(), StoreError> {
        match self.0 {}
    }

    pub(super) fn connections(&self) -> Connections {
        match self.0 {}
    }

    pub(crate) async fn stats(&self) -> Result<ServerStats, StoreError> {
        match self.0 {}
    }

    pub(super) async fn upkeep(
        &self,
        _now_ms: i64,
        _kept_from_ms: Option<i64>,
    ) -> Result<(u64, u64), StoreError> {
        match self.0 {}
    }

    pub(super) async fn tenants_before(&self, _time_ms: i64) -> Result<Vec<String>, StoreError> {
        match self.0 {}
    }

    pub(crate) async fn check(&self) -> Result<(u64, Vec<String>), StoreError> {
        match self.0 {}
    }

    pub(crate) async fn export(
        &self,
        _wanted: &Wanted,
        _out: impl Write + Send + 'static,
    ) -> Result<ExportReport, StoreError> {
        match self.0 {}
    }
}

pub(super) fn why(error: StoreError) -> String {
    error.to_string()
}

pub(super) async fn look_at(_settings: &StoreSettings, _url: &Secret) -> Result<String, String> {
    Err(NOT_BUILT_IN.to_owned())
}

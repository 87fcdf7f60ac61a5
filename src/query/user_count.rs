//! How many users there were in a period.
//!
//! A user is a user id that an event of the period names; ids that an alias has joined are one.
//! Devices and browsers of which nobody knows the user are none: they are visitors, which is
//! another figure.

use analytics_relay_store::{Bucket, Count, Field, Filter, Scope, Store};
use serde::{Deserialize, Serialize};

use super::{
    period::Period,
    unanswered::Unanswered,
    written::{Csv, Format, Meta, Written, json},
};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UserCount;

/// So many users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Users {
    pub(crate) unique_users: u64,
    /// There were too many to remember each: one standard error is 0.8 %.
    pub(crate) estimated: bool,
}

impl UserCount {
    pub(super) async fn ask(&self, store: &dyn Store, scope: &Scope) -> Result<Users, Unanswered> {
        let known = scope.clone().with(Filter::present(Field::User));
        let points = store.counts(&known, Bucket::All, "UTC").await?;
        let Count { n, estimated } = points.first().map(|point| point.visitors).unwrap_or_default();
        Ok(Users { unique_users: n, estimated })
    }

    pub(super) fn write(&self, users: &Users, period: &Period, meta: &Meta, format: Format) -> Written {
        if format == Format::Csv {
            let mut csv = Csv::new(&["from", "to", "unique_users", "estimated"]);
            let [from, to] = [period.range_ms.start, period.range_ms.end].map(|ms| period.shown(ms));
            csv.row([&*from, &to, &users.unique_users.to_string(), &users.estimated.to_string()]);
            return csv.written("user-count", period);
        }
        json(users, meta)
    }
}

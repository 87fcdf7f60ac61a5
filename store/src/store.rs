//! The seam between who asks and who stores.

use analytics_relay_providers::Event;
use async_trait::async_trait;

use crate::{
    Appended, AsOf, Breakdown, Bucket, CountPoint, Deleted, Field, Funnel, FunnelAnswer, Identity, LogEntry,
    NamedPoint, NewVisitors, Operator, PageRow, Point, PropertyRow, Realtime, Scope, SessionRow, StoreError,
    Subject, Summary, TenantScope, ValueRow, model::KnownFact,
};

/// Keeps events and answers questions about them.
///
/// Every backend gives the answers of [`Oracle`](crate::oracle::Oracle): the suite of
/// [`sqlite`](crate::sqlite) compares them. Calls may be dropped at any time; what a
/// dropped [`append`](Store::append) did is found out by sending the batch again.
#[async_trait]
pub trait Store: Send + Sync {
    /// Keeps events, each once by (tenant, event id), together with what they tell about
    /// who is who: all of the batch or, if it fails, none of it. Returns when it would
    /// survive a power cut; of each event what became of it.
    async fn append(&self, batch: &[Event]) -> Result<Vec<Appended>, StoreError>;

    /// How many events of a tenant or some of its sources are kept, and up to when they go.
    /// Machines too, and whether or not a block turns out to be damaged: nothing is read
    /// but sizes.
    async fn as_of(&self, of: &TenantScope) -> Result<AsOf, StoreError>;

    /// Events and visitors of each bucket of a range, which costs a tenth of [`Store::series`].
    async fn counts(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<CountPoint>, StoreError>;

    /// The figures of a range. A predecessor is asked for by a second call.
    async fn summary(&self, scope: &Scope) -> Result<Summary, StoreError>;

    /// The figures of each bucket of a range; `zone` is an IANA name. Views, events and
    /// sessions of all buckets add up to those of the range, visitors do not.
    async fn series(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<Point>, StoreError>;

    /// Events by name in each bucket that has some.
    async fn series_by_name(
        &self,
        scope: &Scope,
        bucket: Bucket,
        zone: &str,
    ) -> Result<Vec<NamedPoint>, StoreError>;

    /// The values of a field, by visitors.
    async fn breakdown(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<ValueRow>, StoreError>;

    /// The names that properties have at the top level, most frequent first, then by name.
    async fn properties(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PropertyRow>, StoreError>;

    /// The values that a field has in the first events of sessions.
    async fn sessions_by(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<SessionRow>, StoreError>;

    /// Pages, with how sessions enter, leave and stay.
    async fn pages(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PageRow>, StoreError>;

    /// How far they came through a funnel whose first step lies in the range.
    async fn funnel(&self, scope: &Scope, funnel: &Funnel) -> Result<FunnelAnswer, StoreError>;

    /// What goes on at a time; the range is not looked at.
    async fn realtime(&self, scope: &Scope, now_ms: i64) -> Result<Realtime, StoreError>;

    /// Who is new in the range.
    async fn new_visitors(&self, scope: &Scope) -> Result<NewVisitors, StoreError>;

    /// The newest events, of somebody if one is given, newest first. Those of one time
    /// come by descending id. For the next page end the range before the last one's time.
    async fn recent(
        &self,
        scope: &Scope,
        who: Option<&Subject>,
        limit: usize,
    ) -> Result<Vec<Event>, StoreError>;

    /// What is known about somebody, of whichever websites and apps of the tenant: so one
    /// who may see some of them gets [`StoreError::Invalid`], here and wherever else the
    /// sources are not looked at.
    async fn identity(&self, of: &TenantScope, who: &Subject) -> Result<Option<Identity>, StoreError>;

    /// What was decided about all ids of somebody, the latest first. Of a tenant the last
    /// [`LOG_MAX`](crate::model::identity::LOG_MAX) decisions are kept.
    async fn identity_log(
        &self,
        of: &TenantScope,
        who: &Subject,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError>;

    /// Says that a device or browser, or an id that an alias names, is not this user's
    /// (`joined` false), or takes that back. What was counted under the link is counted
    /// without it from then on; events that say otherwise, sent again or new, change
    /// nothing. Of an alias it does not matter which id is named first.
    async fn link(
        &self,
        of: &TenantScope,
        from: &str,
        user: &str,
        joined: bool,
        by: &Operator,
    ) -> Result<(), StoreError>;

    /// Takes in what another store knows about who is who: what the events that are kept
    /// do not tell, or not any more. In any order, and any number of times. Returns how many
    /// it can never keep, as it cannot keep events with such ids: [`Appended::Unstorable`].
    async fn know(&self, facts: &[KnownFact]) -> Result<u64, StoreError>;

    /// Deletes somebody: of a user all events under any of their ids and what is known
    /// about them; of a device all events that name it. The answer says what could not be
    /// reached. Of all websites and apps of the tenant.
    async fn erase(&self, of: &TenantScope, who: &Subject) -> Result<Deleted, StoreError>;

    /// Deletes events before a time, of all websites and apps of the tenant.
    async fn retain(&self, of: &TenantScope, from_ms: i64) -> Result<Deleted, StoreError>;
}

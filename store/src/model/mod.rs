//! What questions mean, whatever backend answers them. All of it is pure.

pub mod buckets;
pub mod event;
pub mod funnel;
pub mod identity;
pub mod known;
pub mod sessions;
pub(crate) mod tenant;
pub mod traits;
pub mod uniques;

pub use buckets::Buckets;
pub use event::{Class, Keys, SessionKey};
pub use funnel::{Act, Walk};
pub use identity::{FactLimits, Facts, Owner, Owners, Seen};
pub use known::{Known, KnownFact};
pub use sessions::{DAY_MS, GAP_MS, SessionPart};
pub use uniques::{IdMap, IdSet, Uniques};

//! What of an event is kept, and who gets what of it: consent, rules before the log, rules
//! of each provider while its requests are encoded.

pub(crate) mod secret;
pub(crate) mod suppression;

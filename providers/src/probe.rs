//! What a try of the way to a vendor found out, step by step.

/// One step of the way, in the order in which a request takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What was tried: `dns`, `tcp`, `tls`, `key`, or a path with `path` before it.
    pub what: String,
    /// How it went.
    pub finding: Finding,
    /// Why that is known, or what kept it from being known; no key.
    pub why: String,
}

/// How a step went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// Events would get past it.
    Ok,
    /// No event would.
    Failed,
    /// It could not be found out.
    Unknown,
}

impl Step {
    /// Events would get past it.
    pub fn ok(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), finding: Finding::Ok, why: why.into() }
    }

    /// No event would.
    pub fn failed(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), finding: Finding::Failed, why: why.into() }
    }

    /// It could not be found out.
    pub fn unknown(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), finding: Finding::Unknown, why: why.into() }
    }
}

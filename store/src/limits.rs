//! What the answer to one question may take.

/// What the answer to one question may take of memory.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Visitors that are told apart; more are estimated, and the answer says so.
    pub exact_max: usize,
    /// Visitors of a question that cannot be estimated.
    pub visitors_max: usize,
    /// Values of a field.
    pub values_max: usize,
    /// Bytes of them.
    pub value_bytes_max: usize,
    /// Bytes of the visitors of all values.
    pub group_bytes_max: usize,
    /// Events that are a step of a funnel.
    pub acts_max: usize,
    /// Sessions that are put together at once; of more a part after the other.
    pub sessions_at_once: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            exact_max: 500_000,
            visitors_max: 2_000_000,
            values_max: 100_000,
            value_bytes_max: 16 << 20,
            group_bytes_max: 96 << 20,
            acts_max: 4_000_000,
            sessions_at_once: 1_000_000,
        }
    }
}

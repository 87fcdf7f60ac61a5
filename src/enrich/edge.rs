//! What the edge alone knows of an event, beside what its caller says.

use super::agent::Hints;

/// What the door knows of the user, and the caller does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Edge<'a> {
    /// The draft's address was read off a connection, or told by a trusted proxy: nobody
    /// has said it.
    pub(crate) ip_is_connections: bool,
    /// The country of that address, as a trusted proxy tells it, in two capital letters.
    pub(crate) country_hint: Option<[u8; 2]>,
    /// The user's own device sends, and no server of the customer's.
    pub(crate) is_device: bool,
    /// The user's browser says that its user declines to be followed.
    pub(crate) is_declined: bool,
    /// What the browser that sends says of itself, if one does.
    pub(crate) hints: Option<&'a Hints<'a>>,
}

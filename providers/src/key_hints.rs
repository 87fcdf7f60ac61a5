//! Property names that some vendor's mapping has to look at.
//!
//! Gathered in one place, so that properties are marked once, while they are
//! written, and know no vendor. A vendor that reserves more names adds them
//! here; a mark that is set for nothing costs that vendor a look inside.

/// Why a mapping has to look at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hint {
    /// Mixpanel reads a property of this name itself: a caller's is relayed under another
    /// one.
    Reserved,
    /// Mixpanel's own pages know the trait under another name: see [`profile_name`].
    Renamed,
}

/// What is to be known of a name: of most nothing.
#[inline]
pub(crate) fn hint(key: &[u8]) -> Option<Hint> {
    // A match looks at the length first, and hardly any name gets further.
    match key {
        b"time" | b"distinct_id" | b"ip" | b"token" | b"bucket" | b"alias" | b"$insert_id"
        | b"$device_id" | b"$user_id" | b"$anon_id" | b"$ignore" | b"$event_name" | b"$identified_id"
        | b"$distinct_ids" => Some(Hint::Reserved),
        b"email" | b"name" | b"phone" | b"avatar" | b"username" | b"createdAt" | b"firstName"
        | b"lastName" => Some(Hint::Renamed),
        [b'm', b'p', b'_', ..] => Some(Hint::Reserved),
        _ => None,
    }
}

/// True if Mixpanel reads a property of this name itself.
pub(crate) fn is_reserved_property(key: &[u8]) -> bool {
    hint(key) == Some(Hint::Reserved)
}

/// The name under which Mixpanel's own pages know a common trait.
pub(crate) fn profile_name(trait_name: &[u8]) -> Option<&'static str> {
    Some(match trait_name {
        b"email" => "$email",
        b"name" => "$name",
        b"phone" => "$phone",
        b"avatar" => "$avatar",
        b"username" => "$username",
        b"createdAt" => "$created",
        b"firstName" => "$first_name",
        b"lastName" => "$last_name",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_renamed_if_there_is_another_for_it() {
        for name in ["email", "name", "phone", "avatar", "username", "createdAt", "firstName", "lastName"] {
            assert_eq!(hint(name.as_bytes()), Some(Hint::Renamed), "{name}");
            assert!(profile_name(name.as_bytes()).is_some(), "{name}");
        }
        for name in ["time", "mp_x", "mp_", "$distinct_ids", "alias"] {
            assert_eq!(hint(name.as_bytes()), Some(Hint::Reserved), "{name}");
            assert!(profile_name(name.as_bytes()).is_none(), "{name}");
        }
        assert_eq!(["", "mp", "Email", "total"].map(|name| hint(name.as_bytes())), [None; 4]);
    }
}

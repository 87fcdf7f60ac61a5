//! Property names that some vendor's mapping has to look at.
//!
//! Gathered in one place, so that properties are marked once, while they are
//! written, and know no vendor. A vendor that reserves more names adds them
//! here; a mark that is set for nothing costs that vendor a look inside.

/// True if Mixpanel reads a property of this name itself: a caller's is relayed under
/// another one.
pub(crate) fn is_reserved_property(key: &[u8]) -> bool {
    // A match looks at the length first, and hardly any name gets further.
    matches!(
        key,
        [b'm', b'p', b'_', ..]
            | b"time"
            | b"distinct_id"
            | b"ip"
            | b"token"
            | b"bucket"
            | b"alias"
            | b"$insert_id"
            | b"$device_id"
            | b"$user_id"
            | b"$anon_id"
            | b"$ignore"
            | b"$event_name"
            | b"$identified_id"
            | b"$distinct_ids"
    )
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

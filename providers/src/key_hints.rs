//! Property names that some vendor's mapping has to look at.
//!
//! Gathered in one place, so that properties are marked once, while they are
//! written, and know no vendor. A vendor that reserves more names adds them
//! here; a mark that is set for nothing costs that vendor a look inside.

/// Properties that Mixpanel reads itself, beside those that start with `mp_`. A
/// caller's property of that name is relayed under another one.
const RESERVED_PROPERTIES: [&str; 13] = [
    "time",
    "distinct_id",
    "ip",
    "token",
    "bucket",
    "alias",
    "$insert_id",
    "$device_id",
    "$user_id",
    "$anon_id",
    "$ignore",
    "$event_name",
    "$identified_id",
];

/// True if Mixpanel reads a property of this name itself.
pub(crate) fn is_reserved_property(key: &str) -> bool {
    key.starts_with("mp_") || key == "$distinct_ids" || RESERVED_PROPERTIES.contains(&key)
}

/// The name under which Mixpanel's own pages know a common trait.
pub(crate) fn profile_name(trait_name: &str) -> Option<&'static str> {
    Some(match trait_name {
        "email" => "$email",
        "name" => "$name",
        "phone" => "$phone",
        "avatar" => "$avatar",
        "username" => "$username",
        "createdAt" => "$created",
        "firstName" => "$first_name",
        "lastName" => "$last_name",
        _ => return None,
    })
}

//! Ids that mean nobody.

/// Ids that mean nobody, as programs write them that have none, by their length.
/// Shared, they would make one user of all who are unknown.
const NOBODY: [&[&str]; 18] = [
    &[],
    &["0"],
    &["-1", "{}", "[]", "id", "na", "\\n"],
    &["n/a", "nan", "nil"],
    &["none", "null", "true", "user", "anon"],
    &["<nil>", "false", "guest", "email"],
    &["system", "lmy47d", "(null)"],
    &["backend", "unknown", "not_set"],
    &[],
    &["undefined", "anonymous", "(not set)"],
    &["distinctid"],
    &["distinct_id"],
    &[],
    &[],
    &["anonymous-user", "anonymous_user"],
    &["[object object]"],
    &[],
    &["not_authenticated"],
];

/// True if an id means nobody: a front door takes it as absent, and a store joins nobody by
/// it. Compared without blanks and quotes around it, and without case.
pub fn means_nobody(id: &str) -> bool {
    let is_around = |byte: &u8| matches!(byte, 0..=b' ' | 0x7F | b'"' | b'\'' | b'`');
    let bytes = id.as_bytes();
    let Some(first) = bytes.iter().position(|byte| !is_around(byte)) else { return true };
    let end = bytes.iter().rposition(|byte| !is_around(byte)).map_or(first, |last| last + 1);
    let bytes = &bytes[first..end];
    // The nil UUID among them.
    if matches!(bytes[0], b'0' | b'-') && bytes.iter().all(|byte| matches!(byte, b'0' | b'-')) {
        return true;
    }
    let alike = NOBODY.get(bytes.len()).copied().unwrap_or_default();
    // Hardly an id begins as one of them does.
    let begins = bytes[0].to_ascii_lowercase();
    alike.iter().any(|nobody| {
        nobody.as_bytes().first() == Some(&begins) && nobody.as_bytes().eq_ignore_ascii_case(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_means_nobody_is_known_in_every_spelling() {
        let uuid = "00000000-0000-0000-0000-000000000000";
        for id in NOBODY.concat().into_iter().chain([
            uuid,
            "000",
            "-",
            " ",
            "\t\n",
            "''",
            "None",
            "NULL",
            "Undefined",
        ]) {
            assert!(means_nobody(id), "{id:?}");
            assert!(means_nobody(&format!(" \"{}\" ", id.to_uppercase())), "{id:?}");
        }
        for id in ["1", "00a", "user-1", "nonesuch", "nullable", "x", "é", "0x0", "-2", "undefined1"] {
            assert!(!means_nobody(id), "{id:?}");
        }
        for (length, ids) in NOBODY.iter().enumerate() {
            assert!(ids.iter().all(|id| id.len() == length), "{ids:?}");
        }
    }
}

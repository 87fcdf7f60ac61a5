//! Texts of callers, cut to what is read and told of them.

/// Longest name that is told.
const NAME_BYTES_MAX: usize = 64;

/// At most so many bytes of a text, cut between characters.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A name, no longer than is told, if there is one.
pub(super) fn name_of(name: &str) -> Option<String> {
    let name = cut(name.trim(), NAME_BYTES_MAX).trim_end();
    (!name.is_empty()).then(|| name.to_owned())
}

/// What names the content of an operator's file.
pub(super) fn checksum(text: &str) -> String {
    format!("own:{:08x}", crc32fast::hash(text.as_bytes()))
}

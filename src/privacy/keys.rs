//! Names in rules: whole ones, compared without case and without `_`, `-` and blanks.
//!
//! Never parts of names nor patterns of values: whoever sends `author` would lose it to a
//! rule against `auth`, and nobody could find out why.

use std::collections::HashMap;

use analytics_relay_providers::pii::is_separator;

/// Most bytes of a name in a rule, as it is compared.
pub(super) const NAME_BYTES_MAX: usize = 64;

/// Names, and what is to be known of each.
#[derive(Debug)]
pub(super) struct Keys<T> {
    by_name: HashMap<Box<str>, T>,
    /// Whether a name may begin with this byte: nearly every other one is told by that.
    begins: [bool; 256],
}

impl<T> Keys<T> {
    /// Of names as [`plain`] makes them; of two that are alike the last counts.
    pub(super) fn new(names: impl IntoIterator<Item = (String, T)>) -> Self {
        let by_name: HashMap<Box<str>, T> =
            names.into_iter().map(|(name, value)| (name.into_boxed_str(), value)).collect();
        // Of what is not ASCII nothing can be said by one byte.
        let mut begins = std::array::from_fn(|byte| byte >= 0x80);
        for byte in by_name.keys().filter_map(|name| name.bytes().next()) {
            begins[usize::from(byte)] = true;
            begins[usize::from(byte.to_ascii_uppercase())] = true;
        }
        if !by_name.is_empty() {
            b"_- ".iter().for_each(|byte| begins[usize::from(*byte)] = true);
        }
        Self { by_name, begins }
    }

    /// What is known of a name, whatever its spelling.
    #[inline]
    pub(super) fn get(&self, key: &str) -> Option<&T> {
        let first = key.bytes().next()?;
        if self.begins[usize::from(first)] { self.find(key) } else { None }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    fn find(&self, key: &str) -> Option<&T> {
        if !key.is_ascii() {
            return self.by_name.get(&*plain(key));
        }
        let mut name = [0; NAME_BYTES_MAX];
        let mut bytes = 0;
        for byte in key.bytes().filter(|byte| !is_separator(*byte)) {
            *name.get_mut(bytes)? = byte.to_ascii_lowercase();
            bytes += 1;
        }
        self.by_name.get(std::str::from_utf8(&name[..bytes]).ok()?)
    }
}

/// A name as it is compared; empty if there is nothing in it to compare.
pub(super) fn plain(key: &str) -> String {
    let letters = key.chars().filter(|c| !u8::try_from(*c).is_ok_and(is_separator));
    letters.flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(names: &[&str]) -> Keys<usize> {
        Keys::new(names.iter().enumerate().map(|(place, name)| (plain(name), place)))
    }

    #[test]
    fn a_name_is_known_in_every_spelling_and_as_a_whole() {
        let keys = keys(&["Credit-Card", "straße", "e_mail", "$email", "x"]);
        for (key, want) in [
            ("creditcard", Some(0)),
            ("CREDIT_CARD", Some(0)),
            ("_credit card-", Some(0)),
            ("credit.card", None),
            ("creditcards", None),
            ("credit", None),
            ("STRAßE", Some(1)),
            ("Stra_ße", Some(1)),
            ("strasse", None),
            ("eMail", Some(2)),
            ("email", Some(2)),
            ("$email", Some(3)),
            ("$e-mail", Some(3)),
            ("X", Some(4)),
            ("", None),
            ("_", None),
            (&"x".repeat(200), None),
            (&"_".repeat(200), None),
        ] {
            assert_eq!(keys.get(key).copied(), want, "{key:?}");
        }
        let none: Keys<()> = Keys::new([]);
        assert!(none.is_empty() && ["", "_", "é", "a"].iter().all(|key| none.get(key).is_none()));
    }

    #[test]
    fn nothing_is_left_of_a_name_without_letters() {
        assert_eq!((plain("_- "), plain("A_b"), plain("É")), (String::new(), "ab".into(), "é".into()));
    }
}

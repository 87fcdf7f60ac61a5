//! What a question says in the query of its address.

use std::{fmt::Display, ops::RangeInclusive, str::FromStr};

use super::unanswered::{Fault, Unanswered, quoted};

/// Most names in one query: more than any question has.
const NAMES_MAX: usize = 32;

/// Names and values, each taken by who knows it; what nobody does is an error, for a
/// misspelled filter would answer another question.
#[derive(Debug)]
pub(crate) struct Parameters {
    left: Vec<(String, String)>,
}

impl Parameters {
    /// Of the part of an address behind its `?`.
    pub(crate) fn of(query: &str) -> Result<Self, Unanswered> {
        let mut left: Vec<(String, String)> = Vec::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if left.iter().any(|(known, _)| *known == name) {
                return Err(Fault::of_parameter(shown(&name), "the name twice", "each once").into());
            }
            if left.len() == NAMES_MAX {
                let want = format!("at most {NAMES_MAX} names");
                return Err(Fault::of_parameter(shown(&name), "one name more", want).into());
            }
            left.push((name.into_owned(), value.into_owned()));
        }
        Ok(Self { left })
    }

    /// The value of a name, if it is there.
    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        let at = self.left.iter().position(|(known, _)| known == name)?;
        Some(self.left.swap_remove(at).1)
    }

    /// One of some names, by what it stands for; the first if nothing is said.
    pub(crate) fn one_of<T: Copy>(
        &mut self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Result<T, Unanswered> {
        let Some(value) = self.take(name) else { return Ok(choices[0].1) };
        choice(name, &value, choices)
    }

    /// A whole number, if one is said.
    pub(crate) fn number<T: FromStr + PartialOrd + Display>(
        &mut self,
        name: &'static str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, Unanswered> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.parse().ok().filter(|number| range.contains(number));
        let want = || format!("{} to {}", range.start(), range.end());
        number.map(Some).ok_or_else(|| Fault::of_parameter(name, quoted(&value), want()).into())
    }

    /// True if the question says so.
    pub(crate) fn flag(&mut self, name: &'static str) -> Result<bool, Unanswered> {
        self.one_of(name, &[("false", false), ("true", true)])
    }

    /// Nothing is left that nobody has taken.
    pub(crate) fn end(self, known: &str) -> Result<(), Unanswered> {
        match self.left.first() {
            None => Ok(()),
            Some((name, value)) => {
                Err(Fault::of_parameter(shown(name), quoted(value), format!("one of {known}")).into())
            }
        }
    }
}

/// One of some names, by what it stands for.
pub(crate) fn choice<T: Copy>(
    field: &'static str,
    value: &str,
    choices: &[(&str, T)],
) -> Result<T, Unanswered> {
    if let Some((_, it)) = choices.iter().find(|(name, _)| *name == value) {
        return Ok(*it);
    }
    let (last, others) = choices.split_last().expect("there is a choice");
    let others: Vec<_> = others.iter().map(|(name, _)| *name).collect();
    Err(Fault::of_parameter(field, quoted(value), format!("{} or {}", others.join(", "), last.0)).into())
}

/// A name of a caller's, short enough to be told.
fn shown(name: &str) -> String {
    const CHARS_MAX: usize = 40;
    name.chars().take(CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(result: Result<(), Unanswered>) -> String {
        result.unwrap_err().message()
    }

    #[test]
    fn what_nobody_knows_and_what_stands_twice_is_told() {
        let unknown = Parameters::of("form=2026-01-01").unwrap().end("from, to");
        assert_eq!(said(unknown), "form: got \"2026-01-01\", want one of from, to");
        assert_eq!(said(Parameters::of("a=1&a=1").map(drop)), "a: got the name twice, want each once");
        let many: String = (0..40).map(|at| format!("p{at}=1&")).collect();
        assert_eq!(said(Parameters::of(&many).map(drop)), "p32: got one name more, want at most 32 names");
        let long = format!("{}={}", "n".repeat(9000), "v".repeat(9000));
        assert!(said(Parameters::of(&long).unwrap().end("a")).len() < 200);
    }

    #[test]
    fn values_are_what_they_may_be() {
        let mut parameters = Parameters::of("a=true&b=yes&n=7&m=8&c=+x%20").unwrap();
        assert_eq!(parameters.flag("a"), Ok(true));
        assert_eq!(parameters.flag("none"), Ok(false));
        assert_eq!(said(parameters.flag("b").map(drop)), "b: got \"yes\", want false or true");
        assert_eq!(parameters.number("n", 1..=7), Ok(Some(7)));
        assert_eq!(parameters.number("none", 1..=7), Ok(None));
        assert_eq!(said(parameters.number("m", 1..=7).map(drop)), "m: got \"8\", want 1 to 7");
        assert_eq!(parameters.take("c").as_deref(), Some(" x "));
        assert_eq!(parameters.end(""), Ok(()));
    }
}

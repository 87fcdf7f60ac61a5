//! What is known about who is who beside events: one line each of an export.
//!
//! Events that retention took away do not tell any more who was who, and none ever tells
//! what an operator decided. So an export has these lines behind its events: JSON objects
//! like `{"v":1,"fact":"link","tenant":"t","anonymous":"d","user":"u","first_ms":5,"last_ms":0}`.
//!
//! | `fact` | fields |
//! |---|---|
//! | `user` | `user`, `first_ms`, `last_ms` |
//! | `link` | `anonymous`, `user`, `first_ms`, `last_ms` |
//! | `alias` | `previous`, `user`, `first_ms` |
//! | `apart` | `anonymous` (or the id of before), `user`, `operator`, `reason`, `at_ms` |
//! | `traits` | `anonymous` or `user`; `traits`: key → [time, event id, value] |
//!
//! All have `v`, and `tenant` if there is one. A line of another version is of a newer
//! relay: it is counted as one that cannot be read.

use analytics_relay_providers::means_nobody;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{identity::Seen, traits::Traits};
use crate::{Operator, Subject};

const VERSION: u32 = 1;

/// What one line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownFact {
    /// Whose it is, empty for a relay that has one tenant.
    pub tenant: String,
    /// What is known.
    pub what: Known,
}

/// Something that is known about who is who.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// A user was seen.
    User {
        /// The user.
        user: String,
        /// When.
        seen: Seen,
    },
    /// A device was used by a user.
    Link {
        /// The device.
        anonymous: String,
        /// The user.
        user: String,
        /// When.
        seen: Seen,
    },
    /// A user had another id before.
    Alias {
        /// That id.
        previous: String,
        /// The user.
        user: String,
        /// When it was said first: Unix milliseconds.
        first_ms: i64,
    },
    /// An operator put two ids apart.
    Apart {
        /// The device, or the id of before.
        from: String,
        /// The user.
        user: String,
        /// Who, why and when.
        by: Operator,
    },
    /// What somebody is like.
    Traits {
        /// Who.
        who: Subject,
        /// What.
        traits: Traits,
    },
}

/// As it stands in a file.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Line {
    v: u32,
    fact: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    tenant: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    anonymous: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    operator: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traits: Option<Box<RawValue>>,
}

impl KnownFact {
    /// As a line, without its end.
    pub fn to_line(&self) -> String {
        let line = Line { v: VERSION, tenant: self.tenant.clone(), ..Line::default() };
        let line = match self.what.clone() {
            Known::User { user, seen } => Line { fact: "user".into(), user: Some(user), ..line }.seen(seen),
            Known::Link { anonymous, user, seen } => {
                Line { fact: "link".into(), anonymous: Some(anonymous), user: Some(user), ..line }.seen(seen)
            }
            Known::Alias { previous, user, first_ms } => Line {
                fact: "alias".into(),
                previous: Some(previous),
                user: Some(user),
                first_ms: Some(first_ms),
                ..line
            },
            Known::Apart { from, user, by: Operator { name, reason, at_ms } } => Line {
                fact: "apart".into(),
                anonymous: Some(from),
                user: Some(user),
                operator: Some(name),
                reason: Some(reason),
                at_ms: Some(at_ms),
                ..line
            },
            Known::Traits { who, traits } => {
                let (user, anonymous) = match who {
                    Subject::User(user) => (Some(user), None),
                    Subject::Anonymous(device) => (None, Some(device)),
                };
                let traits = RawValue::from_string(traits.to_stored()).ok();
                Line { fact: "traits".into(), user, anonymous, traits, ..line }
            }
        };
        serde_json::to_string(&line).expect("texts and numbers are JSON")
    }

    /// What a line says; none if it is no such line, or one of another version.
    pub fn from_line(line: &[u8]) -> Option<Self> {
        let line: Line = serde_json::from_slice(line).ok()?;
        if line.v != VERSION {
            return None;
        }
        let seen = line.first_ms.zip(line.last_ms);
        let seen = seen.map(|(first_ms, last_ms)| Seen { first_ms, ..Seen::at(last_ms) });
        let (user, anonymous) = (line.user.map(somebody), line.anonymous.map(somebody));
        let what = match &*line.fact {
            "user" => Known::User { user: user??, seen: seen? },
            "link" => Known::Link { anonymous: anonymous??, user: user??, seen: seen? },
            "alias" => {
                let (previous, user) = (somebody(line.previous?)?, user??);
                if previous == user {
                    return None;
                }
                Known::Alias { previous, user, first_ms: line.first_ms? }
            }
            "apart" => {
                let by = Operator { name: line.operator?, reason: line.reason?, at_ms: line.at_ms? };
                Known::Apart { from: anonymous??, user: user??, by }
            }
            "traits" => {
                let who = match (user, anonymous) {
                    (Some(user), None) => Subject::User(user?),
                    (None, Some(device)) => Subject::Anonymous(device?),
                    _ => return None,
                };
                Known::Traits { who, traits: Traits::read(line.traits?.get())? }
            }
            _ => return None,
        };
        Some(Self { tenant: line.tenant, what })
    }
}

impl Line {
    fn seen(self, Seen { first_ms, last_ms }: Seen) -> Self {
        Self { first_ms: Some(first_ms), last_ms: Some(last_ms), ..self }
    }
}

fn somebody(id: String) -> Option<String> {
    (!means_nobody(&id)).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_comes_back_from_its_line() {
        let (user, tenant) = ("é\"\u{0}".to_owned(), "t".to_owned());
        let traits = Traits::read(r#"{"plan":[5,"id","pro"],"n":[6,"b",1e2],"gone":[7,"c",null]}"#).unwrap();
        let by = Operator { name: "ann".into(), reason: String::new(), at_ms: -1 };
        let seen = Seen::at(3_600_005);
        for what in [
            Known::User { user: user.clone(), seen },
            Known::Link { anonymous: "d".into(), user: user.clone(), seen },
            Known::Alias { previous: "p".into(), user: user.clone(), first_ms: 4 },
            Known::Apart { from: "d".into(), user: user.clone(), by },
            Known::Traits { who: Subject::User(user.clone()), traits: traits.clone() },
            Known::Traits { who: Subject::Anonymous("d".into()), traits },
        ] {
            for tenant in [tenant.clone(), String::new()] {
                let fact = KnownFact { tenant, what: what.clone() };
                let line = fact.to_line();
                assert!(!line.contains('\n'), "{line}");
                assert_eq!(KnownFact::from_line(line.as_bytes()), Some(fact), "{line}");
                assert!(analytics_relay_providers::Event::from_json(line.as_bytes()).is_err(), "{line}");
            }
        }
    }

    #[test]
    fn a_line_that_says_less_or_more_than_is_known_here_is_none() {
        for line in [
            "",
            "{}",
            "[]",
            r#"{"v":2,"fact":"user","user":"u","first_ms":1,"last_ms":1}"#,
            r#"{"v":1,"fact":"user","user":"u","first_ms":1}"#,
            r#"{"v":1,"fact":"user","user":"null","first_ms":1,"last_ms":1}"#,
            r#"{"v":1,"fact":"newer","user":"u","first_ms":1,"last_ms":1}"#,
            r#"{"v":1,"fact":"alias","user":"u","previous":"u","first_ms":1}"#,
            r#"{"v":1,"fact":"traits","user":"u","anonymous":"d","traits":{}}"#,
            r#"{"v":1,"fact":"traits","user":"u","traits":{"a":1}}"#,
        ] {
            assert_eq!(KnownFact::from_line(line.as_bytes()), None, "{line}");
        }
        let more = r#"{"v":1,"fact":"user","user":"u","first_ms":1,"last_ms":3600001,"more":[]}"#;
        let fact = KnownFact::from_line(more.as_bytes()).unwrap();
        let seen = Seen { first_ms: 1, last_ms: 3_600_000 };
        assert_eq!(fact.what, Known::User { user: "u".into(), seen });
    }
}

//! Aliases, in projects of the original ID merge: elsewhere Mixpanel joins ids by itself,
//! and takes none.

use super::{BODY_BYTES_MAX, IdentityMode, Mixpanel, usable};
use crate::{
    Endpoint, Event, EventKind, NotFor, Rejection,
    http::{Encoded, no_form},
    json::{Json, List},
};

const ALIASES: Endpoint = Endpoint(3);
const ALIASES_PATH: &str = "/track?ip=0&verbose=1";

/// The event that names a user's other id.
const CREATE_ALIAS: &str = "$create_alias";
/// The form's field.
const FIELD: &str = "data=";

impl Mixpanel {
    #[cold]
    pub(super) fn alias_endpoint(&self) -> Result<Endpoint, NotFor> {
        match self.identity {
            IdentityMode::Original => Ok(ALIASES),
            IdentityMode::Simplified => Err(NotFor::UnsupportedKind),
        }
    }

    /// The aliases of a batch, and what is in the batch without being one for Mixpanel.
    #[cold]
    pub(super) fn encode_aliases(&self, batch: &[Event]) -> Encoded {
        let mut json = Json::default();
        let mut rows = List::begin(&mut json);
        let mut rejected = Vec::new();
        for (index, event) in batch.iter().enumerate() {
            let EventKind::Alias { previous_id } = event.kind() else {
                rejected.push(no_form(index, event));
                continue;
            };
            match (self.alias_endpoint(), usable(Some(previous_id)), usable(event.user_id())) {
                (Err(_), ..) => rejected.push(no_form(index, event)),
                (Ok(_), Some(previous_id), Some(user_id)) => {
                    self.encode_alias(&mut rows, previous_id, user_id)
                }
                _ => {
                    let detail = "Mixpanel refuses one of these ids".to_owned();
                    rejected.push((index, Rejection::UnusableId, detail));
                }
            }
        }
        rows.end();
        form(&json.into_bytes(), rejected)
    }

    /// Without a time and an id of its own: Mixpanel takes the same alias again for
    /// nothing new.
    fn encode_alias(&self, rows: &mut List<'_>, previous_id: &str, user_id: &str) {
        let mut row = rows.object();
        row.string("event", CREATE_ALIAS);
        let mut properties = row.object("properties");
        properties.string("distinct_id", previous_id);
        properties.string("alias", user_id);
        properties.string("token", self.token.expose());
        properties.end();
        row.end();
    }

    /// A request without an alias.
    pub(super) fn probe_of_aliases(&self) -> Encoded {
        form(b"[]", Vec::new())
    }
}

fn form(json: &[u8], rejected: Vec<(usize, Rejection, String)>) -> Encoded {
    let mut body = Vec::with_capacity(FIELD.len() + 2 * json.len());
    body.extend_from_slice(FIELD.as_bytes());
    json.iter().for_each(|byte| percent_encode(&mut body, *byte));
    Encoded {
        path: ALIASES_PATH,
        body,
        form: true,
        body_bytes_max: BODY_BYTES_MAX,
        rejected,
        ..Encoded::default()
    }
}

/// As RFC 3986 says, section 2: all but what is never reserved.
fn percent_encode(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
        out.push(byte);
    } else {
        out.extend([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EventParts, Secret, event::tests_support::parts, http::Wire};

    fn alias<'a>(previous_id: &'a str, user_id: &'a str) -> Event {
        let kind = EventKind::Alias { previous_id };
        Event::pack(&EventParts { kind, user_id: Some(user_id), ..parts("x", "{}") })
    }

    fn wire(identity: IdentityMode) -> Mixpanel {
        Mixpanel::new(Secret::new("token"), identity)
    }

    #[test]
    fn an_alias_is_a_form_in_a_project_of_the_original_mode() {
        let wire = wire(IdentityMode::Original);
        let event = alias("u 0/é", "u1");
        assert_eq!(wire.endpoint(&event), Ok(ALIASES));
        let encoded = wire.encode(&[event], 0);
        assert!(encoded.form && encoded.rejected.is_empty());
        let want = "data=%5B%7B%22event%22%3A%22%24create_alias%22%2C%22properties%22%3A%7B%22distinct_id%22\
            %3A%22u%200%2F%C3%A9%22%2C%22alias%22%3A%22u1%22%2C%22token%22%3A%22token%22%7D%7D%5D";
        assert_eq!(String::from_utf8(encoded.body).unwrap(), want);
    }

    #[test]
    fn elsewhere_an_alias_is_not_for_mixpanel() {
        let wire = wire(IdentityMode::Simplified);
        assert_eq!(wire.endpoint(&alias("u0", "u1")), Err(NotFor::UnsupportedKind));
        assert!(matches!(
            wire.encode(&[alias("u0", "u1")], 0).rejected[..],
            [(0, Rejection::UnknownKind, _)]
        ));
    }

    #[test]
    fn an_alias_of_an_id_that_mixpanel_refuses_is_rejected_here() {
        for (previous_id, user_id) in [("null", "u1"), ("u0", "true")] {
            let encoded = wire(IdentityMode::Original).encode(&[alias(previous_id, user_id)], 0);
            assert!(matches!(encoded.rejected[..], [(0, Rejection::UnusableId, _)]), "{previous_id}");
        }
    }
}

//! The rules of an event. One that breaks some is told all of them at once.

use analytics_relay_providers::{
    EventId, EventKind, EventParts, MoreParts,
    event::{ID_BYTES_MAX, NAME_BYTES_MAX, OTHER_ID_BYTES_MAX, USER_AGENT_BYTES_MAX},
};

use super::{
    denied::{Violation, context_violation, properties_violation, shown},
    draft::{Draft, DraftKind, More, View},
    lenient::{Mends, cut, id_of_somebody, read_ip},
};
use crate::{
    reasons::{Mended, RefusalReason},
    time::rfc_3339,
};

/// 2000-01-01T00:00:00Z, the earliest time of an event.
const TIME_MS_MIN: i64 = 946_684_800_000;
/// How far ahead of our clock an event's time may be.
const AHEAD_MS_MAX: i64 = 24 * 3600 * 1000;
/// 2100-01-01T00:00:00Z, the latest time of an event while our own clock cannot be
/// believed.
const TIME_MS_MAX: i64 = 4_102_444_800_000;

/// Turns a draft into the parts of an event, and packs them, or names every rule that it
/// breaks. Whether the clock can be believed is asked only when a time would be refused by
/// it.
pub(super) fn check<Packed>(
    draft: &Draft<'_>,
    tenant: Option<&str>,
    now_ms: i64,
    is_trusted: impl Fn() -> bool,
    pack: impl FnOnce(EventParts<'_>) -> Packed,
) -> Result<(Packed, Mends), Vec<Violation>> {
    let (mut violations, mut mends) = (Vec::new(), Mends::default());
    // Most break none, which must cost no copy.
    let mut note = |broken: Option<Violation>| {
        if let Some(violation) = broken {
            violations.push(violation);
        }
    };

    let user_id = id_of_somebody(&draft.user_id, Mended::UserIdLeftOut, &mut mends);
    let anonymous_id = id_of_somebody(&draft.anonymous_id, Mended::AnonymousIdLeftOut, &mut mends);
    let kind = match &draft.kind {
        DraftKind::Track { event_name } => {
            note(check_event_name(event_name));
            EventKind::Track { name: event_name }
        }
        DraftKind::Identify => {
            note(user_id.is_none().then(|| nobody(&draft.user_id)));
            EventKind::Identify
        }
        DraftKind::Page(view) => {
            check_view(view).into_iter().for_each(&mut note);
            EventKind::Page { name: given(&view.name), category: given(&view.category) }
        }
        DraftKind::Screen(view) => {
            check_view(view).into_iter().for_each(&mut note);
            EventKind::Screen { name: given(&view.name), category: given(&view.category) }
        }
        DraftKind::Group { group_id } => {
            note(check_second_id(RefusalReason::GroupIdMissing, "group_id", group_id));
            EventKind::Group { group_id }
        }
        DraftKind::Alias { previous_id } => {
            note(user_id.is_none().then(|| nobody(&draft.user_id)));
            note(check_second_id(RefusalReason::PreviousIdMissing, "previous_id", previous_id));
            note((user_id == Some(&**previous_id)).then(|| of_itself(previous_id)));
            EventKind::Alias { previous_id }
        }
    };
    note(user_id.and_then(|id| too_long(RefusalReason::IdTooLong, "user_id", id, ID_BYTES_MAX)));
    note(anonymous_id.and_then(|id| too_long(RefusalReason::IdTooLong, "anonymous_id", id, ID_BYTES_MAX)));
    let id = if draft.event_id.is_empty() { Ok(EventId::assign()) } else { EventId::new(&*draft.event_id) };
    note(id.as_ref().err().map(|error| Violation {
        reason: RefusalReason::EventIdInvalid,
        field: "event_id".into(),
        got: shown(&draft.event_id),
        want: error.to_string().trim_start_matches("want ").to_owned(),
    }));
    note(draft.time_ms.and_then(|(field, time_ms)| check_time(field, time_ms, now_ms, is_trusted)));
    note(draft.properties.as_ref().err().map(properties_violation));
    let more = draft.more.as_deref().and_then(|more| check_more(more, &mut note));
    let more = match tenant {
        None => more,
        Some(_) => Some(Box::new(MoreParts { tenant, ..more.map_or(MoreParts::EMPTY, |more| *more) })),
    };

    match (id, &draft.properties) {
        (Ok(id), Ok(properties)) if violations.is_empty() => {
            mends.note_if(properties.had_a_name_twice(), Mended::PropertyTwice);
            let packed = pack(EventParts {
                id,
                kind,
                user_id,
                anonymous_id,
                time_ms: draft.time_ms.map_or(now_ms, |(_, time_ms)| time_ms),
                accepted_ms: now_ms,
                ip: read_ip(&draft.ip, &mut mends),
                user_agent: cut(&draft.user_agent, USER_AGENT_BYTES_MAX, &mut mends),
                properties: properties.borrowed(),
                more,
            });
            Ok((packed, mends))
        }
        _ => Err(violations),
    }
}

/// What most drafts do not have.
#[cold]
fn check_more<'a>(
    more: &'a More<'_>,
    note: &mut impl FnMut(Option<Violation>),
) -> Option<Box<MoreParts<'a>>> {
    let session_id = given(&more.session_id);
    note(session_id.and_then(|id| too_long(RefusalReason::IdTooLong, "session_id", id, OTHER_ID_BYTES_MAX)));
    let context = match &more.context {
        None => None,
        Some(Ok(context)) => Some(context.borrowed()),
        Some(Err(bad)) => {
            note(Some(context_violation(bad)));
            None
        }
    };
    let audience = more.audience.borrowed();
    MoreParts { session_id, audience, context, ..MoreParts::EMPTY }.if_any()
}

/// A text, if there is one.
fn given(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// What is too long of a page or a screen.
fn check_view(view: &View<'_>) -> [Option<Violation>; 2] {
    [
        too_long(RefusalReason::EventNameTooLong, "name", &view.name, NAME_BYTES_MAX),
        too_long(RefusalReason::CategoryTooLong, "category", &view.category, OTHER_ID_BYTES_MAX),
    ]
}

/// The rule that the second id of an event breaks.
fn check_second_id(missing: RefusalReason, field: &str, id: &str) -> Option<Violation> {
    if id_of_somebody(id, Mended::UserIdLeftOut, &mut Mends::default()).is_none() {
        return Some(Violation {
            reason: missing,
            field: field.to_owned(),
            got: shown(id),
            want: format!("1 to {OTHER_ID_BYTES_MAX} bytes that name one"),
        });
    }
    too_long(RefusalReason::IdTooLong, field, id, OTHER_ID_BYTES_MAX)
}

fn of_itself(id: &str) -> Violation {
    Violation {
        reason: RefusalReason::AliasOfItself,
        field: "previous_id".into(),
        got: shown(id),
        want: "another id than user_id".into(),
    }
}

/// The rule that an identify of nobody breaks.
fn nobody(user_id: &str) -> Violation {
    Violation {
        reason: if user_id.is_empty() {
            RefusalReason::UserIdMissing
        } else {
            RefusalReason::UserIdForbidden
        },
        field: "user_id".into(),
        got: shown(user_id),
        want: format!("1 to {ID_BYTES_MAX} bytes that name somebody"),
    }
}

fn check_event_name(name: &str) -> Option<Violation> {
    if name.is_empty() {
        return Some(Violation {
            reason: RefusalReason::EventNameEmpty,
            field: "event_name".into(),
            got: "\"\"".into(),
            want: format!("1 to {NAME_BYTES_MAX} bytes"),
        });
    }
    too_long(RefusalReason::EventNameTooLong, "event_name", name, NAME_BYTES_MAX)
}

#[inline]
fn too_long(reason: RefusalReason, field: &str, text: &str, bytes_max: usize) -> Option<Violation> {
    (text.len() > bytes_max).then(|| Violation {
        reason,
        field: field.to_owned(),
        got: format!("{} bytes", text.len()),
        want: format!("at most {bytes_max} bytes"),
    })
}

#[inline]
fn check_time(field: &str, time_ms: i64, now_ms: i64, is_trusted: impl Fn() -> bool) -> Option<Violation> {
    let latest_ms = now_ms.saturating_add(AHEAD_MS_MAX);
    if (TIME_MS_MIN..=latest_ms).contains(&time_ms) {
        return None;
    }
    // By a clock that is wrong nothing is judged; what no clock will show for long is
    // wrong by any.
    if (TIME_MS_MIN..=TIME_MS_MAX).contains(&time_ms) && !is_trusted() {
        return None;
    }
    Some(Violation {
        reason: RefusalReason::TimeOutOfRange,
        field: field.to_owned(),
        got: rfc_3339(time_ms),
        want: format!("{} to {} (24 hours ahead of the relay)", rfc_3339(TIME_MS_MIN), rfc_3339(latest_ms)),
    })
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::{Event, Properties, event::JsonObject, properties::Limits};

    use super::{
        super::{draft::BadProperties, tests::draft},
        *,
    };

    const NOW_MS: i64 = 1_767_225_600_000;

    fn checked(draft: &Draft<'_>, is_trusted: bool) -> Result<(Event, Mends), Vec<Violation>> {
        check(draft, None, NOW_MS, || is_trusted, |parts| Event::pack(&parts))
    }

    fn violations(change: impl FnOnce(&mut Draft<'static>)) -> Vec<(RefusalReason, String)> {
        let mut draft = draft();
        change(&mut draft);
        match checked(&draft, true) {
            Ok(_) => Vec::new(),
            Err(violations) => violations.into_iter().map(|v| (v.reason, v.field)).collect(),
        }
    }

    #[test]
    fn each_limit_holds_at_n_and_breaks_at_n_plus_one() {
        type Change = fn(&mut Draft<'static>, i64);
        let rows: [(Change, i64, i64, RefusalReason, &str); 6] = [
            (
                |d, n| d.kind = DraftKind::Track { event_name: "x".repeat(n as usize).into() },
                255,
                256,
                RefusalReason::EventNameTooLong,
                "event_name",
            ),
            (|d, n| d.user_id = "x".repeat(n as usize).into(), 255, 256, RefusalReason::IdTooLong, "user_id"),
            (
                |d, n| d.anonymous_id = "x".repeat(n as usize).into(),
                255,
                256,
                RefusalReason::IdTooLong,
                "anonymous_id",
            ),
            (
                |d, n| d.event_id = "x".repeat(n as usize).into(),
                100,
                101,
                RefusalReason::EventIdInvalid,
                "event_id",
            ),
            (
                |d, n| d.time_ms = Some(("timestamp", n)),
                TIME_MS_MIN,
                TIME_MS_MIN - 1,
                RefusalReason::TimeOutOfRange,
                "timestamp",
            ),
            (
                |d, n| d.time_ms = Some(("timestamp_ms", n)),
                NOW_MS + AHEAD_MS_MAX,
                NOW_MS + AHEAD_MS_MAX + 1,
                RefusalReason::TimeOutOfRange,
                "timestamp_ms",
            ),
        ];
        for (change, good, bad, reason, field) in rows {
            assert_eq!(violations(|draft| change(draft, good)), [], "{field} {good}");
            assert_eq!(violations(|draft| change(draft, bad)), [(reason, field.to_owned())], "{field} {bad}");
        }
    }

    #[test]
    fn bytes_are_counted_and_not_characters() {
        let name = "é".repeat(128);
        assert_eq!(
            violations(|draft| draft.kind = DraftKind::Track { event_name: name.into() }),
            [(RefusalReason::EventNameTooLong, "event_name".to_owned())]
        );
    }

    #[test]
    fn every_kind_has_what_makes_it_one() {
        type Change = fn(&mut Draft<'static>);
        fn view(name: &str, category: &str) -> Box<View<'static>> {
            Box::new(View { name: name.to_owned().into(), category: category.to_owned().into() })
        }
        let rows: [(Change, &[(RefusalReason, &str)]); 9] = [
            (|d| d.kind = DraftKind::Page(view("", "")), &[]),
            (|d| d.kind = DraftKind::Screen(view("Home", "App")), &[]),
            (
                |d| d.kind = DraftKind::Page(view(&"x".repeat(256), &"x".repeat(256))),
                &[(RefusalReason::EventNameTooLong, "name"), (RefusalReason::CategoryTooLong, "category")],
            ),
            (|d| d.kind = DraftKind::Group { group_id: "acme".into() }, &[]),
            (
                |d| d.kind = DraftKind::Group { group_id: " null ".into() },
                &[(RefusalReason::GroupIdMissing, "group_id")],
            ),
            (
                |d| d.kind = DraftKind::Group { group_id: "x".repeat(256).into() },
                &[(RefusalReason::IdTooLong, "group_id")],
            ),
            (|d| d.kind = DraftKind::Alias { previous_id: "user-0".into() }, &[]),
            (
                |d| d.kind = DraftKind::Alias { previous_id: "user-1".into() },
                &[(RefusalReason::AliasOfItself, "previous_id")],
            ),
            (
                |d| {
                    d.kind = DraftKind::Alias { previous_id: "".into() };
                    d.user_id = "".into();
                },
                &[
                    (RefusalReason::UserIdMissing, "user_id"),
                    (RefusalReason::PreviousIdMissing, "previous_id"),
                ],
            ),
        ];
        for (change, want) in rows {
            let want: Vec<_> = want.iter().map(|(reason, field)| (*reason, (*field).to_owned())).collect();
            assert_eq!(violations(change), want);
        }
    }

    #[test]
    fn a_context_is_kept_as_it_was_sent_or_refused_by_its_place() {
        let json = r#"{"page":{"url":"/"},"n":9007199254740993}"#;
        let (event, _) = taken(|draft| {
            draft.more = Some(More::of_context(Ok(JsonObject::parse(json, &Limits::DEFAULT).unwrap())));
        });
        assert_eq!(event.context().unwrap().json(), json);
        let found = violations(|draft| {
            let error = JsonObject::parse(r#"{"a":{"":1}}"#, &Limits::DEFAULT).unwrap_err();
            draft.more = Some(More::of_context(Err(BadProperties::Faulty { field: "context.json", error })));
        });
        assert_eq!(found, [(RefusalReason::ContextInvalid, "context.json".to_owned())]);
    }

    #[test]
    fn every_broken_rule_is_named_at_once() {
        let found = violations(|draft| {
            draft.kind = DraftKind::Identify;
            draft.user_id = "".into();
            draft.event_id = "tab\t".into();
            draft.time_ms = Some(("timestamp_ms", i64::MIN));
            draft.properties = Properties::parse(r#"{"":1}"#, &Limits::DEFAULT)
                .map_err(|error| BadProperties::Faulty { field: "properties", error });
        });
        let reasons: Vec<_> = found.into_iter().map(|(reason, _)| reason.name()).collect();
        assert_eq!(
            reasons,
            ["USER_ID_MISSING", "EVENT_ID_INVALID", "TIME_OUT_OF_RANGE", "PROPERTY_KEY_EMPTY"]
        );
    }

    /// What an event becomes, and what was mended of it.
    fn taken(change: impl FnOnce(&mut Draft<'static>)) -> (Event, Vec<Mended>) {
        let mut draft = draft();
        change(&mut draft);
        let (event, mends) = checked(&draft, true).unwrap();
        (event, mends.each().collect())
    }

    #[test]
    fn context_never_costs_the_event() {
        let (event, mended) = taken(|draft| draft.ip = "1.2.3.4, 10.0.0.1".into());
        assert_eq!((event.ip(), mended), (Some("1.2.3.4"), vec![Mended::IpFound]));
        let (event, mended) = taken(|draft| draft.ip = "unknown".into());
        assert_eq!((event.ip(), mended), (None, vec![Mended::IpLeftOut]));
        // A cut in the middle of a character would be no text.
        let (event, mended) = taken(|draft| draft.user_agent = format!("x{}", "é".repeat(512)).into());
        assert_eq!(event.user_agent().unwrap(), format!("x{}", "é".repeat(511)));
        assert_eq!(mended, [Mended::UserAgentCut]);
        let (event, mended) = taken(|draft| draft.user_agent = "x".repeat(1024).into());
        assert_eq!((event.user_agent().unwrap().len(), mended), (1024, Vec::new()));
    }

    #[test]
    fn ids_that_mean_nobody_are_not_given() {
        let (event, mended) = taken(|draft| {
            draft.user_id = " [object Object]\n".into();
            draft.anonymous_id = "\"NULL\"".into();
        });
        assert_eq!((event.user_id(), event.anonymous_id()), (None, None));
        assert_eq!(mended, [Mended::UserIdLeftOut, Mended::AnonymousIdLeftOut]);
        let of_nobody = violations(|draft| {
            draft.kind = DraftKind::Identify;
            draft.user_id = "None".into();
        });
        assert_eq!(of_nobody, [(RefusalReason::UserIdForbidden, "user_id".to_owned())]);
    }

    #[test]
    fn by_a_clock_that_cannot_be_believed_no_time_is_refused() {
        let at = |time_ms, trusted| {
            let draft = Draft { time_ms: Some(("timestamp_ms", time_ms)), ..draft() };
            checked(&draft, trusted).map(|(event, _)| event.time_ms()).ok()
        };
        let ahead = NOW_MS + 3 * AHEAD_MS_MAX;
        assert_eq!((at(ahead, true), at(ahead, false)), (None, Some(ahead)));
        for never in [TIME_MS_MIN - 1, TIME_MS_MAX + 1, i64::MAX] {
            assert_eq!(at(never, false), None, "{never}");
        }
    }
}

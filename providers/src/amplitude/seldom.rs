//! Events that most callers do not send: pages, screens, and whatever has a context.

use std::borrow::Cow;

use reqwest::Url;
use uuid::Uuid;

use super::{Amplitude, IDENTIFY, Ids, encode_operations, encode_traits, event_type, write_head};
use crate::{
    Event, EventKind,
    context::{Added, Context, Is, Row},
    event::Kind,
    json::Object,
    view::{SeenAs, see},
};

/// The events that Amplitude's own SDKs make of a page and a screen.
const SDK_PAGE: &str = "[Amplitude] Page Viewed";
const SDK_SCREEN: &str = "[Amplitude] Screen Viewed";
/// A session is known by its start; this says that there is none.
const NO_SESSION: i64 = -1;
/// No session began before.
const YEAR_2000_MS: i64 = 946_684_800_000;

/// An event's own fields. A device's ids are not among them: they would make another
/// device of it.
const ROWS: [Row; 15] = [
    Row("locale", Is::Text, "language"),
    Row("os.name", Is::Text, "os_name"),
    Row("os.version", Is::Text, "os_version"),
    Row("device.brand", Is::Text, "device_brand"),
    Row("device.manufacturer", Is::Text, "device_manufacturer"),
    Row("device.model", Is::Text, "device_model"),
    Row("device.type", Is::Text, "platform"),
    Row("app.version", Is::Text, "app_version"),
    Row("network.carrier", Is::Text, "carrier"),
    Row("location.country", Is::Text, "country"),
    Row("location.region", Is::Text, "region"),
    Row("location.city", Is::Text, "city"),
    Row("location.dma", Is::Text, "dma"),
    Row("location.latitude", Is::Number, "location_lat"),
    Row("location.longitude", Is::Number, "location_lng"),
];

impl Amplitude {
    /// Writes a track, a page, a screen or an identify.
    #[cold]
    pub(super) fn encode_seldom(&self, mut object: Object<'_>, event: &Event, ids: &Ids<'_>) {
        let given = event.properties();
        let context = Context::of(event);
        let mut added = Added::beside(given.json());
        let name = match event.kind() {
            EventKind::Track { name } => event_type(name),
            // Of an identify nothing is seen.
            kind => see(&self.view, kind, &context, &mut added)
                .map_or(IDENTIFY.into(), |seen| name_of(seen, &mut added)),
        };
        object.string("event_type", &name);
        let group = self.view.group_type().zip(context.group_id());
        self.write_fields(&mut object, event, ids, &context, group);
        if !event.is_identify() {
            // Not of the user: a late event must not change what is known of them.
            added.campaign(&context);
            let mut properties = object.object("event_properties");
            added.write(&mut properties);
            properties.splice(given.json());
            properties.end();
        } else {
            let operations = object.object("user_properties");
            match group.filter(|(group_type, _)| !added.has(group_type)) {
                Some(_) => encode_operations(operations, &given, group),
                None => encode_traits(operations, &given),
            }
        }
        object.end();
    }

    fn write_fields(
        &self,
        object: &mut Object<'_>,
        event: &Event,
        ids: &Ids<'_>,
        context: &Context<'_>,
        group: Option<(&str, &str)>,
    ) {
        let user_agent = event.user_agent().map(str::to_owned).or_else(|| context.text("userAgent"));
        write_head(object, event, ids, event.id().as_str(), user_agent.as_deref());
        let mut fields = Added::beside("{}");
        fields.rows(context, &ROWS);
        fields.write(object);
        if let Some(session_id) = event.session_id() {
            object.integer("session_id", start_of(session_id).unwrap_or(NO_SESSION));
        }
        if let Some((group_type, id)) = group {
            let mut groups = object.object("groups");
            groups.named_raw(group_type, id);
            groups.end();
        }
    }
}

/// When a session began, in Unix milliseconds, if its id says so: a number, or the time of
/// a UUID of the seventh version, as the relay's own ids and PostHog's are.
fn start_of(session_id: &str) -> Option<i64> {
    let of_uuid = |uuid: Uuid| {
        let (seconds, nanos) = uuid.get_timestamp().filter(|_| uuid.get_version_num() == 7)?.to_unix();
        i64::try_from(seconds).ok()?.checked_mul(1000)?.checked_add(i64::from(nanos / 1_000_000))
    };
    let start_ms = session_id.parse().ok().or_else(|| Uuid::parse_str(session_id).ok().and_then(of_uuid));
    start_ms.filter(|start_ms| *start_ms >= YEAR_2000_MS)
}

fn name_of(seen: SeenAs, added: &mut Added<'_>) -> Cow<'static, str> {
    match seen {
        SeenAs::Named(name) => Cow::Owned(event_type(&name).into_owned()),
        SeenAs::Vendors(Kind::Screen) => {
            let name = added.text_of("name");
            added.optional("[Amplitude] Screen Name", name.as_deref());
            SDK_SCREEN.into()
        }
        SeenAs::Vendors(_) => {
            add_sdk_page(added);
            SDK_PAGE.into()
        }
    }
}

/// The properties of the SDK's event, but for what only the page itself can count.
fn add_sdk_page(added: &mut Added<'_>) {
    let [title, path, address] = ["title", "path", "url"].map(|name| added.text_of(name));
    let url = address.as_deref().and_then(|address| Url::parse(address).ok());
    added.optional("[Amplitude] Page Domain", url.as_ref().and_then(Url::host_str));
    added.optional("[Amplitude] Page Location", address.as_deref());
    added.optional("[Amplitude] Page Path", url.as_ref().map(Url::path).or(path.as_deref()));
    added.optional("[Amplitude] Page Title", title.as_deref());
    let without_query = address.as_deref().and_then(|address| address.split(['?', '#']).next());
    added.optional("[Amplitude] Page URL", without_query);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        EventParts, MoreParts, Secret,
        event::{JsonObject, tests_support::parts},
        http::Wire,
        properties::Limits,
        view::{GroupType, View, ViewName},
    };

    fn event(kind: EventKind<'_>, properties: &str, session_id: Option<&str>, context: &Value) -> Event {
        let context = context.to_string();
        let context = JsonObject::parse(&context, &Limits::DEFAULT).unwrap();
        let more = MoreParts { context: Some(context), session_id, ..MoreParts::default() };
        Event::pack(&EventParts { kind, more: more.if_any(), ..parts("x", properties) })
    }

    fn encoded(view: View, event: Event) -> Value {
        let encoded = Amplitude::new(Secret::new("key"), 1).with_view(view).encode(&[event], 0);
        assert!(encoded.rejected.is_empty());
        serde_json::from_slice::<Value>(&encoded.body).unwrap()["events"][0].clone()
    }

    fn with_groups() -> View {
        View { group_type: Some(GroupType::parse("company").unwrap()), ..View::default() }
    }

    #[test]
    fn a_context_becomes_amplitudes_own_fields() {
        let context = json!({
            "locale": "de-DE", "os": {"name": "iOS", "version": "26"}, "userAgent": "B/1",
            "device": {"id": "never", "advertisingId": "never", "name": "n", "manufacturer": "m", "brand": "b",
                "model": "mo", "type": "ios"},
            "app": {"name": "Shop", "version": "2.1"}, "network": {"carrier": "c", "wifi": true},
            "location": {"country": "Italy", "region": "P", "city": "Turin", "latitude": 45.1, "longitude": 7},
            "library": {"name": "web"}, "campaign": {"name": "spring", "source": "mail"}, "groupId": "g1"});
        let track = EventKind::Track { name: "x" };
        let found =
            encoded(with_groups(), event(track, r#"{"utm_source":"own"}"#, Some("1767225600000"), &context));
        assert_eq!(
            found,
            json!({"event_type": "x", "user_id": "user-1", "time": 1_767_225_600_000_i64, "insert_id": "id-1",
                "user_agent": "B/1", "library": concat!("analytics-relay/", env!("CARGO_PKG_VERSION")),
                "language": "de-DE", "os_name": "iOS", "os_version": "26", "device_brand": "b",
                "device_manufacturer": "m", "device_model": "mo", "platform": "ios", "app_version": "2.1",
                "carrier": "c", "country": "Italy", "region": "P", "city": "Turin", "location_lat": 45.1,
                "location_lng": 7, "session_id": 1_767_225_600_000_i64, "groups": {"company": "g1"},
                "event_properties": {"utm_source": "own", "utm_campaign": "spring"}})
        );
        let of_uuid = "019b76da-a800-7000-8000-000000000000";
        let found = encoded(View::default(), event(track, "{}", Some(of_uuid), &json!({})));
        assert_eq!(found["session_id"], 1_767_225_600_000_i64);
        let of_another_version = "019b76da-a800-4000-8000-000000000000";
        for session_id in ["s-1", "1", "17672256000000000000", of_another_version] {
            let found = encoded(View::default(), event(track, "{}", Some(session_id), &json!({})));
            assert_eq!(found["session_id"], -1, "{session_id}");
        }
    }

    #[test]
    fn an_identify_with_a_group_makes_its_user_a_member() {
        let identify =
            |traits, context| encoded(with_groups(), event(EventKind::Identify, traits, None, context));
        let of_group = json!({"groupId": "g1", "campaign": {"name": "never"}});
        for (traits, want) in [
            ("{}", json!({"$set": {"company": "g1"}})),
            (r#"{"plan":"pro"}"#, json!({"$set": {"plan": "pro", "company": "g1"}})),
            (r#"{"old":null}"#, json!({"$set": {"company": "g1"}, "$unset": {"old": "-"}})),
            (r#"{"company":"own"}"#, json!({"$set": {"company": "own"}})),
            (r#"{"company":null}"#, json!({"$unset": {"company": "-"}})),
        ] {
            let found = identify(traits, &of_group);
            assert_eq!((&found["groups"], &found["user_properties"]), (&json!({"company": "g1"}), &want));
            assert_eq!(found.get("event_properties"), None);
        }
        let found = identify(r#"{"plan":"pro"}"#, &json!({"locale": "de"}));
        assert_eq!((found.get("groups"), &found["language"]), (None, &json!("de")));
        assert_eq!(found["user_properties"], json!({"$set": {"plan": "pro"}}));
    }

    #[test]
    fn a_page_and_a_screen_may_be_the_events_of_amplitudes_own_sdks() {
        let view = || View { page_name: ViewName::Vendor, screen_name: ViewName::Vendor, group_type: None };
        let page = EventKind::Page { name: Some("Home"), category: None };
        let context = json!({"page": {"url": "https://x.io/p?q=1#f", "title": "T"}});
        let found = encoded(view(), event(page, "{}", None, &context));
        assert_eq!(found["event_type"], "[Amplitude] Page Viewed");
        assert_eq!(
            found["event_properties"],
            json!({"name": "Home", "url": "https://x.io/p?q=1#f", "title": "T",
                "[Amplitude] Page Domain": "x.io", "[Amplitude] Page Location": "https://x.io/p?q=1#f",
                "[Amplitude] Page Path": "/p", "[Amplitude] Page Title": "T",
                "[Amplitude] Page URL": "https://x.io/p"})
        );
        let screen = EventKind::Screen { name: Some("Home"), category: None };
        let found = encoded(view(), event(screen, "{}", None, &json!({})));
        assert_eq!(found["event_type"], "[Amplitude] Screen Viewed");
        assert_eq!(found["event_properties"], json!({"name": "Home", "[Amplitude] Screen Name": "Home"}));
    }

    #[test]
    fn a_name_of_a_template_means_nothing_of_its_own() {
        let view = View { page_name: ViewName::parse("{name}").unwrap(), ..View::default() };
        let page = EventKind::Page { name: Some("[Amplitude] Page Viewed"), category: None };
        let found = encoded(view, event(page, "{}", None, &json!({})));
        assert_eq!(found["event_type"], "event_[Amplitude] Page Viewed");
    }
}

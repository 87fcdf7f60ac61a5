//! Events that most callers do not send, as rows of `/import`: pages, screens, and
//! whatever has a context.

use std::borrow::Cow;

use reqwest::Url;

use super::{Mixpanel, NO_IP, event_name};
use crate::{
    Event, EventKind,
    context::{Added, Context, Is, Row, host_of},
    event::Kind,
    json::List,
    view::{SeenAs, see},
};

/// The event that Mixpanel's own JavaScript SDK makes of a page.
const SDK_PAGE: &str = "$mp_web_page_view";

/// What is not here is not sent: an id of the device's would join people. (`$device_id`)
const ROWS: [Row; 22] = [
    Row("locale", Is::Text, "$locale"),
    Row("os.name", Is::Text, "$os"),
    Row("os.version", Is::Text, "$os_version"),
    Row("browser.name", Is::Text, "$browser"),
    Row("browser.version", Is::Text, "$browser_version"),
    Row("device.name", Is::Text, "$device"),
    Row("device.manufacturer", Is::Text, "$manufacturer"),
    Row("device.brand", Is::Text, "$brand"),
    Row("device.model", Is::Text, "$model"),
    Row("device.type", Is::Text, "$device_type"),
    Row("app.name", Is::Text, "$app_name"),
    Row("app.namespace", Is::Text, "$app_namespace"),
    Row("app.version", Is::Text, "$app_version_string"),
    Row("app.build", Is::Text, "$app_build_number"),
    Row("screen.width", Is::Number, "$screen_width"),
    Row("screen.height", Is::Number, "$screen_height"),
    Row("screen.density", Is::Number, "$screen_dpi"),
    Row("network.carrier", Is::Text, "$carrier"),
    Row("network.wifi", Is::Flag, "$wifi"),
    Row("network.bluetooth", Is::Flag, "$bluetooth_enabled"),
    Row("library.name", Is::Text, "mp_lib"),
    Row("library.version", Is::Text, "$lib_version"),
];
const PLACE: [Row; 2] =
    [Row("location.region", Is::Text, "$region"), Row("location.city", Is::Text, "$city")];

impl Mixpanel {
    /// Writes the row of an event, if there is a form for it.
    #[cold]
    pub(super) fn encode_seldom(&self, rows: &mut List<'_>, event: &Event) -> bool {
        let given = event.properties();
        let context = Context::of(event);
        let mut added = Added::beside(given.json());
        let name = match event.kind() {
            EventKind::Track { name } => {
                add_addresses(&mut added, context.text("page.url"), context.text("page.referrer"));
                event_name(name)
            }
            kind => {
                let Some(seen) = see(&self.view, kind, &context, &mut added) else { return false };
                let [url, referrer] = ["url", "referrer"].map(|name| added.text_of(name));
                add_addresses(&mut added, url, referrer);
                name_of(seen, &mut added)
            }
        };
        added.rows(&context, &ROWS);
        added.optional("$device_type", context.device_class().as_deref());
        added.campaign(&context);
        if let Some(session_id) = event.session_id() {
            added.text("$session_id", session_id);
        }
        if let (Some(group_type), Some(id)) = (self.view.group_type(), context.group_id()) {
            added.json(group_type, format!("[{id}]"));
        }
        // Mixpanel would put what it finds by the address in the place of this.
        let ip = if add_place(&mut added, &context) { None } else { event.ip() };
        self.encode_row(rows.object(), event, &name, ip.unwrap_or(NO_IP), &given, Some(&added));
        true
    }
}

fn name_of(seen: SeenAs, added: &mut Added<'_>) -> Cow<'static, str> {
    match seen {
        SeenAs::Named(name) => Cow::Owned(event_name(&name).into_owned()),
        SeenAs::Vendors(Kind::Page) => {
            add_sdk_page(added);
            SDK_PAGE.into()
        }
        // The SDK has none for a screen.
        SeenAs::Vendors(kind) => SeenAs::default_of(kind).into(),
    }
}

/// Where it happened, under the names that Mixpanel's own reports look for.
fn add_addresses(added: &mut Added<'_>, url: Option<String>, referrer: Option<String>) {
    added.optional("$current_url", url.as_deref());
    let domain = referrer.as_deref().and_then(host_of);
    added.optional("$referrer", referrer.as_deref());
    added.optional("$referring_domain", domain.as_deref());
}

/// The properties of the SDK's event, as a browser's `location` has them.
fn add_sdk_page(added: &mut Added<'_>) {
    let [title, path, search] = ["title", "path", "search"].map(|name| added.text_of(name));
    added.optional("current_page_title", title.as_deref());
    let url = added.text_of("url").and_then(|url| Url::parse(&url).ok());
    let Some(url) = url else {
        added.optional("current_url_path", path.as_deref());
        return added.optional("current_url_search", search.as_deref());
    };
    added.optional("current_domain", url.host_str());
    added.optional("current_url_path", Some(url.path()));
    added.text("current_url_protocol", &format!("{}:", url.scheme()));
    let query = url.query().filter(|query| !query.is_empty());
    added.optional("current_url_search", query.map(|query| format!("?{query}")).as_deref());
}

/// Adds where the user was; false if the context does not say.
fn add_place<'a>(added: &mut Added<'a>, context: &Context<'a>) -> bool {
    let before = added.names().count();
    let is_code =
        |country: &str| country.len() == 2 && country.bytes().all(|byte| byte.is_ascii_alphabetic());
    if let Some(country) = context.text("location.country").filter(|country| is_code(country)) {
        added.text("mp_country_code", &country);
    }
    added.rows(context, &PLACE);
    added.names().count() > before
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        EventParts, MoreParts, Secret,
        event::{JsonObject, tests_support::parts},
        http::Wire,
        mixpanel::IdentityMode,
        properties::Limits,
        view::{GroupType, View, ViewName},
    };

    fn event(kind: EventKind<'_>, properties: &str, context: &Value) -> Event {
        let context = context.to_string();
        let context = JsonObject::parse(&context, &Limits::DEFAULT).unwrap();
        let more = MoreParts { context: Some(context), session_id: Some("s-1"), ..MoreParts::default() };
        Event::pack(&EventParts { kind, more: more.if_any(), ..parts("x", properties) })
    }

    fn row(view: View, event: Event) -> Value {
        let wire = Mixpanel::new(Secret::new("token"), IdentityMode::Simplified).with_view(view);
        let encoded = wire.encode(&[event], 0);
        assert!(encoded.rejected.is_empty());
        serde_json::from_slice::<Value>(&encoded.body).unwrap()[0].clone()
    }

    #[test]
    fn a_context_has_mixpanels_own_names() {
        let context = json!({
            "locale": "de-DE", "os": {"name": "iOS", "version": "26"}, "browser": {"name": "B", "version": "1"},
            "device": {"id": "never", "advertisingId": "never", "name": "n", "manufacturer": "m", "brand": "b",
                "model": "mo", "type": "ios"},
            "app": {"name": "Shop", "namespace": "a.b", "version": "2.1", "build": "7"},
            "screen": {"width": 390, "height": 844, "density": 3}, "ip": "10.0.0.1",
            "network": {"carrier": "c", "wifi": true, "bluetooth": false},
            "location": {"country": "IT", "region": "Piemonte", "city": "Turin", "latitude": 45.1},
            "library": {"name": "web", "version": "4"}, "campaign": {"name": "spring", "source": "mail"},
            "page": {"url": "https://x.io/p", "referrer": "https://g.co/s", "title": "T"},
            "traits": {"never": 1}, "groupId": "g1"});
        let group_type = Some(GroupType::parse("company").unwrap());
        let event = event(EventKind::Track { name: "x" }, r#"{"$os":"mine"}"#, &context);
        let row = row(View { group_type, ..View::default() }, event);
        assert_eq!(
            row["properties"],
            json!({"time": 1_767_225_600_000_i64, "distinct_id": "user-1", "$user_id": "user-1",
                "$insert_id": "id-1", "ip": "0", "$os": "mine",
                "$locale": "de-DE", "$os_version": "26", "$browser": "B", "$browser_version": "1",
                "$device": "n", "$manufacturer": "m", "$brand": "b", "$model": "mo", "$device_type": "ios",
                "$app_name": "Shop", "$app_namespace": "a.b", "$app_version_string": "2.1",
                "$app_build_number": "7", "$screen_width": 390, "$screen_height": 844, "$screen_dpi": 3,
                "$carrier": "c", "$wifi": true, "$bluetooth_enabled": false, "mp_country_code": "IT",
                "$region": "Piemonte", "$city": "Turin", "mp_lib": "web", "$lib_version": "4",
                "$session_id": "s-1", "utm_campaign": "spring", "utm_source": "mail",
                "$current_url": "https://x.io/p", "$referrer": "https://g.co/s", "$referring_domain": "g.co",
                "company": ["g1"]})
        );
    }

    #[test]
    fn an_address_counts_unless_the_caller_says_where_it_was() {
        for (location, want) in [
            (json!({"country": "Italy"}), "10.0.0.9"),
            (json!({}), "10.0.0.9"),
            (json!({"city": "Turin"}), "0"),
        ] {
            let event = event(EventKind::Track { name: "x" }, "{}", &json!({"location": location}));
            let event = Event::pack(&EventParts { ip: Some([10, 0, 0, 9].into()), ..event.parts() });
            let row = row(View::default(), event);
            assert_eq!(row["properties"]["ip"], want, "{location}");
            assert_eq!(row["properties"].get("mp_country_code"), None);
        }
    }

    #[test]
    fn a_page_fills_its_gaps_from_the_context() {
        let page = EventKind::Page { name: Some("B"), category: None };
        let context = json!({"page": {"url": "https://x.io/q", "path": "/q", "title": "T", "search": "?a",
            "referrer": "https://g.co/s"}});
        let row = row(View::default(), event(page, r#"{"name":"A","url":"https://x.io/p"}"#, &context));
        assert_eq!(row["event"], "Loaded a Page");
        for (name, want) in [
            ("name", "A"),
            ("url", "https://x.io/p"),
            ("path", "/q"),
            ("title", "T"),
            ("search", "?a"),
            ("referrer", "https://g.co/s"),
            ("$current_url", "https://x.io/p"),
            ("$referring_domain", "g.co"),
        ] {
            assert_eq!(row["properties"][name], want, "{name}");
        }
    }

    #[test]
    fn a_page_may_be_the_event_of_mixpanels_own_sdk() {
        let view = || View { page_name: ViewName::Vendor, screen_name: ViewName::Vendor, group_type: None };
        let page = EventKind::Page { name: None, category: None };
        let given = r#"{"url":"https://x.io:81/p?q=1#f","title":"T"}"#;
        let found = row(view(), event(page, given, &json!({})));
        assert_eq!(found["event"], "$mp_web_page_view");
        for (name, want) in [
            ("current_page_title", "T"),
            ("current_domain", "x.io"),
            ("current_url_path", "/p"),
            ("current_url_protocol", "https:"),
            ("current_url_search", "?q=1"),
        ] {
            assert_eq!(found["properties"][name], want, "{name}");
        }
        let found = row(view(), event(page, r#"{"url":"/p?q=1","path":"/p"}"#, &json!({})));
        assert_eq!(found["properties"]["current_url_path"], "/p");
        let screen = EventKind::Screen { name: Some("Home"), category: None };
        assert_eq!(row(view(), event(screen, "{}", &json!({})))["event"], "Loaded a Screen");
    }

    #[test]
    fn a_name_of_a_template_does_nothing_else_than_record_an_event() {
        let view = View { page_name: ViewName::parse("{name}").unwrap(), ..View::default() };
        let page = EventKind::Page { name: Some("$merge"), category: None };
        assert_eq!(row(view, event(page, "{}", &json!({})))["event"], "event_$merge");
    }

    #[test]
    fn what_is_added_counts_among_mixpanels_number() {
        let fields: Vec<_> = (0..240).map(|i| format!(r#""k{i}":{i}"#)).collect();
        let context = json!({"os": {"name": "a", "version": "b"}, "locale": "c", "app": {"name": "d",
            "version": "e", "build": "f"}, "campaign": {"name": "g", "source": "h", "term": "i"}});
        let event = event(EventKind::Track { name: "x" }, &format!("{{{}}}", fields.join(",")), &context);
        let row = row(View::default(), event);
        let properties = row["properties"].as_object().unwrap();
        assert!(properties.len() <= 254, "{}", properties.len());
        let surplus = properties["more_properties"].as_object().unwrap();
        let top = properties.keys().filter(|key| key.starts_with('k')).count();
        assert_eq!((top + surplus.len(), &properties["$os"]), (240, &json!("a")));
    }
}

//! What becomes of events, with all steps and with none.

use analytics_relay_providers::{
    EventId, EventKind, NotFor, Properties, event::JsonObject, properties::Limits,
};
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use super::*;
use crate::{
    admission::{
        Admission,
        context::CallContext,
        denied::Denied,
        draft::{Draft, More},
        tests::draft,
        validate::check,
    },
    enrich::{
        agent::Hints,
        enricher::Parts,
        geo::{
            Geo, GeoSettings,
            tests::{flat, nested},
        },
        page::{PageSettings, Pages, UrlQuery},
        senders::{AgentSettings, Agents},
        session::{SessionLimits, SessionSecret, Sessions},
        settings::{BotPolicy, Declined, EnrichSettings},
        visitor::Visitors,
    },
    queue::{Durability, Queue, QueueLimits, memory},
    reasons::Step,
    telemetry::{AdmissionMetrics, EnrichMetrics},
    time::Clock,
    watched::Reload,
};

const NOW_MS: i64 = 1_767_225_600_000;
const FIREFOX: &str = "Mozilla/5.0 (X11; Linux x86_64; rv:131.0) Gecko/20100101 Firefox/131.0";
const CONTEXT: &str = r#"{"page":{"url":"https://shop.example/cart?utm_source=news","referrer":"https://www.google.com/"},"library":{"name":"analytics.js"}}"#;

fn settings() -> EnrichSettings {
    EnrichSettings {
        steps: Step::ALL.into(),
        bots: BotPolicy::Marked,
        declined: Declined::Anonymous,
        sessions: SessionLimits { timeout_ms: 1_800_000, sessions_max: 1000 },
        session_secret: None,
        time_zone: TimeZone::UTC,
    }
}

fn enricher(dir: &std::path::Path) -> Enricher {
    enricher_of(dir, &settings())
}

/// With a database of addresses, and files that may be replaced.
fn enricher_of(dir: &std::path::Path, settings: &EnrichSettings) -> Enricher {
    let database = dir.join("geo.mmdb");
    std::fs::write(&database, nested()).unwrap();
    let list = dir.join("bots");
    std::fs::write(&list, "").unwrap();
    let pages = PageSettings {
        url_query: UrlQuery::Allowed,
        click_id_values: false,
        site_domains: Vec::new(),
        sources_file: None,
    };
    let agents = AgentSettings { regexes: None, with_devices: false, bot_list: Some(list) };
    let parts = Parts {
        agents: Agents::new(&agents).unwrap(),
        geo: Arc::new(Geo::new(&GeoSettings { database: Some(database) }).unwrap()),
        pages: Pages::new(pages).unwrap(),
        visitors: Some(Arc::new(Visitors::open(dir, TimeZone::UTC, NOW_MS))),
        sessions: Sessions::new(SessionSecret::of(b"secret"), settings.sessions),
    };
    Enricher::new(settings, parts, EnrichMetrics::default())
}

fn parts(kind: EventKind<'static>) -> EventParts<'static> {
    let more = MoreParts { context: Some(JsonObject::of_relay(CONTEXT)), ..MoreParts::default() };
    EventParts {
        id: EventId::new("id-1").unwrap(),
        kind,
        user_id: None,
        anonymous_id: Some("device-1"),
        time_ms: NOW_MS,
        accepted_ms: NOW_MS,
        ip: Some("81.2.69.142".parse().unwrap()),
        user_agent: Some(FIREFOX),
        properties: Properties::parse(r#"{"total":1.50}"#, &Limits::DEFAULT).unwrap(),
        more: more.if_any(),
    }
}

fn of_device() -> Edge<'static> {
    Edge { ip_is_connections: true, is_device: true, hints: Some(&Hints::NONE), ..Edge::default() }
}

fn page() -> EventKind<'static> {
    EventKind::Page { name: Some("Cart"), category: None }
}

fn packed(enricher: &Arc<Enricher>, event: EventParts<'_>, edge: &Edge<'_>) -> Event {
    let shaping = Shaping { enricher: Some(enricher.clone()), ..Shaping::default() };
    shaping.pack(event, edge).0
}

fn enriched_of(event: &Event) -> Value {
    serde_json::from_str(event.enriched().unwrap().json()).unwrap()
}

#[test]
fn what_is_found_is_one_object_with_its_data_sets() {
    let dir = tempfile::tempdir().unwrap();
    let enricher = Arc::new(enricher(dir.path()));
    let event = packed(&enricher, parts(page()), &of_device());
    let found = enriched_of(&event);
    assert_eq!((&found["v"], &found["agent"]["browser"]), (&json!(1), &json!("Firefox")));
    assert_eq!((&found["geo"]["country"], &found["page"]["path"]), (&json!("DE"), &json!("/cart")));
    assert_eq!((&found["campaign"]["source"], &found["source"]), (&json!("news"), &json!("news")));
    assert!(found["data"]["uap"].is_string() && found["data"]["geo"].is_string(), "{found}");
    assert_eq!(event.ip(), Some("81.2.69.0"), "looked up before it was cut");
    assert!(event.session_id().is_some());
}

/// Whatever fails in it, an event is taken, and is what its caller sent.
#[test]
fn every_step_panics_on_every_event_and_nothing_else_changes() {
    let dir = tempfile::tempdir().unwrap();
    let enricher = Arc::new(enricher(dir.path()));
    enricher.sabotage(&Step::ALL);
    let plain = Shaping::default();
    let kinds = [page(), EventKind::Track { name: "x" }, EventKind::Identify];
    for turn in 0..20 {
        for kind in kinds {
            let mut nobody = parts(kind);
            nobody.anonymous_id = None;
            for event in [parts(kind), nobody] {
                let sabotaged = packed(&enricher, event.clone(), &of_device());
                let found = enriched_of(&sabotaged);
                let missed = found["missed"].as_array().unwrap();
                assert!(
                    missed.contains(&json!("agent")) && missed.contains(&json!("session"))
                        || turn == 0
                        || event.anonymous_id.is_none(),
                    "{found}"
                );
                assert_eq!(
                    found.as_object().unwrap().len(),
                    3,
                    "a version, no data, what is missed: {found}"
                );
                let mut without = sabotaged.parts();
                without.more.as_mut().unwrap().enriched = None;
                assert_eq!(Event::pack(&without), plain.pack(event, &of_device()).0);
            }
        }
    }
    let off = enricher.switched_off();
    assert_eq!(off, ["agent", "bot", "geo", "page", "visitor", "session"], "the source has no page to go by");
    assert_eq!(enricher.metrics().missed(Step::Agent).get(), 0, "none of them was taken");
    // Data that is new is tried, by the step that goes by it.
    std::fs::write(dir.path().join("bots"), "deny Ours Ourthing\n").unwrap();
    enricher.reload();
    assert_eq!(enricher.switched_off(), ["agent", "geo", "page", "visitor", "session"]);
    std::fs::write(dir.path().join("geo.mmdb"), flat()).unwrap();
    enricher.reload();
    assert_eq!(enricher.switched_off(), ["agent", "page", "visitor", "session"]);
    enricher.reload();
    assert_eq!(enricher.switched_off(), ["agent", "page", "visitor", "session"], "nothing is new");
}

/// What a step finds out, of the event that stands for it below.
fn fields_of(step: Step) -> (&'static [&'static str], &'static [&'static str]) {
    match step {
        Step::Agent => (&["agent"], &["uap"]),
        Step::Bot => (&["bot"], &["bots"]),
        Step::Geo => (&["geo"], &["geo"]),
        Step::Page => (&["page", "campaign", "referrer", "source", "channel"], &["sources"]),
        Step::Source => (&["source", "channel"], &["sources"]),
        Step::Visitor => (&["visitor"], &[]),
        Step::Session => (&[], &[]),
    }
}

/// Nine times it may be the event's fault.
#[test]
fn a_step_that_panics_costs_its_own_fields_and_is_off_from_its_tenth_panic_on() {
    for step in Step::ALL {
        let dir = tempfile::tempdir().unwrap();
        let enricher = Arc::new(enricher(dir.path()));
        let shaping = Shaping { enricher: Some(enricher.clone()), ..Shaping::default() };
        let mut event = parts(page());
        match step {
            Step::Bot => event.user_agent = Some("Googlebot/2.1"),
            Step::Visitor => event.anonymous_id = None,
            _ => {}
        }
        let packed = || {
            let (event, found) = shaping.pack(event.clone(), &of_device());
            shaping.count(found);
            event
        };
        let whole = packed();
        let mut want = enriched_of(&whole);
        let (fields, sets) = fields_of(step);
        for (at, names) in [("", fields), ("/data", sets)] {
            let object = want.pointer_mut(at).unwrap().as_object_mut().unwrap();
            names.iter().for_each(|name| assert!(object.remove(*name).is_some(), "{step:?} finds no {name}"));
        }
        want["missed"] = json!([step.name()]);

        enricher.sabotage(&[step]);
        for panics in 1..=10 {
            assert!(enricher.switched_off().is_empty(), "{step:?} at its panic {panics}");
            let event = packed();
            assert_eq!(enriched_of(&event), want, "{step:?}");
            let keeps_session =
                !matches!(step, Step::Session | Step::Visitor) && whole.session_id().is_some();
            assert_eq!(event.session_id().is_some(), keeps_session || step == Step::Bot, "{step:?}");
            let missed = Step::ALL.map(|each| enricher.metrics().missed(each).get());
            assert_eq!(missed, Step::ALL.map(|each| if each == step { panics } else { 0 }), "{step:?}");
        }
        assert_eq!(enricher.switched_off(), [step.name()]);
        enricher.sabotage(&[]);
        assert_eq!(enriched_of(&packed()), want, "{step:?} is not made any more");
    }
}

/// Steps are not all that looks at what a caller may send.
#[test]
fn what_panics_beside_the_steps_costs_no_event_either_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let enricher = Arc::new(enricher(dir.path()));
    let shaping = Shaping { enricher: Some(enricher.clone()), ..Shaping::default() };
    enricher.sabotage_reading();
    let (event, found) = shaping.pack(parts(page()), &of_device());
    shaping.count(found);
    let plain = Shaping::default().pack(parts(page()), &of_device()).0;
    let mut without = event.parts();
    without.more.as_mut().unwrap().session_id = None;
    assert!(event.session_id().is_some(), "which is found out all the same");
    assert_eq!(Event::pack(&without), plain);
    let missed = [Step::Agent, Step::Page, Step::Geo].map(|step| enricher.metrics().missed(step).get());
    assert_eq!(missed, [1, 1, 0]);
}

/// What stands in the event is what every attempt and every vendor gets, whatever is
/// loaded meanwhile.
#[test]
fn data_that_is_new_touches_new_events_alone() {
    let dir = tempfile::tempdir().unwrap();
    let enricher = Arc::new(enricher(dir.path()));
    let mut machine = parts(page());
    machine.user_agent = Some("Ourthing/1.0");
    let before = packed(&enricher, machine.clone(), &of_device());
    let bytes = before.to_json();
    let list = dir.path().join("bots");
    std::fs::write(&list, "deny Ours Ourthing\n").unwrap();
    enricher.reload();
    assert_eq!(before.to_json(), bytes);
    let after = packed(&enricher, machine, &of_device());
    assert!(enriched_of(&before).get("bot").is_none());
    assert_eq!(enriched_of(&after)["bot"]["name"], "Ours");
    assert!(after.session_id().is_none(), "a machine has none");
    let again = Event::from_json(&bytes).unwrap();
    assert_eq!(again.to_json(), bytes, "from the log, too");
}

/// Room for a whole batch of a device is asked for by it, before anything is found out.
#[test]
fn what_is_found_out_takes_about_as_much_room_as_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let enricher = Arc::new(enricher(dir.path()));
    let plain = Shaping::default().pack(parts(page()), &of_device()).0.memory_bytes();
    let more = packed(&enricher, parts(page()), &of_device()).memory_bytes() - plain;
    assert!((ENRICHED_BYTES / 4..=ENRICHED_BYTES).contains(&more), "{more}");
}

#[test]
fn an_event_of_a_server_that_says_nothing_of_a_user_passes_by_it_all() {
    let dir = tempfile::tempdir().unwrap();
    let enricher = enricher(dir.path());
    let bare = EventParts {
        ip: None,
        user_agent: None,
        more: None,
        ..parts(EventKind::Track { name: "Order Placed" })
    };
    assert_eq!(enricher.enrich(&bare, &Edge::default()), None);
}

/// `0.0.0.0` is how a page says that no address is to be taken.
#[test]
fn who_withholds_the_address_is_nobody_and_tenants_visitors_are_not_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let enricher = Arc::new(enricher(dir.path()));
    let id_of = |ip: &str, tenant| {
        let mut event = parts(page());
        (event.anonymous_id, event.ip) = (None, Some(ip.parse().unwrap()));
        event.more.as_mut().unwrap().tenant = tenant;
        packed(&enricher, event, &of_device()).anonymous_id().map(str::to_owned)
    };
    for ip in ["0.0.0.0", "::", "::ffff:0.0.0.0"] {
        assert_eq!(id_of(ip, None), None, "{ip}");
    }
    let of_none = id_of("81.2.69.142", None);
    assert!(of_none.is_some() && of_none != id_of("81.2.69.142", Some("acme")));
}

#[test]
fn who_declines_is_heard_without_any_step() {
    let dir = tempfile::tempdir().unwrap();
    let settings = EnrichSettings { steps: Vec::new(), declined: Declined::Dropped, ..settings() };
    let enricher = Arc::new(enricher_of(dir.path(), &settings));
    let declines = Edge { is_declined: true, ..of_device() };
    let bare = EventParts { ip: None, user_agent: None, more: None, ..parts(EventKind::Identify) };
    for event in [parts(page()), parts(EventKind::Track { name: "x" }), bare] {
        let of_others = packed(&enricher, event.clone(), &of_device());
        assert_eq!(of_others.parts(), Shaping::default().pack(event.clone(), &of_device()).0.parts());
        let dropped = packed(&enricher, event, &declines);
        assert_eq!(dropped.audience(), Audience::nobody(NotFor::Declined));
    }
}

/// A visit that goes on over midnight keeps the id of the day on which it began.
#[test]
fn a_visit_over_midnight_is_of_one_visitor() {
    let dir = tempfile::tempdir().unwrap();
    let midnight = NOW_MS + 24 * 3_600_000;
    assert_eq!(midnight % (24 * 3_600_000), 0);
    let enricher = Arc::new(enricher(dir.path()));
    let id_at = |time_ms: i64| {
        let mut event = parts(page());
        (event.anonymous_id, event.time_ms, event.accepted_ms) = (None, time_ms, time_ms);
        let event = packed(&enricher, event, &of_device());
        (event.anonymous_id().unwrap().to_owned(), event.session_id().unwrap().to_owned())
    };
    let before = id_at(midnight - 60_000);
    assert_eq!(id_at(midnight + 60_000), before);
    assert_ne!(id_at(midnight + 3_600_000), before, "another visit, another day");
}

/// An event that finds no room is looked at again, and one that is refused comes again: each
/// is counted for what was found out about it when it is taken.
#[tokio::test]
async fn what_is_found_out_about_an_event_is_counted_when_it_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let settings =
        EnrichSettings { sessions: SessionLimits { sessions_max: 0, ..settings().sessions }, ..settings() };
    let enricher = Arc::new(enricher_of(dir.path(), &settings));
    let (queue, _taken) = memory::bounded(QueueLimits { events_max: 3, bytes_max: usize::MAX });
    let queue = Queue::Memory(queue, Default::default());
    let clock = Clock::from_fn(|| NOW_MS);
    let shaping = Shaping { enricher: Some(enricher.clone()), ..Shaping::default() };
    let admission = Admission::new(queue, clock, AdmissionMetrics::default()).with_shaping(shaping);
    let call = CallContext::of_grpc(std::net::Ipv4Addr::LOCALHOST.into());
    let counted = || {
        let EnrichMetrics { bots, declined, salt_gone, sessions_full, .. } = enricher.metrics();
        [bots, declined, salt_gone, sessions_full].map(|counter| counter.get())
    };
    let of_browser = |user_agent: &'static str, edge| {
        let context = Properties::parse(CONTEXT, &Limits::DEFAULT).unwrap().into();
        let more = More { edge, ..*More::of_context(Ok(context)) };
        Draft {
            user_id: "".into(),
            anonymous_id: "".into(),
            ip: "81.2.69.142".into(),
            user_agent: user_agent.into(),
            more: Some(Box::new(more)),
            ..draft()
        }
    };
    let declines = Edge { is_declined: true, ..of_device() };
    let days_ago =
        || Draft { time_ms: Some(("time", NOW_MS - 3 * 86_400_000)), ..of_browser(FIREFOX, of_device()) };
    // Which is found out last.
    let promised = |draft| Draft { durability: Ok(Some(Durability::Synced)), ..draft };
    let drafts = || {
        let known = Draft { anonymous_id: "device-1".into(), ..of_browser(FIREFOX, of_device()) };
        [of_browser("Googlebot/2.1", declines), days_ago(), known]
    };
    for draft in drafts() {
        admission.admit(promised(draft), &call).await.unwrap_err();
    }
    assert_eq!(counted(), [0; 4], "refused");
    for draft in drafts() {
        admission.admit(draft, &call).await.unwrap();
    }
    assert_eq!(counted(), [1; 4]);
    for draft in drafts() {
        let denied = admission.admit(draft, &call).await.unwrap_err();
        assert!(matches!(denied, Denied::Full { .. }), "{denied:?}");
    }
    assert_eq!(counted(), [1; 4], "there was no room");
}

/// The caller's context is kept as it was sent, and may hold the address once more.
#[test]
fn no_more_is_left_of_an_address_than_its_policy_lets_and_not_in_the_context_either() {
    let kept = |is_connections, ip_policy| {
        let json = r#"{"ip":"81.2.69.142","locale":"de"}"#;
        let context =
            Some(Properties::parse(json, &Limits::DEFAULT).map(JsonObject::from).map_err(|_| unreachable!()));
        let edge = Edge { ip_is_connections: is_connections, ..Edge::default() };
        let more = More { session_id: "".into(), audience: Audience::All, context, edge };
        let draft = Draft { ip: "81.2.69.142".into(), more: Some(Box::new(more)), ..draft() };
        let shaping = Shaping { ip_policy, ..Shaping::default() };
        let packed = check(&draft, None, 0, || true, |parts| shaping.pack(parts, &edge));
        let ((event, _), _) = packed.unwrap();
        (event.ip().map(str::to_owned), event.context().unwrap().json().to_owned())
    };
    let some = |ip: &str| (Some(ip.to_owned()), format!(r#"{{"ip":"{ip}","locale":"de"}}"#));
    let (full, cut) = (some("81.2.69.142"), some("81.2.69.0"));
    let none = (None, r#"{"locale":"de"}"#.to_owned());
    for (is_connections, policy, want) in [
        (true, IpPolicy::ByOrigin, &cut),
        (false, IpPolicy::ByOrigin, &full),
        (false, IpPolicy::Truncate, &cut),
        (true, IpPolicy::Full, &full),
        (false, IpPolicy::None, &none),
    ] {
        assert_eq!(&kept(is_connections, policy), want, "{is_connections} {policy:?}");
    }
}

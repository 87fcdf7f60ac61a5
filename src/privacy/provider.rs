//! A provider that gets of each event what today's rules leave for it.
//!
//! The rules are applied while it is sent to, to a copy: log, spill and dead letters hold
//! the event as it was accepted, and so what waits, or is replayed, obeys the rules that
//! hold then.

use std::sync::Arc;

use analytics_relay_providers::{
    BatchLimits, Endpoint, Event, NotFor, Provider, Rejection, SendError, Step, Verdict,
};
use async_trait::async_trait;
use tokio::task::spawn_blocking;

use super::{
    Privacy,
    apply::changed,
    rewrite::{KeyRules, Notes},
};

/// Batches of more are looked through off the asynchronous threads, as vendors encode
/// them.
const INLINE_BYTES_MAX: usize = 64 * 1024;

/// One that is told no more than it may know.
pub(super) struct Guarded {
    pub(super) inner: Arc<dyn Provider>,
    pub(super) privacy: Arc<Privacy>,
}

impl Guarded {
    fn rules(&self) -> Option<Arc<KeyRules>> {
        self.privacy.rules_of(self.inner.name())
    }
}

#[async_trait]
impl Provider for Guarded {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn limits(&self) -> BatchLimits {
        self.inner.limits()
    }

    /// Of what it will be told: a group of which no trait is left may be nothing to a vendor.
    fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        let left = self.rules().and_then(|rules| left_of(event, &rules));
        self.inner.endpoint(left.as_ref().unwrap_or(event))
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let Some(rules) = self.rules() else { return self.inner.send(batch).await };
        let bytes: usize = batch.iter().map(Event::memory_bytes).sum();
        let left = if bytes <= INLINE_BYTES_MAX {
            left_of_batch(batch, &rules)
        } else {
            let batch = batch.to_vec();
            let looked = spawn_blocking(move || left_of_batch(&batch, &rules)).await;
            looked.map_err(|error| SendError::Unavailable {
                retry_after: None,
                detail: format!("a defect: the privacy rules could not be applied: {error}"),
            })?
        };
        match left {
            None => self.inner.send(batch).await,
            Some(left) => self.send_rest(&left).await,
        }
    }

    async fn probe(&self) -> Vec<Step> {
        self.inner.probe().await
    }
}

impl Guarded {
    /// Rules that came since the events were given to an endpoint may have left nothing of
    /// some.
    async fn send_rest(&self, left: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let is_something = |event: &&Event| self.inner.endpoint(event).is_ok();
        let rest: Vec<Event> = left.iter().filter(is_something).cloned().collect();
        if rest.len() == left.len() {
            return self.inner.send(left).await;
        }
        let mut verdicts =
            if rest.is_empty() { Vec::new() } else { self.inner.send(&rest).await? }.into_iter();
        let detail = "the privacy rules leave nothing of it for this provider";
        let nothing = || Verdict::Rejected { reason: Rejection::Invalid, detail: detail.to_owned() };
        let verdict = |event: &Event| if is_something(&event) { verdicts.next() } else { Some(nothing()) };
        Ok(left.iter().map_while(verdict).collect())
    }
}

/// The events as the rules leave them; nothing if they leave all as they are.
fn left_of_batch(batch: &[Event], rules: &KeyRules) -> Option<Vec<Event>> {
    let first = batch.iter().enumerate().find_map(|(at, event)| Some((at, left_of(event, rules)?)));
    let (at, changed) = first?;
    let mut left = batch[..at].to_vec();
    left.push(changed);
    left.extend(batch[at + 1..].iter().map(|event| left_of(event, rules).unwrap_or_else(|| event.clone())));
    Some(left)
}

fn left_of(event: &Event, rules: &KeyRules) -> Option<Event> {
    changed(&event.parts(), rules, None, &mut Notes::default())
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, OnceLock};

    use analytics_relay_providers::{
        EventId, EventKind, EventParts, Properties,
        properties::Limits,
        registry::{self, ProviderSettings, Vendor},
        sandbox::{Options, Sandbox},
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{
        super::{
            json::Names,
            keys::plain,
            tests::{parts, privacy},
        },
        *,
    };
    use crate::watched::Reload;

    /// Takes everything; a group of which nothing is known is not for it.
    #[derive(Default)]
    struct Recording(Mutex<Vec<Vec<Event>>>);

    #[async_trait]
    impl Provider for Recording {
        fn name(&self) -> &'static str {
            "mixpanel"
        }

        fn limits(&self) -> BatchLimits {
            BatchLimits { events_max: 100, body_bytes_max: 1 << 20, requests_max: 1 }
        }

        fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
            match event.properties().shape().top_keys {
                0 => Err(NotFor::NothingToSet),
                _ => Ok(Endpoint::DEFAULT),
            }
        }

        async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
            self.0.lock().unwrap().push(batch.to_vec());
            let verdict = |event: &Event| Verdict::Rejected {
                reason: Rejection::TooLarge,
                detail: event.properties().json().to_owned(),
            };
            Ok(batch.iter().map(verdict).collect())
        }
    }

    fn event(properties: &str) -> Event {
        Event::pack(&parts(properties, ""))
    }

    fn details(verdicts: &[Verdict]) -> Vec<&str> {
        let mut details = Vec::new();
        for verdict in verdicts {
            let Verdict::Rejected { detail, .. } = verdict else { panic!("{verdict:?}") };
            details.push(detail.as_str());
        }
        details
    }

    #[tokio::test]
    async fn a_provider_gets_what_todays_rules_leave_and_its_verdicts_are_its_own() {
        let (privacy, dir) = privacy("[providers.mixpanel]\ndeny = [\"email\"]");
        let inner = Arc::new(Recording::default());
        let guarded = privacy.guard(inner.clone());
        let batch = [event(r#"{"a":1}"#), event(r#"{"email":"a@b","a":2}"#), event(r#"{"a":3}"#)];
        let verdicts = guarded.send(&batch).await.unwrap();
        assert_eq!(details(&verdicts), [r#"{"a":1}"#, r#"{"a":2}"#, r#"{"a":3}"#]);
        assert_eq!(guarded.endpoint(&event(r#"{"email":"a@b"}"#)), Err(NotFor::NothingToSet));
        // The file is another one now.
        std::fs::write(dir.path().join("privacy.toml"), "[providers.mixpanel]\ndeny = [\"a\"]").unwrap();
        privacy.reload();
        let verdicts = guarded.send(&batch).await.unwrap();
        let nothing = "the privacy rules leave nothing of it for this provider";
        assert_eq!(details(&verdicts), [nothing, r#"{"email":"a@b"}"#, nothing]);
        let verdicts = guarded.send(&batch[..1]).await.unwrap();
        assert_eq!(details(&verdicts), [nothing]);
        assert_eq!(inner.0.lock().unwrap().iter().map(Vec::len).collect::<Vec<_>>(), [3, 1]);
    }

    /// A batch that is looked through off the asynchronous threads.
    #[tokio::test]
    async fn a_large_batch_is_no_other() {
        let (privacy, _dir) = privacy("[providers.mixpanel]\ndeny = [\"email\"]");
        let guarded = privacy.guard(Arc::new(Recording::default()));
        let large = format!(r#"{{"email":"a@b","text":"{}"}}"#, "x".repeat(INLINE_BYTES_MAX));
        let verdicts = guarded.send(&[event(&large)]).await.unwrap();
        assert!(details(&verdicts)[0].starts_with(r#"{"text":"xx"#));
    }

    #[tokio::test]
    async fn whom_no_rule_names_gets_the_same_events() {
        let (privacy, _dir) = privacy("[providers.segment]\ndeny = [\"email\"]");
        let inner = Arc::new(Recording::default());
        let batch = [event(r#"{"email":"a@b"}"#)];
        privacy.guard(inner.clone()).send(&batch).await.unwrap();
        assert_eq!(inner.0.lock().unwrap()[0], batch);
    }

    /// What a newer relay wrote is that one's business.
    #[test]
    fn a_kind_that_is_not_known_is_not_looked_into() {
        let (privacy, _dir) = privacy("[providers.mixpanel]\ndeny = [\"email\"]");
        let json =
            br#"{"id":"i","kind":"purchase","time_ms":1,"accepted_ms":1,"properties":{"email":"a@b"}}"#;
        let rules = privacy.rules_of("mixpanel").unwrap();
        assert!(left_of(&Event::from_json(json).unwrap(), &rules).is_none());
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i32>().prop_map(Value::from),
            "[a-zA-Z0-9@. é\"]{0,12}".prop_map(Value::from),
        ];
        let key = "(email|Phone|secret|plan|price|name|ip|[a-d]{1,2})";
        leaf.prop_recursive(3, 16, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(key, inner, 0..4).prop_map(|fields| json!(fields)),
            ]
        })
    }

    fn any_object() -> impl Strategy<Value = String> {
        prop::collection::btree_map("(email|phone|secret|plan|name|[a-d]{1,2})", any_value(), 0..6)
            .prop_map(|fields| json!(fields).to_string())
    }

    struct Vendors {
        sandbox: Sandbox,
        runtime: tokio::runtime::Runtime,
    }

    /// One sandbox for all cases.
    fn vendors() -> &'static Vendors {
        static VENDORS: OnceLock<Vendors> = OnceLock::new();
        VENDORS.get_or_init(|| {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            let sandbox = runtime.block_on(Sandbox::start(Options::default())).unwrap();
            Vendors { sandbox, runtime }
        })
    }

    /// In texts that nobody may read.
    const CANARY: &str = "canary-7f3a9c";
    const DENIED_OR_HASHED: [&str; 5] = ["secret", "ip", "email", "phone", "name"];
    const ALLOWED: [&str; 3] = ["plan", "email", "a"];

    /// An object with a mark in each text that must not be told: one below a name that is
    /// denied or hashed, or, if only some are allowed, below none of those.
    fn marked(object: &str, is_told: bool, is_only: bool) -> String {
        fn mark(value: &mut Value, is_told: bool, is_only: bool) {
            match value {
                Value::String(text) if !is_told => text.insert_str(0, CANARY),
                Value::Array(values) => values.iter_mut().for_each(|value| mark(value, is_told, is_only)),
                Value::Object(fields) => {
                    for (name, value) in fields {
                        let name = plain(name);
                        let hides: &[&str] = if is_only { &["secret", "email"] } else { &DENIED_OR_HASHED };
                        match hides.contains(&&*name) {
                            true => mark(value, false, false),
                            false => mark(value, is_told || is_only && ALLOWED.contains(&&*name), is_only),
                        }
                    }
                }
                _ => {}
            }
        }
        let mut value = serde_json::from_str(object).unwrap();
        mark(&mut value, is_told, is_only);
        value.to_string()
    }

    /// True if each value in it is allowed, or holds nothing else.
    fn leads_to_allowed(value: &Value) -> bool {
        match value {
            Value::Object(fields) => {
                let leads = |(name, value): (&String, &Value)| {
                    ALLOWED.contains(&&*plain(name)) || leads_to_allowed(value)
                };
                fields.iter().all(leads)
            }
            Value::Array(values) => values.iter().all(leads_to_allowed),
            _ => false,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        /// What is left of an event a vendor takes as it would have taken all of it, and in
        /// no body there is what was forbidden.
        #[test]
        fn what_is_left_maps_to_what_vendors_accept(
            properties in any_object(), context in any_object(), kind in 0..3, turn in any::<u64>()
        ) {
            let names = "deny = [\"secret\", \"ip\"]\nhash = { email = \"meta\", phone = \"google\", name = \"hmac\" }";
            let only = "allow = [\"plan\", \"email\", \"a\"]\ndeny = [\"secret\"]\nhash = [\"email\"]";
            let file = format!("[providers.mixpanel]\n{names}\n[providers.amplitude]\n{names}\n[providers.segment]\n{only}");
            let (privacy, _dir) = privacy(&file);
            let kind = match kind {
                0 => EventKind::Track { name: "Order Placed" },
                1 => EventKind::Identify,
                _ => EventKind::Page { name: Some("Home"), category: None },
            };
            let id = EventId::new(format!("event-{turn:020}")).unwrap();
            let Vendors { sandbox, runtime } = vendors();
            for vendor in Vendor::ALL {
                let is_only = vendor == Vendor::Segment;
                let [properties, context] = [&properties, &context].map(|object| marked(object, !is_only, is_only));
                let event = Event::pack(&EventParts {
                    id: id.clone(),
                    kind,
                    properties: Properties::parse(&properties, &Limits::NONE).unwrap(),
                    ..parts("{}", &context)
                });
                let settings = ProviderSettings {
                    vendor,
                    key: analytics_relay_providers::Secret::new("sandbox-key"),
                    base_url: sandbox.url().parse().unwrap(),
                    request_timeout: std::time::Duration::from_secs(10),
                    identity_mode: Default::default(),
                    min_id_length: 1,
                    view: Default::default(),
                };
                let rules = privacy.rules_of(vendor.name()).unwrap();
                let left = left_of(&event, &rules).unwrap_or_else(|| event.clone());
                let encoded = registry::preview(&settings, &left, 1_767_225_601_000).unwrap();
                let body = String::from_utf8_lossy(&encoded.body);
                let is_there = |json: &str, name: &str| Names::of(json).any(|key| plain(&key.name()) == name);
                prop_assert!(!is_there(&body, "secret"), "{}", body);
                for canary in [CANARY, "203.0.113.77"] {
                    prop_assert!(!body.contains(canary), "{} of {}", canary, body);
                }
                prop_assert!(!is_only || !body.contains("Browser/1.0"), "{}", body);
                let context = left.context().map_or("{}".to_owned(), |context| context.json().to_owned());
                for object in [left.properties().json(), &context] {
                    let value = serde_json::from_str(object).unwrap();
                    let obeys = if is_only { leads_to_allowed(&value) } else { !is_there(object, "ip") };
                    prop_assert!(obeys, "{}", object);
                }
                let sent = |provider: Arc<dyn Provider>| {
                    let batch = [event.clone()];
                    runtime.block_on(async move { provider.send(&batch).await })
                };
                let bare = registry::build(&settings).unwrap();
                let whole = sent(bare.clone());
                let guarded = sent(privacy.guard(bare));
                prop_assert_eq!(guarded, whole, "{} of {}", vendor.name(), body);
            }
        }
    }
}

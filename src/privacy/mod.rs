//! What of an event is kept, and who gets what of it: consent, rules before the log, rules
//! of each provider while it is sent to.
//!
//! ```text
//!  validated ─► consent: who gets it ─► global rules: drop, hash, cut ─► pack ─► log
//!                                                                                 │
//!            vendor ◄─ encode ◄─ deny, allow, hash; drop and cut once more ◄──────┘
//! ```
//!
//! What must not be kept goes before the log. What only one provider must not get goes
//! while it is sent to, so that what waits, or is replayed, obeys the rules of today. They
//! stand in one file, which is read again every ten seconds; a bad one changes nothing.
//!
//! | module | what it holds |
//! |---|---|
//! | [`settings`] | what the environment says |
//! | [`mod@file`] | TOML → what stands in the file |
//! | [`rules`] | the file and the settings → rules of the log and of each provider |
//! | [`keys`] | names: whole ones, in any spelling |
//! | [`json`], [`rewrite`] | JSON → what rules leave of it |
//! | [`normalise`] | hashes, and the forms that vendors match |
//! | [`seal`] | values of the store that nobody reads without a key |
//! | [`consent`] | what a user agrees to → who gets the event |
//! | [`apply`], [`provider`] | an event, a provider |
//! | [`suppression`], [`secret`] | users who are erased, and how their ids are kept |

use std::{
    fs::File,
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use analytics_relay_providers::{Event, EventParts, Provider, Secret};
use arc_swap::ArcSwap;
use serde_json::value::RawValue;
use thiserror::Error;
use tracing::{info, warn};

use crate::{
    reasons::{Redaction, STORE},
    sealing::Sealing,
    settings::secret_at,
    telemetry::PrivacyMetrics,
    watched::Reload,
};

mod apply;
mod consent;
mod file;
mod json;
mod keys;
mod normalise;
mod provider;
mod rewrite;
mod rules;
mod seal;
pub(crate) mod secret;
mod settings;
pub(crate) mod suppression;

use apply::{changed, changed_but, changed_integrations, changed_item, fields_by, may_change};
pub(crate) use file::Named;
use file::RuleFile;
use normalise::equal;
use provider::Guarded;
pub(crate) use rewrite::Found;
use rewrite::{KeyRules, Notes};
use rules::Rules;
pub(crate) use seal::unsealed;
pub use settings::{PiiMode, PrivacySettings};

/// Most bytes of the file.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Fields of a refused item that are its own, and no properties of an event, as long as each
/// is one value.
const OWN_FIELDS: [&str; 18] = [
    "type",
    "event",
    "userId",
    "anonymousId",
    "messageId",
    "sessionId",
    "name",
    "category",
    "groupId",
    "previousId",
    "timestamp",
    "originalTimestamp",
    "sentAt",
    "integrations",
    "writeKey",
    "schemaVersion",
    "version",
    "channel",
];

/// Why there are no rules.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("PRIVACY_FILE {}:{}", file.display(), errors.iter().map(|error| format!("\n  {error}")).collect::<String>())]
pub struct PrivacyError {
    file: PathBuf,
    /// All of them.
    errors: Vec<String>,
}

/// The rules that hold, and what was done by them.
#[derive(Debug)]
pub(crate) struct Privacy {
    settings: PrivacySettings,
    providers: Named,
    /// The keys that values of the store are sealed with.
    sealing: Sealing,
    rules: ArcSwap<Rules>,
    /// What they were made of.
    source: Mutex<Source>,
    /// It was told that the file is bad, as it is.
    is_told: AtomicBool,
    metrics: PrivacyMetrics,
}

/// What rules are made of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Source {
    text: String,
    key: Option<Secret>,
}

/// What an event would become, for a person who asks.
#[derive(Debug)]
pub(crate) struct Preview {
    /// None: as it was.
    pub(crate) event: Option<Event>,
    /// Under which names what was done.
    pub(crate) done: Vec<(Redaction, String)>,
}

impl Privacy {
    /// Reads the rules; nothing if there is nothing to do.
    pub(crate) fn open(
        settings: &PrivacySettings,
        providers: Named,
        sealing: &Sealing,
        metrics: PrivacyMetrics,
    ) -> Result<Option<Arc<Self>>, PrivacyError> {
        if settings.file.is_none() && settings.pii_mode == PiiMode::Off {
            return Ok(None);
        }
        let settings = settings.clone();
        let (source, rules) = load(&settings, &providers, sealing, None)?.expect("nothing was read before");
        let (rules, source) = (ArcSwap::from_pointee(rules), Mutex::new(source));
        let (sealing, is_told) = (sealing.clone(), AtomicBool::new(false));
        Ok(Some(Arc::new(Self { settings, providers, sealing, rules, source, is_told, metrics })))
    }

    /// The event of parts that break no rule of admission: for whom its user agrees to, and
    /// without what must not be kept.
    #[inline]
    pub(crate) fn pack(&self, parts: &EventParts<'_>) -> (Event, Found) {
        // Without a file they never change, and nearly nothing concerns them.
        if self.settings.file.is_none() && !has_mark(parts) {
            return (Event::pack(parts), Found::default());
        }
        self.packed_by_rules(parts)
    }

    #[cold]
    fn packed_by_rules(&self, parts: &EventParts<'_>) -> (Event, Found) {
        let (rules, mut notes) = (self.rules.load(), Notes::default());
        let event = before_log(&rules, parts, &mut notes);
        (event.unwrap_or_else(|| Event::pack(parts)), notes.found)
    }

    /// Counts what was found in an event that was taken.
    pub(crate) fn count(&self, found: Found) {
        for (place, counter) in self.metrics.pii_keys.iter().enumerate() {
            if found.counted >> place & 1 == 1 {
                counter.inc();
            }
        }
        for (counter, values) in self.metrics.fields.iter().zip(found.done) {
            counter.inc_by(values.into());
        }
    }

    /// An item that was refused, and is kept, by the rules of the log; nothing if they leave
    /// it as it is.
    pub(crate) fn item(&self, item: &RawValue) -> Option<Box<RawValue>> {
        changed_item(item, &self.rules.load().log, &OWN_FIELDS)
    }

    /// The same of what stood beside it.
    pub(crate) fn beside_item(&self, context: &RawValue) -> Option<Box<RawValue>> {
        changed_but(context, &self.rules.load().log, |_, _| false)
    }

    /// The same of whom it is for.
    pub(crate) fn integrations(&self, integrations: &RawValue) -> Option<Box<RawValue>> {
        changed_integrations(integrations, &self.rules.load().log)
    }

    /// The same of what its call showed.
    pub(crate) fn seen(&self, ip: Option<IpAddr>, user_agent: &str) -> (Option<IpAddr>, String) {
        let user_agent = (!user_agent.is_empty()).then_some(user_agent);
        let (ip, user_agent) = fields_by(&self.rules.load().log, ip, user_agent);
        (ip, user_agent.unwrap_or_default())
    }

    /// A provider that gets what the rules leave for it; itself if there can be no such
    /// rule.
    pub(crate) fn guard(self: &Arc<Self>, provider: Arc<dyn Provider>) -> Arc<dyn Provider> {
        if self.settings.file.is_none() && self.rules_of(provider.name()).is_none() {
            return provider;
        }
        Arc::new(Guarded { inner: provider, privacy: self.clone() })
    }

    /// What of an event goes to the log.
    pub(crate) fn preview_log(&self, event: &Event) -> Preview {
        let mut notes = Notes::with_names();
        let event = before_log(&self.rules.load(), &event.parts(), &mut notes);
        Preview { event, done: notes.names.unwrap_or_default() }
    }

    /// What of an event in the log goes to a provider.
    pub(crate) fn preview_for(&self, provider: &str, event: &Event) -> Preview {
        let mut notes = Notes::with_names();
        let event = self.rules_of(provider).and_then(|it| changed(&event.parts(), &it, None, &mut notes));
        Preview { event, done: notes.names.unwrap_or_default() }
    }

    /// True if the file, as it is now, has values of the store sealed, for which keys are needed.
    pub(crate) fn seals(settings: &PrivacySettings, providers: &Named) -> bool {
        let text = settings.file.as_deref().and_then(|path| read(path).ok());
        let file = text.and_then(|text| file::parse(&text, providers).ok());
        file.is_some_and(|file| file.providers.values().any(|section| !section.seal.is_empty()))
    }

    /// By which equal values of a name are found in the store, if there is a key.
    pub(crate) fn equal(&self, name: &str, value: &str) -> Option<String> {
        let rules = self.rules_of(STORE)?;
        equal(rules.hash_key.as_ref()?, &keys::plain(name), value)
    }

    /// What the rules do, in words, and what is odd about them.
    pub(crate) fn describe(&self) -> (String, Vec<String>) {
        let rules = self.rules.load();
        (rules.to_string(), rules.warnings())
    }

    fn rules_of(&self, provider: &str) -> Option<Arc<KeyRules>> {
        self.rules.load().of_provider(provider).cloned()
    }
}

impl Reload for Privacy {
    /// Reads the file again. If it is bad, the rules stay as they were, which is told once
    /// for each time that it gets bad.
    fn reload(&self) {
        let before = self.source.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match load(&self.settings, &self.providers, &self.sealing, Some(&before)) {
            Ok(None) => self.is_told.store(false, Ordering::Relaxed),
            Ok(Some((source, rules))) => {
                rules.warnings().iter().for_each(|warning| warn!("PRIVACY_FILE: {warning}"));
                self.rules.store(Arc::new(rules));
                *self.source.lock().unwrap_or_else(PoisonError::into_inner) = source;
                self.is_told.store(false, Ordering::Relaxed);
                info!("privacy rules are read again");
            }
            Err(error) => {
                self.metrics.reload_failed.inc();
                if !self.is_told.swap(true, Ordering::Relaxed) {
                    warn!(%error, "the privacy rules stay as they were");
                }
            }
        }
    }
}

/// True if a name that nobody should send is, or may be, in it.
#[inline]
fn has_mark(parts: &EventParts<'_>) -> bool {
    parts.properties.shape().has_red_key()
        || parts
            .more
            .as_ref()
            .and_then(|more| more.context.as_ref())
            .is_some_and(|context| context.may_have_red_key())
}

/// What goes to the log in place of an event; nothing if that is all of it, to all.
fn before_log(rules: &Rules, parts: &EventParts<'_>, notes: &mut Notes) -> Option<Event> {
    let mut refused = None;
    if !rules.consent.categories.is_empty() {
        let more = parts.more.as_deref();
        let context = more.and_then(|more| more.context.as_ref()).map(|context| context.json());
        let all = Default::default();
        let audience = more.map_or(&all, |more| &more.audience);
        let providers = rules.consent.refused(context, audience);
        refused = (!providers.is_empty()).then(|| audience.without_consent_to(&providers));
    }
    if refused.is_none() && !may_change(parts, &rules.log) {
        return None;
    }
    changed(parts, &rules.log, refused, notes)
}

/// Rules, and what they are made of; nothing if that is what it was before.
fn load(
    settings: &PrivacySettings,
    providers: &Named,
    sealing: &Sealing,
    before: Option<&Source>,
) -> Result<Option<(Source, Rules)>, PrivacyError> {
    let file = settings.file.clone().unwrap_or_default();
    let wrong = |errors| PrivacyError { file: file.clone(), errors };
    let text = match &settings.file {
        None => String::new(),
        Some(path) => read(path).map_err(|error| wrong(vec![format!("cannot be read: {error}")]))?,
    };
    let parsed =
        if settings.file.is_some() { file::parse(&text, providers) } else { Ok(RuleFile::default()) };
    let parsed = parsed.map_err(wrong)?;
    let wrong = |errors| PrivacyError { file: file.clone(), errors };
    let key = match &parsed.hash_key {
        None => settings.hash_key.clone(),
        Some(place) => Some(secret_at(place).map_err(|error| wrong(vec![format!("hash_key: {error}")]))?),
    };
    let source = Source { text, key };
    if before == Some(&source) {
        return Ok(None);
    }
    let rules = Rules::new(parsed, settings.pii_mode, source.key.as_ref(), sealing).map_err(wrong)?;
    Ok(Some((source, rules)))
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let why = format!("got more than {FILE_BYTES_MAX} bytes, want a file of rules");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use analytics_relay_providers::{
        EventId, EventKind, MoreParts, NotFor, Properties,
        event::{Audience, JsonObject},
        properties::Limits,
    };
    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;
    use crate::{reasons::PII_FIELDS, sealing::test_keys};

    /// Rules of a file, and where it is.
    pub(super) fn privacy(text: &str) -> (Arc<Privacy>, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("privacy.toml");
        fs::write(&file, text).unwrap();
        let settings = PrivacySettings {
            file: Some(file),
            pii_mode: PiiMode::Detect,
            hash_key: Some(Secret::new("0123456789abcdef")),
        };
        let sealing = test_keys("a");
        let privacy = Privacy::open(&settings, Named::default(), &sealing, PrivacyMetrics::default());
        (privacy.unwrap().unwrap(), dir)
    }

    fn without_file(pii_mode: PiiMode) -> Option<Arc<Privacy>> {
        let settings = PrivacySettings { pii_mode, ..PrivacySettings::default() };
        Privacy::open(&settings, Named::default(), &Sealing::default(), PrivacyMetrics::default()).unwrap()
    }

    pub(super) fn parts<'a>(properties: &'a str, context: &'a str) -> EventParts<'a> {
        let object = |json| JsonObject::parse(json, &Limits::NONE).unwrap();
        let more = MoreParts {
            context: (!context.is_empty()).then(|| object(context)),
            session_id: Some("session-1"),
            ..MoreParts::default()
        };
        EventParts {
            id: EventId::new("event-1-0123456789").unwrap(),
            kind: EventKind::Track { name: "Order Placed" },
            user_id: Some("user-1"),
            anonymous_id: Some("device-1"),
            time_ms: 1_767_225_600_000,
            accepted_ms: 1_767_225_600_456,
            ip: Some("203.0.113.77".parse().unwrap()),
            user_agent: Some("Browser/1.0"),
            properties: Properties::parse(properties, &Limits::NONE).unwrap(),
            more: (!context.is_empty()).then(|| Box::new(more)),
        }
    }

    fn written(event: &Event) -> Value {
        serde_json::from_slice(&event.to_json()).unwrap()
    }

    #[test]
    fn without_rules_nothing_is_asked_and_by_default_red_names_are_counted() {
        assert!(without_file(PiiMode::Off).is_none());
        let privacy = without_file(PiiMode::Detect).unwrap();
        for (properties, context, want) in [
            (r#"{"total":1}"#, "", &[][..]),
            (r#"{"author":1,"tokens":2}"#, r#"{"page":{"path":"/password"}}"#, &[]),
            (r#"{"a":[{"API-Key":1}],"token":2}"#, "", &["apikey", "token"]),
            ("{}", r#"{"traits":{"Pass_Word":"x"}}"#, &["password"]),
        ] {
            let parts = parts(properties, context);
            let (event, found) = privacy.pack(&parts);
            assert_eq!(event, Event::pack(&parts), "it is kept as it came");
            let counted: Vec<_> = (0..)
                .zip(PII_FIELDS)
                .filter(|(bit, _)| found.counted >> bit & 1 == 1)
                .map(|(_, it)| it)
                .collect();
            let mut want = want.to_vec();
            want.sort_by_key(|name| PII_FIELDS.iter().position(|field| field == name));
            assert_eq!(counted, want, "{properties} {context}");
            assert_eq!(found.is_nothing(), want.is_empty());
            privacy.count(found);
        }
        let count =
            |name| privacy.metrics.pii_keys[PII_FIELDS.iter().position(|it| *it == name).unwrap()].get();
        assert_eq!(["password", "apikey", "token", "secret", "added"].map(count), [1, 1, 1, 0, 0]);
    }

    #[test]
    fn in_standard_mode_red_names_are_in_no_file() {
        let privacy = without_file(PiiMode::Standard).unwrap();
        let parts = parts(r#"{"a":1,"p\u0061ssword":"x"}"#, r#"{"traits":{"ssn":"y","b":2}}"#);
        let (event, found) = privacy.pack(&parts);
        let json = written(&event);
        assert_eq!(
            (&json["properties"], &json["sent_context"]),
            (&json!({"a":1}), &json!({"traits":{"b":2}}))
        );
        assert!(!event.properties().shape().has_red_key());
        assert_eq!(found.done, [2, 0, 0, 0]);
        privacy.count(found);
        assert_eq!(privacy.metrics.fields[0].get(), 2);
    }

    #[test]
    fn an_event_is_logged_without_what_must_not_be_kept_and_its_ids_stay() {
        let (privacy, _dir) = privacy(
            "[global]\ndrop = [\"ssn\", \"user_id\"]\nhash = { email = \"meta\", user_agent = \"hmac\" }\n\
             cut = { ip = \"/24\", zip = 2 }",
        );
        let mut parts = parts(
            r#"{"ssn":1,"EMAIL":"John_Smith@gmail.com","zip":"94035","user_id":"x","n":9007199254740993}"#,
            r#"{"ip":"203.0.113.77","traits":{"email":"John_Smith@gmail.com"}}"#,
        );
        let enriched = JsonObject::parse(r#"{"v":1,"geo":{"city":"Berlin","zip":"10115"}}"#, &Limits::NONE);
        parts.more.as_mut().unwrap().enriched = Some(enriched.unwrap());
        let (event, found) = privacy.pack(&parts);
        let json = written(&event);
        let hash = "62a14e44f765419d10fea99367361a727c12365e2520f32218d505ed9aa0f62f";
        assert_eq!(
            event.properties().json(),
            format!(r#"{{"EMAIL":"{hash}","zip":"94","n":9007199254740993}}"#),
            "what stays is as it was"
        );
        assert_eq!(json["sent_context"], json!({"ip": "203.0.113.0", "traits": {"email": hash}}));
        assert_eq!(json["enriched"], json!({"v": 1, "geo": {"city": "Berlin", "zip": "10"}}));
        assert_eq!(json["context"]["ip"], "203.0.113.0");
        let agent = json["context"]["user_agent"].as_str().unwrap();
        assert!(agent.len() == 64 && !agent.contains("Browser"), "{agent}");
        assert_eq!((event.user_id(), event.anonymous_id()), (Some("user-1"), Some("device-1")));
        assert_eq!((event.id(), event.session_id()), (parts.id.clone(), Some("session-1")));
        assert_eq!((event.time_ms(), event.accepted_ms()), (parts.time_ms, parts.accepted_ms));
        assert_eq!(found.done, [2, 3, 4, 0]);
    }

    #[test]
    fn an_address_of_which_a_hash_is_wanted_is_not_there() {
        for (rule, ip, agent) in [
            ("hash = [\"ip\"]", None, Some("Browser/1.0")),
            ("drop = [\"ip\", \"User-Agent\"]", None, None),
            ("cut = { ip = 3, user_agent = 7 }", None, Some("Browser")),
            ("cut = { user_agent = \"/24\" }", Some("203.0.113.77"), None),
            ("drop = [\"ips\"]", Some("203.0.113.77"), Some("Browser/1.0")),
        ] {
            let (privacy, _dir) = privacy(&format!("[global]\n{rule}"));
            let (event, _) = privacy.pack(&parts("{}", ""));
            assert_eq!((event.ip(), event.user_agent()), (ip, agent), "{rule}");
        }
    }

    /// Before `integrations`, and whether there is a context or not.
    #[test]
    fn consent_says_who_gets_it() {
        let file = "[consent]\nmissing = \"deny\"\n[consent.categories]\nads = [\"mixpanel\"]\nstats = [\"amplitude\"]\n\
                    [global]\ndrop = [\"consent\"]";
        let (privacy, _dir) = privacy(file);
        let consented = r#"{"consent":{"categoryPreferences":{"ads":false,"stats":true}}}"#;
        let why = |parts: &EventParts<'_>| {
            let (event, _) = privacy.pack(parts);
            ["mixpanel", "amplitude", "segment"].map(|provider| event.why_not_for(provider))
        };
        let no = Some(NotFor::Consent);
        assert_eq!(why(&parts("{}", "")), [no, no, None]);
        assert_eq!(why(&parts("{}", consented)), [no, None, None], "it is read before it is dropped");
        let mut wanted = parts("{}", consented);
        wanted.more.as_mut().unwrap().audience = Audience::AllBut("mixpanel,segment".into());
        assert_eq!(why(&wanted), [no, None, Some(NotFor::Audience)]);
    }

    #[test]
    fn a_file_that_gets_bad_changes_nothing_and_one_that_is_mended_holds() {
        let (privacy, dir) = privacy("[global]\ndrop = [\"a\"]");
        let file = dir.path().join("privacy.toml");
        let left = || privacy.pack(&parts(r#"{"a":1,"b":2}"#, "")).0.properties().json().to_owned();
        assert_eq!(left(), r#"{"b":2}"#);
        for bad in ["[global]\ndrop = [\"b\"]\nhash = 1", "[globel]", "[providers.mixpannel]\ndeny = []"] {
            fs::write(&file, bad).unwrap();
            privacy.reload();
            assert_eq!(left(), r#"{"b":2}"#, "{bad}");
        }
        fs::remove_file(&file).unwrap();
        privacy.reload();
        assert_eq!(left(), r#"{"b":2}"#);
        assert_eq!(privacy.metrics.reload_failed.get(), 4);
        fs::write(&file, "[global]\ndrop = [\"b\"]").unwrap();
        privacy.reload();
        assert_eq!(left(), r#"{"a":1}"#);
        let rules = privacy.rules.load_full();
        privacy.reload();
        assert!(Arc::ptr_eq(&rules, &privacy.rules.load_full()), "the same file is not read into new rules");
        assert_eq!(privacy.metrics.reload_failed.get(), 4);
    }

    #[test]
    fn a_key_stands_in_another_file_and_one_that_is_changed_holds() {
        let dir = tempfile::tempdir().unwrap();
        let (file, key) = (dir.path().join("p.toml"), dir.path().join("key"));
        fs::write(&key, "0123456789abcdef\n").unwrap();
        fs::write(&file, format!("hash_key = 'file:{}'\n[global]\nhash = [\"a\"]", key.display())).unwrap();
        let settings = PrivacySettings { file: Some(file), ..PrivacySettings::default() };
        let open =
            || Privacy::open(&settings, Named::default(), &Sealing::default(), PrivacyMetrics::default());
        let privacy = open().unwrap().unwrap();
        let left = || privacy.pack(&parts(r#"{"a":"x"}"#, "")).0.properties().json().to_owned();
        let before = left();
        fs::write(&key, "fedcba9876543210\n").unwrap();
        privacy.reload();
        assert_ne!(left(), before);
        fs::write(&key, "short-s3cr3t").unwrap();
        let error = open().unwrap_err().to_string();
        assert!(error.contains("p.toml:\n  hash_key: got one that is too short"), "{error}");
        assert!(!error.contains("s3cr3t") && !format!("{privacy:?}").contains("0123456789"), "{error}");
    }

    #[test]
    fn what_is_too_large_to_be_rules_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.toml");
        fs::write(&file, "#".repeat(1024 * 1024 + 1)).unwrap();
        let settings = PrivacySettings { file: Some(file), ..PrivacySettings::default() };
        let error =
            Privacy::open(&settings, Named::default(), &Sealing::default(), PrivacyMetrics::default())
                .unwrap_err();
        assert!(error.to_string().contains("want a file of rules"), "{error}");
    }

    /// Mended and sent, an item that was kept becomes an event as it would have then.
    #[test]
    fn what_is_kept_of_a_refused_item_obeys_the_rules_of_the_log() {
        let (privacy, _dir) =
            privacy("[global]\ndrop = [\"email\", \"name\", \"event\"]\ncut = { ip = \"/24\" }");
        let raw = |json: &str| RawValue::from_string(json.to_owned()).unwrap();
        let kept =
            |json: &str| privacy.item(&raw(json)).map_or(json.to_owned(), |left| left.get().to_owned());
        let item =
            r#"{"event":"","name":"Home","userId":"u","email":"a@b","traits":{"email":"c@d","plan":1}}"#;
        assert_eq!(kept(item), r#"{"event":"","name":"Home","traits":{"plan":1},"userId":"u"}"#);
        for same in [r#"{"event": "","name":"Home"}"#, "7", r#"["email"]"#] {
            assert_eq!(kept(same), same);
        }
        assert_eq!(kept(r#"[{"email":1}]"#), "[{}]");
        // Of its own fields the one that is wrong: it is kept because it is.
        for (item, want) in [
            (r#"{"event":"x","userId":{"email":"a@b","id":1}}"#, r#"{"event":"x","userId":{"id":1}}"#),
            (r#"{"groupId":[{"email":"a@b"}],"type":"group"}"#, r#"{"groupId":[{}],"type":"group"}"#),
            (r#"{"event":{"password":"x"},"type":"track"}"#, r#"{"type":"track"}"#),
        ] {
            assert_eq!(kept(item), want, "{item}");
        }
        // Whom it is for is no property, whatever they are called, and their options are.
        let integrations = r#"{"All":false,"email":true,"Mixpanel":{"email":"a@b","n":1},"name":"x"}"#;
        let left = r#"{"All":false,"Mixpanel":{"n":1},"email":true}"#;
        assert_eq!(
            kept(&format!(r#"{{"integrations":{integrations}}}"#)),
            format!(r#"{{"integrations":{left}}}"#)
        );
        assert_eq!(privacy.integrations(&raw(integrations)).unwrap().get(), left);
        assert!(privacy.integrations(&raw(r#"{"All":true}"#)).is_none());
        let beside = privacy.beside_item(&raw(r#"{"name":"x","ip":"203.0.113.77"}"#)).unwrap();
        assert_eq!(beside.get(), r#"{"ip":"203.0.113.0"}"#);
        let seen = privacy.seen(Some("203.0.113.77".parse().unwrap()), "Browser");
        assert_eq!(seen, (Some("203.0.113.0".parse().unwrap()), "Browser".to_owned()));
    }
}

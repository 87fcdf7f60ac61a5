//! What the file and the settings say, put together: rules of the log and of each provider.

use std::{collections::BTreeMap, fmt, sync::Arc};

use analytics_relay_providers::{Secret, pii::RED_KEYS};

use super::{
    PiiMode,
    consent::Consent,
    file::{RuleFile, Section},
    keys::{Keys, plain},
    normalise::{Form, HashKey, What},
    rewrite::{Action, Cut, KeyRules, Rule},
    seal::SealForm,
};
use crate::sealing::Sealing;

/// Names that stand beside properties in an event, too, and are never changed there.
const IDS: [&str; 8] =
    ["userid", "anonymousid", "groupid", "previousid", "sessionid", "messageid", "eventid", "event"];

/// All rules that hold.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) log: KeyRules,
    /// Of providers that the file names.
    providers: BTreeMap<String, Arc<KeyRules>>,
    /// Of all others; nothing if there are none.
    others: Option<Arc<KeyRules>>,
    pub(super) consent: Consent,
    file: RuleFile,
    pii_mode: PiiMode,
}

impl Rules {
    /// Puts them together, or says all that does not fit.
    pub(super) fn new(
        file: RuleFile,
        pii_mode: PiiMode,
        key: Option<&Secret>,
        sealing: &Sealing,
    ) -> Result<Self, Vec<String>> {
        let pii_mode = file.pii.mode.unwrap_or(pii_mode);
        if let Some((provider, _)) = file.providers.iter().find(|(_, section)| !section.seal.is_empty())
            && !sealing.seals()
        {
            let want = "RELAY_KEK, RELAY_KEK_FILE or RELAY_KEK_COMMAND, and not none in its first place";
            return Err(vec![format!("providers.{provider}.seal: got no key to seal with, want {want}")]);
        }
        let hash_key = hash_key(&file, key)?;
        let log = log_rules(&file, pii_mode, hash_key.clone());
        let of_provider = |section: &Section| {
            let rules = provider_rules(section, &file, pii_mode);
            KeyRules { hash_key: hash_key.clone(), sealing: sealing.clone(), ..rules }
        };
        let providers =
            file.providers.iter().map(|(name, section)| (name.clone(), Arc::new(of_provider(section))));
        let providers = providers.collect();
        let others = of_provider(&Section::default());
        let others = (!others.keys.is_empty()).then(|| Arc::new(others));
        let consent = Consent::new(file.consent_missing_is_refused, &file.categories);
        Ok(Self { log, providers, others, consent, file, pii_mode })
    }

    /// What holds for a provider while it is sent to; nothing if it gets events as they are
    /// in the log.
    pub(super) fn of_provider(&self, name: &str) -> Option<&Arc<KeyRules>> {
        self.providers.get(name).or(self.others.as_ref())
    }

    /// What is odd about them, and works.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.file.unknown.clone();
        let is_hash =
            |name: &str| self.file.global.hash.iter().any(|(global, _)| plain(global) == plain(name));
        for (provider, section) in &self.file.providers {
            for (name, form) in section.hash.iter().filter(|(name, _)| is_hash(name)) {
                warnings.push(format!(
                    "providers.{provider}.hash.{name}: {} is made of what global.hash has left, a hash",
                    form.name()
                ));
            }
            for (name, _) in &section.seal {
                let place = format!("providers.{provider}.seal.{name}");
                if is_hash(name) {
                    warnings.push(format!("{place}: global.hash has left a hash of it"));
                }
                let is_it = |other: &String| plain(other) == plain(name);
                if section.allow.as_ref().is_some_and(|allow| !allow.iter().any(is_it)) {
                    warnings.push(format!(
                        "{place}: it is kept only within what providers.{provider}.allow names"
                    ));
                }
            }
        }
        for (what, name) in self.named() {
            if IDS.contains(&&*plain(name)) {
                warnings.push(format!(
                    "{what}: {name} is a rule for properties of this name; an event's own ids and its name are \
never changed"
                ));
            }
        }
        let unused = self.file.categories.iter().filter(|(_, providers)| providers.is_empty());
        warnings.extend(unused.map(|(category, _)| {
            format!("consent.categories.{category}: no provider is in it, so nobody is asked for it")
        }));
        warnings
    }

    /// Every name of a rule, with the place where it stands.
    fn named(&self) -> impl Iterator<Item = (String, &str)> {
        let sections =
            self.file.providers.iter().map(|(name, section)| (format!("providers.{name}"), section));
        let sections = std::iter::once(("global".to_owned(), &self.file.global)).chain(sections);
        sections.flat_map(|(what, section)| {
            let hash = section.hash.iter().map(|(name, _)| name);
            let cut = section.cut.iter().map(|(name, _)| name);
            let seal = section.seal.iter().map(|(name, _)| name);
            section
                .drop
                .iter()
                .chain(hash)
                .chain(cut)
                .chain(seal)
                .map(move |name| (what.clone(), name.as_str()))
        })
    }
}

/// What they do, line by line.
impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RuleFile { global, providers, categories, pii, .. } = &self.file;
        writeln!(f, "before the log: {}", in_words(global, "drop"))?;
        for (provider, section) in providers {
            writeln!(f, "{provider}: {}", in_words(section, "deny"))?;
        }
        for (category, names) in categories {
            let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
            writeln!(f, "consent to {category}: asked for {names}")?;
        }
        if !categories.is_empty() {
            let all = "events that say nothing about consent go to all of them";
            let none = "events that say nothing about consent go to none of them";
            writeln!(f, "{}", if self.file.consent_missing_is_refused { none } else { all })?;
        }
        let names = counted(&self.file).map(|(name, _)| name).collect::<Vec<_>>().join(", ");
        match self.pii_mode {
            PiiMode::Off => writeln!(f, "names of passwords, keys and cards are not looked for"),
            PiiMode::Detect => writeln!(f, "counted, and kept: {names}"),
            PiiMode::Standard => writeln!(f, "dropped before the log, and counted: {names}"),
        }?;
        if !pii.except.is_empty() {
            writeln!(f, "not looked for: {}", pii.except.join(", "))?;
        }
        Ok(())
    }
}

fn in_words(section: &Section, drop: &str) -> String {
    let hash = section.hash.iter().map(|(name, form)| format!("{name} ({})", form.name()));
    let cut = section.cut.iter().map(|(name, cut)| match cut {
        Cut::Ip { v4, v6 } => format!("{name} (/{v4}, IPv6 /{v6})"),
        Cut::Chars(chars) => format!("{name} ({chars} characters)"),
    });
    let seal = section.seal.iter().map(|(name, form)| match form {
        SealForm::Opaque => name.clone(),
        SealForm::Index => format!("{name} (index)"),
    });
    let parts = [
        section.allow.as_ref().map(|names| format!("only {}", names.join(", "))),
        (!section.drop.is_empty()).then(|| format!("{drop} {}", section.drop.join(", "))),
        (!section.hash.is_empty()).then(|| format!("hash {}", hash.collect::<Vec<_>>().join(", "))),
        (!section.cut.is_empty()).then(|| format!("cut {}", cut.collect::<Vec<_>>().join(", "))),
        (!section.seal.is_empty()).then(|| format!("seal {}", seal.collect::<Vec<_>>().join(", "))),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "everything as it came".to_owned() } else { parts.join("; ") }
}

/// The key of `hmac` and of `index`, which has to be there if somebody needs it.
fn hash_key(file: &RuleFile, key: Option<&Secret>) -> Result<Option<HashKey>, Vec<String>> {
    let key = match key {
        None => None,
        Some(secret) => match HashKey::new(secret) {
            Some(key) => Some(key),
            None => {
                return Err(vec![format!(
                    "hash_key: got one that is too short (***), want {}",
                    HashKey::want()
                )]);
            }
        },
    };
    let sections = std::iter::once(&file.global).chain(file.providers.values());
    let needs = |section: &Section| {
        let hmac = section.hash.iter().any(|(_, form)| *form == Form::Hmac);
        let index = section.seal.iter().any(|(_, form)| *form == SealForm::Index);
        let hmac = hmac.then_some("hash: got no key for \"hmac\"");
        hmac.or(index.then_some("seal: got no key for \"index\""))
    };
    if let Some(got) = sections.into_iter().find_map(needs).filter(|_| key.is_none()) {
        let got = format!("{got}, want hash_key in the file or PRIVACY_HASH_KEY");
        return Err(vec![format!("{got}: {}", HashKey::want())]);
    }
    Ok(key)
}

/// The names that are counted, and their places.
fn counted(file: &RuleFile) -> impl Iterator<Item = (String, u8)> {
    let except: Vec<String> = file.pii.except.iter().map(|name| plain(name)).collect();
    let known = (0..).zip(RED_KEYS).map(|(place, name)| (name.to_owned(), place));
    let added = RED_KEYS.len().try_into().unwrap_or(u8::MAX);
    let added = file.pii.add.iter().map(move |name| (plain(name), added));
    // Of one that is both, the known.
    added.chain(known).filter(move |(name, _)| !except.contains(name))
}

fn log_rules(file: &RuleFile, pii_mode: PiiMode, hash_key: Option<HashKey>) -> KeyRules {
    let mut rules: BTreeMap<String, Rule> = BTreeMap::new();
    if pii_mode != PiiMode::Off {
        let action = if pii_mode == PiiMode::Standard { Action::Drop } else { Action::Keep };
        let rule = |(name, place)| (name, Rule { action, counted: Some(place) });
        rules.extend(counted(file).map(rule));
    }
    // What the operator says of a name holds, and it is counted all the same.
    let mut only_red = pii_mode == PiiMode::Off || file.pii.add.is_empty();
    for (name, action) in actions(&file.global) {
        let counted = rules.get(&name).and_then(|rule| rule.counted);
        rules.insert(name, Rule { action, counted });
        only_red = false;
    }
    KeyRules { keys: Keys::new(rules), allow: None, hash_key, sealing: Sealing::default(), only_red }
}

/// A provider's own rules, and those of the log that may be done twice: so what stood in
/// the log before there was such a rule, or is replayed, obeys it as well. A hash may not,
/// as it cannot be told from what it was made of.
fn provider_rules(section: &Section, file: &RuleFile, pii_mode: PiiMode) -> KeyRules {
    let mut rules: BTreeMap<String, Action> = BTreeMap::new();
    if pii_mode == PiiMode::Standard {
        rules.extend(counted(file).map(|(name, _)| (name, Action::Drop)));
    }
    let mut only_red = file.pii.add.is_empty() && section.allow.is_none();
    let global = || actions(&file.global);
    // What is hashed before the log was not dropped there.
    global().filter(|(_, action)| matches!(action, Action::Hash(..))).for_each(|(name, _)| {
        rules.remove(&name);
    });
    let cuts = global().filter(|(_, action)| matches!(action, Action::Cut(_)));
    let drops = global().filter(|(_, action)| *action == Action::Drop);
    for (name, action) in cuts.chain(actions(section)).chain(drops) {
        rules.insert(name, action);
        only_red = false;
    }
    let rule = |(name, action)| (name, Rule { action, counted: None });
    let allow = section.allow.as_ref().map(|names| Keys::new(names.iter().map(|name| (plain(name), ()))));
    let keys = Keys::new(rules.into_iter().map(rule));
    KeyRules { keys, allow, hash_key: None, sealing: Sealing::default(), only_red }
}

fn actions(section: &Section) -> impl Iterator<Item = (String, Action)> {
    let drops = section.drop.iter().map(|name| (plain(name), Action::Drop));
    let hashes = section.hash.iter().map(|(name, form)| {
        let name = plain(name);
        let what = What::of(&name);
        (name, Action::Hash(*form, what))
    });
    let cuts = section.cut.iter().map(|(name, cut)| (plain(name), Action::Cut(*cut)));
    let seals = section.seal.iter().map(|(name, form)| (plain(name), Action::Seal(*form)));
    drops.chain(hashes).chain(cuts).chain(seals)
}

#[cfg(test)]
mod tests {
    use super::{
        super::file::{Named, parse},
        *,
    };
    use crate::{reasons::PII_FIELDS, sealing::test_keys};

    const KEY: &str = "0123456789abcdef";

    fn rules(text: &str, pii_mode: PiiMode) -> Rules {
        let key = Secret::new(KEY);
        let file = parse(text, &Named::only(["store"])).unwrap();
        Rules::new(file, pii_mode, Some(&key), &test_keys("a")).unwrap()
    }

    fn log_action(rules: &Rules, name: &str) -> Option<(Action, Option<u8>)> {
        rules.log.keys.get(name).map(|rule| (rule.action, rule.counted))
    }

    fn action_for(rules: &Rules, provider: &str, name: &str) -> Option<Action> {
        rules.of_provider(provider).and_then(|rules| rules.keys.get(name)).map(|rule| rule.action)
    }

    #[test]
    fn a_mode_says_what_becomes_of_red_names() {
        for (mode, want) in [
            (PiiMode::Detect, Some((Action::Keep, Some(0)))),
            (PiiMode::Standard, Some((Action::Drop, Some(0)))),
            (PiiMode::Off, None),
        ] {
            let rules = rules("", mode);
            assert_eq!(log_action(&rules, "password"), want);
            assert_eq!(log_action(&rules, "email"), None);
            assert!(rules.log.only_red);
            assert_eq!(rules.others.is_some(), mode == PiiMode::Standard);
        }
        let file = "[pii]\nmode = \"off\"";
        assert_eq!(log_action(&rules(file, PiiMode::Standard), "password"), None, "the file's mode holds");
    }

    #[test]
    fn the_file_adds_names_takes_some_away_and_has_the_last_word() {
        let file = "[pii]\nadd = [\"Tax-Id\"]\nexcept = [\"token\"]\n[global]\nhash = [\"ssn\"]";
        let rules = rules(file, PiiMode::Standard);
        assert_eq!(log_action(&rules, "tax_id"), Some((Action::Drop, Some(14))));
        assert_eq!(log_action(&rules, "token"), None);
        assert_eq!(log_action(&rules, "ssn"), Some((Action::Hash(Form::Hmac, What::Other), Some(12))));
        assert!(!rules.log.only_red);
        // What is hashed in the log is not dropped behind it.
        assert_eq!(action_for(&rules, "mixpanel", "ssn"), None);
        assert_eq!(action_for(&rules, "mixpanel", "taxid"), Some(Action::Drop));
        assert_eq!((PII_FIELDS[12], PII_FIELDS[14]), ("ssn", "added"));
    }

    #[test]
    fn what_may_be_done_twice_is_done_again_for_each_provider() {
        let file = "[global]\ndrop = [\"ssn\"]\nhash = [\"email\"]\ncut = { ip = \"/24\", zip = 2 }\n\
                    [providers.mixpanel]\ndeny = [\"ip\"]\nhash = { ssn = \"meta\" }\ncut = { zip = 1 }";
        let rules = rules(file, PiiMode::Detect);
        let ip = Action::Cut(Cut::Ip { v4: 24, v6: 48 });
        for (provider, name, want) in [
            ("amplitude", "ssn", Some(Action::Drop)),
            ("amplitude", "ip", Some(ip)),
            ("amplitude", "email", None),
            ("mixpanel", "ssn", Some(Action::Drop)),
            ("mixpanel", "ip", Some(Action::Drop)),
            ("mixpanel", "zip", Some(Action::Cut(Cut::Chars(1)))),
            ("mixpanel", "email", None),
        ] {
            assert_eq!(action_for(&rules, provider, name), want, "{provider} {name}");
        }
    }

    #[test]
    fn a_key_has_to_be_there_for_whom_needs_it_and_has_to_be_one() {
        let file = || parse("[providers.mixpanel]\nhash = [\"email\"]", &Named::default()).unwrap();
        let told = |key: Option<&str>| {
            let key = key.map(Secret::new);
            Rules::new(file(), PiiMode::Off, key.as_ref(), &Sealing::default())
                .map(|_| ())
                .unwrap_err()
                .join("\n")
        };
        assert!(told(None).contains("want hash_key in the file or PRIVACY_HASH_KEY"), "{}", told(None));
        assert!(told(Some("short")).contains("(***), want at least 16 bytes"), "{}", told(Some("short")));
        let meta = parse("[providers.mixpanel]\nhash = { email = \"meta\" }", &Named::default()).unwrap();
        assert!(Rules::new(meta, PiiMode::Off, None, &Sealing::default()).is_ok());
        for (seal, keys, got) in [
            (
                "[\"email\"]",
                Sealing::default(),
                "providers.store.seal: got no key to seal with, want RELAY_KEK",
            ),
            ("[\"email\"]", test_keys("none,a"), "providers.store.seal: got no key to seal with"),
            ("{ email = \"index\" }", test_keys("a"), "seal: got no key for \"index\", want hash_key"),
        ] {
            let file = format!("[providers.store]\nseal = {seal}");
            let file = parse(&file, &Named::only(["store"])).unwrap();
            let told = Rules::new(file, PiiMode::Off, None, &keys).map(|_| ()).unwrap_err().join("\n");
            assert!(told.starts_with(got), "{told}");
        }
    }

    #[test]
    fn what_is_odd_is_told() {
        let sealed =
            "[global]\nhash = [\"email\"]\n[providers.store]\nallow = [\"plan\"]\nseal = [\"e_mail\"]";
        let [hash, allow] = &rules(sealed, PiiMode::Detect).warnings()[..] else { panic!("two are odd") };
        assert!(
            hash.contains("seal.e_mail: global.hash has left") && allow.contains("within what"),
            "{hash} {allow}"
        );
        let file = "[global]\nhash = [\"email\"]\ndrop = [\"User ID\"]\n[consent.categories]\nads = []\n\
                    [providers.segment]\nhash = { email = \"google\" }";
        let warnings = rules(file, PiiMode::Detect).warnings();
        let [hash, id, category] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(hash.starts_with("providers.segment.hash.email: google is made of"), "{hash}");
        assert!(id.starts_with("global: User ID is a rule for properties"), "{id}");
        assert!(category.starts_with("consent.categories.ads: no provider"), "{category}");
    }

    #[test]
    fn what_they_do_is_told_in_words() {
        let file = "[global]\ndrop = [\"ssn\"]\ncut = { ip = \"/24\", zip = 3 }\n[consent]\nmissing = \"deny\"\n\
                    [consent.categories]\nads = [\"mixpanel\"]\n[pii]\nmode = \"standard\"\nexcept = [\"token\"]\n\
                    [providers.segment]\ndeny = [\"phone\"]\nhash = { email = \"google\" }\nallow = [\"plan\", \"email\"]\n\
                    [providers.store]\nseal = { email = \"index\", phone = \"opaque\" }";
        let told = rules(file, PiiMode::Detect).to_string();
        for line in [
            "before the log: drop ssn; cut ip (/24, IPv6 /48), zip (3 characters)",
            "segment: only plan, email; deny phone; hash email (google)",
            "store: seal email (index), phone",
            "consent to ads: asked for mixpanel",
            "events that say nothing about consent go to none of them",
            "not looked for: token",
        ] {
            assert!(told.lines().any(|told| told == line), "{line} is not in\n{told}");
        }
        assert!(told.contains("dropped before the log, and counted: password, "), "{told}");
        assert!(rules("", PiiMode::Off).to_string().starts_with("before the log: everything as it came"));
    }
}

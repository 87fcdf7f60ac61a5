//! The file of rules: TOML → [`RuleFile`]. All that is wrong is told at once, each with its
//! line, what came and what is wanted: a rule with a slip in it would protect nothing, and
//! nobody would notice.

use std::{collections::BTreeMap, ops::Range};

use analytics_relay_providers::registry::Vendor;
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue},
};

use super::{
    PiiMode,
    keys::{NAME_BYTES_MAX, plain},
    normalise::Form,
    rewrite::Cut,
    seal::SealForm,
};
use crate::reasons::STORE;

/// Most characters of a wrong value that are shown.
const SHOWN_CHARS_MAX: usize = 60;
/// How many bits of an address are kept where the file does not say it.
const V4_BITS: u8 = 24;
const V6_BITS: u8 = 48;

/// The providers that the file may name beside the vendors.
#[derive(Debug, Clone, Default)]
pub(crate) struct Named {
    names: Vec<String>,
    /// A program of which the relay is a part may have more.
    or_others: bool,
}

impl Named {
    /// These and no other.
    pub(crate) fn only<'n>(names: impl IntoIterator<Item = &'n str>) -> Self {
        Self { names: names.into_iter().map(str::to_owned).collect(), or_others: false }
    }

    /// These, and, with a warning, others: for commands, which cannot know all.
    pub(crate) fn at_least<'n>(names: impl IntoIterator<Item = &'n str>) -> Self {
        Self { or_others: true, ..Self::only(names) }
    }
}

/// What stands in the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct RuleFile {
    /// Before the log.
    pub(super) global: Section,
    pub(super) providers: BTreeMap<String, Section>,
    pub(super) consent_missing_is_refused: bool,
    /// Providers by category.
    pub(super) categories: BTreeMap<String, Vec<String>>,
    pub(super) pii: PiiSection,
    /// Where the key of `hmac` is.
    pub(super) hash_key: Option<String>,
    /// What names a provider that is not known here.
    pub(super) unknown: Vec<String>,
}

/// Rules for names, as they are written there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) drop: Vec<String>,
    pub(super) allow: Option<Vec<String>>,
    pub(super) hash: Vec<(String, Form)>,
    pub(super) cut: Vec<(String, Cut)>,
    /// Of the store alone.
    pub(super) seal: Vec<(String, SealForm)>,
}

/// Names that are counted, or dropped, beside or instead of those that are known.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PiiSection {
    pub(super) mode: Option<PiiMode>,
    pub(super) add: Vec<String>,
    pub(super) except: Vec<String>,
}

/// Reads the file. Providers that it may name are the vendors and these.
pub(super) fn parse(text: &str, providers: &Named) -> Result<RuleFile, Vec<String>> {
    let (table, bad) = DeTable::parse_recoverable(text);
    let mut reader = Reader { text, providers, errors: Vec::new(), unknown: Vec::new() };
    for error in bad {
        let line = error.span().map_or(1, |span| reader.line(span.start));
        reader.errors.push(format!("line {line}: {}", error.message()));
    }
    if !reader.errors.is_empty() {
        // What follows from it would only hide it.
        return Err(reader.errors);
    }
    let mut file = reader.file(table.get_ref());
    file.unknown = reader.unknown;
    if reader.errors.is_empty() { Ok(file) } else { Err(reader.errors) }
}

type Value<'a, 'i> = &'a Spanned<DeValue<'i>>;

struct Reader<'a> {
    text: &'a str,
    providers: &'a Named,
    errors: Vec<String>,
    unknown: Vec<String>,
}

impl Reader<'_> {
    fn file(&mut self, table: &DeTable<'_>) -> RuleFile {
        let mut file = RuleFile::default();
        for (name, value) in table {
            match name.get_ref().as_ref() {
                "global" => {
                    file.global = self.section("global", value, &["drop", "hash", "cut"]);
                }
                "consent" => self.consent(value, &mut file),
                "providers" => file.providers = self.provider_sections(value),
                "pii" => file.pii = self.pii(value),
                "hash_key" => file.hash_key = self.hash_key(value),
                other => {
                    let want = "global, consent, providers, pii or hash_key";
                    self.wrong(name.span(), other, "this name", want);
                }
            }
        }
        file
    }

    fn provider_sections(&mut self, value: Value<'_, '_>) -> BTreeMap<String, Section> {
        let mut sections = BTreeMap::new();
        for (name, value) in self.table("providers", value).into_iter().flatten() {
            let provider = name.get_ref().as_ref();
            let what = format!("providers.{provider}");
            if self.provider(&what, provider, name.span()) {
                // Vendors could not read what is sealed.
                let known = &["deny", "allow", "hash", "cut", "seal"];
                let known = if provider == STORE { &known[..] } else { &known[..4] };
                let section = self.section(&what, value, known);
                sections.insert(provider.to_owned(), section);
            }
        }
        sections
    }

    /// Rules for names; each name in at most one of them.
    fn section(&mut self, what: &str, value: Value<'_, '_>, known: &[&str]) -> Section {
        let mut section = Section::default();
        let mut named: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in self.table(what, value).into_iter().flatten() {
            let rule = name.get_ref().as_ref();
            let place = format!("{what}.{rule}");
            if !known.contains(&rule) {
                self.wrong(name.span(), &place, "this name", &known.join(", "));
                continue;
            }
            let names: Vec<(String, Range<usize>)> = match rule {
                "hash" => {
                    let want = "\"hmac\", \"meta\" or \"google\"";
                    let form = |text: &str| Form::ALL.into_iter().find(|form| form.name() == text);
                    self.forms(&place, value, &mut section.hash, Form::Hmac, form, want)
                }
                "seal" => {
                    let form = |text: &str| SealForm::ALL.into_iter().find(|form| form.name() == text);
                    let want = "\"opaque\" or \"index\"";
                    self.forms(&place, value, &mut section.seal, SealForm::Opaque, form, want)
                }
                "cut" => self.cut(&place, value, &mut section.cut),
                "allow" => {
                    let names = self.names(&place, value);
                    section.allow = Some(names.into_iter().map(|(name, _)| name).collect());
                    continue;
                }
                _ => {
                    let names = self.names(&place, value);
                    section.drop.extend(names.iter().map(|(name, _)| name.clone()));
                    names
                }
            };
            for (name, span) in names {
                if let Some(other) = named.insert(plain(&name), place.clone()).filter(|other| *other != place)
                {
                    self.wrong(
                        span,
                        &place,
                        &format!("{name:?}, which is in {other}, too"),
                        "each name once",
                    );
                }
            }
        }
        section
    }

    /// A list of names, which have the usual form, or a table of names and forms.
    fn forms<F: Copy>(
        &mut self,
        what: &str,
        value: Value<'_, '_>,
        forms: &mut Vec<(String, F)>,
        usual: F,
        form_of: impl Fn(&str) -> Option<F>,
        want: &str,
    ) -> Vec<(String, Range<usize>)> {
        if let DeValue::Array(_) = value.get_ref() {
            let names = self.names(what, value);
            forms.extend(names.iter().map(|(name, _)| (name.clone(), usual)));
            return names;
        }
        let mut names = Vec::new();
        for (name, value) in self.table(what, value).into_iter().flatten() {
            let Some(key) = self.name(what, name.get_ref(), name.span()) else { continue };
            match value.get_ref().as_str().and_then(&form_of) {
                Some(form) => forms.push((key.clone(), form)),
                None => self.wrong_value(&format!("{what}.{key}"), value, want),
            }
            names.push((key, name.span()));
        }
        names
    }

    fn cut(
        &mut self,
        what: &str,
        value: Value<'_, '_>,
        cuts: &mut Vec<(String, Cut)>,
    ) -> Vec<(String, Range<usize>)> {
        let mut names = Vec::new();
        for (name, value) in self.table(what, value).into_iter().flatten() {
            let Some(key) = self.name(what, name.get_ref(), name.span()) else { continue };
            let cut = match value.get_ref() {
                DeValue::String(text) => bits(text),
                DeValue::Integer(number) => number.as_str().parse().ok().map(Cut::Chars),
                _ => None,
            };
            match cut {
                Some(cut) => cuts.push((key.clone(), cut)),
                None => {
                    let want =
                        "the bits of an address, as in \"/24\" or \"/24,/48\", or a number of characters";
                    self.wrong_value(&format!("{what}.{key}"), value, want);
                }
            }
            names.push((key, name.span()));
        }
        names
    }

    fn consent(&mut self, value: Value<'_, '_>, file: &mut RuleFile) {
        for (name, value) in self.table("consent", value).into_iter().flatten() {
            match name.get_ref().as_ref() {
                "missing" => match value.get_ref().as_str() {
                    Some("allow") => file.consent_missing_is_refused = false,
                    Some("deny") => file.consent_missing_is_refused = true,
                    _ => self.wrong_value("consent.missing", value, "\"allow\" or \"deny\""),
                },
                "categories" => file.categories = self.categories(value),
                other => {
                    let what = format!("consent.{other}");
                    self.wrong(name.span(), &what, "this name", "missing or categories");
                }
            }
        }
    }

    fn categories(&mut self, value: Value<'_, '_>) -> BTreeMap<String, Vec<String>> {
        let mut categories = BTreeMap::new();
        for (name, value) in self.table("consent.categories", value).into_iter().flatten() {
            let category = name.get_ref().as_ref();
            let what = format!("consent.categories.{category}");
            let mut providers: Vec<String> = Vec::new();
            for (provider, span) in self.texts(&what, value, "a list of providers") {
                if self.provider(&what, &provider, span) && !providers.contains(&provider) {
                    providers.push(provider);
                }
            }
            categories.insert(category.to_owned(), providers);
        }
        categories
    }

    fn pii(&mut self, value: Value<'_, '_>) -> PiiSection {
        let mut pii = PiiSection::default();
        for (name, value) in self.table("pii", value).into_iter().flatten() {
            let names = |reader: &mut Self, what| -> Vec<String> {
                reader.names(what, value).into_iter().map(|(name, _)| name).collect()
            };
            match name.get_ref().as_ref() {
                "mode" => {
                    let mode = value.get_ref().as_str();
                    pii.mode = PiiMode::ALL.into_iter().find(|known| mode == Some(known.name()));
                    if pii.mode.is_none() {
                        self.wrong_value("pii.mode", value, "\"detect\", \"standard\" or \"off\"");
                    }
                }
                "add" => pii.add = names(self, "pii.add"),
                "except" => pii.except = names(self, "pii.except"),
                other => {
                    let what = format!("pii.{other}");
                    self.wrong(name.span(), &what, "this name", "mode, add or except");
                }
            }
        }
        pii
    }

    /// What it holds is never shown: it may be the key itself.
    fn hash_key(&mut self, value: Value<'_, '_>) -> Option<String> {
        let reference = value.get_ref().as_str().filter(|text| {
            let name = text.strip_prefix("env:").or_else(|| text.strip_prefix("file:"));
            name.is_some_and(|name| !name.is_empty())
        });
        if reference.is_none() {
            self.wrong(value.span(), "hash_key", "what says no place (***)", "\"env:NAME\" or \"file:PATH\"");
        }
        reference.map(str::to_owned)
    }

    fn table<'a, 'i>(&mut self, what: &str, value: Value<'a, 'i>) -> Option<&'a DeTable<'i>> {
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong_value(what, value, "a table");
            return None;
        };
        Some(table)
    }

    fn names(&mut self, what: &str, value: Value<'_, '_>) -> Vec<(String, Range<usize>)> {
        let texts = self.texts(what, value, "a list of names");
        texts
            .into_iter()
            .filter_map(|(name, span)| Some((self.name(what, &name, span.clone())?, span)))
            .collect()
    }

    fn texts(&mut self, what: &str, value: Value<'_, '_>, want: &str) -> Vec<(String, Range<usize>)> {
        let empty = DeArray::default();
        let items = match value.get_ref() {
            DeValue::Array(items) => items,
            _ => {
                self.wrong_value(what, value, want);
                &empty
            }
        };
        let mut texts = Vec::new();
        for item in items {
            match item.get_ref() {
                DeValue::String(text) => texts.push((text.clone().into_owned(), item.span())),
                _ => self.wrong_value(what, item, want),
            }
        }
        texts
    }

    fn name(&mut self, what: &str, name: &str, span: Range<usize>) -> Option<String> {
        let bytes = plain(name).len();
        if (1..=NAME_BYTES_MAX).contains(&bytes) {
            return Some(name.to_owned());
        }
        let want =
            format!("the whole name of a property, 1 to {NAME_BYTES_MAX} bytes beside _, - and blanks");
        self.wrong(span, what, &format!("{:?}", cut(name)), &want);
        None
    }

    /// True if there is such a provider: a slip in its name would protect nobody from it.
    fn provider(&mut self, what: &str, name: &str, span: Range<usize>) -> bool {
        /// Letters that may differ in a slip.
        const DISTANCE_MAX: usize = 2;
        let vendors = Vendor::ALL.map(Vendor::name);
        let own = self.providers.names.iter().map(String::as_str).filter(|name| !vendors.contains(name));
        let known: Vec<_> = vendors.into_iter().chain(own).collect();
        let is_known = known.contains(&name);
        let is_slip = || known.iter().any(|known| strsim::damerau_levenshtein(known, name) <= DISTANCE_MAX);
        if !is_known && self.providers.or_others && !is_slip() {
            let line = self.line(span.start);
            let why = "a relay without a provider of this name does not start with it";
            self.unknown.push(format!("line {line}: {what}: {:?} is not known here; {why}", cut(name)));
            return true;
        }
        if !is_known {
            self.wrong(span, what, &format!("{:?}", cut(name)), &format!("one of {}", known.join(", ")));
        }
        is_known
    }

    fn wrong_value(&mut self, what: &str, value: Value<'_, '_>, want: &str) {
        let got = self.text.get(value.span()).unwrap_or_default();
        self.wrong(value.span(), what, &cut(got), want);
    }

    fn wrong(&mut self, span: Range<usize>, what: &str, got: &str, want: &str) {
        let line = self.line(span.start);
        self.errors.push(format!("line {line}: {what}: got {got}, want {want}"));
    }

    fn line(&self, at: usize) -> usize {
        self.text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
    }
}

/// As in `/24` or `/24,/48`, in any order.
fn bits(text: &str) -> Option<Cut> {
    let (mut v4, mut v6) = (None, None);
    for part in text.split(',') {
        let bits: u8 = part.trim().strip_prefix('/')?.parse().ok()?;
        // The first of two is IPv4's; alone it is whichever it can be.
        match (bits, v4) {
            (0..=32, None) => v4 = Some(bits),
            (0..=128, _) if v6.is_none() => v6 = Some(bits),
            _ => return None,
        }
    }
    Some(Cut::Ip { v4: v4.unwrap_or(V4_BITS), v6: v6.unwrap_or(V6_BITS) })
}

/// On one line, and not too long.
fn cut(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None if line.len() < text.len() => format!("{line}…"),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(text: &str) -> Vec<String> {
        parse(text, &Named::only(["store"])).unwrap_err()
    }

    #[test]
    fn a_file_says_what_is_kept_and_who_gets_what() {
        let text = r#"
            hash_key = "env:PRIVACY_KEY"
            [global]
            drop = ["ssn", "Pass Phrase"]
            hash = ["email"]
            cut = { ip = "/24", "zip" = 3, last_ip = "/16,/32" }
            [consent]
            missing = "deny"
            [consent.categories]
            Advertising = ["mixpanel", "store", "mixpanel"]
            C0004 = []
            [providers.mixpanel]
            deny = ["phone"]
            hash = { email = "meta", name = "google", note = "hmac" }
            [providers.store]
            allow = ["plan", "price"]
            seal = { phone = "index", street = "opaque" }
            [pii]
            mode = "standard"
            add = ["iban_number"]
            except = ["token"]
        "#;
        let file = parse(text, &Named::only(["store"])).unwrap();
        assert_eq!(file.hash_key.as_deref(), Some("env:PRIVACY_KEY"));
        assert_eq!(file.global.drop, ["ssn", "Pass Phrase"]);
        assert_eq!(file.global.hash, [("email".to_owned(), Form::Hmac)]);
        let cuts = [
            ("ip", Cut::Ip { v4: 24, v6: 48 }),
            ("last_ip", Cut::Ip { v4: 16, v6: 32 }),
            ("zip", Cut::Chars(3)),
        ];
        assert_eq!(file.global.cut, cuts.map(|(name, cut)| (name.to_owned(), cut)));
        let seals = [("phone", SealForm::Index), ("street", SealForm::Opaque)];
        assert_eq!(file.providers["store"].seal, seals.map(|(name, form)| (name.to_owned(), form)));
        let of_list = parse("[providers.store]\nseal = [\"a\"]", &Named::only(["store"])).unwrap();
        assert_eq!(of_list.providers["store"].seal, [("a".to_owned(), SealForm::Opaque)]);
        assert!(file.consent_missing_is_refused);
        assert_eq!(file.categories["Advertising"], ["mixpanel", "store"]);
        assert!(file.categories["C0004"].is_empty());
        assert_eq!(file.providers["mixpanel"].drop, ["phone"]);
        assert_eq!(file.providers["mixpanel"].hash.len(), 3);
        assert_eq!(
            file.providers["store"].allow.as_deref(),
            Some(&["plan".to_owned(), "price".to_owned()][..])
        );
        assert_eq!(file.pii.mode, Some(PiiMode::Standard));
        assert_eq!(parse("", &Named::default()).unwrap(), RuleFile::default());
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once_with_its_line() {
        let text = r#"hash_key = "s3cr3t"
globel = 1
[global]
drop = ["ssn", 7, "_"]
hash = { email = "sha1", "E-Mail" = "meta" }
cut = { ip = "24", zip = -1, SSN = 2 }
allow = ["x"]
[consent]
missing = "ask"
categories = { Advertising = ["mixpannel"] }
[providers.mixpannel]
deny = "email"
[providers.amplitude]
drop = ["email"]
deny = "email"
[pii]
mode = "strict"
"#;
        let found = errors(text);
        for want in [
            "line 1: hash_key: got what says no place (***), want \"env:NAME\" or \"file:PATH\"",
            "line 2: globel: got this name, want global, consent, providers, pii or hash_key",
            "line 4: global.drop: got 7, want a list of names",
            "line 4: global.drop: got \"_\", want the whole name of a property, 1 to 64 bytes beside _, - and blanks",
            "line 5: global.hash.email: got \"sha1\", want \"hmac\", \"meta\" or \"google\"",
            "line 6: global.cut.ip: got \"24\", want the bits of an address, as in \"/24\" or \"/24,/48\", or a number of characters",
            "line 6: global.cut.zip: got -1, want the bits of an address, as in \"/24\" or \"/24,/48\", or a number of characters",
            "line 7: global.allow: got this name, want drop, hash, cut",
            "line 9: consent.missing: got \"ask\", want \"allow\" or \"deny\"",
            "line 10: consent.categories.Advertising: got \"mixpannel\", want one of mixpanel, amplitude, segment, store",
            "line 11: providers.mixpannel: got \"mixpannel\", want one of mixpanel, amplitude, segment, store",
            "line 14: providers.amplitude.drop: got this name, want deny, allow, hash, cut",
            "line 15: providers.amplitude.deny: got \"email\", want a list of names",
            "line 17: pii.mode: got \"strict\", want \"detect\", \"standard\" or \"off\"",
        ] {
            assert!(found.iter().any(|error| error == want), "{want} is not in {found:#?}");
        }
        let twice = |error: &&String| error.contains("each name once");
        assert_eq!(found.iter().filter(twice).count(), 1, "{found:#?}");
        assert!(!found.iter().any(|error| error.contains("s3cr3t")));
        assert_eq!(found.len(), 15, "{found:#?}");
    }

    /// A command does not know what providers a program adds; a slip it knows.
    #[test]
    fn a_provider_that_may_be_anothers_is_told_of_and_a_slip_is_wrong() {
        let text = "[providers.warehouse]\ndeny = [\"a\"]\n[consent.categories]\nads = [\"warehouse\"]\n";
        let file = parse(text, &Named::at_least(["store"])).unwrap();
        assert_eq!(file.providers["warehouse"].drop, ["a"]);
        let why =
            "\"warehouse\" is not known here; a relay without a provider of this name does not start with it";
        let places = ["line 4: consent.categories.ads", "line 1: providers.warehouse"];
        assert_eq!(file.unknown, places.map(|place| format!("{place}: {why}")));
        assert_eq!(errors(text).len(), 2);
        for slip in ["mixpannel", "stroe", "Segment"] {
            let text = format!("[providers.{slip}]\ndeny = []");
            let errors = parse(&text, &Named::at_least(["store"])).unwrap_err();
            assert!(errors[0].starts_with(&format!("line 1: providers.{slip}: got")), "{errors:?}");
        }
    }

    #[test]
    fn what_is_no_toml_is_told_by_its_line() {
        let found = errors("[global]\ndrop = [\"a\"\n\nx = = 1\n");
        assert!(found[0].starts_with("line "), "{found:?}");
        let found = errors("[global]\ndrop = []\ndrop = []\n");
        assert!(found[0].starts_with("line 3: duplicate key"), "{found:?}");
    }

    #[test]
    fn bits_are_of_ipv4_of_ipv6_or_of_both() {
        for (text, want) in [
            ("/24", Some((24, 48))),
            ("/64", Some((24, 64))),
            ("/16,/56", Some((16, 56))),
            ("/8 , /20", Some((8, 20))),
            ("/0,/0", Some((0, 0))),
            ("24", None),
            ("/129", None),
            ("/24,/48,/48", None),
            ("", None),
            ("/", None),
        ] {
            assert_eq!(bits(text), want.map(|(v4, v6)| Cut::Ip { v4, v6 }), "{text:?}");
        }
    }
}

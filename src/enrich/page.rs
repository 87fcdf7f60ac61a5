//! On which page an event happened, and who led somebody there: page, campaign, click ids and
//! referrer from what the event says; source and channel from those.
//!
//! Two steps, so that what is wrong with one costs not the other. Neither waits, and both look
//! at a bounded part of whatever came.

use std::{borrow::Cow, fmt, path::PathBuf, sync::LazyLock};

use memchr::memmem::Finder;
use serde::{
    Deserializer, Serialize, Serializer,
    de::{DeserializeSeed, MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::value::RawValue;

use crate::settings::Reader;

mod address;
mod campaign;
mod channel;
mod host;
mod parameters;
mod referrer;
mod source;

use address::{Address, cut, push_printable};
pub use campaign::{Campaign, Clicks};
use campaign::{Found, text};
use channel::Facts;
use parameters::{Known, Parameter, parameters};
pub use referrer::Referrer;
pub use source::SourcesError;
use source::{Kind, Source, Sources};

/// Most bytes of an address that is kept.
const URL_BYTES_MAX: usize = 2_000;
/// Who marks clicks with what, by the words that the tables know them by; where nothing else
/// names a source.
const CLICK_SOURCES: [(&str, &[&str]); 6] = [
    ("google", &["gclid", "gbraid", "wbraid"]),
    ("bing", &["msclkid"]),
    ("facebook", &["fbclid"]),
    ("tiktok", &["ttclid"]),
    ("twitter", &["twclid"]),
    ("linkedin", &["li_fat_id"]),
];

/// What of pages is kept, and who is one's own.
#[derive(Debug, Clone, Default)]
pub struct PageSettings {
    /// What of an address's query is kept.
    pub url_query: UrlQuery,
    /// Click ids are kept with their values, not by their names alone.
    pub click_id_values: bool,
    /// Domains whose pages lead nobody to one's own: they are.
    pub site_domains: Vec<String>,
    /// The operator's own table of sources.
    pub sources_file: Option<PathBuf>,
}

/// What of an address's query is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UrlQuery {
    /// What says where somebody came from. The rest may hold tokens and addresses.
    #[default]
    Allowed,
    /// All of it.
    Keep,
    /// Nothing.
    Drop,
}

impl PageSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let queries = [("allow", UrlQuery::Allowed), ("keep", UrlQuery::Keep), ("drop", UrlQuery::Drop)];
        let url_query = reader.one_of("URL_QUERY", &queries);
        let click_id_values = reader.one_of("CLICK_IDS", &[("name", false), ("value", true)]);
        let site_domains = site_domains(reader);
        let path = reader.text("SOURCES_FILE");
        let sources_file = (!path.is_empty()).then(|| PathBuf::from(path));
        Self { url_query, click_id_values, site_domains, sources_file }
    }
}

fn site_domains(reader: &mut Reader) -> Vec<String> {
    let text = reader.text("SITE_DOMAINS");
    let mut domains = Vec::new();
    for domain in text.split(',').map(str::trim).filter(|domain| !domain.is_empty()) {
        match host::normal(domain).filter(|host| !host.starts_with('[')) {
            Some(host) => domains.push(host::without_www(&host).to_owned()),
            None => reader.wrong("SITE_DOMAINS", domain, "domains such as shop.example, separated by commas"),
        }
    }
    domains
}

/// Finds all of it.
#[derive(Debug)]
pub struct Pages {
    settings: PageSettings,
    sources: Sources,
}

/// What an event says of its page, as it stands there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageInput<'a> {
    /// True for an event that is a view of a page, whatever else it says.
    pub is_view: bool,
    /// Its address.
    pub url: Option<Cow<'a, str>>,
    /// Where nothing says more: of a page whose host is not told.
    pub path: Option<Cow<'a, str>>,
    /// Where somebody came from.
    pub referrer: Option<Cow<'a, str>>,
    /// What the caller says of a campaign: JSON.
    pub campaign: Option<&'a str>,
}

/// What was found; as JSON, an object of what there is.
#[derive(Debug, Default, Serialize)]
pub struct PageFound<'a> {
    /// The page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page: Option<Page>,
    /// The campaign that led there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub campaign: Option<Campaign<'a>>,
    /// The click ids in its address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clicks: Option<Clicks<'a>>,
    /// Who led there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub referrer: Option<Referrer<'a>>,
    /// Whom to thank, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Cow<'a, str>>,
    /// In which of nineteen ways.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<&'static str>,
    /// True if whoever refers does so only to be looked at: no visit of a person.
    #[serde(skip)]
    pub is_spam: bool,
    /// Whom the address's `source` or `ref` names.
    #[serde(skip)]
    named: Option<Cow<'a, str>>,
    #[serde(skip)]
    is_view: bool,
}

impl PageFound<'_> {
    /// True if nothing was found.
    pub fn is_empty(&self) -> bool {
        self.page.is_none()
            && self.campaign.is_none()
            && self.clicks.is_none()
            && self.referrer.is_none()
            && self.channel.is_none()
    }
}

impl Pages {
    /// Reads the operator's table, if there is one.
    pub fn new(settings: PageSettings) -> Result<Self, SourcesError> {
        let sources = Sources::new(settings.sources_file.clone())?;
        Ok(Self { settings, sources })
    }

    /// Reads the operator's table again if its file is another one now; says if it was. If
    /// it cannot be used, what was read last stays. Waits for the disk.
    pub fn reload(&self) -> Result<bool, SourcesError> {
        self.sources.reload()
    }

    /// Which tables name the sources.
    pub fn stamp(&self) -> Cow<'static, str> {
        self.sources.stamp()
    }

    /// Both steps.
    pub fn find<'a>(&self, input: &'a PageInput<'_>) -> PageFound<'a> {
        let mut found = self.page(input);
        self.source(&mut found);
        found
    }

    /// The first step: all but source and channel.
    pub fn page<'a>(&self, input: &'a PageInput<'_>) -> PageFound<'a> {
        let address = input.url.as_deref().and_then(Address::of);
        let mut found = Found { clicks: Clicks::new(self.settings.click_id_values), ..Found::default() };
        if let Some(json) = input.campaign {
            found.campaign = Campaign::of_json(json);
        }
        let page = match &address {
            Some(address) => Some(self.read(address, &mut found)),
            None => input.path.as_deref().and_then(Page::of_path),
        };
        let page_host = address.as_ref().map(|address| &*address.host);
        let referrer = input.referrer.as_deref();
        let referrer = referrer.and_then(|text| Referrer::of(text, page_host, &self.settings.site_domains));
        let Found { campaign, clicks, named: [source, reference] } = found;
        PageFound {
            page,
            campaign: (!campaign.is_empty()).then_some(campaign),
            clicks: (!clicks.is_empty()).then_some(clicks),
            referrer,
            named: source.or(reference),
            is_view: input.is_view,
            ..PageFound::default()
        }
    }

    /// The second step: source and channel, of what the first one found; nothing where that
    /// is nothing.
    pub fn source(&self, found: &mut PageFound<'_>) {
        if !found.is_view && found.is_empty() && found.named.is_none() {
            return;
        }
        let referring = found.referrer.as_ref().and_then(|referrer| self.sources.of_host(&referrer.host));
        let is_spam =
            |source: &Option<Source>| source.as_ref().is_some_and(|source| source.kind == Kind::Spam);
        found.is_spam = is_spam(&referring);
        let (name, source) = self.name(found, referring);
        found.is_spam |= is_spam(&source);
        found.channel = Some(channel::of(&Facts {
            has_source: name.is_some(),
            source: source.as_ref(),
            campaign: found.campaign.as_ref(),
            clicks: found.clicks.as_ref(),
        }));
        found.source = name;
    }

    /// The page that an address is of, as far as it is kept, and what its parameters say.
    fn read<'a>(&self, address: &Address<'a>, found: &mut Found<'a>) -> Page {
        let mut page = Page::begin(address);
        // Where a page is shown by what is behind a `#/`, that has parameters of its own.
        let (fragment, in_fragment) = match address.fragment.strip_prefix('/') {
            Some(_) => address.fragment.split_once('?').unwrap_or((address.fragment, "")),
            None => ("", ""),
        };
        for (beginning, path, query) in [("", "", address.query), ("#", fragment, in_fragment)] {
            if !path.is_empty() && !page.push_whole(beginning, |to| push_printable(to, path)) {
                break;
            }
            let mut beginning = "?";
            for parameter in parameters(query) {
                let known = parameter.known();
                if let Some(known) = known {
                    found.take(known, &parameter);
                }
                if self.keeps(known) && page.push_whole(beginning, |to| self.push(to, &parameter, known)) {
                    beginning = "&";
                }
            }
        }
        page
    }

    fn keeps(&self, known: Option<Known>) -> bool {
        match self.settings.url_query {
            UrlQuery::Allowed => known.is_some(),
            UrlQuery::Keep => true,
            UrlQuery::Drop => false,
        }
    }

    /// Adds a parameter as it was sent; of a click id its name, unless its value is wanted.
    fn push(&self, to: &mut String, parameter: &Parameter<'_>, known: Option<Known>) {
        match known {
            Some(Known::ClickId(_)) if !self.settings.click_id_values => parameter.push_name(to),
            _ => push_printable(to, parameter.text),
        }
    }

    /// Whom to thank, and what the tables say of it: the one whom the campaign names, or the
    /// address, or the referrer, of which is known what it is, or who marked the click.
    fn name<'a>(
        &self,
        found: &PageFound<'a>,
        referring: Option<Source>,
    ) -> (Option<Cow<'a, str>>, Option<Source>) {
        let named = found.campaign.as_ref().and_then(|campaign| campaign.source.as_ref());
        let (name, source) = if let Some(name) = named.or(found.named.as_ref()) {
            (name.clone(), self.of_text(name))
        } else if let Some(referrer) = &found.referrer {
            (referrer.host.clone(), referring)
        } else {
            let has =
                |(_, names): &(&str, &[&str])| found.clicks.as_ref().is_some_and(|clicks| clicks.has(names));
            let Some((word, _)) = CLICK_SOURCES.iter().find(|row| has(row)) else { return (None, None) };
            (Cow::Borrowed(*word), self.sources.of_word(word))
        };
        let known_as = source.as_ref().and_then(|source| source.name.clone());
        (Some(known_as.unwrap_or(name)), source)
    }

    /// Of what a link calls its source: a word, or a host.
    fn of_text(&self, name: &str) -> Option<Source> {
        if !name.contains('.') {
            return self.sources.of_word(name);
        }
        let host = match name.strip_prefix(referrer::APP) {
            Some(_) => name.into(),
            None => host::normal(name)?,
        };
        self.sources.of_host(host::without_www(&host))
    }
}

/// A page, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The address; of a page whose host is not told the path alone.
    text: String,
    host_start: usize,
    host_end: usize,
    path_end: usize,
}

impl Page {
    /// Host and path.
    fn begin(address: &Address<'_>) -> Self {
        let mut text = String::with_capacity(
            "https://".len() + address.host.len() + address.path.len() + address.query.len().min(256),
        );
        text.push_str(address.scheme);
        text.push_str("://");
        let host_start = text.len();
        text.push_str(&address.host);
        let host_end = text.len();
        push_printable(&mut text, cut(address.path, URL_BYTES_MAX - host_end));
        let path_end = text.len();
        Self { text, host_start, host_end, path_end }
    }

    /// Of a path alone.
    fn of_path(path: &str) -> Option<Self> {
        let path = path.split(['?', '#']).next().filter(|path| path.starts_with('/'))?;
        let mut text = String::new();
        push_printable(&mut text, cut(path, URL_BYTES_MAX));
        let path_end = text.len();
        Some(Self { text, host_start: 0, host_end: 0, path_end })
    }

    /// Adds something if there is room for all of it; says if there was.
    fn push_whole(&mut self, beginning: &str, push: impl FnOnce(&mut String)) -> bool {
        let before = self.text.len();
        self.text.push_str(beginning);
        push(&mut self.text);
        let fits = self.text.len() <= URL_BYTES_MAX;
        if !fits {
            self.text.truncate(before);
        }
        fits
    }

    /// With what is kept of its parameters; nothing if its host is not told.
    pub fn url(&self) -> Option<&str> {
        (self.host_end > 0).then_some(&*self.text)
    }

    /// Lower case, as DNS has it, without port.
    pub fn host(&self) -> Option<&str> {
        Some(&self.text[self.host_start..self.host_end]).filter(|host| !host.is_empty())
    }

    /// As it was sent.
    pub fn path(&self) -> &str {
        &self.text[self.host_end..self.path_end]
    }
}

impl Serialize for Page {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if let (Some(url), Some(host)) = (self.url(), self.host()) {
            map.serialize_entry("url", url)?;
            map.serialize_entry("host", host)?;
        }
        map.serialize_entry("path", self.path())?;
        map.end()
    }
}

impl<'a> PageInput<'a> {
    /// What an event's context says of its page; and of a view of a page, where that says
    /// nothing, its properties. Both are JSON.
    pub fn from_json(context: Option<&'a str>, properties: &'a str, is_view: bool) -> Self {
        let mut input = Self { is_view, ..Self::default() };
        let context = context.filter(|json| says_of_pages(json));
        let [page, campaign, referrer] =
            context.map_or([None; 3], |json| pick(json, &["page", "campaign", "referrer"]));
        if let Some(page) = page {
            input.take_page(pick(page, &["url", "path", "referrer"]));
        }
        input.campaign = campaign;
        // Segment's is an object.
        let referrer = referrer
            .and_then(|json| if json.starts_with('{') { pick(json, &["url"])[0] } else { Some(json) });
        input.take_page([None, None, referrer]);
        if is_view && (input.url.is_none() || input.referrer.is_none()) {
            input.take_page(pick(properties, &["url", "path", "referrer"]));
        }
        input
    }

    fn take_page(&mut self, values: [Option<&'a str>; 3]) {
        for (slot, json) in [&mut self.url, &mut self.path, &mut self.referrer].into_iter().zip(values) {
            let is_text = |json: &&str| json.starts_with('"');
            *slot = slot.take().or_else(|| text(json.filter(is_text)?)).filter(|text| !text.is_empty());
        }
    }
}

/// The values of some names of an object, as they stand; of one that occurs twice the last
/// one.
fn pick<'a, const N: usize>(json: &'a str, names: &'static [&'static str; N]) -> [Option<&'a str>; N] {
    serde_json::Deserializer::from_str(json).deserialize_map(Picked(names)).unwrap_or([None; N])
}

struct Picked<const N: usize>(&'static [&'static str; N]);

impl<'de, const N: usize> Visitor<'de> for Picked<N> {
    type Value = [Option<&'de str>; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = [None; N];
        while let Some(place) = map.next_key_seed(PlaceIn(self.0))? {
            match place {
                Some(place) => values[place] = Some(map.next_value::<&RawValue>()?.get()),
                None => drop(map.next_value::<serde::de::IgnoredAny>()?),
            }
        }
        Ok(values)
    }
}

/// Where a name stands among some.
struct PlaceIn(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for PlaceIn {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for PlaceIn {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().position(|it| *it == name))
    }
}

/// False for a context that need not be read, as most of those that servers send.
fn says_of_pages(context: &str) -> bool {
    static NAMES: LazyLock<[Finder<'static>; 3]> =
        LazyLock::new(|| ["\"page\"", "\"campaign\"", "\"referrer\""].map(Finder::new));
    NAMES.iter().any(|name| name.find(context.as_bytes()).is_some())
}

/// What must hold for whatever was found.
#[cfg(any(test, fuzzing))]
pub(crate) fn check_found(found: &PageFound<'_>, keeps_click_ids: bool) {
    let json = serde_json::to_string(found).expect("its names are texts");
    assert!(json.len() < 64_000, "{json}");
    if let Some(page) = &found.page {
        assert!(page.text.len() <= URL_BYTES_MAX && page.path().starts_with('/'), "{page:?}");
    }
    if let Some(url) = found.page.as_ref().and_then(Page::url) {
        let again = Address::of(url).expect("what is kept is an address");
        assert_eq!(Some(&*again.host), found.page.as_ref().and_then(Page::host));
        let in_fragment = again.fragment.split_once('?').map_or("", |(_, query)| query);
        for parameter in [again.query, in_fragment].into_iter().flat_map(parameters) {
            let is_click_id = matches!(parameter.known(), Some(Known::ClickId(_)));
            assert!(keeps_click_ids || !is_click_id || parameter.click_id().is_none(), "{url}");
        }
    }
    if let Some(referrer) = &found.referrer {
        assert!(referrer.host.len() + referrer.path.len() <= URL_BYTES_MAX, "{referrer:?}");
        assert!(!referrer.path.contains(['?', '#']), "{referrer:?}");
    }
    let has_something = found.is_view || found.source.is_some() || !found.is_empty();
    assert_eq!(found.channel.is_some(), has_something, "{json}");
    let source = found.source.as_deref();
    assert!(source.is_none_or(|source| (1..=300).contains(&source.chars().count())), "{source:?}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn pages(change: impl FnOnce(&mut PageSettings)) -> Pages {
        let mut settings = PageSettings::default();
        change(&mut settings);
        Pages::new(settings).unwrap()
    }

    fn found(pages: &Pages, context: &str, properties: &str, is_view: bool) -> Value {
        let input = PageInput::from_json(Some(context), properties, is_view);
        serde_json::to_value(pages.find(&input)).unwrap()
    }

    /// The address that is kept of one.
    fn kept(pages: &Pages, url: &str) -> Option<String> {
        let input = PageInput { url: Some(url.into()), ..PageInput::default() };
        pages.page(&input).page.and_then(|page| page.url().map(str::to_owned))
    }

    /// Golden: what stands in events.
    #[test]
    fn an_event_says_its_page_and_who_led_there() {
        let context = json!({
            "ip": "1.2.3.4",
            "page": {
                "url": "https://Shop.Example:8443/Shoes/?utm_source=fb&utm_medium=CPC&utm_campaign=Spring%20Sale&token=canary&fbclid=F1#top",
                "referrer": "https://l.facebook.com/l.php?u=canary",
                "title": "Shoes",
            },
        });
        let want = json!({
            "page": {
                "url": "https://shop.example/Shoes/?utm_source=fb&utm_medium=CPC&utm_campaign=Spring%20Sale&fbclid=",
                "host": "shop.example",
                "path": "/Shoes/",
            },
            "campaign": {"source": "fb", "medium": "CPC", "name": "Spring Sale"},
            "clicks": ["fbclid"],
            "referrer": {"host": "l.facebook.com", "path": "/l.php"},
            "source": "Facebook",
            "channel": "Paid Social",
        });
        let plain = pages(|_| {});
        assert_eq!(found(&plain, &context.to_string(), "{}", false), want);
        assert_eq!(
            found(&plain, "{}", &context["page"].to_string(), true),
            want,
            "or in the view's properties"
        );
        assert_eq!(found(&plain, "{}", &context["page"].to_string(), false), json!({}), "only of a view");

        let with_values = pages(|settings| settings.click_id_values = true);
        let found = found(&with_values, &context.to_string(), "{}", false);
        assert_eq!(found["clicks"], json!({"fbclid": "F1"}));
        assert!(found["page"]["url"].as_str().unwrap().ends_with("&fbclid=F1"));
    }

    #[test]
    fn what_a_caller_says_of_a_campaign_beats_the_address_field_by_field() {
        let context = r#"{"campaign":{"source":"news","medium":""},"page":{"url":"https://a.example/?utm_source=x&utm_medium=email&utm_id=7"}}"#;
        let want = json!({"source": "news", "medium": "email", "id": "7"});
        assert_eq!(found(&pages(|_| {}), context, "{}", false)["campaign"], want);
    }

    #[test]
    fn a_view_without_an_address_is_known_by_its_path() {
        let context = r#"{"page":{"path":"/pricing?canary","referrer":"https://www.bing.com/"}}"#;
        let bing = json!({"page": {"path": "/pricing"}, "referrer": {"host": "bing.com", "path": "/"},
            "source": "Bing", "channel": "Organic Search"});
        assert_eq!(found(&pages(|_| {}), context, "{}", true), bing);
        let direct = json!({"page": {"path": "/"}, "channel": "Direct"});
        assert_eq!(found(&pages(|_| {}), "{}", r#"{"path":"/"}"#, true), direct);
        assert_eq!(found(&pages(|_| {}), "{}", "{}", true), json!({"channel": "Direct"}));
        assert_eq!(found(&pages(|_| {}), "{}", "{}", false), json!({}), "nothing is said of any other event");
    }

    #[test]
    fn of_a_query_only_what_says_where_somebody_came_from_is_kept() {
        let url = "https://a.example/p/?email=canary&UTM_Source=x&utm_x=%C3%A9&ref=r&source=s&gclid=G&x&li_fat_id=L&=&utm%5Fterm=t#frag";
        let want =
            "https://a.example/p/?UTM_Source=x&utm_x=%C3%A9&ref=r&source=s&gclid=&li_fat_id=&utm%5Fterm=t";
        assert_eq!(kept(&pages(|_| {}), url).as_deref(), Some(want));
        let all = pages(|settings| settings.url_query = UrlQuery::Keep);
        let want = "https://a.example/p/?email=canary&UTM_Source=x&utm_x=%C3%A9&ref=r&source=s&gclid=&x&li_fat_id=&=&utm%5Fterm=t";
        assert_eq!(kept(&all, url).as_deref(), Some(want));
        let none = pages(|settings| settings.url_query = UrlQuery::Drop);
        assert_eq!(kept(&none, url).as_deref(), Some("https://a.example/p/"));
    }

    #[test]
    fn a_fragment_is_kept_where_it_is_a_page() {
        let plain = pages(|_| {});
        for (url, want) in [
            ("https://a.example/#/shop/1", "https://a.example/#/shop/1"),
            ("https://a.example/?utm_id=1#/", "https://a.example/?utm_id=1#/"),
            ("https://a.example/#/x?token=canary&utm_id=2", "https://a.example/#/x?utm_id=2"),
            ("https://a.example/#access_token=canary", "https://a.example/"),
            ("https://a.example/#", "https://a.example/"),
        ] {
            assert_eq!(kept(&plain, url).as_deref(), Some(want));
        }
        let context = r#"{"page":{"url":"https://a.example/?utm_id=&utm_term=q#/x?utm_id=2&utm_term=f"}}"#;
        assert_eq!(found(&plain, context, "{}", false)["campaign"], json!({"term": "q", "id": "2"}));
    }

    #[test]
    fn an_address_of_any_length_is_cut_where_something_ends() {
        let plain = pages(|_| {});
        let long = kept(&plain, &format!("https://a.example/{}?utm_id=1", "é".repeat(3_000))).unwrap();
        assert!(
            (URL_BYTES_MAX - 1..=URL_BYTES_MAX).contains(&long.len()) && long.ends_with('é'),
            "{}",
            long.len()
        );
        let value = "v".repeat(1_000);
        let url = format!("https://a.example/?utm_source={value}&utm_medium={value}&utm_id=1");
        let want = format!("https://a.example/?utm_source={value}&utm_id=1");
        assert_eq!(kept(&plain, &url), Some(want));
    }

    #[test]
    fn what_is_wrong_with_one_costs_not_the_others() {
        let plain = pages(|_| {});
        for page in [
            r#""x""#,
            "[]",
            "7",
            "null",
            r#"{"url":7}"#,
            r#"{"url":"javascript:alert(1)"}"#,
            r#"{"url":"\ud800"}"#,
        ] {
            let context =
                format!(r#"{{"page":{page},"campaign":{{"source":"x"}},"referrer":"https://b.example/"}}"#);
            let found = found(&plain, &context, "{}", false);
            assert_eq!(found["campaign"], json!({"source": "x"}), "{page}");
            assert_eq!(
                (&found["referrer"]["host"], found.get("page")),
                (&json!("b.example"), None),
                "{page}"
            );
        }
        let found = found(
            &plain,
            r#"{"page":{"url":"https://a.example/","referrer":["x"]},"campaign":[]}"#,
            "{}",
            false,
        );
        assert_eq!(
            found,
            json!({"page":{"url":"https://a.example/","host":"a.example","path":"/"},"channel":"Direct"})
        );
    }

    #[test]
    fn referrers_are_found_wherever_they_stand() {
        let want = json!({"host": "b.example", "path": "/x"});
        for (context, properties) in [
            (r#"{"page":{"referrer":"https://b.example/x"}}"#, "{}"),
            (r#"{"referrer":"https:\/\/b.example\/x"}"#, "{}"),
            (r#"{"referrer":{"type":"x","url":"https://b.example/x"}}"#, "{}"),
            (r#"{"page":{"referrer":""}}"#, r#"{"referrer":"https://b.example/x"}"#),
            (r#"{"page":{"referrer":"https://no.example"},"page":{"referrer":"https://b.example/x"}}"#, "{}"),
        ] {
            assert_eq!(found(&pages(|_| {}), context, properties, true)["referrer"], want, "{context}");
        }
    }

    #[test]
    fn a_spam_host_is_flagged_by_whole_labels() {
        let plain = pages(|_| {});
        let is_spam = |referrer: &str, url: &str| {
            let referrer = Some(referrer.into());
            plain.find(&PageInput { url: Some(url.into()), referrer, ..PageInput::default() }).is_spam
        };
        let page = "https://a.example/";
        assert!(
            is_spam("http://semalt.semalt.com/crawler.php", page) && is_spam("https://darodar.com", page)
        );
        assert!(
            is_spam("https://semalt.com", "https://a.example/?utm_source=news"),
            "whatever it calls itself"
        );
        assert!(is_spam("", "https://a.example/?utm_source=www.semalt.com"));
        assert!(!is_spam("https://notsemalt.com", page) && !is_spam("https://semalt.com.example", page));
        assert!(!is_spam("https://www.google.com", page));
    }

    #[test]
    fn a_host_that_links_name_is_named_as_one_that_refers() {
        for (name, want) in [
            ("facebook.com", "Facebook"),
            ("WWW.Google.DE", "Google"),
            ("news.example", "news.example"),
            ("Partner X", "Partner X"),
            ("a b.example", "a b.example"),
        ] {
            let json = json!({ "source": name }).to_string();
            let input = PageInput { campaign: Some(&json), ..PageInput::default() };
            assert_eq!(pages(|_| {}).find(&input).source.as_deref(), Some(want));
        }
    }

    #[test]
    fn settings_are_read_and_what_is_wrong_is_told() {
        let read = |vars: &[(&str, &str)]| {
            let vars = vars.iter().map(|(name, value)| (name.into(), value.into()));
            let mut reader = Reader::new(vars, std::path::Path::new(""));
            let settings = PageSettings::read(&mut reader);
            (settings, reader.finish().err().map(|error| error.0))
        };
        let (settings, errors) = read(&[]);
        assert_eq!((settings.url_query, settings.click_id_values, errors), (UrlQuery::Allowed, false, None));
        let given = [
            ("URL_QUERY", "drop"),
            ("CLICK_IDS", "value"),
            ("SITE_DOMAINS", "www.Shop.example, bücher.example,"),
            ("SOURCES_FILE", "/x"),
        ];
        let (settings, _) = read(&given);
        assert_eq!(settings.site_domains, ["shop.example", "xn--bcher-kva.example"]);
        assert!(
            settings.click_id_values
                && settings.url_query == UrlQuery::Drop
                && settings.sources_file.is_some()
        );
        let (_, errors) =
            read(&[("URL_QUERY", "all"), ("CLICK_IDS", "yes"), ("SITE_DOMAINS", "https://a.example")]);
        let want = [
            "URL_QUERY: got \"all\", want allow, keep or drop",
            "CLICK_IDS: got \"yes\", want name or value",
            "SITE_DOMAINS: got \"https://a.example\", want domains such as shop.example, separated by commas",
        ];
        assert_eq!(errors.unwrap(), want);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever comes, nothing panics, and what is kept is bounded and without what was
        /// to be left out.
        #[test]
        fn what_is_kept_is_bounded(
            url in r"(https?://)?([a-z.:@\[\]%é]|[ -~]){0,40}(/[ -~é]{0,30})?(\?([ -~]|gclid=CANARY|&|utm_source=){0,60})?(#/?.{0,30})?",
            referrer in r"((https?:)?//|android-app://)?.{0,60}",
            campaign in r#"\{("[a-z_]{0,8}":("([ -!#-\[\]-~é]{0,300})"|[0-9]{1,5}|null),?){0,4}\}"#,
            is_view: bool,
        ) {
            let input = PageInput {
                is_view,
                url: Some(url.into()),
                path: None,
                referrer: Some(referrer.into()),
                campaign: Some(&campaign),
            };
            let plain = pages(|settings| settings.url_query = UrlQuery::Keep);
            check_found(&plain.find(&input), false);
        }

        #[test]
        fn an_event_of_any_json_is_read(context in ".{0,100}", properties in ".{0,100}", is_view: bool) {
            let input = PageInput::from_json(Some(&context), &properties, is_view);
            check_found(&pages(|_| {}).find(&input), false);
        }
    }
}

//! Whether an event comes from a machine that says so: a declared bot. One that wants to
//! pass for a person does.
//!
//! The operator's own list is asked first, then the names of known bots
//! (`data/bots.tsv`), words by which a bot tells itself, an address to write to, and last
//! what a browser says that a program drives. Nothing is a bot for saying nothing.

use std::sync::{Arc, OnceLock};

mod kind;
mod own;
mod table;

pub use self::kind::{Bot, Category, Why};
pub(crate) use self::own::OwnList;
use self::{kind::encoded, own::Own, table::Table};
use super::{
    Encoded,
    agent::{AGENT_BYTES_MAX, AgentInput},
    cache::{Cache, CacheLimits},
    text::cut,
};

/// The month of the table.
const TABLE_STAMP: &str = "2026-11";
const CACHE: CacheLimits = CacheLimits { entries_max: 8_192, bytes_max: 1 << 20 };

/// The lists, and what was found with them.
#[derive(Debug)]
pub(super) struct Bots {
    /// Made when the first user agent comes.
    table: Arc<OnceLock<Table>>,
    own: Option<OwnList>,
    stamp: Box<str>,
    headless: Arc<Encoded<Bot>>,
    webdriver: Arc<Encoded<Bot>>,
    found: Cache<Listed>,
}

/// What the lists say of a user agent.
#[derive(Debug, Clone)]
enum Listed {
    Nothing,
    /// It is none, whatever else there is.
    Allowed,
    Bot(Arc<Encoded<Bot>>),
}

impl Bots {
    pub(super) fn new(own: Option<OwnList>) -> Self {
        Self::over(Arc::default(), own)
    }

    /// The same with another list of the operator's.
    pub(super) fn with(&self, own: OwnList) -> Self {
        Self::over(Arc::clone(&self.table), Some(own))
    }

    fn over(table: Arc<OnceLock<Table>>, own: Option<OwnList>) -> Self {
        let stamp = own
            .as_ref()
            .map_or_else(|| TABLE_STAMP.to_owned(), |own| format!("{TABLE_STAMP}+{}", own.stamp()));
        let driven = |name, why| encoded(name, Category::Automation, why);
        Self {
            table,
            own,
            stamp: stamp.into(),
            headless: driven("headless browser", Why::Headless),
            webdriver: driven("webdriver", Why::Webdriver),
            found: Cache::new(CACHE, fastrand::u128(..)),
        }
    }

    pub(super) fn stamp(&self) -> &str {
        &self.stamp
    }

    pub(super) fn find(&self, input: &AgentInput<'_>) -> Option<Arc<Encoded<Bot>>> {
        let agent = cut(input.user_agent, AGENT_BYTES_MAX);
        match self.listed(agent, input.is_browser) {
            Listed::Bot(bot) => Some(bot),
            Listed::Allowed => None,
            Listed::Nothing if is_headless(agent, input) => Some(Arc::clone(&self.headless)),
            Listed::Nothing => input.webdriver.then(|| Arc::clone(&self.webdriver)),
        }
    }

    fn listed(&self, agent: &str, is_browser: bool) -> Listed {
        if agent.is_empty() {
            return Listed::Nothing;
        }
        let key = self.found.key([Some(agent), is_browser.then_some("")]);
        let find = || match self.own.as_ref().and_then(|own| own.find(agent)) {
            Some(Own::Allow) => Listed::Allowed,
            Some(Own::Deny(bot)) => Listed::Bot(bot),
            None => {
                let found = self.table.get_or_init(Table::new).find(agent, is_browser);
                found.map_or(Listed::Nothing, Listed::Bot)
            }
        };
        self.found.get_or_make(key, find, |listed| match listed {
            Listed::Bot(bot) => size_of::<Encoded<Bot>>() + bot.json.len() + bot.value.name.capacity(),
            Listed::Nothing | Listed::Allowed => 0,
        })
    }
}

/// A browser without a window says so, in its user agent or among its brands.
fn is_headless(agent: &str, input: &AgentInput<'_>) -> bool {
    let hints = input.hints.values();
    let texts = [Some(agent), input.user_agent_data].into_iter().chain(hints).flatten();
    texts.into_iter().any(|text| text.contains("Headless"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrich::agent::Hints;

    const CHROME: &str = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36";

    fn input<'a>(user_agent: &'a str, hints: &'a Hints<'a>) -> AgentInput<'a> {
        AgentInput { user_agent, hints, user_agent_data: None, webdriver: false, is_browser: true }
    }

    fn json(bots: &Bots, input: &AgentInput<'_>) -> Option<String> {
        bots.find(input).map(|bot| bot.json.to_string())
    }

    #[test]
    fn the_operators_list_is_asked_first_and_who_it_allows_is_a_person() {
        let own =
            OwnList::parse("allow GPTBot-of-ours\ndeny ours Linux x86_64\ndeny renamed gptbot").unwrap();
        let bots = Bots::new(Some(own));
        let hints = Hints::default();
        let of = |agent| json(&bots, &input(agent, &hints));
        assert_eq!(of("GPTBot-of-ours/1 HeadlessChrome/1"), None, "not even what it says otherwise counts");
        assert_eq!(of("GPTBot/1.2").unwrap(), r#"{"name":"renamed","cat":"own","why":"own"}"#);
        assert_eq!(of(CHROME).unwrap(), r#"{"name":"ours","cat":"own","why":"own"}"#);
        let allowed = AgentInput { webdriver: true, ..input("gptbot-OF-ours", &hints) };
        assert_eq!(json(&bots, &allowed), None);
        assert_eq!(of("bingbot/2.0").unwrap(), r#"{"name":"bingbot","cat":"search","why":"declared"}"#);
    }

    #[test]
    fn a_browser_that_a_program_drives_is_told_by_its_own_words() {
        let (bots, none) = (Bots::new(None), Hints::default());
        let headless = CHROME.replace("Chrome/", "HeadlessChrome/");
        let wanted = Some(r#"{"name":"headless browser","cat":"automation","why":"headless"}"#.to_owned());
        assert_eq!(json(&bots, &input(&headless, &none)), wanted);
        let brands = r#""HeadlessChrome";v="131", "Chromium";v="131""#;
        let hints = Hints::read(|name| (name == "sec-ch-ua").then_some(brands));
        assert_eq!(json(&bots, &input(CHROME, &hints)), wanted);
        let data = Some(r#"{"brands":[{"brand":"HeadlessChrome","version":"131"}]}"#);
        assert_eq!(json(&bots, &AgentInput { user_agent_data: data, ..input(CHROME, &none) }), wanted);
        let driven = AgentInput { webdriver: true, ..input(CHROME, &none) };
        let wanted = Some(r#"{"name":"webdriver","cat":"automation","why":"webdriver"}"#.to_owned());
        assert_eq!(json(&bots, &driven), wanted);
        assert_eq!(json(&bots, &AgentInput { user_agent: "", ..driven }), wanted);
    }

    #[test]
    fn a_person_is_none_and_neither_is_who_says_nothing() {
        let (bots, hints) = (Bots::new(None), Hints::default());
        assert_eq!(json(&bots, &input(CHROME, &hints)), None);
        assert_eq!(json(&bots, &input("", &hints)), None);
    }

    #[test]
    fn what_was_found_is_shared_and_told_apart_by_whose_event_it_is() {
        let (bots, hints) = (Bots::new(None), Hints::default());
        let library = input("okhttp/4.9.1", &hints);
        let first = bots.find(&library).unwrap();
        assert!(Arc::ptr_eq(&first, &bots.find(&library).unwrap()));
        assert!(bots.find(&AgentInput { is_browser: false, ..library }).is_none());
    }

    #[test]
    fn the_lists_are_named() {
        assert_eq!(Bots::new(None).stamp(), "2026-11");
        let own = |text| Some(OwnList::parse(text).unwrap());
        let (one, other) = (Bots::new(own("allow one")), Bots::new(own("allow other")));
        assert!(one.stamp().starts_with("2026-11+own:") && one.stamp().len() == 20, "{}", one.stamp());
        assert_ne!(one.stamp(), other.stamp());
    }
}

//! The names of known bots, and what else a bot says of itself.

use std::{
    cell::LazyCell,
    fmt::{self, Debug},
    ops::Range,
    sync::Arc,
};

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, Match};

use super::kind::{Bot, Category, Why, encoded};
use crate::enrich::{Encoded, text::name_of};

const TABLE: &str = include_str!("../data/bots.tsv");

/// The names, the words and the addresses, looked for in one pass.
pub(super) struct Table {
    matcher: AhoCorasick,
    patterns: Vec<Pattern>,
    bots: Vec<Arc<Encoded<Bot>>>,
}

impl Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("bots", &self.bots.len()).finish_non_exhaustive()
    }
}

/// What is looked for.
#[derive(Debug, Clone, Copy)]
struct Pattern {
    sort: Sort,
    /// At the start of the user agent.
    is_first: bool,
    /// Not in the middle of a word at its start, at its end.
    starts_word: bool,
    ends_word: bool,
}

/// What a pattern stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Contact,
    Library(usize),
    Word,
    Name(usize),
}

/// Parts of words by which something says that it is a bot.
const WORDS: [&str; 13] = [
    "crawler",
    "crawling",
    "crawl/",
    "spider",
    "scraper",
    "scraping",
    "archiver",
    "fetcher",
    "harvester",
    "indexer",
    "linkcheck",
    "validator",
    "uptime",
];
/// The shortest of them, which must end its word: not so in `bottom`.
const BOT: &str = "bot";
/// What an address begins with, or has in it.
const CONTACTS: [&str; 4] = ["http://", "https://", "www.", "@"];
/// A maker of phones.
const CUBOT: &str = "cubot";

impl Table {
    pub(super) fn new() -> Self {
        let (mut texts, mut patterns, mut bots) = (Vec::new(), Vec::new(), Vec::new());
        for (category, name, found_by) in rows(TABLE) {
            let sort = if category == Category::Library { Sort::Library } else { Sort::Name };
            for text in found_by {
                let (text, pattern) = Pattern::of_table(text, sort(bots.len()));
                texts.push(text);
                patterns.push(pattern);
            }
            bots.push(encoded(name, category, Why::Declared));
        }
        let anywhere = |sort| Pattern { sort, is_first: false, starts_word: false, ends_word: false };
        for (words, pattern) in [
            (&WORDS[..], anywhere(Sort::Word)),
            (&[BOT], Pattern { ends_word: true, ..anywhere(Sort::Word) }),
            (&CONTACTS, anywhere(Sort::Contact)),
        ] {
            texts.extend(words);
            patterns.resize(texts.len(), pattern);
        }
        let matcher = AhoCorasickBuilder::new().ascii_case_insensitive(true).build(texts);
        Self { matcher: matcher.expect("a test makes it"), patterns, bots }
    }

    /// The most telling of what a user agent has, and of two the longer.
    pub(super) fn find(&self, agent: &str, is_browser: bool) -> Option<Arc<Encoded<Bot>>> {
        let model = LazyCell::new(|| phone_model(agent));
        let matches = self.matcher.find_overlapping_iter(agent).filter_map(|found| {
            let pattern = self.patterns[found.pattern()];
            let is_meant = pattern.is_at(agent, found)
                && match pattern.sort {
                    Sort::Name(_) => true,
                    Sort::Word => is_word(agent, found),
                    Sort::Library(_) => is_browser,
                    Sort::Contact => is_browser && is_contact(agent, found),
                };
            // The name of a phone is no name of a bot.
            (is_meant && !model.contains(&found.start())).then_some((pattern.sort, found))
        });
        let best = matches.max_by_key(|(sort, found)| (sort.rank(), found.len()))?;
        match best {
            (Sort::Name(bot) | Sort::Library(bot), _) => Some(Arc::clone(&self.bots[bot])),
            (Sort::Word, found) => named(word(agent, found)),
            (Sort::Contact, found) => named(host(agent, found)),
        }
    }
}

/// A bot that is in no list.
fn named(name: &str) -> Option<Arc<Encoded<Bot>>> {
    Some(encoded(name_of(name)?, Category::Other, Why::Declared))
}

impl Sort {
    fn rank(self) -> u8 {
        match self {
            Self::Contact => 0,
            Self::Library(_) => 1,
            Self::Word => 2,
            Self::Name(_) => 3,
        }
    }
}

impl Pattern {
    /// A text of the table: whole words, wherever they stand; `^` before it is the user
    /// agent's start, `*` behind it is any end of the word.
    fn of_table(text: &str, sort: Sort) -> (&str, Self) {
        let (is_first, text) = text.strip_prefix('^').map_or((false, text), |text| (true, text));
        let (is_any_end, text) = text.strip_suffix('*').map_or((false, text), |text| (true, text));
        let starts_word = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let ends_word = !is_any_end && text.ends_with(|c: char| c.is_ascii_alphabetic());
        (text, Self { sort, is_first, starts_word, ends_word })
    }

    fn is_at(self, agent: &str, found: Match) -> bool {
        let bytes = agent.as_bytes();
        let before = found.start().checked_sub(1).map(|at| bytes[at]);
        let after = bytes.get(found.end());
        let is_elsewhere = self.is_first && before.is_some();
        let is_end_of_word = self.starts_word && before.is_some_and(|byte| byte.is_ascii_alphanumeric());
        let is_start_of_word = self.ends_word && after.is_some_and(u8::is_ascii_alphabetic);
        !(is_elsewhere || is_end_of_word || is_start_of_word)
    }
}

/// The rows of the table: what a bot is for, its name, the texts it is found by.
fn rows(table: &'static str) -> impl Iterator<Item = (Category, &'static str, Vec<&'static str>)> {
    table.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let mut fields = line.split('\t');
        let mut next = || fields.next().filter(|field| !field.is_empty());
        let (category, name) = next().zip(next()).expect("a test reads each row");
        let category = serde_json::from_value(category.into()).expect("a test reads each row");
        (category, name, next().map_or_else(|| vec![name], |texts| texts.split('|').collect()))
    })
}

fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')
}

/// Whether a word is a bot's own, and not an address's or a phone's.
fn is_word(agent: &str, found: Match) -> bool {
    let bytes = agent.as_bytes();
    let word = word(agent, found);
    if word.eq_ignore_ascii_case(BOT) {
        // "Some Bot/1.0", but a phone is an "M bot 60".
        return bytes.get(found.end()).is_none_or(|byte| matches!(byte, b'/' | b';' | b')' | b','));
    }
    let start = word.as_ptr() as usize - agent.as_ptr() as usize;
    let is_in_address = start.checked_sub(1).is_some_and(|at| matches!(bytes[at], b'/' | b'@' | b':'));
    let is_cubot = word.get(..CUBOT.len()).is_some_and(|start| start.eq_ignore_ascii_case(CUBOT));
    !is_in_address && !is_cubot
}

/// All of a word.
fn word(agent: &str, found: Match) -> &str {
    let bytes = agent.as_bytes();
    let start = bytes[..found.start()].iter().rposition(|byte| !is_of_word(*byte)).map_or(0, |at| at + 1);
    let end = bytes[found.end()..].iter().position(|byte| !is_of_word(*byte));
    &agent[start..end.map_or(bytes.len(), |at| found.end() + at)]
}

/// Whether it is an address: of a page, or, with letters on both sides and a dot, of mail.
fn is_contact(agent: &str, found: Match) -> bool {
    let host = host(agent, found);
    let is_mail = agent[found.range()].starts_with('@');
    let is_to_somebody = || agent[..found.start()].ends_with(|c: char| c.is_ascii_alphanumeric());
    host.starts_with(|c: char| c.is_ascii_alphabetic())
        && host.contains('.')
        && (!is_mail || is_to_somebody())
}

/// The host of an address.
fn host(agent: &str, found: Match) -> &str {
    let start = if agent[found.range()].eq_ignore_ascii_case("www.") { found.start() } else { found.end() };
    let end = agent.as_bytes()[start..].iter().position(|byte| !is_of_word(*byte));
    agent[start..end.map_or(agent.len(), |at| start + at)].trim_end_matches('.')
}

/// Where an Android phone says its model: behind the system's version, and behind the
/// language if there is one. Nowhere if it is none.
fn phone_model(agent: &str) -> Range<usize> {
    let part_end = |start: usize| agent[start..].find([';', ')']).map_or(agent.len(), |at| start + at);
    let Some(system_end) = agent.find("Android").map(part_end).filter(|end| agent[*end..].starts_with(';'))
    else {
        return 0..0;
    };
    let mut start = system_end + 1;
    let end = part_end(start);
    if is_language(agent[start..end].trim()) && end < agent.len() {
        start = end + 1;
    }
    start..part_end(start)
}

/// `en`, `en-us`, `pt_BR`.
fn is_language(text: &str) -> bool {
    let bytes = text.as_bytes();
    let letters = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_alphabetic);
    matches!(bytes, [_, _]) && letters(bytes)
        || matches!(bytes, [_, _, b'-' | b'_', _, _]) && letters(&bytes[..2]) && letters(&bytes[3..])
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    thread_local! {
        static MADE: Table = Table::new();
    }

    fn bot(agent: &str, is_browser: bool) -> Option<(String, Category)> {
        MADE.with(|table| table.find(agent, is_browser).map(|bot| (bot.value.name.clone(), bot.value.cat)))
    }

    fn name(agent: &str) -> Option<String> {
        bot(agent, true).map(|(name, _)| name)
    }

    /// And no text stands for two, so that the order of the rows says nothing.
    #[test]
    fn each_row_is_whole_in_its_place_and_found_by_its_own_texts() {
        let (mut last, mut by_text) = ((Category::Ads, String::new()), HashMap::new());
        let mut count = 0;
        for (category, name, texts) in rows(TABLE) {
            let row = (category, name.to_lowercase());
            assert!(last < row, "{name} is behind {}", last.1);
            last = row;
            count += 1;
            for text in texts {
                let plain = text.trim_start_matches('^').trim_end_matches('*');
                assert!(
                    plain.len() >= 3 && text == text.trim_start() && !text.contains('\t'),
                    "{name}: {text:?}"
                );
                let before = by_text.insert(plain.to_lowercase(), name);
                assert_eq!(before, None, "{text} is {name}'s too");
                assert_eq!(bot(plain, true), Some((name.to_owned(), category)), "by {text:?}");
            }
        }
        assert!(count > 1_000, "{count}");
    }

    #[test]
    fn known_bots_are_told_by_the_longest_of_their_names() {
        for (agent, wanted, category) in [
            (
                "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
                "Googlebot",
                Category::Search,
            ),
            ("Googlebot-Image/1.0", "Googlebot-Image", Category::Search),
            (
                "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; +https://openai.com/gptbot)",
                "GPTBot",
                Category::AiCrawler,
            ),
            (
                "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko); compatible; ChatGPT-User/1.0; +https://openai.com/bot",
                "ChatGPT-User",
                Category::AiAssistant,
            ),
            (
                "facebookexternalhit/1.1 (+http://www.facebook.com/externalhit_uatext.php)",
                "facebookexternalhit",
                Category::Preview,
            ),
            (
                "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)",
                "AhrefsBot",
                Category::Seo,
            ),
            (
                "Mozilla/5.0+(compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)",
                "UptimeRobot",
                Category::Monitor,
            ),
            ("PYTHON-REQUESTS/2.31.0", "python-requests", Category::Library),
        ] {
            assert_eq!(bot(agent, true), Some((wanted.to_owned(), category)), "{agent}");
        }
    }

    #[test]
    fn what_calls_itself_a_bot_is_told_by_its_own_name() {
        for (agent, wanted) in [
            ("Mozilla/5.0 (compatible; Never-Seen_Bot/1.0)", "Never-Seen_Bot"),
            ("NeverSeenCrawler (our own)", "NeverSeenCrawler"),
            ("never.seen.spider 7", "never.seen.spider"),
            ("Never Seen Bot/1.0", "Bot"),
            ("Never Seen Bot", "Bot"),
            ("Neverseen/1.0 (+https://never.example/about)", "never.example"),
            ("Neverseen/1.0 (www.never.example)", "www.never.example"),
            ("Neverseen/1.0 (somebody@never.example)", "never.example"),
            ("Neverseen/1.0 (http://never.example/bot.html)", "never.example"),
        ] {
            assert_eq!(bot(agent, true), Some((wanted.to_owned(), Category::Other)), "{agent}");
        }
        let long = bot(&format!("{}bot", "x".repeat(500)), true).unwrap().0;
        assert!(long.len() <= 64, "{long}");
    }

    /// As these were by other lists: isbot's issues 29 and 190, Crawler-Detect's 283 and 429,
    /// device-detector's 5484, browser's 402.
    #[test]
    fn phones_and_apps_that_sound_like_bots_are_none() {
        let phone = |model: &str| {
            format!(
                "Mozilla/5.0 (Linux; Android 9; {model} Build/PPR1.1; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/67.0.3396.87 Mobile Safari/537.36"
            )
        };
        for agent in [
            phone("CUBOT_NOTE_S"), phone("CUBOT X30"), phone("CUBOT"), phone("M bot 60"), phone("M bot"), phone("OCTOPUS-CORE T8"),
            phone("FEVER"), phone("Pixel 6"), phone("SpiderPhone"), phone("en-US; CUBOT MAX"),
            "Mozilla/5.0 (Linux; U; Android 5.1; de-de; CUBOT H1 Build/LMY47D) AppleWebKit/534.30 Version/4.0 U3/0.8.0 Mobile Safari/534.30".to_owned(),
            "Mozilla/5.0 (Linux; Android 13; M bot 60) AppleWebKit/537.36 Chrome/120.0 Mobile Safari/537.36".to_owned(),
            "Dalvik/2.1.0 (Linux; U; Android 10; CUBOT X30 Build/QP1A)".to_owned(),
            "App/1.0 [FBAN/EMA;FBDV/CUBOT X30;FBSV/10]".to_owned(),
            "Safari/600.2.5 MobileRicardo (Google Pixel 6; android 13) ricardo.ch/8.28.2-82802 (debug) deviceId/dfa51331-fdeb-46d7".to_owned(),
            "Mozilla/5.0 (Linux; Android 9; SM-A730F Build/PPR1; wv) Chrome/76.0.3809.89 Mobile Safari/537.36 Instagram 105.0.0.18.119 Android (28/9; samsung; SM-A730F; jackpot2lte)".to_owned(),
            "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/150.0.0.0 Mobile Safari/537.36 (Ecosia android@150.0.0.0)".to_owned(),
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) bottom/1 Chrome/131.0.0.0 Safari/537.36".to_owned(),
        ] {
            assert_eq!(name(&agent), None, "{agent}");
        }
        let crawler = "Mozilla/5.0 (Linux; Android 6.0.1; Nexus 5X Build/MMB29P) AppleWebKit/537.36 Chrome/1.0 Mobile Safari/537.36 (compatible; Googlebot/2.1)";
        assert_eq!(name(crawler).unwrap(), "Googlebot", "one that has a phone's user agent is still found");
    }

    #[test]
    fn a_library_is_a_bot_where_a_browser_is_expected_and_nowhere_else() {
        for agent in
            ["okhttp/4.9.1", "Dart/3.1 (dart:io)", "curl/8.5.0", "Service/1.0 (+https://service.example)"]
        {
            assert!(bot(agent, true).is_some(), "{agent}");
            assert_eq!(bot(agent, false), None, "{agent}");
        }
        assert_eq!(
            bot("MyBot/1.0 python-requests/2.31", true).unwrap().0,
            "MyBot",
            "what it says of itself is more"
        );
        assert_eq!(bot("GPTBot/1.2", false).unwrap().1, Category::AiCrawler);
    }

    proptest! {
        #[test]
        fn no_user_agent_is_too_much(agent in "\\PC{0,200}|(bot|Bot|spider|@|http://|www\\.|Android|; |\\)|\\(|/|é|\\.| |a|7|en-us){0,60}") {
            if let Some(found) = name(&agent) {
                prop_assert!(!found.is_empty() && found.len() <= 64, "{}", found);
            }
        }
    }
}

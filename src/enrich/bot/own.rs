//! The operator's own list of bots: a text file, one line for each.
//!
//! ```text
//! # whoever has this in the user agent is a person
//! allow OurApp/
//! # and whoever has this is a bot of that name
//! deny rank-checker RankTool 3
//! ```

use std::{
    fmt::{self, Debug},
    sync::Arc,
};

use aho_corasick::{AhoCorasick, AhoCorasickBuilder};

use super::kind::{Bot, Category, Why, encoded};
use crate::enrich::{Encoded, text::checksum};

const LINES_MAX: usize = 10_000;
/// Shorter ones would be in nearly every user agent.
const TEXT_BYTES: std::ops::RangeInclusive<usize> = 3..=256;
const NAME_BYTES_MAX: usize = 64;

/// The list, ready to be asked.
pub(crate) struct OwnList {
    matcher: AhoCorasick,
    /// By the places of the texts; who is allowed before who is denied.
    verdicts: Vec<Own>,
    stamp: Box<str>,
}

/// What the list says.
#[derive(Debug, Clone)]
pub(super) enum Own {
    Allow,
    Deny(Arc<Encoded<Bot>>),
}

impl Debug for OwnList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnList").field("lines", &self.verdicts.len()).finish_non_exhaustive()
    }
}

impl OwnList {
    /// Reads a list, or says which line is wrong.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (mut allowed, mut denied) = (Vec::new(), Vec::new());
        let lines = text.trim_start_matches('\u{feff}').lines().enumerate();
        let lines = lines.map(|(at, line)| (at + 1, line.trim()));
        for (number, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let (text, verdict) = parse_line(line).map_err(|error| format!("line {number}: {error}"))?;
            let list = if matches!(verdict, Own::Allow) { &mut allowed } else { &mut denied };
            list.push((text, verdict));
        }
        let lines = allowed.len() + denied.len();
        if lines > LINES_MAX {
            return Err(format!("got {lines} lines, want {LINES_MAX} at most"));
        }
        let (texts, verdicts): (Vec<_>, Vec<_>) = allowed.into_iter().chain(denied).unzip();
        let matcher = AhoCorasickBuilder::new().ascii_case_insensitive(true).build(texts);
        let matcher = matcher.map_err(|error| error.to_string())?;
        Ok(Self { matcher, verdicts, stamp: checksum(text).into() })
    }

    pub(super) fn stamp(&self) -> &str {
        &self.stamp
    }

    /// What the list says of a user agent, if anything: that it is allowed first, then the
    /// first line that denies it.
    pub(super) fn find(&self, agent: &str) -> Option<Own> {
        let first = self.matcher.find_overlapping_iter(agent).map(|found| found.pattern()).min()?;
        Some(self.verdicts[first].clone())
    }
}

fn parse_line(line: &str) -> Result<(&str, Own), String> {
    let want = "want \"allow <text>\" or \"deny <name> <text>\"";
    let (verb, rest) = line.split_once(char::is_whitespace).ok_or_else(|| format!("got {line:?}, {want}"))?;
    let rest = rest.trim_start();
    let (text, verdict) = match verb {
        "allow" => (rest, Own::Allow),
        "deny" => {
            let (name, text) =
                rest.split_once(char::is_whitespace).ok_or_else(|| format!("got {line:?}, {want}"))?;
            if name.len() > NAME_BYTES_MAX {
                return Err(format!("got a name of {} bytes, want {NAME_BYTES_MAX} at most", name.len()));
            }
            (text.trim_start(), Own::Deny(encoded(name, Category::Own, Why::Own)))
        }
        _ => return Err(format!("got {line:?}, {want}")),
    };
    if !TEXT_BYTES.contains(&text.len()) {
        let (min, max) = (TEXT_BYTES.start(), TEXT_BYTES.end());
        return Err(format!("got {text:?}, {} bytes, want {min} to {max}", text.len()));
    }
    Ok((text, verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(list: &OwnList, agent: &str) -> Option<String> {
        match list.find(agent)? {
            Own::Allow => Some("allowed".to_owned()),
            Own::Deny(bot) => Some(bot.value.name.clone()),
        }
    }

    #[test]
    fn who_is_allowed_comes_before_who_is_denied_and_then_the_first_line() {
        let list = "\u{feff}# ours\n\n deny  first \t Some Tool \r\nallow GoodTool\ndeny second tool\ndeny 3 some tool";
        let list = OwnList::parse(list).unwrap();
        for (agent, wanted) in [
            ("x SOME TOOL/1", Some("first")),
            ("goodtool/1 (Some Tool)", Some("allowed")),
            ("another tool", Some("second")),
            ("Mozilla/5.0", None),
            ("", None),
        ] {
            assert_eq!(name(&list, agent).as_deref(), wanted, "{agent}");
        }
    }

    #[test]
    fn an_empty_list_says_nothing() {
        let list = OwnList::parse("# nothing\n").unwrap();
        assert!(list.find("anything").is_none());
    }

    #[test]
    fn a_bad_line_is_named() {
        let long = format!("deny x {}", "y".repeat(257));
        for (line, says) in [
            ("allow", "want \"allow <text>\""),
            ("deny name", "or \"deny <name> <text>\""),
            ("block x y", "got \"block x y\""),
            ("allow ab", "2 bytes, want 3 to 256"),
            (&*long, "257 bytes, want 3 to 256"),
            (&*format!("deny {} text", "n".repeat(65)), "a name of 65 bytes"),
        ] {
            let error = OwnList::parse(&format!("# one\n{line}\n")).map(|_| ()).unwrap_err();
            assert!(error.starts_with("line 2: got ") && error.contains(says), "{error}");
        }
        let many = "allow abc\n".repeat(LINES_MAX + 1);
        assert!(OwnList::parse(&many).map(|_| ()).unwrap_err().contains("want 10000 at most"));
    }
}

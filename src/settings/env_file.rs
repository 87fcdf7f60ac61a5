//! The file `.env`: what is written is what is meant.
//!
//! The rules are Docker Compose's, without its substitution: a value that holds a
//! `$NAME` would mean something else to each program that reads the file, and part
//! of a key would be gone without a word. Single quotes say that it is meant.

use std::{iter, str::CharIndices};

/// One assignment, or a line that is none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    /// Counted from 1.
    pub(super) line: usize,
    /// Empty if the line has no name.
    pub(super) name: String,
    /// What is wrong, in words that tell nothing of the line: it may hold a key.
    pub(super) value: Result<String, &'static str>,
}

const NO_NAME: &str = "got no NAME=value";
const SUBSTITUTION: &str = "got a $ with a name behind it, which would be substituted elsewhere and is not \
here; want the value in single quotes if that is meant";
const OPEN_QUOTE: &str = "got a quote that is never closed";
const BEHIND_QUOTE: &str = "got text behind the closing quote, want a comment with # there, or nothing";
const UNKNOWN_ESCAPE: &str =
    r#"got a \ in double quotes before something else than \, ", $, n, r or t; want single quotes, or \\"#;
const NOT_UTF_8: &str = "got bytes that are not UTF-8, want text";

/// Takes a file apart. A comment may be in any encoding.
pub(super) fn parse(bytes: &[u8]) -> Vec<Assignment> {
    let text = String::from_utf8_lossy(bytes);
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let mut line = 1;
    iter::from_fn(|| {
        loop {
            let current = rest.lines().next()?;
            let number = line;
            let assignment = assignment(current, rest);
            // A value in quotes may go over several lines.
            let taken = assignment.as_ref().map_or(current.len(), |(_, _, taken)| *taken);
            let end = rest[taken..].find('\n').map_or(rest.len(), |end| taken + end + 1);
            line += rest[..end].matches('\n').count();
            rest = &rest[end..];
            if let Some((name, value, _)) = assignment {
                let is_text = !value.as_ref().is_ok_and(|value| value.contains('\u{fffd}'));
                let value = if is_text { value } else { Err(NOT_UTF_8) };
                return Some(Assignment { line: number, name: name.to_owned(), value });
            }
        }
    })
    .collect()
}

/// The name and the value of a line, and how many bytes from its start they take;
/// nothing if it is blank or a comment.
fn assignment<'a>(line: &'a str, from_line: &str) -> Option<(&'a str, Result<String, &'static str>, usize)> {
    let trimmed = line.trim();
    if trimmed.is_empty() || trimmed.starts_with('#') {
        return None;
    }
    let named = line.split_once('=').map(|(name, _)| (name.len() + 1, name.trim()));
    let Some((value_at, name)) =
        named.map(|(at, name)| (at, without_export(name))).filter(|(_, n)| is_name(n))
    else {
        return Some(("", Err(NO_NAME), line.len()));
    };
    let value = line[value_at..].trim_start();
    let value_at = line.len() - value.len();
    let quoted = value.chars().next().filter(|first| matches!(first, '\'' | '"'));
    let Some(quote) = quoted else { return Some((name, unquoted(value), line.len())) };
    match in_quotes(quote, &from_line[value_at + 1..]) {
        Ok((value, length)) => {
            let end = value_at + 1 + length;
            let behind = from_line[end..].lines().next().unwrap_or_default().trim();
            let is_clean = behind.is_empty() || behind.starts_with('#');
            Some((name, if is_clean { Ok(value) } else { Err(BEHIND_QUOTE) }, end))
        }
        Err(problem) => Some((name, Err(problem), line.len())),
    }
}

fn without_export(name: &str) -> &str {
    match name.strip_prefix("export") {
        Some(rest) if rest.starts_with([' ', '\t']) => rest.trim_start(),
        _ => name,
    }
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.'))
}

/// A value without quotes: all of it, up to a `#` with a blank before it.
fn unquoted(value: &str) -> Result<String, &'static str> {
    let is_comment = |(at, _): &(usize, &str)| *at == 0 || value[..*at].ends_with([' ', '\t']);
    let end = value.match_indices('#').find(is_comment).map_or(value.len(), |(at, _)| at);
    let value = value[..end].trim_end();
    let substitutes = value.match_indices('$').any(|(at, _)| names_something(&value[at + 1..]));
    if substitutes { Err(SUBSTITUTION) } else { Ok(value.to_owned()) }
}

/// A value in quotes, and the bytes up to behind the closing one.
fn in_quotes(quote: char, text: &str) -> Result<(String, usize), &'static str> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            _ if c == quote => return Ok((value, at + c.len_utf8())),
            '\\' => value.push(escaped(quote, &mut chars)?),
            '$' if quote == '"' && names_something(chars.as_str()) => return Err(SUBSTITUTION),
            '\r' if chars.as_str().starts_with('\n') => {}
            _ => value.push(c),
        }
    }
    Err(OPEN_QUOTE)
}

/// What stands for a `\` and the character behind it, which is taken if it belongs to it.
fn escaped(quote: char, chars: &mut CharIndices<'_>) -> Result<char, &'static str> {
    let next = chars.as_str().chars().next();
    let meant = match (quote, next) {
        ('\'', Some('\'')) => '\'',
        ('\'', _) => return Ok('\\'),
        (_, Some('n')) => '\n',
        (_, Some('r')) => '\r',
        (_, Some('t')) => '\t',
        (_, Some(c @ ('\\' | '"' | '$'))) => c,
        _ => return Err(UNKNOWN_ESCAPE),
    };
    chars.next();
    Ok(meant)
}

/// Whether what stands behind a `$` would be substituted by a shell or by others.
fn names_something(behind: &str) -> bool {
    behind.starts_with(|c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '{' | '('))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(text: &str) -> Vec<(String, Result<String, &'static str>)> {
        parse(text.as_bytes()).into_iter().map(|found| (found.name, found.value)).collect()
    }

    fn value(text: &str) -> Result<String, &'static str> {
        let [(name, value)] = <[_; 1]>::try_from(values(&format!("NAME={text}"))).unwrap();
        assert_eq!(name, "NAME");
        value
    }

    #[test]
    fn a_value_is_what_is_written() {
        for (written, meant) in [
            ("plain", "plain"),
            ("", ""),
            ("  blanks around \t", "blanks around"),
            ("two words", "two words"),
            ("with # a comment", "with"),
            ("without#a comment", "without#a comment"),
            ("# only a comment", ""),
            ("#", ""),
            (r"C:\a\b", r"C:\a\b"),
            ("a=b=c", "a=b=c"),
            (r#"in"side"#, r#"in"side"#),
            ("a$ b", "a$ b"),
            ("price$", "price$"),
            ("$$", "$$"),
            ("'$HOME ${HOME} # \\n \"'", "$HOME ${HOME} # \\n \""),
            (r"'Let\'s'", "Let's"),
            (r#""Let's \"go\" \\ \$HOME\t#""#, "Let's \"go\" \\ $HOME\t#"),
            ("\"over\r\ntwo\"  # lines", "over\ntwo"),
            ("\"\"", ""),
            ("'\u{e4}\u{1f600}'", "\u{e4}\u{1f600}"),
        ] {
            assert_eq!(value(written).as_deref(), Ok(meant), "{written}");
        }
    }

    #[test]
    fn what_could_mean_something_else_is_an_error() {
        for (written, problem) in [
            ("pa$word", SUBSTITUTION),
            ("${HOME}/data", SUBSTITUTION),
            ("$(cat key)", SUBSTITUTION),
            (r"\$HOME", SUBSTITUTION),
            (r#""a $1""#, SUBSTITUTION),
            ("'open", OPEN_QUOTE),
            ("\"open\\\"", OPEN_QUOTE),
            ("'closed' more", BEHIND_QUOTE),
            ("\"a\"b", BEHIND_QUOTE),
            (r#""C:\data""#, UNKNOWN_ESCAPE),
        ] {
            assert_eq!(value(written), Err(problem), "{written}");
        }
        assert_eq!(parse(b"NAME=\xff\n")[0].value, Err(NOT_UTF_8));
    }

    #[test]
    fn lines_are_numbered_and_each_stands_for_itself() {
        let text = "\u{feff}A=1\r\n\n# note\n export B = '2\n3'\nwhat canary\nC='open\nD=4";
        let found: Vec<_> = parse(text.as_bytes())
            .into_iter()
            .map(|Assignment { line, name, value }| (line, name, value.map_err(|_| ())))
            .collect();
        let ok = |line, name: &str, value: &str| (line, name.to_owned(), Ok(value.to_owned()));
        let bad = |line, name: &str| (line, name.to_owned(), Err(()));
        assert_eq!(found, [ok(1, "A", "1"), ok(4, "B", "2\n3"), bad(6, ""), bad(7, "C"), ok(8, "D", "4")]);
        for none in ["=1", "1A=2", "A B=3", "A-B=3", "export", "A"] {
            assert_eq!(values(none), [(String::new(), Err(NO_NAME))], "{none}");
        }
        assert_eq!(values("export=1\nexport A.b_1=2").len(), 2);
        assert_eq!(values("# \u{fffd}\n"), []);
    }

    #[test]
    fn no_file_makes_it_stumble() {
        let pieces =
            ["A=", "'", "\"", "\\", "$", "{", "#", " ", "\n", "\r\n", "=", "\u{e4}", "\u{feff}", "x"];
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let text: String =
                (0..random.usize(..12)).map(|_| pieces[random.usize(..pieces.len())]).collect();
            let lines = text.matches('\n').count() + 1;
            let mut last = 0;
            for found in parse(text.as_bytes()) {
                assert!(last < found.line && found.line <= lines, "seed {seed}: {text:?}");
                last = found.line;
            }
        }
    }
}

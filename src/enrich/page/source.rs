//! Who a source is, by its host or by what people call it: tables of ours, and the
//! operator's own before them.
//!
//! A row is `kind`, tab, `name`, tab, what it is known by, with a blank between: a host,
//! which stands for all below it too; `name.*`, which is a host in every country; an app's
//! name, as browsers write it; or a word, as links write it.

use std::{
    borrow::Cow,
    fmt, io,
    path::PathBuf,
    str,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use arc_swap::ArcSwapOption;
use smallvec::SmallVec;

use super::{host, referrer::APP};
use crate::watched::WatchedFile;

/// Of what month ours are.
pub(super) const STAMP: &str = "2026-11";
/// Most bytes of an operator's file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest thing that a source is known by.
const KEY_BYTES_MAX: usize = 255;
const NAME_BYTES_MAX: usize = 100;
/// No word that is known is longer.
const WORD_BYTES_MAX: usize = 32;

/// Ours. Read when the first source is looked up.
static OURS: LazyLock<Table> = LazyLock::new(|| {
    let text = concat!(
        include_str!("../data/search.tsv"),
        include_str!("../data/social.tsv"),
        include_str!("../data/video.tsv"),
        include_str!("../data/shopping.tsv"),
        include_str!("../data/assistants.tsv"),
        include_str!("../data/email.tsv"),
        include_str!("../data/others.tsv"),
        include_str!("../data/words.tsv"),
        include_str!("../data/spam.tsv"),
    );
    Table::parse(text.into()).expect("a test has read them")
});

/// What a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Search,
    Social,
    Video,
    Shopping,
    Assistant,
    Email,
    Affiliate,
    Audio,
    Sms,
    Push,
    /// Known by name, and of no kind of its own.
    Other,
    /// Sends referrers only so that somebody looks at it.
    Spam,
}

impl Kind {
    const ALL: [(&'static str, Self); 12] = [
        ("search", Self::Search),
        ("social", Self::Social),
        ("video", Self::Video),
        ("shopping", Self::Shopping),
        ("ai", Self::Assistant),
        ("email", Self::Email),
        ("affiliate", Self::Affiliate),
        ("audio", Self::Audio),
        ("sms", Self::Sms),
        ("push", Self::Push),
        ("other", Self::Other),
        ("spam", Self::Spam),
    ];
}

/// What a table says of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<'t> {
    /// Nothing if it is called what it was called.
    pub(super) name: Option<&'t str>,
    pub(super) kind: Kind,
    /// That of its advertisements.
    pub(super) is_paid: bool,
}

/// A source that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) name: Option<Cow<'static, str>>,
    pub(super) kind: Kind,
    pub(super) is_paid: bool,
}

impl Source {
    fn of(entry: Entry<'_>, name: impl FnOnce(&str) -> Cow<'static, str>) -> Self {
        Self { name: entry.name.map(name), kind: entry.kind, is_paid: entry.is_paid }
    }
}

/// The tables. Their own file may be replaced while they are in use.
#[derive(Debug)]
pub(super) struct Sources {
    file: Option<Mutex<WatchedFile>>,
    theirs: ArcSwapOption<Theirs>,
}

/// An operator's own table.
#[derive(Debug)]
struct Theirs {
    table: Table,
    stamp: String,
}

impl Sources {
    /// Ours, and those of a file, which is read at once.
    pub(super) fn new(path: Option<PathBuf>) -> Result<Self, SourcesError> {
        let Some(path) = path else { return Ok(Self { file: None, theirs: ArcSwapOption::empty() }) };
        let mut file = WatchedFile::new(path, FILE_BYTES_MAX);
        let theirs = Theirs::of(&file.read_first(), &file)?;
        Ok(Self { file: Some(Mutex::new(file)), theirs: ArcSwapOption::from_pointee(theirs) })
    }

    /// Reads the operator's file if it is another one now; says if it was. If it cannot be
    /// used, which is told once, what was read last stays. Waits for the disk.
    pub(super) fn reload(&self) -> Result<bool, SourcesError> {
        let Some(file) = &self.file else { return Ok(false) };
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(read) = file.read_if_changed() else { return Ok(false) };
        self.theirs.store(Some(Arc::new(Theirs::of(&read, &file)?)));
        Ok(true)
    }

    /// Which tables these are.
    pub(super) fn stamp(&self) -> Cow<'static, str> {
        match self.theirs.load().as_ref() {
            None => STAMP.into(),
            Some(theirs) => theirs.stamp.clone().into(),
        }
    }

    /// Whose a host is, or whose the one above it is: the operator's word before ours.
    pub(super) fn of_host(&self, host: &str) -> Option<Source> {
        self.find(|table| table.of_host(host))
    }

    /// Whom a link means that calls its source so.
    pub(super) fn of_word(&self, word: &str) -> Option<Source> {
        let word = plain_word(word)?;
        let word = std::str::from_utf8(&word).ok()?;
        self.find(|table| table.of_word(word))
    }

    fn find(&self, look_up: impl for<'t> Fn(&'t Table) -> Option<Entry<'t>>) -> Option<Source> {
        let theirs = self.theirs.load();
        let in_theirs = theirs.as_ref().and_then(|theirs| look_up(&theirs.table));
        in_theirs.map(|entry| Source::of(entry, |name| name.to_owned().into())).or_else(|| {
            let ours: &'static Table = &OURS;
            let entry: Entry<'static> = look_up(ours)?;
            Some(Source { name: entry.name.map(Cow::Borrowed), kind: entry.kind, is_paid: entry.is_paid })
        })
    }
}

impl Theirs {
    fn of(read: &io::Result<Vec<u8>>, file: &WatchedFile) -> Result<Self, SourcesError> {
        let error = |why| SourcesError { path: file.path().to_owned(), why };
        let bytes = read.as_ref().map_err(|why| error(BadTable::Unreadable(why.to_string())))?;
        let text = str::from_utf8(bytes).map_err(|why| error(BadTable::Unreadable(why.to_string())))?;
        let stamp = format!("{STAMP}+{:08x}", crc32fast::hash(bytes));
        let table = Table::parse(text.to_owned().into()).map_err(error)?;
        Ok(Self { table, stamp })
    }
}

/// A word without what people write in one way or another; nothing if it is none.
fn plain_word(word: &str) -> Option<SmallVec<[u8; WORD_BYTES_MAX]>> {
    let mut plain = SmallVec::new();
    for byte in word.bytes().filter(|byte| !matches!(byte, b' ' | b'-' | b'_')) {
        if plain.len() == WORD_BYTES_MAX || !byte.is_ascii_alphanumeric() {
            return None;
        }
        plain.push(byte.to_ascii_lowercase());
    }
    (!plain.is_empty()).then_some(plain)
}

/// Rows, sorted by what they are known by: twelve bytes each beside their text.
#[derive(Debug)]
pub(super) struct Table {
    text: Cow<'static, str>,
    names: Vec<Span>,
    /// Hosts, apps and words; none of one sort looks like one of another.
    rows: Vec<Row>,
    /// Those that are hosts in every country, without what stands for that.
    families: Vec<Row>,
}

/// A part of a table's text.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u32,
    bytes: u8,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    /// Of what it is known by: what rows are sorted by.
    hash: u32,
    start: u32,
    bytes: u8,
    /// A [`Kind`]'s number, and [`PAID`].
    kind: u8,
    /// The place among the names.
    name: u16,
}

const PAID: u8 = 0x80;

impl Table {
    /// Of a text of rows.
    pub(super) fn parse(text: Cow<'static, str>) -> Result<Self, BadTable> {
        let mut table =
            Self { text: Cow::Borrowed(""), names: Vec::new(), rows: Vec::new(), families: Vec::new() };
        for (index, line) in text.lines().enumerate() {
            let line = line.strip_suffix('\r').unwrap_or(line);
            if !line.trim().is_empty() && !line.starts_with('#') {
                let place = |part: &str| part.as_ptr() as usize - text.as_ptr() as usize;
                table.add(line, place).map_err(|why| BadTable::Row { line: index + 1, why })?;
            }
        }
        table.text = text;
        table.sort()?;
        Ok(table)
    }

    fn add(&mut self, line: &str, place: impl Fn(&str) -> usize) -> Result<(), String> {
        let columns: Vec<_> = line.split('\t').collect();
        let [kind, name, keys] = columns[..] else {
            return Err(format!(
                "got {} columns, want kind, name and hosts with a tab between",
                columns.len()
            ));
        };
        let kind = kind_of(kind)?;
        let name = name.trim();
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) || name.chars().any(char::is_control) {
            return Err(format!("name: got {name:?}, want 1 to {NAME_BYTES_MAX} bytes, or - for none"));
        }
        let name_place =
            u16::try_from(self.names.len()).map_err(|_| "got more than 65536 rows".to_owned())?;
        self.names.push(Span { start: start(place(name))?, bytes: bytes(name)? });
        let before = self.rows.len() + self.families.len();
        for key in keys.split_ascii_whitespace() {
            let stem = key.strip_suffix(".*");
            check_key(key, stem)?;
            let rows = if stem.is_some() { &mut self.families } else { &mut self.rows };
            let known_by = stem.unwrap_or(key);
            let (start, bytes) = (start(place(known_by))?, bytes(known_by)?);
            rows.push(Row { hash: hash(known_by), start, bytes, kind, name: name_place });
        }
        if before == self.rows.len() + self.families.len() {
            return Err("got no host, want one or more".to_owned());
        }
        Ok(())
    }

    fn sort(&mut self) -> Result<(), BadTable> {
        let Self { text, rows, families, .. } = self;
        for (rows, ending) in [(rows, ""), (families, ".*")] {
            let key = |row: &Row| &text[row.start as usize..][..usize::from(row.bytes)];
            rows.sort_unstable_by(|one, other| {
                one.hash.cmp(&other.hash).then_with(|| key(one).cmp(key(other)))
            });
            rows.shrink_to_fit();
            let twice = rows.windows(2).find(|two| key(&two[0]) == key(&two[1]));
            if let Some(twice) = twice {
                return Err(BadTable::Twice { key: format!("{}{ending}", key(&twice[0])) });
            }
        }
        self.names.shrink_to_fit();
        Ok(())
    }

    fn of_word(&self, word: &str) -> Option<Entry<'_>> {
        self.look_up(&self.rows, word)
    }

    fn of_host(&self, of: &str) -> Option<Entry<'_>> {
        if of.starts_with(APP) {
            return self.look_up(&self.rows, of);
        }
        let in_country = || host::without_country(of).and_then(|stem| self.of_family(stem));
        host::and_above(of).find_map(|host| self.look_up(&self.rows, host)).or_else(in_country)
    }

    /// By the longest end of what is left without the country.
    fn of_family(&self, stem: &str) -> Option<Entry<'_>> {
        host::with_ends(stem).find_map(|stem| self.look_up(&self.families, stem))
    }

    fn look_up(&self, rows: &[Row], key: &str) -> Option<Entry<'_>> {
        let part = |start: u32, bytes: u8| &self.text[start as usize..][..usize::from(bytes)];
        let hash = hash(key);
        let alike =
            rows[rows.partition_point(|row| row.hash < hash)..].iter().take_while(|row| row.hash == hash);
        let row = alike.copied().find(|row| part(row.start, row.bytes) == key)?;
        let name = self.names[usize::from(row.name)];
        let name = part(name.start, name.bytes);
        let (_, kind) = Kind::ALL[usize::from(row.kind & !PAID)];
        Some(Entry { name: (name != "-").then_some(name), kind, is_paid: row.kind & PAID != 0 })
    }
}

/// FNV-1a: short texts, and nobody chooses them who gains by two that are alike.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811C_9DC5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

fn start(place: usize) -> Result<u32, String> {
    u32::try_from(place).map_err(|_| "got more than 4 GiB".to_owned())
}

fn bytes(text: &str) -> Result<u8, String> {
    let error = |_| format!("got {} bytes, want at most {KEY_BYTES_MAX}", text.len());
    u8::try_from(text.len()).map_err(error)
}

fn kind_of(text: &str) -> Result<u8, String> {
    let (name, paid) = text.strip_suffix("-ads").map_or((text, 0), |name| (name, PAID));
    let place = Kind::ALL.iter().position(|(known, _)| *known == name);
    let number = place.and_then(|place| u8::try_from(place).ok());
    number.map(|number| number | paid).ok_or_else(|| {
        let known: Vec<_> = Kind::ALL.iter().map(|(known, _)| *known).collect();
        format!(
            "kind: got {text:?}, want one of {}, with -ads behind it where it is paid for",
            known.join(", ")
        )
    })
}

fn check_key(key: &str, stem: Option<&str>) -> Result<(), String> {
    let wrong = |want: &str| Err(format!("got {key:?}, want {want}"));
    if let Some(app) = key.strip_prefix(APP) {
        let is_of_it = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_');
        let is_app = !app.is_empty() && app.bytes().all(is_of_it);
        return if is_app { Ok(()) } else { wrong("the name of an app in lower case") };
    }
    if !key.contains('.') {
        let is_word = plain_word(key).is_some_and(|word| *word == *key.as_bytes());
        return if is_word { Ok(()) } else { wrong("a word in lower case without blanks, - and _") };
    }
    if host::normal(stem.unwrap_or(key)).as_deref() != Some(stem.unwrap_or(key)) {
        return wrong("a host in lower case, as DNS has it");
    }
    if stem.is_none() && psl::domain_str(key).is_none() {
        return wrong("a host, not what many hosts end in");
    }
    Ok(())
}

/// Why an operator's file is not used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct SourcesError {
    path: PathBuf,
    why: BadTable,
}

/// Why a text is no table.
#[derive(Debug)]
pub(super) enum BadTable {
    Unreadable(String),
    Row { line: usize, why: String },
    Twice { key: String },
}

impl fmt::Display for BadTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(error) => write!(f, "cannot be read: {error}"),
            Self::Row { line, why } => write!(f, "line {line}: {why}"),
            Self::Twice { key } => write!(f, "{key} stands there twice, want it once"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use super::*;

    const FILES: [&str; 9] = [
        include_str!("../data/search.tsv"),
        include_str!("../data/social.tsv"),
        include_str!("../data/video.tsv"),
        include_str!("../data/shopping.tsv"),
        include_str!("../data/assistants.tsv"),
        include_str!("../data/email.tsv"),
        include_str!("../data/others.tsv"),
        include_str!("../data/words.tsv"),
        include_str!("../data/spam.tsv"),
    ];

    fn keys() -> BTreeMap<&'static str, (&'static str, &'static str)> {
        let mut keys = BTreeMap::new();
        for line in FILES.iter().flat_map(|file| file.lines()).filter(|line| !line.starts_with('#')) {
            let [kind, name, known_by] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
            for key in known_by.split(' ') {
                assert_eq!(keys.insert(key, (kind, name)), None, "{key} is there twice");
            }
        }
        keys
    }

    #[test]
    fn every_row_of_ours_is_a_row_and_none_says_what_another_does() {
        let keys = keys();
        assert_eq!(OURS.rows.len() + OURS.families.len(), keys.len());
        for (key, row) in &keys {
            let above = key.split_once('.').map(|(_, above)| above).filter(|_| !key.starts_with(APP));
            let said = above.and_then(|above| host::and_above(above).find_map(|host| keys.get(host)));
            assert_ne!(said, Some(row), "{key} is below one that says the same");
        }
        let of_kind = |name| keys.values().filter(|(kind, _)| *kind == name).count();
        for (kind, at_least) in [
            ("search", 300),
            ("social", 250),
            ("video", 50),
            ("shopping", 100),
            ("ai", 50),
            ("email", 100),
            ("spam", 380),
        ] {
            assert!(of_kind(kind) >= at_least, "{kind}: {}", of_kind(kind));
        }
    }

    #[test]
    fn every_file_names_where_its_facts_are_from() {
        for file in FILES {
            assert!(file.starts_with("# ") && file.contains("ur own compilation"), "{file:.100}");
            assert!(file.is_ascii() || !file.contains('\u{fffd}'));
        }
    }

    fn name_of(host: &str) -> Option<(Cow<'static, str>, Kind)> {
        let source = Sources::new(None).unwrap().of_host(host)?;
        Some((source.name.unwrap_or("-".into()), source.kind))
    }

    #[test]
    fn a_host_is_known_by_itself_what_is_above_it_and_in_every_country() {
        for (host, want) in [
            ("google.com", Some(("Google", Kind::Search))),
            ("google.co.uk", Some(("Google", Kind::Search))),
            ("images.google.com.br", Some(("Google", Kind::Search))),
            ("mail.google.com", Some(("Gmail", Kind::Email))),
            ("gemini.google.com", Some(("Gemini", Kind::Assistant))),
            ("mail.yandex.ru", Some(("Yandex Mail", Kind::Email))),
            ("yandex.com.tr", Some(("Yandex", Kind::Search))),
            ("l.facebook.com", Some(("Facebook", Kind::Social))),
            ("de.search.yahoo.com", Some(("Yahoo!", Kind::Search))),
            ("mail.yahoo.com", Some(("Yahoo! Mail", Kind::Email))),
            ("amazon.co.jp", Some(("Amazon", Kind::Shopping))),
            ("t.co", Some(("X", Kind::Social))),
            ("android-app://com.google.android.gm", Some(("Gmail", Kind::Email))),
            ("a.semalt.com", Some(("-", Kind::Spam))),
            ("notsemalt.com", None),
            ("semalt.com.example", None),
            ("google.example", None),
            ("google.github.io", None),
            ("notgoogle.com", None),
            ("facebook.com.evil.example", None),
            ("not.co", None),
            ("co", None),
            ("google", None),
            ("127.0.0.1", None),
            ("[::1]", None),
            ("android-app://com.unknown", None),
        ] {
            let want = want.map(|(name, kind)| (Cow::Borrowed(name), kind));
            assert_eq!(name_of(host), want, "{host}");
        }
    }

    #[test]
    fn a_word_is_known_however_it_is_written() {
        let sources = Sources::new(None).unwrap();
        for word in ["Google_Ads", "google ads", "GOOGLE-ADS", "googleads", " adwords "] {
            let source = sources.of_word(word).unwrap();
            assert_eq!((source.name.as_deref(), source.is_paid), (Some("Google"), true), "{word}");
        }
        assert_eq!(sources.of_word("e-mail").unwrap().name, None);
        for word in ["", " ", "nobody", "google.com", "göögle", &"x".repeat(1000)] {
            assert_eq!(sources.of_word(word), None, "{word}");
        }
    }

    #[test]
    fn a_table_stays_small() {
        let rows = OURS.rows.len() + OURS.families.len();
        let held = rows * size_of::<Row>() + OURS.names.len() * size_of::<Span>();
        assert!(held <= 40_000 && OURS.rows.capacity() == OURS.rows.len(), "{held} bytes for {rows} rows");
    }

    #[test]
    fn what_is_wrong_in_a_file_is_told_by_its_line() {
        for (text, want) in [
            (
                "search\tX\tx.example\ty",
                "line 1: got 4 columns, want kind, name and hosts with a tab between",
            ),
            ("# a\n\nseach\tX\tx.example", "line 3: kind: got \"seach\", want one of search, social"),
            ("search\t\tx.example", "line 1: name: got \"\", want 1 to 100 bytes"),
            ("search\tX\t ", "line 1: got no host, want one or more"),
            ("search\tX\tX.example", "line 1: got \"X.example\", want a host in lower case"),
            ("search\tX\thttps://x.example/", "line 1: got \"https://x.example/\", want a host"),
            ("search\tX\tco.uk", "line 1: got \"co.uk\", want a host, not what many hosts end in"),
            ("search\tX\tgithub.io", "line 1: got \"github.io\", want a host, not what many hosts end in"),
            ("search\tX\tx-y", "line 1: got \"x-y\", want a word in lower case"),
            ("search\tX\tandroid-app://", "line 1: got \"android-app://\", want the name of an app"),
            ("search\tX\tx.example\nai\tY\tx.example", "x.example stands there twice, want it once"),
            ("search\tX\tx.* x.*", "x.* stands there twice, want it once"),
        ] {
            let error = Table::parse(text.to_owned().into()).unwrap_err().to_string();
            assert!(error.starts_with(want), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_operators_rows_win_and_are_read_again_when_they_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sources.tsv");
        let missing = Sources::new(Some(path.clone())).unwrap_err().to_string();
        assert!(missing.contains("sources.tsv: cannot be read: "), "{missing}");

        fs::write(&path, "other\tOurselves\tgoogle.com semalt.com\r\nemail\tPost\tpost\n").unwrap();
        let sources = Sources::new(Some(path.clone())).unwrap();
        let name = |host| sources.of_host(host).and_then(|source| source.name);
        assert_eq!(name("mail.google.com").as_deref(), Some("Ourselves"));
        assert_eq!(sources.of_host("semalt.com").unwrap().kind, Kind::Other, "no spam for them");
        assert_eq!(name("bing.com").as_deref(), Some("Bing"));
        assert_eq!(sources.of_word("post").unwrap().kind, Kind::Email);
        let stamp = sources.stamp();
        assert!(stamp.starts_with("2026-11+") && stamp.len() == STAMP.len() + 9, "{stamp}");
        assert!(!sources.reload().unwrap(), "it is the same");

        fs::write(&path, "nonsense").unwrap();
        assert!(sources.reload().unwrap_err().to_string().contains("line 1: got 1 columns"));
        assert!(!sources.reload().unwrap(), "it is told once");
        assert_eq!(name("google.com").as_deref(), Some("Ourselves"), "what was read stays");
        fs::write(&path, vec![b'#'; FILE_BYTES_MAX as usize + 1]).unwrap();
        assert!(
            sources.reload().unwrap_err().to_string().contains("got 1048577 bytes, want at most 1048576")
        );

        fs::write(&path, "ai\tMine\tgoogle.com\n").unwrap();
        assert!(sources.reload().unwrap());
        assert_eq!((name("google.com").as_deref(), name("semalt.com")), (Some("Mine"), None));
        assert_ne!(sources.stamp(), stamp);
    }
}

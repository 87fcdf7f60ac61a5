//! `analytics-relay secrets status|rewrap|unseal|equal|new-kek`.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, BufRead, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};

use super::{keys, privacy};
use crate::{
    config::Config,
    letter_files::lock_to_replace,
    privacy::unsealed,
    queue::spool::{
        fs::{RealFs, SpoolFs},
        head::{self, Head},
        index::Segment,
        layout::UNREADABLE,
    },
    sealing::{
        FileKind, KeyBlocks, Keyring, Rewrap, RewrapError,
        keyring::{new_kek as make_kek, new_kid},
        lines,
    },
    time::Clock,
};

/// Where a relay in test mode keeps its files.
const TEST_MODE: &str = "test-mode";

/// A file that may be sealed.
#[derive(Debug)]
struct Candidate {
    path: PathBuf,
    kind: FileKind,
    /// The first number of a segment.
    first_seq: u64,
}

/// Prints a new key, alone.
pub(super) fn new_kek(name: Option<String>) -> anyhow::Result<ExitCode> {
    let name = match name {
        Some(name) => name,
        None => new_kid(Clock::system().now_ms())?,
    };
    writeln!(io::stdout(), "{}", make_kek(&name)?)?;
    Ok(ExitCode::SUCCESS)
}

/// Puts back the values that are sealed in lines of JSON; those that do not open stay as they
/// are.
pub(super) fn unseal(config: &Config) -> anyhow::Result<ExitCode> {
    let sealing = keys(config)?;
    // Why, how many, and in which line the first.
    let mut failed: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut put_back = || -> anyhow::Result<()> {
        for (number, line) in (1..).zip(io::stdin().lock().lines()) {
            let (line, unopened) = unsealed(&line.context("standard input cannot be read")?, &sealing);
            unopened.iter().for_each(|why| note(&mut failed, why.to_string(), number));
            writeln!(out, "{line}")?;
        }
        Ok(out.flush()?)
    };
    if let Err(error) = put_back() {
        let kind = error.downcast_ref().map(io::Error::kind);
        // `unseal | head` is no failure.
        if kind != Some(io::ErrorKind::BrokenPipe) {
            return Err(error);
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let told =
        failed.iter().map(|(why, (count, line))| format!("\n  {count}, the first in line {line}: {why}"));
    bail!("values stay sealed:{}", told.collect::<String>());
}

/// Counts why a value stays sealed. Who forges them cannot have endless reasons told.
fn note(failed: &mut BTreeMap<String, (u64, u64)>, why: String, line: u64) {
    const REASONS_MAX: usize = 20;
    if failed.len() < REASONS_MAX || failed.contains_key(&why) {
        failed.entry(why).or_insert((0, line)).0 += 1;
    }
}

/// Prints by what the values of a name that equal a text are found in the store. The text is
/// read from standard input: a command line is shown to everybody.
pub(super) fn equal(config: &Config, name: &str) -> anyhow::Result<ExitCode> {
    let Some(privacy) = privacy::open(config)? else {
        bail!("got no PRIVACY_FILE, want one that seals {name} in the store");
    };
    let mut value = String::new();
    io::stdin().lock().read_line(&mut value).context("standard input cannot be read")?;
    let Some(equal) = privacy.equal(name, &value) else {
        bail!("got no text, or no PRIVACY_HASH_KEY, want a text in standard input and the key");
    };
    writeln!(io::stdout(), "{equal}")?;
    Ok(ExitCode::SUCCESS)
}

/// What of a sort of file is sealed with a key.
type Row = (String, FileKind);

/// Counts files by their keys. The exit code says whether all of them can be opened.
pub(super) fn status(config: &Config) -> anyhow::Result<ExitCode> {
    let sealing = keys(config)?;
    let mut rows: BTreeMap<Row, (u64, PathBuf)> = BTreeMap::new();
    let mut locked = 0;
    for file in candidates(config)? {
        // It may have been removed meanwhile.
        let Some(blocks) = file.blocks()? else { continue };
        locked += u64::from(sealing.open(&blocks, file.kind).is_err());
        // Half of a rewrap that was killed.
        let kids = blocks.kids().join(" and ");
        let kids = if kids.is_empty() { "(damaged)".to_owned() } else { kids };
        rows.entry((kids, file.kind)).or_insert((0, file.path)).0 += 1;
    }
    let keyring = sealing.keyring();
    let writer = keyring.and_then(Keyring::writer).map_or("none: new files are not sealed", |kek| kek.kid());
    println!("new files are sealed with: {writer}");
    println!("keys that are given: {}", keyring.map_or("none".to_owned(), Keyring::kids));
    tell_of_store(config, keyring);
    if rows.is_empty() {
        println!("no file is sealed");
        return Ok(ExitCode::SUCCESS);
    }
    println!("\n{:<28} {:<14} {:>6}  {:<7} such as", "key", "sort", "files", "given");
    for ((kid, kind), (files, path)) in rows {
        let is_given =
            kid.split(" and ").any(|kid| keyring.is_some_and(|keyring| keyring.find(kid).is_some()));
        let is_given = if is_given { "yes" } else { "NO" };
        println!("{kid:<28} {:<14} {files:>6}  {is_given:<7} {}", kind.name(), path.display());
    }
    if locked > 0 {
        println!("\n{locked} file(s) cannot be opened with the keys that are given");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Seals the key of each file anew. The exit code says whether files do not need the other keys
/// any more.
pub(super) fn rewrap(config: &Config) -> anyhow::Result<ExitCode> {
    let sealing = keys(config)?;
    let Some(keyring) = sealing.keyring() else {
        bail!("no key is given: set RELAY_KEK, RELAY_KEK_FILE or RELAY_KEK_COMMAND, the new key first");
    };
    let Some(writer) = keyring.writer() else {
        bail!("the first key is none: want the one that files are to be sealed with in the first place");
    };
    let (mut rewrapped, mut up_to_date, mut failed) = (0_u64, 0_u64, 0_u64);
    for file in candidates(config)? {
        match file.rewrap(keyring) {
            Ok(Rewrap::Rewrapped) => rewrapped += 1,
            Ok(Rewrap::UpToDate) => up_to_date += 1,
            Ok(Rewrap::NotSealed) => {}
            // A relay is done with it.
            Err(RewrapError::File(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                failed += 1;
                println!("{}: {error}", file.path.display());
            }
        }
    }
    println!("{rewrapped} file(s) are sealed with {} now, {up_to_date} were", writer.kid());
    tell_of_store(config, Some(keyring));
    // What a relay has begun meanwhile, if it was started with another first key.
    let mut left = 0_u64;
    for file in candidates(config)? {
        let Some(blocks) = file.blocks()? else { continue };
        left += u64::from(blocks.kids() != [writer.kid()]);
    }
    if failed + left > 0 {
        println!("{left} file(s) need another key still: see secrets status, and run this again");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Nobody knows which keys its fields are sealed with but by reading all of it.
fn tell_of_store(config: &Config, keyring: Option<&Keyring>) {
    if let Some(keyring) = keyring.filter(|_| config.store.is_on() && config.privacy.file.is_some()) {
        println!(
            "fields of the store may be sealed with any of them, and are not looked at: {}",
            keyring.kids()
        );
    }
}

impl Candidate {
    /// Its key; none if it is not sealed, or not there any more.
    fn blocks(&self) -> anyhow::Result<Option<KeyBlocks>> {
        let read = || -> io::Result<Option<KeyBlocks>> {
            match self.kind {
                FileKind::Segment => {
                    let file = RealFs.open_to_read(&self.path)?;
                    Ok(Head::read(&*file, self.first_seq)?.blocks)
                }
                _ => Ok(lines::read_blocks(&fs::File::open(&self.path)?)?.map(|(_, blocks)| blocks)),
            }
        };
        match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.with_context(|| format!("{} cannot be read", self.path.display())),
        }
    }

    fn rewrap(&self, keyring: &Keyring) -> Result<Rewrap, RewrapError> {
        match self.kind {
            FileKind::Segment => head::rewrap(&*RealFs.open(&self.path)?, self.first_seq, keyring),
            _ => {
                // Who takes letters out makes a copy of the key as it was.
                let _lock = lock_to_replace(&self.path)?;
                let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
                lines::rewrap(&file, self.kind, keyring)
            }
        }
    }
}

/// Every file that may be sealed, those that were set aside too.
fn candidates(config: &Config) -> io::Result<Vec<Candidate>> {
    let mut all = Vec::new();
    for spool in [config.spool.dir.clone(), config.spool.dir.join(TEST_MODE)] {
        for path in files_in(&spool.join("segments"))? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some(first_seq) = Segment::parse_name(name.strip_suffix(UNREADABLE).unwrap_or(name)) {
                all.push(Candidate { path, kind: FileKind::Segment, first_seq });
            }
        }
    }
    for data in [config.data_dir.clone(), config.data_dir.join(TEST_MODE)] {
        for (dir, kind) in [("spill", FileKind::Spill), ("dead-letters", FileKind::DeadLetters)] {
            for provider in crate::files::list_dirs(&data.join(dir))? {
                all.extend(lines_in(&data.join(dir).join(provider), kind)?);
            }
        }
        all.extend(lines_in(&data.join("refused"), FileKind::Refused)?);
    }
    Ok(all)
}

/// Files of lines, with those that were set aside and copies.
fn lines_in(dir: &Path, kind: FileKind) -> io::Result<impl Iterator<Item = Candidate>> {
    let is_one = |path: &PathBuf| {
        let ending = path.extension().and_then(|ending| ending.to_str());
        matches!(ending, Some("sealed" | "unreadable" | "damaged"))
    };
    let candidate = move |path| Candidate { path, kind, first_seq: 0 };
    Ok(files_in(dir)?.into_iter().filter(is_one).map(candidate))
}

/// The files of a directory, sorted; none if it is not there.
fn files_in(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match RealFs.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        names => Ok(names?.into_iter().map(|name| dir.join(name)).collect()),
    }
}

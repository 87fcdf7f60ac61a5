//! Where the keys come from: one of three settings.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use analytics_relay_providers::Secret;
use rustix::process::{Pid, Signal, kill_process_group};
use thiserror::Error;

use super::keyring::{BadKeys, Keyring};
use crate::settings::Reader;

/// How long a command has to print the keys.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(10);
/// Most bytes of a text of keys.
const TEXT_BYTES_MAX: u64 = 64 * 1024;
/// Between two looks whether a command has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

const TEXT: &str = "RELAY_KEK";
const FILE: &str = "RELAY_KEK_FILE";
const COMMAND: &str = "RELAY_KEK_COMMAND";

/// Whether files are sealed.
#[derive(Debug, Clone, Default)]
pub struct SealingSettings {
    source: Option<Source>,
    /// Start without a key that files are sealed with: they are set aside, and their
    /// events are lost.
    pub quarantine_unreadable: bool,
}

#[derive(Debug, Clone)]
enum Source {
    Text(Secret),
    File(PathBuf),
    /// May hold a token.
    Command(Secret),
}

/// Why there are no keys.
#[derive(Debug, Error)]
pub enum NoKeys {
    /// What came is not what is wanted.
    #[error("{setting}: {wrong}")]
    Wrong {
        /// The setting,
        setting: &'static str,
        /// and what is wrong. Never what stands there.
        wrong: String,
    },
    /// The file cannot be read, or the command cannot be run.
    #[error("{setting}: {what}")]
    Unreadable {
        /// The setting,
        setting: &'static str,
        /// what could not be done,
        what: String,
        /// and what the system says.
        source: io::Error,
    },
}

impl SealingSettings {
    /// True if keys are named.
    pub(crate) fn is_on(&self) -> bool {
        self.source.is_some()
    }

    pub(crate) fn read(reader: &mut Reader) -> Self {
        let [text, file, command] = [reader.secret(TEXT), reader.text(FILE), reader.secret(COMMAND)];
        let set = [(TEXT, &text), (FILE, &file), (COMMAND, &command)];
        let set: Vec<&str> =
            set.iter().filter(|(_, value)| !value.is_empty()).map(|(name, _)| *name).collect();
        if set.len() > 1 {
            reader.error(format!("{}: got {} settings, want one of them", set.join(", "), set.len()));
        }
        let source = match set.first() {
            Some(&TEXT) => Some(Source::Text(Secret::new(text))),
            Some(&FILE) => Some(Source::File(PathBuf::from(file))),
            Some(_) => Some(Source::Command(Secret::new(command))),
            None => None,
        };
        Self { source, quarantine_unreadable: false }
    }

    /// The keys; none if no setting names any. Reads the file, or runs the command, which
    /// takes ten seconds at most.
    pub(crate) fn load(&self) -> Result<Option<Keyring>, NoKeys> {
        let (setting, text) = match &self.source {
            None => return Ok(None),
            Some(Source::Text(text)) => (TEXT, text.clone()),
            Some(Source::File(path)) => (FILE, read_file(path)?),
            Some(Source::Command(line)) => (COMMAND, run(line.expose(), COMMAND_TIME_MAX)?),
        };
        Keyring::parse(text.expose()).map(Some).map_err(|error: BadKeys| wrong(setting, error))
    }
}

fn wrong(setting: &'static str, wrong: impl ToString) -> NoKeys {
    NoKeys::Wrong { setting, wrong: wrong.to_string() }
}

fn read_file(path: &PathBuf) -> Result<Secret, NoKeys> {
    let what = format!("{} cannot be read", path.display());
    let read = File::open(path).and_then(bounded);
    text(FILE, read.map_err(|source| NoKeys::Unreadable { setting: FILE, what, source })?)
}

/// One byte more than is taken.
fn bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn text(setting: &'static str, bytes: Vec<u8>) -> Result<Secret, NoKeys> {
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        return Err(wrong(setting, format!("got more than {TEXT_BYTES_MAX} bytes")));
    }
    String::from_utf8(bytes).map(Secret::new).map_err(|_| wrong(setting, "got bytes that are not UTF-8"))
}

/// What a command prints. It has no terminal and no shell; its standard error is ours.
fn run(line: &str, time_max: Duration) -> Result<Secret, NoKeys> {
    let unreadable = |what: &str, source| NoKeys::Unreadable { setting: COMMAND, what: what.into(), source };
    let words = words(line).map_err(|error| wrong(COMMAND, error))?;
    let (program, arguments) = words.split_first().ok_or_else(|| wrong(COMMAND, "got no command"))?;
    // A group of its own, so that all of it ends with it.
    let started = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = started.map_err(|source| unreadable("the command cannot be run", source))?;
    let out = child.stdout.take().expect("it is piped");
    let (send, printed) = mpsc::channel();
    // Ends with the group, which holds the other end of the pipe.
    thread::spawn(move || send.send(bounded(out)));
    let until = Instant::now() + time_max;
    let result = wait(&mut child, &printed, until);
    end(&mut child);
    match result {
        Err(source) => Err(unreadable("the command cannot be waited for", source)),
        Ok(None) => Err(wrong(COMMAND, format!("the command did not end within {time_max:?}"))),
        Ok(Some((bytes, _))) if bytes.len() as u64 > TEXT_BYTES_MAX => text(COMMAND, bytes),
        Ok(Some((_, status))) if !status.success() => {
            Err(wrong(COMMAND, format!("the command failed: {status}")))
        }
        Ok(Some((bytes, _))) => text(COMMAND, bytes),
    }
}

/// What it has printed, and how it has ended; `None` if it goes on.
fn wait(
    child: &mut Child,
    printed: &mpsc::Receiver<io::Result<Vec<u8>>>,
    until: Instant,
) -> io::Result<Option<(Vec<u8>, ExitStatus)>> {
    let Ok(bytes) = printed.recv_timeout(until.saturating_duration_since(Instant::now())) else {
        return Ok(None);
    };
    let bytes = bytes?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        // It is cut off, however it would have ended.
        return Ok(Some((bytes, ExitStatus::default())));
    }
    while Instant::now() < until {
        if let Some(status) = child.try_wait()? {
            return Ok(Some((bytes, status)));
        }
        thread::sleep(LOOK_INTERVAL);
    }
    Ok(None)
}

/// Ends it with all that it has begun, unless it has ended by itself: then its number may be
/// another's.
fn end(child: &mut Child) {
    if !matches!(child.try_wait(), Ok(None)) {
        return;
    }
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// The words of a command line: between blanks, or in quotes of either sort. Nothing else
/// stands for anything: no variable, no backslash, no `*`.
fn words(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some(end) if end == c => break,
                        Some(inner) => word.push(inner),
                        None => return Err("got a quote that is not closed"),
                    }
                }
            }
            blank if blank.is_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::config::Config;

    const KEY: &str = "k1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

    fn settings(name: &str, value: &str) -> SealingSettings {
        Config::from_vars([("TEST_MODE", "1"), (name, value)]).unwrap().sealing
    }

    fn error(name: &str, value: &str) -> String {
        let error = settings(name, value).load().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("AQEB"), "{error:?}");
        error.to_string()
    }

    #[test]
    fn keys_come_from_one_of_three_places_and_are_shown_nowhere() {
        assert!(Config::from_vars([("TEST_MODE", "1")]).unwrap().sealing.load().unwrap().is_none());
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "# ours\n{KEY}").unwrap();
        for (name, value) in [
            (TEXT, KEY.to_owned()),
            (FILE, file.path().display().to_string()),
            (COMMAND, format!("/bin/cat '{}'", file.path().display())),
        ] {
            let settings = settings(name, &value);
            assert_eq!(settings.load().unwrap().unwrap().kids(), "k1", "{name}");
            assert!(!format!("{settings:?}").contains("AQEB"));
        }
        let config = Config::from_vars([("TEST_MODE", "1"), (TEXT, KEY)]).unwrap();
        assert!(!format!("{config:?}").contains("AQEB"));
        let both = Config::from_vars([("TEST_MODE", "1"), (TEXT, KEY), (FILE, "/x")]).unwrap_err();
        assert_eq!(both.0, ["RELAY_KEK, RELAY_KEK_FILE: got 2 settings, want one of them"]);
    }

    #[test]
    fn what_is_wrong_names_the_setting_and_not_the_key() {
        assert!(error(TEXT, "k1=AQEB").starts_with("RELAY_KEK: entry 1: got no colon"));
        assert_eq!(error(FILE, "/nowhere/at/all"), "RELAY_KEK_FILE: /nowhere/at/all cannot be read");
        let mut large = tempfile::NamedTempFile::new().unwrap();
        large.write_all(&[b'a'; 70_000]).unwrap();
        assert_eq!(error(FILE, large.path().to_str().unwrap()), "RELAY_KEK_FILE: got more than 65536 bytes");
        assert_eq!(error(COMMAND, "/nowhere/at/all"), "RELAY_KEK_COMMAND: the command cannot be run");
        assert_eq!(error(COMMAND, "/bin/cat 'x"), "RELAY_KEK_COMMAND: got a quote that is not closed");
        let failed = error(COMMAND, &format!("/bin/sh -c 'echo {KEY}; exit 3'"));
        assert_eq!(failed, "RELAY_KEK_COMMAND: the command failed: exit status: 3");
        assert_eq!(error(COMMAND, "/bin/cat /dev/zero"), "RELAY_KEK_COMMAND: got more than 65536 bytes");
    }

    /// Also one that leaves a child behind which holds its output open.
    #[test]
    fn a_command_that_hangs_is_ended() {
        let started = Instant::now();
        for line in ["/bin/sleep 60", "/bin/sh -c 'sleep 60 & wait'", "/bin/sh -c 'exec >&-; sleep 60'"] {
            let error = run(line, Duration::from_millis(200)).unwrap_err();
            assert_eq!(error.to_string(), "RELAY_KEK_COMMAND: the command did not end within 200ms");
        }
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_command_line_is_cut_into_words_and_nothing_is_substituted() {
        let cut = words(" kms  get 'a b'c \"$HOME\" '' * \\n").unwrap();
        assert_eq!(cut, ["kms", "get", "a bc", "$HOME", "", "*", "\\n"]);
        assert!(words("a \"b").is_err());
        assert_eq!(words("  ").unwrap(), [""; 0]);
    }
}

//! The data sets by which an event's sender is told: rules of user agents and lists of
//! bots, those of the binary or the operator's, which are read again when they change.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::{ArcSwap, Guard};

use super::{
    Encoded,
    agent::{Agent, AgentInput, AgentRules},
    bot::{Bot, Bots, OwnList},
};
use crate::{
    reasons::Step,
    settings::{ConfigError, Reader},
    watched::WatchedFile,
};

/// Largest file of rules; uap-core's has 210 KB.
const REGEXES_BYTES_MAX: u64 = 4 << 20;
/// Largest list of the operator's.
const BOT_LIST_BYTES_MAX: u64 = 1 << 20;

/// What the recognition of agents is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentSettings {
    /// Rules in uap-core's form, instead of those in the binary.
    pub regexes: Option<PathBuf>,
    /// Whether the rules of devices are used: their brand and model, for 16 MB.
    pub with_devices: bool,
    /// The operator's list of bots.
    pub bot_list: Option<PathBuf>,
}

impl AgentSettings {
    /// Reads its settings. What the files hold is found out by [`Agents::new`].
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let mut path = |name| Some(reader.text(name)).filter(|path| !path.is_empty()).map(PathBuf::from);
        let (regexes, bot_list) = (path("UA_REGEXES"), path("BOT_LIST"));
        Self {
            regexes,
            bot_list,
            with_devices: reader.one_of("UA_DEVICE", &[("class", false), ("full", true)]),
        }
    }
}

/// Finds agents and bots, by data sets that can be exchanged while it does.
#[derive(Debug)]
pub struct Agents {
    with_devices: bool,
    current: ArcSwap<DataSets>,
    /// Whoever reads them may exchange what they hold.
    files: Mutex<Files>,
}

/// The operator's.
#[derive(Debug)]
struct Files {
    regexes: Option<WatchedFile>,
    bot_list: Option<WatchedFile>,
}

/// The data sets of one moment. What one event is told comes from one of these.
#[derive(Debug, Clone)]
pub struct DataSets {
    rules: Arc<AgentRules>,
    bots: Arc<Bots>,
}

/// A file that has changed: the step that goes by it, its setting, and what is wrong with
/// it, in which case the old one stays.
pub(crate) type Reloaded = (Step, &'static str, Result<(), String>);

impl Agents {
    /// Reads the operator's files, if there are any; or says all that is wrong with them.
    pub fn new(settings: &AgentSettings) -> Result<Self, ConfigError> {
        let watched = |path: &Option<PathBuf>, bytes_max| Some(WatchedFile::new(path.clone()?, bytes_max));
        let mut regexes = watched(&settings.regexes, REGEXES_BYTES_MAX);
        let mut bot_list = watched(&settings.bot_list, BOT_LIST_BYTES_MAX);
        let rules =
            first("UA_REGEXES", &mut regexes, |text| AgentRules::of_file(text, settings.with_devices));
        let own = first("BOT_LIST", &mut bot_list, OwnList::parse);
        let (rules, own) = match (rules, own) {
            (Ok(rules), Ok(own)) => (rules, own),
            (rules, own) => {
                return Err(ConfigError([rules.err(), own.err()].into_iter().flatten().collect()));
            }
        };
        let rules = rules.unwrap_or_else(|| AgentRules::built_in(settings.with_devices));
        let sets = DataSets { rules: Arc::new(rules), bots: Arc::new(Bots::new(own)) };
        Ok(Self {
            with_devices: settings.with_devices,
            current: ArcSwap::from_pointee(sets),
            files: Mutex::new(Files { regexes, bot_list }),
        })
    }

    /// The data sets of now.
    pub fn load(&self) -> Guard<Arc<DataSets>> {
        self.current.load()
    }

    /// Reads the files that have changed. Blocks.
    pub(crate) fn reload(&self) -> Vec<Reloaded> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let Files { regexes, bot_list } = &mut *files;
        let regexes = changed(Step::Agent, "UA_REGEXES", regexes, |text| {
            let rules = Arc::new(AgentRules::of_file(text, self.with_devices)?);
            self.exchange(|sets| sets.rules = rules);
            Ok(())
        });
        let bot_list = changed(Step::Bot, "BOT_LIST", bot_list, |text| {
            let own = OwnList::parse(text)?;
            self.exchange(|sets| sets.bots = Arc::new(sets.bots.with(own)));
            Ok(())
        });
        regexes.into_iter().chain(bot_list).collect()
    }

    fn exchange(&self, change: impl FnOnce(&mut DataSets)) {
        let mut sets = DataSets::clone(&self.current.load());
        change(&mut sets);
        self.current.store(Arc::new(sets));
    }
}

fn first<T>(
    setting: &'static str,
    file: &mut Option<WatchedFile>,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Option<T>, String> {
    let Some(file) = file else { return Ok(None) };
    let parsed = text_of(file.read_first()).and_then(|text| parse(&text));
    parsed.map(Some).map_err(|error| format!("{setting}: {}: {error}", file.path().display()))
}

fn changed(
    step: Step,
    setting: &'static str,
    file: &mut Option<WatchedFile>,
    take: impl FnOnce(&str) -> Result<(), String>,
) -> Option<Reloaded> {
    let file = file.as_mut()?;
    let taken = text_of(file.read_if_changed()?).and_then(|text| take(&text));
    Some((step, setting, taken.map_err(|error| format!("{}: {error}", file.path().display()))))
}

fn text_of(read: io::Result<Vec<u8>>) -> Result<String, String> {
    let bytes = read.map_err(|error| format!("cannot be read: {error}"))?;
    String::from_utf8(bytes).map_err(|_| "got what is no text, want UTF-8".to_owned())
}

impl DataSets {
    /// The agent, if there is anything to find one by.
    pub fn agent(&self, input: &AgentInput<'_>) -> Option<Arc<Encoded<Agent>>> {
        self.rules.find(input)
    }

    /// The bot, if it is one.
    pub fn bot(&self, input: &AgentInput<'_>) -> Option<Arc<Encoded<Bot>>> {
        self.bots.find(input)
    }

    /// Which rules of user agents these are: the month of those in the binary, or a
    /// checksum of the operator's.
    pub fn rules_stamp(&self) -> &str {
        self.rules.stamp()
    }

    /// Which lists of bots these are, likewise.
    pub fn bots_stamp(&self) -> &str {
        self.bots.stamp()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::enrich::agent::Hints;

    const RULES: &str =
        "user_agent_parsers:\n  - regex: '(Ours)/(\\d+)'\nos_parsers: []\ndevice_parsers: []\n";

    fn settings(regexes: Option<&Path>, bot_list: Option<&Path>) -> AgentSettings {
        AgentSettings {
            regexes: regexes.map(Path::to_owned),
            with_devices: false,
            bot_list: bot_list.map(Path::to_owned),
        }
    }

    fn replace(path: &Path, text: &str) {
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn told(agents: &Agents, user_agent: &str) -> (Option<String>, Option<String>) {
        let hints = Hints::default();
        let input = AgentInput {
            user_agent,
            hints: &hints,
            user_agent_data: None,
            webdriver: false,
            is_browser: true,
        };
        let sets = agents.load();
        let browser = sets.agent(&input).and_then(|agent| agent.value.browser.clone());
        (browser, sets.bot(&input).map(|bot| bot.value.name.clone()))
    }

    #[test]
    fn without_files_those_of_the_binary_are_used_and_named() {
        let agents = Agents::new(&settings(None, None)).unwrap();
        assert_eq!(
            told(&agents, "Mozilla/5.0 (X11; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0")
                .0
                .unwrap(),
            "Firefox"
        );
        assert_eq!((agents.load().rules_stamp(), agents.load().bots_stamp()), ("2026-03", "2026-11"));
        assert!(agents.reload().is_empty());
    }

    #[test]
    fn every_bad_file_ends_the_start_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (regexes, list) = (dir.path().join("regexes.yaml"), dir.path().join("bots"));
        fs::write(&list, "forbid x").unwrap();
        let errors = Agents::new(&settings(Some(&regexes), Some(&list))).map(|_| ()).unwrap_err().0;
        assert_eq!(errors.len(), 2);
        assert!(errors[0].starts_with("UA_REGEXES: ") && errors[0].contains("cannot be read"), "{errors:?}");
        assert!(errors[1].starts_with("BOT_LIST: ") && errors[1].contains("line 1: got"), "{errors:?}");
    }

    #[test]
    fn files_that_change_are_read_again_and_bad_ones_leave_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let (regexes, list) = (dir.path().join("regexes.yaml"), dir.path().join("bots"));
        fs::write(&regexes, RULES).unwrap();
        fs::write(&list, "deny first Ours/1").unwrap();
        let agents = Agents::new(&settings(Some(&regexes), Some(&list))).unwrap();
        let before = (agents.load().rules_stamp().to_owned(), agents.load().bots_stamp().to_owned());
        assert_eq!(told(&agents, "Ours/1"), (Some("Ours".into()), Some("first".into())));
        assert!(agents.reload().is_empty(), "nothing has changed");

        replace(&list, "deny second Ours/1");
        assert_eq!(agents.reload(), [(Step::Bot, "BOT_LIST", Ok(()))]);
        assert_eq!(
            told(&agents, "Ours/1"),
            (Some("Ours".into()), Some("second".into())),
            "and nothing is kept"
        );
        assert_eq!(agents.load().rules_stamp(), before.0);
        assert_ne!(agents.load().bots_stamp(), before.1);

        replace(&regexes, "user_agent_parsers: 7");
        let [(Step::Agent, "UA_REGEXES", Err(error))] = &agents.reload()[..] else { panic!("it is bad") };
        assert!(error.contains("regexes.yaml: got no list"), "{error}");
        assert!(agents.reload().is_empty(), "it is told once");
        assert_eq!(told(&agents, "Ours/1").0.unwrap(), "Ours");

        replace(&regexes, &RULES.replace("Ours", "Theirs"));
        assert_eq!(agents.reload(), [(Step::Agent, "UA_REGEXES", Ok(()))]);
        assert_eq!(told(&agents, "Theirs/1").0.unwrap(), "Theirs");
        assert_eq!(told(&agents, "Ours/1"), (None, Some("second".into())));
    }

    #[test]
    fn the_settings_are_read() {
        let read = |vars: &[(&str, &str)]| {
            let vars = vars.iter().map(|(name, value)| ((*name).into(), (*value).into()));
            let mut reader = Reader::new(vars.collect::<Vec<_>>().into_iter(), Path::new(""));
            let settings = AgentSettings::read(&mut reader);
            reader.finish().map(|_| settings)
        };
        assert_eq!(read(&[]).unwrap(), settings(None, None));
        let all = read(&[("UA_REGEXES", "/r.yaml"), ("BOT_LIST", "/bots"), ("UA_DEVICE", "full")]).unwrap();
        let wanted = settings(Some(Path::new("/r.yaml")), Some(Path::new("/bots")));
        assert_eq!(all, AgentSettings { with_devices: true, ..wanted });
        let error = read(&[("UA_DEVICE", "all")]).unwrap_err().0;
        assert_eq!(error, ["UA_DEVICE: got \"all\", want class or full"]);
    }
}

//! What enrichment reads from the environment.

use analytics_relay_providers::Secret;
use jiff::tz::TimeZone;

use super::session::SessionLimits;
use crate::{reasons::Step, settings::Reader};

const MINUTES_OF_DAY: i64 = 24 * 60;
/// Half a gigabyte of table.
const SESSIONS_MAX: usize = 10_000_000;
/// Shorter secrets are guessed.
const SECRET_BYTES_MIN: usize = 16;

/// What becomes of an event that a machine sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BotPolicy {
    /// It goes its way and says so.
    #[default]
    Marked,
    /// It goes to nobody, and is counted.
    Dropped,
    /// It goes to the store and to no vendor.
    KeptOut,
}

/// What becomes of an event whose user says with `Sec-GPC` or `DNT` that they decline.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Declined {
    /// The relay makes no id of a visitor or a session for it.
    #[default]
    Anonymous,
    /// It goes to nobody, and is counted.
    Dropped,
    /// Nothing.
    Ignored,
}

/// How events are enriched.
#[derive(Debug, Clone)]
pub struct EnrichSettings {
    /// The steps that are made.
    pub(crate) steps: Vec<Step>,
    /// What becomes of machines' events.
    pub bots: BotPolicy,
    /// What becomes of those of users who decline.
    pub declined: Declined,
    pub(crate) sessions: SessionLimits,
    /// What relays share that are to give the same ids; this relay's own if there is none.
    pub session_secret: Option<Secret>,
    /// Of the days of visitors without cookies.
    pub time_zone: TimeZone,
}

impl EnrichSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let bots = [
            ("mark", BotPolicy::Marked),
            ("drop", BotPolicy::Dropped),
            ("keep_out_of_providers", BotPolicy::KeptOut),
        ];
        let declined =
            [("anonymous", Declined::Anonymous), ("drop", Declined::Dropped), ("ignore", Declined::Ignored)];
        let timeout_minutes: i64 = reader.number("SESSION_TIMEOUT_MINUTES", 1..=MINUTES_OF_DAY);
        let sessions_max: usize = reader.number("SESSIONS_MAX", 1..=SESSIONS_MAX);
        Self {
            steps: steps(reader),
            bots: reader.one_of("BOTS", &bots),
            declined: reader.one_of("RESPECT_GPC", &declined),
            sessions: SessionLimits { timeout_ms: timeout_minutes * 60_000, sessions_max },
            session_secret: session_secret(reader),
            time_zone: time_zone(reader),
        }
    }

    /// True if there is anything to be done.
    pub(crate) fn is_on(&self) -> bool {
        !self.steps.is_empty()
    }
}

fn session_secret(reader: &mut Reader) -> Option<Secret> {
    let secret = reader.secret("SESSION_SECRET");
    if secret.is_empty() {
        return None;
    }
    if secret.len() < SECRET_BYTES_MIN {
        let got = format!("{} bytes", secret.len());
        reader.error(format!("SESSION_SECRET: got {got}, want {SECRET_BYTES_MIN} at least"));
    }
    Some(Secret::new(secret))
}

fn steps(reader: &mut Reader) -> Vec<Step> {
    let text = reader.text("ENRICH");
    match &*text {
        "all" => return Step::ALL.into(),
        "none" => return Vec::new(),
        _ => {}
    }
    let mut steps = Vec::new();
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        match Step::ALL.into_iter().find(|step| step.name() == name) {
            Some(step) => steps.push(step),
            None => {
                let all = Step::ALL.map(Step::name).join(", ");
                reader.wrong("ENRICH", name, &format!("all, none, or some of {all}"));
            }
        }
    }
    steps
}

fn time_zone(reader: &mut Reader) -> TimeZone {
    let name = reader.text("TIME_ZONE");
    TimeZone::get(&name).unwrap_or_else(|_| {
        reader.wrong("TIME_ZONE", &name, "a name of the IANA's, such as Europe/Berlin");
        TimeZone::UTC
    })
}

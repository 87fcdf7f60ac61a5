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

const BOT_POLICIES: [(&str, BotPolicy); 3] = [
    ("mark", BotPolicy::Marked),
    ("drop", BotPolicy::Dropped),
    ("keep_out_of_providers", BotPolicy::KeptOut),
];

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
        let declined =
            [("anonymous", Declined::Anonymous), ("drop", Declined::Dropped), ("ignore", Declined::Ignored)];
        let timeout_minutes: i64 = reader.number("SESSION_TIMEOUT_MINUTES", 1..=MINUTES_OF_DAY);
        let sessions_max: usize = reader.number("SESSIONS_MAX", 1..=SESSIONS_MAX);
        let (steps, bots) = (steps(reader), reader.one_of("BOTS", &BOT_POLICIES));
        if let Some(steps) = &steps {
            check_bots(reader, steps, bots);
        }
        Self {
            steps: steps.unwrap_or_default(),
            bots,
            declined: reader.one_of("RESPECT_GPC", &declined),
            sessions: SessionLimits { timeout_ms: timeout_minutes * 60_000, sessions_max },
            session_secret: session_secret(reader),
            time_zone: time_zone(reader),
        }
    }

    /// True if there is anything to be done. Whoever declines is heard without any step.
    pub(crate) fn is_on(&self) -> bool {
        !self.steps.is_empty() || self.declined == Declined::Dropped
    }
}

/// Machines that nobody looks for would go to everybody.
fn check_bots(reader: &mut Reader, steps: &[Step], bots: BotPolicy) {
    let policy = BOT_POLICIES.iter().find(|(_, policy)| *policy == bots).map_or("", |(name, _)| *name);
    if bots != BotPolicy::Marked && !steps.contains(&Step::Bot) {
        let got = match steps {
            [] => "none".to_owned(),
            steps => steps.iter().map(|step| step.name()).collect::<Vec<_>>().join(","),
        };
        reader.error(format!(
            "BOTS: got {policy:?} with ENRICH={got}, want the step bot in ENRICH, or BOTS=mark"
        ));
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

/// Nothing if a name is wrong.
fn steps(reader: &mut Reader) -> Option<Vec<Step>> {
    let text = reader.text("ENRICH");
    match &*text {
        "all" => return Some(Step::ALL.into()),
        "none" => return Some(Vec::new()),
        _ => {}
    }
    let (mut steps, mut are_right) = (Vec::new(), true);
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        match Step::ALL.into_iter().find(|step| step.name() == name) {
            Some(step) => steps.push(step),
            None => {
                are_right = false;
                let all = Step::ALL.map(Step::name).join(", ");
                reader.wrong("ENRICH", name, &format!("all, none, or some of {all}"));
            }
        }
    }
    are_right.then_some(steps)
}

fn time_zone(reader: &mut Reader) -> TimeZone {
    let name = reader.text("TIME_ZONE");
    TimeZone::get(&name).unwrap_or_else(|_| {
        reader.wrong("TIME_ZONE", &name, "a name of the IANA's, such as Europe/Berlin");
        TimeZone::UTC
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<EnrichSettings, Vec<String>> {
        let vars = vars.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let mut reader = Reader::new(vars.collect::<Vec<_>>().into_iter(), Path::new(""));
        let settings = EnrichSettings::read(&mut reader);
        reader.finish().map(|_| settings).map_err(|error| error.0)
    }

    /// Else it would be told nowhere that they go to everybody.
    #[test]
    fn machines_cannot_be_kept_from_anybody_where_nobody_looks_for_them() {
        for (steps, bots) in [("none", "drop"), ("geo,page", "drop"), ("geo,page", "keep_out_of_providers")] {
            let errors = read(&[("ENRICH", steps), ("BOTS", bots)]).unwrap_err();
            let want =
                format!("BOTS: got {bots:?} with ENRICH={steps}, want the step bot in ENRICH, or BOTS=mark");
            assert_eq!(errors, [want]);
        }
        for (steps, bots) in [("all", "drop"), ("geo,bot", "keep_out_of_providers"), ("none", "mark")] {
            read(&[("ENRICH", steps), ("BOTS", bots)]).unwrap();
        }
        let errors = read(&[("ENRICH", "bots"), ("BOTS", "drop")]).unwrap_err();
        assert!(errors.len() == 1 && errors[0].starts_with("ENRICH: got \"bots\""), "{errors:?}");
    }

    #[test]
    fn there_is_nothing_to_do_without_steps_unless_who_declines_is_to_be_dropped() {
        let is_on = |declined| read(&[("ENRICH", "none"), ("RESPECT_GPC", declined)]).unwrap().is_on();
        assert_eq!(["anonymous", "ignore", "drop"].map(is_on), [false, false, true]);
        assert!(read(&[]).unwrap().is_on());
    }
}

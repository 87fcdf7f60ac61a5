//! The steps, one after the other, over one event.
//!
//! A step that fails, panics included, costs its own fields and is named in the event and
//! in a metric; one that has panicked ten times is switched off until there is new data for
//! it, or the relay is started again. Nothing here waits for anything, and most events of servers pass without any of
//! it: they have no address, no user agent and no page.

use std::{
    fmt::Write,
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use analytics_relay_providers::{EventKind, EventParts, NotFor, event::Audience};
use serde::Serialize;
use tracing::{error, info, warn};

use super::{
    Encoded,
    agent::{Agent, AgentInput, Hints},
    bot::Bot,
    edge::Edge,
    geo::{Geo, Place},
    page::{PageFound, PageInput, Pages},
    senders::{Agents, DataSets},
    session::{Session, Sessions},
    settings::{BotPolicy, Declined, EnrichSettings},
    tally::{Steps, Tally},
    told::Told,
    visitor::{Seen, Visitors},
};
use crate::{
    reasons::{STORE, Step},
    telemetry::EnrichMetrics,
    watched::Reload,
};

/// After so many panics a step is switched off.
const PANICS_MAX: u32 = 10;
/// The version of what is written.
const VERSION: u32 = 1;

/// What was found out about an event, and is to become part of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Enriched {
    /// A JSON object.
    pub(crate) json: Option<String>,
    /// Of an event that names none.
    pub(crate) session_id: Option<String>,
    /// Of an event of nobody.
    pub(crate) anonymous_id: Option<String>,
    /// In place of the event's own, if it is not for all that it was for.
    pub(crate) audience: Option<Audience<'static>>,
    pub(crate) tally: Tally,
}

/// Finds out what the edge alone can. Shared by all callers.
#[derive(Debug)]
pub(crate) struct Enricher {
    agents: Agents,
    geo: Arc<Geo>,
    pages: Pages,
    /// None where nobody gets an id.
    visitors: Option<Arc<Visitors>>,
    sessions: Sessions,
    bots: BotPolicy,
    declined: Declined,
    /// Those that are to be made.
    steps: Steps,
    panics: [AtomicU32; Step::ALL.len()],
    metrics: EnrichMetrics,
    /// Those that panic.
    #[cfg(test)]
    sabotaged: std::sync::Mutex<Steps>,
    #[cfg(test)]
    reading_is_sabotaged: std::sync::atomic::AtomicBool,
}

/// What an enricher works with.
pub(crate) struct Parts {
    pub(crate) agents: Agents,
    pub(crate) geo: Arc<Geo>,
    pub(crate) pages: Pages,
    pub(crate) visitors: Option<Arc<Visitors>>,
    pub(crate) sessions: Sessions,
}

impl Enricher {
    pub(crate) fn new(settings: &EnrichSettings, parts: Parts, metrics: EnrichMetrics) -> Self {
        let Parts { agents, geo, pages, visitors, sessions } = parts;
        Self {
            agents,
            geo,
            pages,
            visitors,
            sessions,
            bots: settings.bots,
            declined: settings.declined,
            steps: Steps::of(&settings.steps),
            panics: Default::default(),
            metrics,
            #[cfg(test)]
            sabotaged: Default::default(),
            #[cfg(test)]
            reading_is_sabotaged: Default::default(),
        }
    }

    /// What is found out about an event; nothing about one that has nothing to go by.
    #[inline]
    pub(crate) fn enrich(&self, event: &EventParts<'_>, edge: &Edge<'_>) -> Option<Enriched> {
        let is_bare = event.more.is_none() && event.ip.is_none() && event.user_agent.is_none();
        if is_bare && !edge.is_declined && !matches!(event.kind, EventKind::Page { .. }) {
            return None;
        }
        self.enriched(event, edge)
    }

    #[cold]
    fn enriched(&self, event: &EventParts<'_>, edge: &Edge<'_>) -> Option<Enriched> {
        let context = event.more.as_ref().and_then(|more| more.context.as_ref()).map(|json| json.json());
        let mut finding = Finding { enricher: self, tally: Tally::default() };
        let told = finding.read(Step::Agent, || Told::read(context));
        let is_device = edge.is_device || told.is_of_device();
        let sets = self.agents.load();

        let input = AgentInput {
            user_agent: event.user_agent.unwrap_or_default(),
            hints: edge.hints.unwrap_or(&Hints::NONE),
            user_agent_data: told.user_agent_data(),
            webdriver: told.webdriver(),
            is_browser: is_device && edge.hints.is_some(),
        };
        let has_agent = !input.user_agent.is_empty() || input.user_agent_data.is_some();
        let agent = finding.step(Step::Agent, has_agent, || sets.agent(&input));
        let bot = finding.step(Step::Bot, has_agent || input.webdriver, || sets.bot(&input));
        let place = self.place(&mut finding, event.ip, edge);
        let is_view = matches!(event.kind, EventKind::Page { .. });
        let read = || PageInput::from_json(context, event.properties.json(), is_view);
        let page_input = finding.read(Step::Page, read);
        let has_page = is_view || page_input != PageInput::default();
        let page = finding.step(Step::Page, has_page, || Some(self.pages.page(&page_input)));
        let page = match page {
            Some(page) => finding.sourced(page),
            None => PageFound::default(),
        };

        let is_machine = bot.is_some() || page.is_spam;
        let is_declined = edge.is_declined && self.declined != Declined::Ignored;
        let is_visit = is_device && !is_machine && !is_declined;
        let anonymous_id = if is_visit { self.visitor_id(&mut finding, event, &page) } else { None };
        let session_id =
            if is_visit { self.session_id(&mut finding, event, anonymous_id.as_deref()) } else { None };

        let found = Found { agent, bot, place, page, is_cookieless: anonymous_id.is_some() };
        let missed = finding.tally.missed;
        let json = finding.read(Step::Page, || found.json(&sets, &self.pages, missed));
        let tally = Tally { is_machines: is_machine, is_declined: edge.is_declined, ..finding.tally };
        let audience = self.audience(event, is_machine, edge.is_declined);
        let enriched = Enriched { json, session_id, anonymous_id, audience, tally };
        (enriched != Enriched::default()).then_some(enriched)
    }

    fn place(
        &self,
        finding: &mut Finding<'_>,
        ip: Option<IpAddr>,
        edge: &Edge<'_>,
    ) -> Option<Arc<Encoded<Place>>> {
        let mut is_bad = false;
        let found = finding.step(Step::Geo, ip.is_some() || edge.country_hint.is_some(), || {
            match ip.map(|ip| self.geo.try_find(ip)) {
                Some(Ok(Some(place))) => return Some(place),
                Some(Err(_)) => is_bad = true,
                _ => {}
            }
            edge.country_hint.and_then(|code| self.geo.country_hint(code))
        });
        if is_bad {
            finding.tally.missed.add(Step::Geo);
        }
        found
    }

    /// An id for who names none, of an event that says from where and by what.
    fn visitor_id(
        &self,
        finding: &mut Finding<'_>,
        event: &EventParts<'_>,
        page: &PageFound<'_>,
    ) -> Option<String> {
        let is_nobodys = event.user_id.is_none() && event.anonymous_id.is_none();
        // Who says 0.0.0.0 wants no address to be taken.
        let ip = event.ip.filter(|ip| !ip.to_canonical().is_unspecified())?;
        let (user_agent, visitors) = (event.user_agent?, self.visitors.as_ref()?);
        let mut lacks_salt = false;
        let id = finding.step(Step::Visitor, is_nobodys, || {
            let website = super::told::website_of(event.properties.json());
            let host = page.page.as_ref().and_then(|page| page.host());
            let domain = host.and_then(psl::domain_str).unwrap_or_default();
            let (tenant, website) = (tenant_of(event), website.as_deref().unwrap_or_default());
            let seen = Seen { tenant, website, ip, user_agent, domain };
            let (time_ms, now_ms) = (event.time_ms, event.accepted_ms);
            // A visit that goes on over midnight stays one.
            let before = visitors.id_of_the_day_before(&seen, time_ms).map(|id| id.to_string());
            let goes_on = |id: &String| {
                let visitor = self.sessions.visitor(tenant, id, "");
                self.sessions.goes_on(visitor, time_ms, now_ms)
            };
            let id = before.filter(goes_on).or_else(|| Some(visitors.id(&seen, time_ms)?.to_string()));
            lacks_salt = id.is_none();
            id
        });
        finding.tally.lacks_salt |= lacks_salt;
        id
    }

    /// The table notes an event that may yet be refused, and again when it is looked at again
    /// because there was no room. That moves nothing which its caller's next attempt, or the
    /// visitor's next event, would not: a visit begins or goes on by the seconds between.
    fn session_id(
        &self,
        finding: &mut Finding<'_>,
        event: &EventParts<'_>,
        made: Option<&str>,
    ) -> Option<String> {
        let has_one = event.more.as_ref().is_some_and(|more| more.session_id.is_some());
        let (anonymous_id, user_id) = (made.or(event.anonymous_id), event.user_id);
        let is_somebodys = anonymous_id.is_some() || user_id.is_some();
        let mut lacks_room = false;
        let id = finding.step(Step::Session, !has_one && is_somebodys, || {
            let (device, user) = (anonymous_id.unwrap_or_default(), user_id.unwrap_or_default());
            let visitor = self.sessions.visitor(tenant_of(event), device, user);
            match self.sessions.of(visitor, event.time_ms, event.accepted_ms) {
                Session::Of(id) => Some(id.to_string()),
                Session::None => None,
                Session::Full => {
                    lacks_room = true;
                    None
                }
            }
        });
        finding.tally.lacks_room |= lacks_room;
        id
    }

    /// Who does not get the event, because a machine sent it, or its user declines.
    fn audience(
        &self,
        event: &EventParts<'_>,
        is_machine: bool,
        is_declined: bool,
    ) -> Option<Audience<'static>> {
        if is_declined && self.declined == Declined::Dropped {
            return Some(Audience::nobody(NotFor::Declined));
        }
        if !is_machine {
            return None;
        }
        match self.bots {
            BotPolicy::Marked => None,
            BotPolicy::Dropped => Some(Audience::nobody(NotFor::Bot)),
            BotPolicy::KeptOut => {
                let own = event.more.as_ref().map_or(Audience::All, |more| more.audience.borrowed());
                let stays = if own.includes(STORE) { &[STORE][..] } else { &[] };
                Some(Audience::only_for(stays, NotFor::Bot))
            }
        }
    }

    /// Counts what was found out about an event that was taken.
    pub(crate) fn count(&self, tally: Tally) {
        let Tally { missed, is_machines, is_declined, lacks_salt, lacks_room } = tally;
        missed.each().for_each(|step| {
            self.metrics.missed(step).inc();
        });
        let EnrichMetrics { bots, declined, salt_gone, sessions_full, .. } = &self.metrics;
        for (is_so, counter) in [
            (is_machines, bots),
            (is_declined, declined),
            (lacks_salt, salt_gone),
            (lacks_room, sessions_full),
        ] {
            counter.inc_by(is_so.into());
        }
    }

    /// What was counted.
    #[cfg(test)]
    pub(crate) fn metrics(&self) -> &EnrichMetrics {
        &self.metrics
    }

    /// The sessions of now, to be kept across a restart.
    pub(crate) fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Steps that are switched off because they panicked.
    pub(crate) fn switched_off(&self) -> Vec<&'static str> {
        Step::ALL.into_iter().filter(|step| self.is_off(*step)).map(Step::name).collect()
    }

    fn is_off(&self, step: Step) -> bool {
        self.panics[step as usize].load(Ordering::Relaxed) >= PANICS_MAX
    }

    fn try_again(&self, step: Step) {
        self.panics[step as usize].store(0, Ordering::Relaxed);
    }

    /// Steps of a defective release: from now on these panic, and no others.
    #[cfg(test)]
    pub(crate) fn sabotage(&self, steps: &[Step]) {
        *self.sabotaged.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Steps::of(steps);
    }

    /// The same of what reads the caller's JSON for them, and writes theirs.
    #[cfg(test)]
    pub(crate) fn sabotage_reading(&self) {
        self.reading_is_sabotaged.store(true, Ordering::Relaxed);
    }

    #[cfg(test)]
    fn is_sabotaged(&self, step: Step) -> bool {
        self.sabotaged.lock().unwrap_or_else(std::sync::PoisonError::into_inner).has(step)
    }
}

/// Data sets are read again, and a step that has a new one is tried again.
impl Reload for Enricher {
    fn reload(&self) {
        let told = |step, setting, read: Result<(), String>| match read {
            Ok(()) => {
                self.try_again(step);
                info!(setting, "a data set is read again");
            }
            Err(error) => warn!(setting, error, "a data set cannot be used, the one before is used on"),
        };
        self.agents.reload().into_iter().for_each(|(step, setting, read)| told(step, setting, read));
        match self.pages.reload() {
            Ok(false) => {}
            read => told(Step::Source, "SOURCES_FILE", read.map(|_| ()).map_err(|error| error.to_string())),
        }
        if self.geo.reload() {
            self.try_again(Step::Geo);
        }
    }
}

fn tenant_of<'a>(event: &'a EventParts<'_>) -> &'a str {
    event.more.as_ref().and_then(|more| more.tenant).unwrap_or_default()
}

/// Makes the steps of one event, and notes those that fail.
struct Finding<'a> {
    enricher: &'a Enricher,
    tally: Tally,
}

impl Finding<'_> {
    /// Makes a step that has something to go by.
    fn step<T>(&mut self, step: Step, is_wanted: bool, make: impl FnOnce() -> Option<T>) -> Option<T> {
        if !is_wanted || !self.enricher.steps.has(step) {
            return None;
        }
        if self.enricher.is_off(step) {
            self.tally.missed.add(step);
            return None;
        }
        #[cfg(test)]
        let enricher = self.enricher;
        self.caught(step, || {
            #[cfg(test)]
            assert!(!enricher.is_sabotaged(step), "sabotaged");
            make()
        })
    }

    /// Reads what the caller says, or writes what was found, whichever steps are made; nothing,
    /// to the cost of this one, where that panics.
    fn read<T: Default>(&mut self, step: Step, read: impl FnOnce() -> T) -> T {
        #[cfg(test)]
        let enricher = self.enricher;
        self.caught(step, || {
            #[cfg(test)]
            assert!(!enricher.reading_is_sabotaged.load(Ordering::Relaxed), "sabotaged");
            read()
        })
    }

    /// Nothing, to the cost of a step, where that panics.
    fn caught<T: Default>(&mut self, step: Step, make: impl FnOnce() -> T) -> T {
        // What a panic leaves behind it is a cache or a table that is whole at every point.
        catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|_| {
            self.panicked(step);
            T::default()
        })
    }

    /// The second step of a page; what the first has found stays.
    fn sourced<'p>(&mut self, mut page: PageFound<'p>) -> PageFound<'p> {
        let pages = &self.enricher.pages;
        self.step(Step::Source, true, || {
            pages.source(&mut page);
            Some(())
        });
        page
    }

    #[cold]
    fn panicked(&mut self, step: Step) {
        self.tally.missed.add(step);
        let panics = self.enricher.panics[step as usize].fetch_add(1, Ordering::Relaxed) + 1;
        if panics == PANICS_MAX {
            error!(step = step.name(), "a defect: a step of enrichment panics, it is switched off");
        }
    }
}

/// What the steps have found.
struct Found<'a> {
    agent: Option<Arc<Encoded<Agent>>>,
    bot: Option<Arc<Encoded<Bot>>>,
    place: Option<Arc<Encoded<Place>>>,
    page: PageFound<'a>,
    is_cookieless: bool,
}

impl Found<'_> {
    /// All of it with the data sets that it comes from; nothing if that is nothing.
    fn json(&self, sets: &DataSets, pages: &Pages, missed: Steps) -> Option<String> {
        let has_page = !self.page.is_empty();
        let is_any = self.agent.is_some() || self.bot.is_some() || self.place.is_some() || self.page.is_spam;
        if !is_any && !has_page && !self.is_cookieless && missed.is_empty() {
            return None;
        }
        let mut json = String::with_capacity(512);
        let _ = write!(json, r#"{{"v":{VERSION},"data":{{"#);
        let place_stamp = self.place.as_ref().and_then(|place| place.value.stamp.as_deref());
        let sources = (has_page && self.page.channel.is_some()).then(|| pages.stamp());
        let stamps = [
            ("uap", self.agent.is_some().then(|| sets.rules_stamp())),
            ("bots", self.bot.is_some().then(|| sets.bots_stamp())),
            ("geo", place_stamp),
            ("sources", sources.as_deref()),
        ];
        for (name, stamp) in stamps {
            if let Some(stamp) = stamp {
                if !json.ends_with('{') {
                    json.push(',');
                }
                let _ = write!(json, r#""{name}":"#);
                push_json(&mut json, stamp);
            }
        }
        json.push('}');
        let parts = [
            ("agent", self.agent.as_ref().map(|agent| &*agent.json)),
            ("bot", self.bot.as_ref().map(|bot| &*bot.json)),
            ("geo", self.place.as_ref().map(|place| &*place.json)),
        ];
        for (name, part) in parts {
            if let Some(part) = part {
                let _ = write!(json, r#","{name}":{part}"#);
            }
        }
        if self.bot.is_none() && self.page.is_spam {
            json.push_str(r#","bot":{"name":"referrer spam","cat":"spam","why":"referrer"}"#);
        }
        if has_page {
            let start = json.len();
            push_json(&mut json, &self.page);
            // Its fields stand among the others.
            json.replace_range(start..=start, ",");
            json.pop();
        }
        if self.is_cookieless {
            json.push_str(r#","visitor":"day""#);
        }
        if !missed.is_empty() {
            json.push_str(r#","missed":"#);
            push_json(&mut json, &missed.each().map(Step::name).collect::<Vec<_>>());
        }
        json.push('}');
        Some(json)
    }
}

fn push_json(json: &mut String, value: &(impl Serialize + ?Sized)) {
    json.push_str(&serde_json::to_string(value).expect("its names are texts"));
}

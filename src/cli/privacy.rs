//! `analytics-relay privacy test`: what the log and each vendor would get of an event.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use analytics_relay_providers::{Event, EventKind, registry};
use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    keys,
    terminal::{json, words},
};
use crate::{
    admission::{self, denied::Violation},
    app::edge,
    config::{Config, ProviderConfig},
    ingest::http::sample::read_message,
    privacy::{Named, Preview, Privacy},
    reasons::{Redaction, Step},
    sealing::Sealing,
    telemetry::PrivacyMetrics,
    time::Clock,
};

/// Most bytes of a file with an event.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Shows what becomes of the event in a file, or of standard input if that is `-`. Nothing
/// is sent.
pub(super) fn test(config: &Config, path: &Path) -> anyhow::Result<ExitCode> {
    let now_ms = Clock::system().now_ms();
    let (event, left_out) = read_event(config, path, now_ms)?;
    let privacy = open(config)?;
    let out = &mut io::stdout().lock();
    let shown =
        show_left_out(out, &left_out).and_then(|()| show(out, config, privacy.as_ref(), &event, now_ms));
    match shown {
        // `test | head` is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The rules, for a command; says what is odd about them.
#[expect(clippy::print_stderr, reason = "standard output is for what the command finds")]
pub(super) fn open(config: &Config) -> anyhow::Result<Option<Arc<Privacy>>> {
    let privacy = rules(config)?;
    let warnings = privacy.as_ref().map(|privacy| privacy.describe().1).unwrap_or_default();
    warnings.iter().for_each(|warning| eprintln!("warning: PRIVACY_FILE: {}", words(warning)));
    Ok(privacy)
}

/// A program of which the relay is a part may have providers that no command knows.
fn rules(config: &Config) -> anyhow::Result<Option<Arc<Privacy>>> {
    let names = Named::at_least(config.provider_names());
    // Most rules need none, and a command may take long to say them.
    let seals = Privacy::seals(&config.privacy, &names);
    let sealing = if seals { keys(config)? } else { Sealing::default() };
    Ok(Privacy::open(&config.privacy, names, &sealing, PrivacyMetrics::default())?)
}

/// What `check` says of the rules.
pub(super) fn describe(config: &Config) -> anyhow::Result<()> {
    let Some(privacy) = rules(config)? else { return Ok(()) };
    let (rules, warnings) = privacy.describe();
    rules.lines().for_each(|line| println!("# privacy: {line}"));
    warnings.iter().for_each(|warning| println!("warning: PRIVACY_FILE: {warning}"));
    Ok(())
}

/// Says what is not found out about the event, and would be.
fn show_left_out(out: &mut impl Write, steps: &[Step]) -> io::Result<()> {
    if steps.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = steps.iter().map(|step| step.name()).collect();
    writeln!(out, "# what goes by who was seen before is not shown: {}", names.join(", "))
}

fn show(
    out: &mut impl Write,
    config: &Config,
    privacy: Option<&Arc<Privacy>>,
    event: &Event,
    now_ms: i64,
) -> io::Result<()> {
    writeln!(out, "log")?;
    let logged = privacy.map(|privacy| privacy.preview_log(event));
    let event = show_done(out, logged, event)?;
    writeln!(out, "  {}", json(&String::from_utf8_lossy(&event.to_json())))?;
    let vendors = config.providers.iter().map(Some).chain([None]);
    for (name, vendor) in config.provider_names().zip(vendors) {
        writeln!(out, "{name}")?;
        if let Some(why) = event.why_not_for(name) {
            writeln!(out, "  gets nothing: {}", why.name())?;
            continue;
        }
        let left = privacy.map(|privacy| privacy.preview_for(name, &event));
        let left = show_done(out, left, &event)?;
        match vendor {
            Some(vendor) => show_request(out, vendor, &left, now_ms)?,
            None => writeln!(out, "  keeps {}", json(&String::from_utf8_lossy(&left.to_json())))?,
        }
    }
    Ok(())
}

/// Names what was done, and returns what is left.
fn show_done(out: &mut impl Write, preview: Option<Preview>, event: &Event) -> io::Result<Event> {
    let Some(Preview { event: left, done }) = preview else { return Ok(event.clone()) };
    let mut times: BTreeMap<(Redaction, String), u32> = BTreeMap::new();
    done.into_iter().for_each(|done| *times.entry(done).or_default() += 1);
    for ((done, name), times) in times {
        let times = if times > 1 { format!(" ({times} times)") } else { String::new() };
        writeln!(out, "  {:<8} {}{times}", done.name(), words(&name))?;
    }
    Ok(left.unwrap_or_else(|| event.clone()))
}

fn show_request(
    out: &mut impl Write,
    provider: &ProviderConfig,
    event: &Event,
    now_ms: i64,
) -> io::Result<()> {
    match registry::preview(&provider.settings, event, now_ms) {
        Err(why) => writeln!(out, "  gets nothing: {}", why.name()),
        Ok(encoded) => match encoded.rejected.first() {
            Some((_, _, detail)) => writeln!(out, "  becomes a dead letter: {}", words(detail)),
            None => {
                let body = String::from_utf8_lossy(&encoded.body);
                writeln!(out, "  POST {}\n  {}", encoded.path, json(&body))
            }
        },
    }
}

/// An event as it stands in our files, or in a dead letter; or what a message of Segment's form
/// becomes, and the steps that it would go through and does not.
fn read_event(config: &Config, path: &Path, now_ms: i64) -> anyhow::Result<(Event, Vec<Step>)> {
    #[derive(Deserialize)]
    struct Forms<'a> {
        kind: Option<String>,
        #[serde(borrow)]
        event: Option<&'a RawValue>,
    }
    let text = read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let want = "want one event: a message of Segment's form, or one of our files, as JSON";
    let forms: Forms<'_> =
        serde_json::from_str(&text).with_context(|| format!("{}: {want}", path.display()))?;
    let of_letter = forms.event.map(RawValue::get).filter(|event| event.starts_with('{'));
    if let Some(json) = forms.kind.map(|_| text.as_str()).or(of_letter) {
        let event = Event::from_json(json.as_bytes()).with_context(|| path.display().to_string())?;
        if let EventKind::Unknown { kind, .. } = event.kind() {
            bail!("{}: got a {kind}, which this relay does not know", path.display());
        }
        return Ok((event, Vec::new()));
    }
    let (shaping, left_out) = edge::for_showing(config)?;
    let providers: Vec<_> = config.provider_names().collect();
    let read = read_message(&text, &providers, now_ms, |draft| admission::event_of(draft, &shaping, now_ms));
    match read {
        Ok(Ok(event)) => Ok((event, left_out)),
        Ok(Err(violations)) => bail!("{}: {}", path.display(), in_words(&violations)),
        Err(violation) => bail!("{}: {}", path.display(), in_words(&[violation])),
    }
}

fn in_words(violations: &[Violation]) -> String {
    let word = |violation: &Violation| {
        let Violation { field, got, want, .. } = violation;
        format!("{field}: got {got}, want {want}")
    };
    violations.iter().map(word).collect::<Vec<_>>().join("\n")
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let mut input: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(io::stdin().lock()),
        _ => Box::new(fs::File::open(path)?),
    };
    (&mut input).take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

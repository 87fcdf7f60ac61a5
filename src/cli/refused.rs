//! `analytics-relay dead-letters refused list|show|send|delete`.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use reqwest::{Client, Response, StatusCode, header::AUTHORIZATION};
use tokio::time::sleep;

use super::{
    DeleteRefusedArgs, RefusedAt, SendRefusedArgs, ShowRefusedArgs, dead_letters::elsewhere, keys,
    print_each, terminal::words,
};
use crate::{
    config::Config,
    ingest::{
        http::resend::{self, Answer},
        settings::HttpSettings,
    },
    refused::{RefusedDir, RefusedHead, RefusedItem, Stored},
    sealing::Sealing,
    time::{Clock, rfc_3339},
};

/// Most items of one call.
const ITEMS_AT_ONCE: usize = 100;
/// Most bytes of their JSON.
const BYTES_AT_ONCE: usize = 400_000;
/// How often those are sent again for which there is no room, and after how long at most.
const TRIES_MAX: u32 = 10;
const WAIT_MAX: Duration = Duration::from_secs(10);
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Items whose rules are shown.
const SHOWN_MAX: usize = 10;

impl RefusedAt {
    fn data_dir<'a>(&'a self, config: &'a Config) -> &'a Path {
        self.data_dir.as_ref().unwrap_or(&config.data_dir)
    }

    fn dir(&self, config: &Config) -> RefusedDir {
        RefusedDir::new(self.data_dir(config))
    }

    fn takes(&self, reason: &str) -> bool {
        self.reason.as_ref().is_none_or(|wanted| reason.eq_ignore_ascii_case(wanted))
    }

    /// Passes each item on, until `action` says false. Fails at the first whose key is not
    /// there.
    fn each(
        &self,
        config: &Config,
        mut action: impl FnMut(RefusedItem) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let sealing = keys(config)?;
        for path in self.dir(config).files()? {
            let stored = Self::read(&path, &sealing)?;
            if let Some(locked) =
                stored.why_locked.filter(|_| stored.locked.iter().any(|it| self.takes(&it.reason)))
            {
                bail!("{}: {locked}", path.display());
            }
            for item in stored.items.into_iter().filter(|item| self.takes(&item.reason)) {
                if !action(item)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Passes on what of each item needs no key.
    fn each_head(&self, config: &Config, mut action: impl FnMut(RefusedHead)) -> anyhow::Result<()> {
        for path in self.dir(config).files()? {
            let stored = Self::read(&path, &Sealing::default())?;
            stored.into_heads().filter(|head| self.takes(&head.reason)).for_each(&mut action);
        }
        Ok(())
    }

    fn read(path: &Path, sealing: &Sealing) -> anyhow::Result<Stored> {
        let stored = RefusedDir::read(path, sealing)?;
        if stored.damaged > 0 {
            warn(&format!("{}: {} line(s) cannot be read", path.display(), stored.damaged));
        }
        if !stored.broken.is_empty() {
            warn(&format!("{}: {} item(s) are not what was sealed", path.display(), stored.broken.len()));
        }
        Ok(stored)
    }
}

#[expect(clippy::print_stderr, reason = "standard output is for the items")]
fn warn(text: &str) {
    eprintln!("warning: {text}");
}

pub(super) fn list(config: &Config, at: &RefusedAt) -> anyhow::Result<ExitCode> {
    let mut rows: BTreeMap<(String, String), (u64, i64, i64)> = BTreeMap::new();
    at.each_head(config, |item| {
        let came_ms = item.refused_since_ms;
        let row = rows
            .entry((item.reason, item.discard_reason.unwrap_or_default()))
            .or_insert((0, came_ms, came_ms));
        *row = (row.0 + 1, row.1.min(came_ms), row.2.max(came_ms));
    })?;
    if rows.is_empty() {
        println!("no refused items{}", elsewhere(at.data_dir(config)));
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<28} {:<22} {:>8}  {:<24}  newest", "reason", "segment's reason", "items", "oldest");
    for ((reason, discard), (items, oldest, newest)) in rows {
        let (oldest, newest) = (rfc_3339(oldest), rfc_3339(newest));
        println!("{:<28} {:<22} {items:>8}  {oldest:<24}  {newest}", words(&reason), words(&discard));
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn show(config: &Config, args: &ShowRefusedArgs) -> anyhow::Result<ExitCode> {
    print_each(args.limit, |print| args.at.each(config, print))
}

pub(super) fn delete(config: &Config, args: &DeleteRefusedArgs) -> anyhow::Result<ExitCode> {
    let _alone = if args.yes { args.at.dir(config).lock()? } else { None };
    let mut ids = HashSet::new();
    args.at.each_head(config, |item| {
        ids.insert(item.letter_id);
    })?;
    if !args.yes {
        println!("{} item(s); nothing is deleted; to delete them, add: --yes", ids.len());
        return Ok(if ids.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    println!("deleted {}", args.at.dir(config).delete(&ids)?);
    Ok(ExitCode::SUCCESS)
}

/// What became of the items.
#[derive(Debug, Default)]
struct Report {
    taken: usize,
    refused: usize,
    deferred: usize,
    newer: usize,
    left: usize,
}

/// Sends items, piece by piece; what the door takes is taken out of the files before the
/// next piece goes. The exit code says whether all of them were taken.
pub(super) async fn send(config: Config, args: SendRefusedArgs) -> anyhow::Result<ExitCode> {
    let dir = args.at.dir(&config);
    let _alone = dir.lock()?;
    let mut items = Vec::new();
    match &args.file {
        Some(file) => read_mended(file, &args.at, &mut items)?,
        None => args.at.each(&config, |item| {
            items.push(item);
            Ok(true)
        })?,
    }
    let door = Door::of(&config.http, &args)?;
    let known = door.current_schema().await?;
    let mut report = Report::default();
    // What the relay does not know either would only be kept again.
    items.retain(|item| {
        let is_known = item.schema_version <= known;
        report.newer += usize::from(!is_known);
        is_known
    });
    let mut rest = &items[..];
    let mut sent = Ok(());
    while !rest.is_empty() && sent.is_ok() {
        let (piece, behind) = rest.split_at(piece_of(rest));
        rest = behind;
        let mut taken = HashSet::new();
        sent = door.send(piece, &mut report, &mut taken).await;
        report.taken += taken.len();
        dir.delete(&taken)
            .context("what was taken could not be taken out; sent again, it has the same ids")?;
    }
    report.left += rest.len();
    report.print();
    sent?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Report {
    fn print(&self) {
        println!("taken {}", self.taken);
        for (items, what) in [
            (self.refused, "still refused"),
            (self.deferred, "not taken: there was no room"),
            (self.newer, "left: of a schema version that the relay does not know"),
            (self.left, "left: not sent"),
        ] {
            if items > 0 {
                println!("{what} {items}");
            }
        }
    }

    fn is_clean(&self) -> bool {
        self.refused + self.deferred + self.newer + self.left == 0
    }

    fn note_refused(&mut self, item: &RefusedItem, why: &str) {
        self.refused += 1;
        if self.refused <= SHOWN_MAX {
            println!("{}  {}", words(&item.letter_id), words(why));
        }
    }
}

fn read_mended(file: &Path, at: &RefusedAt, items: &mut Vec<RefusedItem>) -> anyhow::Result<()> {
    let open = || format!("{} cannot be read", file.display());
    for (number, line) in BufReader::new(File::open(file).with_context(open)?).lines().enumerate() {
        let line = line.with_context(open)?;
        if line.trim().is_empty() {
            continue;
        }
        let item: RefusedItem = serde_json::from_str(&line).with_context(|| {
            format!("{} line {}: want a line as `show` prints it", file.display(), number + 1)
        })?;
        items.extend(Some(item).filter(|item| at.takes(&item.reason)));
    }
    Ok(())
}

/// How many of the first items go in one call, with what stands beside each of them.
fn piece_of(items: &[RefusedItem]) -> usize {
    let mut bytes = 0;
    let fits = |item: &&RefusedItem| {
        bytes += item.memory_bytes();
        resend::go_together(&items[0], item) && bytes <= BYTES_AT_ONCE
    };
    items.iter().take(ITEMS_AT_ONCE).take_while(fits).count().max(1)
}

/// A relay's HTTP door.
struct Door {
    client: Client,
    url: String,
    authorization: Option<String>,
}

impl Door {
    fn of(settings: &HttpSettings, args: &SendRefusedArgs) -> anyhow::Result<Self> {
        let url = match &args.to {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => {
                own_url(settings).context("HTTP_PORT is off: want --to with the URL of a relay's door")?
            }
        };
        let key = args.write_key.as_ref().or(settings.write_keys.first());
        let authorization = key.map(|key| format!("Basic {}", BASE64_STANDARD.encode(format!("{key}:"))));
        // Fails only if one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().timeout(CALL_TIMEOUT).no_proxy().build()?;
        Ok(Self { client, url, authorization })
    }

    /// The newest version that it knows.
    async fn current_schema(&self) -> anyhow::Result<u32> {
        #[derive(serde::Deserialize)]
        struct Schemas {
            current: u32,
        }
        let url = format!("{}/v1/schemas", self.url);
        let said = self.client.get(&url).send().await.with_context(|| format!("{url} cannot be reached"))?;
        ensure!(said.status().is_success(), "{url}: {}", said.status());
        let schemas: Schemas = serde_json::from_slice(&said.bytes().await?)
            .with_context(|| format!("{url}: that is no relay's answer"))?;
        Ok(schemas.current)
    }

    /// Sends a piece until each of its items is taken or refused, but not for ever. Adds the
    /// ids of the letters whose items were taken.
    async fn send(
        &self,
        items: &[RefusedItem],
        report: &mut Report,
        taken: &mut HashSet<String>,
    ) -> anyhow::Result<()> {
        // What the door does not take together is cut in halves, down to one item.
        let mut pieces: Vec<(Vec<&RefusedItem>, u32)> = vec![(items.iter().collect(), 0)];
        while let Some((piece, tries)) = pieces.pop() {
            if tries == TRIES_MAX {
                report.deferred += piece.len();
                continue;
            }
            match self.call(&piece).await? {
                Called::Later(wait) => {
                    sleep(wait).await;
                    pieces.push((piece, tries + 1));
                }
                Called::Refused(why) if piece.len() == 1 => report.note_refused(piece[0], &why),
                Called::Refused(_) => {
                    let (one, other) = piece.split_at(piece.len() / 2);
                    pieces.extend([(other.to_vec(), tries), (one.to_vec(), tries)]);
                }
                Called::Answered(answer, wait) => {
                    let later = settle(&piece, &answer, report, taken);
                    if !later.is_empty() {
                        sleep(wait).await;
                        pieces.push((later, tries + 1));
                    }
                }
            }
        }
        Ok(())
    }

    async fn call(&self, items: &[&RefusedItem]) -> anyhow::Result<Called> {
        let url = format!("{}/v1/batch", self.url);
        let body = resend::body(items, Clock::system().now_ms());
        let mut call = self.client.post(&url).header("content-type", "application/json").body(body);
        if let Some((name, value)) = resend::head(items) {
            call = call.header(name, value);
        }
        if let Some(authorization) = &self.authorization {
            call = call.header(AUTHORIZATION, authorization);
        }
        let said = call.send().await.with_context(|| format!("{url} cannot be reached"))?;
        let wait = retry_after(&said);
        let (status, text) = (said.status(), said.bytes().await?);
        let shown = || String::from_utf8_lossy(&text).chars().take(300).collect::<String>();
        match status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Ok(Called::Later(wait)),
            StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE => Ok(Called::Refused(shown())),
            StatusCode::OK => {
                let answer: Answer = serde_json::from_slice(&text)
                    .with_context(|| format!("{url}: that is no relay's answer"))?;
                let wait = answer.retry_after_ms.map_or(wait, Duration::from_millis).min(WAIT_MAX);
                Ok(Called::Answered(answer, wait))
            }
            status => bail!("{url}: {status}: {}", shown()),
        }
    }
}

/// What a door says to a call.
enum Called {
    /// For each item; how long to wait with those that are deferred.
    Answered(Answer, Duration),
    /// All of it is to be sent again, after this time.
    Later(Duration),
    /// It takes no such call, in its words.
    Refused(String),
}

/// Notes what became of each item; returns those that are deferred.
fn settle<'a>(
    items: &[&'a RefusedItem],
    answer: &Answer,
    report: &mut Report,
    taken: &mut HashSet<String>,
) -> Vec<&'a RefusedItem> {
    let later: HashSet<usize> = answer.deferred.iter().map(|item| item.index).collect();
    let refused: BTreeMap<usize, String> = answer
        .refused
        .iter()
        .map(|item| {
            let said =
                item.violations.iter().map(|it| format!("{} {}: {}", it.reason, it.field, it.description));
            (item.index, said.collect::<Vec<_>>().join("; "))
        })
        .collect();
    let mut deferred = Vec::new();
    for (place, item) in items.iter().enumerate() {
        match refused.get(&place) {
            Some(why) => report.note_refused(item, why),
            None if later.contains(&place) => deferred.push(*item),
            None => {
                taken.insert(item.letter_id.clone());
            }
        }
    }
    deferred
}

/// The door of a relay with these settings, as this machine reaches it.
fn own_url(settings: &HttpSettings) -> Option<String> {
    let listen = settings.listen.as_ref()?;
    let host = match listen.host.trim_matches(['[', ']']) {
        "0.0.0.0" | "::" | "*" | "" => "127.0.0.1".to_owned(),
        host if host.contains(':') => format!("[{host}]"),
        host => host.to_owned(),
    };
    let scheme = if settings.tls.is_some() { "https" } else { "http" };
    Some(format!("{scheme}://{host}:{}", listen.port))
}

fn retry_after(said: &Response) -> Duration {
    let seconds = said.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(1)).min(WAIT_MAX)
}

//! `analytics-relay erase` and `suppression check|lift`.

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use analytics_relay_providers::Event;
use anyhow::{Context, ensure};

use super::{EraseArgs, IdArgs, keys};
use crate::{
    config::Config,
    delivery::{
        dead_letter::{DeadLetter, DeadLetterDir},
        spill::{SpillDir, SpilledEvent},
    },
    files::{self, DataDirLock},
    ingest::http::resend::ids_of,
    letter_files::{Letter, Line, delete_lines},
    privacy::{
        secret::DataSecret,
        suppression::{IdSort, Ids, SuppressionDir},
    },
    queue::{Durability, spool::inspect::SpoolDir},
    refused::{RefusedDir, RefusedItem},
    sealing::Sealing,
    store::{
        self, OpenStore,
        erasures::{Erased, Erasure, Erasures},
    },
    telemetry::StoreMetrics,
    time::{Clock, rfc_3339},
};

/// How long a running relay has to say that it keeps to the list: requests under way may
/// take their whole time.
const CONFIRM_TIME: Duration = Duration::from_secs(30);
/// A large store is rewritten in part.
const STORE_TIME: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The user is suppressed, and no running relay has said so in time.
const UNCONFIRMED: u8 = 2;

impl IdArgs {
    fn ids(&self) -> anyhow::Result<Vec<(IdSort, &str)>> {
        let users = self.user_ids.iter().map(|id| (IdSort::User, &**id));
        let ids: Vec<_> =
            users.chain(self.anonymous_ids.iter().map(|id| (IdSort::Anonymous, &**id))).collect();
        ensure!(!ids.is_empty(), "got no id, want --user-id or --anonymous-id, as often as there are ids");
        ensure!(ids.iter().all(|(_, id)| !id.is_empty()), "got an empty id, want one that names somebody");
        Ok(ids)
    }

    fn data_dir<'a>(&'a self, config: &'a Config) -> &'a Path {
        self.data_dir.as_deref().unwrap_or(&config.data_dir)
    }

    fn list(&self, config: &Config) -> anyhow::Result<SuppressionDir> {
        let dir = self.data_dir(config);
        files::create_dir(dir).with_context(|| dir.display().to_string())?;
        Ok(SuppressionDir::open(dir, &DataSecret::open(dir)?))
    }

    fn is_of(&self, user_id: Option<&str>, anonymous_id: Option<&str>) -> bool {
        user_id.is_some_and(|id| self.user_ids.iter().any(|own| own == id))
            || anonymous_id.is_some_and(|id| self.anonymous_ids.iter().any(|own| own == id))
    }

    fn is_of_event(&self, event: &Event) -> bool {
        Ids::of(event).any(|user_id, anonymous_id| self.is_of(user_id, anonymous_id))
    }

    /// An item that broke a rule may have its ids in any form, and each more than once.
    fn is_of_item(&self, json: &str) -> bool {
        let Some([user_id, anonymous_id, previous_id]) = ids_of(json) else { return false };
        let ids = Ids {
            user_id: user_id.as_deref(),
            anonymous_id: anonymous_id.as_deref(),
            previous_id: previous_id.as_deref(),
        };
        ids.any(|user_id, anonymous_id| self.is_of(user_id, anonymous_id))
    }
}

/// Suppresses a user, waits until a running relay keeps to it, and takes what is kept of
/// them out of every file but the log.
pub(super) fn erase(config: &Config, args: &EraseArgs) -> anyhow::Result<ExitCode> {
    let ids = args.ids.ids()?;
    let data_dir = args.ids.data_dir(config);
    let list = args.ids.list(config)?;
    let sealing = keys(config)?;
    let generation = list.add(&ids, now_ms())?;
    let confirmed = match DataDirLock::acquire(data_dir) {
        Ok(_nobody_runs) => {
            println!("suppressed {} id(s); no relay runs on {}", ids.len(), data_dir.display());
            true
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => confirm(&list, generation, ids.len())?,
        Err(error) => return Err(error).with_context(|| data_dir.display().to_string()),
    };
    let mut erasing = Erasing { ids: &args.ids, sealing, left: Vec::new() };
    let replays = erasing.letters(data_dir)?;
    erasing.refused(data_dir)?;
    erasing.spilled(data_dir)?;
    let is_gone_from_store = erasing.stored(config, data_dir)?;
    erasing.logged(config)?;
    println!("what providers have is theirs to erase: ask each of them");
    for provider in &replays {
        println!(
            "a replay to {provider} is running: it may have read their events before, run this again after it"
        );
    }
    for left in &erasing.left {
        println!("not judged: {left}");
    }
    let is_whole = confirmed && is_gone_from_store && replays.is_empty() && erasing.left.is_empty();
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::from(UNCONFIRMED) })
}

fn confirm(list: &SuppressionDir, generation: u64, ids: usize) -> anyhow::Result<bool> {
    let until = Instant::now() + CONFIRM_TIME;
    while list.in_force()? < generation {
        if Instant::now() > until {
            println!(
                "suppressed {ids} id(s); the running relay has not confirmed it within {} s: see its log, \
                 and run this again",
                CONFIRM_TIME.as_secs()
            );
            return Ok(false);
        }
        thread::sleep(LOOK_AGAIN);
    }
    println!("suppressed {ids} id(s); in force in the running relay since {}", rfc_3339(now_ms()));
    Ok(true)
}

/// Takes events out of files.
struct Erasing<'a> {
    ids: &'a IdArgs,
    sealing: Sealing,
    /// What nobody could tell of, whose it is.
    left: Vec<String>,
}

impl Erasing<'_> {
    /// Returns the providers to which a replay is running.
    fn letters(&mut self, data_dir: &Path) -> anyhow::Result<Vec<String>> {
        let (mut deleted, mut replays) = (0, Vec::new());
        for provider in DeadLetterDir::providers(data_dir)? {
            let dir = DeadLetterDir::new(data_dir, &provider);
            if dir.is_being_replayed()? {
                replays.push(provider);
            }
            let ids = self.ids;
            deleted += self.files(dir.files()?, |letter: &DeadLetter| ids.is_of_event(&letter.event));
        }
        println!("dead letters deleted: {deleted}");
        Ok(replays)
    }

    fn refused(&mut self, data_dir: &Path) -> anyhow::Result<()> {
        let ids = self.ids;
        let deleted = self
            .files(RefusedDir::new(data_dir).files()?, |item: &RefusedItem| ids.is_of_item(item.item.get()));
        println!("refused items deleted: {deleted}");
        Ok(())
    }

    fn spilled(&mut self, data_dir: &Path) -> anyhow::Result<()> {
        let mut deleted = 0;
        for provider in SpillDir::providers(data_dir)? {
            let ids = self.ids;
            let files = SpillDir::files_of(data_dir, &provider)?;
            deleted += self.files(files, |SpilledEvent(event): &SpilledEvent| ids.is_of_event(event));
        }
        println!("spilled events deleted: {deleted}");
        for path in SpillDir::set_aside(data_dir)? {
            self.left.push(format!("{}: lines of a spill file that cannot be read", path.display()));
        }
        Ok(())
    }

    /// Asks whoever has the store open, or opens it. False if it is not done in time: it stays
    /// asked.
    fn stored(&mut self, config: &Config, data_dir: &Path) -> anyhow::Result<bool> {
        if !config.store.is_on() {
            println!("the store: none (STORE_URL)");
            return Ok(true);
        }
        if let Some(file) = config.store.file(data_dir) {
            for path in store::set_aside(&file).with_context(|| file.display().to_string())? {
                self.left.push(format!("{}: a damaged store that was set aside", path.display()));
            }
            if !file.exists() {
                println!("the store: nothing is in it yet");
                return Ok(true);
            }
        }
        let erasures = Erasures::new(data_dir);
        let asked = erasures.ask(&Erasure {
            user_ids: self.ids.user_ids.clone(),
            anonymous_ids: self.ids.anonymous_ids.clone(),
        })?;
        let until = Instant::now() + STORE_TIME;
        loop {
            if let Some(Erased { events, facts }) = erasures.outcome(&asked)? {
                println!("the store: events deleted: {events}, facts about who is who: {facts}");
                return Ok(true);
            }
            if Instant::now() > until {
                println!(
                    "the store: they are not deleted within {} s; it is done as soon as a relay has it open: \
                     see its log",
                    STORE_TIME.as_secs()
                );
                return Ok(false);
            }
            match DataDirLock::acquire(data_dir) {
                Ok(_nobody_runs) => {
                    let worked = work_off(config, data_dir, &erasures);
                    // What failed may have been asked by others.
                    if !erasures.is_done(&asked) {
                        worked?;
                    }
                }
                Err(_) => thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Says until when the log holds bytes of theirs, and notes what of it stays longer.
    fn logged(&mut self, config: &Config) -> anyhow::Result<()> {
        tell_of_log(config);
        let log = SpoolDir::open(&config.spool.dir);
        for path in log.map(|log| log.set_aside()).transpose()?.unwrap_or_default() {
            self.left.push(format!(
                "{}: a part of the log that cannot be read and goes with no retention",
                path.display()
            ));
        }
        Ok(())
    }

    /// One file after the other, also if one cannot be rewritten; how many there were.
    fn files<L: Letter>(&mut self, paths: Vec<PathBuf>, is_theirs: impl Fn(&L) -> bool) -> usize {
        let mut deleted = 0;
        for path in paths {
            let mut unread = 0;
            let erased = delete_lines(&path, &self.sealing, |_, line: Line<L>| match line {
                Line::Letter(letter) => is_theirs(&letter),
                _ => {
                    unread += 1;
                    false
                }
            });
            match erased {
                Ok(lines) => deleted += lines,
                // All that was in it has ended meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => self.left.push(format!("{}: {error}", path.display())),
            }
            if unread > 0 {
                self.left.push(format!("{}: {unread} line(s) that cannot be read", path.display()));
            }
        }
        deleted
    }
}

/// Does what is asked of the store while no relay runs.
fn work_off(config: &Config, data_dir: &Path, erasures: &Erasures) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (metrics, clock) = (StoreMetrics::default(), Clock::system());
        let store = OpenStore::open(&config.store, data_dir, metrics, clock).await?;
        let done = erasures.work_off(&*store.store).await;
        store.close().await;
        done.map(|_| ())
            .context("the store: they are not deleted yet; it stays asked, and the next relay does it")
    })
}

/// Until when bytes of the user may stand in the log, whose frames are never rewritten.
fn tell_of_log(config: &Config) {
    let is_there = config.spool.dir.join("segments").exists();
    if config.spool.durability == Durability::Queued && !is_there {
        return println!("the log: none (DURABILITY=memory)");
    }
    let hours = config.spool.retention.as_secs() / 3600;
    let until_ms = now_ms() + i64::try_from(config.spool.retention.as_millis()).unwrap_or(i64::MAX);
    println!(
        "the log: events of theirs are not delivered; their bytes go with its retention, by {} \
         (SPOOL_RETENTION_HOURS={hours}), later only where dead letters cannot be written",
        rfc_3339(until_ms)
    );
}

/// Says whether ids are suppressed.
pub(super) fn check(config: &Config, args: &IdArgs) -> anyhow::Result<ExitCode> {
    let list = args.list(config)?;
    let mut all = true;
    for (sort, id) in args.ids()? {
        match list.since_ms(sort, id)? {
            Some(since_ms) => println!("suppressed since {}", rfc_3339(since_ms)),
            None => {
                println!("not suppressed");
                all = false;
            }
        }
    }
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Lets users come back: what they send from now on is taken.
pub(super) fn lift(config: &Config, args: &IdArgs) -> anyhow::Result<ExitCode> {
    let (list, ids) = (args.list(config)?, args.ids()?);
    list.lift(&ids)?;
    println!("{} id(s) are suppressed still", list.count()?);
    Ok(ExitCode::SUCCESS)
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

//! `analytics-relay erase` and `suppression check|lift`.

use std::{
    io,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use analytics_relay_providers::Event;
use anyhow::{Context, ensure};
use serde_json::value::RawValue;

use super::{EraseArgs, IdArgs};
use crate::{
    config::Config,
    delivery::{
        dead_letter::{DeadLetter, DeadLetterDir},
        spill::SpillDir,
    },
    files::{self, DataDirLock},
    letter_files::delete_from,
    privacy::{
        secret::DataSecret,
        suppression::{IdSort, SuppressionDir},
    },
    queue::Durability,
    refused::{RefusedDir, RefusedItem},
    time::rfc_3339,
};

/// How long a running relay has to say that it keeps to the list: requests under way may
/// take their whole time.
const CONFIRM_TIME: Duration = Duration::from_secs(30);
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
        self.is_of(event.user_id(), event.anonymous_id())
    }

    /// An item that broke a rule may have its ids in any form.
    fn is_of_item(&self, item: &RefusedItem) -> bool {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Ids<'a> {
            #[serde(borrow)]
            user_id: Option<&'a RawValue>,
            #[serde(borrow)]
            anonymous_id: Option<&'a RawValue>,
        }
        let Ok(ids) = serde_json::from_str::<Ids<'_>>(item.item.get()) else { return false };
        let text = |value: Option<&RawValue>| {
            let json = value?.get();
            Some(serde_json::from_str(json).unwrap_or_else(|_| json.to_owned()))
        };
        self.is_of(text(ids.user_id).as_deref(), text(ids.anonymous_id).as_deref())
    }
}

/// Suppresses a user, waits until a running relay keeps to it, and takes what is kept of
/// them out of every file but the log.
pub(super) fn erase(config: &Config, args: &EraseArgs) -> anyhow::Result<ExitCode> {
    let ids = args.ids.ids()?;
    let data_dir = args.ids.data_dir(config);
    let list = args.ids.list(config)?;
    let generation = list.add(&ids, now_ms())?;
    let confirmed = match DataDirLock::acquire(data_dir) {
        Ok(_nobody_runs) => {
            println!("suppressed {} id(s); no relay runs on {}", ids.len(), data_dir.display());
            true
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => confirm(&list, generation, ids.len())?,
        Err(error) => return Err(error).with_context(|| data_dir.display().to_string()),
    };
    let letters = erase_letters(data_dir, &args.ids)?;
    println!("dead letters deleted: {letters}");
    println!("refused items deleted: {}", erase_refused(data_dir, &args.ids)?);
    println!("spilled events deleted: {}", erase_spilled(data_dir, &args.ids)?);
    tell_of_log(config);
    println!("what providers have is theirs to erase: ask each of them");
    Ok(if confirmed { ExitCode::SUCCESS } else { ExitCode::from(UNCONFIRMED) })
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

fn erase_letters(data_dir: &Path, of: &IdArgs) -> anyhow::Result<usize> {
    let mut deleted = 0;
    for provider in DeadLetterDir::providers(data_dir)? {
        for path in DeadLetterDir::new(data_dir, &provider).files()? {
            let letters = delete_from(&path, u64::MAX, |letter: &DeadLetter| of.is_of_event(&letter.event));
            deleted += letters.with_context(|| path.display().to_string())?.len();
        }
    }
    Ok(deleted)
}

fn erase_refused(data_dir: &Path, of: &IdArgs) -> anyhow::Result<usize> {
    let mut deleted = 0;
    for path in RefusedDir::new(data_dir).files()? {
        let items = delete_from(&path, u64::MAX, |item: &RefusedItem| of.is_of_item(item));
        deleted += items.with_context(|| path.display().to_string())?.len();
    }
    Ok(deleted)
}

fn erase_spilled(data_dir: &Path, of: &IdArgs) -> anyhow::Result<usize> {
    let mut deleted = 0;
    for provider in SpillDir::providers(data_dir)? {
        for path in SpillDir::files_of(data_dir, &provider)? {
            let events = delete_from(&path, u64::MAX, |event: &Event| of.is_of_event(event));
            deleted += events.with_context(|| path.display().to_string())?.len();
        }
    }
    Ok(deleted)
}

/// Until when bytes of the user may stand in the log, whose frames are never rewritten.
fn tell_of_log(config: &Config) {
    if config.spool.durability == Durability::Queued {
        return println!("the log: none (DURABILITY=memory)");
    }
    let hours = config.spool.retention.as_secs() / 3600;
    let until_ms = now_ms() + i64::try_from(config.spool.retention.as_millis()).unwrap_or(i64::MAX);
    println!(
        "the log: events of theirs are not delivered; their bytes are gone by {} at the latest \
         (SPOOL_RETENTION_HOURS={hours})",
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

//! `analytics-relay identity show|split|join|log`.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{bail, ensure};
use axum::http::Method;
use form_urlencoded::Serializer;

use super::{
    IdentityCommand, IdentityLogArgs, OfTenant, PairArgs, ShowIdentityArgs, control::Way, print_each,
    terminal,
};
use crate::{
    config::Config,
    control::wire::{Decided, IDENTITY, JOIN, Known, KnownTie, LOG, Pair, SPLIT},
    time::rfc_3339,
};

pub(super) async fn run(config: &Config, command: IdentityCommand) -> anyhow::Result<ExitCode> {
    match command {
        IdentityCommand::Show(args) => show(config, args).await,
        IdentityCommand::Split(args) => link(config, args, false).await,
        IdentityCommand::Join(args) => link(config, args, true).await,
        IdentityCommand::Log(args) => log(config, args).await,
    }
}

/// Prints what is known about somebody. The exit code says whether anything is.
async fn show(config: &Config, args: ShowIdentityArgs) -> anyhow::Result<ExitCode> {
    let ShowIdentityArgs { id, anonymous, of: OfTenant { tenant, at }, json } = args;
    ensure!(!id.is_empty(), "got an empty id, want one that names somebody");
    let (name, query) = query(&id, anonymous, &tenant);
    let mut way = Way::open(config, &at, false).await?;
    let known = way.call::<Known>(Method::GET, &format!("{IDENTITY}?{query}"), &()).await;
    way.close().await;
    let Some(known) = known? else {
        bail!("nothing is known of a {name} of this id");
    };
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", terminal::json(&serde_json::to_string(&known)?))?;
    } else {
        print(&mut out, &known)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is asked for.
fn query(id: &str, anonymous: bool, tenant: &str) -> (&'static str, String) {
    let name = if anonymous { "device" } else { "user" };
    let query = Serializer::new(String::new()).append_pair(name, id).append_pair("tenant", tenant).finish();
    (name, query)
}

fn print(out: &mut impl Write, known: &Known) -> io::Result<()> {
    let Known { root, users, devices, first_seen_ms, last_seen_ms, traits, ties } = known;
    let seen = |at_ms: Option<i64>| at_ms.map_or("-".to_owned(), rfc_3339);
    writeln!(out, "counts as   {}", terminal::words(root))?;
    for (what, ids) in [("user", users), ("device", devices)] {
        for id in ids {
            writeln!(out, "{what:<11} {}", terminal::words(id))?;
        }
    }
    writeln!(out, "first seen  {}", seen(*first_seen_ms))?;
    writeln!(out, "last seen   {}", seen(*last_seen_ms))?;
    writeln!(out, "traits      {}", terminal::json(traits.get()))?;
    for KnownTie { from, user, by_alias, first_ms, last_ms, is_apart } in ties {
        let how = if *by_alias { "alias" } else { "events" };
        let (from, user) = (terminal::words(from), terminal::words(user));
        let apart = if *is_apart { "; an operator put them apart" } else { "" };
        let (first, last) = (rfc_3339(*first_ms), rfc_3339(*last_ms));
        writeln!(out, "tie         {from} with {user} by {how}, {first} to {last}{apart}")?;
    }
    Ok(())
}

/// Puts a device and a user apart, or joins them again.
async fn link(config: &Config, args: PairArgs, joins: bool) -> anyhow::Result<ExitCode> {
    let PairArgs { device, user, reason, operator, of: OfTenant { tenant, at } } = args;
    ensure!(!device.is_empty() && !user.is_empty(), "got an empty id, want a device and a user");
    let call = if joins { JOIN } else { SPLIT };
    let mut way = Way::open(config, &at, false).await?;
    let of_terminal = || std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_default();
    let operator = operator.unwrap_or_else(of_terminal);
    let pair = Pair { tenant, device, user, operator, reason };
    let done = way.call::<serde_json::Value>(Method::POST, call, &pair).await;
    way.close().await;
    ensure!(done?.is_some(), "the relay that runs knows no such command: it is older");
    let (device, user) = (terminal::words(&pair.device), terminal::words(&pair.user));
    if joins {
        println!("{device} may be {user}'s again: its events count as their facts say");
    } else {
        println!("{device} is not {user}'s: its events without a user id do not count as theirs any more");
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what was decided about somebody's ids.
async fn log(config: &Config, args: IdentityLogArgs) -> anyhow::Result<ExitCode> {
    let IdentityLogArgs { id, anonymous, of: OfTenant { tenant, at }, limit, json } = args;
    ensure!(!id.is_empty(), "got an empty id, want one that names somebody");
    let (_, query) = query(&id, anonymous, &tenant);
    let mut way = Way::open(config, &at, false).await?;
    let log = way.call::<Vec<Decided>>(Method::GET, &format!("{LOG}?{query}&limit={limit}"), &()).await;
    way.close().await;
    let log = log?.unwrap_or_default();
    if json {
        return print_each(None, |each| log.into_iter().try_for_each(|decided| each(decided).map(drop)));
    }
    let mut out = io::stdout().lock();
    for decided in &log {
        print_decided(&mut out, decided)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_decided(out: &mut impl Write, decided: &Decided) -> io::Result<()> {
    let Decided { at_ms, what, from, user, before, event_id, operator, reason } = decided;
    let (from, user) = (terminal::words(from), terminal::words(user));
    write!(out, "{} {what} {from} with {user}", rfc_3339(*at_ms))?;
    let parts = [("before", before), ("event", event_id), ("operator", operator), ("reason", reason)];
    for (name, value) in parts {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
            write!(out, ", {name} {}", terminal::words(value))?;
        }
    }
    writeln!(out)
}

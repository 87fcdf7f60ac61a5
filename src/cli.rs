//! The command line. Without a sub-command the relay serves.

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use analytics_relay_providers::{
    EventId,
    sandbox::{Fault, Vendor},
};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::{
    app::{App, Watchdog},
    config::Config,
    reasons::DeadLetterReason,
    sealing::{Sealing, keyring::is_kid},
    shutdown,
    telemetry::{self, LogFormat, VERSION},
};

/// How long whoever reads standard error has for why a command failed.
const LAST_WORDS_TIME: Duration = Duration::from_secs(2);

mod check;
mod control;
mod dead_letters;
mod erase;
mod explain;
mod identity;
mod privacy;
mod providers;
mod refused;
mod sandbox;
mod secrets;
mod spool;
mod store;
mod terminal;

/// Relays product-analytics events to Mixpanel, Amplitude and Segment.
#[derive(Debug, Parser)]
#[command(name = "analytics-relay", version = VERSION, after_help = "Settings come from the environment \
and from .env; .env.example documents them.")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take events and relay them (the default)
    Serve(ServeArgs),
    /// Validate the settings and print them, keys masked
    Check(CheckArgs),
    /// Run a local server that speaks the providers' contracts, with faults on demand
    Sandbox(SandboxArgs),
    /// Look at events that a provider did not get, send them again, export and delete them
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Stop sending to a provider, and let it go on
    #[command(subcommand)]
    Providers(ProvidersCommand),
    /// Look at the spool, check it, take events out of it and repair it
    #[command(subcommand)]
    Spool(SpoolCommand),
    /// Look at the store, check it, back it up, take events out of it and into it
    #[command(subcommand)]
    Store(StoreCommand),
    /// Look at who is who in the store, and decide whose a device is
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Tell what became of an event
    Explain(ExplainArgs),
    /// Take nothing more of a user, deliver nothing more, and delete what is kept of them
    Erase(EraseArgs),
    /// Look whether users are suppressed, and let them come back
    #[command(subcommand)]
    Suppression(SuppressionCommand),
    /// Look at what the privacy rules do
    #[command(subcommand)]
    Privacy(PrivacyCommand),
    /// The keys that files are sealed with
    #[command(subcommand)]
    Secrets(SecretsCommand),
}

/// Works beside a running relay, and waits until it keeps to it.
#[derive(Debug, Args)]
struct EraseArgs {
    #[command(flatten)]
    ids: IdArgs,
}

#[derive(Debug, Subcommand)]
enum SuppressionCommand {
    /// Say since when; fails if one of the ids is not suppressed
    Check(IdArgs),
    /// Take their events again
    Lift(IdArgs),
}

#[derive(Debug, Args)]
struct IdArgs {
    /// A user, by the id that their events name; as often as needed
    #[arg(long = "user-id", value_name = "ID")]
    user_ids: Vec<String>,
    /// A device or browser of theirs; as often as needed
    #[arg(long = "anonymous-id", value_name = "ID")]
    anonymous_ids: Vec<String>,
    /// Where the relay keeps its files, instead of DATA_DIR
    #[arg(long)]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum PrivacyCommand {
    /// Show what the log and each provider would get of an event; nothing is sent
    Test {
        /// The event: a message of Segment's form, or an event or a dead letter of our files;
        /// - is standard input
        event: PathBuf,
    },
}

#[derive(Debug, Args, Default)]
struct ServeArgs {
    /// Start without a key that files are sealed with: they are set aside, and their events
    /// count as lost
    #[arg(long)]
    quarantine_unreadable: bool,
}

/// All of these work beside a running relay.
#[derive(Debug, Subcommand)]
enum SecretsCommand {
    /// Show which keys files are sealed with, and whether those are given
    Status,
    /// Seal the key of every file with the first key; afterwards files do not need the others.
    /// Fields of the store do, if they are sealed with them
    Rewrap,
    /// Put back what `seal` has sealed in the store: lines of JSON, as `store export` prints
    /// them, from standard input to standard output. Fails if some do not open
    Unseal,
    /// Print by what values of a field that are sealed as `index` are found: those that equal the
    /// text in standard input
    Equal {
        /// The field's name, as in PRIVACY_FILE
        name: String,
    },
    /// Print a new key as RELAY_KEK takes it
    NewKek {
        /// Its name; the day and a random number without it
        #[arg(long, value_parser = parse_kid)]
        name: Option<String>,
    },
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Try each provider too, sending it no event: its name, connection, certificate,
    /// paths and key. Fails if a step does
    #[arg(long)]
    connect: bool,
}

#[derive(Debug, Args)]
struct SandboxArgs {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:8787")]
    listen: SocketAddr,
    /// The key that is accepted, for all vendors
    #[arg(long, default_value = "sandbox-key")]
    key: String,
    /// What every request of a vendor gets, as in mixpanel=503 or segment=10%reset-after
    #[arg(long = "fault", value_parser = parse_fault, value_name = "VENDOR=FAULT")]
    faults: Vec<(Vendor, Fault)>,
}

/// All of these work beside a running relay, and hold until the opposite is said.
#[derive(Debug, Subcommand)]
enum ProvidersCommand {
    /// Show which are suspended, since when and why
    List,
    /// Send it nothing: its events wait, as if it were down
    #[command(visible_alias = "pause")]
    Suspend {
        /// The provider's name, such as mixpanel
        #[arg(value_parser = parse_provider)]
        provider: String,
        /// Why, for whoever looks
        #[arg(long, default_value = "")]
        note: String,
    },
    /// Send to it again
    Resume {
        /// The provider's name, such as mixpanel
        #[arg(value_parser = parse_provider)]
        provider: String,
    },
}

#[derive(Debug, Subcommand)]
enum DeadLettersCommand {
    /// Count them by provider and reason
    List(Filter),
    /// Print them, one JSON object a line
    Show(ShowArgs),
    /// Send them again; what is delivered is never sent twice
    Replay(ReplayArgs),
    /// Write them to a file or to standard output, one JSON object a line
    Export(ExportLettersArgs),
    /// Delete them; shows which ones, and deletes nothing, without --yes
    Delete(DeleteArgs),
    /// Items of batches that broke a rule, and that their callers believe to be taken
    #[command(subcommand)]
    Refused(RefusedCommand),
}

/// All of these work beside a running relay.
#[derive(Debug, Subcommand)]
enum RefusedCommand {
    /// Count them by reason
    List(RefusedAt),
    /// Print them, one JSON object a line, to be mended and sent
    Show(ShowRefusedArgs),
    /// Send them to a relay's HTTP door again; what it takes is no letter any more
    Send(SendRefusedArgs),
    /// Delete them; shows how many, and deletes nothing, without --yes
    Delete(DeleteRefusedArgs),
}

#[derive(Debug, Args, Clone)]
struct RefusedAt {
    /// Only with one reason, such as EVENT_NAME_EMPTY
    #[arg(long)]
    reason: Option<String>,
    /// Where they are, instead of DATA_DIR
    #[arg(long)]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ShowRefusedArgs {
    #[command(flatten)]
    at: RefusedAt,
    /// Print at most this many
    #[arg(long)]
    limit: Option<usize>,
}

#[derive(Debug, Args)]
struct SendRefusedArgs {
    /// What `show` printed, with its items mended; without it, those that are kept as
    /// they are
    file: Option<PathBuf>,
    #[command(flatten)]
    at: RefusedAt,
    /// The relay's HTTP door; the one that the settings name without it
    #[arg(long, value_name = "URL")]
    to: Option<String>,
    /// The write key; the first of HTTP_WRITE_KEYS without it
    #[arg(long)]
    write_key: Option<String>,
}

#[derive(Debug, Args)]
struct DeleteRefusedArgs {
    #[command(flatten)]
    at: RefusedAt,
    /// Do it
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    filter: Filter,
    /// Print at most this many
    #[arg(long)]
    limit: Option<usize>,
}

#[derive(Debug, Args)]
struct ReplayArgs {
    #[command(flatten)]
    filter: Filter,
    /// Send identifies too. A newer one of the same user may have been delivered
    /// since: its traits would be overwritten
    #[arg(long)]
    identifies: bool,
}

#[derive(Debug, Args)]
struct ExportLettersArgs {
    #[command(flatten)]
    filter: Filter,
    /// The file, which must not be there; standard output without it
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    #[command(flatten)]
    filter: Filter,
    /// All of them, of every provider
    #[arg(long)]
    all: bool,
    /// Do it
    #[arg(long)]
    yes: bool,
    /// Only if there are so many, as were shown
    #[arg(long, requires = "yes")]
    letters: Option<u64>,
}

/// Which dead letters; all without any option.
#[derive(Debug, Args, Clone, Default)]
struct Filter {
    /// Of one provider
    #[arg(long)]
    provider: Option<String>,
    /// With one reason, such as retries_exhausted
    #[arg(long, value_parser = parse_reason)]
    reason: Option<DeadLetterReason>,
    /// Not older than this time, as in 2026-01-31T08:00:00Z
    #[arg(long, value_parser = parse_time)]
    since: Option<jiff::Timestamp>,
    /// Older than this time
    #[arg(long, value_parser = parse_time)]
    until: Option<jiff::Timestamp>,
    /// Where they are, instead of DATA_DIR
    #[arg(long)]
    data_dir: Option<PathBuf>,
}

/// All of these work beside a running relay.
#[derive(Debug, Subcommand)]
enum SpoolCommand {
    /// Show segments, how far each provider has come, and the balance
    List(SpoolAt),
    /// Read every byte; fails if anything is damaged or missing
    Verify(SpoolAt),
    /// Print the events, one JSON object a line
    Export(ExportArgs),
    /// Copy what is damaged to quarantine; mend the rest, if no relay is running
    Repair(SpoolAt),
    /// Give up the events of a provider that is not in ANALYTICS_PROVIDER any more
    Forget(ForgetArgs),
}

#[derive(Debug, Args)]
struct SpoolAt {
    /// Where the spool is, instead of SPOOL_DIR
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ExportArgs {
    #[command(flatten)]
    at: SpoolAt,
    /// Only events that have not ended at this provider
    #[arg(long)]
    provider: Option<String>,
    /// Only events with this number or a higher one
    #[arg(long, value_name = "SEQ")]
    since: Option<u64>,
    /// Print at most this many
    #[arg(long)]
    limit: Option<usize>,
}

#[derive(Debug, Args)]
struct ForgetArgs {
    #[command(flatten)]
    at: SpoolAt,
    /// Which one
    provider: String,
    /// Also if events are given up with it
    #[arg(long)]
    yes: bool,
}

/// All of these work beside a running relay. What is in the store is not sealed, and neither
/// is what they write: keep it where nobody else reads.
#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Read all of it; fails if anything is damaged
    Check(CheckStoreArgs),
    /// Copy the store's file into a new one: all that is in it now
    Backup(BackupStoreArgs),
    /// Write the events, one JSON object a line; fails if some could not be read
    Export(ExportStoreArgs),
    /// Take in what export wrote; events that are there are not taken twice. Fails if a line
    /// is no event
    Import(ImportStoreArgs),
    /// Give free pages of the file back to the file system; what is to be stored waits meanwhile
    Vacuum(StoreAt),
    /// Do now what is done at night: make blocks of what is older than a day, merge small ones
    Tidy(StoreAt),
    /// Show how much is in it
    Stats(StatsStoreArgs),
}

#[derive(Debug, Args)]
struct StoreAt {
    /// Where the relay keeps its files, instead of DATA_DIR
    #[arg(long)]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CheckStoreArgs {
    /// A backup, instead of the file that STORE_URL names
    file: Option<PathBuf>,
    #[command(flatten)]
    at: StoreAt,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct BackupStoreArgs {
    /// The file, which must not be there
    to: PathBuf,
    #[command(flatten)]
    at: StoreAt,
}

#[derive(Debug, Args)]
struct ExportStoreArgs {
    /// A backup, instead of the file that STORE_URL names
    #[arg(long)]
    file: Option<PathBuf>,
    /// Of one tenant; "" is that of events that name none. All without it
    #[arg(long)]
    tenant: Option<String>,
    /// Events of this time or later, as in 2026-01-31T08:00:00Z
    #[arg(long, value_parser = parse_time, visible_alias = "since")]
    from: Option<jiff::Timestamp>,
    /// Events before this time
    #[arg(long, value_parser = parse_time, visible_alias = "until")]
    to: Option<jiff::Timestamp>,
    /// The file, which must not be there; standard output without it
    #[arg(long, value_name = "FILE", visible_alias = "out")]
    output: Option<PathBuf>,
    #[command(flatten)]
    at: StoreAt,
}

#[derive(Debug, Args)]
struct ImportStoreArgs {
    /// What export wrote; - is standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    #[command(flatten)]
    at: StoreAt,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct StatsStoreArgs {
    #[command(flatten)]
    at: StoreAt,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// All of these work beside a running relay.
#[derive(Debug, Subcommand)]
enum IdentityCommand {
    /// Show what is known about somebody: all their ids and traits
    Show(ShowIdentityArgs),
    /// Say that a device is not this user's: what was counted so no more is
    Split(PairArgs),
    /// Take a split back
    Join(PairArgs),
    /// Show what was decided about somebody's ids, and why, the latest first
    Log(IdentityLogArgs),
}

#[derive(Debug, Args)]
struct ShowIdentityArgs {
    /// The id of a user
    id: String,
    /// It is the id of a device or browser
    #[arg(long, visible_alias = "device")]
    anonymous: bool,
    #[command(flatten)]
    of: OfTenant,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct IdentityLogArgs {
    /// The id of a user
    id: String,
    /// It is the id of a device or browser
    #[arg(long, visible_alias = "device")]
    anonymous: bool,
    #[command(flatten)]
    of: OfTenant,
    /// Show at most this many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    limit: u16,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct PairArgs {
    /// The device or browser, by the anonymous id that its events name; or an id that an
    /// alias names
    device: String,
    /// The user, by their id
    user: String,
    /// Why, for the log
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Who decides, for the log; the user of this terminal without it
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    #[command(flatten)]
    of: OfTenant,
}

#[derive(Debug, Args)]
struct OfTenant {
    /// Whose; that of events that name none without it
    #[arg(long, default_value = "", hide_default_value = true)]
    tenant: String,
    #[command(flatten)]
    at: StoreAt,
}

#[derive(Debug, Args)]
struct ExplainArgs {
    /// The id that the caller gave the event, or got for it
    #[arg(value_parser = parse_event_id)]
    event_id: EventId<'static>,
    #[command(flatten)]
    at: SpoolAt,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Reads the command line and does what it says.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Printing fails only when nobody reads.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match cli.command.unwrap_or(Command::Serve(ServeArgs::default())) {
        Command::Serve(ServeArgs { quarantine_unreadable }) => with_config(|mut config| {
            config.sealing.quarantine_unreadable = quarantine_unreadable;
            in_runtime(serve(config))
        }),
        Command::Check(CheckArgs { connect }) => match check::check(Config::from_env()) {
            Ok(config) if connect => in_runtime(check::connect(config)),
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => fail(&format_args!("{error:#}")),
        },
        Command::Sandbox(args) => in_runtime(sandbox::sandbox(args)),
        Command::DeadLetters(command) => dead_letters(command),
        Command::Providers(command) => providers(command),
        Command::Spool(command) => spool(command),
        Command::Privacy(PrivacyCommand::Test { event }) => match Config::for_showing() {
            Ok(config) => privacy::test(&config, &event).unwrap_or_else(|error| fail(&format!("{error:#}"))),
            Err(error) => fail(&error),
        },
        Command::Explain(ExplainArgs { event_id, at, json }) => reading(at, |config, dir| {
            explain::explain(dir, &config.data_dir, &keys_if_any(config), &event_id, json)
        }),
        Command::Store(command) => with_files(|config| store::run(config, command)),
        Command::Identity(command) => with_files(|config| Ok(in_runtime(identity::run(config, command)))),
        Command::Secrets(command) => secrets(command),
        Command::Erase(args) => with_files(|config| erase::erase(config, &args)),
        Command::Suppression(SuppressionCommand::Check(ids)) => {
            with_files(|config| erase::check(config, &ids))
        }
        Command::Suppression(SuppressionCommand::Lift(ids)) => with_files(|config| erase::lift(config, &ids)),
    }
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    // Before the first line: whoever reads it may ask to stop.
    let signals = shutdown::signals()?;
    let logs = telemetry::init_logs(&config.logs.level, config.logs.format);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    check::log(&config);
    let starting = Watchdog::over_the_start(signals.first(), config.stop.drain_timeout);
    let app = App::start(&config).await?;
    drop(starting);
    let (report, watchdog) = app.run_watched_until(signals).await;
    if config.logs.format == LogFormat::Pretty {
        logs.print(&report.to_string());
    }
    // Nothing that is left to be let go of holds up the end.
    watchdog.keep();
    Ok(ExitCode::from(report.exit_code()))
}

fn with_config(action: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    match Config::from_env() {
        Ok(config) => action(config),
        Err(error) => fail(&error),
    }
}

fn dead_letters(command: DeadLettersCommand) -> ExitCode {
    let at = |config: Config, filter: &Filter| filter.data_dir.clone().unwrap_or(config.data_dir);
    // Reading needs no key; replaying does.
    let done = match command {
        DeadLettersCommand::List(filter) => {
            Config::for_reading().map(|config| dead_letters::list(&at(config, &filter), &filter))
        }
        DeadLettersCommand::Show(ShowArgs { filter, limit }) => Config::for_reading().map(|config| {
            let sealing = keys(&config)?;
            dead_letters::show(&at(config, &filter), &filter, &sealing, limit)
        }),
        DeadLettersCommand::Export(ExportLettersArgs { filter, out }) => {
            Config::for_reading().map(|config| {
                let sealing = keys(&config)?;
                dead_letters::export(&at(config, &filter), &filter, &sealing, out.as_deref())
            })
        }
        DeadLettersCommand::Delete(args) => {
            Config::for_reading().map(|config| dead_letters::delete(&at(config, &args.filter), args))
        }
        DeadLettersCommand::Refused(command) => Config::for_reading().map(|config| refused(config, command)),
        DeadLettersCommand::Replay(args) => Config::from_env().map(|mut config| {
            config.data_dir = at(config.clone(), &args.filter);
            Ok(in_runtime(dead_letters::replay(config, args)))
        }),
    };
    match done {
        Ok(result) => result.unwrap_or_else(|error| fail(&format!("{error:#}"))),
        Err(error) => fail(&error),
    }
}

fn refused(config: Config, command: RefusedCommand) -> anyhow::Result<ExitCode> {
    match command {
        RefusedCommand::List(at) => refused::list(&config, &at),
        RefusedCommand::Show(args) => refused::show(&config, &args),
        RefusedCommand::Send(args) => Ok(in_runtime(refused::send(config, args))),
        RefusedCommand::Delete(args) => refused::delete(&config, &args),
    }
}

fn providers(command: ProvidersCommand) -> ExitCode {
    match Config::for_reading() {
        Ok(config) => match command {
            ProvidersCommand::List => providers::list(&config),
            ProvidersCommand::Suspend { provider, note } => providers::suspend(&config, &provider, note),
            ProvidersCommand::Resume { provider } => providers::resume(&config, &provider),
        }
        .unwrap_or_else(|error| fail(&format!("{error:#}"))),
        Err(error) => fail(&error),
    }
}

fn spool(command: SpoolCommand) -> ExitCode {
    match command {
        SpoolCommand::List(at) => reading(at, |_, dir| spool::list(dir)),
        SpoolCommand::Verify(at) => reading(at, |config, dir| spool::verify(dir, &keys_if_any(config))),
        SpoolCommand::Export(args) => {
            let ExportArgs { at, provider, since, limit } = args;
            reading(at, |config, dir| {
                spool::export(dir, &keys(config)?, provider.as_deref(), since.unwrap_or(0), limit)
            })
        }
        SpoolCommand::Repair(at) => reading(at, |config, dir| spool::repair(dir, config.spool.limits)),
        SpoolCommand::Forget(ForgetArgs { at, provider, yes }) => {
            reading(at, |_, dir| spool::forget(dir, &provider, yes))
        }
    }
}

fn secrets(command: SecretsCommand) -> ExitCode {
    let done = match command {
        SecretsCommand::NewKek { name } => Ok(secrets::new_kek(name)),
        SecretsCommand::Status => Config::for_reading().map(|config| secrets::status(&config)),
        SecretsCommand::Unseal => Config::for_reading().map(|config| secrets::unseal(&config)),
        SecretsCommand::Equal { name } => Config::for_reading().map(|config| secrets::equal(&config, &name)),
        SecretsCommand::Rewrap => Config::for_reading().map(|config| secrets::rewrap(&config)),
    };
    match done {
        Ok(result) => result.unwrap_or_else(|error| fail(&format!("{error:#}"))),
        Err(error) => fail(&error),
    }
}

/// The keys that the settings name.
fn keys(config: &Config) -> anyhow::Result<Sealing> {
    Ok(Sealing::new(config.sealing.load()?))
}

/// The same for what can do without: what is wrong with them is told, and no more.
#[expect(clippy::print_stderr, reason = "standard output is for the result")]
fn keys_if_any(config: &Config) -> Sealing {
    keys(config).unwrap_or_else(|error| {
        eprintln!("warning: {error:#}");
        Sealing::default()
    })
}

/// Does what needs the settings, but no key of a provider's.
fn with_files(action: impl FnOnce(&Config) -> anyhow::Result<ExitCode>) -> ExitCode {
    match Config::for_reading() {
        Ok(config) => action(&config).unwrap_or_else(|error| fail(&format!("{error:#}"))),
        Err(error) => fail(&error),
    }
}

/// The same with the directory of the log.
fn reading(at: SpoolAt, action: impl FnOnce(&Config, &Path) -> anyhow::Result<ExitCode>) -> ExitCode {
    with_files(|config| action(config, at.dir.as_ref().unwrap_or(&config.spool.dir)))
}

fn in_runtime(task: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let code = runtime.block_on(task).unwrap_or_else(|error| fail(&format!("{error:#}")));
    // Connections that callers keep open must not keep the process.
    runtime.shutdown_background();
    code
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    telemetry::say_on_stderr(format!("analytics-relay: {error}\n"), LAST_WORDS_TIME);
    ExitCode::FAILURE
}

/// Prints what `each` hands on, one JSON object a line, and no more than so many.
fn print_each<L: Serialize>(
    limit: Option<usize>,
    each: impl FnOnce(&mut dyn FnMut(L) -> anyhow::Result<bool>) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let mut left = limit.unwrap_or(usize::MAX);
    let mut out = io::stdout().lock();
    let printed = each(&mut |letter| {
        if left == 0 {
            return Ok(false);
        }
        left -= 1;
        let line = serde_json::to_string(&letter)?;
        writeln!(out, "{}", terminal::json(&line))?;
        Ok(true)
    });
    match printed {
        // `show | head` is no failure.
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        printed => printed.map(|()| ExitCode::SUCCESS),
    }
}

/// True if nobody reads what we print.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.downcast_ref::<io::Error>().is_some_and(kind)
        || error
            .downcast_ref::<serde_json::Error>()
            .is_some_and(|e| e.io_error_kind() == Some(io::ErrorKind::BrokenPipe))
}

fn parse_fault(text: &str) -> Result<(Vendor, Fault), String> {
    let (vendor, fault) = text.split_once('=').ok_or("want VENDOR=FAULT, as in mixpanel=503")?;
    let vendor = Vendor::from_name(vendor)
        .ok_or_else(|| format!("got {vendor:?}, want one of {}", Vendor::ALL.map(Vendor::name).join(", ")))?;
    Ok((vendor, fault.parse().map_err(|error| format!("{error}"))?))
}

fn parse_reason(name: &str) -> Result<DeadLetterReason, String> {
    DeadLetterReason::from_name(name).ok_or_else(|| {
        let known = DeadLetterReason::ALL.map(DeadLetterReason::name);
        format!("got {name:?}, want one of {}", known.join(", "))
    })
}

fn parse_event_id(text: &str) -> Result<EventId<'static>, String> {
    EventId::new(text.to_owned()).map_err(|error| format!("got {text:?}, {error}"))
}

fn parse_kid(name: &str) -> Result<String, String> {
    match is_kid(name) {
        true => Ok(name.to_owned()),
        false => Err(format!("got {name:?}, want 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', and not none")),
    }
}

/// The name of a file, too.
fn parse_provider(name: &str) -> Result<String, String> {
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(is_legal) {
        return Err(format!("got {name:?}, want a provider's name: 1 to 64 of A-Z, a-z, 0-9, - and _"));
    }
    Ok(name.to_owned())
}

fn parse_time(text: &str) -> Result<jiff::Timestamp, String> {
    text.parse().map_err(|_| format!("got {text:?}, want a time such as 2026-01-31T08:00:00Z"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn bad_arguments_say_what_is_wanted() {
        assert!(parse_fault("mixpanel").unwrap_err().contains("VENDOR=FAULT"));
        assert!(parse_fault("posthog=503").unwrap_err().contains("mixpanel"));
        assert!(parse_fault("mixpanel=nonsense").is_err());
        assert_eq!(parse_fault("segment=503").unwrap().0, Vendor::Segment);
        assert!(parse_reason("x").unwrap_err().contains("retries_exhausted"));
        assert!(parse_event_id("").unwrap_err().contains("1 to 100"));
        assert!(parse_provider("../x").unwrap_err().contains("provider's name"));
        assert!(parse_time("yesterday").unwrap_err().contains("2026"));
    }
}

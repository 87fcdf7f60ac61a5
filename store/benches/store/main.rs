//! What the store costs: `cargo bench -p analytics-relay-store -- [million events] [what]`.
//!
//! | what | |
//! |---|---|
//! | nothing, or a part of a question's name | what appending costs, where the store is not there yet; what questions cost |
//! | `erase a user` | what that costs; the store has one user less then |
//! | `live` | questions while events come in, on all cores |
//! | `move` | `store export` and `store import` of the relay that `RELAY_BIN` names |
//! | `peers` | writes events and answers for other engines: see `store/benches/peers` |
//!
//! The data are made up, the same each time: 90 days of 10 websites, of which the first has
//! half of everything and is the one that is asked about; 2,000 pages and 40 countries by
//! Zipf's law, sessions of 1 to 14 events, 5 % custom events, 8 properties. Times are of this
//! process's processor as `/proc` tells them, and of the wall; run it pinned to one core
//! (`taskset -c 0`) for the figures of one.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use analytics_relay_store::{
    Store, Subject, TenantScope,
    sqlite::{Settings, SqliteStore},
};

mod live;
mod load;
mod moving;
mod peers;
mod process;
mod questions;
mod source;

/// What is measured, and where.
struct Bench {
    /// How many, as it was asked for.
    millions: f64,
    /// Of the stores and all that is written beside.
    dir: PathBuf,
}

impl Bench {
    fn events(&self) -> u64 {
        (self.millions * 1e6) as u64
    }

    /// A file of these events, by the end of its name.
    fn file(&self, end: &str) -> PathBuf {
        self.dir.join(format!("store-bench-{}{end}", self.millions))
    }

    /// The store of these events.
    fn store(&self) -> PathBuf {
        self.file(".db")
    }
}

/// Opens a store, with one reader: one core answers.
fn open(path: &Path) -> SqliteStore {
    let readers = std::env::var("STORE_BENCH_READERS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    SqliteStore::open(Settings { readers, ..Settings::new(path) }).unwrap()
}

/// Removes a store with what lies beside it.
fn remove(store: &Path) {
    for beside in ["", "-wal", "-shm", "-lock"] {
        let mut name = store.as_os_str().to_owned();
        name.push(beside);
        match std::fs::remove_file(&name) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{name:?}: {error}"),
            _ => {}
        }
    }
}

async fn erase(store: &SqliteStore) {
    let start = Instant::now();
    let deleted = store.erase(&TenantScope::tenant(""), &Subject::User("user-2000".into())).await.unwrap();
    println!("erase a user: {deleted:?} in {:.1?}", start.elapsed());
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let bench = Bench {
        millions: arguments.first().and_then(|millions| millions.parse().ok()).unwrap_or(1.0),
        dir: std::env::var_os("STORE_BENCH_DIR").map_or_else(std::env::temp_dir, Into::into),
    };
    let what = arguments.get(1).cloned().unwrap_or_default();
    if !bench.store().exists() {
        load::all(&bench).await;
    }
    match &*what {
        "live" => return live::run(&bench).await,
        "move" => return moving::run(&bench).await,
        _ => {}
    }
    let start = Instant::now();
    let store = open(&bench.store());
    println!("opened in {:.1?}: {:?}", start.elapsed(), store.stats().await.unwrap());
    match &*what {
        "erase a user" => erase(&store).await,
        "peers" => peers::write(&bench, &store).await,
        part => drop(questions::ask(&store, part).await),
    }
    store.close().await;
}

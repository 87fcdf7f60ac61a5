//! What `pg_dump` and `pg_restore` make of a store, as docs/store-commands.md has them.

use std::{path::Path, process::Command};

use super::{server::binaries, *};

/// A database of its own.
async fn database(served: &Served, name: &str) -> Settings {
    let name = format!("{name}_{}", served.schema);
    sql(served, &format!("CREATE DATABASE {name} TEMPLATE template0")).await;
    Settings::new(SERVER.as_ref().unwrap().database_url(&name))
}

/// Runs one of the server's programs. What it complains of, if it does.
fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let program = binaries().unwrap().join(program);
    let ended = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    if ended.status.success() && said.is_empty() { Ok(()) } else { Err(said) }
}

fn dump(url: &str, file: &Path) -> Result<(), String> {
    run("pg_dump", &["--format=custom", &format!("--file={}", file.display()), &format!("--dbname={url}")])
}

fn restore(url: &str, file: &Path) -> Result<(), String> {
    run("pg_restore", &["--exit-on-error", &format!("--dbname={url}"), &file.display().to_string()])
}

/// All that is in a store.
async fn lines_of(store: &PostgresStore) -> Vec<String> {
    let lines = String::from_utf8(exported(store).await).unwrap();
    let mut lines: Vec<String> = lines.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Brings the oracle up to what is in a store, batch by batch.
async fn follow(store: &PostgresStore, oracle: &Oracle, batches: &[&[Event]]) {
    let of = TenantScope::tenant("");
    let (there, mut come) = (store.as_of(&of).await.unwrap().events, batches.iter());
    while oracle.as_of(&of).await.unwrap().events < there {
        oracle.append(come.next().expect("no more came")).await.unwrap();
    }
}

#[test]
fn a_dump_that_is_made_beside_a_relay_is_restored_as_it_was_at_one_moment_and_goes_on() {
    with_postgres(async |served| {
        let [from, to] = [database(served, "dumped").await, database(served, "restored").await];
        let store = PostgresStore::open(from.clone()).await.unwrap();
        let oracle = Oracle::with_keys(store.shared.keys);
        let events = various(160, 11);
        let batches: Vec<&[Event]> = events.chunks(8).collect();
        let (before, meanwhile) = batches.split_at(8);
        for batch in before {
            assert_eq!(store.append(batch).await, oracle.append(batch).await);
        }
        let (of, who) = (TenantScope::tenant(""), Subject::User("u2".into()));
        let by = Operator { name: "ann".into(), reason: "shared".into(), at_ms: 5 };
        for store in [&store as &dyn Store, &oracle] {
            store.link(&of, "d1", "u1", false, &by).await.unwrap();
            store.erase(&of, &who).await.unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let (file, url) = (dir.path().join("dump"), from.url.clone());
        let dumping = tokio::task::spawn_blocking({
            let file = file.clone();
            move || dump(&url, &file)
        });
        for batch in meanwhile {
            store.append(batch).await.unwrap();
        }
        dumping.await.unwrap().unwrap();
        store.close().await;

        restore(&to.url, &file).unwrap();
        let restored = PostgresStore::open(to.clone()).await.unwrap();
        whole(&restored).await;
        // What came meanwhile is in it up to some batch.
        follow(&restored, &oracle, meanwhile).await;
        for scope in scopes(0, 600) {
            compare(&restored, &oracle, &scope).await;
        }
        compare_logs(&restored, &oracle).await;

        // It goes on: what is there is known, and what is not is kept.
        for batch in &batches {
            assert_eq!(restored.append(batch).await, oracle.append(batch).await);
        }
        compare(&restored, &oracle, &scopes(0, 600)[0]).await;
        whole(&restored).await;

        // Over a store nothing is restored.
        let there = lines_of(&restored).await;
        let refused = restore(&to.url, &file).unwrap_err();
        assert!(refused.contains("already exists"), "{refused}");
        assert_eq!(lines_of(&restored).await, there);
        whole(&restored).await;
        restored.close().await;
        for name in ["dumped", "restored"] {
            sql(served, &format!("DROP DATABASE {name}_{} WITH (FORCE)", served.schema)).await;
        }
    });
}

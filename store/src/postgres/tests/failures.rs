//! Several who write, and servers that are gone.

use super::{server::Server, *};
use crate::scan::owners::OwnerMap;

fn events(range: std::ops::Range<usize>) -> Vec<Event> {
    let event = |n: usize| {
        let (user, time_ms) = (n % 37, BASE_MS + n as i64 * MINUTE_MS);
        let json = format!(
            r#"{{"id":"e{n}","kind":"page","user_id":"u{user}","anonymous_id":"d{}","session_id":"s{user}","time_ms":{time_ms},"accepted_ms":{time_ms}}}"#,
            n % 53
        );
        Event::from_json(json.as_bytes()).unwrap()
    };
    range.map(event).collect()
}

#[test]
fn two_that_append_the_same_at_once_keep_each_event_once() {
    with_postgres(async |served| {
        let stores = [served.open().await, served.open().await];
        let batches: Vec<Vec<Event>> = (0..20).map(|n| events(n * 25..n * 25 + 50)).collect();
        let append = async |store: &PostgresStore, batches: &[Vec<Event>]| {
            let mut new = 0;
            for batch in batches {
                let verdicts = store.append(batch).await.unwrap();
                new += verdicts.iter().filter(|verdict| **verdict == Appended::New).count();
            }
            new
        };
        let mut back = batches.clone();
        back.reverse();
        let (one, other) = tokio::join!(append(&stores[0], &batches), append(&stores[1], &back));
        assert_eq!(one + other, 525);
        for store in &stores {
            assert_eq!(store.as_of(&TenantScope::tenant("")).await.unwrap().events, 525);
            assert_eq!(store.summary(&all()).await.unwrap().events, 525);
        }
        let oracle = Oracle::with_keys(stores[0].shared.keys);
        oracle.append(&events(0..525)).await.unwrap();
        assert_eq!(stores[1].summary(&all()).await, oracle.summary(&all()).await);
        // What one erases the other does not take for known.
        let who = Subject::User("u1".into());
        stores[0].erase(&TenantScope::tenant(""), &who).await.unwrap();
        oracle.erase(&TenantScope::tenant(""), &who).await.unwrap();
        let more = events(556..560);
        stores[1].append(&more).await.unwrap();
        oracle.append(&more).await.unwrap();
        for store in &stores {
            let of = TenantScope::tenant("");
            assert_eq!(store.identity(&of, &who).await, oracle.identity(&of, &who).await);
            assert_eq!(store.summary(&all()).await, oracle.summary(&all()).await);
        }
        whole(&stores[0]).await;
        for store in stores {
            store.close().await;
        }
    });
}

/// Lets so many inserts of events fail from now on, as if others were in the way.
async fn in_the_way(served: &Served, code: &str, times: u32) {
    let trigger = format!(
        "CREATE SEQUENCE IF NOT EXISTS inserts;
        SELECT setval('inserts', 1, false);
        CREATE OR REPLACE FUNCTION in_the_way() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('inserts') <= {times} THEN RAISE 'others are in the way' USING ERRCODE = '{code}'; END IF;
            RETURN NULL;
        END $$;
        DROP TRIGGER IF EXISTS in_the_way ON events;
        CREATE TRIGGER in_the_way BEFORE INSERT ON events EXECUTE FUNCTION in_the_way()"
    );
    sql(served, &trigger).await;
}

#[test]
fn who_was_in_the_way_costs_another_attempt_and_their_number_is_bounded() {
    for code in ["40001", "40P01"] {
        with_postgres(async |served| {
            let store = served.open().await;
            let oracle = Oracle::with_keys(store.shared.keys);
            // A sequence is not set back with what was tried.
            let attempts = || number(&store, "SELECT last_value FROM inserts WHERE is_called");
            in_the_way(served, code, 1).await;
            let batch = events(0..30);
            assert_eq!(store.append(&batch).await, oracle.append(&batch).await);
            assert_eq!(attempts().await, 2, "{code}");
            // As long as it is tried.
            in_the_way(served, code, CONFLICTS_MAX as u32 - 1).await;
            let batch = events(20..60);
            assert_eq!(store.append(&batch).await, oracle.append(&batch).await);
            assert_eq!(attempts().await, CONFLICTS_MAX as i64, "{code}");
            // For ever: nothing of the batch is kept, nor of who is who.
            in_the_way(served, code, u32::MAX).await;
            let batch = events(50..90);
            let refused = store.append(&batch).await;
            assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
            assert_eq!(attempts().await, CONFLICTS_MAX as i64, "{code}");
            compare(&store, &oracle, &scopes(0, 100)[1]).await;
            in_the_way(served, code, 0).await;
            assert_eq!(store.append(&batch).await, oracle.append(&batch).await);
            compare(&store, &oracle, &scopes(0, 100)[1]).await;
            whole(&store).await;
            store.close().await;
        });
    }
}

/// What a later relay may have changed is not known here.
#[test]
fn the_tables_of_a_later_relay_are_left_as_they_are() {
    with_postgres(async |served| {
        let store = served.open().await;
        store.append(&events(0..5)).await.unwrap();
        // One that an open would make.
        let name = schema::partition(now_ms().div_euclid(DAY_MS) + 1);
        let later = i64::to_le_bytes(7).map(|byte| format!("{byte:02x}")).concat();
        let change = format!(
            "ALTER TABLE events DETACH PARTITION {name}; DROP TABLE {name};
            UPDATE relay_meta SET v = decode('{later}', 'hex') WHERE k = 'version'"
        );
        sql(served, &change).await;
        let connection = store.connection().await.unwrap();
        let there = async || {
            let sql =
                "SELECT md5(string_agg(concat_ws(' ', relname, relkind, relfilenode), ',' ORDER BY oid)),
                    (SELECT md5(string_agg(concat_ws(' ', k, xmin, v), ',' ORDER BY k)) FROM relay_meta),
                    (SELECT md5(string_agg(concat_ws(' ', id, xmin, ctid), ',' ORDER BY id)) FROM events)
                FROM pg_class WHERE relnamespace = current_schema()::regnamespace";
            let row = connection.query_one(sql, &[]).await.unwrap();
            [0, 1, 2].map(|at| row.get::<_, String>(at))
        };
        let before = there().await;
        let error = PostgresStore::open(served.settings.clone()).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Refused(why) if why.contains("a later relay: got version 7, want at most 1")),
            "{error}"
        );
        assert_eq!(there().await, before);
        give_back(Ok(()), connection).unwrap();
        store.close().await;
    });
}

#[test]
fn a_server_that_is_killed_in_the_middle_of_appends_loses_nothing_that_was_acknowledged() {
    let Some(server) = Server::start() else { return not_run("PostgreSQL") };
    runtime().block_on(async {
        let settings = Settings::new(server.url("public"));
        let store = PostgresStore::open(settings.clone()).await.unwrap();
        let appending = tokio::spawn({
            let store = store.clone();
            async move {
                let mut acknowledged = 0;
                for n in 0.. {
                    match store.append(&events(n * 20..n * 20 + 20)).await {
                        Ok(_) => acknowledged += 1,
                        Err(error) => return (acknowledged, error),
                    }
                }
                unreachable!()
            }
        });
        tokio::time::sleep(Duration::from_millis(400)).await;
        server.kill();
        let (acknowledged, error) = appending.await.unwrap();
        assert!(acknowledged > 0);
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        assert!(matches!(store.append(&events(0..1)).await, Err(StoreError::Unavailable(_))));
        // Whoever looks notices the same, and forgets what a server said that is lost.
        let mut map = OwnerMap::of_epoch(0);
        map.n = 7;
        store.shared.owners.keep("", map);
        assert!(matches!(store.look().await, Err(StoreError::Unavailable(_))));
        assert_eq!(store.shared.owners.last("").n, 0);
        let opened = PostgresStore::open(settings.clone()).await;
        assert!(matches!(opened, Err(StoreError::Unavailable(_))), "{opened:?}");
        let server = tokio::task::spawn_blocking(move || server.restart()).await.unwrap();
        // All questions are answered by whole batches, the one that was under way or not.
        let there = store.as_of(&TenantScope::tenant("")).await.unwrap().events as usize;
        assert!([acknowledged * 20, (acknowledged + 1) * 20].contains(&there), "{there} of {acknowledged}");
        let oracle = Oracle::with_keys(store.shared.keys);
        oracle.append(&events(0..there)).await.unwrap();
        let scope = &scopes(0, 600)[1];
        compare(&store, &oracle, scope).await;
        // The same store goes on, and what was acknowledged is there once.
        for n in 0..acknowledged {
            let verdicts = store.append(&events(n * 20..n * 20 + 20)).await.unwrap();
            assert!(verdicts.iter().all(|verdict| *verdict == Appended::Duplicate), "batch {n}");
        }
        let next = events(acknowledged * 20..acknowledged * 20 + 20);
        assert_eq!(store.append(&next).await, oracle.append(&next).await);
        compare(&store, &oracle, scope).await;
        let events = store.as_of(&TenantScope::tenant("")).await.unwrap().events;
        assert_eq!(events, (acknowledged as u64 + 1) * 20);
        assert_eq!(store.summary(&all()).await.unwrap().events, events);
        whole(&store).await;
        store.close().await;
        drop(server);
    });
}

#[test]
fn what_is_wrong_is_told_so_that_the_next_move_is_clear() {
    // It is for this test alone: others would be hit too.
    let Some(server) = Server::start() else { return not_run("PostgreSQL") };
    runtime().block_on(async {
        let served = Served { settings: Settings::new(server.url("public")), schema: "public".into() };
        let store = served.open().await;
        store.append(&events(0..5)).await.unwrap();
        let url = served.settings.url.clone();
        let open = async |url: String| PostgresStore::open(Settings::new(url)).await.unwrap_err();
        let nobody = open(url.replace("postgres@", "nobody_here@")).await;
        assert!(matches!(nobody, StoreError::Unauthorized(_)), "{nobody}");
        assert!(nobody.to_string().contains("want a role that exists"), "{nobody}");
        let nowhere = open(url.replace("/postgres?", "/not_there?")).await;
        assert!(matches!(nowhere, StoreError::Unauthorized(_)), "{nowhere}");
        assert!(nowhere.to_string().contains("want a database that exists"), "{nowhere}");
        let plain = open(format!("{url}&sslmode=require")).await;
        assert!(matches!(&plain, StoreError::Unauthorized(why) if why.contains("got a server without TLS, want")), "{plain}");
        let gone = open("postgres://127.0.0.1:1/x".into()).await;
        assert!(matches!(gone, StoreError::Unavailable(_)), "{gone}");
        // A server that only reads, as one after a failover.
        sql(&served, "ALTER ROLE postgres SET default_transaction_read_only = on").await;
        let other = Settings { connections_max: 1, ..served.settings.clone() };
        let only_reads = PostgresStore::open(other).await;
        sql(&served, "BEGIN READ WRITE; ALTER ROLE postgres RESET default_transaction_read_only; COMMIT").await;
        assert!(matches!(only_reads, Err(StoreError::Unavailable(_))), "{only_reads:?}");
        // A connection that somebody ended costs one attempt.
        sql(&served, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE '%relay%'").await;
        let mut attempts = 0;
        while let Err(error) = store.append(&events(0..6)).await {
            attempts += 1;
            assert!(matches!(error, StoreError::Unavailable(_)) && attempts < 10, "{error}");
        }
        assert_eq!(store.as_of(&TenantScope::tenant("")).await.unwrap().events, 6);
        // A question that takes too long.
        let hasty = Settings { deadline: Duration::from_millis(1), ..served.settings.clone() };
        let hasty = PostgresStore::open(hasty).await.unwrap();
        let error = hasty.summary(&all()).await;
        assert!(matches!(error, Err(StoreError::TooExpensive(_) | StoreError::Unavailable(_))), "{error:?}");
        hasty.close().await;
        // Tables that are taken away.
        sql(&served, "DROP TABLE hourly").await;
        let error = store.append(&events(6..7)).await.unwrap_err();
        assert!(matches!(error, StoreError::Unauthorized(_)), "{error}");
        store.close().await;
        assert_eq!(store.summary(&all()).await, Err(StoreError::Closed));
    });
}

#[test]
fn a_password_that_is_asked_for_and_not_given_is_for_a_person() {
    let Some(server) = Server::start() else { return not_run("PostgreSQL") };
    runtime().block_on(async {
        let served = Served { settings: Settings::new(server.url("public")), schema: "public".into() };
        let store = served.open().await;
        let asked = "CREATE ROLE asked LOGIN SUPERUSER PASSWORD 'right';
            DO $$ BEGIN EXECUTE format('COPY (VALUES (''local all asked scram-sha-256''), (''local all all trust'')) TO %L',
                current_setting('hba_file')); END $$; SELECT pg_reload_conf()";
        sql(&served, asked).await;
        let open = async |user: &str| {
            let url = served.settings.url.replace("postgres@", &format!("{user}@"));
            let opened = PostgresStore::open(Settings::new(url)).await;
            opened.map(|store| drop(tokio::spawn(async move { store.close().await })))
        };
        let since = Instant::now();
        // The server reads it in a moment.
        let error = loop {
            match open("asked").await {
                Ok(()) => assert!(since.elapsed() < Duration::from_secs(20), "it asks for none"),
                Err(error) => break error,
            }
        };
        assert!(matches!(&error, StoreError::Unauthorized(why) if why.contains("got no password, want one")), "{error}");
        let wrong = open("asked:wrong").await.unwrap_err();
        assert!(matches!(&wrong, StoreError::Unauthorized(why) if why.contains("28P01")), "{wrong}");
        open("asked:right").await.unwrap();
        // Others are asked for none.
        store.append(&events(0..1)).await.unwrap();
        store.close().await;
    });
}

#[test]
fn what_a_batch_cannot_keep_is_one_events_fault() {
    with_postgres(async |served| {
        let store = served.open().await;
        let long = "w".repeat(5_000);
        let json = format!(
            r#"{{"id":"long","kind":"page","user_id":"u","time_ms":1,"accepted_ms":1,"properties":{{"website_id":"{long}"}}}}"#
        );
        let odd = r#"{"id":"odd","kind":"page","user_id":"u","time_ms":1,"accepted_ms":1,"properties":{"n":1e300,"t":"\u0000"}}"#;
        let mut batch = events(0..2);
        batch.extend([json.as_str(), odd].map(|json| Event::from_json(json.as_bytes()).unwrap()));
        let verdicts = store.append(&batch).await.unwrap();
        assert!(
            matches!(&verdicts[..], [Appended::New, Appended::New, Appended::Unstorable(_), Appended::New]),
            "{verdicts:?}"
        );
        let recent = store.recent(&all(), None, 10).await.unwrap();
        assert_eq!(recent.last(), batch.last(), "it comes back as it was");
        store.close().await;
    });
}

#[test]
fn websites_that_anybody_names_are_bounded_and_those_that_keys_name_are_not() {
    let change = |settings: &mut Settings| {
        settings.sites_max = 10;
        // Ids are forgotten at once: what is there is found by its website.
        settings.window = 0;
    };
    with_settings(change, async |served| {
        let store = served.open().await;
        let page = |id: &str, own: &str| {
            let json = format!(
                r#"{{"id":"{id}","kind":"page","user_id":"u","time_ms":{BASE_MS},"accepted_ms":{BASE_MS}{own}}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        let of_site = |n: usize| page(&n.to_string(), &format!(r#","properties":{{"website_id":"w{n}"}}"#));
        for part in 0..10 {
            store.append(&(part * 20..part * 20 + 20).map(of_site).collect::<Vec<_>>()).await.unwrap();
        }
        let own = [
            page("by key", r#","source":"of a key""#),
            page("other tenant", r#","tenant":"t","properties":{"website_id":"w"}"#),
        ];
        store.append(&own).await.unwrap();
        // The ten, those that name none, the key's, the other tenant's.
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.sites, stats.sources_refused), (13, 190), "{stats:?}");
        let events = async |source: &str| {
            let scope = Scope { of: TenantScope::source("", source), ..all() };
            store.summary(&scope).await.unwrap().events
        };
        let of =
            async || [events("w9").await, events("w10").await, events("").await, events("of a key").await];
        assert_eq!(of().await, [1, 0, 190, 1]);
        assert_eq!(store.summary(&all()).await.unwrap().events, 201);
        // What is there is there once, also for another relay.
        let other = served.open().await;
        assert_eq!(other.append(&[of_site(150), of_site(5)]).await.unwrap(), vec![Appended::Duplicate; 2]);
        other.append(&[of_site(1_000)]).await.unwrap();
        assert_eq!(of().await, [1, 0, 191, 1]);
        whole(&store).await;
        other.close().await;
        store.close().await;
    });
}

/// What can be kept, and what has an id that fits no key, of each sort.
fn long_lines() -> Vec<u8> {
    let (long, odd) = ("u".repeat(3_000), "\\\\".repeat(400));
    let event = |id: &str, user: &str| {
        format!(r#"{{"id":"{id}","kind":"page","user_id":"{user}","time_ms":1,"accepted_ms":1}}"#)
    };
    let seen = crate::model::Seen::at(1);
    let fact = |tenant: &str, what| KnownFact { tenant: tenant.to_owned(), what }.to_line();
    let user = |user: &str| crate::model::Known::User { user: user.to_owned(), seen };
    let link = |anonymous: &str, user: &str| crate::model::Known::Link {
        anonymous: anonymous.to_owned(),
        user: user.to_owned(),
        seen,
    };
    let lines = [
        event("a", &long),
        event("b", &odd),
        event("c", "u"),
        fact("", user(&long)),
        fact("", user(&"\\".repeat(400))),
        fact("", link("d", "u")),
        fact("", link(&long, "u")),
        fact(&long, link("d", "u")),
        fact("", user("v")),
    ];
    (lines.join("\n") + "\n").into_bytes()
}

#[test]
fn an_import_goes_on_behind_ids_that_fit_no_key() {
    with_postgres(async |served| {
        let store = served.open().await;
        let report = store.import(std::io::Cursor::new(long_lines())).await.unwrap();
        assert_eq!(report, ImportReport { new: 1, duplicates: 0, facts: 2, damaged: 6 });
        let of = TenantScope::tenant("");
        let identity = store.identity(&of, &Subject::Anonymous("d".into())).await.unwrap().unwrap();
        assert!(identity.users == ["u"], "{identity:?}");
        assert!(store.identity(&of, &Subject::User("v".into())).await.unwrap().is_some());
        store.close().await;
    });
}

#[test]
fn a_connection_that_somebody_was_dropped_with_goes_to_nobody_else() {
    with_postgres(async |served| {
        let store = served.open().await;
        let backend = || async { number(&store, "SELECT pg_backend_pid()::bigint").await };
        let first = backend().await;
        assert_eq!(backend().await, first, "what is given back is used again");
        let dropped = async {
            let connection = store.connection().await.unwrap();
            connection.batch_execute("SELECT pg_sleep(30)").await
        };
        assert!(tokio::time::timeout(Duration::from_millis(300), dropped).await.is_err());
        let next = tokio::time::timeout(Duration::from_secs(10), backend()).await;
        assert_ne!(next.expect("nobody waits for the one before"), first);
        store.close().await;
    });
}

#[test]
fn a_database_without_room_for_every_text_is_refused() {
    with_postgres(async |served| {
        let name = format!("latin_{}", served.schema);
        let make = format!(
            "CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        );
        sql(served, &make).await;
        let url = SERVER.as_ref().unwrap().database_url(&name);
        let error = PostgresStore::open(Settings::new(url)).await.unwrap_err();
        assert!(matches!(&error, StoreError::Refused(why) if why.contains("want UTF8")), "{error}");
        sql(served, &format!("DROP DATABASE {name}")).await;
    });
}

//! Who is who, and why; what of it moves to another store.

use std::time::Instant as Clock;

use super::*;
use crate::{
    By, Decision, Tie,
    conformance::people::{FEW, happens, known_after, odd_cases},
    model::identity::LOG_MAX,
};

fn of() -> TenantScope {
    TenantScope::tenant("")
}

fn user(id: &str) -> Subject {
    Subject::User(id.into())
}

fn device(id: &str) -> Subject {
    Subject::Anonymous(id.into())
}

const HOUR_MS: i64 = 3_600_000;

/// An event at an hour, with more of its JSON.
fn event(id: &str, hour: i64, more: &str) -> Event {
    let time_ms = BASE_MS + hour * HOUR_MS + 5;
    let json = format!(r#"{{"id":"{id}","kind":"page","time_ms":{time_ms},"accepted_ms":{time_ms}{more}}}"#);
    Event::from_json(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"))
}

fn both(user: &str, device: &str) -> String {
    format!(r#","user_id":"{user}","anonymous_id":"{device}""#)
}

fn alias(id: &str, hour: i64, previous: &str, user: &str) -> Event {
    let time_ms = BASE_MS + hour * HOUR_MS;
    let json = format!(
        r#"{{"id":"{id}","kind":"alias","previous_id":"{previous}","user_id":"{user}","time_ms":{time_ms},"accepted_ms":7}}"#
    );
    Event::from_json(json.as_bytes()).unwrap()
}

fn ann(at_ms: i64) -> Operator {
    Operator { name: "ann".into(), reason: "a shared desk".into(), at_ms }
}

#[test]
fn it_is_known_since_when_until_when_and_by_what_somebody_is_known() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let lone = r#","anonymous_id":"lone""#;
        let events = [
            event("1", 2, &both("u", "d")),
            event("2", 7, r#","user_id":"u""#),
            event("3", 5, &both("u", "d")),
            event("4", 6, &both("v", "d")),
            event("5", 4, lone),
        ];
        store.append(&events).await.unwrap();
        store.seal().await.unwrap();
        store.append(&[event("6", 9, lone), alias("7", 3, "p", "u")]).await.unwrap();
        let at = |hour: i64| BASE_MS + hour * HOUR_MS;
        let identity = store.identity(&of(), &user("u")).await.unwrap().unwrap();
        assert_eq!((identity.first_seen_ms, identity.last_seen_ms), (Some(at(2) + 5), Some(at(7))));
        assert_eq!(identity.anonymous, ["d", "p"]);
        let tie = |from: &str, user: &str, by_alias, first_ms, last_ms| Tie {
            from: from.into(),
            user: user.into(),
            by_alias,
            first_ms,
            last_ms,
            is_apart: false,
        };
        let want = [
            tie("d", "u", false, at(2) + 5, at(5)),
            tie("d", "v", false, at(6) + 5, at(6) + 5),
            tie("p", "u", true, at(3), at(3)),
        ];
        assert_eq!(identity.ties, want);
        let lone = store.identity(&of(), &device("lone")).await.unwrap().unwrap();
        assert_eq!((lone.first_seen_ms, lone.last_seen_ms), (Some(at(4) + 5), Some(at(9) + 5)));
        assert_eq!(store.identity(&of(), &device("nobody")).await.unwrap(), None);
        store.close().await;
    });
}

#[test]
fn the_log_says_why_two_ids_are_one_and_an_operator_can_take_it_back() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let first =
            [event("1", 1, &both("u", "d")), event("2", 2, &both("v", "d")), event("3", 3, &both("u", "d"))];
        store.append(&first).await.unwrap();
        store.append(&[alias("4", 4, "v", "u")]).await.unwrap();
        let root = async |id: &str| store.identity(&of(), &user(id)).await.unwrap().unwrap().root;
        assert_eq!(root("v").await, "u");
        // Whichever is named first, and twice is once.
        for at_ms in [8, 9] {
            store.link(&of(), "u", "v", false, &ann(at_ms)).await.unwrap();
        }
        assert_eq!(root("v").await, "v");
        let identity = store.identity(&of(), &user("u")).await.unwrap().unwrap();
        assert_eq!(identity.ties.iter().filter(|tie| tie.is_apart && tie.by_alias).count(), 1);
        store.append(&[alias("5", 5, "v", "u")]).await.unwrap();
        assert_eq!(root("v").await, "v", "what is said again changes nothing");
        let log = store.identity_log(&of(), &user("v"), 10).await.unwrap();
        let told: Vec<_> = log
            .iter()
            .map(|entry| (entry.what, &*entry.from, &*entry.user, entry.before.as_deref()))
            .collect();
        let want = [
            (Decision::PutApart, "u", "v", None),
            (Decision::Aliased, "v", "u", None),
            (Decision::Linked, "d", "v", Some("u")),
        ];
        assert_eq!(told, want);
        assert_eq!(log[0].by, By::Operator { name: "ann".into(), reason: "a shared desk".into() });
        assert_eq!((&log[1].by, log[0].at_ms, log[1].at_ms), (&By::Event("4".into()), 8, 7));
        store.link(&of(), "u", "v", true, &ann(10)).await.unwrap();
        assert_eq!(root("v").await, "u");
        assert_eq!(store.identity_log(&of(), &device("d"), 1).await.unwrap()[0].what, Decision::Rejoined);
        assert!(store.identity_log(&of(), &user("v"), 100_000).await.is_err());
        store.close().await;
    });
}

#[test]
fn the_log_keeps_its_last_entries() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&[event("1", 1, &both("u", "d"))]).await.unwrap();
        let count = || {
            store.write(|writer| {
                let sql = "SELECT count(*), min(seq) FROM identity_log";
                let row: (i64, i64) =
                    writer.connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
                Ok(row)
            })
        };
        store
            .write(|writer| {
                let many = "INSERT INTO identity_log SELECT tenant, seq + n, at_ms, event, operator, reason, what, 'x', 'y', before
                    FROM identity_log, (WITH RECURSIVE all_n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM all_n WHERE n < ?1) SELECT n FROM all_n)";
                Ok(writer.connection.execute(many, [LOG_MAX as i64 - 1])?)
            })
            .await
            .unwrap();
        assert_eq!(count().await.unwrap(), (LOG_MAX as i64, 1));
        store.append(&[event("2", 1, &both("u", "e"))]).await.unwrap();
        assert_eq!(count().await.unwrap(), (LOG_MAX as i64, 2));
        let log = store.identity_log(&of(), &user("u"), 10).await.unwrap();
        assert_eq!(log.iter().map(|entry| &*entry.from).collect::<Vec<_>>(), ["e"]);
        store.close().await;
    });
}

#[test]
fn what_is_too_much_is_refused_counted_and_told_once_a_batch() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings { block_rows: 1_000, ..settings(dir.path()) }).unwrap();
        let limits = FactLimits::default();
        let users = limits.users_of_a_device + 3;
        let events: Vec<Event> =
            (0..users).map(|n| event(&format!("{n}"), n as i64, &both(&format!("u{n}"), "desk"))).collect();
        store.append(&events).await.unwrap();
        let others = 0..=limits.users_joined;
        let seen: Vec<Event> =
            others.clone().map(|n| event(&format!("s{n}"), 0, &format!(r#","user_id":"p{n}""#))).collect();
        store.append(&seen).await.unwrap();
        let aliases: Vec<Event> =
            others.map(|n| alias(&format!("a{n}"), 0, &format!("p{n}"), "all")).collect();
        store.append(&aliases).await.unwrap();
        let much = "x".repeat(11_000);
        let identify = format!(
            r#"{{"id":"t","kind":"identify","user_id":"u0","time_ms":1,"accepted_ms":1,"properties":{{"much":"{much}","plan":1}}}}"#
        );
        store.append(&[Event::from_json(identify.as_bytes()).unwrap()]).await.unwrap();
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.links_refused, stats.aliases_refused, stats.traits_refused), (3, 2, 1));
        let log = store.identity_log(&of(), &user(&format!("u{}", users - 3)), 10).await.unwrap();
        assert_eq!(log.iter().map(|entry| entry.what).collect::<Vec<_>>(), [Decision::DeviceHasTooManyUsers]);
        assert!(store.identity_log(&of(), &user(&format!("u{}", users - 1)), 10).await.unwrap().is_empty());
        let identity = store.identity(&of(), &user("u0")).await.unwrap().unwrap();
        assert_eq!(identity.traits, r#"{"plan":1}"#);
        store.close().await;
    });
}

/// Of each user the devices, and all of them one.
fn crowd(users: usize, devices: usize) -> Vec<Event> {
    let links = (0..users).flat_map(|user| {
        (0..devices).map(move |device| {
            let both = both(&format!("u{user}"), &format!("d{user} {device}"));
            event(&format!("{user} {device}"), 50, &both)
        })
    });
    let aliases = (1..users).map(|user| alias(&format!("a{user}"), 60, &format!("u{user}"), "u0"));
    links.chain(aliases).collect()
}

#[test]
fn what_one_event_changes_is_bounded_whatever_many_devices_are_somebodys() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings::new(dir.path().join("store.db"))).unwrap();
        for batch in crowd(90, 200).chunks(1_000) {
            store.append(batch).await.unwrap();
        }
        let start = Clock::now();
        // As in an import that goes back in time.
        for n in 0..40 {
            let earlier = event(&format!("e{n}"), 40 - n, &format!(r#","user_id":"u{}""#, n % 40));
            store.append(&[earlier]).await.unwrap();
        }
        // If all devices were worked out anew it would take minutes.
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        let stats = store.stats().await.unwrap();
        assert!(stats.links_refused + stats.aliases_refused > 80, "{stats:?}");
        let identity = store.identity(&of(), &user("u0")).await.unwrap().unwrap();
        assert!(identity.anonymous.len() <= FactLimits::default().devices_of_a_user);
        store.close().await;
    });
}

#[test]
fn ids_with_zero_bytes_are_told_apart() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&[event("1", 5, &both("c", "a\\u0000b"))]).await.unwrap();
        store.append(&[event("2", 5, &both("b\\u0000c", "a"))]).await.unwrap();
        let identity = store.identity(&of(), &user("b\0c")).await.unwrap().unwrap();
        assert_eq!(identity.anonymous, ["a"]);
        store.close().await;
    });
}

#[test]
fn who_is_erased_is_no_id_of_before_in_what_others_sent() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let events = [
            alias("1", 1, "gone-device", "u"),
            event("2", 2, r#","user_id":"gone-user""#),
            event("3", 2, r#","user_id":"v""#),
            alias("4", 3, "gone-user", "v"),
            event("5", 4, r#","user_id":"u""#),
            alias("6", 5, "stays", "u"),
        ];
        // In a block, and in memory.
        store.append(&events).await.unwrap();
        store.seal().await.unwrap();
        store.append(&[alias("7", 1, "gone-device", "w"), alias("8", 3, "gone-user", "v")]).await.unwrap();
        store.link(&of(), "gone-user", "v", false, &ann(5)).await.unwrap();
        let deleted = store.erase(&of(), &device("gone-device")).await.unwrap();
        assert_eq!((deleted.events, deleted.blocks), (2, 1));
        let deleted = store.erase(&of(), &user("gone-user")).await.unwrap();
        assert_eq!((deleted.events, deleted.blocks), (3, 2));
        store.seal().await.unwrap();
        let left = store.recent(&strain::all(""), None, 10).await.unwrap();
        let left: Vec<String> = left.iter().map(|event| event.id().as_str().to_owned()).collect();
        assert_eq!(left, ["6", "5", "3"]);
        for end in ["", "-wal"] {
            let bytes = std::fs::read(format!("{}{end}", path.display())).unwrap_or_default();
            assert!(!bytes.windows(5).any(|part| part == b"gone-"), "{end}");
        }
        store.close().await;
    });
}

#[test]
fn a_user_whose_id_an_alias_names_is_no_device_to_be_erased() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let oracle = Oracle::with_keys(store.shared.keys);
        let events = [
            event("1", 1, r#","user_id":"both""#),
            alias("2", 2, "both", "u"),
            event("3", 2, &both("u", "both")),
        ];
        for store in [&store as &dyn Store, &oracle] {
            store.append(&events).await.unwrap();
            assert_eq!(store.erase(&of(), &device("both")).await.unwrap().events, 1);
            let identity = store.identity(&of(), &user("u")).await.unwrap().unwrap();
            assert_eq!(identity.users, ["both", "u"]);
        }
        store.close().await;
    });
}

#[test]
fn a_store_of_the_first_version_is_brought_up_and_keeps_what_it_knows() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(super::super::schema::TABLES).unwrap();
        old.execute_batch(
            "INSERT INTO meta(k, v) VALUES ('secret', zeroblob(32)); INSERT INTO tenant(id, name) VALUES (1, '');
            INSERT INTO user(tenant, id, first_ms) VALUES (1, 'u', 7), (1, 'v', 8);
            INSERT INTO link(tenant, device, user, first_ms) VALUES (1, 'd', 'u', 7), (1, 'd', 'v', 9);
            INSERT INTO apart(tenant, device, user) VALUES (1, 'd', 'v'); PRAGMA user_version=1;",
        )
        .unwrap();
        drop(old);
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        assert_eq!(store.set_aside(), None);
        let identity = store.identity(&of(), &user("u")).await.unwrap().unwrap();
        assert_eq!((identity.first_seen_ms, identity.last_seen_ms), (Some(7), Some(7)));
        assert_eq!(identity.ties.iter().map(|tie| tie.is_apart).collect::<Vec<_>>(), [false, true]);
        store.append(&[event("1", 1, &both("u", "d"))]).await.unwrap();
        let identity = store.identity(&of(), &user("u")).await.unwrap().unwrap();
        assert_eq!(identity.last_seen_ms, Some(BASE_MS + HOUR_MS));
        store.close().await;
    });
}

proptest! {
    #![proptest_config(cases(25))]

    /// Events, what retention took away of them, and what an operator said: a store that
    /// imports it all knows the same.
    #[test]
    fn who_is_who_moves_to_another_store(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(
            prop_oneof![5 => doing(false), 1 => (-60..600_i16).prop_map(Do::Retain)],
            1..14,
        ),
    ) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let pool: Vec<Event> = pool.iter().enumerate().map(|(id, spec)| spec.event(id)).collect();
            let (store, oracle) = run(&settings(dir.path()), &pool, &all).await;
            let mut lines = Vec::new();
            export(&dir.path().join("store.db"), &Wanted::default(), &mut lines).unwrap();
            let path = dir.path().join("moved.db");
            let moved = SqliteStore::open(Settings { path, ..settings(dir.path()) }).unwrap();
            // In any order, and twice.
            let mut by_line: Vec<&[u8]> = lines.split_inclusive(|byte| *byte == b'\n').collect();
            by_line.reverse();
            for lines in [by_line.concat(), lines.clone()] {
                assert_eq!(moved.import(std::io::Cursor::new(lines)).await.unwrap().damaged, 0);
            }
            for of in [of(), TenantScope::tenant("t2")] {
                for who in everybody() {
                    assert_eq!(moved.identity(&of, &who).await, oracle.identity(&of, &who).await, "{who:?}");
                    let scope = Scope::new(of.clone(), i64::MIN..i64::MAX);
                    assert_eq!(
                        moved.recent(&scope, Some(&who), 100).await,
                        oracle.recent(&scope, Some(&who), 100).await
                    );
                }
            }
            // Where facts are handed over, too.
            let known: Vec<KnownFact> =
                by_line.iter().filter_map(|line| KnownFact::from_line(line)).collect();
            let other = Oracle::with_keys(store.shared.keys);
            let events: Vec<Event> =
                oracle.recent(&Scope { include_bots: true, ..Scope::new(of(), i64::MIN..i64::MAX) }, None, 1_000).await.unwrap();
            other.append(&events).await.unwrap();
            other.know(&known).await.unwrap();
            for who in everybody() {
                assert_eq!(other.identity(&of(), &who).await, oracle.identity(&of(), &who).await, "{who:?}");
            }
            store.close().await;
            moved.close().await;
        });
    }
}

#[test]
fn who_is_erased_leaves_others_who_they_are_whatever_ids_they_have() {
    for all in odd_cases() {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let backend = Embedded(Settings { fact_limits: FEW, ..settings(dir.path()) });
            known_after(&backend, 1, &all).await.0.close().await;
        });
    }
}

proptest! {
    #![proptest_config(cases(40))]

    /// Where there is no room for all that is told, it is the same that is known, in
    /// whatever batches the events come.
    #[test]
    fn at_the_limits_it_is_known_what_came_first(all in prop::collection::vec(happens(), 1..60)) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut known = Vec::new();
            for batch_max in [1, 4, 1_000] {
                let path = dir.path().join(format!("{batch_max}.db"));
                let backend = Embedded(Settings { path, fact_limits: FEW, ..settings(dir.path()) });
                let (store, of_each) = known_after(&backend, batch_max, &all).await;
                known.push(of_each);
                store.close().await;
            }
            assert_eq!(known[0], known[1]);
            assert_eq!(known[0], known[2]);
        });
    }
}

//! Questions to a store, through both doors of a relay inside of this program, and answers
//! that two such relays share in a Redis that is started here.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use analytics_relay::{
    app::App,
    config::Config,
    proto::v1::{
        GetEventCountRequest, GetEventCountResponse, GetUserCountRequest, TrackEventRequest,
        analytics_service_client::AnalyticsServiceClient,
    },
    providers::{BatchLimits, Event, Provider, SendError, Verdict},
};
use analytics_relay_store::{
    Store, Subject, TenantScope,
    sqlite::{Settings, SqliteStore},
};
use async_trait::async_trait;
use reqwest::{Method, Response, StatusCode, header};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::{sleep, timeout},
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{not_run, reqwest_client};

const PATIENCE: Duration = Duration::from_secs(30);
const KEY: &str = "0123456789abcdef";
/// 2026-11-20T00:00:00Z, and the day of it.
const DAY_MS: i64 = 1_795_132_800_000;
const DAY: &str = "from=2026-11-20&to=2026-11-20";

/// Delivers to a store.
struct ToStore(SqliteStore);

#[async_trait]
impl Provider for ToStore {
    fn name(&self) -> &'static str {
        "own-store"
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits { events_max: 1000, body_bytes_max: 8 << 20, requests_max: 1 }
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        self.0.append(batch).await.expect("the disk works");
        Ok(vec![Verdict::Delivered; batch.len()])
    }
}

/// A store of its own file.
struct Kept {
    store: SqliteStore,
    _dir: TempDir,
}

impl Kept {
    /// With three events of two users on a day that is over.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings::new(dir.path().join("store.db"))).unwrap();
        let kept = Self { store, _dir: dir };
        let named = [("Order Placed", "u1"), ("Order Placed", "u2"), ("=cmd()", "u1")];
        kept.append(named.iter().enumerate().map(|(id, (name, user))| event(id, name, user))).await;
        kept
    }

    async fn append(&self, events: impl Iterator<Item = Event>) {
        self.store.append(&events.collect::<Vec<_>>()).await.unwrap();
    }
}

fn event(id: usize, name: &str, user: &str) -> Event {
    let time_ms = DAY_MS + 3_600_000 * id as i64;
    let event = json!({
        "id": format!("{id:08}-0000-4000-8000-000000000000"), "kind": "track", "name": name, "user_id": user,
        "time_ms": time_ms, "accepted_ms": time_ms, "properties": {},
    });
    Event::from_json(event.to_string().as_bytes()).unwrap()
}

async fn json_of(answer: Response) -> Value {
    serde_json::from_str(&answer.text().await.unwrap()).unwrap()
}

/// A relay that answers.
struct Relay {
    app: App,
    url: String,
    _data: TempDir,
}

impl Relay {
    async fn start(kept: &Kept, vars: &[(&str, &str)]) -> Self {
        Self::start_with(Some(kept), vars).await
    }

    async fn start_with(kept: Option<&Kept>, vars: &[(&str, &str)]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let defaults = [
            ("ANALYTICS_PROVIDER", "none"),
            ("GRPC_HOST", "127.0.0.1"),
            ("GRPC_PORT", "0"),
            ("HTTP_HOST", "127.0.0.1"),
            ("HTTP_PORT", "0"),
            ("METRICS_HOST", "127.0.0.1"),
            ("METRICS_PORT", "0"),
            ("FLUSH_INTERVAL_SECONDS", "0.05"),
            ("DATA_DIR", data.path().to_str().unwrap()),
        ];
        let config = Config::from_vars(defaults.iter().chain(vars).copied()).unwrap();
        let other = Kept::new().await.store;
        let to = ToStore(kept.map_or(other, |kept| kept.store.clone()));
        let store = kept.map(|kept| Arc::new(kept.store.clone()) as Arc<dyn Store>);
        let app = App::start_with_store(&config, vec![Arc::new(to)], store).await.unwrap();
        let http = SocketAddr::from((Ipv4Addr::LOCALHOST, app.http_addr().unwrap().port()));
        Self { app, url: format!("http://{http}"), _data: data }
    }

    fn client(&self) -> AnalyticsServiceClient<tonic::transport::Channel> {
        let addr = format!("http://{}", self.app.grpc_addr());
        AnalyticsServiceClient::new(tonic::transport::Channel::from_shared(addr).unwrap().connect_lazy())
    }

    async fn call(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
        let call = reqwest_client().request(method, format!("{}{path}", self.url));
        headers.iter().fold(call, |call, (name, value)| call.header(*name, *value)).send().await.unwrap()
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let answer = self.call(Method::GET, path, &[]).await;
        (answer.status().as_u16(), json_of(answer).await)
    }

    /// The events of the day, and whether that was known. It took less than a second.
    async fn total(&self, of: &str) -> (u64, bool) {
        let begun = Instant::now();
        let (status, said) = self.get(&format!("/api/v1/events/count?{DAY}{of}")).await;
        assert_eq!(status, 200, "{said}");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        (said["total"].as_u64().unwrap(), said["meta"]["cached"].as_bool().unwrap())
    }

    async fn metric(&self, series: &str) -> f64 {
        let page = reqwest_client().get(format!("http://{}/metrics", self.app.metrics_addr()));
        let page = page.send().await.unwrap().text().await.unwrap();
        let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {series} in {page}")).parse().unwrap()
    }

    async fn in_redis(&self, outcome: &str) -> f64 {
        self.metric(&format!(r#"relay_query_cache_total{{cache="redis",outcome="{outcome}"}}"#)).await
    }

    async fn connected(&self, value: f64) {
        let begun = Instant::now();
        while self.metric("relay_redis_connected").await != value {
            assert!(begun.elapsed() < PATIENCE, "relay_redis_connected does not become {value}");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn counts(
    relay: &Relay,
    request: GetEventCountRequest,
) -> Result<GetEventCountResponse, tonic::Status> {
    relay.client().get_event_count(request).await.map(tonic::Response::into_inner)
}

fn of_day(event_name: &str) -> GetEventCountRequest {
    GetEventCountRequest {
        event_name: event_name.into(),
        start_time: DAY_MS / 1000,
        end_time: DAY_MS / 1000 + 86_400,
        group_by: "day".into(),
    }
}

#[tokio::test]
async fn without_a_store_both_doors_say_how_to_get_one() {
    let relay = Relay::start_with(None, &[]).await;
    let (status, said) = relay.get("/api/v1/events/count?nonsense").await;
    assert_eq!((status, &said["code"]), (501, &"NO_STORE".into()));
    assert!(said["error"].as_str().unwrap().contains("STORE_URL"), "{said}");
    let users = relay.client().get_user_count(GetUserCountRequest::default()).await.unwrap_err();
    assert_eq!(users.code(), Code::Unimplemented);
    assert_eq!(users.get_error_details().error_info().unwrap().reason, "NO_STORE");
}

#[tokio::test]
async fn a_question_that_is_none_is_refused_in_the_words_of_its_door() {
    let kept = Kept::new().await;
    let relay = Relay::start(&kept, &[]).await;
    for (query, field, code) in [
        ("evnt_name=x", "evnt_name", "INVALID_PARAMETER"),
        ("group_by=month", "group_by", "INVALID_PARAMETER"),
        ("format=xml", "format", "INVALID_PARAMETER"),
        ("days=91", "days", "INVALID_PARAMETER"),
        ("from=2026-01-01&to=2026-06-01", "to", "TIME_RANGE_INVALID"),
        ("from=2026-01-02T00:00:00Z&to=2026-01-02T00:00:00Z", "to", "TIME_RANGE_INVALID"),
        ("from=1&from=2", "from", "INVALID_PARAMETER"),
    ] {
        let (status, said) = relay.get(&format!("/api/v1/events/count?{query}")).await;
        assert_eq!((status, &said["field"], &said["code"]), (400, &field.into(), &code.into()), "{query}");
        assert!(said["error"].as_str().unwrap().starts_with(&format!("{field}: got ")), "{said}");
    }
    let (status, said) = relay.get("/api/v1/users/count?event_name=x").await;
    assert_eq!((status, &said["field"]), (400, &"event_name".into()), "no user has a name: {said}");
    let status = counts(&relay, GetEventCountRequest { end_time: 0, ..of_day("") }).await.unwrap_err();
    assert_eq!(
        (status.code(), status.get_error_details().error_info().unwrap().reason.as_str()),
        (Code::InvalidArgument, "TIME_RANGE_INVALID")
    );
}

/// What both doors are sent, both tell.
#[tokio::test]
async fn what_was_sent_is_counted_at_both_doors() {
    let kept = Kept::new().await;
    let relay = Relay::start(&kept, &[]).await;
    let event = json!({"event": "Order Placed", "userId": "u3", "messageId": "m-0123456789", "timestamp": "2026-11-20T23:59:59.999Z"});
    let sent = reqwest_client().post(format!("{}/v1/events/track", relay.url)).body(event.to_string());
    assert_eq!(sent.send().await.unwrap().status(), 202);
    let at = DAY_MS / 1000 + 86_400;
    for timestamp in [at - 1, at] {
        let request = TrackEventRequest {
            event_name: "Order Placed".into(),
            user_id: "u1".into(),
            timestamp,
            ..Default::default()
        };
        relay.client().track_event(request).await.unwrap();
    }
    // Each question is another one until all of it has arrived.
    let mut days = 1;
    loop {
        let (_, said) = relay.get(&format!("/api/v1/users/count?from=2026-11-{days:02}&to=2026-11-20")).await;
        if said["unique_users"] == 3 {
            break;
        }
        days += 1;
        assert!(days < 20, "{said}");
        sleep(Duration::from_millis(200)).await;
    }
    sleep(Duration::from_millis(200)).await;
    let (status, said) = relay.get(&format!("/api/v1/events/count?{DAY}")).await;
    assert_eq!((status, &said["total"]), (200, &5.into()), "its end is not in it: {said}");
    let rows = &said["counts"];
    assert_eq!(
        rows[0],
        json!({"event_name": "=cmd()", "timestamp": "2026-11-20T00:00:00+00:00", "count": 1})
    );
    assert_eq!(
        rows[1],
        json!({"event_name": "Order Placed", "timestamp": "2026-11-20T00:00:00+00:00", "count": 4})
    );
    let all = counts(&relay, of_day("")).await.unwrap().counts;
    let all: Vec<_> = all.iter().map(|it| (it.event_name.as_str(), it.timestamp * 1000, it.count)).collect();
    assert_eq!(all, [("=cmd()", DAY_MS, 1), ("Order Placed", DAY_MS, 4)]);
    let one = counts(&relay, of_day("Order Placed")).await.unwrap().counts;
    assert_eq!((one.len(), one[0].count), (1, 4));
    let users = GetUserCountRequest { start_time: DAY_MS / 1000, end_time: at };
    assert_eq!(relay.client().get_user_count(users).await.unwrap().into_inner().unique_users, 3);
}

#[tokio::test]
async fn a_spreadsheet_gets_rows_and_no_formula() {
    let kept = Kept::new().await;
    let relay = Relay::start(&kept, &[]).await;
    let answer =
        relay.call(Method::GET, &format!("/api/v1/events/count?{DAY}&format=csv&group_by=hour"), &[]).await;
    let header = |name| answer.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("content-type"), "text/csv; charset=utf-8");
    assert_eq!(
        header("content-disposition"),
        "attachment; filename=\"event-count-2026-11-20-2026-11-20.csv\""
    );
    assert_eq!(
        answer.text().await.unwrap(),
        "event_name,timestamp,count\r\n\
         Order Placed,2026-11-20T00:00:00+00:00,1\r\n\
         Order Placed,2026-11-20T01:00:00+00:00,1\r\n\
         \"'=cmd()\",2026-11-20T02:00:00+00:00,1\r\n"
    );
    let answer = relay.call(Method::GET, &format!("/api/v1/users/count?{DAY}&format=csv"), &[]).await;
    assert_eq!(
        answer.text().await.unwrap(),
        "from,to,unique_users,estimated\r\n2026-11-20T00:00:00+00:00,2026-11-21T00:00:00+00:00,2,false\r\n"
    );
}

/// The port is open to browsers: they may send, and read nothing.
#[tokio::test]
async fn only_who_knows_a_key_reads_and_no_page_does() {
    let kept = Kept::new().await;
    let path = format!("/api/v1/events/count?{DAY}");
    let open = Relay::start(&kept, &[("HTTP_HOST", "0.0.0.0")]).await;
    let refused = open.call(Method::GET, &path, &[]).await;
    assert_eq!(
        (refused.status(), &refused.headers()["www-authenticate"]),
        (StatusCode::UNAUTHORIZED, &"Bearer".parse().unwrap())
    );
    let vars = [("HTTP_HOST", "0.0.0.0"), ("HTTP_WRITE_KEYS", "write-key-of-pages"), ("READ_KEYS", KEY)];
    let relay = Relay::start(&kept, &vars).await;
    let page = ("origin", "https://shop.example");
    for (headers, code) in [
        (&[page][..], "KEY_MISSING"),
        (&[("authorization", "Bearer write-key-of-pages"), page], "KEY_INVALID"),
        (&[("authorization", "Basic d3JpdGUta2V5LW9mLXBhZ2VzOg=="), page], "KEY_MISSING"),
        (&[("x-api-key", KEY), page], "KEY_MISSING"),
    ] {
        let refused = relay.call(Method::GET, &path, headers).await;
        let has_cors = refused.headers().keys().any(|name| name.as_str().starts_with("access-control"));
        assert_eq!((refused.status(), has_cors), (StatusCode::UNAUTHORIZED, false), "{headers:?}");
        assert_eq!(json_of(refused).await["code"], code);
    }
    let bearer = ("authorization", &*format!("Bearer {KEY}"));
    let read = relay.call(Method::GET, &path, &[bearer, page]).await;
    assert_eq!(read.status(), StatusCode::OK);
    let headers = read.headers();
    assert!(headers.keys().all(|name| !name.as_str().starts_with("access-control")), "{headers:?}");
    assert_eq!(
        (&headers["x-content-type-options"], &headers["cache-control"]),
        (&header::HeaderValue::from_static("nosniff"), &header::HeaderValue::from_static("no-store"))
    );
    let head = relay.call(Method::HEAD, &path, &[bearer]).await;
    assert_eq!((head.status(), head.text().await.unwrap().as_str()), (StatusCode::OK, ""));
    let options = relay.call(Method::OPTIONS, &path, &[page, ("access-control-request-method", "GET")]).await;
    assert_eq!(
        (options.status(), &options.headers()["allow"]),
        (StatusCode::NO_CONTENT, &"GET, HEAD, OPTIONS".parse().unwrap())
    );
    assert!(!options.headers().contains_key("access-control-allow-origin"));
    let posted = relay.call(Method::POST, &path, &[bearer]).await;
    assert_eq!(posted.status(), StatusCode::METHOD_NOT_ALLOWED);
    // A read key sends nothing.
    let sent = relay.call(Method::POST, "/v1/events/track", &[bearer]).await;
    assert_eq!(sent.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn what_was_deleted_is_told_no_more() {
    let kept = Kept::new().await;
    let relay = Relay::start(&kept, &[]).await;
    assert_eq!(relay.total("").await, (3, false));
    kept.store.erase(&TenantScope::tenant(""), &Subject::User("u1".into())).await.unwrap();
    assert_eq!(relay.total("").await, (3, true), "until it is said");
    relay.app.forget_answers();
    assert_eq!(relay.total("").await, (1, false));
}

/// A Redis of the test's own, on a port that is free.
struct Redis {
    child: Child,
    addr: SocketAddr,
    _dir: TempDir,
}

impl Redis {
    /// Nothing if the machine has none.
    async fn start() -> Option<Self> {
        let addr = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        Self::start_at(addr).await
    }

    async fn start_at(addr: SocketAddr) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let port = addr.port().to_string();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        let child = command.current_dir(dir.path()).stdout(Stdio::null()).kill_on_drop(true).spawn();
        let Ok(child) = child else {
            not_run("answers in Redis: redis-server");
            return None;
        };
        let redis = Self { child, addr, _dir: dir };
        let begun = Instant::now();
        while TcpStream::connect(addr).await.is_err() {
            assert!(begun.elapsed() < PATIENCE, "redis-server does not listen");
            sleep(Duration::from_millis(10)).await;
        }
        Some(redis)
    }

    fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    /// What it answers, as it stands on the wire.
    async fn command(&self, words: &[&str]) -> String {
        let mut text = format!("*{}\r\n", words.len());
        words.iter().for_each(|word| text.push_str(&format!("${}\r\n{word}\r\n", word.len())));
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = vec![0; 64 * 1024];
        let count = timeout(PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap();
        String::from_utf8_lossy(&answer[..count]).into_owned()
    }

    async fn keys(&self) -> Vec<String> {
        let answer = self.command(&["KEYS", "analytics:*"]).await;
        answer.lines().filter(|line| line.starts_with("analytics:")).map(str::to_owned).collect()
    }

    /// Waits until so many answers are kept.
    async fn keeps(&self, answers: usize) -> Vec<String> {
        let begun = Instant::now();
        loop {
            let mut keys = self.keys().await;
            keys.retain(|key| !key.ends_with(":generation"));
            if keys.len() == answers {
                return keys;
            }
            assert!(begun.elapsed() < PATIENCE, "want {answers} of {keys:?}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let sent = std::process::Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status();
        assert!(sent.unwrap().success());
    }
}

#[tokio::test]
async fn relays_share_answers_and_what_one_deletes_the_other_does_not_tell() {
    let Some(redis) = Redis::start().await else { return };
    let kept = Kept::new().await;
    let vars = [("REDIS_URL", &*redis.url())];
    let (one, other) = (Relay::start(&kept, &vars).await, Relay::start(&kept, &vars).await);
    one.connected(1.0).await;
    other.connected(1.0).await;
    assert_eq!(one.total("&event_name=Order%20Placed").await, (2, false));
    let keys = redis.keeps(1).await;
    let (hash, rest) =
        keys[0].strip_prefix("analytics:default:event_count:all:").unwrap().split_once(':').unwrap();
    assert_eq!((hash.len(), rest), (32, "day:1795132800000:1795219200000:UTC:people"));
    let ttl = redis.command(&["PTTL", &keys[0]]).await;
    let ttl: i64 = ttl.trim().trim_start_matches(':').parse().unwrap();
    assert!((200_000..=300_000).contains(&ttl), "{ttl}");
    assert_eq!(other.total("&event_name=Order%20Placed").await, (2, true));
    assert_eq!((other.in_redis("hit").await, one.in_redis("miss").await), (1.0, 1.0));

    kept.store.erase(&TenantScope::tenant(""), &Subject::User("u1".into())).await.unwrap();
    one.app.forget_answers();
    let begun = Instant::now();
    while redis.keys().await.iter().all(|key| key != "analytics:default:generation") {
        assert!(begun.elapsed() < PATIENCE);
        sleep(Duration::from_millis(10)).await;
    }
    // A third one knows nothing but what is in Redis.
    let third = Relay::start(&kept, &vars).await;
    third.connected(1.0).await;
    assert_eq!(third.total("&event_name=Order%20Placed").await, (1, false));
    assert_eq!(third.in_redis("miss").await, 1.0);
    // And the other one believes what it knows for ten seconds.
    sleep(Duration::from_secs(10)).await;
    assert_eq!(other.total("&event_name=Order%20Placed").await, (1, true));
}

#[tokio::test]
async fn whatever_stands_in_redis_the_answer_is_right() {
    let Some(redis) = Redis::start().await else { return };
    let kept = Kept::new().await;
    let vars = [("REDIS_URL", &*redis.url())];
    let first = Relay::start(&kept, &vars).await;
    first.connected(1.0).await;
    assert_eq!(first.total("").await, (3, false));
    let key = redis.keeps(1).await.remove(0);
    let good = redis.command(&["GET", &key]).await;
    let users = r#"{"generation":"","as_of_ms":1795689000000,"answer":{"UserCount":{"unique_users":9,"estimated":false}}}"#;
    let large = "x".repeat(400_000);
    for (what, command) in [
        ("garbage", &["SET", &key, "garbage"][..]),
        ("half", &["SETRANGE", &key, "40", "\0\0\0\0"]),
        ("another report's", &["SET", &key, users]),
        ("too large", &["SET", &key, &large]),
        ("no text", &["HSET", &key, "a", "b"]),
    ] {
        redis.command(&["DEL", &key]).await;
        redis.command(&["SET", &key, good.lines().nth(1).unwrap()]).await;
        if what == "no text" {
            redis.command(&["DEL", &key]).await;
        }
        redis.command(command).await;
        let relay = Relay::start(&kept, &vars).await;
        relay.connected(1.0).await;
        assert_eq!(relay.total("").await, (3, false), "{what}");
        assert_eq!(relay.in_redis("error").await, 1.0, "{what}");
        assert_eq!(relay.metric("relay_redis_connected").await, 1.0, "{what}");
    }
    // Full: nothing is written, and what is asked is answered.
    redis.command(&["FLUSHALL"]).await;
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let relay = Relay::start(&kept, &vars).await;
    relay.connected(1.0).await;
    for at in 0..5 {
        assert_eq!(relay.total(&format!("&event_name={at}")).await, (0, false));
    }
    assert_eq!(redis.keys().await, [""; 0]);
    // The other relay deletes while it is full: from then on nobody believes what is there.
    relay.app.forget_answers();
    relay.connected(0.0).await;
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    relay.connected(1.0).await;
    assert_eq!(redis.keys().await, ["analytics:default:generation"]);
}

/// A server that accepts and says nothing, and one that stops in the middle.
#[tokio::test]
async fn a_redis_that_hangs_costs_three_moments_and_comes_back_by_itself() {
    let kept = Kept::new().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", silent.local_addr().unwrap());
    let held = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            all.push(stream);
        }
    });
    let relay = Relay::start(&kept, &[("REDIS_URL", &*url)]).await;
    let begun = Instant::now();
    for at in 0..20 {
        assert_eq!(relay.total(&format!("&event_name={at}")).await, (0, false));
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "nobody waits for it: {:?}", begun.elapsed());
    assert_eq!((relay.in_redis("away").await, relay.in_redis("error").await), (20.0, 0.0));
    held.abort();

    let Some(redis) = Redis::start().await else { return };
    let relay = Relay::start(&kept, &[("REDIS_URL", &*redis.url())]).await;
    relay.connected(1.0).await;
    redis.signal("STOP");
    for at in 0..20 {
        assert_eq!(relay.total(&format!("&event_name={at}")).await, (0, false));
    }
    relay.connected(0.0).await;
    let errors = relay.in_redis("error").await;
    assert!((3.0..=5.0).contains(&errors), "it was asked {errors} times");
    redis.signal("CONT");
    relay.connected(1.0).await;
    assert_eq!(relay.total("&event_name=again").await, (0, false));
    redis.keeps(1).await;
}

#[tokio::test]
async fn a_redis_that_dies_costs_its_hits_and_is_used_again() {
    let kept = Kept::new().await;
    let Some(mut redis) = Redis::start().await else { return };
    let relay = Relay::start(&kept, &[("REDIS_URL", &*redis.url())]).await;
    relay.connected(1.0).await;
    redis.child.kill().await.unwrap();
    for at in 0..10 {
        assert_eq!(relay.total(&format!("&event_name={at}")).await, (0, false));
    }
    relay.connected(0.0).await;
    let Some(redis) = Redis::start_at(redis.addr).await else { return };
    relay.connected(1.0).await;
    assert_eq!(relay.total("").await, (3, false));
    redis.keeps(1).await;
}

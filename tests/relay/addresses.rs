//! Whose address an event has, how much of it is kept, and the database that is asked where
//! it is.

use std::{fs, path::Path};

use analytics_relay::providers::sandbox::Vendor;
use base64::{Engine, prelude::BASE64_STANDARD};
use maxminddb_writer::{Database, paths::IpAddrWithMask};
use serde_json::{Value, json};

use crate::harness::{Relay, Setup, everything_below, reqwest_client, taken, track};

/// The user's, as a proxy saw it, and what is left of it.
const USERS: [(&str, &str); 2] =
    [("198.51.100.77", "198.51.100.0"), ("2001:db8:77:7:7:7:7:7", "2001:db8:77::")];
/// What a page says of itself.
const CLAIMED: &str = "198.51.100.99";

async fn post(relay: &Relay, path: &str, headers: &[(&str, &str)], body: &Value) -> u16 {
    let url = format!("http://{}{path}", relay.http_addr.unwrap());
    let call = reqwest_client().post(url).body(body.to_string());
    let call = headers.iter().fold(call, |call, (name, value)| call.header(*name, *value));
    call.send().await.unwrap().status().as_u16()
}

fn event(name: &str, context: &Value) -> Value {
    json!({"type":"track","event":name,"userId":"u","messageId":format!("{name}-0123456789012345"),"context":context})
}

/// As pages, pixels, websites and devices send, good items and bad ones.
async fn send_all_ways(relay: &Relay, user: &str) {
    let page = [("x-forwarded-for", user), ("origin", "https://shop.example")];
    let number = user.replace(['.', ':'], "-");
    let named = |name: &str| format!("{name}-{number}");
    let claims = json!({"ip": CLAIMED, "locale": "de"});
    assert_eq!(post(relay, "/v1/track", &page, &event(&named("bare"), &Value::Null)).await, 200);
    assert_eq!(post(relay, "/v1/track", &page, &event(&named("claims"), &claims)).await, 200);
    let batch = json!({"context": claims, "batch": [
        event(&named("item"), &json!({"page": {"url": "/"}})),
        {"type": "track", "userId": "u", "context": {"ip": CLAIMED}},
        {"type": "track", "userId": "u"},
    ]});
    assert_eq!(post(relay, "/v1/batch", &page, &batch).await, 200);
    let direct = event(&named("direct"), &json!({"direct": true}));
    assert_eq!(post(relay, "/v1/track", &page[..1], &direct).await, 200);
    let view = json!({"website_id": "s", "page": "/", "visitor_id": "v", "event_id": format!("{}-0123456789", named("view"))});
    assert_eq!(post(relay, "/api/v1/analytics/event", &page[..1], &view).await, 202);
    let data = event(&named("pixel"), &Value::Null).to_string();
    let data = BASE64_STANDARD.encode(data).replace('+', "%2B");
    let url = format!("http://{}/v1/pixel/track?data={data}", relay.http_addr.unwrap());
    let image = reqwest_client().get(url).header(page[0].0, page[0].1).send().await.unwrap();
    assert_eq!(image.status(), 200);
}

/// Delivered, dead-lettered, spilled, in the log, refused and kept: whatever becomes of it.
#[tokio::test]
async fn an_address_that_was_read_off_a_connection_is_nowhere_on_the_disk() {
    for durability in ["memory", "written"] {
        let mut setup = Setup::new().await;
        setup.set("DURABILITY", durability).set("TRUSTED_PROXIES", "127.0.0.1");
        setup.set("DRAIN_TIMEOUT_SECONDS", "1");
        setup.sandbox.always(Vendor::Amplitude, Some("400".parse().unwrap()));
        setup.sandbox.always(Vendor::Mixpanel, Some("stall".parse().unwrap()));
        let relay = setup.start().await;
        for (user, _) in USERS {
            send_all_ways(&relay, user).await;
        }
        taken(&setup, Vendor::Segment, 12).await;
        relay.terminate().await;

        let mut written = String::new();
        everything_below(setup.data_dir(), &mut written);
        let got: Vec<_> = setup.sandbox.taken(Vendor::Segment).into_iter().map(|taken| taken.event).collect();
        let sent = serde_json::to_string(&got).unwrap();
        for (user, cut) in USERS {
            for (place, text) in [("the data directory", &written), ("what is sent", &sent)] {
                assert!(!text.contains(user), "{user} is in {place}: {text}");
                assert!(text.contains(&format!("\"ip\":\"{cut}\"")), "there was nothing to find: {text}");
            }
            let of_user = got.iter().filter(|event| event["context"]["ip"] == cut);
            assert_eq!(of_user.count(), 6, "each of them has what is kept of it, whatever it says: {sent}");
        }
        assert!(
            !written.contains(CLAIMED) && !sent.contains(CLAIMED),
            "what a page says of itself: {written}"
        );
        assert!(written.contains("refused_since_ms"), "{written}");
    }
}

/// And with other policies, what a server says too, or nothing.
#[tokio::test]
async fn what_is_kept_of_an_address_is_what_the_policy_says() {
    for (policy, of_page, of_server) in [
        ("full", Some("198.51.100.77"), Some("203.0.113.9")),
        ("truncate", Some("198.51.100.0"), Some("203.0.113.0")),
        ("none", None, None),
    ] {
        let mut setup = Setup::new().await;
        setup
            .set("IP_STORE", policy)
            .set("TRUSTED_PROXIES", "127.0.0.0/8")
            .set("FORWARDED_HEADER", "forwarded");
        let relay = setup.start().await;
        let page =
            [("origin", "https://x.example"), ("forwarded", "for=6.6.6.6, for=198.51.100.77;proto=https")];
        assert_eq!(post(&relay, "/v1/track", &page, &event("page", &Value::Null)).await, 200);
        let said = json!({"ip": "203.0.113.9", "locale": "de"});
        assert_eq!(post(&relay, "/v1/track", &page[1..], &event("server", &said)).await, 200);
        let mut over_grpc = track("grpc", "u");
        over_grpc.context =
            Some(analytics_relay::proto::v1::EventContext { ip: "203.0.113.9".into(), ..Default::default() });
        relay.client().track_event(over_grpc).await.unwrap();
        taken(&setup, Vendor::Segment, 3).await;
        let got = setup.sandbox.taken(Vendor::Segment);
        let ip = |name: &str| {
            let event = &got.iter().find(|taken| taken.name == name).unwrap().event;
            event["context"]["ip"].as_str().map(str::to_owned)
        };
        assert_eq!(ip("page").as_deref(), of_page, "{policy}");
        for server in ["server", "grpc"] {
            assert_eq!(ip(server).as_deref(), of_server, "{policy} {server}");
        }
    }
}

/// Anybody can write a header; and what calls is no user, if it says that it was called.
#[tokio::test]
async fn a_proxy_that_is_not_named_is_not_believed_and_not_taken_for_its_users() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    for turn in 0..3 {
        let page =
            [("origin", "https://x.example"), ("x-forwarded-for", "198.51.100.77"), ("x-real-ip", "6.6.6.6")];
        assert_eq!(post(&relay, "/v1/track", &page, &event(&format!("lie-{turn}"), &Value::Null)).await, 200);
    }
    taken(&setup, Vendor::Segment, 3).await;
    for taken in setup.sandbox.taken(Vendor::Segment) {
        assert!(taken.event["context"].get("ip").is_none(), "{}", taken.event);
    }
    let told = "calls come through a proxy that TRUSTED_PROXIES does not name: the addresses of its callers are not known";
    relay.log(told).await;
    assert_eq!(relay.terminate().await.count(told), 1);
}

/// A database that was made on 2025-06-01 and knows where one network is.
pub(crate) fn write_database(path: &Path, network: &str, place: &Value) {
    let mut database = Database::default();
    database.metadata.binary_format_major_version = 2;
    database.metadata.build_epoch = 1_748_736_000;
    let record = database.insert_value(place.clone()).unwrap();
    database.insert_node(network.parse::<IpAddrWithMask>().unwrap(), record);
    database.write_to(fs::File::create(path).unwrap()).unwrap();
}

#[tokio::test]
async fn a_geo_database_is_tried_before_the_relay_starts_and_its_age_is_shown() {
    let mut setup = Setup::new().await;
    let path = setup.data.path().join("geo.mmdb");
    setup.set("GEO_DATABASE", path.to_str().unwrap());
    for (content, why) in [(None, "cannot be read"), (Some("<html>"), "want a database in MaxMind's format")]
    {
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        for args in [&["check"][..], &[]] {
            let (code, out, err) = setup.run(args).await;
            let said = out + &err;
            assert!(code == 1 && said.contains("GEO_DATABASE") && said.contains(why), "{code} {said}");
        }
    }
    write_database(&path, "81.2.69.0/24", &json!({"country": {"iso_code": "DE"}}));
    assert_eq!(setup.run(&["check"]).await.0, 0);
    let relay = setup.start().await;
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let age = relay.metric("relay_geo_database_age_seconds", &[]).await;
    assert!((since - 1_748_736_000.0 - age).abs() < 60.0, "{age}");
}

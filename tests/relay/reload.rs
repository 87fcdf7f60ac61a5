//! Files of the operator's that change while the relay runs: what it does by them changes too,
//! without a restart.

use std::{
    fs,
    path::{Path, PathBuf},
};

use analytics_relay::providers::sandbox::Vendor;
use serde_json::json;

use crate::{
    addresses::write_database,
    enrichment::{FIREFOX, in_log, named, of_page, send},
    harness::{Relay, Setup, taken},
};

/// In the order of the settings below.
const BEFORE: [&str; 3] = ["[global]\ndrop = [\"ssn\"]\n", "# nobody yet\n", "# nobody yet\n"];
const AFTER: [&str; 3] = [
    "[global]\ndrop = [\"ssn\", \"plan\"]\n",
    "deny Ours Ourthing\n",
    "other\tOur partner\tpartner.example\n",
];

/// Puts a file in another one's place, as operators are told to.
fn replace(path: &Path, write: impl FnOnce(&Path)) {
    let new = path.with_extension("new");
    write(&new);
    fs::rename(new, path).unwrap();
}

/// A page, seen from an address that the database knows.
async fn see(relay: &Relay, name: &str, user_agent: &str) {
    let event = json!({
        "name": name, "anonymousId": "device-1", "messageId": format!("{name}-0123456789"),
        "properties": {"plan": "gold", "ssn": "078-05-1120"},
        "context": {"page": {"url": "https://shop.example/", "referrer": "https://partner.example/"}},
    });
    send(of_page(relay, "/v1/page", user_agent).header("x-forwarded-for", "81.2.69.142"), &event).await;
}

#[tokio::test]
async fn rules_and_data_that_change_are_used_by_the_relay_that_runs() {
    let mut setup = Setup::new().await;
    let dir = setup.data.path().to_owned();
    let files: [PathBuf; 3] = ["privacy.toml", "bots", "sources.tsv"].map(|name| dir.join(name));
    let database = dir.join("geo.mmdb");
    for ((setting, file), text) in
        ["PRIVACY_FILE", "BOT_LIST", "SOURCES_FILE"].into_iter().zip(&files).zip(BEFORE)
    {
        fs::write(file, text).unwrap();
        setup.set(setting, file.to_str().unwrap());
    }
    write_database(&database, "81.2.69.0/24", &json!({"country": {"iso_code": "DE"}}));
    setup.set("GEO_DATABASE", database.to_str().unwrap()).set("TRUSTED_PROXIES", "127.0.0.1");
    // So that vendors are told the place.
    setup.set("IP_STORE", "none").set("BOTS", "drop").set("DURABILITY", "written");
    let relay = setup.start().await;
    see(&relay, "before", "Ourthing/1.0").await;
    taken(&setup, Vendor::Segment, 1).await;

    for (file, text) in files.iter().zip(AFTER) {
        replace(file, |new| fs::write(new, text).unwrap());
    }
    let in_france = json!({"country": {"iso_code": "FR"}});
    replace(&database, |new| write_database(new, "81.2.69.0/24", &in_france));
    relay.log("privacy rules are read again").await;
    relay.log("geo database replaced").await;
    for setting in ["BOT_LIST", "SOURCES_FILE"] {
        relay.log_where("a data set is read again", |line| line["setting"] == setting).await;
    }
    see(&relay, "after", FIREFOX).await;
    see(&relay, "machine", "Ourthing/1.0").await;
    taken(&setup, Vendor::Segment, 2).await;
    let sources = [in_log(&setup, "before-0123456789").await, in_log(&setup, "after-0123456789").await]
        .map(|event| event["enriched"]["source"].clone());
    assert_eq!(sources, ["partner.example", "Our partner"]);

    let balance = relay.terminate().await.balance(Vendor::Segment);
    assert_eq!((balance.delivered, balance.not_for), (2, 1), "the list of bots: {balance:?}");
    let at_segment = setup.sandbox.taken(Vendor::Segment);
    let [before, after] = ["before", "after"].map(|name| &named(&at_segment, name).event);
    assert_eq!(before["context"]["location"]["country"], "DE", "{before}");
    assert_eq!(after["context"]["location"]["country"], "FR", "{after}");
    assert_eq!(before["properties"]["plan"], "gold", "{before}");
    assert!(after["properties"].get("plan").is_none(), "{after}");
    assert!([before, after].iter().all(|event| event["properties"].get("ssn").is_none()), "as before");
}

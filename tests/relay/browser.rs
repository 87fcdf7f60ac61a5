//! A page without an SDK, in a headless Chromium and from another origin than the door's:
//! what a browser asks before it sends, what it still sends of a page that is left, and what
//! it lets a page read.

use std::{process::Stdio, time::Duration};

use analytics_relay::providers::sandbox::Vendor;
use tokio::{process::Command, time::timeout};

use crate::{
    foreign_clients::program,
    harness::{Setup, eventually, not_run},
    official_sdks::in_sdks,
};

const PATIENCE: Duration = Duration::from_secs(90);

/// The ways in which `tests/sdks/plain_page.cjs` sends.
const WAYS: [&str; 10] = [
    "fetch-json",
    "fetch-text",
    "keepalive",
    "beacon-query",
    "beacon-body",
    "beacon-json",
    "pagehide-beacon",
    "pagehide-keepalive",
    "unload-beacon",
    "unload-keepalive",
];

fn node(args: &[&str]) -> Command {
    in_sdks(program("NODE", "node", args))
}

/// The script sees each answer that a page gets; of what is sent while a page is left, only
/// this sees that it arrived.
#[tokio::test]
async fn a_page_sends_in_each_way_of_browsers_and_reads_what_it_is_told() {
    const COUNT: usize = 5;
    let browser = node(&["-e", "require('./browser.cjs').executable()"]).output().await;
    if !browser.is_ok_and(|output| output.status.success()) {
        return not_run("a page in a browser: Node with playwright-core, and Chromium");
    }
    let mut setup = Setup::new().await;
    setup.set("HTTP_WRITE_KEYS", "wk");
    let relay = setup.start().await;
    let (addr, count) = (relay.http_addr.unwrap().to_string(), COUNT.to_string());
    let mut page = node(&["plain_page.cjs", &addr, &count, "page"]);
    page.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut page = page.spawn().unwrap();
    let stays = page.stdin.take();
    let ended = tokio::spawn(timeout(PATIENCE, page.wait_with_output()));
    let events = WAYS.len() * COUNT;
    let arrived = || setup.sandbox.stats(Vendor::Segment).taken >= events as u64;
    eventually("what the page sends", || arrived() || ended.is_finished()).await;
    drop(stays);
    let output = ended.await.unwrap().expect("the page ends").unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    println!("{}", String::from_utf8_lossy(&output.stdout).trim());

    let taken = setup.sandbox.taken(Vendor::Segment);
    for id in WAYS.iter().flat_map(|way| (0..COUNT).map(move |at| format!("page-{way}-{at}"))) {
        let event = taken.iter().find(|taken| taken.id == id).unwrap_or_else(|| panic!("{id} is missing"));
        assert_eq!((event.copies, &event.event["context"]["ip"]), (1, &"127.0.0.0".into()), "{id}");
    }
    assert_eq!(taken.len(), events, "and no other");
    // Once each with a preflight and without.
    relay.metric_is("relay_refusals_total", &["EVENT_NAME_EMPTY"], 2.0).await;
    relay.metric_is("relay_requests_total", &["/v1/track", "\"401\""], 2.0).await;
    let ended = relay.terminate().await;
    assert!(ended.code == 0 && ended.balance(Vendor::Segment).is_exact(), "{:?}", ended.logs);
}

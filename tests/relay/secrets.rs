//! A key is seen by its provider and by nobody else.

use std::fs;

use analytics_relay::providers::sandbox::{Options, Sandbox, Vendor};

use crate::harness::{Observer, Setup, assert_is_nowhere, bodies, everything_below};

const CANARY: &str = "canary-0123456789abcdef";
/// The same as it stands in an Authorization header.
const CANARY_BASIC: &str = "Y2FuYXJ5LTAxMjM0NTY3ODlhYmNkZWY6";

/// What a provider may do to a request; nothing is wrong with the first.
pub(crate) const FAULTS: [&str; 14] = [
    "",
    "500",
    "400",
    "413",
    "429",
    "junk",
    "junk-json",
    "huge-body=100000",
    "stall",
    "drip=200",
    "reset-before",
    "reset-after",
    "reset-mid-reply",
    "reject-every=2",
];

/// Answers that tell the key that they got.
const TELLING: [&str; 5] = [
    "400+body=you sent canary-0123456789abcdef",
    "503+body=Basic Y2FuYXJ5LTAxMjM0NTY3ODlhYmNkZWY6",
    "401+body=key canary-0123456789abcdef is unknown",
    // Hidden in escapes until the answer is read.
    r#"400+body={"code":400,"error":"canary\u002d0123456789abcdef","failed_records":[{"index":0,"field":"token","message":"canary\u002d0123456789abcdef is odd"}]}"#,
    "503+body=canary\u{1}-0123456789abcdef",
];

/// Every kind of failure at the most talkative level: no key in logs, metrics,
/// dead letters, spill files or the output of the commands.
#[tokio::test]
async fn no_failure_tells_a_key() {
    let mut setup = Setup::new().await;
    setup.sandbox = Sandbox::start(Options { key: CANARY.into(), ..Options::default() }).await.unwrap();
    let url = setup.sandbox.url();
    setup.set("LOG_LEVEL", "trace,h2=trace,hyper=trace,reqwest=trace,rustls=trace,tonic=trace");
    for (vendor, key) in [("MIXPANEL", "API_KEY"), ("AMPLITUDE", "API_KEY"), ("SEGMENT", "WRITE_KEY")] {
        setup.set(&format!("{vendor}_{key}"), CANARY).set(&format!("{vendor}_BASE_URL"), &url);
    }
    setup.set("REQUEST_TIMEOUT_SECONDS", "0.3").set("MAX_RETRY_ATTEMPTS", "2");
    setup.set("DRAIN_TIMEOUT_SECONDS", "1").set("BATCH_SIZE", "5");
    let mut seen = String::new();
    for fault in FAULTS.into_iter().chain(TELLING) {
        for vendor in Vendor::ALL {
            setup.sandbox.always(vendor, (!fault.is_empty()).then(|| fault.parse().unwrap()));
        }
        let relay = setup.start().await;
        Observer::default().tracks(&mut relay.client(), 6).await;
        relay.log("flushing batch").await;
        tokio::time::sleep(std::time::Duration::from_millis(150)).await;
        seen.push_str(&relay.page("/metrics").await.1);
        seen.push_str(&relay.page("/healthz").await.1);
        let logs = relay.terminate().await.logs;
        logs.iter().for_each(|line| seen.push_str(&line.to_string()));
    }
    // A key that the provider does not know, and one that cannot be one.
    setup.set("MIXPANEL_API_KEY", &format!("{CANARY} x"));
    for args in [&["check"][..], &[]] {
        let (code, out, err) = setup.run(args).await;
        assert_eq!(code, 1);
        seen.push_str(&out);
        seen.push_str(&err);
    }
    setup.set("MIXPANEL_API_KEY", CANARY);
    for args in [&["check"][..], &["dead-letters", "list"], &["dead-letters", "show"]] {
        let (_, out, err) = setup.run(args).await;
        seen.push_str(&out);
        seen.push_str(&err);
    }
    everything_below(setup.data_dir(), &mut seen);
    assert!(seen.len() > 100_000, "there was something to look through: {} bytes", seen.len());
    assert_is_nowhere(&[CANARY, CANARY_BASIC], &seen);
    assert!(bodies(&setup, Vendor::Amplitude).contains(CANARY), "the provider itself got the key");
}

#[cfg(unix)]
#[tokio::test]
async fn what_is_on_disk_is_for_us_alone() {
    use std::os::unix::fs::PermissionsExt;
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=bad".parse().unwrap()));
    setup.sandbox.always(Vendor::Segment, Some("401".parse().unwrap()));
    let relay = setup.start().await;
    for name in ["good", "bad"] {
        Observer::default().track(&mut relay.client(), name, "u").await;
    }
    relay.log("events become dead letters").await;
    relay.terminate().await;
    let mut files = 0;
    let mut directories = vec![setup.data_dir().to_owned()];
    while let Some(dir) = directories.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            if path.is_dir() {
                assert_eq!(mode, 0o700, "{path:?}");
                directories.push(path);
            } else {
                assert_eq!(mode, 0o600, "{path:?}");
                files += 1;
            }
        }
    }
    assert!(files >= 3, "a dead letter, a spill file and the lock");
}

/// Whatever a caller sends, a log line stays one line of JSON.
#[tokio::test]
async fn a_caller_cannot_forge_a_log_line() {
    let mut setup = Setup::new().await;
    setup.set("LOG_LEVEL", "debug");
    let relay = setup.start().await;
    let mut client = relay.client();
    let nasty = "x\r\n{\"level\":\"ERROR\",\"message\":\"forged\"}\u{1b}[31m\u{202e}";
    let mut observer = Observer::default();
    observer.track(&mut client, nasty, nasty).await;
    let mut request = crate::harness::track("x", "u");
    request.event_id = nasty.chars().take(90).collect();
    assert!(client.track_event(request).await.is_err());
    let ended = relay.terminate().await;
    // Every line was parsed as JSON by the harness already.
    assert_eq!(ended.count("forged"), 0);
    observer.check_balance(&setup, &ended);
}

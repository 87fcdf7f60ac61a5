//! The HTTP door and its OpenAPI document, held to each other: `tests/openapi/door.py` sends
//! every example of the document, and what schemathesis makes up by it and against it. It runs
//! where that is (`.ci/python-packages.txt`).

use std::{process::Stdio, time::Duration};

use serde_json::Value;
use tokio::time::timeout;

use crate::{
    foreign_clients::program,
    harness::{Setup, not_run},
};

/// It takes a quarter of a minute on a machine that does nothing else.
const PATIENCE: Duration = Duration::from_secs(300);

/// What was done with a door, as the script counts it; None if it cannot run.
async fn held_to_its_document(write_key: Option<&str>) -> Option<Value> {
    let has_it = program("PYTHON", "python3", &["-c", "import schemathesis"]).output().await;
    if !has_it.is_ok_and(|output| output.status.success()) {
        not_run("the OpenAPI document: Python with schemathesis");
        return None;
    }
    let mut setup = Setup::new().await;
    setup.set("STORE_URL", "sqlite:");
    if let Some(key) = write_key {
        setup.set("HTTP_WRITE_KEYS", key);
    }
    let relay = setup.start().await;
    let url = format!("http://{}", relay.http_addr.unwrap());
    let args: Vec<&str> = ["tests/openapi/door.py", &url].into_iter().chain(write_key).collect();
    let mut run = program("PYTHON", "python3", &args);
    run.env("NO_PROXY", "127.0.0.1").env("PYTHONDONTWRITEBYTECODE", "1");
    let output = run.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(PATIENCE, output).await.expect("the script ends").unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let done = String::from_utf8(output.stdout).unwrap();
    println!("{}", done.trim());
    Some(serde_json::from_str(&done).unwrap())
}

fn is_some_of(done: &Value, names: &[&str]) -> bool {
    names.iter().all(|name| done[name].as_u64().is_some_and(|count| count > 0))
}

#[tokio::test]
async fn the_door_does_what_its_document_says() {
    let Some(done) = held_to_its_document(None).await else { return };
    assert!(is_some_of(&done, &["examples", "refused", "operations", "cases"]), "{done}");
}

/// Without one of its keys it takes nothing, and with one what it takes without keys.
#[tokio::test]
async fn a_door_with_keys_does_what_its_document_says() {
    // The one in the document's examples.
    let Some(done) = held_to_its_document(Some("key")).await else { return };
    assert!(is_some_of(&done, &["examples", "refused", "operations", "cases", "keys"]), "{done}");
}

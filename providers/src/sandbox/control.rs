//! The controls for a sandbox that runs in another process.

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response, StatusCode};
use serde_json::json;

use super::contract::parameter;
use super::fault::Fault;
use super::record::Stats;
use super::reply::ReplyBody;
use super::state::State;
use crate::registry::Vendor;

const BODY_MAX_BYTES: usize = 1024 * 1024;

/// Why a control request is refused.
struct Refused(StatusCode, String);

/// Obeys one control request; `command` is its path after `/_sandbox/`.
pub(super) async fn answer(
    state: &State,
    method: &Method,
    command: &str,
    query: &str,
    incoming: Incoming,
) -> Response<ReplyBody> {
    let body = Limited::new(incoming, BODY_MAX_BYTES).collect().await.map(|body| body.to_bytes());
    let (status, json) = match body {
        Ok(body) => match obey(state, method, command, query, &body) {
            Ok(json) => (StatusCode::OK, json),
            Err(Refused(status, error)) => (status, json!({"error": error}).to_string()),
        },
        Err(error) => (StatusCode::BAD_REQUEST, json!({"error": error.to_string()}).to_string()),
    };
    let mut response = Response::new(ReplyBody::whole(Bytes::from(json)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn obey(state: &State, method: &Method, command: &str, query: &str, body: &[u8]) -> Result<String, Refused> {
    let bad = |error: String| Refused(StatusCode::BAD_REQUEST, error);
    let vendor = || {
        let name = parameter(query, "vendor").unwrap_or_default();
        let want = "want mixpanel, amplitude or segment";
        Vendor::from_name(name).ok_or_else(|| bad(format!("vendor: got {name:?}, {want}")))
    };
    let faults = || -> Result<Vec<Fault>, Refused> {
        let text = std::str::from_utf8(body).map_err(|error| bad(error.to_string()))?;
        let lines = text.lines().filter(|line| !line.is_empty() && *line != "none");
        lines.map(|line| line.parse::<Fault>().map_err(|error| bad(error.to_string()))).collect()
    };

    match (command, method) {
        ("stats", &Method::GET) => {
            let stats = Vendor::ALL.map(|vendor| (vendor.name(), state.desk(vendor).record.stats()));
            to_json(&std::collections::BTreeMap::<&str, Stats>::from(stats))
        }
        ("taken", &Method::GET) => {
            let taken = state.desk(vendor()?).record.taken();
            to_json(&taken)
        }
        ("requests", &Method::GET) => {
            let requests = state.desk(vendor()?).record.requests();
            to_json(&requests)
        }
        ("script", &Method::POST) => {
            let (vendor, faults) = (vendor()?, faults()?);
            let scripted = faults.len();
            state.desk(vendor).script.append(faults);
            to_json(&json!({"scripted": scripted}))
        }
        ("always", &Method::POST) => {
            let (vendor, mut faults) = (vendor()?, faults()?);
            if faults.len() > 1 {
                return Err(bad(format!("always: got {} faults, want one, or none", faults.len())));
            }
            let fault = faults.pop();
            let always = fault.as_ref().map(Fault::to_string);
            state.desk(vendor).script.always(fault);
            to_json(&json!({"always": always}))
        }
        ("reset", &Method::POST) => {
            state.reset();
            to_json(&json!({}))
        }
        ("stats" | "taken" | "requests" | "script" | "always" | "reset", _) => {
            Err(Refused(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not for /_sandbox/{command}")))
        }
        _ => Err(Refused(StatusCode::NOT_FOUND, format!("no control /_sandbox/{command}"))),
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<String, Refused> {
    serde_json::to_string(value)
        .map_err(|error| Refused(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

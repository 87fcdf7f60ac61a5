//! What analytics.js asks before it sends: the settings of a source, as Segment's CDN
//! would serve them.

use hyper::{
    HeaderMap, StatusCode,
    header::{CACHE_CONTROL, HOST, HeaderValue, VARY},
};
use serde_json::json;

use super::reply::{Reply, bytes};

/// Settings with which analytics.js sends to this door, by the name that it was asked by.
pub(super) fn settings(write_key: &str, headers: &HeaderMap, authority: Option<&str>, is_tls: bool) -> Reply {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).or(authority).unwrap_or("localhost");
    // Behind a proxy that ends TLS.
    let forwarded = headers.get("x-forwarded-proto").is_some_and(|proto| proto == "https");
    let protocol = if is_tls || forwarded { "https" } else { "http" };
    let allowed = json!({"enabled": true, "integrations": {}});
    let settings = json!({
        "integrations": {"Segment.io": {
            "apiKey": write_key,
            "apiHost": format!("{host}/v1"),
            "protocol": protocol,
            "unbundledIntegrations": [],
            "addBundledMetadata": true,
            "maybeBundledConfigIds": {},
            "versionSettings": {"version": "4.4.7", "componentTypes": ["browser"]},
        }},
        "plan": {
            "track": {"__default": allowed},
            "identify": {"__default": {"enabled": true}},
            "group": {"__default": {"enabled": true}},
        },
        "edgeFunction": {},
        "middlewareSettings": {},
        "enabledMiddleware": {},
        "remotePlugins": [],
        "metrics": {"sampleRate": 0},
        "legacyVideoPluginsEnabled": false,
    });
    let mut reply = bytes(StatusCode::OK, "application/json", settings.to_string());
    reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("public, max-age=120"));
    reply.headers_mut().insert(VARY, HeaderValue::from_static("x-forwarded-proto"));
    reply
}

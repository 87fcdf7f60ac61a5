//! What a context says about who sends, as far as enrichment goes by it.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// How the libraries begin that run on a user's own device, in lower case.
const OF_DEVICES: [&str; 12] = [
    "analytics.js",
    "analytics-android",
    "analytics-ios",
    "analytics-kotlin",
    "analytics-swift",
    "analytics-react-native",
    "analytics_flutter",
    "com.rudderstack.android",
    "rudder-ios",
    "rudderlabs javascript sdk",
    "rudder-flutter",
    "rudder-react-native",
];

/// See the module.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Told<'a> {
    #[serde(borrow, rename = "userAgentData")]
    user_agent_data: Option<&'a RawValue>,
    #[serde(borrow)]
    webdriver: Option<&'a RawValue>,
    #[serde(borrow)]
    library: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Library<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

impl<'a> Told<'a> {
    /// What is malformed says nothing.
    pub(super) fn read(context: Option<&'a str>) -> Self {
        context.and_then(|context| serde_json::from_str(context).ok()).unwrap_or_default()
    }

    /// JSON of the browser's own.
    pub(super) fn user_agent_data(&self) -> Option<&'a str> {
        self.user_agent_data.map(RawValue::get).filter(|json| json.starts_with('{'))
    }

    /// True if the page says that a program drives the browser.
    pub(super) fn webdriver(&self) -> bool {
        self.webdriver.is_some_and(|value| value.get() == "true")
    }

    /// True if a library sends that runs on a user's own device, and on no server.
    pub(super) fn is_of_device(&self) -> bool {
        let library = self.library.and_then(|json| serde_json::from_str::<Library<'_>>(json.get()).ok());
        library.is_some_and(|library| {
            let name = library.name.as_bytes();
            OF_DEVICES
                .iter()
                .any(|of| name.get(..of.len()).is_some_and(|start| start.eq_ignore_ascii_case(of.as_bytes())))
        })
    }
}

/// The website that an event of website analytics is of.
pub(super) fn website_of(properties: &str) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct OfWebsite<'a> {
        #[serde(borrow)]
        website_id: Option<Cow<'a, str>>,
    }
    serde_json::from_str::<OfWebsite<'_>>(properties).ok()?.website_id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_devices_are_told_from_those_of_servers() {
        let is_device = |name: &str| {
            let context = format!(r#"{{"library":{{"name":"{name}","version":"1"}}}}"#);
            Told::read(Some(&context)).is_of_device()
        };
        assert!(["analytics.js", "analytics-ios", "RudderLabs JavaScript SDK"].into_iter().all(is_device));
        let of_servers = ["@segment/analytics-node", "analytics-python", "rudder-sdk-python", ""];
        assert!(!of_servers.into_iter().any(is_device));
        for malformed in [r#"{"library":7}"#, r#"{"library":{"name":7}}"#, "{", "{}"] {
            assert!(!Told::read(Some(malformed)).is_of_device(), "{malformed}");
        }
    }

    #[test]
    fn a_browser_tells_who_drives_it() {
        let context = r#"{"webdriver":true,"userAgentData":{"mobile":false}}"#;
        let told = Told::read(Some(context));
        assert_eq!((told.webdriver(), told.user_agent_data()), (true, Some(r#"{"mobile":false}"#)));
        let told = Told::read(Some(r#"{"webdriver":"true","userAgentData":[]}"#));
        assert_eq!((told.webdriver(), told.user_agent_data()), (false, None));
    }
}

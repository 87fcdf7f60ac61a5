//! Which browser, system and device an event came from, and whether a machine sent it.
//!
//! A browser's own words come first, in the body before those in the headers, then what
//! [uap-core](https://github.com/ua-parser/uap-core)'s rules read in the user agent. What
//! browsers have frozen there, and say for everybody, is not known.

use std::{borrow::Cow, sync::Arc};

use serde::Serialize;

mod device;
mod hints;
mod rules;
mod yaml;

pub use self::{device::Device, hints::Hints};
use self::{
    hints::Told,
    rules::{Named, Rules, Versioned},
};
use super::{
    Encoded,
    cache::{Cache, CacheLimits},
    text::{checksum, cut, name_of},
};

/// Longest user agent that is read; of a longer one as much.
pub(super) const AGENT_BYTES_MAX: usize = 1_024;
/// Longest version that is told.
const VERSION_BYTES_MAX: usize = 8;
/// The agents of some days of a large website.
const CACHE: CacheLimits = CacheLimits { entries_max: 8_192, bytes_max: 4 << 20 };

/// What is known of an event's sender before it is looked at.
#[derive(Debug, Clone, Copy)]
pub struct AgentInput<'a> {
    /// The user agent, empty if there is none.
    pub user_agent: &'a str,
    /// The hints in its headers.
    pub hints: &'a Hints<'a>,
    /// `context.userAgentData`, as JSON.
    pub user_agent_data: Option<&'a str>,
    /// Whether the page said that a program drives the browser (`navigator.webdriver`).
    pub webdriver: bool,
    /// Whether the event is a browser's. Elsewhere a library for HTTP is what one expects.
    pub is_browser: bool,
}

/// The sender's browser, system and device. What is not known is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Agent {
    /// Such as `Chrome`; the same on each sort of device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub browser: Option<String>,
    /// Its major version; the others are frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub browser_version: Option<String>,
    /// Such as `Windows`, `macOS`, `iOS`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// Its major version, as people say it: `11`, `10.14`, `8.1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// The sort of device.
    pub device: Device,
    /// The device's maker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brand: Option<String>,
    /// The device's model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// The rules, and what was found with them.
#[derive(Debug)]
pub(super) struct AgentRules {
    rules: Rules,
    stamp: Box<str>,
    found: Cache<Option<Arc<Encoded<Agent>>>>,
}

impl AgentRules {
    /// Those of the binary; with the rules of devices, whose brand and model they tell.
    pub(super) fn built_in(with_devices: bool) -> Self {
        Self::new(Rules::built_in(with_devices), env!("UAP_STAMP").into())
    }

    /// Those of a file of the operator's, or what is wrong with it.
    pub(super) fn of_file(text: &str, with_devices: bool) -> Result<Self, String> {
        Ok(Self::new(Rules::of_yaml(text, with_devices)?, checksum(text).into()))
    }

    fn new(rules: Rules, stamp: Box<str>) -> Self {
        Self { rules, stamp, found: Cache::new(CACHE, fastrand::u128(..)) }
    }

    /// Which rules these are: the month of those of the binary, or a checksum.
    pub(super) fn stamp(&self) -> &str {
        &self.stamp
    }

    /// The agent, if there is anything to find one by.
    pub(super) fn find(&self, input: &AgentInput<'_>) -> Option<Arc<Encoded<Agent>>> {
        let agent = cut(input.user_agent, AGENT_BYTES_MAX);
        let hints = input.hints.values();
        if agent.is_empty() && input.user_agent_data.is_none() && hints.iter().all(Option::is_none) {
            return None;
        }
        let key = self.found.key([Some(agent), input.user_agent_data].into_iter().chain(hints));
        let find = || {
            let told = Told::read(input.user_agent_data, input.hints);
            find(&self.rules, agent, &told).map(|agent| Arc::new(Encoded::new(agent)))
        };
        self.found.get_or_make(key, find, |found| found.as_ref().map_or(0, |agent| agent.bytes()))
    }
}

impl Encoded<Agent> {
    /// What it takes in memory, roughly.
    fn bytes(&self) -> usize {
        let Agent { browser, browser_version, os, os_version, brand, model, .. } = &self.value;
        let texts = [browser, browser_version, os, os_version, brand, model];
        let texts: usize = texts.into_iter().flatten().map(String::capacity).sum();
        size_of::<Self>() + self.json.len() + texts
    }
}

fn find(rules: &Rules, agent: &str, told: &Told<'_>) -> Option<Agent> {
    if agent.trim().is_empty() && told.is_empty() {
        return None;
    }
    let named = rules.name(agent);
    let (browser, browser_version) = browser(told, named.browser.as_ref());
    let (os, os_version) = system(agent, told, named.system.as_ref());
    let (brand, model) = brand_and_model(told, &named);
    let device = device::device(agent, told.is_mobile, os);
    let (browser, os) = (browser.and_then(|name| name_of(&name)), os.and_then(name_of));
    Some(Agent { browser, browser_version, os, os_version, device, brand, model })
}

fn browser<'a>(told: &'a Told<'_>, named: Option<&'a Versioned>) -> (Option<Cow<'a, str>>, Option<String>) {
    // "Chrome Mobile", "Mobile Safari": the device says it.
    let name = |named: &Versioned| named.name.replace(" Mobile", "").replace("Mobile ", "");
    let of_agent = named.map(|named| (name(named), named.major.as_deref().and_then(major)));
    match (&told.browser, of_agent) {
        // These say what it is built of, and the user agent may say what it is.
        (Some((brand, _)), Some((name, version)))
            if matches!(&**brand, "Chromium" | "Android WebView") && !name.starts_with("Chrome") =>
        {
            (Some(name.into()), version)
        }
        (Some((brand, version)), _) => (Some(brand_name(brand).into()), major(version)),
        (None, Some((name, version))) => (Some(name.into()), version),
        (None, None) => (None, None),
    }
}

/// A brand by the name that uap-core's rules give it.
fn brand_name(brand: &str) -> &str {
    match brand {
        "Google Chrome" => "Chrome",
        "Android WebView" => "Chrome WebView",
        "Microsoft Edge" => "Edge",
        "YaBrowser" | "Yandex" => "Yandex Browser",
        other => other,
    }
}

fn system<'a>(
    agent: &str,
    told: &'a Told<'_>,
    named: Option<&'a Versioned>,
) -> (Option<&'a str>, Option<String>) {
    let name = |name| match name {
        "Mac OS X" | "Mac OS" => "macOS",
        "ChromeOS" | "Chromium OS" => "Chrome OS",
        other => other,
    };
    let of_agent = named.map(|named| (name(&named.name), named));
    let Some(platform) = told.platform.as_deref().filter(|platform| *platform != "Unknown") else {
        let version = of_agent.and_then(|(name, named)| system_version(agent, name, named));
        return (of_agent.map(|(name, _)| name), version);
    };
    let platform = name(platform);
    let version = match (&told.platform_version, of_agent) {
        (Some(version), _) => told_version(platform, version),
        (None, Some((name, named))) if name == platform => system_version(agent, name, named),
        _ => None,
    };
    (Some(platform), version)
}

/// A system's version as the user agent has it, if that is not what it says for all.
fn system_version(agent: &str, name: &str, named: &Versioned) -> Option<String> {
    let major = named.major.as_deref().and_then(major)?;
    let minor = named.minor.as_deref().unwrap_or_default();
    match (name, &*major) {
        // Windows 11 says it too.
        ("Windows", "10") => None,
        // All later ones say it too.
        ("macOS", "10") if matches!(minor, "15" | "16") => None,
        ("Android", _) if agent.contains("Android 10; K)") || agent.contains("Android 10; K;") => None,
        ("Windows", "8") if minor == "1" => Some("8.1".to_owned()),
        ("macOS", "10") if !minor.is_empty() && minor.len() <= VERSION_BYTES_MAX => {
            Some(format!("10.{minor}"))
        }
        // From version 26 on Safari tells the system's, whose own is frozen at 18.
        ("iOS", _) => {
            Some(safari_version(agent).filter(|version| *version >= 26).map_or(major, |v| v.to_string()))
        }
        _ => Some(major),
    }
}

fn safari_version(agent: &str) -> Option<u16> {
    let (_, version) = agent.split_once(" Version/")?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A system's version as the browser has it.
fn told_version(name: &str, version: &str) -> Option<String> {
    let mut numbers = version.trim().split('.').map(|number| number.parse::<u16>().ok());
    let (first, second) = (numbers.next()??, numbers.next().flatten().unwrap_or(0));
    match (name, first, second) {
        // The version of an interface of Windows, which every Windows 11 has from 13 on.
        ("Windows", 13.., _) => Some("11".to_owned()),
        ("Windows", 1.., _) => Some("10".to_owned()),
        ("Windows", 0, 1) => Some("7".to_owned()),
        ("Windows", 0, 2) => Some("8".to_owned()),
        ("Windows", 0, 3) => Some("8.1".to_owned()),
        // The kernel's.
        ("Linux", ..) | (_, 0, _) => None,
        ("macOS", 10, _) => Some(format!("10.{second}")),
        _ => Some(first.to_string()),
    }
}

fn brand_and_model(told: &Told<'_>, named: &Named) -> (Option<String>, Option<String>) {
    let (brand, model) =
        named.device.as_ref().map_or((None, None), |(brand, model)| (brand.as_deref(), model.as_deref()));
    // Where the rules know no device they say so, and of a bot that it is one.
    let is_known = brand.is_some_and(|brand| !brand.starts_with("Generic") && brand != "Spider");
    let model = told.model.as_deref().or(model.filter(|_| is_known));
    // What every phone says since its model is frozen.
    let model = model.filter(|model| *model != "K");
    (brand.filter(|_| is_known).and_then(name_of), model.and_then(name_of))
}

/// The first part of a version.
fn major(version: &str) -> Option<String> {
    let major = version.trim().split(['.', '_', ' ']).next()?;
    let is_one = !major.is_empty() && major.len() <= VERSION_BYTES_MAX;
    (is_one && major.bytes().all(|byte| byte.is_ascii_alphanumeric())).then(|| major.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOWS: &str = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36";
    const ANDROID: &str = "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Mobile Safari/537.36";
    const MAC: &str = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.4 Safari/605.1.15";

    thread_local! {
        /// Compiled once for all tests of a thread.
        static RULES: AgentRules = AgentRules::built_in(true);
    }

    fn found(input: &AgentInput<'_>) -> Option<String> {
        RULES.with(|rules| rules.find(input).map(|agent| agent.json.to_string()))
    }

    fn json(user_agent: &str, headers: &[(&str, &'static str)], data: Option<&str>) -> String {
        let hints = Hints::read(|name| headers.iter().find(|header| header.0 == name).map(|header| header.1));
        let input = AgentInput {
            user_agent,
            hints: &hints,
            user_agent_data: data,
            webdriver: false,
            is_browser: true,
        };
        found(&input).unwrap_or_default()
    }

    /// Browser, its version, system, its version, device.
    fn told(user_agent: &str, headers: &[(&str, &'static str)]) -> String {
        let json: serde_json::Value = serde_json::from_str(&json(user_agent, headers, None)).unwrap();
        let text = |name: &str| json[name].as_str().unwrap_or("-").to_owned();
        ["browser", "browser_version", "os", "os_version", "device"].map(text).join(" ")
    }

    #[test]
    fn what_is_frozen_is_not_known() {
        for (agent, wanted) in [
            (WINDOWS, "Chrome 131 Windows - desktop"),
            (ANDROID, "Chrome 131 Android - mobile"),
            (MAC, "Safari 17 macOS - desktop"),
            (
                "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:140.0) Gecko/20100101 Firefox/140.0",
                "Firefox 140 macOS - desktop",
            ),
            (
                "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/26.0 Mobile/15E148 Safari/604.1",
                "Safari 26 iOS 26 mobile",
            ),
            // These were not, when they came.
            (
                "Mozilla/5.0 (iPhone; CPU iPhone OS 17_4 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.4 Mobile/15E148 Safari/604.1",
                "Safari 17 iOS 17 mobile",
            ),
            (
                "Mozilla/5.0 (Windows NT 6.3; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/109.0.5414.120 Safari/537.36",
                "Chrome 109 Windows 8.1 desktop",
            ),
            (
                "Mozilla/5.0 (Windows NT 6.1; rv:52.0) Gecko/20100101 Firefox/52.0",
                "Firefox 52 Windows 7 desktop",
            ),
            (
                "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_14_6) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/14.1 Safari/605.1.15",
                "Safari 14 macOS 10.14 desktop",
            ),
            (
                "Mozilla/5.0 (Linux; Android 10; SM-G960F) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/90.0.4430.210 Mobile Safari/537.36",
                "Chrome 90 Android 10 mobile",
            ),
        ] {
            assert_eq!(told(agent, &[]), wanted, "{agent}");
        }
    }

    #[test]
    fn a_browser_has_one_name_on_all_devices() {
        for (agent, wanted) in [
            (
                "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) CriOS/126.0.6478.54 Mobile/15E148 Safari/604.1",
                "Chrome iOS 126 iOS 17 mobile",
            ),
            (
                "Mozilla/5.0 (Android 14; Mobile; rv:127.0) Gecko/127.0 Firefox/127.0",
                "Firefox 127 Android 14 mobile",
            ),
            (
                "Mozilla/5.0 (Android 14; Tablet; rv:127.0) Gecko/127.0 Firefox/127.0",
                "Firefox 127 Android 14 tablet",
            ),
            (
                "Mozilla/5.0 (Linux; Android 12; Pixel 6 Build/SD1A; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/94.0.4606.71 Mobile Safari/537.36",
                "Chrome WebView 94 Android 12 mobile",
            ),
            (&*format!("{WINDOWS} Edg/131.0.0.0"), "Edge 131 Windows - desktop"),
            (&*format!("{ANDROID} EdgA/131.0.0.0"), "Edge 131 Android - mobile"),
        ] {
            assert_eq!(told(agent, &[]), wanted, "{agent}");
        }
    }

    #[test]
    fn hints_come_before_the_user_agent() {
        let brave = r#""Brave";v="131", "Chromium";v="131", "Not_A Brand";v="24""#;
        let headers = |brands, mobile, platform, version| {
            [
                ("sec-ch-ua", brands),
                ("sec-ch-ua-mobile", mobile),
                ("sec-ch-ua-platform", platform),
                ("sec-ch-ua-platform-version", version),
            ]
        };
        for (agent, headers, wanted) in [
            (WINDOWS, headers(brave, "?0", "\"Windows\"", "\"15.0.0\""), "Brave 131 Windows 11 desktop"),
            (WINDOWS, headers(brave, "?0", "\"Windows\"", "\"13.0.0\""), "Brave 131 Windows 11 desktop"),
            (WINDOWS, headers(brave, "?0", "\"Windows\"", "\"10.0.0\""), "Brave 131 Windows 10 desktop"),
            (WINDOWS, headers(brave, "?0", "\"Windows\"", "\"0.3.0\""), "Brave 131 Windows 8.1 desktop"),
            (WINDOWS, headers(brave, "?0", "\"Windows\"", "\"0\""), "Brave 131 Windows - desktop"),
            (WINDOWS, headers(brave, "?0", "\"Windows\"", "\"\""), "Brave 131 Windows - desktop"),
            (WINDOWS, headers(brave, "?0", "\"Windows\"", "\"99999999999\""), "Brave 131 Windows - desktop"),
            (MAC, headers(brave, "?0", "\"macOS\"", "\"15.1.0\""), "Brave 131 macOS 15 desktop"),
            (
                MAC,
                headers(brave, "?0", "\"Chromium OS\"", "\"16000.1\""),
                "Brave 131 Chrome OS 16000 desktop",
            ),
            (WINDOWS, headers(brave, "?0", "\"Linux\"", "\"6.5.0\""), "Brave 131 Linux - desktop"),
            (WINDOWS, headers(brave, "?0", "\"Unknown\"", "\"\""), "Brave 131 Windows - desktop"),
            (ANDROID, headers(brave, "?1", "\"Android\"", "\"15\""), "Brave 131 Android 15 mobile"),
            (ANDROID, headers(brave, "?0", "\"Android\"", "\"15\""), "Brave 131 Android 15 tablet"),
            ("", headers(brave, "?1", "\"Android\"", "\"\""), "Brave 131 Android - mobile"),
            ("", headers(brave, "?0", "\"macOS\"", "\"\""), "Brave 131 macOS - desktop"),
        ] {
            assert_eq!(told(agent, &headers), wanted, "{agent} {headers:?}");
        }
    }

    /// An app's window says of what it is built, and in its user agent whose it is.
    #[test]
    fn what_a_browser_is_built_of_is_told_if_there_is_nothing_better() {
        let app = "Mozilla/5.0 (Linux; Android 14; SM-S911B Build/UP1A; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/131.0.0.0 Mobile Safari/537.36 Instagram 406.0.0.58.159 Android";
        let webview = [("sec-ch-ua", r#""Android WebView";v="131", "Chromium";v="131""#)];
        assert_eq!(told(app, &webview), "Instagram 406 Android 14 mobile");
        assert_eq!(told(ANDROID, &webview), "Chrome WebView 131 Android - mobile");
        assert_eq!(
            told(WINDOWS, &[("sec-ch-ua", r#""Chromium";v="132""#)]),
            "Chromium 132 Windows - desktop"
        );
    }

    #[test]
    fn what_is_told_is_an_object_without_what_is_not_known() {
        assert_eq!(
            json(WINDOWS, &[], None),
            r#"{"browser":"Chrome","browser_version":"131","os":"Windows","device":"desktop"}"#
        );
        let iphone = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_4 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.4 Mobile/15E148 Safari/604.1";
        assert!(json(iphone, &[], None).ends_with(r#""device":"mobile","brand":"Apple","model":"iPhone"}"#));
        let data = r#"{"model":"Pixel 9","mobile":true}"#;
        assert!(json(ANDROID, &[], Some(data)).ends_with(r#""device":"mobile","model":"Pixel 9"}"#));
        assert!(json(ANDROID, &[], Some(r#"{"model":"K"}"#)).ends_with(r#""device":"mobile"}"#));
        assert_eq!(json("what nobody knows", &[], None), r#"{"device":"other"}"#);
        let nothing = AgentRules::built_in(false);
        let hints = Hints::default();
        let empty = AgentInput {
            user_agent: "",
            hints: &hints,
            user_agent_data: None,
            webdriver: true,
            is_browser: true,
        };
        assert!(nothing.find(&empty).is_none());
        assert!(
            nothing.find(&AgentInput { user_agent_data: Some("{}"), user_agent: "  ", ..empty }).is_none()
        );
        let with_class = nothing.find(&AgentInput { user_agent: iphone, ..empty }).unwrap();
        assert_eq!((&with_class.value.brand, with_class.value.device), (&None, Device::Mobile));
    }

    #[test]
    fn the_sort_of_device_is_told_by_ten_rules() {
        for (agent, wanted) in [
            (
                "Mozilla/5.0 (PlayStation 5 3.11) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/13.0 Safari/605.1.15",
                Device::Console,
            ),
            (
                "Mozilla/5.0 (Windows NT 10.0; Win64; x64; Xbox; Xbox One) AppleWebKit/537.36 (KHTML, like Gecko) Edge/44.18363.8131",
                Device::Console,
            ),
            (
                "Mozilla/5.0 (Nintendo Switch; WifiWebAuthApplet) AppleWebKit/606.4 (KHTML, like Gecko) NF/6.0.1 NintendoBrowser/5.1",
                Device::Console,
            ),
            (
                "Mozilla/5.0 (SMART-TV; LINUX; Tizen 5.0) AppleWebKit/537.36 (KHTML, like Gecko) Version/5.0 TV Safari/537.36",
                Device::Tv,
            ),
            (
                "Mozilla/5.0 (Web0S; Linux/SmartTV) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/79.0.3945.79 Safari/537.36",
                Device::Tv,
            ),
            (
                "Mozilla/5.0 (Linux; Android 9; AFTKA Build/PS7) AppleWebKit/537.36 (KHTML, like Gecko) Silk/102 like Chrome/102 Safari/537.36",
                Device::Tv,
            ),
            (
                "Mozilla/5.0 (iPad; CPU OS 17_4 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.4 Mobile/15E148 Safari/604.1",
                Device::Tablet,
            ),
            (
                "Mozilla/5.0 (Linux; Android 13; SM-X700) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
                Device::Tablet,
            ),
            (
                "Mozilla/4.0 (compatible; MSIE 8.0; Windows NT 6.1; Trident/4.0; Tablet PC 2.0)",
                Device::Desktop,
            ),
            ("Dalvik/2.1.0 (Linux; U; Android 13; Pixel 7 Build/TQ3A)", Device::Mobile),
            ("OurApp/7.1 CFNetwork/1408.0.4 Darwin/22.5.0", Device::Mobile),
            ("Opera/9.80 (J2ME/MIDP; Opera Mini/9.80) Presto/2.12.423 Version/12.16", Device::Mobile),
            (
                "Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
                Device::Desktop,
            ),
            (
                "Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0",
                Device::Desktop,
            ),
            ("curl/8.5.0", Device::Other),
        ] {
            let hints = Hints::default();
            let input = AgentInput {
                user_agent: agent,
                hints: &hints,
                user_agent_data: None,
                webdriver: false,
                is_browser: true,
            };
            let device = RULES.with(|rules| rules.find(&input).unwrap().value.device);
            assert_eq!(device, wanted, "{agent}");
        }
    }

    #[test]
    fn a_user_agent_that_is_too_long_is_read_as_far_as_it_may_be() {
        let long = format!("{WINDOWS} {}", "é".repeat(AGENT_BYTES_MAX));
        assert_eq!(told(&long, &[]), "Chrome 131 Windows - desktop");
        let late = format!("{} Firefox/100.0", " ".repeat(AGENT_BYTES_MAX));
        assert_eq!(json(&late, &[], None), "");
    }

    #[test]
    fn what_was_found_is_shared_and_told_apart_by_its_hints() {
        let rules = AgentRules::built_in(false);
        let plain = Hints::default();
        let phone = Hints::read(|name| (name == "sec-ch-ua-mobile").then_some("?1"));
        let input = AgentInput {
            user_agent: "x",
            hints: &plain,
            user_agent_data: None,
            webdriver: false,
            is_browser: true,
        };
        let first = rules.find(&input).unwrap();
        assert!(Arc::ptr_eq(&first, &rules.find(&input).unwrap()));
        assert_eq!(rules.find(&AgentInput { hints: &phone, ..input }).unwrap().value.device, Device::Mobile);
        let data = Some(r#"{"mobile":true,"platform":"iOS"}"#);
        assert_eq!(
            rules.find(&AgentInput { user_agent_data: data, ..input }).unwrap().value.os.as_deref(),
            Some("iOS")
        );
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_told_in_few_bytes(
            agent in "(Mozilla/5\\.0 |)(\\PC{0,40}|[ -~]{0,200}|(Android|iPhone OS|Version|Chrome|; |/|[0-9]{1,12}|\\.){0,30})",
            hints in prop::collection::vec(prop::option::of("(\"[^\"]{0,20}\"(;v=\"[0-9.]{0,9}\")?,? ?){0,5}|\\PC{0,30}|\\?[01]"), 6),
            data in prop::option::of("\\PC{0,60}|\\{\"(platform|model|platformVersion)\":\"\\PC{0,90}\"\\}"),
        ) {
            let mut values = hints.iter();
            let hints = Hints::read(|_| values.next().and_then(Option::as_deref));
            let input = AgentInput {
                user_agent: &agent, hints: &hints, user_agent_data: data.as_deref(), webdriver: false, is_browser: true,
            };
            let json = found(&input).unwrap_or_else(|| "{}".to_owned());
            prop_assert!(json.len() < 2_000, "{}", json);
            prop_assert!(serde_json::from_str::<serde_json::Value>(&json).unwrap().is_object());
        }
    }
}

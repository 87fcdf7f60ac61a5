//! What sort of device an event came from, by ten rules: the first that fits.

use serde::Serialize;

/// A sort of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// A phone.
    Mobile,
    /// A tablet.
    Tablet,
    /// A desktop or a laptop.
    Desktop,
    /// A television set, or what is connected to one.
    Tv,
    /// A game console.
    Console,
    /// None of these, or it does not say.
    Other,
}

const CONSOLES: [&str; 3] = ["PlayStation", "Xbox", "Nintendo"];
const TVS: [&str; 21] = [
    "SMART-TV",
    "SmartTV",
    "Smart-TV",
    "Smart TV",
    "GoogleTV",
    "Google TV",
    "Android TV",
    "AndroidTV",
    "AppleTV",
    "Apple TV",
    "HbbTV",
    "NetCast",
    "Web0S",
    "webOS.TV",
    "BRAVIA",
    "VIDAA",
    "Viera",
    "Roku",
    "CrKey",
    "; AFT",
    " TV Safari",
];
const TABLETS: [&str; 3] = ["iPad", "PlayBook", "Kindle"];
const PHONES: [&str; 12] = [
    "Mobile",
    "iPhone",
    "iPod",
    "Windows Phone",
    "IEMobile",
    "BlackBerry",
    "BB10",
    "Opera Mini",
    "Opera Mobi",
    "KAIOS",
    "Symbian",
    "MIDP",
];
const PHONE_SYSTEMS: [&str; 5] = ["Android", "iOS", "KaiOS", "Windows Phone", "HarmonyOS"];
const DESKTOPS: [&str; 5] = ["Windows NT", "Macintosh", "X11", "CrOS", "Linux x86_64"];
const DESKTOP_SYSTEMS: [&str; 5] = ["Windows", "macOS", "Linux", "Ubuntu", "Chrome OS"];

/// By the user agent, the browser's own word on whether it is a phone's, and the name of
/// the system.
pub(super) fn device(agent: &str, is_mobile: Option<bool>, system: Option<&str>) -> Device {
    let has = |words: &[&str]| words.iter().any(|word| agent.contains(word));
    let is_system = |names: &[&str]| system.is_some_and(|system| names.contains(&system));
    // An app's is no browser's, and says nothing of Mobile.
    let is_browsers = agent.is_empty() || agent.starts_with("Mozilla/") || agent.starts_with("Opera/");
    let is_phone = has(&PHONES) || is_mobile == Some(true);
    let is_android = is_system(&["Android"]);
    match () {
        () if has(&CONSOLES) => Device::Console,
        () if has(&TVS) => Device::Tv,
        () if has(&TABLETS) => Device::Tablet,
        // Old Windows says "Tablet PC" on every machine that could be one.
        () if agent.contains("Tablet") && !agent.contains("Tablet PC") => Device::Tablet,
        () if is_android && is_mobile == Some(false) => Device::Tablet,
        () if is_phone => Device::Mobile,
        // By Google's rule a phone's browser says Mobile, and a tablet's does not.
        () if is_android && is_browsers => Device::Tablet,
        () if is_system(&PHONE_SYSTEMS) => Device::Mobile,
        () if is_system(&DESKTOP_SYSTEMS) || has(&DESKTOPS) => Device::Desktop,
        () => Device::Other,
    }
}

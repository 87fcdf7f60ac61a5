//! What each vendor is told. The vendors themselves never see the environment.

use std::time::Duration;

use analytics_relay_providers::{
    Secret,
    mixpanel::IdentityMode,
    registry::{ProviderSettings, Url, Vendor},
};

use crate::settings::Reader;

/// The vendors that ANALYTICS_PROVIDER names, in its order.
pub(super) fn named(reader: &mut Reader) -> Vec<Vendor> {
    const SETTING: &str = "ANALYTICS_PROVIDER";
    let names = reader.text(SETTING);
    let mut vendors = Vec::new();
    for name in names.split(',').map(str::trim).filter(|name| !matches!(*name, "" | "none")) {
        match Vendor::from_name(&name.to_ascii_lowercase()) {
            Some(vendor) if vendors.contains(&vendor) => reader.wrong(SETTING, name, "each provider once"),
            Some(vendor) => vendors.push(vendor),
            None => {
                let known = Vendor::ALL.map(Vendor::name).join(", ");
                reader.wrong(SETTING, name, &format!("none, or some of {known}"));
            }
        }
    }
    vendors
}

/// What one vendor is built with.
pub(super) fn settings(
    reader: &mut Reader,
    vendor: Vendor,
    request_timeout: Duration,
    test_mode: bool,
) -> ProviderSettings {
    let (key_setting, base_url_setting) = match vendor {
        Vendor::Mixpanel => ("MIXPANEL_API_KEY", "MIXPANEL_BASE_URL"),
        Vendor::Amplitude => ("AMPLITUDE_API_KEY", "AMPLITUDE_BASE_URL"),
        Vendor::Segment => ("SEGMENT_WRITE_KEY", "SEGMENT_BASE_URL"),
    };
    let key = key(reader, key_setting, vendor, test_mode);
    let base_url = base_url(reader, base_url_setting, vendor);
    let (mut identity_mode, mut min_id_length) = (IdentityMode::default(), 1);
    match vendor {
        Vendor::Mixpanel => {
            let modes = [("simplified", IdentityMode::Simplified), ("original", IdentityMode::Original)];
            identity_mode = reader.one_of("MIXPANEL_IDENTITY_MODE", &modes);
        }
        Vendor::Amplitude => min_id_length = reader.number("AMPLITUDE_MIN_ID_LENGTH", 1..=255),
        Vendor::Segment => {}
    }
    ProviderSettings { vendor, key, base_url, request_timeout, identity_mode, min_id_length }
}

fn key(reader: &mut Reader, name: &str, vendor: Vendor, test_mode: bool) -> Secret {
    let key = reader.secret(name);
    if key.is_empty() {
        if !test_mode {
            reader.error(format!(
                "{name}: got nothing, want the key of {vendor}, which ANALYTICS_PROVIDER names (or TEST_MODE=true)"
            ));
        }
        return Secret::new(key);
    }
    Secret::parse(&key).unwrap_or_else(|error| {
        let want = "want the key alone: letters, digits and any of -._~+/=";
        reader.error(format!("{name}: got {error} (***), {want}"));
        Secret::new(key)
    })
}

fn base_url(reader: &mut Reader, name: &str, vendor: Vendor) -> Url {
    let (text, source) = reader.lookup(name);
    // A password in it must not be shown.
    let shown = if text.contains(['@', '?', '#']) { "***".to_owned() } else { text.clone() };
    reader.show(name, shown.clone(), source);
    let host = vendor.hosts().iter().find(|(region, _)| *region == text);
    let url = host.map_or(text.as_str(), |(_, url)| *url);
    match url.parse() {
        Ok(url) if is_base_url(&url) => url,
        _ => {
            let regions: Vec<_> = vendor.hosts().iter().map(|(region, _)| *region).collect();
            let want = format!("{}, or a URL with http or https and no user or query", regions.join(", "));
            reader.wrong(name, &shown, &want);
            let (_, default) = vendor.hosts()[0];
            default.parse().expect("the vendors' own hosts are URLs")
        }
    }
}

/// Scheme, host, port and path, and nothing that could be a secret.
fn is_base_url(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none()
}

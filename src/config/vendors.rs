//! What each vendor is told. The vendors themselves never see the environment.

use std::time::Duration;

use analytics_relay_providers::{
    Secret,
    mixpanel::IdentityMode,
    registry::{ProviderSettings, Url, Vendor},
    view::{GroupType, View, ViewName},
};

use crate::{
    reasons::STORE,
    settings::{Reader, name_for},
};

/// How pages, screens and groups look to who has none.
const VIEW: [&str; 3] = ["PAGE_NAME", "SCREEN_NAME", "GROUP_TYPE"];

/// The vendors that ANALYTICS_PROVIDER names, in its order.
pub(super) fn named(reader: &mut Reader) -> Vec<Vendor> {
    const SETTING: &str = "ANALYTICS_PROVIDER";
    let names = reader.text(SETTING);
    let mut vendors = Vec::new();
    for name in names.split(',').map(str::trim).filter(|name| !matches!(*name, "" | "none")) {
        match Vendor::from_name(&name.to_ascii_lowercase()) {
            Some(vendor) if vendors.contains(&vendor) => reader.wrong(SETTING, name, "each provider once"),
            Some(vendor) => vendors.push(vendor),
            None if name.eq_ignore_ascii_case(STORE) => {
                reader.wrong(SETTING, name, "vendors alone: STORE_URL names the store");
            }
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
    if !reader.has_shown(VIEW[0]) {
        // What holds for all of them is shown, and found wrong, once.
        view(reader, None);
    }
    let view = if vendor == Vendor::Segment { View::default() } else { view(reader, Some(vendor)) };
    let (mut identity_mode, mut min_id_length) = (IdentityMode::default(), 1);
    match vendor {
        Vendor::Mixpanel => {
            let modes = [("simplified", IdentityMode::Simplified), ("original", IdentityMode::Original)];
            identity_mode = reader.one_of("MIXPANEL_IDENTITY_MODE", &modes);
        }
        Vendor::Amplitude => min_id_length = reader.number("AMPLITUDE_MIN_ID_LENGTH", 1..=255),
        Vendor::Segment => {}
    }
    ProviderSettings { vendor, key, base_url, request_timeout, identity_mode, min_id_length, view }
}

/// How pages, screens and groups look to all providers that have none of their own, or
/// to one of them.
fn view(reader: &mut Reader, vendor: Option<Vendor>) -> View {
    let [page, screen, setting] = VIEW.map(|setting| name_for(vendor, setting));
    let [page_name, screen_name] = [page, screen].map(|setting| view_name(reader, &setting));
    let text = reader.text(&setting);
    let parsed = (!text.is_empty()).then(|| GroupType::parse(&text)).transpose();
    let group_type = parsed.unwrap_or_else(|want| {
        reader.wrong(&setting, &text, &want.to_string());
        None
    });
    View { page_name, screen_name, group_type }
}

fn view_name(reader: &mut Reader, setting: &str) -> ViewName {
    let text = reader.text(setting);
    ViewName::parse(&text).unwrap_or_else(|want| {
        reader.wrong(setting, &text, &want.to_string());
        ViewName::default()
    })
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

#[cfg(test)]
mod tests {
    use crate::config::Config;

    use super::*;

    fn views(vars: &[(&str, &str)]) -> Vec<View> {
        let vars = [("TEST_MODE", "1")].iter().chain(vars).copied();
        let providers = Config::from_vars(vars).unwrap().providers;
        providers.into_iter().map(|provider| provider.settings.view).collect()
    }

    #[test]
    fn pages_and_groups_look_as_each_provider_is_told() {
        let text = |text| ViewName::parse(text).unwrap();
        let [mixpanel, amplitude, segment] = &views(&[
            ("PAGE_NAME", "Viewed {name} Page"),
            ("AMPLITUDE_PAGE_NAME", "vendor"),
            ("MIXPANEL_SCREEN_NAME", "{category}"),
            ("AMPLITUDE_GROUP_TYPE", "company"),
        ])[..] else {
            panic!("three vendors");
        };
        assert_eq!(
            (&mixpanel.page_name, &amplitude.page_name),
            (&text("Viewed {name} Page"), &ViewName::Vendor)
        );
        assert_eq!(
            (&mixpanel.screen_name, &amplitude.screen_name),
            (&text("{category}"), &text("Loaded a Screen"))
        );
        assert_eq!((&mixpanel.group_type, &amplitude.group_type), (&None, &GroupType::parse("company").ok()));
        assert_eq!((&segment.page_name, &segment.group_type), (&ViewName::Default, &None));
    }

    #[test]
    fn a_bad_name_is_told_once_with_what_came_and_what_is_wanted() {
        let errors = |vars: &[(&str, &str)]| {
            let vars = [("TEST_MODE", "1")].iter().chain(vars).copied();
            Config::from_vars(vars).unwrap_err().0
        };
        let bad = errors(&[("PAGE_NAME", "Viewed {title}"), ("AMPLITUDE_GROUP_TYPE", "$group")]);
        let [page, group] = &bad[..] else { panic!("{bad:?}") };
        assert!(
            page.starts_with("PAGE_NAME: got \"Viewed {title}\", want vendor, or 1 to 255 bytes"),
            "{page}"
        );
        assert!(page.contains("{name} and {category}"), "{page}");
        assert!(group.starts_with("AMPLITUDE_GROUP_TYPE: got \"$group\", want a property's name"), "{group}");
        let bad = errors(&[("MIXPANEL_SCREEN_NAME", "{"), ("BATCH_SIZE", "0")]);
        assert_eq!(bad.len(), 2, "{bad:?}");
        // Segment knows pages and groups.
        let vars = [("TEST_MODE", "1"), ("SEGMENT_PAGE_NAME", "x")];
        let warnings = Config::from_vars(vars).unwrap().warnings;
        assert!(warnings[0].starts_with("SEGMENT_PAGE_NAME is none of our settings"), "{warnings:?}");
    }
}

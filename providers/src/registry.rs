//! Every vendor by name: from settings to a provider that is ready to send.

use std::{fmt, sync::Arc, time::Duration};

/// An address of a provider.
pub use reqwest::Url;

use crate::{
    Event, NotFor, Provider, Secret,
    amplitude::Amplitude,
    http::{Encoded, HttpClient, HttpProvider, HttpSettings, Wire},
    mixpanel::{IdentityMode, Mixpanel},
    segment::Segment,
    test_mode::TestMode,
    view::View,
};

/// A vendor that the relay knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Vendor {
    /// Mixpanel.
    Mixpanel,
    /// Amplitude.
    Amplitude,
    /// Segment.
    Segment,
}

impl Vendor {
    /// All vendors, in the order in which they are shown.
    pub const ALL: [Self; 3] = [Self::Mixpanel, Self::Amplitude, Self::Segment];

    /// The vendor's name in settings, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixpanel => "mixpanel",
            Self::Amplitude => "amplitude",
            Self::Segment => "segment",
        }
    }

    /// The vendor of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|vendor| vendor.name() == name)
    }

    /// Where the vendor's servers are, by region; the first is the default.
    pub fn hosts(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Mixpanel => &[
                ("us", "https://api.mixpanel.com"),
                ("eu", "https://api-eu.mixpanel.com"),
                ("in", "https://api-in.mixpanel.com"),
            ],
            Self::Amplitude => {
                &[("us", "https://api2.amplitude.com"), ("eu", "https://api.eu.amplitude.com")]
            }
            // The EU host is written differently on two of Segment's own pages.
            Self::Segment => {
                &[("us", "https://api.segment.io"), ("eu", "https://events.eu1.segmentapis.com")]
            }
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a vendor needs to be built.
#[derive(Debug, Clone)]
pub struct ProviderSettings {
    /// Which vendor.
    pub vendor: Vendor,
    /// Project token, API key or write key.
    pub key: Secret,
    /// Scheme, host and port.
    pub base_url: Url,
    /// Longest time for one request.
    pub request_timeout: Duration,
    /// Mixpanel: how the project joins identities.
    pub identity_mode: IdentityMode,
    /// Amplitude: the shortest id that the project takes.
    pub min_id_length: u32,
    /// Mixpanel and Amplitude: how pages, screens and groups look there.
    pub view: View,
}

/// A provider could not be built.
#[derive(Debug, thiserror::Error)]
#[error("the client for {vendor} cannot be built")]
pub struct BuildError {
    vendor: &'static str,
    source: reqwest::Error,
}

/// Builds a provider that sends.
pub fn build(settings: &ProviderSettings) -> Result<Arc<dyn Provider>, BuildError> {
    let key = settings.key.clone();
    match settings.vendor {
        Vendor::Mixpanel => over_http(settings, mixpanel(settings, key)),
        Vendor::Amplitude => over_http(settings, amplitude(settings, key)),
        Vendor::Segment => over_http(settings, Segment::new(key)),
    }
}

/// Builds a provider that only shows what it would send.
pub fn build_test_mode(settings: &ProviderSettings) -> Arc<dyn Provider> {
    let key = Secret::new("***");
    match settings.vendor {
        Vendor::Mixpanel => Arc::new(TestMode::new(mixpanel(settings, key))),
        Vendor::Amplitude => Arc::new(TestMode::new(amplitude(settings, key))),
        Vendor::Segment => Arc::new(TestMode::new(Segment::new(key))),
    }
}

/// What a vendor would be sent for an event at `now_ms` Unix milliseconds, with `***` in
/// place of its key; or why it gets none.
pub fn preview(settings: &ProviderSettings, event: &Event, now_ms: i64) -> Result<Encoded, NotFor> {
    let key = Secret::new("***");
    match settings.vendor {
        Vendor::Mixpanel => preview_of(&mixpanel(settings, key), event, now_ms),
        Vendor::Amplitude => preview_of(&amplitude(settings, key), event, now_ms),
        Vendor::Segment => preview_of(&Segment::new(key), event, now_ms),
    }
}

fn preview_of(wire: &impl Wire, event: &Event, now_ms: i64) -> Result<Encoded, NotFor> {
    wire.endpoint(event)?;
    Ok(wire.encode(std::slice::from_ref(event), now_ms))
}

fn mixpanel(settings: &ProviderSettings, key: Secret) -> Mixpanel {
    Mixpanel::new(key, settings.identity_mode).with_view(settings.view.clone())
}

fn amplitude(settings: &ProviderSettings, key: Secret) -> Amplitude {
    Amplitude::new(key, settings.min_id_length).with_view(settings.view.clone())
}

fn over_http(settings: &ProviderSettings, wire: impl Wire) -> Result<Arc<dyn Provider>, BuildError> {
    let http = HttpSettings {
        base_url: settings.base_url.clone(),
        request_timeout: settings.request_timeout,
        idle_connections_max: wire.limits().requests_max,
    };
    let client = HttpClient::new(http, &settings.key)
        .map_err(|source| BuildError { vendor: settings.vendor.name(), source })?;
    Ok(Arc::new(HttpProvider::new(wire, client)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vendor_is_found_by_its_name_and_has_a_host() {
        for vendor in Vendor::ALL {
            assert_eq!(Vendor::from_name(vendor.name()), Some(vendor));
            for (_, host) in vendor.hosts() {
                assert!(host.parse::<Url>().is_ok_and(|url| url.scheme() == "https"));
            }
        }
        assert_eq!(Vendor::from_name("posthog"), None);
    }
}

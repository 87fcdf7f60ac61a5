//! What a path stands for.

use crate::query::ReportName;

/// What is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// One event.
    One(Kind, Form),
    /// Many events.
    Batch(Form),
    /// What SDKs count of themselves.
    SdkMetrics,
    /// What analytics.js asks before it sends.
    SdkSettings,
    /// An event in the address of an image, of that kind if it is one.
    Pixel(Option<Kind>),
    /// What the store is asked.
    Report(ReportName),
    /// Which schema versions are taken.
    Schemas,
    /// The door's description, as OpenAPI has it.
    OpenApi,
    Health,
    Ready,
}

/// The kinds of events, as paths and `type` name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Track,
    Identify,
    Page,
    Screen,
    Group,
    Alias,
}

impl Kind {
    pub(super) const ALL: [Self; 6] =
        [Self::Track, Self::Identify, Self::Page, Self::Screen, Self::Group, Self::Alias];

    /// The kind's name in paths and in `type`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Track => "track",
            Self::Identify => "identify",
            Self::Page => "page",
            Self::Screen => "screen",
            Self::Group => "group",
            Self::Alias => "alias",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// By its name, or by the first letter of it.
    fn of_segment(path: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == path || path.len() == 1 && kind.name().starts_with(path))
    }
}

/// How a caller says what it sends, and wants to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Segment's: OK for all of a batch, whatever is wrong with some of it.
    Segment,
    /// The ingestion API's: an answer for each event.
    Ingestion,
    /// Website analytics': events of pages, one or many; refused ones are named.
    Website,
}

impl Route {
    /// The route of a path, with and without a slash at its end; nothing if there is none.
    pub(super) fn of_path(path: &str) -> Option<Self> {
        let path = path.strip_suffix('/').unwrap_or(path);
        if let Some(of_events) = path.strip_prefix("/v1/events/") {
            return match of_events {
                "track" => Some(Self::One(Kind::Track, Form::Ingestion)),
                "identify" => Some(Self::One(Kind::Identify, Form::Ingestion)),
                "batch" => Some(Self::Batch(Form::Ingestion)),
                _ => None,
            };
        }
        if let Some(of_website) = path.strip_prefix("/api/v1/") {
            return match of_website {
                "analytics/event" | "analytics/event/batch" | "events/track" => {
                    Some(Self::Batch(Form::Website))
                }
                "events/count" => Some(Self::Report(ReportName::EventCount)),
                "users/count" => Some(Self::Report(ReportName::UserCount)),
                _ => None,
            };
        }
        match path {
            "/health" | "/healthz" => return Some(Self::Health),
            "/ready" | "/readyz" => return Some(Self::Ready),
            "/openapi.json" => return Some(Self::OpenApi),
            "/beacon/v1/batch" => return Some(Self::Batch(Form::Segment)),
            _ => {}
        }
        let path = path.strip_prefix("/v1/")?;
        if let Some(pixel) = path.strip_prefix("pixel/") {
            return Some(Self::Pixel(pixel.rsplit('/').next().and_then(Kind::named)));
        }
        match path {
            "batch" | "b" | "import" => Some(Self::Batch(Form::Segment)),
            "m" => Some(Self::SdkMetrics),
            "schemas" => Some(Self::Schemas),
            _ if write_key_of_settings(path).is_some() => Some(Self::SdkSettings),
            _ => Kind::of_segment(path).map(|kind| Self::One(kind, Form::Segment)),
        }
    }

    /// The method that it is called with; all can be asked about with OPTIONS.
    pub(super) fn method(self) -> &'static str {
        match self {
            Self::One(..) | Self::Batch(_) | Self::SdkMetrics => "POST",
            Self::SdkSettings
            | Self::Pixel(_)
            | Self::Report(_)
            | Self::Schemas
            | Self::OpenApi
            | Self::Health
            | Self::Ready => "GET",
        }
    }

    /// The form in which its errors are told.
    pub(super) fn form(self) -> Form {
        match self {
            Self::One(_, form) | Self::Batch(form) => form,
            Self::Report(_) => Form::Website,
            _ => Form::Segment,
        }
    }

    /// The place of its label among all.
    pub(super) fn place(self) -> usize {
        match self {
            Self::One(kind, Form::Segment) => kind as usize,
            Self::One(Kind::Identify, Form::Ingestion) => 6,
            Self::One(..) => 7,
            Self::Batch(Form::Segment) => 8,
            Self::Batch(Form::Ingestion) => 9,
            Self::Batch(Form::Website) => 16,
            Self::OpenApi => 17,
            Self::SdkMetrics => 10,
            Self::SdkSettings => 11,
            Self::Pixel(_) => 12,
            Self::Health => 13,
            Self::Ready => 14,
            Self::Schemas => 15,
            Self::Report(ReportName::EventCount) => 18,
            Self::Report(ReportName::UserCount) => 19,
        }
    }
}

/// The labels of all routes in metrics, by their places; behind them that of a path that
/// is none.
pub(super) const LABELS: [&str; 21] = [
    "/v1/track",
    "/v1/identify",
    "/v1/page",
    "/v1/screen",
    "/v1/group",
    "/v1/alias",
    "/v1/events/identify",
    "/v1/events/track",
    "/v1/batch",
    "/v1/events/batch",
    "/v1/m",
    "/v1/projects/settings",
    "/v1/pixel",
    "/health",
    "/ready",
    "/v1/schemas",
    "/api/v1/analytics/event",
    "/openapi.json",
    "/api/v1/events/count",
    "/api/v1/users/count",
    "other",
];

/// The write key in the path of the settings, which begins behind `/v1/`.
pub(super) fn write_key_of_settings(path: &str) -> Option<&str> {
    let key = path.strip_prefix("projects/")?.strip_suffix("/settings")?;
    Some(key).filter(|key| !key.is_empty() && !key.contains('/'))
}

/// The value of a name in a query.
pub(super) fn query_value(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes()).find(|(it, _)| it == name).map(|(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_has_its_own_label() {
        for report in [ReportName::EventCount, ReportName::UserCount] {
            let route = Route::Report(report);
            assert_eq!(Route::of_path(LABELS[route.place()]), Some(route));
        }
    }

    #[test]
    fn every_path_has_its_route_with_and_without_a_slash_behind_it() {
        let segment = |kind| Route::One(kind, Form::Segment);
        for (path, route) in [
            ("/v1/track", segment(Kind::Track)),
            ("/v1/t", segment(Kind::Track)),
            ("/v1/i", segment(Kind::Identify)),
            ("/v1/p", segment(Kind::Page)),
            ("/v1/screen", segment(Kind::Screen)),
            ("/v1/g", segment(Kind::Group)),
            ("/v1/a", segment(Kind::Alias)),
            ("/v1/batch", Route::Batch(Form::Segment)),
            ("/v1/b", Route::Batch(Form::Segment)),
            ("/v1/import", Route::Batch(Form::Segment)),
            ("/beacon/v1/batch", Route::Batch(Form::Segment)),
            ("/v1/m", Route::SdkMetrics),
            ("/v1/projects/key/settings", Route::SdkSettings),
            ("/v1/pixel/track", Route::Pixel(Some(Kind::Track))),
            ("/v1/pixel/nothing", Route::Pixel(None)),
            ("/v1/events/track", Route::One(Kind::Track, Form::Ingestion)),
            ("/v1/events/batch", Route::Batch(Form::Ingestion)),
            ("/v1/schemas", Route::Schemas),
            ("/openapi.json", Route::OpenApi),
            ("/api/v1/analytics/event", Route::Batch(Form::Website)),
            ("/api/v1/analytics/event/batch", Route::Batch(Form::Website)),
            ("/api/v1/events/track", Route::Batch(Form::Website)),
            ("/api/v1/events/count", Route::Report(ReportName::EventCount)),
            ("/api/v1/users/count", Route::Report(ReportName::UserCount)),
            ("/health", Route::Health),
            ("/readyz", Route::Ready),
        ] {
            assert_eq!(Route::of_path(path), Some(route), "{path}");
            assert_eq!(Route::of_path(&format!("{path}/")), Some(route), "{path}/");
        }
        for path in [
            "",
            "/",
            "/v1",
            "/v1/",
            "/v1/x",
            "/v1/tr",
            "/v1/projects//settings",
            "/v1/events/page",
            "/v2/track",
            "/api/v1/analytics",
            "/api/v1/track",
        ] {
            assert_eq!(Route::of_path(path), None, "{path}");
        }
    }
}

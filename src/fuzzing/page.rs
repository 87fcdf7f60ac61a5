//! What an event says of its page, whatever it says.

use std::borrow::Cow;

use analytics_relay_providers::fuzzing::Input;

use crate::enrich::page::{PageInput, PageSettings, Pages, UrlQuery, check_found};

/// Addresses, referrers and campaigns, as texts and as the JSON that they come in.
pub fn page_url(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let keeps_click_ids = input.flag();
    let settings = PageSettings {
        url_query: [UrlQuery::Allowed, UrlQuery::Keep, UrlQuery::Drop][input.below(3)],
        click_id_values: keeps_click_ids,
        site_domains: vec!["a.example".into()],
        sources_file: None,
    };
    let pages = Pages::new(settings).expect("there is no file");
    let (is_view, is_json) = (input.flag(), input.flag());
    let Ok(text) = std::str::from_utf8(input.rest()) else { return };
    let mut lines = text.split('\n');
    let mut next = || lines.next().unwrap_or_default();
    let (first, second, third) = (next(), next(), next());
    let input = match is_json {
        true => PageInput::from_json(Some(first), second, is_view),
        false => PageInput {
            is_view,
            url: Some(Cow::Borrowed(first)),
            path: Some(Cow::Borrowed(second)),
            referrer: Some(Cow::Borrowed(second)),
            campaign: Some(third),
        },
    };
    check_found(&pages.find(&input), keeps_click_ids);
}

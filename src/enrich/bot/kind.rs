//! What is told of a bot.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::enrich::Encoded;

/// A bot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bot {
    /// What it calls itself, or the operator does.
    pub name: String,
    /// What it is for.
    pub cat: Category,
    /// Why it is taken for one.
    pub why: Why,
}

/// What a bot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Category {
    /// Ads: checks of landing pages, of where they stand.
    Ads,
    /// Fetches a page because a person asked a model something.
    AiAssistant,
    /// Collects texts for models.
    AiCrawler,
    /// Keeps copies.
    Archiver,
    /// A browser that a program drives; a framework of crawlers.
    Automation,
    /// Reads feeds.
    Feed,
    /// A library for HTTP. Only for events of browsers: elsewhere it is what one expects.
    Library,
    /// Looks whether a site is up, quick, as it should be.
    Monitor,
    /// It says that it is a bot, and not which.
    Other,
    /// The operator's list says so.
    Own,
    /// Fetches a page that somebody linked to.
    Preview,
    /// Science.
    Research,
    /// Looks for holes.
    Scanner,
    /// A search engine.
    Search,
    /// Looks at a site for its or a competitor's marketing.
    Seo,
    /// Another service's client: webhooks, proxies of images.
    Service,
}

/// Why something is taken for a bot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The operator's list has it.
    Own,
    /// Its user agent says so.
    Declared,
    /// Its browser has no window.
    Headless,
    /// Its page saw that a program drives the browser.
    Webdriver,
}

pub(super) fn encoded(name: impl Into<String>, cat: Category, why: Why) -> Arc<Encoded<Bot>> {
    Arc::new(Encoded::new(Bot { name: name.into(), cat, why }))
}

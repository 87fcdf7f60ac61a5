//! Whose events a question is about, of when, and which of them.

use std::{ops::Range, sync::LazyLock};

use crate::StoreError;

/// Most filters of one question, or of one step of a funnel.
pub const FILTERS_MAX: usize = 16;
/// Most values of one filter.
pub const VALUES_MAX: usize = 100;

/// Whose events may be seen. Every question carries one; only who has authenticated a
/// caller makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantScope {
    /// The tenant, empty for a relay that has one.
    pub tenant: String,
    /// Which of its websites and apps.
    pub sources: Sources,
}

/// Which of a tenant's websites and apps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sources {
    /// All, also those that are not known yet.
    All,
    /// These. Of events that name none the source is empty.
    Only(Vec<String>),
}

impl TenantScope {
    /// All of a tenant.
    pub fn tenant(tenant: impl Into<String>) -> Self {
        Self { tenant: tenant.into(), sources: Sources::All }
    }

    /// One website or app of a tenant.
    pub fn source(tenant: impl Into<String>, source: impl Into<String>) -> Self {
        Self { tenant: tenant.into(), sources: Sources::Only(vec![source.into()]) }
    }

    /// The tenant, of whom all may be seen: what is known about who is who, and what is
    /// deleted, is a whole tenant's.
    pub(crate) fn whole(&self) -> Result<&str, StoreError> {
        match &self.sources {
            Sources::All => Ok(&self.tenant),
            Sources::Only(sources) => {
                Err(StoreError::invalid("sources", format!("{} of them", sources.len()), "all of the tenant"))
            }
        }
    }

    /// True if events of that website or app may be seen.
    pub fn includes(&self, source: &str) -> bool {
        match &self.sources {
            Sources::All => true,
            Sources::Only(sources) => sources.iter().any(|one| one == source),
        }
    }
}

/// The events that a question is about.
#[derive(Debug, Clone, PartialEq)]
pub struct Scope {
    /// Whose.
    pub of: TenantScope,
    /// Of when: Unix milliseconds, half open. What belongs to a time, as an event or a
    /// visit of a page, is in it by its own time; a session by when it starts.
    pub range_ms: Range<i64>,
    /// All of these hold. Of sessions it is asked that one of their events matches.
    pub filters: Vec<Filter>,
    /// Machines too, which otherwise are in no figure.
    pub include_bots: bool,
}

impl Scope {
    /// All events of people in a range.
    pub fn new(of: TenantScope, range_ms: Range<i64>) -> Self {
        Self { of, range_ms, filters: Vec::new(), include_bots: false }
    }

    /// Narrowed by one more filter.
    pub fn with(mut self, filter: Filter) -> Self {
        self.filters.push(filter);
        self
    }

    /// The same for another range.
    pub fn over(&self, range_ms: Range<i64>) -> Self {
        Self { range_ms, ..self.clone() }
    }

    /// Checks what a type cannot say.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        check_filters(&self.filters)?;
        if self.range_ms.start > self.range_ms.end {
            let Range { start, end } = self.range_ms;
            return Err(StoreError::invalid("range", format!("{start} to {end}"), "a start before its end"));
        }
        Ok(())
    }
}

/// Checks filters of a scope or a step.
pub(crate) fn check_filters(filters: &[Filter]) -> Result<(), StoreError> {
    if filters.len() > FILTERS_MAX {
        return Err(StoreError::invalid("filters", filters.len(), format!("at most {FILTERS_MAX}")));
    }
    match filters.iter().find(|filter| filter.values.len() > VALUES_MAX) {
        None => Ok(()),
        Some(filter) => {
            Err(StoreError::invalid("filter values", filter.values.len(), format!("at most {VALUES_MAX}")))
        }
    }
}

/// What can be asked of an event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Field {
    /// A track's name; `pageview` and `screen` of those, the kind's name of others.
    Name,
    /// The path of the page.
    Page,
    /// The host of the page.
    Host,
    /// The host that led to it.
    Referrer,
    /// Who led to it, by name.
    Source,
    /// By what kind of way.
    Channel,
    /// Of the campaign.
    Medium,
    /// Of the campaign.
    Campaign,
    /// Of the campaign.
    Term,
    /// Of the campaign.
    Content,
    /// Two letters.
    Continent,
    /// Two letters.
    Country,
    /// As `DE-BE`.
    Region,
    /// Its name.
    City,
    /// Its name.
    Browser,
    /// Its version.
    BrowserVersion,
    /// Its name.
    Os,
    /// Its version.
    OsVersion,
    /// desktop, mobile, tablet, tv, console or other.
    Device,
    /// The name of a machine.
    Bot,
    /// The id of the user whom the event names.
    User,
    /// A property at the top level: texts as they are, anything else as JSON.
    Property(String),
}

/// Between the names of a path; no JSON text has it raw.
pub(crate) const SEPARATOR: char = '\u{1f}';

/// Where fields stand that are no properties: whatever names callers make up, what stands
/// here must be found fast.
pub(crate) static FIXED_PATHS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let mut paths: Vec<String> = Field::FIXED.iter().flat_map(Field::paths).collect();
    let more = ["anonymous_id", "user_id", "session_id", "properties seconds", "properties time_on_page"];
    paths.extend(more.map(|path| path.replace(' ', &SEPARATOR.to_string())));
    paths
});

impl Field {
    /// All but properties.
    const FIXED: [Self; 20] = [
        Self::Name,
        Self::Page,
        Self::Host,
        Self::Referrer,
        Self::Source,
        Self::Channel,
        Self::Medium,
        Self::Campaign,
        Self::Term,
        Self::Content,
        Self::Continent,
        Self::Country,
        Self::Region,
        Self::City,
        Self::Browser,
        Self::BrowserVersion,
        Self::Os,
        Self::OsVersion,
        Self::Device,
        Self::Bot,
    ];

    /// Where its value stands in an event's JSON: the first that is there counts. None for
    /// the name, which is made of more.
    pub(crate) fn paths(&self) -> Vec<String> {
        let places: &[&str] = match self {
            Self::Name => &[],
            Self::Page => &["enriched page path", "sent_context page path"],
            Self::Host => &["enriched page host"],
            Self::Referrer => &["enriched referrer host"],
            Self::Source => &["enriched source", "sent_context campaign source"],
            Self::Channel => &["enriched channel"],
            Self::Medium => &["enriched campaign medium", "sent_context campaign medium"],
            Self::Campaign => &["enriched campaign name", "sent_context campaign name"],
            Self::Term => &["enriched campaign term", "sent_context campaign term"],
            Self::Content => &["enriched campaign content", "sent_context campaign content"],
            Self::Continent => &["enriched geo continent"],
            Self::Country => &["enriched geo country"],
            Self::Region => &["enriched geo region"],
            Self::City => &["enriched geo city"],
            Self::Browser => &["enriched agent browser"],
            Self::BrowserVersion => &["enriched agent browser_version"],
            Self::Os => &["enriched agent os"],
            Self::OsVersion => &["enriched agent os_version"],
            Self::Device => &["enriched agent device"],
            Self::Bot => &["enriched bot name"],
            Self::User => &["user_id"],
            Self::Property(name) => return vec![format!("properties{SEPARATOR}{name}")],
        };
        places.iter().map(|place| place.replace(' ', &SEPARATOR.to_string())).collect()
    }
}

/// How a filter compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Is {
    /// The whole text is one of the values.
    OneOf,
    /// One of the values is in it.
    Containing,
    /// One of the values fits it, where `*` stands for anything.
    Like,
}

/// Which events count.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Filter {
    /// What is looked at.
    pub field: Field,
    /// How.
    pub is: Is,
    /// With what: one suffices.
    pub values: Vec<String>,
    /// Or the event has no such field.
    pub or_absent: bool,
    /// The other way round.
    pub negated: bool,
}

impl Filter {
    /// The field has this value.
    pub fn is(field: Field, value: impl Into<String>) -> Self {
        Self { field, is: Is::OneOf, values: vec![value.into()], or_absent: false, negated: false }
    }

    /// The field fits this pattern, where `*` stands for anything.
    pub fn like(field: Field, pattern: impl Into<String>) -> Self {
        Self { is: Is::Like, ..Self::is(field, pattern) }
    }

    /// The event has the field.
    pub fn present(field: Field) -> Self {
        Self { field, is: Is::OneOf, values: Vec::new(), or_absent: true, negated: true }
    }

    /// The other way round.
    pub fn negate(self) -> Self {
        Self { negated: !self.negated, ..self }
    }

    /// True if a value passes, `None` being the lack of one.
    pub fn passes(&self, value: Option<&str>) -> bool {
        let passes = match value {
            None => self.or_absent,
            Some(value) => self.values.iter().any(|wanted| match self.is {
                Is::OneOf => wanted == value,
                Is::Containing => value.contains(&**wanted),
                Is::Like => fits(wanted, value),
            }),
        };
        passes != self.negated
    }
}

/// True if a text fits a pattern, where `*` stands for anything. Each part is taken at
/// its first place, so the time is bounded by the product of both lengths.
fn fits(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return text.ends_with(part);
        }
        let Some(at) = text.find(part) else { return false };
        text = &text[at + part.len()..];
    }
    true
}

/// One step of a funnel: an event that passes all filters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Step {
    /// None: any event.
    pub filters: Vec<Filter>,
}

/// Somebody.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// A known user.
    User(String),
    /// A device or browser.
    Anonymous(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_stands_for_anything_between_its_parts() {
        for (pattern, text, want) in [
            ("/a", "/a", true),
            ("/a", "/ab", false),
            ("/a*", "/ab", true),
            ("*", "", true),
            ("**", "x", true),
            ("*a", "aba", true),
            ("/*/x", "/x", false),
            ("/*/x", "/y/x", true),
            ("a*b*c", "a1b2b3c", true),
            ("a*bc*c", "abc", false),
            ("é*", "é", true),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(fits(pattern, text), want, "{pattern} {text}");
        }
    }

    #[test]
    fn a_lack_passes_only_where_it_is_asked_for() {
        let filter = Filter::is(Field::Country, "DE");
        assert!(filter.passes(Some("DE")) && !filter.passes(Some("FR")) && !filter.passes(None));
        assert!(!filter.clone().negate().passes(Some("DE")) && filter.clone().negate().passes(None));
        let absent = Filter { or_absent: true, ..filter };
        assert!(absent.passes(None) && !absent.negate().passes(None));
        let present = Filter::present(Field::User);
        assert!(present.passes(Some("")) && present.passes(Some("u")) && !present.passes(None));
    }
}

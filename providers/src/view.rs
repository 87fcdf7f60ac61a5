//! Pages, screens and groups at vendors that have no such thing: a page is an event whose
//! name is the same for all of them, because a vendor limits how many names there are,
//! and has what page it was among its properties; a group has a type.

use std::{borrow::Cow, fmt};

use crate::{
    EventKind,
    context::{Added, Context, Is},
    event::{Kind, NAME_BYTES_MAX},
    key_hints::is_reserved_property,
};

/// Segment's own names for both at such vendors.
const PAGE: &str = "Loaded a Page";
const SCREEN: &str = "Loaded a Screen";
/// Instead of a text: the name that the vendor's own SDKs give.
const VENDOR: &str = "vendor";
/// Most bytes of a group's type: it is a property's name.
const GROUP_TYPE_BYTES_MAX: usize = 255;

/// What a context says of a page that its own properties may say, too.
const PAGE_FIELDS: [&str; 5] = ["url", "path", "referrer", "title", "search"];

/// How pages, screens and groups look at such a vendor.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// What an event is called that a page becomes.
    pub page_name: ViewName,
    /// What an event is called that a screen becomes.
    pub screen_name: ViewName,
    /// What sort of group a group is; without it the vendor gets none.
    pub group_type: Option<GroupType>,
}

/// What an event is called that a page or a screen becomes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ViewName {
    /// "Loaded a Page", "Loaded a Screen".
    #[default]
    Default,
    /// As the vendor's own SDKs do, with their properties, so that the vendor's own
    /// reports find it.
    Vendor,
    /// A text in which a page's name and category stand in for `{name}` and `{category}`.
    Text(Template),
}

/// A text with places in it; see [`ViewName::Text`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Name,
    Category,
}

/// What is wrong with the name of pages or screens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "vendor, or 1 to 255 bytes of text in which {{name}} and {{category}} stand for a page's, without other braces"
)]
pub struct BadViewName;

/// What sort of group a group is, as a company or a team.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupType(String);

/// What is wrong with the type of groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a property's name of 1 to 255 bytes, such as company, that neither begins with $ or mp_ nor is one \
that Mixpanel reads itself, such as time"
)]
pub struct BadGroupType;

impl ViewName {
    /// Reads a setting.
    pub fn parse(text: &str) -> Result<Self, BadViewName> {
        match text {
            VENDOR => Ok(Self::Vendor),
            text => Template::parse(text).map(Self::Text),
        }
    }
}

impl Template {
    fn parse(text: &str) -> Result<Self, BadViewName> {
        if text.trim().is_empty() || text.len() > NAME_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(BadViewName);
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (place, after) = after.split_once('}').ok_or(BadViewName)?;
            parts.push(Part::literal(before)?);
            parts.push(match place {
                "name" => Part::Name,
                "category" => Part::Category,
                _ => return Err(BadViewName),
            });
            rest = after;
        }
        parts.push(Part::literal(rest)?);
        Ok(Self(parts))
    }

    /// The text with what stands in its places; nothing if it has places and nothing
    /// stands in any of them.
    fn fill(&self, name: &str, category: &str) -> Option<String> {
        let filled = self.0.iter().map(|part| match part {
            Part::Text(text) => text,
            Part::Name => name,
            Part::Category => category,
        });
        let is_filled = |part: &Part| match part {
            Part::Text(_) => false,
            Part::Name => !name.trim().is_empty(),
            Part::Category => !category.trim().is_empty(),
        };
        let has_places = self.0.iter().any(|part| !matches!(part, Part::Text(_)));
        if has_places && !self.0.iter().any(is_filled) {
            return None;
        }
        let filled: String = filled.collect();
        let mut text = filled.split_whitespace().collect::<Vec<_>>().join(" ");
        while text.len() > NAME_BYTES_MAX {
            text.pop();
        }
        Some(text)
    }
}

impl Part {
    fn literal(text: &str) -> Result<Self, BadViewName> {
        if text.contains('}') { Err(BadViewName) } else { Ok(Self::Text(text.to_owned())) }
    }
}

impl GroupType {
    /// Reads a setting that is not empty.
    pub fn parse(text: &str) -> Result<Self, BadGroupType> {
        let fits = (1..=GROUP_TYPE_BYTES_MAX).contains(&text.len())
            && !text.starts_with('$')
            && !text.chars().any(char::is_control)
            && !is_reserved_property(text.as_bytes());
        if fits { Ok(Self(text.to_owned())) } else { Err(BadGroupType) }
    }

    /// The type's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GroupType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl View {
    /// The type of groups, as text.
    pub(crate) fn group_type(&self) -> Option<&str> {
        self.group_type.as_ref().map(GroupType::as_str)
    }
}

/// What a page or screen that became an event is called.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SeenAs {
    Named(Cow<'static, str>),
    /// As the vendor's SDKs do, if they know such a thing; else by the default.
    Vendors(Kind),
}

impl SeenAs {
    /// Without a name of the vendor's own for it.
    pub(crate) fn default_of(kind: Kind) -> &'static str {
        if kind == Kind::Screen { SCREEN } else { PAGE }
    }
}

/// What a page or screen is called, with what it is added to its properties: a vendor
/// sees only these. Nothing for what is neither.
pub(crate) fn see<'a>(
    view: &View,
    kind: EventKind<'_>,
    context: &Context<'a>,
    added: &mut Added<'a>,
) -> Option<SeenAs> {
    let (kind, name, category, rule) = match kind {
        EventKind::Page { name, category } => (Kind::Page, name, category, &view.page_name),
        EventKind::Screen { name, category } => (Kind::Screen, name, category, &view.screen_name),
        EventKind::Track { .. }
        | EventKind::Identify
        | EventKind::Group { .. }
        | EventKind::Alias { .. }
        | EventKind::Unknown { .. } => return None,
    };
    // Callers whose SDK has no place of its own for them put them among the properties.
    let either = |own: Option<&str>, key| own.map(str::to_owned).or_else(|| added.text_of(key));
    let [called, of_category] =
        [either(name, "name"), either(category, "category")].map(Option::unwrap_or_default);
    added.optional("name", name);
    added.optional("category", category);
    for field in PAGE_FIELDS {
        if let Some(json) = context.find(&format!("page.{field}"), Is::Text) {
            added.json(field, json);
        }
    }
    let filled = match rule {
        ViewName::Vendor => return Some(SeenAs::Vendors(kind)),
        ViewName::Default => None,
        ViewName::Text(template) => template.fill(&called, &of_category),
    };
    Some(SeenAs::Named(filled.map_or(SeenAs::default_of(kind).into(), Cow::Owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(template: &str, name: &str, category: &str) -> Option<String> {
        Template::parse(template).unwrap().fill(name, category)
    }

    #[test]
    fn a_template_takes_name_and_category_and_collapses_blanks() {
        let both = "Viewed {category} {name} Page";
        for (template, name, category, want) in [
            (both, "Home", "Docs", Some("Viewed Docs Home Page")),
            (both, "Home", "", Some("Viewed Home Page")),
            (both, "", "Docs", Some("Viewed Docs Page")),
            (both, "", "", None),
            (both, " \t", "", None),
            ("{name}", "  a  b ", "", Some("a b")),
            ("{name}{category}", "a", "b", Some("ab")),
            ("{name}", "{category}", "b", Some("{category}")),
            ("  A   Page ", "Home", "", Some("A Page")),
        ] {
            assert_eq!(filled(template, name, category).as_deref(), want, "{template:?} {name:?}");
        }
        let long = filled("{name} {category}", &"é".repeat(127), &"é".repeat(127)).unwrap();
        assert_eq!(long.len(), 255, "as long as a name may be, between two characters");
    }

    #[test]
    fn a_bad_template_is_an_error_that_says_what_is_wanted() {
        for bad in
            ["", " ", "{title}", "{", "}", "{name", "name}", "{{name}}", "{Name}", "a\nb", &"x".repeat(256)]
        {
            assert_eq!(ViewName::parse(bad), Err(BadViewName), "{bad:?}");
        }
        assert!(BadViewName.to_string().contains("{name} and {category}"), "{BadViewName}");
        assert_eq!(ViewName::parse("vendor"), Ok(ViewName::Vendor));
    }

    #[test]
    fn a_group_type_is_a_name_that_no_vendor_reserves() {
        for good in ["company", "Team Id", "é", &"x".repeat(255)] {
            assert_eq!(GroupType::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "$set", "mp_x", "time", "distinct_id", "a\nb", &"x".repeat(256)] {
            assert_eq!(GroupType::parse(bad), Err(BadGroupType), "{bad:?}");
        }
    }
}

//! The rules of uap-core out of its YAML, for the build, which puts those of the crate
//! ua-parser into the binary, and for a file of the operator's.
//!
//! The build compiles this file too: it knows nothing of the relay.

use std::collections::BTreeMap;

use saphyr::{LoadableYamlNode, Scalar, Yaml};

/// One rule: its `regex` and what it puts where, by their names in uap-core.
pub(crate) type Rule = BTreeMap<String, String>;

/// The rules of a section.
pub(crate) type Section = Vec<Rule>;

/// The sections, by which a user agent's browser, system and device are found.
pub(crate) const SECTIONS: [&str; 3] = ["user_agent_parsers", "os_parsers", "device_parsers"];

/// The rules of each of [`SECTIONS`], in their order.
pub(crate) fn read(yaml: &str) -> Result<[Section; 3], String> {
    let documents = Yaml::load_from_str(yaml).map_err(|error| format!("got no YAML: {error}"))?;
    let document = documents.first().ok_or("got an empty file, want the sections of uap-core")?;
    let [mut browsers, mut systems, mut devices] = [const { Section::new() }; 3];
    for (name, section) in SECTIONS.iter().zip([&mut browsers, &mut systems, &mut devices]) {
        let rules = document.as_mapping_get(name).and_then(Yaml::as_sequence);
        let rules = rules.ok_or_else(|| format!("got no list {name:?}, want the sections of uap-core"))?;
        for (at, rule) in rules.iter().enumerate() {
            section.push(read_rule(rule).map_err(|error| format!("{name}[{at}]: {error}"))?);
        }
    }
    Ok([browsers, systems, devices])
}

fn read_rule(rule: &Yaml<'_>) -> Result<Rule, String> {
    let members = rule.as_mapping().ok_or("got no mapping, want a rule")?;
    // A name without a value is as good as none.
    let members = members.iter().filter(|(_, value)| !matches!(value, Yaml::Value(Scalar::Null)));
    let read = members.map(|(name, value)| Ok((text(name)?, text(value)?)));
    let read = read.collect::<Result<Rule, String>>()?;
    if read.contains_key("regex") { Ok(read) } else { Err("got no regex".to_owned()) }
}

/// A text; a bare number is one too.
fn text(value: &Yaml<'_>) -> Result<String, String> {
    match value {
        Yaml::Value(Scalar::String(text)) => Ok(text.clone().into_owned()),
        Yaml::Value(Scalar::Integer(number)) => Ok(number.to_string()),
        Yaml::Value(Scalar::FloatingPoint(number)) => Ok(number.to_string()),
        other => Err(format!("got {other:?}, want text")),
    }
}

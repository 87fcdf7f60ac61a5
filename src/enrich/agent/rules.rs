//! uap-core's rules, compiled: which browser, system and device a user agent names.
//!
//! They take 11 MB, those of devices 16 more, so those of the binary are compiled when
//! the first user agent comes. A file of the operator's is, to be checked, when it is read.

use std::{
    fmt::{self, Debug},
    sync::OnceLock,
};

use ua_parser::{device, os, user_agent};

use super::yaml::{self, Rule, SECTIONS, Section};

/// What a user agent says, as the rules have it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) browser: Option<Versioned>,
    pub(super) system: Option<Versioned>,
    /// Brand and model.
    pub(super) device: Option<(Option<String>, Option<String>)>,
}

/// A name and a version of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Versioned {
    pub(super) name: String,
    pub(super) major: Option<String>,
    pub(super) minor: Option<String>,
}

/// The rules, compiled or not yet.
pub(super) struct Rules {
    compiled: OnceLock<Compiled>,
    with_devices: bool,
}

struct Compiled {
    browsers: user_agent::Extractor<'static>,
    systems: os::Extractor<'static>,
    devices: Option<device::Extractor<'static>>,
}

impl Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").field("with_devices", &self.with_devices).finish_non_exhaustive()
    }
}

impl Rules {
    /// Those of the binary.
    pub(super) fn built_in(with_devices: bool) -> Self {
        Self { compiled: OnceLock::new(), with_devices }
    }

    /// Those of a file in uap-core's form.
    pub(super) fn of_yaml(text: &str, with_devices: bool) -> Result<Self, String> {
        let compiled = Compiled::new(yaml::read(text)?, with_devices)?;
        Ok(Self { compiled: OnceLock::from(compiled), with_devices })
    }

    pub(super) fn name(&self, agent: &str) -> Named {
        let compiled = self.compiled.get_or_init(|| {
            let sections = built_in_sections(self.with_devices);
            Compiled::new(sections, self.with_devices).expect("a test compiles those of the binary")
        });
        let browser = compiled.browsers.extract(agent).map(|found| Versioned {
            name: found.family.into_owned(),
            major: found.major.map(str::to_owned),
            minor: found.minor.map(str::to_owned),
        });
        let system = compiled.systems.extract(agent).map(|found| Versioned {
            name: found.os.into_owned(),
            major: found.major.map(Into::into),
            minor: found.minor.map(Into::into),
        });
        let device = compiled.devices.as_ref().and_then(|devices| devices.extract(agent));
        let device = device.map(|found| (found.brand.map(Into::into), found.model.map(Into::into)));
        Named { browser, system, device }
    }
}

fn built_in_sections(with_devices: bool) -> [Section; 3] {
    let read = |json: &str| serde_json::from_str(json).expect("build.rs wrote it");
    let devices = include_str!(concat!(env!("OUT_DIR"), "/device_parsers.json"));
    [
        read(include_str!(concat!(env!("OUT_DIR"), "/user_agent_parsers.json"))),
        read(include_str!(concat!(env!("OUT_DIR"), "/os_parsers.json"))),
        if with_devices { read(devices) } else { Section::new() },
    ]
}

impl Compiled {
    fn new([browsers, systems, devices]: [Section; 3], with_devices: bool) -> Result<Self, String> {
        let browsers = push_all(SECTIONS[0], browsers, user_agent::Builder::new(), |builder, rule| {
            builder.push(browser_rule(rule))
        })?;
        let systems = push_all(SECTIONS[1], systems, os::Builder::new(), |builder, rule| {
            builder.push(system_rule(rule))
        })?;
        let devices = with_devices.then(|| {
            push_all(SECTIONS[2], devices, device::Builder::new(), |builder, rule| {
                builder.push(device_rule(rule))
            })
        });
        Ok(Self {
            browsers: browsers.build().map_err(|error| format!("{}: {error}", SECTIONS[0]))?,
            systems: systems.build().map_err(|error| format!("{}: {error}", SECTIONS[1]))?,
            devices: devices
                .transpose()?
                .map(device::Builder::build)
                .transpose()
                .map_err(|error| format!("{}: {error}", SECTIONS[2]))?,
        })
    }
}

/// Adds rule by rule, so that a bad one is named.
fn push_all<B, E: fmt::Display>(
    section: &str,
    rules: Section,
    builder: B,
    push: impl Fn(B, Rule) -> Result<B, E>,
) -> Result<B, String> {
    rules.into_iter().enumerate().try_fold(builder, |builder, (at, rule)| {
        let regex = rule.get("regex").cloned().unwrap_or_default();
        push(builder, rule).map_err(|error| format!("{section}[{at}]: the regex {regex:?}: {error}"))
    })
}

fn browser_rule(mut rule: Rule) -> user_agent::Parser<'static> {
    let mut take = |name| rule.remove(name).map(Into::into);
    user_agent::Parser {
        regex: take("regex").unwrap_or_default(),
        family_replacement: take("family_replacement"),
        v1_replacement: take("v1_replacement"),
        v2_replacement: take("v2_replacement"),
        v3_replacement: take("v3_replacement"),
        v4_replacement: take("v4_replacement"),
    }
}

fn system_rule(mut rule: Rule) -> os::Parser<'static> {
    let mut take = |name| rule.remove(name).map(Into::into);
    os::Parser {
        regex: take("regex").unwrap_or_default(),
        os_replacement: take("os_replacement"),
        os_v1_replacement: take("os_v1_replacement"),
        os_v2_replacement: take("os_v2_replacement"),
        os_v3_replacement: take("os_v3_replacement"),
        os_v4_replacement: take("os_v4_replacement"),
    }
}

fn device_rule(mut rule: Rule) -> device::Parser<'static> {
    let is_case_ignored = rule.remove("regex_flag").is_some_and(|flag| flag == "i");
    let mut take = |name| rule.remove(name).map(Into::into);
    device::Parser {
        regex: take("regex").unwrap_or_default(),
        regex_flag: is_case_ignored.then_some(device::Flag::IgnoreCase),
        device_replacement: take("device_replacement"),
        brand_replacement: take("brand_replacement"),
        model_replacement: take("model_replacement"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_the_binary_compile() {
        let sections = built_in_sections(true);
        let rules: Vec<usize> = sections.iter().map(Vec::len).collect();
        assert!(rules[0] > 300 && rules[1] > 150 && rules[2] > 600, "{rules:?}");
        Compiled::new(sections, true).map(|_| ()).unwrap();
    }

    #[test]
    fn a_file_that_is_bad_says_what_and_where() {
        let error = |yaml: &str| Rules::of_yaml(yaml, true).map(|_| ()).unwrap_err();
        let with_browsers =
            |rules: &str| error(&format!("user_agent_parsers:\n{rules}\nos_parsers: []\ndevice_parsers: []"));
        for (error, says) in [
            (error(""), "an empty file"),
            (error("a: [1"), "no YAML"),
            (error("7"), "no list \"user_agent_parsers\""),
            (error("user_agent_parsers: []\nos_parsers: []"), "no list \"device_parsers\""),
            (with_browsers("  - 7"), "user_agent_parsers[0]: got no mapping"),
            (with_browsers("  - family_replacement: 'x'"), "user_agent_parsers[0]: got no regex"),
            (with_browsers("  - regex: [1]"), "want text"),
            (with_browsers("  - regex: '(a)'\n  - regex: '(b'"), "user_agent_parsers[1]: the regex \"(b\""),
            (with_browsers("  - regex: 'a'\n    family_replacement: '$1'"), "MissingGroup"),
        ] {
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_file_of_the_operators_is_used_as_it_is() {
        let rules = Rules::of_yaml(
            "user_agent_parsers:\n  - regex: '(Ours)/(\\d+)\\.(\\d+)'\n    v2_replacement: 7\n\
             os_parsers:\n  - regex: 'OurOS'\n    os_replacement: 'OurOS'\n\
             device_parsers:\n  - regex: '; (our)'\n    regex_flag: 'i'\n    device_replacement: 'x'\n    \
             brand_replacement: 'We'\n    model_replacement: '$1'\n",
            true,
        );
        let named = rules.unwrap().name("Ours/3.4 (OurOS; OUR)");
        let browser = Versioned { name: "Ours".into(), major: Some("3".into()), minor: Some("7".into()) };
        assert_eq!(named.browser, Some(browser));
        assert_eq!(named.system.unwrap().name, "OurOS");
        assert_eq!(named.device, Some((Some("We".into()), Some("OUR".into()))));
    }
}

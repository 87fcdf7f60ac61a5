//! User agents, hints, `userAgentData` and the operator's list of bots.

use analytics_relay_providers::fuzzing::Input;
use serde_json::Value;

use crate::enrich::{
    agent::{AgentInput, Hints},
    bot::OwnList,
    senders::{AgentSettings, Agents},
};

/// Most bytes of an agent's JSON: six names and versions, each byte as six.
const AGENT_JSON_BYTES_MAX: usize = 2_048;
const BOT_JSON_BYTES_MAX: usize = 512;

thread_local! {
    static AGENTS: Agents =
        Agents::new(&AgentSettings { regexes: None, with_devices: true, bot_list: None }).expect("there are no files");
}

/// A user agent alone, and as the operator's list.
pub fn user_agent(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    check(text, &Hints::default(), None);
    let _ = OwnList::parse(text);
}

/// Headers, a body and a user agent.
pub fn hints(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut text = |mut bytes_max: usize| {
        bytes_max = bytes_max.min(usize::from(input.byte()));
        std::str::from_utf8(input.take(bytes_max)).ok()
    };
    let headers = Hints::HEADERS.map(|_| text(255));
    let agent = text(64).unwrap_or_default();
    let mut headers = headers.into_iter();
    let hints = Hints::read(|_| headers.next().flatten());
    let data = std::str::from_utf8(input.rest()).ok();
    check(agent, &hints, data);
}

fn check(user_agent: &str, hints: &Hints<'_>, user_agent_data: Option<&str>) {
    AGENTS.with(|agents| {
        let sets = agents.load();
        for is_browser in [false, true] {
            let input = AgentInput { user_agent, hints, user_agent_data, webdriver: false, is_browser };
            let (agent, bot) = (sets.agent(&input), sets.bot(&input));
            assert_eq!(agent, sets.agent(&input), "the second time it is kept");
            assert_eq!(bot, sets.bot(&input));
            for (json, bytes_max) in [
                (agent.as_ref().map(|agent| &agent.json), AGENT_JSON_BYTES_MAX),
                (bot.as_ref().map(|bot| &bot.json), BOT_JSON_BYTES_MAX),
            ] {
                let Some(json) = json else { continue };
                assert!(json.len() <= bytes_max, "{json}");
                assert!(serde_json::from_str::<Value>(json).is_ok_and(|json| json.is_object()), "{json}");
            }
        }
    });
}

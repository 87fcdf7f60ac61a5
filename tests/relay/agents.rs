//! How user agents are read, held against public lists of them: npm's crawler-user-agents,
//! of which nearly all must be found, and user-agents, people's browsers, of which none may
//! be taken for a bot. They run where Node and the packages are (`npm ci` in `tests/sdks`).
//!
//! `make bots` shows what the table of bots lacks of the newest list.

use analytics_relay::{
    config::Config,
    enrich::{
        agent::{Agent, AgentInput, Hints},
        bot::Bot,
        senders::Agents,
    },
};
use serde::Deserialize;
use std::collections::BTreeMap;

use crate::{foreign_clients::program, harness::not_run, official_sdks::in_sdks};

/// Share of the crawlers' user agents that are to be found.
const FOUND_MIN: f64 = 0.95;
/// Share of people's devices, by their weight, of which the sort is as the list has it.
const SAME_DEVICE_MIN: f64 = 0.99;

#[derive(Deserialize)]
struct Lists {
    crawlers: Vec<Crawler>,
    people: Vec<Person>,
}

#[derive(Deserialize)]
struct Crawler {
    pattern: String,
    instances: Vec<String>,
    tags: Vec<String>,
}

#[derive(Deserialize)]
struct Person {
    agent: String,
    device: String,
    weight: f64,
}

async fn lists() -> Option<Lists> {
    let output = in_sdks(program("NODE", "node", &["agents.cjs"])).output().await;
    let Some(output) = output.ok().filter(|output| output.status.success()) else {
        not_run("lists of user agents: Node with crawler-user-agents and user-agents");
        return None;
    };
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

fn agents() -> Agents {
    Agents::new(&Config::from_vars([("TEST_MODE", "1")]).unwrap().agents).unwrap()
}

fn input<'a>(user_agent: &'a str, hints: &'a Hints<'a>) -> AgentInput<'a> {
    AgentInput { user_agent, hints, user_agent_data: None, webdriver: false, is_browser: true }
}

fn bot(agents: &Agents, user_agent: &str) -> Option<Bot> {
    agents.load().bot(&input(user_agent, &Hints::default())).map(|bot| bot.value.clone())
}

fn agent(agents: &Agents, user_agent: &str) -> Option<Agent> {
    agents.load().agent(&input(user_agent, &Hints::default())).map(|agent| agent.value.clone())
}

#[expect(clippy::cast_precision_loss, reason = "a share")]
fn share(part: usize, all: usize) -> f64 {
    part as f64 / all as f64
}

#[tokio::test]
async fn nearly_all_known_crawlers_are_found() {
    let Some(lists) = lists().await else { return };
    let (agents, mut all, mut found, mut by_name) = (agents(), 0, 0, 0);
    let mut missing = BTreeMap::<&str, Vec<&str>>::new();
    for crawler in &lists.crawlers {
        for instance in &crawler.instances {
            all += 1;
            match bot(&agents, instance) {
                Some(bot) => {
                    found += 1;
                    by_name += usize::from(serde_json::to_value(bot.cat).unwrap() != "other");
                }
                None => missing.entry(&crawler.pattern).or_default().push(instance),
            }
        }
    }
    for (pattern, instances) in &missing {
        let tags =
            lists.crawlers.iter().find(|crawler| crawler.pattern == *pattern).map(|crawler| &crawler.tags);
        println!(
            "missing: {pattern} {:?} {} of it, such as {:?}",
            tags.unwrap(),
            instances.len(),
            instances[0]
        );
    }
    println!("{found} of {all} found ({:.1} %), {by_name} by their names", 100.0 * share(found, all));
    assert!(all > 2_000 && share(found, all) >= FOUND_MIN, "{found} of {all}");
}

#[tokio::test]
async fn no_browser_of_people_is_taken_for_a_bot_and_each_is_known() {
    let Some(lists) = lists().await else { return };
    let (agents, mut same, mut all, mut unknown) = (agents(), 0.0, 0.0, 0);
    assert!(lists.people.len() > 900, "{}", lists.people.len());
    for person in &lists.people {
        assert_eq!(bot(&agents, &person.agent), None, "{}", person.agent);
        let agent = agent(&agents, &person.agent).unwrap();
        if agent.browser.is_none() || agent.os.is_none() {
            println!("unknown: {} is {agent:?}", person.agent);
            unknown += 1;
        }
        all += person.weight;
        if serde_json::to_value(agent.device).unwrap() == *person.device {
            same += person.weight;
        } else {
            println!("{} {:?} is in the list as {}", person.agent, agent.device, person.device);
        }
    }
    let of_all = lists.people.len();
    println!("unknown: {unknown} of {of_all} ({:.1} %)", 100.0 * share(unknown, of_all));
    assert_eq!(unknown, 0, "of {of_all}");
    println!("the same sort of device: {:.1} % by weight", 100.0 * same / all);
    assert!(same / all >= SAME_DEVICE_MIN, "{same} of {all}");
}

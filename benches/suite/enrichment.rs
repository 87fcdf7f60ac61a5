//! What it costs to enrich an event, step by step, on one core.

use std::{fs, hint::black_box, time::Instant};

use analytics_relay::{
    config::Config,
    enrich::{
        agent::{AgentInput, Hints},
        senders::{Agents, DataSets},
    },
};
use anyhow::Context;

use crate::report::{Report, median};

const ROUNDS: usize = 9;
const EVENTS: usize = 2_000;
/// Of people, of an app and of a crawler.
pub(crate) const USER_AGENTS: [&str; 6] = [
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/26.0 Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Mobile Safari/537.36",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Mozilla/5.0 (Linux; Android 14; SM-S911B Build/UP1A; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/131.0.0.0 Mobile Safari/537.36 Instagram 406.0.0.58.159 Android",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; +https://openai.com/gptbot)",
];

pub(crate) fn run(report: &mut Report) -> anyhow::Result<()> {
    for (device, with) in [("class", ""), ("full", "_full")] {
        let before = memory_mb()?;
        let agents = agents(device)?;
        let started = Instant::now();
        find(&agents.load(), "Mozilla/5.0", Step::Agent);
        report.add(&format!("agent{with}.build"), started.elapsed().as_secs_f64() * 1e3, "ms");
        report.add(&format!("agent{with}.memory"), memory_mb()? - before, "MB");
        each(report, &format!("agent{with}_hit"), &agents, Step::Agent, |at| USER_AGENTS[at % 6].to_owned());
        each(report, &format!("agent{with}_miss"), &agents, Step::Agent, fresh);
        each(report, &format!("agent{with}_hostile"), &agents, Step::Agent, hostile);
    }
    let before = memory_mb()?;
    let agents = agents("class")?;
    let started = Instant::now();
    find(&agents.load(), "Mozilla/5.0", Step::Bot);
    report.add("bot.build", started.elapsed().as_secs_f64() * 1e3, "ms");
    report.add("bot.memory", memory_mb()? - before, "MB");
    each(report, "bot_hit", &agents, Step::Bot, |at| USER_AGENTS[at % 6].to_owned());
    each(report, "bot_miss", &agents, Step::Bot, fresh);
    each(report, "bot_hostile", &agents, Step::Bot, hostile);
    flood(report, &agents)
}

fn agents(device: &str) -> anyhow::Result<Agents> {
    Ok(Agents::new(&Config::from_vars([("TEST_MODE", "1"), ("UA_DEVICE", device)])?.agents)?)
}

#[derive(Clone, Copy)]
enum Step {
    Agent,
    Bot,
}

/// Never seen before, and read as the others are.
fn fresh(at: usize) -> String {
    format!("{} {at}", USER_AGENTS[at % 6])
}

/// As long as it is read, of what the rules look for.
fn hostile(at: usize) -> String {
    let words = "Chrome/Version/Android bot spider iPhone OS Mobile Safari; Windows NT (KHTML ";
    format!("Mozilla/5.0 {at} {}", words.repeat(14))
}

fn find(sets: &DataSets, user_agent: &str, step: Step) {
    let hints = Hints::default();
    let input =
        AgentInput { user_agent, hints: &hints, user_agent_data: None, webdriver: false, is_browser: true };
    match step {
        Step::Agent => drop(black_box(sets.agent(&input))),
        Step::Bot => drop(black_box(sets.bot(&input))),
    }
}

/// The time of one, in the middle of some rounds.
#[expect(clippy::cast_precision_loss, reason = "figures for a person")]
fn each(report: &mut Report, name: &str, agents: &Agents, step: Step, user_agent: impl Fn(usize) -> String) {
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        let texts: Vec<_> = (round * EVENTS..(round + 1) * EVENTS).map(&user_agent).collect();
        let started = Instant::now();
        for text in &texts {
            find(&agents.load(), text, step);
        }
        times.push(started.elapsed().as_secs_f64() * 1e6 / EVENTS as f64);
    }
    report.add(name, median(times), "us");
}

/// What a hundred thousand user agents that never come again leave.
fn flood(report: &mut Report, agents: &Agents) -> anyhow::Result<()> {
    find(&agents.load(), "Mozilla/5.0", Step::Agent);
    let before = memory_mb()?;
    for at in 0..100_000 {
        let text = fresh(at);
        find(&agents.load(), &text, Step::Agent);
        find(&agents.load(), &text, Step::Bot);
    }
    report.add("agent_flood.memory", memory_mb()? - before, "MB");
    Ok(())
}

/// What of this process is in memory.
pub(crate) fn memory_mb() -> anyhow::Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}

//! Lines of figures, as they come; a summary as JSON and as a table; the recorded
//! baseline.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::ensure;
use serde_json::json;

/// How far above the baseline a counted figure may be.
const GROWTH_MAX: f64 = 1.03;
/// Start of the names of what one provider does to the others, and how far it may move them.
pub(crate) const ISOLATION: &str = "isolation.";
const MOVES_MAX: f64 = 0.10;
/// Units of figures that repeat, whatever else the machine does.
const COUNTED: [&str; 2] = ["instructions", "allocations"];

struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    to_floor: Option<f64>,
    to_baseline: Option<f64>,
}

/// See the module.
pub(crate) struct Report {
    baseline_path: PathBuf,
    baseline: BTreeMap<String, f64>,
    figures: Vec<Figure>,
}

impl Report {
    pub(crate) fn new(project: &str) -> anyhow::Result<Self> {
        let baseline_path = Path::new(project).join("benches/baseline.json");
        let baseline = serde_json::from_slice(&fs::read(&baseline_path)?)?;
        Ok(Self { baseline_path, baseline, figures: Vec::new() })
    }

    /// Names the columns.
    pub(crate) fn head(&self) {
        println!("{:<34} {:>12}  {:<18} {:>8} {:>12}", "name", "value", "unit", "to floor", "to baseline");
    }

    /// Says why something was left out.
    pub(crate) fn not_run(&self, what: &str, why: &str) {
        println!("{what:<34} not run: {why}");
    }

    /// Adds a figure.
    pub(crate) fn add(&mut self, name: &str, value: f64, unit: &'static str) {
        self.add_line(name, value, unit, None);
    }

    /// Adds a figure beside another one of this run, its floor.
    pub(crate) fn add_beside(&mut self, name: &str, value: f64, unit: &'static str, floor: &str) {
        let to_floor = self.value(floor).map(|floor| value / floor);
        self.add_line(name, value, unit, to_floor);
    }

    fn add_line(&mut self, name: &str, value: f64, unit: &'static str, to_floor: Option<f64>) {
        let to_baseline = self.baseline.get(name).map(|baseline| value / baseline);
        let ratio = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!(
            "{name:<34} {:>12}  {unit:<18} {:>8} {:>12}",
            short(value),
            ratio(to_floor),
            ratio(to_baseline)
        );
        self.figures.push(Figure { name: name.to_owned(), value, unit, to_floor, to_baseline });
    }

    /// The value of a figure of this run.
    pub(crate) fn value(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|figure| figure.name == name).map(|figure| figure.value)
    }

    /// Writes `summary.json` and `summary.md` into `target/bench`.
    pub(crate) fn write_summary(&self, machine: &str) -> anyhow::Result<()> {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
        fs::create_dir_all(&dir)?;
        let figures: Vec<_> = self
            .figures
            .iter()
            .map(|figure| {
                json!({"name": figure.name, "value": figure.value, "unit": figure.unit,
                       "to_floor": figure.to_floor, "to_baseline": figure.to_baseline})
            })
            .collect();
        let summary = json!({"machine": machine, "figures": figures});
        fs::write(dir.join("summary.json"), serde_json::to_string_pretty(&summary)? + "\n")?;

        let mut table = format!("{machine}\n\n| figure | value | unit | to its floor |\n|---|---|---|---|\n");
        for figure in &self.figures {
            let to_floor = figure.to_floor.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
            writeln!(
                table,
                "| `{}` | {} | {} | {to_floor} |",
                figure.name,
                short(figure.value),
                figure.unit
            )?;
        }
        fs::write(dir.join("summary.md"), table)?;
        println!("\nwritten: {}/summary.json and summary.md", dir.display());
        Ok(())
    }

    /// Makes the figures of this run the baseline; others stay.
    pub(crate) fn record(&self) -> anyhow::Result<()> {
        let mut baseline = self.baseline.clone();
        baseline.extend(self.figures.iter().map(|figure| (figure.name.clone(), figure.value)));
        let rounded: BTreeMap<_, _> =
            baseline.into_iter().map(|(name, value)| (name, (value * 1000.0).round() / 1000.0)).collect();
        Ok(fs::write(&self.baseline_path, serde_json::to_string_pretty(&rounded)? + "\n")?)
    }

    /// Fails if a figure of this run is not as it must be: one that is counted, or one of
    /// what a provider in trouble does to the others.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let is_isolation = |figure: &&Figure| figure.name.starts_with(ISOLATION) && figure.to_floor.is_some();
        let isolation: Vec<_> = self.figures.iter().filter(is_isolation).collect();
        let moved: Vec<_> = isolation
            .iter()
            .filter(|figure| figure.to_floor.is_none_or(|ratio| ratio > 1.0 + MOVES_MAX))
            .map(|figure| format!("{} {:.2}", figure.name, figure.to_floor.unwrap_or(f64::NAN)))
            .collect();
        ensure!(moved.is_empty(), "over 10 % above what it is when all are healthy: {}", moved.join(", "));
        if isolation.is_empty() { self.check_counted() } else { Ok(()) }
    }

    /// Fails if a counted figure has grown, or was never recorded.
    fn check_counted(&self) -> anyhow::Result<()> {
        let is_counted = |figure: &&Figure| COUNTED.iter().any(|counted| figure.unit.starts_with(counted));
        let counted: Vec<_> = self.figures.iter().filter(is_counted).collect();
        ensure!(!counted.is_empty(), "nothing was counted: it needs valgrind and the group \"instructions\"");
        let grown: Vec<_> = counted
            .into_iter()
            .filter(|figure| figure.to_baseline.is_none_or(|ratio| ratio > GROWTH_MAX))
            .map(|figure| format!("{} {:.1}", figure.name, figure.value))
            .collect();
        ensure!(grown.is_empty(), "over 3 % above the recorded baseline, or not in it: {}", grown.join(", "));
        Ok(())
    }
}

/// Three digits or more.
fn short(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The value in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

//! Funnels: what each one did that is a step.

use std::ops::Range;

use super::{
    Limits,
    chunk::Chunk,
    groups::visitor,
    select::{Rows, passing},
    snapshot::{Fold, Seen, Snapshot},
};
use crate::{
    Funnel, FunnelAnswer, Order, Scope, StoreError, Unit,
    model::{Act, Class, funnel, funnel::STEPS_MAX, funnel::WINDOW_MS_MAX},
    scope::check_filters,
};

/// What all did.
struct Acts<'q> {
    scope: &'q Scope,
    funnel: &'q Funnel,
    range_ms: Range<i64>,
    limits: &'q Limits,
    acts: Vec<(u64, Act)>,
}

/// Answers how far they came.
pub(crate) fn answer(
    snapshot: &mut Snapshot<'_>,
    scope: &Scope,
    funnel: &Funnel,
    limits: &Limits,
) -> Result<FunnelAnswer, StoreError> {
    check(funnel)?;
    let end_ms = scope.range_ms.end.saturating_add(funnel.window_ms).saturating_add(1);
    let range_ms = scope.range_ms.start..end_ms;
    let new = || Acts { scope, funnel, range_ms: range_ms.clone(), limits, acts: Vec::new() };
    let mut acts = snapshot.scan(&range_ms, new)?.acts;
    acts.sort_unstable();
    let (mut walks, mut one) = (Vec::new(), Vec::new());
    for of_one in acts.chunk_by(|(a, _), (b, _)| a == b) {
        one.clear();
        one.extend(of_one.iter().map(|(_, act)| *act));
        let walk = funnel::walk(&one, funnel.steps.len(), &scope.range_ms, funnel.window_ms, funnel.order);
        if !walk.is_empty() {
            walks.push(walk);
        }
    }
    let steps = funnel::count(&walks, funnel.steps.len());
    Ok(FunnelAnswer { steps, damaged_blocks: snapshot.damaged_blocks() })
}

fn check(funnel: &Funnel) -> Result<(), StoreError> {
    let steps = funnel.steps.len();
    if steps == 0 || steps > STEPS_MAX {
        return Err(StoreError::invalid("steps", steps, format!("1 to {STEPS_MAX}")));
    }
    if !(0..=WINDOW_MS_MAX).contains(&funnel.window_ms) {
        return Err(StoreError::invalid("window", funnel.window_ms, format!("0 to {WINDOW_MS_MAX} ms")));
    }
    funnel.steps.iter().try_for_each(|step| check_filters(&step.filters))
}

impl Fold for Acts<'_> {
    fn take(&mut self, chunk: &mut Chunk<'_>, seen: &Seen<'_>) -> Result<(), StoreError> {
        let Some(rows) = Rows::of(chunk, self.scope, &self.range_ms)? else { return Ok(()) };
        let mut steps = vec![0_u16; rows.times.len()];
        for (index, step) in self.funnel.steps.iter().enumerate() {
            match passing(chunk, &step.filters)? {
                None => steps.iter_mut().for_each(|steps| *steps |= 1 << index),
                Some(passing) => {
                    steps
                        .iter_mut()
                        .zip(passing)
                        .for_each(|(steps, passes)| *steps |= u16::from(passes) << index);
                }
            }
        }
        let who = match self.funnel.unit {
            Unit::Visitor | Unit::User => chunk.who(true)?,
            Unit::Session => chunk.sessions()?,
        };
        let visitors = seen.visitors(&who);
        let is_strict = self.funnel.order == Order::Strict;
        for row in rows.range.clone().filter(|row| rows.counts(*row)) {
            let steps = if rows.matches(row) { steps[row] } else { 0 };
            let breaks = is_strict && matches!(rows.class(row), Class::View | Class::Action);
            if steps == 0 && !breaks {
                continue;
            }
            let (code, time_ms) = (who.codes[row] as usize, rows.times[row]);
            let key = who.keys[code];
            let unit = match self.funnel.unit {
                Unit::Visitor => visitor(&who, &visitors, code, time_ms),
                // Keys of users are odd, and those of sessions that gaps divide.
                Unit::User if key & 1 == 1 => visitor(&who, &visitors, code, time_ms),
                Unit::Session if key & 1 == 0 => key,
                Unit::User | Unit::Session => 0,
            };
            if unit != 0 {
                self.acts.push((unit, Act { time_ms, steps }));
            }
        }
        self.check()
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.acts.extend(other.acts);
        self.check()
    }
}

impl Acts<'_> {
    fn check(&self) -> Result<(), StoreError> {
        if self.acts.len() > self.limits.acts_max {
            return Err(StoreError::TooExpensive(format!(
                "over {} events are a step; narrow the range or the steps",
                self.limits.acts_max
            )));
        }
        Ok(())
    }
}

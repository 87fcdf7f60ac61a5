//! Funnels: what each one did that is a step.

use std::ops::Range;

use super::{
    chunk::Chunk,
    groups::visitor,
    seam::{Fold, Scan, Seen, Wants},
    select::{Rows, passing},
};
use crate::{
    Field, Filter, Funnel, FunnelAnswer, Limits, Order, Scope, StoreError, Unit,
    model::{Act, Class, funnel, funnel::STEPS_MAX, funnel::WINDOW_MS_MAX},
    scope::check_filters,
};

/// Acts are kept apart by the first bits of whose they are: what is sorted together fits the
/// processor's cache.
const DRAWERS: usize = 64;

/// What all did.
struct Acts<'q> {
    scope: &'q Scope,
    funnel: &'q Funnel,
    range_ms: Range<i64>,
    limits: &'q Limits,
    count: usize,
    drawers: Vec<Vec<(u64, Act)>>,
}

/// Answers how far they came.
pub(crate) fn answer(
    snapshot: &mut impl Scan,
    scope: &Scope,
    funnel: &Funnel,
    limits: &Limits,
) -> Result<FunnelAnswer, StoreError> {
    check(funnel)?;
    let end_ms = scope.range_ms.end.saturating_add(funnel.window_ms).saturating_add(1);
    let range_ms = scope.range_ms.start..end_ms;
    let new = || Acts {
        scope,
        funnel,
        range_ms: range_ms.clone(),
        limits,
        count: 0,
        drawers: vec![Vec::new(); DRAWERS],
    };
    let acts = snapshot.scan(&range_ms, new)?;
    let (mut walks, mut one) = (Vec::new(), Vec::new());
    for mut acts in acts.drawers {
        acts.sort_unstable();
        for (turn, of_one) in acts.chunk_by(|(a, _), (b, _)| a == b).enumerate() {
            if turn % 256 == 0 || of_one.len() > 1_000 {
                snapshot.check()?;
            }
            one.clear();
            one.extend(of_one.iter().map(|(_, act)| *act));
            let walk =
                funnel::walk(&one, funnel.steps.len(), &scope.range_ms, funnel.window_ms, funnel.order);
            if !walk.is_empty() {
                walks.push(walk);
            }
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
    fn wants(&self) -> Wants {
        let is_by_session = self.funnel.unit == Unit::Session;
        let filters = self.funnel.steps.iter().flat_map(|step| &step.filters);
        let wants = filters.fold(Wants::of(self.scope), |wants, filter| wants.field(&filter.field));
        Wants { who: !is_by_session, sessions: is_by_session, ..wants }
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        let Some(rows) = Rows::of(chunk, self.scope, &self.range_ms)? else { return Ok(()) };
        let steps = steps_of(chunk, self.funnel, rows.times.len())?;
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
                self.count += 1;
                self.drawers[(unit >> 58) as usize].push((unit, Act { time_ms, steps }));
            }
        }
        self.check()
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.count += other.count;
        self.drawers.iter_mut().zip(other.drawers).for_each(|(ours, theirs)| ours.extend(theirs));
        self.check()
    }
}

/// Of each row the steps that it passes, a bit for each. Steps of one filter on one field
/// are asked together: each value once, and each row once.
fn steps_of(chunk: &mut dyn Chunk, funnel: &Funnel, rows: usize) -> Result<Vec<u16>, StoreError> {
    let mut steps = vec![0_u16; rows];
    let mut by_field: Vec<(&Field, Vec<(usize, &Filter)>)> = Vec::new();
    for (index, step) in funnel.steps.iter().enumerate() {
        if let [filter] = &step.filters[..] {
            match by_field.iter_mut().find(|(field, _)| **field == filter.field) {
                Some((_, filters)) => filters.push((index, filter)),
                None => by_field.push((&filter.field, vec![(index, filter)])),
            }
            continue;
        }
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
    for (field, filters) in by_field {
        let values = chunk.field(field)?;
        let bits = |code| {
            let value = values.get(code);
            let passed = filters.iter().filter(|(_, filter)| filter.passes(value.as_deref()));
            passed.fold(0, |bits, (index, _)| bits | 1 << index)
        };
        let bits: Vec<u16> = (0..values.codes() as u32).map(bits).collect();
        let codes = values.column.codes.iter();
        steps.iter_mut().zip(codes).for_each(|(steps, code)| *steps |= bits[*code as usize]);
    }
    Ok(steps)
}

impl Acts<'_> {
    fn check(&self) -> Result<(), StoreError> {
        if self.count > self.limits.acts_max {
            return Err(StoreError::TooExpensive(format!(
                "over {} events are a step; narrow the range or the steps",
                self.limits.acts_max
            )));
        }
        Ok(())
    }
}

//! Many events in one call: cut into items, put one by one, answered together or each.

use std::collections::BTreeMap;

use hyper::{StatusCode, header::RETRY_AFTER};
use serde::Serialize;

use super::{
    integrations::Destinations,
    item::{Beside, Call, Came, Item, NAMES},
    json::{Items, List, fields_and_items},
    keeping::Keeping,
    reply::{Problem, Reply, described, json, name_here, success, whole_seconds},
    route::Form,
    scan::Raw,
    schema::{self, Schemas, Stated},
    website,
};
use crate::{
    admission::{
        Accepted, Admission, PutBatch,
        context::CallContext,
        denied::{Denied, Violation},
    },
    ingest::limits::{HTTP_BATCH_ITEMS_MAX, HTTP_INGESTION_ITEMS_MAX},
    reasons::RefusalReason,
};

/// Most bytes of what stands beside the items, as often as it stands for one: it becomes
/// a part of each of them.
const BESIDE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// About what an event holds of memory beside its JSON.
const EVENT_BYTES_BESIDE_JSON: usize = 300;

/// What a batch has beside its items.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    items: Vec<Item<'a>>,
    /// Items of another form, or another schema than the current one, by their places:
    /// what they become, or why they do not.
    rewritten: BTreeMap<usize, Result<String, Violation>>,
    /// Its only item is the body itself.
    pub(super) is_one: bool,
    beside: Beside<'a>,
    pub(super) write_key: Option<Raw<'a>>,
    pub(super) stated: Stated,
    /// The caller reads an answer for each item.
    pub(super) wants_answers: bool,
}

impl<'a> Batch<'a> {
    /// Cuts a body into its items. The version of the call is what its head and query
    /// say, and it.
    pub(super) fn of(
        text: &'a str,
        form: Form,
        schemas: Schemas,
        version_of_call: impl FnOnce(Option<Raw<'_>>) -> Result<Stated, Problem>,
    ) -> Result<Self, Problem> {
        let (list_name, items_max) = match form {
            Form::Segment => ("batch", HTTP_BATCH_ITEMS_MAX),
            Form::Ingestion | Form::Website => ("events", HTTP_INGESTION_ITEMS_MAX),
        };
        let names = ["context", "integrations", "sentAt", "writeKey", "answers", schema::FIELD];
        let (values, list) =
            fields_and_items(text, &names, List { name: list_name, items_max, names: &NAMES })
                .map_err(|error| not_json(text, &error))?;
        let [context, integrations, sent_at, write_key, answers, version] = values;
        let is_one = list.is_none() && form == Form::Website;
        let (items, count) = match list {
            Some(Items::List(items, count)) => (items, count),
            None if is_one => (vec![Item::of(text, &NAMES).map_err(|error| not_json(text, &error))?], 1),
            Some(Items::NoList) | None => return Err(no_list(list_name)),
        };
        if count == 0 {
            return Err(Problem::malformed(list_name, "got an empty list, want at least one event"));
        }
        if count > items_max {
            return Err(Problem::malformed(
                list_name,
                format!("got {count} events, want at most {items_max}"),
            ));
        }
        let wants_answers = answers.is_some_and(|answers| matches!(answers.get(), "1" | "true"));
        let beside_bytes =
            [context, integrations, sent_at].iter().flatten().map(|value| value.get().len()).sum::<usize>();
        if beside_bytes * count > BESIDE_BYTES_MAX {
            let got = format!("got {beside_bytes} bytes for each of {count} events");
            let want = format!("want at most {BESIDE_BYTES_MAX} for all together");
            return Err(Problem::malformed("context", format!("{got}, {want}")));
        }
        let stated = version_of_call(version)?;
        let mut rewritten = BTreeMap::new();
        let are_rewritten = form == Form::Website || stated.version != schemas.current();
        for (place, item) in items.iter().enumerate() {
            if are_rewritten || item.schema_version().is_some() {
                let current = rewrite(item, form, schemas, stated.version).transpose();
                rewritten.extend(current.map(|current| (place, current)));
            }
        }
        let beside = match form {
            // Whose address and browser it was only the connection says.
            Form::Website => Beside::default(),
            _ => Beside { context, integrations, sent_at },
        };
        Ok(Self { items, rewritten, is_one, beside, write_key, stated, wants_answers })
    }

    /// Puts it into the queue: as far as it can be taken if its caller reads an answer for
    /// each event, else all of it or nothing.
    pub(super) async fn put(
        &self,
        form: Form,
        came: Came<'a>,
        destinations: &'a Destinations,
        (admission, context): (&Admission, &CallContext<'_>),
    ) -> PutBatch {
        let call = Call::new(form, came, self.beside, destinations);
        let drafts = self.items.iter().enumerate().map(|(place, item)| match self.rewritten.get(&place) {
            None => call.read(item, None),
            Some(Ok(current)) => call.read_text(current, None),
            Some(Err(violation)) => Err(violation.clone()),
        });
        if form == Form::Ingestion || self.wants_answers {
            return admission.put_batch(drafts, context);
        }
        let found_out = if came.caller.is_direct { admission.enriched_bytes() } else { 0 };
        admission.put_whole_batch(drafts, self.memory_bytes(found_out), context).await
    }

    /// About what its events will hold, to each of which so much is added.
    fn memory_bytes(&self, added_bytes: usize) -> usize {
        let context = self.beside.context.map_or(0, |context| context.get().len());
        let beside = EVENT_BYTES_BESIDE_JSON + context + added_bytes;
        self.items.iter().map(|item| item.raw.get().len() + beside).sum()
    }
}

impl Batch<'_> {
    /// True if the caller reads what is wrong with each item.
    fn is_answered_by_item(&self, form: Form) -> bool {
        form != Form::Segment || self.wants_answers
    }

    /// What is kept of it: what nobody is told of, and what a newer relay will understand.
    /// Nothing of a user who is erased, or declines where such events go to nobody.
    pub(super) fn keeping(
        &self,
        form: Form,
        puts: &PutBatch,
        came: Came<'_>,
        admission: &Admission,
    ) -> Keeping {
        let mut keeping = Keeping::of(admission.ip_policy());
        // What is kept is sent as Segment's form.
        if form == Form::Website || came.caller.is_declined && admission.drops_declined() {
            return keeping;
        }
        for (place, violation) in puts.invalid() {
            if violation.reason == RefusalReason::UserSuppressed {
                continue;
            }
            let is_newer = violation.reason == RefusalReason::SchemaNewer;
            if is_newer || !self.is_answered_by_item(form) {
                let item = &self.items[place];
                let version = Schemas::of_item(item.schema_version(), self.stated.version);
                let version = version.unwrap_or(self.stated.version);
                keeping.add((place, item.raw), violation, self.beside, version, came);
            }
        }
        keeping
    }

    /// True if its caller sends all of it again, whatever became of some.
    pub(super) fn is_sent_again(
        form: Form,
        wants_answers: bool,
        answers: &[Result<Accepted, Denied>],
    ) -> bool {
        form == Form::Segment && !wants_answers && deferred(answers).is_some()
    }
}

fn no_list(name: &'static str) -> Problem {
    Problem::malformed(name, format!("want a list of events in {name:?}"))
}

/// An item as one of Segment's form and the current schema; nothing if it is that already.
fn rewrite(item: &Item<'_>, form: Form, schemas: Schemas, of_call: u32) -> Result<Option<String>, Violation> {
    let (json, version) = (item.raw.get(), Schemas::of_item(item.schema_version(), of_call)?);
    let current = schemas.upcast(json, version)?;
    if form != Form::Website {
        return Ok(current);
    }
    let of_segment = website::as_segment(current.as_deref().unwrap_or(json))?;
    Ok(of_segment.or(current))
}

/// A body that is no JSON object.
pub(super) fn not_json(text: &str, error: &serde_json::Error) -> Problem {
    let got = if text.trim().is_empty() { "an empty body".to_owned() } else { format!("{error}") };
    Problem::malformed("", format!("want a JSON object: {got}"))
}

/// The answer to a batch of website analytics, or to its only event.
pub(super) fn reply_of_website(answers: &[Result<Accepted, Denied>], is_one: bool) -> Reply {
    match (deferred(answers), answers) {
        (Some(denied), _) => Problem::Denied(denied.clone()).reply(Form::Website),
        (None, [Ok(accepted)]) if is_one => website::reply_to_one(accepted),
        (None, [Err(denied)]) if is_one && denied.is_of_suppressed_user() => success(),
        (None, [Err(denied)]) if is_one => Problem::Denied(denied.clone()).reply(Form::Website),
        (None, answers) => website::reply_to_many(answers),
    }
}

/// Segment's answer to a whole batch. Its SDKs read the status and nothing else: if some
/// of it was deferred they send all of it again, and what was taken twice is known by its
/// id. What is refused always will be, and is not sent again for.
pub(super) fn reply_of_segment(answers: &[Result<Accepted, Denied>]) -> Reply {
    match deferred(answers) {
        Some(denied) => Problem::Denied(denied.clone()).reply(Form::Segment),
        None => success(),
    }
}

/// The one that stands for all that are to be sent again: the longest wait.
fn deferred(answers: &[Result<Accepted, Denied>]) -> Option<&Denied> {
    let denied = answers.iter().filter_map(|answer| answer.as_ref().err());
    denied.filter(|denied| denied.retry_delay().is_some()).max_by_key(|denied| denied.retry_delay())
}

#[derive(Serialize)]
struct FieldError<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    field: &'a str,
    code: &'static str,
    message: String,
}

fn errors(violations: &[Violation]) -> Vec<FieldError<'_>> {
    let errors = violations.iter().map(|violation| FieldError {
        field: name_here(&violation.field),
        code: violation.reason.name(),
        message: described(violation),
    });
    errors.collect()
}

/// The ingestion API's answer: for each event, and 202, 207, or 429 if there is room for
/// none.
pub(super) fn reply_of_ingestion(answers: &[Result<Accepted, Denied>], warning: Option<&str>) -> Reply {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer<'a> {
        success: bool,
        accepted: usize,
        rejected: usize,
        deferred: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u128>,
        #[serde(skip_serializing_if = "Option::is_none")]
        warning: Option<&'a str>,
        results: Vec<Outcome<'a>>,
    }
    #[derive(Serialize)]
    #[serde(tag = "status", rename_all = "lowercase")]
    enum Outcome<'a> {
        #[serde(rename_all = "camelCase")]
        Accepted {
            index: usize,
            event_id: &'a str,
        },
        Rejected {
            index: usize,
            errors: Vec<FieldError<'a>>,
        },
        Deferred {
            index: usize,
            code: &'static str,
        },
    }
    let (mut accepted, mut rejected, mut later) = (0, 0, 0);
    let results = answers.iter().enumerate().map(|(index, answer)| match answer {
        Ok(taken) => {
            accepted += 1;
            Outcome::Accepted { index, event_id: taken.event_id.as_str() }
        }
        Err(Denied::Invalid(violations)) => {
            rejected += 1;
            Outcome::Rejected { index, errors: errors(violations) }
        }
        Err(denied) => {
            later += 1;
            Outcome::Deferred { index, code: denied.reason().name() }
        }
    });
    let results = results.collect();
    let delay = deferred(answers);
    let status = match delay {
        Some(denied) if later == answers.len() => Problem::Denied(denied.clone()).status(Form::Ingestion),
        _ if rejected + later > 0 => StatusCode::MULTI_STATUS,
        _ => StatusCode::ACCEPTED,
    };
    let wait = delay.and_then(Denied::retry_delay);
    let retry_after_ms = wait.map(|wait| wait.as_millis());
    let success = accepted == answers.len();
    let answer = Answer { success, accepted, rejected, deferred: later, retry_after_ms, warning, results };
    let mut reply = json(status, &answer);
    if let Some(wait) = wait.filter(|_| later == answers.len()) {
        reply.headers_mut().insert(RETRY_AFTER, whole_seconds(wait));
    }
    reply
}

/// The answer of Segment's form to who reads one: what was refused and what is to be sent
/// again, by its place.
pub(super) fn reply_with_answers(answers: &[Result<Accepted, Denied>], warning: Option<&str>) -> Reply {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer<'a> {
        success: bool,
        accepted: usize,
        refused: Vec<Refused<'a>>,
        deferred: Vec<Deferred>,
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u128>,
        #[serde(skip_serializing_if = "Option::is_none")]
        warning: Option<&'a str>,
    }
    #[derive(Serialize)]
    struct Refused<'a> {
        index: usize,
        violations: Vec<ReasonOfField<'a>>,
    }
    #[derive(Serialize)]
    struct ReasonOfField<'a> {
        reason: &'static str,
        field: &'a str,
        description: String,
    }
    #[derive(Serialize)]
    struct Deferred {
        index: usize,
        reason: &'static str,
    }
    let (mut refused, mut later) = (Vec::new(), Vec::new());
    for (index, answer) in answers.iter().enumerate() {
        match answer {
            Ok(_) => {}
            Err(Denied::Invalid(violations)) => {
                let violations = violations.iter().map(|violation| ReasonOfField {
                    reason: violation.reason.name(),
                    field: name_here(&violation.field),
                    description: described(violation),
                });
                refused.push(Refused { index, violations: violations.collect() });
            }
            Err(denied) => later.push(Deferred { index, reason: denied.reason().name() }),
        }
    }
    let retry_after_ms = deferred(answers).and_then(Denied::retry_delay).map(|delay| delay.as_millis());
    let accepted = answers.len() - refused.len() - later.len();
    let answer = Answer { success: true, accepted, refused, deferred: later, retry_after_ms, warning };
    json(StatusCode::OK, &answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_asked_for_what_each_event_will_hold() {
        let [context, one, two] = [r#"{"locale":"de"}"#, r#"{"event":"x"}"#, r#"{"event":"yy"}"#];
        let text = format!(r#"{{"context":{context},"batch":[{one}, {two}]}}"#);
        let stated = |_: Option<Raw<'_>>| Ok(Stated { version: 1, warning: None });
        let batch = Batch::of(&text, Form::Segment, Schemas::KNOWN, stated).unwrap();
        let each = EVENT_BYTES_BESIDE_JSON + context.len();
        assert_eq!(batch.memory_bytes(0), one.len() + two.len() + 2 * each);
        assert_eq!(batch.memory_bytes(1000), batch.memory_bytes(0) + 2000);
    }
}

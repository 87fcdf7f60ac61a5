//! Many events in one call: cut into items, put one by one, answered together or each.

use hyper::{StatusCode, header::RETRY_AFTER};
use serde::Serialize;
use serde_json::value::RawValue;

use super::{
    integrations::Destinations,
    item::{Beside, Call, Caller},
    json::{fields, items},
    reply::{Problem, Reply, described, json, name_here, success, whole_seconds},
    route::Form,
};
use crate::{
    admission::{
        Accepted, Admission, PutBatch,
        denied::{Denied, Violation},
    },
    ingest::limits::{HTTP_BATCH_ITEMS_MAX, HTTP_INGESTION_ITEMS_MAX},
};

/// Most bytes of what stands beside the items, as often as it stands for one: it becomes
/// a part of each of them.
const BESIDE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// About what an event holds of memory beside its JSON.
const EVENT_BYTES_BESIDE_JSON: usize = 300;

/// What a batch has beside its items.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    items: Vec<&'a RawValue>,
    beside: Beside<'a>,
    pub(super) write_key: Option<&'a RawValue>,
    /// The caller reads an answer for each item.
    pub(super) wants_answers: bool,
}

impl<'a> Batch<'a> {
    /// Cuts a body into its items.
    pub(super) fn of(text: &'a str, form: Form) -> Result<Self, Problem> {
        let (list_name, items_max) = match form {
            Form::Segment => ("batch", HTTP_BATCH_ITEMS_MAX),
            Form::Ingestion => ("events", HTTP_INGESTION_ITEMS_MAX),
        };
        let names = [list_name, "context", "integrations", "sentAt", "writeKey", "answers"];
        let [list, context, integrations, sent_at, write_key, answers] =
            fields(text, &names).map_err(|error| not_json(text, &error))?;
        let list = list.ok_or_else(|| {
            Problem::malformed(list_name, format!("got nothing, want a list of events in {list_name:?}"))
        })?;
        let (items, count) = items(list.get(), items_max)
            .map_err(|error| Problem::malformed(list_name, format!("want a list of events: {error}")))?;
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
            [context, integrations].iter().flatten().map(|value| value.get().len()).sum::<usize>();
        if beside_bytes * count > BESIDE_BYTES_MAX {
            let got = format!("got {beside_bytes} bytes for each of {count} events");
            let want = format!("want at most {BESIDE_BYTES_MAX} for all together");
            return Err(Problem::malformed("context", format!("{got}, {want}")));
        }
        let beside = Beside { context, integrations, sent_at };
        Ok(Self { items, beside, write_key, wants_answers })
    }

    /// Puts it into the queue: as far as it can be taken if its caller reads an answer for
    /// each event, else all of it or nothing.
    pub(super) async fn put(
        &self,
        form: Form,
        caller: (Caller<'a>, bool),
        destinations: &'a Destinations,
        admission: &Admission,
    ) -> PutBatch {
        let call = Call::new(form, admission.now_ms(), caller, self.beside, destinations);
        let drafts = self.items.iter().map(|item| call.read(item.get(), None));
        if form == Form::Ingestion || self.wants_answers {
            return admission.put_batch(drafts);
        }
        let bytes = self.items.iter().map(|item| item.get().len() + EVENT_BYTES_BESIDE_JSON).sum();
        admission.put_whole_batch(drafts, bytes).await
    }
}

/// A body that is no JSON object.
pub(super) fn not_json(text: &str, error: &serde_json::Error) -> Problem {
    let got = if text.trim().is_empty() { "an empty body".to_owned() } else { format!("{error}") };
    Problem::malformed("", format!("want a JSON object: {got}"))
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
pub(super) fn reply_of_ingestion(answers: &[Result<Accepted, Denied>]) -> Reply {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer<'a> {
        success: bool,
        accepted: usize,
        rejected: usize,
        deferred: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u128>,
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
    let mut reply =
        json(status, &Answer { success, accepted, rejected, deferred: later, retry_after_ms, results });
    if let Some(wait) = wait.filter(|_| later == answers.len()) {
        reply.headers_mut().insert(RETRY_AFTER, whole_seconds(wait));
    }
    reply
}

/// The answer of Segment's form to who reads one: what was refused and what is to be sent
/// again, by its place.
pub(super) fn reply_with_answers(answers: &[Result<Accepted, Denied>]) -> Reply {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer<'a> {
        success: bool,
        accepted: usize,
        refused: Vec<Refused<'a>>,
        deferred: Vec<Deferred>,
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u128>,
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
    json(StatusCode::OK, &Answer { success: true, accepted, refused, deferred: later, retry_after_ms })
}

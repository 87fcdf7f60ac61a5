//! Questions and answers as messages, and why there is none as a status.

use std::collections::HashMap;

use analytics_relay_store::TenantScope;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::refusal::DOMAIN;
use crate::{
    proto::v1::{
        EventCount as EventCountMessage, GetEventCountRequest, GetEventCountResponse, GetUserCountRequest,
        GetUserCountResponse,
    },
    query::{
        Answer, Known, Period, Question, Report, Unanswered,
        event_count::{EventCount, GroupBy},
        unanswered::Fault,
        user_count::UserCount,
    },
};

/// Whoever reaches the port may ask, as they may send. There is one tenant.
fn of_caller() -> TenantScope {
    TenantScope::tenant("")
}

pub(super) fn event_count(request: GetEventCountRequest) -> Result<Question, Unanswered> {
    let GetEventCountRequest { event_name, start_time, end_time, group_by } = request;
    let (period, group_by) = (Period::of_seconds(start_time, end_time), GroupBy::named(&group_by));
    let report = match (group_by, &period) {
        (Ok(group_by), Ok(_)) => EventCount::new(event_name, group_by)?,
        (group_by, period) => return Err(every_fault(group_by.err(), period.clone().err())),
    };
    Ok(Question { of: of_caller(), period: period?, include_bots: false, report: Report::EventCount(report) })
}

pub(super) fn user_count(request: GetUserCountRequest) -> Result<Question, Unanswered> {
    let period = Period::of_seconds(request.start_time, request.end_time)?;
    Ok(Question { of: of_caller(), period, include_bots: false, report: Report::UserCount(UserCount) })
}

/// All that is wrong at once, the period first.
fn every_fault(of_rest: Option<Unanswered>, of_period: Option<Unanswered>) -> Unanswered {
    let faults = |unanswered: Unanswered| -> Vec<Fault> {
        match unanswered {
            Unanswered::Invalid(faults) => faults,
            _ => Vec::new(),
        }
    };
    Unanswered::Invalid([of_period, of_rest].into_iter().flatten().flat_map(faults).collect())
}

pub(super) fn event_count_response(known: &Known) -> Result<GetEventCountResponse, Status> {
    let Answer::EventCount(counts) = &known.answer else { return Err(Unanswered::Defect.into()) };
    let message = |count: &crate::query::event_count::NamedCount| EventCountMessage {
        event_name: count.name.clone(),
        timestamp: count.start_ms.div_euclid(1000),
        count: whole(count.events),
    };
    Ok(GetEventCountResponse { counts: counts.iter().map(message).collect() })
}

pub(super) fn user_count_response(known: &Known) -> Result<GetUserCountResponse, Status> {
    let Answer::UserCount(users) = &known.answer else { return Err(Unanswered::Defect.into()) };
    Ok(GetUserCountResponse { unique_users: whole(users.unique_users) })
}

fn whole(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl From<Unanswered> for Status {
    fn from(unanswered: Unanswered) -> Self {
        let code = match &unanswered {
            Unanswered::Invalid(_) => Code::InvalidArgument,
            Unanswered::NoStore => Code::Unimplemented,
            Unanswered::TooExpensive(_) | Unanswered::TooMany => Code::ResourceExhausted,
            Unanswered::Late => Code::DeadlineExceeded,
            Unanswered::Unavailable(_) | Unanswered::Draining => Code::Unavailable,
            Unanswered::Damaged(_) => Code::DataLoss,
            Unanswered::Defect => Code::Internal,
        };
        let mut details = match unanswered.retry_delay() {
            Some(delay) => ErrorDetails::with_retry_info(Some(delay)),
            None => ErrorDetails::new(),
        };
        if let Unanswered::Invalid(faults) = &unanswered {
            let violations: Vec<_> = faults.iter().map(field_violation).collect();
            details.set_bad_request(violations);
        }
        details.set_error_info(unanswered.reason(), DOMAIN, HashMap::new());
        Self::with_error_details(code, unanswered.message(), details)
    }
}

fn field_violation(fault: &Fault) -> FieldViolation {
    FieldViolation {
        field: fault.field.clone(),
        description: fault.described(),
        reason: fault.kind.name().to_owned(),
        localized_message: None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_rule_that_a_question_breaks_is_told_at_once() {
        let request = GetEventCountRequest {
            start_time: 7,
            end_time: 7,
            group_by: "month".into(),
            ..Default::default()
        };
        let status = Status::from(event_count(request).unwrap_err());
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        let told: Vec<_> = violations.iter().map(|it| (it.field.as_str(), it.reason.as_str())).collect();
        assert_eq!(told, [("end_time", "TIME_RANGE_INVALID"), ("group_by", "INVALID_PARAMETER")]);
        assert_eq!(violations[1].description, "got \"month\", want day, hour or week");
        assert_eq!(details.error_info().unwrap().reason, "TIME_RANGE_INVALID");
    }

    #[test]
    fn a_name_that_no_event_can_have_is_refused_and_not_told_whole() {
        let request = GetEventCountRequest {
            event_name: "é".repeat(20_000),
            end_time: 7,
            group_by: "day".into(),
            ..Default::default()
        };
        let status = Status::from(event_count(request).unwrap_err());
        assert!(status.message().len() < 200, "{}", status.message());
        assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, "event_name");
    }

    #[test]
    fn who_may_ask_again_is_told_when() {
        for (unanswered, code, is_to_retry) in [
            (Unanswered::TooMany, Code::ResourceExhausted, true),
            (Unanswered::Unavailable("canary".into()), Code::Unavailable, true),
            (Unanswered::Draining, Code::Unavailable, true),
            (Unanswered::TooExpensive("x".into()), Code::ResourceExhausted, false),
            (Unanswered::Late, Code::DeadlineExceeded, false),
            (Unanswered::NoStore, Code::Unimplemented, false),
            (Unanswered::Damaged("canary".into()), Code::DataLoss, false),
            (Unanswered::Defect, Code::Internal, false),
        ] {
            let reason = unanswered.reason();
            let status = Status::from(unanswered);
            assert!(!status.message().contains("canary"), "{status:?}");
            let details = status.get_error_details();
            assert_eq!((status.code(), details.error_info().unwrap().reason.as_str()), (code, reason));
            let delay = details.retry_info().and_then(|info| info.retry_delay);
            assert_eq!(delay, is_to_retry.then_some(Duration::from_secs(1)), "{reason}");
        }
    }
}

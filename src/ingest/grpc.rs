//! The gRPC front door: `analytics.v1.AnalyticsService`. The generated types
//! stop here.

use std::{collections::HashMap, sync::Arc};

use analytics_relay_providers::{
    Properties,
    properties::{PropertiesWriter, PropertyError},
};
use tonic::{Request, Response, Status};

use crate::{
    admission::{Accepted, Admission, Draft, DraftKind},
    health::Health,
    proto::v1::{
        self, Durability, EventContext, GetEventCountRequest, GetEventCountResponse, GetUserCountRequest,
        GetUserCountResponse, HealthCheckRequest, HealthCheckResponse, IdentifyUserRequest,
        IdentifyUserResponse, PropertyValue, TrackEventRequest, TrackEventResponse,
        analytics_service_server::AnalyticsService, property_value::Value,
    },
    queue,
};

/// Answers the calls of `AnalyticsService`.
#[derive(Debug)]
pub(crate) struct GrpcFrontDoor {
    admission: Arc<Admission>,
    health: Arc<Health>,
}

impl GrpcFrontDoor {
    pub(crate) fn new(admission: Arc<Admission>, health: Arc<Health>) -> Self {
        Self { admission, health }
    }
}

#[tonic::async_trait]
impl AnalyticsService for GrpcFrontDoor {
    async fn track_event(
        &self,
        request: Request<TrackEventRequest>,
    ) -> Result<Response<TrackEventResponse>, Status> {
        let draft = track_draft(request.into_inner());
        let Accepted { event_id, durability } = self.admission.admit(draft).await?;
        Ok(Response::new(TrackEventResponse {
            success: true,
            event_id: event_id.to_string(),
            durability: Durability::from(durability).into(),
        }))
    }

    async fn identify_user(
        &self,
        request: Request<IdentifyUserRequest>,
    ) -> Result<Response<IdentifyUserResponse>, Status> {
        let draft = identify_draft(request.into_inner());
        let Accepted { event_id, durability } = self.admission.admit(draft).await?;
        Ok(Response::new(IdentifyUserResponse {
            success: true,
            event_id: event_id.to_string(),
            durability: Durability::from(durability).into(),
        }))
    }

    async fn get_event_count(
        &self,
        _request: Request<GetEventCountRequest>,
    ) -> Result<Response<GetEventCountResponse>, Status> {
        Err(needs_store("GetEventCount"))
    }

    async fn get_user_count(
        &self,
        _request: Request<GetUserCountRequest>,
    ) -> Result<Response<GetUserCountResponse>, Status> {
        Err(needs_store("GetUserCount"))
    }

    async fn health_check(
        &self,
        _request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse { status: self.health.status() }))
    }
}

fn needs_store(method: &str) -> Status {
    Status::unimplemented(format!(
        "{method} will be served by the event store, a provider of its own that this version does not have; \
         ask your analytics provider until then"
    ))
}

fn track_draft(request: TrackEventRequest) -> Draft {
    let time_ms = match (request.timestamp_ms, request.timestamp) {
        (0, 0) => None,
        (0, seconds) => Some(("timestamp", seconds.saturating_mul(1000))),
        (millis, _) => Some(("timestamp_ms", millis)),
    };
    let EventContext { ip, user_agent } = request.context.unwrap_or_default();
    Draft {
        kind: DraftKind::Track { event_name: request.event_name },
        event_id: request.event_id,
        user_id: request.user_id,
        anonymous_id: request.anonymous_id,
        time_ms,
        ip,
        user_agent,
        properties: encode_properties(&request.properties),
        durability: asked_durability(request.durability),
    }
}

fn identify_draft(request: IdentifyUserRequest) -> Draft {
    let EventContext { ip, user_agent } = request.context.unwrap_or_default();
    Draft {
        kind: DraftKind::Identify,
        event_id: request.event_id,
        user_id: request.user_id,
        anonymous_id: request.anonymous_id,
        time_ms: (request.timestamp_ms != 0).then_some(("timestamp_ms", request.timestamp_ms)),
        ip,
        user_agent,
        properties: encode_properties(&request.properties),
        durability: asked_durability(request.durability),
    }
}

/// The level that a request names: none, one, or a number that means nothing.
fn asked_durability(number: i32) -> Result<Option<queue::Durability>, i32> {
    match Durability::try_from(number) {
        Ok(Durability::Unspecified) => Ok(None),
        Ok(Durability::Queued) => Ok(Some(queue::Durability::Queued)),
        Ok(Durability::Written) => Ok(Some(queue::Durability::Written)),
        Ok(Durability::Synced) => Ok(Some(queue::Durability::Synced)),
        Err(_) => Err(number),
    }
}

impl From<queue::Durability> for Durability {
    fn from(level: queue::Durability) -> Self {
        match level {
            queue::Durability::Queued => Self::Queued,
            queue::Durability::Written => Self::Written,
            queue::Durability::Synced => Self::Synced,
        }
    }
}

fn encode_properties(properties: &HashMap<String, PropertyValue>) -> Result<Properties, PropertyError> {
    let mut writer = PropertiesWriter::new();
    write_fields(&mut writer, properties)?;
    writer.finish()
}

fn write_fields(
    writer: &mut PropertiesWriter,
    fields: &HashMap<String, PropertyValue>,
) -> Result<(), PropertyError> {
    // In order of the names: a map has none, and the same event sent again
    // should become the same text.
    let mut fields: Vec<_> = fields.iter().collect();
    fields.sort_unstable_by_key(|(key, _)| *key);
    for (key, value) in fields {
        writer.key(key)?;
        write_value(writer, value).map_err(|error| error.under_key(key))?;
    }
    Ok(())
}

/// As deep as the writer allows: it refuses before the stack is in danger.
fn write_value(writer: &mut PropertiesWriter, value: &PropertyValue) -> Result<(), PropertyError> {
    match &value.value {
        None => writer.null(),
        Some(Value::StringValue(text)) => writer.string(text),
        Some(Value::NumberValue(number)) => writer.number(*number)?,
        Some(Value::BoolValue(boolean)) => writer.boolean(*boolean),
        Some(Value::IntegerValue(integer)) => writer.integer(*integer),
        Some(Value::ListValue(v1::PropertyList { values })) => {
            writer.begin_list()?;
            for (index, item) in values.iter().enumerate() {
                writer.item();
                write_value(writer, item).map_err(|error| error.under_index(index))?;
            }
            writer.end_list();
        }
        Some(Value::ObjectValue(v1::PropertyObject { fields })) => {
            writer.begin_object()?;
            write_fields(writer, fields)?;
            writer.end_object();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(value: Value) -> PropertyValue {
        PropertyValue { value: Some(value) }
    }

    fn object(
        fields: impl IntoIterator<Item = (&'static str, PropertyValue)>,
    ) -> HashMap<String, PropertyValue> {
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    #[test]
    fn properties_become_json_exactly() {
        let list =
            v1::PropertyList { values: vec![value(Value::NumberValue(1.5)), PropertyValue { value: None }] };
        let inner = v1::PropertyObject { fields: object([("x", value(Value::BoolValue(true)))]) };
        let properties = object([
            ("text", value(Value::StringValue("a\"b\u{0}é".into()))),
            ("whole", value(Value::NumberValue(3.0))),
            ("exact", value(Value::IntegerValue(9_007_199_254_740_993))),
            ("list", value(Value::ListValue(list))),
            ("object", value(Value::ObjectValue(inner))),
            ("null", PropertyValue { value: None }),
        ]);
        assert_eq!(
            encode_properties(&properties).unwrap().json(),
            "{\"exact\":9007199254740993,\"list\":[1.5,null],\"null\":null,\"object\":{\"x\":true},\
             \"text\":\"a\\\"b\\u0000é\",\"whole\":3}"
        );
    }

    #[test]
    fn a_refusal_names_the_place() {
        let bad = object([("price", value(Value::NumberValue(f64::NAN)))]);
        let list = v1::PropertyList {
            values: vec![
                PropertyValue { value: None },
                value(Value::ObjectValue(v1::PropertyObject { fields: bad })),
            ],
        };
        let error = encode_properties(&object([("items", value(Value::ListValue(list)))])).unwrap_err();
        assert_eq!(error.path, "items[1].price");
    }

    #[test]
    fn the_time_with_milliseconds_wins() {
        let time = |timestamp, timestamp_ms| {
            track_draft(TrackEventRequest { timestamp, timestamp_ms, ..Default::default() }).time_ms
        };
        assert_eq!(time(0, 0), None);
        assert_eq!(time(5, 0), Some(("timestamp", 5000)));
        assert_eq!(time(5, 7), Some(("timestamp_ms", 7)));
        assert_eq!(time(i64::MAX, 0), Some(("timestamp", i64::MAX)));
    }
}

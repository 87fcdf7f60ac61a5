//! Sends one event to a relay.
//!
//! ```sh
//! cargo run --example track -- "Order Placed" user-4821
//! RELAY_ADDR=http://relay:50054 cargo run --example track
//! ```

use std::{env, time::Duration};

use analytics_relay::proto::v1::{
    PropertyValue, TrackEventRequest, analytics_service_client::AnalyticsServiceClient, property_value::Value,
};
use tonic::Request;
use tonic_types::StatusExt;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = env::args().skip(1);
    let addr = env::var("RELAY_ADDR").unwrap_or_else(|_| "http://127.0.0.1:50054".to_owned());
    // One channel for the whole process; it connects again by itself.
    let mut client = AnalyticsServiceClient::connect(addr).await?;

    let mut request = Request::new(TrackEventRequest {
        event_name: args.next().unwrap_or_else(|| "Order Placed".to_owned()),
        user_id: args.next().unwrap_or_else(|| "user-4821".to_owned()),
        properties: [
            ("total", Value::NumberValue(19.5)),
            ("gift", Value::BoolValue(false)),
            ("sku", Value::StringValue("SKU-1".to_owned())),
        ]
        .map(|(key, value)| (key.to_owned(), PropertyValue { value: Some(value) }))
        .into(),
        // Your own id and time make sending again safe after a lost answer.
        event_id: uuid::Uuid::now_v7().to_string(),
        timestamp_ms: jiff::Timestamp::now().as_millisecond(),
        ..TrackEventRequest::default()
    });
    // Analytics must never hold up what it observes.
    request.set_timeout(Duration::from_millis(200));

    match client.track_event(request).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            println!("accepted {} ({})", answer.event_id, answer.durability().as_str_name());
        }
        Err(status) => {
            println!("refused: {:?} {}", status.code(), status.message());
            for violation in status.get_details_bad_request().into_iter().flat_map(|bad| bad.field_violations)
            {
                println!("  {} {}: {}", violation.reason, violation.field, violation.description);
            }
            if let Some(retry) = status.get_details_retry_info() {
                println!("  try again after {:?}", retry.retry_delay);
            }
        }
    }
    Ok(())
}

//! Tells a relay what is known about a user.
//!
//! ```sh
//! cargo run --example identify -- user-4821
//! ```

use std::env;

use analytics_relay::proto::v1::{
    IdentifyUserRequest, PropertyValue, analytics_service_client::AnalyticsServiceClient,
    property_value::Value,
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let addr = env::var("RELAY_ADDR").unwrap_or_else(|_| "http://127.0.0.1:50054".to_owned());
    let mut client = AnalyticsServiceClient::connect(addr).await?;
    let answer = client
        .identify_user(IdentifyUserRequest {
            user_id: env::args().nth(1).unwrap_or_else(|| "user-4821".to_owned()),
            properties: [
                ("plan", Some(Value::StringValue("pro".to_owned()))),
                ("seats", Some(Value::IntegerValue(12))),
                // No value: the trait is removed.
                ("trial_ends", None),
            ]
            .map(|(key, value)| (key.to_owned(), PropertyValue { value }))
            .into(),
            ..IdentifyUserRequest::default()
        })
        .await?
        .into_inner();
    println!("accepted {} ({})", answer.event_id, answer.durability().as_str_name());
    Ok(())
}

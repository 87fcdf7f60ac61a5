//! Sends many events through the batching client.
//!
//! ```sh
//! cargo run --example batch -- 10000
//! RELAY_ADDR=http://relay:50054 cargo run --example batch
//! RELAY_ADDR=https://relay:50054 cargo run --example batch   # the system's authorities
//! ```

use std::{env, time::Duration};

use analytics_relay::{
    client::{BatchingClient, ClientSettings, NotQueued},
    proto::v1::{IdentifyUserRequest, TrackEventRequest},
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let orders: u64 = env::args().nth(1).map_or(Ok(1000), |count| count.parse())?;
    let addr = env::var("RELAY_ADDR").unwrap_or_else(|_| "http://127.0.0.1:50054".to_owned());
    // One for the process. What it cannot send waits in a bounded queue.
    let analytics = BatchingClient::new(&addr, ClientSettings::default())?;

    analytics.identify(IdentifyUserRequest {
        user_id: "user-4821".to_owned(),
        properties_json: br#"{"plan": "pro", "trial_ends": null}"#.to_vec(),
        ..IdentifyUserRequest::default()
    })?;
    for number in 0..orders {
        let order = TrackEventRequest {
            event_name: "Order Placed".to_owned(),
            user_id: "user-4821".to_owned(),
            properties_json: format!(r#"{{"order": {number}, "total": 19.5, "items": ["book", "pen"]}}"#)
                .into(),
            ..TrackEventRequest::default()
        };
        // A service goes on without the event; this waits for room.
        while analytics.track(order.clone()) == Err(NotQueued::Full) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    println!("{:?}", analytics.counters());
    // As at the end of a service: what waits is sent, for at most so long.
    println!("{:?}", analytics.close(Duration::from_secs(5)).await);
    Ok(())
}

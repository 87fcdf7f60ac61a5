//! The pure parts of the path of an event, one by one.

use analytics_relay::providers::{
    Event, EventId, EventKind, EventParts, Properties, Secret,
    amplitude::Amplitude,
    http::Wire,
    mixpanel::{IdentityMode, Mixpanel},
    properties::{Limits, PropertiesWriter},
    segment::Segment,
};
use divan::{Bencher, black_box, counter::ItemsCount};

const BATCH: usize = 50;

fn main() {
    divan::main();
}

const PROPERTIES: &str = r#"{"currency":"EUR","gift":false,"quantity":3,"sku":"SKU-1","total":19.5}"#;

fn event(properties: &str) -> Event {
    Event::pack(&EventParts {
        id: EventId::assign(),
        kind: EventKind::Track { name: "Order Placed" },
        user_id: Some("user-4821"),
        anonymous_id: None,
        time_ms: 1_767_225_600_000,
        accepted_ms: 1_767_225_600_000,
        ip: None,
        user_agent: None,
        properties: Properties::parse(properties, &Limits::DEFAULT).expect("an object"),
        more: None,
    })
}

fn batch(properties: &str) -> Vec<Event> {
    (0..BATCH).map(|_| event(properties)).collect()
}

#[divan::bench]
fn properties_written() -> Properties<'static> {
    let mut writer = PropertiesWriter::new(&Limits::DEFAULT, 0);
    for key in ["currency", "sku"] {
        writer.key(key).expect("within limits");
        writer.string(black_box("SKU-1"));
    }
    writer.key("gift").expect("within limits");
    writer.boolean(false);
    writer.key("quantity").expect("within limits");
    writer.integer(3);
    writer.key("total").expect("within limits");
    writer.number(19.5).expect("finite");
    writer.finish().expect("within limits")
}

#[divan::bench]
fn properties_checked() -> Properties<'static> {
    Properties::parse(black_box(PROPERTIES), &Limits::DEFAULT).expect("an object")
}

#[divan::bench]
fn event_id_assigned() -> EventId<'static> {
    EventId::assign()
}

fn encode(bencher: Bencher<'_, '_>, wire: impl Wire, properties: &str) {
    let batch = batch(properties);
    bencher.counter(ItemsCount::new(BATCH)).bench(|| wire.encode(black_box(&batch), 1_767_225_601_000));
}

#[divan::bench]
fn batch_for_mixpanel(bencher: Bencher<'_, '_>) {
    encode(bencher, Mixpanel::new(Secret::new("token"), IdentityMode::Simplified), PROPERTIES);
}

/// A reserved name: the mapping has to look inside.
#[divan::bench]
fn batch_for_mixpanel_looking_inside(bencher: Bencher<'_, '_>) {
    let properties = r#"{"currency":"EUR","gift":false,"ip":"x","sku":"SKU-1","total":19.5}"#;
    encode(bencher, Mixpanel::new(Secret::new("token"), IdentityMode::Simplified), properties);
}

#[divan::bench]
fn batch_for_amplitude(bencher: Bencher<'_, '_>) {
    encode(bencher, Amplitude::new(Secret::new("key"), 1), PROPERTIES);
}

#[divan::bench]
fn batch_for_segment(bencher: Bencher<'_, '_>) {
    encode(bencher, Segment::new(Secret::new("key")), PROPERTIES);
}

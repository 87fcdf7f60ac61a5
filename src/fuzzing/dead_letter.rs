//! Lines of the files that wait for a provider or a person.

use analytics_relay_providers::{
    Event,
    fuzzing::{check_properties, encode_everywhere},
    properties::Limits,
};

use crate::delivery::dead_letter::DeadLetter;

/// Lines of a file of dead letters, or of a spill file.
pub fn dead_letter(bytes: &[u8]) {
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Ok(letter) = serde_json::from_slice::<DeadLetter>(line) {
            let json = serde_json::to_vec(&letter).expect("a letter is JSON");
            assert_eq!(serde_json::from_slice::<DeadLetter>(&json).expect("it was written by us"), letter);
        }
        let Ok(event) = serde_json::from_slice::<Event>(line) else { continue };
        let json = serde_json::to_vec(&event).expect("an event is JSON");
        assert!(!json.contains(&b'\n'), "a line holds it");
        assert_eq!(serde_json::from_slice::<Event>(&json).expect("it was written by us"), event);
        check_properties(&event.properties(), &Limits::NONE);
        encode_everywhere(&event);
    }
}

//! Lines of the files that wait for a provider or a person.

use analytics_relay_providers::{
    Event,
    fuzzing::{check_properties, encode_everywhere},
    properties::Limits,
};

use crate::{
    delivery::dead_letter::{DeadLetter, DeadLetterHead},
    letter_files::Letter,
    sealing::{
        FileKind, KeyBlocks,
        lines::{line_bytes, seal_line},
        test_keys,
    },
};

/// Lines of a file of dead letters, or of a spill file.
pub fn dead_letter(bytes: &[u8]) {
    // Whatever stands where a file's key should, it is one that was wrapped by us or none.
    if let Some(blocks) = KeyBlocks::parse(bytes, 0) {
        let _ = (blocks.kids().len(), blocks.damaged().count());
        assert!(test_keys("a").open(&blocks, FileKind::DeadLetters).is_err());
    }
    let (mut sealer, _) =
        test_keys("a").begin(FileKind::DeadLetters).expect("there is a key").expect("it seals");
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Ok(letter) = serde_json::from_slice::<DeadLetter>(line) {
            let json = serde_json::to_vec(&letter).expect("a letter is JSON");
            assert_eq!(serde_json::from_slice::<DeadLetter>(&json).expect("it was written by us"), letter);
            let (head, secret, mut sealed) = (letter.head(), letter.secret(), Vec::new());
            let head_json = serde_json::to_vec(&head).expect("a head is JSON");
            seal_line(&mut sealer, &head_json, &secret, &mut sealed);
            assert_eq!(sealed.len(), line_bytes(head_json.len(), secret.len()));
            let read: DeadLetterHead = serde_json::from_slice(&sealed).expect("a line is JSON");
            assert_eq!(read, head);
            assert_eq!(DeadLetter::join(read, &secret).expect("it is the rest"), letter);
        }
        let Ok(event) = serde_json::from_slice::<Event>(line) else { continue };
        let json = serde_json::to_vec(&event).expect("an event is JSON");
        assert!(!json.contains(&b'\n'), "a line holds it");
        assert_eq!(serde_json::from_slice::<Event>(&json).expect("it was written by us"), event);
        check_properties(&event.properties(), &Limits::NONE);
        encode_everywhere(&event);
    }
}

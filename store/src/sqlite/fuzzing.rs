//! The insides, for the fuzzer and for a test that does the same in small.

use std::io::BufReader;

use super::{codec, hot};
use crate::{
    lines::{Line, next_line},
    model::{Keys, KnownFact},
    scan::table::Table,
};

pub(crate) fn column(bytes: &[u8]) {
    codec::read_anything(bytes);
}

pub(crate) fn batch(bytes: &[u8]) {
    drop(hot::decode(bytes));
    let whole = [&[1][..], &crc32fast::hash(bytes).to_le_bytes(), bytes].concat();
    if let Some(events) = hot::decode(&whole) {
        assert_eq!(
            hot::decode(&hot::encode(events.iter()).expect("the bytes of a fuzzer are few")),
            Some(events)
        );
    }
}

pub(crate) fn export(bytes: &[u8]) {
    let mut lines = BufReader::with_capacity(16, bytes);
    let mut events = Vec::new();
    while let Some((line, _)) = next_line(&mut lines).expect("bytes in memory can be read") {
        match line {
            Line::Event(event) => events.push(*event),
            Line::Fact(fact) => {
                assert_eq!(KnownFact::from_line(fact.to_line().as_bytes()).as_ref(), Some(&*fact));
            }
            Line::Damaged(_) | Line::Empty => {}
        }
    }
    if events.is_empty() {
        return;
    }
    let mut table = Table::new(Keys::new([1; 16]), [2; 16]);
    events.iter().for_each(|event| table.push(event));
    for (row, event) in events.iter().enumerate() {
        assert_eq!(table.event(row).as_ref(), Some(event));
    }
    let encoded = codec::encode(&table).expect("the bytes of a fuzzer are few");
    encoded.check().expect("what was written can be read");
    for (row, at) in table.order(&[]).into_iter().zip(0..) {
        let (_, ids) =
            encoded.columns.iter().find(|(number, _)| *number == codec::IDS).expect("all have ids");
        let ids = codec::decode_texts(ids, encoded.rows).expect("it was just encoded");
        assert_eq!(ids.get(at), table.ids.get(row + 1));
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_fuzzer_s_targets_hold_for_what_they_start_from() {
        let line = r#"{"id":"a","kind":"track","name":"n","user_id":"u","time_ms":1,"accepted_ms":2,"properties":{"x":[{}]}}"#;
        let fact = r#"{"v":1,"fact":"traits","user":"u","traits":{"a":[1,"i",[2]]}}"#;
        super::export(format!("{line}\n\nno\n{line}\n{fact}").as_bytes());
        let mut random = fastrand::Rng::with_seed(4);
        for _ in 0..3_000 {
            let mut bytes = line.as_bytes().to_vec();
            for _ in 0..random.usize(0..3) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.choice(b"\"\\{}[]:,0 \x01\x1f\n").copied().unwrap_or_default();
            }
            super::export(&bytes);
            super::batch(&bytes);
            super::column(&bytes);
        }
    }
}

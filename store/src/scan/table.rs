//! Events as columns in memory: what came lately, and a block before it is written.

use std::{borrow::Cow, collections::HashMap, hash::Hasher, ops::Range};

use analytics_relay_providers::Event;
use siphasher::sip::SipHasher13;

use super::shred::{put_together, take_apart};
use crate::{
    model::{Class, Keys, event::what},
    scope::{FIXED_PATHS, SEPARATOR},
};

/// Most columns of values that callers can make up: what stands at more paths stays in the
/// skeletons.
pub(crate) const PATHS_MAX: usize = 200;
/// Most columns of values: the rest are for [`FIXED_PATHS`].
pub(crate) const COLUMNS_MAX: usize = 240;

/// True if a path has a column, should there be so many already and it be in an event.
pub(crate) fn has_room(path: &str, columns: usize) -> bool {
    columns < PATHS_MAX || columns < COLUMNS_MAX && FIXED_PATHS.iter().any(|one| one == path)
}

/// Different texts, found by a number each; 0 is the lack of one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dictionary {
    texts: String,
    /// Where each text ends; that of number 1 is the first.
    ends: Vec<u32>,
    /// Zero is free. A power of two, at most half full; empty where nothing is looked up.
    slots: Vec<u32>,
    hashes: Vec<u32>,
}

impl Dictionary {
    /// How many texts.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn get(&self, number: u32) -> &str {
        let Some(place) = (number as usize).checked_sub(1) else { return "" };
        let start = place.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        &self.texts[start..self.ends[place] as usize]
    }

    /// Adds a text that is not looked for.
    pub(crate) fn add(&mut self, text: &str) -> u32 {
        self.texts.push_str(text);
        self.ends.push(u32::try_from(self.texts.len()).expect("batches and blocks are bounded"));
        self.ends.len() as u32
    }

    /// The number of a text, which is added if it is new.
    fn number(&mut self, text: &str, secret: &[u8; 16]) -> u32 {
        if self.len() * 2 >= self.slots.len() {
            self.grow();
        }
        let mut hasher = SipHasher13::new_with_key(secret);
        hasher.write(text.as_bytes());
        let hash = hasher.finish() as u32;
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            match self.slots[at] {
                0 => {
                    self.slots[at] = self.add(text);
                    self.hashes.push(hash);
                    return self.slots[at];
                }
                there if self.hashes[there as usize - 1] == hash && self.get(there) == text => return there,
                _ => at = (at + 1) & mask,
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        self.slots = vec![0; (self.slots.len() * 2).max(8)];
        let mask = self.slots.len() - 1;
        for (number, hash) in (1..).zip(&self.hashes) {
            let mut at = *hash as usize & mask;
            while self.slots[at] != 0 {
                at = (at + 1) & mask;
            }
            self.slots[at] = number;
        }
    }
}

/// A text for each row, or the lack of one.
#[derive(Debug, Clone, Default)]
pub(crate) struct TextColumn {
    /// The number of each row's text; rows behind the last have none.
    pub(crate) codes: Vec<u32>,
    pub(crate) texts: Dictionary,
}

impl TextColumn {
    pub(crate) fn set(&mut self, row: usize, text: &str, secret: &[u8; 16]) {
        // Often it is that of the row before.
        let before = self.codes.last().copied().filter(|code| *code != 0 && self.texts.get(*code) == text);
        let code = before.unwrap_or_else(|| self.texts.number(text, secret));
        self.codes.resize(row, 0);
        self.codes.push(code);
    }

    fn has(&self, row: usize) -> bool {
        self.codes.len() > row
    }

    pub(crate) fn get(&self, row: usize) -> &str {
        self.texts.get(self.codes.get(row).copied().unwrap_or_default())
    }

    fn bytes(&self) -> usize {
        let Dictionary { texts, ends, slots, hashes } = &self.texts;
        texts.capacity()
            + 4 * (self.codes.capacity() + ends.capacity() + slots.capacity() + hashes.capacity())
    }
}

/// A column of values, and the path at which they stand.
#[derive(Debug, Clone)]
pub(crate) struct PathColumn {
    pub(crate) path: Box<str>,
    pub(crate) values: TextColumn,
}

/// Events as columns, in the order in which they came.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    keys: Keys,
    /// For telling texts apart: nobody can make many of one place.
    secret: [u8; 16],
    pub(crate) times: Vec<i64>,
    pub(crate) accepted: Vec<i64>,
    pub(crate) who: Vec<u64>,
    pub(crate) sessions: Vec<u64>,
    /// Class and name: see [`mark`].
    pub(crate) what: TextColumn,
    /// As JSON.
    pub(crate) ids: Dictionary,
    pub(crate) skeletons: TextColumn,
    pub(crate) paths: Vec<PathColumn>,
    index: HashMap<Box<str>, usize>,
    /// Rows of machines.
    pub(crate) bots: usize,
    /// The first and the last time.
    pub(crate) first_ms: i64,
    pub(crate) last_ms: i64,
}

/// The character before a name that says its class and whether it is a machine's.
pub(crate) fn mark(class: Class, is_bot: bool) -> char {
    let number = Class::ALL.iter().position(|one| *one == class).unwrap_or_default() as u8;
    char::from(b'0' + number + if is_bot { 4 } else { 0 })
}

/// What [`mark`] said, and the name behind it.
pub(crate) fn unmark(what: &str) -> (Class, bool, &str) {
    let number = what.bytes().next().unwrap_or_default().wrapping_sub(b'0');
    let class = Class::ALL[usize::from(number & 3)];
    (class, number & 4 != 0, what.get(1..).unwrap_or_default())
}

impl Table {
    pub(crate) fn new(keys: Keys, secret: [u8; 16]) -> Self {
        Self {
            keys,
            secret,
            times: Vec::new(),
            accepted: Vec::new(),
            who: Vec::new(),
            sessions: Vec::new(),
            what: TextColumn::default(),
            ids: Dictionary::default(),
            skeletons: TextColumn::default(),
            paths: Vec::new(),
            index: HashMap::new(),
            bots: 0,
            first_ms: i64::MAX,
            last_ms: i64::MIN,
        }
    }

    /// True if it may have events of a range.
    pub(crate) fn overlaps(&self, range_ms: &Range<i64>) -> bool {
        self.first_ms < range_ms.end && self.last_ms >= range_ms.start
    }

    pub(crate) fn rows(&self) -> usize {
        self.times.len()
    }

    /// Bytes of memory, about.
    pub(crate) fn bytes(&self) -> usize {
        let values: usize = self.paths.iter().map(|column| column.values.bytes() + 200).sum();
        let fixed = 8
            * (self.times.capacity()
                + self.accepted.capacity()
                + self.who.capacity()
                + self.sessions.capacity());
        values
            + fixed
            + self.what.bytes()
            + self.skeletons.bytes()
            + self.ids.texts.capacity()
            + 4 * self.ids.ends.capacity()
    }

    /// Adds an event.
    pub(crate) fn push(&mut self, event: &Event) {
        #[cfg(test)]
        assert_ne!(event.id().as_str(), PANICS, "on purpose");
        let json = String::from_utf8(event.to_json()).expect("JSON is text");
        let row = self.rows();
        let (mut skeleton, mut is_bot, mut hint) = (String::with_capacity(json.len()), false, 0);
        let [time_ms, accepted_ms] = [event.time_ms(), event.accepted_ms()].map(|ms| ms.to_string());
        let mut has_id = false;
        take_apart(&json, &mut skeleton, |path, value| match path {
            "time_ms" => value == time_ms,
            "accepted_ms" => value == accepted_ms,
            "id" if !has_id => {
                self.ids.add(value);
                has_id = true;
                true
            }
            _ => {
                is_bot |= is_bots(path);
                self.take(row, path, value, &mut hint)
            }
        });
        if !has_id {
            self.ids.add("");
        }
        let (class, name) = what(event);
        let marked = format!("{}{name}", mark(class, is_bot));
        self.what.set(row, &marked, &self.secret);
        self.skeletons.set(row, &skeleton, &self.secret);
        self.times.push(event.time_ms());
        self.first_ms = self.first_ms.min(event.time_ms());
        self.last_ms = self.last_ms.max(event.time_ms());
        self.accepted.push(event.accepted_ms());
        self.who.push(self.keys.who(event));
        self.sessions.push(self.keys.session(event).0);
        self.bots += usize::from(is_bot);
    }

    /// Puts a value into its column, if there is one. Events of one shape have them in the
    /// order of the event before: `hint` is where that one's next stands.
    fn take(&mut self, row: usize, path: &str, value: &str, hint: &mut usize) -> bool {
        let hinted = self.paths.get(*hint).is_some_and(|column| &*column.path == path);
        let place = if hinted { Some(*hint) } else { self.index.get(path).copied() };
        let place = match place {
            Some(place) => place,
            None if !has_room(path, self.paths.len()) => return false,
            None => {
                self.index.insert(path.into(), self.paths.len());
                self.paths.push(PathColumn { path: path.into(), values: TextColumn::default() });
                self.paths.len() - 1
            }
        };
        *hint = place + 1;
        let values = &mut self.paths[place].values;
        let is_first = !values.has(row);
        if is_first {
            values.set(row, value, &self.secret);
        }
        is_first
    }

    /// The column of a path.
    pub(crate) fn path(&self, path: &str) -> Option<&TextColumn> {
        self.index.get(path).map(|place| &self.paths[*place].values)
    }

    /// An event again.
    pub(crate) fn event(&self, row: usize) -> Option<Event> {
        let json = put_together(self.skeletons.get(row), |path, json| {
            json.push_str(&match path {
                "time_ms" => Cow::Owned(self.times[row].to_string()),
                "accepted_ms" => Cow::Owned(self.accepted[row].to_string()),
                "id" => Cow::Borrowed(self.ids.get(row as u32 + 1)),
                path => Cow::Borrowed(self.path(path)?.get(row)),
            });
            Some(())
        })?;
        Event::from_json(json.as_bytes()).ok()
    }

    /// The rows by time, those of one time by id. It is quick where many are in their order:
    /// those of before.
    pub(crate) fn order(&self, before: &[u32]) -> Vec<u32> {
        let mut order = before.to_vec();
        order.extend(before.len() as u32..self.rows() as u32);
        let key = |row: &u32| (self.times[*row as usize], self.ids.get(row + 1));
        order.sort_by(|a, b| key(a).cmp(&key(b)));
        order
    }
}

/// The id of an event at which a test lets it panic, as a bug would.
#[cfg(test)]
pub(crate) const PANICS: &str = "panics on purpose";

/// True for what is only found out about machines.
fn is_bots(path: &str) -> bool {
    let rest = path.strip_prefix("enriched").and_then(|path| path.strip_prefix(SEPARATOR));
    let rest = rest.and_then(|path| path.strip_prefix("bot"));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(SEPARATOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(json: &str) -> Event {
        Event::from_json(json.as_bytes()).unwrap()
    }

    fn table() -> Table {
        Table::new(Keys::new([1; 16]), [2; 16])
    }

    #[test]
    fn events_come_back_as_they_were() {
        let events = [
            event(
                r#"{"id":"1","kind":"track","name":"a","user_id":"u","time_ms":-5,"accepted_ms":2,"properties":{"a":1,"b":{"c":"\u0000"}}}"#,
            ),
            event(
                r#"{"id":"2","kind":"page","name":"n","category":"c","anonymous_id":"d","time_ms":1,"accepted_ms":2,"session_id":"s","source":"w","tenant":"t","only":"x","sent_context":{"page":{"path":"/"}},"enriched":{"v":1,"bot":{"name":"x"}},"properties":{}}"#,
            ),
            event(
                r#"{ "id":"3", "kind":"new", "user_id":"u","accepted_ms":2,"time_ms":1,"x":[{"a":1}],"properties":{"a":1e2} }"#,
            ),
            event(
                r#"{"id":"4","kind":"alias","user_id":"é😀","previous_id":"p","time_ms":9223372036854775807,"accepted_ms":-9223372036854775808}"#,
            ),
        ];
        let mut table = table();
        events.iter().for_each(|event| table.push(event));
        for (row, event) in events.iter().enumerate() {
            assert_eq!(table.event(row).as_ref(), Some(event));
        }
        assert_eq!(table.bots, 1);
        assert_eq!(unmark(table.what.get(1)), (Class::View, true, "pageview"));
        assert_eq!(table.order(&[]), [0, 1, 2, 3]);
        assert_eq!(table.order(&[1, 0]), [0, 1, 2, 3], "whatever stood before");
    }

    #[test]
    fn callers_who_use_ids_as_names_make_no_more_columns_than_there_may_be() {
        let mut table = table();
        let events: Vec<_> = (0..PATHS_MAX * 2)
            .map(|n| event(&format!(r#"{{"id":"{n}","kind":"track","name":"a","time_ms":1,"accepted_ms":2,"properties":{{"id{n}":{n}}}}}"#)))
            .collect();
        events.iter().for_each(|event| table.push(event));
        assert_eq!(table.paths.len(), PATHS_MAX);
        assert!(FIXED_PATHS.len() <= COLUMNS_MAX - PATHS_MAX);
        let late = event(
            r#"{"id":"x","kind":"page","user_id":"u","time_ms":1,"accepted_ms":2,"enriched":{"v":1,"geo":{"country":"DE"}},"properties":{"x":1}}"#,
        );
        table.push(&late);
        let country = crate::Field::Country.paths().remove(0);
        assert_eq!(
            table.path(&country).map(|column| column.get(PATHS_MAX * 2)),
            Some("\"DE\""),
            "what is asked for has one"
        );
        assert_eq!(table.path(&format!("properties{SEPARATOR}x")).map(|_| ()), None);
        assert_eq!(table.event(PATHS_MAX * 2).as_ref(), Some(&late));
        assert!((0..events.len()).all(|row| table.event(row).as_ref() == Some(&events[row])));
    }
}

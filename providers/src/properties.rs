//! Properties as one validated JSON object in an exactly sized buffer.
//!
//! They are encoded once, at admission, whatever front door they came through;
//! providers splice the text into their envelope, and dead letters and spill
//! files hold the same text. While it is written (or checked) its [`Shape`] is
//! taken, so that a vendor with narrower rules looks inside only when the shape
//! says that it has to.

use std::{borrow::Cow, fmt, string::FromUtf8Error};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
    ser,
};
use serde_json::value::RawValue;

use crate::{
    json::Json,
    key_hints::{self, Hint},
    pii,
};

mod duplicates;

pub(crate) use duplicates::entries;

/// Most levels that any front door lets in; the properties themselves are the first.
pub const DEPTH_MAX: usize = 16;
/// Names that are compared as they come: of more it is looked for twins in a second pass.
const NAMES_NOTED: usize = 256;

/// What the properties of one event may be at most. A front door holds its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all properties, as JSON.
    pub json_bytes_max: usize,
    /// Names, counted over all levels.
    pub keys_max: u16,
    /// Levels, up to [`DEPTH_MAX`]; the properties themselves are the first.
    pub depth_max: u8,
}

impl Limits {
    /// Where a front door says nothing else: gRPC's.
    pub const DEFAULT: Self = Self { json_bytes_max: 10 * 1024, keys_max: 256, depth_max: DEPTH_MAX as u8 };
    /// None: for what was accepted once, by whatever limits held then. (serde_json does
    /// not go deeper than 128 levels.)
    pub const NONE: Self = Self { json_bytes_max: usize::MAX, keys_max: u16::MAX, depth_max: u8::MAX };
}

/// JSON without its line breaks: an event stands on one line of a file. A raw one only
/// stands between tokens, where a blank says the same.
fn on_one_line(json: &str) -> Cow<'_, str> {
    match memchr::memchr2(b'\n', b'\r', json.as_bytes()) {
        None => Cow::Borrowed(json),
        Some(_) => Cow::Owned(json.replace(['\n', '\r'], " ")),
    }
}

/// Integers up to here are exact as a double.
const EXACT_INTEGER_MAX: f64 = 9_007_199_254_740_992.0;

/// A validated JSON object. Its text is relayed as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Properties<'a> {
    json: Cow<'a, str>,
    shape: Shape,
    /// A name occurred twice in one object, and of its values the last was kept.
    had_a_name_twice: bool,
}

/// What a vendor's mapping has to know to decide whether it must look inside.
/// Small, because it stands in every event: what is more than a field can say
/// breaks a limit anyway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    /// Names over all levels.
    pub keys: u16,
    /// Names at the top level.
    pub top_keys: u16,
    /// Levels; a flat object has 1.
    pub depth: u8,
    /// Most items of one nested list or object.
    pub widest: u16,
    /// Bytes of the longest name, over all levels.
    pub longest_key: u16,
    /// What is to be known of the names, a bit each.
    marks: u8,
}

impl Shape {
    const NULL: u8 = 1;
    const RESERVED_KEY: u8 = 1 << 1;
    const RENAMED_TRAIT: u8 = 1 << 2;
    const RED_KEY: u8 = 1 << 3;

    /// True if a value at the top level is null.
    pub fn has_null(self) -> bool {
        self.marks & Self::NULL != 0
    }

    /// True if a name at the top level is one that a vendor reserves for itself.
    pub fn has_reserved_key(self) -> bool {
        self.marks & Self::RESERVED_KEY != 0
    }

    /// True if a name at the top level is a trait that a vendor knows under another name.
    pub fn has_renamed_trait(self) -> bool {
        self.marks & Self::RENAMED_TRAIT != 0
    }

    /// True if a name at any level is one of [`RED_KEYS`](crate::pii::RED_KEYS).
    pub fn has_red_key(self) -> bool {
        self.marks & Self::RED_KEY != 0
    }
}

/// Why properties are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{fault}")]
pub struct PropertyError {
    /// Where, as in `cart.items[2].price`; empty for the properties as a whole.
    pub path: String,
    /// What is wrong.
    pub fault: PropertyFault,
}

/// What is wrong with properties.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PropertyFault {
    /// Over [`Limits::json_bytes_max`].
    #[error("got {bytes} bytes as JSON, want at most {bytes_max}")]
    TooLarge {
        /// What came.
        bytes: usize,
        /// What is allowed.
        bytes_max: usize,
    },
    /// Over [`Limits::keys_max`], which this is.
    #[error("got more than {0} names, want at most {0} over all levels")]
    TooManyKeys(u16),
    /// Over [`Limits::depth_max`], which this is.
    #[error("got more than {0} levels, want at most {0}")]
    TooDeep(u8),
    /// A name is empty.
    #[error("got an empty name, want at least one character")]
    EmptyKey,
    /// NaN or an infinity, which JSON cannot say.
    #[error("got {0}, want a finite number")]
    NonFinite(String),
    /// Not a JSON object.
    #[error("not a JSON object: {0}")]
    NotJson(String),
}

impl PropertyFault {
    fn at_root(self) -> PropertyError {
        PropertyError { path: String::new(), fault: self }
    }
}

impl PropertyError {
    /// The same error, one level further out: under the name `key`.
    #[must_use]
    pub fn under_key(mut self, key: &str) -> Self {
        // A path helps a person to find the place; a hostile one helps nobody.
        const PATH_BYTES_MAX: usize = 200;
        let joint = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        if self.path.len() + key.len() < PATH_BYTES_MAX {
            self.path = format!("{key}{joint}{}", self.path);
        }
        self
    }

    /// The same error, one level further out: at `index` of a list.
    #[must_use]
    pub fn under_index(self, index: usize) -> Self {
        self.under_key(&format!("[{index}]"))
    }
}

impl<'a> Properties<'a> {
    /// `{}`.
    pub fn empty() -> Self {
        Self::checked("{}", Shape { depth: 1, ..Shape::default() })
    }

    /// Checks an object that is JSON already. The text is kept as it is, on one line and
    /// less the white space around it; but where a name occurs twice in an object, only
    /// the last is kept, as every reader of JSON takes it otherwise.
    pub fn parse(json: &'a str, limits: &Limits) -> Result<Self, PropertyError> {
        let json = json.trim();
        if json.len() > limits.json_bytes_max {
            let fault = PropertyFault::TooLarge { bytes: json.len(), bytes_max: limits.json_bytes_max };
            return Err(fault.at_root());
        }
        let not_json = |error: serde_json::Error| PropertyFault::NotJson(error.to_string()).at_root();
        if !json.starts_with('{') {
            return Err(PropertyFault::NotJson("want {".to_owned()).at_root());
        }
        let mut meter = Meter::new(limits);
        let mut fault = None;
        let mut names = Names::default();
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let checked = Check { meter: &mut meter, fault: &mut fault, names: &mut names }
            .deserialize(&mut deserializer)
            .and_then(|()| deserializer.end());
        if let Some(fault) = fault {
            return Err(fault.at_root());
        }
        checked.map_err(not_json)?;
        if names.may_be_twice {
            return Self::each_name_once(json, meter.shape);
        }
        Ok(Self { json: on_one_line(json), ..Self::checked(json, meter.shape) })
    }

    /// A checked object in which a name may occur twice.
    #[cold]
    fn each_name_once(json: &'a str, shape: Shape) -> Result<Self, PropertyError> {
        match duplicates::removed(json) {
            None => Ok(Self { json: on_one_line(json), ..Self::checked(json, shape) }),
            Some(once) => {
                // It has less of everything.
                let once = Properties::parse(&once, &Limits::NONE)?.into_owned();
                Ok(Self { had_a_name_twice: true, ..once })
            }
        }
    }

    /// What was checked before.
    pub(crate) fn checked(json: &'a str, shape: Shape) -> Self {
        Self { json: Cow::Borrowed(json), shape, had_a_name_twice: false }
    }

    /// The same properties, as long as these are there.
    pub fn borrowed(&self) -> Properties<'_> {
        Properties::checked(&self.json, self.shape)
    }

    /// The properties, for longer than what they stand in.
    pub fn into_owned(self) -> Properties<'static> {
        Properties { json: Cow::Owned(self.json.into_owned()), ..self }
    }

    /// True if a name occurred twice in one of the objects that were checked.
    pub fn had_a_name_twice(&self) -> bool {
        self.had_a_name_twice
    }

    /// The object as JSON, for as long as the properties.
    pub(crate) fn into_json(self) -> Cow<'a, str> {
        self.json
    }

    /// The object as JSON, braces included.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// What the object looks like.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The object's names and values at the top level, values as JSON text. For
    /// a mapping whose vendor's rules make it look inside.
    pub fn entries(&self) -> Vec<(String, &RawValue)> {
        entries(&self.json)
    }
}

/// The shape of one value of some properties, as if it were the only one.
pub(crate) fn shape_of(value: &RawValue) -> Shape {
    let mut meter = Meter { depth: 1, ..Meter::new(&Limits::NONE) };
    let mut deserializer = serde_json::Deserializer::from_str(value.get());
    Check { meter: &mut meter, fault: &mut None, names: &mut Names::default() }
        .deserialize(&mut deserializer)
        .expect("the value was checked when the properties were made");
    meter.shape
}

impl Serialize for Properties<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_str(&self.json).map_err(ser::Error::custom)?;
        raw.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Properties<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        Properties::parse(raw.get(), &Limits::NONE).map(Properties::into_owned).map_err(de::Error::custom)
    }
}

/// Writes properties, value by value, and refuses what breaks a limit.
///
/// The caller opens and closes lists and objects in pairs and gives each value
/// in an object its key first.
#[derive(Debug)]
pub struct PropertiesWriter {
    json: Json,
    meter: Meter,
    /// What comes next in this list or object is not the first, and needs a comma.
    follows: bool,
}

impl PropertiesWriter {
    /// Opens the outermost object, with room for so many bytes of JSON.
    #[inline]
    pub fn new(limits: &Limits, bytes: usize) -> Self {
        let mut meter = Meter::new(limits);
        meter.enter().expect("one level is within the limit");
        let mut json = Json::with_capacity(bytes);
        json.push(b'{');
        Self { json, meter, follows: false }
    }

    /// Names the next value. That it is UTF-8 is checked at the end, once for all
    /// texts, and so it is for [`string`](Self::string).
    pub fn key(&mut self, key: impl AsRef<[u8]>) -> Result<(), PropertyError> {
        let key = key.as_ref();
        self.meter.key(key).map_err(PropertyFault::at_root)?;
        self.comma();
        self.json.text(key);
        self.json.push(b':');
        Ok(())
    }

    /// Starts the next item of a list.
    pub fn item(&mut self) {
        self.meter.item();
        self.comma();
    }

    /// Opens a nested object.
    pub fn begin_object(&mut self) -> Result<(), PropertyError> {
        self.meter.enter().map_err(PropertyFault::at_root)?;
        self.json.push(b'{');
        self.follows = false;
        Ok(())
    }

    /// Closes it.
    pub fn end_object(&mut self) {
        self.meter.leave();
        self.json.push(b'}');
        self.follows = true;
    }

    /// Opens a list.
    pub fn begin_list(&mut self) -> Result<(), PropertyError> {
        self.meter.enter().map_err(PropertyFault::at_root)?;
        self.json.push(b'[');
        self.follows = false;
        Ok(())
    }

    /// Closes it.
    pub fn end_list(&mut self) {
        self.meter.leave();
        self.json.push(b']');
        self.follows = true;
    }

    /// A null.
    pub fn null(&mut self) {
        self.meter.null();
        self.json.raw(b"null");
    }

    /// A text.
    pub fn string(&mut self, value: impl AsRef<[u8]>) {
        self.json.text(value.as_ref());
    }

    /// True or false.
    pub fn boolean(&mut self, value: bool) {
        self.json.raw(if value { b"true" } else { b"false" });
    }

    /// A whole number.
    pub fn integer(&mut self, value: i64) {
        self.json.number(value);
    }

    /// A finite number; whole ones are written without a fraction, as every
    /// language's own client would.
    pub fn number(&mut self, value: f64) -> Result<(), PropertyError> {
        if !value.is_finite() {
            return Err(PropertyFault::NonFinite(value.to_string()).at_root());
        }
        if value.fract() == 0.0 && value.abs() <= EXACT_INTEGER_MAX {
            #[expect(clippy::cast_possible_truncation, reason = "whole and within 53 bits")]
            self.integer(value as i64);
            return Ok(());
        }
        self.json.number(value);
        Ok(())
    }

    /// Closes the outermost object.
    pub fn finish(mut self) -> Result<Properties<'static>, PropertyError> {
        self.json.push(b'}');
        let not_text = |error: FromUtf8Error| PropertyFault::NotJson(error.to_string()).at_root();
        let json = String::from_utf8(self.json.into_bytes()).map_err(not_text)?;
        let bytes_max = self.meter.limits.json_bytes_max;
        if json.len() > bytes_max {
            return Err(PropertyFault::TooLarge { bytes: json.len(), bytes_max }.at_root());
        }
        Ok(Properties { json: Cow::Owned(json), shape: self.meter.shape, had_a_name_twice: false })
    }

    fn comma(&mut self) {
        if std::mem::replace(&mut self.follows, true) {
            self.json.push(b',');
        }
    }
}

/// Counts what a [`Shape`] holds and refuses what breaks a limit, for the
/// writer and the checker alike.
#[derive(Debug)]
struct Meter {
    limits: Limits,
    shape: Shape,
    /// Items so far, of each list and object that is open: as many as `depth`. What is
    /// deeper than any front door allows is not counted.
    open: [u16; DEPTH_MAX],
    depth: usize,
}

impl Meter {
    fn new(limits: &Limits) -> Self {
        Self { limits: *limits, shape: Shape::default(), open: [0; DEPTH_MAX], depth: 0 }
    }

    fn enter(&mut self) -> Result<(), PropertyFault> {
        if self.depth >= usize::from(self.limits.depth_max) {
            return Err(PropertyFault::TooDeep(self.limits.depth_max));
        }
        if let Some(items) = self.open.get_mut(self.depth) {
            *items = 0;
        }
        self.depth += 1;
        self.shape.depth = self.shape.depth.max(u8::try_from(self.depth).unwrap_or(u8::MAX));
        Ok(())
    }

    fn leave(&mut self) {
        self.depth = self.depth.saturating_sub(1);
    }

    // As a call of its own it costs a batch's event two per cent more.
    #[inline(always)]
    fn key(&mut self, key: &[u8]) -> Result<(), PropertyFault> {
        if key.is_empty() {
            return Err(PropertyFault::EmptyKey);
        }
        if self.shape.keys == self.limits.keys_max {
            return self.too_many_keys();
        }
        self.shape.keys += 1;
        self.shape.longest_key = self.shape.longest_key.max(small(key.len()));
        if self.depth == 1 {
            self.shape.top_keys += 1;
            self.shape.marks |= match key_hints::hint(key) {
                None => 0,
                Some(Hint::Reserved) => Shape::RESERVED_KEY,
                Some(Hint::Renamed) => Shape::RENAMED_TRAIT,
            };
        }
        if pii::may_be_red(key) && pii::red_key(key).is_some() {
            self.shape.marks |= Shape::RED_KEY;
        }
        self.item();
        Ok(())
    }

    /// Without limits they are not counted any more.
    #[cold]
    fn too_many_keys(&self) -> Result<(), PropertyFault> {
        let Limits { keys_max, .. } = self.limits;
        if self.limits == Limits::NONE { Ok(()) } else { Err(PropertyFault::TooManyKeys(keys_max)) }
    }

    fn item(&mut self) {
        let Some(items) = self.depth.checked_sub(1).and_then(|place| self.open.get_mut(place)) else {
            return;
        };
        *items = items.saturating_add(1);
        if self.depth > 1 {
            self.shape.widest = self.shape.widest.max(*items);
        }
    }

    fn null(&mut self) {
        self.shape.marks |= u8::from(self.depth == 1) * Shape::NULL;
    }
}

fn small(number: usize) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

/// Walks over a JSON value without building it.
struct Check<'a> {
    meter: &'a mut Meter,
    /// The limit that was broken; serde's own error can only carry text.
    fault: &'a mut Option<PropertyFault>,
    names: &'a mut Names,
}

/// The names of the objects that are open, as marks that are alike if the names are.
struct Names {
    marks: [u32; NAMES_NOTED],
    count: usize,
    may_be_twice: bool,
}

impl Default for Names {
    fn default() -> Self {
        Self { marks: [0; NAMES_NOTED], count: 0, may_be_twice: false }
    }
}

impl Names {
    /// Notes a name of the object whose names begin at `first`.
    fn note(&mut self, first: usize, name: &[u8]) {
        let mark = mark(name);
        self.may_be_twice |= self.marks[first..self.count].contains(&mark);
        match self.marks.get_mut(self.count) {
            Some(place) => {
                *place = mark;
                self.count += 1;
            }
            None => self.may_be_twice = true,
        }
    }
}

/// From a name's first and last bytes and its length.
fn mark(name: &[u8]) -> u32 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    let eight = |bytes: &[u8]| {
        let mut eight = [0; 8];
        eight[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(eight)
    };
    let first = name.first_chunk().map_or_else(|| eight(name), |first| u64::from_le_bytes(*first));
    let last = name.last_chunk().map_or(0, |last| u64::from_le_bytes(*last));
    let mixed = (first ^ last.rotate_left(23) ^ name.len() as u64).wrapping_mul(ODD);
    u32::try_from(mixed >> 32).unwrap_or(u32::MAX)
}

impl Check<'_> {
    fn limit<T, E: de::Error>(&mut self, result: Result<T, PropertyFault>) -> Result<T, E> {
        result.map_err(|fault| {
            let error = E::custom(&fault);
            *self.fault = Some(fault);
            error
        })
    }
}

impl<'de> DeserializeSeed<'de> for Check<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Check<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.meter.null();
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<(), A::Error> {
        let entered = self.meter.enter();
        self.limit(entered)?;
        while items
            .next_element_seed(Check { meter: self.meter, fault: self.fault, names: self.names })?
            .is_some()
        {
            self.meter.item();
        }
        self.meter.leave();
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let entered = self.meter.enter();
        self.limit(entered)?;
        let first = self.names.count;
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let counted = self.meter.key(key.as_bytes());
            self.limit(counted)?;
            self.names.note(first, key.as_bytes());
            map.next_value_seed(Check { meter: self.meter, fault: self.fault, names: self.names })?;
        }
        self.names.count = first;
        self.meter.leave();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const JSON_BYTES_MAX: usize = Limits::DEFAULT.json_bytes_max;
    const KEYS_MAX: usize = Limits::DEFAULT.keys_max as usize;

    fn write(writer: &mut PropertiesWriter, value: &Value) -> Result<(), PropertyError> {
        match value {
            Value::Null => writer.null(),
            Value::Bool(value) => writer.boolean(*value),
            Value::Number(number) => match number.as_i64() {
                Some(integer) => writer.integer(integer),
                None => writer.number(number.as_f64().unwrap())?,
            },
            Value::String(text) => writer.string(text),
            Value::Array(items) => {
                writer.begin_list()?;
                for item in items {
                    writer.item();
                    write(writer, item)?;
                }
                writer.end_list();
            }
            Value::Object(fields) => {
                writer.begin_object()?;
                for (key, value) in fields {
                    writer.key(key)?;
                    write(writer, value)?;
                }
                writer.end_object();
            }
        }
        Ok(())
    }

    fn written(object: &Value) -> Result<Properties<'static>, PropertyError> {
        let mut writer = PropertiesWriter::new(&Limits::DEFAULT, 0);
        for (key, value) in object.as_object().unwrap() {
            writer.key(key)?;
            write(&mut writer, value)?;
        }
        writer.finish()
    }

    fn nested(levels: usize) -> Value {
        (1..levels).fold(json!({"leaf": 1}), |inner, _| json!({ "inner": inner }))
    }

    fn fault(result: Result<Properties<'_>, PropertyError>) -> PropertyFault {
        result.unwrap_err().fault
    }

    /// In a file it must not look like two lines, of which the second is whatever its
    /// caller wants.
    #[test]
    fn an_object_on_several_lines_is_put_on_one() {
        for json in ["{\n  \"a\": [1,\r\n {\"id\":\"x\"}\n]}", "{\"a\":1,\n\"a\":{\n}}"] {
            let properties = Properties::parse(json, &Limits::DEFAULT).unwrap();
            assert!(!properties.json().contains(['\n', '\r']), "{}", properties.json());
            let [ours, theirs] = [properties.json(), json]
                .map(|json| serde_json::from_str::<serde_json::Value>(json).unwrap());
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn each_limit_holds_at_n_and_breaks_at_n_plus_one() {
        let wide = |keys: usize| Value::Object((0..keys).map(|i| (format!("k{i}"), json!(1))).collect());
        let long = |bytes: usize| json!({ "k": "x".repeat(bytes - r#"{"k":""}"#.len()) });
        for (good, bad, want) in [
            (wide(KEYS_MAX), wide(KEYS_MAX + 1), PropertyFault::TooManyKeys(256)),
            (nested(DEPTH_MAX), nested(DEPTH_MAX + 1), PropertyFault::TooDeep(16)),
            (
                long(JSON_BYTES_MAX),
                long(JSON_BYTES_MAX + 1),
                PropertyFault::TooLarge { bytes: JSON_BYTES_MAX + 1, bytes_max: JSON_BYTES_MAX },
            ),
            (json!({"k": {"a": 1}}), json!({"k": {"": 1}}), PropertyFault::EmptyKey),
        ] {
            assert!(written(&good).is_ok());
            assert!(Properties::parse(&good.to_string(), &Limits::DEFAULT).is_ok());
            assert_eq!(fault(written(&bad)), want);
            assert_eq!(fault(Properties::parse(&bad.to_string(), &Limits::DEFAULT)), want);
        }
    }

    #[test]
    fn numbers_that_json_cannot_say_are_refused() {
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = PropertiesWriter::new(&Limits::DEFAULT, 0).number(number).unwrap_err();
            assert!(matches!(error.fault, PropertyFault::NonFinite(_)), "{number}");
        }
        assert!(matches!(
            fault(Properties::parse(r#"{"n":1e999}"#, &Limits::DEFAULT)),
            PropertyFault::NotJson(_)
        ));
    }

    #[test]
    fn whole_numbers_are_written_without_a_fraction() {
        let mut writer = PropertiesWriter::new(&Limits::DEFAULT, 0);
        for (key, number) in [("a", 3.0), ("b", 19.5), ("c", -0.0), ("d", 1e300)] {
            writer.key(key).unwrap();
            writer.number(number).unwrap();
        }
        assert_eq!(writer.finish().unwrap().json(), r#"{"a":3,"b":19.5,"c":0,"d":1e+300}"#);
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        for text in ["", "[]", "1", "{", r#"{"a":1} x"#, r#"{"a":}"#, "{1:2}"] {
            assert!(
                matches!(fault(Properties::parse(text, &Limits::DEFAULT)), PropertyFault::NotJson(_)),
                "{text}"
            );
        }
    }

    #[test]
    fn of_a_name_that_occurs_twice_the_last_is_kept() {
        for (text, once) in [
            (r#"{"a":1,"a":2}"#, r#"{"a":2}"#),
            (r#"{"a":1, "b":"x", "\u0061" : [2.50]}"#, r#"{"b":"x","a":[2.50]}"#),
            (
                r#"{"o":{"k":1,"k":{"k":2,"k":3}},"l":[{"é":1,"é":2}]}"#,
                r#"{"o":{"k":{"k":3}},"l":[{"é":2}]}"#,
            ),
            (r#"{"time":null,"time":1}"#, r#"{"time":1}"#),
        ] {
            let properties = Properties::parse(text, &Limits::DEFAULT).unwrap();
            assert_eq!(properties.json(), once);
            assert!(properties.had_a_name_twice());
            assert_eq!(properties.shape(), Properties::parse(once, &Limits::DEFAULT).unwrap().shape());
        }
        let once = r#"{"a": {"b":1}, "b":2, "c":[{"a":1},{"a":2}]}"#;
        let properties = Properties::parse(once, &Limits::DEFAULT).unwrap();
        assert_eq!((properties.json(), properties.had_a_name_twice()), (once, false));
    }

    #[test]
    fn a_hostile_depth_does_not_overflow_the_stack() {
        let text = r#"{"a":"#.repeat(JSON_BYTES_MAX / 5);
        assert_eq!(fault(Properties::parse(&text, &Limits::DEFAULT)), PropertyFault::TooDeep(16));
    }

    #[test]
    fn a_red_name_is_marked_at_any_level_and_in_any_spelling() {
        for (text, is_red) in [
            (r#"{"password":1}"#, true),
            (r#"{"a":[1,{"b":{"API-key":null}}]}"#, true),
            (r#"{"p\u0061ssword":1}"#, true),
            (r#"{"author":1,"passwordless":["password"],"a":{"tokens":"token"}}"#, false),
        ] {
            let checked = Properties::parse(text, &Limits::DEFAULT).unwrap();
            let written = written(&serde_json::from_str(text).unwrap()).unwrap();
            assert_eq!([checked.shape().has_red_key(), written.shape().has_red_key()], [is_red; 2], "{text}");
        }
    }

    #[test]
    fn a_path_names_the_place() {
        let error = PropertyFault::EmptyKey.at_root().under_key("price").under_index(2).under_key("items");
        assert_eq!(error.path, "items[2].price");
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e15..1e15).prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        let key = prop_oneof![4 => "[a-z$_]{1,8}", 1 => Just("time".to_owned()), 1 => Just("$insert_id".to_owned())];
        leaf.prop_recursive(5, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(key.clone(), inner, 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn writing_and_checking_agree_on_text_and_shape(
            fields in prop::collection::btree_map("[a-z$]{1,6}", any_json(), 0..8)
        ) {
            let object = Value::Object(fields.into_iter().collect());
            let properties = written(&object).unwrap();
            prop_assert_eq!(&Properties::parse(properties.json(), &Limits::DEFAULT).unwrap(), &properties);
            // Exactly what was given arrives: numbers compared as text would
            // differ in form, so compare them as values.
            let back: Value = serde_json::from_str(properties.json()).unwrap();
            prop_assert!(same(&back, &object), "{back} {object}");
        }

        /// Names that are alike in their first and last bytes are told apart.
        #[test]
        fn only_a_name_that_occurs_twice_is_left_out(names in prop::collection::vec("(ab|abcdefgh)[a-c]{0,2}(stuvwxyz)?", 1..12)) {
            let entries: Vec<_> = names.iter().enumerate().map(|(at, name)| format!("{name:?}:{at}")).collect();
            let text = format!("{{{}}}", entries.join(","));
            let properties = Properties::parse(&text, &Limits::DEFAULT).unwrap();
            let want: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(serde_json::from_str::<Value>(properties.json()).unwrap(), want.clone());
            let distinct = want.as_object().unwrap().len();
            prop_assert_eq!(usize::from(properties.shape().keys), distinct);
            prop_assert_eq!(properties.had_a_name_twice(), distinct < names.len());
            prop_assert_eq!(properties.json() == text, distinct == names.len());
        }

        #[test]
        fn checking_never_panics(text in ".{0,200}") {
            let _ = Properties::parse(&text, &Limits::DEFAULT);
        }
    }

    fn same(a: &Value, b: &Value) -> bool {
        match (a, b) {
            (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
            (Value::Array(a), Value::Array(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
            }
            (Value::Object(a), Value::Object(b)) => {
                a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
            }
            _ => a == b,
        }
    }
}

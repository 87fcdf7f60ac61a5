//! Writes the vendors' envelopes: a few fields of our own around text that is
//! JSON already.

use serde_json::value::RawValue;

/// An object that is being written to the end of a body.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    out: &'a mut Vec<u8>,
    empty: bool,
}

impl<'a> Object<'a> {
    /// Opens an object.
    pub(crate) fn begin(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, empty: true }
    }

    /// A text field.
    pub(crate) fn string(&mut self, key: &str, value: &str) {
        text(self.key(key), value);
    }

    /// A text field that is left out when there is no text.
    pub(crate) fn optional(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.string(key, value);
        }
    }

    /// A whole number.
    pub(crate) fn integer(&mut self, key: &str, value: i64) {
        self.key(key).extend_from_slice(value.to_string().as_bytes());
    }

    /// A field whose value is JSON already.
    pub(crate) fn raw(&mut self, key: &str, json: &str) {
        self.key(key).extend_from_slice(json.as_bytes());
    }

    /// All fields of an object that is JSON already, beside our own.
    pub(crate) fn splice(&mut self, object: &str) {
        let fields = &object[1..object.len() - 1];
        if !fields.trim_ascii().is_empty() {
            self.comma();
            self.out.extend_from_slice(fields.as_bytes());
        }
    }

    /// Opens an object in a field.
    pub(crate) fn object(&mut self, key: &str) -> Object<'_> {
        Object::begin(self.key(key))
    }

    /// A list of texts.
    pub(crate) fn strings<'s>(&mut self, key: &str, values: impl IntoIterator<Item = &'s str>) {
        let out = self.key(key);
        out.push(b'[');
        for (index, value) in values.into_iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            text(out, value);
        }
        out.push(b']');
    }

    /// Entries of properties, values as they are.
    pub(crate) fn entries<'e>(&mut self, entries: impl IntoIterator<Item = (&'e str, &'e RawValue)>) {
        for (key, value) in entries {
            self.raw(key, value.get());
        }
    }

    /// Closes the object.
    pub(crate) fn end(self) {
        self.out.push(b'}');
    }

    fn key(&mut self, key: &str) -> &mut Vec<u8> {
        self.comma();
        text(self.out, key);
        self.out.push(b':');
        self.out
    }

    fn comma(&mut self) {
        if !self.empty {
            self.out.push(b',');
        }
        self.empty = false;
    }
}

/// Writes `value` quoted and escaped.
pub(crate) fn text(out: &mut Vec<u8>, value: &str) {
    serde_json::to_writer(out, value).expect("a vector takes any bytes");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_valid_json_whatever_its_fields_are() {
        let mut out = Vec::new();
        let mut object = Object::begin(&mut out);
        object.splice("{ }");
        object.string("a\"b", "c\n");
        object.optional("no", None);
        object.splice(r#"{"x":1,"y":[2]}"#);
        let mut inner = object.object("inner");
        inner.integer("n", -3);
        inner.end();
        object.strings("list", ["p", "q"]);
        object.end();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"a\"b":"c\n","x":1,"y":[2],"inner":{"n":-3},"list":["p","q"]}"#
        );
    }
}

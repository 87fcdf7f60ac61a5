//! How answers over HTTP are written: JSON in an envelope, or CSV for a spreadsheet.

use serde::Serialize;

use super::period::Period;
use crate::time::rfc_3339;

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Json,
    Csv,
}

/// An answer in bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) content_type: &'static str,
    pub(crate) body: Vec<u8>,
    /// The name of a file to keep it in.
    pub(crate) file: Option<String>,
}

/// What an answer says of itself.
#[derive(Debug, Serialize)]
pub(crate) struct Meta {
    from: String,
    to: String,
    timezone: String,
    include_bots: bool,
    /// When the store was asked: what it got later is not in the figures.
    as_of: String,
    /// True if it was asked for somebody else.
    cached: bool,
}

impl Meta {
    pub(super) fn of(period: &Period, include_bots: bool, as_of_ms: i64, cached: bool) -> Self {
        Self {
            from: period.shown(period.range_ms.start),
            to: period.shown(period.range_ms.end),
            timezone: period.zone().to_owned(),
            include_bots,
            as_of: rfc_3339(as_of_ms),
            cached,
        }
    }
}

/// The report's fields, and what the answer says of itself behind them.
pub(super) fn json(report: &impl Serialize, meta: &Meta) -> Written {
    #[derive(Serialize)]
    struct Envelope<'a, T> {
        #[serde(flatten)]
        report: &'a T,
        meta: &'a Meta,
    }
    let body = serde_json::to_vec(&Envelope { report, meta }).expect("an answer has names that are texts");
    Written { content_type: "application/json", body, file: None }
}

/// Rows as RFC 4180 has them. What a program for spreadsheets would take for a formula gets
/// a `'` in front: names are chosen by whoever can send an event.
#[derive(Debug)]
pub(super) struct Csv {
    text: String,
}

impl Csv {
    pub(super) fn new(header: &[&str]) -> Self {
        let mut csv = Self { text: String::new() };
        csv.row(header.iter().copied());
        csv
    }

    pub(super) fn row<'f>(&mut self, fields: impl IntoIterator<Item = &'f str>) {
        for (at, field) in fields.into_iter().enumerate() {
            if at > 0 {
                self.text.push(',');
            }
            self.field(field);
        }
        self.text.push_str("\r\n");
    }

    fn field(&mut self, field: &str) {
        let is_formula = field.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']);
        if !is_formula && !field.contains(['"', ',', '\r', '\n']) {
            return self.text.push_str(field);
        }
        self.text.push('"');
        if is_formula {
            self.text.push('\'');
        }
        self.text.push_str(&field.replace('"', "\"\""));
        self.text.push('"');
    }

    pub(super) fn written(self, name: &str, period: &Period) -> Written {
        let [first, last] = period.days();
        let file = format!("{name}-{first}-{last}.csv");
        Written { content_type: "text/csv; charset=utf-8", body: self.text.into_bytes(), file: Some(file) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_what_it_was_and_no_formula() {
        for (field, want) in [
            ("Order Placed", "Order Placed"),
            ("", ""),
            ("a,b", "\"a,b\""),
            ("say \"hi\"", "\"say \"\"hi\"\"\""),
            ("a\nb", "\"a\nb\""),
            ("=1+1", "\"'=1+1\""),
            ("+1", "\"'+1\""),
            ("-1", "\"'-1\""),
            ("@SUM(A1)", "\"'@SUM(A1)\""),
            ("\t=1", "\"'\t=1\""),
            ("\r=1", "\"'\r=1\""),
            ("=\",\"", "\"'=\"\",\"\"\""),
            ("1-2", "1-2"),
        ] {
            let mut csv = Csv::new(&["a", "b"]);
            csv.row([field, "7"]);
            assert_eq!(csv.text, format!("a,b\r\n{want},7\r\n"), "{field:?}");
        }
    }
}

//! An event in the address of an image, for mails and pages without scripts. Whoever
//! looks at it sees an image, whatever becomes of the event.

use base64::{
    Engine,
    alphabet::{STANDARD, URL_SAFE},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use hyper::StatusCode;

use super::reply::{Problem, Reply, bytes};

const CONFIG: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);

/// The smallest transparent GIF.
const GIF: [u8; 43] =
    *b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff!\xf9\x04\x01\x00\x00\x00\x00,\
    \x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;";

pub(super) fn image() -> Reply {
    bytes(StatusCode::OK, "image/gif", &GIF[..])
}

/// The event in `data` of a query: JSON in Base64, of either alphabet, with or without
/// padding.
pub(super) fn event_in(query: &str) -> Result<String, Problem> {
    let no_data = || Problem::malformed("data", "want data=<JSON in Base64>");
    let data = super::route::query_value(query, "data").ok_or_else(no_data)?;
    // A plus that was not escaped.
    let data = data.replace(' ', "+");
    let alphabet = if data.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
    let decoded = GeneralPurpose::new(alphabet, CONFIG).decode(data.trim());
    super::body::as_text(decoded.map_err(|_| no_data())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_found_however_its_base64_is_written() {
        for query in ["data=eyJhIjoiPz4ifQ==", "x=1&data=eyJhIjoiPz4ifQ", "data=eyJhIjoiPz4ifQ%3D%3D"] {
            assert_eq!(event_in(query).unwrap(), r#"{"a":"?>"}"#, "{query}");
        }
        for query in ["", "data=", "data=!!", "dat=eyJhIjoiPz4ifQ"] {
            let text = event_in(query);
            assert!(text.is_err() || text.is_ok_and(|text| text.is_empty()), "{query}");
        }
    }
}

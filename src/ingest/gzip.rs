//! What callers compress with gzip.

use std::io::Read;

use flate2::bufread::GzDecoder;

use crate::admission::denied::Denied;

/// Steps in which it is inflated, and room is looked for.
const STEP_BYTES: usize = 64 * 1024;

/// Why something was not inflated.
#[derive(Debug)]
pub(super) enum NotInflated {
    /// It has more bytes than it may.
    TooLarge,
    /// It is not one whole piece of gzip, because of this.
    Malformed(String),
    /// There is no room for it now.
    NoRoom(Denied),
}

/// What something inflates to, of which no more is made than it may have bytes, but for
/// one. `hold` is told how many there are, step by step.
pub(super) fn inflate(
    compressed: &[u8],
    bytes_max: usize,
    mut hold: impl FnMut(usize) -> Result<(), Denied>,
) -> Result<Vec<u8>, NotInflated> {
    let malformed = |error| NotInflated::Malformed(format!("gzip: {error}"));
    let (mut bytes, mut decoder) = (Vec::new(), GzDecoder::new(compressed));
    loop {
        let left = bytes_max.saturating_add(1) - bytes.len();
        let step = u64::try_from(left.min(STEP_BYTES)).expect("a step is small");
        let more = decoder.by_ref().take(step).read_to_end(&mut bytes).map_err(malformed)?;
        if bytes.len() > bytes_max {
            return Err(NotInflated::TooLarge);
        }
        if more == 0 {
            break;
        }
        hold(bytes.len()).map_err(NotInflated::NoRoom)?;
    }
    if !decoder.into_inner().is_empty() {
        return Err(NotInflated::Malformed("gzip: more behind its end".to_owned()));
    }
    Ok(bytes)
}

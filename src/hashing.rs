//! Hashes under a key, for ids that must not stand anywhere as they are.

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher24};

/// SipHash-2-4-128 of texts, each behind its length, so that none can pass for a part of
/// another.
pub(crate) fn keyed_hash(key: &[u8; 16], texts: &[&[u8]]) -> u128 {
    let mut hasher = SipHasher24::new_with_key(key);
    for text in texts {
        hasher.write(&(text.len() as u64).to_le_bytes());
        hasher.write(text);
    }
    hasher.finish128().as_u128()
}

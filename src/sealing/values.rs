//! Single values under a key, where what holds them stays readable: `KID:NONCE:SEALED`, the
//! latter two in base64url without padding.
//!
//! Each has a key of its own, HKDF(KEK, name of the value, nonce), so that however many there
//! are, no key is used twice (a nonce is 24 random bytes). What is sealed under one name opens
//! under no other, and changed bytes open not at all. Of which event it is, it does not say: a
//! copy under the same name opens too.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce},
    hkdf::Prk,
};
use thiserror::Error;

use super::keyring::{Kek, Keyring, NoRandom, random};

const NONCE_BYTES: usize = 24;
const PURPOSE: &[u8] = b"analytics-relay sealed value 1\0";

/// Why a value does not open.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum Unopened {
    #[error("got what is no sealed value, want KID:NONCE:SEALED")]
    Malformed,
    #[error("it is sealed with the key {kid:?}, which is not given (given: {given})")]
    NoKey { kid: String, given: String },
    #[error(
        "it was sealed with another key than the one that is given as {kid:?}, under another name, or was changed"
    )]
    Wrong { kid: String },
}

/// Seals a value that stands under a name.
pub(crate) fn seal(kek: &Kek, name: &str, value: &str) -> Result<String, NoRandom> {
    let nonce: [u8; NONCE_BYTES] = random()?;
    let mut sealed = value.as_bytes().to_vec();
    let once = Nonce::assume_unique_for_key(Default::default());
    key(&kek.values, kek.kid(), name, &nonce)
        .seal_in_place_append_tag(once, Aad::empty(), &mut sealed)
        .expect("a value is short");
    let [nonce, sealed] = [&nonce[..], &sealed].map(|bytes| BASE64_URL_SAFE_NO_PAD.encode(bytes));
    Ok(format!("{}:{nonce}:{sealed}", kek.kid()))
}

/// The value that was sealed under a name.
pub(crate) fn open(keyring: Option<&Keyring>, name: &str, sealed: &str) -> Result<String, Unopened> {
    let mut parts = sealed.split(':');
    let (Some(kid), Some(nonce), Some(sealed), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Unopened::Malformed);
    };
    let decoded = |text: &str| BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| Unopened::Malformed);
    let nonce: [u8; NONCE_BYTES] = decoded(nonce)?.try_into().map_err(|_| Unopened::Malformed)?;
    let mut sealed = decoded(sealed)?;
    let Some(kek) = keyring.and_then(|keyring| keyring.find(kid)) else {
        let given = keyring.map_or_else(|| "none".to_owned(), Keyring::kids);
        return Err(Unopened::NoKey { kid: kid.to_owned(), given });
    };
    let once = Nonce::assume_unique_for_key(Default::default());
    let opened = key(&kek.values, kid, name, &nonce).open_in_place(once, Aad::empty(), &mut sealed).ok();
    let value = opened.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
    value.ok_or_else(|| Unopened::Wrong { kid: kid.to_owned() })
}

/// The key of one value.
fn key(values: &Prk, kid: &str, name: &str, nonce: &[u8; NONCE_BYTES]) -> LessSafeKey {
    // The nonce is of one length, and a key's name has no zero in it.
    let info = [PURPOSE, nonce, kid.as_bytes(), b"\0", name.as_bytes()];
    let key = values.expand(&info, &AES_256_GCM).expect("a key is short");
    LessSafeKey::new(key.into())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Sealing, test_keys},
        *,
    };

    fn sealed(keys: &Sealing, name: &str, value: &str) -> String {
        seal(keys.keyring().unwrap().writer().unwrap(), name, value).unwrap()
    }

    #[test]
    fn a_value_opens_with_its_key_under_its_name_only() {
        let (keys, others) = (test_keys("a,b"), test_keys("b,c"));
        let text = sealed(&keys, "email", "\"ann@example.com\"");
        assert!(text.starts_with("a:") && !text.contains("ann"), "{text}");
        assert_eq!(open(keys.keyring(), "email", &text).unwrap(), "\"ann@example.com\"");
        let wrong = Unopened::Wrong { kid: "a".to_owned() };
        assert_eq!(open(keys.keyring(), "phone", &text), Err(wrong.clone()));
        let given = |given: &str| Unopened::NoKey { kid: "a".to_owned(), given: given.to_owned() };
        assert_eq!(open(others.keyring(), "email", &text), Err(given("b, c")));
        assert_eq!(open(None, "email", &text), Err(given("none")));
        let renamed = text.replacen("a:", "b:", 1);
        assert_eq!(open(keys.keyring(), "email", &renamed), Err(Unopened::Wrong { kid: "b".to_owned() }));
        assert_ne!(sealed(&keys, "email", "\"ann@example.com\""), text, "equal values look different");
        for (at, byte) in text.bytes().enumerate().skip(2).filter(|(_, byte)| *byte != b':') {
            let mut changed = text.clone().into_bytes();
            changed[at] = if byte == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            let opened = open(keys.keyring(), "email", &changed);
            // The last character of either part may have bits that say nothing.
            assert!(opened == Err(wrong.clone()) || opened == Err(Unopened::Malformed), "{at}: {opened:?}");
        }
    }

    #[test]
    fn what_is_no_sealed_value_is_said_to_be_none() {
        let keys = test_keys("a");
        for text in ["", "a", "a:b", "a:b:c", "a:b:c:d", "a:!!:AAAA", ":::", "a::"] {
            assert_eq!(open(keys.keyring(), "email", text), Err(Unopened::Malformed), "{text}");
        }
    }
}

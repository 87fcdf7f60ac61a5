//! The key-encrypting keys: read from a text, never shown.

use std::{fmt, hint::black_box};

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
    prelude::BASE64_STANDARD,
};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, Prk},
    rand::{SecureRandom, SystemRandom},
};
use thiserror::Error;

use super::seal::{FileKind, WRAPPED_BYTES};

/// Bytes of every key.
pub(super) const KEY_BYTES: usize = 32;
/// Most keys at a time.
const KEYS_MAX: usize = 64;
/// In the first place: what is written is not sealed.
const NONE: &str = "none";
/// Padding or none: tools differ.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Keys by their names. The first one wraps what is new.
#[derive(Debug)]
pub(crate) struct Keyring {
    keys: Vec<Kek>,
    /// The first entry was [`NONE`].
    writes_unsealed: bool,
}

/// One key-encrypting key. It shows its name and no more.
pub(crate) struct Kek {
    kid: String,
    key: LessSafeKey,
    /// What keys of single values are made of.
    pub(super) values: Prk,
}

impl fmt::Debug for Kek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kek({}:***)", self.kid)
    }
}

/// Why a file cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Locked {
    /// Its key was not given.
    #[error(
        "it is sealed with the key {kid:?}, which is not given (given: {given}); \
RELAY_KEK, RELAY_KEK_FILE or RELAY_KEK_COMMAND must have it too"
    )]
    NoKey {
        /// The name of the key that would do.
        kid: String,
        /// The names of those that are there.
        given: String,
    },
    /// A key of that name was given, and is another one.
    #[error("it is sealed with another key than the one that is given as {kid:?}")]
    WrongKey {
        /// The name.
        kid: String,
    },
    /// Both of its key blocks are gone.
    #[error("both of its key blocks are damaged: nobody can read it any more")]
    Damaged,
    /// A new key cannot be made.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
}

/// What is wrong with a text of keys. Never says what stands there: it may be a key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum BadKeys {
    #[error("got no key, want NAME:KEY with the key in base64 (`analytics-relay secrets new-kek` makes one)")]
    Empty,
    #[error("entry {0}: got no colon, want NAME:KEY")]
    NoName(usize),
    #[error("entry {0}: got no name of a key, want 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', and not none")]
    BadName(usize),
    #[error("entry {0}: got no key of 32 bytes in base64")]
    BadKey(usize),
    #[error("entry {0}: got a name that another entry has")]
    SameName(usize),
    #[error("got more than {KEYS_MAX} keys")]
    TooMany,
}

impl Keyring {
    /// Reads `NAME:KEY` entries, with commas or line breaks between them. Lines that begin
    /// with `#` say nothing.
    pub(crate) fn parse(text: &str) -> Result<Self, BadKeys> {
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let entries = lines.flat_map(|line| line.split(',')).map(str::trim).filter(|entry| !entry.is_empty());
        let mut keyring = Self { keys: Vec::new(), writes_unsealed: false };
        for (place, entry) in (1..).zip(entries) {
            if place == 1 && entry == NONE {
                keyring.writes_unsealed = true;
                continue;
            }
            let (kid, key) = entry.split_once(':').ok_or(BadKeys::NoName(place))?;
            if !is_kid(kid) {
                return Err(BadKeys::BadName(place));
            }
            if keyring.find(kid).is_some() {
                return Err(BadKeys::SameName(place));
            }
            if keyring.keys.len() == KEYS_MAX {
                return Err(BadKeys::TooMany);
            }
            keyring.keys.push(Kek::parse(kid, key).ok_or(BadKeys::BadKey(place))?);
        }
        if keyring.keys.is_empty() { Err(BadKeys::Empty) } else { Ok(keyring) }
    }

    /// The key that wraps what is new; none if nothing new is sealed.
    pub(crate) fn writer(&self) -> Option<&Kek> {
        self.keys.first().filter(|_| !self.writes_unsealed)
    }

    pub(crate) fn find(&self, kid: &str) -> Option<&Kek> {
        self.keys.iter().find(|key| key.kid == kid)
    }

    /// The names, in their order.
    pub(crate) fn kids(&self) -> String {
        self.keys.iter().map(|key| &*key.kid).collect::<Vec<_>>().join(", ")
    }
}

impl Kek {
    fn parse(kid: &str, key: &str) -> Option<Self> {
        let mut bytes = BASE64.decode(key.trim()).ok()?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes).ok();
        let values = Prk::new_less_safe(HKDF_SHA256, &bytes);
        erase(&mut bytes);
        Some(Self { kid: kid.to_owned(), key: LessSafeKey::new(key?), values })
    }

    pub(crate) fn kid(&self) -> &str {
        &self.kid
    }

    /// Seals a data key. There are few under a key, so that a nonce by chance is never
    /// the same (NIST SP 800-38D, 8.3: up to 2^32).
    pub(super) fn wrap(
        &self,
        kind: FileKind,
        dek: &[u8; KEY_BYTES],
    ) -> Result<[u8; WRAPPED_BYTES], NoRandom> {
        let nonce: [u8; NONCE_LEN] = random()?;
        let mut wrapped = [0; WRAPPED_BYTES];
        let (head, rest) = wrapped.split_at_mut(NONCE_LEN);
        head.copy_from_slice(&nonce);
        let (key, tag) = rest.split_at_mut(KEY_BYTES);
        key.copy_from_slice(dek);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let sealed = self.key.seal_in_place_separate_tag(nonce, Aad::from(self.about(kind)), key);
        tag.copy_from_slice(sealed.expect("a key is short").as_ref());
        Ok(wrapped)
    }

    /// The data key, if it was sealed with this one, for that sort of file.
    pub(super) fn unwrap(&self, kind: FileKind, wrapped: &[u8; WRAPPED_BYTES]) -> Option<[u8; KEY_BYTES]> {
        let mut sealed = *wrapped;
        let (nonce, rest) = sealed.split_at_mut(NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(nonce).expect("it has its length");
        let dek = self.key.open_in_place(nonce, Aad::from(self.about(kind)), rest).ok()?;
        let dek = <[u8; KEY_BYTES]>::try_from(&*dek).ok();
        erase(&mut sealed);
        dek
    }

    fn about(&self, kind: FileKind) -> Vec<u8> {
        [b"analytics-relay wrapped key 1\0", kind.name().as_bytes(), b"\0", self.kid.as_bytes()].concat()
    }
}

/// The system gave no random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the system gives no random bytes")]
pub struct NoRandom;

/// Bytes that nobody can guess.
pub(super) fn random<const N: usize>() -> Result<[u8; N], NoRandom> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| NoRandom)?;
    Ok(bytes)
}

/// A new key as the settings take it.
pub(crate) fn new_kek(kid: &str) -> Result<String, NoRandom> {
    let mut key: [u8; KEY_BYTES] = random()?;
    let entry = format!("{kid}:{}", BASE64_STANDARD.encode(key));
    erase(&mut key);
    Ok(entry)
}

/// A name for a key that has none yet: the day, and what tells two of one day apart.
pub(crate) fn new_kid(now_ms: i64) -> Result<String, NoRandom> {
    let [high, low] = random()?;
    let day: String = crate::time::rfc_3339(now_ms).chars().filter(char::is_ascii_digit).take(8).collect();
    Ok(format!("kek-{day}-{high:02x}{low:02x}"))
}

/// True for what can be the name of a key.
pub(crate) fn is_kid(text: &str) -> bool {
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=64).contains(&text.len()) && text.bytes().all(is_legal) && text != NONE
}

/// Leaves nothing of a key in this memory. The compiler must believe that it is read.
pub(super) fn erase(key: &mut [u8]) {
    key.fill(0);
    black_box(key);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> String {
        BASE64_STANDARD.encode([byte; KEY_BYTES])
    }

    #[test]
    fn several_keys_are_read_and_the_first_one_writes() {
        let text = format!("# of 2026\nnew:{},\n\n old.1:{} \r\n", key(1), key(2).trim_end_matches('='));
        let keyring = Keyring::parse(&text).unwrap();
        assert_eq!(keyring.kids(), "new, old.1");
        assert_eq!(keyring.writer().map(Kek::kid), Some("new"));
        let keyring = Keyring::parse(&format!("none,{text}")).unwrap_err();
        assert_eq!(keyring, BadKeys::NoName(2), "a comment begins its line");
        let keyring = Keyring::parse(&format!("none\n{text}")).unwrap();
        assert!(keyring.writer().is_none() && keyring.find("new").is_some());
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place_and_never_shown() {
        let good = key(7);
        for (text, wrong) in [
            (String::new(), BadKeys::Empty),
            ("none".to_owned(), BadKeys::Empty),
            (good.clone(), BadKeys::NoName(1)),
            (format!("a:{good},b c:{good}"), BadKeys::BadName(2)),
            (format!("a:{good},none:{good}"), BadKeys::BadName(2)),
            (format!(":{good}"), BadKeys::BadName(1)),
            (format!("{}:{good}", "k".repeat(65)), BadKeys::BadName(1)),
            (format!("a:{}", BASE64_STANDARD.encode([1; 31])), BadKeys::BadKey(1)),
            (format!("a:{}", BASE64_STANDARD.encode([1; 33])), BadKeys::BadKey(1)),
            (format!("a:{good},b:not base64"), BadKeys::BadKey(2)),
            (format!("a:{good}\na:{}", key(8)), BadKeys::SameName(2)),
            ((0..65).map(|n| format!("k{n}:{good}\n")).collect(), BadKeys::TooMany),
        ] {
            let error = Keyring::parse(&text).unwrap_err();
            assert_eq!(error, wrong);
            assert!(!error.to_string().contains(&good) && !format!("{error:?}").contains(&good));
        }
        let shown = format!("{:?}", Keyring::parse(&format!("a:{good}")).unwrap());
        assert!(shown.contains("a:***") && !shown.contains(&good), "{shown}");
    }

    #[test]
    fn a_data_key_is_unwrapped_by_its_key_for_its_sort_of_file_only() {
        let keyring = Keyring::parse(&format!("a:{},b:{}", key(1), key(2))).unwrap();
        let (a, b) = (keyring.find("a").unwrap(), keyring.find("b").unwrap());
        let wrapped = a.wrap(FileKind::Segment, &[9; KEY_BYTES]).unwrap();
        assert_eq!(a.unwrap(FileKind::Segment, &wrapped), Some([9; KEY_BYTES]));
        assert_eq!(a.unwrap(FileKind::Spill, &wrapped), None);
        assert_eq!(b.unwrap(FileKind::Segment, &wrapped), None);
        let renamed = Keyring::parse(&format!("c:{}", key(1))).unwrap();
        assert_eq!(
            renamed.find("c").unwrap().unwrap(FileKind::Segment, &wrapped),
            None,
            "nor under another name"
        );
        for bit in 0..WRAPPED_BYTES * 8 {
            let mut flipped = wrapped;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(a.unwrap(FileKind::Segment, &flipped), None, "bit {bit}");
        }
        assert_ne!(a.wrap(FileKind::Segment, &[9; KEY_BYTES]).unwrap(), wrapped, "never the same nonce");
    }

    #[test]
    fn a_new_key_is_read_back() {
        let kid = new_kid(1_795_000_000_000).unwrap();
        assert!(kid.starts_with("kek-2026") && is_kid(&kid), "{kid}");
        let (one, two) = (new_kek(&kid).unwrap(), new_kek(&kid).unwrap());
        assert_ne!(one, two);
        assert_eq!(Keyring::parse(&one).unwrap().kids(), kid);
    }
}

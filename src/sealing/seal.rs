//! One file's key: what it seals, and the blocks that keep it.
//!
//! **A seal** is 25 bytes longer than what it hides:
//!
//! | bytes | what |
//! |---|---|
//! | 1 | the scheme, now 1: AES-256-GCM under HKDF-SHA-256 of the file's data key, no salt |
//! | 8 | the counter, little-endian; the nonce is four zeros and it, big-endian |
//! | | what is hidden, and 16 bytes of tag |
//!
//! **A key block** is 4096 bytes, or fewer where something stands before it: one JSON
//! object, blanks, and a line break. Whatever else is in a file, this can be read by a
//! person: `{"relay_key":1,"file":"segment","kid":"2026-11","wrapped":"…","crc":"…"}`.
//! `wrapped` is 12 bytes of nonce, the data key under the key-encrypting key of that name,
//! and 16 bytes of tag, in base64; `crc` the CRC-32 of all that stands before it.

use std::{io, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, Salt},
};
use serde::Deserialize;
use thiserror::Error;

use super::keyring::{KEY_BYTES, Kek, Keyring, Locked, erase, random};

/// Where the second key block of a file begins; where what it holds begins, is twice that.
pub(crate) const KEY_BLOCK_BYTES: usize = 4096;
/// What a seal adds to what it hides.
pub(crate) const SEAL_BYTES: usize = 1 + COUNTER_BYTES + TAG_BYTES;
/// What a data key is sealed as.
pub(super) const WRAPPED_BYTES: usize = NONCE_LEN + KEY_BYTES + TAG_BYTES;
/// The only scheme so far. That of tenants will name the tenant's key, which is the salt.
pub(crate) const SCHEME: u8 = 1;

const COUNTER_BYTES: usize = 8;
const TAG_BYTES: usize = 16;
const BLOCK_VERSION: u32 = 1;
const CRC: &str = r#","crc":""#;

/// A sort of file. The same data key seals differently for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FileKind {
    /// A segment of the log.
    Segment,
    /// Events that wait for the next start.
    Spill,
    DeadLetters,
    /// Items of batches that broke a rule.
    Refused,
}

impl FileKind {
    const ALL: [Self; 4] = [Self::Segment, Self::Spill, Self::DeadLetters, Self::Refused];

    /// Its name in key blocks.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Segment => "segment",
            Self::Spill => "spill",
            Self::DeadLetters => "dead_letters",
            Self::Refused => "refused",
        }
    }
}

/// What was sealed is not what stands there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("its seal is broken")]
pub(crate) struct BrokenSeal;

/// Opens what one file holds.
pub(crate) struct FileKey(LessSafeKey);

impl std::fmt::Debug for FileKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FileKey(***)")
    }
}

impl FileKey {
    /// Erases the data key.
    fn derive(dek: &mut [u8; KEY_BYTES], kind: FileKind) -> Self {
        let about: [&[u8]; 3] = [b"analytics-relay sealed file", &[SCHEME], kind.name().as_bytes()];
        let derived = Salt::new(HKDF_SHA256, &[]).extract(dek);
        let key = UnboundKey::from(derived.expand(&about, &AES_256_GCM).expect("a key is short"));
        erase(dek);
        Self(LessSafeKey::new(key))
    }

    /// What is hidden in a seal that was made beside `clear`, and its counter. Says in
    /// `secret` what it was.
    pub(crate) fn open(&self, clear: &[u8], sealed: &[u8], secret: &mut Vec<u8>) -> Result<u64, BrokenSeal> {
        secret.clear();
        let (head, hidden) = sealed.split_at_checked(1 + COUNTER_BYTES).ok_or(BrokenSeal)?;
        if head[0] != SCHEME {
            return Err(BrokenSeal);
        }
        let counter = u64::from_le_bytes(head[1..].try_into().expect("its length"));
        secret.extend_from_slice(hidden);
        match self.0.open_in_place(nonce(counter), Aad::from(clear), secret) {
            Ok(opened) => {
                let length = opened.len();
                secret.truncate(length);
                Ok(counter)
            }
            Err(_) => {
                secret.clear();
                Err(BrokenSeal)
            }
        }
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - COUNTER_BYTES..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Seals what one file gets, as long as it is open. Not a second time: who opens the file
/// again begins another.
#[derive(Debug)]
pub(crate) struct Sealer {
    key: Arc<FileKey>,
    next: u64,
}

impl Sealer {
    /// A sealer with a new data key, and that key as the file keeps it.
    pub(super) fn begin(kek: &Kek, kind: FileKind) -> io::Result<(Self, KeyBlock)> {
        let mut dek: [u8; KEY_BYTES] = random().map_err(io::Error::other)?;
        let wrapped = kek.wrap(kind, &dek).map_err(io::Error::other);
        let key = Arc::new(FileKey::derive(&mut dek, kind));
        let block = KeyBlock { kind, kid: kek.kid().to_owned(), wrapped: wrapped? };
        Ok((Self { key, next: 0 }, block))
    }

    /// Hides `secret`; whoever opens it must show the same `clear`. `sealed` is what it
    /// becomes; one that `is_bad`, which must be rare, is made again under the next counter.
    pub(crate) fn seal(
        &mut self,
        clear: &[u8],
        secret: &[u8],
        is_bad: impl Fn(&[u8]) -> bool,
        sealed: &mut Vec<u8>,
    ) {
        loop {
            let counter = self.next;
            // At a frame a nanosecond it takes centuries.
            self.next = counter.checked_add(1).expect("nobody counts that far");
            sealed.clear();
            sealed.push(SCHEME);
            sealed.extend_from_slice(&counter.to_le_bytes());
            sealed.extend_from_slice(secret);
            let hidden = &mut sealed[1 + COUNTER_BYTES..];
            let tag = self.key.0.seal_in_place_separate_tag(nonce(counter), Aad::from(clear), hidden);
            sealed.extend_from_slice(tag.expect("a secret is short").as_ref());
            if !is_bad(sealed) {
                return;
            }
        }
    }

    /// What opens it again.
    pub(crate) fn key(&self) -> Arc<FileKey> {
        self.key.clone()
    }
}

/// A file's data key as it stands on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyBlock {
    kind: FileKind,
    kid: String,
    wrapped: [u8; WRAPPED_BYTES],
}

/// As it is written.
#[derive(Deserialize)]
struct Written {
    relay_key: u32,
    file: String,
    kid: String,
    wrapped: String,
    crc: String,
}

impl KeyBlock {
    /// The block's bytes: `length` of them.
    pub(crate) fn encode(&self, length: usize) -> Vec<u8> {
        let Self { kind, kid, wrapped } = self;
        let wrapped = BASE64_STANDARD.encode(wrapped);
        let text = format!(
            r#"{{"relay_key":{BLOCK_VERSION},"file":"{}","kid":"{kid}","wrapped":"{wrapped}""#,
            kind.name()
        );
        let mut bytes = format!("{text}{CRC}{:08x}\"}}", crc32fast::hash(text.as_bytes())).into_bytes();
        bytes.resize(length - 1, b' ');
        bytes.push(b'\n');
        bytes
    }

    /// Both blocks of a file of lines.
    pub(crate) fn encode_lines(&self) -> Vec<u8> {
        self.encode(KEY_BLOCK_BYTES).repeat(2)
    }

    /// The name of the key that it is sealed with.
    pub(crate) fn kid(&self) -> &str {
        &self.kid
    }

    /// None if it is damaged, or none of ours.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let end = memchr::memchr(b'}', bytes)?;
        let text = &bytes[..=end];
        let covered = &text[..memchr::memmem::find(text, CRC.as_bytes())?];
        let written: Written = serde_json::from_slice(text).ok()?;
        if written.relay_key != BLOCK_VERSION || written.crc != format!("{:08x}", crc32fast::hash(covered)) {
            return None;
        }
        let kind = FileKind::ALL.into_iter().find(|kind| kind.name() == written.file)?;
        let wrapped = BASE64_STANDARD.decode(written.wrapped).ok()?.try_into().ok()?;
        Some(Self { kind, kid: written.kid, wrapped })
    }
}

/// The two places at which a file keeps its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyBlocks {
    slots: [Slot; 2],
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    block: Option<KeyBlock>,
    /// Byte for byte as it was written.
    is_whole: bool,
}

impl Slot {
    fn parse(bytes: &[u8], length: usize) -> Self {
        let block = KeyBlock::parse(bytes);
        let is_whole = block.as_ref().is_some_and(|block| block.encode(length) == bytes);
        Self { block, is_whole }
    }
}

impl KeyBlocks {
    /// From the first bytes of a file, as many of the 8192 as there are; the first block
    /// begins at `first_at`. None if neither block is there: it is not sealed, or not any
    /// more.
    pub(crate) fn parse(start: &[u8], first_at: usize) -> Option<Self> {
        let blocks = Self::parse_sealed(start, first_at);
        blocks.slots.iter().any(|slot| slot.block.is_some()).then_some(blocks)
    }

    /// The same for a file that is known to be sealed.
    pub(crate) fn parse_sealed(start: &[u8], first_at: usize) -> Self {
        let slot = |from: usize, to: usize| {
            Slot::parse(start.get(from..to.min(start.len())).unwrap_or_default(), to - from)
        };
        Self { slots: [slot(first_at, KEY_BLOCK_BYTES), slot(KEY_BLOCK_BYTES, 2 * KEY_BLOCK_BYTES)] }
    }

    /// The blocks that are not as they were written: 0 or 1.
    pub(crate) fn damaged(&self) -> impl Iterator<Item = usize> {
        self.slots.iter().enumerate().filter(|(_, slot)| !slot.is_whole).map(|(place, _)| place)
    }

    /// The names of the keys that either block is sealed with.
    pub(crate) fn kids(&self) -> Vec<&str> {
        let mut kids: Vec<&str> = self.blocks().map(KeyBlock::kid).collect();
        kids.dedup();
        kids
    }

    fn blocks(&self) -> impl Iterator<Item = &KeyBlock> {
        self.slots.iter().filter_map(|slot| slot.block.as_ref())
    }

    /// The key that they keep.
    pub(super) fn open(&self, keyring: Option<&Keyring>, kind: FileKind) -> Result<FileKey, Locked> {
        self.unwrap(keyring, kind).map(|(_, mut dek)| FileKey::derive(&mut dek, kind))
    }

    /// The data key, and the place of the block that gave it.
    fn unwrap(&self, keyring: Option<&Keyring>, kind: FileKind) -> Result<(usize, [u8; KEY_BYTES]), Locked> {
        let mut locked = Locked::Damaged;
        for (place, slot) in self.slots.iter().enumerate() {
            let Some(block) = slot.block.as_ref().filter(|block| block.kind == kind) else { continue };
            let kid = block.kid.clone();
            let Some(kek) = keyring.and_then(|keyring| keyring.find(&kid)) else {
                if locked == Locked::Damaged {
                    let given = keyring.map_or("none".to_owned(), Keyring::kids);
                    locked = Locked::NoKey { kid, given };
                }
                continue;
            };
            match kek.unwrap(kind, &block.wrapped) {
                Some(dek) => return Ok((place, dek)),
                None => locked = Locked::WrongKey { kid },
            }
        }
        Err(locked)
    }

    /// What is to be written, one after the other and each synced before the next, so that
    /// both blocks are whole and sealed with the first key of the ring: places in the file,
    /// and bytes. Nothing if they are. The block that the key was got from comes last, so at
    /// any moment one of them is good.
    pub(crate) fn rewrap(
        &self,
        keyring: &Keyring,
        kind: FileKind,
        first_at: usize,
    ) -> Result<Vec<(u64, Vec<u8>)>, Locked> {
        let Some(writer) = keyring.writer() else { return Ok(Vec::new()) };
        let is_done =
            |slot: &Slot| slot.is_whole && slot.block.as_ref().is_some_and(|it| it.kid == writer.kid());
        let (source, mut dek) = self.unwrap(Some(keyring), kind)?;
        if self.slots.iter().all(is_done) {
            erase(&mut dek);
            return Ok(Vec::new());
        }
        let wrapped = writer.wrap(kind, &dek);
        erase(&mut dek);
        let block = KeyBlock { kind, kid: writer.kid().to_owned(), wrapped: wrapped? };
        let write = |place: usize| match place {
            0 => (first_at as u64, block.encode(KEY_BLOCK_BYTES - first_at)),
            _ => (KEY_BLOCK_BYTES as u64, block.encode(KEY_BLOCK_BYTES)),
        };
        Ok(vec![write(1 - source), write(source)])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::sealing::{Sealing, test_keys as sealing};

    fn begun(kind: FileKind) -> (Sealer, KeyBlock) {
        sealing("a").begin(kind).unwrap().expect("it seals")
    }

    fn seal(sealer: &mut Sealer, clear: &[u8], secret: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::new();
        sealer.seal(clear, secret, |_| false, &mut sealed);
        sealed
    }

    /// As two other implementations have it (Python's `cryptography` 48, Node 20): the
    /// format is a promise.
    #[test]
    fn the_bytes_are_pinned() {
        let mut dek = std::array::from_fn(|at| at as u8);
        let key = FileKey::derive(&mut dek, FileKind::Segment);
        assert_eq!(dek, [0; KEY_BYTES], "it is erased");
        let mut sealer = Sealer { key: Arc::new(key), next: 5 };
        let sealed = seal(&mut sealer, b"clear", b"secret");
        let hex: String = sealed.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, VECTOR);
        let mut secret = Vec::new();
        assert_eq!(sealer.key().open(b"clear", &sealed, &mut secret), Ok(5));
        assert_eq!(secret, b"secret");
    }

    const VECTOR: &str = "01050000000000000073ba2afe660ec6064337927c59a61b8d8e021b0313fc";

    #[test]
    fn what_was_sealed_comes_back_and_nothing_else_does() {
        let (mut sealer, _) = begun(FileKind::Spill);
        let sealed = seal(&mut sealer, b"seq 7", b"a canary");
        assert_eq!(sealed.len(), 8 + SEAL_BYTES);
        assert!(memchr::memmem::find(&sealed, b"canary").is_none());
        let next = seal(&mut sealer, b"seq 8", b"a canary");
        let key = sealer.key();
        let mut secret = b"old".to_vec();
        assert_eq!(key.open(b"seq 7", &sealed, &mut secret), Ok(0));
        assert_eq!(secret, b"a canary");
        assert_eq!(key.open(b"seq 8", &next, &mut secret), Ok(1));
        for (clear, sealed) in [(&b"seq 8"[..], &sealed), (b"seq 7", &next), (b"", &sealed)] {
            assert_eq!(key.open(clear, sealed, &mut secret), Err(BrokenSeal));
            assert!(secret.is_empty(), "nothing of it is shown");
        }
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key.open(b"seq 7", &flipped, &mut secret), Err(BrokenSeal), "bit {bit}");
        }
        for cut in 0..sealed.len() {
            assert_eq!(key.open(b"seq 7", &sealed[..cut], &mut secret), Err(BrokenSeal), "cut at {cut}");
        }
    }

    /// The same events in the same places, as after a torn end was cut: nothing repeats.
    #[test]
    fn no_nonce_is_used_twice_and_no_key_in_two_files() {
        let mut seen = HashSet::new();
        for _ in 0..20 {
            let (mut sealer, block) = begun(FileKind::Segment);
            assert!(seen.insert(block.wrapped.to_vec()), "a data key wrapped as another");
            let mut counters = HashSet::new();
            for _ in 0..20 {
                let sealed = seal(&mut sealer, b"seq 1", b"the same");
                assert!(counters.insert(sealed[1..9].to_vec()), "a counter comes twice");
                assert!(seen.insert(sealed[9..].to_vec()), "sealed the same twice");
            }
        }
    }

    #[test]
    fn a_key_of_one_sort_of_file_opens_no_other() {
        let dek = [3; KEY_BYTES];
        let mut sealer =
            Sealer { key: Arc::new(FileKey::derive(&mut dek.clone(), FileKind::Spill)), next: 0 };
        let sealed = seal(&mut sealer, b"", b"x");
        for kind in [FileKind::Segment, FileKind::DeadLetters, FileKind::Refused] {
            let key = FileKey::derive(&mut dek.clone(), kind);
            assert_eq!(key.open(b"", &sealed, &mut Vec::new()), Err(BrokenSeal));
        }
    }

    /// One byte stands in most seals: each that holds it is made anew.
    #[test]
    fn what_readers_find_their_place_by_stands_in_no_seal() {
        let (mut sealer, _) = begun(FileKind::Segment);
        let mut sealed = Vec::new();
        for n in 0..200 {
            sealer.seal(b"", &[7; 40], |sealed| sealed.contains(&0xFE), &mut sealed);
            assert!(!sealed.contains(&0xFE), "{n}");
        }
        assert!(sealer.next > 220, "{}", sealer.next);
    }

    fn file(block: &KeyBlock) -> Vec<u8> {
        block.encode_lines()
    }

    #[test]
    fn a_file_is_opened_as_long_as_one_of_its_blocks_is_whole() {
        let (mut sealer, block) = begun(FileKind::Refused);
        let sealed = seal(&mut sealer, b"", b"x");
        let whole = file(&block);
        assert_eq!(whole.len(), 2 * KEY_BLOCK_BYTES);
        let mut rng = fastrand::Rng::with_seed(3);
        let keys = sealing("a");
        for bit in (0..whole.len() * 8).filter(|bit| bit % 8 == 0 || rng.u8(..8) == 0) {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let blocks = KeyBlocks::parse(&flipped, 0).unwrap();
            assert_eq!(blocks.damaged().collect::<Vec<_>>(), [bit / 8 / KEY_BLOCK_BYTES], "bit {bit}");
            let key = keys.open(&blocks, FileKind::Refused).unwrap();
            key.open(b"", &sealed, &mut Vec::new()).unwrap();
        }
        let mut gone = whole;
        gone[..KEY_BLOCK_BYTES].fill(0);
        assert!(keys.open(&KeyBlocks::parse(&gone, 0).unwrap(), FileKind::Refused).is_ok());
        gone[KEY_BLOCK_BYTES + 20] ^= 1;
        assert_eq!(KeyBlocks::parse(&gone, 0), None);
        let sealed = KeyBlocks::parse_sealed(&gone, 0);
        assert_eq!(keys.open(&sealed, FileKind::Refused).unwrap_err(), Locked::Damaged);
    }

    #[test]
    fn a_key_that_is_missing_or_wrong_is_named() {
        let (_, block) = begun(FileKind::Segment);
        let blocks = KeyBlocks::parse(&file(&block), 0).unwrap();
        assert_eq!(blocks.kids(), ["a"]);
        let locked = |sealing: &Sealing| sealing.open(&blocks, FileKind::Segment).unwrap_err();
        let no_key = |given: &str| Locked::NoKey { kid: "a".into(), given: given.into() };
        assert_eq!(locked(&Sealing::default()), no_key("none"));
        assert_eq!(locked(&sealing("b,c")), no_key("b, c"));
        let wrong = Keyring::parse(&format!("a:{}", BASE64_STANDARD.encode([1; 32]))).unwrap();
        assert_eq!(locked(&Sealing::new(Some(wrong))), Locked::WrongKey { kid: "a".into() });
        assert!(sealing("none,a").open(&blocks, FileKind::Segment).is_ok());
        assert_eq!(sealing("a").open(&blocks, FileKind::Spill).unwrap_err(), Locked::Damaged);
    }

    /// Writes as far as a step, and half of it.
    fn write_until(file: &mut [u8], writes: &[(u64, Vec<u8>)], steps: usize, half: bool) {
        for (step, (at, bytes)) in writes.iter().enumerate().take(steps + 1) {
            let length = if step < steps { bytes.len() } else { bytes.len() / 2 * usize::from(half) };
            let at = usize::try_from(*at).unwrap();
            // A disk that writes the end first is no better.
            file[at..at + length].copy_from_slice(&bytes[..length]);
        }
    }

    #[test]
    fn a_rewrap_that_is_killed_anywhere_leaves_a_file_that_both_keys_open() {
        for damaged in [None, Some(0), Some(1)] {
            let (mut sealer, block) = begun(FileKind::Segment);
            let sealed = seal(&mut sealer, b"", b"x");
            let mut old = vec![7; 32];
            old.extend(block.encode(KEY_BLOCK_BYTES - 32));
            old.extend(block.encode(KEY_BLOCK_BYTES));
            if let Some(place) = damaged {
                old[place * KEY_BLOCK_BYTES + 40] ^= 1;
            }
            let both = sealing("b,a");
            let ring = both.keyring().unwrap();
            let parse = |file: &[u8]| KeyBlocks::parse(file, 32).unwrap();
            let writes = parse(&old).rewrap(ring, FileKind::Segment, 32).unwrap();
            assert_eq!(writes.len(), 2);
            for (steps, half) in [(0, false), (0, true), (1, false), (1, true), (2, false)] {
                let mut file = old.clone();
                write_until(&mut file, &writes, steps, half);
                assert_eq!(file[..32], [7; 32]);
                let key = both.open(&parse(&file), FileKind::Segment).unwrap();
                key.open(b"", &sealed, &mut Vec::new()).unwrap();
                // Done again it is finished, and then there is nothing to do.
                let again = parse(&file).rewrap(ring, FileKind::Segment, 32).unwrap();
                write_until(&mut file, &again, 2, false);
                assert_eq!(parse(&file).rewrap(ring, FileKind::Segment, 32), Ok(Vec::new()));
                let key = sealing("b").open(&parse(&file), FileKind::Segment).unwrap();
                key.open(b"", &sealed, &mut Vec::new()).unwrap();
                assert_eq!(parse(&file).kids(), ["b"]);
            }
        }
    }
}

//! A block's columns as bytes. This file is the format: version 1.
//!
//! A block holds the events of one website or app, by ascending time, those of one time by
//! the JSON text of their ids. Each column is a text of bytes of its own (a row of the
//! table `col`), so that a question reads what it is about. Numbers are little endian;
//! *varint* is LEB128 of 64 bits, seven bits a byte, the lowest first.
//!
//! ```text
//! column   := version:u8 = 1, body, crc:u32      CRC-32 (IEEE) of what is before it
//! ```
//!
//! | number | column | body |
//! |---|---|---|
//! | 0 | directory | count:varint, then for each column of values, in the order of their numbers from 16 on: length:varint, path |
//! | 1 | times | first:i64, then for each further row the difference to the one before: varint |
//! | 2 | who | keys: whose each event is |
//! | 3 | sessions | keys: by what its session is found |
//! | 4 | what | texts: a digit, which is its class (0 view, 1 ping, 2 action, 3 silent) plus 4 for a machine, and its name |
//! | 5 | ids | texts: the event's id as JSON |
//! | 6 | accepted | packed zigzag varints: accepted minus time, wrapping |
//! | 7 | skeletons | texts: an event's JSON with U+0001 for each value that is a column |
//! | 16… | values | texts: JSON; which path is said by the directory |
//!
//! ```text
//! keys     := count:u32, key:u64 × count, codes   code n is the key with index n
//! texts    := count:u32, how:u8, dictionary, codes   code 0 is the lack of one, n is text n-1
//!             how 0   packed(LZ4) texts
//!             how 1   packed(zlib) texts
//!             how 2   uuid:[u8; 16] × count       a text is "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
//!             texts   := length:varint × count, text × count
//! packed   := unpacked:u32, packed:u32, bytes
//! codes    := 0, code:u32                         of every row
//!           | 1, 2 or 4 = bytes of one, packed(LZ4) planes   the lowest byte of all rows first
//!           | 255                                 row n has code n+1
//! ```
//!
//! Numbers of columns are for ever: one that is not known is not read. A version that is
//! not known is damage, which costs the block. Whatever the bytes are, reading ends in an
//! error at worst.

use std::io::{Read, Write};

use flate2::{Compression, read::ZlibDecoder, write::ZlibEncoder};

use crate::scan::{
    chunk::KeyColumn,
    table::{COLUMNS_MAX, Dictionary, Table, TextColumn},
};

/// The version that is written.
pub(crate) const VERSION: u8 = 1;
/// Most bytes of the texts of a column.
const TEXT_BYTES_MAX: usize = 1 << 30;

pub(crate) const DIRECTORY: u8 = 0;
pub(crate) const TIMES: u8 = 1;
pub(crate) const WHO: u8 = 2;
pub(crate) const SESSIONS: u8 = 3;
pub(crate) const WHAT: u8 = 4;
pub(crate) const IDS: u8 = 5;
pub(crate) const ACCEPTED: u8 = 6;
pub(crate) const SKELETONS: u8 = 7;
pub(crate) const VALUES: u8 = 16;

/// A column that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a column is damaged: {0}")]
pub struct Damaged(pub(crate) &'static str);

/// A block to be written.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) rows: usize,
    pub(crate) first_ms: i64,
    pub(crate) last_ms: i64,
    pub(crate) bots: usize,
    /// Different sessions.
    pub(crate) sessions: usize,
    /// Bytes of memory that its events take, about.
    pub(crate) bytes: usize,
    pub(crate) columns: Vec<(u8, Vec<u8>)>,
}

/// Encodes a table that has rows. Fails if it could not be read again.
pub(crate) fn encode(table: &Table) -> Result<Encoded, Damaged> {
    let order = table.order(&[]);
    let times: Vec<i64> = order.iter().map(|row| table.times[*row as usize]).collect();
    let delays = order.iter().map(|row| {
        let (accepted, time) = (table.accepted[*row as usize], table.times[*row as usize]);
        accepted.wrapping_sub(time)
    });
    let (who, _) = keys(order.iter().map(|row| table.who[*row as usize]));
    let (sessions, session_count) = keys(order.iter().map(|row| table.sessions[*row as usize]));
    let mut columns = vec![
        (DIRECTORY, directory(table)),
        (TIMES, encode_times(&times)),
        (WHO, who),
        (SESSIONS, sessions),
        (WHAT, texts(&table.what, &order)?),
        (IDS, unique_texts(&table.ids, &order)?),
        (ACCEPTED, encode_delays(delays)),
        (SKELETONS, texts(&table.skeletons, &order)?),
    ];
    for (number, column) in (VALUES..).zip(&table.paths) {
        columns.push((number, texts(&column.values, &order)?));
    }
    for (_, column) in &mut columns {
        column.insert(0, VERSION);
        let crc = crc32fast::hash(column);
        column.extend(crc.to_le_bytes());
    }
    let (first_ms, last_ms) = (times[0], times[times.len() - 1]);
    Ok(Encoded {
        rows: times.len(),
        first_ms,
        last_ms,
        bots: table.bots,
        sessions: session_count,
        bytes: table.bytes(),
        columns,
    })
}

impl Encoded {
    /// Reads all of it, as nothing may be deleted for a block that cannot be read.
    pub(crate) fn check(&self) -> Result<(), Damaged> {
        for (number, column) in &self.columns {
            match *number {
                DIRECTORY => drop(decode_directory(column)?),
                TIMES => drop(decode_times(column, self.rows)?),
                ACCEPTED => drop(decode_delays(column, self.rows)?),
                WHO | SESSIONS => drop(decode_keys(column, self.rows, true)?),
                _ => drop(decode_texts(column, self.rows)?),
            }
        }
        Ok(())
    }
}

fn directory(table: &Table) -> Vec<u8> {
    let mut body = Vec::new();
    varint(&mut body, table.paths.len() as u64);
    for column in &table.paths {
        varint(&mut body, column.path.len() as u64);
        body.extend(column.path.as_bytes());
    }
    body
}

fn encode_times(times: &[i64]) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + times.len() * 3);
    body.extend(times[0].to_le_bytes());
    for pair in times.windows(2) {
        varint(&mut body, pair[1].wrapping_sub(pair[0]) as u64);
    }
    body
}

fn encode_delays(delays: impl Iterator<Item = i64>) -> Vec<u8> {
    let mut numbers = Vec::new();
    for delay in delays {
        varint(&mut numbers, (delay << 1 ^ delay >> 63) as u64);
    }
    let mut body = Vec::new();
    pack(&mut body, &numbers, true);
    body
}

fn keys(keys: impl Iterator<Item = u64>) -> (Vec<u8>, usize) {
    let KeyColumn { keys, codes } = KeyColumn::of(keys);
    let mut body = Vec::with_capacity(keys.len() * 8 + codes.len());
    body.extend((keys.len() as u32).to_le_bytes());
    keys.iter().for_each(|key| body.extend(key.to_le_bytes()));
    encode_codes(&mut body, &codes, keys.len());
    (body, keys.len())
}

/// A column of texts, which are sorted, so that like ones lie together.
fn texts(column: &TextColumn, order: &[u32]) -> Result<Vec<u8>, Damaged> {
    let mut sorted: Vec<u32> = (1..=column.texts.len() as u32).collect();
    sorted.sort_unstable_by_key(|code| column.texts.get(*code));
    let mut renumbered = vec![0; sorted.len() + 1];
    (1..).zip(&sorted).for_each(|(new, old)| renumbered[*old as usize] = new);
    let code = |row: &u32| renumbered[column.codes.get(*row as usize).copied().unwrap_or_default() as usize];
    let codes: Vec<u32> = order.iter().map(code).collect();
    let mut body = Vec::new();
    let is_cold = sorted.len() * 8 > order.len();
    encode_dictionary(&mut body, sorted.iter().map(|code| column.texts.get(*code)), sorted.len(), is_cold)?;
    encode_codes(&mut body, &codes, sorted.len() + 1);
    Ok(body)
}

/// A text for each row.
fn unique_texts(texts: &Dictionary, order: &[u32]) -> Result<Vec<u8>, Damaged> {
    let mut body = Vec::new();
    encode_dictionary(&mut body, order.iter().map(|row| texts.get(row + 1)), order.len(), true)?;
    body.push(255);
    Ok(body)
}

fn encode_dictionary<'a>(
    body: &mut Vec<u8>,
    texts: impl Iterator<Item = &'a str> + Clone,
    count: usize,
    is_cold: bool,
) -> Result<(), Damaged> {
    body.extend((count as u32).to_le_bytes());
    if let Some(uuids) = texts.clone().map(uuid).collect::<Option<Vec<_>>>() {
        body.push(2);
        uuids.iter().for_each(|uuid| body.extend(uuid));
        return Ok(());
    }
    let mut all = Vec::new();
    texts.clone().for_each(|text| varint(&mut all, text.len() as u64));
    texts.for_each(|text| all.extend(text.as_bytes()));
    if all.len() > TEXT_BYTES_MAX {
        return Err(Damaged("it would be too large"));
    }
    body.push(u8::from(is_cold));
    pack(body, &all, is_cold);
    Ok(())
}

/// The bytes of a UUID as JSON, if it is the text that is made of them again.
fn uuid(text: &str) -> Option<[u8; 16]> {
    let text: &[u8; 38] = text.as_bytes().try_into().ok()?;
    let mut uuid = [0; 16];
    let mut digits = 0;
    for (at, byte) in text.iter().enumerate() {
        let digit = match (at, byte) {
            (0 | 37, b'"') | (9 | 14 | 19 | 24, b'-') => continue,
            (0 | 37 | 9 | 14 | 19 | 24, _) => return None,
            (_, b'0'..=b'9') => byte - b'0',
            (_, b'a'..=b'f') => byte - b'a' + 10,
            _ => return None,
        };
        uuid[digits / 2] |= if digits % 2 == 0 { digit << 4 } else { digit };
        digits += 1;
    }
    Some(uuid)
}

fn push_uuid(text: &mut String, uuid: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    text.push('"');
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push(HEX[usize::from(byte >> 4)].into());
        text.push(HEX[usize::from(byte & 15)].into());
    }
    text.push('"');
}

fn encode_codes(body: &mut Vec<u8>, codes: &[u32], count: usize) {
    if codes.iter().all(|code| *code == codes[0]) {
        body.push(0);
        body.extend(codes[0].to_le_bytes());
        return;
    }
    let width = match count {
        0..=0x100 => 1,
        0x101..=0x1_0000 => 2,
        _ => 4,
    };
    body.push(width);
    let planes = (0..width).flat_map(|plane| codes.iter().map(move |code| (code >> (8 * plane)) as u8));
    pack(body, &planes.collect::<Vec<_>>(), false);
}

fn pack(body: &mut Vec<u8>, bytes: &[u8], is_cold: bool) {
    let packed = if is_cold {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(2));
        encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("a vector takes any bytes")
    } else {
        lz4_flex::block::compress(bytes)
    };
    body.extend((bytes.len() as u32).to_le_bytes());
    body.extend((packed.len() as u32).to_le_bytes());
    body.extend(packed);
}

fn varint(body: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        body.push(number as u8 | 0x80);
        number >>= 7;
    }
    body.push(number as u8);
}

/// Checks a column; what is between its version and its sum.
fn body(column: &[u8]) -> Result<Bytes<'_>, Damaged> {
    let (rest, crc) = column.split_last_chunk().ok_or(Damaged("it is too short"))?;
    if crc32fast::hash(rest) != u32::from_le_bytes(*crc) {
        return Err(Damaged("its sum is wrong"));
    }
    match rest.split_first() {
        Some((&VERSION, body)) => Ok(Bytes(body)),
        _ => Err(Damaged("its version is not known")),
    }
}

/// The paths of a directory: the first is that of column [`VALUES`].
pub(crate) fn decode_directory(column: &[u8]) -> Result<Vec<String>, Damaged> {
    let mut bytes = body(column)?;
    let count = bytes.varint()? as usize;
    if count > COLUMNS_MAX {
        return Err(Damaged("it names too many columns"));
    }
    let path = |bytes: &mut Bytes<'_>| {
        let length = bytes.varint()? as usize;
        let path = std::str::from_utf8(bytes.take(length)?).map_err(|_| Damaged("a path is no text"))?;
        Ok(path.to_owned())
    };
    (0..count).map(|_| path(&mut bytes)).collect()
}

/// Ascending times.
pub(crate) fn decode_times(column: &[u8], rows: usize) -> Result<Vec<i64>, Damaged> {
    let mut bytes = body(column)?;
    let mut time = i64::from_le_bytes(*bytes.array()?);
    let mut times = Vec::with_capacity(rows.min(bytes.0.len() + 1));
    times.push(time);
    for _ in 1..rows {
        time = time.wrapping_add(bytes.varint()? as i64);
        times.push(time);
    }
    if !times.is_sorted() {
        return Err(Damaged("its times do not ascend"));
    }
    Ok(times)
}

/// Accepted minus time.
pub(crate) fn decode_delays(column: &[u8], rows: usize) -> Result<Vec<i64>, Damaged> {
    let numbers = body(column)?.packed(true, rows.saturating_mul(10))?;
    let mut numbers = Bytes(&numbers);
    let delay = |number: u64| (number >> 1) as i64 ^ -((number & 1) as i64);
    (0..rows).map(|_| numbers.varint().map(delay)).collect()
}

/// Keys; their codes only if they are asked for.
pub(crate) fn decode_keys(column: &[u8], rows: usize, with_codes: bool) -> Result<KeyColumn, Damaged> {
    let mut bytes = body(column)?;
    let count = u32::from_le_bytes(*bytes.array()?) as usize;
    let keys = bytes.take(count.saturating_mul(8))?.as_chunks::<8>().0;
    let keys = keys.iter().map(|key| u64::from_le_bytes(*key)).collect();
    let codes = if with_codes { bytes.codes(rows, count)? } else { Vec::new() };
    Ok(KeyColumn { keys, codes })
}

/// Texts.
pub(crate) fn decode_texts(column: &[u8], rows: usize) -> Result<TextColumn, Damaged> {
    let mut bytes = body(column)?;
    let count = u32::from_le_bytes(*bytes.array()?) as usize;
    if count > rows {
        return Err(Damaged("it has more texts than rows"));
    }
    let mut texts = Dictionary::default();
    match bytes.byte()? {
        how @ (0 | 1) => {
            let all = bytes.packed(how == 1, TEXT_BYTES_MAX)?;
            let mut lengths = Bytes(&all);
            let lengths: Vec<usize> =
                (0..count).map(|_| lengths.varint().map(|n| n as usize)).collect::<Result<_, _>>()?;
            let total = lengths.iter().try_fold(0_usize, |sum, length| sum.checked_add(*length));
            let start =
                total.and_then(|total| all.len().checked_sub(total)).ok_or(Damaged("a text is cut"))?;
            let mut rest = std::str::from_utf8(&all[start..]).map_err(|_| Damaged("a text is none"))?;
            for length in lengths {
                let (text, behind) = rest.split_at_checked(length).ok_or(Damaged("a text is cut"))?;
                texts.add(text);
                rest = behind;
            }
        }
        2 => {
            let mut text = String::with_capacity(38);
            for uuid in bytes.take(count.saturating_mul(16))?.chunks_exact(16) {
                text.clear();
                push_uuid(&mut text, uuid);
                texts.add(&text);
            }
        }
        _ => return Err(Damaged("its texts are of no known form")),
    }
    Ok(TextColumn { codes: bytes.codes(rows, count + 1)?, texts })
}

/// Bytes that are being read.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Damaged> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Damaged("it is cut"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Damaged> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Damaged("it is cut"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Damaged> {
        self.array::<1>().map(|byte| byte[0])
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, Damaged> {
        let mut number = 0;
        for (at, byte) in self.0.iter().take(10).enumerate() {
            number |= u64::from(byte & 0x7F) << (7 * at);
            if byte & 0x80 == 0 {
                self.0 = &self.0[at + 1..];
                return Ok(number);
            }
        }
        Err(Damaged("a number is cut"))
    }

    fn packed(&mut self, is_cold: bool, bytes_max: usize) -> Result<Vec<u8>, Damaged> {
        let unpacked = u32::from_le_bytes(*self.array()?) as usize;
        let packed = u32::from_le_bytes(*self.array()?) as usize;
        let packed = self.take(packed)?;
        if unpacked > bytes_max {
            return Err(Damaged("it would be too large"));
        }
        let bytes = if is_cold {
            let mut bytes = Vec::new();
            let mut decoder = ZlibDecoder::new(packed).take(unpacked as u64);
            decoder.read_to_end(&mut bytes).map_err(|_| Damaged("it cannot be unpacked"))?;
            bytes
        } else {
            // No bytes unpack to more than 255 times as many.
            if unpacked / 255 > packed.len() {
                return Err(Damaged("it cannot be unpacked"));
            }
            lz4_flex::block::decompress(packed, unpacked).map_err(|_| Damaged("it cannot be unpacked"))?
        };
        if bytes.len() == unpacked { Ok(bytes) } else { Err(Damaged("it is cut")) }
    }

    /// Codes of rows, each less than `count`.
    fn codes(&mut self, rows: usize, count: usize) -> Result<Vec<u32>, Damaged> {
        let width = self.byte()?;
        let codes: Vec<u32> = match width {
            0 => vec![u32::from_le_bytes(*self.array()?); rows],
            255 => (1..=rows as u32).collect(),
            1 | 2 | 4 => {
                let planes = self.packed(false, rows.saturating_mul(4))?;
                if planes.len() != rows * usize::from(width) {
                    return Err(Damaged("it has other rows"));
                }
                let mut planes = planes.chunks_exact(rows.max(1));
                let first = planes.next().unwrap_or_default();
                let mut codes: Vec<u32> = first.iter().map(|byte| u32::from(*byte)).collect();
                for (plane, shift) in planes.zip([8, 16, 24]) {
                    codes.iter_mut().zip(plane).for_each(|(code, byte)| *code |= u32::from(*byte) << shift);
                }
                codes
            }
            _ => return Err(Damaged("its codes are of no known width")),
        };
        let largest = codes.iter().copied().max().unwrap_or_default() as usize;
        if largest >= count { Err(Damaged("a code is of no text")) } else { Ok(codes) }
    }
}

/// What the fuzzer throws at the format: any bytes, of any kind of column.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_anything(bytes: &[u8]) {
    let Some(((rows, column), rest)) = bytes.split_first_chunk::<2>().map(|(rows, rest)| {
        (
            (usize::from(u16::from_le_bytes(*rows)), rest.first().copied().unwrap_or_default()),
            rest.get(1..).unwrap_or_default(),
        )
    }) else {
        return;
    };
    let mut whole = vec![VERSION];
    whole.extend(rest);
    whole.extend(crc32fast::hash(&whole).to_le_bytes());
    match column {
        DIRECTORY => drop(decode_directory(&whole)),
        TIMES => drop(decode_times(&whole, rows)),
        ACCEPTED => drop(decode_delays(&whole, rows)),
        WHO | SESSIONS => drop(decode_keys(&whole, rows, true)),
        _ => drop(decode_texts(&whole, rows)),
    }
    drop(decode_texts(rest, rows));
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::Event;

    use super::*;
    use crate::model::Keys;

    fn table(rows: usize) -> Table {
        let mut table = Table::new(Keys::new([1; 16]), [2; 16]);
        for n in 0..rows {
            let json = format!(
                r#"{{"id":"{:08x}-0000-4000-8000-000000000000","kind":"track","name":"n{}","anonymous_id":"d{}","time_ms":{},"accepted_ms":{},"properties":{{"n":{n}}}}}"#,
                rows - n,
                n % 7,
                n % 300,
                1_000_000 - n as i64 / 3,
                n
            );
            table.push(&Event::from_json(json.as_bytes()).unwrap());
        }
        table
    }

    fn column(encoded: &Encoded, number: u8) -> &[u8] {
        &encoded.columns.iter().find(|(one, _)| *one == number).unwrap().1
    }

    #[test]
    fn a_block_reads_as_it_was_written() {
        for rows in [1, 2, 1_000] {
            let table = table(rows);
            let (encoded, order) = (encode(&table).unwrap(), table.order(&[]));
            encoded.check().unwrap();
            assert!(Encoded { rows: rows + 1, ..encode(&table).unwrap() }.check().is_err());
            assert_eq!(decode_directory(column(&encoded, DIRECTORY)).unwrap().len(), table.paths.len());
            let times = decode_times(column(&encoded, TIMES), rows).unwrap();
            let delays = decode_delays(column(&encoded, ACCEPTED), rows).unwrap();
            let who = decode_keys(column(&encoded, WHO), rows, true).unwrap();
            let ids = decode_texts(column(&encoded, IDS), rows).unwrap();
            for (at, row) in order.iter().map(|row| *row as usize).enumerate() {
                assert_eq!(times[at], table.times[row]);
                assert_eq!(times[at] + delays[at], table.accepted[row]);
                assert_eq!(who.keys[who.codes[at] as usize], table.who[row]);
                assert_eq!(ids.get(at), table.ids.get(row as u32 + 1));
                for (number, path) in (VALUES..).zip(&table.paths) {
                    let values = decode_texts(column(&encoded, number), rows).unwrap();
                    assert_eq!(values.get(at), path.values.get(row));
                }
            }
        }
    }

    #[test]
    fn a_bit_that_tips_is_noticed() {
        let encoded = encode(&table(50)).unwrap();
        for (number, bytes) in &encoded.columns {
            for at in 0..bytes.len() {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << (at % 8);
                let damaged = match *number {
                    DIRECTORY => decode_directory(&bytes).is_err(),
                    TIMES => decode_times(&bytes, 50).is_err(),
                    ACCEPTED => decode_delays(&bytes, 50).is_err(),
                    WHO | SESSIONS => decode_keys(&bytes, 50, true).is_err(),
                    _ => decode_texts(&bytes, 50).is_err(),
                };
                assert!(damaged, "column {number}, byte {at}");
            }
        }
    }

    /// With sums that are right: what a fuzzer finds, in small.
    #[test]
    fn no_bytes_make_reading_panic() {
        let encoded = encode(&table(40)).unwrap();
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..20_000 {
            let (number, bytes) = &encoded.columns[random.usize(..encoded.columns.len())];
            let mut bytes = bytes[1..bytes.len() - 4].to_vec();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            bytes.truncate(random.usize(..=bytes.len()));
            let rows = if random.bool() { 40_u16 } else { random.u16(..) };
            read_anything(&[&rows.to_le_bytes()[..], &[*number], &bytes].concat());
        }
    }

    #[test]
    fn only_the_text_that_a_uuid_has_is_kept_as_one() {
        let text = "\"00010203-0405-0607-0809-0a0b0c0d0e0f\"";
        let mut again = String::new();
        push_uuid(&mut again, &uuid(text).unwrap());
        assert_eq!(again, text);
        for text in [&text.to_uppercase(), &text.replace('-', "0"), &text.replace('"', " "), &text[1..]] {
            assert_eq!(uuid(text), None, "{text}");
        }
    }
}

//! Values of which only a hash is passed on.
//!
//! | form | what is hashed | how |
//! |---|---|---|
//! | `hmac` | the text as it is | HMAC-SHA256 with the relay's own key: who lacks it cannot try out whose it is |
//! | `meta` | what Meta's "customer information parameters" want | SHA-256 |
//! | `google` | what Google's "format user data" wants | SHA-256 |
//!
//! Both vendors match hashes with their own, and so the smallest difference before hashing
//! costs the match: each field has its form. What is a hash already, 64 hexadecimal digits,
//! is not hashed by these two again. A plain SHA-256 is a name for somebody, and not
//! anonymous. Rules as the two vendors document them, checked 2026-11-26.

use std::fmt;

use analytics_relay_providers::Secret;
use ring::{digest, hmac};

/// Hexadecimal digits of a SHA-256.
const DIGITS: usize = 64;
/// Bytes that a key has at least: what is shorter is found by trying.
const KEY_BYTES_MIN: usize = 16;

/// How a value is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Hmac,
    Meta,
    Google,
}

impl Form {
    pub(super) const ALL: [Self; 3] = [Self::Hmac, Self::Meta, Self::Google];

    /// Its name in the file of rules.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Hmac => "hmac",
            Self::Meta => "meta",
            Self::Google => "google",
        }
    }
}

/// What a value is, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Email,
    Phone,
    Name,
    City,
    State,
    Zip,
    Country,
    Birthdate,
    Gender,
    Other,
}

impl What {
    /// By a name as [`plain`](super::keys::plain) makes it.
    pub(super) fn of(name: &str) -> Self {
        match name {
            "email" | "em" | "emailaddress" | "useremail" | "$email" => Self::Email,
            "phone" | "ph" | "phonenumber" | "mobile" | "mobilephone" | "$phone" => Self::Phone,
            "firstname" | "fn" | "givenname" | "lastname" | "ln" | "familyname" | "surname" | "name" => {
                Self::Name
            }
            "city" | "ct" => Self::City,
            "state" | "st" | "region" => Self::State,
            "zip" | "zp" | "zipcode" | "postalcode" | "postcode" => Self::Zip,
            "country" | "countrycode" => Self::Country,
            "birthdate" | "birthday" | "dateofbirth" | "db" | "dob" => Self::Birthdate,
            "gender" | "ge" | "sex" => Self::Gender,
            _ => Self::Other,
        }
    }
}

/// The key of `hmac`.
#[derive(Clone)]
pub(super) struct HashKey(hmac::Key);

impl HashKey {
    /// Nothing if the secret is too short.
    pub(super) fn new(secret: &Secret) -> Option<Self> {
        let secret = secret.expose().as_bytes();
        (secret.len() >= KEY_BYTES_MIN).then(|| Self(hmac::Key::new(hmac::HMAC_SHA256, secret)))
    }

    /// What a key has to be.
    pub(super) fn want() -> String {
        format!("at least {KEY_BYTES_MIN} bytes that nobody can guess")
    }
}

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// By which equal values of a name are found, in lower-case hexadecimal digits; where case and
/// blanks around them do not count. Nothing of an empty one. It is no [`Form::Hmac`] of the
/// value, which vendors may have.
pub(super) fn equal(key: &HashKey, name: &str, value: &str) -> Option<String> {
    let value = value.trim().to_lowercase();
    let signed = ["analytics-relay equal 1", name, &value].join("\0");
    (!value.is_empty()).then(|| hex(hmac::sign(&key.0, signed.as_bytes()).as_ref()))
}

/// The hash of a text, in lower-case hexadecimal digits; empty if there is nothing of it
/// that could be hashed. Without a key nothing is said of what would need one.
pub(super) fn hashed(form: Form, what: What, text: &str, key: Option<&HashKey>) -> String {
    let normal = match form {
        Form::Hmac => {
            let signed = |HashKey(key): &HashKey| hex(hmac::sign(key, text.as_bytes()).as_ref());
            return key.filter(|_| !text.is_empty()).map(signed).unwrap_or_default();
        }
        Form::Meta | Form::Google if is_hashed(text.trim()) => return text.trim().to_ascii_lowercase(),
        Form::Meta => for_meta(what, text.trim()),
        Form::Google => for_google(what, text.trim()),
    };
    if normal.is_empty() {
        return normal;
    }
    hex(digest::digest(&digest::SHA256, normal.as_bytes()).as_ref())
}

fn is_hashed(text: &str) -> bool {
    text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn for_meta(what: What, text: &str) -> String {
    let text = text.to_lowercase();
    match what {
        What::Email | What::Other => text,
        What::Phone => digits(&text).trim_start_matches('0').to_owned(),
        What::Name => text.chars().filter(|c| !is_punctuation(*c)).collect::<String>().trim().to_owned(),
        What::City | What::State | What::Country => text.chars().filter(|c| c.is_alphanumeric()).collect(),
        What::Zip => zip(&text),
        What::Birthdate => digits(&text),
        What::Gender => match text.as_str() {
            "female" | "woman" => "f".into(),
            "male" | "man" => "m".into(),
            _ => text,
        },
    }
}

fn for_google(what: What, text: &str) -> String {
    let text = text.to_lowercase();
    match what {
        What::Email => {
            let address: String = text.chars().filter(|c| !c.is_whitespace()).collect();
            match address.rsplit_once('@') {
                Some((user, domain @ ("gmail.com" | "googlemail.com"))) => {
                    let user = user.split('+').next().unwrap_or_default().replace('.', "");
                    format!("{user}@{domain}")
                }
                _ => address,
            }
        }
        What::Phone => {
            let digits = digits(&text);
            // How a number begins that is dialled abroad.
            let number = if text.starts_with('+') { &*digits } else { digits.trim_start_matches("00") };
            if number.is_empty() { String::new() } else { format!("+{number}") }
        }
        _ => text,
    }
}

fn digits(text: &str) -> String {
    text.chars().filter(char::is_ascii_digit).collect()
}

fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation()
        || matches!(c, '\u{2018}' | '\u{2019}' | '\u{201c}' | '\u{201d}' | '\u{2010}'..='\u{2015}')
}

/// Of a number of the United States with its extension the first five digits.
fn zip(text: &str) -> String {
    let is_number = |part: &str, digits| part.len() == digits && part.bytes().all(|b| b.is_ascii_digit());
    match text.split_once('-') {
        Some((five, four)) if is_number(five, 5) && is_number(four, 4) => five.to_owned(),
        _ => text.chars().filter(|c| !c.is_whitespace() && *c != '-').collect(),
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(half.into(), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sha256(text: &str) -> String {
        hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
    }

    /// Inputs and hashes as Meta's page on customer information parameters has them.
    #[test]
    fn metas_own_examples_come_out_as_meta_says() {
        for (what, text, hash) in [
            (
                What::Email,
                "John_Smith@gmail.com",
                "62a14e44f765419d10fea99367361a727c12365e2520f32218d505ed9aa0f62f",
            ),
            (
                What::Phone,
                "1(650)555-1212",
                "e323ec626319ca94ee8bff2e4c87cf613be6ea19919ed1364124e16807ab3176",
            ),
            (What::Name, "Mary", "6915771be1c5aa0c886870b6951b03d7eafc121fea0e80a5ea83beb7c449f4ec"),
            (What::Name, "정", "8fa8cd9c440be61d0151429310034083132b35975c4bea67fdd74158eb51db14"),
            (What::Name, "Valéry", "08e1996b5dd49e62a4b4c010d44e4345592a863bb9f8e3976219bac29417149c"),
        ] {
            assert_eq!(hashed(Form::Meta, what, text, None), hash, "{text}");
            assert_eq!(hashed(Form::Meta, what, &format!("  {text}\n"), None), hash, "{text}");
        }
    }

    #[test]
    fn each_field_has_the_form_that_meta_wants() {
        for (what, text, normal) in [
            (What::Phone, "+44 (0)20 7946 0958", "4402079460958"),
            (What::Phone, "00 49 30 1234", "49301234"),
            (What::Phone, "n/a", ""),
            (What::Name, " O'Neil-Smith ", "oneilsmith"),
            (What::City, "San Francisco", "sanfrancisco"),
            (What::City, "St. Gallen", "stgallen"),
            (What::State, "CA", "ca"),
            (What::Zip, "94035-1234", "94035"),
            (What::Zip, "M1 1AE", "m11ae"),
            (What::Country, "US", "us"),
            (What::Birthdate, "1997-02-16", "19970216"),
            (What::Gender, "Female", "f"),
            (What::Gender, "m", "m"),
            (What::Other, " Some-ID ", "some-id"),
        ] {
            let want = if normal.is_empty() { String::new() } else { sha256(normal) };
            assert_eq!(hashed(Form::Meta, what, text, None), want, "{text}");
        }
    }

    /// The examples of Google's page on formatting user data, and what lies around them.
    #[test]
    fn each_field_has_the_form_that_google_wants() {
        for (what, text, normal) in [
            (What::Email, "cloudy.sanfrancisco+shopping@gmail.com", "cloudysanfrancisco@gmail.com"),
            (What::Email, "user.name+NYC@Example.com", "user.name+nyc@example.com"),
            (What::Email, " Jane.Doe @GoogleMail.com ", "janedoe@googlemail.com"),
            (What::Email, "a.b@gmail.com.example", "a.b@gmail.com.example"),
            (What::Email, "no address", "noaddress"),
            (What::Phone, "+1 (800) 555-0100", "+18005550100"),
            (What::Phone, "0049 30 1234", "+49301234"),
            (What::Phone, "-", ""),
            (What::Name, " John ", "john"),
            (What::Other, " 1600 Amphitheatre Pkwy", "1600 amphitheatre pkwy"),
        ] {
            let want = if normal.is_empty() { String::new() } else { sha256(normal) };
            assert_eq!(hashed(Form::Google, what, text, None), want, "{text}");
        }
    }

    #[test]
    fn what_is_hashed_is_not_hashed_for_a_vendor_again() {
        let once = sha256("john_smith@gmail.com");
        for form in [Form::Meta, Form::Google] {
            assert_eq!(hashed(form, What::Email, &once, None), once);
            assert_eq!(hashed(form, What::Email, &format!(" {} ", once.to_uppercase()), None), once);
            for other in [&once[1..], &format!("{once}0"), &format!("{}g", &once[1..])] {
                assert_ne!(hashed(form, What::Other, other, None), other.to_lowercase(), "{other}");
            }
        }
    }

    /// RFC 4231 has no case of a text key of this length: the value is of Python's hmac.
    #[test]
    fn a_keyed_hash_is_of_the_text_as_it_is() {
        let key = HashKey::new(&Secret::new("0123456789abcdef")).unwrap();
        let hash = |text: &str| hashed(Form::Hmac, What::Email, text, Some(&key));
        assert_eq!(
            hash("John_Smith@gmail.com"),
            "4b7cfa147c96bf981da4ecd84ab969060dc9d8b7faa532adc430e555d8268fac"
        );
        assert_ne!(hash("john_smith@gmail.com"), hash("John_Smith@gmail.com"));
        // A device's token has 64 digits, too, and is no hash.
        let token = sha256("token");
        assert_ne!(hash(&token), token);
        assert_eq!(hash(""), "");
        assert_eq!(hashed(Form::Hmac, What::Email, "x", None), "", "nothing is told without a key");
        assert!(HashKey::new(&Secret::new("0123456789abcde")).is_none());
        assert_eq!(format!("{key:?}"), "***");
    }
}

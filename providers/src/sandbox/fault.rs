//! How the sandbox can misbehave, and how to say so on a command line.

use std::fmt;
use std::str::FromStr;

use hyper::header::HeaderValue;

/// What to do to one request instead of behaving.
///
/// Each has a text form, given with it, that [`FromStr`] reads and `Display`
/// writes. A list in it is separated by commas, so its members cannot contain
/// any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Answers with this status and takes nothing: `503`, `429+retry-after=2`,
    /// `400+body={}`, both in that order. The body is the one the vendor has for
    /// the status, unless given. `retry-after` may be a date, or nonsense.
    Status {
        /// 200 to 599.
        code: u16,
        /// The `Retry-After` header.
        retry_after: Option<String>,
        /// The body, instead of the vendor's.
        body: Option<String>,
    },
    /// Refuses the events whose id hashes (64-bit FNV-1a) to a multiple of
    /// `every`: `reject-every=5`. The same events are refused however they are
    /// batched. Mixpanel lists them and takes the rest, Amplitude lists them and
    /// takes nothing, Segment and Mixpanel's `/engage` say nothing and take the
    /// rest. A record without an id goes by its user.
    RejectEvents {
        /// One in how many; 1 is all.
        every: usize,
    },
    /// The same for events of this name: `reject-name=bad`.
    RejectNames {
        /// The event name.
        name: String,
    },
    /// Answers 500 to a request with an event of this name and takes nothing, as
    /// a server whose code fails on it: `fail-name=bad`.
    FailOnName {
        /// The event name.
        name: String,
    },
    /// Amplitude: 429 that names these users or devices and their events, if the
    /// request has any, and takes nothing. Others: 429. `throttle-users=a,b`.
    ThrottleUsers {
        /// User or device ids.
        users: Vec<String>,
    },
    /// Amplitude: 429 that reports these users or devices over their daily quota,
    /// if the request has events of theirs, and takes nothing. Others: 429.
    /// `daily-quota=a`.
    DailyQuota {
        /// User or device ids.
        users: Vec<String>,
    },
    /// Amplitude: 400 that lists these devices and their events as silenced, if
    /// the request has any, and takes nothing. Others behave. `silence-devices=a`.
    SilenceDevices {
        /// Device ids.
        devices: Vec<String>,
    },
    /// Refuses a larger body, measured uncompressed, with 413, or 400 from
    /// Segment: `body-limit=20000`.
    BodyLimit {
        /// The largest body accepted.
        bytes: usize,
    },
    /// Behaves after a pause: `delay=200`. The events are taken after the pause,
    /// so a client that hangs up during it has delivered nothing. `delay=0` is
    /// how to write a well-behaved answer in a script.
    Delay {
        /// The pause.
        millis: u64,
    },
    /// Reads the request, takes nothing and never answers: `stall`. Cuts the
    /// connection after 120 s.
    Stall,
    /// Takes the events, then sends the answer's body byte by byte: `drip=500`.
    Drip {
        /// The pause before each byte.
        millis: u64,
    },
    /// Resets the connection (TCP RST), takes nothing: `reset-before`.
    ResetBefore,
    /// Takes the events, then resets instead of answering: `reset-after`.
    ResetAfter,
    /// Takes the events, sends the head and half of the body, then resets:
    /// `reset-mid-reply`.
    ResetMidReply,
    /// Takes nothing, answers 200 with text that is not JSON: `junk`.
    Junk,
    /// Takes nothing, answers 200 with arrays nested 5000 deep: `junk-json`.
    JunkJson,
    /// Takes nothing, answers 200 with a body of this size that it does not
    /// announce: `huge-body=1000000`.
    HugeBody {
        /// Size of the answer's body.
        bytes: u64,
    },
    /// Behaves, and the body of the answer comes in this encoding, as from something on
    /// the way: `encoded=gzip`. Of any other than gzip there is only the name.
    Encoded {
        /// The `Content-Encoding` header.
        coding: String,
    },
    /// Takes nothing, answers 307: `redirect=http://127.0.0.1:1/`.
    Redirect {
        /// The `Location` header.
        location: String,
    },
    /// The fault inside with this probability, else normal behaviour: `10%503`.
    Percent {
        /// 0 to 100.
        percent: u8,
        /// The fault.
        fault: Box<Fault>,
    },
}

/// A text that names no [`Fault`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("fault: got {got:?}, want {want}")]
pub struct ParseFaultError {
    got: String,
    want: &'static str,
}

impl FromStr for Fault {
    type Err = ParseFaultError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |want| ParseFaultError { got: text.to_owned(), want };

        // Only digits before the sign: a redirect or a body may contain one too.
        if let Some((percent, fault)) = text.split_once('%')
            && is_number(percent)
        {
            let percent = percent.parse().ok().filter(|percent| *percent <= 100);
            let percent = percent.ok_or_else(|| error("0 to 100 percent"))?;
            return Ok(Self::Percent { percent, fault: Box::new(fault.parse()?) });
        }
        if text.starts_with(|first: char| first.is_ascii_digit()) {
            return status(text)
                .ok_or_else(|| error("STATUS[+retry-after=VALUE][+body=TEXT], STATUS 200 to 599"));
        }

        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let number = || {
            let value = value.filter(|value| is_number(value));
            value.and_then(|value| value.parse::<u64>().ok()).ok_or_else(|| error("NAME=NUMBER"))
        };
        let string = || value.filter(|value| !value.is_empty()).ok_or_else(|| error("NAME=VALUE"));
        let list = || Ok(string()?.split(',').map(str::to_owned).collect());
        let bare = |fault| if value.is_none() { Ok(fault) } else { Err(error("the name alone")) };
        match name {
            "reject-every" => match usize::try_from(number()?) {
                Ok(every @ 1..) => Ok(Self::RejectEvents { every }),
                _ => Err(error("reject-every=1 or more")),
            },
            "reject-name" => Ok(Self::RejectNames { name: string()?.to_owned() }),
            "fail-name" => Ok(Self::FailOnName { name: string()?.to_owned() }),
            "throttle-users" => Ok(Self::ThrottleUsers { users: list()? }),
            "daily-quota" => Ok(Self::DailyQuota { users: list()? }),
            "silence-devices" => Ok(Self::SilenceDevices { devices: list()? }),
            "body-limit" => match usize::try_from(number()?) {
                Ok(bytes) => Ok(Self::BodyLimit { bytes }),
                Err(_) => Err(error("a size in bytes")),
            },
            "delay" => Ok(Self::Delay { millis: number()? }),
            "stall" => bare(Self::Stall),
            "drip" => Ok(Self::Drip { millis: number()? }),
            "reset-before" => bare(Self::ResetBefore),
            "reset-after" => bare(Self::ResetAfter),
            "reset-mid-reply" => bare(Self::ResetMidReply),
            "junk" => bare(Self::Junk),
            "junk-json" => bare(Self::JunkJson),
            "huge-body" => Ok(Self::HugeBody { bytes: number()? }),
            "encoded" => match string()? {
                coding if HeaderValue::from_str(coding).is_ok() => {
                    Ok(Self::Encoded { coding: coding.to_owned() })
                }
                _ => Err(error("a name that fits in a header")),
            },
            "redirect" => match string()? {
                location if HeaderValue::from_str(location).is_ok() => {
                    Ok(Self::Redirect { location: location.to_owned() })
                }
                _ => Err(error("a location that fits in a header")),
            },
            _ => Err(error(
                "STATUS, N%FAULT, reject-every=N, reject-name=NAME, fail-name=NAME, throttle-users=A,B, daily-quota=A,B, \
                 silence-devices=A,B, body-limit=BYTES, delay=MS, stall, drip=MS, reset-before, reset-after, \
                 reset-mid-reply, junk, junk-json, huge-body=BYTES, encoded=CODING or redirect=URL",
            )),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status { code, retry_after, body } => {
                write!(f, "{code}")?;
                if let Some(value) = retry_after {
                    write!(f, "+retry-after={value}")?;
                }
                match body {
                    Some(body) => write!(f, "+body={body}"),
                    None => Ok(()),
                }
            }
            Self::RejectEvents { every } => write!(f, "reject-every={every}"),
            Self::RejectNames { name } => write!(f, "reject-name={name}"),
            Self::FailOnName { name } => write!(f, "fail-name={name}"),
            Self::ThrottleUsers { users } => write!(f, "throttle-users={}", users.join(",")),
            Self::DailyQuota { users } => write!(f, "daily-quota={}", users.join(",")),
            Self::SilenceDevices { devices } => write!(f, "silence-devices={}", devices.join(",")),
            Self::BodyLimit { bytes } => write!(f, "body-limit={bytes}"),
            Self::Delay { millis } => write!(f, "delay={millis}"),
            Self::Stall => f.write_str("stall"),
            Self::Drip { millis } => write!(f, "drip={millis}"),
            Self::ResetBefore => f.write_str("reset-before"),
            Self::ResetAfter => f.write_str("reset-after"),
            Self::ResetMidReply => f.write_str("reset-mid-reply"),
            Self::Junk => f.write_str("junk"),
            Self::JunkJson => f.write_str("junk-json"),
            Self::HugeBody { bytes } => write!(f, "huge-body={bytes}"),
            Self::Encoded { coding } => write!(f, "encoded={coding}"),
            Self::Redirect { location } => write!(f, "redirect={location}"),
            Self::Percent { percent, fault } => write!(f, "{percent}%{fault}"),
        }
    }
}

impl Fault {
    /// Whether this fault refuses the event by itself.
    pub(super) fn rejects(&self, id: &str, user: &str, name: &str) -> bool {
        match self {
            Self::RejectEvents { every } => {
                let id = if id.is_empty() { user } else { id };
                *every != 0 && fnv1a(id.as_bytes()).is_multiple_of(*every as u64)
            }
            Self::RejectNames { name: rejected } => rejected == name,
            _ => false,
        }
    }
}

/// `CODE[+retry-after=VALUE][+body=TEXT]`
fn status(text: &str) -> Option<Fault> {
    let (head, body) = match text.split_once("+body=") {
        Some((head, body)) => (head, Some(body.to_owned())),
        None => (text, None),
    };
    let (code, retry_after) = match head.split_once("+retry-after=") {
        Some((code, value)) => (code, Some(value.to_owned())),
        None => (head, None),
    };
    let code = Some(code).filter(|code| is_number(code))?.parse().ok()?;
    let sendable = retry_after.as_deref().is_none_or(|value| HeaderValue::from_str(value).is_ok());
    ((200..=599).contains(&code) && sendable).then_some(Fault::Status { code, retry_after, body })
}

/// Digits only: `parse` would accept a plus sign.
fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_survives_its_text_form() {
        let texts = [
            "503",
            "429+retry-after=2",
            "429+retry-after=Wed, 21 Oct 2026 07:28:00 GMT",
            "503+retry-after=soon",
            "400+body={\"code\":400}",
            "429+retry-after=1+body=a=b+c%d",
            "reject-every=5",
            "reject-name=bad=name",
            "fail-name=bad",
            "throttle-users=a,b",
            "daily-quota=a",
            "silence-devices=a",
            "body-limit=20000",
            "delay=200",
            "stall",
            "drip=500",
            "reset-before",
            "reset-after",
            "reset-mid-reply",
            "junk",
            "junk-json",
            "huge-body=1000000",
            "encoded=gzip",
            "redirect=http://127.0.0.1:1/a%20b?c=d",
            "10%503",
            "30%reset-after",
            "50%50%429+retry-after=2",
        ];
        for text in texts {
            let fault: Fault = text.parse().unwrap();
            assert_eq!(fault.to_string(), text);
            assert_eq!(fault.to_string().parse(), Ok(fault));
        }
    }

    #[test]
    fn a_text_that_is_no_fault_is_refused() {
        let texts = [
            "",
            "ok",
            "99",
            "600",
            "+503",
            "503 ",
            "503x",
            "429+retry-after=a\nb",
            "reject-every=0",
            "reject-every=",
            "delay=-1",
            "delay",
            "stall=1",
            "throttle-users=",
            "101%503",
            "10%",
            "%503",
            "huge-body=lots",
        ];
        for text in texts {
            assert!(text.parse::<Fault>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_error_says_what_it_got_and_wants() {
        let error = "reject-every=0".parse::<Fault>().unwrap_err();
        assert_eq!(error.to_string(), r#"fault: got "reject-every=0", want reject-every=1 or more"#);
    }

    #[test]
    fn the_hash_is_fnv1a() {
        assert_eq!(fnv1a(b""), 0xCBF2_9CE4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_F739_67E8);
    }
}

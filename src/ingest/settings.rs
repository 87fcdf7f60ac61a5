//! What the front doors are told.

use analytics_relay_providers::Secret;

use super::{
    client_address::ClientAddressSettings,
    tls::{TlsDoor, TlsFiles},
};
use crate::{listener::Listen, settings::Reader};

/// Shorter keys of readers are guessed.
const READ_KEY_BYTES_MIN: usize = 16;

/// How gRPC is served.
#[derive(Debug, Clone)]
pub struct GrpcSettings {
    /// Where to listen for callers.
    pub listen: Listen,
    /// Most connections of callers.
    pub connections_max: usize,
    /// Most of them of one peer; nothing if a quarter, and without a limit for this
    /// machine's own.
    pub connections_of_peer_max: Option<usize>,
    /// Most bytes of messages that are being received.
    pub receive_bytes_max: usize,
    /// What to serve TLS with; plaintext if nothing.
    pub tls: Option<TlsFiles>,
}

impl GrpcSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self {
            listen: Listen::read(reader, "GRPC_HOST", "GRPC_PORT"),
            connections_max: reader.number("GRPC_MAX_CONNECTIONS", 1..=100_000),
            connections_of_peer_max: reader.number_if_set("GRPC_MAX_CONNECTIONS_PER_PEER", 1..=100_000),
            receive_bytes_max: reader.number("GRPC_RECEIVE_MAX_BYTES", 4 << 20..=1 << 36),
            tls: TlsFiles::read(reader, TlsDoor::GRPC),
        }
    }
}

/// How HTTP is served.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Where to listen for callers; nowhere if nothing.
    pub listen: Option<Listen>,
    /// Most connections of callers.
    pub connections_max: usize,
    /// Most of them of one peer; nothing if a quarter, and without a limit for this
    /// machine's own.
    pub connections_of_peer_max: Option<usize>,
    /// The write keys that are taken; any, and none, if there are none.
    pub write_keys: Vec<String>,
    /// Who knows one of these may read what the store says.
    pub read_keys: Vec<Secret>,
    /// Without any, everybody who reaches the port from this machine may: in test mode, or if
    /// it is this machine's own.
    pub is_read_without_key: bool,
    /// Whose word on where a call comes from is believed.
    pub clients: ClientAddressSettings,
    /// What to serve TLS with; plaintext if nothing.
    pub tls: Option<TlsFiles>,
}

impl HttpSettings {
    pub(crate) fn read(reader: &mut Reader, test_mode: bool) -> Self {
        let is_off = reader.lookup("HTTP_PORT").0.eq_ignore_ascii_case("off");
        let listen = if is_off {
            reader.text("HTTP_HOST");
            reader.text("HTTP_PORT");
            None
        } else {
            Some(Listen::read(reader, "HTTP_HOST", "HTTP_PORT"))
        };
        let write_keys = write_keys(reader);
        let is_of_machine = listen.as_ref().is_some_and(Listen::is_loopback);
        Self {
            listen,
            connections_max: reader.number("HTTP_MAX_CONNECTIONS", 1..=100_000),
            connections_of_peer_max: reader.number_if_set("HTTP_MAX_CONNECTIONS_PER_PEER", 1..=100_000),
            read_keys: read_keys(reader, &write_keys),
            is_read_without_key: test_mode || is_of_machine,
            write_keys,
            clients: ClientAddressSettings::read(reader),
            tls: TlsFiles::read(reader, TlsDoor::HTTP),
        }
    }

    /// True if anybody who reaches the port from elsewhere can read.
    pub(crate) fn is_read_openly(&self) -> bool {
        let is_of_machine = self.listen.as_ref().is_none_or(Listen::is_loopback);
        self.read_keys.is_empty() && self.is_read_without_key && !is_of_machine
    }

    /// True if anybody who reaches the port can send.
    pub fn is_open(&self) -> bool {
        self.write_keys.is_empty() && self.listen.as_ref().is_some_and(|listen| !listen.is_loopback())
    }
}

fn write_keys(reader: &mut Reader) -> Vec<String> {
    let text = reader.secret("HTTP_WRITE_KEYS");
    let keys: Vec<String> =
        text.split(',').map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect();
    // Without a key the door would take any.
    if keys.is_empty() && !text.trim().is_empty() {
        reader.wrong("HTTP_WRITE_KEYS", "a list without a key", "keys with commas between them, or nothing");
    }
    keys
}

/// Write keys are in every page, and so no secret.
fn read_keys(reader: &mut Reader, write_keys: &[String]) -> Vec<Secret> {
    let text = reader.secret("READ_KEYS");
    let keys: Vec<&str> = text.split(',').map(str::trim).filter(|key| !key.is_empty()).collect();
    if keys.is_empty() && !text.trim().is_empty() {
        reader.wrong("READ_KEYS", "a list without a key", "keys with commas between them, or nothing");
    }
    for key in &keys {
        let got = if key.len() < READ_KEY_BYTES_MIN {
            format!("a key of {} bytes", key.len())
        } else if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            "a key that no header can have".to_owned()
        } else if write_keys.iter().any(|write_key| write_key == key) {
            "a key of HTTP_WRITE_KEYS, which every page shows".to_owned()
        } else {
            continue;
        };
        let want = format!("{READ_KEY_BYTES_MIN} characters of ASCII at least, and keys of their own");
        reader.error(format!("READ_KEYS: got {got}, want {want}"));
    }
    keys.into_iter().map(Secret::new).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<HttpSettings, Vec<String>> {
        read_in(false, vars)
    }

    fn read_in(test_mode: bool, vars: &[(&str, &str)]) -> Result<HttpSettings, Vec<String>> {
        let vars: Vec<_> = vars.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let mut reader = Reader::new(vars.into_iter(), Path::new(""));
        let settings = HttpSettings::read(&mut reader, test_mode);
        reader.finish().map(|_| settings).map_err(|error| error.0)
    }

    #[test]
    fn a_key_that_is_guessed_or_that_every_page_shows_is_none_and_no_error_tells_it() {
        for key in ["short", "canary-of-a-page", "canary canary canary", "\u{e9}0123456789012345", ","] {
            let errors = read(&[("READ_KEYS", key), ("HTTP_WRITE_KEYS", "canary-of-a-page")]).unwrap_err();
            assert!(errors.len() == 1 && errors[0].starts_with("READ_KEYS: got "), "{errors:?}");
            assert!(!errors[0].contains("canary"), "{errors:?}");
        }
        let two = read(&[("READ_KEYS", "0123456789abcdef, another-key-0123456")]).unwrap();
        assert_eq!(two.read_keys.len(), 2);
        assert!(!format!("{two:?}").contains("0123456789abcdef"));
    }

    #[test]
    fn without_keys_only_a_port_of_this_machine_is_read_but_in_test_mode() {
        for (host, is_own) in [("127.0.0.1", true), ("localhost", true), ("[::]", false), ("10.0.0.1", false)]
        {
            let settings = read(&[("HTTP_HOST", host)]).unwrap();
            assert_eq!((settings.is_read_without_key, settings.is_read_openly()), (is_own, false), "{host}");
            let settings = read_in(true, &[("HTTP_HOST", host)]).unwrap();
            assert_eq!((settings.is_read_without_key, settings.is_read_openly()), (true, !is_own), "{host}");
        }
    }
}

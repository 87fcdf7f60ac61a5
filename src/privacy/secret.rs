//! The relay's own secret: random bytes from its first start on, under which ids are
//! hashed that must not stand in files as they are.

use std::{fs, io, path::Path};

use ring::{
    hmac,
    rand::{SecureRandom, SystemRandom},
};

use crate::files;

const NAME: &str = "secret";
const BYTES: usize = 32;

/// See the module. Printed it says nothing.
pub(crate) struct DataSecret(hmac::Key);

impl std::fmt::Debug for DataSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl DataSecret {
    /// Reads the secret of a data directory, or makes one. One that is damaged is an error:
    /// under another nobody would be found who is suppressed.
    pub(crate) fn open(data_dir: &Path) -> io::Result<Self> {
        match Self::read(data_dir)? {
            Some(secret) => Ok(secret),
            None => Self::make(data_dir),
        }
    }

    /// The secret, if there is one.
    pub(crate) fn read(data_dir: &Path) -> io::Result<Option<Self>> {
        let path = data_dir.join(NAME);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        if bytes.len() != BYTES {
            let text = format!("{}: got {} bytes, want {BYTES}", path.display(), bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Some(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes))))
    }

    fn make(data_dir: &Path) -> io::Result<Self> {
        let mut bytes = [0; BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("no randomness for a secret"))?;
        files::replace(&data_dir.join(NAME), &bytes)?;
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }

    /// A key for one purpose, from which no other can be made.
    pub(crate) fn key_for(&self, purpose: &str) -> [u8; 16] {
        let tag = hmac::sign(&self.0, purpose.as_bytes());
        let mut key = [0; 16];
        key.copy_from_slice(&tag.as_ref()[..16]);
        key
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_is_made_once_for_us_alone_and_each_purpose_has_its_own_key() {
        let dir = tempfile::tempdir().unwrap();
        assert!(DataSecret::read(dir.path()).unwrap().is_none());
        let made = DataSecret::open(dir.path()).unwrap();
        let read = DataSecret::open(dir.path()).unwrap();
        assert_eq!(made.key_for("a"), read.key_for("a"));
        assert_ne!(made.key_for("a"), made.key_for("b"));
        let mode = fs::metadata(dir.path().join(NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join(NAME), "short").unwrap();
        let error = DataSecret::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("got 5 bytes, want 32"), "{error}");
    }
}

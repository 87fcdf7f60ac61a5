//! What the environment says about privacy.

use std::path::PathBuf;

use analytics_relay_providers::Secret;

use crate::settings::Reader;

/// What is done about names that nobody should send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PiiMode {
    /// They are counted.
    #[default]
    Detect,
    /// They go, before the log, and are counted.
    Standard,
    /// They are not looked for.
    Off,
}

impl PiiMode {
    pub(super) const ALL: [Self; 3] = [Self::Detect, Self::Standard, Self::Off];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Detect => "detect",
            Self::Standard => "standard",
            Self::Off => "off",
        }
    }
}

/// Where the rules are, and what holds without them.
#[derive(Debug, Clone, Default)]
pub struct PrivacySettings {
    /// The file of rules.
    pub file: Option<PathBuf>,
    /// What is done about names that nobody should send, unless the file says it.
    pub pii_mode: PiiMode,
    /// The key of hashes, unless the file names another.
    pub hash_key: Option<Secret>,
}

impl PrivacySettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let file = reader.text("PRIVACY_FILE");
        let hash_key = reader.secret("PRIVACY_HASH_KEY");
        let modes = PiiMode::ALL.map(|mode| (mode.name(), mode));
        Self {
            file: (!file.is_empty()).then(|| PathBuf::from(file)),
            pii_mode: reader.one_of("PII_MODE", &modes),
            hash_key: (!hash_key.is_empty()).then(|| Secret::new(hash_key)),
        }
    }
}

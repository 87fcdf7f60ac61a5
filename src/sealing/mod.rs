//! Files that nobody reads without the key: AES-256-GCM under the log, spill files, dead
//! letters and refused items.

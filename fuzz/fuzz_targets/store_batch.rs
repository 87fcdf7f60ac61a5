#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| analytics_relay_store::fuzzing::store_batch(bytes));

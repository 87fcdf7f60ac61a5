//! Compiles `proto/` to Rust in `OUT_DIR` with a compiler written in Rust, so
//! that no `protoc` has to be on the machine. The same descriptor set feeds
//! code generation and server reflection.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_file("analytics/v1/analytics.proto")?;

    fs::write(out.join("analytics_descriptor.bin"), compiler.encode_file_descriptor_set())?;
    // The server is routed by hand, in `ingest::service`.
    tonic_prost_build::configure().build_server(false).compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

//! Compiles `proto/` to Rust in `OUT_DIR` with a compiler written in Rust, so
//! that no `protoc` has to be on the machine. The same descriptor set feeds
//! code generation and server reflection.
//!
//! Puts the rules of user agents there too: they lie in the package of the crate
//! ua-parser, which does not hand them out.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

#[path = "src/enrich/agent/yaml.rs"]
mod yaml;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// As in Cargo.toml: the rules are data that is tested with the relay.
const UA_PARSER: &str = "=0.2.2";

fn main() -> Outcome {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    compile_proto(&out)?;
    write_user_agents(&out)
}

fn compile_proto(out: &Path) -> Outcome {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_file("analytics/v1/analytics.proto")?;

    fs::write(out.join("analytics_descriptor.bin"), compiler.encode_file_descriptor_set())?;
    // The server is routed by hand, in `ingest::service`.
    tonic_prost_build::configure().build_server(false).compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

/// Writes `<section>.json` for each section of uap-core's rules.
fn write_user_agents(out: &Path) -> Outcome {
    println!("cargo:rerun-if-changed=src/enrich/agent/yaml.rs");
    println!("cargo:rerun-if-env-changed=UA_PARSER_DIR");
    let package = match env::var_os("UA_PARSER_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => find_ua_parser(out).map_err(|error| {
            format!("the package of ua-parser {UA_PARSER}: {error}; UA_PARSER_DIR=<its folder> names it")
        })?,
    };
    let path = package.join("uap-core/regexes.yaml");
    println!("cargo:rerun-if-changed={}", path.display());
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let sections = yaml::read(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    for (name, section) in yaml::SECTIONS.iter().zip(sections) {
        fs::write(out.join(format!("{name}.json")), serde_json::to_vec(&section)?)?;
    }
    println!("cargo:rustc-env=UAP_STAMP={}", stamp(&package));
    Ok(())
}

/// Asks cargo where the package is, whether from a registry or vendored.
///
/// Not for the packages of this workspace: cargo would want those of its tests too, which
/// a build of the relay alone has not fetched. For a package that depends on nothing else
/// all is there, as the relay depends on the same. The folder in which cargo runs is the
/// relay's, where its configuration may stand.
fn find_ua_parser(out: &Path) -> Outcome<PathBuf> {
    let asking = out.join("asking");
    fs::create_dir_all(asking.join("src"))?;
    fs::write(asking.join("src/lib.rs"), "")?;
    let manifest = asking.join("Cargo.toml");
    let package = "[package]\nname = \"asking\"\nedition = \"2024\"\n[workspace]\n";
    fs::write(&manifest, format!("{package}[dependencies]\nua-parser = \"{UA_PARSER}\"\n"))?;

    let mut cargo = Command::new(env::var_os("CARGO").ok_or("CARGO is not set: built without cargo")?);
    cargo.current_dir(env::var("CARGO_MANIFEST_DIR")?).args(["metadata", "--offline", "--format-version=1"]);
    cargo.arg("--filter-platform").arg(env::var("TARGET")?).arg("--manifest-path").arg(manifest);
    let output = cargo.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let found = packages.find(|package| package["name"] == "ua-parser").ok_or("cargo does not know it")?;
    let manifest = found["manifest_path"].as_str().ok_or("cargo does not say where it is")?;
    Ok(Path::new(manifest).parent().ok_or("it has no folder")?.to_owned())
}

/// The month of the package, as its change log has it: how old the rules are.
fn stamp(package: &Path) -> String {
    println!("cargo:rerun-if-changed={}", package.join("CHANGELOG.md").display());
    let version = UA_PARSER.trim_start_matches('=');
    let log = fs::read_to_string(package.join("CHANGELOG.md")).unwrap_or_default();
    let of_version = |line: &str| line.starts_with(&format!("## [{version}]"));
    let date = log.lines().find(|line| of_version(line)).and_then(|line| line.rsplit_once(" - "));
    date.and_then(|(_, date)| date.get(..7)).map_or_else(|| format!("ua-parser-{version}"), str::to_owned)
}

//! Tests that the C header matches the sources that it is generated from.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::path::Path;

#[test]
fn header_matches_the_sources() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let made = cbindgen::Builder::new().with_crate(folder).with_config(config).generate().unwrap();
    let mut text = Vec::new();
    made.write(&mut text);
    let (made, path) = (String::from_utf8(text).unwrap(), folder.join("include/dmaload.h"));
    if std::env::var_os("DMALOAD_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == made, "include/dmaload.h is outdated: run `just capi-header`");
}

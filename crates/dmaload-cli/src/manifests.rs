//! Records manifests, and reads the manifests and checksums that files are verified against.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use dmabuf::printable;
use dmaload::LoadOptions;
use dmaload::verify::{Algorithm, Digest, Manifest, Recorder};
use dmaload_text::ForPath;

/// Records a manifest of the files' current contents.
pub(crate) async fn record_manifest(
    loader: &dmaload::Loader,
    paths: &[PathBuf],
    recorder: Recorder,
) -> dmaload::Result<Manifest> {
    let recorder = Arc::new(recorder);
    let mut segments = loader.load(paths).options(loader.load_options().observer(recorder.clone())).segments();
    while let Some(segment) = segments.next().await {
        drop(segment?);
    }
    let report = segments.report().expect("a stream that has ended without an error should have a report");
    Ok(recorder.manifest(report))
}

/// The reference that files are verified against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Against {
    /// A checksum of a single file.
    Digest(Digest),
    /// The path of a manifest.
    Manifest(PathBuf),
}

impl FromStr for Against {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = text.split_once(':').is_some_and(|(name, _)| name.parse::<Algorithm>().is_ok());
        if named {
            return text.parse().map(Against::Digest);
        }
        // A manifest can have any name, even one that looks like a checksum.
        if Path::new(text).exists() {
            return Ok(Against::Manifest(text.into()));
        }
        if let Some((name, hex)) = split_loosely(text) {
            return match name.parse::<Algorithm>() {
                Ok(algorithm) => format!("{algorithm}:{hex}").parse().map(Against::Digest),
                Err(unknown) => Err(format!("{text:?} is not an existing manifest, and {unknown}")),
            };
        }
        match bare_digits(text) {
            None => Ok(Against::Manifest(text.into())),
            Some(hex) => match hex.len() {
                64 => format!("sha256:{hex}").parse().map(Against::Digest),
                32 | 40 | 96 | 128 => {
                    Err(format!("{text:?} looks like MD5, SHA-1, SHA-384 or SHA-512: use sha256, blake3, crc32c or xxh3"))
                }
                digits => Err(format!(
                    "{text:?} is {digits} hexadecimal digits without the name of a checksum (a sha256 has 64): write \
                     sha256:HEX, blake3:HEX, crc32c:HEX or xxh3:HEX"
                )),
            },
        }
    }
}

/// Splits a checksum with an unknown or differently spelled name (`SHA256:HEX`, `sha256-HEX`) into
/// the name, in lower case, and the digits.
fn split_loosely(text: &str) -> Option<(String, &str)> {
    let (name, hex) = text.split_once([':', '-', '='])?;
    let name = name.to_ascii_lowercase();
    // Text that does not look like a checksum is a path. The shortest checksum, crc32c, has eight
    // digits.
    let is_name = ["md5", "sha", "crc", "xxh", "blake", "b3", "adler"].iter().any(|start| name.starts_with(start));
    let is_hex = hex.len() >= 8 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_name && is_hex).then_some((name, hex))
}

/// Returns the digits of a checksum without a `NAME:`. The text consists of the digits alone, or
/// is a line of a SHA256SUMS file in the format of coreutils or BSD.
fn bare_digits(text: &str) -> Option<&str> {
    let first = match text.strip_prefix("SHA256 (") {
        Some(line) => line.rsplit_once(") = ")?.1,
        None => text.trim_start_matches('\\').split_whitespace().next()?,
    };
    let is_hex = first.len() >= 8 && first.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then_some(first)
}

impl Against {
    /// Adds the verification to the load's options.
    ///
    /// # Errors
    /// If the manifest cannot be read or is invalid.
    pub fn apply_to(&self, options: LoadOptions) -> Result<LoadOptions> {
        match self {
            Against::Digest(digest) => Ok(options.verify(*digest)),
            Against::Manifest(path) => Ok(options.verify(read(path)?)),
        }
    }
}

fn read(path: &Path) -> Result<Manifest> {
    let json = std::fs::read(path).for_path("read", path)?;
    let about = || {
        let path = printable::path(path);
        let lines = String::from_utf8_lossy(&json);
        let sums = lines.lines().next().is_some_and(|line| bare_digits(line).is_some());
        let why = if sums {
            " is a list of checksums, not a manifest: use the checksum of one file (--verify sha256:HEX), or create a manifest \
             (dmaload manifest)"
        } else {
            ""
        };
        format!("{path}{why}")
    };
    Manifest::parse(&json).with_context(about)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_distinguished_from_a_path() {
        let hex = "e3069283";
        assert_eq!(format!("crc32c:{hex}").parse(), Ok(Against::Digest(format!("crc32c:{hex}").parse().unwrap())));
        assert_eq!("m.json".parse(), Ok(Against::Manifest("m.json".into())));
        assert_eq!("C:m.json".parse(), Ok(Against::Manifest("C:m.json".into())));
        "sha256:12".parse::<Against>().unwrap_err();
    }

    #[test]
    fn bare_checksum_is_accepted_or_explained() {
        let hex = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393";
        let sha256 = Against::Digest(format!("sha256:{hex}").parse().unwrap());
        for text in [
            hex.to_owned(),
            hex.to_uppercase(),
            format!("SHA256:{hex}"),
            format!("sha256-{hex}"),
            format!("Sha256={hex}"),
            format!("{hex}  model.safetensors"),
            format!("{hex} *model.safetensors"),
            format!("\\{hex}  a\\nb"),
            format!("SHA256 (model (1).safetensors) = {hex}"),
        ] {
            assert_eq!(text.parse(), Ok(sha256.clone()), "{text}");
        }
        for (text, word) in [
            ("d41d8cd98f00b204e9800998ecf8427e", "MD5"),
            ("da39a3ee5e6b4b0d3255bfef95601890afd80709", "SHA-1"),
            ("e3069283", "crc32c:HEX"),
            ("0123456789abcdef", "xxh3:HEX"),
            (&hex[1..], "63 hexadecimal digits"),
            (&format!("SHA256:{}", &hex[1..]), "sha256 checksum has 64"),
            (&format!("sha512:{hex}"), "\"sha512\": use sha256, blake3, crc32c or xxh3"),
            (&format!("MD5-{}", &hex[32..]), "\"md5\": use sha256"),
        ] {
            let error = text.parse::<Against>().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        for path in ["sha256-m.json", "sha-1234", "run-20240101", "crc.json", "C:deadbeef"] {
            assert_eq!(path.parse(), Ok(Against::Manifest(path.into())));
        }
        assert_eq!("SHA256SUMS".parse(), Ok(Against::Manifest("SHA256SUMS".into())));
    }
}

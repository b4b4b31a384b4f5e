//! The size limit of a heap's segments, which both errors and heaps refer to.

use std::fmt;

/// The maximum size of a heap's segments, and the file in which it is set.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SizeLimit {
    /// The limit in bytes.
    pub bytes: u64,
    /// The path of the file that contains the limit, as a number of units.
    pub setting: String,
    /// The size of a unit in bytes.
    pub unit_bytes: u64,
}

impl SizeLimit {
    /// Creates a limit that is set in a file.
    pub fn new(bytes: u64, setting: impl Into<String>, unit_bytes: u64) -> Self {
        SizeLimit { bytes, setting: setting.into(), unit_bytes }
    }

    /// The shell command that raises the limit to `wanted_bytes`, rounded up to a whole unit.
    pub fn raise(&self, wanted_bytes: u64) -> String {
        format!("echo {} > {}", wanted_bytes.div_ceil(self.unit_bytes.max(1)), self.setting)
    }
}

impl fmt::Display for SizeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} ({} bytes)", self.setting, self.bytes / self.unit_bytes.max(1), self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_says_where_it_is_set_and_how_to_raise_it() {
        let limit = SizeLimit::new(64 << 20, "/sys/x", 1 << 20);
        assert_eq!(limit.to_string(), "/sys/x is 64 (67108864 bytes)");
        assert_eq!(limit.raise((200 << 20) + 777), "echo 201 > /sys/x");
    }
}

//! Parses the numbered file names of multi-file models: `model-00001-of-00003.safetensors`. This
//! module calls each such file a part, whatever its format.

/// The parsed name of one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    /// Everything before the number, including the separator: `model-`. May be empty.
    stem: &'a str,
    digits: &'a str,
    /// `-of-` or `_of_`, in lower, upper or title case.
    of: &'a str,
    count_digits: &'a str,
    /// Everything after the count: `.safetensors`, `.fp16.safetensors`.
    end: &'a str,
    /// The number of the part. Some writers count from 0 rather than 1.
    pub(crate) number: u32,
    pub(crate) count: u32,
}

impl<'a> PartName<'a> {
    /// Parses a file name. Returns `None` if it is not the name of a part.
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        // Searches from the end, because the stem may contain the separator too.
        let of = |of| name.rmatch_indices(of).find_map(|(at, of)| Self::parse_at(name, at, of));
        ["-of-", "_of_", "-OF-", "_OF_", "-Of-", "_Of_"].into_iter().find_map(of)
    }

    fn parse_at(name: &'a str, at: usize, of: &'a str) -> Option<Self> {
        let (before, after) = (&name[..at], &name[at + of.len()..]);
        let is_digit = |c: char| c.is_ascii_digit();
        let (count_digits, end) = after.split_at(after.find(|c| !is_digit(c)).unwrap_or(after.len()));
        let (stem, digits) = before.split_at(before.trim_end_matches(is_digit).len());
        let (number, count) = (digits.parse().ok()?, count_digits.parse().ok()?);
        // Two five-digit numbers identify a part even if no separator precedes the first one.
        let is_series = digits.len() == 5 && count_digits.len() == 5;
        let joined = stem.ends_with(['-', '_', '.']) || is_series || stem.is_empty();
        (joined && count > 0 && number <= count).then_some(PartName { stem, digits, of, count_digits, end, number, count })
    }

    /// Returns whether two names belong to parts of the same model.
    pub(crate) fn is_same_model(&self, other: &PartName<'_>) -> bool {
        (self.stem, self.of, self.end, self.count) == (other.stem, other.of, other.end, other.count)
    }

    /// Returns the name of the part with this number in the same model.
    pub(crate) fn with_number(&self, number: u32) -> String {
        let width = self.digits.len();
        let PartName { stem, of, count_digits, end, .. } = self;
        format!("{stem}{number:0width$}{of}{count_digits}{end}")
    }

    /// Returns whether the name follows llama.cpp's scheme for parts of a split GGUF file.
    pub(crate) fn is_gguf_split(&self) -> bool {
        let five = self.digits.len() == 5 && self.count_digits.len() == 5;
        five && self.stem.ends_with('-') && self.of == "-of-" && self.end == ".gguf" && self.number > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_names_are_parsed_and_formatted() {
        for (name, number, count, second) in [
            ("model-00001-of-00003.safetensors", 1, 3, "model-00002-of-00003.safetensors"),
            ("model-00001-of-000163.safetensors", 1, 163, "model-00002-of-000163.safetensors"),
            ("model.fp16-00001-of-00002.safetensors", 1, 2, "model.fp16-00002-of-00002.safetensors"),
            ("model-00001-of-00002.fp16.safetensors", 1, 2, "model-00002-of-00002.fp16.safetensors"),
            ("m_1_of_3.safetensors", 1, 3, "m_2_of_3.safetensors"),
            ("model-00000-of-00002.safetensors", 0, 2, "model-00002-of-00002.safetensors"),
            ("a-of-b-00003-of-00003.gguf", 3, 3, "a-of-b-00002-of-00003.gguf"),
            ("00001-of-00002.safetensors", 1, 2, "00002-of-00002.safetensors"),
            ("model00001-of-00002.safetensors", 1, 2, "model00002-of-00002.safetensors"),
            ("MODEL-00001-OF-00002.SAFETENSORS", 1, 2, "MODEL-00002-OF-00002.SAFETENSORS"),
            ("m-00001-of-00002-one-of-many.safetensors", 1, 2, "m-00002-of-00002-one-of-many.safetensors"),
            ("m-00001-of-4294967295.safetensors", 1, u32::MAX, "m-00002-of-4294967295.safetensors"),
        ] {
            let part = PartName::parse(name).unwrap();
            assert_eq!((part.number, part.count, part.with_number(2).as_str()), (number, count, second));
            assert_eq!(part.with_number(number), name);
            assert!(part.is_same_model(&PartName::parse(second).unwrap()));
        }
        for name in ["model.safetensors", "a-of-b", "-of-", "x-00004-of-00003.gguf", "x-1-of-0.gguf", "of-1-of-", "x1-of-3", ""] {
            assert_eq!(PartName::parse(name), None, "{name}");
        }
        let other = |name| PartName::parse(name).unwrap();
        let part = other("model-00001-of-00003.safetensors");
        for name in ["model-00001-of-00004.safetensors", "other-00001-of-00003.safetensors", "model-00001-of-00003.gguf"] {
            assert!(!part.is_same_model(&other(name)), "{name}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_name_round_trips_or_is_refused(name in r"(-of-|_of_|[-_.a]|[0-9]{1,12}|\.gguf|\PC){0,8}") {
            if let Some(part) = PartName::parse(&name) {
                proptest::prop_assert_eq!(part.with_number(part.number), name.clone());
            }
        }
    }
}

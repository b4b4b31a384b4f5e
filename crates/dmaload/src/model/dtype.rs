//! The element types of tensors: those that a safetensors header can name, and ggml's block types
//! that GGUF files use.

use std::fmt;
use std::str::FromStr;

/// Declares [`DType`] and its properties from one table, so that parsing and formatting cannot
/// disagree.
macro_rules! dtypes {
    (
        $($(#[$doc:meta])+ $variant:ident = $name:literal, $bits:literal bits;)+
        quantized:
        $($(#[$qdoc:meta])+ $quantized:ident = $qname:literal, $elements:literal in $bytes:literal bytes;)+
    ) => {
        /// The element type of a tensor.
        ///
        /// The types and their names are those of the `safetensors` crate 0.8, plus ggml's
        /// quantized types, which are stored in blocks of elements that share scales. All types
        /// are little-endian.
        ///
        /// A type converts to and from its name, as spelled by `safetensors` or ggml:
        ///
        /// ```
        /// use dmaload::model::DType;
        ///
        /// let dtype: DType = "BF16".parse()?;
        /// assert_eq!((dtype, dtype.element_bytes()), (DType::BF16, Some(2)));
        /// assert_eq!(DType::try_from("Q4_0")?.to_string(), "Q4_0");
        /// # Ok::<(), dmaload::model::ParseDTypeError>(())
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[allow(non_camel_case_types, reason = "the names that ggml uses")]
        pub enum DType {
            $($(#[$doc])+ $variant,)+
            $($(#[$qdoc])+ $quantized,)+
        }

        impl DType {
            /// Every type that a safetensors header can name.
            pub const SAFETENSORS: &[Self] = &[$(Self::$variant),+];

            /// Every quantized type that a GGUF file can contain.
            pub const QUANTIZED: &[Self] = &[$(Self::$quantized),+];

            /// Returns the size of one element in bits, which is not always a multiple of 8.
            /// Returns `None` for a quantized type, whose elements share scales.
            #[must_use]
            pub const fn element_bits(self) -> Option<usize> {
                match self {
                    $(Self::$variant => Some($bits),)+
                    $(Self::$quantized)|+ => None,
                }
            }

            /// Returns the number of elements in a block, the smallest unit that can be stored: 1
            /// for [`BF16`](Self::BF16), 2 for [`F4`](Self::F4), 32 for [`Q4_0`](Self::Q4_0).
            #[must_use]
            pub const fn block_elements(self) -> usize {
                match self {
                    $(Self::$variant => match $bits {
                        4 => 2,
                        6 => 4,
                        _ => 1,
                    },)+
                    $(Self::$quantized => $elements,)+
                }
            }

            /// Returns the size of a block in bytes: 2 for [`BF16`](Self::BF16), 1 for
            /// [`F4`](Self::F4), 18 for [`Q4_0`](Self::Q4_0).
            #[must_use]
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(Self::$variant => $bits * self.block_elements() / 8,)+
                    $(Self::$quantized => $bytes,)+
                }
            }

            /// Returns the name that safetensors headers or ggml use for the type.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                    $(Self::$quantized => $qname,)+
                }
            }

            /// Returns the type that has this name in safetensors headers. The format has no
            /// quantized types.
            pub(super) fn from_safetensors_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }
    };
}

impl DType {
    /// Returns the size of one element in bytes, or `None` if an element is not a whole number of
    /// bytes ([`F4`](Self::F4)) or is quantized.
    #[must_use]
    pub const fn element_bytes(self) -> Option<usize> {
        match self.element_bits() {
            Some(bits) if bits.is_multiple_of(8) => Some(bits / 8),
            _ => None,
        }
    }

    /// Returns the size of this many elements in bytes, or `None` if they do not fill whole blocks
    /// or if the size overflows 64 bits.
    pub(crate) fn bytes_of(self, elements: u64) -> Option<u64> {
        let (block_elements, block_bytes) = (self.block_elements() as u64, self.block_bytes() as u64);
        if elements.is_multiple_of(block_elements) { (elements / block_elements).checked_mul(block_bytes) } else { None }
    }
}

/// The error for a string that is not the name of a [`DType`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {name:?} (names must be spelled exactly, like \"BF16\" or \"F8_E4M3\")")]
#[non_exhaustive]
pub struct ParseDTypeError {
    /// The unknown name.
    pub name: String,
}

/// Parses a name that is spelled exactly as safetensors headers (`"BF16"`, not `"bf16"`) or ggml
/// (`"Q4_0"`) spell it.
impl FromStr for DType {
    type Err = ParseDTypeError;

    fn from_str(name: &str) -> Result<Self, ParseDTypeError> {
        let quantized = || Self::QUANTIZED.iter().copied().find(|dtype| dtype.name() == name);
        Self::from_safetensors_name(name).or_else(quantized).ok_or_else(|| ParseDTypeError { name: name.to_owned() })
    }
}

/// Same as [`DType::from_str`].
impl TryFrom<&str> for DType {
    type Error = ParseDTypeError;

    fn try_from(name: &str) -> Result<Self, ParseDTypeError> {
        name.parse()
    }
}

dtypes! {
    /// A boolean stored in one byte.
    Bool = "BOOL", 8 bits;
    /// 4-bit float (OCP microscaling, E2M1).
    F4 = "F4", 4 bits;
    /// 6-bit float with 2 exponent bits (OCP microscaling).
    F6E2M3 = "F6_E2M3", 6 bits;
    /// 6-bit float with 3 exponent bits (OCP microscaling).
    F6E3M2 = "F6_E3M2", 6 bits;
    /// Unsigned byte.
    U8 = "U8", 8 bits;
    /// Signed byte.
    I8 = "I8", 8 bits;
    /// 8-bit float with 5 exponent bits.
    F8E5M2 = "F8_E5M2", 8 bits;
    /// 8-bit float with 4 exponent bits.
    F8E4M3 = "F8_E4M3", 8 bits;
    /// 8-bit power-of-two scale (OCP microscaling).
    F8E8M0 = "F8_E8M0", 8 bits;
    /// 8-bit float with 4 exponent bits, no infinities and a single zero.
    F8E4M3Fnuz = "F8_E4M3FNUZ", 8 bits;
    /// 8-bit float with 5 exponent bits, no infinities and a single zero.
    F8E5M2Fnuz = "F8_E5M2FNUZ", 8 bits;
    /// Signed 16-bit integer.
    I16 = "I16", 16 bits;
    /// Unsigned 16-bit integer.
    U16 = "U16", 16 bits;
    /// Half-precision float.
    F16 = "F16", 16 bits;
    /// Brain float: the upper 16 bits of an [`F32`](Self::F32).
    BF16 = "BF16", 16 bits;
    /// Signed 32-bit integer.
    I32 = "I32", 32 bits;
    /// Unsigned 32-bit integer.
    U32 = "U32", 32 bits;
    /// Single-precision float.
    F32 = "F32", 32 bits;
    /// Complex number: two [`F32`](Self::F32) values.
    C64 = "C64", 64 bits;
    /// Double-precision float.
    F64 = "F64", 64 bits;
    /// Signed 64-bit integer.
    I64 = "I64", 64 bits;
    /// Unsigned 64-bit integer.
    U64 = "U64", 64 bits;

    quantized:
    /// 4 bits per element and one scale per block.
    Q4_0 = "Q4_0", 32 in 18 bytes;
    /// 4 bits per element, and a scale and a minimum per block.
    Q4_1 = "Q4_1", 32 in 20 bytes;
    /// 5 bits per element and one scale per block.
    Q5_0 = "Q5_0", 32 in 22 bytes;
    /// 5 bits per element, and a scale and a minimum per block.
    Q5_1 = "Q5_1", 32 in 24 bytes;
    /// 8 bits per element and one scale per block.
    Q8_0 = "Q8_0", 32 in 34 bytes;
    /// 8 bits per element, and a scale and a sum per block.
    Q8_1 = "Q8_1", 32 in 36 bytes;
    /// 2 bits per element, in super-blocks of 256 elements.
    Q2_K = "Q2_K", 256 in 84 bytes;
    /// 3 bits per element, in super-blocks of 256 elements.
    Q3_K = "Q3_K", 256 in 110 bytes;
    /// 4 bits per element, in super-blocks of 256 elements.
    Q4_K = "Q4_K", 256 in 144 bytes;
    /// 5 bits per element, in super-blocks of 256 elements.
    Q5_K = "Q5_K", 256 in 176 bytes;
    /// 6 bits per element, in super-blocks of 256 elements.
    Q6_K = "Q6_K", 256 in 210 bytes;
    /// 8 bits per element, in super-blocks of 256 elements.
    Q8_K = "Q8_K", 256 in 292 bytes;
    /// 2.06 bits per element, with a codebook.
    IQ2_XXS = "IQ2_XXS", 256 in 66 bytes;
    /// 2.31 bits per element, with a codebook.
    IQ2_XS = "IQ2_XS", 256 in 74 bytes;
    /// 3.06 bits per element, with a codebook.
    IQ3_XXS = "IQ3_XXS", 256 in 98 bytes;
    /// 1.56 bits per element, with a codebook.
    IQ1_S = "IQ1_S", 256 in 50 bytes;
    /// Non-linear 4-bit quantization, with one scale per block.
    IQ4_NL = "IQ4_NL", 32 in 18 bytes;
    /// 3.44 bits per element, with a codebook.
    IQ3_S = "IQ3_S", 256 in 110 bytes;
    /// 2.56 bits per element, with a codebook.
    IQ2_S = "IQ2_S", 256 in 82 bytes;
    /// Non-linear 4-bit quantization, in super-blocks of 256 elements.
    IQ4_XS = "IQ4_XS", 256 in 136 bytes;
    /// 1.75 bits per element, with a codebook.
    IQ1_M = "IQ1_M", 256 in 56 bytes;
    /// Ternary values in 1.69 bits per element.
    TQ1_0 = "TQ1_0", 256 in 54 bytes;
    /// Ternary values in 2.06 bits per element.
    TQ2_0 = "TQ2_0", 256 in 66 bytes;
    /// 4-bit float with one scale per block (OCP microscaling).
    MXFP4 = "MXFP4", 32 in 17 bytes;
    /// 4-bit float with a scale for every 16 elements (NVIDIA).
    NVFP4 = "NVFP4", 64 in 36 bytes;
    /// 1 bit per element and one scale per block.
    Q1_0 = "Q1_0", 128 in 18 bytes;
    /// 2 bits per element and one scale per block.
    Q2_0 = "Q2_0", 64 in 18 bytes;
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = DType> {
        DType::SAFETENSORS.iter().chain(DType::QUANTIZED).copied()
    }

    #[test]
    fn every_name_parses_to_its_type() {
        let mut names = Vec::new();
        for dtype in all() {
            assert_eq!(dtype.to_string(), dtype.name());
            assert_eq!(dtype.name().parse(), Ok(dtype));
            assert_eq!(DType::try_from(dtype.name()), Ok(dtype));
            names.push(dtype.name());
        }
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "duplicate name: {names:?}");
    }

    #[test]
    fn block_is_whole_bytes_and_matches_element_bits() {
        for &dtype in DType::SAFETENSORS {
            let (elements, bits) = (dtype.block_elements(), dtype.element_bits().unwrap());
            assert_eq!(elements * bits, dtype.block_bytes() * 8, "{dtype}");
            assert_eq!(dtype.element_bytes(), (elements == 1).then_some(bits / 8), "{dtype}");
        }
        for &dtype in DType::QUANTIZED {
            assert_eq!((dtype.element_bits(), dtype.element_bytes()), (None, None), "{dtype}");
        }
        let block = |dtype: DType| (dtype.block_elements(), dtype.block_bytes());
        let blocks = [DType::F4, DType::F6E2M3, DType::BF16, DType::Q6_K].map(block);
        assert_eq!(blocks, [(2, 1), (4, 3), (1, 2), (256, 210)]);
    }

    #[test]
    fn partial_blocks_and_overflow_have_no_size() {
        assert_eq!((DType::BF16.bytes_of(3), DType::F4.bytes_of(3)), (Some(6), None));
        assert_eq!((DType::Q4_0.bytes_of(64), DType::Q4_0.bytes_of(63)), (Some(36), None));
        assert_eq!((DType::U8.bytes_of(u64::MAX), DType::U16.bytes_of(u64::MAX)), (Some(u64::MAX), None));
    }

    #[test]
    fn misspelled_dtype_is_refused() {
        for name in ["", "bf16", "BF16 ", "F8E4M3", "Bool", "F128", "q4_0", "\u{1b}[2J"] {
            let error = name.parse::<DType>().unwrap_err();
            assert_eq!(error.name, name);
            assert!(!error.to_string().contains('\u{1b}'), "control characters should be escaped");
        }
        // Safetensors headers cannot name quantized types.
        assert_eq!(DType::from_safetensors_name("Q4_0"), None);
    }
}

//! The element types that a safetensors header can name.

use std::fmt;

/// Declares [`DType`] and everything about it from one table, so that a type
/// can't be known in one direction and unknown in the other.
macro_rules! dtypes {
    ($($(#[$doc:meta])+ $variant:ident = $name:literal, $bits:literal bits;)+) => {
        /// The type of a tensor's elements.
        ///
        /// The set and the spelling are those of the `safetensors` crate 0.8.
        /// All are little-endian.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DType {
            $($(#[$doc])+ $variant,)+
        }

        impl DType {
            /// Every type there is.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The size of one element, in bits. Not always a multiple of 8.
            #[must_use]
            pub const fn bits(self) -> u64 {
                match self {
                    $(Self::$variant => $bits,)+
                }
            }

            /// The name that a safetensors header uses.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// The type of that name, spelled exactly as in a header
            /// (`"BF16"`, not `"bf16"`), or `None`.
            #[must_use]
            pub fn parse(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }
    };
}

dtypes! {
    /// A truth value in a byte of its own.
    Bool = "BOOL", 8 bits;
    /// 4-bit float (OCP microscaling, E2M1).
    F4 = "F4", 4 bits;
    /// 6-bit float, 2 bits of exponent (OCP microscaling).
    F6E2M3 = "F6_E2M3", 6 bits;
    /// 6-bit float, 3 bits of exponent (OCP microscaling).
    F6E3M2 = "F6_E3M2", 6 bits;
    /// Unsigned byte.
    U8 = "U8", 8 bits;
    /// Signed byte.
    I8 = "I8", 8 bits;
    /// 8-bit float, 5 bits of exponent.
    F8E5M2 = "F8_E5M2", 8 bits;
    /// 8-bit float, 4 bits of exponent.
    F8E4M3 = "F8_E4M3", 8 bits;
    /// 8-bit power-of-two scale (OCP microscaling).
    F8E8M0 = "F8_E8M0", 8 bits;
    /// 8-bit float, 4 bits of exponent, no infinities and one zero.
    F8E4M3Fnuz = "F8_E4M3FNUZ", 8 bits;
    /// 8-bit float, 5 bits of exponent, no infinities and one zero.
    F8E5M2Fnuz = "F8_E5M2FNUZ", 8 bits;
    /// Signed 16-bit integer.
    I16 = "I16", 16 bits;
    /// Unsigned 16-bit integer.
    U16 = "U16", 16 bits;
    /// Half-precision float.
    F16 = "F16", 16 bits;
    /// Brain float: the upper half of an [`F32`](Self::F32).
    BF16 = "BF16", 16 bits;
    /// Signed 32-bit integer.
    I32 = "I32", 32 bits;
    /// Unsigned 32-bit integer.
    U32 = "U32", 32 bits;
    /// Single-precision float.
    F32 = "F32", 32 bits;
    /// Complex number of two [`F32`](Self::F32).
    C64 = "C64", 64 bits;
    /// Double-precision float.
    F64 = "F64", 64 bits;
    /// Signed 64-bit integer.
    I64 = "I64", 64 bits;
    /// Unsigned 64-bit integer.
    U64 = "U64", 64 bits;
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_type() {
        for &dtype in DType::ALL {
            assert_eq!(DType::parse(&dtype.to_string()), Some(dtype));
        }
    }

    #[test]
    fn spelling_is_exact() {
        for name in ["", "bf16", "BF16 ", "F8E4M3", "Bool", "F128"] {
            assert_eq!(DType::parse(name), None, "{name:?}");
        }
    }
}

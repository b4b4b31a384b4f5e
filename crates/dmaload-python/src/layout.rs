//! Computes the shapes and strides of exported arrays.

use dmaload::model::DType;

/// The elements of an exported array: those of the tensor's own type, or bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Elements {
    pub(crate) shape: Vec<usize>,
    /// The size of an element in bytes, which is 1 for elements smaller than a byte.
    pub(crate) bytes: usize,
}

impl Elements {
    /// Describes a tensor as an array of elements of its own type.
    pub(crate) fn new(dtype: DType, shape: &[usize]) -> Self {
        Elements { shape: shape.to_vec(), bytes: dtype.element_bytes().unwrap_or(1) }
    }

    /// Describes a tensor as an array of bytes, with the last dimension in bytes. If a row is not
    /// a whole number of blocks, or the tensor is a scalar, the array has only one dimension.
    pub(crate) fn as_bytes(dtype: DType, shape: &[usize]) -> Self {
        let (block, block_bytes) = (dtype.block_elements(), dtype.block_bytes());
        let shape = match shape.split_last() {
            Some((last, others)) if last.is_multiple_of(block) => {
                others.iter().copied().chain([last / block * block_bytes]).collect()
            }
            _ => vec![bytes_of(dtype, shape)],
        };
        Elements { shape, bytes: 1 }
    }

    /// Returns the stride of each dimension, in elements.
    pub(crate) fn strides(&self) -> Vec<usize> {
        let mut stride = 1_usize;
        let of_dimension = |&length: &usize| {
            let own = stride;
            // Saturates only for an empty tensor, whose strides have no meaning.
            stride = stride.saturating_mul(length.max(1));
            own
        };
        let mut strides: Vec<usize> = self.shape.iter().rev().map(of_dimension).collect();
        strides.reverse();
        strides
    }
}

/// Returns the size of a tensor in bytes. The file's header must have been checked; otherwise, the
/// number of elements could overflow.
pub(crate) fn bytes_of(dtype: DType, shape: &[usize]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    let elements: usize = shape.iter().product();
    elements / dtype.block_elements() * dtype.block_bytes()
}

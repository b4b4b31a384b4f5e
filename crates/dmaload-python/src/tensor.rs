//! The Python class `Tensor`, and the protocols through which arrays share its memory.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_void};
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex};

use dmaload::ImageFile;
use dmaload::model::DType;
use pyo3::ffi::{self, Py_buffer, Py_ssize_t};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::dlpack;
use crate::errors::{Failure, Raised, guarded};
use crate::layout::{Elements, bytes_of};
use crate::memory::{Copied, Memory};
use crate::process::{Owned, detached, lock};

/// A tensor: its name, type and shape, and its bytes in memory that Python may write to.
///
/// `numpy()`, `torch()`, DLPack (`np.from_dlpack`, `torch.from_dlpack`) and the buffer protocol
/// (`memoryview`) create arrays that share the tensor's memory and keep it alive. The methods'
/// documentation lists the cases in which they copy.
#[pyclass(frozen, module = "dmaload")]
#[derive(Debug)]
pub(crate) struct Tensor {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: usize,
    source: Owned<Source>,
    /// Created by the first export.
    memory: Mutex<Option<Arc<Owned<Memory>>>>,
}

/// Where a tensor's bytes are.
#[derive(Debug)]
enum Source {
    Tensor(dmaload::Tensor),
    Part(ImageFile, Range<u64>),
    /// The bytes are only in [`Tensor::memory`].
    Memory,
}

/// The description of a tensor that is a range of a loaded file.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) file: ImageFile,
    pub(crate) range: Range<u64>,
}

impl Tensor {
    pub(crate) fn new(tensor: dmaload::Tensor) -> Self {
        let (name, dtype, shape) = (tensor.name().to_owned(), tensor.dtype(), tensor.shape().to_vec());
        let bytes = bytes_of(dtype, &shape);
        let tensor = tensor.without_other_segments();
        Tensor { name, dtype, shape, bytes, source: Owned::new(Source::Tensor(tensor)), memory: Mutex::default() }
    }

    pub(crate) fn of_part(part: Part) -> Self {
        let Part { name, dtype, shape, file, range } = part;
        let bytes = bytes_of(dtype, &shape);
        Tensor { name, dtype, shape, bytes, source: Owned::new(Source::Part(file, range)), memory: Mutex::default() }
    }

    pub(crate) fn of_memory(name: String, dtype: DType, shape: Vec<usize>, memory: Memory) -> Self {
        let bytes = memory.len();
        let memory = Mutex::new(Some(Arc::new(Owned::new(memory))));
        Tensor { name, dtype, shape, bytes, source: Owned::new(Source::Memory), memory }
    }

    /// Returns the underlying `dmaload::Tensor`, whose segments may be dma-bufs or memfds. Returns
    /// `None` for ranges of files (`Image.file`, `start_read`) and for tensors that `read_small`
    /// has read.
    pub(crate) fn loaded(&self) -> Option<&dmaload::Tensor> {
        match &*self.source {
            Source::Tensor(tensor) => Some(tensor),
            Source::Part(..) | Source::Memory => None,
        }
    }

    /// Returns the tensor's memory. Every call returns the same memory.
    pub(crate) fn memory(&self, py: Python<'_>) -> Result<Arc<Owned<Memory>>, Failure> {
        if let Some(known) = &*lock(&self.memory) {
            return Ok(Arc::clone(known));
        }
        // Gather before taking the lock, so only threads that are attached to the interpreter
        // hold the lock. While Python forks, no other thread is attached, so a child never
        // inherits a held lock. If two threads gather at once, the first result is kept.
        let gathered = match &*self.source {
            Source::Tensor(tensor) if !tensor.is_contiguous() => Some(detached(py, || gathered(tensor))?),
            _ => None,
        };
        let mut memory = lock(&self.memory);
        if let Some(known) = &*memory {
            return Ok(Arc::clone(known));
        }
        let of_export = |error: dmaload::Error| Failure::of_export(&error);
        let made = match (gathered, &*self.source) {
            (Some(gathered), _) => Memory::Copied(gathered),
            (None, Source::Tensor(tensor)) => Memory::Private(tensor.private_memory().map_err(of_export)?),
            (None, Source::Part(file, range)) => Memory::Private(file.private_memory(range.clone()).map_err(of_export)?),
            (None, Source::Memory) => unreachable!("a tensor with `Source::Memory` should be created with its memory"),
        };
        assert_eq!(made.len(), self.bytes, "a tensor's memory must have the size that its type and shape imply");
        Ok(Arc::clone(memory.insert(Arc::new(Owned::new(made)))))
    }

    /// Returns the buffer protocol's format for the elements, or `None` if the protocol does not
    /// support their type.
    fn format(&self) -> Option<&'static CStr> {
        Some(match self.dtype {
            DType::Bool => c"?",
            DType::U8 => c"B",
            DType::I8 => c"b",
            DType::I16 => c"h",
            DType::U16 => c"H",
            DType::F16 => c"e",
            DType::I32 => c"i",
            DType::U32 => c"I",
            DType::F32 => c"f",
            DType::I64 => c"q",
            DType::U64 => c"Q",
            DType::F64 => c"d",
            DType::C64 => c"Zf",
            _ => return None,
        })
    }
}

/// Copies a rank's rows, which are not contiguous, into one region.
fn gathered(tensor: &dmaload::Tensor) -> Result<Copied, Failure> {
    if tensor.parts().iter().any(|part| part.segment.has_dma_buf()) {
        return Err(Failure::new(
            "ExportError",
            "cannot export a dma-buf as an array, only by its descriptor: see dmaload.dma_buf",
        ));
    }
    let bytes = bytes_of(tensor.dtype(), tensor.shape());
    Copied::filled(bytes, |buffer| {
        let mut rest = buffer;
        for part in tensor.parts() {
            let (row, behind) = rest.split_at_mut(part.len);
            let copied = part.segment.cpu_access()?.read_at(row, part.offset);
            assert_eq!(copied, part.len, "a part must lie within its segment");
            rest = behind;
        }
        assert!(rest.is_empty(), "the parts must add up to the whole tensor");
        Ok(())
    })
}

/// The data that a `Py_buffer` points to, apart from the tensor's bytes.
struct Shown {
    shape: Vec<Py_ssize_t>,
    strides: Vec<Py_ssize_t>,
    /// Keeps the bytes alive even if a consumer holds the buffer without its owner.
    _memory: Arc<Owned<Memory>>,
}

/// Converts a length to the interpreter's type.
fn signed(length: usize) -> Py_ssize_t {
    Py_ssize_t::try_from(length).expect("memory should not be longer than isize::MAX bytes")
}

#[pymethods]
impl Tensor {
    /// The tensor's name in the file.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// The name of the element type in safetensors or ggml, such as `BF16`, `F8_E4M3` or `Q4_K`.
    #[getter(dtype)]
    fn dtype_name(&self) -> &'static str {
        self.dtype.name()
    }

    /// The lengths of the dimensions, outermost first.
    #[getter(shape)]
    fn shape_tuple<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// The size in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.bytes
    }

    /// The number of elements in a block of the type: 1 for most types, 2 for `F4`, 256 for
    /// `Q4_K`.
    #[getter]
    fn block_elements(&self) -> usize {
        self.dtype.block_elements()
    }

    /// The size of a block of the type, in bytes.
    #[getter]
    fn block_bytes(&self) -> usize {
        self.dtype.block_bytes()
    }

    /// Returns a NumPy array that shares the memory. Types that NumPy lacks use `ml_dtypes`. `F4`
    /// and the `F6` types are unpacked into a copy, since `ml_dtypes` stores each element in a
    /// byte. GGUF blocks become bytes.
    fn numpy(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        slf.py().import("dmaload._convert")?.call_method1("to_numpy", (slf,))
    }

    /// Returns a torch tensor that shares the memory. `F4` becomes `torch.float4_e2m1fn_x2`, with
    /// two values in each element. GGUF blocks, and types that torch lacks, become bytes. Elements
    /// that are not aligned in the file are copied.
    fn torch(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        slf.py().import("dmaload._convert")?.call_method1("to_torch", (slf,))
    }

    /// The DLPack protocol: returns a capsule with the writable memory.
    ///
    /// If `max_version` is 1.0 or later, the capsule contains the versioned structure of DLPack
    /// 1.1 (`dltensor_versioned`), otherwise the unversioned one (`dltensor`). With `copy=True`,
    /// the memory is copied. Elements that are not aligned to their size must be copied, so
    /// `copy=False` is an error for them. GGUF blocks become bytes.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<Py<PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        guarded(py, || {
            if stream.is_some() {
                return Err(Failure::export("stream must be None, because CPU memory has no streams").into());
            }
            if let Some(device) = dl_device.filter(|&device| device != dlpack::CPU) {
                return Err(Failure::export(format!("cannot export CPU memory (device (1, 0)) to device {device:?}")).into());
            }
            dlpack::export(py, self.dtype, &self.shape, self.memory(py)?, max_version, copy)
        })
    }

    /// The DLPack device of the memory: the CPU.
    fn __dlpack_device__(&self) -> (i32, i32) {
        dlpack::CPU
    }

    /// # Safety
    /// Only the interpreter may call this method, with a buffer to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut Py_buffer, flags: c_int) -> PyResult<()> {
        let py = slf.py();
        // SAFETY: the interpreter passes a valid, writable view. The owner is cleared first, so
        // the view holds no reference if this function fails.
        unsafe { (*view).obj = ptr::null_mut() };
        guarded(py, || {
            let this = slf.get();
            let memory = this.memory(py)?;
            let format = this.format();
            let elements_of = if format.is_some() { Elements::new } else { Elements::as_bytes };
            let elements = elements_of(this.dtype, &this.shape);
            let strides = elements.strides().into_iter().map(|stride| {
                // Strides of an empty tensor have no meaning, so they may be any number.
                signed(stride.saturating_mul(elements.bytes).min(isize::MAX.unsigned_abs()))
            });
            let (strides, item_bytes, shape) = (strides.collect(), elements.bytes, elements.shape);
            let dimensions =
                c_int::try_from(shape.len()).map_err(|_| Failure::export("cannot export more than 2^31 - 1 dimensions"))?;
            let mut shown =
                Box::new(Shown { strides, shape: shape.into_iter().map(signed).collect(), _memory: Arc::clone(&memory) });
            let is_requested = |flag: c_int| flags & flag == flag;
            if is_requested(ffi::PyBUF_F_CONTIGUOUS) && !is_requested(ffi::PyBUF_ANY_CONTIGUOUS) && shown.shape.len() > 1 {
                return Err(Failure::export("cannot export in column-major order: rows are contiguous").into());
            }
            // The C API expects null pointers if there are no dimensions.
            let (shape, strides) = match dimensions {
                0 => (ptr::null_mut(), ptr::null_mut()),
                _ => (shown.shape.as_mut_ptr(), shown.strides.as_mut_ptr()),
            };
            let filled = Py_buffer {
                buf: memory.address().as_ptr().cast::<c_void>(),
                len: signed(this.bytes),
                itemsize: signed(item_bytes),
                readonly: 0,
                ndim: if is_requested(ffi::PyBUF_ND) { dimensions } else { 1 },
                format: if is_requested(ffi::PyBUF_FORMAT) {
                    format.unwrap_or(c"B").as_ptr().cast_mut()
                } else {
                    ptr::null_mut()
                },
                shape: if is_requested(ffi::PyBUF_ND) { shape } else { ptr::null_mut() },
                strides: if is_requested(ffi::PyBUF_STRIDES) { strides } else { ptr::null_mut() },
                suboffsets: ptr::null_mut(),
                internal: Box::into_raw(shown).cast::<c_void>(),
                obj: slf.clone().into_ptr(),
            };
            // SAFETY: the interpreter passes a valid, writable view, whose previous contents need
            // not be dropped.
            unsafe { view.write(filled) };
            Ok::<_, Raised>(())
        })
    }

    /// # Safety
    /// Only the interpreter may call this method, once for each buffer that `__getbuffer__`
    /// filled.
    unsafe fn __releasebuffer__(&self, view: *mut Py_buffer) {
        // SAFETY: `view` is a buffer that `__getbuffer__` filled, so it is valid.
        let internal = unsafe { (*view).internal };
        // SAFETY: `internal` came from `Box::into_raw` in `__getbuffer__`, and is freed once.
        drop(unsafe { Box::from_raw(internal.cast::<Shown>()) });
    }

    fn __repr__(&self) -> String {
        format!("<dmaload.Tensor {:?}: {} {:?}, bytes: {}>", self.name, self.dtype, self.shape, self.bytes)
    }
}

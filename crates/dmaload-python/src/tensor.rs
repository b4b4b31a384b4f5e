//! A tensor as Python has it: what it is, its memory, and the protocols by which arrays share it.
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

/// A tensor: its name, its type, its shape, and its bytes in memory that Python may write to.
///
/// Arrays are made of it without a copy: by `numpy()`, `torch()`, DLPack (`np.from_dlpack`,
/// `torch.from_dlpack`), or the buffer protocol (`memoryview`). Each keeps the memory, and all of
/// one tensor have the same.
#[pyclass(frozen, module = "dmaload")]
#[derive(Debug)]
pub(crate) struct Tensor {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: usize,
    source: Owned<Source>,
    /// Made when it is first exported.
    memory: Mutex<Option<Arc<Owned<Memory>>>>,
}

/// Where its bytes are.
#[derive(Debug)]
enum Source {
    Tensor(dmaload::Tensor),
    Part(ImageFile, Range<u64>),
    /// In its memory alone.
    Memory,
}

/// Bytes of a loaded file that are a tensor.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) file: ImageFile,
    pub(crate) range: Range<u64>,
}

impl Tensor {
    pub(crate) fn of(tensor: dmaload::Tensor) -> Self {
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

    /// The library's tensor, for its descriptors.
    pub(crate) fn loaded(&self) -> Option<&dmaload::Tensor> {
        match &*self.source {
            Source::Tensor(tensor) => Some(tensor),
            Source::Part(..) | Source::Memory => None,
        }
    }

    /// Its memory, which is always the same.
    pub(crate) fn memory(&self, py: Python<'_>) -> Result<Arc<Owned<Memory>>, Failure> {
        if let Some(known) = &*lock(&self.memory) {
            return Ok(Arc::clone(known));
        }
        // Gathered without the lock, and before it is taken: it is held only by threads that are
        // attached to the interpreter, so no fork of Python's finds it held. Of two threads that
        // gather at once, the first counts.
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
            (None, Source::Memory) => unreachable!("it was made with its memory"),
        };
        assert_eq!(made.len(), self.bytes, "a tensor's memory has the bytes of its shape");
        Ok(Arc::clone(memory.insert(Arc::new(Owned::new(made)))))
    }

    /// What the buffer protocol calls an element, if it has a name for it.
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

/// A rank's rows, which are apart in memory, put together.
fn gathered(tensor: &dmaload::Tensor) -> Result<Copied, Failure> {
    if tensor.parts().iter().any(|part| part.segment.has_dma_buf()) {
        return Err(Failure::new("ExportError", "a dma-buf is exported by its descriptor alone: see dmaload.dma_buf"));
    }
    let bytes = bytes_of(tensor.dtype(), tensor.shape());
    Copied::filled(bytes, |buffer| {
        let mut rest = buffer;
        for part in tensor.parts() {
            let (row, behind) = rest.split_at_mut(part.len);
            let copied = part.segment.cpu_access()?.read_at(row, part.offset);
            assert_eq!(copied, part.len, "a part is within its segment");
            rest = behind;
        }
        assert!(rest.is_empty(), "the parts are all of the tensor");
        Ok(())
    })
}

/// What a `Py_buffer` points to, beside the bytes.
struct Shown {
    shape: Vec<Py_ssize_t>,
    strides: Vec<Py_ssize_t>,
    /// The bytes outlive the tensor, should a consumer hold the buffer and not its owner.
    _memory: Arc<Owned<Memory>>,
}

/// Lengths as the interpreter counts them.
fn signed(length: usize) -> Py_ssize_t {
    Py_ssize_t::try_from(length).expect("no memory is longer")
}

#[pymethods]
impl Tensor {
    /// Its name.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// The type of its elements, as safetensors or ggml spell it: `BF16`, `F8_E4M3`, `Q4_K`.
    #[getter(dtype)]
    fn dtype_name(&self) -> &'static str {
        self.dtype.name()
    }

    /// The lengths of its dimensions, outermost first.
    #[getter(shape)]
    fn shape_tuple<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// How many bytes it has.
    #[getter]
    fn nbytes(&self) -> usize {
        self.bytes
    }

    /// The elements in a block of its type: 1 for most, 2 for `F4`, 256 for `Q4_K`.
    #[getter]
    fn block_elements(&self) -> usize {
        self.dtype.block_elements()
    }

    /// The bytes of a block of its type.
    #[getter]
    fn block_bytes(&self) -> usize {
        self.dtype.block_bytes()
    }

    /// A NumPy array of its memory, without a copy. Types that NumPy lacks are those of
    /// `ml_dtypes`; `F4` and the `F6` types, which that has one to a byte, are unpacked into a
    /// copy. Blocks of GGUF are bytes.
    fn numpy(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        slf.py().import("dmaload._convert")?.call_method1("to_numpy", (slf,))
    }

    /// A torch tensor of its memory, without a copy. `F4` is `torch.float4_e2m1fn_x2`, two to an
    /// element. Blocks of GGUF, and types that torch lacks, are bytes.
    fn torch(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        slf.py().import("dmaload._convert")?.call_method1("to_torch", (slf,))
    }

    /// The DLPack protocol: a capsule with its memory, writable.
    ///
    /// With `max_version` it is of version 1.1 (`dltensor_versioned`), else of the version before
    /// these had numbers. `copy=True` copies; so do elements that are not aligned to their size,
    /// which is refused under `copy=False`.
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
                return Err(Failure::export("memory of the CPU has no streams: stream must be None").into());
            }
            if let Some(device) = dl_device.filter(|&device| device != dlpack::CPU) {
                return Err(Failure::export(format!("the memory is the CPU's (1, 0), and not of device {device:?}")).into());
            }
            dlpack::export(py, self.dtype, &self.shape, self.memory(py)?, max_version, copy)
        })
    }

    /// The device of its memory, as DLPack counts them: the CPU.
    fn __dlpack_device__(&self) -> (i32, i32) {
        dlpack::CPU
    }

    /// # Safety
    /// The interpreter calls it with a buffer to be filled.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut Py_buffer, flags: c_int) -> PyResult<()> {
        let py = slf.py();
        // SAFETY: the interpreter's view is there to be filled. Without an owner it holds nothing,
        // should this fail.
        unsafe { (*view).obj = ptr::null_mut() };
        guarded(py, || {
            let this = slf.get();
            let memory = this.memory(py)?;
            let format = this.format();
            let of = if format.is_some() { Elements::of } else { Elements::as_bytes };
            let elements = of(this.dtype, &this.shape);
            let strides = elements.strides().into_iter().map(|stride| {
                // Without elements, strides mean nothing, and may be any number.
                signed(stride.saturating_mul(elements.bytes).min(isize::MAX.unsigned_abs()))
            });
            let (strides, item_bytes, shape) = (strides.collect(), elements.bytes, elements.shape);
            let dimensions = c_int::try_from(shape.len()).map_err(|_| Failure::export("it has too many dimensions"))?;
            let mut shown =
                Box::new(Shown { strides, shape: shape.into_iter().map(signed).collect(), _memory: Arc::clone(&memory) });
            let asked = |flag: c_int| flags & flag == flag;
            if asked(ffi::PyBUF_F_CONTIGUOUS) && !asked(ffi::PyBUF_ANY_CONTIGUOUS) && shown.shape.len() > 1 {
                return Err(Failure::export("its rows are contiguous, and columns were asked for").into());
            }
            // The C API wants null where there are no dimensions.
            let (shape, strides) = match dimensions {
                0 => (ptr::null_mut(), ptr::null_mut()),
                _ => (shown.shape.as_mut_ptr(), shown.strides.as_mut_ptr()),
            };
            let filled = Py_buffer {
                buf: memory.address().as_ptr().cast::<c_void>(),
                len: signed(this.bytes),
                itemsize: signed(item_bytes),
                readonly: 0,
                ndim: if asked(ffi::PyBUF_ND) { dimensions } else { 1 },
                format: if asked(ffi::PyBUF_FORMAT) { format.unwrap_or(c"B").as_ptr().cast_mut() } else { ptr::null_mut() },
                shape: if asked(ffi::PyBUF_ND) { shape } else { ptr::null_mut() },
                strides: if asked(ffi::PyBUF_STRIDES) { strides } else { ptr::null_mut() },
                suboffsets: ptr::null_mut(),
                internal: Box::into_raw(shown).cast::<c_void>(),
                obj: slf.clone().into_ptr(),
            };
            // SAFETY: the interpreter's view is there to be filled, with whatever it has in it
            // before.
            unsafe { view.write(filled) };
            Ok::<_, Raised>(())
        })
    }

    /// # Safety
    /// The interpreter calls it once with a buffer that `__getbuffer__` has filled.
    unsafe fn __releasebuffer__(&self, view: *mut Py_buffer) {
        // SAFETY: as above; the field is the box's.
        let internal = unsafe { (*view).internal };
        // SAFETY: it came from `Box::into_raw` in `__getbuffer__`, and is taken back once.
        drop(unsafe { Box::from_raw(internal.cast::<Shown>()) });
    }

    fn __repr__(&self) -> String {
        format!("<dmaload.Tensor {:?}: {} {:?}, {} bytes>", self.name, self.dtype, self.shape, self.bytes)
    }
}

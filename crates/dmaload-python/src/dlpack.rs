//! Exports CPU memory in DLPack capsules: see <https://dmlc.github.io/dlpack/latest/>.
//!
//! A capsule owns a structure, which owns the memory. The consumer renames the capsule, and calls
//! the structure's deleter when it is done. It may do so on any thread, even on one that is not
//! attached to the interpreter, so the deleter uses no Python objects. If a capsule is not
//! consumed, its destructor calls the deleter.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::Arc;

use dmaload::model::DType;
use pyo3::ffi::{self, PyObject};
use pyo3::prelude::*;

use crate::errors::{Failure, Raised};
use crate::layout::Elements;
use crate::memory::Memory;
use crate::process::{Owned, detached};

/// The device type `kDLCPU`, and the device number.
pub(crate) const CPU: (i32, i32) = (1, 0);

/// The DLPack version to export. It is the first version with codes for floats that have fewer
/// than 16 bits.
const VERSION: (u32, u32) = (1, 1);

const VERSIONED: &CStr = c"dltensor_versioned";
const UNVERSIONED: &CStr = c"dltensor";

/// `DLPACK_FLAG_BITMASK_IS_COPIED`.
const IS_COPIED: u64 = 1 << 1;

#[repr(C)]
struct Device {
    kind: i32,
    id: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct RawTensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`.
#[repr(C)]
struct Unversioned {
    tensor: RawTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Unversioned)>,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: RawTensor,
}

/// The data that the exported structure points to.
struct Context {
    shape: Vec<i64>,
    strides: Vec<i64>,
    _memory: Arc<Owned<Memory>>,
}

/// Returns the type's code, bits and lanes, and the oldest DLPack version that the consumer must
/// accept (0.0 means any version). Returns `None` for the types that DLPack lacks, which are
/// ggml's blocks.
fn data_type(dtype: DType) -> Option<(DataType, (u32, u32))> {
    let (before, now) = ((0, 0), VERSION);
    let (code, bits, since) = match dtype {
        DType::Bool => (6, 8, before),
        DType::U8 => (1, 8, before),
        DType::I8 => (0, 8, before),
        DType::I16 => (0, 16, before),
        DType::U16 => (1, 16, before),
        DType::F16 => (2, 16, before),
        DType::BF16 => (4, 16, before),
        DType::I32 => (0, 32, before),
        DType::U32 => (1, 32, before),
        DType::F32 => (2, 32, before),
        DType::I64 => (0, 64, before),
        DType::U64 => (1, 64, before),
        DType::F64 => (2, 64, before),
        DType::C64 => (5, 64, before),
        DType::F8E4M3 => (10, 8, now),
        DType::F8E4M3Fnuz => (11, 8, now),
        DType::F8E5M2 => (12, 8, now),
        DType::F8E5M2Fnuz => (13, 8, now),
        DType::F8E8M0 => (14, 8, now),
        DType::F6E2M3 => (15, 6, now),
        DType::F6E3M2 => (16, 6, now),
        DType::F4 => (17, 4, now),
        _ => return None,
    };
    Some((DataType { code, bits, lanes: 1 }, since))
}

/// Returns a capsule with a tensor's memory. Types that DLPack lacks are exported as bytes.
pub(crate) fn export(
    py: Python<'_>,
    dtype: DType,
    shape: &[usize],
    memory: Arc<Owned<Memory>>,
    max_version: Option<(u32, u32)>,
    copy: Option<bool>,
) -> Result<Py<PyAny>, Raised> {
    // A consumer that passes version 1 or later accepts the versioned structure, and ignores flags
    // that it does not know.
    let is_versioned = max_version.is_some_and(|(major, _)| major >= 1);
    let (data_type, elements) = match data_type(dtype) {
        Some((known, since)) => {
            if max_version.unwrap_or((0, 0)) < since {
                let name = dtype.name();
                let message = format!(
                    "cannot export {name}: DLPack has this type only in version {}.{} and later, which the consumer does not \
                     accept: use numpy(), torch(), or the buffer protocol, which exports bytes",
                    since.0, since.1
                );
                return Err(Failure::export(message).into());
            }
            (known, Elements::new(dtype, shape))
        }
        None => (DataType { code: 1, bits: 8, lanes: 1 }, Elements::as_bytes(dtype, shape)),
    };
    let is_aligned = memory.len() == 0 || memory.address().addr().get().is_multiple_of(elements.bytes.min(8));
    if !is_aligned && copy == Some(false) {
        let message = format!("cannot export without a copy: elements of {} bytes are not aligned in the file", elements.bytes);
        return Err(Failure::export(message).into());
    }
    let is_copied = copy == Some(true) || !is_aligned;
    let memory = if is_copied { Arc::new(Owned::new(detached(py, || memory.copy())?)) } else { memory };
    let signed = |length: usize| i64::try_from(length).unwrap_or(i64::MAX);
    let dimensions =
        i32::try_from(elements.shape.len()).map_err(|_| Failure::export("cannot export more than 2^31 - 1 dimensions"))?;
    let data = if memory.len() == 0 { ptr::null_mut() } else { memory.address().as_ptr().cast::<c_void>() };
    let mut context = Box::new(Context {
        strides: elements.strides().into_iter().map(signed).collect(),
        shape: elements.shape.into_iter().map(signed).collect(),
        _memory: memory,
    });
    let described = RawTensor {
        data,
        device: Device { kind: CPU.0, id: CPU.1 },
        ndim: dimensions,
        dtype: data_type,
        shape: context.shape.as_mut_ptr(),
        strides: context.strides.as_mut_ptr(),
        byte_offset: 0,
    };
    let context = Box::into_raw(context).cast::<c_void>();
    if is_versioned {
        let flags = if is_copied { IS_COPIED } else { 0 };
        let (major, minor) = VERSION;
        let deleter = Some(delete_versioned as unsafe extern "C" fn(*mut Versioned));
        let managed = Box::into_raw(Box::new(Versioned { major, minor, context, deleter, flags, tensor: described }));
        capsule(py, managed.cast(), VERSIONED, destroy_versioned, || {
            // SAFETY: creating the capsule failed, so nothing else owns `managed`.
            unsafe { delete_versioned(managed) };
        })
    } else {
        let deleter = Some(delete_unversioned as unsafe extern "C" fn(*mut Unversioned));
        let managed = Box::into_raw(Box::new(Unversioned { tensor: described, context, deleter }));
        capsule(py, managed.cast(), UNVERSIONED, destroy_unversioned, || {
            // SAFETY: creating the capsule failed, so nothing else owns `managed`.
            unsafe { delete_unversioned(managed) };
        })
    }
}

fn capsule(
    py: Python<'_>,
    managed: *mut c_void,
    name: &'static CStr,
    destructor: unsafe extern "C" fn(*mut PyObject),
    or_else: impl FnOnce(),
) -> Result<Py<PyAny>, Raised> {
    // SAFETY: the thread is attached to the interpreter (`py`), `managed` is not null, and `name`
    // is static.
    let capsule = unsafe { ffi::PyCapsule_New(managed, name.as_ptr(), Some(destructor)) };
    // SAFETY: `PyCapsule_New` returns a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, capsule) }.map(Bound::unbind).map_err(|error| {
        or_else();
        Raised::Python(error)
    })
}

/// # Safety
/// [`export`] must have created the structure, which must not be used afterwards.
unsafe extern "C" fn delete_versioned(managed: *mut Versioned) {
    // SAFETY: the caller guarantees that `export` created the structure with `Box::into_raw`, and
    // that the structure is not used afterwards. It is therefore freed only once.
    let managed = unsafe { Box::from_raw(managed) };
    // SAFETY: `export` also created the context with `Box::into_raw`. Only the structure owned the
    // context, and the structure is being freed.
    drop(unsafe { Box::from_raw(managed.context.cast::<Context>()) });
}

/// # Safety
/// The same as for [`delete_versioned`].
unsafe extern "C" fn delete_unversioned(managed: *mut Unversioned) {
    // SAFETY: the caller guarantees that `export` created the structure with `Box::into_raw`, and
    // that the structure is not used afterwards. It is therefore freed only once.
    let managed = unsafe { Box::from_raw(managed) };
    // SAFETY: `export` also created the context with `Box::into_raw`. Only the structure owned the
    // context, and the structure is being freed.
    drop(unsafe { Box::from_raw(managed.context.cast::<Context>()) });
}

/// Returns the structure of a capsule that was not consumed, or null if a consumer has renamed the
/// capsule.
///
/// # Safety
/// `capsule` must be a capsule that the interpreter is destroying.
unsafe fn unconsumed(capsule: *mut PyObject, name: &'static CStr) -> *mut c_void {
    // SAFETY: the caller passes a capsule, and the call only compares the capsule's name.
    if unsafe { ffi::PyCapsule_IsValid(capsule, name.as_ptr()) } == 0 {
        return ptr::null_mut();
    }
    // SAFETY: the capsule has this name, as checked above.
    unsafe { ffi::PyCapsule_GetPointer(capsule, name.as_ptr()) }
}

unsafe extern "C" fn destroy_versioned(capsule: *mut PyObject) {
    // SAFETY: the interpreter calls this function with the capsule that it destroys.
    let managed = unsafe { unconsumed(capsule, VERSIONED) };
    if !managed.is_null() {
        // SAFETY: no consumer has renamed the capsule, so the capsule still owns the structure.
        unsafe { delete_versioned(managed.cast()) };
    }
}

unsafe extern "C" fn destroy_unversioned(capsule: *mut PyObject) {
    // SAFETY: the interpreter calls this function with the capsule that it destroys.
    let managed = unsafe { unconsumed(capsule, UNVERSIONED) };
    if !managed.is_null() {
        // SAFETY: no consumer has renamed the capsule, so the capsule still owns the structure.
        unsafe { delete_unversioned(managed.cast()) };
    }
}

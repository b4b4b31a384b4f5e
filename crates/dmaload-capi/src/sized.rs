//! Structs that may get more fields in later versions. Each begins with a `uint64_t` that holds
//! the size, in bytes, of the version that the calling program was compiled with.
//!
//! This works like the kernel's `copy_struct_from_user` (include/linux/uaccess.h).
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use rustix::io::Errno;

use crate::failure::{Failure, Result};
use crate::types::{dmaload_options, dmaload_report};

/// A struct whose first field is its size.
///
/// # Safety
/// The struct is `repr(C)`, its first field is a `u64`, and zero is a valid value of each field.
pub(crate) unsafe trait Sized64: Copy {
    const NAME: &str;
}

// SAFETY: `repr(C)`, begins with `size: u64`, and consists of numbers, nullable pointers and
// nullable functions.
unsafe impl Sized64 for dmaload_options {
    const NAME: &str = "struct dmaload_options";
}

// SAFETY: `repr(C)`, begins with `size: u64`, and consists of numbers only.
unsafe impl Sized64 for dmaload_report {
    const NAME: &str = "struct dmaload_report";
}

fn stated_size<T: Sized64>(size: u64) -> Result<usize> {
    let least = size_of::<u64>();
    usize::try_from(size)
        .ok()
        .filter(|&size| (least..=1 << 16).contains(&size))
        .ok_or_else(|| Failure::invalid(format!("{}: size is {size}: set it to sizeof({})", T::NAME, T::NAME)))
}

/// Returns a struct whose fields are all zero.
pub(crate) fn zeroed<T: Sized64>() -> T {
    // SAFETY: the trait guarantees that zero is a valid value of each field.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// Reads a struct of any version; for NULL, returns a struct whose fields are all zero.
///
/// # Safety
/// `from` is null, or valid for reads of as many bytes as its first field says.
pub(crate) unsafe fn read<T: Sized64>(from: *const T) -> Result<T> {
    let mut all = zeroed::<T>();
    if from.is_null() {
        return Ok(all);
    }
    // SAFETY: the first field is present, as the caller guarantees. The caller's struct may have
    // any alignment, so the read is unaligned.
    let size = stated_size::<T>(unsafe { from.cast::<u64>().read_unaligned() })?;
    let known = size.min(size_of::<T>());
    // SAFETY: both structs have at least `known` bytes. They do not overlap, because `all` is a
    // local variable.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), (&raw mut all).cast::<u8>(), known) };
    // SAFETY: the caller's struct has `size` bytes, and `known` is at most that.
    let rest = unsafe { from.cast::<u8>().add(known) };
    // SAFETY: the caller's struct has `size - known` bytes after the first `known`.
    let rest = unsafe { std::slice::from_raw_parts(rest, size - known) };
    if rest.iter().any(|&byte| byte != 0) {
        let text = format!("{}: from a newer version, and sets fields that this version does not know", T::NAME);
        return Err(Failure::new(Errno::TOOBIG, text));
    }
    Ok(all)
}

/// Writes a struct of any version, up to the `size` that the caller has set in it. Keeps the
/// caller's `size`, and sets fields that this version does not know to 0. Does nothing for NULL.
///
/// # Safety
/// `to` is null, or valid for reads and writes of as many bytes as its first field says.
pub(crate) unsafe fn write<T: Sized64>(to: *mut T, all: &T) -> Result<()> {
    if to.is_null() {
        return Ok(());
    }
    // SAFETY: the first field is present, as the caller guarantees. The caller's struct may have
    // any alignment, so the read is unaligned.
    let size = stated_size::<T>(unsafe { to.cast::<u64>().read_unaligned() })?;
    let known = size.min(size_of::<T>());
    let first = size_of::<u64>();
    // SAFETY: the struct begins with a field of `first` bytes.
    let from = unsafe { (&raw const *all).cast::<u8>().add(first) };
    // SAFETY: the struct begins with a field of `first` bytes.
    let to = unsafe { to.cast::<u8>().add(first) };
    // SAFETY: both structs have at least `known` bytes. They do not overlap, because the caller's
    // struct may be written to and `all` is borrowed.
    unsafe { std::ptr::copy_nonoverlapping(from, to, known - first) };
    // SAFETY: the caller's struct has `size` bytes, and `known` is at most that.
    let rest = unsafe { to.add(known - first) };
    // SAFETY: the caller's struct has `size - known` bytes after the first `known`.
    unsafe { rest.write_bytes(0, size - known) };
    Ok(())
}

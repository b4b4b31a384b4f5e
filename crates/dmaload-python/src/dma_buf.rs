//! Hands descriptors of dma-bufs to importers.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::Mutex;

use pyo3::prelude::*;

use crate::errors::{Failure, Raised, guarded};
use crate::process::lock;
use crate::tensor::Tensor;

/// A descriptor of a dma-buf, and the range of a tensor's bytes in it.
///
/// The object owns the descriptor. The descriptor is closed by `close()`, at the end of a `with`
/// block, and when the object is destroyed. The dma-buf lives as long as a descriptor, an import
/// or a mapping of it exists.
#[pyclass(frozen, module = "dmaload")]
#[derive(Debug)]
pub(crate) struct DmaBuf {
    fd: Mutex<Option<OwnedFd>>,
    /// The offset of the bytes in the dma-buf.
    #[pyo3(get)]
    offset: usize,
    /// The number of bytes.
    #[pyo3(get)]
    length: usize,
}

fn closed() -> Failure {
    Failure::new("ClosedError", "the descriptor was closed or detached")
}

#[pymethods]
impl DmaBuf {
    /// Returns the descriptor, which this object still owns.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        guarded(py, || Ok(lock(&self.fd).as_ref().ok_or_else(closed)?.as_raw_fd()))
    }

    /// Returns the descriptor, which the caller then owns and must close.
    fn detach(&self, py: Python<'_>) -> PyResult<i32> {
        guarded(py, || Ok(lock(&self.fd).take().ok_or_else(closed)?.into_raw_fd()))
    }

    /// Closes the descriptor, unless it was already closed or detached.
    fn close(&self) {
        drop(lock(&self.fd).take());
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(&self, _type: Py<PyAny>, _value: Py<PyAny>, _traceback: Py<PyAny>) {
        self.close();
    }

    fn __repr__(&self) -> String {
        match &*lock(&self.fd) {
            Some(fd) => format!("<dmaload.DmaBuf {}: offset: {}, length: {}>", fd.as_raw_fd(), self.offset, self.length),
            None => "<dmaload.DmaBuf: closed>".to_owned(),
        }
    }
}

/// Returns the dma-bufs that contain a tensor's bytes, in order.
#[pyfunction]
pub(crate) fn dma_bufs(py: Python<'_>, tensor: &Bound<'_, Tensor>) -> PyResult<Vec<DmaBuf>> {
    guarded(py, || {
        let tensor = tensor.get();
        let none = || Failure::new("UnsupportedError", "safe_open and Image.file() provide no dma-bufs: use an image's tensors");
        let parts = tensor.loaded().ok_or_else(none)?.parts();
        let dma_bufs = parts.iter().map(|part| {
            let fd = Mutex::new(Some(part.segment.hand_out_owned_dma_buf()?));
            Ok::<_, Raised>(DmaBuf { fd, offset: part.memory_offset(), length: part.len })
        });
        dma_bufs.collect()
    })
}

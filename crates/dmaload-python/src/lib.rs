//! The native part of the Python package `dmaload`: the library for Python, as `dmaload._native`.
//!
//! ```text
//!   python/dmaload ──► loading (load, stream, attach, header) ──► image ──► tensor ──► memory
//!        │                 │ waits detached, a little at a time            │ buffer, dlpack
//!        └─► errors        └──► waiting: a parked thread, or an event loop's eventfd
//! ```
//!
//! - **No thread of Rust's attaches to the interpreter.** Threads of Python's wait here, detached
//!   and for a moment at a time, and loop in Python, where signals and exceptions are handled. An
//!   event loop is woken by a descriptor ([`waiting`]). So nothing here can run while the
//!   interpreter is gone, and none of the loader's threads ever waits for Python code.
//! - **No reference is made to memory that Python has.** It is handed out by the library
//!   (`dmaload::PrivateMemory`), as an address ([`memory`]).
//! - **A forked child never touches what its parent's threads have** ([`process`]).
//! - **No panic crosses into Python**: each becomes a `dmaload.PanickedError` ([`errors`]).
//!
//! What is here is private to the package; its interface, with its documentation, is Python.

mod command;
mod describe;
mod dlpack;
mod dma_buf;
mod errors;
mod header;
mod image;
mod layout;
mod loading;
mod memory;
mod options;
mod process;
mod tensor;
mod waiting;

/// What the package imports.
#[pyo3::pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use crate::command::run_command;
    #[pymodule_export]
    use crate::dma_buf::{DmaBuf, dma_bufs};
    #[pymodule_export]
    use crate::header::{read_header, read_small, start_read};
    #[pymodule_export]
    use crate::image::Image;
    #[pymodule_export]
    use crate::loading::{Loading, start_attach, start_load, start_stream};
    #[pymodule_export]
    use crate::process::{after_fork_in_child, before_exit};
    #[pymodule_export]
    use crate::tensor::Tensor;
    #[pymodule_export]
    use crate::waiting::Hub;

    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");
}

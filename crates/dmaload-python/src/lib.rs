//! The native module `dmaload._native` of the Python package `dmaload`.
//!
//! ```text
//!   python/dmaload ──► loading (load, stream, attach, header) ──► image ──► tensor ──► memory
//!        │                 │ waits detached, in short intervals            │ buffer, dlpack
//!        └─► errors        └──► waiting: a parked thread, or an event loop's eventfd
//! ```
//!
//! - **No Rust thread attaches to the interpreter.** A blocking call waits here, detached from the
//!   interpreter, for only a short time. Then it returns to a loop in Python, which handles
//!   signals and exceptions. An event loop is woken through a descriptor ([`waiting`]). So this
//!   code never runs without an interpreter, and none of the loader's threads waits for Python
//!   code.
//! - **Rust holds no reference to memory that Python can write to.** The library hands this memory
//!   out as an address (`dmaload::PrivateMemory`, [`memory`]).
//! - **A forked child never uses objects that need its parent's threads** ([`process`]).
//! - **A panic is an exception in Python**: functions that call the library turn it into a
//!   `dmaload.PanickedError` ([`errors`]). For the few others, such as `__len__`, PyO3 turns it
//!   into a `PanicException`.
//!
//! This module is private to the package, which exports `Image`, `Tensor` and `DmaBuf` under its
//! own name. The rest of the public interface is written in Python.

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

/// The names that the package imports.
#[pyo3::pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use crate::command::run_command;
    #[pymodule_export]
    use crate::dma_buf::{DmaBuf, dma_bufs};
    #[cfg(debug_assertions)]
    #[pymodule_export]
    use crate::errors::panic_on_purpose;
    #[pymodule_export]
    use crate::header::{raise_open_error, read_header, read_small, start_read};
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

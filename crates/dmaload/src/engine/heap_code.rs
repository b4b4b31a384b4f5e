//! Calls the loader's heap, which may be the caller's code.

use std::sync::{Arc, Weak};

use crate::error::{Error, Result};
use crate::memory::heap::Heap;
use crate::support::foreign::{self, Foreign};

/// A strong reference to the heap, which may be the caller's code. The caller's handles, the
/// workers and the thread that starts them hold one, as do copiers while they populate memory. The
/// ring thread and the teller never do.
#[derive(Debug, Clone)]
pub(crate) struct HeapCode(Arc<Foreign<Arc<dyn Heap>>>);

/// A weak reference to the heap, for values that the ring thread may drop.
#[derive(Debug, Clone)]
pub(super) struct WeakHeap(Weak<Foreign<Arc<dyn Heap>>>);

impl WeakHeap {
    /// Returns `None` after the engine has ended.
    pub(super) fn upgrade(&self) -> Option<HeapCode> {
        self.0.upgrade().map(HeapCode)
    }
}

impl HeapCode {
    pub(super) fn new(heap: Arc<dyn Heap>) -> Self {
        HeapCode(Arc::new(Foreign::new(heap)))
    }

    /// Returns the heap, for use on the caller's own thread.
    pub(super) fn heap(&self) -> &dyn Heap {
        &***self.0
    }

    pub(super) fn downgrade(&self) -> WeakHeap {
        WeakHeap(Arc::downgrade(&self.0))
    }

    /// Calls the heap. The calling thread must not hold a lock, because the heap may be the
    /// caller's code.
    ///
    /// # Errors
    /// [`Error::Panicked`] if the heap panicked.
    pub(crate) fn call<T>(&self, name: &str, call: impl FnOnce(&dyn Heap) -> T) -> Result<T> {
        let code = || format!("heap {name}");
        foreign::call(|| call(&***self.0)).map_err(|message| Error::Panicked { code: code(), message })
    }
}

//! The Python class `Image`, a loaded model.

use std::collections::HashSet;
use std::ffi::OsString;
use std::sync::Mutex;

use dmaload::{Error, ImageFile, Report};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyList, PyString};

use crate::describe;
use crate::errors::{Failure, Raised, guarded};
use crate::process::{Owned, lock};
use crate::tensor::{Part, Tensor};

/// A loaded model: a read-only mapping from names to tensors.
///
/// The image keeps all of its memory alive. After the image is gone, each tensor, and each array
/// made from a tensor, keeps the segments that hold its bytes.
#[pyclass(frozen, mapping, module = "dmaload")]
#[derive(Debug)]
pub(crate) struct Image {
    /// `None` once the image has been closed.
    image: Mutex<Option<Owned<dmaload::Image>>>,
    /// The names of the tensors, in file order or in the requested order.
    names: Vec<String>,
    /// The tensors that were looked up. Looking up a name again returns the same object, so all
    /// arrays made from a tensor share its memory.
    tensors: Py<PyDict>,
}

impl Image {
    pub(crate) fn new(py: Python<'_>, image: dmaload::Image) -> Self {
        let mut seen = HashSet::new();
        // If the caller passed several files, they may contain tensors with the same name.
        let names = image.tensors().map(|tensor| tensor.name().to_owned()).filter(|name| seen.insert(name.clone()));
        let names = names.collect();
        Image { image: Mutex::new(Some(Owned::new(image))), names, tensors: PyDict::new(py).unbind() }
    }

    fn find(&self, py: Python<'_>, name: &str) -> Result<Py<PyAny>, Raised> {
        let tensors = self.tensors.bind(py);
        if let Some(known) = tensors.get_item(name)? {
            return Ok(known.unbind());
        }
        let tensor = Py::new(py, Tensor::new(self.image()?.tensor(name)?))?;
        // If two threads look up a name at the same time, both get the first thread's tensor.
        let known = tensors.call_method1("setdefault", (name, tensor))?;
        Ok(known.unbind())
    }

    fn image(&self) -> Result<dmaload::Image, Failure> {
        let image = lock(&self.image);
        image.as_deref().cloned().ok_or_else(|| Failure::new("ClosedError", "the image was closed"))
    }

    fn has(&self, name: &str) -> bool {
        self.image().is_ok_and(|image| matches!(image.tensor(name), Ok(_) | Err(Error::AmbiguousTensor { .. })))
    }
}

#[pymethods]
impl Image {
    fn __getitem__(&self, py: Python<'_>, name: &str) -> PyResult<Py<PyAny>> {
        guarded(py, || self.find(py, name))
    }

    /// Returns the tensor with this name, or `default` if there is none.
    #[pyo3(signature = (name, default=None))]
    fn get(&self, py: Python<'_>, name: &str, default: Option<Py<PyAny>>) -> PyResult<Option<Py<PyAny>>> {
        guarded(py, || match self.find(py, name) {
            Ok(tensor) => Ok(Some(tensor)),
            Err(_) if self.image().is_ok() && !self.has(name) => Ok(default),
            Err(raised) => Err(raised),
        })
    }

    fn __contains__(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        guarded(py, || {
            let Ok(name) = name.cast::<PyString>() else { return Ok(false) };
            Ok(self.has(name.to_str()?))
        })
    }

    fn __len__(&self) -> usize {
        self.names.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        self.keys(py)?.try_iter()
    }

    /// Returns the names, in file order or in the requested order.
    fn keys<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, &self.names)
    }

    /// Returns the tensors, in the order of `keys()`.
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        guarded(py, || {
            let values = self.names.iter().map(|name| self.find(py, name)).collect::<Result<Vec<_>, _>>()?;
            Ok(PyList::new(py, values)?)
        })
    }

    /// Returns pairs of names and tensors, in the order of `keys()`.
    fn items<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        guarded(py, || {
            let items = self.names.iter().map(|name| Ok::<_, Raised>((name, self.find(py, name)?)));
            Ok(PyList::new(py, items.collect::<Result<Vec<_>, _>>()?)?)
        })
    }

    /// Returns the metadata of the files: strings in safetensors, values of any type in GGUF. If
    /// several files have the same key, the value from the first of them is returned.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guarded(py, || {
            let all = PyDict::new(py);
            let image = self.image()?;
            for map in image.files().iter().rev().filter_map(ImageFile::tensor_map) {
                all.update(describe::metadata(py, map)?.bind(py).as_mapping())?;
            }
            Ok(all)
        })
    }

    /// Returns the paths of the files, in order.
    fn files(&self, py: Python<'_>) -> PyResult<Vec<OsString>> {
        guarded(py, || Ok(self.image()?.files().iter().map(|file| file.path().as_os_str().to_owned()).collect()))
    }

    /// Returns all bytes of a file, as a `U8` tensor named after the file's path. This gives
    /// access to raw files, which have no tensors.
    #[pyo3(signature = (index=0))]
    fn file(&self, py: Python<'_>, index: usize) -> PyResult<Tensor> {
        guarded(py, || {
            let image = self.image()?;
            let files = image.files();
            let missing = || format!("no file has the index {index}: number of files in the image: {}", files.len());
            let file = files.get(index).ok_or_else(|| Failure::new("InvalidInputError", missing()))?.clone();
            let bytes = usize::try_from(file.len()).map_err(|error| Failure::config(error.to_string()))?;
            Ok(Tensor::of_part(Part {
                name: file.path().to_string_lossy().into_owned(),
                dtype: dmaload::model::DType::U8,
                shape: vec![bytes],
                range: file.file_range(),
                file,
            }))
        })
    }

    /// Returns the load's report as a dictionary, with the same keys as the command's JSON output.
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guarded(py, || Ok(report(py, self.image()?.report())?))
    }

    /// Releases the memory. Existing tensors, and arrays made from them, keep the memory that they
    /// use.
    fn close(&self, py: Python<'_>) {
        self.tensors.bind(py).clear();
        let image = lock(&self.image).take();
        drop(image);
    }

    fn __exit__(&self, py: Python<'_>, _type: Py<PyAny>, _value: Py<PyAny>, _traceback: Py<PyAny>) {
        self.close(py);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __repr__(&self) -> String {
        match self.image() {
            Ok(image) => {
                let report = image.report();
                format!("<dmaload.Image: tensors: {}, bytes: {}, route: {}>", self.names.len(), report.bytes, report.route)
            }
            Err(_) => "<dmaload.Image: closed>".to_owned(),
        }
    }
}

fn report<'py>(py: Python<'py>, report: &Report) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("bytes", report.bytes)?;
    dict.set_item("wanted_bytes", report.wanted_bytes)?;
    dict.set_item("copied_bytes", report.copied_bytes)?;
    dict.set_item("cached_bytes", report.cached_bytes)?;
    dict.set_item("reused_bytes", report.reused_bytes)?;
    dict.set_item("seconds", report.total.as_secs_f64())?;
    dict.set_item("throughput_bytes_per_second", report.throughput_bytes_per_second())?;
    dict.set_item("allocate_seconds", report.allocating.as_secs_f64())?;
    dict.set_item("read_seconds", report.reading.as_secs_f64())?;
    dict.set_item("copy_seconds", report.copying.as_secs_f64())?;
    dict.set_item("cache_seconds", report.from_cache.as_secs_f64())?;
    dict.set_item("storage_bytes_per_second", report.storage_bytes_per_second())?;
    dict.set_item("cache_bytes_per_second", report.cache_bytes_per_second())?;
    dict.set_item("overlap", report.overlap())?;
    dict.set_item("first_segment_seconds", report.first_segment.map(|first| first.as_secs_f64()))?;
    dict.set_item("page_size_bytes", report.page_size_bytes())?;
    dict.set_item("huge_page_bytes", report.pages.huge_bytes)?;
    dict.set_item("pages_refused", report.pages_refused.map(|errno| errno.describe()))?;
    dict.set_item("heap", &report.heap)?;
    dict.set_item("notes", &report.notes)?;
    dict.set_item("layout", report.layout.name())?;
    dict.set_item("segments", report.segments)?;
    dict.set_item("memories", report.memories)?;
    dict.set_item("route", report.route.name())?;
    dict.set_item("verified", report.verified.as_deref())?;
    let fallbacks = PyList::empty(py);
    for fallback in &report.fallbacks {
        let step = PyDict::new(py);
        step.set_item("from", fallback.from.name())?;
        step.set_item("to", fallback.to.name())?;
        step.set_item("reason", fallback.reason())?;
        step.set_item("errno", fallback.errno.raw_os_error())?;
        step.set_item("file", fallback.file_index)?;
        fallbacks.append(step)?;
    }
    dict.set_item("fallbacks", fallbacks)?;
    let measured = report.measured.map(|measured| {
        let rates = PyDict::new(py);
        rates.set_item("direct_bytes_per_second", measured.direct_bytes_per_second)?;
        rates.set_item("staged_bytes_per_second", measured.staged_bytes_per_second)?;
        rates.set_item("buffered_bytes_per_second", measured.buffered_bytes_per_second)?;
        rates.set_item("chosen", measured.chosen.to_string())?;
        Ok::<_, PyErr>(rates)
    });
    dict.set_item("measured", measured.transpose()?)?;
    let files = PyList::empty(py);
    for file in &report.files {
        let entry = PyDict::new(py);
        entry.set_item("path", file.path.as_os_str())?;
        entry.set_item("bytes", file.bytes)?;
        entry.set_item("route", file.route.name())?;
        files.append(entry)?;
    }
    dict.set_item("files", files)?;
    Ok(dict)
}

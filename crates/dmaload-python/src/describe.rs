//! Converts headers to dictionaries.

use dmaload::Inspected;
use dmaload::model::TensorMap;
use dmaload::model::gguf::Value;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// Returns a list with a dictionary for each file.
pub(crate) fn headers(py: Python<'_>, headers: Vec<Inspected>) -> PyResult<Py<PyAny>> {
    let files = PyList::empty(py);
    for Inspected { path, file_bytes, tensors, .. } in headers {
        let file = PyDict::new(py);
        file.set_item("path", path.into_os_string())?;
        file.set_item("file_bytes", file_bytes)?;
        file.set_item("format", tensors.as_ref().map(TensorMap::format))?;
        // For a file without metadata, `safe_open` returns None rather than an empty dictionary.
        let described = tensors.as_ref().filter(|map| map.gguf().is_some() || map.metadata().is_present());
        file.set_item("metadata", described.map(|map| metadata(py, map)).transpose()?)?;
        let infos = tensors.iter().flat_map(TensorMap::iter);
        let infos = infos.map(|info| {
            let (start, end) = (info.file_range.start, info.file_range.end);
            (&info.name, info.dtype.name(), &info.shape, start, end, info.dtype.block_elements(), info.dtype.block_bytes())
        });
        file.set_item("tensors", PyList::new(py, infos.collect::<Vec<_>>())?)?;
        files.append(file)?;
    }
    Ok(files.into_any().unbind())
}

/// Returns the metadata of a file: strings in safetensors, values of all types in GGUF.
pub(crate) fn metadata(py: Python<'_>, map: &TensorMap) -> PyResult<Py<PyDict>> {
    let pairs = PyDict::new(py);
    match map.gguf() {
        Some(gguf) => gguf.iter().try_for_each(|(key, value)| pairs.set_item(key, value_to_python(py, value)?))?,
        None => map.metadata().iter().try_for_each(|(key, value)| pairs.set_item(key, value))?,
    }
    Ok(pairs.unbind())
}

fn value_to_python<'py>(py: Python<'py>, value: Value<'_>) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::U8(number) => number.into_pyobject(py)?.into_any(),
        Value::I8(number) => number.into_pyobject(py)?.into_any(),
        Value::U16(number) => number.into_pyobject(py)?.into_any(),
        Value::I16(number) => number.into_pyobject(py)?.into_any(),
        Value::U32(number) => number.into_pyobject(py)?.into_any(),
        Value::I32(number) => number.into_pyobject(py)?.into_any(),
        Value::U64(number) => number.into_pyobject(py)?.into_any(),
        Value::I64(number) => number.into_pyobject(py)?.into_any(),
        Value::F32(number) => number.into_pyobject(py)?.into_any(),
        Value::F64(number) => number.into_pyobject(py)?.into_any(),
        Value::Bool(truth) => truth.into_pyobject(py)?.to_owned().into_any(),
        Value::String(text) => text.as_ref().into_pyobject(py)?.into_any(),
        Value::Array(array) => {
            let values = PyList::empty(py);
            array.iter().try_for_each(|value| values.append(value_to_python(py, value)?))?;
            values.into_any()
        }
        other => format!("{other}").into_pyobject(py)?.into_any(),
    })
}

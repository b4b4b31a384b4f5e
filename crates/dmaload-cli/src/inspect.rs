//! `dmaload inspect`: shows the headers of a file or of all files in a model.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use dmabuf::printable;
use dmaload::model::{TensorInfo, TensorMap, gguf};
use dmaload::{Format, Inspected};
use dmaload_text::{Align, Pairs, Table, bytes, grouped};
use serde_json::{Map, Value, json};

use crate::output::{self, terminal_width};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The file to inspect; for a folder or an index, all files of its model are inspected.
    pub(crate) path: PathBuf,
    /// How to interpret the file's bytes: auto, safetensors, gguf, raw.
    #[arg(long, default_value = "auto")]
    pub(crate) format: Format,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let files = dmaload::inspect_model_blocking(&arguments.path, arguments.format)?;
    if arguments.json {
        let mut objects = files.iter().map(file_to_json);
        let object = match objects.len() {
            1 => objects.next().unwrap_or_default(),
            _ => json!({ "path": arguments.path.to_string_lossy(), "files": objects.collect::<Vec<_>>() }),
        };
        return Ok(output::write_json(&object)?);
    }
    let mut stdout = output::stdout();
    for (number, inspected) in files.iter().enumerate() {
        let (path, file_bytes) = (printable::path(&inspected.path), bytes(inspected.file_bytes));
        if files.len() > 1 {
            writeln!(stdout, "{}{path}, {file_bytes}", if number == 0 { "" } else { "\n" })?;
        }
        match &inspected.tensors {
            Some(tensors) => {
                match tensors.gguf() {
                    Some(gguf) => writeln!(stdout, "{}", metadata(gguf))?,
                    None if tensors.metadata().is_empty() => {}
                    None => writeln!(stdout, "{}", safetensors_metadata(tensors))?,
                }
                write!(stdout, "{}", table(tensors))?;
            }
            None => writeln!(stdout, "{path}: raw bytes, {file_bytes}")?,
        }
    }
    Ok(stdout.flush()?)
}

fn file_to_json(inspected: &Inspected) -> Value {
    let (format, tensors) = match &inspected.tensors {
        Some(tensors) => (tensors.format(), to_json(tensors)),
        None => ("raw", json!({ "tensors": [] })),
    };
    let mut object = json!({ "path": inspected.path.to_string_lossy(), "bytes": inspected.file_bytes, "format": format });
    if let (Some(object), Value::Object(tensors)) = (object.as_object_mut(), tensors) {
        object.extend(tensors);
    }
    object
}

/// Formats the metadata of a GGUF file, one key per line.
fn metadata(gguf: &gguf::GgufMetadata) -> Pairs {
    let pairs = Pairs::new().with("GGUF version", gguf.version());
    gguf.iter().fold(pairs, |pairs, (key, value)| pairs.with(key, value))
}

/// Formats the metadata of a safetensors file (`__metadata__`), one key per line.
fn safetensors_metadata(tensors: &TensorMap) -> Pairs {
    tensors.metadata().iter().fold(Pairs::new(), |pairs, (key, value)| pairs.with(key, value))
}

fn gguf_to_json(value: &gguf::Value<'_>) -> Value {
    use gguf::Value::{Array, Bool, F32, F64, I8, I16, I32, I64, String, U8, U16, U32, U64};
    match value {
        U8(value) => json!(value),
        I8(value) => json!(value),
        U16(value) => json!(value),
        I16(value) => json!(value),
        U32(value) => json!(value),
        I32(value) => json!(value),
        F32(value) => json!(value),
        Bool(value) => json!(value),
        String(value) => json!(value),
        Array(array) => array.iter().map(|value| gguf_to_json(&value)).collect(),
        U64(value) => json!(value),
        I64(value) => json!(value),
        F64(value) => json!(value),
        other => json!(other.to_string()),
    }
}

fn table(tensors: &TensorMap) -> Table {
    let columns = [
        ("name", Align::Left),
        ("dtype", Align::Left),
        ("shape", Align::Left),
        ("bytes", Align::Right),
        ("offset", Align::Right),
    ];
    let mut table = Table::new(columns).fit(terminal_width());
    let mut sum = 0;
    for tensor in tensors {
        let len = tensor.file_range.end - tensor.file_range.start;
        sum += len;
        let shape = format!("{:?}", tensor.shape);
        table.row([tensor.name.clone(), tensor.dtype.to_string(), shape, grouped(len), grouped(tensor.file_range.start)]);
    }
    table.total([format!("{} tensors", grouped(tensors.len() as u64)), String::new(), String::new(), grouped(sum)]);
    table
}

fn to_json(tensors: &TensorMap) -> Value {
    json!({
        "header_bytes": tensors.header_bytes(),
        "metadata": match tensors.gguf() {
            Some(gguf) => gguf.iter().map(|(key, value)| (key.to_owned(), gguf_to_json(&value))).collect::<Map<_, _>>(),
            None => tensors.metadata().iter().map(|(key, value)| (key.to_owned(), json!(value))).collect(),
        },
        "tensors": tensors.iter().map(tensor_to_json).collect::<Vec<_>>(),
    })
}

fn tensor_to_json(tensor: &TensorInfo) -> Value {
    json!({
        "name": tensor.name,
        "dtype": tensor.dtype.to_string(),
        "shape": tensor.shape,
        "bytes": tensor.file_range.end - tensor.file_range.start,
        "offset": tensor.file_range.start,
    })
}

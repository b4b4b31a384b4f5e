//! `dmaload inspect`: what a file says about itself.

use std::io::Write;

use anyhow::Result;
use dmaload::model::{TensorInfo, TensorMap};
use serde_json::{Value, json};

use crate::args;
use crate::summary::{Align, Table, bytes, grouped, terminal_width};

pub(crate) fn run(arguments: &args::Inspect) -> Result<()> {
    let inspected = dmaload::inspect(&arguments.path, arguments.format)?;
    let mut stdout = std::io::stdout().lock();
    if arguments.json {
        let (format, tensors) = match &inspected.tensors {
            Some(tensors) => ("safetensors", to_json(tensors)),
            None => ("raw", json!({ "tensors": [] })),
        };
        let mut object = json!({ "path": arguments.path.to_string_lossy(), "bytes": inspected.bytes, "format": format });
        if let (Some(object), Value::Object(tensors)) = (object.as_object_mut(), tensors) {
            object.extend(tensors);
        }
        writeln!(stdout, "{object:#}")?;
    } else {
        match &inspected.tensors {
            Some(tensors) => write!(stdout, "{}", table(tensors))?,
            None => writeln!(stdout, "{}: raw bytes, {}", arguments.path.display(), bytes(inspected.bytes))?,
        }
    }
    Ok(stdout.flush()?)
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
        "metadata": tensors.metadata().iter().map(|(key, value)| (key.to_owned(), json!(value))).collect::<serde_json::Map<_, _>>(),
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

//! Shares loaded memory between two processes. The parent loads a model and serves it, and its
//! child attaches and maps the same pages. Both print a checksum of the bytes.
//!
//! `cargo run -p dmaload-examples --example share -- MODEL`

use std::process::Command;

use dmaload::Loader;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach};

/// Computes a checksum that depends on every byte and its position.
fn checksum(image: &dmaload::Image) -> anyhow::Result<u64> {
    let mut sum = 0u64;
    for segment in image.segments() {
        sum = segment.bytes()?.iter().fold(sum, |sum, &byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    }
    Ok(sum)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next().unwrap_or("model.safetensors".to_owned());
    if first == "attach" {
        let attached = attach(arguments.next().unwrap_or_default(), AttachOptions::default()).await?;
        println!("process {}, attached to process {}: {:016x}", std::process::id(), attached.process, checksum(&attached.image)?);
        return Ok(());
    }
    let image = Loader::new()?.load(&first).await?;
    let socket = std::env::temp_dir().join(format!("dmaload-share-{}", std::process::id()));
    let server = Server::bind(&socket, ServerOptions::default())?;
    server.publish("model", image.clone())?;
    println!("process {}: {:016x}", std::process::id(), checksum(&image)?);
    let child = Command::new(std::env::current_exe()?).arg("attach").arg(&socket).status()?;
    anyhow::ensure!(child.success(), "the child process failed");
    Ok(())
}

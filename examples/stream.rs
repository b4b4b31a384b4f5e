//! Processes each segment while the rest of the file is still being read, and then drops it. A
//! program that uploads a model to a device would do the same.

use dmaload::{LoadOptions, Loader};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).unwrap_or("model.safetensors".to_owned());
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(16 << 20)).build()?;
    let mut segments = loader.load(path).segments();
    while let Some(segment) = segments.next().await {
        let segment = segment?;
        let sum = segment.bytes()?.iter().fold(0u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
        println!("bytes {:?}: {sum:016x}", segment.file_range());
    }
    if let Some(report) = segments.report() {
        println!("{} bytes in {:?}, {:.0} % overlapped", report.bytes, report.total, report.overlap() * 100.0);
    }
    loader.shutdown().await?;
    Ok(())
}

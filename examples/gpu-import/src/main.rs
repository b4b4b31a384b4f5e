//! Imports a model's segments into Vulkan as buffers, without a copy
//! (`VK_EXT_external_memory_dma_buf`). The GPU copies each buffer, and sums its words with a
//! compute shader; the copy and the sum are compared with the file.
//!
//! `just gpu-import MODEL [HEAP]`, where the heap is `udmabuf` or `dma-heap:NAME`. The program
//! prints the reason and exits with 0 if it cannot run on this machine: if no heap is given and
//! none can make dma-bufs, if Vulkan is not installed, or if no Vulkan driver imports dma-bufs.
#![allow(unsafe_code, reason = "Vulkan")]

mod gpu;

use anyhow::{Context, Result, ensure};
use ash::Entry;
use dmaload::heap::{HeapChoice, Pages};
use dmaload::{Error, Loader};
use gpu::Gpu;

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("no model was given: run `just gpu-import MODEL`")?;
    let heap = std::env::args().nth(2).unwrap_or("dma-buf".to_owned());
    let heap: HeapChoice = heap.parse().map_err(anyhow::Error::msg)?;
    let loader = match heap.open(Pages::Auto).and_then(|(heap, _)| Loader::builder().heap(heap).dma_buf(true).build()) {
        Ok(loader) => loader,
        Err(error @ Error::NoDmaBuf { .. }) => {
            println!("skipped: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    // SAFETY: the system's Vulkan loader is trusted.
    let entry = match unsafe { Entry::load() } {
        Ok(entry) => entry,
        Err(error) => {
            println!("skipped: cannot load the Vulkan library: {error}");
            return Ok(());
        }
    };
    // SAFETY: `entry` outlives `gpu`, because locals are dropped in reverse order.
    let gpu = match unsafe { Gpu::open(&entry)? } {
        Ok(gpu) => gpu,
        Err(reason) => {
            println!("skipped: {reason}");
            return Ok(());
        }
    };
    let image = loader.load(&path).await?;
    let file = std::fs::read(&path)?;
    for segment in image.segments() {
        let range = segment.file_range();
        let expected = &file[usize::try_from(range.start)?..usize::try_from(range.end)?];
        let bytes = segment.memory_offset() + segment.memory_bytes();
        let buffer = gpu.import(segment.hand_out_owned_dma_buf()?, bytes as u64)?;
        let copy = gpu.copy(&buffer)?;
        let seen = &copy[segment.memory_offset()..][..segment.len()];
        ensure!(seen == expected, "the GPU's copy differs from the file in {range:?}");
        // Both sums cover the whole dma-buf, including bytes before and after the segment.
        ensure!(gpu.sum(&buffer)? == gpu::sum(&copy), "the GPU's sum differs from that of its copy in {range:?}");
        if segment.memory_offset() == 0 {
            ensure!(gpu.sum(&buffer)? == gpu::sum(expected), "the GPU's sum differs from that of the file in {range:?}");
        }
        gpu.release(buffer);
    }
    let (report, segments) = (image.report(), image.segments().len());
    println!("{}: {segments} segments imported, {} bytes equal to the file's, {}", gpu.name, report.bytes, report.heap);
    Ok(())
}

//! Tests for private memory, which the caller may write to. Writes do not reach memory that others
//! use, and writable memory cannot be viewed as bytes.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(unsafe_code, reason = "tests write to private memory")]

mod common;

use std::path::{Path, PathBuf};

use common::{assert_same, file, folder};
use dmaload::heap::{AnonHeap, Heap, MemfdHeap, UdmabufHeap};
use dmaload::share::{AttachOptions, Server, ServerOptions, attach};
use dmaload::{Error, Image, LoadOptions, Loader, PrivateMemory, Shard};

const SEGMENT: u64 = 2 << 20;
const TENSORS: usize = 5;
/// At this size, some tensors cross a segment boundary, and none starts at a page boundary.
const TENSOR_BYTES: usize = 1_500_000;

fn model(folder: &Path) -> (PathBuf, Vec<u8>) {
    let bytes = dmaload_testing::safetensors_of(TENSORS, TENSOR_BYTES, 7);
    (file(folder, "model.safetensors", &bytes), bytes)
}

async fn load(path: &Path, heap: impl Heap) -> Image {
    let options = LoadOptions::new().segment_bytes(SEGMENT);
    let loader = Loader::builder().heap(heap).load_options(options).build().unwrap();
    loader.load(path).await.unwrap()
}

fn read(memory: &PrivateMemory) -> Vec<u8> {
    // SAFETY: the memory is `len` bytes long. Only the test writes to it, on this thread, so it
    // does not change during this call.
    unsafe { std::slice::from_raw_parts(memory.address().as_ptr(), memory.len()) }.to_vec()
}

fn overwrite(memory: &PrivateMemory, byte: u8) {
    // SAFETY: the memory is `len` bytes long, and no reference to it is alive.
    unsafe { memory.address().as_ptr().write_bytes(byte, memory.len()) };
}

#[tokio::test]
async fn private_memory_of_an_anonymous_tensor_is_not_a_copy() {
    let folder = folder();
    let (path, bytes) = model(folder.path());
    let image = load(&path, AnonHeap::default()).await;
    let mut kept = Vec::new();
    for tensor in image.tensors() {
        let range = tensor.file_range();
        let expected = &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        let memory = tensor.private_memory().unwrap();
        assert_same(&read(&memory), expected, tensor.name());
        let address = tensor.parts().first().map(|part| part.segment.cpu_access().unwrap().address().addr().get() + part.offset);
        assert_eq!(Some(memory.address().addr().get()), address, "private memory must be the segment's memory, not a copy");
        let refused = tensor.bytes().unwrap_err();
        assert!(matches!(refused, Error::HandedOut { .. }), "{refused}");
        overwrite(&memory, 0xAB);
        let second = tensor.private_memory().unwrap();
        assert_eq!(second.address(), memory.address(), "both calls must return the same memory");
        kept.push(memory);
    }
    assert_eq!(kept.len(), TENSORS);
    // The memory outlives the image and the loader.
    drop(image);
    for memory in kept {
        assert!(read(&memory).iter().all(|&byte| byte == 0xAB));
    }
}

#[tokio::test]
async fn views_and_private_memory_exclude_each_other() {
    let folder = folder();
    let (path, _) = model(folder.path());
    let image = load(&path, AnonHeap::default()).await;
    let tensor = image.tensors().next().unwrap();
    let view = tensor.bytes().unwrap();
    let refused = tensor.private_memory().unwrap_err();
    assert!(matches!(refused, Error::Viewed { .. }), "{refused}");
    drop(view);
    tensor.private_memory().unwrap();
}

#[tokio::test]
async fn private_memory_of_a_memfd_is_copied_on_write() {
    let folder = folder();
    let (path, bytes) = model(folder.path());
    let image = load(&path, MemfdHeap::default()).await;
    for tensor in image.tensors() {
        let range = tensor.file_range();
        let expected = &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        let view = tensor.bytes().unwrap();
        let (ours, theirs) = (tensor.private_memory().unwrap(), tensor.private_memory().unwrap());
        assert_same(&read(&ours), expected, tensor.name());
        overwrite(&ours, 0xCD);
        assert_same(&read(&theirs), expected, "the other private memory");
        assert_same(&view, expected, "a view");
        assert!(read(&ours).iter().all(|&byte| byte == 0xCD));
    }
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "the file");
    let whole = image.files()[0].private_memory(0..bytes.len() as u64).unwrap();
    assert_same(&read(&whole), &bytes, "the whole file");
}

#[tokio::test]
async fn writes_to_attached_memory_stay_private() {
    let folder = folder();
    let (path, bytes) = model(folder.path());
    let image = load(&path, MemfdHeap::default()).await;
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    let attached = attach(&socket, AttachOptions::default()).await.unwrap();
    let tensor = attached.image.tensors().nth(1).unwrap();
    let memory = tensor.private_memory().unwrap();
    overwrite(&memory, 0xEF);
    for side in [&image, &attached.image] {
        assert_same(&side.files()[0].bytes().unwrap(), &bytes, "the file");
    }
    // Private memory outlives the server and the image.
    drop((server, image, attached, tensor));
    assert!(read(&memory).iter().all(|&byte| byte == 0xEF));
}

#[tokio::test]
async fn memory_that_cannot_be_private_is_refused() {
    let folder = folder();
    let (path, _) = model(folder.path());
    let image = load(&path, AnonHeap::default()).await;
    let end = image.files()[0].len();
    let refused = image.files()[0].private_memory(end - 1..end + 1).unwrap_err();
    assert!(matches!(refused, Error::NotLoaded { .. }), "{refused}");
    assert!(image.files()[0].private_memory(5..5).unwrap().is_empty());
    let two = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![2, 4], &[1; 8]).unwrap();
    let path = file(folder.path(), "two.safetensors", &safetensors::serialize([("t", two)], None).unwrap());
    let options = LoadOptions::new().shard(Shard { rank: 0, world_size: 2, dim: Some(1) });
    let image = Loader::new().unwrap().load(&path).options(options).await.unwrap();
    let refused = image.tensor("t").unwrap().private_memory().unwrap_err();
    assert!(matches!(refused, Error::NotContiguous { .. }), "{refused}");
    if let Ok(heap) = UdmabufHeap::open(dmaload::heap::Pages::Auto) {
        let image = load(&path, heap).await;
        let refused = image.tensor("t").unwrap().private_memory().unwrap_err();
        assert!(matches!(refused, Error::NoDescriptor { .. }), "{refused}");
        image.tensor("t").unwrap().bytes().unwrap();
    }
}

/// A seal does not revoke the pool's own writable mapping, so a load into reused memory would
/// change those pages of a private mapping that have not been copied yet.
#[tokio::test]
async fn pool_does_not_reuse_memory_that_is_mapped_privately() {
    let folder = folder();
    let (path, bytes) = model(folder.path());
    let other = file(folder.path(), "other.safetensors", &dmaload_testing::safetensors_of(TENSORS, TENSOR_BYTES, 8));
    let options = LoadOptions::new().segment_bytes(SEGMENT);
    let loader = Loader::builder().heap(MemfdHeap::default()).load_options(options).pool_bytes(64 << 20).build().unwrap();
    let image = loader.load(&path).await.unwrap();
    let tensor = image.tensor("t1").unwrap();
    let range = tensor.file_range();
    let memory = tensor.private_memory().unwrap();
    drop((image, tensor));
    for _ in 0..3 {
        drop(loader.load(&other).await.unwrap());
    }
    let expected = &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
    assert_same(&read(&memory), expected, "after loads with a pool");
    drop(memory);
    loader.shutdown().await.unwrap();
}

/// A consumer that keeps one small tensor must not keep the whole model in memory.
#[tokio::test]
async fn tensor_without_other_segments_keeps_only_its_own() {
    let folder = folder();
    let (path, bytes) = model(folder.path());
    let image = load(&path, AnonHeap::default()).await;
    for tensor in image.tensors() {
        let all = tensor.file().segments().len();
        let alone = tensor.clone().without_other_segments();
        let own: Vec<_> = alone.parts().iter().map(|part| part.segment.file_range()).collect();
        let kept: Vec<_> = alone.file().segments().iter().map(dmaload::Segment::file_range).collect();
        assert_eq!(kept, own, "{}", tensor.name());
        assert!(kept.len() < all);
        let range = tensor.file_range();
        let expected = &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        assert_same(&alone.bytes().unwrap(), expected, tensor.name());
        assert_eq!((alone.name(), alone.shape(), alone.dtype()), (tensor.name(), tensor.shape(), tensor.dtype()));
    }
}

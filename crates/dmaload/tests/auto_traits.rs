//! Asserts at compile time that every public type is `Send` and `Sync`, and that every public
//! stream is `Unpin`. `.ci/public-types` finds public types that are missing from this file. One
//! test reads loaded bytes on several threads at once.

use std::path::PathBuf;

use dmaload::heap::{HeapHooks, MemfdHeap};
use dmaload::{Format, Load, LoadRequest, Loader, Segment, Segments, Tensor, Tensors, share};
use futures_core::Stream;

const fn shared<T: Send + Sync + 'static>() {}

/// Callers can poll streams through `Pin::new(&mut stream)`, which requires `Unpin`.
const fn polled<T: Stream + Unpin>() {}

#[derive(Debug)]
struct NoHooks;

impl HeapHooks for NoHooks {}

const _: () = {
    shared::<dmaload::Attempt>();
    shared::<dmaload::Cache>();
    shared::<dmaload::Errno>();
    shared::<dmaload::Error>();
    shared::<dmaload::ErrorKind>();
    shared::<dmaload::Fallback>();
    shared::<dmaload::FileReport>();
    shared::<dmaload::Format>();
    shared::<dmaload::Image>();
    shared::<dmaload::ImageFile>();
    shared::<dmaload::ImporterLimits>();
    shared::<dmaload::Inspected>();
    shared::<dmaload::Latency>();
    shared::<dmaload::Layout>();
    shared::<dmaload::Leaked>();
    shared::<dmaload::Load>();
    shared::<dmaload::LoadOptions>();
    shared::<dmaload::LoadRequest>();
    shared::<dmaload::Loader>();
    shared::<dmaload::LoaderBuilder>();
    shared::<dmaload::Measured>();
    shared::<dmaload::Metrics>();
    shared::<dmaload::Prefer>();
    shared::<dmaload::Priority>();
    shared::<dmaload::PrivateMemory>();
    shared::<dmaload::Progress>();
    shared::<dmaload::Rejection>();
    shared::<dmaload::Report>();
    shared::<dmaload::Route>();
    shared::<dmaload::Segment>();
    shared::<dmaload::SegmentAccess<'static>>();
    shared::<dmaload::Segments>();
    shared::<dmaload::Shard>();
    shared::<dmaload::Source>();
    shared::<dmaload::Tensor>();
    shared::<dmaload::TensorPart>();
    shared::<dmaload::Tensors>();
    shared::<dmaload::TraceEvent>();
    shared::<dmaload::TraceKind>();
    shared::<dmaload::Way>();

    shared::<dmaload::heap::AnonHeap>();
    shared::<dmaload::heap::DmaHeap>();
    shared::<dmaload::heap::FromDescriptors>();
    shared::<dmaload::heap::HeapChoice>();
    shared::<dmaload::heap::Hooked<MemfdHeap, NoHooks>>();
    shared::<dmaload::heap::MemfdHeap>();
    shared::<dmaload::heap::SizeLimit>();
    shared::<dmaload::heap::UdmabufHeap>();
    // Re-exported from the `dmabuf` crate.
    shared::<dmaload::heap::Access>();
    shared::<dmaload::heap::AddressRange>();
    shared::<dmaload::heap::CpuAccess<'static>>();
    shared::<dmaload::heap::DeviceError>();
    shared::<dmaload::heap::DmaBuf>();
    shared::<dmaload::heap::HeapError>();
    shared::<dmaload::heap::Mapping>();
    shared::<dmaload::heap::Memfd>();
    shared::<dmaload::heap::Memory>();
    shared::<dmaload::heap::NotMoved>();
    shared::<dmaload::heap::PageCount>();
    shared::<dmaload::heap::Pages>();
    shared::<dmaload::heap::Populated>();

    shared::<dmaload::model::DType>();
    shared::<dmaload::model::ForeignFile>();
    shared::<dmaload::model::ModelError>();
    shared::<dmaload::model::ParseDTypeError>();
    shared::<dmaload::model::SafetensorsMetadata>();
    shared::<dmaload::model::TensorInfo>();
    shared::<dmaload::model::TensorMap>();
    shared::<dmaload::model::gguf::Array<'static>>();
    shared::<dmaload::model::gguf::GgufMetadata>();
    shared::<dmaload::model::gguf::Parsed>();
    shared::<dmaload::model::gguf::Value<'static>>();
    shared::<dmaload::model::index::Index>();
    shared::<dmaload::model::index::Named>();
    shared::<dmaload::model::safetensors::Sniff>();

    shared::<dmaload::probe::File>();
    shared::<dmaload::probe::IoUring>();
    shared::<dmaload::probe::MemoryAvailable>();

    shared::<dmaload::share::AttachOptions>();
    shared::<dmaload::share::Attached>();
    shared::<dmaload::share::Server>();
    shared::<dmaload::share::ServerOptions>();

    polled::<Load>();
    polled::<Segments>();
    polled::<Tensors>();
};

#[cfg(feature = "verify")]
const _: () = {
    shared::<dmaload::verify::Algorithm>();
    shared::<dmaload::verify::Digest>();
    shared::<dmaload::verify::Hasher>();
    shared::<dmaload::verify::Manifest>();
    shared::<dmaload::verify::ManifestError>();
    shared::<dmaload::verify::ManifestFile>();
    shared::<dmaload::verify::Recorder>();
};

/// Accepts the futures that a multi-threaded executor accepts as tasks.
fn spawned<F: Future<Output: Send> + Send + 'static>(_future: F) {}

/// Accepts the futures that a task on a multi-threaded executor can await. They need not be
/// `'static`.
fn awaited<F: Future<Output: Send> + Send>(_future: F) {}

/// Compiled but never called.
#[expect(dead_code, reason = "only the types are checked")]
fn futures(loader: Loader, request: LoadRequest, load: &mut Load, segments: &mut Segments, tensors: &mut Tensors, path: PathBuf) {
    spawned(request.into_future());
    awaited(load.next());
    awaited(load.tensor("t"));
    spawned(loader.load(&path).start().finish());
    awaited(segments.next());
    awaited(tensors.next());
    spawned(loader.shutdown());
    awaited(dmaload::inspect(&path, Format::Auto));
    awaited(dmaload::inspect_model(&path, Format::Auto));
    awaited(share::attach(path, share::AttachOptions::default()));
}

#[test]
fn several_threads_read_loaded_bytes_at_once() {
    let folder = tempfile::tempdir().expect("create a folder");
    let path = folder.path().join("model.safetensors");
    let bytes = dmaload_testing::safetensors_of(2, 5000, 1);
    std::fs::write(&path, &bytes).expect("write the model");
    let load = Loader::new().expect("build a loader").load(path).start();
    let tensor: Tensor = load.tensor_blocking("t1").expect("load the tensor");
    let segment: &Segment = &tensor.parts()[0].segment;
    let views = std::thread::scope(|scope| {
        let views = [(); 3].map(|()| scope.spawn(|| (tensor.bytes(), segment.bytes())));
        views.map(|view| view.join().expect("a reader panicked"))
    });
    for (tensor_view, segment_view) in views {
        assert_eq!(tensor_view.expect("view the tensor"), bytes[bytes.len() - 5000..]);
        assert_eq!(segment_view.expect("view the segment"), bytes);
    }
}

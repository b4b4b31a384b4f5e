//! Tests loads on a kernel that cannot seal memfds against future writes, as before Linux 5.1, and
//! cannot move mappings with `MREMAP_DONTUNMAP`, as before Linux 5.7. Seccomp filters simulate
//! such a kernel. They cannot be removed, so this file has one test, which runs in its own
//! process.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(unsafe_code, reason = "implements a heap")]

mod common;

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use common::{assert_same, file, folder, random_bytes};
use dmaload::heap::{Heap, HeapError, HeapHooks, Hooked, Mapping, Memfd, MemfdHeap, Memory, Populated};
use dmaload::{Errno, Error, Image, Loader};
use dmaload_testing::seccomp::{Scope, install, instruction};

// Offsets in `struct seccomp_data` of the system call number and of the low halves of the second,
// third and fourth arguments, on a little-endian machine.
const CALL: u32 = 0;
const SECOND: u32 = 24;
const THIRD: u32 = 32;
const FOURTH: u32 = 40;

fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn verdict(verdict: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, verdict)
}

/// Makes `fcntl(F_ADD_SEALS)` with `F_SEAL_FUTURE_WRITE` fail with EINVAL from now on.
fn refuse_the_seal() {
    const F_ADD_SEALS: u32 = 1033;
    const F_SEAL_FUTURE_WRITE: u32 = 0x10;
    let call = u32::try_from(libc::SYS_fcntl).unwrap();
    let filter = vec![
        load(CALL),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 5, call),
        load(SECOND),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 3, F_ADD_SEALS),
        load(THIRD),
        instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, F_SEAL_FUTURE_WRITE),
        verdict(libc::SECCOMP_RET_ERRNO | libc::EINVAL.cast_unsigned()),
        verdict(libc::SECCOMP_RET_ALLOW),
    ];
    install(Scope::Process, filter).unwrap();
}

/// Makes `mremap` with any of these flags fail with `errno` from now on.
fn refuse_moves(flags: i32, errno: i32) {
    let call = u32::try_from(libc::SYS_mremap).unwrap();
    let filter = vec![
        load(CALL),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 3, call),
        load(FOURTH),
        instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, flags.cast_unsigned()),
        verdict(libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()),
        verdict(libc::SECCOMP_RET_ALLOW),
    ];
    install(Scope::Process, filter).unwrap();
}

/// Loads a file until its memory is in the pool, and then once more. Returns the result of that.
async fn load_from_pool(path: &Path, bytes: &[u8]) -> Result<Image, Error> {
    let loader = Loader::builder().pool_bytes(1 << 30).build().unwrap();
    let first = loader.load(path).await.unwrap();
    assert_same(&first.files()[0].bytes().unwrap(), bytes, "the first load");
    drop(first);
    while loader.pooled_bytes() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    loader.load(path).await
}

#[derive(Debug)]
struct CallersHeap;

// SAFETY: the memory comes from `MemfdHeap`, and this heap keeps no descriptor of it.
unsafe impl Heap for CallersHeap {
    fn name(&self) -> Cow<'_, str> {
        "callers-heap".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        MemfdHeap::default().allocate(bytes)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        MemfdHeap::default().populate(mapping, memory, part)
    }
}

#[derive(Debug)]
struct Nothing;

impl HeapHooks for Nothing {}

#[tokio::test]
async fn before_linux_5_1_loads_need_a_built_in_heap() {
    refuse_the_seal();
    assert!(!Memfd::kernel_seals_writes());
    let folder = folder();
    let bytes = random_bytes(5_000_000, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    for builder in [
        Loader::builder(),
        Loader::builder().heap(MemfdHeap::default()),
        Loader::builder().heap(Hooked::new(MemfdHeap::default(), Nothing)),
    ] {
        let image = builder.build().unwrap().load(&path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, "a built-in heap");
        // Without the seal, any holder of the descriptor could write to the memory.
        let refused = image.segments()[0].hand_out_memfd().unwrap_err();
        assert!(matches!(&refused, Error::Memory { refusal, .. } if refusal.errno == Errno::EINVAL), "{refused}");
    }
    let error = Loader::builder().heap(CallersHeap).build().unwrap().load(&path).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("callers-heap: cannot seal a memfd against writes") && text.contains("EINVAL"), "{text}");

    assert!(load_from_pool(&path, &bytes).await.unwrap().report().reused_bytes > 0);
    // If only the move itself fails, its target is lost. The load fails with that error.
    refuse_moves(libc::MREMAP_FIXED, libc::ENOMEM);
    let error = load_from_pool(&path, &bytes).await.unwrap_err();
    assert!(error.to_string().contains("move a mapping") && error.to_string().contains("ENOMEM"), "{error}");
    assert!(error.hint().unwrap().contains("vm.max_map_count"), "{:?}", error.hint());
    // Before Linux 5.7, no mapping can be moved, and memory is allocated instead.
    refuse_moves(libc::MREMAP_DONTUNMAP, libc::EINVAL);
    let image = load_from_pool(&path, &bytes).await.unwrap();
    assert_eq!(image.report().reused_bytes, 0);
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "a load whose memory could not be moved");
}

//! Digests of loaded files, computed from the loaded memory. On a heap that the CPU reads
//! uncached, they are computed from the staging buffers instead, because reading such memory takes
//! several times as long.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dmaload::heap::Heap;
use dmaload::verify::{Algorithm, Digest, Hasher, digest};
use dmaload::{Image, LoadOptions, Observer, Rejection};

/// Computes digests of a load's files.
#[derive(Debug)]
pub(crate) struct Checksums {
    algorithm: Algorithm,
    /// Hashes the files during the load. It is `None` unless the CPU reads the heap uncached.
    observer: Option<Arc<HashingObserver>>,
}

#[derive(Debug)]
struct HashingObserver {
    algorithm: Algorithm,
    /// A hasher for each file seen so far: the number of files becomes known only during the load.
    hashers: Mutex<Vec<Hasher>>,
}

impl HashingObserver {
    /// Locks the list and extends it to at least `files` hashers. The observer is not called for
    /// empty files, so their hashers may be missing.
    fn extend_to(&self, files: usize) -> MutexGuard<'_, Vec<Hasher>> {
        let mut hashers = self.hashers.lock().unwrap_or_else(PoisonError::into_inner);
        if hashers.len() < files {
            hashers.resize(files, Hasher::new(self.algorithm));
        }
        hashers
    }
}

impl Observer for HashingObserver {
    fn bytes(&self, file_index: usize, _offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        let mut hashers = self.extend_to(file_index + 1);
        hashers.get_mut(file_index).ok_or("unexpected file")?.update(bytes);
        Ok(())
    }
}

impl Checksums {
    /// Prepares digests of files loaded into this heap.
    pub(crate) fn new(algorithm: Algorithm, heap: &dyn Heap) -> Self {
        let observer = || Arc::new(HashingObserver { algorithm, hashers: Mutex::default() });
        Checksums { algorithm, observer: heap.is_uncached().then(observer) }
    }

    /// Adds the observer, if any, to the load's options.
    pub(crate) fn apply_to(&self, options: LoadOptions) -> LoadOptions {
        match &self.observer {
            Some(observer) => options.observer(Arc::clone(observer)),
            None => options,
        }
    }

    /// Returns the digests of a finished load, in the order of its files.
    pub(crate) fn finish(&self, image: &Image) -> dmaload::Result<Vec<Digest>> {
        match &self.observer {
            Some(observer) => {
                let hashers = observer.extend_to(image.files().len());
                Ok(hashers.iter().cloned().map(Hasher::finish).collect())
            }
            None => image.files().iter().map(|file| Ok(digest(self.algorithm, &file.bytes()?))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmaload::Loader;
    use dmaload::heap::{HeapHooks, Hooked, MemfdHeap};

    #[derive(Debug)]
    struct Uncached;

    impl HeapHooks for Uncached {
        fn is_uncached(&self, _of_the_heap: bool) -> bool {
            true
        }
    }

    #[test]
    fn digests_during_and_after_a_load_are_equal() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let paths = [0_usize, 1, 5_000_001].map(|bytes| {
            let path = folder.path().join(bytes.to_string());
            std::fs::write(&path, vec![7; bytes]).unwrap();
            path
        });
        let loaders = [
            Loader::builder().heap(MemfdHeap::default()).build().unwrap(),
            Loader::builder().heap(Hooked::new(MemfdHeap::default(), Uncached)).build().unwrap(),
        ];
        for algorithm in Algorithm::ALL {
            let expected = paths.each_ref().map(|path| digest(algorithm, &std::fs::read(path).unwrap()));
            for (loader, observes) in loaders.iter().zip([false, true]) {
                let checksums = Checksums::new(algorithm, loader.heap());
                assert_eq!(checksums.observer.is_some(), observes);
                let load = loader.load(&paths).options(checksums.apply_to(loader.load_options())).start();
                let image = crate::engine::block_on(async { load.await }).unwrap().unwrap();
                assert_eq!(checksums.finish(&image).unwrap(), expected);
            }
        }
    }
}

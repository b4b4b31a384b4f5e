//! Helpers for the integration tests: folders on a disk, files of random bytes, the routes, and an
//! executor.
#![allow(dead_code, unreachable_pub, reason = "no test uses every helper")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::fs;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};

use dmaload::Route;

/// Creates a temporary folder in the build's target folder. That is usually on a disk, so
/// `O_DIRECT` reads reach a device.
pub fn folder() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

#[allow(unused_imports, reason = "no test uses every helper")]
pub use dmaload_testing::{assert_same, file, random_bytes};

pub const ROUTES: [Route; 6] =
    [Route::UringFixedDirect, Route::UringDirect, Route::PreadDirect, Route::Bounce, Route::UringBuffered, Route::Buffered];

/// Runs a future on a minimal executor, which parks the thread between polls.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

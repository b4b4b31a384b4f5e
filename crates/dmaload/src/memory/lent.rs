//! Ensures that memory is never viewed and handed out at the same time. Any number of views can
//! exist until the memory is handed out, which is possible only while no view is alive.

use crate::support::sync::atomic::{AtomicUsize, Ordering};

/// The number of live views, or [`HANDED_OUT`].
#[derive(Debug)]
pub(crate) struct ViewCount(AtomicUsize);

const HANDED_OUT: usize = usize::MAX;

impl ViewCount {
    pub(crate) fn new() -> Self {
        ViewCount(AtomicUsize::new(0))
    }

    /// Counts one more view. If the memory was handed out, returns `false` and counts nothing.
    pub(crate) fn lend(&self) -> bool {
        let one_more = |views: usize| (views < HANDED_OUT - 1).then(|| views + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// Removes a view that [`ViewCount::lend`] added.
    pub(crate) fn take_back(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    /// Marks the memory as handed out, so no new view can be created. If views are still alive,
    /// changes nothing and returns their number as the error.
    pub(crate) fn hand_out(&self) -> Result<(), usize> {
        match self.0.compare_exchange(0, HANDED_OUT, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) | Err(HANDED_OUT) => Ok(()),
            Err(views) => Err(views),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::sync::model::{Arc, model, spawn};

    #[test]
    fn views_and_handing_out_exclude_each_other() {
        model(|| {
            // The counter, and a value that views read and the holder of the descriptor writes.
            let shared = Arc::new((ViewCount::new(), AtomicUsize::new(0)));
            let viewers = [(); 2].map(|()| {
                let shared = Arc::clone(&shared);
                spawn(move || {
                    let (lent, written) = &*shared;
                    if lent.lend() {
                        assert_eq!(written.load(Ordering::Relaxed), 0, "written while a view is alive");
                        lent.take_back();
                    }
                })
            });
            let (lent, written) = &*shared;
            let handed = lent.hand_out();
            if handed.is_ok() {
                written.store(1, Ordering::Relaxed);
                assert!(!lent.lend(), "viewed after being handed out");
                assert_eq!(lent.hand_out(), Ok(()), "handing out again should succeed");
            }
            for viewer in viewers {
                viewer.join().unwrap();
            }
            assert_eq!(lent.hand_out(), Ok(()), "no view should be left");
        });
    }
}

//! Views and handing out exclude each other: bytes are lent as often as one likes until the memory's descriptor has left, and
//! that leaves only when no view is alive.

use crate::support::sync::atomic::{AtomicUsize, Ordering};

/// The number of views that are alive, or [`HANDED_OUT`].
#[derive(Debug)]
pub(crate) struct ViewCount(AtomicUsize);

/// No number of views.
const HANDED_OUT: usize = usize::MAX;

impl ViewCount {
    pub(crate) fn new() -> Self {
        ViewCount(AtomicUsize::new(0))
    }

    /// A view more; `false` once it was handed out.
    pub(crate) fn lend(&self) -> bool {
        let one_more = |views: usize| (views < HANDED_OUT - 1).then(|| views + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// A view that [`ViewCount::lend`] has allowed is gone.
    pub(crate) fn take_back(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    /// From now on nobody gets a view. Where there are any, the error is their number.
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
    fn nobody_views_what_was_handed_out_and_nobody_hands_out_what_is_viewed() {
        model(|| {
            // What a view looks at, and what the one who was handed it writes to.
            let shared = Arc::new((ViewCount::new(), AtomicUsize::new(0)));
            let viewers = [(); 2].map(|()| {
                let shared = Arc::clone(&shared);
                spawn(move || {
                    let (lent, written) = &*shared;
                    if lent.lend() {
                        assert_eq!(written.load(Ordering::Relaxed), 0, "somebody writes under a view");
                        lent.take_back();
                    }
                })
            });
            let (lent, written) = &*shared;
            let handed = lent.hand_out();
            if handed.is_ok() {
                written.store(1, Ordering::Relaxed);
                assert!(!lent.lend(), "lent after it was handed out");
                assert_eq!(lent.hand_out(), Ok(()), "handed out as often as one likes");
            }
            for viewer in viewers {
                viewer.join().unwrap();
            }
            assert_eq!(lent.hand_out(), Ok(()), "when all views are gone");
        });
    }
}

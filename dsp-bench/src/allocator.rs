//! Counts the bytes that the process holds, over mimalloc.
//!
//! What is counted is what Rust code asks the global allocator for: tensors of a backend that is
//! written in Rust, the autodiff graph, the parameters. What C libraries and graphics drivers
//! allocate, stacks of threads, the binary itself and what mimalloc keeps back for reuse are not;
//! the resident size that the system reports is therefore larger.
//!
//! This is the only file of the crate with `unsafe` in it.
//!
//! ```ignore
//! #[global_allocator]
//! static MEMORY: CountingAllocator = CountingAllocator::new();
//! ```

#![expect(unsafe_code, reason = "an allocator is one by `unsafe`")]

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use mimalloc::MiMalloc;

/// mimalloc, counting the bytes that are held and the most that were.
///
/// The counters are relaxed atomics: each is exact by itself, but between threads the peak may miss
/// another thread's allocation of the same moment by its size. [`CountingAllocator::reset_peak`] is
/// for moments at which no rank is running.
#[allow(missing_debug_implementations)] // A static that nobody prints.
pub struct CountingAllocator {
    current_bytes: AtomicUsize,
    peak_bytes: AtomicUsize,
}

impl CountingAllocator {
    /// For a `static` with `#[global_allocator]`.
    pub const fn new() -> Self {
        Self {
            current_bytes: AtomicUsize::new(0),
            peak_bytes: AtomicUsize::new(0),
        }
    }

    /// Lets mimalloc keep freed pages for reuse, rather than give them back to the system.
    ///
    /// A step frees and asks for the same hundreds of megabytes again and again; pages that come back from
    /// the system must be cleared first, which took a fifth of a step's processor time.
    pub fn keep_freed_pages(&self) {
        /// `mi_option_purge_delay` in mimalloc's header: milliseconds, or -1 for never.
        const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
        // SAFETY: the option exists in the mimalloc that is linked, whose header gives its number; setting it
        // only stores a number, which mimalloc reads when it frees.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    }

    /// Bytes that are held now.
    pub fn current_bytes(&self) -> usize {
        self.current_bytes.load(Relaxed)
    }

    /// The most bytes that were held since the last [`CountingAllocator::reset_peak`], or since the
    /// start.
    pub fn peak_bytes(&self) -> usize {
        self.peak_bytes.load(Relaxed)
    }

    /// Begins a new peak at what is held now, and returns that.
    pub fn reset_peak(&self) -> usize {
        let current = self.current_bytes();
        self.peak_bytes.store(current, Relaxed);
        current
    }

    fn grown_by(&self, bytes: usize) {
        let current = self.current_bytes.fetch_add(bytes, Relaxed) + bytes;
        // Most allocations are no new peak; a load is cheaper for them than a shared write.
        if current > self.peak_bytes.load(Relaxed) {
            self.peak_bytes.fetch_max(current, Relaxed);
        }
    }

    fn shrunk_by(&self, bytes: usize) {
        self.current_bytes.fetch_sub(bytes, Relaxed);
    }
}

impl Default for CountingAllocator {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: every call is handed on unchanged to `MiMalloc`, a `GlobalAlloc`, and its answer handed
// back unchanged; the counters are atomics beside it, allocate nothing, and decide nothing. So
// whatever the contract demands of the caller reaches `MiMalloc`, and whatever it demands of an
// allocator is what `MiMalloc` keeps. Counting cannot unwind: `fetch_add` and `fetch_sub` wrap, and
// the one `+` is over sizes of live allocations, which together fit an address space.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps `alloc`'s contract, which is `MiMalloc`'s.
        let pointer = unsafe { MiMalloc.alloc(layout) };
        if !pointer.is_null() {
            self.grown_by(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps `alloc_zeroed`'s contract, which is `MiMalloc`'s.
        let pointer = unsafe { MiMalloc.alloc_zeroed(layout) };
        if !pointer.is_null() {
            self.grown_by(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from this allocator, so from `MiMalloc`, with this layout.
        unsafe { MiMalloc.dealloc(pointer, layout) };
        self.shrunk_by(layout.size());
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: `pointer` came from this allocator, so from `MiMalloc`, with this layout, and the
        // caller keeps `realloc`'s contract for `new_size`.
        let moved = unsafe { MiMalloc.realloc(pointer, layout, new_size) };
        if !moved.is_null() {
            self.grown_by(new_size);
            self.shrunk_by(layout.size());
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn current_and_peak_follow_allocations_growth_and_release() {
        let counted = CountingAllocator::new();
        let layout = Layout::from_size_align(1000, 64).unwrap();
        // SAFETY: sizes are not zero, the pointers are freed once with the layout they have.
        unsafe {
            let a = counted.alloc(layout);
            assert_eq!(a.align_offset(64), 0);
            assert_eq!(
                (counted.current_bytes(), counted.peak_bytes()),
                (1000, 1000)
            );
            let b = counted.alloc_zeroed(layout);
            assert!(
                std::slice::from_raw_parts(b, 1000)
                    .iter()
                    .all(|&byte| byte == 0)
            );
            assert_eq!(counted.current_bytes(), 2000);
            counted.dealloc(b, layout);
            assert_eq!(
                (counted.current_bytes(), counted.peak_bytes()),
                (1000, 2000)
            );
            assert_eq!(counted.reset_peak(), 1000);
            a.write(7);
            let a = counted.realloc(a, layout, 500);
            assert_eq!(a.read(), 7);
            assert_eq!(counted.current_bytes(), 500);
            counted.dealloc(a, Layout::from_size_align(500, 64).unwrap());
        }
        assert_eq!(counted.current_bytes(), 0);
        // While `realloc` moves, both blocks are there.
        assert_eq!(counted.peak_bytes(), 1500);
    }

    #[test]
    fn threads_count_into_the_same_sums() {
        let counted = CountingAllocator::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for size in 1..200 {
                        let layout = Layout::from_size_align(size, 8).unwrap();
                        // SAFETY: the size is not zero, the pointer is freed once with its layout.
                        unsafe {
                            let pointer = counted.alloc(layout);
                            counted.dealloc(pointer, layout);
                        }
                    }
                });
            }
        });
        assert_eq!(counted.current_bytes(), 0);
        assert!((199..=4 * 199).contains(&counted.peak_bytes()));
    }
}

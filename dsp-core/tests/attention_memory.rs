//! Attention's memory grows with the length, not with its square.
//!
//! A test binary of its own, with one test: the allocator counts for the whole process.
#![expect(unsafe_code, reason = "an allocator is one by `unsafe`")]
#![cfg(feature = "flex")]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "positions are lists of ranges"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{DType, Device, Tensor};
use dsp_core::attention::{HeadRange, Mask, Problem, softmax_attention};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `dealloc`'s contract, and `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HEADS: usize = 4;
const WIDTH: usize = 16;

/// The bytes that forward and backward held at most, beyond the inputs.
fn peak_bytes(length: usize, mask: Mask) -> usize {
    let options = (&Device::flex().autodiff(), DType::F32);
    let inputs: [Tensor<4>; 3] =
        [0.1, 0.2, 0.3].map(|x| Tensor::full([1, length, HEADS, WIDTH], x, options).require_grad());
    let [q, k, v] = inputs.clone();
    let problem = Problem {
        heads: HeadRange {
            query: 0..HEADS,
            group: 1,
        },
        mask,
        query_positions: vec![0..length],
        key_positions: vec![0..length],
        scale: 0.25,
        dropout: None,
        samples: vec![0..1],
    };
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let (out, lse) = softmax_attention(q, k, v, problem);
    let gradients = out.sum().backward();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    drop((lse, gradients));
    peak
}

#[test]
fn twice_the_length_takes_twice_the_memory_forward_and_backward() {
    peak_bytes(256, Mask::Full);
    for mask in [Mask::Full, Mask::Causal] {
        let [short, long] = [2048, 4096].map(|length| peak_bytes(length, mask.clone()));
        assert!(
            long <= 2 * short + (1 << 20),
            "{mask:?}: {short} bytes, then {long}"
        );
        // All scores at once, of one head alone, would take 64 MiB; an input takes 1 MiB.
        assert!(long < 32 << 20, "{mask:?}: {long} bytes");
    }
}

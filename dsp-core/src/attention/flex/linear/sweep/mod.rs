//! A whole chunk in one sweep, where there is nothing before it, or backward, after it: what is read of a block serves
//! its rows and the state that leaves it.
//!
//! ```text
//!   heads of a thread,     ┌ block 0 ┐┌ block 1 ┐        a head's state stays in the second cache
//!   side by side in     h0 │ ──────▶ ││ ──────▶ │ ─ ─ ▶
//!   memory              h1 │ ──────▶ ││         │        ▶  what comes next is asked for meanwhile
//!                       h2 │ ──────▶ ││         │           (`simd::Ahead`)
//!                          └─────────┘└─────────┘
//! ```
//!
//! It computes what `states.rs`, `output.rs` and `gradients.rs` do one after the other, by the same products in the same
//! order, so the bits are the same. Those compute all blocks side by side: for more threads than there are heads, and
//! for a chunk whose states come from elsewhere.

mod backward;
mod forward;

use crate::simd::Run;

pub(super) use backward::backward;
pub(super) use forward::forward;

/// Whether every thread has a head of its own.
pub(super) fn fits(samples: usize, heads: usize) -> bool {
    samples * heads >= rayon::current_num_threads()
}

/// How many heads, side by side, are one part of the work: all of a sample's, unless less keeps the threads busier.
fn heads_of_a_part(samples: usize, heads: usize) -> usize {
    let threads = rayon::current_num_threads();
    let longest = |parts: &usize| (samples * parts).div_ceil(threads) * heads.div_ceil(*parts);
    heads.div_ceil((1..=heads).min_by_key(longest).unwrap_or(1))
}

/// Each block of some heads, in turn; and what comes after it.
fn steps(
    blocks: impl Iterator<Item = usize>,
    heads: usize,
) -> impl Iterator<Item = ([usize; 2], Option<[usize; 2]>)> {
    let steps: Vec<_> = blocks
        .flat_map(|block| (0..heads).map(move |head| [block, head]))
        .collect();
    let after = (steps.clone().into_iter().skip(1).map(Some)).chain([None]);
    steps.into_iter().zip(after)
}

/// So many elements that lie end to end, as a number of rows.
fn whole(start: *const f32, elements: usize, rows: usize) -> Run {
    let width = elements.div_ceil(rows);
    Run {
        start,
        stride: width,
        width,
    }
}

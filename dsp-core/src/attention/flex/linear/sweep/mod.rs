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

pub(super) use backward::backward;
pub(super) use forward::forward;

/// Whether every thread has a head of its own.
pub(super) fn fits(samples: usize, heads: usize) -> bool {
    samples * heads >= rayon::current_num_threads()
}

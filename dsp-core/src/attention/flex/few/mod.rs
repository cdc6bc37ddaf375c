//! Attention over few keys, as along a short axis of many samples: what is left of a head's time is not its products, but
//! packing, and the passes of a softmax over rows of a vector or two.
//!
//! ```text
//!            rows ──►  lanes of vectors
//!          ┌─────────────────┐
//!   keys   │ s s s s s s s s │   scores are taken the other way round, K·Qᵀ: rows lie side by side in a vector,
//!     │    │ s s s s s s s s │   so that maxima and sums over keys go down the lanes, all rows of them at once
//!     ▼    │ s s s s s s s s │
//!          └─────────────────┘
//! ```
//!
//! Keys are read where they are: only the queries are transposed, and the values packed. A part is the heads of a sample
//! together, which lie side by side in memory; what the next one reads and writes is asked for a few lines at a time, after
//! each row that is packed or written and each tile of a product, evenly while this one works. A row's bits depend on neither
//! the threads nor the rows beside it.

mod backward;
mod forward;

use std::ops::Range;

use super::visible::Visible;
use super::{Head, numbers};
use crate::attention::Dropout;
use crate::attention::softmax::Problem;
use crate::simd::Ahead;

/// How few keys go this way, and how many rows of them at once.
#[derive(Debug, Clone, Copy)]
pub(in crate::attention) struct Few {
    /// The most keys.
    pub(in crate::attention) keys: usize,
    /// Rows (queries × query heads of a group) whose scores are taken at once.
    pub(in crate::attention) rows: usize,
}

impl Few {
    /// The scores, and backward their gradients too, stay in the first cache. With 37 keys the way by tiles was no slower
    /// backward (benchmarks/RESULTS.md).
    pub(super) const DEFAULT: Self = Self { keys: 32, rows: 64 };

    /// Whether this way is taken: where nothing is dropped. It depends on neither the queries nor the threads, so that a
    /// row's bits do not.
    pub(super) fn takes(&self, keys: usize, problem: &Problem) -> bool {
        let drops = |dropout: &Dropout| dropout.probability() > 0.0;
        keys <= self.keys && !problem.dropout.as_ref().is_some_and(drops)
    }

    /// Queries whose rows are taken at once, in groups of so many heads.
    fn queries(&self, group: usize) -> usize {
        (self.rows / group).max(1)
    }
}

/// Lines that are asked for at once: a row is packed in the time in which some four arrive.
const BURST: usize = 4;

/// The sample of heads that lie side by side, their kv heads and their query heads.
fn side_by_side(heads: &[Head]) -> (usize, Range<usize>, Range<usize>) {
    match (heads.first(), heads.last()) {
        (Some(first), Some(last)) => (
            first.sample,
            first.kv..last.kv + 1,
            first.query.start..last.query.end,
        ),
        _ => (0, 0..0, 0..0),
    }
}

/// Finds what the queries of a part see, once for all of its heads, which are one sample's. Returns how many keys there are
/// to look at: those after the last that is seen are padding, of any values.
fn see(
    visible: &mut Visible,
    problem: &Problem,
    heads: &[Head],
    queries: Range<usize>,
    keys: usize,
) -> usize {
    let (count, (sample, ..)) = (queries.len(), side_by_side(heads));
    let positions = numbers(&problem.query_positions, queries.start).take(count);
    visible.find(&problem.mask, sample, positions, &problem.key_positions);
    visible.hull(0..count, &(0..keys)).end
}

/// What a row that is packed or written is worth beside multiply-adds, in what is asked for ahead.
const ROW: usize = 512;

/// Rows, each of which counts for [`ROW`] as it comes.
#[inline(always)]
fn counted<'a>(
    rows: impl Iterator<Item = &'a [f32]>,
    ahead: &mut Ahead,
) -> impl Iterator<Item = &'a [f32]> {
    rows.inspect(|_| ahead.worked(ROW))
}

/// Sets the scores to −∞ of the keys that a row's query does not see: the queries from `first` on, of those that `visible`
/// knows. The scores of a key lie `stride` apart.
#[inline(always)]
fn hide(
    visible: &Visible,
    first: usize,
    group: usize,
    rows: usize,
    scores: &mut [f32],
    stride: usize,
) {
    let keys = scores.len() / stride;
    for row in 0..rows {
        let mut hide = |keys: Range<usize>| {
            keys.for_each(|key| scores[key * stride + row] = f32::NEG_INFINITY);
        };
        let mut from = 0;
        for seen in visible.of(first + row / group) {
            hide(from..seen.start);
            from = seen.end;
        }
        hide(from..keys);
    }
}

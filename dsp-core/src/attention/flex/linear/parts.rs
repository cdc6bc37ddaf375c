//! How heads are shared out among threads, and in which order a thread goes through their blocks.

use std::ops::Range;

use super::super::heads_of_a_part;
use crate::simd::Run;

/// The parts: of each a sample, and heads of it.
pub(super) fn parts(samples: usize, heads: usize) -> Vec<(usize, Range<usize>)> {
    let size = heads_of_a_part(samples, heads);
    let of_sample = |sample| {
        let part = move |first| (sample, first..heads.min(first + size));
        (0..heads).step_by(size).map(part)
    };
    (0..samples).flat_map(of_sample).collect()
}

/// Each block of some heads, in turn; and what comes after it.
pub(super) fn steps(
    blocks: impl Iterator<Item = usize> + Clone,
    heads: usize,
) -> impl Iterator<Item = ([usize; 2], Option<[usize; 2]>)> {
    let steps = blocks.flat_map(move |block| (0..heads).map(move |head| [block, head]));
    let after = (steps.clone().skip(1).map(Some)).chain([None]);
    steps.zip(after)
}

/// A state, whose `d` rows lie end to end, as `rows` rows: those of what is asked for are as many as a block's.
pub(super) fn of_state(state: Run, d: usize, rows: usize) -> Run {
    let width = (d * state.width).div_ceil(rows);
    Run {
        stride: width,
        width,
        ..state
    }
}

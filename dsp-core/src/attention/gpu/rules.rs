//! A mask as numbers that a kernel can read.
//!
//! Whatever the mask, the keys that a query sees are those at an *interval* of positions. So two numbers a
//! query, one a key, and a few a tile say everything, for keys and queries in any order:
//!
//! ```text
//!   first: queries of each sample │ end: the same │ keys' positions │ tiles of queries │ tiles of keys
//!   └── query i sees the key at p if first[i] ≤ p < end[i] ──────┘    (least first,      (least,
//!                                                                      greatest end,      greatest position)
//!                                                                      greatest first,
//!                                                                      least end)
//! ```
//!
//! Of a tile of queries the first two say whether any of them may see a tile of keys, the others whether all see it whole.

use std::ops::Range;

use crate::attention::{Problem, Visibility};

/// The numbers, and whether there is a set of them for each sample.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) numbers: Vec<i32>,
    pub(super) by_sample: bool,
}

/// Whether any pair of the problem is hidden.
pub(super) fn masked(problem: &Problem, samples: usize) -> bool {
    let (queries, keys) = (&problem.query_positions, &problem.key_positions);
    problem.mask.classify(0..samples, queries, keys) != Visibility::All
}

/// The rules of a problem in tiles of so many queries and keys; none if a position is beyond 31 bits.
pub(super) fn rules(
    problem: &Problem,
    samples: usize,
    (query_tile, key_tile): (usize, usize),
) -> Option<Rules> {
    let queries = || problem.query_positions.iter().cloned().flatten();
    let keys = || problem.key_positions.iter().cloned().flatten();
    let largest = queries().chain(keys()).max().unwrap_or(0);
    if i32::try_from(largest).is_err() {
        return None;
    }
    let by_sample = problem.mask.depends_on_sample();
    let samples = if by_sample { 0..samples } else { 0..1 };
    let intervals: Vec<Range<usize>> = samples
        .clone()
        .flat_map(|sample| queries().map(move |query| problem.mask.visible(sample, query)))
        .collect();
    let mut numbers: Vec<i32> = Vec::new();
    let mut push = |position: usize| numbers.push(i32::try_from(position).unwrap_or(i32::MAX));
    intervals.iter().for_each(|seen| push(seen.start));
    intervals.iter().for_each(|seen| push(seen.end));
    keys().for_each(&mut push);
    for of_sample in intervals.chunks(queries().count().max(1)) {
        for tile in of_sample.chunks(query_tile) {
            let seeing = || tile.iter().filter(|seen| !seen.is_empty());
            push(seeing().map(|seen| seen.start).min().unwrap_or(usize::MAX));
            push(seeing().map(|seen| seen.end).max().unwrap_or(0));
            // A query that sees nothing has no tile whole.
            let whole = seeing().count() == tile.len();
            let first = seeing().map(|seen| seen.start).max();
            push(first.filter(|_| whole).unwrap_or(usize::MAX));
            push(seeing().map(|seen| seen.end).min().unwrap_or(0));
        }
    }
    let keys: Vec<usize> = keys().collect();
    for tile in keys.chunks(key_tile) {
        push(tile.iter().copied().min().unwrap_or(0));
        push(tile.iter().copied().max().unwrap_or(0));
    }
    Some(Rules { numbers, by_sample })
}

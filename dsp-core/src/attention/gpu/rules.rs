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

use crate::attention::{Mask, Problem, Visibility, Within};

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
        .flat_map(|sample| queries().map(move |query| seen(&problem.mask, sample, query)))
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

/// The positions of the keys that a query sees.
fn seen(mask: &Mask, sample: usize, query: usize) -> Range<usize> {
    match mask {
        Mask::Full => 0..usize::MAX,
        Mask::Causal => within(Within::Causal, query),
        Mask::Window { size } => within(Within::Window(*size), query),
        Mask::Packed {
            documents,
            within: rule,
        } => {
            let ends = documents.ends();
            let document = documents.of(query);
            let start = document.checked_sub(1).map_or(0, |before| ends[before]);
            let end = ends.get(document).copied().unwrap_or(usize::MAX);
            let seen = within(*rule, query);
            seen.start.max(start)..seen.end.min(end)
        }
        Mask::KeyLengths(lengths) => 0..lengths[sample],
    }
}

fn within(rule: Within, query: usize) -> Range<usize> {
    match rule {
        Within::Full => 0..usize::MAX,
        Within::Causal => 0..query + 1,
        Within::Window(size) => (query + 1).saturating_sub(size.get())..query + 1,
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use proptest::prelude::*;

    use super::*;
    use crate::attention::Documents;

    fn masks() -> impl Strategy<Value = Mask> {
        let size = || (1..9usize).prop_map(|size| NonZeroUsize::new(size).unwrap());
        let within = prop_oneof![
            Just(Within::Full),
            Just(Within::Causal),
            size().prop_map(Within::Window)
        ];
        let documents = prop::collection::btree_set(0..20usize, 0..5)
            .prop_map(|ends| Documents::new(ends.into_iter().collect::<Vec<_>>()).unwrap());
        prop_oneof![
            Just(Mask::Full),
            Just(Mask::Causal),
            size().prop_map(|size| Mask::Window { size }),
            (documents, within).prop_map(|(documents, within)| Mask::Packed { documents, within }),
            prop::collection::vec(0..25usize, 2)
                .prop_map(|lengths| Mask::KeyLengths(lengths.into())),
        ]
    }

    proptest! {
        #[test]
        fn the_interval_holds_the_keys_that_the_mask_shows(
            mask in masks(),
            sample in 0..2usize,
            query in 0..25usize,
            key in 0..25usize,
        ) {
            prop_assert_eq!(
                seen(&mask, sample, query).contains(&key),
                mask.sees(sample, query, key)
            );
        }
    }

    #[test]
    fn documents_that_are_empty_or_share_an_end_keep_their_bounds() {
        let documents = Documents::new([2, 2, 5]).unwrap();
        let mask = Mask::Packed {
            documents,
            within: Within::Full,
        };
        assert_eq!(seen(&mask, 0, 1), 0..2);
        assert_eq!(seen(&mask, 0, 3), 2..5);
        assert_eq!(seen(&mask, 0, 9), 5..usize::MAX);
    }
}

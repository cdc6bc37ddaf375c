//! Attention over the keys that a rank holds, as operations with a backward of our own.
//!
//! For each sample, query head `h` with its kv head `h / group`, and query `i`, over the keys `j`
//! that the [`Mask`] lets it see:
//!
//! ```text
//!   s_ij = scale · q_i · k_j          lse_i = log Σ_j exp s_ij
//!   p_ij = exp(s_ij − lse_i)          out_i = Σ_j p_ij v_j
//!
//!   dv_j = Σ_i p_ij dout_i            ds_ij = p_ij (dout_i · v_j − dout_i · out_i)
//!   dq_i = scale · Σ_j ds_ij k_j      dk_j  = scale · Σ_i ds_ij q_i
//! ```
//!
//! The logsumexp is returned beside the output, for two reasons. The backward needs nothing else
//! to recompute `p` block by block, so that memory grows with the length and not with its square.
//! And the results of two disjoint sets of keys [`merge`] into the result of their union, which is
//! how a ring of ranks attends to keys that it never holds at once; its backward is
//! [`backward`] on each set of keys with the merged output and logsumexp.
//!
//! [`Dropout`] drops probabilities after the softmax: with `m_ij` drawn 0 or 1, `p_ij` becomes
//! `m_ij p_ij / (1 − p)` in `out` and `dv`, and `dout_i · v_j` is multiplied with `m_ij / (1 − p)`;
//! the logsumexp is that of all scores, and merging stays what it is.
//!
//! A query that sees no key has the output 0 and the logsumexp −∞, and all its gradients are 0.
//!
//! Nothing here knows of ranks: rows carry their *global* positions, heads and samples their global
//! numbers.
//!
//! Sources: FlashAttention-2 (arXiv:2307.08691) for the blocks and the backward, Ring Attention
//! (arXiv:2310.01889) for the merge, grouped-query attention (arXiv:2305.13245).

pub mod chunks;
mod dropout;
#[cfg(feature = "flex")]
mod flex;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu;
pub mod heads;
mod kernel;
pub mod linear;
mod packed;
pub mod ring;
mod shard;
mod softmax;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

pub use dropout::{Dropout, DropoutError, DropoutKey};
pub use kernel::{Kept, Kernel};
pub use packed::{Documents, DocumentsError, Within};
pub use shard::{
    Attended, Fold, Heads, HeldAttention, Logsumexp, attend_held, attend_local, check_dropout,
    check_heads, cross_attention, positions, positions_in, samples,
};
pub use softmax::{HeadRange, Problem, backward, forward, merge, softmax_attention};

/// Which keys a query sees.
///
/// A mask is a rule on global positions, never a tensor: whoever holds some rows and some keys
/// evaluates it for those, whatever the partition.
///
/// Positions are those of the attended axes jointly, the last axis varying fastest.
///
/// A new kind (an additive bias, a block pattern) is one variant here with an
/// arm in [`sees`](Self::sees), one in [`classify`](Self::classify) and one in the private `visible`, and, if it
/// depends on a query or a sample, in the private `depends_on_sample` and `depends_on_query`. The attention
/// itself asks for nothing else; a bias, which has a gradient, would also add a term to the scores.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Mask {
    /// Every key.
    Full,
    /// The keys at the query's own position and before it.
    Causal,
    /// A causal sliding window: the keys at the query's own position and the `size − 1` before it.
    Window {
        /// How many keys a query sees at most, its own included.
        size: NonZeroUsize,
    },
    /// Several documents end to end in one sequence, the same in all samples: a query sees keys of its own
    /// document only.
    Packed {
        /// Where each document ends.
        documents: Documents,
        /// Which keys of its document a query sees.
        within: Within,
    },
    /// For each sample of the batch, a length: the keys at positions before it. Zero hides all.
    KeyLengths(Arc<[usize]>),
}

/// What a mask shows of a block: a set of queries against a set of keys, for some samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Every query sees every key.
    All,
    /// No query sees any key: the block needs no work.
    None,
    /// Neither: each pair must be asked.
    Some,
}

impl Mask {
    /// Whether, in sample `sample`, the query at position `query` sees the key at position `key`.
    ///
    /// # Panics
    /// If there is a length per sample, but none for this one.
    pub fn sees(&self, sample: usize, query: usize, key: usize) -> bool {
        match self {
            Self::Full => true,
            Self::Causal => Within::Causal.sees(query, key),
            Self::Window { size } => Within::Window(*size).sees(query, key),
            Self::Packed { documents, within } => {
                documents.of(query) == documents.of(key) && within.sees(query, key)
            }
            Self::KeyLengths(lengths) => key < lengths[sample],
        }
    }

    /// The positions of the keys that a query sees: [`sees`](Self::sees) as one range.
    #[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
    fn visible(&self, sample: usize, query: usize) -> Range<usize> {
        match self {
            Self::Full => 0..usize::MAX,
            Self::Causal => Within::Causal.visible(query),
            Self::Window { size } => Within::Window(*size).visible(query),
            Self::Packed { documents, within } => {
                let (document, seen) = (documents.around(query), within.visible(query));
                document.start.max(seen.start)..document.end.min(seen.end)
            }
            Self::KeyLengths(lengths) => 0..lengths[sample],
        }
    }

    /// What is visible of the block of `queries` against `keys`, both lists of ranges of
    /// positions, for all of `samples`. A block without any pair shows [`Visibility::None`].
    ///
    /// The answer is exact. It costs the number of ranges and samples; for windows and documents the
    /// number of pairs of a range of queries and one of keys, each times the documents that they share and the
    /// logarithm of all documents. No position is looked at one by one.
    ///
    /// # Panics
    /// If there is a length per sample, but not for all of `samples`.
    pub fn classify(
        &self,
        samples: Range<usize>,
        queries: &[Range<usize>],
        keys: &[Range<usize>],
    ) -> Visibility {
        let (queries, keys) = (spans(queries), spans(keys));
        let (Some(all_queries), Some(all_keys)) = (hull(&queries), hull(&keys)) else {
            return Visibility::None;
        };
        if samples.is_empty() {
            return Visibility::None;
        }
        let pairs = || {
            queries
                .iter()
                .flat_map(|&query| keys.iter().map(move |&key| (query, key)))
        };
        let (all, any) = match self {
            Self::Full => (true, true),
            Self::Causal => (
                Within::Causal.shows_all(all_queries, all_keys),
                Within::Causal.shows_any(all_queries, all_keys),
            ),
            Self::Window { size } => {
                let within = Within::Window(*size);
                (
                    within.shows_all(all_queries, all_keys),
                    pairs().any(|(queries, keys)| within.shows_any(queries, keys)),
                )
            }
            Self::Packed { documents, within } => (
                documents.shows_all(*within, all_queries, all_keys),
                pairs().any(|(queries, keys)| documents.shows_any(*within, queries, keys)),
            ),
            Self::KeyLengths(lengths) => {
                let lengths = &lengths[samples];
                (
                    lengths.iter().all(|&length| all_keys.last < length),
                    lengths.iter().any(|&length| all_keys.first < length),
                )
            }
        };
        match (all, any) {
            (true, _) => Visibility::All,
            (false, true) => Visibility::Some,
            (false, false) => Visibility::None,
        }
    }

    /// Whether two samples may see different keys.
    fn depends_on_sample(&self) -> bool {
        matches!(self, Self::KeyLengths(_))
    }

    /// Whether two queries of one sample may see different keys.
    fn depends_on_query(&self) -> bool {
        match self {
            Self::Full | Self::KeyLengths(_) => false,
            Self::Causal | Self::Window { .. } | Self::Packed { .. } => true,
        }
    }
}

/// Positions without a gap: at least one.
#[derive(Debug, Clone, Copy)]
struct Span {
    first: usize,
    last: usize,
}

/// The ranges that hold anything.
fn spans(ranges: &[Range<usize>]) -> Vec<Span> {
    let held = ranges.iter().filter(|range| !range.is_empty());
    let span = |range: &Range<usize>| Span {
        first: range.start,
        last: range.end - 1,
    };
    held.map(span).collect()
}

/// From the first to the last of all positions.
fn hull(spans: &[Span]) -> Option<Span> {
    spans.iter().copied().reduce(|a, b| Span {
        first: a.first.min(b.first),
        last: a.last.max(b.last),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn masks(samples: usize) -> impl Strategy<Value = Mask> {
        prop_oneof![
            Just(Mask::Full),
            Just(Mask::Causal),
            window().prop_map(|size| Mask::Window { size }),
            (documents(), within())
                .prop_map(|(documents, within)| Mask::Packed { documents, within }),
            prop::collection::vec(0..25usize, samples)
                .prop_map(|lengths| Mask::KeyLengths(lengths.into())),
        ]
    }

    fn window() -> impl Strategy<Value = NonZeroUsize> {
        prop_oneof![1..9usize, Just(usize::MAX)].prop_map(|size| NonZeroUsize::new(size).unwrap())
    }

    /// Some of them empty, and most often with positions past the last end.
    fn documents() -> impl Strategy<Value = Documents> {
        prop::collection::vec(0..6usize, 0..6).prop_map(|lengths| {
            let ends = lengths.iter().scan(0, |end, length| {
                *end += length;
                Some(*end)
            });
            Documents::new(ends.collect::<Vec<_>>()).unwrap()
        })
    }

    fn within() -> impl Strategy<Value = Within> {
        prop_oneof![
            Just(Within::Full),
            Just(Within::Causal),
            window().prop_map(Within::Window),
        ]
    }

    fn positions() -> impl Strategy<Value = Vec<Range<usize>>> {
        let range = (0..20usize, 0..4usize).prop_map(|(start, len)| start..start + len);
        prop::collection::vec(range, 0..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_blocks_class_is_what_its_pairs_say(
            mask in masks(3),
            first in 0..4usize,
            queries in positions(),
            keys in positions(),
        ) {
            let pairs: Vec<bool> = (first..3)
                .flat_map(|sample| queries.iter().cloned().flatten().map(move |q| (sample, q)))
                .flat_map(|(sample, q)| keys.iter().cloned().flatten().map(move |k| (sample, q, k)))
                .map(|(sample, query, key)| mask.sees(sample, query, key))
                .collect();
            let expected = match (pairs.iter().all(|&seen| seen), pairs.iter().any(|&seen| seen)) {
                (_, false) => Visibility::None,
                (true, true) => Visibility::All,
                (false, true) => Visibility::Some,
            };
            prop_assert_eq!(mask.classify(first.min(3)..3, &queries, &keys), expected);
        }

        #[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
        #[test]
        fn what_a_query_sees_is_one_range_of_positions(
            mask in masks(2),
            (query, key) in (0..25usize, 0..25usize),
        ) {
            for sample in 0..2 {
                prop_assert_eq!(mask.visible(sample, query).contains(&key), mask.sees(sample, query, key));
            }
        }

        #[test]
        fn a_mask_that_says_it_depends_on_neither_sample_nor_query_does_not(
            mask in masks(2),
            pair in (0..25usize, 0..25usize),
            other in 0..25usize,
        ) {
            let (query, key) = pair;
            if !mask.depends_on_sample() {
                prop_assert_eq!(mask.sees(0, query, key), mask.sees(1, query, key));
            }
            if !mask.depends_on_query() {
                prop_assert_eq!(mask.sees(0, query, key), mask.sees(0, other, key));
            }
        }
    }

    #[test]
    fn a_query_sees_itself_but_not_the_next_position_under_a_causal_mask() {
        assert!(Mask::Causal.sees(0, 4, 4));
        assert!(!Mask::Causal.sees(0, 4, 5));
    }

    #[test]
    fn a_window_of_two_is_a_query_and_its_predecessor() {
        let size = NonZeroUsize::new(2).unwrap();
        let mask = Mask::Window { size };
        let seen = |query| (0..9).filter(move |&key| Mask::Window { size }.sees(0, query, key));
        assert_eq!(seen(4).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(seen(0).collect::<Vec<_>>(), [0]);
        // Between two ranges that a window spans is a gap that it does not.
        assert_eq!(
            mask.classify(0..1, &[0..1, 8..9], &[4..5]),
            Visibility::None
        );
    }

    #[test]
    fn a_document_begins_where_the_one_before_ends_and_what_is_past_the_last_is_one_more() {
        let documents = Documents::new([2, 2, 5]).unwrap();
        let of: Vec<usize> = (0..7).map(|position| documents.of(position)).collect();
        assert_eq!(of, [0, 0, 2, 2, 2, 3, 3]);
        let within = Within::Causal;
        let mask = Mask::Packed { documents, within };
        assert!(mask.sees(0, 3, 2) && !mask.sees(0, 3, 1) && !mask.sees(0, 2, 3));
    }

    #[test]
    fn ends_that_fall_are_refused_with_what_was_given() {
        let refused = Documents::new([3, 5, 4]).unwrap_err();
        assert_eq!(
            refused,
            DocumentsError::Falls {
                document: 2,
                end: 4,
                before: 5
            }
        );
    }

    #[test]
    fn a_length_hides_the_key_at_that_position_in_its_own_sample_only() {
        let mask = Mask::KeyLengths([2, 0].into());
        assert!(mask.sees(0, 0, 1));
        assert!(!mask.sees(0, 0, 2));
        assert!(!mask.sees(1, 0, 0));
    }
}

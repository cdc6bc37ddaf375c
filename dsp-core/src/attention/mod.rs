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
//! A query that sees no key has the output 0 and the logsumexp −∞, and all its gradients are 0.
//!
//! Nothing here knows of ranks: rows carry their *global* positions, heads their global numbers.
//!
//! Sources: FlashAttention-2 (arXiv:2307.08691) for the blocks and the backward, Ring Attention
//! (arXiv:2310.01889) for the merge, grouped-query attention (arXiv:2305.13245).

pub mod chunks;
pub mod heads;
mod kernel;
pub mod linear;
pub mod ring;
mod shard;
mod softmax;

use std::ops::Range;
use std::sync::Arc;

pub use kernel::{Kept, Kernel};
pub use shard::{
    Attended, Fold, Heads, HeldAttention, Logsumexp, attend_held, attend_local, check_heads,
    cross_attention, positions, positions_in,
};
pub use softmax::{HeadRange, Problem, backward, forward, merge, softmax_attention};

/// Which keys a query sees.
///
/// A mask is a rule on global positions, never a tensor: whoever holds some rows and some keys
/// evaluates it for those, whatever the partition.
///
/// A new kind (a sliding window, packed documents, an additive bias) is one variant here with an
/// arm in [`sees`](Self::sees) and one in [`classify`](Self::classify), and, if it depends on a
/// query or a sample, in the private `depends_on_sample` and `depends_on_query`. The attention
/// itself asks for nothing else; a bias, which has a gradient, would also add a term to the scores.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Mask {
    /// Every key.
    Full,
    /// The keys at the query's own position and before it.
    Causal,
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
            Self::Causal => key <= query,
            Self::KeyLengths(lengths) => key < lengths[sample],
        }
    }

    /// What is visible of the block of `queries` against `keys`, both lists of ranges of
    /// positions, for all of `samples`. A block without any pair shows [`Visibility::None`].
    ///
    /// The answer is exact at the cost of the number of ranges and samples, not of pairs.
    ///
    /// # Panics
    /// If there is a length per sample, but not for all of `samples`.
    pub fn classify(
        &self,
        samples: Range<usize>,
        queries: &[Range<usize>],
        keys: &[Range<usize>],
    ) -> Visibility {
        let (Some(queries), Some(keys)) = (span(queries), span(keys)) else {
            return Visibility::None;
        };
        if samples.is_empty() {
            return Visibility::None;
        }
        let (all, any) = match self {
            Self::Full => (true, true),
            Self::Causal => (keys.last <= queries.first, keys.first <= queries.last),
            Self::KeyLengths(lengths) => {
                let lengths = &lengths[samples];
                (
                    lengths.iter().all(|&length| keys.last < length),
                    lengths.iter().any(|&length| keys.first < length),
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
        matches!(self, Self::Causal)
    }
}

/// The first and the last of some positions.
struct Span {
    first: usize,
    last: usize,
}

fn span(ranges: &[Range<usize>]) -> Option<Span> {
    let held = || ranges.iter().filter(|range| !range.is_empty());
    Some(Span {
        first: held().map(|range| range.start).min()?,
        last: held().map(|range| range.end - 1).max()?,
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
            prop::collection::vec(0..25usize, samples)
                .prop_map(|lengths| Mask::KeyLengths(lengths.into())),
        ]
    }

    fn positions() -> impl Strategy<Value = Vec<Range<usize>>> {
        let range = (0..20usize, 0..4usize).prop_map(|(start, len)| start..start + len);
        prop::collection::vec(range, 0..4)
    }

    proptest! {
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
    fn a_length_hides_the_key_at_that_position_in_its_own_sample_only() {
        let mask = Mask::KeyLengths([2, 0].into());
        assert!(mask.sees(0, 0, 1));
        assert!(!mask.sees(0, 0, 2));
        assert!(!mask.sees(1, 0, 0));
    }
}

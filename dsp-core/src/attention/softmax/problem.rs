//! What softmax attention is asked: the heads that a rank holds, the positions of its rows, and what a query sees.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::attention::{Dropout, Heads, Mask};

/// The query heads that a rank holds, and how many of them share a kv head.
///
/// Query head `h` attends with kv head `h / group`. The keys and values held beside them are of
/// the kv heads `query.start / group .. ⌈query.end / group⌉`, in order: a kv head whose queries
/// are cut between ranks is held by both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadRange {
    /// The query heads held here, numbered over all ranks.
    pub query: Range<usize>,
    /// Query heads per kv head; 1 for multi-head attention.
    pub group: usize,
}

impl HeadRange {
    /// All of some heads.
    pub fn all(heads: Heads) -> Self {
        Self {
            query: 0..heads.query,
            group: heads.group(),
        }
    }

    /// The kv heads that the query heads attend with, numbered over all ranks.
    ///
    /// # Panics
    /// If `group` is zero.
    pub fn kv(&self) -> Range<usize> {
        assert!(
            self.group > 0,
            "attention: a group holds at least one query head"
        );
        if self.query.is_empty() {
            return 0..0;
        }
        self.query.start / self.group..self.query.end.div_ceil(self.group)
    }

    /// The heads held here in runs of whole kv heads with equally many queries each: at most three,
    /// as only the first and the last kv head can be cut.
    pub(in crate::attention) fn segments(&self) -> Vec<Segment> {
        let kv_start = self.kv().start;
        let mut segments = Vec::new();
        let mut head = self.query.start;
        while head < self.query.end {
            let kv = head / self.group;
            let whole = (self.query.end - head) / self.group;
            let (kv_heads, group) = if head.is_multiple_of(self.group) && whole > 0 {
                (whole, self.group)
            } else {
                (1, self.query.end.min((kv + 1) * self.group) - head)
            };
            segments.push(Segment {
                query_start: head - self.query.start,
                kv: kv - kv_start..kv - kv_start + kv_heads,
                group,
            });
            head += kv_heads * group;
        }
        segments
    }
}

/// Kv heads with equally many query heads each; all numbers are local.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::attention) struct Segment {
    pub(in crate::attention) query_start: usize,
    pub(in crate::attention) kv: Range<usize>,
    pub(in crate::attention) group: usize,
}

/// What to attend to: everything but the tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// The heads held here.
    pub heads: HeadRange,
    /// Which keys a query sees.
    pub mask: Mask,
    /// The global positions of the local queries, row by row: ranges in the order of the rows.
    pub query_positions: Vec<Range<usize>>,
    /// The global positions of the local keys, row by row: ranges in the order of the rows.
    pub key_positions: Vec<Range<usize>>,
    /// What the products of queries and keys are multiplied with; commonly `1/√d`.
    pub scale: f64,
    /// Which probabilities are dropped, if any.
    pub dropout: Option<Dropout>,
    /// The global numbers of the local samples, of which dropout's draws depend: ranges in the order of the
    /// batch. A mask numbers the samples locally.
    pub samples: Vec<Range<usize>>,
}

/// The shapes of `q`, `k`, `v`, which agree with one another and with the problem.
pub(in crate::attention) struct Sizes {
    pub(in crate::attention) q: [usize; 4],
    pub(in crate::attention) k: [usize; 4],
    pub(in crate::attention) v: [usize; 4],
}

impl Sizes {
    pub(in crate::attention) fn of(
        q: &Tensor<4>,
        k: &Tensor<4>,
        v: &Tensor<4>,
        problem: &Problem,
    ) -> Self {
        let sizes = Self {
            q: q.dims(),
            k: k.dims(),
            v: v.dims(),
        };
        let Self { q, k, v } = &sizes;
        let rows = |positions: &[Range<usize>]| positions.iter().map(Range::len).sum::<usize>();
        assert!(
            q[0] == k[0] && q[3] == k[3] && k[..3] == v[..3],
            "attention: q {q:?}, k {k:?} and v {v:?} must be [B, Lq, Hq, d], [B, Lk, Hkv, d] and \
             [B, Lk, Hkv, dv]"
        );
        assert!(
            q[2] == problem.heads.query.len() && k[2] == problem.heads.kv().len(),
            "attention: q {q:?} and k {k:?} must hold the query heads {:?} and the kv heads {:?}",
            problem.heads.query,
            problem.heads.kv()
        );
        assert!(
            q[1] == rows(&problem.query_positions) && k[1] == rows(&problem.key_positions),
            "attention: q {q:?} and k {k:?} must have a row per position of {:?} and {:?}",
            problem.query_positions,
            problem.key_positions
        );
        assert_eq!(
            rows(&problem.samples),
            q[0],
            "attention: there is one global number (left) per sample (right)"
        );
        if let Mask::KeyLengths(lengths) = &problem.mask {
            assert_eq!(
                lengths.len(),
                q[0],
                "attention: there is one key length (left) per sample (right)"
            );
        }
        sizes
    }

    pub(in crate::attention) fn check_results(
        &self,
        out: &Tensor<4>,
        lse: &Tensor<3>,
        dout: &Tensor<4>,
    ) {
        let [batch, queries, heads, _] = self.q;
        let expected = [batch, queries, heads, self.v[3]];
        assert!(
            out.dims() == expected && dout.dims() == expected && lse.dims() == expected[..3],
            "attention: out {:?}, dout {:?} must be {expected:?}, and lse {:?} without its last",
            out.dims(),
            dout.dims(),
            lse.dims()
        );
    }
}

/// The positions of some rows, of all rows' positions.
pub(in crate::attention) fn positions_of(
    positions: &[Range<usize>],
    rows: Range<usize>,
) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut first_row = 0;
    for range in positions {
        let from = rows.start.max(first_row);
        let to = rows.end.min(first_row + range.len());
        if from < to {
            found.push(range.start + (from - first_row)..range.start + (to - first_row));
        }
        first_row += range.len();
    }
    found
}

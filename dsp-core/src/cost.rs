//! What each strategy sends, by formula: elements per rank and direction, exact for uneven blocks.
//!
//! These stand apart from the code that moves data, so that the ledger can be checked against them. "Sends"
//! is payload delivered to other ranks, the same for every engine. Symbols: `B` batch, `C` channels, `d` head
//! dim, `N` ranks, `r` this rank; `a`, `b` and `l` are the ranks' block lengths.

use serde::{Deserialize, Serialize};

use crate::attention::Heads;
use crate::partition::{Partition, balanced_range};

/// Elements that a rank sends, each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elements {
    /// In the forward pass.
    pub forward: u64,
    /// In the backward pass.
    pub backward: u64,
}

impl Elements {
    /// The same elements both ways, as for every exchange whose transpose moves as much.
    pub fn both(forward: u64, backward: u64) -> Self {
        Self { forward, backward }
    }
}

impl std::ops::Add for Elements {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            forward: self.forward + other.forward,
            backward: self.backward + other.backward,
        }
    }
}

impl std::iter::Sum for Elements {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::default(), std::ops::Add::add)
    }
}

fn elements(count: usize) -> u64 {
    count as u64
}

/// A switch of `[B, …, C]` from an axis split by `from` to one split by `to`: rank `r` sends
/// `B·C·a_r·(T − b_r)` where `a` are `from`'s blocks and `b` are `to`'s, of length `T`. Backward, the same
/// with the axes' roles swapped. `others` is the product of the axes that are whole in both layouts.
pub fn switch(
    batch: usize,
    channels: usize,
    others: usize,
    from: &Partition,
    to: &Partition,
    rank: usize,
) -> Elements {
    let (a, b) = (from.count(rank), to.count(rank));
    let unit = batch * channels * others;
    Elements {
        forward: elements(unit * a * (to.length() - b)),
        backward: elements(unit * b * (from.length() - a)),
    }
}

/// An all-gather of blocks of `l` positions: rank `r` sends `B·C·(N−1)·l_r`; backward, the reduce-scatter
/// sends `B·C·(L − l_r)`.
pub fn all_gather(
    batch: usize,
    channels: usize,
    others: usize,
    partition: &Partition,
    rank: usize,
) -> Elements {
    let unit = batch * channels * others;
    let (own, all) = (unit * partition.count(rank), unit * partition.length());
    gather(own, all, partition.ranks())
}

/// An all-gather to which a rank brings `own` of `all` elements: `(N−1)·own`; backward `all − own`.
pub fn gather(own: usize, all: usize, ranks: usize) -> Elements {
    Elements::both(elements((ranks - 1) * own), elements(all - own))
}

/// The state of linear attention, `S` elements, handed on hop by hop (LASP): every rank but the last sends it
/// forward, every one but the first sends its gradient backward.
pub fn state_hops(state: usize, ranks: usize, rank: usize) -> Elements {
    let sent = |sends: bool| if sends { elements(state) } else { 0 };
    Elements::both(sent(rank + 1 < ranks), sent(rank > 0))
}

/// The states of linear attention, `S` elements a rank, gathered by all (LASP-2): `(N − 1)·S` each way.
pub fn state_gather(state: usize, ranks: usize) -> Elements {
    let sent = elements((ranks - 1) * state);
    Elements::both(sent, sent)
}

/// An all-reduce of `count` elements, each way: its reduce-scatter and its all-gather over balanced chunks
/// `p` send `(P − p_r) + (N − 1)·p_r`.
pub fn all_reduce(count: usize, ranks: usize, rank: usize) -> Elements {
    let own = balanced_range(count, rank, ranks).len();
    let sent = elements((count - own) + (ranks - 1) * own);
    Elements::both(sent, sent)
}

/// The query heads of each rank in head-parallel attention, and the key-value heads that they touch.
///
/// Returns for rank `r` the pair `(q_r, kv_r)`; heads that two ranks touch count for both.
pub fn heads_per_rank(heads: Heads, ranks: usize) -> Vec<(usize, usize)> {
    let group = heads.group();
    let of_rank = |rank| match balanced_range(heads.query, rank, ranks) {
        range if range.is_empty() => (0, 0),
        range => {
            let touched = range.end.div_ceil(group) - range.start / group;
            (range.len(), touched)
        }
    };
    (0..ranks).map(of_rank).collect()
}

/// Head-parallel attention (Ulysses) of queries in blocks `l` and keys in blocks `m`:
/// `B·d·[l_r(Hq − q_r) + 2·m_r·Σ_{p≠r} kv_p + q_r(L − l_r)]`; backward as much, mirrored:
/// `B·d·[q_r(L − l_r) + 2·kv_r(M − m_r) + l_r(Hq − q_r)]`.
pub fn ulysses(
    batch: usize,
    others: usize,
    heads: Heads,
    queries: &Partition,
    keys: &Partition,
    rank: usize,
) -> Elements {
    let shares = heads_per_rank(heads, queries.ranks());
    let (q, kv) = shares[rank];
    let (l, m) = (queries.count(rank), keys.count(rank));
    let elsewhere: usize = shares.iter().map(|&(_, kv)| kv).sum::<usize>() - kv;
    let queries_and_output = l * (heads.query - q) + q * (queries.length() - l);
    let unit = batch * others * heads.dim;
    Elements {
        forward: elements(unit * (queries_and_output + 2 * m * elsewhere)),
        backward: elements(unit * (queries_and_output + 2 * kv * (keys.length() - m))),
    }
}

//! Softmax attention in blocks of queries × keys, with plain Burn operations, on any backend.
//!
//! One block at a time: its scores are made, used and forgotten. What stays is of the size of the
//! inputs: the output and the logsumexp forward, the three gradients backward.
//!
//! ```text
//!              keys ──►                  All    no mask
//!            ┌─────┬─────┬─────┐         Some   a mask is made for the block
//!    queries │ Some│ None│ None│         None   no work
//!       │    ├─────┼─────┼─────┤
//!       ▼    │ All │ Some│ None│         for each tile of samples × kv heads,
//!            ├─────┼─────┼─────┤         which bounds a block's scores in bytes
//!            │ All │ All │ Some│
//!            └─────┴─────┴─────┘
//! ```
//!
//! The query heads that share a kv head are laid out as rows of one matrix, so that keys and
//! values are never repeated, and their gradients are summed by the matrix product itself.
//!
//! Hidden scores are a large negative *finite* number, so that no ∞ − ∞ can arise: the weights of
//! hidden keys are exactly zero because `exp` of it is.

use std::convert::Infallible;
use std::ops::Range;

use burn::tensor::{Bool, DType, Device, Tensor, TensorData, s};

use super::{Dropout, Heads, Mask, Visibility};
use crate::matmul::matmul;
use crate::precision::{computed, computed_in};
use crate::vjp;

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
    pub(super) fn segments(&self) -> Vec<Segment> {
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
pub(super) struct Segment {
    pub(super) query_start: usize,
    pub(super) kv: Range<usize>,
    pub(super) group: usize,
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

/// Attends: the output, and the logsumexp (natural logarithm) of each query's scores.
///
/// The tensors are untracked; see [`softmax_attention`] for a gradient. They share one floating
/// dtype, in which everything is computed; of 16 bits, in f32, in which their logsumexp then is, and
/// the output is rounded once.
///
/// # Shapes
/// - `q`: `[B, Lq, Hq, d]`, `k`: `[B, Lk, Hkv, d]`, `v`: `[B, Lk, Hkv, dv]`; any of them may be
///   empty
/// - returns: `[B, Lq, Hq, dv]` and `[B, Lq, Hq]`; `(0, −∞)` for a query that sees no key. The logsumexp is
///   that of all visible keys, those dropped included
///
/// # Cost
/// `2·B·Hq·(d + dv)` operations per visible pair of query and key. Memory: the results, and a
/// constant for one block's scores; of 16 bits, where no kernel takes these, copies of all in f32.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn forward(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    problem: &Problem,
) -> (Tensor<4>, Tensor<3>) {
    Way::Best.forward(q, k, v, problem)
}

/// The gradients of `q`, `k` and `v`, recomputing the weights block by block from the logsumexp.
///
/// With `out` and `lse` merged over several sets of keys, and `k` and `v` one of those sets, the
/// results are that set's `dk` and `dv` and its part of `dq`.
///
/// # Shapes
/// - `q`, `k`, `v`: as in [`forward`]; `out`, `lse`: what it returned, or a [`merge`] of that
/// - `dout`: `[B, Lq, Hq, dv]`
/// - returns: `(dq, dk, dv)`, in the shapes of `q`, `k`, `v`; zero where nothing is visible
///
/// # Cost
/// 2.5 times the forward's operations. Memory: the results, a scaled copy of `q`, two numbers per
/// query, and a constant for one block's scores; of 16 bits, where no kernel takes these, copies of all in f32.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn backward(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    out: Tensor<4>,
    lse: Tensor<3>,
    dout: Tensor<4>,
    problem: &Problem,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    Way::Best.backward(q, k, v, out, lse, dout, problem)
}

/// Attends with a gradient: [`forward`], attached to the graphs of `q`, `k`, `v` with [`backward`].
///
/// The graph keeps `q`, `k`, `v`, the output and the logsumexp.
///
/// # Shapes
/// As [`forward`].
///
/// # Gradient
/// Through the output. The logsumexp is returned as a constant.
///
/// # Panics
/// As [`forward`].
pub fn softmax_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    problem: Problem,
) -> (Tensor<4>, Tensor<3>) {
    softmax_attention_in(Way::Best, q, k, v, problem)
}

/// The result over two disjoint sets of keys from the result over each.
///
/// `out ← out − σ(lse' − lse)(out − out')`, `lse ← lse − log σ(lse − lse')`: no exponential of a
/// logsumexp is ever taken, so that nothing overflows. Where one side saw no key (`lse` is −∞ and
/// `out` is 0) the result is the other side; where neither did, `(0, −∞)`.
///
/// All is computed in the logsumexps' dtype, and the output returned in that of `a`'s: where many results of 16 bits
/// are merged one after the other, begin with one cast to f32, so that none of the sums is rounded to 16 bits.
///
/// # Shapes
/// - outputs: `[B, Lq, Hq, dv]`, logsumexps: `[B, Lq, Hq]`
pub fn merge(a: (Tensor<4>, Tensor<3>), b: (Tensor<4>, Tensor<3>)) -> (Tensor<4>, Tensor<3>) {
    let (dtype, computed) = (a.0.dtype(), a.1.dtype());
    let rows = |(out, lse): (Tensor<4>, Tensor<3>)| (out.cast(computed), lse.unsqueeze_dim(3));
    let (out, lse) = merge_rows(rows(a), rows(b));
    (out.cast(dtype), lse.squeeze_dim(3))
}

/// The sizes of a block. Results depend on them by rounding only.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    /// Queries in a block.
    query: usize,
    /// Keys in a block.
    key: usize,
    /// What the scores of a block may take, over all its samples and heads.
    scores_bytes: usize,
}

impl Blocks {
    /// One block of keys covers common short axes (a frame's patches, a clip's frames), which then
    /// need no merge. The scores of a block and their few temporaries stay in a CPU's cache.
    const DEFAULT: Self = Self {
        query: 256,
        key: 512,
        scores_bytes: 4 << 20,
    };
}

/// How attention is computed.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// By the kernels of [`super::flex`], or of `gpu`, where there are some for the tensors, else portably; in f32 at
    /// least.
    Best,
    /// With Burn's operations, in such blocks.
    #[cfg_attr(not(test), expect(dead_code, reason = "the oracle of the tests"))]
    Portable(Blocks),
    /// By the kernels of [`super::flex`], with an instruction set and such tiles.
    #[cfg(all(test, feature = "flex"))]
    Flex(crate::simd::Level, super::flex::Tiling),
}

impl Way {
    fn forward(
        self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        problem: &Problem,
    ) -> (Tensor<4>, Tensor<3>) {
        match self {
            Self::Best => {
                #[cfg(any(feature = "cuda", feature = "wgpu"))]
                if let Some(results) = super::gpu::forward(&q, &k, &v, problem) {
                    return results;
                }
                let dtype = q.dtype();
                if dtype != computed_in(dtype) {
                    let [q, k, v] = [q, k, v].map(computed);
                    let (out, lse) = self.forward(q, k, v, problem);
                    return (out.cast(dtype), lse);
                }
                #[cfg(feature = "flex")]
                if let Some(results) = super::flex::forward(&q, &k, &v, problem) {
                    return results;
                }
                forward_in(Blocks::DEFAULT, q, k, v, problem)
            }
            Self::Portable(blocks) => forward_in(blocks, q, k, v, problem),
            #[cfg(all(test, feature = "flex"))]
            Self::Flex(level, tiling) => {
                super::flex::forward_in((level, tiling), &q, &k, &v, problem)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the names of the formula")]
    fn backward(
        self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        out: Tensor<4>,
        lse: Tensor<3>,
        dout: Tensor<4>,
        problem: &Problem,
    ) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        #[cfg(any(feature = "cuda", feature = "wgpu", feature = "flex"))]
        let tensors = [&q, &k, &v, &out, &dout];
        match self {
            Self::Best => {
                #[cfg(any(feature = "cuda", feature = "wgpu"))]
                if let Some([dq, dk, dv]) = super::gpu::backward(tensors, &lse, problem) {
                    return (dq, dk, dv);
                }
                let dtype = q.dtype();
                if dtype != computed_in(dtype) {
                    let [q, k, v, out, dout] = [q, k, v, out, dout].map(computed);
                    let gradients = self.backward(q, k, v, out, computed(lse), dout, problem);
                    let [dq, dk, dv] = <[_; 3]>::from(gradients).map(|x| x.cast(dtype));
                    return (dq, dk, dv);
                }
                #[cfg(feature = "flex")]
                if let Some([dq, dk, dv]) = super::flex::backward(tensors, &lse, problem) {
                    return (dq, dk, dv);
                }
                backward_in(Blocks::DEFAULT, q, k, v, out, lse, dout, problem)
            }
            Self::Portable(blocks) => backward_in(blocks, q, k, v, out, lse, dout, problem),
            #[cfg(all(test, feature = "flex"))]
            Self::Flex(level, tiling) => {
                let [dq, dk, dv] =
                    super::flex::backward_in((level, tiling), tensors, &lse, problem);
                (dq, dk, dv)
            }
        }
    }
}

fn softmax_attention_in(
    way: Way,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    problem: Problem,
) -> (Tensor<4>, Tensor<3>) {
    let inputs = [q, k, v];
    let [q, k, v] = inputs.clone().map(Tensor::inner);
    let (out, lse) = way.forward(q.clone(), k.clone(), v.clone(), &problem);
    let constant_lse = match inputs.iter().find(|input| input.is_autodiff()) {
        Some(input) => vjp::constant_like(lse.clone(), input),
        None => lse.clone(),
    };
    let kept = out.clone();
    let out = vjp::attach3(inputs, out, move |dout| {
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        let (out, lse) = (kept.clone(), lse.clone());
        let (dq, dk, dv) = way.backward(q, k, v, out, lse, dout, &problem);
        Ok::<_, Infallible>([dq, dk, dv])
    });
    (out, constant_lse)
}

fn forward_in(
    blocks: Blocks,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    problem: &Problem,
) -> (Tensor<4>, Tensor<3>) {
    let sizes = Sizes::of(&q, &k, &v, problem);
    let (device, dtype) = (q.device(), q.dtype());
    let [batch, queries, heads, _] = sizes.q;
    let mut out = Tensor::zeros([batch, queries, heads, sizes.v[3]], (&device, dtype));
    let mut lse = Tensor::full(
        [batch, queries, heads, 1],
        f64::NEG_INFINITY,
        (&device, dtype),
    );
    for tile in tiles(blocks, &sizes, problem, dtype) {
        for rows in ranges(queries, tile.query_block) {
            let query_positions = positions_of(&problem.query_positions, rows.clone());
            let q = tile.queries(&q, &rows).mul_scalar(problem.scale);
            let mut seen: Option<(Tensor<4>, Tensor<4>)> = None;
            for keys in ranges(sizes.k[1], blocks.key) {
                let block = Block {
                    tile: &tile,
                    problem,
                    queries: &query_positions,
                    keys: &positions_of(&problem.key_positions, keys.clone()),
                };
                let visibility = block.visibility();
                if visibility == Visibility::None {
                    continue;
                }
                let scores = block.scores(visibility, &q, tile.keys(&k, &keys));
                let kept = block.kept(&scores.device());
                let part = attend(scores, tile.keys(&v, &keys), kept.as_ref());
                seen = Some(match seen {
                    Some(before) => merge_rows(before, part),
                    None => part,
                });
            }
            if let Some((block_out, block_lse)) = seen {
                out = tile.assign_queries(out, &rows, block_out);
                lse = tile.assign_queries(lse, &rows, block_lse);
            }
        }
    }
    (out, lse.squeeze_dim(3))
}

#[expect(clippy::too_many_arguments, reason = "the names of the formula")]
fn backward_in(
    blocks: Blocks,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    out: Tensor<4>,
    lse: Tensor<3>,
    dout: Tensor<4>,
    problem: &Problem,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let sizes = Sizes::of(&q, &k, &v, problem);
    sizes.check_results(&out, &lse, &dout);
    let (device, dtype) = (q.device(), q.dtype());
    let mut dq = Tensor::zeros(sizes.q, (&device, dtype));
    let mut dk = Tensor::zeros(sizes.k, (&device, dtype));
    let mut dv = Tensor::zeros(sizes.v, (&device, dtype));
    // Nothing to add up; and no backend is asked to run an operation on an empty tensor.
    if dq.shape().num_elements() == 0 || dk.shape().num_elements() == 0 {
        return (dq, dk, dv);
    }
    // dout · out, which is Σ_j p_ij dp_ij, dropped or not: the softmax's own derivative.
    let delta: Tensor<4> = (dout.clone() * out).sum_dim(3);
    let lse = finite_lse(lse).unsqueeze_dim::<4>(3);
    for tile in tiles(blocks, &sizes, problem, dtype) {
        let mut query_blocks: Vec<QueryBlock> = ranges(sizes.q[1], tile.query_block)
            .map(|rows| QueryBlock {
                positions: positions_of(&problem.query_positions, rows.clone()),
                q: tile.queries(&q, &rows).mul_scalar(problem.scale),
                dout: tile.queries(&dout, &rows),
                lse: tile.queries(&lse, &rows),
                delta: tile.queries(&delta, &rows),
                dq: None,
                rows,
            })
            .collect();
        for keys in ranges(sizes.k[1], blocks.key) {
            let key_positions = positions_of(&problem.key_positions, keys.clone());
            let (block_k, block_v) = (tile.keys(&k, &keys), tile.keys(&v, &keys));
            let (mut block_dk, mut block_dv) = (None, None);
            for queries in &mut query_blocks {
                let block = Block {
                    tile: &tile,
                    problem,
                    queries: &queries.positions,
                    keys: &key_positions,
                };
                let visibility = block.visibility();
                if visibility == Visibility::None {
                    continue;
                }
                let scores = block.scores(visibility, &queries.q, block_k.clone());
                let weights = (scores - queries.lse.clone()).exp();
                let kept = block.kept(&weights.device());
                let dout = queries.dout.clone();
                let dropped = drop_out(weights.clone(), kept.as_ref());
                add(&mut block_dv, matmul(dropped.swap_dims(2, 3), dout.clone()));
                let dweights = matmul(dout, block_v.clone().swap_dims(2, 3));
                let dweights = drop_out(dweights, kept.as_ref());
                let dscores = weights * (dweights - queries.delta.clone());
                // `q` carries the scale already.
                add(
                    &mut block_dk,
                    matmul(dscores.clone().swap_dims(2, 3), queries.q.clone()),
                );
                add(&mut queries.dq, matmul(dscores, block_k.clone()));
            }
            if let (Some(block_dk), Some(block_dv)) = (block_dk, block_dv) {
                dk = tile.assign_keys(dk, &keys, block_dk);
                dv = tile.assign_keys(dv, &keys, block_dv);
            }
        }
        for queries in query_blocks {
            if let Some(block_dq) = queries.dq {
                dq = tile.assign_queries(dq, &queries.rows, block_dq.mul_scalar(problem.scale));
            }
        }
    }
    (dq, dk, dv)
}

/// A block of queries during the backward of a tile; tensors are `[b, h, rows·group, ·]`.
struct QueryBlock {
    rows: Range<usize>,
    positions: Vec<Range<usize>>,
    q: Tensor<4>,
    dout: Tensor<4>,
    lse: Tensor<4>,
    delta: Tensor<4>,
    dq: Option<Tensor<4>>,
}

fn add(sum: &mut Option<Tensor<4>>, term: Tensor<4>) {
    *sum = Some(match sum.take() {
        Some(sum) => sum + term,
        None => term,
    });
}

/// The shapes of `q`, `k`, `v`, which agree with one another and with the problem.
pub(super) struct Sizes {
    pub(super) q: [usize; 4],
    pub(super) k: [usize; 4],
    pub(super) v: [usize; 4],
}

impl Sizes {
    pub(super) fn of(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> Self {
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

    pub(super) fn check_results(&self, out: &Tensor<4>, lse: &Tensor<3>, dout: &Tensor<4>) {
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

/// Samples × kv heads of one segment that are computed together.
struct Tile {
    samples: Range<usize>,
    query_heads: Range<usize>,
    kv_heads: Range<usize>,
    group: usize,
    query_block: usize,
}

/// The tiles of a problem: as many samples and heads at once as the bound on the scores allows.
fn tiles(blocks: Blocks, sizes: &Sizes, problem: &Problem, dtype: DType) -> Vec<Tile> {
    let [batch, queries, ..] = sizes.q;
    let keys = sizes.k[1].min(blocks.key);
    let scores = blocks.scores_bytes / dtype.size();
    let mut tiles = Vec::new();
    if queries == 0 || keys == 0 {
        return tiles;
    }
    for segment in problem.heads.segments() {
        let Segment {
            query_start,
            kv,
            group,
        } = segment;
        // A group so large that one block of it exceeds the bound takes fewer queries at once.
        let query_block = (scores / (group * keys))
            .clamp(1, blocks.query)
            .min(queries);
        let matrices = (scores / (query_block * group * keys)).max(1);
        let heads = kv.len().min(matrices);
        for samples in ranges(batch, (matrices / heads).max(1)) {
            for run in ranges(kv.len(), heads) {
                tiles.push(Tile {
                    samples: samples.clone(),
                    query_heads: query_start + run.start * group..query_start + run.end * group,
                    kv_heads: kv.start + run.start..kv.start + run.end,
                    group,
                    query_block,
                });
            }
        }
    }
    tiles
}

impl Tile {
    /// Rows of a tensor of queries `[B, Lq, Hq, ·]`, folded: `[b, h, rows·group, ·]`.
    fn queries(&self, tensor: &Tensor<4>, rows: &Range<usize>) -> Tensor<4> {
        let part = tensor.clone().slice(s![
            self.samples.clone(),
            rows.clone(),
            self.query_heads.clone(),
            ..
        ]);
        // Without groups the fold is a view; with them the rows must be copied together.
        if self.group == 1 {
            return part.swap_dims(1, 2);
        }
        let [b, rows, heads, width] = part.dims();
        let kv_heads = heads / self.group;
        part.reshape([b, rows, kv_heads, self.group, width])
            .swap_dims(1, 2)
            .reshape([b, kv_heads, rows * self.group, width])
    }

    /// The inverse of [`queries`](Self::queries): folded rows back into their place.
    fn assign_queries(
        &self,
        tensor: Tensor<4>,
        rows: &Range<usize>,
        folded: Tensor<4>,
    ) -> Tensor<4> {
        let part = if self.group == 1 {
            folded.swap_dims(1, 2)
        } else {
            let [b, kv_heads, _, width] = folded.dims();
            folded
                .reshape([b, kv_heads, rows.len(), self.group, width])
                .swap_dims(1, 2)
                .reshape([b, rows.len(), kv_heads * self.group, width])
        };
        tensor.slice_assign(
            s![
                self.samples.clone(),
                rows.clone(),
                self.query_heads.clone(),
                ..
            ],
            part,
        )
    }

    /// Rows of a tensor of keys or values `[B, Lk, Hkv, ·]`, as a view `[b, h, keys, ·]`.
    fn keys(&self, tensor: &Tensor<4>, keys: &Range<usize>) -> Tensor<4> {
        let slices = s![
            self.samples.clone(),
            keys.clone(),
            self.kv_heads.clone(),
            ..
        ];
        tensor.clone().slice(slices).swap_dims(1, 2)
    }

    /// The inverse of [`keys`](Self::keys).
    fn assign_keys(&self, tensor: Tensor<4>, keys: &Range<usize>, part: Tensor<4>) -> Tensor<4> {
        let slices = s![
            self.samples.clone(),
            keys.clone(),
            self.kv_heads.clone(),
            ..
        ];
        tensor.slice_assign(slices, part.swap_dims(1, 2))
    }
}

/// A block of queries against a block of keys, by their positions.
struct Block<'a> {
    tile: &'a Tile,
    problem: &'a Problem,
    queries: &'a [Range<usize>],
    keys: &'a [Range<usize>],
}

impl Block<'_> {
    fn visibility(&self) -> Visibility {
        (self.problem.mask).classify(self.tile.samples.clone(), self.queries, self.keys)
    }

    /// `[b, h, rows·group, keys]`, hidden pairs at [`hidden_score`].
    fn scores(&self, visibility: Visibility, q: &Tensor<4>, k: Tensor<4>) -> Tensor<4> {
        let scores = matmul(q.clone(), k.swap_dims(2, 3));
        match visibility {
            Visibility::Some => {
                let hidden = self.hidden(&scores.device());
                let score = hidden_score(scores.dtype());
                scores.mask_fill(hidden, score)
            }
            Visibility::All | Visibility::None => scores,
        }
    }

    /// True where a key is hidden: `[b or 1, 1, rows·group or 1, keys]`.
    fn hidden(&self, device: &Device) -> Tensor<4, Bool> {
        let mask = &self.problem.mask;
        let samples = match mask.depends_on_sample() {
            true => self.tile.samples.clone(),
            false => self.tile.samples.start..self.tile.samples.start + 1,
        };
        let rows: Vec<usize> = match mask.depends_on_query() {
            true => (self.queries.iter().cloned().flatten())
                .flat_map(|query| std::iter::repeat_n(query, self.tile.group))
                .collect(),
            false => self.queries.iter().cloned().flatten().take(1).collect(),
        };
        let keys: Vec<usize> = self.keys.iter().cloned().flatten().collect();
        let shape = [samples.len(), 1, rows.len(), keys.len()];
        let mut hidden = Vec::with_capacity(shape.iter().product());
        for sample in samples {
            for &query in &rows {
                hidden.extend(keys.iter().map(|&key| !mask.sees(sample, query, key)));
            }
        }
        Tensor::from_data(TensorData::new(hidden, shape), device)
    }
    /// What dropout keeps of the pairs, `[b, h, rows·group, keys]`, if there is dropout.
    fn kept(&self, device: &Device) -> Option<Kept> {
        let dropout = self.problem.dropout?;
        let tile = self.tile;
        let heads = {
            let first = self.problem.heads.query.start;
            first + tile.query_heads.start..first + tile.query_heads.end
        };
        let samples = positions_of(&self.problem.samples, tile.samples.clone());
        let rows: usize = self.queries.iter().map(Range::len).sum();
        let keys: usize = self.keys.iter().map(Range::len).sum();
        let shape = [
            tile.samples.len(),
            tile.kv_heads.len(),
            rows * tile.group,
            keys,
        ];
        let mut dropped = Vec::with_capacity(shape.iter().product());
        for sample in samples.into_iter().flatten() {
            for group in heads.clone().step_by(tile.group) {
                for query in self.queries.iter().cloned().flatten() {
                    for head in group..group + tile.group {
                        dropout.extend(&mut dropped, [sample, head, query], self.keys);
                    }
                }
            }
        }
        Some(Kept {
            dropped: Tensor::from_data(TensorData::new(dropped, shape), device),
            scale: dropout.scale(),
        })
    }
}

/// What dropout does to the pairs of a block.
struct Kept {
    /// True where a pair is dropped.
    dropped: Tensor<4, Bool>,
    /// What the others are multiplied with.
    scale: f64,
}

/// `m / (1 − p) ∘ x`, or `x` without dropout.
fn drop_out(x: Tensor<4>, kept: Option<&Kept>) -> Tensor<4> {
    match kept {
        Some(Kept { dropped, scale }) => x.mask_fill(dropped.clone(), 0.0).mul_scalar(*scale),
        None => x,
    }
}

/// The output and the logsumexp (as a last dimension of one) of rows of scores.
fn attend(scores: Tensor<4>, v: Tensor<4>, kept: Option<&Kept>) -> (Tensor<4>, Tensor<4>) {
    // The bound lies between hidden and real scores: a row that sees nothing keeps weights of 0.
    let bound = least_maximum(scores.dtype());
    let maximum = scores.clone().max_dim(3).clamp_min(bound);
    let weights = (scores - maximum.clone()).exp();
    let sum = weights.clone().sum_dim(3);
    // The largest weight is 1, so that only the sum of a row that sees nothing is below one half.
    let out = matmul(drop_out(weights, kept), v) / sum.clone().clamp_min(0.5);
    (out, maximum + sum.log())
}

/// [`merge`] on outputs of any width and logsumexps with a last dimension of one.
fn merge_rows(a: (Tensor<4>, Tensor<4>), b: (Tensor<4>, Tensor<4>)) -> (Tensor<4>, Tensor<4>) {
    let ((out_a, lse_a), (out_b, lse_b)) = (a, b);
    let bound = least_maximum(lse_a.dtype());
    let gap = lse_b.clone().clamp_min(bound) - lse_a.clone().clamp_min(bound);
    // The sigmoid. Burn's own is in f32 on GPUs, whatever the type (0.22.1).
    let weight_of_b = (gap.clone().neg().exp() + 1.0).recip();
    let out = out_a.clone() - weight_of_b * (out_a - out_b);
    // From the larger one, −log σ(x) = log(1 + exp(−x)) with x ≥ 0: at most log 2.
    let correction = gap.abs().neg().exp().log1p();
    (out, lse_a.max_pair(lse_b) + correction)
}

/// The logsumexp for the backward: −∞ becomes so large that the weights of the row are exactly 0.
fn finite_lse(lse: Tensor<3>) -> Tensor<3> {
    let dtype = lse.dtype();
    let nothing_seen = lse.clone().lower_elem(least_maximum(dtype));
    lse.mask_fill(nothing_seen, -least_maximum(dtype))
}

/// The score of a hidden key: half of the lowest number, so that what is subtracted from it in
/// [`attend`] and in the backward leaves it finite.
fn hidden_score(dtype: DType) -> f64 {
    lowest(dtype) / 2.0
}

/// Far above hidden scores and far below real ones.
fn least_maximum(dtype: DType) -> f64 {
    lowest(dtype) / 4.0
}

fn lowest(dtype: DType) -> f64 {
    match dtype.finfo() {
        Some(info) => info.min,
        None => panic!("attention: {dtype:?} is not a floating dtype"),
    }
}

/// `0..length` in runs of `size`; the last may be shorter.
fn ranges(length: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length)
        .step_by(size)
        .map(move |start| start..length.min(start + size))
}

/// The positions of some rows, of all rows' positions.
pub(super) fn positions_of(positions: &[Range<usize>], rows: Range<usize>) -> Vec<Range<usize>> {
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

#[cfg(test)]
#[cfg(feature = "flex")]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "positions are lists of ranges"
)]
mod tests {
    use std::num::NonZeroUsize;

    use proptest::prelude::*;

    use super::*;
    use crate::attention::flex::Tiling;
    use crate::attention::{Documents, DropoutKey, Within};
    use crate::simd::Level;

    /// Blocks that hold any problem of these tests at once.
    const ONE_BLOCK: Blocks = Blocks {
        query: 1000,
        key: 1000,
        scores_bytes: 1 << 30,
    };

    fn random(shape: [usize; 4], seed: u64, (device, dtype): (&Device, DType)) -> Tensor<4> {
        // A generator of our own: Burn's is shared by all threads, so that no test could be repeated.
        let mut state = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0
            })
            .collect();
        Tensor::from_data(TensorData::new(values, shape), (device, dtype))
    }

    fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
        tensor.to_data().iter::<f64>().collect()
    }

    /// The largest difference, relative to the largest value or 1; infinities must be equal.
    fn difference<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>) -> f64 {
        assert_eq!(found.dims(), expected.dims());
        let (found, expected) = (values(found), values(expected));
        let size =
            (expected.iter().filter(|x| x.is_finite())).fold(1.0, |m: f64, x| m.max(x.abs()));
        let differences = found.iter().zip(&expected).map(|(a, b)| match a == b {
            true => 0.0,
            false => (a - b).abs() / size,
        });
        // A NaN, once found, stays: no number is greater.
        differences.fold(
            0.0,
            |worst, x| if x > worst || x.is_nan() { x } else { worst },
        )
    }

    macro_rules! assert_close {
        ($found:expr, $expected:expr, $tolerance:expr) => {
            let difference = difference(&$found, &$expected);
            // Written so that NaN fails.
            assert!(
                difference <= $tolerance,
                "{} differs by {difference:e}",
                stringify!($found)
            );
        };
    }

    #[derive(Debug, Clone)]
    struct Case {
        problem: Problem,
        batch: usize,
        width: usize,
        value_width: usize,
        blocks: Blocks,
        dtype: DType,
        seed: u64,
    }

    impl Case {
        fn inputs(&self, device: &Device, dtype: DType) -> [Tensor<4>; 4] {
            let rows = |positions: &[Range<usize>]| positions.iter().map(Range::len).sum();
            let lq: usize = rows(&self.problem.query_positions);
            let lk: usize = rows(&self.problem.key_positions);
            let (hq, hkv) = (
                self.problem.heads.query.len(),
                self.problem.heads.kv().len(),
            );
            let (b, d, dv) = (self.batch, self.width, self.value_width);
            let shapes = [
                [b, lq, hq, d],
                [b, lk, hkv, d],
                [b, lk, hkv, dv],
                [b, lq, hq, dv],
            ];
            let mut seed = self.seed;
            let [q, k, v, dout] = shapes.map(|shape| {
                seed += 1;
                random(shape, seed, (device, DType::F32))
            });
            // Dropout enlarges the terms of gradients by its scale, and the rounding of what cancels with them: from
            // so much less they are of one size, whatever is dropped.
            let scale = self.problem.dropout.map_or(1.0, |dropout| dropout.scale());
            // Rounded first to what the case's precision holds, f32's at most, so that all see the same numbers.
            let held = match self.dtype {
                DType::F64 => DType::F32,
                held => held,
            };
            [q, k, v, dout.div_scalar(scale)].map(|x| x.cast(held).cast(dtype))
        }
    }

    /// Everything that attention returns, and the gradients for one cotangent.
    struct Results {
        out: Tensor<4>,
        lse: Tensor<3>,
        gradients: [Tensor<4>; 3],
    }

    impl Results {
        fn assert_close(&self, expected: &Self, tolerance: f64) {
            assert_close!(self.out, expected.out, tolerance);
            assert_close!(self.lse, expected.lse, tolerance);
            let [dq, dk, dv] = &self.gradients;
            assert_close!(dq, expected.gradients[0], tolerance);
            assert_close!(dk, expected.gradients[1], tolerance);
            assert_close!(dv, expected.gradients[2], tolerance);
        }
    }

    /// Every way that can take the case, in blocks of these sizes.
    fn ways(case: &Case, blocks: Blocks) -> Vec<Way> {
        let mut ways = vec![Way::Best, Way::Portable(blocks)];
        if case.dtype == DType::F32 {
            let tiling = Tiling {
                rows: blocks.query,
                strip: blocks.query.div_ceil(2),
                keys: blocks.key,
            };
            ways.extend(
                Level::all()
                    .into_iter()
                    .map(|level| Way::Flex(level, tiling)),
            );
        }
        ways
    }

    fn ours(case: &Case, way: Way, device: &Device) -> Results {
        let [q, k, v, dout] = case.inputs(device, case.dtype);
        let [q, k, v] = [q, k, v].map(|x| x.autodiff().require_grad());
        let (out, lse) =
            softmax_attention_in(way, q.clone(), k.clone(), v.clone(), case.problem.clone());
        let gradients = (out.clone() * dout.autodiff()).sum().backward();
        Results {
            out: out.inner(),
            lse: lse.inner(),
            gradients: [q, k, v].map(|x| x.grad(&gradients).unwrap()),
        }
    }

    /// All scores at once, in f64, with Burn's own gradients.
    fn naive(case: &Case, device: &Device) -> Results {
        let Problem {
            heads,
            mask,
            query_positions,
            key_positions,
            scale,
            dropout,
            samples,
        } = &case.problem;
        let [q, k, v, dout] = case.inputs(device, DType::F64);
        let [q, k, v] = [q, k, v].map(|x| x.autodiff().require_grad());
        let ([b, lq, hq, _], lk) = (q.dims(), k.dims()[1]);
        let kv: Vec<i64> = (heads.query.clone())
            .map(|head| (head / heads.group - heads.kv().start) as i64)
            .collect();
        let kv = Tensor::<1, burn::tensor::Int>::from_data(kv.as_slice(), &k.device());
        let by_head = |x: &Tensor<4>| x.clone().select(2, kv.clone()).swap_dims(1, 2);
        let mut visible = Vec::new();
        for sample in 0..b {
            for query in query_positions.iter().cloned().flatten() {
                for key in key_positions.iter().cloned().flatten() {
                    visible.push(f64::from(mask.sees(sample, query, key)));
                }
            }
        }
        let visible = TensorData::new(visible, [b, 1, lq, lk]);
        let visible = Tensor::<4>::from_data(visible, (&q.device(), DType::F64));
        let scores = q
            .clone()
            .swap_dims(1, 2)
            .matmul(by_head(&k).swap_dims(2, 3))
            * *scale;
        // Scores of these tests are small enough to take their exponentials as they are.
        let weights = scores.exp() * visible;
        let sum = weights.clone().sum_dim(3);
        let blind = sum.clone().equal_elem(0.0);
        let mut kept = Vec::new();
        for sample in samples.iter().cloned().flatten() {
            for head in heads.query.clone() {
                for query in query_positions.iter().cloned().flatten() {
                    for key in key_positions.iter().cloned().flatten() {
                        kept.push(match dropout {
                            Some(dropout) if dropout.drops(sample, head, query, key) => 0.0,
                            Some(dropout) => 1.0 / (1.0 - dropout.probability()),
                            None => 1.0,
                        });
                    }
                }
            }
        }
        let kept = TensorData::new(kept, [b, hq, lq, lk]);
        let weights = weights * Tensor::<4>::from_data(kept, (&q.device(), DType::F64));
        let out = weights.matmul(by_head(&v)) / sum.clone().mask_fill(blind, 1.0);
        let out = out.swap_dims(1, 2);
        let lse = sum.inner().log().swap_dims(1, 2).reshape([b, lq, hq]);
        let gradients = (out.clone() * dout.autodiff()).sum().backward();
        Results {
            out: out.inner(),
            lse,
            gradients: [q, k, v].map(|x| x.grad(&gradients).unwrap()),
        }
    }

    fn positions(ranges: Range<usize>) -> impl Strategy<Value = Vec<Range<usize>>> {
        let range = (0..30usize, 1..6usize).prop_map(|(start, len)| start..start + len);
        prop::collection::vec(range, ranges)
    }

    fn window() -> impl Strategy<Value = NonZeroUsize> {
        (1..12usize).prop_map(|size| NonZeroUsize::new(size).unwrap())
    }

    fn documents() -> impl Strategy<Value = Documents> {
        prop::collection::btree_set(0..30usize, 0..5)
            .prop_map(|ends| Documents::new(ends.into_iter().collect::<Vec<_>>()).unwrap())
    }

    fn within() -> impl Strategy<Value = Within> {
        prop_oneof![
            Just(Within::Full),
            Just(Within::Causal),
            window().prop_map(Within::Window),
        ]
    }

    fn dropout() -> impl Strategy<Value = Dropout> {
        let probability = prop_oneof![Just(0.0), Just(0.9), 0.0..0.9f64];
        (probability, any::<u64>()).prop_map(|(probability, seed)| {
            let key = DropoutKey {
                seed,
                ..DropoutKey::default()
            };
            Dropout::new(probability, key).unwrap()
        })
    }

    fn cases() -> impl Strategy<Value = Case> {
        (1..4usize, 0..6usize, 1..7usize, 1..5usize).prop_flat_map(|(batch, start, len, group)| {
            let mask = prop_oneof![
                Just(Mask::Full),
                Just(Mask::Causal),
                window().prop_map(|size| Mask::Window { size }),
                (documents(), within())
                    .prop_map(|(documents, within)| Mask::Packed { documents, within }),
                prop::collection::vec(0..30usize, batch)
                    .prop_map(|lengths| Mask::KeyLengths(lengths.into())),
            ];
            let samples =
                prop::collection::vec((0..9usize).prop_map(|start| start..start + 1), batch);
            let problem = (
                mask,
                positions(1..4),
                positions(1..4),
                0.2..0.8f64,
                prop::option::of(dropout()),
                samples,
            );
            let problem = problem.prop_map(
                move |(mask, query_positions, key_positions, scale, dropout, samples)| Problem {
                    heads: HeadRange {
                        query: start..start + len,
                        group,
                    },
                    mask,
                    query_positions,
                    key_positions,
                    scale,
                    dropout,
                    samples,
                },
            );
            let blocks =
                (1..9usize, 1..9usize, 1..4096usize).prop_map(|(query, key, bytes)| Blocks {
                    query,
                    key,
                    scores_bytes: bytes,
                });
            let dtype = prop_oneof![Just(DType::F32), Just(DType::F64)];
            (problem, 1..5usize, 1..5usize, blocks, dtype, any::<u32>()).prop_map(
                move |(problem, width, value_width, blocks, dtype, seed)| Case {
                    problem,
                    batch,
                    width,
                    value_width,
                    blocks,
                    dtype,
                    seed: u64::from(seed),
                },
            )
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn any_blocks_give_the_naive_output_logsumexp_and_gradients(case in cases()) {
            let device = Device::flex();
            // f64: a few hundred roundings. f32: the same, at its own epsilon.
            let tolerance = if case.dtype == DType::F64 { 1e-13 } else { 1e-5 };
            let expected = naive(&case, &device);
            for blocks in [case.blocks, ONE_BLOCK] {
                for way in ways(&case, blocks) {
                    ours(&case, way, &device).assert_close(&expected, tolerance);
                }
            }
        }

        #[test]
        fn disjoint_sets_of_keys_merge_to_their_union_and_share_its_backward(
            case in cases(),
            cut in 0..16usize,
        ) {
            let device = Device::flex();
            let [q, k, v, dout] = case.inputs(&device, DType::F64);
            let keys = k.dims()[1];
            let cut = cut.min(keys);
            let parts: Vec<_> = [0..cut, cut..keys]
                .into_iter()
                .filter(|rows| !rows.is_empty())
                .map(|rows| {
                    let mut problem = case.problem.clone();
                    problem.key_positions = positions_of(&problem.key_positions, rows.clone());
                    let part = |x: &Tensor<4>| x.clone().slice(s![.., rows.clone(), .., ..]);
                    (part(&k), part(&v), problem)
                })
                .collect();
            let (out, lse) = parts
                .iter()
                .map(|(k, v, problem)| forward_in(case.blocks, q.clone(), k.clone(), v.clone(), problem))
                .reduce(merge)
                .unwrap();
            let mut dq = q.zeros_like();
            let (mut dk, mut dv) = (Vec::new(), Vec::new());
            for (k, v, problem) in parts {
                let (q, out, lse, dout) = (q.clone(), out.clone(), lse.clone(), dout.clone());
                let part = backward_in(case.blocks, q, k, v, out, lse, dout, &problem);
                dq = dq + part.0;
                dk.push(part.1);
                dv.push(part.2);
            }
            let gradients = [dq, Tensor::cat(dk, 1), Tensor::cat(dv, 1)];
            let expected = naive(&case, &device);
            Results { out, lse, gradients }.assert_close(&expected, 1e-13);
        }

        #[test]
        fn segments_hold_every_head_once_beside_its_kv_head(
            start in 0..40usize,
            len in 0..40usize,
            group in 1..10usize,
        ) {
            let heads = HeadRange { query: start..start + len, group };
            let segments = heads.segments();
            prop_assert!(segments.len() <= 3);
            let mut pairs = Vec::new();
            for segment in segments {
                for (i, kv) in segment.kv.enumerate() {
                    for j in 0..segment.group {
                        pairs.push((segment.query_start + i * segment.group + j, kv));
                    }
                }
            }
            let expected: Vec<_> = (0..len)
                .map(|local| (local, (start + local) / group - start / group))
                .collect();
            prop_assert_eq!(pairs, expected);
        }

        #[test]
        fn positions_of_rows_are_those_of_the_whole_list(
            all in positions(0..5),
            from in 0..20usize,
            len in 0..20usize,
        ) {
            let flat: Vec<usize> = all.iter().cloned().flatten().collect();
            let rows = from.min(flat.len())..(from + len).min(flat.len());
            let found: Vec<usize> = positions_of(&all, rows.clone()).into_iter().flatten().collect();
            prop_assert_eq!(&found, &flat[rows]);
        }
    }

    fn plain(batch: usize, heads: usize, queries: usize, keys: usize, mask: Mask) -> Case {
        Case {
            problem: Problem {
                heads: HeadRange {
                    query: 0..heads,
                    group: 1,
                },
                mask,
                query_positions: vec![0..queries],
                key_positions: vec![0..keys],
                scale: 0.5,
                dropout: None,
                samples: vec![0..batch],
            },
            batch,
            width: 4,
            value_width: 3,
            blocks: Blocks::DEFAULT,
            dtype: DType::F64,
            seed: 7,
        }
    }

    #[test]
    fn empty_batches_heads_queries_and_keys_give_zeros_of_the_right_shapes() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::F64] {
            for (batch, heads, queries, keys) in [
                (0, 2, 3, 4),
                (2, 0, 3, 4),
                (2, 2, 0, 4),
                (2, 2, 3, 0),
                (0, 0, 0, 0),
            ] {
                for mask in [
                    Mask::Full,
                    Mask::Causal,
                    Mask::KeyLengths(vec![2; batch].into()),
                ] {
                    let mut case = plain(batch, heads, queries, keys, mask);
                    case.dtype = dtype;
                    for way in ways(&case, Blocks::DEFAULT) {
                        let Results {
                            out,
                            lse,
                            gradients: [dq, dk, dv],
                        } = ours(&case, way, &device);
                        assert_eq!(out.dims(), [batch, queries, heads, 3]);
                        assert_eq!(lse.dims(), [batch, queries, heads]);
                        assert_eq!(dq.dims(), [batch, queries, heads, 4]);
                        assert_eq!(dk.dims(), [batch, keys, heads, 4]);
                        assert_eq!(dv.dims(), [batch, keys, heads, 3]);
                        assert!(values(&lse).iter().all(|&x| x == f64::NEG_INFINITY));
                        for tensor in [out, dq, dk, dv] {
                            assert_eq!(tensor.dtype(), dtype);
                            assert!(values(&tensor).iter().all(|&x| x == 0.0));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn empty_results_merge() {
        let (device, dtype) = (Device::flex(), DType::F64);
        for [b, l, h] in [[0, 3, 2], [2, 0, 2], [2, 3, 0]] {
            let side = || {
                (
                    Tensor::<4>::zeros([b, l, h, 4], (&device, dtype)),
                    Tensor::<3>::zeros([b, l, h], (&device, dtype)),
                )
            };
            let (out, lse) = merge(side(), side());
            assert_eq!((out.dims(), lse.dims()), ([b, l, h, 4], [b, l, h]));
        }
    }

    #[test]
    fn a_sample_of_length_zero_gets_zeros_and_minus_infinity_beside_one_that_sees() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::F64] {
            for blocks in [
                Blocks::DEFAULT,
                Blocks {
                    key: 2,
                    ..Blocks::DEFAULT
                },
            ] {
                let mut case = plain(2, 2, 3, 5, Mask::KeyLengths([0, 3].into()));
                case.dtype = dtype;
                for way in ways(&case, blocks) {
                    let found = ours(&case, way, &device);
                    let [blind, seeing] = [0, 1].map(|sample| {
                        let part = |x: &Tensor<4>| values(&x.clone().slice(s![sample..sample + 1]));
                        let mut all = part(&found.out);
                        found.gradients.iter().for_each(|x| all.extend(part(x)));
                        (
                            all,
                            values(&found.lse.clone().slice(s![sample..sample + 1])),
                        )
                    });
                    assert!(blind.0.iter().all(|&x| x == 0.0));
                    assert!(blind.1.iter().all(|&x| x == f64::NEG_INFINITY));
                    assert!(seeing.0.iter().chain(&seeing.1).all(|x| x.is_finite()));
                    // Hidden keys of the seeing sample get no gradient, to the last bit.
                    let hidden = found.gradients[1].clone().slice(s![1..2, 3..5]);
                    assert!(values(&hidden).iter().all(|&x| x == 0.0));
                }
            }
        }
    }

    #[test]
    fn hidden_keys_and_values_do_not_touch_the_result_even_if_huge() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::F64] {
            let mut case = plain(1, 2, 6, 6, Mask::KeyLengths([4].into()));
            case.dtype = dtype;
            let [q, k, v, _] = case.inputs(&device, dtype);
            let huge = |x: &Tensor<4>| {
                let tail = x.clone().slice(s![.., 4..6]).full_like(1e30);
                x.clone().slice_assign(s![.., 4..6], tail)
            };
            let expected = forward(q.clone(), k.clone(), v.clone(), &case.problem);
            let found = forward(q, huge(&k), huge(&v), &case.problem);
            assert_eq!(values(&found.0), values(&expected.0));
            assert_eq!(values(&found.1), values(&expected.1));
        }
    }

    #[test]
    fn scores_in_the_thousands_neither_overflow_nor_lose_the_logsumexp() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::F64] {
            for blocks in [
                Blocks::DEFAULT,
                Blocks {
                    key: 3,
                    ..Blocks::DEFAULT
                },
            ] {
                let mut case = plain(1, 2, 5, 8, Mask::Causal);
                case.problem.scale = 2000.0;
                case.dtype = dtype;
                for way in ways(&case, blocks) {
                    let found = ours(&case, way, &device);
                    // The first query sees one key: its score is its logsumexp, its value the output.
                    let [q, k, v, _] = case.inputs(&device, DType::F64);
                    let first = |x: Tensor<4>| x.slice(s![.., 0..1]);
                    let score = (first(q) * first(k)).sum_dim(3) * case.problem.scale;
                    let lse = found.lse.clone().slice(s![.., 0..1]).unsqueeze_dim::<4>(3);
                    assert_close!(lse, score, if dtype == DType::F64 { 1e-14 } else { 1e-6 });
                    assert_close!(first(found.out.clone()), first(v), 0.0);
                    for tensor in found.gradients.iter().chain([&found.out]) {
                        assert!(values(tensor).iter().all(|x| x.is_finite()));
                    }
                }
            }
        }
    }

    #[test]
    fn merging_with_a_side_that_saw_nothing_returns_the_other_and_two_such_return_nothing() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::F64] {
            let infinity = f64::NEG_INFINITY;
            let out = |x: f64| Tensor::<4>::full([1, 1, 1, 2], x, (&device, dtype));
            let lse = |x: f64| Tensor::<3>::full([1, 1, 1], x, (&device, dtype));
            for value in [-3000.0, -0.3, 0.0, 2.7, 3000.0] {
                let expected = (values(&out(value)), values(&lse(value)));
                let seen = (out(value), lse(value));
                let unseen = (out(0.0), lse(infinity));
                let first = merge(seen.clone(), unseen.clone());
                assert_eq!((values(&first.0), values(&first.1)), expected);
                let second = merge(unseen, seen);
                assert_eq!((values(&second.0), values(&second.1)), expected);
            }
            let neither = merge((out(0.0), lse(infinity)), (out(0.0), lse(infinity)));
            assert_eq!(values(&neither.0), [0.0, 0.0]);
            assert_eq!(values(&neither.1), [infinity]);
            // Far apart, the larger logsumexp wins whole; equal, each side is a half.
            let far = merge((out(1.0), lse(-9000.0)), (out(2.0), lse(9000.0)));
            assert_eq!(
                (values(&far.0), values(&far.1)),
                (vec![2.0; 2], vec![9000.0])
            );
            let equal = merge((out(1.0), lse(9.0)), (out(2.0), lse(9.0)));
            assert_eq!(values(&equal.0), [1.5, 1.5]);
            assert_close!(equal.1, lse(9.0 + 2f64.ln()), 1e-7);
        }
    }

    #[test]
    fn tiles_keep_a_blocks_scores_below_the_bound_and_cover_every_head_once() {
        let mut case = plain(5, 8, 300, 700, Mask::Full);
        case.problem.heads = HeadRange {
            query: 3..29,
            group: 4,
        };
        let sizes = Sizes {
            q: [5, 300, 26, 4],
            k: [5, 700, 8, 4],
            v: [5, 700, 8, 3],
        };
        for scores_bytes in [1, 10_000, 1 << 20, 16 << 20, 1 << 30] {
            let blocks = Blocks {
                scores_bytes,
                ..Blocks::DEFAULT
            };
            let mut covered = vec![0; 5 * 26];
            for tile in tiles(blocks, &sizes, &case.problem, DType::F64) {
                assert_eq!(tile.query_heads.len(), tile.kv_heads.len() * tile.group);
                let rows = tile.query_heads.len() * tile.query_block;
                let bytes = tile.samples.len() * rows * 512 * DType::F64.size();
                assert!(bytes <= scores_bytes || tile.query_block == 1);
                for sample in tile.samples {
                    for head in tile.query_heads.clone() {
                        covered[sample * 26 + head] += 1;
                    }
                }
            }
            assert_eq!(covered, [1; 5 * 26]);
        }
    }

    #[test]
    fn gradient_checkpointing_changes_nothing() {
        let device = Device::flex();
        let case = plain(2, 2, 7, 9, Mask::Causal);
        let plain = ours(&case, Way::Best, &device);
        let balanced = device.clone().autodiff().gradient_checkpointing();
        let [q, k, v, dout] = case.inputs(&balanced, DType::F64);
        let leaves = [q, k, v].map(|x| x.detach().require_grad());
        // Memory-bound neighbours, which checkpointing does repeat.
        let [q, k, v] = leaves.clone().map(|x| x.mul_scalar(2.0).mul_scalar(0.5));
        let (out, lse) = softmax_attention(q, k, v, case.problem);
        assert!(!lse.is_tracked());
        // Devices are equal with and without autodiff: the strategy tells them apart.
        let strategy = balanced.gradient_checkpointing_strategy();
        assert!(strategy.is_some());
        assert_eq!(lse.gradient_checkpointing_strategy(), strategy);
        let gradients = (out * dout).sum().backward();
        for (leaf, expected) in leaves.iter().zip(&plain.gradients) {
            assert_eq!(values(&leaf.grad(&gradients).unwrap()), values(expected));
        }
    }

    #[test]
    fn inputs_without_autodiff_give_outputs_without_it() {
        let device = Device::flex();
        let case = plain(1, 1, 2, 2, Mask::Full);
        let [q, k, v, _] = case.inputs(&device, DType::F32);
        let (out, lse) = softmax_attention(q, k, v, case.problem);
        assert!(!out.is_autodiff() && !lse.is_autodiff());
    }

    #[test]
    fn the_same_inputs_give_the_same_bits() {
        let device = Device::flex();
        let mut case = plain(2, 4, 70, 90, Mask::Causal);
        case.dtype = DType::F32;
        let blocks = Blocks {
            query: 16,
            key: 32,
            scores_bytes: 10_000,
        };
        for way in ways(&case, blocks) {
            let (a, b) = (ours(&case, way, &device), ours(&case, way, &device));
            assert_eq!(values(&a.out), values(&b.out));
            for (a, b) in a.gradients.iter().zip(&b.gradients) {
                assert_eq!(values(a), values(b));
            }
        }
    }

    #[test]
    fn kernels_give_the_same_bits_on_any_number_of_threads_and_in_tiles_of_any_rows() {
        let Some(level) = Level::detect() else { return };
        let device = Device::flex();
        // One kv head, so that its queries are cut into chunks.
        let mut case = plain(1, 2, 700, 300, Mask::Causal);
        case.dtype = DType::F32;
        case.problem.heads.group = 2;
        let tiling = |rows| Tiling {
            rows,
            strip: rows.div_ceil(3),
            keys: 64,
        };
        let run = |threads, rows| {
            let threads = rayon::ThreadPoolBuilder::new().num_threads(threads);
            (threads.build().unwrap())
                .install(|| ours(&case, Way::Flex(level, tiling(rows)), &device))
        };
        let expected = run(1, 40);
        for (threads, rows) in [(3, 40), (2, 40)] {
            let found = run(threads, rows);
            assert_eq!(values(&found.out), values(&expected.out));
            assert_eq!(values(&found.lse), values(&expected.lse));
            for (found, expected) in found.gradients.iter().zip(&expected.gradients) {
                assert_eq!(values(found), values(expected));
            }
        }
        let found = run(2, 14);
        assert_eq!(values(&found.out), values(&expected.out));
        assert_eq!(values(&found.lse), values(&expected.lse));
    }

    #[test]
    fn kernels_read_any_view_as_they_read_a_copy_of_it() {
        let device = Device::flex();
        let mut case = plain(2, 3, 20, 30, Mask::Causal);
        (case.dtype, case.width) = (DType::F32, 12);
        let [q, k, v, dout] = case.inputs(&device, DType::F32);
        let copies = [&q, &k, &v, &dout].map(Tensor::clone);
        // Permuted, cut out of more, repeated, and backwards.
        let apart = |x: Tensor<4>| {
            let data = x.clone().swap_dims(1, 3).into_data();
            Tensor::<4>::from_data(data, &device).swap_dims(1, 3)
        };
        let part = |x: Tensor<4>| {
            let [b, l, h, w] = x.dims();
            let larger = Tensor::<4>::zeros([b, l + 2, h + 1, w + 3], &device);
            let place = s![.., 1..l + 1, 1.., 2..w + 2];
            larger.slice_assign(place, x).slice(place)
        };
        let flipped = |x: Tensor<4>| x.flip([1, 3]).flip([1, 3]);
        let views = [part(apart(q)), apart(k), flipped(v), part(dout)];
        let run = |[q, k, v, dout]: [Tensor<4>; 4]| {
            let (out, lse) = forward(q.clone(), k.clone(), v.clone(), &case.problem);
            let gradients = backward(q, k, v, out.clone(), lse.clone(), dout, &case.problem);
            (out, lse, gradients)
        };
        let (found, expected) = (run(views), run(copies));
        assert_eq!(values(&found.0), values(&expected.0));
        assert_eq!(values(&found.1), values(&expected.1));
        assert_eq!(values(&found.2.0), values(&expected.2.0));
        assert_eq!(values(&found.2.1), values(&expected.2.1));
        assert_eq!(values(&found.2.2), values(&expected.2.2));
    }

    #[test]
    fn kernels_are_right_over_many_tiles_of_their_own_sizes() {
        let device = Device::flex();
        let documents = Documents::new([100, 130, 400]).unwrap();
        let within = Within::Causal;
        let window = NonZeroUsize::new(333).unwrap();
        // Of so few heads the gradients are computed in chunks of queries, and a draw knows nothing of those.
        let dropping = Dropout::new(0.4, DropoutKey::default()).unwrap();
        for (mask, query_positions, key_positions, dropout) in [
            (Mask::Full, vec![0..401], vec![0..531], None),
            (
                Mask::Causal,
                vec![0..130, 400..600],
                vec![0..300, 350..601],
                None,
            ),
            (Mask::Causal, vec![0..530], vec![0..530], Some(dropping)),
            (
                Mask::Window { size: window },
                vec![0..700],
                vec![0..700],
                None,
            ),
            (
                Mask::Packed { documents, within },
                vec![0..513],
                vec![300..513, 0..300],
                None,
            ),
            (
                Mask::KeyLengths([520, 0].into()),
                vec![0..300],
                vec![0..530],
                None,
            ),
        ] {
            for (width, value_width) in [(64, 64), (72, 40), (5, 33)] {
                let mut case = plain(2, 5, 0, 0, mask.clone());
                (case.problem.query_positions, case.problem.key_positions) =
                    (query_positions.clone(), key_positions.clone());
                case.problem.heads = HeadRange {
                    query: 1..6,
                    group: 3,
                };
                case.problem.scale = 1.0 / (width as f64).sqrt();
                case.problem.dropout = dropout;
                (case.width, case.value_width) = (width, value_width);
                let expected = ours(&case, Way::Portable(Blocks::DEFAULT), &device);
                case.dtype = DType::F32;
                ours(&case, Way::Best, &device).assert_close(&expected, 1e-5);
            }
        }
    }

    /// How far one is from the other, relative to its size.
    fn distance<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>) -> f64 {
        let (found, expected) = (values(found), values(expected));
        let squares = |x: Vec<f64>| x.into_iter().map(|x| x * x).sum::<f64>();
        let between = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
        (squares(between) / squares(expected)).sqrt()
    }

    /// A long row's attention in 16 bits, and what half of a last place is to a number of that type.
    fn cases_of_16_bits() -> impl Iterator<Item = (Case, f64)> {
        [(DType::BF16, 2f64.powi(-9)), (DType::F16, 2f64.powi(-12))]
            .into_iter()
            .map(|(dtype, half_a_place)| {
                let mut case = plain(1, 4, 300, 2100, Mask::Causal);
                case.problem.query_positions = vec![1800..2100];
                case.problem.heads.group = 2;
                (case.width, case.value_width) = (16, 16);
                case.dtype = dtype;
                (case, half_a_place)
            })
    }

    impl Results {
        /// 16 bits are rounded where a result begins and ends, and nothing in between is: errors do not grow with
        /// the length. The output, which is rounded before it goes back, may add as much as the gradient's own end.
        fn assert_rounded_at_the_ends(&self, expected: &Self, half_a_place: f64) {
            assert_eq!(self.lse.dtype(), DType::F32);
            assert_close!(self.lse, expected.lse, 1e-6);
            let found = self.gradients.iter().chain([&self.out]);
            let expected = expected.gradients.iter().chain([&expected.out]);
            for (found, expected) in found.zip(expected) {
                let distance = distance(found, expected);
                assert!(distance <= 2.0 * half_a_place, "{distance:e}");
            }
        }
    }

    #[test]
    fn sixteen_bits_are_computed_in_f32_and_rounded_once() {
        let device = Device::flex();
        let dropout = Dropout::new(0.3, DropoutKey::default()).unwrap();
        for dropout in [None, Some(dropout)] {
            for (mut case, half_a_place) in cases_of_16_bits() {
                case.problem.dropout = dropout;
                let found = ours(&case, Way::Best, &device);
                assert_eq!(found.out.dtype(), case.dtype);
                found.assert_rounded_at_the_ends(&naive(&case, &device), half_a_place);
            }
        }
    }

    #[test]
    fn parts_of_16_bits_merge_in_f32_and_share_their_backward() {
        let device = Device::flex();
        for (case, half_a_place) in cases_of_16_bits() {
            let [q, k, v, dout] = case.inputs(&device, case.dtype);
            let parts = [0..700, 700..1400, 1400..2100].map(|keys: Range<usize>| {
                let part = |x: &Tensor<4>| x.clone().slice(s![.., keys.clone(), .., ..]);
                let (k, v) = (part(&k), part(&v));
                let mut problem = case.problem.clone();
                problem.key_positions = vec![keys];
                (k, v, problem)
            });
            let [first, second, third] = parts
                .each_ref()
                .map(|(k, v, problem)| forward(q.clone(), k.clone(), v.clone(), problem));
            let two = merge(first.clone(), second.clone());
            assert_eq!((two.0.dtype(), two.1.dtype()), (case.dtype, DType::F32));
            let first = (first.0.cast(DType::F32), first.1);
            let (out, lse) = merge(merge(first, second), third);
            let mut dq = q.zeros_like().cast(DType::F32);
            let (mut dk, mut dv) = (Vec::new(), Vec::new());
            for (k, v, problem) in parts {
                let (q, out, lse, dout) = (q.clone(), out.clone(), lse.clone(), dout.clone());
                let part = backward(q, k, v, out, lse, dout, &problem);
                dq = dq + part.0.cast(DType::F32);
                dk.push(part.1);
                dv.push(part.2);
            }
            let gradients = [dq, Tensor::cat(dk, 1), Tensor::cat(dv, 1)];
            let expected = naive(&case, &device);
            Results {
                out,
                lse,
                gradients,
            }
            .assert_rounded_at_the_ends(&expected, half_a_place);
        }
    }

    #[test]
    fn dropout_with_probability_0_changes_no_bit() {
        let device = Device::flex();
        let mut case = plain(2, 4, 9, 11, Mask::Causal);
        case.dtype = DType::F32;
        let mut dropping = case.clone();
        dropping.problem.dropout = Some(Dropout::new(0.0, DropoutKey::default()).unwrap());
        for way in ways(&case, case.blocks) {
            let [without, with] = [&case, &dropping].map(|case| ours(case, way, &device));
            assert_eq!(values(&with.out), values(&without.out));
            assert_eq!(values(&with.lse), values(&without.lse));
            for (a, b) in with.gradients.iter().zip(&without.gradients) {
                assert_eq!(values(a), values(b));
            }
        }
    }

    #[test]
    fn dropout_leaves_the_logsumexp_and_the_mean_of_the_output() {
        let device = Device::flex();
        // Of equal weights and values of one, an output is the share of what is kept, scaled.
        let (queries, keys, probability) = (64, 256, 0.3);
        let mut case = plain(1, 2, queries, keys, Mask::Full);
        let [q, k, v, _] = case.inputs(&device, DType::F64);
        let (q, v) = (q.zeros_like(), v.ones_like());
        let without = forward(q.clone(), k.clone(), v.clone(), &case.problem);
        case.problem.dropout = Some(Dropout::new(probability, DropoutKey::default()).unwrap());
        let with = forward(q, k, v, &case.problem);
        assert_eq!(values(&with.1), values(&without.1));
        let outputs = values(&with.0);
        let mean = outputs.iter().sum::<f64>() / outputs.len() as f64;
        // Five standard deviations of a mean of all pairs.
        let pairs = (2 * queries * keys) as f64;
        let bound = 5.0 * (probability / (1.0 - probability) / pairs).sqrt();
        assert!((mean - 1.0).abs() < bound, "{mean}");
        assert!(outputs.iter().any(|x| (x - 1.0).abs() > 1e-3));
    }

    #[test]
    #[should_panic(expected = "one global number")]
    fn samples_without_a_global_number_are_refused() {
        let mut case = plain(2, 1, 2, 2, Mask::Full);
        let [q, k, v, _] = case.inputs(&Device::flex(), DType::F32);
        case.problem.samples = vec![3..4];
        let _ = forward(q, k, v, &case.problem);
    }

    #[test]
    #[should_panic(expected = "must have a row per position")]
    fn positions_that_are_not_one_per_row_are_refused() {
        let mut case = plain(1, 1, 2, 2, Mask::Full);
        let [q, k, v, _] = case.inputs(&Device::flex(), DType::F32);
        case.problem.query_positions = vec![0..1];
        let _ = forward(q, k, v, &case.problem);
    }

    #[test]
    #[should_panic(expected = "must hold the query heads")]
    fn kv_heads_other_than_those_of_the_query_heads_are_refused() {
        let mut case = plain(1, 4, 2, 2, Mask::Full);
        let [q, k, v, _] = case.inputs(&Device::flex(), DType::F32);
        case.problem.heads = HeadRange {
            query: 2..6,
            group: 2,
        };
        let _ = forward(q, k, v, &case.problem);
    }
}

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

use std::ops::Range;

use burn::tensor::{Bool, DType, Device, Tensor, TensorData, s};

use super::problem::{HeadRange, Problem, Segment, Sizes, positions_of};
use crate::attention::Visibility;
use crate::matmul::matmul;

/// The sizes of a block. Results depend on them by rounding only.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    /// Queries in a block.
    pub(super) query: usize,
    /// Keys in a block.
    pub(super) key: usize,
    /// What the scores of a block may take, over all its samples and heads.
    pub(super) scores_bytes: usize,
}

impl Blocks {
    /// One block of keys covers common short axes (a frame's patches, a clip's frames), which then
    /// need no merge. The scores of a block and their few temporaries stay in a CPU's cache.
    pub(super) const DEFAULT: Self = Self {
        query: 256,
        key: 512,
        scores_bytes: 4 << 20,
    };
}

pub(super) fn forward_in(
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
    for tile in tiles(blocks, &sizes, &problem.heads, dtype) {
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
pub(super) fn backward_in(
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
    for tile in tiles(blocks, &sizes, &problem.heads, dtype) {
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

/// Samples × kv heads of one segment that are computed together.
struct Tile {
    samples: Range<usize>,
    query_heads: Range<usize>,
    kv_heads: Range<usize>,
    group: usize,
    query_block: usize,
}

/// The tiles of a problem: as many samples and heads at once as the bound on the scores allows.
fn tiles(blocks: Blocks, sizes: &Sizes, held: &HeadRange, dtype: DType) -> Vec<Tile> {
    let [batch, queries, ..] = sizes.q;
    let keys = sizes.k[1].min(blocks.key);
    let scores = blocks.scores_bytes / dtype.size();
    let mut tiles = Vec::new();
    if queries == 0 || keys == 0 {
        return tiles;
    }
    for segment in held.segments() {
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
pub(super) fn merge_rows(
    a: (Tensor<4>, Tensor<4>),
    b: (Tensor<4>, Tensor<4>),
) -> (Tensor<4>, Tensor<4>) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_keep_a_blocks_scores_below_the_bound_and_cover_every_head_once() {
        let heads = HeadRange {
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
            for tile in tiles(blocks, &sizes, &heads, DType::F64) {
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
}

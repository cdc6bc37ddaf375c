//! Attention on shards: which dims of an activation are attended over, and which ride along as samples.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;

use super::{Dropout, HeadRange, Kernel, Mask, Problem, linear, softmax_attention};
use crate::blocks::DIMS;
use crate::error::Error;
use crate::layout::{AxisSet, Layout, SeqAxis, Shard};
use crate::shape::reshape;
use crate::strategy::{AttentionScope, Form};
use crate::vjp::attach1;

/// The heads of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key-value heads: as many, or a divisor (grouped-query attention).
    pub key_value: usize,
    /// The dim of each.
    pub dim: usize,
}

impl Heads {
    /// As many key-value heads as query heads.
    pub fn multi(heads: usize, dim: usize) -> Self {
        Self {
            query: heads,
            key_value: heads,
            dim,
        }
    }

    /// How many query heads share a key-value head.
    pub fn group(self) -> usize {
        self.query / self.key_value
    }
}

/// Whether an attention's logsumexp is wanted beside its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Logsumexp {
    /// It is, laid out as the queries; a strategy may have to send it for that.
    Wanted,
    /// It is not.
    #[default]
    Unwanted,
}

/// What an attention returns.
#[derive(Debug, Clone)]
pub struct Attended {
    /// `[B, s1, s2, s3, heads·d]`, laid out as the queries.
    pub output: Shard,
    /// `[B, s1, s2, s3, heads]`, untracked, if it was wanted and the attention is softmax attention.
    pub logsumexp: Option<Shard>,
}

/// Which part of an attention is computed here.
#[derive(Debug, Clone, Copy)]
pub struct HeldAttention<'a> {
    /// The axes over which it runs jointly.
    pub axes: AxisSet,
    /// The heads that are held, numbered over all ranks.
    pub heads: &'a HeadRange,
    /// Which keys a query sees.
    pub mask: &'a Mask,
    /// Softmax or linear.
    pub form: &'a Form,
    /// What the scores are multiplied with.
    pub scale: f64,
    /// Which probabilities are dropped, if any.
    pub dropout: Option<Dropout>,
}

/// Refuses queries, keys or values whose channels are not those of the heads that a rank holds.
///
/// # Errors
/// [`Error::Shape`] with what was given and what fits.
pub fn check_heads(channels: [usize; 3], heads: &HeadRange, dim: usize) -> Result<(), Error> {
    let (queries, keys) = (heads.query.len(), heads.kv().len());
    if channels == [queries * dim, keys * dim, keys * dim] {
        return Ok(());
    }
    Err(Error::Shape {
        what: "the attention's query, key and value",
        got: channels.to_vec(),
        rule: format!(
            "their channels must be {queries}, {keys} and {keys} heads of {dim}: those that this rank holds"
        ),
    })
}

/// Refuses dropout of a linear attention: it has no probabilities that could be dropped.
///
/// # Errors
/// [`Error::LinearDropout`].
pub fn check_dropout(form: &Form, dropout: Option<Dropout>) -> Result<(), Error> {
    match (form, dropout) {
        (Form::Softmax, _) | (_, None) => Ok(()),
        (_, Some(dropout)) => Err(Error::LinearDropout {
            probability: dropout.probability(),
        }),
    }
}

/// A self-attention within what this rank holds: exact if the keys' attended axes are whole.
///
/// # Shapes
/// - `qkv`: `[B, s1, s2, s3, heads·d]` each, of the heads that the rank holds
/// - returns: laid out as the query
///
/// # Errors
/// [`Error::AttendsSplitAxis`] if the keys are split along an attended axis.
pub fn attend_local(qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
    let attention = scope.attention;
    let layout = qkv[0].layout().clone();
    let rank = qkv[0].rank();
    let (output, lse) = attend_held(
        qkv,
        HeldAttention {
            axes: attention.axes,
            heads: scope.heads,
            mask: &attention.mask,
            form: &attention.form,
            scale: attention.scale,
            dropout: scope.dropout,
        },
    )?;
    let logsumexp = match (scope.logsumexp, lse) {
        (Logsumexp::Wanted, Some(lse)) => Some(Shard::new(lse, layout.clone(), rank)?),
        _ => None,
    };
    Ok(Attended {
        output: Shard::new(output, layout, rank)?,
        logsumexp,
    })
}

/// The attention of some heads, given all the keys that their queries see.
///
/// # Shapes
/// - `qkv`: `[B, s1, s2, s3, heads·d]` each, of the held heads
/// - returns: the output in the query's shape, and the logsumexp `[B, s1, s2, s3, heads]`, untracked, which
///   linear attention does not have
///
/// # Errors
/// [`Error::AttendsSplitAxis`] if the keys are split along an attended axis, [`Error::Shape`] if queries and
/// keys differ along an axis that is not attended, [`Error::LinearDropout`] for dropout of a linear attention.
pub fn attend_held(
    qkv: [Shard; 3],
    held: HeldAttention<'_>,
) -> Result<(Tensor<DIMS>, Option<Tensor<DIMS>>), Error> {
    let [query, key, value] = qkv;
    check_dropout(held.form, held.dropout)?;
    for axis in SeqAxis::ALL {
        if held.axes.contains(axis) {
            if key.layout().is_split(axis) {
                return Err(Error::AttendsSplitAxis { axis });
            }
        } else if query.positions(axis) != key.positions(axis) {
            return Err(Error::Shape {
                what: "an attention's key",
                got: key.tensor().dims().to_vec(),
                rule: format!("queries and keys must hold the same positions of {axis}"),
            });
        }
    }
    let fold = Fold::new(query.tensor().dims(), held.axes);
    let key_fold = Fold::new(key.tensor().dims(), held.axes);
    let (queries, keys) = (held.heads.query.len(), held.heads.kv().len());
    let kernel = match held.form {
        Form::Softmax => Kernel::Softmax(Problem {
            heads: held.heads.clone(),
            mask: fold.mask(held.mask),
            query_positions: positions(query.layout(), held.axes, query.rank()),
            key_positions: positions(key.layout(), held.axes, key.rank()),
            scale: held.scale,
            dropout: held.dropout,
            samples: samples(query.layout(), held.axes, fold.batch(), query.rank()),
        }),
        Form::Linear { decay } => Kernel::Linear(linear::Problem {
            heads: held.heads.clone(),
            decay: decay.clone(),
            scale: held.scale,
        }),
    };
    let (output, lse) = kernel.attend([
        fold.fold(query.into_tensor(), queries),
        key_fold.fold(key.into_tensor(), keys),
        key_fold.fold(value.into_tensor(), keys),
    ]);
    let lse = lse.map(|lse| {
        let [samples, rows, heads] = lse.dims();
        fold.unfold(reshape(lse, [samples, rows, heads, 1]))
    });
    Ok((fold.unfold(output), lse))
}

/// Attention of an activation to keys and values that every rank holds: text conditioning. Nothing is sent;
/// the gradients of `key` and `value` are this rank's terms of a sum over the ranks.
///
/// # Shapes
/// - `query`: `[B, s1, s2, s3, heads·d]`, of the held heads
/// - `key`, `value`: `[B, length, heads·d]`, of theirs
/// - `lengths`: per sample, how many of the keys count
/// - returns: laid out as the query
///
/// # Errors
/// [`Error::Shape`] if the shapes do not fit each other.
pub fn cross_attention(
    query: Shard,
    key: Tensor<3>,
    value: Tensor<3>,
    (heads, dim): (&HeadRange, usize),
    lengths: Arc<[usize]>,
) -> Result<Shard, Error> {
    let [batch, s1, s2, s3, channels] = query.tensor().dims();
    let [key_batch, length, key_channels] = key.dims();
    let [_, _, value_channels] = value.dims();
    check_heads([channels, key_channels, value_channels], heads, dim)?;
    let fits = key_batch == batch && value.dims()[..2] == key.dims()[..2] && lengths.len() == batch;
    if !fits {
        return Err(Error::Shape {
            what: "a cross-attention's key",
            got: key.dims().to_vec(),
            rule: format!(
                "{batch} samples with {} lengths need as many samples of keys and values",
                lengths.len()
            ),
        });
    }
    let rows = s1 * s2 * s3;
    let (queries, keys) = (heads.query.len(), heads.kv().len());
    let mask = if lengths.iter().all(|&count| count >= length) {
        Mask::Full
    } else {
        Mask::KeyLengths(lengths)
    };
    let problem = Problem {
        heads: heads.clone(),
        mask,
        query_positions: nonempty(0..rows),
        key_positions: nonempty(0..length),
        scale: (dim as f64).powf(-0.5),
        dropout: None,
        samples: nonempty(0..batch),
    };
    let key = reshape(key, [batch, length, keys, dim]);
    let value = reshape(value, [batch, length, keys, dim]);
    Ok(query.map(|query| {
        let query = reshape(query, [batch, rows, queries, dim]);
        let (output, _) = softmax_attention(query, key, value, problem);
        reshape(output, [batch, s1, s2, s3, channels])
    })?)
}

/// `[B, s1, s2, s3, H·d]` seen as `[samples, rows, H, d]`: attended axes are rows, the others samples.
///
/// What a strategy needs that brings an attention of its own: it folds what it holds, attends with
/// [`forward`](super::forward), [`merge`](super::merge) and [`backward`](super::backward), and unfolds.
#[derive(Debug, Clone)]
pub struct Fold {
    dims: [usize; DIMS],
    /// Batch, the axes that are not attended, those that are, channels.
    order: [usize; DIMS],
    samples: usize,
    rows: usize,
}

impl Fold {
    /// How a local tensor of shape `dims` is folded for an attention over `axes`.
    pub fn new(dims: [usize; DIMS], axes: AxisSet) -> Self {
        let mut order = [0, 0, 0, 0, 4];
        let (mut next, mut samples, mut rows) = (1, dims[0], 1);
        for attended in [false, true] {
            for axis in SeqAxis::ALL {
                if axes.contains(axis) == attended {
                    order[next] = axis.dim();
                    next += 1;
                    if attended {
                        rows *= dims[axis.dim()];
                    } else {
                        samples *= dims[axis.dim()];
                    }
                }
            }
        }
        Self {
            dims,
            order,
            samples,
            rows,
        }
    }

    /// `[B, s1, s2, s3, H·d]` to `[samples, rows, H, d]`: a view where the strides allow it.
    pub fn fold(&self, x: Tensor<DIMS>, heads: usize) -> Tensor<4> {
        let dim = x.dims()[4].checked_div(heads).unwrap_or(0);
        let folded = self.folded(x.clone().inner(), [heads, dim]);
        let this = self.clone();
        attach1(x, folded, move |gradient| {
            Ok::<_, Infallible>(this.unfolded(gradient))
        })
    }

    /// `[samples, rows, H, d]` back to `[B, s1, s2, s3, H·d]`.
    pub fn unfold(&self, x: Tensor<4>) -> Tensor<DIMS> {
        let ([_, _, heads, dim], this) = (x.dims(), self.clone());
        let unfolded = self.unfolded(x.clone().inner());
        attach1(x, unfolded, move |gradient| {
            Ok::<_, Infallible>(this.folded(gradient, [heads, dim]))
        })
    }

    fn folded(&self, x: Tensor<DIMS>, [heads, dim]: [usize; 2]) -> Tensor<4> {
        let x = x.permute(self.order.map(|dim| dim as isize));
        reshape(x, [self.samples, self.rows, heads, dim])
    }

    fn unfolded(&self, x: Tensor<4>) -> Tensor<DIMS> {
        let [_, _, heads, dim] = x.dims();
        let mut shape = self.order.map(|dim| self.dims[dim]);
        shape[4] = heads * dim;
        let mut back = [0; DIMS];
        for (place, &dim) in self.order.iter().enumerate() {
            back[dim] = place as isize;
        }
        reshape(x, shape).permute(back)
    }

    /// The samples before folding.
    pub fn batch(&self) -> usize {
        self.dims[0]
    }

    /// The mask with one length for each folded sample.
    pub fn mask(&self, mask: &Mask) -> Mask {
        match mask {
            Mask::KeyLengths(lengths) if self.dims[0] > 0 => {
                let copies = self.samples / self.dims[0];
                let lengths = lengths
                    .iter()
                    .flat_map(|&length| std::iter::repeat_n(length, copies));
                Mask::KeyLengths(lengths.collect())
            }
            mask => mask.clone(),
        }
    }
}

fn nonempty(range: Range<usize>) -> Vec<Range<usize>> {
    if range.is_empty() {
        vec![]
    } else {
        vec![range]
    }
}

/// The global positions of a rank's rows in the attended axes, row by row, the axes' last varying fastest.
pub fn positions(layout: &Layout, axes: AxisSet, rank: usize) -> Vec<Range<usize>> {
    positions_in(layout.lengths(), axes, |axis| layout.ranges(axis, rank))
}

/// The same of any ranges of the axes, whose global lengths are `lengths`.
pub fn positions_in(
    lengths: [usize; 3],
    axes: AxisSet,
    ranges: impl Fn(SeqAxis) -> Vec<Range<usize>>,
) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = std::iter::once(0..1).collect();
    for axis in axes.iter() {
        let length = lengths[axis.index()];
        let ranges = ranges(axis);
        let outer = found.into_iter().flatten();
        let mut next: Vec<Range<usize>> = Vec::new();
        for position in outer {
            for range in &ranges {
                let (start, end) = (
                    position * length + range.start,
                    position * length + range.end,
                );
                match next.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => next.push(start..end),
                }
            }
        }
        found = next;
    }
    found
}

/// The global numbers of a rank's samples in an attention over `axes`, in the order of [`Fold`]: the batch times the
/// positions along the other axes, numbered as [`positions`] are.
pub fn samples(layout: &Layout, axes: AxisSet, batch: usize, rank: usize) -> Vec<Range<usize>> {
    let others: Vec<SeqAxis> = SeqAxis::ALL
        .into_iter()
        .filter(|&axis| !axes.contains(axis))
        .collect();
    let all: usize = others.iter().map(|&axis| layout.length(axis)).product();
    let beside = positions(layout, AxisSet::of(&others), rank);
    let mut found: Vec<Range<usize>> = Vec::new();
    for first in (0..batch).map(|sample| sample * all) {
        for range in &beside {
            let (start, end) = (first + range.start, first + range.end);
            match found.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => found.push(start..end),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::Partition;

    #[test]
    fn joint_positions_run_over_the_last_axis_fastest_and_skip_what_other_ranks_hold() {
        let layout = Layout::split([2, 4, 1], SeqAxis::SECOND, 2);
        let axes = AxisSet::of(&[SeqAxis::FIRST, SeqAxis::SECOND]);
        assert_eq!(positions(&layout, axes, 0), [0..2, 4..6]);
        assert_eq!(positions(&layout, axes, 1), [2..4, 6..8]);
        let alone = AxisSet::of(&[SeqAxis::FIRST]);
        assert_eq!(
            positions(&layout, alone, 1),
            std::iter::once(0..2).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_zigzag_rank_has_the_positions_of_both_its_chunks() {
        let partition = Partition::zigzag(10, 2);
        let layout = Layout::whole([10, 1, 1])
            .with_split(SeqAxis::FIRST, partition, crate::layout::MeshAxis::whole(2))
            .unwrap();
        let axes = AxisSet::of(&[SeqAxis::FIRST]);
        assert_eq!(positions(&layout, axes, 0), [0..3, 8..10]);
    }

    #[test]
    fn samples_are_numbered_over_the_batch_and_the_axes_beside_the_attended_one() {
        let layout = Layout::split([2, 4, 1], SeqAxis::SECOND, 2);
        let first = AxisSet::of(&[SeqAxis::FIRST]);
        assert_eq!(samples(&layout, first, 2, 0), [0..2, 4..6]);
        assert_eq!(samples(&layout, first, 2, 1), [2..4, 6..8]);
        // What is split is attended: every rank has a part of every sample.
        let second = AxisSet::of(&[SeqAxis::SECOND]);
        let all: Vec<_> = std::iter::once(0..6).collect();
        assert_eq!(samples(&layout, second, 3, 1), all);
        assert!(samples(&layout, first, 0, 1).is_empty());
    }
}

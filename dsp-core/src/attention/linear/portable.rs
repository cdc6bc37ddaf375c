//! Linear attention in chunks by Burn's operations: on any backend, in any float type.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::super::chunks::Direction;
use super::{GradientsWithin, Problem, States, ranges};
use crate::matmul::matmul;
use crate::precision::computed_in;

impl Problem {
    /// Which of the held key-value heads each held query head attends with.
    fn kv_heads(&self) -> Vec<usize> {
        (0..self.decays().len())
            .map(|head| self.kv_head(head))
            .collect()
    }

    /// `λ^power(i)` for each head and row: `[1, H, rows, 1]`.
    pub(super) fn powers(
        &self,
        rows: usize,
        power: impl Fn(usize) -> usize,
        like: (&Device, DType),
    ) -> Tensor<4> {
        let decays = self.decays();
        let values = decays.iter().flat_map(|decay| {
            (0..rows)
                .map(|row| raised(*decay, power(row)))
                .collect::<Vec<_>>()
        });
        let data = TensorData::new(values.collect::<Vec<f64>>(), [1, decays.len(), rows, 1]);
        Tensor::from_data(data, like)
    }

    /// `λ^{i−j}` for each head, 0 where `j > i`: `[1, H, rows, rows]`.
    fn triangle(&self, rows: usize, like: (&Device, DType)) -> Tensor<4> {
        let decays = self.decays();
        let mut values = Vec::with_capacity(decays.len() * rows * rows);
        for &decay in decays {
            for i in 0..rows {
                values.extend((0..rows).map(|j| match i.checked_sub(j) {
                    Some(distance) => raised(decay, distance),
                    None => 0.0,
                }));
            }
        }
        Tensor::from_data(TensorData::new(values, [1, decays.len(), rows, rows]), like)
    }
}

/// `decay^power`.
pub(super) fn raised(decay: f64, power: usize) -> f64 {
    match i32::try_from(power) {
        Ok(power) => decay.powi(power),
        Err(_) => decay.powf(power as f64),
    }
}

/// The states along a chunk, each block of which adds the outer products of its rows of `a` and `b`.
pub(super) fn states(
    block: usize,
    [a, b]: [&Tensor<4>; 2],
    direction: Direction,
    problem: &Problem,
) -> States {
    let [a, b] = match direction {
        Direction::Forward => [Rows::kv(a, problem), Rows::kv(b, problem)],
        Direction::Backward => [Rows::query(a, problem.scale), Rows::query(b, 1.0)],
    };
    let mut last = a.no_state(&b);
    let blocks = blocks([&a, &b], block);
    let mut order: Vec<_> = blocks.iter().collect();
    if direction == Direction::Backward {
        order.reverse();
    }
    let [samples, heads, d, dv] = last.dims();
    let (mut met, mut tables) = (Vec::new(), None);
    for rows in order {
        let tables = Tables::of(&mut tables, problem, rows.len(), a.like());
        let weights = match direction {
            Direction::Forward => tables.aged.clone(),
            Direction::Backward => tables.reached.clone(),
        };
        met.push(last.clone().unsqueeze_dim::<5>(2));
        last = outer(a.part(rows) * weights, b.part(rows)) + last * tables.whole.clone();
    }
    if direction == Direction::Backward {
        met.reverse();
    }
    let met = match met.is_empty() {
        true => Tensor::zeros([samples, heads, 0, d, dv], a.like()),
        false => Tensor::cat(met, 2),
    };
    States {
        last,
        met,
        block,
        length: a.length(),
        direction,
    }
}

/// The state that a block meets: `[B, Hq, d, dv]`.
fn of_block(states: &States, block: usize) -> Tensor<4> {
    states.met.clone().narrow(2, block, 1).squeeze_dim(2)
}

/// What the rows of each block give each other: `[B, L, Hq, dv]`, in f32 at least.
pub(super) fn within(block: usize, [q, k, v]: [&Tensor<4>; 3], problem: &Problem) -> Tensor<4> {
    let [batch, length, heads, _] = q.dims();
    let shape = [batch, length, heads, v.dims()[3]];
    let (q, k, v) = (
        Rows::query(q, problem.scale),
        Rows::kv(k, problem),
        Rows::kv(v, problem),
    );
    let mut tables = None;
    let of_block = |rows: Range<usize>| {
        let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
        let weights = scores(q.part(&rows), k.part(&rows)) * tables.triangle.clone();
        matmul(weights, v.part(&rows))
    };
    let blocks = blocks([&q, &v], block);
    let parts = blocks.into_iter().map(of_block);
    joined(parts.collect(), shape, q.like())
}

/// What the states that the blocks meet give their rows: `[B, L, Hq, dv]`, in f32 at least.
pub(super) fn from_before(q: &Tensor<4>, states: &States, problem: &Problem) -> Tensor<4> {
    let [batch, length, heads, _] = q.dims();
    let shape = [batch, length, heads, states.last.dims()[3]];
    let q = Rows::query(q, problem.scale);
    let mut tables = None;
    let parts = states
        .blocks()
        .into_iter()
        .enumerate()
        .map(|(index, rows)| {
            let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
            let reached = q.part(&rows) * tables.reached.clone();
            matmul(reached, of_block(states, index))
        });
    joined(parts.collect(), shape, q.like())
}

/// As [`super::gradients_within`].
pub(super) fn gradients_within(
    [q, k, v]: [&Tensor<4>; 3],
    states: &States,
    dout: &Tensor<4>,
    problem: &Problem,
) -> GradientsWithin {
    let shapes = [q, k, v].map(Tensor::dims);
    let (q, k, v, dout) = (
        Rows::query(q, problem.scale),
        Rows::kv(k, problem),
        Rows::kv(v, problem),
        Rows::query(dout, 1.0),
    );
    let mut parts = [const { Vec::new() }; 3];
    let mut tables = None;
    for (index, rows) in states.blocks().into_iter().enumerate() {
        let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
        let [q, k, v, dout] = [&q, &k, &v, &dout].map(|x| x.part(&rows));
        let weights = scores(q.clone(), k.clone()) * tables.triangle.clone();
        let dweights = scores(dout.clone(), v) * tables.triangle.clone();
        let from_before = scores(dout.clone(), of_block(states, index)) * tables.reached.clone();
        let dq = matmul(dweights.clone(), k) + from_before;
        let (dk, dv) = (outer(dweights, q), outer(weights, dout));
        parts[0].push(dq.mul_scalar(problem.scale));
        parts[1].push(of_kv_heads(dk, problem));
        parts[2].push(of_kv_heads(dv, problem));
    }
    let [query, key, value] = parts;
    GradientsWithin {
        query: joined(query, shapes[0], q.like()),
        key: joined(key, shapes[1], q.like()),
        value: joined(value, shapes[2], q.like()),
    }
}

/// What the gradients of the states after the blocks give the gradients of their keys and values, in f32 at least.
pub(super) fn from_after(
    [k, v]: [&Tensor<4>; 2],
    after: &States,
    problem: &Problem,
) -> [Tensor<4>; 2] {
    let shapes = [k, v].map(Tensor::dims);
    let (k, v) = (Rows::kv(k, problem), Rows::kv(v, problem));
    let (mut keys, mut values, mut tables) = (Vec::new(), Vec::new(), None);
    for (index, rows) in after.blocks().into_iter().enumerate() {
        let tables = Tables::of(&mut tables, problem, rows.len(), k.like());
        let state = of_block(after, index);
        let dk = scores(v.part(&rows), state.clone()) * tables.aged.clone();
        let dv = matmul(k.part(&rows) * tables.aged.clone(), state);
        keys.push(of_kv_heads(dk, problem));
        values.push(of_kv_heads(dv, problem));
    }
    [
        joined(keys, shapes[0], k.like()),
        joined(values, shapes[1], k.like()),
    ]
}

/// The powers of the decays that a block of some length needs.
struct Tables {
    rows: usize,
    /// `λ^{i−j}`.
    triangle: Tensor<4>,
    /// `λ^{i+1}`: how a row is reached by the state before the block.
    reached: Tensor<4>,
    /// `λ^{C−1−j}`: how a row enters the state after the block.
    aged: Tensor<4>,
    /// `λ^C`.
    whole: Tensor<4>,
}

impl Tables {
    /// Those of blocks of `rows`: made anew only for the last block, which may be shorter.
    fn of<'a>(
        made: &'a mut Option<Self>,
        problem: &Problem,
        rows: usize,
        like: (&Device, DType),
    ) -> &'a Self {
        if made.as_ref().is_some_and(|tables| tables.rows != rows) {
            *made = None;
        }
        made.get_or_insert_with(|| Self {
            rows,
            triangle: problem.triangle(rows, like),
            reached: problem.powers(rows, |row| row + 1, like),
            aged: problem.powers(rows, |row| rows - 1 - row, like),
            whole: problem.passing(rows, like),
        })
    }
}

/// Queries, keys or values, of which a block at a time is brought into the form in which it is computed: one matrix for
/// each sample and query head, in f32 at least.
struct Rows {
    /// `[B, H, L, ·]`, a view.
    x: Tensor<4>,
    device: Device,
    /// The key-value head of each query head, unless it is its own.
    heads: Option<Vec<usize>>,
    scale: f64,
}

impl Rows {
    fn query(x: &Tensor<4>, scale: f64) -> Self {
        Self {
            x: x.clone().swap_dims(1, 2),
            device: x.device(),
            heads: None,
            scale,
        }
    }

    fn kv(x: &Tensor<4>, problem: &Problem) -> Self {
        let heads = problem.kv_heads();
        Self {
            heads: (!heads.iter().copied().eq(0..x.dims()[2])).then_some(heads),
            ..Self::query(x, 1.0)
        }
    }

    fn like(&self) -> (&Device, DType) {
        (&self.device, computed_in(self.x.dtype()))
    }

    fn length(&self) -> usize {
        self.x.dims()[2]
    }

    /// Some of the rows, for each query head: `[B, Hq, rows, ·]`.
    fn part(&self, rows: &Range<usize>) -> Tensor<4> {
        let mut x = self.x.clone().narrow(2, rows.start, rows.len());
        if let Some(heads) = &self.heads {
            let repeated = heads.iter().map(|&head| x.clone().narrow(1, head, 1));
            x = Tensor::cat(repeated.collect(), 1);
        }
        x = x.cast(self.like().1);
        if self.scale == 1.0 {
            x
        } else {
            x.mul_scalar(self.scale)
        }
    }

    /// The state of no position: `[B, Hq, d, dv]`.
    fn no_state(&self, value: &Self) -> Tensor<4> {
        let [batch, heads, _, d] = self.x.dims();
        let heads = self.heads.as_ref().map_or(heads, Vec::len);
        Tensor::zeros([batch, heads, d, value.x.dims()[3]], self.like())
    }
}

/// `a bᵀ`.
fn scores(a: Tensor<4>, b: Tensor<4>) -> Tensor<4> {
    matmul(a, b.swap_dims(2, 3))
}

/// `aᵀ b`: the sum over the rows of their outer products.
fn outer(a: Tensor<4>, b: Tensor<4>) -> Tensor<4> {
    matmul(a.swap_dims(2, 3), b)
}

/// Blocks of rows end to end, as `[B, L, H, ·]`: nothing, if there are none.
fn joined(parts: Vec<Tensor<4>>, shape: [usize; 4], like: (&Device, DType)) -> Tensor<4> {
    if parts.is_empty() {
        return Tensor::zeros(shape, like);
    }
    Tensor::cat(parts, 2).swap_dims(1, 2).cast(like.1)
}

/// The query heads of each key-value head, summed.
fn of_kv_heads(x: Tensor<4>, problem: &Problem) -> Tensor<4> {
    let heads = problem.kv_heads();
    let keys = problem.heads.kv().len();
    if heads.iter().copied().eq(0..keys) {
        return x;
    }
    let of_head = (0..keys).map(|key| {
        let first = heads.iter().take_while(|&&head| head < key).count();
        let count = heads.iter().filter(|&&head| head == key).count();
        x.clone().narrow(1, first, count).sum_dim(1)
    });
    Tensor::cat(of_head.collect(), 1)
}

/// The rows in blocks: none, if either tensor has no elements.
fn blocks(x: [&Rows; 2], block: usize) -> Vec<Range<usize>> {
    match x.iter().any(|x| x.x.shape().num_elements() == 0) {
        true => vec![],
        false => ranges(x[0].length(), block),
    }
}

//! Linear attention whose state decays, in chunks: what a rank computes of it, forward and backward.
//!
//! For each sample and query head, with the decay `λ` and the scale `c`:
//!
//! ```text
//!   S_i = λ·S_{i−1} + k_iᵀ v_i        o_i = c · q_i S_i = c · Σ_{j≤i} λ^{i−j} (q_i·k_j) v_j
//!
//!            ┌ block 0 ┐┌ block 1 ┐┌ block 2 ┐      within a block    (q kᵀ ∘ λ^{i−j}) v
//!   state P ─┤ q  k  v ├┤ q  k  v ├┤ q  k  v ├─▶    from before it    λ^{i+1} q S
//!            └─────────┘└─────────┘└─────────┘      the state after   λ^C S + Σ λ^{C−1−j} k_jᵀ v_j
//! ```
//!
//! All is linear in the state `P` before a chunk, so a rank can compute its chunk as if there were none
//! ([`forward`]) and add what `P` contributes when it arrives ([`Chunk::receive`]); and backward alike, with the
//! gradient `G` of the state after the chunk ([`backward`], [`Gradients::receive`]). Chunks may be of any length, and
//! empty: an empty one hands the state on.
//!
//! Powers of a decay are never negative, so nothing overflows. They are computed in f64; products and states are in
//! f32 at least.
//!
//! Sources: Lightning Attention-2 (arXiv:2401.04658) for the blocks; LASP (arXiv:2404.02882) for the states that are
//! kept for the backward pass.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::HeadRange;
use crate::vjp;

/// What to attend to: everything but the tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// The heads held here.
    pub heads: HeadRange,
    /// The decay of each query head, numbered over all ranks, in (0, 1].
    pub decay: Arc<[f64]>,
    /// What the products of queries and keys are multiplied with.
    pub scale: f64,
}

impl Problem {
    /// The decays of the held query heads.
    fn decays(&self) -> &[f64] {
        &self.decay[self.heads.query.clone()]
    }

    /// Which of the held key-value heads each held query head attends with.
    fn kv_heads(&self) -> Vec<usize> {
        let first = self.heads.kv().start;
        let heads = self.heads.query.clone();
        heads.map(|head| head / self.heads.group - first).collect()
    }

    /// `λ^power(i)` for each head and row: `[1, H, rows, 1]`.
    fn powers(
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

    /// What a state that passes `length` positions is multiplied with: `[1, H, 1, 1]`.
    pub fn passing(&self, length: usize, like: (&Device, DType)) -> Tensor<4> {
        self.powers(1, |_| length, like)
    }
}

fn raised(decay: f64, power: usize) -> f64 {
    match i32::try_from(power) {
        Ok(power) => decay.powi(power),
        Err(_) => decay.powf(power as f64),
    }
}

/// Positions in a block. Results depend on it by rounding only.
const BLOCK: usize = 64;

/// The forward pass of a chunk.
///
/// It keeps the state before each block for the backward pass, as LASP does: `⌈L/64⌉·B·H·d·dv` elements, as much
/// as the keys where `dv` is 64.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// `[B, L, Hq, dv]`.
    pub output: Tensor<4>,
    /// The state after the chunk: `[B, Hq, d, dv]`, in f32 at least.
    pub last: Tensor<4>,
    /// The state before each block.
    states: Vec<Tensor<4>>,
}

/// The gradients of a chunk.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of the query: `[B, L, Hq, d]`.
    pub query: Tensor<4>,
    /// Of the key: `[B, L, Hkv, d]`.
    pub key: Tensor<4>,
    /// Of the value: `[B, L, Hkv, dv]`.
    pub value: Tensor<4>,
}

/// The state that a chunk alone leaves: `Σ_i λ^{L−1−i} k_iᵀ v_i`.
///
/// # Shapes
/// - `k`: `[B, L, Hkv, d]`, `v`: `[B, L, Hkv, dv]`; any may be empty
/// - returns: `[B, Hq, d, dv]`, in f32 at least
///
/// # Cost
/// `2·B·L·Hq·d·dv` operations.
pub fn state(k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> Tensor<4> {
    let (k, v) = (Rows::kv(k, problem), Rows::kv(v, problem));
    let length = k.length();
    let aged = problem.powers(length, |row| length - 1 - row, k.like());
    k.times(aged).outer(&v)
}

/// The gradient that a chunk's output gives the state before it: `Σ_i λ^{i+1} q_iᵀ dout_i`.
///
/// # Shapes
/// - `q`: `[B, L, Hq, d]`, `dout`: `[B, L, Hq, dv]`
/// - returns: `[B, Hq, d, dv]`, in f32 at least
///
/// # Cost
/// `2·B·L·Hq·d·dv` operations.
pub fn state_gradient(q: &Tensor<4>, dout: &Tensor<4>, problem: &Problem) -> Tensor<4> {
    let (q, dout) = (Rows::query(q, problem.scale), Rows::query(dout, 1.0));
    let reached = problem.powers(q.length(), |row| row + 1, q.like());
    q.times(reached).outer(&dout)
}

/// The forward pass of a chunk before which there is nothing.
///
/// # Shapes
/// - `q`: `[B, L, Hq, d]`, `k`: `[B, L, Hkv, d]`, `v`: `[B, L, Hkv, dv]`, untracked; any may be empty
///
/// # Cost
/// `2·B·L·Hq·(32·(d + dv) + 2·d·dv)` operations: linear in the length. Memory: see [`Chunk`].
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn forward(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> Chunk {
    forward_in(BLOCK, q, k, v, problem)
}

fn forward_in(
    block: usize,
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    problem: &Problem,
) -> Chunk {
    check(q, k, v, problem);
    let dtype = q.dtype();
    let (q, k, v) = (
        Rows::query(q, problem.scale),
        Rows::kv(k, problem),
        Rows::kv(v, problem),
    );
    let mut state = k.no_state(&v);
    if q.x.shape().num_elements() == 0 {
        return Chunk {
            output: q.zeros_like(&v).swap_dims(1, 2).cast(dtype),
            states: blocks(q.length(), block).map(|_| state.clone()).collect(),
            last: state,
        };
    }
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    let mut tables: Option<Tables> = None;
    for rows in blocks(q.length(), block) {
        let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
        let (q, k, v) = (q.part(&rows), k.part(&rows), v.part(&rows));
        let weights = q.scores(&k) * tables.triangle.clone();
        let within = v.weighted(weights);
        let before = q.times(tables.reached.clone()).through(&state);
        outputs.push(within + before);
        let after = k.times(tables.aged.clone()).outer(&v) + state.clone() * tables.whole.clone();
        states.push(std::mem::replace(&mut state, after));
    }
    Chunk {
        output: joined(outputs, dtype),
        last: state,
        states,
    }
}

impl Chunk {
    /// Adds what the state before the chunk contributes.
    ///
    /// # Shapes
    /// - `state`: `[B, Hq, d, dv]`; `q` as in [`forward`]
    ///
    /// # Cost
    /// `2·B·L·Hq·d·dv` operations.
    pub fn receive(&mut self, state: &Tensor<4>, q: &Tensor<4>, problem: &Problem) {
        self.receive_in(BLOCK, state, q, problem);
    }

    fn receive_in(&mut self, block: usize, state: &Tensor<4>, q: &Tensor<4>, problem: &Problem) {
        let dtype = self.output.dtype();
        let q = Rows::query(q, problem.scale);
        if state.shape().num_elements() == 0 {
            return;
        }
        let length = q.length();
        let passing = |length| problem.passing(length, q.like());
        self.last = self.last.clone() + state.clone() * passing(length);
        for (rows, kept) in blocks(length, block).zip(&mut self.states) {
            *kept = kept.clone() + state.clone() * passing(rows.start);
        }
        if self.output.shape().num_elements() > 0 {
            let reached = problem.powers(length, |row| row + 1, q.like());
            let more = q.times(reached).through(state).swap_dims(1, 2);
            self.output = (self.output.clone().cast(more.dtype()) + more).cast(dtype);
        }
    }
}

/// The backward pass of a chunk after which nothing follows.
///
/// # Shapes
/// - `q`, `k`, `v`: as in [`forward`]; `dout`: `[B, L, Hq, dv]`
///
/// # Cost
/// Two and a half times the forward's operations.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn backward(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    chunk: &Chunk,
    dout: &Tensor<4>,
    problem: &Problem,
) -> Gradients {
    backward_in(BLOCK, q, k, v, chunk, dout, problem)
}

fn backward_in(
    block: usize,
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    chunk: &Chunk,
    dout: &Tensor<4>,
    problem: &Problem,
) -> Gradients {
    check(q, k, v, problem);
    let (given, dtype) = ([q, k, v], q.dtype());
    let (q, k, v) = (
        Rows::query(q, problem.scale),
        Rows::kv(k, problem),
        Rows::kv(v, problem),
    );
    let dout = Rows::query(dout, 1.0);
    if q.x.shape().num_elements() == 0 {
        let zeros = |x: &Tensor<4>| Tensor::zeros(x.dims(), (&x.device(), dtype));
        return Gradients {
            query: zeros(given[0]),
            key: zeros(given[1]),
            value: zeros(given[2]),
        };
    }
    // The gradient of the state after the block at hand.
    let mut after = k.no_state(&v);
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    let mut tables: Option<Tables> = None;
    let ranges: Vec<Range<usize>> = blocks(q.length(), block).collect();
    for (rows, state) in ranges.into_iter().zip(&chunk.states).rev() {
        let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
        let (q, k, v, dout) = (
            q.part(&rows),
            k.part(&rows),
            v.part(&rows),
            dout.part(&rows),
        );
        let weights = q.scores(&k) * tables.triangle.clone();
        let dweights = dout.scores(&v) * tables.triangle.clone();
        let through_state = dout.back_through(state) * tables.reached.clone();
        dq.push((k.weighted(dweights.clone()) + through_state).mul_scalar(problem.scale));
        let into_state = v.back_through(&after) * tables.aged.clone();
        dk.push(q.weighted(dweights.swap_dims(2, 3)) + into_state);
        let into_state = k.times(tables.aged.clone()).through(&after);
        dv.push(dout.weighted(weights.swap_dims(2, 3)) + into_state);
        after = q.times(tables.reached.clone()).outer(&dout) + after * tables.whole.clone();
    }
    for parts in [&mut dq, &mut dk, &mut dv] {
        parts.reverse();
    }
    Gradients {
        query: joined(dq, dtype),
        key: joined(summed(dk, problem), dtype),
        value: joined(summed(dv, problem), dtype),
    }
}

impl Gradients {
    /// Adds what the gradient of the state after the chunk contributes.
    ///
    /// # Shapes
    /// - `gradient`: `[B, Hq, d, dv]`; `k`, `v` as in [`forward`]
    ///
    /// # Cost
    /// `4·B·L·Hq·d·dv` operations.
    pub fn receive(
        &mut self,
        gradient: &Tensor<4>,
        k: &Tensor<4>,
        v: &Tensor<4>,
        problem: &Problem,
    ) {
        if self.key.shape().num_elements() * self.value.shape().num_elements() == 0 {
            return;
        }
        let dtype = self.key.dtype();
        let (k, v) = (Rows::kv(k, problem), Rows::kv(v, problem));
        let length = k.length();
        let aged = problem.powers(length, |row| length - 1 - row, k.like());
        let add = |sum: &mut Tensor<4>, more: Tensor<4>| {
            let more = summed(vec![more], problem).swap_remove(0).swap_dims(1, 2);
            *sum = (sum.clone().cast(more.dtype()) + more).cast(dtype);
        };
        add(&mut self.key, v.back_through(gradient) * aged.clone());
        add(&mut self.value, k.times(aged).through(gradient));
    }
}

/// Linear attention of all positions, with a gradient.
///
/// The graph keeps `q`, `k`, `v` and the states of [`Chunk`].
///
/// # Shapes
/// As [`forward`]; returns `[B, L, Hq, dv]`.
///
/// # Panics
/// As [`forward`].
pub fn linear_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, problem: Problem) -> Tensor<4> {
    let inputs = [q, k, v];
    let [q, k, v] = inputs.clone().map(Tensor::inner);
    let chunk = forward(&q, &k, &v, &problem);
    let output = chunk.output.clone();
    vjp::attach3(inputs, output, move |dout| {
        let gradients = backward(&q, &k, &v, &chunk, &dout, &problem);
        Ok::<_, Infallible>([gradients.query, gradients.key, gradients.value])
    })
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

/// Rows of queries, keys or values, one matrix for each sample and query head: `[B, Hq, L, ·]`, f32 at least.
struct Rows {
    x: Tensor<4>,
    device: Device,
}

impl Rows {
    fn new(x: Tensor<4>) -> Self {
        let device = x.device();
        Self { x, device }
    }

    fn query(x: &Tensor<4>, scale: f64) -> Self {
        let x = computed(x.clone()).swap_dims(1, 2);
        Self::new(if scale == 1.0 { x } else { x.mul_scalar(scale) })
    }

    /// The head of each query head, repeated where several share it.
    fn kv(x: &Tensor<4>, problem: &Problem) -> Self {
        let x = computed(x.clone()).swap_dims(1, 2);
        let heads = problem.kv_heads();
        if x.shape().num_elements() == 0 {
            let [batch, _, length, width] = x.dims();
            let zeros = Tensor::zeros(
                [batch, heads.len(), length, width],
                (&x.device(), x.dtype()),
            );
            return Self::new(zeros);
        }
        if heads.iter().copied().eq(0..x.dims()[1]) {
            return Self::new(x);
        }
        let repeated = heads.iter().map(|&head| x.clone().narrow(1, head, 1));
        Self::new(Tensor::cat(repeated.collect(), 1))
    }

    fn like(&self) -> (&Device, DType) {
        (&self.device, self.x.dtype())
    }

    fn length(&self) -> usize {
        self.x.dims()[2]
    }

    fn part(&self, rows: &Range<usize>) -> Self {
        Self::new(self.x.clone().narrow(2, rows.start, rows.len()))
    }

    /// Each row times a number.
    fn times(&self, numbers: Tensor<4>) -> Self {
        Self::new(self.x.clone() * numbers)
    }

    /// `x otherᵀ`.
    fn scores(&self, other: &Self) -> Tensor<4> {
        self.x.clone().matmul(other.x.clone().swap_dims(2, 3))
    }

    /// `weights x`.
    fn weighted(&self, weights: Tensor<4>) -> Tensor<4> {
        weights.matmul(self.x.clone())
    }

    /// `x state`, of no row too.
    fn through(&self, state: &Tensor<4>) -> Tensor<4> {
        self.x.clone().matmul(state.clone())
    }

    /// `x stateᵀ`.
    fn back_through(&self, state: &Tensor<4>) -> Tensor<4> {
        self.x.clone().matmul(state.clone().swap_dims(2, 3))
    }

    /// `xᵀ other`: the sum over the rows of their outer products.
    fn outer(&self, other: &Self) -> Tensor<4> {
        let [.., rows, _] = self.x.dims();
        if rows * self.x.shape().num_elements() == 0 {
            return self.no_state(other);
        }
        self.x.clone().swap_dims(2, 3).matmul(other.x.clone())
    }

    fn no_state(&self, value: &Self) -> Tensor<4> {
        let [batch, heads, _, d] = self.x.dims();
        Tensor::zeros([batch, heads, d, value.x.dims()[3]], self.like())
    }

    /// Zeros, as wide as `other`.
    fn zeros_like(&self, other: &Self) -> Tensor<4> {
        let [batch, heads, rows, _] = self.x.dims();
        Tensor::zeros([batch, heads, rows, other.x.dims()[3]], self.like())
    }
}

/// In the dtype in which it is computed.
fn computed(x: Tensor<4>) -> Tensor<4> {
    match x.dtype() {
        DType::F64 | DType::F32 => x,
        _ => x.cast(DType::F32),
    }
}

/// Blocks of rows end to end, as `[B, L, H, ·]`.
fn joined(parts: Vec<Tensor<4>>, dtype: DType) -> Tensor<4> {
    Tensor::cat(parts, 2).swap_dims(1, 2).cast(dtype)
}

/// The query heads of each key-value head, summed.
fn summed(parts: Vec<Tensor<4>>, problem: &Problem) -> Vec<Tensor<4>> {
    let heads = problem.kv_heads();
    let keys = problem.heads.kv().len();
    if heads.iter().copied().eq(0..keys) {
        return parts;
    }
    let sum = |x: Tensor<4>| {
        let of_head = (0..keys).map(|key| {
            let first = heads.iter().take_while(|&&head| head < key).count();
            let count = heads.iter().filter(|&&head| head == key).count();
            x.clone().narrow(1, first, count).sum_dim(1)
        });
        Tensor::cat(of_head.collect(), 1)
    };
    parts.into_iter().map(sum).collect()
}

/// A length in blocks.
fn blocks(length: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length)
        .step_by(block)
        .map(move |start| start..length.min(start + block))
}

fn check(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) {
    let (q, k, v) = (q.dims(), k.dims(), v.dims());
    assert!(
        q[..2] == k[..2] && q[3] == k[3] && k[..3] == v[..3],
        "linear attention: q {q:?}, k {k:?} and v {v:?} must be [B, L, Hq, d], [B, L, Hkv, d] and [B, L, Hkv, dv]"
    );
    assert!(
        q[2] == problem.heads.query.len() && k[2] == problem.heads.kv().len(),
        "linear attention: q {q:?} and k {k:?} must hold the query heads {:?} and the kv heads {:?}",
        problem.heads.query,
        problem.heads.kv()
    );
    assert!(
        problem.heads.query.end <= problem.decay.len(),
        "linear attention: {} decays are too few for the query heads {:?}",
        problem.decay.len(),
        problem.heads.query
    );
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Values without a pattern.
    fn random(shape: [usize; 4], seed: u64, (device, dtype): (&Device, DType)) -> Tensor<4> {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|index| ((index as f64 + 1.0) * 12.9898 + seed as f64 * 78.233).sin() * 43758.5453)
            .map(|value| value - value.floor() - 0.5)
            .collect();
        Tensor::from_data(TensorData::new(values, shape), (device, dtype))
    }

    fn values(x: &Tensor<4>) -> Vec<f64> {
        x.to_data().iter::<f64>().collect()
    }

    fn difference(found: &Tensor<4>, expected: &Tensor<4>) -> f64 {
        assert_eq!(found.dims(), expected.dims());
        let pairs = values(found).into_iter().zip(values(expected));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    #[derive(Debug, Clone)]
    struct Case {
        batch: usize,
        length: usize,
        width: [usize; 2],
        problem: Problem,
    }

    impl Case {
        fn inputs(&self, device: &Device) -> [Tensor<4>; 4] {
            let heads = (
                self.problem.heads.query.len(),
                self.problem.heads.kv().len(),
            );
            let [d, dv] = self.width;
            let of = |heads, width, seed| {
                let shape = [self.batch, self.length, heads, width];
                random(shape, seed, (device, DType::F64))
            };
            [
                of(heads.0, d, 1),
                of(heads.1, d, 2),
                of(heads.1, dv, 3),
                of(heads.0, dv, 4),
            ]
        }

        /// By the formula, with every pair of positions at once, and Burn's gradients of that.
        fn naive(&self) -> [Tensor<4>; 4] {
            let device = Device::flex().autodiff();
            let [q, k, v, dout] = self.inputs(&device);
            let leaves = [q, k, v].map(Tensor::require_grad);
            let [q, k, v] = leaves.clone();
            let problem = &self.problem;
            let of_head = problem
                .kv_heads()
                .into_iter()
                .enumerate()
                .map(|(head, kv)| {
                    let [q, k, v] = [(&q, head), (&k, kv), (&v, kv)]
                        .map(|(x, head)| x.clone().narrow(2, head, 1).swap_dims(1, 2));
                    let decay = problem.decays()[head];
                    let mut weights = vec![];
                    for i in 0..self.length {
                        for j in 0..self.length {
                            weights.push(if j <= i {
                                decay.powi((i - j) as i32)
                            } else {
                                0.0
                            });
                        }
                    }
                    let data = TensorData::new(weights, [1, 1, self.length, self.length]);
                    let weights = Tensor::<4>::from_data(data, (&device, DType::F64));
                    let scores = q.matmul(k.swap_dims(2, 3)).mul_scalar(problem.scale);
                    (scores * weights).matmul(v).swap_dims(1, 2)
                });
            let out = Tensor::cat(of_head.collect(), 2);
            let gradients = (out.clone() * dout).sum().backward();
            let [dq, dk, dv] = leaves.map(|leaf| leaf.grad(&gradients).unwrap());
            [out.inner(), dq, dk, dv]
        }

        /// In chunks of the given lengths, each of which gets its states from the others.
        fn chunked(&self, block: usize, lengths: &[usize]) -> [Tensor<4>; 4] {
            let device = Device::flex();
            let inputs = self.inputs(&device);
            let problem = &self.problem;
            let mut start = 0;
            let chunks: Vec<[Tensor<4>; 4]> = lengths
                .iter()
                .map(|&length| {
                    let range = start..start + length;
                    start = range.end;
                    inputs
                        .each_ref()
                        .map(|x| x.clone().slice_dim(1, range.clone()))
                })
                .collect();
            let mut before: Option<Tensor<4>> = None;
            let mut forwards = vec![];
            for [q, k, v, _] in &chunks {
                let mut chunk = forward_in(block, q, k, v, problem);
                assert!(difference(&chunk.last, &state(k, v, problem)) < 1e-12);
                if let Some(before) = before {
                    chunk.receive_in(block, &before, q, problem);
                }
                before = Some(chunk.last.clone());
                forwards.push(chunk);
            }
            let mut after: Option<Tensor<4>> = None;
            let mut backwards = vec![];
            for ([q, k, v, dout], chunk) in chunks.iter().zip(&forwards).rev() {
                let mut gradients = backward_in(block, q, k, v, chunk, dout, problem);
                let mut own = state_gradient(q, dout, problem);
                if let Some(after) = after {
                    gradients.receive(&after, k, v, problem);
                    own = own + after * problem.passing(q.dims()[1], (&device, DType::F64));
                }
                after = Some(own);
                backwards.push(gradients);
            }
            backwards.reverse();
            let cat = |parts: Vec<Tensor<4>>| Tensor::cat(parts, 1);
            [
                cat(forwards.into_iter().map(|chunk| chunk.output).collect()),
                cat(backwards.iter().map(|part| part.query.clone()).collect()),
                cat(backwards.iter().map(|part| part.key.clone()).collect()),
                cat(backwards.iter().map(|part| part.value.clone()).collect()),
            ]
        }
    }

    fn cases() -> impl Strategy<Value = Case> {
        let heads = prop_oneof![
            Just((0..3, 1)),
            Just((1..4, 1)),
            Just((0..4, 2)),
            // The first and the last key-value head are cut.
            Just((1..6, 2)),
            Just((2..3, 3)),
        ];
        let decay = prop_oneof![Just(1.0), 0.05..1.0f64, 0.9..1.0f64];
        (
            1..=2usize,
            1..=13usize,
            [1..=3usize, 1..=4usize],
            heads,
            prop::collection::vec(decay, 6),
            prop_oneof![Just(1.0), Just(0.3)],
        )
            .prop_map(
                |(batch, length, width, (query, group), decay, scale)| Case {
                    batch,
                    length,
                    width,
                    problem: Problem {
                        heads: HeadRange { query, group },
                        decay: decay.into(),
                        scale,
                    },
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn chunks_of_any_length_with_states_passed_between_them_give_the_formulas_results(
            case in cases(),
            cuts in prop::collection::vec(0..=13usize, 0..4),
            block in 1..=5usize,
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(case.length)).collect();
            cuts.extend([0, case.length]);
            cuts.sort_unstable();
            let lengths: Vec<usize> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let found = case.chunked(block, &lengths);
            for (found, expected) in found.iter().zip(case.naive()) {
                let difference = difference(found, &expected);
                prop_assert!(difference < 1e-12, "{difference:e}");
            }
        }
    }

    #[test]
    fn the_operation_has_the_formulas_gradients_over_several_blocks() {
        let case = Case {
            batch: 2,
            length: 2 * BLOCK + 7,
            width: [3, 4],
            problem: Problem {
                heads: HeadRange {
                    query: 1..5,
                    group: 2,
                },
                decay: vec![0.5, 0.99, 1.0, 0.9, 0.7].into(),
                scale: 0.5,
            },
        };
        let device = Device::flex().autodiff();
        let [q, k, v, dout] = case.inputs(&device);
        let leaves = [q, k, v].map(Tensor::require_grad);
        let [q, k, v] = leaves.clone();
        let out = linear_attention(q, k, v, case.problem.clone());
        let gradients = (out.clone() * dout).sum().backward();
        let [dq, dk, dv] = leaves.map(|leaf| leaf.grad(&gradients).unwrap());
        for (found, expected) in [out.inner(), dq, dk, dv].iter().zip(case.naive()) {
            assert!(difference(found, &expected) < 1e-11);
        }
    }

    #[test]
    fn nothing_of_any_kind_has_results_without_elements() {
        for [batch, length, heads] in [[0, 3, 2], [2, 0, 2], [2, 3, 0]] {
            let problem = Problem {
                heads: HeadRange {
                    query: 0..heads,
                    group: 1,
                },
                decay: vec![0.9; 2].into(),
                scale: 1.0,
            };
            let device = Device::flex();
            let of = |width| random([batch, length, heads, width], 1, (&device, DType::F32));
            let (q, k, v, dout) = (of(3), of(3), of(4), of(4));
            let mut chunk = forward(&q, &k, &v, &problem);
            assert_eq!(chunk.output.dims(), [batch, length, heads, 4]);
            let before = Tensor::ones([batch, heads, 3, 4], (&device, DType::F32));
            chunk.receive(&before, &q, &problem);
            // What passes an empty chunk is what came.
            if length == 0 {
                assert_eq!(difference(&chunk.last, &before), 0.0);
            }
            let mut gradients = backward(&q, &k, &v, &chunk, &dout, &problem);
            gradients.receive(&before, &k, &v, &problem);
            assert_eq!(gradients.query.dims(), q.dims());
            assert_eq!(gradients.key.dims(), k.dims());
            assert_eq!(gradients.value.dims(), v.dims());
            assert_eq!(
                state_gradient(&q, &dout, &problem).dims(),
                [batch, heads, 3, 4]
            );
        }
    }
}

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
//! All is linear in the state `P` before a chunk, so a chunk is computed in three steps, of which only the last needs
//! what comes from elsewhere:
//!
//! ```text
//!   forward     states            what its keys and values leave, as if nothing came before
//!               within            what the rows of a block give each other
//!               States::receive   the state before the chunk reaches every block
//!               Within::output    and with it every row
//!   backward    state_gradients, gradients_within, States::receive, GradientsWithin::gradients: the same from the end
//! ```
//!
//! A rank sends its state after the first step and computes the second while states are on their way; [`forward`] and
//! [`backward`] are the steps at once, for a chunk that is all there is. Chunks may be of any length, and empty: an
//! empty one hands the state on.
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
use crate::matmul::matmul;
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

/// The states along a chunk, in the direction in which they run: forward from its first position, and backward, as
/// gradients, from its last.
///
/// One is kept for each block, as LASP does: `⌈L/64⌉·B·Hq·d·dv` elements, as much as the keys where `dv` is 64.
#[derive(Debug, Clone)]
pub struct States {
    /// The state that leaves the chunk: `[B, Hq, d, dv]`, in f32 at least.
    pub last: Tensor<4>,
    /// The state that each block meets, in the order of positions.
    met: Vec<Tensor<4>>,
    /// How many positions of the chunk the state has passed by then.
    passed: Vec<usize>,
    length: usize,
}

impl States {
    /// States that run through blocks in the given order, each of which adds its own.
    fn run(
        length: usize,
        ranges: impl Iterator<Item = Range<usize>>,
        none: Tensor<4>,
        mut through: impl FnMut(&Range<usize>, Tensor<4>) -> Tensor<4>,
    ) -> Self {
        let (mut met, mut passed, mut far) = (Vec::new(), Vec::new(), 0);
        let mut last = none;
        for rows in ranges {
            let after = through(&rows, last.clone());
            met.push(std::mem::replace(&mut last, after));
            passed.push(far);
            far += rows.len();
        }
        Self {
            last,
            met,
            passed,
            length,
        }
    }

    /// Adds a state that comes into the chunk: to what each block meets, and to what leaves.
    ///
    /// # Shapes
    /// - `state`: `[B, Hq, d, dv]`, in the dtype of [`last`](Self::last)
    ///
    /// # Cost
    /// `⌈L/64⌉·B·Hq·d·dv` operations.
    pub fn receive(&mut self, state: &Tensor<4>, problem: &Problem) {
        if state.shape().num_elements() == 0 {
            return;
        }
        let device = state.device();
        let after = |length| {
            let passing = problem.passing(length, (&device, state.dtype()));
            state.clone() * passing
        };
        for (met, &passed) in self.met.iter_mut().zip(&self.passed) {
            *met = met.clone() + after(passed);
        }
        self.last = self.last.clone() + after(self.length);
    }
}

/// The states that a chunk alone makes: the last is `Σ_i λ^{L−1−i} k_iᵀ v_i`.
///
/// # Shapes
/// - `k`: `[B, L, Hkv, d]`, `v`: `[B, L, Hkv, dv]`, untracked; any may be empty
///
/// # Cost
/// `2·B·L·Hq·d·dv` operations.
pub fn states(k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> States {
    states_in(BLOCK, k, v, problem)
}

fn states_in(block: usize, k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> States {
    let (k, v) = (Rows::kv(k, problem), Rows::kv(v, problem));
    let mut tables = None;
    States::run(
        k.length(),
        blocks([&k, &v], block).into_iter(),
        k.no_state(&v),
        |rows, state| {
            let tables = Tables::of(&mut tables, problem, rows.len(), k.like());
            let (k, v) = (k.part(rows), v.part(rows));
            outer(k * tables.aged.clone(), v) + state * tables.whole.clone()
        },
    )
}

/// The gradients of states that a chunk's output alone makes: the last, that of the state before the chunk, is
/// `Σ_i λ^{i+1} q_iᵀ dout_i`.
///
/// # Shapes
/// - `q`: `[B, L, Hq, d]`, `dout`: `[B, L, Hq, dv]`
///
/// # Cost
/// `2·B·L·Hq·d·dv` operations.
pub fn state_gradients(q: &Tensor<4>, dout: &Tensor<4>, problem: &Problem) -> States {
    state_gradients_in(BLOCK, q, dout, problem)
}

fn state_gradients_in(block: usize, q: &Tensor<4>, dout: &Tensor<4>, problem: &Problem) -> States {
    let (q, dout) = (Rows::query(q, problem.scale), Rows::query(dout, 1.0));
    let mut tables = None;
    let mut states = States::run(
        q.length(),
        blocks([&q, &dout], block).into_iter().rev(),
        q.no_state(&dout),
        |rows, state| {
            let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
            let (q, dout) = (q.part(rows), dout.part(rows));
            outer(q * tables.reached.clone(), dout) + state * tables.whole.clone()
        },
    );
    states.met.reverse();
    states.passed.reverse();
    states
}

/// What the rows of each block give each other.
#[derive(Debug, Clone)]
pub struct Within {
    blocks: Vec<(Range<usize>, Tensor<4>)>,
}

/// The output without any state: what the rows of each block give each other.
///
/// # Shapes
/// - `q`: `[B, L, Hq, d]`, `k`: `[B, L, Hkv, d]`, `v`: `[B, L, Hkv, dv]`, untracked; any may be empty
///
/// # Cost
/// `128·B·L·Hq·(d + dv)` operations.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn within(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> Within {
    within_in(BLOCK, q, k, v, problem)
}

fn within_in(
    block: usize,
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    problem: &Problem,
) -> Within {
    check(q, k, v, problem);
    let (q, k, v) = (
        Rows::query(q, problem.scale),
        Rows::kv(k, problem),
        Rows::kv(v, problem),
    );
    let mut tables = None;
    let of_block = |rows: Range<usize>| {
        let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
        let weights = scores(q.part(&rows), k.part(&rows)) * tables.triangle.clone();
        let output = matmul(weights, v.part(&rows));
        (rows, output)
    };
    Within {
        blocks: blocks([&q, &v], block).into_iter().map(of_block).collect(),
    }
}

impl Within {
    /// The output, with what the states that the blocks meet contribute to it: `[B, L, Hq, dv]`.
    ///
    /// # Cost
    /// `2·B·L·Hq·d·dv` operations.
    pub fn output(self, q: &Tensor<4>, states: &States, problem: &Problem) -> Tensor<4> {
        let [batch, length, heads, _] = q.dims();
        let (dtype, width) = (q.dtype(), states.last.dims()[3]);
        let q = Rows::query(q, problem.scale);
        let mut tables = None;
        let parts = self.blocks.into_iter().zip(&states.met);
        let parts = parts.map(|((rows, within), state)| {
            let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
            within + matmul(q.part(&rows) * tables.reached.clone(), state.clone())
        });
        let shape = [batch, length, heads, width];
        joined(parts.collect(), shape, (&q.device, dtype))
    }
}

/// The forward pass of a chunk.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// `[B, L, Hq, dv]`.
    pub output: Tensor<4>,
    /// What the backward pass needs.
    pub states: States,
}

/// The forward pass of a chunk before which there is nothing.
///
/// # Shapes
/// - `q`: `[B, L, Hq, d]`, `k`: `[B, L, Hkv, d]`, `v`: `[B, L, Hkv, dv]`, untracked; any may be empty
///
/// # Cost
/// `B·L·Hq·(128·(d + dv) + 4·d·dv)` operations: linear in the length. Memory: see [`States`].
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn forward(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> Chunk {
    let states = states(k, v, problem);
    Chunk {
        output: within(q, k, v, problem).output(q, &states, problem),
        states,
    }
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

/// The gradients without what comes from after each block.
#[derive(Debug, Clone)]
pub struct GradientsWithin {
    blocks: Vec<Range<usize>>,
    query: Vec<Tensor<4>>,
    key: Vec<Tensor<4>>,
    value: Vec<Tensor<4>>,
}

/// The gradients without what comes from after each block.
///
/// # Shapes
/// - `q`, `k`, `v`: as in [`within`]; `dout`: `[B, L, Hq, dv]`
/// - `states`: of the forward pass
///
/// # Cost
/// `B·L·Hq·(384·d + 256·dv + 2·d·dv)` operations.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn gradients_within(
    [q, k, v]: [&Tensor<4>; 3],
    states: &States,
    dout: &Tensor<4>,
    problem: &Problem,
) -> GradientsWithin {
    gradients_within_in(BLOCK, [q, k, v], states, dout, problem)
}

fn gradients_within_in(
    block: usize,
    [q, k, v]: [&Tensor<4>; 3],
    states: &States,
    dout: &Tensor<4>,
    problem: &Problem,
) -> GradientsWithin {
    check(q, k, v, problem);
    let (q, k, v, dout) = (
        Rows::query(q, problem.scale),
        Rows::kv(k, problem),
        Rows::kv(v, problem),
        Rows::query(dout, 1.0),
    );
    let blocks = blocks([&q, &v], block);
    let (mut query, mut key, mut value) = (Vec::new(), Vec::new(), Vec::new());
    let mut tables = None;
    for (rows, state) in blocks.iter().zip(&states.met) {
        let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
        let parts = [&q, &k, &v, &dout].map(|x| x.part(rows));
        let [dq, dk, dv] = gradients_before(parts, state, tables, problem);
        query.push(dq);
        key.push(dk);
        value.push(dv);
    }
    GradientsWithin {
        blocks,
        query,
        key,
        value,
    }
}

impl GradientsWithin {
    /// The gradients, with what the gradients of the states after the blocks contribute to them.
    ///
    /// # Shapes
    /// - `q`, `k`, `v`: as in [`within`]
    ///
    /// # Cost
    /// `4·B·L·Hq·d·dv` operations.
    pub fn gradients(
        self,
        [q, k, v]: [&Tensor<4>; 3],
        after: &States,
        problem: &Problem,
    ) -> Gradients {
        let shapes = [q, k, v].map(Tensor::dims);
        let like = (&q.device(), q.dtype());
        let (k, v) = (Rows::kv(k, problem), Rows::kv(v, problem));
        let (mut keys, mut values, mut tables) = (Vec::new(), Vec::new(), None);
        let within = self.key.into_iter().zip(self.value);
        for ((rows, state), (dk, dv)) in self.blocks.iter().zip(&after.met).zip(within) {
            let tables = Tables::of(&mut tables, problem, rows.len(), k.like());
            let [dk, dv] = gradients_after([&k, &v].map(|x| x.part(rows)), state, tables, [dk, dv]);
            keys.push(of_kv_heads(dk, problem));
            values.push(of_kv_heads(dv, problem));
        }
        let [query, key, value] = shapes;
        Gradients {
            query: joined(self.query, query, like),
            key: joined(keys, key, like),
            value: joined(values, value, like),
        }
    }
}

/// The backward pass of a chunk after which nothing follows.
///
/// # Shapes
/// - `q`, `k`, `v`: as in [`forward`]; `dout`: `[B, L, Hq, dv]`
/// - `states`: of the forward pass
///
/// # Cost
/// Two to two and a half times the forward's operations.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn backward(
    qkv: [&Tensor<4>; 3],
    states: &States,
    dout: &Tensor<4>,
    problem: &Problem,
) -> Gradients {
    let [q, k, v] = qkv;
    check(q, k, v, problem);
    let after = state_gradients(q, dout, problem);
    let shapes = qkv.map(Tensor::dims);
    let like = (&q.device(), q.dtype());
    let (q, k, v, dout) = (
        Rows::query(q, problem.scale),
        Rows::kv(k, problem),
        Rows::kv(v, problem),
        Rows::query(dout, 1.0),
    );
    let mut gradients = [const { Vec::new() }; 3];
    let mut tables = None;
    // Both parts of a block at once: what is at hand is not fetched again.
    let met = states.met.iter().zip(&after.met);
    for (rows, (before, after)) in blocks([&q, &v], BLOCK).iter().zip(met) {
        let tables = Tables::of(&mut tables, problem, rows.len(), q.like());
        let [q, k, v, dout] = [&q, &k, &v, &dout].map(|x| x.part(rows));
        let parts = [q, k.clone(), v.clone(), dout];
        let [dq, dk, dv] = gradients_before(parts, before, tables, problem);
        let [dk, dv] = gradients_after([k, v], after, tables, [dk, dv]);
        let block = [dq, of_kv_heads(dk, problem), of_kv_heads(dv, problem)];
        for (gradients, block) in gradients.iter_mut().zip(block) {
            gradients.push(block);
        }
    }
    let [query, key, value] = gradients;
    Gradients {
        query: joined(query, shapes[0], like),
        key: joined(key, shapes[1], like),
        value: joined(value, shapes[2], like),
    }
}

/// The gradients of a block's query, key and value, for each query head: all from its rows and the state before it.
fn gradients_before(
    [q, k, v, dout]: [Tensor<4>; 4],
    state: &Tensor<4>,
    tables: &Tables,
    problem: &Problem,
) -> [Tensor<4>; 3] {
    let weights = scores(q.clone(), k.clone()) * tables.triangle.clone();
    let dweights = scores(dout.clone(), v) * tables.triangle.clone();
    let from_before = scores(dout.clone(), state.clone()) * tables.reached.clone();
    let dq = matmul(dweights.clone(), k) + from_before;
    [
        dq.mul_scalar(problem.scale),
        outer(dweights, q),
        outer(weights, dout),
    ]
}

/// The gradients of a block's key and value, with what comes from the gradient of the state after it.
fn gradients_after(
    [k, v]: [Tensor<4>; 2],
    state: &Tensor<4>,
    tables: &Tables,
    [dk, dv]: [Tensor<4>; 2],
) -> [Tensor<4>; 2] {
    [
        dk + scores(v, state.clone()) * tables.aged.clone(),
        dv + matmul(k * tables.aged.clone(), state.clone()),
    ]
}

/// Linear attention of all positions, with a gradient.
///
/// The graph keeps `q`, `k`, `v` and the [`States`].
///
/// # Shapes
/// As [`forward`]; returns `[B, L, Hq, dv]`.
///
/// # Panics
/// As [`forward`].
pub fn linear_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, problem: Problem) -> Tensor<4> {
    let inputs = [q, k, v];
    let [q, k, v] = inputs.clone().map(Tensor::inner);
    let Chunk { output, states } = forward(&q, &k, &v, &problem);
    vjp::attach3(inputs, output, move |dout| {
        let gradients = backward([&q, &k, &v], &states, &dout, &problem);
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
        let dtype = match self.x.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        (&self.device, dtype)
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
    if x.iter().any(|x| x.x.shape().num_elements() == 0) {
        return vec![];
    }
    let length = x[0].length();
    (0..length)
        .step_by(block)
        .map(|start| start..length.min(start + block))
        .collect()
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
                let mut states = states_in(block, k, v, problem);
                if let Some(before) = before {
                    states.receive(&before, problem);
                }
                before = Some(states.last.clone());
                let output = within_in(block, q, k, v, problem).output(q, &states, problem);
                forwards.push(Chunk { output, states });
            }
            let mut after: Option<Tensor<4>> = None;
            let mut backwards = vec![];
            for ([q, k, v, dout], chunk) in chunks.iter().zip(&forwards).rev() {
                let mut gradients = state_gradients_in(block, q, dout, problem);
                if let Some(after) = after {
                    gradients.receive(&after, problem);
                }
                after = Some(gradients.last.clone());
                let qkv = [q, k, v];
                let within = gradients_within_in(block, qkv, &chunk.states, dout, problem);
                backwards.push(within.gradients(qkv, &gradients, problem));
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
    fn half_precision_has_states_in_f32_and_results_in_its_own_dtype() {
        let problem = Problem {
            heads: HeadRange {
                query: 0..2,
                group: 2,
            },
            decay: vec![0.9, 1.0].into(),
            scale: 0.5,
        };
        let device = Device::flex();
        let of = |dtype: DType| {
            // What bf16 can hold, so that both compute with the same numbers.
            let of = |heads, seed| {
                let x = random([1, 5, heads, 3], seed, (&device, DType::F32));
                x.cast(DType::BF16).cast(dtype)
            };
            let (q, k, v, dout) = (of(2, 1), of(1, 2), of(1, 3), of(2, 4));
            let chunk = forward(&q, &k, &v, &problem);
            let gradients = backward([&q, &k, &v], &chunk.states, &dout, &problem);
            let Gradients { query, key, value } = gradients;
            (chunk.states.last, [chunk.output, query, key, value])
        };
        let ((state, half), (expected, single)) = (of(DType::BF16), of(DType::F32));
        assert_eq!(state.dtype(), DType::F32);
        assert_eq!(difference(&state, &expected), 0.0);
        for (half, single) in half.into_iter().zip(single) {
            assert_eq!(half.dtype(), DType::BF16);
            // Rounded once, at the end.
            assert_eq!(difference(&half, &single.cast(DType::BF16)), 0.0);
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
            let mut states = states(&k, &v, &problem);
            let before = Tensor::ones([batch, heads, 3, 4], (&device, DType::F32));
            states.receive(&before, &problem);
            let output = within(&q, &k, &v, &problem).output(&q, &states, &problem);
            assert_eq!(output.dims(), [batch, length, heads, 4]);
            let mut after = state_gradients(&q, &dout, &problem);
            after.receive(&before, &problem);
            // What passes an empty chunk is what came.
            if length == 0 {
                assert_eq!(difference(&states.last, &before), 0.0);
                assert_eq!(difference(&after.last, &before), 0.0);
            }
            let qkv = [&q, &k, &v];
            let within = gradients_within(qkv, &states, &dout, &problem);
            let gradients = within.gradients(qkv, &after, &problem);
            assert_eq!(gradients.query.dims(), q.dims());
            assert_eq!(gradients.key.dims(), k.dims());
            assert_eq!(gradients.value.dims(), v.dims());
        }
    }
}

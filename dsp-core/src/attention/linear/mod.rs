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
//! In f32 on the CPU the steps are kernels of our own (`flex::linear` beside this); all else goes the portable way,
//! and either takes the other's states.
//!
//! Sources: Lightning Attention-2 (arXiv:2401.04658) for the blocks; LASP (arXiv:2404.02882) for the states that are
//! kept for the backward pass.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use super::HeadRange;
use super::chunks::Direction;
#[cfg(feature = "flex")]
use super::flex::linear as flex;
use crate::vjp;
use received::received;

mod portable;
mod received;
#[cfg(test)]
#[cfg(feature = "flex")]
mod tests;

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
    pub(super) fn decays(&self) -> &[f64] {
        &self.decay[self.heads.query.clone()]
    }

    /// Which of the held key-value heads a held query head attends with; both counted from the first held here.
    pub(super) fn kv_head(&self, head: usize) -> usize {
        (self.heads.query.start + head) / self.heads.group - self.heads.kv().start
    }

    /// What a state that passes `length` positions is multiplied with: `[1, H, 1, 1]`.
    pub fn passing(&self, length: usize, like: (&Device, DType)) -> Tensor<4> {
        self.powers(1, |_| length, like)
    }
}

/// Positions in a block. Results depend on it by rounding only.
const BLOCK: usize = 64;

/// How a chunk is computed.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// By kernels of our own, where there are some for the tensors, else portably.
    Best,
    /// By Burn's operations, in blocks of so many positions.
    #[cfg(test)]
    Portable(usize),
    /// By kernels of our own, with an instruction set.
    #[cfg(all(test, feature = "flex"))]
    Flex(crate::simd::Level, usize),
}

impl Way {
    fn block(self) -> usize {
        match self {
            Self::Best => BLOCK,
            #[cfg(test)]
            Self::Portable(block) => block,
            #[cfg(all(test, feature = "flex"))]
            Self::Flex(_, block) => block,
        }
    }

    /// The instruction set of the kernels for such tensors, unless these go the portable way.
    #[cfg(feature = "flex")]
    fn level<const N: usize>(self, tensors: [&Tensor<4>; N]) -> Option<crate::simd::Level> {
        let elements = |x: &&Tensor<4>| x.shape().num_elements();
        if tensors.iter().any(|x| elements(x) == 0) {
            return None;
        }
        match self {
            Self::Best => super::flex::level_for(tensors),
            #[cfg(test)]
            Self::Portable(_) => None,
            #[cfg(test)]
            Self::Flex(level, _) => Some(level),
        }
    }
}

/// The states along a chunk, in the direction in which they run: forward from its first position, and backward, as
/// gradients, from its last.
///
/// One is kept for each block, as LASP does: `⌈L/64⌉·B·Hq·d·dv` elements, as much as the keys where `dv` is 64.
#[derive(Debug, Clone)]
pub struct States {
    /// The state that leaves the chunk: `[B, Hq, d, dv]`, in f32 at least.
    pub last: Tensor<4>,
    /// The state that each block meets, in the order of positions: `[B, Hq, blocks, d, dv]`.
    met: Tensor<5>,
    /// Positions of a block, and of the chunk.
    block: usize,
    length: usize,
    direction: Direction,
}

impl States {
    /// What kernels give: the last state, `[B, Hq, d, dv]`, and those that the blocks meet, `[B, Hq, blocks·d, dv]`.
    #[cfg(feature = "flex")]
    fn of(
        [last, met]: [Tensor<4>; 2],
        (length, block): (usize, usize),
        direction: Direction,
    ) -> Self {
        let [samples, heads, d, dv] = last.dims();
        let blocks = length.div_ceil(block);
        Self {
            last,
            met: met.reshape([samples, heads, blocks, d, dv]),
            block,
            length,
            direction,
        }
    }

    /// The positions of each block; there is none where there are no states.
    fn blocks(&self) -> Vec<Range<usize>> {
        match self.met.dims()[2] {
            0 => vec![],
            _ => ranges(self.length, self.block),
        }
    }

    /// Adds a state that comes into the chunk: to what each block meets, and to what leaves.
    ///
    /// # Shapes
    /// - `state`: `[B, Hq, d, dv]`, in the dtype of [`last`](Self::last)
    ///
    /// # Cost
    /// `2·⌈L/64⌉·B·Hq·d·dv` operations, on the CPU in one pass over the states, in place unless somebody else holds them.
    pub fn receive(&mut self, state: &Tensor<4>, problem: &Problem) {
        if state.shape().num_elements() == 0 {
            return;
        }
        let blocks = self.blocks();
        if !blocks.is_empty() {
            // How many positions of the chunk the state has passed when a block meets it.
            let passed = |block: usize| match self.direction {
                Direction::Forward => blocks[block].start,
                Direction::Backward => self.length - blocks[block].end,
            };
            // Taken out of here, so that it is held once.
            let met = std::mem::replace(&mut self.met, state.clone().unsqueeze_dim(2));
            self.met = received(met, state, passed, problem);
        }
        let last = self.last.clone().unsqueeze_dim(2);
        self.last = received(last, state, |_| self.length, problem).squeeze_dim(2);
    }
}

/// The states that a chunk alone makes: the last is `Σ_i λ^{L−1−i} k_iᵀ v_i`.
///
/// # Shapes
/// - `k`: `[B, L, Hkv, d]`, `v`: `[B, L, Hkv, dv]`, untracked; any may be empty
///
/// # Cost
/// `2·B·L·Hq·d·dv` operations.
///
/// # Panics
/// If a shape contradicts the other, or the problem.
pub fn states(k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> States {
    states_by(Way::Best, [k, v], Direction::Forward, problem)
}

/// The gradients of states that a chunk's output alone makes: the last, that of the state before the chunk, is
/// `Σ_i λ^{i+1} q_iᵀ dout_i`.
///
/// # Shapes
/// - `q`: `[B, L, Hq, d]`, `dout`: `[B, L, Hq, dv]`
///
/// # Cost
/// `2·B·L·Hq·d·dv` operations.
///
/// # Panics
/// If a shape contradicts the other, or the problem.
pub fn state_gradients(q: &Tensor<4>, dout: &Tensor<4>, problem: &Problem) -> States {
    states_by(Way::Best, [q, dout], Direction::Backward, problem)
}

fn states_by(way: Way, ab: [&Tensor<4>; 2], direction: Direction, problem: &Problem) -> States {
    check_states(ab, direction, problem);
    #[cfg(feature = "flex")]
    if let Some(level) = way.level(ab) {
        let (length, block) = (ab[0].dims()[1], way.block());
        let states = flex::states(level, ab, &ranges(length, block), direction, problem);
        return States::of(states, (length, block), direction);
    }
    portable::states(way.block(), ab, direction, problem)
}

/// What the rows of each block give each other.
#[derive(Debug, Clone)]
pub struct Within {
    /// `[B, L, Hq, dv]`, in f32 at least.
    output: Tensor<4>,
}

/// The output without any state: what the rows of each block give each other.
///
/// # Shapes
/// - `q`: `[B, L, Hq, d]`, `k`: `[B, L, Hkv, d]`, `v`: `[B, L, Hkv, dv]`, untracked; any may be empty
///
/// # Cost
/// `128·B·L·Hq·(d + dv)` operations, a third of which is left out in f32 on the CPU.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn within(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, problem: &Problem) -> Within {
    within_by(Way::Best, [q, k, v], problem)
}

fn within_by(way: Way, qkv: [&Tensor<4>; 3], problem: &Problem) -> Within {
    check(qkv, problem);
    #[cfg(feature = "flex")]
    if let Some(level) = way.level(qkv) {
        let blocks = ranges(qkv[0].dims()[1], way.block());
        let output = flex::output(level, qkv, None, &blocks, problem);
        return Within { output };
    }
    let output = portable::within(way.block(), qkv, problem);
    Within { output }
}

impl Within {
    /// The output, with what the states that the blocks meet contribute to it: `[B, L, Hq, dv]`.
    ///
    /// # Cost
    /// `2·B·L·Hq·d·dv` operations.
    pub fn output(self, q: &Tensor<4>, states: &States, problem: &Problem) -> Tensor<4> {
        self.output_by(Way::Best, q, states, problem)
    }

    fn output_by(self, way: Way, q: &Tensor<4>, states: &States, problem: &Problem) -> Tensor<4> {
        #[cfg(feature = "flex")]
        if let Some(level) = way.level([q, &self.output]) {
            let (within, met) = (&self.output, &states.met);
            return flex::output_after(level, q, within, met, &states.blocks(), problem);
        }
        #[cfg(not(feature = "flex"))]
        let _ = way;
        (self.output + portable::from_before(q, states, problem)).cast(q.dtype())
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
    forward_by(Way::Best, [q, k, v], problem)
}

fn forward_by(way: Way, qkv: [&Tensor<4>; 3], problem: &Problem) -> Chunk {
    check(qkv, problem);
    let [q, k, v] = qkv;
    #[cfg(feature = "flex")]
    if let Some(level) = way.level(qkv) {
        let (length, block) = (q.dims()[1], way.block());
        let (output, states) = flex::forward(level, qkv, &ranges(length, block), problem);
        let states = States::of(states, (length, block), Direction::Forward);
        return Chunk { output, states };
    }
    let states = states_by(way, [k, v], Direction::Forward, problem);
    let within = within_by(way, qkv, problem);
    let output = within.output_by(way, q, &states, problem);
    Chunk { output, states }
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

/// The gradients without what comes from after each block, in f32 at least.
#[derive(Debug, Clone)]
pub struct GradientsWithin {
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
}

/// The gradients without what comes from after each block.
///
/// # Shapes
/// - `q`, `k`, `v`: as in [`within`]; `dout`: `[B, L, Hq, dv]`
/// - `states`: of the forward pass
///
/// # Cost
/// `B·L·Hq·(384·d + 256·dv + 2·d·dv)` operations, with a third of the first two left out in f32 on the CPU.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn gradients_within(
    qkv: [&Tensor<4>; 3],
    states: &States,
    dout: &Tensor<4>,
    problem: &Problem,
) -> GradientsWithin {
    gradients_within_by(Way::Best, qkv, states, dout, problem)
}

fn gradients_within_by(
    way: Way,
    qkv: [&Tensor<4>; 3],
    states: &States,
    dout: &Tensor<4>,
    problem: &Problem,
) -> GradientsWithin {
    check(qkv, problem);
    check_gradient(qkv, dout);
    #[cfg(feature = "flex")]
    if let Some(level) = way.level([qkv[0], qkv[1], qkv[2], dout]) {
        let met = (&states.met, None);
        let [query, key, value] = flex::gradients(level, qkv, dout, met, &states.blocks(), problem);
        return GradientsWithin { query, key, value };
    }
    #[cfg(not(feature = "flex"))]
    let _ = way;
    portable::gradients_within(qkv, states, dout, problem)
}

impl GradientsWithin {
    /// The gradients, with what the gradients of the states after the blocks contribute to them.
    ///
    /// # Shapes
    /// - `q`, `k`, `v`: as in [`within`]
    ///
    /// # Cost
    /// `4·B·L·Hq·d·dv` operations.
    pub fn gradients(self, qkv: [&Tensor<4>; 3], after: &States, problem: &Problem) -> Gradients {
        self.gradients_by(Way::Best, qkv, after, problem)
    }

    fn gradients_by(
        self,
        way: Way,
        [q, k, v]: [&Tensor<4>; 3],
        after: &States,
        problem: &Problem,
    ) -> Gradients {
        let Self { query, key, value } = self;
        #[cfg(feature = "flex")]
        if let Some(level) = way.level([q, k, v, &query]) {
            let (within, met) = ([&key, &value], &after.met);
            let [key, value] =
                flex::gradients_after(level, [k, v], within, met, &after.blocks(), problem);
            return Gradients { query, key, value };
        }
        #[cfg(not(feature = "flex"))]
        let _ = way;
        let [dk, dv] = portable::from_after([k, v], after, problem);
        let dtype = q.dtype();
        Gradients {
            query: query.cast(dtype),
            key: (key + dk).cast(dtype),
            value: (value + dv).cast(dtype),
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
    backward_by(Way::Best, qkv, states, dout, problem)
}

fn backward_by(
    way: Way,
    qkv: [&Tensor<4>; 3],
    states: &States,
    dout: &Tensor<4>,
    problem: &Problem,
) -> Gradients {
    check(qkv, problem);
    check_gradient(qkv, dout);
    #[cfg(feature = "flex")]
    if let Some(level) = way.level([qkv[0], qkv[1], qkv[2], dout]) {
        let [query, key, value] =
            flex::backward(level, qkv, dout, &states.met, &states.blocks(), problem);
        return Gradients { query, key, value };
    }
    let after = states_by(way, [qkv[0], dout], Direction::Backward, problem);
    let within = gradients_within_by(way, qkv, states, dout, problem);
    within.gradients_by(way, qkv, &after, problem)
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

/// The positions in blocks.
fn ranges(length: usize, block: usize) -> Vec<Range<usize>> {
    (0..length)
        .step_by(block)
        .map(|start| start..length.min(start + block))
        .collect()
}

fn check([q, k, v]: [&Tensor<4>; 3], problem: &Problem) {
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
    check_decays(problem);
}

fn check_states([a, b]: [&Tensor<4>; 2], direction: Direction, problem: &Problem) {
    let (a, b) = (a.dims(), b.dims());
    let (names, heads) = match direction {
        Direction::Forward => (["k", "v"], problem.heads.kv()),
        Direction::Backward => (["q", "dout"], problem.heads.query.clone()),
    };
    assert!(
        a[..3] == b[..3] && a[2] == heads.len(),
        "linear attention: {} {a:?} and {} {b:?} must be [B, L, H, d] and [B, L, H, dv], and hold the heads {heads:?}",
        names[0],
        names[1]
    );
    check_decays(problem);
}

fn check_gradient([q, _, v]: [&Tensor<4>; 3], dout: &Tensor<4>) {
    let ([batch, length, heads, _], [.., width]) = (q.dims(), v.dims());
    let (expected, dout) = ([batch, length, heads, width], dout.dims());
    assert!(
        dout == expected,
        "linear attention: dout {dout:?} must be {expected:?}"
    );
}

fn check_decays(problem: &Problem) {
    assert!(
        problem.heads.query.end <= problem.decay.len(),
        "linear attention: {} decays are too few for the query heads {:?}",
        problem.decay.len(),
        problem.heads.query
    );
}

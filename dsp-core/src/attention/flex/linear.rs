//! Linear attention on the CPU in f32: what [`super::super::linear`] computes of a chunk, block by block.
//!
//! ```text
//!   one head of one sample       ┌─────┐ powers of the decay on the triangle, a strip of rows at a time;
//!   a block: its rows of q, k    │▒    │ what lies right of a strip is left out
//!   and v, packed once, and   ▶  │▒▒▒  │
//!   the state that it meets      │▒▒▒▒▒│ a strip's scores, and both results, stay in the first cache
//!                                └─────┘
//! ```
//!
//! States run through the blocks of a head one after the other; once they are known, all blocks of all heads are
//! computed side by side. A row's bits depend on neither the number of threads nor the rows after it in its block.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::forward::padded;
use super::rows::{Rows, RowsOut, readable};
use super::{Head, flex, heads_of, pack, tensor};
use crate::attention::linear::{Direction, Problem};
use crate::simd::{Left, Level, Product, Right, Store, panel_width};

/// Rows whose scores are taken at once. More of them read what is packed less often, and compute more scores that lie
/// right of the diagonal.
const STRIP: usize = 24;

/// The powers of a head's decay, in f32 from f64.
struct Powers {
    /// `λ^i`, as far as a block is long.
    rising: Vec<f32>,
    /// `c·λ^{C−1−i}`: its end is what row `i` of a block sees of the rows up to itself.
    falling: Vec<f32>,
    scale: f32,
}

impl Powers {
    fn all(problem: &Problem, blocks: &[Range<usize>]) -> Vec<Self> {
        let longest = blocks.iter().map(Range::len).max().unwrap_or(0);
        let of_head = |&decay: &f64| {
            let power = |i: usize| decay.powi(i as i32);
            Self {
                rising: (0..=longest).map(|i| power(i) as f32).collect(),
                falling: (0..longest)
                    .rev()
                    .map(|i| (problem.scale * power(i)) as f32)
                    .collect(),
                scale: problem.scale as f32,
            }
        };
        problem.decays().iter().map(of_head).collect()
    }

    /// `c·λ^{i+1}`: how a row is reached by the state before its block.
    #[inline(always)]
    fn reached(&self, row: usize) -> f32 {
        self.scale * self.rising[row + 1]
    }

    /// `λ^{C−1−j}`: how a row of a block of `rows` enters the state after it.
    #[inline(always)]
    fn aged(&self, row: usize, rows: usize) -> f32 {
        self.rising[rows - 1 - row]
    }

    /// Scores of a row of a block, times `c·λ^{i−j}`, and 0 right of the diagonal.
    #[inline(always)]
    fn weigh(&self, row: usize, scores: &mut [f32]) {
        let (seen, hidden) = scores.split_at_mut(row + 1);
        let powers = &self.falling[self.falling.len() - 1 - row..];
        seen.iter_mut()
            .zip(powers)
            .for_each(|(x, power)| *x *= power);
        hidden.fill(0.0);
    }
}

/// The state that leaves, `[B, Hq, d, dv]`, and those that the blocks meet, `[B, Hq, blocks·d, dv]`; each block adds
/// the outer products of its rows of `a` and `b`.
pub(in crate::attention) fn states(
    level: Level,
    ab: [&Tensor<4>; 2],
    blocks: &[Range<usize>],
    direction: Direction,
    problem: &Problem,
) -> [Tensor<4>; 2] {
    let device = ab[0].device();
    let ([samples, _, _, d], dv) = (ab[0].dims(), ab[1].dims()[3]);
    let heads = problem.heads.query.len();
    let inputs = ab.map(input);
    let [a, b] = inputs.each_ref().map(Rows::of);
    let mut last = vec![0.0; samples * heads * d * dv];
    let mut met = vec![0.0; last.len() * blocks.len()];
    let powers = Powers::all(problem, blocks);
    let states = (last.par_chunks_mut(d * dv)).zip(met.par_chunks_mut(blocks.len() * d * dv));
    let of_head = |scratch: &mut _, (index, (last, met))| {
        let (sample, head) = (index / heads, index % heads);
        level.run(Run {
            from: [&a, &b],
            sample,
            head: match direction {
                Direction::Forward => problem.kv_head(head),
                Direction::Backward => head,
            },
            powers: &powers[head],
            blocks,
            direction,
            last,
            met,
            scratch,
        });
    };
    (states.enumerate()).for_each_init(Scratch::default, of_head);
    [
        tensor(last, [samples, heads, d, dv], &device),
        tensor(met, [samples, heads, blocks.len() * d, dv], &device),
    ]
}

/// The output: `[B, L, Hq, dv]`. Of the rows of each block alone, or with what the states that they meet give them.
pub(in crate::attention) fn output(
    level: Level,
    [q, k, v]: [&Tensor<4>; 3],
    met: Option<&Tensor<5>>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> Tensor<4> {
    let (inputs, met) = ([k, v].map(input), met.map(states_of));
    let within = Some(inputs.each_ref().map(Rows::of));
    let base = None;
    let met = met.as_ref().map(Rows::of);
    outputs(
        level,
        q,
        Terms { base, met, within },
        v.dims()[3],
        blocks,
        problem,
    )
}

/// An output to which the states that the blocks meet are added.
pub(in crate::attention) fn output_after(
    level: Level,
    q: &Tensor<4>,
    within: &Tensor<4>,
    met: &Tensor<5>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> Tensor<4> {
    let (base, met) = (input(within), states_of(met));
    let terms = Terms {
        base: Some(Rows::of(&base)),
        met: Some(Rows::of(&met)),
        within: None,
    };
    outputs(level, q, terms, within.dims()[3], blocks, problem)
}

fn outputs(
    level: Level,
    q: &Tensor<4>,
    terms: Terms<'_>,
    width: usize,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> Tensor<4> {
    let [samples, length, heads, _] = q.dims();
    let device = q.device();
    let q = input(q);
    let mut out = vec![0.0; samples * length * heads * width];
    let powers = Powers::all(problem, blocks);
    let forward = Forward {
        q: Rows::of(&q),
        terms,
        powers: &powers,
        problem,
        out: RowsOut::new(&mut out, [samples, length, heads], width),
        width,
    };
    let block = |scratch: &mut _, index: usize| {
        // Heads before blocks: the rows of a position's heads lie side by side.
        let (of_sample, head) = (index / heads, index % heads);
        let block = of_sample % blocks.len();
        level.run(Block {
            forward: &forward,
            sample: of_sample / blocks.len(),
            head,
            index: block,
            rows: blocks[block].clone(),
            scratch,
        });
    };
    (0..samples * heads * blocks.len())
        .into_par_iter()
        .for_each_init(Scratch::default, block);
    tensor(out, [samples, length, heads, width], &device)
}

/// The gradients of the query, the key and the value, from the rows of each block and the state before it, and with
/// what the gradients of the states after the blocks contribute, if they are known.
pub(in crate::attention) fn gradients(
    level: Level,
    [q, k, v]: [&Tensor<4>; 3],
    dout: &Tensor<4>,
    (met, after): (&Tensor<5>, Option<&Tensor<5>>),
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 3] {
    let (shape, device) = (q.dims(), q.device());
    let inputs = [q, dout].map(input);
    let (met, after) = (states_of(met), after.map(states_of));
    let mut dq = vec![0.0; shape.iter().product()];
    let [q, dout] = inputs.each_ref().map(Rows::of);
    let terms = GradientTerms {
        base: None,
        before: Some(Before {
            q,
            dout,
            met: Rows::of(&met),
            dq: RowsOut::new(&mut dq, [shape[0], shape[1], shape[2]], shape[3]),
        }),
        after: after.as_ref().map(Rows::of),
    };
    let [dk, dv] = key_gradients(level, [k, v], terms, blocks, problem);
    [tensor(dq, shape, &device), dk, dv]
}

/// The gradients of the key and the value to which those of the states after the blocks are added.
pub(in crate::attention) fn gradients_after(
    level: Level,
    kv: [&Tensor<4>; 2],
    within: [&Tensor<4>; 2],
    after: &Tensor<5>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 2] {
    let (base, after) = (within.map(input), states_of(after));
    let terms = GradientTerms {
        base: Some(base.each_ref().map(Rows::of)),
        before: None,
        after: Some(Rows::of(&after)),
    };
    key_gradients(level, kv, terms, blocks, problem)
}

fn key_gradients(
    level: Level,
    kv: [&Tensor<4>; 2],
    terms: GradientTerms<'_>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 2] {
    let device = kv[0].device();
    let shapes = kv.map(Tensor::dims);
    let inputs = kv.map(input);
    let [mut dk, mut dv] = shapes.map(|shape| vec![0.0; shape.iter().product()]);
    let of = |data, shape: [usize; 4]| RowsOut::new(data, [shape[0], shape[1], shape[2]], shape[3]);
    let powers = Powers::all(problem, blocks);
    let [k, v] = inputs.each_ref().map(Rows::of);
    let backward = Backward {
        k,
        v,
        terms,
        powers: &powers,
        dk: of(&mut dk, shapes[0]),
        dv: of(&mut dv, shapes[1]),
    };
    let heads = heads_of(shapes[0][0], &problem.heads);
    let kv_heads = shapes[0][2];
    let block = |scratch: &mut _, index: usize| {
        let (of_sample, head) = (index / kv_heads, index % kv_heads);
        let (sample, block) = (of_sample / blocks.len(), of_sample % blocks.len());
        level.run(BlockBack {
            backward: &backward,
            head: &heads[sample * kv_heads + head],
            index: block,
            rows: blocks[block].clone(),
            scratch,
        });
    };
    (0..heads.len() * blocks.len())
        .into_par_iter()
        .for_each_init(Scratch::default, block);
    [
        tensor(dk, shapes[0], &device),
        tensor(dv, shapes[1], &device),
    ]
}

fn input(x: &Tensor<4>) -> FlexTensor {
    readable(flex(x.clone()))
}

/// `[B, Hq, blocks, d, dv]` with a row of a state for a position: `[B, blocks·d, Hq, dv]`.
fn states_of(met: &Tensor<5>) -> FlexTensor {
    let [samples, heads, blocks, d, dv] = met.dims();
    let rows = met.clone().reshape([samples, heads, blocks * d, dv]);
    input(&rows.swap_dims(1, 2))
}

/// A matrix whose rows lie `stride` apart.
#[inline(always)]
fn as_rows(data: &[f32], stride: usize) -> Left<'_> {
    let (row, step) = (stride, 1);
    Left { data, row, step }
}

/// A matrix whose columns lie `stride` apart.
#[inline(always)]
fn as_columns(data: &[f32], stride: usize) -> Left<'_> {
    let (row, step) = (1, stride);
    Left { data, row, step }
}

/// A product with panels of so many steps.
#[inline(always)]
fn multiply<S: Simd>(
    simd: S,
    sizes: [usize; 3],
    left: Left<'_>,
    (right, steps): (&[f32], usize),
    (out, out_row): (&mut [f32], usize),
    store: Store,
) {
    let right = Right {
        data: right,
        panel: steps * panel_width::<S>(),
    };
    simd.vectorize(Product {
        sizes,
        left,
        right,
        out,
        out_row,
        store,
    });
}

/// Writes a row, and what was there already added to it.
#[inline(always)]
fn write(to: &mut [f32], from: &[f32], base: Option<&[f32]>) {
    match base {
        None => to.copy_from_slice(&from[..to.len()]),
        Some(base) => {
            let sums = from.iter().zip(base).map(|(a, b)| a + b);
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum);
        }
    }
}

/// What a thread needs for a block; kept from one to the next.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    q_panels: Vec<f32>,
    k: Vec<f32>,
    k_panels: Vec<f32>,
    k_transposed: Vec<f32>,
    v: Vec<f32>,
    v_panels: Vec<f32>,
    v_transposed: Vec<f32>,
    dout: Vec<f32>,
    dout_panels: Vec<f32>,
    state: Vec<f32>,
    weights: Vec<f32>,
    dweights: Vec<f32>,
    out: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// The states of one head.
struct Run<'a> {
    from: [&'a Rows<'a>; 2],
    sample: usize,
    /// Of the tensors.
    head: usize,
    powers: &'a Powers,
    blocks: &'a [Range<usize>],
    direction: Direction,
    last: &'a mut [f32],
    met: &'a mut [f32],
    scratch: &'a mut Scratch,
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            from: [a, b],
            sample,
            head,
            powers,
            blocks,
            direction,
            last,
            met,
            scratch,
        } = self;
        let Scratch {
            k: packed_a,
            v_panels: packed_b,
            state,
            ..
        } = scratch;
        let lanes = S::F32_LANES;
        let (d, dv) = (a.width(), b.width());
        let [a_row, row] = [d, dv].map(|width| width.next_multiple_of(lanes));
        state.clear();
        state.resize(d * row, 0.0);
        for step in 0..blocks.len() {
            let index = match direction {
                Direction::Forward => step,
                Direction::Backward => blocks.len() - 1 - step,
            };
            let rows = blocks[index].clone();
            let count = rows.len();
            let met = &mut met[index * d * dv..(index + 1) * d * dv];
            for (to, from) in met.chunks_exact_mut(dv).zip(state.chunks_exact(row)) {
                to.copy_from_slice(&from[..dv]);
            }
            let weights = (0..count).map(|row| match direction {
                Direction::Forward => powers.aged(row, count),
                Direction::Backward => powers.reached(row),
            });
            pack::weighted_rows::<S>(packed_a, a.positions(sample, &rows, head).zip(weights), d);
            pack::panels::<S>(packed_b, b.positions(sample, &rows, head), count, dv);
            let whole = powers.rising[count];
            state.iter_mut().for_each(|x| *x *= whole);
            multiply(
                simd,
                [d, dv, count],
                as_columns(packed_a, a_row),
                (packed_b, count),
                (state, row),
                Store::Add,
            );
        }
        for (to, from) in last.chunks_exact_mut(dv).zip(state.chunks_exact(row)) {
            to.copy_from_slice(&from[..dv]);
        }
    }
}

/// One forward: what is read, and what is written.
struct Forward<'a> {
    q: Rows<'a>,
    terms: Terms<'a>,
    powers: &'a [Powers],
    problem: &'a Problem,
    out: RowsOut<'a>,
    width: usize,
}

/// What is added up to the output.
struct Terms<'a> {
    /// What is there already.
    base: Option<Rows<'a>>,
    /// What the states give that the blocks meet.
    met: Option<Rows<'a>>,
    /// What the rows of a block give each other, by their keys and values.
    within: Option<[Rows<'a>; 2]>,
}

/// A block of one query head.
struct Block<'a> {
    forward: &'a Forward<'a>,
    sample: usize,
    head: usize,
    index: usize,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            forward,
            sample,
            head,
            index,
            rows,
            scratch,
        } = self;
        let Forward {
            q,
            terms,
            problem,
            out: to,
            width: dv,
            ..
        } = forward;
        let powers = &forward.powers[head];
        let lanes = S::F32_LANES;
        let (count, d, dv) = (rows.len(), q.width(), *dv);
        let [q_row, out_row] = [d, dv].map(|width| width.next_multiple_of(lanes));
        let Scratch {
            q: packed_q,
            k_transposed,
            v_panels,
            state,
            weights,
            out,
            ..
        } = scratch;
        pack::by_rows::<S>(packed_q, q.positions(sample, &rows, head), d, 1.0);
        out.clear();
        out.resize(count * out_row, 0.0);
        if let Some(met) = &terms.met {
            let of_block = index * d..(index + 1) * d;
            pack::panels::<S>(state, met.positions(sample, &of_block, head), d, dv);
            multiply(
                simd,
                [count, dv, d],
                as_rows(packed_q, q_row),
                (state, d),
                (out, out_row),
                Store::Set,
            );
            for (row, out) in out.chunks_exact_mut(out_row).enumerate() {
                let reached = powers.reached(row);
                out.iter_mut().for_each(|x| *x *= reached);
            }
        }
        if let Some([k, v]) = &terms.within {
            let kv_head = problem.kv_head(head);
            let of_k = k.positions(sample, &rows, kv_head);
            pack::transposed_panels::<S>(k_transposed, of_k, count, d);
            pack::panels::<S>(v_panels, v.positions(sample, &rows, kv_head), count, dv);
            let score_row = padded(count);
            weights.resize(STRIP * score_row, 0.0);
            for first in (0..count).step_by(STRIP) {
                let end = count.min(first + STRIP);
                multiply(
                    simd,
                    [end - first, end, d],
                    as_rows(&packed_q[first * q_row..], q_row),
                    (k_transposed, d),
                    (weights, score_row),
                    Store::Set,
                );
                for row in first..end {
                    let begin = (row - first) * score_row;
                    powers.weigh(row, &mut weights[begin..begin + end]);
                }
                multiply(
                    simd,
                    [end - first, dv, end],
                    as_rows(weights, score_row),
                    (v_panels, count),
                    (&mut out[first * out_row..], out_row),
                    Store::Add,
                );
            }
        }
        for (position, out) in rows.zip(out.chunks_exact(out_row)) {
            let at = [sample, position, head];
            // SAFETY: this block alone has these rows of this head, and each is written once.
            let to = unsafe { to.row(at) };
            write(to, out, terms.base.as_ref().map(|base| base.row(at)));
        }
    }
}

/// One backward: what is read, and what is written.
struct Backward<'a> {
    k: Rows<'a>,
    v: Rows<'a>,
    terms: GradientTerms<'a>,
    powers: &'a [Powers],
    dk: RowsOut<'a>,
    dv: RowsOut<'a>,
}

/// What is added up to the gradients.
struct GradientTerms<'a> {
    /// What is there already of the key's and the value's.
    base: Option<[Rows<'a>; 2]>,
    before: Option<Before<'a>>,
    /// What the gradients of the states give that come after the blocks.
    after: Option<Rows<'a>>,
}

/// What the rows of a block and the state before it give.
struct Before<'a> {
    q: Rows<'a>,
    dout: Rows<'a>,
    met: Rows<'a>,
    dq: RowsOut<'a>,
}

/// A block of one key-value head, with all its query heads.
struct BlockBack<'a> {
    backward: &'a Backward<'a>,
    head: &'a Head,
    index: usize,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for BlockBack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            backward,
            head,
            index,
            rows,
            scratch,
        } = self;
        let (sample, count) = (head.sample, rows.len());
        let Backward { k, v, terms, .. } = backward;
        let widths @ [d, dv] = [k.width(), v.width()];
        let [k_row, v_row] = widths.map(|width| width.next_multiple_of(S::F32_LANES));
        for (sum, row) in [(&mut scratch.dk, k_row), (&mut scratch.dv, v_row)] {
            sum.clear();
            sum.resize(count * row, 0.0);
        }
        let (of_k, of_v) = (
            k.positions(sample, &rows, head.kv),
            v.positions(sample, &rows, head.kv),
        );
        if terms.before.is_some() {
            pack::panels::<S>(&mut scratch.k_panels, of_k.clone(), count, d);
            pack::transposed_panels::<S>(&mut scratch.k_transposed, of_k.clone(), count, d);
            pack::transposed_panels::<S>(&mut scratch.v_transposed, of_v.clone(), count, dv);
        }
        let states = index * d..(index + 1) * d;
        for query in head.query.clone() {
            let powers = &backward.powers[query];
            if let Some(before) = &terms.before {
                scratch.before(simd, before, powers, (sample, &rows, query), &states);
            }
            if let Some(after) = &terms.after {
                let aged = || (0..count).map(|row| powers.aged(row, count));
                pack::weighted_rows::<S>(&mut scratch.k, of_k.clone().zip(aged()), d);
                pack::weighted_rows::<S>(&mut scratch.v, of_v.clone().zip(aged()), dv);
                let state = after.positions(sample, &states, query);
                scratch.after(simd, state, [count, d, dv]);
            }
        }
        for (offset, position) in rows.enumerate() {
            let at = [sample, position, head.kv];
            // SAFETY: this block alone has these rows of this head, and each is written once.
            let (dk, dv) = unsafe { (backward.dk.row(at), backward.dv.row(at)) };
            let [of_k, of_v] = match &terms.base {
                Some(base) => base.each_ref().map(|base| Some(base.row(at))),
                None => [None, None],
            };
            write(dk, &scratch.dk[offset * k_row..], of_k);
            write(dv, &scratch.dv[offset * v_row..], of_v);
        }
    }
}

impl Scratch {
    /// Adds to `dk` and `dv` what the rows of the block give, and writes `dq`.
    #[inline(always)]
    fn before<S: Simd>(
        &mut self,
        simd: S,
        before: &Before<'_>,
        powers: &Powers,
        (sample, rows, head): (usize, &Range<usize>, usize),
        states: &Range<usize>,
    ) {
        let Before { q, dout, met, dq } = before;
        let (lanes, panel) = (S::F32_LANES, panel_width::<S>());
        let (count, d, dv) = (rows.len(), q.width(), dout.width());
        let [q_row, v_row] = [d, dv].map(|width| width.next_multiple_of(lanes));
        let (of_q, of_dout) = (
            q.positions(sample, rows, head),
            dout.positions(sample, rows, head),
        );
        pack::by_rows::<S>(&mut self.q, of_q.clone(), d, 1.0);
        pack::panels::<S>(&mut self.q_panels, of_q, count, d);
        pack::by_rows::<S>(&mut self.dout, of_dout.clone(), dv, 1.0);
        pack::panels::<S>(&mut self.dout_panels, of_dout, count, dv);
        let state = met.positions(sample, states, head);
        pack::transposed_panels::<S>(&mut self.state, state, d, dv);
        let out = &mut self.out;
        out.resize(count * q_row, 0.0);
        multiply(
            simd,
            [count, d, dv],
            as_rows(&self.dout, v_row),
            (&self.state, dv),
            (out, q_row),
            Store::Set,
        );
        for (row, out) in out.chunks_exact_mut(q_row).take(count).enumerate() {
            let reached = powers.reached(row);
            out.iter_mut().for_each(|x| *x *= reached);
        }
        let score_row = padded(count);
        for weights in [&mut self.weights, &mut self.dweights] {
            weights.resize(STRIP * score_row, 0.0);
        }
        for first in (0..count).step_by(STRIP) {
            let end = count.min(first + STRIP);
            let strip = end - first;
            multiply(
                simd,
                [strip, end, d],
                as_rows(&self.q[first * q_row..], q_row),
                (&self.k_transposed, d),
                (&mut self.weights, score_row),
                Store::Set,
            );
            multiply(
                simd,
                [strip, end, dv],
                as_rows(&self.dout[first * v_row..], v_row),
                (&self.v_transposed, dv),
                (&mut self.dweights, score_row),
                Store::Set,
            );
            for row in first..end {
                let begin = (row - first) * score_row;
                let of_row = begin..begin + end;
                powers.weigh(row, &mut self.weights[of_row.clone()]);
                powers.weigh(row, &mut self.dweights[of_row]);
            }
            let [weights, dweights] = [&self.weights, &self.dweights];
            let from = first * panel;
            multiply(
                simd,
                [strip, d, end],
                as_rows(dweights, score_row),
                (&self.k_panels, count),
                (&mut out[first * q_row..], q_row),
                Store::Add,
            );
            multiply(
                simd,
                [end, d, strip],
                as_columns(dweights, score_row),
                (&self.q_panels[from..], count),
                (&mut self.dk, q_row),
                Store::Add,
            );
            multiply(
                simd,
                [end, dv, strip],
                as_columns(weights, score_row),
                (&self.dout_panels[from..], count),
                (&mut self.dv, v_row),
                Store::Add,
            );
        }
        for (position, out) in rows.clone().zip(out.chunks_exact(q_row)) {
            // SAFETY: this block alone has these rows of this head, and each is written once.
            let to = unsafe { dq.row([sample, position, head]) };
            write(to, out, None);
        }
    }

    /// Adds to `dk` and `dv` what the gradient of the state after the block gives, by the aged keys and values.
    #[inline(always)]
    fn after<'a, S: Simd>(
        &mut self,
        simd: S,
        state: impl Iterator<Item = &'a [f32]> + Clone,
        [count, d, dv]: [usize; 3],
    ) {
        let lanes = S::F32_LANES;
        let [k_row, v_row] = [d, dv].map(|width| width.next_multiple_of(lanes));
        pack::panels::<S>(&mut self.state, state.clone(), d, dv);
        multiply(
            simd,
            [count, dv, d],
            as_rows(&self.k, k_row),
            (&self.state, d),
            (&mut self.dv, v_row),
            Store::Add,
        );
        pack::transposed_panels::<S>(&mut self.state, state, d, dv);
        multiply(
            simd,
            [count, d, dv],
            as_rows(&self.v, v_row),
            (&self.state, dv),
            (&mut self.dk, k_row),
            Store::Add,
        );
    }
}

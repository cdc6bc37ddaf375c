//! The gradients of a block: from its rows and the state that it meets, and from the gradient of the state after it.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::forward::padded;
use super::super::rows::{NewRows, Rows};
use super::super::{Head, heads_of, pack, tensor};
use super::parts::of_state;
use super::{Powers, STRIP, add_to, input, states_of};
use crate::attention::linear::Problem;
use crate::simd::{Ahead, Left, Level, Run, Store, multiply, panel_width};

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
    let [q, dout] = inputs.each_ref().map(Rows::of);
    let before = Before {
        q,
        dout,
        met: Rows::of(&met),
    };
    let dq = NewRows::new([shape[0], shape[1], shape[2]], shape[3]);
    let terms = GradientTerms {
        base: None,
        before: Some((before, &dq)),
        after: after.as_ref().map(Rows::of),
    };
    let [dk, dv] = key_gradients(level, [k, v], terms, blocks, problem);
    [tensor(dq.all(), shape, &device), dk, dv]
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
    let [dk, dv] =
        shapes.map(|[samples, length, heads, width]| NewRows::new([samples, length, heads], width));
    let powers = Powers::all(problem, blocks);
    let [k, v] = inputs.each_ref().map(Rows::of);
    let backward = Backward {
        k,
        v,
        terms,
        powers: &powers,
        dk,
        dv,
    };
    let heads = heads_of(shapes[0][0], &problem.heads);
    let kv_heads = shapes[0][2];
    let parts = heads.len() * blocks.len();
    let place = |part: usize| {
        let (of_sample, head) = (part / kv_heads, part % kv_heads);
        let (sample, index) = (of_sample / blocks.len(), of_sample % blocks.len());
        (index, &heads[sample * kv_heads + head])
    };
    let block = |scratch: &mut Scratch, part: usize| {
        if part + 1 < parts {
            let (index, head) = place(part + 1);
            let rows = &blocks[index];
            scratch
                .ahead
                .want(backward.runs((index, rows), head), rows.len());
        }
        let (index, head) = place(part);
        level.run(BlockBack {
            backward: &backward,
            head,
            index,
            rows: blocks[index].clone(),
            scratch,
        });
    };
    (0..parts)
        .into_par_iter()
        .for_each_init(Scratch::default, block);
    [
        tensor(backward.dk.all(), shapes[0], &device),
        tensor(backward.dv.all(), shapes[1], &device),
    ]
}

/// What a thread needs for a block; kept from one to the next.
#[derive(Default)]
pub(super) struct Scratch {
    q: Vec<f32>,
    q_panels: Vec<f32>,
    k: Vec<f32>,
    k_panels: Vec<f32>,
    k_transposed: Vec<f32>,
    v: Vec<f32>,
    v_transposed: Vec<f32>,
    dout: Vec<f32>,
    /// Of the output's gradient, once `before` has packed it.
    pub(super) dout_panels: Vec<f32>,
    state: Vec<f32>,
    weights: Vec<f32>,
    dweights: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// What is read and written after this block.
    pub(super) ahead: Ahead,
}

/// One backward: what is read, and what is written.
struct Backward<'a> {
    k: Rows<'a>,
    v: Rows<'a>,
    terms: GradientTerms<'a>,
    powers: &'a [Powers],
    dk: NewRows,
    dv: NewRows,
}

impl Backward<'_> {
    /// What a block of a head reads and writes.
    fn runs(
        &self,
        (index, rows): (usize, &Range<usize>),
        head: &Head,
    ) -> impl Iterator<Item = Run> {
        let (d, count, sample) = (self.k.width(), rows.len(), head.sample);
        let at = [sample, rows.start, head.kv];
        let own = [
            self.k.run(at),
            self.v.run(at),
            self.dk.run(at),
            self.dv.run(at),
        ];
        let base = self.terms.base.iter().flatten().map(move |x| x.run(at));
        let (first, terms) = (rows.start, &self.terms);
        let of_query = move |query| {
            let at = [sample, first, query];
            let before = terms.before.iter().flat_map(move |(before, dq)| {
                let read = before.runs(at, index, count);
                read.into_iter().chain([dq.run(at)])
            });
            let after = terms.after.iter().map(move |after| {
                let after = after.run([sample, index * d, query]);
                of_state(after, d, count)
            });
            before.chain(after)
        };
        let queries = head.query.clone().flat_map(of_query);
        own.into_iter().chain(base).chain(queries)
    }
}

/// What is added up to the gradients.
struct GradientTerms<'a> {
    /// What is there already of the key's and the value's.
    base: Option<[Rows<'a>; 2]>,
    /// And where the query's is written.
    before: Option<(Before<'a>, &'a NewRows)>,
    /// What the gradients of the states give that come after the blocks.
    after: Option<Rows<'a>>,
}

/// What the rows of a block and the state before it give.
pub(super) struct Before<'a> {
    pub(super) q: Rows<'a>,
    pub(super) dout: Rows<'a>,
    pub(super) met: Rows<'a>,
}

impl Before<'_> {
    /// What is read of a block of `count` rows of a query head, the first of which is `at`.
    pub(super) fn runs(
        &self,
        at @ [sample, _, query]: [usize; 3],
        index: usize,
        count: usize,
    ) -> [Run; 3] {
        let d = self.q.width();
        let met = self.met.run([sample, index * d, query]);
        [self.q.run(at), self.dout.run(at), of_state(met, d, count)]
    }
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
        let (of_k, of_v) = (
            k.positions(sample, &rows, head.kv),
            v.positions(sample, &rows, head.kv),
        );
        scratch.enter::<S>(count, widths);
        if terms.before.is_some() {
            scratch.pack::<S>((of_k.clone(), of_v.clone()), count, widths);
        }
        let states = index * d..(index + 1) * d;
        for query in head.query.clone() {
            let powers = &backward.powers[query];
            if let Some((before, dq)) = &terms.before {
                scratch.before(simd, before, powers, (sample, &rows, query), &states);
                let from = scratch.query_gradient::<S>(d);
                // SAFETY: this block alone has these rows of this head, and it comes once.
                unsafe { dq.write([sample, rows.start, query], from) };
            }
            if let Some(after) = &terms.after {
                let state = after.positions(sample, &states, query);
                let kv = (of_k.clone(), of_v.clone());
                scratch.after(simd, kv, state, powers, [count, d, dv]);
            }
        }
        if let Some([base_k, base_v]) = &terms.base {
            let [k_row, v_row] = widths.map(|width| width.next_multiple_of(S::F32_LANES));
            add_to(
                &mut scratch.dk,
                base_k.positions(sample, &rows, head.kv),
                k_row,
            );
            add_to(
                &mut scratch.dv,
                base_v.positions(sample, &rows, head.kv),
                v_row,
            );
        }
        let at = [sample, rows.start, head.kv];
        let [of_k, of_v] = scratch.key_gradients::<S>(widths);
        // SAFETY: this block alone has these rows of this head, and it comes once.
        unsafe {
            backward.dk.write(at, of_k);
            backward.dv.write(at, of_v);
        }
    }
}

impl Scratch {
    /// Begins a block of `count` rows of a key-value head.
    #[inline(always)]
    pub(super) fn enter<S: Simd>(&mut self, count: usize, widths: [usize; 2]) {
        let [k_row, v_row] = widths.map(|width| width.next_multiple_of(S::F32_LANES));
        for (sum, row) in [(&mut self.dk, k_row), (&mut self.dv, v_row)] {
            sum.clear();
            sum.resize(count * row, 0.0);
        }
    }

    /// Packs the keys and values as [`before`](Self::before) needs them.
    #[inline(always)]
    pub(super) fn pack<'a, S: Simd>(
        &mut self,
        (k, v): (
            impl Iterator<Item = &'a [f32]> + Clone,
            impl Iterator<Item = &'a [f32]>,
        ),
        count: usize,
        [d, dv]: [usize; 2],
    ) {
        pack::panels::<S>(&mut self.k_panels, k.clone(), count, d);
        pack::transposed_panels::<S>(&mut self.k_transposed, k, count, d);
        pack::transposed_panels::<S>(&mut self.v_transposed, v, count, dv);
    }

    /// The gradients of the block's keys and values: their rows, in whole vectors.
    #[inline(always)]
    pub(super) fn key_gradients<S: Simd>(
        &self,
        [d, dv]: [usize; 2],
    ) -> [impl Iterator<Item = &[f32]>; 2] {
        [(&self.dk, d), (&self.dv, dv)]
            .map(|(sums, width)| sums.chunks_exact(width.next_multiple_of(S::F32_LANES)))
    }

    /// The gradient of the block's queries, once `before` has been called: its rows, in whole vectors.
    #[inline(always)]
    pub(super) fn query_gradient<S: Simd>(&self, d: usize) -> impl Iterator<Item = &[f32]> {
        self.dq.chunks_exact(d.next_multiple_of(S::F32_LANES))
    }

    /// Adds to `dk` and `dv` what the rows of a query head's block give, and makes the query's gradient.
    #[inline(always)]
    pub(super) fn before<S: Simd>(
        &mut self,
        simd: S,
        before: &Before<'_>,
        powers: &Powers,
        (sample, rows, head): (usize, &Range<usize>, usize),
        states: &Range<usize>,
    ) {
        let Before { q, dout, met } = before;
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
        let out = &mut self.dq;
        out.resize(count * q_row, 0.0);
        multiply(
            simd,
            [count, d, dv],
            Left::rows(&self.dout, v_row),
            (&self.state, dv),
            (out, q_row),
            Store::Set,
            &mut self.ahead,
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
                Left::rows(&self.q[first * q_row..], q_row),
                (&self.k_transposed, d),
                (&mut self.weights, score_row),
                Store::Set,
                &mut self.ahead,
            );
            multiply(
                simd,
                [strip, end, dv],
                Left::rows(&self.dout[first * v_row..], v_row),
                (&self.v_transposed, dv),
                (&mut self.dweights, score_row),
                Store::Set,
                &mut self.ahead,
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
                Left::rows(dweights, score_row),
                (&self.k_panels, count),
                (&mut out[first * q_row..], q_row),
                Store::Add,
                &mut self.ahead,
            );
            multiply(
                simd,
                [end, d, strip],
                Left::columns(dweights, score_row),
                (&self.q_panels[from..], count),
                (&mut self.dk, q_row),
                Store::Add,
                &mut self.ahead,
            );
            multiply(
                simd,
                [end, dv, strip],
                Left::columns(weights, score_row),
                (&self.dout_panels[from..], count),
                (&mut self.dv, v_row),
                Store::Add,
                &mut self.ahead,
            );
        }
    }

    /// Adds to `dk` and `dv` what the gradient of the state after the block gives, by the aged keys and values.
    #[inline(always)]
    pub(super) fn after<'a, 's, S: Simd>(
        &mut self,
        simd: S,
        (k, v): (
            impl Iterator<Item = &'a [f32]>,
            impl Iterator<Item = &'a [f32]>,
        ),
        state: impl Iterator<Item = &'s [f32]> + Clone,
        powers: &Powers,
        [count, d, dv]: [usize; 3],
    ) {
        let aged = || (0..count).map(|row| powers.aged(row, count));
        pack::weighted_rows::<S>(&mut self.k, k.zip(aged()), d);
        pack::weighted_rows::<S>(&mut self.v, v.zip(aged()), dv);
        let lanes = S::F32_LANES;
        let [k_row, v_row] = [d, dv].map(|width| width.next_multiple_of(lanes));
        pack::panels::<S>(&mut self.state, state.clone(), d, dv);
        multiply(
            simd,
            [count, dv, d],
            Left::rows(&self.k, k_row),
            (&self.state, d),
            (&mut self.dv, v_row),
            Store::Add,
            &mut self.ahead,
        );
        pack::transposed_panels::<S>(&mut self.state, state, d, dv);
        multiply(
            simd,
            [count, d, dv],
            Left::rows(&self.v, v_row),
            (&self.state, dv),
            (&mut self.dk, k_row),
            Store::Add,
            &mut self.ahead,
        );
    }
}

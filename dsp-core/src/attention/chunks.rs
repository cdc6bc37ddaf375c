//! Linear attention over an axis that is split in contiguous chunks: each rank computes its own, and what comes from
//! the others is one state.
//!
//! ```text
//!   forward     own state  M = Σ λ^{e−1−i} k_iᵀ v_i  ── relay ──▶  state before the chunk   P = Σ λ^{b−e_s} M_s
//!   backward    its gradient D = Σ λ^{i−b+1} q_iᵀ do_i ── relay ──▶  gradient after the chunk G = Σ λ^{b_t−e} D_t
//! ```
//!
//! How states get from rank to rank is the strategy's: a [`Relay`]. While they are on their way the rank computes what
//! the rows of each block give each other. No rank computes anything twice.

use burn::tensor::Tensor;

use super::linear;
use super::shard::{Attended, Fold, positions};
use crate::error::{CommError, Error, Tracking};
use crate::layout::{AxisSet, Layout, Shard};
use crate::strategy::{AttentionScope, Form, ModelShape, PlanError, Stage};
use crate::vjp;

/// Which way states go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From earlier positions to later ones.
    Forward,
    /// From later positions to earlier ones: the gradients.
    Backward,
}

/// How a strategy brings the ranks' states together.
pub trait Relay: Send + Sync + 'static {
    /// What is under way.
    type Started;

    /// Hands over this rank's own state, `[samples, Hq, d, dv]`.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    fn start(&self, own: Tensor<4>, direction: Direction) -> Result<Self::Started, CommError>;

    /// The state at this rank's edge that all chunks on the far side make together, as it arrives here; none where
    /// there is no chunk.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    fn finish(&self, started: Self::Started) -> Result<Option<Tensor<4>>, CommError>;
}

/// What a relay must know of the attention: how states age on their way.
#[derive(Debug, Clone)]
pub struct Chunks {
    /// The decays.
    pub problem: linear::Problem,
    /// How many positions of the attended axes each rank has.
    pub lengths: Vec<usize>,
    /// Whether a backward pass will answer.
    pub tracking: Tracking,
}

/// The elements of each rank's state in a stage where the residual stream is laid out as `residual`; none if the stage
/// is no attention over the axis that is split, and no state moves. `on_softmax` is the rule by which `strategy` refuses
/// an attention without states.
///
/// # Errors
/// [`PlanError::Form`] for softmax attention over the split axis, [`PlanError::Residual`] if the ranks' positions do not
/// follow one another.
pub fn moved_state(
    (strategy, on_softmax): (&str, &'static str),
    model: &ModelShape,
    stage: &Stage,
    residual: &Layout,
    ranks: usize,
) -> Result<Option<usize>, PlanError> {
    let Some((attention, ..)) = stage.attends_split(residual) else {
        return Ok(None);
    };
    if attention.form == Form::Softmax {
        return Err(PlanError::Form {
            strategy: strategy.to_owned(),
            stage: stage.name.clone(),
            rule: on_softmax,
        });
    }
    if !in_rank_order(residual, attention.axes, ranks) {
        return Err(PlanError::Residual {
            strategy: strategy.to_owned(),
            stage: stage.name.clone(),
            residual: Box::new(residual.clone()),
            rule: "a state runs through contiguous positions in rank order; split the outermost attended axis \
                   in plain blocks",
        });
    }
    Ok(Some(
        attention.state_elements(model.batch, residual.lengths()),
    ))
}

/// Whether the ranks' rows of an attention over `axes` are contiguous and in rank order, as linear attention in
/// chunks needs them.
fn in_rank_order(layout: &Layout, axes: AxisSet, ranks: usize) -> bool {
    let mut next = 0;
    (0..ranks)
        .flat_map(|rank| positions(layout, axes, rank))
        .all(|range| range.start == std::mem::replace(&mut next, range.end))
}

/// Linear attention whose axes are split in chunks, as one node.
///
/// # Shapes
/// - `qkv`: `[B, s1, s2, s3, heads·d]` each
/// - returns: laid out as the query; there is no logsumexp
///
/// # Errors
/// [`Error`] if the ranks fail; [`Error::Shape`] if the stage is not linear attention.
pub fn attend_in_chunks<R: Relay>(
    qkv: [Shard; 3],
    scope: &AttentionScope<'_>,
    relay: impl FnOnce(Chunks) -> R,
) -> Result<Attended, Error> {
    let attention = scope.attention;
    let Form::Linear { decay } = &attention.form else {
        return Err(Error::Shape {
            what: "an attention in chunks",
            got: vec![],
            rule: "it must be linear attention, of which a state is all that moves".to_owned(),
        });
    };
    let (layout, rank) = (qkv[0].layout().clone(), qkv[0].rank());
    let axes = attention.axes;
    let ranks = scope.scope.group.size();
    let length = |rank| -> usize {
        let lengths = layout.local_lengths(rank);
        axes.iter().map(|axis| lengths[axis.index()]).product()
    };
    let inputs = qkv.map(Shard::into_tensor);
    let problem = linear::Problem {
        heads: scope.heads.clone(),
        decay: decay.clone(),
        scale: attention.scale,
    };
    let relay = relay(Chunks {
        problem: problem.clone(),
        lengths: (0..ranks).map(length).collect(),
        tracking: Tracking::of(&inputs),
    });
    let fold = Fold::new(inputs[0].dims(), axes);
    let key_fold = Fold::new(inputs[1].dims(), axes);
    let (queries, keys) = (scope.heads.query.len(), scope.heads.kv().len());
    let [q, k, v] = inputs.each_ref().map(|x| x.clone().inner());
    let q = fold.fold(q, queries);
    let [k, v] = [k, v].map(|x| key_fold.fold(x, keys));

    let mut states = linear::states(&k, &v, &problem);
    let started = relay.start(states.last.clone(), Direction::Forward)?;
    let within = linear::within(&q, &k, &v, &problem);
    if let Some(state) = relay.finish(started)? {
        states.receive(&state, &problem);
    }

    let output = fold.unfold(within.output(&q, &states, &problem));
    let output = vjp::attach3(inputs, output, move |dout| {
        let dout = fold.fold(dout, queries);
        let qkv = [&q, &k, &v];
        let mut after = linear::state_gradients(&q, &dout, &problem);
        let started = relay.start(after.last.clone(), Direction::Backward)?;
        let within = linear::gradients_within(qkv, &states, &dout, &problem);
        if let Some(state) = relay.finish(started)? {
            after.receive(&state, &problem);
        }
        let linear::Gradients { query, key, value } = within.gradients(qkv, &after, &problem);
        Ok::<_, CommError>([
            fold.unfold(query),
            key_fold.unfold(key),
            key_fold.unfold(value),
        ])
    });
    Ok(Attended {
        output: Shard::new(output, layout, rank)?,
        logsumexp: None,
    })
}

//! Strategies that are only sketched, to prove that the trait has room for them: Megatron-SP's sharded heads
//! and MLP, a zigzag ring, and a mixture that runs each stage with one of its parts.
//!
//! They go through the same comparison as the real ones: outputs, all gradients, what is sent.
#![cfg(all(feature = "flex", feature = "dsp", feature = "ulysses"))]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use common::{Case, Checkpointing, HEAD, Sub, attend, check};
use dsp_core::attention::{self, Attended, Fold, HeadRange, Logsumexp, Problem, merge, positions};
use dsp_core::blocks::{Blocks, DIMS, DimBlocks};
use dsp_core::collective::relayout;
use dsp_core::cost::{self, Elements};
use dsp_core::error::Tracking;
use dsp_core::group::{Request, Step};
use dsp_core::layout::{MeshAxis, Value};
use dsp_core::ledger::{Collective, Phase};
use dsp_core::strategy::{
    AttentionScope, OutputLayout, Parameter, Placement, Plan, Role, Scope, StageKind, StagePlan,
    add_bias, check_softmax,
};
use dsp_core::{
    CommError, Error, Group, Layout, Mask, ModelShape, Partition, PlanError, SeqAxis,
    SequenceParallel, Shard, vjp,
};
use dsp_strategies::{Dsp, Ulysses};
use proptest::prelude::*;

/// As for the real strategies: f64's roundings.
const F64: f64 = 1e-10;

// --- Megatron-SP ------------------------------------------------------------------------------------------

/// The residual stream is split; a sub-layer gathers its input, computes its own heads or features of all
/// positions, and reduce-scatters the partial sums.
#[derive(Debug)]
struct Megatron;

impl SequenceParallel for Megatron {
    fn name(&self) -> &'static str {
        "megatron"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        check_softmax(self.name(), model)?;
        for stage in &model.stages {
            let heads = match &stage.kind {
                StageKind::Attention(attention) => attention.heads,
                StageKind::CrossAttention { heads } => *heads,
                _ => continue,
            };
            if heads.key_value < ranks {
                return Err(PlanError::Heads {
                    strategy: self.name(),
                    stage: stage.name.clone(),
                    heads: heads.key_value,
                    ranks,
                });
            }
        }
        let lengths = model.lengths()?;
        let residual = Layout::split(lengths, SeqAxis::FIRST, ranks);
        let partition = Partition::balanced(lengths[0], ranks);
        let others = lengths[1] * lengths[2];
        let sends = |rank| {
            // In by an all-gather, out by a reduce-scatter; each the other's transpose.
            let there = cost::all_gather(model.batch, model.hidden, others, &partition, rank);
            there + Elements::both(there.backward, there.forward)
        };
        let stage = StagePlan {
            residual: residual.clone(),
            inner: Layout::whole(lengths),
            sends: (0..ranks).map(sends).collect(),
            delegate: 0,
        };
        Ok(Plan {
            input: residual.clone(),
            stages: vec![stage; model.stages.len()],
            output: residual,
            output_sends: vec![Elements::default(); ranks],
        })
    }

    fn placement(&self, parameter: &Parameter<'_>, rank: usize, ranks: usize) -> Placement {
        let Parameter { role, shape, .. } = *parameter;
        let (dim, fused, units) = match role {
            Role::Columns { dim, fused, units } => (dim, fused, units),
            Role::Rows { dim, units } => (dim, 1, units),
            _ => return Placement::Replicated,
        };
        let part = shape[dim] / fused;
        let unit = part / units;
        let own = Partition::balanced(units, ranks);
        let ranges = (0..fused).flat_map(|index| {
            let own = own.ranges(rank).iter();
            own.map(move |range| index * part + range.start * unit..index * part + range.end * unit)
        });
        Placement::Sharded {
            dim,
            ranges: ranges.collect(),
        }
    }

    fn leave(&self, x: Shard, bias: Option<Tensor<1>>, scope: &Scope<'_>) -> Result<Shard, Error> {
        let x = relayout(
            x.with_value(Value::Partial),
            &scope.plan.residual,
            scope.group,
        )?;
        add_bias(x, bias)
    }
}

// --- zigzag ring ------------------------------------------------------------------------------------------

/// The first axis stays split in zigzag chunks; in its attention, keys and values go round the ring.
#[derive(Debug)]
struct Ring;

fn zigzag(lengths: [usize; 3], ranks: usize) -> Layout {
    if ranks == 1 {
        return Layout::whole(lengths);
    }
    let partition = Partition::zigzag(lengths[0], ranks);
    Layout::whole(lengths)
        .with_split(SeqAxis::FIRST, partition, MeshAxis::whole(ranks))
        .unwrap()
}

impl SequenceParallel for Ring {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        check_softmax(self.name(), model)?;
        let lengths = model.lengths()?;
        let layout = zigzag(lengths, ranks);
        let count = |rank: usize| layout.local_lengths(rank)[0];
        let sends = |kind: &StageKind, rank: usize| match kind {
            StageKind::Attention(attention)
                if attention.axes.contains(SeqAxis::FIRST) && ranks > 1 =>
            {
                let heads = 2 * attention.heads.key_value * attention.heads.dim;
                let unit = model.batch * lengths[1] * lengths[2] * heads;
                // All blocks but the next rank's pass through; of dK and dV, all but its own.
                let there = unit * (lengths[0] - count((rank + 1) % ranks));
                let back = there + unit * (lengths[0] - count(rank));
                Elements::both(there as u64, back as u64)
            }
            _ => Elements::default(),
        };
        let stages = model.stages.iter().map(|stage| StagePlan {
            residual: layout.clone(),
            inner: layout.clone(),
            sends: (0..ranks).map(|rank| sends(&stage.kind, rank)).collect(),
            delegate: 0,
        });
        Ok(Plan {
            input: layout.clone(),
            stages: stages.collect(),
            output: layout.clone(),
            output_sends: vec![Elements::default(); ranks],
        })
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let attention = scope.attention;
        let layout = qkv[0].layout().clone();
        if !attention.axes.iter().any(|axis| layout.is_split(axis)) {
            return attention::attend_local(qkv, attention, scope.logsumexp);
        }
        let rank = qkv[0].rank();
        let inputs = qkv.map(Shard::into_tensor);
        let fold = Fold::new(inputs[0].dims(), attention.axes);
        let dim = attention.heads.dim;
        let [query, key] = [0, 1].map(|which: usize| inputs[which].dims()[4] / dim);
        let tracked = inputs.iter().any(Tensor::is_tracked);
        let ring = Hops {
            group: scope.scope.group.clone(),
            asked: scope.scope.group.next_sequence(),
            layout: layout.clone(),
            tracking: if tracked {
                Tracking::Tracked
            } else {
                Tracking::Untracked
            },
        };
        let ranks = ring.group.size();
        let axes = attention.axes;
        let (mask, scale) = (fold.mask(&attention.mask), attention.scale);
        let problem = {
            let layout = layout.clone();
            move |origin: usize| Problem {
                heads: HeadRange {
                    query: 0..query,
                    group: query / key,
                },
                mask: mask.clone(),
                query_positions: positions(&layout, axes, rank),
                key_positions: positions(&layout, axes, origin),
                scale,
            }
        };
        // Keys and values travel unfolded, so that an exchange sees the axis that is split.
        let split = move |kv: Tensor<DIMS>| -> [Tensor<4>; 2] {
            let fold = Fold::new(kv.dims(), axes);
            let width = kv.dims()[4] / 2;
            [0, width].map(|start| fold.fold(kv.clone().narrow(4, start, width), key))
        };
        let [q, k, v] = inputs.each_ref().map(|x| x.clone().inner());
        let q = fold.fold(q, query);
        let own = Tensor::cat(vec![k, v], 4);
        let mut kv = own.clone();
        let mut result: Option<(Tensor<4>, Tensor<3>)> = None;
        for step in 0..ranks {
            if step > 0 {
                kv = ring.hop(kv, step - 1, Phase::Forward)?;
            }
            let [k, v] = split(kv.clone());
            let origin = (rank + ranks - step) % ranks;
            let part = attention::forward(q.clone(), k, v, &problem(origin));
            result = Some(match result {
                Some(result) => merge(result, part),
                None => part,
            });
        }
        let (out, lse) = result.unwrap();
        let output = fold.unfold(out.clone());
        let unfold_lse = fold.unfold(lse.clone().unsqueeze_dim(3));
        let logsumexp = match scope.logsumexp {
            Logsumexp::Wanted => Some(Shard::new(unfold_lse, layout.clone(), rank)?),
            Logsumexp::Unwanted => None,
        };
        let output = vjp::attach3(inputs, output, move |dout| {
            let dout = fold.fold(dout, query);
            let mut kv = own.clone();
            let mut dq: Option<Tensor<4>> = None;
            let mut kept: Option<Tensor<DIMS>> = None;
            let mut travelling: Option<Tensor<DIMS>> = None;
            for step in 0..ranks {
                if step > 0 {
                    kv = ring.hop(kv, step - 1, Phase::Backward)?;
                }
                let key_fold = Fold::new(kv.dims(), axes);
                let [k, v] = split(kv.clone());
                let origin = (rank + ranks - step) % ranks;
                let (out, lse) = (out.clone(), lse.clone());
                let parts =
                    attention::backward(q.clone(), k, v, out, lse, dout.clone(), &problem(origin));
                dq = Some(match dq {
                    Some(dq) => dq + parts.0,
                    None => parts.0,
                });
                let here = Tensor::cat(vec![key_fold.unfold(parts.1), key_fold.unfold(parts.2)], 4);
                match step {
                    0 => kept = Some(here),
                    1 => travelling = Some(here),
                    _ => {
                        let arrived =
                            ring.hop(travelling.take().unwrap(), step - 1, Phase::Backward)?;
                        travelling = Some(arrived + here);
                    }
                }
            }
            let mut dkv = kept.unwrap();
            if let Some(last) = travelling {
                dkv = dkv + ring.hop(last, ranks - 1, Phase::Backward)?;
            }
            let width = dkv.dims()[4] / 2;
            Ok::<_, CommError>([
                fold.unfold(dq.unwrap()),
                dkv.clone().narrow(4, 0, width),
                dkv.narrow(4, width, width),
            ])
        });
        Ok(Attended {
            output: Shard::new(output, layout, rank)?,
            logsumexp,
        })
    }
}

struct Hops {
    group: Group,
    /// The number of the ring's first exchange.
    asked: u64,
    layout: Layout,
    tracking: Tracking,
}

impl Hops {
    /// One hop round the ring: rank `r` has the block of rank `r − step` and gets that of `r − step − 1`.
    fn hop(&self, x: Tensor<DIMS>, step: usize, phase: Phase) -> Result<Tensor<DIMS>, CommError> {
        let ranks = self.group.size();
        let [batch, .., channels] = x.dims();
        let length = self.layout.length(SeqAxis::FIRST);
        let held = |step: usize| -> Arc<Blocks> {
            let ranges: Vec<Vec<Range<usize>>> = (0..ranks)
                .map(|rank| {
                    self.layout
                        .ranges(SeqAxis::FIRST, (rank + ranks - step % ranks) % ranks)
                })
                .collect();
            let blocks = self.layout.blocks(batch, channels, ranks);
            Arc::new(blocks.with_dim(SeqAxis::FIRST.dim(), DimBlocks::from_ranges(length, ranges)))
        };
        self.group.exchange(Request {
            collective: Collective::RingShift,
            phase,
            tracking: if phase == Phase::Forward {
                self.tracking
            } else {
                Tracking::Untracked
            },
            tensor: x,
            before: held(step),
            after: held(step + 1),
            step: Step::First,
            answers: (phase == Phase::Backward).then_some(self.asked),
        })
    }
}

// --- a mixture --------------------------------------------------------------------------------------------

/// DSP where it can, Ulysses in attentions over every axis.
#[derive(Debug)]
struct Mixture([Arc<dyn SequenceParallel>; 2]);

const ULYSSES: usize = 1;

impl Mixture {
    fn new() -> Self {
        Self([Arc::new(Dsp), Arc::new(Ulysses)])
    }

    fn part(&self, plan: &StagePlan) -> &dyn SequenceParallel {
        &*self.0[plan.delegate]
    }
}

impl SequenceParallel for Mixture {
    fn name(&self) -> &'static str {
        "dsp + ulysses"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        let over_all = |kind: &StageKind| matches!(kind, StageKind::Attention(a) if model.axes().all(|axis| a.axes.contains(axis)));
        // To DSP such a stage is one that does not mind which axis is split.
        let mut rest = model.clone();
        for stage in &mut rest.stages {
            if over_all(&stage.kind) {
                stage.kind = StageKind::FeedForward { inner: 0 };
            }
        }
        let mut plan = self.0[0].plan(&rest, ranks)?;
        let lengths = model.lengths()?;
        for (stage, planned) in model.stages.iter().zip(&mut plan.stages) {
            let StageKind::Attention(attention) = &stage.kind else {
                continue;
            };
            if !over_all(&stage.kind) || ranks == 1 {
                continue;
            }
            if attention.heads.query < ranks {
                return Err(PlanError::Heads {
                    strategy: self.name(),
                    stage: stage.name.clone(),
                    heads: attention.heads.query,
                    ranks,
                });
            }
            planned.delegate = ULYSSES;
            let axis = planned.residual.split_axes().iter().next().unwrap();
            let partition = Partition::balanced(planned.residual.length(axis), ranks);
            let others = lengths.iter().product::<usize>() / lengths[axis.index()];
            for (rank, sends) in planned.sends.iter_mut().enumerate() {
                let heads = attention.heads;
                let attended =
                    cost::ulysses(model.batch, others, heads, &partition, &partition, rank);
                *sends = *sends + attended;
            }
        }
        Ok(plan)
    }

    fn arrange(&self, x: Shard, scope: &Scope<'_>) -> Result<Shard, Error> {
        self.part(scope.plan).arrange(x, scope)
    }

    fn enter(&self, x: Shard, scope: &Scope<'_>) -> Result<Shard, Error> {
        self.part(scope.plan).enter(x, scope)
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        self.part(scope.scope.plan).attend(qkv, scope)
    }

    fn leave(&self, x: Shard, bias: Option<Tensor<1>>, scope: &Scope<'_>) -> Result<Shard, Error> {
        self.part(scope.plan).leave(x, bias, scope)
    }
}

// --- the same comparison for all --------------------------------------------------------------------------

fn equal(
    strategy: impl SequenceParallel + 'static,
    case: &Case,
    ranks: usize,
) -> Result<(), TestCaseError> {
    let strategy: Arc<dyn SequenceParallel> = Arc::new(strategy);
    let outcome = check(&strategy, case, ranks, DType::F64, F64)?;
    prop_assert_eq!(outcome, Ok(()));
    Ok(())
}

fn model(lengths: Vec<usize>, heads: (usize, usize), subs: Vec<Sub>) -> Case {
    Case {
        batch: 2,
        lengths,
        heads,
        subs,
        output: OutputLayout::AsInput,
        checkpointing: Checkpointing::Off,
    }
}

fn causal(axes: &[usize]) -> Sub {
    Sub::Attention(axes.to_vec(), Mask::Causal)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn megatrons_sharded_heads_and_mlp_give_the_serial_results(
        lengths in prop::collection::vec(1usize..6, 1..=2),
        heads in prop::sample::select(vec![(4, 4), (5, 5), (8, 4)]),
        ranks in 1usize..=4,
    ) {
        let last = lengths.len() - 1;
        let subs = vec![attend(&[0]), Sub::Mlp, Sub::Text, causal(&[last]), Sub::Mlp];
        equal(Megatron, &model(lengths, heads, subs), ranks)?;
    }

    #[test]
    fn a_zigzag_ring_gives_the_serial_results_for_any_length(
        lengths in prop::collection::vec(1usize..12, 1..=2),
        heads in prop::sample::select(vec![(1, 1), (2, 2), (4, 2), (3, 1)]),
        ranks in 1usize..=5,
    ) {
        let last = lengths.len() - 1;
        let both: Vec<usize> = (0..=last).collect();
        let subs = vec![causal(&[0]), Sub::Mlp, attend(&[last]), Sub::Text, causal(&both), attend(&[0])];
        equal(Ring, &model(lengths, heads, subs), ranks)?;
    }

    #[test]
    fn a_mixture_runs_each_stage_with_one_of_its_parts_and_gives_the_serial_results(
        lengths in [1usize..6, 1usize..6],
        heads in prop::sample::select(vec![(5, 5), (6, 2), (6, 3)]),
        ranks in 1usize..=5,
    ) {
        let subs = vec![attend(&[1]), causal(&[0, 1]), Sub::Mlp, attend(&[0]), Sub::Text, attend(&[0, 1])];
        equal(Mixture::new(), &model(lengths.to_vec(), heads, subs), ranks)?;
    }
}

#[test]
fn megatrons_ranks_hold_their_part_of_the_heads_and_of_a_fused_projection() {
    // Query, key and value of 4 heads end to end: rank 1 of 2 has the last two heads of each.
    let role = Role::Columns {
        dim: 1,
        fused: 3,
        units: 4,
    };
    let part = 4 * HEAD;
    let place = |role, shape: &[usize], rank| {
        let parameter = Parameter {
            role,
            shape,
            stage: None,
        };
        Megatron.placement(&parameter, rank, 2)
    };
    let held = place(role, &[3, 3 * part], 1);
    let half = part / 2;
    let ranges = vec![half..part, part + half..2 * part, 2 * part + half..3 * part];
    assert_eq!(held, Placement::Sharded { dim: 1, ranges });
    let rows = place(Role::Rows { dim: 0, units: 4 }, &[part, 3], 0);
    assert_eq!(
        rows,
        Placement::Sharded {
            dim: 0,
            ranges: std::iter::once(0..half).collect()
        }
    );
    assert_eq!(place(Role::Replicated, &[3], 0), Placement::Replicated);
}

//! Dynamic Sequence Parallelism: before an axis is attended, the split moves to another one.
//!
//! ```text
//!        attend space                     attend time                    attend space …
//!          space                            space
//!        ┌─────────┐                       ┌────┬────┐
//!   time │ rank 0  │   one all-to-all      │rank│rank│   one all-to-all
//!        ├─────────┤  ───────────────▶     │ 0  │ 1  │  ───────────────▶   …
//!        │ rank 1  │  of the residual      │    │    │
//!        └─────────┘  stream               └────┴────┘
//! ```
//!
//! Attention itself, and everything else, is local. Cost: a switch sends `B·C·a_r·(T − b_r)` elements, that is
//! `M(N−1)/N²` of an activation of `M` where blocks are even; D pairs of attentions take 2D switches, 2D−1 if
//! the output may stay where it is. On k axes attended in a cycle that is `k/(k−1)` switches a layer.
//!
//! Requires: two sequence axes or more, and no attention over all of them jointly: a
//! [`Mixture`](crate::Mixture) hands such a layer to a strategy that splits the attended axis. An axis shorter
//! than the ranks leaves some of them without a block, which is right but idle.
//!
//! Zhao et al., "DSP: Dynamic Sequence Parallelism for Multi-Dimensional Transformers", arXiv:2403.10266.

use dsp_core::cost::{self, Elements};
use dsp_core::layout::AxisLayout;
use dsp_core::strategy::{OutputLayout, Plan, StageKind, StagePlan};
use dsp_core::{Layout, ModelShape, Partition, PlanError, SeqAxis, SequenceParallel, Stage};

/// Dynamic Sequence Parallelism.
///
/// Its verbs are the trait's own: all that it does is to plan where the split is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dsp;

impl SequenceParallel for Dsp {
    fn name(&self) -> &'static str {
        "dsp"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        model.check_on(ranks)?;
        let switches = Switches::new(model, ranks)?;
        let path = self.cheapest_path(model, &switches)?;
        let stage = |index: usize| {
            let before = if index == 0 {
                path[0]
            } else {
                path[index - 1]
            };
            let layout = switches.layout(path[index]);
            StagePlan {
                arranges: switches.sends(before, path[index]),
                ..StagePlan::local(&layout, ranks)
            }
        };
        let stages = (0..path.len()).map(stage).collect();
        // A model without stages stays where it starts.
        let first = path.first().copied().unwrap_or(SeqAxis::FIRST);
        let last = path.last().copied().unwrap_or(first);
        let end = match model.output {
            OutputLayout::AsInput => first,
            OutputLayout::Free => last,
        };
        Ok(Plan {
            input: switches.layout(first),
            stages,
            output: switches.layout(end),
            output_sends: switches.sends(last, end),
        })
    }

    fn plan_stage(
        &self,
        _model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        if stage.attends_split(residual).is_some() {
            return Err(PlanError::Residual {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                residual: Box::new(residual.clone()),
                rule: "it attends within a rank only, and the axis that is split is attended",
            });
        }
        Ok(StagePlan::local(residual, ranks))
    }
}

impl Dsp {
    fn no_axis_left(self, model: &ModelShape, stage: &Stage) -> PlanError {
        PlanError::NoAxisLeft {
            strategy: self.name().to_owned(),
            stage: stage.name.clone(),
            axes: model.lengths.len(),
        }
    }

    /// Which axis is split in each stage, so that the ranks together send least over the whole model; of
    /// equals, the one that splits longer axes.
    ///
    /// A shortest path through the stages, from each axis that could be split at first.
    fn cheapest_path(
        self,
        model: &ModelShape,
        switches: &Switches,
    ) -> Result<Vec<SeqAxis>, PlanError> {
        let axes: Vec<SeqAxis> = model.axes().collect();
        let mut candidates = Vec::new();
        for stage in &model.stages {
            let free: Vec<SeqAxis> = axes
                .iter()
                .copied()
                .filter(|&axis| switches.ranks == 1 || !attends(&stage.kind, axis))
                .collect();
            if free.is_empty() {
                return Err(self.no_axis_left(model, stage));
            }
            candidates.push(free);
        }
        let Some(starts) = candidates.first().cloned() else {
            return Ok(vec![]);
        };
        let mut best: Option<(PathCost, Vec<SeqAxis>)> = None;
        for start in starts {
            // Per axis, the cheapest way to have it split in the stage at hand.
            let mut paths = vec![(switches.hold(start), vec![start])];
            for free in &candidates[1..] {
                paths = free
                    .iter()
                    .filter_map(|&axis| {
                        let reach = |(cost, path): &(PathCost, Vec<SeqAxis>)| {
                            let last = *path.last()?;
                            let cost = *cost + switches.step(last, axis) + switches.hold(axis);
                            Some((cost, [path.as_slice(), &[axis]].concat()))
                        };
                        paths.iter().filter_map(reach).min_by_key(|(cost, _)| *cost)
                    })
                    .collect();
            }
            for (mut cost, path) in paths {
                if let (OutputLayout::AsInput, Some(&last)) = (model.output, path.last()) {
                    cost = cost + switches.step(last, start);
                }
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, path));
                }
            }
        }
        Ok(best.map(|(_, path)| path).unwrap_or_default())
    }
}

fn attends(kind: &StageKind, axis: SeqAxis) -> bool {
    matches!(kind, StageKind::Attention(attention) if attention.axes.contains(axis))
}

/// What a path through the stages costs: elements sent, then the stages' idle positions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct PathCost {
    sent: u64,
    idle: u64,
}

impl std::ops::Add for PathCost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            idle: self.idle + other.idle,
        }
    }
}

/// The layouts between which the split moves, and what moving it costs.
struct Switches {
    lengths: [usize; 3],
    batch: usize,
    hidden: usize,
    ranks: usize,
}

impl Switches {
    fn new(model: &ModelShape, ranks: usize) -> Result<Self, PlanError> {
        Ok(Self {
            lengths: model.lengths()?,
            batch: model.batch,
            hidden: model.hidden,
            ranks,
        })
    }

    fn layout(&self, axis: SeqAxis) -> Layout {
        Layout::split(self.lengths, axis, self.ranks)
    }

    fn partition(&self, axis: SeqAxis) -> Partition {
        match self.layout(axis).axis(axis) {
            AxisLayout::Split { partition, .. } => partition.clone(),
            AxisLayout::Whole => Partition::balanced(self.lengths[axis.index()], 1),
        }
    }

    /// What each rank sends to move the split.
    fn sends(&self, from: SeqAxis, to: SeqAxis) -> Vec<Elements> {
        if from == to {
            return vec![Elements::default(); self.ranks];
        }
        let others = SeqAxis::ALL
            .into_iter()
            .filter(|&axis| axis != from && axis != to)
            .map(|axis| self.lengths[axis.index()])
            .product();
        let (a, b) = (self.partition(from), self.partition(to));
        (0..self.ranks)
            .map(|rank| cost::switch(self.batch, self.hidden, others, &a, &b, rank))
            .collect()
    }

    fn step(&self, from: SeqAxis, to: SeqAxis) -> PathCost {
        let sends = self.sends(from, to);
        PathCost {
            sent: sends.iter().map(|sent| sent.forward + sent.backward).sum(),
            idle: 0,
        }
    }

    /// Positions that the busiest rank computes beyond its share while `axis` is split.
    fn hold(&self, axis: SeqAxis) -> PathCost {
        let all: usize = self.lengths.iter().product();
        let busiest = self.partition(axis).counts().into_iter().max().unwrap_or(0);
        let busiest = all
            .checked_div(self.lengths[axis.index()])
            .map_or(0, |others| others * busiest);
        PathCost {
            sent: 0,
            idle: (busiest * self.ranks - all) as u64,
        }
    }
}

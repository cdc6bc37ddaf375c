//! USP: a mesh of ranks, Ulysses within its rows and a ring across them.
//!
//! ```text
//!     mesh of 2 × 2                  within a row: heads for sequence        across rows: keys and values go round
//!     ┌────────┬────────┐            ┌──────────────┬──────────────┐         ┌──────────────┬──────────────┐
//!     │ rank 0 │ rank 1 │  row 0     │ row 0, half  │ row 0, half  │         │      kv      │      kv      │
//!     ├────────┼────────┤            │ of the heads │ of the heads │         │     │ ▲      │     │ ▲      │
//!     │ rank 2 │ rank 3 │  row 1     ├──────────────┼──────────────┤         │     ▼ │      │     ▼ │      │
//!     └────────┴────────┘            │    row 1     │    row 1     │         │      kv      │      kv      │
//!                                    └──────────────┴──────────────┘         └──────────────┴──────────────┘
//! ```
//!
//! The axis stays split over all ranks; attentions over the other axes are local. Cost of one over the split axis on a
//! mesh of u×r: Ulysses' over a row's positions plus the ring's of a row's positions and a rank's heads; where all is
//! even, `(M/N)·[(2+2g)(u−1)/u + 2g(r−1)]` of an activation of `M`, with `g = max(Hkv, u)/Hq`. u = N is Ulysses,
//! u = 1 a ring.
//!
//! Requires: softmax attention; a u that divides the ranks and is at most the query heads, which the automatic one
//! always is.
//!
//! Fang and Zhao, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI", arXiv:2405.07719.

use std::num::NonZeroUsize;
use std::ops::Range;

use burn::tensor::Tensor;
use dsp_core::attention::heads::{Side, Trade, share, union};
use dsp_core::attention::ring::{self, Ring as Rounds, balanced_layouts};
use dsp_core::attention::{
    Attended, Heads, Logsumexp, attend_local, positions_in,
};
use dsp_core::blocks::DIMS;
use dsp_core::cost;
use dsp_core::error::Tracking;
use dsp_core::layout::MeshAxis;
use dsp_core::ledger::Phase;
use dsp_core::strategy::{AttentionScope, AttentionStage, Form, StagePlan};
use dsp_core::{
    CommError, Error, Layout, ModelShape, Partition, PlanError, SeqAxis, SequenceParallel, Shard,
    Stage, vjp,
};

/// Unified sequence parallelism: Ulysses in the rows of a mesh, a ring across them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usp {
    /// The ranks of a row.
    row: Row,
}

/// How many ranks a row of the mesh has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Row {
    /// As many as the query heads allow: the largest divisor of the ranks that they reach.
    #[default]
    Automatic,
    /// As many as these.
    Of(NonZeroUsize),
}

impl Usp {
    /// With rows of `ranks`, in which heads are exchanged for sequence.
    pub fn with_rows_of(ranks: NonZeroUsize) -> Self {
        Self {
            row: Row::Of(ranks),
        }
    }

    fn mesh(self, heads: Heads, ranks: usize) -> Mesh {
        let row = match self.row {
            Row::Of(row) => row.get(),
            Row::Automatic => {
                let fits = |row: &usize| ranks.is_multiple_of(*row) && *row <= heads.query;
                (1..=ranks).rfind(fits).unwrap_or(1)
            }
        };
        Mesh { row, ranks }
    }
}

/// A mesh of ranks: those of a row are next to each other.
#[derive(Debug, Clone, Copy)]
struct Mesh {
    row: usize,
    ranks: usize,
}

impl Mesh {
    fn within_a_row(self) -> MeshAxis {
        MeshAxis {
            stride: 1,
            size: self.row,
        }
    }

    fn across_rows(self) -> MeshAxis {
        MeshAxis {
            stride: self.row,
            size: self.rows(),
        }
    }

    fn rows(self) -> usize {
        self.ranks / self.row
    }

    /// The ranks of a row.
    fn members(self, row: usize) -> Vec<usize> {
        self.within_a_row().members(row * self.row)
    }

    /// The positions that each row's ranks hold together, over the attended axes.
    fn positions(self, layout: &Layout, attention: &AttentionStage) -> Vec<Vec<Range<usize>>> {
        let of_row = |row: usize| {
            let members = self.members(row);
            let ranges = |axis: SeqAxis| match layout.is_split(axis) {
                true => union(layout, axis, &members),
                false => layout.ranges(axis, members[0]),
            };
            positions_in(layout.lengths(), attention.axes, ranges)
        };
        (0..self.rows()).map(of_row).collect()
    }
}

impl SequenceParallel for Usp {
    fn name(&self) -> &'static str {
        "usp"
    }

    fn residuals(&self, model: &ModelShape, ranks: usize) -> Result<Vec<Layout>, PlanError> {
        balanced_layouts(model, ranks)
    }

    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        let local = StagePlan::local(residual, ranks);
        let Some((attention, axis, partition)) = stage.attends_split(residual) else {
            return Ok(local);
        };
        if attention.form != Form::Softmax {
            return Err(PlanError::Form {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                rule: "it sends keys and values round for softmax attention, and this one is linear, whose state is all \
                       that must move; use lasp or lasp2",
            });
        }
        let heads = attention.heads;
        let mesh = self.mesh(heads, ranks);
        if !ranks.is_multiple_of(mesh.row) {
            return Err(PlanError::Mesh {
                strategy: self.name().to_owned(),
                row: mesh.row,
                ranks,
            });
        }
        if heads.query < mesh.row {
            return Err(PlanError::RowHeads {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                heads: heads.query,
                row: mesh.row,
                ranks,
            });
        }
        let held = mesh.positions(residual, attention);
        let reach = ring::reach(&attention.mask, model.batch, &held, &held);
        let rows: Vec<usize> = held
            .iter()
            .map(|ranges| ranges.iter().map(ExactSizeIterator::len).sum())
            .collect();
        let samples = attention.samples(model.batch, residual.lengths());
        let sends = |rank: usize| {
            let (row, index) = (rank / mesh.row, rank % mesh.row);
            let counts: Vec<usize> = mesh
                .members(row)
                .into_iter()
                .map(|member| partition.count(member))
                .collect();
            let others = residual.positions_beside(axis);
            let traded = Partition::from_counts(&counts)
                .map(|of_row| cost::ulysses(model.batch, others, heads, &of_row, &of_row, index))
                .unwrap_or_default();
            let keys = share(heads, index, mesh.row).kv().len();
            traded + ring::sends(samples * 2 * keys * heads.dim, &rows, &reach, row)
        };
        Ok(local.sending(sends))
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let attention = scope.attention;
        let (query, key) = (qkv[0].layout().clone(), qkv[1].layout().clone());
        if !attention.axes.iter().any(|axis| key.is_split(axis)) {
            return attend_local(qkv, scope);
        }
        let (rank, world) = (qkv[0].rank(), scope.scope.group);
        let mesh = self.mesh(attention.heads, world.size());
        let row = world.along(mesh.within_a_row())?;
        let across = world.along(mesh.across_rows())?;
        let tracking = Tracking::of(qkv.iter().map(Shard::tensor));
        let members = mesh.members(rank / mesh.row);
        let sides = [&qkv[0], &qkv[1]];
        let trade = Trade::new(attention, sides, (&row, &members), tracking);
        let rounds = Rounds {
            heads: share(attention.heads, row.rank(), row.size()),
            mask: trade.mask(&attention.mask),
            scale: attention.scale,
            dropout: scope.dropout,
            samples: trade.samples().to_vec(),
            queries: mesh.positions(&query, attention),
            keys: mesh.positions(&key, attention),
            tracking,
            asked: across.next_sequence(),
            group: across,
        };
        let inputs = qkv.map(Shard::into_tensor);
        let forth = |index: usize, side| {
            let x: Tensor<DIMS> = inputs[index].clone().inner();
            trade.to_heads(x, side, Phase::Forward)
        };
        let held = [
            forth(0, Side::Queries)?,
            forth(1, Side::Keys)?,
            forth(2, Side::Keys)?,
        ];
        let (out, lse) = rounds.forward(&held)?;
        let forward = (Phase::Forward, tracking);
        let output = trade.to_sequence(out.clone(), Side::Queries, forward)?;
        let logsumexp = match scope.logsumexp {
            Logsumexp::Wanted => {
                let lse = lse.clone().unsqueeze_dim(3);
                let untracked = (Phase::Forward, Tracking::Untracked);
                let lse = trade.to_sequence(lse, Side::Queries, untracked)?;
                let lse = vjp::constant_like(lse, &inputs[0]);
                Some(Shard::new(lse, query.clone(), rank)?)
            }
            Logsumexp::Unwanted => None,
        };
        let output = vjp::attach3(inputs, output, move |dout| {
            let backward = (Phase::Backward, Tracking::Untracked);
            let dout = trade.to_heads(dout, Side::Queries, Phase::Backward)?;
            let [dq, dk, dv] = rounds.backward(&held, (&out, &lse), dout)?;
            Ok::<_, CommError>([
                trade.to_sequence(dq, Side::Queries, backward)?,
                trade.to_sequence(dk, Side::Keys, backward)?,
                trade.to_sequence(dv, Side::Keys, backward)?,
            ])
        });
        Ok(Attended {
            output: Shard::new(output, query, rank)?,
            logsumexp,
        })
    }
}

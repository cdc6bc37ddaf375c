//! A plain Burn module over a two-axis activation, trained on ranks, under a strategy chosen by a value.
//!
//! `cargo run --release --example quickstart -- ulysses`

#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use burn::module::Module;
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData, activation::gelu};
use dsp_core::linear::project;
use dsp_core::session::StageRun;
use dsp_core::strategy::{AttentionStage, OutputLayout, Part, Role, StageKind, Units};
use dsp_core::{
    AxisSet, Error, Heads, Launch, Loss, Mask, ModelShape, SeqAxis, Session, Shard, Stage,
};

const WIDTH: usize = 32;
const HEADS: usize = 4;
/// Two sequence axes; three ranks divide neither.
const GRID: [usize; 2] = [10, 14];
const RANKS: usize = 3;

// ---- The model: ordinary Burn modules. ----------------------------------------------------------------------

#[derive(Module, Debug)]
struct Attention {
    norm: LayerNorm,
    qkv: Linear,
    project: Linear,
}

#[derive(Module, Debug)]
struct FeedForward {
    norm: LayerNorm,
    up: Linear,
    down: Linear,
}

/// Attends along the rows, then along the columns, then mixes channels.
#[derive(Module, Debug)]
struct Axial {
    rows: Attention,
    columns: Attention,
    mix: FeedForward,
}

impl Axial {
    fn new(device: &Device) -> Self {
        let norm = || LayerNormConfig::new(WIDTH).init(device);
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let attention = || Attention {
            norm: norm(),
            qkv: linear(WIDTH, 3 * WIDTH),
            project: linear(WIDTH, WIDTH),
        };
        Self {
            rows: attention(),
            columns: attention(),
            mix: FeedForward {
                norm: norm(),
                up: linear(WIDTH, 4 * WIDTH),
                down: linear(4 * WIDTH, WIDTH),
            },
        }
    }
}

// ---- What makes it sequence parallel: declare the stages, and pass the verbs in each. -----------------------

impl Axial {
    fn shape(batch: usize) -> ModelShape {
        let heads = Heads::multi(HEADS, WIDTH / HEADS);
        let over = |axis| {
            StageKind::Attention(AttentionStage::softmax(
                AxisSet::of(&[axis]),
                heads,
                Mask::Full,
            ))
        };
        ModelShape {
            batch,
            lengths: GRID.to_vec(),
            hidden: WIDTH,
            stages: vec![
                Stage::new("rows", over(SeqAxis::SECOND)),
                Stage::new("columns", over(SeqAxis::FIRST)),
                Stage::new("mix", StageKind::FeedForward { inner: 4 * WIDTH }),
            ],
            output: OutputLayout::AsInput,
        }
    }

    fn forward(&self, x: Shard, session: &Session) -> Result<Shard, Error> {
        let mut stages = session.stages();
        let x = self.rows.forward(x, stages.attention()?)?;
        let x = self.columns.forward(x, stages.attention()?)?;
        let x = self.mix.forward(x, stages.feed_forward()?)?;
        stages.finish(x)
    }
}

/// What each parameter is for, and in which stage: a strategy may give each rank some heads or features only.
fn role(path: &str) -> Part {
    let heads = Units::Query(Heads::multi(HEADS, WIDTH / HEADS));
    let inner = Units::Features(4 * WIDTH);
    let (stage, units) = match path.split('.').next() {
        Some("rows") => (0, heads),
        Some("columns") => (1, heads),
        _ => (2, inner),
    };
    let dim = usize::from(path.ends_with("weight"));
    let columns = |fused| Role::Columns { dim, fused, units };
    let role = match path.split('.').nth(1) {
        Some("qkv") => columns(3),
        Some("up") => columns(1),
        Some("project" | "down") if path.ends_with("weight") => Role::Rows { dim: 0, units },
        _ => Role::Replicated,
    };
    role.in_stage(stage)
}

impl Attention {
    fn forward(&self, x: Shard, stage: StageRun<'_>) -> Result<Shard, Error> {
        let x = stage.arrange(x)?; // the residual stream, laid out for this stage
        let h = stage.enter(x.clone().map(|x| self.norm.forward(x))?)?;
        let [query, key, value] = h.map(|h| project(h, &self.qkv))?.chunks();
        let h = stage.attend(query, key, value)?;
        Ok(x.plus(stage.project(h, &self.project)?)?)
    }
}

impl FeedForward {
    fn forward(&self, x: Shard, stage: StageRun<'_>) -> Result<Shard, Error> {
        let x = stage.arrange(x)?;
        let h = stage.enter(x.clone().map(|x| self.norm.forward(x))?)?;
        let h = h.map(|h| gelu(project(h, &self.up)))?;
        Ok(x.plus(stage.project(h, &self.down)?)?)
    }
}

// ---- Training on ranks. ------------------------------------------------------------------------------------

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let name = std::env::args().nth(1).unwrap_or_else(|| "dsp".to_owned());
    let strategy = dsp_strategies::by_name(&name)?;
    let template = Axial::new(&Device::flex());

    let ranks = if name == "serial" { 1 } else { RANKS };
    let curves = Launch::new(ranks).run(move |group| -> Result<Vec<f32>, Error> {
        let device = Device::flex().autodiff();
        let session = Session::new(strategy.clone(), group, Axial::shape(1))?;
        let mut placed = session.place(&template, role, &device);
        let mut optimizer = AdamWConfig::new().init();
        // Every rank holds the whole input, and works on its part of it.
        let input = session.split(wave(0.0, &device))?;
        let target = session.split(wave(0.7, &device))?;
        let count = (GRID[0] * GRID[1] * WIDTH) as f32;

        let mut curve = Vec::new();
        for _ in 0..20 {
            let output = placed.module.forward(input.clone(), &session)?;
            let error = output.into_tensor() - target.tensor().clone();
            // This rank's terms over the global count: the ranks' losses add up to the mean.
            let loss = (error.clone() * error).sum() / count;
            let sum = dsp_core::collective::all_reduce(loss.clone().detach(), session.group())?;
            curve.push(sum.into_scalar::<f32>());
            let mut gradients = session.backward(Loss::OfShard(loss))?;
            let gradients: GradientsParams = session.reduce(&mut gradients, &placed)?;
            placed.module = optimizer.step(1e-2, placed.module, gradients);
        }
        Ok(curve)
    })?;

    let curve = &curves[0];
    let (first, last) = (curve[0], curve[curve.len() - 1]);
    println!(
        "{name} on {ranks} ranks: loss {first:.4} -> {last:.4} in {} steps",
        curve.len()
    );
    assert!(last < first / 2.0, "the loss must fall");
    Ok(())
}

/// `[1, rows, columns, 1, WIDTH]`: a wave over the grid.
fn wave(phase: f32, device: &Device) -> Tensor<5> {
    let shape = [1, GRID[0], GRID[1], 1, WIDTH];
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|i: usize| (i as f32 * 0.37 + phase).sin())
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

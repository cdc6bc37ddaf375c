//! What the tests share: reading reference files, and running a model on ranks with everything compared that a
//! step produces.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses a part; a test that cannot read its file has failed"
)]

#[path = "../../../dsp-core/tests/common/device.rs"]
mod device;
#[path = "../../../dsp-core/tests/common/engine.rs"]
mod engine;
pub(crate) mod language;
pub(crate) mod weather;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use dsp_core::Loss;
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::{Phase, Traffic};
use dsp_core::strategy::{AttentionStage, OutputLayout, PlanError, StageKind};
use dsp_core::{
    AxisSet, Error, Group, Heads, Launch, LaunchError, Mask, ModelShape, SeqAxis, SequenceParallel,
    Session, Shard, Stage, gradients,
};
use dsp_models::error::ModelError;
use dsp_models::video_dit::{
    BlockKind, BlockPairs, ByFrame, Conditions, FrameMask, PatchOrder, Text, VideoConditions,
    VideoDit, patchify, roles,
};
use dsp_models::weights::named_gradients;
use dsp_models::{BlockConfig, VideoDitConfig};
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use device::device;
use engine::engine;

/// Every strategy, serial first, but those for another form of attention: those that refuse softmax attention over
/// the only axis for its form. (That they are the right ones, the tests of the strategies say.)
pub(crate) fn softmax_strategies() -> Vec<Arc<dyn SequenceParallel>> {
    let axes = AxisSet::of(&[SeqAxis::FIRST]);
    let attention = AttentionStage::softmax(axes, Heads::multi(2, 1), Mask::Full);
    let model = ModelShape {
        batch: 1,
        lengths: vec![2],
        hidden: 2,
        stages: vec![Stage::new("attention", StageKind::Attention(attention))],
        output: OutputLayout::AsInput,
    };
    let refuses = |strategy: &dyn SequenceParallel| {
        matches!(strategy.plan(&model, 2), Err(PlanError::Form { .. }))
    };
    let mut strategies = dsp_strategies::all();
    strategies.retain(|strategy| !refuses(&**strategy));
    strategies
}

/// A value and its shape, whatever its element type was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Values {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

impl Values {
    pub(crate) fn of(data: &TensorData) -> Self {
        Self {
            shape: data.shape().to_vec(),
            values: data.iter::<f64>().collect(),
        }
    }

    pub(crate) fn new(shape: &[usize], values: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        Self {
            shape: shape.to_vec(),
            values,
        }
    }

    pub(crate) fn tensor<const D: usize>(&self, device: &Device, dtype: DType) -> Tensor<D> {
        let data = TensorData::new(self.values.clone(), self.shape.clone());
        Tensor::from_data(data, (device, dtype))
    }

    /// The largest difference, relative to `max(max|expected|, 1e-3)`.
    pub(crate) fn error(&self, expected: &Self) -> f64 {
        assert_eq!(
            self.values.len(),
            expected.values.len(),
            "{:?} and {:?}",
            self.shape,
            expected.shape
        );
        let size = expected
            .values
            .iter()
            .fold(1e-3, |size: f64, x| size.max(x.abs()));
        let pairs = self.values.iter().zip(&expected.values);
        pairs.fold(0.0, |worst, (a, b)| {
            let error = (a - b).abs() / size;
            if error.is_nan() {
                f64::INFINITY
            } else {
                f64::max(worst, error)
            }
        })
    }
}

/// A reference file.
pub(crate) struct Fixture {
    pub(crate) bytes: Vec<u8>,
}

impl Fixture {
    pub(crate) fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        Self {
            bytes: fs::read(folder.join(name)).unwrap(),
        }
    }

    pub(crate) fn config(&self) -> serde_json::Value {
        let (_, metadata) = SafeTensors::read_metadata(&self.bytes).unwrap();
        serde_json::from_str(&metadata.metadata().as_ref().unwrap()["config"]).unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        file.names().into_iter().map(str::to_owned).collect()
    }

    pub(crate) fn get(&self, name: &str) -> Values {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let bytes = view.data();
        let values = match view.dtype() {
            Dtype::F32 => (bytes.chunks_exact(4))
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            Dtype::I64 => (bytes.chunks_exact(8))
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64)
                .collect(),
            Dtype::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
            other => panic!("{name} is {other:?}"),
        };
        Values::new(view.shape(), values)
    }
}

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LossFrom {
    Shard,
    Whole,
}

/// What a rank's ledger says, and what the formulas say it must.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) forward: (u64, u64),
    pub(crate) backward: (u64, u64),
    pub(crate) gather: (u64, u64),
    pub(crate) reduce: (u64, u64),
}

/// What a run gives: everything by name, and each rank's account.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) found: BTreeMap<String, Values>,
    pub(crate) accounts: Vec<Account>,
}

impl Run {
    /// Every rank sent what the formulas say.
    pub(crate) fn assert_sent_as_planned(&self) {
        for (rank, account) in self.accounts.iter().enumerate() {
            for (what, (sent, formula)) in [
                ("forward", account.forward),
                ("backward", account.backward),
                ("gather", account.gather),
                ("reduction", account.reduce),
            ] {
                assert_eq!(sent, formula, "what rank {rank} sends: {what}");
            }
        }
    }
}

/// A stack of block pairs with its inputs.
#[derive(Debug)]
pub(crate) struct PairsCase {
    pub(crate) config: BlockConfig,
    pub(crate) template: BlockPairs,
    /// `[B, T, S, 1, C]`
    pub(crate) x: Values,
    /// `[B, L, C]`
    pub(crate) y: Values,
    pub(crate) lengths: Vec<usize>,
    /// `[B, 6, C]`
    pub(crate) t: Values,
    pub(crate) given: Option<(FrameMask, Values)>,
    /// `[B, T, S, 1, C]`
    pub(crate) dout: Values,
    pub(crate) dtype: DType,
}

impl PairsCase {
    pub(crate) fn run(
        self: &Arc<Self>,
        strategy: &Arc<dyn SequenceParallel>,
        ranks: usize,
    ) -> Result<Run, LaunchError> {
        let (case, strategy) = (self.clone(), strategy.clone());
        let ends = launch(ranks, move |group| case.run_rank(strategy.clone(), group))?;
        Ok(collect(ends))
    }

    fn run_rank(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
    ) -> Result<(BTreeMap<String, Values>, Account), ModelError> {
        let device = device(self.dtype).autodiff();
        let leaf3 = |values: &Values| values.tensor::<3>(&device, self.dtype).require_grad();
        let dims = &self.x.shape;
        let depth = self.template.spatial_blocks.len();
        let shape = self
            .config
            .shape(depth, [dims[0], dims[1], dims[2]], OutputLayout::AsInput);
        let session = Session::new(strategy, group, shape)?;
        let placed = session.place(&self.template, roles(&self.config), &device);

        let x = self.x.tensor::<5>(&device, self.dtype).require_grad();
        let (y, t) = (leaf3(&self.y), leaf3(&self.t));
        let given = self
            .given
            .as_ref()
            .map(|(mask, t0)| (mask.clone(), leaf3(t0)));
        let conditions = Conditions {
            text: Text {
                tokens: y.clone(),
                lengths: self.lengths.clone().into(),
            },
            modulation: ByFrame {
                generated: t.clone(),
                given: given.clone(),
            },
        };
        let mut shown = Vec::new();
        let mut stages = session.stages();
        let out = placed.module.forward_observed(
            session.split(x.clone())?,
            &conditions,
            &mut stages,
            |kind, pair, shard| shown.push((kind, pair, shard.clone())),
        )?;
        let out = stages.finish(out)?;
        let dout = self.dout.tensor::<5>(&device, self.dtype);
        let mut ending = Ending::of(&session, &out, &dout, LossFrom::Shard)?;
        let reduced = ending.reduce(&session, &placed)?;

        let mut found = named(&placed.module, &reduced);
        for (kind, pair, shard) in shown {
            let name = match kind {
                BlockKind::Spatial => format!("after_spatial.{pair}"),
                BlockKind::Temporal => format!("after_temporal.{pair}"),
            };
            found.insert(name, whole(&session, shard)?);
        }
        found.insert("out".to_owned(), whole(&session, out)?);
        let group = session.group();
        found.insert("dx".to_owned(), summed(&x, &ending.gradients, group)?);
        found.insert("dy".to_owned(), summed(&y, &ending.gradients, group)?);
        found.insert("dt".to_owned(), summed(&t, &ending.gradients, group)?);
        if let Some((_, t0)) = &given {
            found.insert("dt0".to_owned(), summed(t0, &ending.gradients, group)?);
        }
        Ok((found, ending.account))
    }
}

/// A whole model with its inputs.
#[derive(Debug)]
pub(crate) struct ModelCase {
    pub(crate) config: VideoDitConfig,
    pub(crate) template: VideoDit,
    /// `[B, C, F, H, W]`
    pub(crate) video: Values,
    /// `[B, L, caption]`
    pub(crate) text: Values,
    pub(crate) keep: Vec<Vec<bool>>,
    pub(crate) timesteps: Vec<f64>,
    pub(crate) fps: Vec<f64>,
    pub(crate) resolution: [f64; 2],
    pub(crate) frame_mask: Option<FrameMask>,
    /// `[B, out, F, H, W]`
    pub(crate) dout: Values,
    pub(crate) dtype: DType,
    pub(crate) output: OutputLayout,
    pub(crate) loss: LossFrom,
    /// In how many parts switches go that follow a sub-layer.
    pub(crate) switch_parts: NonZeroUsize,
}

impl ModelCase {
    pub(crate) fn run(
        self: &Arc<Self>,
        strategy: &Arc<dyn SequenceParallel>,
        ranks: usize,
    ) -> Result<Run, LaunchError> {
        let (case, strategy) = (self.clone(), strategy.clone());
        let ends = launch(ranks, move |group| case.run_rank(strategy.clone(), group))?;
        Ok(collect(ends))
    }

    fn run_rank(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
    ) -> Result<(BTreeMap<String, Values>, Account), ModelError> {
        let device = device(self.dtype).autodiff();
        let dims = &self.video.shape;
        let mut shape = self.config.shape(dims[0], dims[2], dims[3], dims[4]);
        shape.output = self.output;
        let session = Session::new(strategy, group, shape)?.switching_in(self.switch_parts);
        let placed = session.place(&self.template, roles(&self.config.block()), &device);

        let video = self.video.tensor::<5>(&device, self.dtype).require_grad();
        let text = self.text.tensor::<3>(&device, self.dtype).require_grad();
        let conditions = VideoConditions {
            timesteps: self.timesteps.clone(),
            fps: self.fps.clone(),
            resolution: self.resolution,
            text: Text::masked(text.clone(), &self.keep)?,
            frame_mask: self.frame_mask.clone(),
        };
        let out = placed
            .module
            .forward(video.clone(), &conditions, &session)?;
        let dout = self.dout.tensor::<5>(&device, self.dtype);
        let dout = patchify(dout, self.config.patch_size, PatchOrder::ChannelLast);
        let mut ending = Ending::of(&session, &out, &dout, self.loss)?;
        let reduced = ending.reduce(&session, &placed)?;

        let mut found = named(&placed.module, &reduced);
        let out = out.map(Tensor::detach)?;
        let out = placed
            .module
            .video(out, [dims[2], dims[3], dims[4]], &session)?;
        found.insert("out".to_owned(), Values::of(&out.into_data()));
        let group = session.group();
        found.insert("dx".to_owned(), summed(&video, &ending.gradients, group)?);
        found.insert("dy".to_owned(), summed(&text, &ending.gradients, group)?);
        Ok((found, ending.account))
    }
}

/// The backward pass and what it sent.
pub(crate) struct Ending {
    pub(crate) gradients: Gradients,
    pub(crate) account: Account,
}

impl Ending {
    pub(crate) fn of(
        session: &Session,
        out: &Shard,
        dout: &Tensor<5>,
        loss: LossFrom,
    ) -> Result<Self, ModelError> {
        let (rank, ledger) = (session.group().rank(), session.group().ledger());
        let forward = ledger.take();
        let [batch, .., channels] = out.tensor().dims();
        let expected = session.expected_sends();
        let gather = session.expected_gather(batch, channels);
        let loss = match loss {
            LossFrom::Shard => {
                let dout = Shard::split(dout.clone(), out.layout(), rank)?.into_tensor();
                Loss::OfShard((out.tensor().clone() * dout).sum())
            }
            LossFrom::Whole => Loss::OfWhole((session.gather(out.clone())? * dout.clone()).sum()),
        };
        let gathered = sent(&ledger.take(), Phase::Forward);
        let with_gather = matches!(loss, Loss::OfWhole(_));
        let gradients = session.backward(loss)?;
        let backward = sent(&ledger.take(), Phase::Backward);
        let account = Account {
            forward: (sent(&forward, Phase::Forward), expected.forward),
            gather: (gathered, if with_gather { gather.forward } else { 0 }),
            backward: (
                backward,
                expected.backward + if with_gather { gather.backward } else { 0 },
            ),
            reduce: (0, 0),
        };
        Ok(Self { gradients, account })
    }

    pub(crate) fn reduce<M: Module>(
        &mut self,
        session: &Session,
        placed: &dsp_core::Placed<M>,
    ) -> Result<burn::optim::GradientsParams, ModelError> {
        let reduced = session.reduce(&mut self.gradients, placed)?;
        let traffic = session.group().ledger().take();
        let count = gradients::reduced_parameters(placed);
        self.account.reduce = (
            sent(&traffic, Phase::Gradients),
            session.expected_reduce(count),
        );
        Ok(session.whole(reduced, placed)?)
    }
}

pub(crate) fn sent(traffic: &Traffic, phase: Phase) -> u64 {
    traffic.phase(phase).elements
}

pub(crate) fn named<M: dsp_models::weights::OriginalNames>(
    module: &M,
    gradients: &burn::optim::GradientsParams,
) -> BTreeMap<String, Values> {
    let gradients = named_gradients(module, gradients).unwrap();
    (gradients.iter())
        .map(|(name, data)| (format!("grad.{name}"), Values::of(data)))
        .collect()
}

pub(crate) fn whole(session: &Session, shard: Shard) -> Result<Values, Error> {
    let whole = session.gather(shard.map(Tensor::detach)?)?;
    Ok(Values::of(&whole.into_data()))
}

/// The sum over the ranks of a replicated input's gradient.
pub(crate) fn summed<const D: usize>(
    leaf: &Tensor<D>,
    gradients: &Gradients,
    group: &Group,
) -> Result<Values, Error> {
    let inner = leaf.clone().inner();
    let own = leaf.grad(gradients).unwrap_or_else(|| inner.zeros_like());
    let sum = all_reduce_in(own, Phase::Outside, group)?;
    Ok(Values::of(&sum.into_data()))
}

pub(crate) fn launch<T: Serialize + DeserializeOwned + Send + Sync + 'static>(
    ranks: usize,
    function: impl Fn(Group) -> Result<T, ModelError> + Send + Sync + 'static,
) -> Result<Vec<T>, LaunchError> {
    let launch = Launch::new(ranks).on(&engine(ranks)).threads_per_rank(1);
    launch.run_shared(function)
}

/// Every rank must have found the same.
pub(crate) fn collect(ends: Vec<(BTreeMap<String, Values>, Account)>) -> Run {
    let mut accounts = Vec::new();
    let mut found: Option<BTreeMap<String, Values>> = None;
    for (values, account) in ends {
        accounts.push(account);
        match &found {
            Some(first) => assert!(*first == values, "the ranks found different values"),
            None => found = Some(values),
        }
    }
    Run {
        found: found.unwrap(),
        accounts,
    }
}

//! What a comparison runs: STDiT-3 on a clip, and one step of it on a rank.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::{CommError, Loss, ModelShape, Placed, PlanError, Session, Shard};
use dsp_models::error::{ConfigError, ModelError};
use dsp_models::random::{Draws, Purpose};
use dsp_models::video_dit::{
    Init, PatchOrder, Text, VideoConditions, VideoDit, VideoDitConfig, patchify, roles,
};
use dsp_models::weights::{WeightsError, cast, named_gradients};

use crate::clip::ClipError;
use crate::scenario::{Passes, Scenario};

/// What is drawn from the scenario's seed beside the weights and the timesteps.
const CAPTION: u64 = 0;
const TARGET: u64 = 1;

/// Why a subject cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum SubjectError {
    /// The clip cannot be used.
    #[error(transparent)]
    Clip(#[from] ClipError),
    /// The scenario's sizes describe no model.
    #[error("the scenario's model: {0}")]
    Config(#[from] ConfigError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The strategy refuses the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The ranks failed.
    #[error(transparent)]
    Core(#[from] dsp_core::Error),
    /// The gradients cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

impl From<CommError> for SubjectError {
    fn from(error: CommError) -> Self {
        Self::Core(error.into())
    }
}

impl From<dsp_core::layout::LayoutError> for SubjectError {
    fn from(error: dsp_core::layout::LayoutError) -> Self {
        Self::Core(error.into())
    }
}

/// A model with its weights and inputs, the same for every case of a comparison.
#[derive(Debug)]
pub struct Subject {
    config: VideoDitConfig,
    template: VideoDit,
    passes: Passes,
    dtype: DType,
    /// `[B, 3, T, H, W]`
    pixels: TensorData,
    /// `[B, L, channels]`
    caption: TensorData,
    /// What the velocity is compared with: `[B, 3, T, H, W]`.
    target: TensorData,
    text_lengths: Vec<usize>,
    timesteps: Vec<f64>,
    fps: f64,
}

impl Subject {
    /// Reads the scenario's clip and draws weights, caption features and a target from its seed.
    ///
    /// There is no text encoder here: caption features are random, of the given lengths.
    ///
    /// # Errors
    /// [`SubjectError`] if the clip cannot be used or the sizes describe no model.
    pub fn new(scenario: &Scenario) -> Result<Self, SubjectError> {
        let size = &scenario.model;
        let config = VideoDitConfig::new()
            .with_in_channels(3)
            .with_pred_sigma(false)
            .with_patch_size(scenario.patch)
            .with_hidden_size(size.hidden)
            .with_depth(size.depth)
            .with_num_heads(size.heads)
            .with_mlp_ratio(size.mlp_ratio)
            .with_qk_norm(size.qk_norm)
            .with_caption_channels(size.caption_channels)
            .with_model_max_length(size.text_tokens);
        let dtype = crate::verify::dtype(scenario.dtype);
        // Dense: the published initialisation begins with zeros, behind which gradients would vanish.
        let template = config.init(Init::Dense, scenario.seed, &Device::flex())?;
        let template = cast(template, dtype);
        let clip = scenario.read_clip()?;
        let batch = scenario.batch;
        let pixels = clip.batch(batch, scenario.frames, scenario.height, scenario.width)?;
        let video = [batch, 3, scenario.frames, scenario.height, scenario.width];
        let drawn = |stream, shape: &[usize]| {
            let count = shape.iter().product();
            let values = Draws::new(scenario.seed, Purpose::Other, stream).normals(count);
            TensorData::new(values, shape.to_vec())
        };
        Ok(Self {
            config,
            template,
            passes: scenario.passes,
            dtype,
            pixels: TensorData::new(pixels, video),
            caption: drawn(CAPTION, &[batch, size.text_tokens, size.caption_channels]),
            target: drawn(TARGET, &video),
            text_lengths: scenario.text_lengths(),
            timesteps: Draws::new(scenario.seed, Purpose::Timesteps, 0)
                .uniforms(batch)
                .into_iter()
                .map(|uniform| 1000.0 * uniform)
                .collect(),
            fps: clip.fps,
        })
    }

    /// What the model declares.
    pub fn shape(&self) -> ModelShape {
        let [batch, _, frames, height, width] = self.video();
        self.config.shape(batch, frames, height, width)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// One number, for the ranks to wait for each other by.
    pub fn token(&self) -> Tensor<1> {
        Tensor::zeros([1], (&Device::flex(), self.dtype))
    }

    /// This rank's part of the model.
    pub fn place(&self, session: &Session) -> Placed<VideoDit> {
        let roles = roles(&self.config.block());
        session.place(&self.template, roles, &Device::flex().autodiff())
    }

    /// The forward pass, to the loss.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    pub fn forward(
        &self,
        session: &Session,
        placed: &Placed<VideoDit>,
    ) -> Result<Run, SubjectError> {
        let _span = tracing::info_span!("forward").entered();
        // The input gradient is checked, so the input takes part; a forward pass alone keeps no graph.
        let (device, module) = match self.passes {
            Passes::ForwardBackward => (Device::flex().autodiff(), placed.module.clone()),
            Passes::Forward => (Device::flex(), placed.module.valid()),
        };
        let tensor = |data: &TensorData| -> Tensor<5> {
            Tensor::from_data(data.clone(), (&device, self.dtype))
        };
        let video = match self.passes {
            Passes::ForwardBackward => tensor(&self.pixels).require_grad(),
            Passes::Forward => tensor(&self.pixels),
        };
        let [batch, ..] = self.video();
        let conditions = VideoConditions {
            timesteps: self.timesteps.clone(),
            fps: vec![self.fps; batch],
            resolution: [self.video()[3] as f64, self.video()[4] as f64],
            text: Text {
                tokens: Tensor::from_data(self.caption.clone(), (&device, self.dtype)),
                lengths: self.text_lengths.clone().into(),
            },
            frame_mask: None,
        };
        let output = module.forward(video.clone(), &conditions, session)?;
        let target = patchify(
            tensor(&self.target),
            self.config.patch_size,
            PatchOrder::ChannelLast,
        );
        let target = Shard::split(target, output.layout(), session.group().rank())?;
        let error = output.tensor().clone() - target.into_tensor();
        // This rank's squared errors over the global count.
        let count = self.video().iter().product::<usize>();
        let loss = (error.clone() * error).sum().mul_scalar(1.0 / count as f64);
        Ok(Run {
            video,
            output,
            loss,
        })
    }

    fn video(&self) -> [usize; 5] {
        std::array::from_fn(|dim| self.pixels.shape()[dim])
    }
}

/// A forward pass that was made.
#[derive(Debug)]
pub struct Run {
    video: Tensor<5>,
    output: Shard,
    loss: Tensor<1>,
}

/// The gradients of a step on this rank: of the parameters, after the sum over the ranks, and this rank's
/// part of the input's.
#[derive(Debug)]
pub struct StepGradients {
    parameters: GradientsParams,
    input: Tensor<5>,
}

/// The gradients of a step, whole.
#[derive(Debug)]
pub struct Gradients {
    /// Of the video.
    pub input: TensorData,
    /// Of each parameter, by its original name.
    pub parameters: BTreeMap<String, TensorData>,
}

impl Run {
    /// The backward pass, and the sum of the parameters' gradients over the ranks.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    pub fn backward(
        &self,
        session: &Session,
        placed: &Placed<VideoDit>,
    ) -> Result<StepGradients, SubjectError> {
        let mut gradients = {
            let _span = tracing::info_span!("backward").entered();
            session.backward(Loss::OfShard(self.loss.clone()))?
        };
        let _span = tracing::info_span!("reduce gradients").entered();
        let zeros = || self.video.clone().inner().zeros_like();
        let input = self.video.grad(&gradients).unwrap_or_else(zeros);
        Ok(StepGradients {
            parameters: session.reduce(&mut gradients, placed)?,
            input,
        })
    }

    /// The output's tokens, whole.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    pub fn gather(&self, session: &Session) -> Result<TensorData, SubjectError> {
        Ok(session.gather(self.output.clone().detach())?.into_data())
    }
}

impl StepGradients {
    /// The gradients, whole.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    pub fn whole(
        self,
        session: &Session,
        placed: &Placed<VideoDit>,
    ) -> Result<Gradients, SubjectError> {
        let input = all_reduce_in(self.input, Phase::Outside, session.group())?;
        let parameters = session.whole(self.parameters, placed)?;
        Ok(Gradients {
            input: input.into_data(),
            parameters: named_gradients(&placed.module, &parameters)?,
        })
    }
}

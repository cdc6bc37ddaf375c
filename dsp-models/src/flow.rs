//! The loss of rectified flow (Liu et al., arXiv:2209.03003), in Open-Sora 1.2's convention, and sampling by it.
//!
//! With a video `x₀`, noise `ε` and a time `τ = timestep / 1000` in (0, 1):
//!
//! ```text
//!   x_τ = (1 − τ)·x₀ + τ·ε          the model sees x_τ and the timestep
//!   v   = x₀ − ε                     what it shall say
//! ```
//!
//! Noise and timesteps come from [`crate::random`], so that every rank draws the same. The original's timestep
//! transform, which counts the frames of its VAE, is left out.

use burn::tensor::{DType, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::precision::computed;
use dsp_core::shape::reshape;
use dsp_core::{Session, Shard};

use crate::error::ModelError;
use crate::random::{Draws, Purpose};
use crate::video_dit::{FrameMask, PatchOrder, Text, VideoConditions, VideoDit, patchify};

/// The timestep of pure noise.
pub const TIMESTEPS: f64 = 1000.0;

/// What a model is trained on, the same on every rank.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[B, C, F, H, W]`, on the rank's device. In f32, also where the model computes in fewer bits: the model rounds
    /// what it sees, and what it shall say is not rounded.
    pub video: Tensor<5>,
    /// Frames a second, one for each sample.
    pub fps: Vec<f64>,
    /// The picture's height and width in pixels.
    pub resolution: [f64; 2],
    /// `[B, L, caption_channels]`.
    pub text: Text,
    /// Which time positions are to be generated; all if it is not there. Given ones are shown without noise and
    /// do not count in the loss.
    pub frame_mask: Option<FrameMask>,
}

/// How a sample's timestep is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// Uniform.
    Uniform,
    /// The logistic function of a normal number: in the middle more often than at the ends.
    LogitNormal {
        /// Its mean.
        location: f64,
        /// Its standard deviation.
        scale: f64,
    },
}

/// The random part of a training step.
#[derive(Debug, Clone)]
pub struct Noised {
    /// One for each sample, between 0 and [`TIMESTEPS`].
    pub timesteps: Vec<f64>,
    /// `[B, C, F, H, W]`.
    pub noise: Tensor<5>,
}

impl Noised {
    /// Draws it for a step: the same wherever it is drawn.
    pub fn draw(batch: &Batch, sampling: Sampling, seed: u64, step: u64) -> Self {
        let shape = batch.video.dims();
        let times = &mut Draws::new(seed, Purpose::Timesteps, step);
        let times = match sampling {
            Sampling::Uniform => times.uniforms(shape[0]),
            Sampling::LogitNormal { location, scale } => (times.normals(shape[0]).into_iter())
                .map(|normal| 1.0 / (1.0 + (-(location + scale * normal)).exp()))
                .collect(),
        };
        let noise = Draws::new(seed, Purpose::Noise, step).normals(shape.iter().product());
        let options = (&batch.video.device(), batch.video.dtype());
        Self {
            timesteps: times.into_iter().map(|time| time * TIMESTEPS).collect(),
            noise: Tensor::from_data(TensorData::new(noise, shape), options),
        }
    }
}

/// This rank's terms of the loss: the squared errors of the velocity in its own tokens, over the *global* count.
///
/// Each sample's mean is over what is to be generated of it, and the loss is the mean over the samples. A sample
/// of which nothing is to be generated adds 0.
///
/// # Errors
/// [`ModelError`] if the batch does not fit the model, or the ranks fail.
pub fn loss(
    model: &VideoDit,
    batch: &Batch,
    noised: &Noised,
    session: &Session,
) -> Result<Tensor<1>, ModelError> {
    let (video, noise) = (batch.video.clone(), noised.noise.clone());
    let patch = model.x_embedder.patch_size();
    let [samples, channels, frames, ..] = video.dims();
    let like = (&video.device(), video.dtype());

    let is_generated = |sample: usize, frame: usize| {
        (batch.frame_mask.as_ref()).is_none_or(|mask| mask.is_generated(sample, frame / patch[0]))
    };
    let conditions = VideoConditions {
        timesteps: noised.timesteps.clone(),
        fps: batch.fps.clone(),
        resolution: batch.resolution,
        text: batch.text.clone(),
        frame_mask: batch.frame_mask.clone(),
    };
    conditions.check(model, &video)?;

    let mut times = Vec::with_capacity(samples * frames);
    for (sample, timestep) in noised.timesteps.iter().enumerate() {
        let time = |frame| match is_generated(sample, frame) {
            true => timestep / TIMESTEPS,
            false => 0.0,
        };
        times.extend((0..frames).map(time));
    }
    let times = TensorData::new(times, [samples, 1, frames, 1, 1]);
    let times: Tensor<5> = Tensor::from_data(times, like);
    let shown = video.clone() * times.clone().neg().add_scalar(1.0) + noise.clone() * times;

    let tokens = model.forward(shown, &conditions, session)?;
    let velocity = model.velocity(tokens)?;
    let rank = session.group().rank();
    let own = |tokens: Tensor<5>| Shard::split(tokens, velocity.layout(), rank);

    let predicted = computed(velocity.tensor().clone());
    let target = computed(video) - computed(noise);
    let target = own(patchify(target, patch, PatchOrder::ChannelLast))?.into_tensor();
    let target = target.cast(predicted.dtype());
    let weights = weights(&batch.video, predicted.dtype(), is_generated);
    let weights = own(patchify(weights, patch, PatchOrder::ChannelLast))?.into_tensor();

    let [samples, s1, s2, s3, _] = predicted.dims();
    let volume = weights.dims()[4];
    let error = predicted - target;
    let square = error.clone() * error;
    let square: Tensor<5> = reshape(square, [samples, s1, s2 * s3, volume, channels]);
    let weights: Tensor<5> = reshape(weights, [samples, s1, s2 * s3, volume, 1]);
    Ok((square * weights).sum())
}

/// `[B, 1, F, H, W]`: by what each pixel's squared error is multiplied, so that their sum is the loss.
fn weights(
    video: &Tensor<5>,
    dtype: DType,
    is_generated: impl Fn(usize, usize) -> bool,
) -> Tensor<5> {
    let [samples, channels, frames, height, width] = video.dims();
    let mut values = Vec::with_capacity(samples * frames * height * width);
    for sample in 0..samples {
        let counted = (0..frames)
            .filter(|&frame| is_generated(sample, frame))
            .count();
        let count = samples * channels * counted * height * width;
        for frame in 0..frames {
            let weight = match is_generated(sample, frame) {
                true => 1.0 / count as f64,
                false => 0.0,
            };
            values.extend(std::iter::repeat_n(weight, height * width));
        }
    }
    let data = TensorData::new(values, [samples, 1, frames, height, width]);
    Tensor::from_data(data, (&video.device(), dtype))
}

/// What leads a video out of noise: its text, and how much more of it than of none.
#[derive(Debug, Clone)]
pub struct Guided {
    /// The text, for one sample.
    pub captioned: Text,
    /// What stands for none, in the same shape.
    pub without: Text,
    /// The velocity is `without + scale·(captioned − without)`: 1 is the text's alone.
    pub scale: f64,
    /// Frames a second.
    pub fps: f64,
    /// The picture's height and width in pixels.
    pub resolution: [f64; 2],
}

/// A video from noise, by `steps` even steps of Euler's rule along the velocity, with classifier-free guidance (Ho
/// and Salimans, arXiv:2207.12598).
///
/// Each step asks for two velocities. Replicas share them: the first one computes that of the text, the second one
/// that of none, others nothing.
///
/// # Shapes
/// - `noise`: `[1, C, F, H, W]`, the same on every rank; returns the same shape, whole on every rank
///
/// # Errors
/// [`ModelError`] if an input does not fit the model or the session, or the ranks fail.
pub fn sample(
    model: &VideoDit,
    noise: Tensor<5>,
    guided: &Guided,
    steps: usize,
    session: &Session,
) -> Result<Tensor<5>, ModelError> {
    let [samples, _, frames, height, width] = noise.dims();
    let (replica, replicas) = match session.replicas() {
        Some(replicas) => (replicas.rank(), replicas.size()),
        None => (0, 1),
    };
    let branches = [
        (&guided.captioned, guided.scale),
        (&guided.without, 1.0 - guided.scale),
    ];
    let own = (branches.into_iter().enumerate())
        .filter(|(branch, _)| branch % replicas == replica)
        .map(|(_, branch)| branch);
    let own: Vec<(&Text, f64)> = own.collect();
    let mut video = noise;
    for step in 0..steps {
        let time = 1.0 - step as f64 / steps as f64;
        let mut velocity = video.zeros_like();
        for (text, weight) in &own {
            let conditions = VideoConditions {
                timesteps: vec![time * TIMESTEPS; samples],
                fps: vec![guided.fps; samples],
                resolution: guided.resolution,
                text: (*text).clone(),
                frame_mask: None,
            };
            let tokens = model.forward(video.clone(), &conditions, session)?;
            let tokens = model.velocity(tokens)?;
            let whole = model.video(tokens, [frames, height, width], session)?;
            velocity = velocity + whole.mul_scalar(*weight);
        }
        if let Some(replicas) = session.replicas() {
            velocity = all_reduce_in(velocity, Phase::Outside, replicas)?;
        }
        // The velocity leads from noise (time 1) to the video (time 0).
        video = video + velocity.mul_scalar(1.0 / steps as f64);
    }
    Ok(video)
}

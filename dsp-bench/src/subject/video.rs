//! STDiT-3, the video transformer, on a clip: the error of its velocity against a random one.

use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::{Device, TensorData};
use dsp_core::{Loss, ModelShape, Placed, Session, Shard};
use dsp_models::random::{Draws, Purpose};
use dsp_models::video_dit::{
    Init, PatchOrder, Text, VideoConditions, VideoDit, VideoDitConfig, patchify, roles,
};
use dsp_models::weights::cast;
use serde::{Deserialize, Serialize};

use super::{Description, Output, Pass, Run, Sizes, Subject, SubjectError, Workload};
use crate::clip::{self, Clip, ClipError};
use crate::scenario::{DEEPEST, LONGEST, Rules, Scenario, ScenarioError, WIDEST};

/// What is drawn from the scenario's seed beside the weights and the timesteps.
const CAPTION: u64 = 0;
const TARGET: u64 = 1;

/// The sizes of an STDiT-3 and of the video that it sees; three channels, red, green, blue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VideoSizes {
    /// The y4m file; in the TOML relative to the TOML's folder, after [`Scenario::load`] relative to
    /// the current one. `None`: the built-in clip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<PathBuf>,
    /// Frames that a sample has, before the patch divides them.
    pub frames: usize,
    /// Rows of pixels, after cropping and scaling.
    pub height: usize,
    /// Columns of pixels, after cropping and scaling.
    pub width: usize,
    /// What becomes one token: `[frames, rows, columns]`.
    pub patch: [usize; 3],
    /// Pairs of a spatial and a temporal block.
    pub depth: usize,
    /// Channels of a token.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the feed-forward over `hidden`.
    pub mlp_ratio: f64,
    /// Whether queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Channels of a caption token, before its projection.
    pub caption_channels: usize,
    /// Caption tokens, padding included.
    pub text_tokens: usize,
    /// Caption tokens of each sample that are not padding; `None`: all of every sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_lengths: Option<Vec<usize>>,
}

impl VideoSizes {
    /// Tokens along time, rows and columns.
    pub fn grid(&self) -> [usize; 3] {
        [
            self.frames / self.patch[0],
            self.height / self.patch[1],
            self.width / self.patch[2],
        ]
    }

    /// Tokens along time: T.
    pub fn temporal_tokens(&self) -> usize {
        self.grid()[0]
    }

    /// Tokens of a frame: S.
    pub fn spatial_tokens(&self) -> usize {
        self.grid()[1] * self.grid()[2]
    }

    /// Caption tokens of each sample that are not padding.
    pub fn text_lengths(&self, batch: usize) -> Vec<usize> {
        let all = || vec![self.text_tokens; batch];
        self.text_lengths.clone().unwrap_or_else(all)
    }

    /// Reads the clip that the scenario names, or the built-in one, whole.
    pub(crate) fn config(&self) -> VideoDitConfig {
        VideoDitConfig::new()
            .with_in_channels(3)
            .with_pred_sigma(false)
            .with_patch_size(self.patch)
            .with_hidden_size(self.hidden)
            .with_depth(self.depth)
            .with_num_heads(self.heads)
            .with_mlp_ratio(self.mlp_ratio)
            .with_qk_norm(self.qk_norm)
            .with_caption_channels(self.caption_channels)
            .with_model_max_length(self.text_tokens)
    }

    pub(crate) fn read_clip(&self) -> Result<Clip, ClipError> {
        match &self.clip {
            Some(path) => Clip::read(path),
            None => Clip::built_in(),
        }
    }
}

impl Sizes for VideoSizes {
    fn check(&self, batch: usize, rules: &Rules<'_>) -> Result<(), ScenarioError> {
        let extents = [
            ("model.frames", self.frames),
            ("model.height", self.height),
            ("model.width", self.width),
        ];
        rules.within(LONGEST, &extents)?;
        rules.within(DEEPEST, &[("model.depth", self.depth)])?;
        let caption = [
            ("model.caption_channels", self.caption_channels),
            ("model.text_tokens", self.text_tokens),
        ];
        rules.within(WIDEST, &caption)?;
        rules.hold(
            self.patch.iter().all(|&side| side > 0),
            "model.patch",
            &self.patch,
            "each side must be at least 1",
        )?;
        for ((key, value), side) in extents.into_iter().zip(self.patch) {
            rules.multiple(key, value, side, "the patch's side")?;
        }
        rules.rotary_heads(self.hidden, self.heads)?;
        rules.hold(
            self.hidden.is_multiple_of(4),
            "model.hidden",
            &self.hidden,
            "must be a multiple of 4, for the position embedding has sine and cosine of rows and columns",
        )?;
        rules.mlp_ratio(self.mlp_ratio, self.hidden)?;
        let Some(lengths) = &self.text_lengths else {
            return Ok(());
        };
        rules.hold(
            lengths.len() == batch,
            "model.text_lengths",
            lengths,
            format!("must have one length for each of the batch = {batch} samples"),
        )?;
        let tokens = self.text_tokens;
        rules.hold(
            lengths.iter().all(|length| (1..=tokens).contains(length)),
            "model.text_lengths",
            lengths,
            format!("each must lie in 1..={tokens}, model.text_tokens"),
        )
    }

    fn file(&mut self) -> &mut Option<PathBuf> {
        &mut self.clip
    }

    fn describe(&self, batch: usize) -> Description {
        let pairs = if self.depth == 1 { "pair" } else { "pairs" };
        let norm = if self.qk_norm { "with" } else { "without" };
        let clip = match &self.clip {
            Some(path) => path.display().to_string(),
            None => clip::BUILT_IN_NAME.to_owned(),
        };
        let [frames, rows, columns] = self.patch;
        let lengths = self.text_lengths(batch);
        let lengths: Vec<String> = lengths.iter().map(usize::to_string).collect();
        Description {
            noun: "video transformer",
            data: "clip",
            model: format!(
                "STDiT-3, {} spatial/temporal {pairs}, hidden {}, {} heads",
                self.depth, self.hidden, self.heads
            ),
            tokens: format!(
                "T {} × S {} tokens",
                self.temporal_tokens(),
                self.spatial_tokens()
            ),
            facts: vec![
                (
                    "layers",
                    format!(
                        "as in Open-Sora 1.2: feed-forward {}×, {norm} qk-norm",
                        self.mlp_ratio
                    ),
                ),
                (
                    "input",
                    format!(
                        "{} frames of {}×{} pixels, patches of {frames}×{rows}×{columns}; pixels are patchified, \
                         there is no VAE",
                        self.frames, self.height, self.width
                    ),
                ),
                ("clip", clip),
                (
                    "captions",
                    format!(
                        "{} tokens of {} channels, of which not padding: {}",
                        self.text_tokens,
                        self.caption_channels,
                        lengths.join(", ")
                    ),
                ),
            ],
        }
    }

    /// There is no text encoder here: caption features are random, of the given lengths.
    fn subject(&self, scenario: &Scenario) -> Result<Arc<dyn Subject>, SubjectError> {
        let config = self.config();
        let clip = self.read_clip()?;
        let batch = scenario.batch;
        let pixels = clip.batch(batch, self.frames, self.height, self.width)?;
        // Dense: the published initialisation begins with zeros, behind which gradients would vanish.
        let template = config.init(Init::Dense, scenario.seed, &Device::flex())?;
        let template = cast(template, scenario.dtype.dtype());
        let video = [batch, 3, self.frames, self.height, self.width];
        let drawn = |stream, shape: &[usize]| {
            let count = shape.iter().product();
            let values = Draws::new(scenario.seed, Purpose::Other, stream).normals(count);
            TensorData::new(values, shape.to_vec())
        };
        Ok(Arc::new(Video {
            config,
            template,
            pixels: TensorData::new(pixels, video),
            caption: drawn(CAPTION, &[batch, self.text_tokens, self.caption_channels]),
            target: drawn(TARGET, &video),
            text_lengths: self.text_lengths(batch),
            timesteps: Draws::new(scenario.seed, Purpose::Timesteps, 0)
                .uniforms(batch)
                .into_iter()
                .map(|uniform| 1000.0 * uniform)
                .collect(),
            fps: clip.fps,
        }))
    }
}

#[derive(Debug)]
struct Video {
    config: VideoDitConfig,
    template: VideoDit,
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

impl Video {
    fn video(&self) -> [usize; 5] {
        std::array::from_fn(|dim| self.pixels.shape()[dim])
    }
}

impl Workload for Video {
    type Module = VideoDit;

    fn shape(&self) -> ModelShape {
        let [batch, _, frames, height, width] = self.video();
        self.config.shape(batch, frames, height, width)
    }

    fn place(&self, session: &Session, device: &Device) -> Placed<VideoDit> {
        session.place(&self.template, roles(&self.config.block()), device)
    }

    fn forward(
        &self,
        module: &VideoDit,
        pass: &Pass,
        session: &Session,
    ) -> Result<Run, SubjectError> {
        let [batch, _, _, height, width] = self.video();
        let video = pass.input(&self.pixels);
        let conditions = VideoConditions {
            timesteps: self.timesteps.clone(),
            fps: vec![self.fps; batch],
            resolution: [height as f64, width as f64],
            text: Text {
                tokens: pass.constant(&self.caption),
                lengths: self.text_lengths.clone().into(),
            },
            frame_mask: None,
        };
        let output = module.forward(video.clone(), &conditions, session)?;
        let target = patchify(
            pass.constant(&self.target),
            self.config.patch_size,
            PatchOrder::ChannelLast,
        );
        let target = Shard::split(target, output.layout(), session.group().rank())?;
        let error = output.tensor().clone() - target.into_tensor();
        // This rank's squared errors over the global count.
        let count = self.video().iter().product::<usize>();
        let loss = (error.clone() * error).sum().mul_scalar(1.0 / count as f64);
        Ok(Run {
            input: Some(video),
            output: Output::Shard(output),
            loss: Loss::OfShard(loss),
        })
    }
}

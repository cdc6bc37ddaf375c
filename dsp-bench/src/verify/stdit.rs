//! Kinds `stdit3_block`, `stdit3_block_xmask` and `stdit3_model`: Open-Sora 1.2's STDiT-3.
//!
//! A block file holds a pair of a spatial and a temporal block, `x [B, T·S, C]`, the packed text
//! `y [1, B·L, C]`, the modulation `t [B, 6·C]` (with a frame mask also `t0` and `x_mask`), and `dout`. A model
//! file holds the whole model and a video.

use std::sync::Arc;

use burn::tensor::{DType, Device, Gradients, Tensor};
use dsp_core::strategy::OutputLayout;
use dsp_core::{Group, Loss, SequenceParallel, Session, Shard};
use dsp_models::layers::Rotary;
use dsp_models::video_dit::{
    BlockKind, BlockPairs, ByFrame, Conditions, FrameMask, Init, PatchOrder, Text, VideoConditions,
    VideoDit, patchify, roles,
};
use dsp_models::{BlockConfig, VideoDitConfig};
use serde::Deserialize;

use super::shared::{keep, keep_parameters, leaf, of_dtype, summed, weights};
use super::{Case, CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored};

// ---- A pair of blocks. --------------------------------------------------------------------------------------

/// The configuration in a block file's metadata.
#[derive(Debug, Clone, Deserialize)]
struct BlockFile {
    hidden: usize,
    heads: usize,
    mlp_ratio: f64,
    #[serde(rename = "T")]
    frames: usize,
    #[serde(rename = "S")]
    tokens: usize,
    #[serde(rename = "B")]
    batch: usize,
    text_tokens: usize,
    text_lens: Vec<usize>,
    qk_norm: bool,
}

struct BlockCase {
    config: BlockConfig,
    /// In f32 and in f64.
    templates: [BlockPairs; 2],
    sizes: BlockFile,
    /// x, y, t and dout.
    inputs: [Stored; 4],
    given: Option<(FrameMask, Stored)>,
}

pub(super) fn open_block(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let sizes: BlockFile = reference.json("config")?;
    let BlockFile {
        hidden,
        heads,
        frames,
        tokens,
        batch,
        ..
    } = sizes;
    let config = BlockConfig::new(hidden, heads)
        .with_mlp_ratio(sizes.mlp_ratio)
        .with_qk_norm(sizes.qk_norm);
    if sizes.text_lens.len() != batch {
        return Err(reference.wrong_metadata(format!(
            "has {} text_lens for B = {batch} samples",
            sizes.text_lens.len()
        )));
    }
    let template = || BlockPairs::new(&config, 1, Init::Dense, 0, &Device::flex());
    let templates = weights(reference, template)?;
    let activation = [batch, frames * tokens, hidden];
    let inputs = [
        reference.shaped("x", &activation)?.clone(),
        reference
            .shaped("y", &[1, batch * sizes.text_tokens, hidden])?
            .clone(),
        reference.shaped("t", &[batch, 6 * hidden])?.clone(),
        reference.shaped("dout", &activation)?.clone(),
    ];
    let given = if reference.kind() == "stdit3_block_xmask" {
        let mask = reference.shaped("x_mask", &[batch, frames])?;
        let t0 = reference.shaped("t0", &[batch, 6 * hidden])?;
        Some((FrameMask::new(rows(mask)), t0.clone()))
    } else {
        None
    };
    Ok(vec![Arc::new(BlockCase {
        config,
        templates,
        sizes,
        inputs,
        given,
    })])
}

impl Case for BlockCase {
    fn name(&self) -> &str {
        ""
    }

    fn run(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
        device: &Device,
        dtype: DType,
    ) -> Result<Produced, CaseError> {
        let device = device.clone().autodiff();
        let BlockFile {
            batch,
            frames,
            tokens,
            hidden,
            text_tokens,
            ..
        } = self.sizes;
        let shape = self
            .config
            .shape(1, [batch, frames, tokens], OutputLayout::AsInput);
        let session = Session::new(strategy, group, shape)?;
        let placed = session.place(
            of_dtype(&self.templates, dtype),
            roles(&self.config),
            &device,
        );

        let [x, y, t, dout] = &self.inputs;
        let activation = [batch, frames, tokens, 1, hidden];
        let x: Tensor<5> = leaf(x, activation, &device, dtype);
        let y: Tensor<3> = leaf(y, [batch, text_tokens, hidden], &device, dtype);
        let t: Tensor<3> = leaf(t, [batch, 6, hidden], &device, dtype);
        let given = self.given.as_ref().map(|(mask, t0)| {
            let t0: Tensor<3> = leaf(t0, [batch, 6, hidden], &device, dtype);
            (mask.clone(), t0)
        });
        let conditions = Conditions {
            text: Text {
                tokens: y.clone(),
                lengths: self.sizes.text_lens.clone().into(),
            },
            modulation: ByFrame {
                generated: t.clone(),
                given: given.clone(),
            },
        };
        let mut after_spatial = None;
        let mut stages = session.stages();
        let output = placed.module.forward_observed(
            session.split(x.clone())?,
            &conditions,
            &mut stages,
            |kind, _, shard| {
                if kind == BlockKind::Spatial {
                    after_spatial = Some(shard.clone().detach());
                }
            },
        )?;
        let output = stages.finish(output)?;
        let dout: Tensor<5> = leaf(dout, activation, &device, dtype).detach();
        let gradients = backward(&session, &output, dout)?;

        let group = session.group();
        let mut produced = Produced::new();
        let flat = [batch, frames * tokens, hidden];
        keep(
            &mut produced,
            "out",
            session.gather(output.detach())?,
            &flat,
        );
        if let Some(shard) = after_spatial {
            keep(
                &mut produced,
                "after_spatial",
                session.gather(shard)?,
                &flat,
            );
        }
        let rotary = Rotary::new(self.config.head_dim());
        let frequencies = rotary.frequencies();
        let stored = Stored {
            shape: vec![frequencies.len()],
            values: frequencies.to_vec(),
        };
        produced.insert("rope_freqs".to_owned(), stored);
        keep(&mut produced, "dx", summed(&x, &gradients, group)?, &flat);
        let packed = [1, batch * text_tokens, hidden];
        keep(&mut produced, "dy", summed(&y, &gradients, group)?, &packed);
        let modulation = [batch, 6 * hidden];
        keep(
            &mut produced,
            "dt",
            summed(&t, &gradients, group)?,
            &modulation,
        );
        if let Some((_, t0)) = &given {
            keep(
                &mut produced,
                "dt0",
                summed(t0, &gradients, group)?,
                &modulation,
            );
        }
        keep_parameters(&mut produced, &session, &placed, gradients)?;
        Ok(produced)
    }
}

// ---- The whole model. ---------------------------------------------------------------------------------------

/// The configuration in a model file's metadata.
#[derive(Debug, Clone, Deserialize)]
struct ModelFile {
    depth: usize,
    hidden_size: usize,
    num_heads: usize,
    caption_channels: usize,
    model_max_length: usize,
    in_channels: usize,
    patch_size: [usize; 3],
    input_sq_size: usize,
    qk_norm: bool,
    #[serde(rename = "T")]
    frames: usize,
    #[serde(rename = "H_latent")]
    height: usize,
    #[serde(rename = "W_latent")]
    width: usize,
    #[serde(rename = "B")]
    batch: usize,
}

struct ModelCase {
    config: VideoDitConfig,
    /// In f32 and in f64.
    templates: [VideoDit; 2],
    /// x, y and dout.
    inputs: [Stored; 3],
    keep: Vec<Vec<bool>>,
    timesteps: Vec<f64>,
    fps: Vec<f64>,
    resolution: [f64; 2],
    frame_mask: Option<FrameMask>,
}

pub(super) fn open_model(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let sizes: ModelFile = reference.json("config")?;
    let ModelFile {
        batch,
        frames,
        height,
        width,
        in_channels,
        model_max_length,
        caption_channels,
        ..
    } = sizes;
    let config = VideoDitConfig::new()
        .with_depth(sizes.depth)
        .with_hidden_size(sizes.hidden_size)
        .with_num_heads(sizes.num_heads)
        .with_caption_channels(caption_channels)
        .with_model_max_length(model_max_length)
        .with_in_channels(in_channels)
        .with_patch_size(sizes.patch_size)
        .with_input_sq_size(sizes.input_sq_size)
        .with_qk_norm(sizes.qk_norm);
    let template = || config.init(Init::Dense, 0, &Device::flex());
    let templates = weights(reference, template)?;
    let per_sample = |name| reference.shaped(name, &[batch]).cloned();
    let video = [batch, in_channels, frames, height, width];
    let out = [batch, config.out_channels(), frames, height, width];
    let text = [batch, 1, model_max_length, caption_channels];
    let (heights, widths) = (per_sample("height")?, per_sample("width")?);
    let frame_mask = match reference.has("x_mask") {
        true => {
            let grid = config.grid([frames, height, width]);
            let mask = reference.shaped("x_mask", &[batch, grid[0]])?;
            Some(FrameMask::new(rows(mask)))
        }
        false => None,
    };
    if batch == 0 {
        return Err(reference.wrong_metadata("has B = 0, no sample to run".to_owned()));
    }
    Ok(vec![Arc::new(ModelCase {
        templates,
        inputs: [
            reference.shaped("x", &video)?.clone(),
            reference.shaped("y", &text)?.clone(),
            reference.shaped("dout", &out)?.clone(),
        ],
        keep: rows(reference.shaped("mask", &[batch, model_max_length])?),
        timesteps: per_sample("timestep")?.values,
        fps: per_sample("fps")?.values,
        // As the original: the first sample's picture gives the positions' scale.
        resolution: [heights.values[0], widths.values[0]],
        frame_mask,
        config,
    })])
}

impl Case for ModelCase {
    fn name(&self) -> &str {
        ""
    }

    fn run(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
        device: &Device,
        dtype: DType,
    ) -> Result<Produced, CaseError> {
        let device = device.clone().autodiff();
        let [video, text, dout] = &self.inputs;
        let five = |stored: &Stored| -> [usize; 5] { std::array::from_fn(|dim| stored.shape[dim]) };
        let [batch, _, frames, height, width] = five(video);
        let [length, channels] = [text.shape[2], text.shape[3]];
        let shape = self.config.shape(batch, frames, height, width);
        let session = Session::new(strategy, group, shape)?;
        let block = self.config.block();
        let placed = session.place(of_dtype(&self.templates, dtype), roles(&block), &device);

        let x: Tensor<5> = leaf(video, five(video), &device, dtype);
        let y: Tensor<3> = leaf(text, [batch, length, channels], &device, dtype);
        let conditions = VideoConditions {
            timesteps: self.timesteps.clone(),
            fps: self.fps.clone(),
            resolution: self.resolution,
            text: Text::masked(y.clone(), &self.keep)?,
            frame_mask: self.frame_mask.clone(),
        };
        let output = placed.module.forward(x.clone(), &conditions, &session)?;
        let dout_whole: Tensor<5> = leaf(dout, five(dout), &device, dtype).detach();
        let patches = patchify(dout_whole, self.config.patch_size, PatchOrder::ChannelLast);
        let gradients = backward(&session, &output, patches)?;

        let group = session.group();
        let mut produced = Produced::new();
        let whole = placed
            .module
            .video(output.detach(), [frames, height, width], &session)?;
        keep(&mut produced, "out", whole, &dout.shape);
        keep(
            &mut produced,
            "dx",
            summed(&x, &gradients, group)?,
            &video.shape,
        );
        keep(
            &mut produced,
            "dy",
            summed(&y, &gradients, group)?,
            &text.shape,
        );
        keep_parameters(&mut produced, &session, &placed, gradients)?;
        Ok(produced)
    }
}

fn rows(mask: &Stored) -> Vec<Vec<bool>> {
    mask.values
        .chunks(mask.shape[1].max(1))
        .map(|row| row.iter().map(|&value| value != 0.0).collect())
        .collect()
}

/// The backward pass from a cotangent that every rank holds whole.
fn backward(session: &Session, output: &Shard, dout: Tensor<5>) -> Result<Gradients, CaseError> {
    let cotangent = Shard::split(dout, output.layout(), session.group().rank())?.into_tensor();
    let loss = (output.tensor().clone() * cotangent).sum();
    Ok(session.backward(Loss::OfShard(loss))?)
}

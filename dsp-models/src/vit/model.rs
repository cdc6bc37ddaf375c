//! The model: images in, logits of their classes out.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::fused::check_classes;
use dsp_core::ledger::Phase;
use dsp_core::linear::{affine, project};
use dsp_core::session::{StageRun, Stages};
use dsp_core::shape::reshape;
use dsp_core::{Ending, Session, Shard};

use super::config::{PATCHES, VitConfig};
use crate::error::{ConfigError, ModelError};
use crate::layers::{LayerNorm, Target, cross_entropy, gelu, linear, narrow, parameter};
use crate::random::{Draws, Purpose};
use crate::video_dit::{PatchOrder, patchify};

/// A convolution whose stride is its kernel: a linear map of patches, position by position.
#[derive(Module, Debug)]
pub struct PatchProjection {
    /// `[hidden, channels, rows, columns]`.
    pub weight: Param<Tensor<4>>,
    /// `[hidden]`.
    pub bias: Param<Tensor<1>>,
}

/// The embedding of patches.
#[derive(Module, Debug)]
pub struct PatchEmbed {
    /// The linear map.
    pub proj: PatchProjection,
}

/// Attention, its queries, keys and values from one projection.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[C, 3·H·d]`: queries, keys and values, each head by head.
    pub qkv: Linear,
    /// `[H·d, C]`.
    pub proj: Linear,
}

impl Attention {
    /// From the normed residual stream to what the last projection takes, with which the sub-layer ends.
    fn forward(&self, x: Shard, stage: &StageRun<'_>) -> Result<Shard, ModelError> {
        let x = stage.enter(x)?.map(|x| project(x, &self.qkv))?;
        let [query, key, value] = x.chunks();
        Ok(stage.attend(query, key, value)?)
    }
}

/// Two linear layers with the exact GELU between.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[C, inner]` and its bias.
    pub fc1: Linear,
    /// `[inner, C]` and its bias.
    pub fc2: Linear,
}

/// A layer.
#[derive(Module, Debug)]
pub struct Block {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// The attention.
    pub attn: Attention,
    /// Before the feed-forward network.
    pub norm2: LayerNorm,
    /// The feed-forward network.
    pub mlp: Mlp,
}

impl Block {
    fn forward(&self, x: Shard, stages: &mut Stages<'_>) -> Result<Shard, ModelError> {
        let stage = stages.attention()?;
        let x = stage.arrange(x)?;
        let h = x.clone().map(|x| self.norm1.forward(x))?;
        let h = self.attn.forward(h, &stage)?;
        let x = stage.end(x, h, Ending::of(&self.attn.proj))?;

        let stage = stages.feed_forward()?;
        let x = stage.arrange(x)?;
        let h = x.clone().map(|x| self.norm2.forward(x))?;
        let h = stage.enter(h)?.map(|x| gelu(project(x, &self.mlp.fc1)))?;
        Ok(stage.end(x, h, Ending::of(&self.mlp.fc2))?)
    }
}

/// A vision transformer.
#[derive(Module, Debug)]
pub struct Vit {
    /// `[1, 1, C]`.
    pub cls_token: Param<Tensor<3>>,
    /// The class token and the patches of an image.
    pub tokens: usize,
    /// `[1, tokens, C]`, or a rank's own rows of it.
    pub pos_embed: Param<Tensor<3>>,
    /// The embedding of patches.
    pub patch_embed: PatchEmbed,
    /// The layers.
    pub blocks: Vec<Block>,
    /// The last norm.
    pub norm: LayerNorm,
    /// `[C, classes]`.
    pub head: Linear,
}

/// The same model under torchvision's names.
#[derive(Module, Debug)]
pub struct TorchvisionVit {
    /// The model.
    pub vit: Vit,
}

impl VitConfig {
    /// A model with parameters drawn from a seed, the same on every rank.
    ///
    /// # Errors
    /// [`ConfigError`] if the configuration describes no model.
    pub fn init(&self, seed: u64, device: &Device) -> Result<Vit, ConfigError> {
        self.check()?;
        let draws = &mut Draws::new(seed, Purpose::Parameters, 0);
        let hidden = self.hidden;
        let norm = || LayerNorm::new(hidden, self.norm_eps, device);
        let cls_token = parameter(draws.normal([1, 1, hidden], 1e-6, device));
        let pos_embed = parameter(draws.normal([1, self.tokens(), hidden], 0.02, device));
        let patch = [hidden, self.channels, self.patch, self.patch];
        let bound = ((self.channels * self.patch * self.patch) as f64).powf(-0.5);
        let proj = PatchProjection {
            weight: parameter(draws.uniform(patch, bound, device)),
            bias: parameter(draws.uniform([hidden], bound, device)),
        };
        let mut blocks = Vec::with_capacity(self.depth);
        for _ in 0..self.depth {
            let mut layer = |inputs, outputs| linear(inputs, outputs, draws, device);
            blocks.push(Block {
                norm1: norm(),
                attn: Attention {
                    qkv: layer(hidden, 3 * hidden),
                    proj: layer(hidden, hidden),
                },
                norm2: norm(),
                mlp: Mlp {
                    fc1: layer(hidden, self.mlp),
                    fc2: layer(self.mlp, hidden),
                },
            });
        }
        Ok(Vit {
            cls_token,
            tokens: self.tokens(),
            pos_embed,
            patch_embed: PatchEmbed { proj },
            blocks,
            norm: norm(),
            head: linear(hidden, self.classes, draws, device),
        })
    }
}

impl Vit {
    /// The logits of the images' classes, on the rank that holds the class token.
    ///
    /// # Shapes
    /// - `images`: `[B, channels, rows, columns]`, the same on every rank
    /// - returns: `[B, 1, 1, 1, classes]`, or `[B, 0, 1, 1, classes]` on the other ranks
    ///
    /// # Errors
    /// [`ModelError`] if the images are not as declared, or the ranks fail.
    pub fn forward(&self, images: Tensor<4>, session: &Session) -> Result<Tensor<5>, ModelError> {
        let mut x = self.embed(images, session)?;
        let mut stages = session.stages();
        for block in &self.blocks {
            x = block.forward(x, &mut stages)?;
        }
        let x = stages.finish(x)?;
        // Where this rank has the class token among its own, if it does.
        let own = x.positions(PATCHES).into_iter().flatten();
        let place = own.enumerate().find(|&(_, position)| position == 0);
        let class = place.map_or(0..0, |(index, _)| index..index + 1);
        let class = narrow(x.into_tensor(), 1, class);
        Ok(project(self.norm.forward(class), &self.head))
    }

    /// The class token and the patches with their positions.
    fn embed(&self, images: Tensor<4>, session: &Session) -> Result<Shard, ModelError> {
        let weight = self.patch_embed.proj.weight.val();
        let [hidden, channels, rows, columns] = weight.dims();
        let dims = images.dims();
        let [batch, image_channels, height, width] = dims;
        let model = session.model();
        let tokens = 1 + (height / rows) * (width / columns);
        let fits = batch == model.batch
            && image_channels == channels
            && height.is_multiple_of(rows)
            && width.is_multiple_of(columns)
            && model.lengths == [tokens];
        if !fits {
            return Err(ModelError::Shape {
                what: "the images",
                got: dims.to_vec(),
                rule: format!(
                    "the model was declared for {} images of {channels} channels and {:?} tokens with the class's, of \
                     {rows}·{columns} pixels each",
                    model.batch, model.lengths
                ),
            });
        }
        let video = images.reshape([batch, channels, 1, height, width]);
        let patches = patchify(video, [1, rows, columns], PatchOrder::ChannelFirst);
        let size = channels * rows * columns;
        let patches: Tensor<5> = reshape(patches, [batch, tokens - 1, 1, 1, size]);
        // The class token has no patch: nothing is embedded in its place.
        let (device, dtype) = (patches.device().without_autodiff(), patches.dtype());
        let nothing = Tensor::zeros([batch, 1, 1, 1, size], (&device, dtype));
        let nothing = match patches.is_autodiff() {
            true => dsp_core::vjp::constant_like(nothing, &patches),
            false => nothing,
        };
        let x = session.split(Tensor::cat(vec![nothing, patches], 1))?;

        let own: Vec<usize> = x.positions(PATCHES).into_iter().flatten().collect();
        let held = own.len();
        let is_patch: Vec<f64> = own.iter().map(|&at| f64::from(at > 0)).collect();
        let is_patch = TensorData::new(is_patch, [1, held, 1, 1, 1]);
        let is_patch = Tensor::<5>::from_data(is_patch, (&device, dtype));
        let is_class = is_patch.clone().neg().add_scalar(1.0);
        let [is_patch, is_class] = [is_patch, is_class].map(|mask| {
            let parameter = self.cls_token.val();
            match parameter.is_autodiff() {
                true => dsp_core::vjp::constant_like(mask, &parameter),
                false => mask,
            }
        });
        let table = self.pos_embed.val();
        let table: Tensor<2> = {
            let [_, rows, hidden] = table.dims();
            reshape(table, [rows, hidden])
        };
        let table = x.rows_of(table, self.tokens, PATCHES)?;
        let weight = reshape(weight, [hidden, size]).transpose();
        Ok(x.map(|x| {
            let x = affine(x, weight, Some(self.patch_embed.proj.bias.val())) * is_patch;
            let class = reshape(self.cls_token.val(), [1, 1, 1, 1, hidden]) * is_class;
            x + class + reshape(table, [1, held, 1, 1, hidden])
        })?)
    }
}

/// This rank's terms of the loss, the mean cross-entropy of the classes: all of it on the rank that holds the class
/// token, and 0 on the others.
///
/// # Shapes
/// - `logits`: as [`Vit::forward`] returns them; `labels`: one for each image
/// - returns: `[1]`
///
/// # Errors
/// [`ModelError`] on every rank, if there are not as many labels as images, or one is no class.
pub fn class_loss(logits: Tensor<5>, labels: &[u32]) -> Result<Tensor<1>, ModelError> {
    let [batch, held, _, _, classes] = logits.dims();
    if labels.len() != batch {
        return Err(ModelError::Shape {
            what: "the labels",
            got: vec![labels.len()],
            rule: format!("there are {batch} images: each has one"),
        });
    }
    check_classes(labels.iter().copied(), classes)?;
    let target = |&class: &u32| Target {
        class,
        weight: 1.0 / labels.len() as f64,
    };
    let targets: Vec<Target> = labels
        .iter()
        .map(target)
        .take(held * labels.len())
        .collect();
    Ok(cross_entropy(logits, &targets))
}

/// The logits on every rank, outside of any graph: `[B, classes]`.
///
/// # Errors
/// [`ModelError`] if the ranks fail.
pub fn gather_logits(logits: Tensor<5>, session: &Session) -> Result<Tensor<2>, ModelError> {
    let logits = logits.inner();
    let [batch, held, _, _, classes] = logits.dims();
    let own = match held {
        0 => Tensor::zeros([batch, classes], (&logits.device(), logits.dtype())),
        _ => reshape(logits, [batch, classes]),
    };
    Ok(all_reduce_in(own, Phase::Outside, session.group())?)
}

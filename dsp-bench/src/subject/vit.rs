//! A vision transformer on frames of a clip: the cross-entropy of random classes.

use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::{Loss, ModelShape, Placed, Session};
use dsp_models::random::{Draws, Purpose};
use dsp_models::vit::{Vit, VitConfig, class_loss, roles};
use dsp_models::weights::cast;
use serde::{Deserialize, Serialize};

use super::{Description, Output, Pass, Run, Sizes, Subject, SubjectError, Workload};
use crate::clip::{self, Clip, ClipError};
use crate::scenario::{DEEPEST, LONGEST, Rules, Scenario, ScenarioError, WIDEST};

/// What is drawn from the scenario's seed beside the weights.
const LABELS: u64 = 0;

/// The sizes of a vision transformer and of the images that it sees; three channels, red, green, blue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitSizes {
    /// The y4m file whose frames are the images, relative to the TOML's folder. `None`: the built-in clip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<PathBuf>,
    /// Rows of pixels, after cropping and scaling.
    pub height: usize,
    /// Columns of pixels, after cropping and scaling.
    pub width: usize,
    /// Rows and columns of a patch.
    pub patch: usize,
    /// Layers.
    pub depth: usize,
    /// Channels of a token.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// The inner width of the feed-forward.
    pub inner: usize,
    /// Classes.
    pub classes: usize,
}

impl VitSizes {
    pub(crate) fn config(&self) -> VitConfig {
        VitConfig::new(
            [self.height, self.width],
            self.patch,
            self.hidden,
            self.depth,
            self.heads,
            self.inner,
            self.classes,
        )
    }

    pub(crate) fn read_clip(&self) -> Result<Clip, ClipError> {
        match &self.clip {
            Some(path) => Clip::read(path),
            None => Clip::built_in(),
        }
    }
}

impl Sizes for VitSizes {
    fn check(&self, _batch: usize, rules: &Rules<'_>) -> Result<(), ScenarioError> {
        let [height, width] = [("model.height", self.height), ("model.width", self.width)];
        rules.within(LONGEST, &[height, width, ("model.patch", self.patch)])?;
        rules.within(DEEPEST, &[("model.depth", self.depth)])?;
        let wide = [("model.inner", self.inner), ("model.classes", self.classes)];
        rules.within(WIDEST, &wide)?;
        rules.heads(self.hidden, self.heads)?;
        for (key, value) in [height, width] {
            rules.multiple(key, value, self.patch, "the patch's side")?;
        }
        Ok(())
    }

    fn file(&mut self) -> &mut Option<PathBuf> {
        &mut self.clip
    }

    fn describe(&self, _batch: usize) -> Description {
        let layers = if self.depth == 1 { "layer" } else { "layers" };
        let clip = match &self.clip {
            Some(path) => path.display().to_string(),
            None => clip::BUILT_IN_NAME.to_owned(),
        };
        Description {
            noun: "vision transformer",
            data: "images",
            model: format!(
                "ViT, {} {layers}, hidden {}, {} heads",
                self.depth, self.hidden, self.heads
            ),
            tokens: format!("{} tokens, the class's included", self.config().tokens()),
            facts: vec![
                (
                    "layers",
                    format!(
                        "attention over all tokens, feed-forward of {} features",
                        self.inner
                    ),
                ),
                (
                    "input",
                    format!(
                        "frames of {}×{} pixels, patches of {}×{}; their classes are random",
                        self.height, self.width, self.patch, self.patch
                    ),
                ),
                ("clip", clip),
            ],
        }
    }

    fn subject(&self, scenario: &Scenario) -> Result<Arc<dyn Subject>, SubjectError> {
        let config = self.config();
        let batch = scenario.batch;
        let pixels = self.read_clip()?.batch(batch, 1, self.height, self.width)?;
        let template = config.init(scenario.seed, &Device::flex())?;
        let classes = Draws::new(scenario.seed, Purpose::Other, LABELS).uniforms(batch);
        Ok(Arc::new(Classes {
            template: cast(template, scenario.dtype.dtype()),
            pixels: TensorData::new(pixels, [batch, 3, 1, self.height, self.width]),
            labels: classes
                .into_iter()
                .map(|uniform| (uniform * self.classes as f64) as u32)
                .collect(),
            config,
        }))
    }
}

#[derive(Debug)]
struct Classes {
    config: VitConfig,
    template: Vit,
    /// `[B, 3, 1, H, W]`
    pixels: TensorData,
    labels: Vec<u32>,
}

impl Workload for Classes {
    type Module = Vit;

    fn shape(&self) -> ModelShape {
        self.config.shape(self.labels.len())
    }

    fn place(&self, session: &Session, device: &Device) -> Placed<Vit> {
        session.place(&self.template, roles(&self.config), device)
    }

    fn forward(&self, module: &Vit, pass: &Pass, session: &Session) -> Result<Run, SubjectError> {
        let images = pass.input(&self.pixels);
        let one_frame: Tensor<4> = images.clone().squeeze_dim(2);
        let logits = module.forward(one_frame, session)?;
        let loss = class_loss(logits.clone(), &self.labels)?;
        Ok(Run {
            input: Some(images),
            output: Output::Classes(logits),
            loss: Loss::OfShard(loss),
        })
    }
}

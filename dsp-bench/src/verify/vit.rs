//! Kinds `vit_timm` and `vit_torchvision`: a vision transformer, its images and labels.
//!
//! A file holds `x [B, C, H, W]`, `labels [B]`, the weights, `logits [B, classes]`, `loss`, `dx` and each weight's
//! gradient.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::{Group, Loss, SequenceParallel, Session};
use dsp_models::vit::{TorchvisionVit, Vit, VitConfig, class_loss, gather_logits, roles};
use dsp_models::weights::OriginalNames;
use serde::Deserialize;

use super::shared::{keep, keep_parameters, leaf, of_dtype, summed, weights};
use super::{Case, CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored};

#[derive(Debug, Deserialize)]
struct File {
    image: [usize; 2],
    patch: usize,
    hidden: usize,
    depth: usize,
    heads: usize,
    mlp: usize,
    classes: usize,
    norm_eps: f64,
}

/// A model, whatever its parameters are called.
trait Named: OriginalNames + Send + Sync + 'static {
    fn vit(&self) -> &Vit;
}

impl Named for Vit {
    fn vit(&self) -> &Vit {
        self
    }
}

impl Named for TorchvisionVit {
    fn vit(&self) -> &Vit {
        &self.vit
    }
}

struct VitCase<M> {
    config: VitConfig,
    templates: [M; 2],
    images: Stored,
    labels: Vec<u32>,
}

pub(super) fn open_timm(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    open(reference, |vit| vit)
}

pub(super) fn open_torchvision(
    reference: &Reference,
) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    open(reference, |vit| TorchvisionVit { vit })
}

fn open<M: Named>(
    reference: &Reference,
    named: impl Fn(Vit) -> M,
) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let file: File = reference.json("config")?;
    let (image, patch) = (file.image, file.patch);
    let config = VitConfig::new(
        image,
        patch,
        file.hidden,
        file.depth,
        file.heads,
        file.mlp,
        file.classes,
    )
    .with_norm_eps(file.norm_eps);
    let templates = weights(reference, || config.init(0, &Device::flex()).map(&named))?;
    let labels = reference.input("labels")?.clone();
    let batch = labels.values.len();
    let images = [batch, config.channels, image[0], image[1]];
    let labels: Vec<u32> = labels.values.iter().map(|&label| label as u32).collect();
    if let Some(label) = labels.iter().find(|&&label| label as usize >= file.classes) {
        return Err(reference.wrong_metadata(format!(
            "has {} classes, and a label is {label}",
            file.classes
        )));
    }
    Ok(vec![Arc::new(VitCase {
        config,
        templates,
        images: reference.shaped("x", &images)?.clone(),
        labels,
    })])
}

impl<M: Named> Case for VitCase<M> {
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
        let batch = self.labels.len();
        let session = Session::new(strategy, group, self.config.shape(batch))?;
        let template = of_dtype(&self.templates, dtype);
        let placed = session.place(template, roles(&self.config), &device);
        let dims = std::array::from_fn(|dim| self.images.shape[dim]);
        let images: Tensor<4> = leaf(&self.images, dims, &device, dtype);
        let logits = placed.module.vit().forward(images.clone(), &session)?;
        let loss = class_loss(logits.clone(), &self.labels)?;
        let gradients = session.backward(Loss::OfShard(loss.clone()))?;
        let mut produced = Produced::new();
        let logits = gather_logits(logits, &session)?;
        keep(
            &mut produced,
            "logits",
            logits,
            &[batch, self.config.classes],
        );
        let loss = all_reduce_in(loss, Phase::Outside, session.group())?;
        keep(&mut produced, "loss", loss, &[1]);
        let dx = summed(&images, &gradients, session.group())?;
        keep(&mut produced, "dx", dx, &self.images.shape);
        keep_parameters(&mut produced, &session, &placed, gradients)?;
        Ok(produced)
    }
}

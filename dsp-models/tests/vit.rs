//! Vision transformers against timm's and torchvision's numbers, and every strategy against serial.
#![cfg(feature = "flex")]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};
use common::weather::of_loss;
use common::{Account, Fixture, Run, Values, collect, launch, named, summed};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::{Group, LaunchError, PlanError, SequenceParallel, Session};
use dsp_models::error::{ConfigError, ModelError};
use dsp_models::random::{Draws, Purpose};
use dsp_models::vit::{TorchvisionVit, Vit, VitConfig, class_loss, gather_logits, roles};
use dsp_models::weights::{OriginalNames, Weights, cast, load, to_bytes};
use proptest::prelude::*;

/// f32: some twenty times the originals' own difference between f32 and f64. f64: the references' storage in f32.
const TOLERANCES: [(DType, f64); 2] = [(DType::F32, 2e-5), (DType::F64, 3e-7)];

/// The model, whatever its parameters are called.
trait Named: OriginalNames + Clone + Send + Sync + 'static {
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

#[derive(Debug, Clone)]
struct Case<M> {
    config: VitConfig,
    template: M,
    images: Values,
    labels: Vec<u32>,
    dtype: DType,
}

impl<M: Named> Case<M> {
    fn run(
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
        let device = Device::flex().autodiff();
        let session = Session::new(strategy, group, self.config.shape(self.labels.len()))?;
        let placed = session.place(&self.template, roles(&self.config), &device);
        let images: Tensor<4> = self.images.tensor(&device, self.dtype).require_grad();
        let logits = placed.module.vit().forward(images.clone(), &session)?;
        let loss = class_loss(logits.clone(), &self.labels)?;
        let mut ending = of_loss(&session, loss.clone())?;
        let reduced = ending.reduce(&session, &placed)?;
        let mut found = named(&placed.module, &reduced);
        let sum = all_reduce_in(loss.detach(), Phase::Outside, session.group())?;
        found.insert("loss".to_owned(), Values::of(&sum.into_data()));
        let logits = gather_logits(logits, &session)?;
        found.insert("logits".to_owned(), Values::of(&logits.into_data()));
        let dx = summed(&images, &ending.gradients, session.group())?;
        found.insert("dx".to_owned(), dx);
        Ok((found, ending.account))
    }
}

fn config(fixture: &Fixture) -> VitConfig {
    let config = fixture.config();
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let image = [0, 1].map(|index| config["image"][index].as_u64().unwrap() as usize);
    VitConfig::new(
        image,
        number("patch"),
        number("hidden"),
        number("depth"),
        number("heads"),
        number("mlp"),
        number("classes"),
    )
    .with_norm_eps(config["norm_eps"].as_f64().unwrap())
}

/// Holds a model to a file, under every strategy that can run it, on one to four ranks.
fn assert_meets<M: Named>(fixture: &Fixture, fresh: M) {
    let weights = Weights::bytes(fixture.bytes.clone()).with_prefix("param.");
    let template = load(fresh, &weights, DType::F64).unwrap();
    let labels = fixture.get("labels").values;
    for (dtype, tolerance) in TOLERANCES {
        let case = Arc::new(Case {
            config: config(fixture),
            template: cast(template.clone(), dtype),
            images: fixture.get("x"),
            labels: labels.iter().map(|&label| label as u32).collect(),
            dtype,
        });
        let mut runs = 0;
        for strategy in dsp_strategies::all() {
            for ranks in 1..=4 {
                if strategy.plan(&case.config.shape(2), ranks).is_err() {
                    continue;
                }
                runs += 1;
                let run = case.run(&strategy, ranks).unwrap();
                let mut compared = 0;
                for name in fixture.names() {
                    if ["x", "labels"].contains(&name.as_str()) || name.starts_with("param.") {
                        continue;
                    }
                    let error = run.found[&name].error(&fixture.get(&name));
                    let what = strategy.name();
                    assert!(
                        error <= tolerance,
                        "{name} {dtype:?} {what} × {ranks}: {error:e}"
                    );
                    compared += 1;
                }
                assert_eq!(compared, 3 + 32);
                run.assert_sent_as_planned();
            }
        }
        // Serial, DSP, LASP and LASP-2 on one rank; Ulysses, ring, USP, Megatron-SP and LSS on four.
        assert_eq!(runs, 4 + 5 * 4);
    }
}

#[test]
fn the_model_gives_timms_logits_loss_and_gradients_under_every_strategy() {
    let fixture = Fixture::open("vit_timm.safetensors");
    let fresh = config(&fixture).init(0, &Device::flex()).unwrap();
    assert_meets(&fixture, fresh);
}

#[test]
fn the_model_gives_torchvisions_logits_loss_and_gradients_under_its_names() {
    let fixture = Fixture::open("vit_torchvision.safetensors");
    let vit = config(&fixture).init(0, &Device::flex()).unwrap();
    assert_meets(&fixture, TorchvisionVit { vit });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_strategy_gives_the_serial_logits_and_gradients(
        (rows, columns) in (1..=3usize, 1..=3usize),
        (heads, dim) in (1..=5usize, 1..=2usize),
        depth in 1..=2usize,
        batch in 1..=2usize,
        ranks in 1..=5usize,
        seed in 0..1000u64,
    ) {
        let config = VitConfig::new([2 * rows, 2 * columns], 2, heads * dim, depth, heads, 3, 4).with_channels(1);
        let pixels = [batch, 1, 2 * rows, 2 * columns];
        let count = pixels.iter().product();
        let case = Arc::new(Case {
            template: cast(config.init(seed, &Device::flex()).unwrap(), DType::F64),
            images: Values::new(&pixels, Draws::new(seed, Purpose::Other, 0).normals(count)),
            labels: (0..batch as u32).collect(),
            dtype: DType::F64,
            config,
        });
        let strategies = dsp_strategies::all();
        let serial = case.run(&strategies[0], 1).unwrap();
        for strategy in &strategies {
            match strategy.plan(&case.config.shape(batch), ranks) {
                Ok(_) => {
                    let run = case.run(strategy, ranks).map_err(|error| TestCaseError::fail(error.to_string()))?;
                    for (name, values) in &run.found {
                        let error = values.error(&serial.found[name]);
                        prop_assert!(error < 1e-10, "{} × {ranks}: {name} differs by {error:e}", strategy.name());
                    }
                    run.assert_sent_as_planned();
                }
                Err(PlanError::Heads { heads, ranks, .. }) => prop_assert!(heads < ranks),
                Err(_) => prop_assert!(["serial", "dsp", "lasp", "lasp2"].contains(&strategy.name())),
            }
        }
    }
}

#[test]
fn torchvisions_names_come_back_from_a_file() {
    let fixture = Fixture::open("vit_torchvision.safetensors");
    let vit = config(&fixture).init(0, &Device::flex()).unwrap();
    let bytes = to_bytes(&TorchvisionVit { vit: vit.clone() }).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for name in fixture.names() {
        if let Some(name) = name.strip_prefix("param.") {
            assert!(file.tensor(name).is_ok(), "{name}");
        }
    }
    assert_eq!(file.names().len(), vit_parameters(&vit));
    // What is missing is named as torchvision names it.
    let empty = Weights::bytes(bytes).with_prefix("nothing.");
    let error = load(TorchvisionVit { vit }, &empty, DType::F32)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("encoder.layers.encoder_layer_1.self_attention.in_proj_weight"),
        "{error}"
    );
}

fn vit_parameters(vit: &Vit) -> usize {
    burn::module::list_param_ids(vit).len()
}

#[test]
fn what_is_no_model_and_what_are_no_images_is_said_with_the_number_and_the_rule() {
    let config = VitConfig::new([5, 4], 2, 4, 1, 2, 3, 2);
    let expected = ConfigError::Multiple {
        field: "image[0]",
        value: 5,
        divisor: 2,
        rule: "an image is a whole number of patches",
    };
    assert_eq!(config.check(), Err(expected));
    let config = VitConfig::new([4, 4], 2, 4, 1, 2, 3, 2);
    let vit = config.init(0, &Device::flex()).unwrap();
    let session = Session::new(
        Arc::new(dsp_strategies::Serial),
        Group::alone(),
        config.shape(1),
    )
    .unwrap();
    let images = Tensor::zeros([1, 3, 4, 6], &Device::flex());
    let error = vit.forward(images, &session).unwrap_err().to_string();
    assert_eq!(
        error,
        "the images has shape [1, 3, 4, 6], where the model was declared for 1 images of 3 channels and [5] tokens \
         with the class's, of 2·2 pixels each"
    );
    assert_eq!(vit.num_params(), cast(vit.clone(), DType::F64).num_params());
}

#[test]
fn a_label_that_is_no_class_is_named_on_ranks_without_the_class_token_too() {
    let logits = Tensor::zeros([2, 0, 1, 1, 10], &Device::flex());
    assert_eq!(
        class_loss(logits, &[9, 10]).unwrap_err().to_string(),
        "target 1 is class 10, and there are 10, from 0"
    );
}

#[test]
fn labels_that_are_not_one_for_each_image_are_counted() {
    let logits = Tensor::zeros([2, 1, 1, 1, 10], &Device::flex());
    assert_eq!(
        class_loss(logits, &[1, 2, 3]).unwrap_err().to_string(),
        "the labels has shape [3], where there are 2 images: each has one"
    );
}

//! Language models: LLaMA against transformers' numbers, TransNormer's attention against lightning-attention's, and
//! every strategy against serial for all of them.
#![cfg(feature = "flex")]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use common::language::LanguageCase;
use common::{Fixture, Values, launch, named, summed, whole};
use dsp_core::attention::{Documents, Within};
use dsp_core::strategy::{AttentionStage, Closing, OutputLayout, Part, Role, StageKind, Units};
use dsp_core::{
    AxisSet, Heads, Loss, Mask, ModelShape, PlanError, SeqAxis, SequenceParallel, Session, Shard,
    Stage,
};
use dsp_models::error::{ConfigError, ModelError};
use dsp_models::language::{LanguageConfig, Layers, LinearAttention, Tokens, next_token_loss};
use dsp_models::random::{Draws, Purpose};
use dsp_models::weights::{Weights, WeightsError, cast, load, named_parameters, to_bytes};
use proptest::prelude::*;

/// f32: some twenty times the original's own difference between f32 and f64. f64: the references' storage in f32.
const TOLERANCES: [(DType, f64); 2] = [(DType::F32, 2e-5), (DType::F64, 3e-7)];

/// Those that can run a model, on one to four ranks.
fn runs(shape: &ModelShape) -> Vec<(Arc<dyn SequenceParallel>, usize)> {
    let strategies = dsp_strategies::all().into_iter();
    let pairs = strategies.flat_map(|strategy| (1..=4).map(move |ranks| (strategy.clone(), ranks)));
    pairs
        .filter(|(strategy, ranks)| strategy.plan(shape, *ranks).is_ok())
        .collect()
}

fn llama() -> (Fixture, LanguageCase) {
    let fixture = Fixture::open("llama_lm.safetensors");
    let config = fixture.config();
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let config = LanguageConfig::new(
        number("vocab_size"),
        number("hidden_size"),
        number("intermediate_size"),
        number("num_hidden_layers"),
        number("num_attention_heads"),
        number("num_key_value_heads"),
    )
    .with_rms_norm_eps(config["rms_norm_eps"].as_f64().unwrap())
    .with_rope_theta(config["rope_theta"].as_f64().unwrap());
    let template = config.init(0, &Device::flex()).unwrap();
    let weights = Weights::bytes(fixture.bytes.clone()).with_prefix("param.");
    let template = load(template, &weights, DType::F64).unwrap();
    let ids = fixture.get("input_ids");
    let rows = ids.values.chunks(ids.shape[1]);
    let rows = rows
        .map(|row| row.iter().map(|&id| id as u32).collect())
        .collect();
    let case = LanguageCase {
        config,
        template,
        tokens: Tokens::new(rows).unwrap(),
        mask: Mask::Causal,
    };
    (fixture, case)
}

#[test]
fn llama_gives_transformers_logits_loss_and_gradients_under_every_strategy() {
    let (fixture, case) = llama();
    let shape = case.config.shape(2, 32, &case.mask);
    let runs = runs(&shape);
    // Serial and DSP on one rank, LASP too; Ulysses, ring, USP, Megatron-SP and LSS on four.
    assert_eq!(runs.len(), 1 + 1 + 2 + 5 * 4);
    for (dtype, tolerance) in TOLERANCES {
        let case = Arc::new(case.clone().cast(dtype));
        for (strategy, ranks) in &runs {
            let run = case.run(strategy, *ranks).unwrap();
            let mut compared = 0;
            for name in fixture.names() {
                let ours = match name.as_str() {
                    "input_ids" => continue,
                    name if name.starts_with("param.") => continue,
                    "layer0_in" => "after 0 layers",
                    "layer0_out" => "after 1 layers",
                    name => name,
                };
                let error = run.found[ours].error(&fixture.get(&name));
                assert!(
                    error <= tolerance,
                    "{name} {dtype:?} {} × {ranks}: {error:e}",
                    strategy.name()
                );
                compared += 1;
            }
            assert_eq!(compared, 4 + 21);
            run.assert_sent_as_planned();
        }
    }
}

fn transnormer() -> (Fixture, LinearAttention, AttentionStage) {
    let fixture = Fixture::open("tnl_attention.safetensors");
    let attention = LinearAttention::new(
        64,
        4,
        &mut Draws::new(0, Purpose::Parameters, 0),
        &Device::flex(),
    );
    let weights = Weights::bytes(fixture.bytes.clone()).with_prefix("param.");
    let attention = load(attention, &weights, DType::F64).unwrap();
    let config = LanguageConfig::new(1, 64, 1, 4, 4, 4).with_layers(Layers::Linear);
    let stage = config.attention(1, &Mask::Causal);
    (fixture, attention, stage)
}

#[test]
fn linear_attention_gives_transnormers_outputs_and_gradients_under_every_strategy() {
    let (fixture, template, stage) = transnormer();
    let StageKind::Attention(declared) = StageKind::Attention(stage) else {
        unreachable!()
    };
    let dsp_core::strategy::Form::Linear { decay } = &declared.form else {
        panic!("{declared:?}")
    };
    for (decay, slope) in decay.iter().zip(fixture.get("slope_rate").values) {
        assert!(
            (decay - (-slope).exp()).abs() < 1e-7,
            "{decay}, slope {slope}"
        );
    }
    let shape = ModelShape {
        batch: 2,
        lengths: vec![40],
        hidden: 64,
        stages: vec![Stage::new("linear_attn", StageKind::Attention(declared))],
        output: OutputLayout::AsInput,
    };
    let runs = runs(&shape);
    // Serial, DSP, ring, USP and LSS on one rank; Ulysses, Megatron-SP, LASP and LASP-2 on four.
    assert_eq!(runs.len(), 5 + 4 * 4);
    for (dtype, tolerance) in TOLERANCES {
        let template = Arc::new(cast(template.clone(), dtype));
        for (strategy, ranks) in runs.clone() {
            let (template, shape) = (template.clone(), shape.clone());
            let [x, dout] = ["x", "dout"].map(|name| fixture.get(name));
            let name = strategy.name().to_owned();
            let found = launch(
                ranks,
                move |group| -> Result<BTreeMap<String, Values>, ModelError> {
                    let device = Device::flex().autodiff();
                    let session = Session::new(strategy.clone(), group, shape.clone())?;
                    let heads = Units::Query(Heads::multi(4, 16));
                    let roles = |path: &str| -> Part {
                        match path {
                            "q_proj.weight" | "k_proj.weight" | "v_proj.weight" => Role::Columns {
                                dim: 1,
                                fused: 1,
                                units: heads,
                            }
                            .in_stage(0),
                            _ => Role::Replicated.into(),
                        }
                    };
                    let placed = session.place(&*template, roles, &device);
                    let leaf: Tensor<3> = x.tensor(&device, dtype).require_grad();
                    let stages = &mut session.stages();
                    let stage = stages.attention()?;
                    let input = session.split(leaf.clone().reshape([2, 40, 1, 1, 64]))?;
                    let out = placed.module.forward(stage.arrange(input)?, &stage)?;
                    let cotangent = session
                        .split(dout.tensor::<3>(&device, dtype).reshape([2, 40, 1, 1, 64]))?;
                    let loss = (out.tensor().clone() * cotangent.into_tensor()).sum();
                    let mut gradients = session.backward(Loss::OfShard(loss))?;
                    let dx = summed(&leaf, &gradients, session.group())?;
                    let reduced = session.reduce(&mut gradients, &placed)?;
                    let mut found = named(&placed.module, &session.whole(reduced, &placed)?);
                    found.insert("out".to_owned(), whole(&session, out)?);
                    found.insert("dx".to_owned(), dx);
                    Ok(found)
                },
            )
            .unwrap();
            for (tensor, values) in &found[0] {
                let error = values.error(&fixture.get(tensor));
                assert!(
                    error <= tolerance,
                    "{tensor} {dtype:?} {name} × {ranks}: {error:e}"
                );
            }
            assert_eq!(found[0].len(), 8 + 2);
        }
    }
}

/// A small model of any kind.
#[derive(Debug, Clone)]
struct Tiny {
    heads: (usize, usize),
    layers: (usize, Layers),
    tied: bool,
    batch: usize,
    length: usize,
    ranks: usize,
    mask: Mask,
    seed: u64,
}

/// Causal, a sliding window, or two packed documents and what is left.
fn masks() -> impl Strategy<Value = Mask> {
    let window = (1..=4usize).prop_map(|size| Mask::Window {
        size: NonZeroUsize::new(size).unwrap(),
    });
    let packed = (0..=4usize, 0..=4usize).prop_map(|(first, second)| Mask::Packed {
        documents: Documents::new(vec![first, first + second]).unwrap(),
        within: Within::Causal,
    });
    prop_oneof![2 => Just(Mask::Causal), 1 => window, 1 => packed]
}

fn tiny() -> impl Strategy<Value = Tiny> {
    let kinds = prop_oneof![
        2 => Just(Layers::Softmax),
        1 => Just(Layers::Linear),
        2 => Just(Layers::Hybrid { softmax_every: 2 }),
    ];
    (
        prop::sample::select(vec![(1, 1), (2, 2), (4, 2), (5, 1), (6, 3)]),
        (1..=3usize, kinds),
        any::<bool>(),
        1..=2usize,
        1..=11usize,
        1..=5usize,
        masks(),
        0..1000u64,
    )
        .prop_map(
            |(heads, layers, tied, batch, length, ranks, mask, seed)| Tiny {
                heads,
                layers,
                tied,
                batch,
                length,
                ranks,
                mask,
                seed,
            },
        )
}

impl Tiny {
    fn case(&self) -> Arc<LanguageCase> {
        let (query, key) = self.heads;
        let config = LanguageConfig::new(7, 2 * query, 5, self.layers.0, query, key)
            .with_layers(self.layers.1)
            .with_tie_word_embeddings(self.tied);
        let template = config.init(self.seed, &Device::flex()).unwrap();
        let drawn = Draws::new(self.seed, Purpose::Other, 0).uniforms(self.batch * self.length);
        let rows = drawn.chunks(self.length);
        let rows = rows
            .map(|row| row.iter().map(|&u| (7.0 * u) as u32).collect())
            .collect();
        let case = LanguageCase {
            config,
            template,
            tokens: Tokens::new(rows).unwrap(),
            mask: self.mask.clone(),
        };
        Arc::new(case.cast(DType::F64))
    }
}

/// Every strategy and some mixtures give what serial gives, and send what their formulas say.
fn everything_is_equal(tiny: &Tiny) -> Result<(), TestCaseError> {
    let case = tiny.case();
    let shape = case.config.shape(tiny.batch, tiny.length, &case.mask);
    let mut strategies = dsp_strategies::all();
    let serial = case.run(&strategies[0], 1).unwrap();
    for mixture in ["lasp2+ring", "lasp+lss", "ulysses+megatron", "lasp2+usp"] {
        strategies.push(dsp_strategies::by_name(mixture).unwrap());
    }
    for strategy in &strategies {
        match strategy.plan(&shape, tiny.ranks) {
            Ok(_) => {
                let what = format!("{} on {} ranks", strategy.name(), tiny.ranks);
                let run = case
                    .run(strategy, tiny.ranks)
                    .map_err(|error| TestCaseError::fail(format!("{what}: {error}")))?;
                prop_assert_eq!(run.found.len(), serial.found.len());
                for (name, values) in &run.found {
                    let error = values.error(&serial.found[name]);
                    prop_assert!(error < 1e-10, "{what}: {name} differs by {error:e}");
                }
                run.assert_sent_as_planned();
            }
            Err(PlanError::Ranks { .. } | PlanError::NoAxisLeft { .. }) => {
                prop_assert!(["serial", "dsp"].contains(&strategy.name()));
            }
            Err(PlanError::Heads { heads, ranks, .. }) => prop_assert!(heads < ranks),
            Err(PlanError::Form { .. }) => {
                let name = strategy.name();
                let softmax_only = ["ring", "usp", "lss"].contains(&name);
                let linear_only = ["lasp", "lasp2"].contains(&name);
                let right = match tiny.layers.1 {
                    Layers::Softmax => linear_only,
                    Layers::Linear => softmax_only,
                    Layers::Hybrid { .. } => softmax_only || linear_only,
                };
                prop_assert!(right, "{name}");
            }
            Err(refusal) => prop_assert!(false, "{refusal}"),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_strategy_gives_the_serial_logits_and_gradients(tiny in tiny()) {
        everything_is_equal(&tiny)?;
    }
}

#[test]
fn more_ranks_than_tokens_or_heads_agree_with_serial() {
    for layers in [
        Layers::Softmax,
        Layers::Linear,
        Layers::Hybrid { softmax_every: 2 },
    ] {
        for (length, heads) in [(1, (1, 1)), (3, (2, 1)), (2, (5, 1))] {
            let tiny = Tiny {
                heads,
                layers: (2, layers),
                tied: false,
                batch: 1,
                length,
                ranks: 5,
                mask: Mask::Causal,
                seed: 3,
            };
            everything_is_equal(&tiny).unwrap();
        }
    }
}

#[test]
fn weights_come_back_from_a_file_under_hugging_faces_names() {
    let (fixture, case) = llama();
    let bytes = to_bytes(&case.template).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let published = fixture.names();
    let mut published: Vec<_> = (published.iter())
        .filter_map(|name| name.strip_prefix("param."))
        .collect();
    published.sort_unstable();
    assert_eq!(names, published);

    let fresh = case.config.init(5, &Device::flex()).unwrap();
    let loaded = load(fresh, &Weights::bytes(bytes), DType::F64).unwrap();
    for (name, data) in named_parameters(&loaded).unwrap() {
        // Stored as f32 there, and held as f64 here: the same numbers, in the original's layout.
        assert_eq!(
            Values::of(&data),
            fixture.get(&format!("param.{name}")),
            "{name}"
        );
    }
}

/// Hugging Face writes tied weights once, as the embedding's.
#[test]
fn a_file_of_tied_weights_has_no_head_and_gives_the_same_model_back() {
    let config = LanguageConfig::new(7, 8, 5, 1, 2, 1).with_tie_word_embeddings(true);
    let [saved, fresh] = [1, 2].map(|seed| config.init(seed, &Device::flex()).unwrap());
    let bytes = to_bytes(&saved).unwrap();
    let saved = named_parameters(&saved).unwrap();
    assert!(saved.contains_key("model.embed_tokens.weight"));
    assert!(!saved.contains_key("lm_head.weight"));
    assert_ne!(named_parameters(&fresh).unwrap(), saved);
    let loaded = load(fresh, &Weights::bytes(bytes.clone()), DType::F32).unwrap();
    assert_eq!(named_parameters(&loaded).unwrap(), saved);

    let untied = config.with_tie_word_embeddings(false);
    let untied = untied.init(2, &Device::flex()).unwrap();
    let error = load(untied, &Weights::bytes(bytes), DType::F32).unwrap_err();
    let WeightsError::Missing { names, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(names, ["lm_head.weight"]);
}

/// The loss of tokens where the logits are zeros, of a row of three tokens from a vocabulary of two.
fn loss_of_zeros(tokens: Vec<Vec<u32>>) -> Result<Tensor<1>, ModelError> {
    let shape = LanguageConfig::new(2, 4, 3, 1, 2, 1).shape(1, 3, &Mask::Causal);
    let serial = Arc::new(dsp_strategies::Serial);
    let session = Session::new(serial, dsp_core::Group::alone(), shape).unwrap();
    let zeros = Tensor::zeros([1, 3, 1, 1, 2], &Device::flex());
    let logits = Shard::new(zeros, session.plan().input.clone(), 0).unwrap();
    next_token_loss(&logits, &Tokens::new(tokens).unwrap())
}

#[test]
fn the_loss_of_a_token_that_is_in_no_vocabulary_names_it() {
    let error = loss_of_zeros(vec![vec![1, 0, 2]]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "target 2 is class 2, and there are 2, from 0"
    );
}

#[test]
fn the_loss_of_other_tokens_than_the_models_counts_them() {
    let error = loss_of_zeros(vec![vec![1, 0]]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the tokens has shape [1, 2], where the logits are those of [1, 3]"
    );
}

#[test]
fn the_loss_and_its_gradient_are_finite_and_exact_for_large_logits() {
    let shape = LanguageConfig::new(2, 4, 3, 1, 2, 1).shape(1, 3, &Mask::Causal);
    let serial = Arc::new(dsp_strategies::Serial);
    let session = Session::new(serial, dsp_core::Group::alone(), shape).unwrap();
    let tokens = Tokens::new(vec![vec![1, 0, 1]]).unwrap();
    for dtype in [DType::F32, DType::F64] {
        // Position 0 is sure of the wrong token, 1 of the right one; what 2 says has no target.
        let values = vec![-1000.0, 1000.0, -1000.0, 1000.0, 5.0, -7.0];
        let data = TensorData::new(values, [1, 3, 1, 1, 2]);
        let options = (&Device::flex().autodiff(), dtype);
        let leaf = Tensor::<5>::from_data(data, options).require_grad();
        let logits = Shard::new(leaf.clone(), session.plan().input.clone(), 0).unwrap();
        let loss = next_token_loss(&logits, &tokens).unwrap();
        assert_eq!(Values::of(&loss.to_data()).values, [1000.0]);
        let gradient = leaf.grad(&loss.backward()).unwrap();
        let expected = [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(Values::of(&gradient.into_data()).values, expected);
    }
}

#[test]
fn what_is_no_model_and_what_are_no_tokens_is_said_with_the_number_and_the_rule() {
    let config = LanguageConfig::new(7, 12, 5, 1, 4, 3);
    let expected = ConfigError::Multiple {
        field: "hidden_size",
        value: 12,
        divisor: 8,
        rule: "each head has an even number of channels, in pairs that are turned together",
    };
    assert_eq!(config.check(), Err(expected));
    let heads = LanguageConfig::new(7, 16, 5, 1, 4, 3).check().unwrap_err();
    assert_eq!(
        heads.to_string(),
        "num_attention_heads is 4, which must be a multiple of 3 (as many query heads share each key-value head)"
    );
    let ragged = Tokens::new(vec![vec![1, 2], vec![3]]).unwrap_err();
    assert_eq!(
        ragged.to_string(),
        "a row of tokens has shape [1], where the first has 2: all must have as many"
    );
    let config = LanguageConfig::new(7, 8, 5, 1, 2, 2);
    let model = config.init(0, &Device::flex()).unwrap();
    let session = Session::new(
        Arc::new(dsp_strategies::Serial),
        dsp_core::Group::alone(),
        config.shape(1, 3, &Mask::Causal),
    )
    .unwrap();
    let error = |row: Vec<u32>| {
        model
            .forward(&Tokens::new(vec![row]).unwrap(), &session)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        error(vec![0, 7, 1]),
        "a token has shape [7], where the vocabulary has 7, from 0"
    );
    assert_eq!(
        error(vec![0, 1]),
        "the tokens has shape [1, 2], where the model was declared for [1, 3]"
    );
}

#[test]
fn a_linear_layer_is_declared_to_need_all_heads() {
    let config =
        LanguageConfig::new(7, 8, 5, 2, 2, 1).with_layers(Layers::Hybrid { softmax_every: 2 });
    assert_eq!(
        config.attention(0, &Mask::Causal).closing,
        Closing::AllHeads
    );
    assert_eq!(
        config.attention(1, &Mask::Causal).closing,
        Closing::Projection
    );
    assert_eq!(
        config.attention(1, &Mask::Causal).axes,
        AxisSet::of(&[SeqAxis::FIRST])
    );
    let _: fn(Shard) -> Shard = Shard::detach;
}

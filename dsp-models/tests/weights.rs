//! Weights in and out, under the original names.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot read its file has failed"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{DType, Device};
use common::{Fixture, Values};
use dsp_models::VideoDitConfig;
use dsp_models::video_dit::{Init, VideoDit};
use dsp_models::weights::{Weights, WeightsError, load, named_parameters, save, to_bytes};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn config() -> VideoDitConfig {
    VideoDitConfig::new()
        .with_depth(2)
        .with_hidden_size(64)
        .with_num_heads(4)
        .with_caption_channels(32)
        .with_model_max_length(7)
}

fn fresh() -> VideoDit {
    config().init(Init::Dense, 0, &Device::flex()).unwrap()
}

/// The file's parameters, but for those that `keep` refuses, with another added.
fn parameters(fixture: &Fixture, keep: impl Fn(&str) -> bool, extra: Option<&str>) -> Vec<u8> {
    let file = SafeTensors::deserialize(&fixture.bytes).unwrap();
    let mut tensors: BTreeMap<String, TensorView<'_>> = (file.tensors().into_iter())
        .filter_map(|(name, view)| Some((name.strip_prefix("param.")?.to_owned(), view)))
        .filter(|(name, _)| keep(name))
        .collect();
    if let Some(extra) = extra {
        let view = tensors.values().next().unwrap().clone();
        tensors.insert(extra.to_owned(), view);
    }
    safetensors::serialize(tensors, None).unwrap()
}

#[test]
fn weights_come_back_bit_for_bit_under_the_original_names_and_in_the_original_layouts() {
    let fixture = Fixture::open("stdit3_model.safetensors");
    let weights = Weights::bytes(fixture.bytes.clone()).with_prefix("param.");
    let model = load(fresh(), &weights, DType::F32).unwrap();

    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("weights-round-trip.safetensors");
    save(&model, &path).unwrap();
    // Over the one that is there.
    save(&model, &path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let in_memory = to_bytes(&model).unwrap();
    let saved = SafeTensors::deserialize(&bytes).unwrap();
    let original = SafeTensors::deserialize(&fixture.bytes).unwrap();
    let names: Vec<String> = (original.names().into_iter())
        .filter_map(|name| Some(name.strip_prefix("param.")?.to_owned()))
        .collect();
    assert_eq!(saved.len(), names.len());
    for name in &names {
        let (saved, original) = (
            saved.tensor(name).unwrap(),
            original.tensor(&format!("param.{name}")).unwrap(),
        );
        assert_eq!(saved.shape(), original.shape(), "{name}");
        assert_eq!(saved.data(), original.data(), "{name}");
        let in_memory = SafeTensors::deserialize(&in_memory).unwrap();
        assert_eq!(
            in_memory.tensor(name).unwrap().data(),
            original.data(),
            "{name}"
        );
    }

    let again = load(fresh(), &Weights::file(path), DType::F32).unwrap();
    let named = named_parameters(&again).unwrap();
    assert_eq!(named.len(), names.len());
    for (name, data) in named {
        assert_eq!(
            Values::of(&data),
            fixture.get(&format!("param.{name}")),
            "{name}"
        );
    }
}

#[test]
fn a_missing_tensor_is_named_as_in_the_original() {
    let fixture = Fixture::open("stdit3_model.safetensors");
    let gone = [
        "t_embedder.mlp.0.bias",
        "temporal_blocks.1.attn.q_norm.weight",
    ];
    let bytes = parameters(&fixture, |name| !gone.contains(&name), None);
    let error = load(fresh(), &Weights::bytes(bytes), DType::F32).unwrap_err();
    let WeightsError::Missing { mut names, .. } = error else {
        panic!("{error}");
    };
    names.sort();
    assert_eq!(names, gone);
}

#[test]
fn a_tensor_that_the_model_does_not_have_is_named() {
    let fixture = Fixture::open("stdit3_model.safetensors");
    let bytes = parameters(&fixture, |_| true, Some("spatial_blocks.2.attn.qkv.bias"));
    let error = load(fresh(), &Weights::bytes(bytes), DType::F32).unwrap_err();
    let WeightsError::Extra { names, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(names, ["spatial_blocks.2.attn.qkv.bias"]);
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let fixture = Fixture::open("stdit3_model.safetensors");
    let weights = Weights::bytes(fixture.bytes).with_prefix("param.");
    let other = config().with_in_channels(3).with_pred_sigma(false);
    let other = other.init(Init::Dense, 0, &Device::flex()).unwrap();
    let error = load(other, &weights, DType::F32).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, WeightsError::Shape { .. }), "{message}");
    assert!(message.contains("x_embedder.proj.weight"), "{message}");
    assert!(message.contains("[64, 4, 1, 2, 2]"), "{message}");
}

#[test]
fn a_file_that_is_not_there_is_an_error_with_its_path() {
    let weights = Weights::file("no/such/file.safetensors");
    let message = load(fresh(), &weights, DType::F32).unwrap_err().to_string();
    assert!(message.contains("no/such/file.safetensors"), "{message}");
}

//! `dsp verify` on the reference files of the repository, and on files that are wrong.

#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dsp_bench::reference::ReferenceError;
use dsp_bench::scenario::Precision;
use dsp_bench::verify::{Options, Record, VerifyError, verify};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn options(precision: Precision, tolerance: f64) -> Options {
    Options {
        precision,
        tolerance,
        ranks: vec![1, 2, 3, 4],
    }
}

/// Every file passes; returns how many comparisons that were, and the refusals.
fn assert_passes(path: &Path, precision: Precision, tolerance: f64) -> (usize, Vec<String>) {
    let records = verify(path, &options(precision, tolerance), &|_| {}).unwrap();
    let mut refusals = Vec::new();
    let mut compared = 0;
    for record in records {
        match record {
            Record::Comparison { pass, .. } => {
                assert!(pass, "{record:?}");
                compared += 1;
            }
            Record::Refusal {
                case,
                strategy,
                ranks,
                ..
            } => refusals.push(format!("{case}: {strategy} × {ranks}")),
        }
    }
    (compared, refusals)
}

#[test]
fn every_tensor_of_every_reference_file_is_met_under_every_strategy_in_f32_and_f64() {
    for (file, case_tensors) in [
        ("dsp-models/tests/fixtures/stdit3_block.safetensors", 44),
        (
            "dsp-models/tests/fixtures/stdit3_block_xmask.safetensors",
            10,
        ),
        ("dsp-models/tests/fixtures/stdit3_model.safetensors", 25),
    ] {
        for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::F64, 3e-7)] {
            let (compared, refusals) = assert_passes(&fixture(file), precision, tolerance);
            assert!(refusals.is_empty(), "{file}: {refusals:?}");
            // Serial on one rank, the two others on one to four.
            assert!(
                compared >= 9 * (case_tensors - 5),
                "{file}: only {compared}"
            );
        }
    }
}

#[test]
fn attention_is_met_in_all_cases_but_those_that_a_strategy_rightly_refuses() {
    let file = fixture("dsp-core/tests/fixtures/attention.safetensors");
    for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::F64, 3e-7)] {
        let (compared, refusals) = assert_passes(&file, precision, tolerance);
        // Five tensors of eight cases: serial; DSP on one rank; Ulysses on four, less two cases of two heads.
        assert_eq!(compared, 5 * (8 + 8 + 4 * 8 - 2 * 2));
        for refusal in refusals {
            let one_axis = refusal.contains("dsp × ") && !refusal.ends_with("× 1");
            let few_heads = ["mha_causal_len1: ulysses", "mha_causal_sharp: ulysses"]
                .iter()
                .any(|case| refusal.starts_with(case));
            assert!(one_axis || few_heads, "{refusal}");
        }
    }
}

/// A copy of the attention file with its tensors and metadata changed.
fn changed(
    folder: &Path,
    name: &str,
    change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<u8>)>, &mut HashMap<String, String>),
) -> PathBuf {
    let bytes = std::fs::read(fixture("dsp-core/tests/fixtures/attention.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()))
        .collect();
    change(&mut tensors, &mut metadata);
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    let path = folder.join(name);
    let written = safetensors::serialize(views, Some(metadata)).unwrap();
    std::fs::write(&path, written).unwrap();
    path
}

#[test]
fn wrong_files_are_refused_with_what_is_wrong_and_a_wrong_number_fails() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let run = |path: &Path| verify(path, &options(Precision::F32, 2e-5), &|_| {});

    let kind = changed(folder, "kind.safetensors", |_, metadata| {
        metadata.insert("kind".into(), "poetry".into());
    });
    let error = run(&kind).unwrap_err().to_string();
    assert!(
        error.contains("\"poetry\"") && error.contains("stdit3_model"),
        "{error}"
    );

    let missing = changed(folder, "missing.safetensors", |tensors, _| {
        tensors.retain(|(name, ..)| name != "mha_full.v");
    });
    let error = run(&missing).unwrap_err().to_string();
    assert!(error.contains("mha_full.v"), "{error}");

    let extra = changed(folder, "extra.safetensors", |tensors, _| {
        tensors.push(("mha_full.dbias".into(), vec![1], vec![0; 4]));
    });
    let error = run(&extra).unwrap_err();
    let VerifyError::Reference(ReferenceError::Unknown { names, .. }) = error else {
        panic!("{error}");
    };
    assert_eq!(names, ["mha_full.dbias"]);

    let wrong = changed(folder, "wrong.safetensors", |tensors, _| {
        let dk = tensors.iter_mut().find(|(name, ..)| name == "gqa_full.dk");
        dk.unwrap().2[0..4].copy_from_slice(&9.0_f32.to_le_bytes());
    });
    let failed: Vec<String> = run(&wrong)
        .unwrap()
        .into_iter()
        .filter_map(|record| match record {
            Record::Comparison { tensor, pass, .. } if !pass => Some(tensor),
            _ => None,
        })
        .collect();
    // Serial, DSP on one rank, Ulysses on one to four.
    assert_eq!(failed, vec!["gqa_full.dk"; 6]);

    let absent = folder.join("absent.safetensors");
    assert!(
        run(&absent)
            .unwrap_err()
            .to_string()
            .contains("absent.safetensors")
    );
}

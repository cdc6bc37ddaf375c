//! `dsp verify` on the reference files of the repository, and on files that are wrong.

#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use common::{Refusal, linear_refusal, softmax_refusal};
use dsp_bench::devices::Devices;
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
        ranks: RANKS.to_vec(),
        engine: dsp_core::Engine::Threads,
        devices: Devices::default(),
    }
}

const RANKS: [usize; 4] = [1, 2, 3, 4];

/// Both float types, with what they are held to: files are stored in f32.
const PRECISIONS: [(Precision, f64); 2] = [(Precision::F32, 2e-5), (Precision::F64, 3e-7)];

/// Every strategy on each number of ranks that is run: serial on one.
fn runs() -> Vec<(String, usize)> {
    let mut runs = Vec::new();
    for strategy in dsp_strategies::all() {
        for ranks in RANKS {
            if strategy.name() != "serial" || ranks == 1 {
                runs.push((strategy.name().to_owned(), ranks));
            }
        }
    }
    runs
}

/// Verifies a file. In each case every run must meet all of the tensors that serial meets, or be refused where
/// `refusal` says so and for that reason.
fn assert_met(path: &Path, refusal: impl Fn(&str, &str, usize) -> Refusal) {
    for (precision, tolerance) in PRECISIONS {
        let records = verify(path, &options(precision, tolerance), &|_| {}).unwrap();
        let mut met: BTreeMap<(String, String, usize), BTreeSet<String>> = BTreeMap::new();
        let mut reasons = BTreeMap::new();
        for record in records {
            match record {
                Record::Comparison { pass: false, .. } => panic!("{record:?}"),
                Record::Sent { .. } => unreachable!("ranks are threads here"),
                Record::Comparison {
                    case,
                    tensor,
                    strategy,
                    ranks,
                    ..
                } => {
                    let run = met.entry((case, strategy, ranks)).or_default();
                    assert!(run.insert(tensor));
                }
                Record::Refusal {
                    case,
                    strategy,
                    ranks,
                    reason,
                    ..
                } => assert!(reasons.insert((case, strategy, ranks), reason).is_none()),
            }
        }
        let cases: BTreeSet<String> = met.keys().map(|(case, ..)| case.clone()).collect();
        for case in cases {
            let serial = &met[&(case.clone(), "serial".to_owned(), 1)];
            for (strategy, ranks) in runs() {
                let label = format!("{}: {case}: {strategy} × {ranks}", path.display());
                let run = (case.clone(), strategy.clone(), ranks);
                match refusal(&case, &strategy, ranks) {
                    None => assert_eq!(met.get(&run), Some(serial), "{label}"),
                    Some(words) => {
                        assert!(!met.contains_key(&run), "{label} was not refused");
                        let reason = &reasons[&run];
                        assert!(reason.contains(words), "{label}: {reason}");
                    }
                }
            }
        }
    }
}

/// Who refuses a bare softmax attention over the only axis.
fn bare_refusal(strategy: &str, query_heads: usize, ranks: usize) -> Refusal {
    match strategy {
        // On one rank nothing is sharded.
        "megatron" if ranks > 1 => Some("shards the projections"),
        _ => softmax_refusal(strategy, 1, query_heads, ranks),
    }
}

#[test]
fn every_tensor_of_every_stdit3_file_is_met_under_every_strategy_in_f32_and_f64() {
    for file in [
        "dsp-models/tests/fixtures/stdit3_block.safetensors",
        "dsp-models/tests/fixtures/stdit3_block_xmask.safetensors",
        "dsp-models/tests/fixtures/stdit3_model.safetensors",
    ] {
        assert_met(&fixture(file), |_, strategy, ranks| {
            softmax_refusal(strategy, 2, 4, ranks)
        });
    }
}

#[test]
fn attention_is_met_in_all_cases_but_those_that_a_strategy_rightly_refuses() {
    let file = fixture("dsp-core/tests/fixtures/attention.safetensors");
    assert_met(&file, |case, strategy, ranks| {
        let query_heads = match case {
            "mha_causal_len1" | "mha_causal_sharp" => 2,
            _ => 4,
        };
        bare_refusal(strategy, query_heads, ranks)
    });
}

#[test]
fn merged_blocks_linear_attention_and_whole_models_are_met_but_where_a_strategy_rightly_refuses() {
    let file = fixture("dsp-core/tests/fixtures/ring_merge.safetensors");
    assert_met(&file, |_, strategy, ranks| bare_refusal(strategy, 3, ranks));
    for file in ["linear_attention_decay", "linear_attention_fla"] {
        let file = fixture(&format!("dsp-core/tests/fixtures/{file}.safetensors"));
        assert_met(&file, |case, strategy, ranks| {
            let query_heads = match case {
                "alibi6" => 6,
                "fast" => 2,
                "zero" => 3,
                _ => 4,
            };
            match strategy {
                "megatron" if ranks > 1 => Some("shards the projections"),
                _ => linear_refusal(strategy, query_heads, ranks),
            }
        });
    }
    let model = |name: &str| fixture(&format!("dsp-models/tests/fixtures/{name}.safetensors"));
    assert_met(&model("tnl_attention"), |_, strategy, ranks| {
        linear_refusal(strategy, 4, ranks)
    });
    assert_met(&model("llama_lm"), |_, strategy, ranks| {
        softmax_refusal(strategy, 1, 8, ranks)
    });
    for name in ["vit_timm", "vit_torchvision"] {
        assert_met(&model(name), |_, strategy, ranks| {
            softmax_refusal(strategy, 1, 4, ranks)
        });
    }
}

#[test]
fn three_steps_of_training_are_pytorchs_under_every_strategy() {
    for name in ["llama_train_adamw", "llama_train_adam"] {
        let path = fixture(&format!("dsp-models/tests/fixtures/{name}.safetensors"));
        assert_met(&path, |_, strategy, ranks| {
            softmax_refusal(strategy, 1, 8, ranks)
        });
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
    // In every run that is not refused: of eight query heads.
    let runs = runs();
    let met = |(name, ranks): &&(String, usize)| bare_refusal(name, 8, *ranks).is_none();
    let count = runs.iter().filter(met).count();
    assert_eq!(failed, vec!["gqa_full.dk"; count]);

    let absent = folder.join("absent.safetensors");
    assert!(
        run(&absent)
            .unwrap_err()
            .to_string()
            .contains("absent.safetensors")
    );
}

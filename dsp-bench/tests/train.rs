//! Training: every strategy gives the serial curve, and a training that is stopped, killed or moved to another mesh
//! goes on as if nothing had happened.

#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Refusal, linear_refusal, softmax_refusal};
use dsp_bench::scenario::ModelKind;
use dsp_bench::train::{Begin, Change, Line, Outcome, RunConfig, TrainError, metrics_of, train};

/// A run of a small model: 50 steps of two samples.
fn small(kind: ModelKind, changes: &[&str]) -> RunConfig {
    let sizes: &[&str] = match kind {
        ModelKind::Video => &[
            "model.frames=3",
            "model.height=10",
            "model.width=12",
            "model.patch=[1,2,2]",
            "model.depth=1",
            "model.hidden=16",
            "model.heads=4",
            "model.mlp_ratio=2.0",
            "model.caption_channels=4",
            "model.text_tokens=3",
        ],
        ModelKind::Lm | ModelKind::LinearLm => &[
            "model.tokens=17",
            "model.depth=1",
            "model.hidden=16",
            "model.inner=24",
        ],
        ModelKind::Hybrid => &[
            "model.tokens=17",
            "model.depth=2",
            "model.hidden=16",
            "model.inner=24",
            "model.layers={hybrid={softmax_every=2}}",
        ],
        ModelKind::Vit => &[
            "model.height=12",
            "model.width=12",
            "model.depth=1",
            "model.hidden=16",
            "model.inner=24",
        ],
        ModelKind::Weather => &[
            "model.times=3",
            "model.latitudes=5",
            "model.longitudes=4",
            "model.hidden=16",
        ],
    };
    let run = [
        "training.steps=50",
        "training.batch=2",
        "training.warmup=5",
        "training.learning_rate=0.002",
        "evaluate_every=50",
        "checkpoint_every=50",
        "deadline_seconds=60.0",
    ];
    let all = sizes.iter().chain(&run).chain(changes);
    let all: Vec<Change> = all.map(|text| text.parse().unwrap()).collect();
    RunConfig::of_model(kind).unwrap().with(&all).unwrap()
}

fn run(config: &RunConfig, folder: &Path, begin: Begin) -> Result<Outcome, TrainError> {
    let engine = dsp_core::Engine::Threads;
    train(config, folder, begin, &engine, Arc::new(|_| ()))
}

/// The losses of all steps, and the held-out error after them.
fn curve(folder: &Path) -> Vec<f64> {
    let number = |line: Line| match line {
        Line::Step { loss, .. } => loss,
        Line::HeldOut { held_out, .. } => held_out,
    };
    metrics_of(folder)
        .unwrap()
        .into_iter()
        .map(number)
        .collect()
}

fn curve_of(config: &RunConfig) -> Result<Vec<f64>, TrainError> {
    let folder = tempfile::tempdir().unwrap();
    run(config, folder.path(), Begin::Fresh)?;
    Ok(curve(folder.path()))
}

fn assert_near(found: &[f64], expected: &[f64], allowed: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs() / expected.abs();
        assert!(
            error <= allowed,
            "{what}: {found} instead of {expected} at {step}: {error:e}"
        );
    }
}

/// Both float types with what a curve is held to: rounding differs by the order of sums, and grows with the steps.
const PRECISIONS: [(&str, f64); 2] = [("dtype=f64", 1e-8), ("dtype=f32", 1e-4)];

/// Every strategy gives the serial curve, on a mesh of sequence ranks and on one with replicas and smaller parts
/// too, or refuses for the reason that `refusal` says.
fn assert_serial_curve(kind: ModelKind, refusal: impl Fn(&str, usize) -> Refusal) {
    for (dtype, allowed) in PRECISIONS {
        let serial = small(kind, &[dtype, "strategy=serial", "mesh.sp=1"]);
        let expected = curve_of(&serial).unwrap();
        assert_eq!(expected.len(), 51);
        let mut names: Vec<String> = dsp_strategies::all()
            .iter()
            .map(|strategy| strategy.name().to_owned())
            .filter(|name| name != "serial")
            .collect();
        names.push("lasp2+ring".to_owned());
        // What one type covers, the other need not.
        let (ranks, others) = match dtype {
            "dtype=f64" => (3, vec![]),
            _ => (2, vec!["mesh.dp=2", "training.microbatch=1"]),
        };
        for name in names {
            let what = format!("{kind:?}, {name}, {ranks} ranks, {dtype}");
            let (strategy, sp) = (format!("strategy={name}"), format!("mesh.sp={ranks}"));
            let mut changes = vec![dtype, strategy.as_str(), sp.as_str()];
            changes.extend(&others);
            match (curve_of(&small(kind, &changes)), refusal(&name, ranks)) {
                (Ok(found), None) => assert_near(&found, &expected, allowed, &what),
                (Err(TrainError::Plan(error)), Some(reason)) => {
                    assert!(error.to_string().contains(reason), "{what}: {error}");
                }
                (found, refusal) => panic!("{what}: {found:?}, where the refusal is {refusal:?}"),
            }
        }
    }
}

#[test]
fn a_language_models_curve_is_the_serial_one_under_every_strategy() {
    assert_serial_curve(ModelKind::Lm, |strategy, ranks| match strategy {
        "lasp2+ring" => None,
        strategy => softmax_refusal(strategy, 1, 4, ranks),
    });
}

#[test]
fn a_linear_language_models_curve_is_the_serial_one_under_every_strategy() {
    assert_serial_curve(ModelKind::LinearLm, |strategy, ranks| match strategy {
        "lasp2+ring" => None,
        strategy => linear_refusal(strategy, 4, ranks),
    });
}

#[test]
fn a_hybrids_curve_is_the_serial_one_under_every_strategy() {
    assert_serial_curve(ModelKind::Hybrid, |strategy, ranks| match strategy {
        "lasp2+ring" => None,
        "ring" | "usp" | "lss" => linear_refusal(strategy, 4, ranks),
        strategy => softmax_refusal(strategy, 1, 4, ranks),
    });
}

#[test]
fn a_vision_transformers_curve_is_the_serial_one_under_every_strategy() {
    assert_serial_curve(ModelKind::Vit, |strategy, ranks| match strategy {
        "lasp2+ring" => None,
        strategy => softmax_refusal(strategy, 1, 4, ranks),
    });
}

#[test]
fn a_video_models_curve_is_the_serial_one_under_every_strategy() {
    assert_serial_curve(ModelKind::Video, |strategy, ranks| match strategy {
        "lasp2+ring" => None,
        strategy => softmax_refusal(strategy, 2, 4, ranks),
    });
}

#[test]
fn a_weather_models_curve_is_the_serial_one_under_every_strategy() {
    assert_serial_curve(ModelKind::Weather, |strategy, ranks| match strategy {
        "lasp2+ring" => None,
        strategy => softmax_refusal(strategy, 3, 4, ranks),
    });
}

/// A run in one folder whose parts are of different strategies and meshes has the curve of the one that was never
/// stopped.
fn assert_resumes(kind: ModelKind, parts: &[(&str, &str, u64)]) {
    for (dtype, allowed) in PRECISIONS {
        let of = |strategy: &str, mesh: &str, steps: u64| {
            let (sp, dp) = mesh.split_once('x').unwrap();
            let changes = [
                dtype.to_owned(),
                format!("strategy={strategy}"),
                format!("mesh.sp={sp}"),
                format!("mesh.dp={dp}"),
                format!("training.steps={steps}"),
                "evaluate_every=1000".to_owned(),
                // A checkpoint that is not at the part's end, too.
                "checkpoint_every=7".to_owned(),
                "training.schedule=constant".to_owned(),
                "training.batch=3".to_owned(),
            ];
            let changes: Vec<&str> = changes.iter().map(String::as_str).collect();
            small(kind, &changes)
        };
        let last = parts.last().unwrap().2;
        let whole = tempfile::tempdir().unwrap();
        run(&of("serial", "1x1", last), whole.path(), Begin::Fresh).unwrap();
        let expected = curve(whole.path());

        let folder = tempfile::tempdir().unwrap();
        for (part, (strategy, mesh, steps)) in parts.iter().enumerate() {
            let begin = if part == 0 {
                Begin::Fresh
            } else {
                Begin::Latest
            };
            run(&of(strategy, mesh, *steps), folder.path(), begin).unwrap();
        }
        // Each part evaluated once at its end: only the last one's counts.
        let steps = |line: &Line| matches!(line, Line::Step { .. });
        let found = metrics_of(folder.path()).unwrap();
        assert_eq!(found.iter().filter(|line| steps(line)).count() as u64, last);
        let losses = found.into_iter().filter_map(|line| match line {
            Line::Step { loss, .. } => Some(loss),
            Line::HeldOut { step, held_out } => (step == last).then_some(held_out),
        });
        let losses: Vec<f64> = losses.collect();
        assert_near(
            &losses,
            &expected,
            allowed,
            &format!("{kind:?}, {parts:?}, {dtype}"),
        );
    }
}

#[test]
fn a_video_training_goes_on_from_four_ranks_to_three_to_two_under_other_strategies() {
    let parts = [
        ("ulysses", "4x1", 12),
        ("ring", "3x1", 25),
        ("dsp", "2x1", 40),
    ];
    assert_resumes(ModelKind::Video, &parts);
}

#[test]
fn sharded_parameters_and_their_moments_are_gathered_and_split_again() {
    let parts = [
        ("ulysses", "4x1", 8),
        ("ring", "3x1", 16),
        ("megatron", "2x1", 24),
        ("megatron", "3x1", 32),
        ("lss", "1x3", 40),
        ("lss", "2x2", 44),
        ("serial", "1x1", 50),
    ];
    assert_resumes(ModelKind::Vit, &parts);
}

#[test]
fn a_hybrid_goes_on_under_other_mixtures_and_meshes() {
    let parts = [
        ("lasp2+ring", "3x1", 10),
        ("lasp+ulysses", "2x2", 20),
        ("megatron", "4x1", 30),
        ("ulysses", "1x3", 40),
    ];
    assert_resumes(ModelKind::Hybrid, &parts);
}

#[test]
fn the_same_seed_on_the_same_mesh_gives_the_same_bits() {
    let config = small(
        ModelKind::Video,
        &["strategy=dsp", "mesh.sp=2", "mesh.dp=2", "training.steps=6"],
    );
    let [first, second] = [(); 2].map(|()| {
        let folder = tempfile::tempdir().unwrap();
        run(&config, folder.path(), Begin::Fresh).unwrap();
        let checkpoint = folder.path().join("checkpoints/step-00000006");
        let sums = std::fs::read_to_string(checkpoint.join("SHA256SUMS")).unwrap();
        (curve(folder.path()), sums)
    });
    assert_eq!(first, second);
    let other = config.with(&["training.seed=2".parse().unwrap()]).unwrap();
    assert_ne!(curve_of(&other).unwrap(), first.0);
}

#[test]
fn recomputing_cheap_operations_changes_no_number() {
    for kind in [ModelKind::Video, ModelKind::Hybrid] {
        let of = |recompute| {
            let strategy = match kind {
                ModelKind::Hybrid => "strategy=lasp2+ring",
                _ => "strategy=dsp",
            };
            curve_of(&small(kind, &[strategy, "training.steps=8", recompute])).unwrap()
        };
        assert_eq!(
            of("training.recompute=nothing"),
            of("training.recompute=cheap")
        );
    }
}

#[test]
fn passes_in_bfloat16_learn_as_those_in_f32_do() {
    for (kind, strategy) in [
        (ModelKind::Lm, "strategy=ring"),
        (ModelKind::LinearLm, "strategy=lasp2"),
        (ModelKind::Video, "strategy=dsp"),
        (ModelKind::Weather, "strategy=ulysses"),
        (ModelKind::Vit, "strategy=megatron"),
    ] {
        let of = |compute| curve_of(&small(kind, &[strategy, compute])).unwrap();
        let (single, half) = (
            of("training.compute=as-stored"),
            of("training.compute=bf16"),
        );
        assert_ne!(single, half, "{kind:?}: the passes were not in bfloat16");
        // bfloat16 has 8 bits: a few steps of 2⁻⁸.
        assert_near(&half, &single, 0.03, &format!("{kind:?}"));
    }
}

#[test]
fn a_run_that_watches_names_the_rank_and_the_layer_of_the_first_number_that_is_none() {
    let blown = |watch| {
        let changes = [
            "strategy=ulysses",
            "mesh.sp=2",
            "training.warmup=0",
            "training.learning_rate=1e30",
            watch,
        ];
        let error = curve_of(&small(ModelKind::Lm, &changes)).unwrap_err();
        format!("{:#}", anyhow::Error::from(error))
    };
    let unwatched = blown("watch=nothing");
    assert!(unwatched.contains("step 2 has the loss"), "{unwatched}");
    let watched = blown("watch=finite");
    assert!(
        watched.contains("layers.0.mlp") && watched.contains("rank"),
        "{watched}"
    );
}

//! Training: every strategy gives the serial curve, and a training that is stopped, killed or moved to another mesh
//! goes on as if nothing had happened.

#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{Refusal, linear_refusal, softmax_refusal};
use dsp_bench::scenario::ModelKind;
use dsp_bench::train::{
    Begin, Change, Event, Line, Outcome, RunConfig, TrainError, metrics_of, train, write_report,
};
use dsp_models::training::{Store, digest};

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
fn under_a_schedule_that_falls_a_run_of_as_many_steps_goes_on_as_if_it_had_never_stopped() {
    let rates = |folder: &Path| -> Vec<f64> {
        let rate = |line| match line {
            Line::Step { learning_rate, .. } => Some(learning_rate),
            Line::HeldOut { .. } => None,
        };
        let lines = metrics_of(folder).unwrap().into_iter();
        lines.filter_map(rate).collect()
    };
    for (dtype, allowed) in PRECISIONS {
        let changes = [
            dtype,
            "strategy=serial",
            "mesh.sp=1",
            "training.steps=30",
            "training.schedule={cosine={floor=0.1}}",
            "checkpoint_every=7",
            "keep=9",
        ];
        let whole = small(ModelKind::Lm, &changes);
        let folder = tempfile::tempdir().unwrap();
        run(&whole, folder.path(), Begin::Fresh).unwrap();
        let (expected, falling) = (curve(folder.path()), rates(folder.path()));
        assert!(falling[29] < 0.2 * falling[10], "{falling:?}");
        let others = ["strategy=ring".parse(), "mesh.sp=2".parse()].map(Result::unwrap);
        let on_two = whole.with(&others).unwrap();
        run(&on_two, folder.path(), Begin::Step(14)).unwrap();
        assert_near(&curve(folder.path()), &expected, allowed, dtype);
        assert_eq!(rates(folder.path()), falling);
    }
}

#[test]
fn a_run_that_goes_on_from_an_earlier_step_leaves_nothing_of_the_curve_that_it_left() {
    let of = |steps: u64, rate: &str| {
        let (steps, rate) = (
            format!("training.steps={steps}"),
            format!("training.learning_rate={rate}"),
        );
        let changes = [
            "strategy=ring",
            "mesh.sp=2",
            "training.schedule=constant",
            "training.warmup=0",
            "checkpoint_every=2",
            "keep=3",
            &steps,
            &rate,
        ];
        small(ModelKind::Lm, &changes)
    };
    let steps = |folder: &Path| -> Vec<Line> {
        let mut lines = metrics_of(folder).unwrap();
        for line in &mut lines {
            if let Line::Step {
                tokens_per_second, ..
            } = line
            {
                *tokens_per_second = 0.0;
            }
        }
        lines.retain(|line| matches!(line, Line::Step { .. }));
        lines
    };
    let straight = tempfile::tempdir().unwrap();
    run(&of(2, "0.002"), straight.path(), Begin::Fresh).unwrap();
    run(&of(3, "0.01"), straight.path(), Begin::Latest).unwrap();
    run(&of(8, "0.01"), straight.path(), Begin::Latest).unwrap();

    let forked = tempfile::tempdir().unwrap();
    let checkpoints = Store::open(forked.path().join("checkpoints")).unwrap();
    run(&of(6, "0.002"), forked.path(), Begin::Fresh).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [2, 4, 6]);
    run(&of(3, "0.01"), forked.path(), Begin::Step(2)).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [2, 3]);
    run(&of(8, "0.01"), forked.path(), Begin::Latest).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [4, 6, 8]);
    assert_eq!(steps(forked.path()), steps(straight.path()));
}

#[test]
fn a_checkpoint_may_take_longer_than_ranks_wait_for_each_other() {
    let changes = [
        "strategy=ring",
        "mesh.sp=2",
        "mesh.dp=2",
        "training.steps=2",
        "training.warmup=0",
        "checkpoint_every=1",
        "deadline_seconds=2.0",
    ];
    let folder = tempfile::tempdir().unwrap();
    let slow = |event: Event<'_>| {
        if let Event::Saved(_) = event {
            std::thread::sleep(Duration::from_secs(5));
        }
    };
    let (config, engine) = (small(ModelKind::Lm, &changes), dsp_core::Engine::Threads);
    train(
        &config,
        folder.path(),
        Begin::Fresh,
        &engine,
        Arc::new(slow),
    )
    .unwrap();
}

#[test]
#[cfg(unix)]
fn a_file_is_read_once_and_its_digest_is_that_of_what_was_learnt_from() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("text");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let text = "Call me Ishmael. ".repeat(50);
    let expected = format!("SHA-256 {}", digest(text.as_bytes()));
    let into = pipe.clone();
    std::thread::spawn(move || std::fs::write(into, text));
    let mut config = small(ModelKind::Lm, &["training.steps=1", "training.warmup=0"]);
    config.set_data(&pipe).unwrap();
    let out = folder.path().join("run");
    let (end, ends) = std::sync::mpsc::channel();
    let own = out.clone();
    // Nobody writes into the pipe for a second time: who reads once more waits for ever.
    std::thread::spawn(move || end.send(run(&config, &own, Begin::Fresh)));
    let ended = ends.recv_timeout(Duration::from_secs(60));
    ended.expect("the file was read again").unwrap();
    let manifest = out.join("checkpoints/step-00000001/manifest.json");
    let manifest = std::fs::read_to_string(manifest).unwrap();
    assert!(manifest.contains(&expected), "{manifest}");
}

#[test]
fn data_that_a_picture_cannot_be_cut_from_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let refused = |config: &RunConfig, words: &str| {
        let error = run(config, &out, Begin::Fresh).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!out.exists());
    };
    let large = small(ModelKind::Vit, &["model.height=150", "model.width=150"]);
    refused(&large, "150×150 pixels are asked for");
    let clip = folder.path().join("clip.y4m");
    let mut one_frame = b"YUV4MPEG2 W16 H16 F25:1 C420\nFRAME\n".to_vec();
    one_frame.extend([128; 16 * 16 * 3 / 2]);
    std::fs::write(&clip, one_frame).unwrap();
    let mut config = small(ModelKind::Vit, &[]);
    config.set_data(&clip).unwrap();
    refused(&config, "2 frames from frame 0 on are asked for");
}

#[test]
fn data_of_which_too_little_is_held_out_are_refused_with_what_there_is_and_the_rule() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |config: &RunConfig, words: &str| {
        let error = run(config, &folder.path().join("run"), Begin::Fresh);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let clip = folder.path().join("clip.y4m");
    let mut frames = b"YUV4MPEG2 W16 H16 F25:1 C420\n".to_vec();
    for _ in 0..20 {
        frames.extend(b"FRAME\n");
        frames.extend([128; 16 * 16 * 3 / 2]);
    }
    std::fs::write(&clip, frames).unwrap();
    let mut config = small(ModelKind::Video, &["model.frames=6"]);
    config.set_data(&clip).unwrap();
    refused(
        &config,
        "the clip has 20 frames, of which a training holds out the last quarter, 5, and a sample is of 6",
    );
    refused(
        &small(ModelKind::Weather, &["model.times=13"]),
        "has 36 times, of which a training holds out the last third, 12, and a sample is of 13",
    );
    curve_of(&small(
        ModelKind::Weather,
        &["model.times=12", "training.steps=5"],
    ))
    .unwrap();
}

#[test]
fn values_that_no_run_can_have_are_refused_with_their_rule() {
    for (kind, change, words) in [
        (ModelKind::Lm, "model.tokens=1", "model.tokens = 1"),
        (ModelKind::Vit, "deadline_seconds=1e20", "deadline_seconds"),
        (ModelKind::Vit, "deadline_seconds=4e7", "at most a year"),
        (ModelKind::Vit, "deadline_seconds=1e-20", "above 0"),
        (ModelKind::Vit, "deadline_seconds=nan", "above 0"),
        (ModelKind::Vit, "deadline_seconds=-1.0", "above 0"),
        (
            ModelKind::Lm,
            "model.key_value_heads=3",
            "the command line: model.key_value_heads = 3: must divide model.heads = 4",
        ),
        (
            ModelKind::Hybrid,
            "model.layers={hybrid={softmax_every=0}}",
            "model.layers.hybrid.softmax_every = 0: must be at least 1",
        ),
        (
            ModelKind::Lm,
            "mesh.dp=0",
            "mesh.dp = 0: must be at least 1",
        ),
        (
            ModelKind::Lm,
            "mesh.sp=4611686018427387904",
            "mesh = sp=4611686018427387904,dp=1: sp times dp must be at most 4096",
        ),
        (
            ModelKind::Lm,
            "training.batch=9000000000000000",
            "training.batch = 9000000000000000: must be at least 1 and at most",
        ),
        (
            ModelKind::Video,
            "model.text_tokens=9000000000000000000",
            "model.text_tokens = 9000000000000000000: must be at least 1 and at most",
        ),
        // Also those that are not set.
        (ModelKind::Lm, "training.microbath=1", "microbatch"),
    ] {
        let run = RunConfig::of_model(kind).unwrap();
        let error = run.with(&[change.parse().unwrap()]).unwrap_err();
        assert!(error.to_string().contains(words), "{change}: {error}");
    }
}

#[test]
fn an_error_of_a_runs_file_begins_with_the_file() {
    let text = RunConfig::of_model(ModelKind::Lm).unwrap().to_toml();
    let text = text.unwrap().replace("keep = 3", "keep = 0");
    let error = RunConfig::parse("my-run.toml", &text).unwrap_err();
    assert_eq!(
        error.to_string(),
        "my-run.toml: keep = 0: must be at least 1"
    );
}

#[test]
fn data_that_are_named_by_their_key_are_found_from_anywhere_too() {
    let run = RunConfig::of_model(ModelKind::Lm).unwrap();
    let run = run.with(&["model.text=my.txt".parse().unwrap()]).unwrap();
    let whole = std::env::current_dir().unwrap().join("my.txt");
    let named = toml::Value::from(whole.to_str().unwrap());
    let written: toml::Table = toml::from_str(&run.to_toml().unwrap()).unwrap();
    assert_eq!(written["model"]["text"], named);
}

#[test]
fn a_vision_transformers_heads_may_have_an_odd_number_of_channels() {
    let of = |strategy: &str, ranks: &str| {
        let changes = ["model.hidden=12", "training.steps=5", strategy, ranks];
        curve_of(&small(ModelKind::Vit, &changes)).unwrap()
    };
    let found = of("strategy=ring", "mesh.sp=2");
    assert_near(
        &found,
        &of("strategy=serial", "mesh.sp=1"),
        1e-4,
        "odd heads",
    );
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
fn a_model_that_is_no_number_any_more_is_an_error_and_is_never_saved() {
    let ends = |changes: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let all = ["strategy=megatron", "mesh.sp=2", "training.warmup=0"];
        let config = small(ModelKind::Lm, &[&all[..], changes].concat());
        let error = run(&config, folder.path(), Begin::Fresh);
        let error = format!("{:#}", anyhow::Error::from(error.unwrap_err()));
        let store = Store::open(folder.path().join("checkpoints")).unwrap();
        assert_eq!(store.latest().unwrap(), None, "{error}");
        // Nor is anything noted that no JSON can hold.
        let lines = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
        assert!(!lines.contains("null"), "{lines}");
        error
    };
    // The step's loss is a number, and the weights that it leaves are none: the evaluation finds it,
    let blown = ["training.learning_rate=1e30", "training.weight_decay=1e30"];
    let error = ends(&[&blown[..], &["evaluate_every=1"]].concat());
    assert!(
        error.contains("after step 1 the held-out error is"),
        "{error}"
    );
    // or who would save them,
    let error = ends(&[&blown[..], &["checkpoint_every=1"]].concat());
    assert!(error.contains("step 1 leaves weights"), "{error}");
    // or the next step.
    let error = ends(&blown);
    assert!(error.contains("step 2 has the loss"), "{error}");
}

#[test]
fn a_run_that_was_ended_before_it_was_shown_is_evaluated_and_shown_and_after_that_it_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let of = |strategy: &str| {
        let steps = ["training.steps=4", "checkpoint_every=2", "evaluate_every=2"];
        let ranks = ["training.warmup=0", "mesh.sp=2", strategy];
        small(ModelKind::Lm, &[steps, ranks].concat())
    };
    let expected = run(&of("strategy=ring"), folder.path(), Begin::Fresh).unwrap();
    let lines = curve(folder.path());
    // As a library there is no page: the run was killed before it.
    let found = run(&of("strategy=ulysses"), folder.path(), Begin::Latest).unwrap();
    assert_near(&[found.error], &[expected.error], 1e-5, "held out");
    assert!(!found.shown.is_empty());
    assert_near(
        &curve(folder.path()),
        &lines,
        1e-5,
        "nothing is noted twice",
    );

    let page = write_report(folder.path(), "").unwrap();
    let error = run(&of("strategy=ring"), folder.path(), Begin::Latest).unwrap_err();
    assert!(
        matches!(error, TrainError::Done { step: 4, steps: 4 }),
        "{error}"
    );
    // One that goes on has not ended.
    let more = of("strategy=ring").with(&["training.steps=5".parse().unwrap()]);
    run(&more.unwrap(), folder.path(), Begin::Latest).unwrap();
    assert!(!page.exists());
    let error = run(&of("strategy=ring"), folder.path(), Begin::Latest).unwrap_err();
    assert!(
        matches!(error, TrainError::Done { step: 5, steps: 4 }),
        "{error}"
    );
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

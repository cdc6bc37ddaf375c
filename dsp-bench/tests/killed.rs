//! `dsp train` as a process: killed at random moments, on a disk that is full, with arguments that are wrong.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use dsp_bench::train::{Line, metrics_of};
use dsp_models::random::{Draws, Purpose};

/// A language model so small that writing checkpoints is most of what it does.
fn small(folder: &Path, begin: &str, steps: u64) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsp"));
    command.arg("train").arg(begin).arg(folder);
    if begin == "--out" {
        command.args(["--model", "lm", "--strategy", "ring", "--ranks", "2"]);
        for change in [
            "model.tokens=9",
            "model.depth=1",
            "model.hidden=16",
            "model.inner=16",
            "training.batch=1",
            "training.warmup=0",
            "training.schedule=constant",
            "training.weight_decay=0.0",
            "checkpoint_every=1",
            "evaluate_every=1000000",
            "keep=2",
        ] {
            command.args(["--set", change]);
        }
    }
    command.args(["--steps", &steps.to_string()]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn steps_in(checkpoints: &Path) -> Vec<u64> {
    let names = fs::read_dir(checkpoints).into_iter().flatten();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter_map(|name| name.strip_prefix("step-")?.parse().ok())
        .collect()
}

/// Whether a writer left a checkpoint or an old one's removal half done.
fn is_half_done(checkpoints: &Path) -> bool {
    let names = fs::read_dir(checkpoints).into_iter().flatten();
    names.into_iter().any(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.starts_with(".step-")
    })
}

/// Waits until the process has written a checkpoint of its own.
fn await_checkpoint(child: &mut Child, checkpoints: &Path) {
    let before = steps_in(checkpoints).into_iter().max().unwrap_or(0);
    let start = Instant::now();
    while steps_in(checkpoints).into_iter().max().unwrap_or(0) == before {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "it ended by itself: {ended:?}");
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "no checkpoint in a minute"
        );
        std::thread::sleep(Duration::from_micros(300));
    }
}

#[test]
fn a_training_killed_in_a_hundred_checkpoint_writes_goes_on_from_a_whole_one_each_time() {
    const WRITES: usize = 100;
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let checkpoints = run.join("checkpoints");
    let (mut in_a_write, mut kills) = (0, 0);
    while in_a_write < WRITES {
        let begin = if kills == 0 { "--out" } else { "--resume" };
        let mut child = small(&run, begin, 1_000_000).spawn().unwrap();
        await_checkpoint(&mut child, &checkpoints);
        let uniform = Draws::new(1, Purpose::Other, kills).uniforms(1)[0];
        std::thread::sleep(Duration::from_secs_f64(0.03 * uniform));
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        in_a_write += usize::from(is_half_done(&checkpoints));
        assert!(
            kills < 20 * WRITES as u64,
            "only {in_a_write} of {kills} kills met a write"
        );
        assert!(
            !steps_in(&checkpoints).is_empty(),
            "all checkpoints are lost"
        );
    }
    // Nothing was lost on the way: the curve is that of a run that was never killed.
    let last = steps_in(&checkpoints).into_iter().max().unwrap() + 2;
    assert!(small(&run, "--resume", last).status().unwrap().success());
    let whole = folder.path().join("whole");
    assert!(small(&whole, "--out", last).status().unwrap().success());
    let losses = |folder: &Path| -> Vec<(u64, f64)> {
        let losses = metrics_of(folder).unwrap().into_iter();
        losses
            .filter_map(|line| match line {
                Line::Step { step, loss, .. } => Some((step, loss)),
                Line::HeldOut { .. } => None,
            })
            .collect()
    };
    let (found, expected) = (losses(&run), losses(&whole));
    assert_eq!(expected.len() as u64, last);
    assert_eq!(
        found, expected,
        "after {kills} kills, {in_a_write} of them in a write"
    );
    assert!(
        !is_half_done(&checkpoints),
        "what the killed left is still there"
    );
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_full_disk_ends_the_run_with_a_clear_error_and_the_last_checkpoint_stays() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    assert!(small(&run, "--out", 2).status().unwrap().success());
    // No file may grow past some blocks, which a checkpoint's do: a write fails as on a full disk.
    let dsp = env!("CARGO_BIN_EXE_dsp");
    let limited = format!(
        "trap '' XFSZ; ulimit -f 8; exec '{dsp}' train --resume '{}' --steps 5",
        run.display()
    );
    let output = Command::new("bash")
        .args(["-c", &limited])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let error = said(&output);
    assert!(error.contains("cannot be written"), "{error}");
    assert!(error.contains(&run.display().to_string()), "{error}");
    assert!(steps_in(&run.join("checkpoints")).contains(&2));
    assert!(small(&run, "--resume", 5).status().unwrap().success());
}

#[test]
fn one_training_at_a_time_writes_into_a_folder_and_a_killed_one_leaves_it_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let checkpoints = run.join("checkpoints");
    let mut first = small(&run, "--out", 1_000_000).spawn().unwrap();
    await_checkpoint(&mut first, &checkpoints);
    for begin in ["--resume", "--out"] {
        let mut second = small(&run, begin, 1_000_000);
        let output = second.stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let error = said(&output);
        assert!(error.contains("another training writes here"), "{error}");
    }
    assert_eq!(first.try_wait().unwrap(), None);
    first.kill().unwrap();
    first.wait().unwrap();
    let last = steps_in(&checkpoints).into_iter().max().unwrap() + 2;
    assert!(small(&run, "--resume", last).status().unwrap().success());
}

#[test]
fn a_run_whose_data_moved_goes_on_once_it_is_told_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let [there, here] = ["there.txt", "here.txt"].map(|name| folder.path().join(name));
    fs::write(&there, "Call me Ishmael. ".repeat(50)).unwrap();
    let from = |begin: &str, data: &[&Path]| {
        let mut command = small(&run, begin, if begin == "--out" { 2 } else { 4 });
        for path in data {
            command.arg("--data").arg(path);
        }
        command.stderr(Stdio::piped()).output().unwrap()
    };
    let begun = from("--out", &[&there]);
    assert!(begun.status.success(), "{}", said(&begun));
    fs::rename(&there, &here).unwrap();
    let lost = said(&from("--resume", &[]));
    assert!(lost.contains("there.txt: cannot be read"), "{lost}");
    let found = from("--resume", &[&here]);
    assert!(found.status.success(), "{}", said(&found));
}

#[test]
fn what_cannot_be_gone_on_from_is_refused_with_what_is_wrong_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    assert!(small(&run, "--out", 3).status().unwrap().success());
    let refused = |begin: &str, folder: &Path, more: &[&str]| {
        let mut command = small(folder, begin, 9);
        let output = command.args(more).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        said(&output)
    };
    let has = |error: String, words: &[&str]| {
        for word in words {
            assert!(error.contains(word), "{error:?} lacks {word:?}");
        }
    };
    has(
        refused("--out", &run, &[]),
        &["holds a run already", "--resume"],
    );
    has(
        refused("--resume", &folder.path().join("none"), &[]),
        &["none", "cannot be read"],
    );
    has(
        refused("--resume", &run, &["--set", "model.hidden=32"]),
        &["the model is", "it is of another training"],
    );
    has(
        refused("--resume", &run, &["--seed", "9"]),
        &["the seed is 1 there and 9 here"],
    );
    has(
        refused("--resume", &run, &["--set", "training.batch=2"]),
        &["the number of samples seen"],
    );
    let other = folder.path().join("other.txt");
    fs::write(&other, "Call me Ishmael. ".repeat(50)).unwrap();
    has(
        refused("--resume", &run, &["--data", other.to_str().unwrap()]),
        &["the data is built in there and SHA-256"],
    );
    has(
        refused("--resume", &run, &["--strategy", "rong"]),
        &["rong", "ring"],
    );
    has(
        refused("--resume", &run, &["--strategy", "dsp"]),
        &["none is left to be split"],
    );
    has(
        refused("--resume", &run, &["--set", "training.learning_rat=1"]),
        &["learning_rat", "learning_rate"],
    );
    let done = small(&run, "--resume", 3)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    has(said(&done), &["step 3", "--steps"]);
    // As if it had been killed before that was written.
    let page = run.join("report.html");
    fs::remove_file(&page).unwrap();
    assert!(small(&run, "--resume", 3).status().unwrap().success());
    assert!(page.exists());

    // A bit of any file of the last checkpoint.
    let last = run.join("checkpoints/step-00000003");
    for entry in fs::read_dir(&last).unwrap() {
        let file = entry.unwrap().path();
        let good = fs::read(&file).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 16;
        fs::write(&file, &bad).unwrap();
        has(
            refused("--resume", &run, &[]),
            &["step-00000003", "[2]", "--from-step"],
        );
        fs::write(&file, &good).unwrap();
    }
    let weights = last.join("model.safetensors");
    fs::write(&weights, b"").unwrap();
    let from_two = small(&run, "--resume", 4)
        .args(["--from-step", "2"])
        .status()
        .unwrap();
    assert!(from_two.success());
}

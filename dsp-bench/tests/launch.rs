//! `dsp launch` as a process: exit codes, lines by rank, and a training that goes on after a rank was killed.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dsp_bench::train::{Line, metrics_of};

const STEPS: u64 = 120;

fn launch(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsp"));
    command.arg("launch").args(arguments);
    command
}

#[test]
fn the_first_failures_exit_code_is_the_launchers_and_lines_have_their_rank() {
    let output = launch(&["-n", "2", "--", "compare", "--scenario", "no such file"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("[0] dsp: "), "{errors}");
    assert!(
        errors.contains("[launch] rank 0 failed first, with exit code 2"),
        "{errors}"
    );
}

#[cfg(not(feature = "nccl"))]
#[test]
fn each_rank_with_a_gpu_is_a_process_of_its_own_and_says_how_to_build_it() {
    let output = launch(&["-n", "2", "--transport", "nccl", "--", "compare"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&output.stderr);
    for rank in 0..2 {
        let expected = format!("[{rank}] dsp: --transport nccl: this program was built without it");
        assert!(errors.contains(&expected), "{errors}");
    }
}

#[test]
fn what_has_no_checkpoint_is_not_started_again() {
    let arguments = [
        "-n",
        "1",
        "--restarts",
        "1",
        "--",
        "compare",
        "--scenario",
        "no such file",
    ];
    let output = launch(&arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("\"compare\" has no checkpoint"), "{errors}");
    assert!(!errors.contains("[0]"), "it was started once: {errors}");
}

/// A language model so small that a step takes a millisecond.
fn training(folder: &Path, steps: u64) -> Vec<String> {
    let mut arguments = vec!["train", "--model", "lm", "--strategy", "ring", "--out"];
    arguments.push(folder.to_str().unwrap());
    for change in [
        "model.tokens=9",
        "model.depth=1",
        "model.hidden=16",
        "model.inner=16",
        "training.batch=1",
        "training.warmup=0",
        "training.schedule=constant",
        "training.weight_decay=0.0",
        "checkpoint_every=5",
        "evaluate_every=1000000",
        "keep=2",
        "deadline_seconds=3.0",
    ] {
        arguments.extend(["--set", change]);
    }
    let mut arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
    arguments.extend(["--steps".to_owned(), steps.to_string()]);
    arguments
}

fn losses(folder: &Path) -> Vec<f64> {
    let step = |line| match line {
        Line::Step { loss, .. } => Some(loss),
        Line::HeldOut { .. } => None,
    };
    metrics_of(folder)
        .unwrap()
        .into_iter()
        .filter_map(step)
        .collect()
}

fn has_checkpoint(folder: &Path) -> bool {
    let store = dsp_models::training::Store::existing(folder.join("checkpoints"));
    store.is_ok_and(|store| store.latest().is_ok_and(|latest| latest.is_some()))
}

/// Runs a training into `folder` on `transport`, whose rank `victim` is killed once there is a checkpoint; what was said.
fn disturbed(transport: &[&str], victim: usize, folder: &Path, training: &[String]) -> String {
    let mut command = launch(transport);
    command
        .args(["--grace", "20", "--restarts", "1", "--"])
        .args(training);
    let start = Instant::now();
    let mut job = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut killed = false;
    for line in BufReader::new(job.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        let own = format!("[{victim}] is process ");
        if let (false, Some(process)) = (killed, line.strip_prefix(&own)) {
            while !has_checkpoint(folder) {
                assert!(
                    start.elapsed() < Duration::from_secs(60),
                    "no checkpoint in a minute"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            Command::new("kill").args(["-9", process]).status().unwrap();
            killed = true;
        }
        said.push_str(&line);
        said.push('\n');
    }
    assert!(job.wait().unwrap().success(), "{said}");
    assert!(killed, "{said}");
    assert!(said.contains("[launch] restart 1 of 1"), "{said}");
    assert!(start.elapsed() < Duration::from_secs(90), "{said}");
    said
}

/// The curve of a training that nothing happens to, on as many ranks.
fn undisturbed(ranks: usize, folder: &Path) -> Vec<f64> {
    let output = launch(&["-n", &ranks.to_string(), "--"])
        .args(training(folder, STEPS))
        .output();
    let output = output.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    losses(folder)
}

#[test]
fn a_training_whose_process_is_killed_goes_on_with_the_curve_it_would_have_had() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let expected = undisturbed(2, &whole);
    assert_eq!(expected.len() as u64, STEPS);
    // Begun by options, and by a file.
    let file = whole.join("config.toml");
    let by_file = ["train", "--config", file.to_str().unwrap(), "--out"].map(str::to_owned);
    let again = folder.path().join("again");
    let by_file = [&by_file[..], &[again.to_str().unwrap().to_owned()]].concat();
    for (out, training) in [(&killed, training(&killed, STEPS)), (&again, by_file)] {
        let said = disturbed(&["-n", "2"], 0, out, &training);
        assert!(
            said.contains("rank 0 failed first, with exit code 137"),
            "{said}"
        );
        assert_eq!(losses(out), expected);
    }
}

#[cfg(feature = "mpi")]
mod on_mpi {
    use burn::tensor::Device;
    use dsp_core::{CommError, Engine, Launch};

    use super::*;

    const MPI: [&str; 6] = [
        "-n",
        "3",
        "--transport",
        "mpi",
        "--mpirun",
        "--oversubscribe --allow-run-as-root",
    ];

    #[test]
    fn a_training_whose_rank_is_killed_goes_on_with_the_curve_it_would_have_had() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
        let expected = undisturbed(3, &whole);
        let said = disturbed(&MPI, 1, &killed, &training(&killed, STEPS));
        assert!(
            said.contains("rank 1 failed first, with exit code 137"),
            "{said}"
        );
        // The others say who is missing.
        for survivor in [0, 2] {
            let found = (said.lines()).any(|line| {
                line.starts_with(&format!("[{survivor}] dsp: ")) && line.contains("rank(s) [1]")
            });
            assert!(found, "{said}");
        }
        assert_eq!(losses(&killed), expected);
    }

    #[test]
    fn a_rank_that_is_killed_together_with_who_watches_it_ends_the_job() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = launch(&MPI);
        command
            .args(["--grace", "5", "--"])
            .args(training(folder.path(), 1_000_000));
        let mut job = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (start, mut said) = (Instant::now(), String::new());
        for line in BufReader::new(job.stderr.take().unwrap()).lines() {
            let line = line.unwrap();
            if let Some(process) = line.strip_prefix("[1] is process ") {
                let of = ["-o", "ppid=", "-p", process];
                let shim = Command::new("ps").args(of).output().unwrap();
                let shim = String::from_utf8(shim.stdout).unwrap();
                while !has_checkpoint(folder.path()) {
                    assert!(
                        start.elapsed() < Duration::from_secs(60),
                        "no checkpoint in a minute"
                    );
                    std::thread::sleep(Duration::from_millis(1));
                }
                let both = ["-9", shim.trim(), process];
                assert!(Command::new("kill").args(both).status().unwrap().success());
            }
            said.push_str(&line);
            said.push('\n');
        }
        assert!(!job.wait().unwrap().success(), "{said}");
        assert!(
            said.contains("failed first") || said.contains("mpirun failed"),
            "{said}"
        );
        assert!(start.elapsed() < Duration::from_secs(120), "{said}");
    }

    /// The seconds for which rank 0 of [`one_of_three`] is busy.
    const BUSY: &str = "DSP_TEST_BUSY_SECONDS";

    const DEADLINE: Duration = Duration::from_secs(4);

    #[test]
    #[ignore = "one of the processes of the test below"]
    fn one_of_three() {
        let busy: u64 = std::env::var(BUSY).unwrap().parse().unwrap();
        let engine = Engine::Mpi(dsp_core::transport::mpi::Mpi::start().unwrap());
        let launch = Launch::new(3).timeout(DEADLINE).on(&engine);
        let failed = launch.run(move |group| match group.rank() {
            0 => {
                std::thread::sleep(Duration::from_secs(busy));
                println!("rank 0 has written its checkpoint");
                dsp_core::share::share(&(), &Device::flex(), &group)
                    .map_err(|error| error.to_string())
            }
            1 => Err("no more data".to_owned()),
            _ => dsp_core::share::share(&(), &Device::flex(), &group)
                .map_err(|error| error.to_string()),
        });
        let root = failed.unwrap_err().root;
        assert!(matches!(root, CommError::Failed { rank: 1, .. }), "{root}");
    }

    #[test]
    #[ignore = "one of the processes of the test below"]
    fn one_of_three_without_rank_0() {
        let engine = Engine::Mpi(dsp_core::transport::mpi::Mpi::start().unwrap());
        let launch = Launch::new(3).timeout(2 * DEADLINE).on(&engine);
        let failed = launch.run(move |group| match group.rank() {
            0 => loop {
                std::thread::park();
            },
            _ => dsp_core::share::share(&(), &Device::flex(), &group),
        });
        let root = failed.unwrap_err().root;
        let missing = matches!(&root, CommError::Unanswered { missing, .. } if missing == &[0]);
        assert!(missing, "{root}");
        println!("rank 0 is missed");
    }

    /// Three processes of one of the tests above: whether all ended well, and what they said.
    fn three(test: &str, busy: u64) -> (bool, String) {
        let mut mpirun = Command::new("mpirun");
        mpirun.args(["-n", "3", "--oversubscribe", "--allow-run-as-root"]);
        mpirun.arg(std::env::current_exe().unwrap());
        mpirun.args(["--ignored", "--nocapture", "--exact", test]);
        let output = mpirun.env(BUSY, busy.to_string()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), said)
    }

    /// It has had its deadline when the others find out, and is not waited for once more.
    #[test]
    fn who_is_stuck_ends_the_job_within_one_deadline() {
        let start = Instant::now();
        let (all_ended, said) = three("on_mpi::one_of_three_without_rank_0", 0);
        assert!(!all_ended, "{said}");
        assert_eq!(said.matches("rank 0 is missed").count(), 2, "{said}");
        let limit = 2 * DEADLINE + Duration::from_secs(5);
        assert!(start.elapsed() < limit, "{said}");
    }

    #[test]
    fn who_is_busy_when_another_rank_fails_has_a_deadline_to_end_by_itself() {
        let run = |busy: u64| three("on_mpi::one_of_three", busy);
        let (all_ended, said) = run(2);
        assert!(said.contains("has written"), "{said}");
        assert!(all_ended, "{said}");
        // Nobody waits for ever.
        let start = Instant::now();
        let (all_ended, said) = run(60);
        assert!(!all_ended && !said.contains("has written"), "{said}");
        assert!(
            start.elapsed() < DEADLINE + Duration::from_secs(5),
            "{said}"
        );
    }

    #[test]
    fn a_mesh_of_more_ranks_than_processes_is_refused_before_the_run_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let begun = launch(&["-n", "2", "--"]).args(training(&run, 5)).output();
        assert!(begun.unwrap().status.success());
        let config = || std::fs::read_to_string(run.join("config.toml")).unwrap();
        let before = config();
        let mut mpirun = Command::new("mpirun");
        mpirun.args(["-n", "2", "--oversubscribe", "--allow-run-as-root"]);
        mpirun.arg(env!("CARGO_BIN_EXE_dsp"));
        mpirun.args([
            "--transport",
            "mpi",
            "train",
            "--ranks",
            "4",
            "--steps",
            "9",
        ]);
        let output = mpirun.arg("--resume").arg(&run).output().unwrap();
        assert!(!output.status.success());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("4 ranks on 2 processes"), "{errors}");
        assert_eq!(config(), before);
    }

    #[test]
    fn it_goes_on_with_a_rank_less_if_asked() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
        let expected = undisturbed(3, &whole);
        let fewer = [&MPI[..], &["--fewer", "1"]].concat();
        let said = disturbed(&fewer, 2, &killed, &training(&killed, STEPS));
        assert!(said.contains("restart 1 of 1 on 2 ranks"), "{said}");
        let found = losses(&killed);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            // Sums over other ranks round in another order: f32, over all steps.
            assert!(
                (found - expected).abs() < 1e-3 * expected.abs(),
                "{found} {expected}"
            );
        }
    }
}

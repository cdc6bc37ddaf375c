//! What must hold before a change lands, from cheap to dear; the first failure ends it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::architecture::{self, Package};
use crate::command::{answers, cargo, installed, run};
use crate::gpu::{self, Gpu};
use crate::mpi;

/// Where the reference files stand that `dsp verify` is run on: a folder takes all of its files.
const FIXTURES: [&str; 2] = ["dsp-models/tests/fixtures", "dsp-core/tests/fixtures"];

/// Strategies for linear attention alone, which the README's example does not have.
const LINEAR_ONLY: [&str; 2] = ["lasp", "lasp2"];

/// Runs every step, or all but the tests, and prints what each took.
pub(crate) fn ci(skip_tests: bool) -> Result<()> {
    let mut steps = Steps::default();
    steps.step("formatting", || {
        run(cargo().args(["fmt", "--all", "--check"]))
    })?;
    steps.step("spelling", || {
        optional(
            answers(Command::new("typos").arg("--version")),
            "typos",
            &mut Command::new("typos"),
        )
    })?;
    steps.step("dependencies", || {
        let check = ["deny", "check", "--hide-inclusion-graph"];
        let check = check.into_iter().chain(["bans", "licenses", "sources"]);
        optional(installed("deny"), "cargo-deny", cargo().args(check))
    })?;
    steps.step("architecture", architecture::check)?;
    steps.step("clippy", || {
        run(cargo()
            .args(["clippy", "--workspace", "--all-targets"])
            .args(mpi::features())
            .args(["--", "-D", "warnings"]))
    })?;
    // The targets are named for the same reason as in `build_dsp`: nothing is then checked twice.
    steps.step("documentation", || {
        run(cargo()
            .args([
                "doc",
                "--no-deps",
                "--workspace",
                "--lib",
                "--bins",
                "--examples",
            ])
            .env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    steps.step("what needs CUDA compiles", gpu::check)?;
    steps.step("subsets of the strategies", subsets_of_the_strategies)?;
    if skip_tests {
        println!("\nthe tests are left out (--skip-tests)");
    } else {
        steps.step("tests", || crate::test(&[]))?;
    }
    steps.step("the main job", main_job)?;
    steps.step("a GPU, in software", on_lavapipe)?;
    steps.summary();
    Ok(())
}

/// The steps that have run, with their seconds.
#[derive(Debug, Default)]
struct Steps {
    done: Vec<(&'static str, f64)>,
}

impl Steps {
    fn step(&mut self, title: &'static str, body: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n== {title}");
        let start = Instant::now();
        let result = body();
        let seconds = start.elapsed().as_secs_f64();
        result.with_context(|| format!("step `{title}` failed after {seconds:.1} s"))?;
        println!("== {title}: {seconds:.1} s");
        self.done.push((title, seconds));
        Ok(())
    }

    fn summary(&self) {
        println!("\nall {} steps passed", self.done.len());
        for (title, seconds) in &self.done {
            println!("{seconds:8.1} s  {title}");
        }
    }
}

/// Runs a tool that a machine may lack, or says that it is left out.
fn optional(installed: bool, name: &str, command: &mut Command) -> Result<()> {
    if installed {
        return run(command);
    }
    println!("skipped: {name} is not installed");
    Ok(())
}

/// dsp-strategies compiles without any strategy, with each alone and, where cargo-hack is installed, with each
/// two of them; dsp-bench with each alone.
fn subsets_of_the_strategies() -> Result<()> {
    let packages = architecture::packages()?;
    let strategies = Package::find(&packages, "dsp-strategies")?.strategies();
    if strategies.is_empty() {
        bail!("dsp-strategies has no feature that is a strategy: this step would check nothing");
    }
    if installed("hack") {
        // The backend stays as it is: another one is another Burn.
        let excluded = architecture::NOT_STRATEGIES.into_iter();
        let excluded: Vec<_> = excluded.filter(|&name| name != "flex").collect();
        let powerset = ["--feature-powerset", "--depth", "2", "--exclude-features"];
        run(cargo()
            .args(["hack", "check", "-p", "dsp-strategies"])
            .args(powerset)
            .arg(excluded.join(","))
            .args(["--features", "flex"]))?;
    } else {
        println!("cargo-hack is not installed: each strategy alone, and no two of them");
        let features = std::iter::once("flex".to_owned())
            .chain(strategies.iter().map(|name| format!("flex,{name}")));
        for features in features {
            let alone = [
                "check",
                "-p",
                "dsp-strategies",
                "--no-default-features",
                "--features",
            ];
            run(cargo().args(alone).arg(features))?;
        }
    }
    for name in &strategies {
        // dsp-strategies and the examples stand here so that cargo settles the dependencies'
        // features as for clippy, and Burn is not checked again.
        let targets = [
            "-p",
            "dsp-bench",
            "-p",
            "dsp-strategies",
            "--lib",
            "--bins",
            "--examples",
        ];
        run(cargo()
            .arg("check")
            .args(targets)
            .args(["--no-default-features", "--features"])
            .arg(format!("flex,{name}")))?;
    }
    Ok(())
}

/// `dsp` does what it is for: reference files pass, the example of the README trains under every strategy, and
/// a small head-to-head runs to its end.
fn main_job() -> Result<()> {
    let dsp = crate::build_dsp()?;
    let files = fixtures(Path::new(""))?;
    run(Command::new(&dsp).arg("verify").args(files))?;
    let quickstart = dsp.with_file_name("examples").join("quickstart");
    let packages = architecture::packages()?;
    for strategy in Package::find(&packages, "dsp-strategies")?.strategies() {
        if !LINEAR_ONLY.contains(&strategy.as_str()) {
            run(Command::new(&quickstart).arg(strategy))?;
        }
    }
    run(Command::new(&dsp).args(["compare", "--scenario", "small"]))
}

/// What computes on a GPU, on Mesa's software device where it is installed.
fn on_lavapipe() -> Result<()> {
    if gpu::lavapipe().is_some() {
        return gpu::tests(&Gpu::Lavapipe);
    }
    println!("left out: Mesa's lavapipe is not installed (Debian: mesa-vulkan-drivers libvulkan1)");
    Ok(())
}

/// The reference files of [`FIXTURES`] under `root`, in the order of their names.
fn fixtures(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for fixture in FIXTURES.map(|fixture| root.join(fixture)) {
        if !fixture.is_dir() {
            files.push(fixture);
            continue;
        }
        let entries =
            fs::read_dir(&fixture).with_context(|| format!("reading {}", fixture.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "safetensors")
            {
                files.push(path);
            }
        }
    }
    files.sort();
    match files.iter().find(|file| !file.is_file()) {
        Some(missing) => bail!("the reference file {} is missing", missing.display()),
        None => Ok(files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_fails_names_itself_and_the_cause() {
        let error = Steps::default()
            .step("clippy", || bail!("a warning"))
            .unwrap_err();
        let message = format!("{error:#}");
        assert!(
            message.starts_with("step `clippy` failed after"),
            "{message}"
        );
        assert!(message.ends_with("a warning"), "{message}");
    }

    #[test]
    fn a_reference_file_that_is_missing_is_an_error() {
        let error = fixtures(Path::new("no such folder")).unwrap_err();
        assert!(error.to_string().contains("is missing"), "{error}");
    }

    #[test]
    fn a_tool_that_is_missing_is_skipped() {
        assert!(optional(false, "typos", &mut Command::new("no such tool")).is_ok());
        assert!(optional(true, "typos", &mut Command::new("no such tool")).is_err());
    }
}

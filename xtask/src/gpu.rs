//! `cargo xtask gpu`: what computes on a GPU, on a GPU or on Mesa's software device, and a small head-to-head there.
//!
//! Whichever it is, the same tests run: they compute on the device of the backend that is compiled in, and on the
//! processor what that has no numbers for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use crate::command::{SEED, cargo, run, target_directory};
use crate::nccl;

/// Where the loader of Vulkan finds lavapipe, by Debian's and Mesa's names.
const DRIVERS: [&str; 4] = [
    "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json",
    "/usr/share/vulkan/icd.d/lvp_icd.aarch64.json",
    "/usr/share/vulkan/icd.d/lvp_icd.json",
    "/usr/local/share/vulkan/icd.d/lvp_icd.x86_64.json",
];

/// Test targets, each with the tests of it that compute on a GPU by their names; none stands for all.
const TESTS: [(&[&str], &[&str]); 5] = [
    (&["--lib"], &["attention::gpu", "transport::", "devices::"]),
    (&["--test", "collectives"], &[]),
    (&["--test", "ending"], &[]),
    (&["--test", "reference"], &["in_f32"]),
    (&["--test", "equivalence"], &["f32", "same_bits"]),
];

/// The reference files that `dsp verify` is run on: other people's attention, video, language and vision models.
const FILES: [&str; 5] = [
    "dsp-core/tests/fixtures/attention.safetensors",
    "dsp-core/tests/fixtures/linear_attention_decay.safetensors",
    "dsp-models/tests/fixtures/llama_lm.safetensors",
    "dsp-models/tests/fixtures/stdit3_block.safetensors",
    "dsp-models/tests/fixtures/vit_timm.safetensors",
];

/// What the tests run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gpu {
    /// Mesa's Vulkan device that computes on the processor: kernels are run, not only compiled.
    Lavapipe,
    /// The system's GPU, through Vulkan, Metal or DirectX.
    Wgpu,
    /// NVIDIA's, by numbers: `cuda:0`, or `cuda:0,1` for ranks on several.
    Cuda(String),
    /// The same, by a process for each rank: only what exchanges through NCCL is tested.
    Nccl(Vec<usize>),
}

impl FromStr for Gpu {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.split_once(':').unwrap_or((name, "")) {
            ("lavapipe", "") => Ok(Self::Lavapipe),
            ("wgpu", "") => Ok(Self::Wgpu),
            ("cuda", "") => Ok(Self::Cuda("0".to_owned())),
            ("cuda", numbers) => Ok(Self::Cuda(numbers.to_owned())),
            ("nccl", numbers) => {
                let numbers = numbers.split(',').map(str::parse).collect::<Result<_, _>>();
                numbers
                    .map(Self::Nccl)
                    .context("nccl: takes GPUs by number, as in nccl:0,1")
            }
            _ => Err(anyhow!(
                "there are lavapipe, wgpu, cuda:0, cuda:0,1 and nccl:0,1"
            )),
        }
    }
}

impl Gpu {
    /// As `dsp --device` calls it.
    fn device(&self) -> String {
        match self {
            Self::Lavapipe | Self::Wgpu => "wgpu".to_owned(),
            Self::Cuda(numbers) => format!("cuda:{numbers}"),
            Self::Nccl(_) => "cuda".to_owned(),
        }
    }

    /// Beside the features that are on by default. What of NCCL's transport needs no GPU is tested along.
    fn backend(&self) -> &'static str {
        match self {
            Self::Lavapipe | Self::Wgpu => "wgpu,dsp-core/nccl-engine",
            Self::Cuda(_) => "cuda",
            Self::Nccl(_) => "nccl",
        }
    }

    /// How often a property is tried at most. On a software device the strategies' take seconds each.
    fn tries(&self) -> &'static str {
        match self {
            Self::Lavapipe => "4",
            Self::Wgpu | Self::Cuda(_) | Self::Nccl(_) => "40",
        }
    }

    /// Gives a command the device: Vulkan's loader is told of no other one.
    fn seen_by<'a>(&self, command: &'a mut Command) -> Result<&'a mut Command> {
        if *self == Self::Lavapipe {
            let driver = lavapipe().context(
                "Mesa's lavapipe is not installed (Debian: mesa-vulkan-drivers libvulkan1)",
            )?;
            command.env("VK_ICD_FILENAMES", driver);
        }
        Ok(command)
    }

    /// Cargo's arguments that build for the device. One set of them for all commands, so that Burn is built once.
    fn build(&self) -> [&'static str; 6] {
        [
            "--workspace",
            "--exclude=xtask",
            "--profile",
            "gpu",
            "--features",
            self.backend(),
        ]
    }
}

/// Lavapipe's driver file, if it is installed.
pub(crate) fn lavapipe() -> Option<PathBuf> {
    let mut drivers = DRIVERS.iter().map(PathBuf::from);
    drivers.find(|driver| driver.is_file())
}

/// Runs a target's tests, the same cases each time.
fn test(gpu: &Gpu, (targets, names): (&[&str], &[&str])) -> Result<()> {
    let mut tests = cargo();
    tests.arg("test").args(gpu.build()).args(targets);
    // A test's ranks share the device with no other test's.
    tests.arg("--").args(names).args(["--test-threads", "1"]);
    let tests = gpu.seen_by(&mut tests)?;
    timed(tests.envs([("PROPTEST_CASES", gpu.tries()), ("PROPTEST_RNG_SEED", SEED)]))
}

/// Runs the tests of kernels, of collectives, of strategies and of a model's blocks.
pub(crate) fn tests(gpu: &Gpu) -> Result<()> {
    TESTS.into_iter().try_for_each(|tests| test(gpu, tests))
}

/// Runs the tests, then reference files, a small head-to-head under every strategy and some steps of a training.
pub(crate) fn gpu(gpu: &Gpu) -> Result<()> {
    if let Gpu::Nccl(numbers) = gpu {
        return nccl::test(&gpu.build(), numbers);
    }
    tests(gpu)?;
    let mut build = cargo();
    timed(build.arg("build").args(gpu.build()).args(["--bin", "dsp"]))?;
    let binary = format!("dsp{}", std::env::consts::EXE_SUFFIX);
    let dsp = target_directory()?.join("gpu").join(binary);
    let device = ["--device".to_owned(), gpu.device()];

    let mut verify = Command::new(&dsp);
    verify.arg("verify").args(&device).args(["--ranks", "1,2"]);
    timed(gpu.seen_by(verify.args(FILES.map(Path::new)))?)?;

    let results = target_directory()?.join("gpu-compare");
    std::fs::create_dir_all(&results)
        .with_context(|| format!("making the folder {}", results.display()))?;
    let mut compare = Command::new(&dsp);
    compare.arg("compare").args(&device);
    compare.args(["--scenario", "small", "--ranks", "2"]);
    for (flag, file) in [("--report", "report.html"), ("--trace", "trace.json")] {
        compare.arg(flag).arg(results.join(file));
    }
    timed(gpu.seen_by(&mut compare)?)?;

    // A training does not begin where another one lies.
    let folder = results.join("run");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)
            .with_context(|| format!("removing the folder {}", folder.display()))?;
    }
    let mut train = Command::new(&dsp);
    train.arg("train").args(&device).args(["--model", "vit"]);
    train.args(["--ranks", "2", "--steps", "3"]);
    train.args(["--set", "training.warmup=1", "--out"]);
    timed(gpu.seen_by(train.arg(&folder))?)
}

/// What needs CUDA compiles, without a warning. Nothing of it is linked: CubeCL's build fetches LLVM, hundreds of megabytes,
/// also where NVRTC compiles the kernels, unless it is told that only documentation is wanted.
pub(crate) fn check() -> Result<()> {
    let mut check = cargo();
    check.args(["clippy", "--workspace", "--exclude=xtask", "--all-targets"]);
    check.args(["--features", "nccl"]).env("DOCS_RS", "1");
    run(check.args(["--", "-D", "warnings"]))
}

fn timed(command: &mut Command) -> Result<()> {
    let start = Instant::now();
    run(command)?;
    println!("{:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        assert_eq!("lavapipe".parse::<Gpu>().unwrap(), Gpu::Lavapipe);
        assert_eq!("wgpu".parse::<Gpu>().unwrap().device(), "wgpu");
        assert_eq!("cuda".parse::<Gpu>().unwrap().device(), "cuda:0");
        assert_eq!("cuda:0,1".parse::<Gpu>().unwrap().device(), "cuda:0,1");
        assert_eq!("nccl:0,0".parse::<Gpu>().unwrap(), Gpu::Nccl(vec![0, 0]));
        assert!("nccl".parse::<Gpu>().is_err());
        assert!("llvmpipe".parse::<Gpu>().is_err());
        assert!("wgpu:1".parse::<Gpu>().is_err());
    }

    #[test]
    fn the_reference_files_are_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for file in FILES {
            assert!(root.join(file).is_file(), "{file}");
        }
    }
}

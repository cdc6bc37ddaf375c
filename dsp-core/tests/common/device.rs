//! Where a test's ranks compute, and how often a property is tried there.
//!
//! The tests are the same on every device: they run on the one of the backend that is compiled in (a GPU, or
//! Mesa's software device). f64 is what results are held to, and stays on the processor where the GPU is not NVIDIA's: few
//! others have it, and fewer have its exponential. Their 16-bit numbers differ too.

use burn::tensor::{DType, Device};
use proptest::test_runner::Config;

/// Where ranks compute in an element type: on the GPU, if a backend for one is compiled in that has the type.
pub(crate) fn device(dtype: DType) -> Device {
    match dtype {
        _ if cfg!(feature = "cuda") => Device::default(),
        DType::F32 => Device::default(),
        _ => Device::flex(),
    }
}

/// As many tries of a property, or fewer where `PROPTEST_CASES` asks for fewer: each costs more on a GPU.
pub(crate) fn tries(most: u32) -> Config {
    let config = Config::default();
    Config {
        cases: config.cases.min(most),
        ..config
    }
}

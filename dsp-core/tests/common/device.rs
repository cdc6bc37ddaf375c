//! Where a test's ranks compute, and how often a property is tried there.
//!
//! The tests are the same on every device: they run on the one of the backend that is compiled in (a GPU, or
//! Mesa's software device). f64 is what results are held to, and stays on the processor: few GPUs have it, and fewer
//! have its exponential.

use burn::tensor::{DType, Device};
use proptest::test_runner::Config;

/// Where ranks compute in an element type: on the GPU in f32, if a backend for one is compiled in.
pub(crate) fn device(dtype: DType) -> Device {
    match dtype {
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

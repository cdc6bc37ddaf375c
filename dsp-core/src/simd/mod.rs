//! What the CPU kernels are built of: the instruction set, chosen when the program runs, a matrix
//! product that keeps its result in registers, a transposition, and the exponential.
//!
//! A kernel is a [`WithSimd`] of pulp, generic over the width of a vector; [`Level::run`] compiles
//! it once for each instruction set and picks the best that the processor has.

mod ahead;
mod exp;
mod product;
mod transpose;

use pulp::{Simd, WithSimd};

pub(crate) use ahead::{Ahead, Run};
pub(crate) use exp::{exp2, exp2_row, row_max};
pub(crate) use product::{Left, Store, multiply, panel_width};
pub(crate) use transpose::{ROWS as TRANSPOSED_ROWS, transpose};

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
    /// Vectors of 4, written out: how NEON's width is tested elsewhere.
    #[cfg(test)]
    Emulated4(pulp::Scalar128b),
    /// Vectors of 16, written out: how the width of AVX-512 is tested elsewhere.
    #[cfg(test)]
    Emulated16(pulp::Scalar512b),
}

impl Level {
    /// The best one, or `None` where there is none worth a kernel of our own.
    pub(crate) fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = pulp::x86::V4::try_new().map(Self::Avx512);
            avx512.or_else(|| pulp::x86::V3::try_new().map(Self::Avx2))
        }
        #[cfg(target_arch = "aarch64")]
        {
            pulp::aarch64::Neon::try_new().map(Self::Neon)
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            None
        }
    }

    /// Runs a kernel with this instruction set.
    pub(crate) fn run<Op: WithSimd>(self, op: Op) -> Op::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => Simd::vectorize(simd, op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => Simd::vectorize(simd, op),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(simd) => Simd::vectorize(simd, op),
            #[cfg(test)]
            Self::Emulated4(simd) => Simd::vectorize(simd, op),
            #[cfg(test)]
            Self::Emulated16(simd) => Simd::vectorize(simd, op),
        }
    }

    /// Every width that a kernel is compiled for, so far as this processor can show it.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let emulated = [
            Self::Emulated4(pulp::Scalar128b),
            Self::Emulated16(pulp::Scalar512b),
        ];
        Self::detect().into_iter().chain(emulated).collect()
    }
}

//! f32 and f64 in loops that vectorise, and the instruction set chosen when the program runs.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use burn::tensor::Element;

use crate::simd::Level;

/// How many partial sums a reduction keeps: enough for the widest registers, and more exact than one.
const LANES: usize = 16;

/// An element type of the fused operations.
///
/// Products and sums are never contracted, so every instruction set gives the same bits.
pub(crate) trait Real:
    Element
    + bytemuck::Pod
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;

    /// The nearest value.
    fn of(x: f64) -> Self;

    /// The square root.
    fn root(self) -> Self;

    /// The smaller one of two numbers; `limit`, of what is no number.
    fn at_most(self, limit: Self) -> Self;

    /// `eˣ` to the last bits, without a branch or a call: `2ⁿ·eʳ` with `|r| ≤ ½·ln 2`, `eʳ` by its series. What would
    /// underflow is held at the last normal numbers; what would overflow is infinite, as `n` then fills the exponent,
    /// and from half a power of two below already.
    fn exponential(self) -> Self;

    /// `1 / (1 + e⁻ˣ)`: exactly 0 far enough below 0, so that its product with any number is.
    #[inline(always)]
    fn logistic(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exponential())
    }
}

/// Implements [`Real`]: what differs is the format's numbers.
macro_rules! real {
    ($real:ty, exponents: $limits:expr, shift: $shift:expr, bias: $bias:expr, mantissa: $mantissa:expr,
     ln_2: [$high:expr, $low:expr], series: $terms:expr) => {
        impl Real for $real {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;

            #[inline(always)]
            fn of(x: f64) -> Self {
                x as Self
            }

            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }

            #[inline(always)]
            fn at_most(self, limit: Self) -> Self {
                self.min(limit)
            }

            #[inline(always)]
            fn exponential(self) -> Self {
                let [low, high] = $limits;
                let x = self.clamp(low, high);
                // Adding 1.5·2^mantissa rounds to a whole number, which then stands in the lowest bits.
                let shifted = x * std::f64::consts::LOG2_E as Self + $shift;
                let n = shifted - $shift;
                let r = x - n * $high - n * $low;
                let mut sum = INVERSE_FACTORIALS[$terms] as Self;
                let mut term = $terms;
                while term > 0 {
                    term -= 1;
                    sum = sum * r + INVERSE_FACTORIALS[term] as Self;
                }
                sum * Self::from_bits(shifted.to_bits().wrapping_add($bias) << $mantissa)
            }
        }
    };
}

real!(f32, exponents: [-87.0, 89.0], shift: 12_582_912.0, bias: 127, mantissa: 23,
      ln_2: [0.693_359_4, -2.121_944_4e-4], series: 7);
real!(f64, exponents: [-708.0, 710.0], shift: 6_755_399_441_055_744.0, bias: 1023, mantissa: 52,
      ln_2: [6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10], series: 13);

/// `1/k!`, the coefficients of the exponential series.
const INVERSE_FACTORIALS: [f64; 14] = {
    let mut table = [1.0; 14];
    let mut k = 1;
    while k < 14 {
        table[k] = table[k - 1] / k as f64;
        k += 1;
    }
    table
};

/// Runs `work`, whose loops are compiled for each instruction set, as compiled for the best that this processor has.
///
/// Pass a closure marked `#[inline(always)]`: a function that is only called is not compiled anew.
#[inline(always)]
pub(crate) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    match Level::detect() {
        Some(level) => level.run(work),
        None => work(),
    }
}

/// `Σ term(x)`.
#[inline(always)]
pub(crate) fn sum<E: Real>(x: &[E], term: impl Fn(E) -> E) -> E {
    let mut lanes = [E::ZERO; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += term(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += term(x);
    }
    total(lanes)
}

/// `Σ term(x, y)`, of rows of one length.
#[inline(always)]
pub(crate) fn sum_of_pairs<E: Real>(x: &[E], y: &[E], term: impl Fn(E, E) -> E) -> E {
    let mut lanes = [E::ZERO; LANES];
    let ((xs, rest_of_x), (ys, rest_of_y)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (xs, ys) in xs.iter().zip(ys) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(xs.iter().zip(ys)) {
            *lane += term(x, y);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(rest_of_x.iter().zip(rest_of_y)) {
        *lane += term(x, y);
    }
    total(lanes)
}

#[inline(always)]
fn total<E: Real>(mut lanes: [E; LANES]) -> E {
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        for (low, &mut high) in low.iter_mut().zip(high) {
            *low += high;
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_exact_to_the_last_bits_of_either_format() {
        for step in -70_000..=70_000 {
            let x = f64::from(step) / 100.0;
            let error = (x.exponential() / x.exp() - 1.0).abs();
            assert!(error < 1e-15, "e^{x}: {error:e}");
        }
        for step in -8_700..=8_800 {
            let x = step as f32 / 100.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(x.exponential()) / expected - 1.0).abs();
            assert!(error < 2e-7, "e^{x}: {error:e}");
        }
    }

    #[test]
    fn the_exponential_overflows_to_infinity_never_wraps_round_and_passes_what_is_no_number() {
        for x in [709.6, 1e4, f64::INFINITY] {
            assert_eq!((x.exponential(), x.logistic()), (f64::INFINITY, 1.0));
            assert_eq!((-x).logistic(), 0.0);
            assert!((-x).exponential() > 0.0 && (-x).exponential() < 1e-300);
        }
        for x in [88.5, 1e4, f32::INFINITY] {
            assert_eq!((x.exponential(), x.logistic()), (f32::INFINITY, 1.0));
            assert_eq!((-x).logistic(), 0.0);
            assert!((-x).exponential() > 0.0 && (-x).exponential() < 1e-37);
        }
        assert!(f64::NAN.exponential().is_nan() && f32::NAN.exponential().is_nan());
    }

    #[test]
    fn sums_count_every_element_of_rows_of_any_length() {
        for length in 0..70 {
            let x: Vec<f64> = (0..length).map(f64::from).collect();
            let expected: f64 = x.iter().sum();
            assert_eq!(sum(&x, |x| x), expected);
            assert_eq!(sum_of_pairs(&x, &x, |x, y| x + y), 2.0 * expected);
        }
    }
}

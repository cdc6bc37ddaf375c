//! Eight rows written as eight lanes of a panel.
//!
//! ```text
//!   rows        a a a a a a a a …            panel      a b c d e f g h ………
//!               b b b b b b b b …     ──►    (stride)   a b c d e f g h ………
//!               …                                       …
//! ```
//!
//! Element by element that is a store each, to as many cache lines as a row is long. In registers, eight rows of eight
//! elements are 24 shuffles and eight stores.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "vectors are read and written by address")
)]

/// Rows that are transposed at once.
pub(crate) const ROWS: usize = 8;

/// `to[step·stride + lane] = rows[lane][step]` for all steps below `width`.
///
/// # Panics
/// If a row is shorter than `width`, or `to` ends before the last lane.
#[inline(always)]
pub(crate) fn transpose(rows: [&[f32]; ROWS], width: usize, to: &mut [f32], stride: usize) {
    let rows = rows.map(|row| &row[..width]);
    assert!(width == 0 || to.len() >= (width - 1) * stride + ROWS);
    #[cfg(not(target_arch = "x86_64"))]
    let whole = 0;
    #[cfg(target_arch = "x86_64")]
    let whole = match std::arch::is_x86_feature_detected!("avx") {
        true => width / ROWS * ROWS,
        false => 0,
    };
    #[cfg(target_arch = "x86_64")]
    if whole > 0 {
        // SAFETY: the processor has the instructions; the rows are as long as `width`, and `to` as the lanes of
        // that many steps.
        unsafe { avx::transpose(rows.map(<[f32]>::as_ptr), whole, to.as_mut_ptr(), stride) };
    }
    for step in whole..width {
        for (lane, row) in rows.iter().enumerate() {
            to[step * stride + lane] = row[step];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx {
    use std::arch::x86_64::{
        __m256, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use super::ROWS;

    /// # Safety
    /// `steps`, a multiple of eight, elements can be read from each row, and eight written at `to + step·stride` for each
    /// step.
    #[target_feature(enable = "avx")]
    pub(super) unsafe fn transpose(
        rows: [*const f32; ROWS],
        steps: usize,
        to: *mut f32,
        stride: usize,
    ) {
        for first in (0..steps).step_by(ROWS) {
            // SAFETY: the caller's.
            let square = rows.map(|row| unsafe { _mm256_loadu_ps(row.wrapping_add(first)) });
            for (step, lanes) in transposed(square).into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { _mm256_storeu_ps(to.wrapping_add((first + step) * stride), lanes) };
            }
        }
    }

    /// Of pairs, of fours, of eights.
    #[target_feature(enable = "avx")]
    fn transposed(rows: [__m256; ROWS]) -> [__m256; ROWS] {
        let [a, b, c, d, e, f, g, h] = rows;
        let [ab, cd, ef, gh] = [(a, b), (c, d), (e, f), (g, h)]
            .map(|(a, b)| [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)]);
        let fours = |ab: [__m256; 2], cd: [__m256; 2]| {
            [
                _mm256_shuffle_ps::<0x44>(ab[0], cd[0]),
                _mm256_shuffle_ps::<0xee>(ab[0], cd[0]),
                _mm256_shuffle_ps::<0x44>(ab[1], cd[1]),
                _mm256_shuffle_ps::<0xee>(ab[1], cd[1]),
            ]
        };
        let ([a, b, c, d], [e, f, g, h]) = (fours(ab, cd), fours(ef, gh));
        let low = |x, y| _mm256_permute2f128_ps::<0x20>(x, y);
        let high = |x, y| _mm256_permute2f128_ps::<0x31>(x, y);
        [
            low(a, e),
            low(b, f),
            low(c, g),
            low(d, h),
            high(a, e),
            high(b, f),
            high(c, g),
            high(d, h),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_a_lane_of_each_step_and_nothing_else_is_written() {
        for width in [0, 1, 7, 8, 9, 31, 64] {
            for stride in [8, 16, 21] {
                let row = |lane: usize| (0..width + 3).map(move |step| (lane * 100 + step) as f32);
                let rows: [Vec<f32>; ROWS] = std::array::from_fn(|lane| row(lane).collect());
                let mut to = vec![-1.0; width * stride + ROWS];
                transpose(rows.each_ref().map(|row| &row[..]), width, &mut to, stride);
                for (at, found) in to.into_iter().enumerate() {
                    let (step, lane) = (at / stride, at % stride);
                    let expected = match step < width && lane < ROWS {
                        true => (lane * 100 + step) as f32,
                        false => -1.0,
                    };
                    assert_eq!(
                        found, expected,
                        "step {step} of {width}, lane {lane} of {stride}"
                    );
                }
            }
        }
    }
}

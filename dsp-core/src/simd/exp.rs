//! Powers of two of whole vectors, and the two passes of a softmax over a row.

use pulp::Simd;

/// `2^x` to 1.3 units in the last place, for `x ≤ 127`; exactly 1 at 0, and exactly 0 below −127.5, −∞ included.
///
/// `x = n + r` with a whole number `n` and `|r| ≤ 1/2`: `2^r` is a polynomial (its coefficients minimise the
/// largest relative error, which is 2e−9), and `n` goes into the exponent's bits. Results below 2⁻¹²⁶, which have
/// no normal form, are 0.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5·2²³ leaves no bits for fractions: the sum's low bits are n, here with the exponent's bias.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    const POLYNOMIAL: [f32; 7] = [
        1.535_336_2e-4,
        1.339_887_4e-3,
        9.618_437e-3,
        5.550_332_5e-2,
        2.402_264_8e-1,
        6.931_472e-1,
        1.0,
    ];
    // In this order a NaN stays one, on every processor.
    let x = simd.max_f32s(simd.splat_f32s(-127.0), x);
    let shifted = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let r = simd.sub_f32s(x, simd.sub_f32s(shifted, simd.splat_f32s(ROUND)));
    let mut power = simd.splat_f32s(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        power = simd.mul_add_e_f32s(power, r, simd.splat_f32s(*coefficient));
    }
    let exponent =
        simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.mul_f32s(power, simd.transmute_f32s_u32s(exponent))
}

/// The largest number of a row of whole vectors; −∞ if it is empty.
#[inline(always)]
pub(crate) fn row_max<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, rest) = S::as_simd_f32s(row);
    debug_assert!(rest.is_empty());
    let mut largest = [simd.splat_f32s(f32::NEG_INFINITY); 4];
    let (fours, rest) = vectors.as_chunks::<4>();
    for four in fours {
        for (largest, x) in largest.iter_mut().zip(four) {
            *largest = simd.max_f32s(*largest, *x);
        }
    }
    for x in rest {
        largest[0] = simd.max_f32s(largest[0], *x);
    }
    let [a, b, c, d] = largest;
    simd.reduce_max_f32s(simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d)))
}

/// Replaces each `x` of a row of whole vectors by `2^(x − shift)`, and returns their sum.
#[inline(always)]
pub(crate) fn exp2_row<S: Simd>(simd: S, row: &mut [f32], shift: f32) -> f32 {
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    debug_assert!(rest.is_empty());
    let shift = simd.splat_f32s(shift);
    let mut sums = [simd.splat_f32s(0.0); 2];
    let (pairs, rest) = vectors.as_chunks_mut::<2>();
    for pair in pairs {
        for (x, sum) in pair.iter_mut().zip(&mut sums) {
            *x = exp2(simd, simd.sub_f32s(*x, shift));
            *sum = simd.add_f32s(*sum, *x);
        }
    }
    for x in rest {
        *x = exp2(simd, simd.sub_f32s(*x, shift));
        sums[0] = simd.add_f32s(sums[0], *x);
    }
    simd.reduce_sum_f32s(simd.add_f32s(sums[0], sums[1]))
}

#[cfg(test)]
mod tests {
    use pulp::WithSimd;

    use super::*;
    use crate::simd::Level;

    struct Powers<'a>(&'a mut [f32], f32);

    impl WithSimd for Powers<'_> {
        type Output = [f32; 2];

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> [f32; 2] {
            [row_max(simd, self.0), exp2_row(simd, self.0, self.1)]
        }
    }

    #[test]
    fn powers_of_two_are_right_to_their_last_bits_over_the_whole_range() {
        for level in Level::all() {
            let given: Vec<f32> = (0..1 << 16)
                .map(|i| 126.9 - i as f32 / 258.3)
                .filter(|&x| x >= -125.9)
                .take(60_000)
                .collect();
            let mut found = given.clone();
            level.run(Powers(&mut found, 0.0));
            for (x, found) in given.iter().zip(found) {
                let expected = f64::from(*x).exp2();
                let error = (f64::from(found) - expected).abs() / expected;
                // One unit in the last place is between 6e−8 and 1.2e−7.
                assert!(error < 1.6e-7, "2^{x} = {found}, off by {error:e}");
            }
        }
    }

    #[test]
    fn zero_gives_one_and_what_is_hidden_gives_nothing_to_the_last_bit() {
        for level in Level::all() {
            let mut row = [f32::NEG_INFINITY; 32];
            row[3] = 5.0;
            row[9] = -1e30;
            row[10] = 3.0;
            assert_eq!(level.run(Powers(&mut row, 5.0)), [5.0, 1.25]);
            let mut expected = [0.0; 32];
            (expected[3], expected[10]) = (1.0, 0.25);
            assert_eq!(row, expected);
            let mut row = [f32::NEG_INFINITY; 16];
            assert_eq!(level.run(Powers(&mut row, 0.0)), [f32::NEG_INFINITY, 0.0]);
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        // The emulated maximum forgets it, unlike every processor's.
        if let Some(level) = Level::detect() {
            let mut row = [0.0; 16];
            row[5] = f32::NAN;
            assert!(level.run(Powers(&mut row, 0.0))[1].is_nan());
            assert!(row[5].is_nan() && row[4] == 1.0);
        }
    }
}

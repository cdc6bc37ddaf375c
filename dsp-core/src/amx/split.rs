//! f32 as three bfloat16, in tiles.
//!
//! ```text
//!   of a left matrix        line ▼ [ 0│1  2│3  4│5 … ] steps ►     a row of the tile is a line
//!   of a right matrix       pair ▼ [ ┃0 ┃1 ┃2 ┃3   … ] lines ►     a row of the tile is two steps, a pair for each line
//!                                    ┃1 …
//! ```
//!
//! Numbers lie in memory line by line or step by step. The one is what a left matrix's tile is, the other, with two
//! steps interleaved, a right one's; what is neither is transposed, pairs being what moves.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{Amx, LINES, SIDE, STEPS, TILES, Tile};

/// Numbers that have no three parts: they are not finite, or would not be as bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unfit;

/// How the numbers of a matrix lie in memory: its lines are its rows if it is multiplied from the left, else its
/// columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The steps of a line after one another.
    ByLine,
    /// The lines of a step after one another.
    ByStep,
}

/// Which matrix of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
}

/// The parts of 16 pairs of numbers, high first, of each pair the first number's in the lower half.
type Parts = [__m512i; 3];

/// Above it are what is not finite and what would not be, rounded to bfloat16.
const LARGEST: u32 = 0x7f7f_7fff;

impl Amx {
    /// Packs some panels of a matrix, from its line `first_line` on, with so many tiles each, a multiple of [`TILES`],
    /// all of which are written. `slice` gives the numbers of a line, or of a step; what it has not is zero.
    ///
    /// # Panics
    /// If the last panel has not as many tiles as the others.
    #[inline]
    pub(super) fn pack<'r>(
        self,
        side: Side,
        (order, slice): (Order, impl Fn(usize) -> &'r [f32]),
        first_line: usize,
        (panels, each): (&mut [MaybeUninit<Tile>], usize),
    ) -> Result<(), Unfit> {
        assert!(each > 0 && panels.len().is_multiple_of(each));
        let (count, blocks) = (panels.len() / each, each / TILES);
        let mut largest = 0;
        for index in 0..count * blocks {
            // Along what lies side by side in memory.
            let (panel, block) = match order {
                Order::ByLine => (index / blocks, index % blocks),
                Order::ByStep => (index % count, index / count),
            };
            let tiles = &mut panels[panel * each..][..each].as_chunks_mut().0[block];
            let first = [first_line + panel * LINES, block * STEPS];
            // SAFETY: the processor has these instructions, which `self` shows.
            largest = largest.max(unsafe { pack(side, order, &slice, first, tiles) });
        }
        match largest <= LARGEST {
            true => Ok(()),
            false => Err(Unfit),
        }
    }
}

/// Packs the block from a line and a step on, and tells the bits of its largest number, without the sign.
#[target_feature(enable = "avx512f")]
fn pack<'r>(
    side: Side,
    order: Order,
    slice: &impl Fn(usize) -> &'r [f32],
    [first_line, first_step]: [usize; 2],
    tiles: &mut [MaybeUninit<Tile>; TILES],
) -> u32 {
    let mut largest = _mm512_setzero_si512();
    for row in 0..SIDE {
        let mut pairs = [[_mm512_setzero_ps(); 2]; 2];
        match order {
            Order::ByLine => {
                for (half, pair) in pairs.iter_mut().enumerate() {
                    let steps = from(slice(first_line + half * SIDE + row), first_step);
                    *pair = even_and_odd(load(steps), load(from(steps, SIDE)));
                }
            }
            Order::ByStep => {
                for odd in [0, 1] {
                    let lines = from(slice(first_step + 2 * row + odd), first_line);
                    pairs[0][odd] = load(lines);
                    pairs[1][odd] = load(from(lines, SIDE));
                }
            }
        }
        for (half, pair) in pairs.into_iter().enumerate() {
            for numbers in pair {
                let bits = _mm512_castps_si512(_mm512_abs_ps(numbers));
                largest = _mm512_max_epu32(largest, bits);
            }
            for (part, numbers) in split(pair).into_iter().enumerate() {
                let tile = tiles[2 * part + half].as_mut_ptr().cast::<__m512i>();
                // SAFETY: a tile is 16 vectors, of which this is one, and it is aligned as they are.
                unsafe { tile.add(row).write(numbers) };
            }
        }
    }
    let as_is = matches!(
        (side, order),
        (Side::Left, Order::ByLine) | (Side::Right, Order::ByStep)
    );
    if !as_is {
        for tile in tiles {
            let tile = tile.as_mut_ptr().cast::<[__m512i; SIDE]>();
            // SAFETY: a tile is 16 vectors, which have been written, and is aligned as they are.
            unsafe { tile.write(transpose(tile.read())) };
        }
    }
    _mm512_reduce_max_epu32(largest)
}

/// What comes from `start` on, if anything.
#[inline(always)]
fn from(numbers: &[f32], start: usize) -> &[f32] {
    numbers.get(start..).unwrap_or_default()
}

/// The first 16 numbers, with zeros after the last one.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(numbers: &[f32]) -> __m512 {
    if let Some(numbers) = numbers.first_chunk::<SIDE>() {
        // SAFETY: there are so many numbers.
        return unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
    }
    let mask = (1 << numbers.len()) - 1;
    // SAFETY: what the mask leaves out is not read, and there are so many numbers.
    unsafe { _mm512_maskz_loadu_ps(mask, numbers.as_ptr()) }
}

/// Of 32 numbers every second one, from the first on and from the second on.
#[target_feature(enable = "avx512f")]
#[inline]
fn even_and_odd(first: __m512, second: __m512) -> [__m512; 2] {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    [
        _mm512_permutex2var_ps(first, even, second),
        _mm512_permutex2var_ps(first, odd, second),
    ]
}

#[target_feature(enable = "avx512f")]
#[inline]
fn split([mut first, mut second]: [__m512; 2]) -> Parts {
    let mut parts = [_mm512_setzero_si512(); 3];
    // Loops rather than closures, which the library's functions would call without these instructions.
    for part in &mut parts[..2] {
        // What is left over is exact, as it has no more bits than were there.
        let rounded = [rounded(first), rounded(second)];
        first = _mm512_sub_ps(first, rounded[0]);
        second = _mm512_sub_ps(second, rounded[1]);
        *part = paired(rounded);
    }
    // It has eight bits by now.
    parts[2] = paired([first, second]);
    parts
}

/// To the nearest of those with eight bits; from the middle, away from zero.
#[target_feature(enable = "avx512f")]
#[inline]
fn rounded(numbers: __m512) -> __m512 {
    let half = _mm512_set1_epi32(0x8000);
    let kept = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let nearest = _mm512_add_epi32(_mm512_castps_si512(numbers), half);
    _mm512_castsi512_ps(_mm512_and_si512(nearest, kept))
}

/// bfloat16 are the upper halves of f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn paired([first, second]: [__m512; 2]) -> __m512i {
    let first = _mm512_srli_epi32::<16>(_mm512_castps_si512(first));
    _mm512_or_si512(_mm512_castps_si512(second), first)
}

/// Rows become columns. [`crate::simd::transpose`], eight by eight and by way of memory, takes 0.5 ns a number more.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    let zero = _mm512_setzero_si512();
    let (mut pairs, mut fours, mut eights) = ([zero; SIDE], [zero; SIDE], [zero; SIDE]);
    // Of each quarter of a vector: two rows' numbers side by side, then four rows'.
    for i in (0..SIDE).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for i in (0..SIDE).step_by(4) {
        for odd in [0, 1] {
            let (first, second) = (pairs[i + odd], pairs[i + odd + 2]);
            fours[i + 2 * odd] = _mm512_unpacklo_epi64(first, second);
            fours[i + 2 * odd + 1] = _mm512_unpackhi_epi64(first, second);
        }
    }
    // `fours[4 r + c]` has in its quarter `q` column `4 q + c` of the rows from `4 r` on: quarters move.
    for c in 0..4 {
        for r in [0, 2] {
            let (first, second) = (fours[4 * r + c], fours[4 * r + 4 + c]);
            eights[4 * r + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second);
            eights[4 * r + 4 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second);
        }
    }
    let mut columns = [zero; SIDE];
    for c in 0..4 {
        // Quarters 0 and 2 of eight rows, and quarters 1 and 3.
        for odd in [0, 1] {
            let (first, second) = (eights[4 * odd + c], eights[8 + 4 * odd + c]);
            columns[4 * odd + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second);
            columns[8 + 4 * odd + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second);
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_parts_are_the_number_each_rounded_to_the_nearest_wherever_it_lies() {
        // Packing needs no unit.
        if !is_x86_feature_detected!("avx512f") {
            return;
        }
        let number = |line: usize, step: usize| {
            // The fraction's bits in any order, and exponents from 2⁻⁶⁰ to 2⁶⁰.
            let bits = (line * STEPS + step) as u32 + 1;
            let fraction = bits.wrapping_mul(0x9e37_79b9) >> 9;
            let exponent = 127 - 60 + bits % 121;
            f32::from_bits(((bits % 2) << 31) | (exponent << 23) | fraction)
        };
        for side in [Side::Left, Side::Right] {
            for order in [Order::ByLine, Order::ByStep] {
                let of = |i: usize, j: usize| match order {
                    Order::ByLine => number(i, j),
                    Order::ByStep => number(j, i),
                };
                let rows: [[f32; STEPS]; LINES] =
                    std::array::from_fn(|i| std::array::from_fn(|j| of(i, j)));
                let mut tiles = [const { MaybeUninit::uninit() }; TILES];
                // SAFETY: the processor has these instructions, as seen above.
                let largest = unsafe { pack(side, order, &|i| &rows[i][..], [0, 0], &mut tiles) };
                assert!(largest <= LARGEST);
                // SAFETY: packing writes all of them.
                let tiles = tiles.map(|tile: MaybeUninit<Tile>| unsafe { tile.assume_init() });
                for line in 0..LINES {
                    for step in 0..STEPS {
                        let [high, middle, low] = [0, 1, 2].map(|part| {
                            let (inside, pair) = (line % SIDE, step / 2);
                            let Tile(tile) = &tiles[2 * part + line / SIDE];
                            let pair = match side {
                                Side::Left => tile[inside][pair],
                                Side::Right => tile[pair][inside],
                            };
                            f64::from(f32::from_bits((pair >> (16 * (step % 2))) << 16))
                        });
                        let number = f64::from(number(line, step));
                        assert_eq!(high + middle + low, number);
                        // Eight bits: the last one is 2⁻⁷ of the first, half of it the most that may be missing.
                        assert!((number - high).abs() <= number.abs() / 256.0);
                        let missing = (number - high - middle).abs();
                        assert!(missing <= (number - high).abs() / 256.0);
                    }
                }
            }
        }
    }
}

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

/// The parts of 32 numbers, high first: the first 16 numbers' in the lower half of each vector.
type Parts = [__m512i; 3];

impl Amx {
    /// Packs some panels of a matrix, from its line `first_line` on, with so many tiles each, a multiple of [`TILES`],
    /// all of which are written. `slice` gives the
    /// numbers of a line, or of a step; what it has not is zero.
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
        let mut unfit = 0;
        for index in 0..count * blocks {
            // Along what lies side by side in memory.
            let (panel, block) = match order {
                Order::ByLine => (index / blocks, index % blocks),
                Order::ByStep => (index % count, index / count),
            };
            let tiles = &mut panels[panel * each..][..each].as_chunks_mut().0[block];
            let first = [first_line + panel * LINES, block * STEPS];
            // SAFETY: the processor has these instructions, which `self` shows.
            unfit |= unsafe { pack(side, order, &slice, first, tiles) };
        }
        match unfit {
            0 => Ok(()),
            _ => Err(Unfit),
        }
    }
}

/// Packs the block from a line and a step on, and tells which of its numbers are unfit.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack<'r>(
    side: Side,
    order: Order,
    slice: &impl Fn(usize) -> &'r [f32],
    [first_line, first_step]: [usize; 2],
    tiles: &mut [MaybeUninit<Tile>; TILES],
) -> u32 {
    let mut unfit = 0;
    let mut write = |part: usize, half: usize, row: usize, numbers: __m512i| {
        let tile = tiles[2 * part + half].as_mut_ptr().cast::<__m512i>();
        // SAFETY: a tile is 16 vectors, of which this is one, and it is aligned as they are.
        unsafe { tile.add(row).write(numbers) };
    };
    for row in 0..SIDE {
        let pairs = match order {
            Order::ByLine => [0, SIDE].map(|line| {
                let steps = from(slice(first_line + line + row), first_step);
                [steps, from(steps, SIDE)]
            }),
            Order::ByStep => {
                let [even, odd] = [0, 1].map(|odd| {
                    let lines = slice(first_step + 2 * row + odd);
                    from(lines, first_line)
                });
                [[even, odd], [from(even, SIDE), from(odd, SIDE)]]
            }
        };
        for (half, [first, second]) in pairs.into_iter().enumerate() {
            let parts = split([load(first), load(second)]);
            unfit |= not_finite(parts[0]);
            for (part, numbers) in parts.into_iter().enumerate() {
                let numbers = match order {
                    Order::ByLine => numbers,
                    Order::ByStep => interleave(numbers),
                };
                write(part, half, row, numbers);
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
    unfit
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
    let count = numbers.len().min(SIDE);
    let mask = ((1_u32 << count) - 1) as u16;
    // SAFETY: what the mask leaves out is not read, and there are so many numbers.
    unsafe { _mm512_maskz_loadu_ps(mask, numbers.as_ptr()) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn split(numbers: [__m512; 2]) -> Parts {
    let [mut first, mut second] = numbers;
    let mut parts = [_mm512_setzero_si512(); 3];
    // Loops rather than closures, which the library's functions would call without these instructions.
    for part in &mut parts {
        // Rounded to the nearest; the rest is exact, as it has no more bits than were there.
        *part = rounded(first, second);
        first = _mm512_sub_ps(first, widened(_mm512_castsi512_si256(*part)));
        second = _mm512_sub_ps(second, widened(_mm512_extracti64x4_epi64::<1>(*part)));
    }
    parts
}

/// bfloat16 are the upper halves of f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn widened(numbers: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(numbers)))
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn rounded(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both are 64 bytes of which all values are allowed.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
}

/// Which of the bfloat16 have the exponent of what is not finite.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn not_finite(numbers: __m512i) -> u32 {
    let exponent = _mm512_set1_epi16(0x7f80);
    _mm512_cmpeq_epi16_mask(_mm512_and_si512(numbers, exponent), exponent)
}

/// The first of the lower half, the first of the upper half, the second of the lower half, …
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn interleave(halves: __m512i) -> __m512i {
    const ORDER: [u16; 2 * SIDE] = {
        let mut order = [0; 2 * SIDE];
        let mut i = 0;
        while i < 2 * SIDE {
            order[i] = (i / 2 + i % 2 * SIDE) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: the array is 64 bytes, and need not be aligned.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    _mm512_permutexvar_epi16(order, halves)
}

/// Rows become columns.
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

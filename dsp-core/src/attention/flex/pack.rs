//! Rows of one head, laid out as a product reads them, and filled up with zeros to whole vectors.

use pulp::Simd;

use crate::simd::{TRANSPOSED_ROWS as ROWS, panel_width, transpose};

/// Rows under one another, each times `factor`: `[rows, width up to whole vectors]`.
#[inline(always)]
pub(super) fn by_rows<'a, S: Simd>(
    packed: &mut Vec<f32>,
    rows: impl Iterator<Item = &'a [f32]>,
    width: usize,
    factor: f32,
) {
    weighted_rows::<S>(packed, rows.map(|row| (row, factor)), width);
}

/// Rows under one another, each times a factor of its own: `[rows, width up to whole vectors]`.
#[inline(always)]
pub(super) fn weighted_rows<'a, S: Simd>(
    packed: &mut Vec<f32>,
    rows: impl Iterator<Item = (&'a [f32], f32)>,
    width: usize,
) {
    let stride = width.next_multiple_of(S::F32_LANES);
    packed.clear();
    for (row, factor) in rows {
        packed.extend(row.iter().map(|x| x * factor));
        packed.resize(packed.len() + stride - width, 0.0);
    }
}

/// A right side whose steps are the rows: panels of columns, `[⌈width / panel⌉, rows, panel]`.
#[inline(always)]
pub(super) fn panels<'a, S: Simd>(
    packed: &mut Vec<f32>,
    rows: impl Iterator<Item = &'a [f32]>,
    count: usize,
    width: usize,
) {
    let panel = panel_width::<S>();
    packed.resize(width.div_ceil(panel) * count * panel, 0.0);
    for (step, row) in rows.enumerate() {
        let mut at = step * panel;
        let pieces = row.chunks_exact(panel);
        let rest = pieces.remainder();
        for piece in pieces {
            packed[at..at + panel].copy_from_slice(piece);
            at += count * panel;
        }
        if !rest.is_empty() {
            let (to, zeros) = packed[at..at + panel].split_at_mut(rest.len());
            to.copy_from_slice(rest);
            zeros.fill(0.0);
        }
    }
}

/// A right side whose columns are the rows: panels of rows, `[⌈rows / panel⌉, width, panel]`. Zeros fill up the last
/// vector; what comes after it in its panel is anything.
#[inline(always)]
pub(super) fn transposed_panels<'a, S: Simd>(
    packed: &mut Vec<f32>,
    mut rows: impl Iterator<Item = &'a [f32]>,
    count: usize,
    width: usize,
) {
    let panel = panel_width::<S>();
    packed.resize(count.div_ceil(panel) * width * panel, 0.0);
    let columns = count.next_multiple_of(S::F32_LANES);
    for first in (0..columns).step_by(ROWS) {
        let panel_of = &mut packed[first / panel * width * panel..][..width * panel];
        let lanes = &mut panel_of[first % panel..];
        if first + ROWS <= count {
            let eight = [(); ROWS].map(|()| rows.next().unwrap_or_default());
            transpose(eight, width, lanes, panel);
            continue;
        }
        for lane in 0..ROWS {
            let row = rows.next().unwrap_or_default();
            for (step, to) in lanes.chunks_mut(panel).take(width).enumerate() {
                to[lane] = row.get(step).copied().unwrap_or_default();
            }
        }
    }
}

//! Rows of one head, laid out as a product reads them, and filled up with zeros to whole vectors.

use pulp::Simd;

use super::rows::{Row, Rows};
use crate::simd::panel_width;

/// Rows under one another, each times `factor`: `[rows, width up to whole vectors]`.
#[inline(always)]
pub(super) fn by_rows<'a, S: Simd>(
    packed: &mut Vec<f32>,
    rows: impl Iterator<Item = &'a [f32]>,
    width: usize,
    factor: f32,
) {
    let stride = width.next_multiple_of(S::F32_LANES);
    packed.clear();
    for row in rows {
        packed.extend(row.iter().map(|x| x * factor));
        packed.resize(packed.len() + stride - width, 0.0);
    }
}

/// A right side whose steps are the rows: panels of columns, `[⌈width / panel⌉, rows, panel]`.
#[inline(always)]
pub(super) fn panels<'a, S: Simd>(
    packed: &mut Vec<f32>,
    rows: impl Iterator<Item = &'a [f32]> + Clone,
    count: usize,
    width: usize,
) {
    let panel = panel_width::<S>();
    packed.clear();
    packed.reserve(width.div_ceil(panel) * count * panel);
    for column in (0..width).step_by(panel) {
        let columns = panel.min(width - column);
        for row in rows.clone() {
            packed.extend_from_slice(&row[column..column + columns]);
            packed.resize(packed.len() + panel - columns, 0.0);
        }
    }
}

/// A right side whose columns are the rows: panels of rows, `[⌈rows / panel⌉, width, panel]`.
#[inline(always)]
pub(super) fn transposed_panels<S: Simd>(
    packed: &mut Vec<f32>,
    rows: &Rows<'_>,
    [sample, count, head]: Row,
) {
    let (panel, width) = (panel_width::<S>(), rows.width());
    let size = count.div_ceil(panel) * width * panel;
    if packed.len() != size {
        packed.clear();
        packed.resize(size, 0.0);
    }
    for (index, packed) in packed.chunks_exact_mut(width * panel).enumerate() {
        let first = index * panel;
        for lane in 0..panel {
            if first + lane < count {
                let row = rows.row([sample, first + lane, head]);
                for (x, step) in row.iter().zip(packed.chunks_exact_mut(panel)) {
                    step[lane] = *x;
                }
            } else {
                packed
                    .chunks_exact_mut(panel)
                    .for_each(|step| step[lane] = 0.0);
            }
        }
    }
}

//! Tables of sines and cosines, made on the host in f64.

use std::ops::Range;

/// Features of numbers such as timesteps: for each, `cos(v·f_i)` for all `i`, then `sin(v·f_i)`, with
/// `f_i = 10000^(−i/(dim/2))`.
///
/// # Shapes
/// - returns: `[values, dim]`, row by row
pub fn timestep_features(values: &[f64], dim: usize) -> Vec<f64> {
    let half = dim / 2;
    let frequency = |i: usize| 1e4_f64.powf(-(i as f64) / half as f64);
    let mut features = Vec::with_capacity(values.len() * dim);
    for value in values {
        features.extend((0..half).map(|i| (value * frequency(i)).cos()));
        features.extend((0..half).map(|i| (value * frequency(i)).sin()));
        features.extend(std::iter::repeat_n(0.0, dim - 2 * half));
    }
    features
}

/// The position embedding of tokens on a grid of `height · width`, for the flattened positions `tokens`
/// (row by row, the width varying fastest).
///
/// The first half of the channels holds the sines, then the cosines, of the column's coordinate, the second
/// half those of the row's. A coordinate is an index times `base_size / extent / scale`, so that a picture of
/// another resolution spans the same range.
///
/// # Shapes
/// - returns: `[tokens, channels]`, row by row; `channels` is a multiple of 4
pub fn sin_cos_2d(
    tokens: &[Range<usize>],
    [height, width]: [usize; 2],
    channels: usize,
    scale: f64,
    base_size: f64,
) -> Vec<f64> {
    let half = channels / 2;
    let frequencies: Vec<f64> = (0..half)
        .step_by(2)
        .map(|i| 1e4_f64.powf(-(i as f64) / half as f64))
        .collect();
    let mut table = Vec::new();
    for token in tokens.iter().cloned().flatten() {
        let column = (token % width) as f64 / scale * (base_size / width as f64);
        let row = (token / width) as f64 / scale * (base_size / height as f64);
        for coordinate in [column, row] {
            table.extend(frequencies.iter().map(|f| (coordinate * f).sin()));
            table.extend(frequencies.iter().map(|f| (coordinate * f).cos()));
        }
    }
    table
}

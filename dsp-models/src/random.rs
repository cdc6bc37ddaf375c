//! Random numbers that depend on nothing but their key and their index: every rank draws the same, in any order.
//!
//! Burn's own generator is one for the whole process and its numbers depend on who draws first, so ranks on
//! threads never use it. This one is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011): ten rounds of multiplications turn a counter and a key into 128 random bits.

use burn::tensor::{Device, Tensor, TensorData};
pub use dsp_core::random::philox;

/// What random numbers are for: those of different purposes have nothing to do with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The parameters of a fresh model.
    Parameters = 0,
    /// A training step's timesteps.
    Timesteps = 1,
    /// A training step's noise.
    Noise = 2,
    /// Which samples of the data are learnt from.
    Samples = 3,
    /// Anything that a caller draws for itself.
    Other = 255,
}

/// A sequence of random numbers, named by a seed, a purpose and a number such as a training step's.
#[derive(Debug, Clone)]
pub struct Draws {
    key: [u32; 2],
    stream: u64,
    next: u64,
}

impl Draws {
    /// The sequence from its beginning. Sequences do not overlap, for numbers below 2⁵⁶.
    pub fn new(seed: u64, purpose: Purpose, number: u64) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            stream: (purpose as u64) << 56 | (number & (u64::MAX >> 8)),
            next: 0,
        }
    }

    /// Two numbers uniform in (0, 1), of 53 bits.
    fn pair(&mut self) -> [f64; 2] {
        let (index, stream) = (self.next, self.stream);
        self.next += 1;
        let counter = [
            index as u32,
            (index >> 32) as u32,
            stream as u32,
            (stream >> 32) as u32,
        ];
        let [a, b, c, d] = philox(counter, self.key);
        [(a, b), (c, d)].map(|(high, low)| {
            let bits = (u64::from(high) << 21) ^ u64::from(low >> 11);
            (bits as f64 + 0.5) / (1_u64 << 53) as f64
        })
    }

    /// `count` numbers uniform in (0, 1).
    pub fn uniforms(&mut self, count: usize) -> Vec<f64> {
        self.fill(count, |pair| pair)
    }

    /// `count` numbers of the standard normal distribution (Box and Muller).
    pub fn normals(&mut self, count: usize) -> Vec<f64> {
        self.fill(count, |[u, v]| {
            let radius = (-2.0 * u.ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
            [radius * cos, radius * sin]
        })
    }

    fn fill(&mut self, count: usize, transform: impl Fn([f64; 2]) -> [f64; 2]) -> Vec<f64> {
        let mut values = Vec::with_capacity(count + 1);
        while values.len() < count {
            values.extend(transform(self.pair()));
        }
        values.truncate(count);
        values
    }

    /// A tensor of numbers uniform in `(−bound, bound)`, in the device's element type.
    pub fn uniform<const D: usize>(
        &mut self,
        shape: [usize; D],
        bound: f64,
        device: &Device,
    ) -> Tensor<D> {
        let values = self.uniforms(shape.iter().product());
        let values: Vec<f32> = (values.into_iter())
            .map(|value| ((2.0 * value - 1.0) * bound) as f32)
            .collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    /// A tensor of normal numbers with the given standard deviation, in the device's element type.
    pub fn normal<const D: usize>(
        &mut self,
        shape: [usize; D],
        deviation: f64,
        device: &Device,
    ) -> Tensor<D> {
        let values = self.normals(shape.iter().product());
        let values: Vec<f32> = (values.into_iter())
            .map(|value| (value * deviation) as f32)
            .collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1_and_sequences_differ() {
        let draws = |seed, number| Draws::new(seed, Purpose::Noise, number);
        let values = draws(7, 0).normals(100_001);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.02, "{variance}");
        assert_ne!(values[..4], draws(7, 1).normals(4));
        assert_ne!(values[..4], draws(8, 0).normals(4));
        assert_ne!(values[..4], Draws::new(7, Purpose::Other, 0).normals(4));
        assert_eq!(values[..4], draws(7, 0).normals(4));
    }
}

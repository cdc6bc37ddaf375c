//! Dropout of attention probabilities: which are dropped depends on no partition.
//!
//! ```text
//!    out_i = Σ_j  m_ij / (1 − p) · p_ij v_j          m_ij = 0 with probability p, else 1
//! ```
//!
//! Each `m_ij` is a function of a key (the run's seed, the step, the microbatch, the operation) and of *global*
//! numbers: the sample, the query head, the positions of query and key. So whoever computes a pair draws the same
//! for it, whatever the partition, the order and the blocks, and the backward pass draws again instead of keeping
//! a mask of the size of the scores.
//!
//! Sources: Srivastava et al., "Dropout", JMLR 15, 2014; of attention's probabilities, Vaswani et al.,
//! arXiv:1706.03762; a counter-based generator in the attention kernel, FlashAttention (arXiv:2205.14135, §B.4).

use std::ops::Range;

use crate::random::philox;

/// Neighbouring key positions that share one call of the generator: its four numbers.
const LANES: usize = 4;

/// What the draws of an attention belong to. All ranks of a group must give the same numbers; replicas, which train
/// on other samples, microbatches of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DropoutKey {
    /// The run's.
    pub seed: u64,
    /// The number of the optimiser's step.
    pub step: u64,
    /// The number of the microbatch within the step, over all replicas.
    pub microbatch: u32,
    /// The number of the attention within the model.
    pub operation: u32,
}

/// Dropout of an attention's probabilities, with its draws.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    probability: f64,
    /// Draws below it drop: the probability as a fraction of 2³².
    threshold: u32,
    key: [u32; 2],
}

/// Why a number is no probability of dropout.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DropoutError {
    /// It is not in [0, 1).
    #[error(
        "a dropout probability of {probability} is refused: it must be at least 0 and below 1, so that something is \
         kept"
    )]
    Probability {
        /// What was given.
        probability: f64,
    },
}

impl Dropout {
    /// Drops with probability `probability`, to a precision of 2⁻³². The draws of different keys have nothing to do
    /// with each other.
    ///
    /// # Errors
    /// [`DropoutError::Probability`] if it is not in [0, 1).
    pub fn new(probability: f64, key: DropoutKey) -> Result<Self, DropoutError> {
        if !(0.0..1.0).contains(&probability) {
            return Err(DropoutError::Probability { probability });
        }
        let DropoutKey {
            seed,
            step,
            microbatch,
            operation,
        } = key;
        // The generator itself makes one key of the four numbers.
        let [step_low, step_high] = words(step);
        let [a, b, ..] = philox([step_low, step_high, microbatch, operation], words(seed));
        Ok(Self {
            probability,
            threshold: (probability * 2f64.powi(32)) as u32,
            key: [a, b],
        })
    }

    /// The probability with which a pair is dropped.
    pub fn probability(&self) -> f64 {
        self.probability
    }

    /// What kept probabilities are multiplied with: `1/(1 − p)`, so that the mean stays.
    pub fn scale(&self) -> f64 {
        1.0 / (1.0 - self.probability)
    }

    /// Whether the pair of a query and a key is dropped. All numbers are global; each counts modulo 2³², and the
    /// key's position modulo 2³⁴.
    pub fn drops(&self, sample: usize, head: usize, query: usize, key: usize) -> bool {
        self.draw([sample, head, query], key / LANES)[key % LANES]
    }

    /// The same for one query and many keys, in their order, at the end of `dropped`.
    ///
    /// # Cost
    /// One call of the generator for four neighbouring keys.
    pub(super) fn extend(&self, dropped: &mut Vec<bool>, row: [usize; 3], keys: &[Range<usize>]) {
        for range in keys {
            let mut key = range.start;
            while key < range.end {
                let (quad, lane) = (key / LANES, key % LANES);
                let count = (LANES - lane).min(range.end - key);
                dropped.extend_from_slice(&self.draw(row, quad)[lane..lane + count]);
                key += count;
            }
        }
    }

    /// Which of four neighbouring keys are dropped of a row: a sample, a query head and a query's position.
    fn draw(&self, [sample, head, query]: [usize; 3], quad: usize) -> [bool; LANES] {
        let counter = [sample, head, query, quad].map(|number| number as u32);
        philox(counter, self.key).map(|bits| bits < self.threshold)
    }
}

fn words(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dropout(probability: f64, key: DropoutKey) -> Dropout {
        Dropout::new(probability, key).unwrap()
    }

    fn draws(dropout: &Dropout, row: [usize; 3], keys: Range<usize>) -> Vec<bool> {
        let mut dropped = vec![];
        dropout.extend(&mut dropped, row, std::slice::from_ref(&keys));
        dropped
    }

    proptest! {
        #[test]
        fn a_row_is_drawn_as_its_pairs_are(
            row in [0..9usize, 0..9usize, 0..99usize],
            keys in prop::collection::vec((0..40usize, 0..12usize), 0..4),
        ) {
            let dropout = dropout(0.4, DropoutKey::default());
            let keys: Vec<Range<usize>> = keys
                .into_iter()
                .map(|(start, len)| start..start + len)
                .collect();
            let mut found = vec![];
            dropout.extend(&mut found, row, &keys);
            let [sample, head, query] = row;
            let expected: Vec<bool> = (keys.into_iter().flatten())
                .map(|key| dropout.drops(sample, head, query, key))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn as_many_are_dropped_as_the_probability_says_and_in_each_lane() {
        const COUNT: usize = 100_000;
        for probability in [0.0, 0.1, 0.5, 0.9] {
            let key = DropoutKey {
                seed: 3,
                ..DropoutKey::default()
            };
            let dropped = draws(&dropout(probability, key), [1, 2, 3], 0..LANES * COUNT);
            for lane in 0..LANES {
                let of_lane = dropped.iter().skip(lane).step_by(LANES);
                let share = of_lane.filter(|&&dropped| dropped).count() as f64 / COUNT as f64;
                // Five standard deviations.
                let bound = 5.0 * (probability * (1.0 - probability) / COUNT as f64).sqrt();
                assert!(
                    (share - probability).abs() <= bound,
                    "{share} of {probability}"
                );
            }
        }
    }

    #[test]
    fn every_number_of_the_key_and_of_the_row_changes_the_draws() {
        let key = DropoutKey::default();
        let keys = [
            key,
            DropoutKey { seed: 1, ..key },
            DropoutKey {
                seed: 1 << 32,
                ..key
            },
            DropoutKey { step: 1, ..key },
            DropoutKey {
                step: 1 << 32,
                ..key
            },
            DropoutKey {
                microbatch: 1,
                ..key
            },
            DropoutKey {
                operation: 1,
                ..key
            },
        ];
        let mut all: Vec<Vec<bool>> = keys
            .iter()
            .map(|&key| draws(&dropout(0.5, key), [0, 0, 0], 0..128))
            .collect();
        for row in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
            all.push(draws(&dropout(0.5, key), row, 0..128));
        }
        all.push(draws(&dropout(0.5, key), [0, 0, 0], 128..256));
        for (index, draws) in all.iter().enumerate() {
            assert!(!all[..index].contains(draws), "{index}");
        }
    }

    #[test]
    fn probabilities_outside_of_0_to_1_are_refused() {
        for probability in [-0.1, 1.0, 1.5, f64::NAN, f64::INFINITY] {
            let refused = Dropout::new(probability, DropoutKey::default()).unwrap_err();
            let DropoutError::Probability { probability: given } = refused;
            assert_eq!(given.to_bits(), probability.to_bits());
        }
        // The largest below 1 still keeps something.
        assert_eq!(
            dropout(1.0 - f64::EPSILON / 2.0, DropoutKey::default()).threshold,
            u32::MAX
        );
    }
}

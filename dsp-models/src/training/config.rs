//! How a training goes: samples, steps, learning rate, decay, clipping.

use std::num::NonZeroUsize;

use burn::config::Config;
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

/// The course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Schedule {
    /// It stays.
    Constant,
    /// Half a wave of a cosine down to a part of it (Loshchilov and Hutter, arXiv:1608.03983). The step after the last one
    /// would have that part; the last one has a little more.
    Cosine {
        /// The part: 0.1 is a tenth.
        floor: f64,
    },
    /// A straight line down to a part of it, which the step after the last one would have.
    Linear {
        /// The part.
        floor: f64,
    },
}

/// Which parameters decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decayed {
    /// All of them.
    All,
    /// Those of two dims and more: biases and the scales of norms do not.
    Matrices,
}

/// What the backward pass computes once more instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Nothing.
    Nothing,
    /// Operations that cost memory traffic only, such as sums and activations. No collective is repeated, nor an
    /// attention or a matrix product.
    Cheap,
}

/// The floats that forward and backward passes are computed in. Weights, moments, sums of gradients, targets and losses
/// stay what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compute {
    /// Those of the weights.
    AsStored,
    /// bfloat16, of which each pass makes its own copy of the weights: half the memory of activations, half the
    /// bytes between ranks. It has the range of f32, so that losses need no scaling (Micikevicius et al.,
    /// arXiv:1710.03740; Kalamkar et al., arXiv:1905.12322).
    Bf16,
}

impl Compute {
    /// The type of a pass's floats, where the weights have type `stored`.
    pub fn dtype(self, stored: DType) -> DType {
        match self {
            Self::AsStored => stored,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// When the ranks sum their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduce {
    /// After the backward pass, all in one bucket.
    AtOnce,
    /// While the last backward pass of a step runs, in buckets of [`BUCKET`](Self::BUCKET) numbers and more.
    Overlapped,
}

impl Reduce {
    /// 4 MiB of f32.
    pub const BUCKET: NonZeroUsize = NonZeroUsize::new(1 << 20).unwrap();
}

/// How a model is trained.
#[derive(Config, Debug, PartialEq)]
pub struct TrainingConfig {
    /// Steps of the optimizer.
    pub steps: u64,
    /// Samples of a step, over all replicas.
    pub batch: usize,
    /// Samples that a replica computes at once; all of its share if it is not there. Gradients of the parts add up.
    pub microbatch: Option<usize>,
    /// The learning rate after the warm-up.
    pub learning_rate: f64,
    /// Steps in which the learning rate rises from 0 in a straight line.
    #[config(default = 0)]
    pub warmup: u64,
    /// Its course after that.
    #[config(default = "Schedule::Constant")]
    pub schedule: Schedule,
    /// AdamW's β₁.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// AdamW's β₂.
    #[config(default = 0.95)]
    pub beta_2: f64,
    /// AdamW's ε.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// What a parameter loses in a step, times the learning rate.
    #[config(default = 0.1)]
    pub weight_decay: f64,
    /// Which parameters do.
    #[config(default = "Decayed::Matrices")]
    pub decayed: Decayed,
    /// The largest norm of all gradients together; larger ones are scaled down to it.
    pub clip_norm: Option<f64>,
    /// What the backward pass computes once more.
    #[config(default = "Recompute::Nothing")]
    pub recompute: Recompute,
    /// The floats of the passes.
    #[config(default = "Compute::AsStored")]
    pub compute: Compute,
    /// When the gradients are summed. It changes no number.
    #[config(default = "Reduce::AtOnce")]
    pub reduce: Reduce,
    /// Of the first weights, the samples and all else that is random.
    #[config(default = 1)]
    pub seed: u64,
}

/// A number that breaks a rule.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{key} = {value}: {rule}")]
pub struct TrainingConfigError {
    /// The field.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// The rule.
    pub rule: String,
}

impl TrainingConfig {
    /// Checks every number, before any work.
    ///
    /// # Errors
    /// [`TrainingConfigError`] for the first one that breaks its rule.
    pub fn check(&self) -> Result<(), TrainingConfigError> {
        let hold = |holds: bool, key, value: &dyn std::fmt::Display, rule: &str| match holds {
            true => Ok(()),
            false => Err(TrainingConfigError {
                key,
                value: value.to_string(),
                rule: rule.to_owned(),
            }),
        };
        let at_least_one = "must be at least 1";
        hold(self.steps > 0, "steps", &self.steps, at_least_one)?;
        hold(self.batch > 0, "batch", &self.batch, at_least_one)?;
        hold(
            self.steps.checked_mul(self.batch as u64).is_some(),
            "batch",
            &self.batch,
            &format!(
                "times steps = {} must be below 2^64, for samples are numbered",
                self.steps
            ),
        )?;
        let part = self.microbatch.unwrap_or(1);
        hold(part > 0, "microbatch", &part, at_least_one)?;
        hold(
            self.warmup <= self.steps,
            "warmup",
            &self.warmup,
            &format!("must be at most steps = {}", self.steps),
        )?;
        // AdamW computes with f32: there too the rule must hold, where small numbers are 0 and large ones infinite.
        let number = |holds: fn(f64) -> bool, key, value: f64, rule: &str| {
            let single = f64::from(value as f32);
            let rule = match holds(value) {
                true => format!("{rule}; as an f32, in which it is computed with, it is {single}"),
                false => rule.to_owned(),
            };
            hold(holds(value) && holds(single), key, &value, &rule)
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        for (key, value) in [
            ("learning_rate", self.learning_rate),
            ("epsilon", self.epsilon),
            ("clip_norm", self.clip_norm.unwrap_or(1.0)),
        ] {
            number(positive, key, value, "must be above 0 and finite")?;
        }
        let below_one = |value: f64| (0.0..1.0).contains(&value);
        for (key, value) in [("beta_1", self.beta_1), ("beta_2", self.beta_2)] {
            number(below_one, key, value, "must be at least 0 and below 1")?;
        }
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        let decay = self.weight_decay;
        let rule = "must be at least 0 and finite";
        number(not_negative, "weight_decay", decay, rule)?;
        if let Schedule::Cosine { floor } | Schedule::Linear { floor } = self.schedule {
            let rule = "must be at least 0 and at most 1";
            hold((0.0..=1.0).contains(&floor), "schedule.floor", &floor, rule)?;
        }
        Ok(())
    }

    /// The learning rate of a step, counted from 0.
    pub fn learning_rate_of(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.learning_rate * (step + 1) as f64 / self.warmup as f64;
        }
        let (done, all) = (step - self.warmup, self.steps.saturating_sub(self.warmup));
        let done = (done as f64 / all.max(1) as f64).min(1.0);
        let part = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Cosine { floor } => {
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
            Schedule::Linear { floor } => 1.0 - (1.0 - floor) * done,
        };
        self.learning_rate * part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_and_falls_as_the_schedule_says() {
        let config = TrainingConfig::new(104, 1, 2.0).with_warmup(4);
        let rates = |schedule, steps: [u64; 4]| {
            let config = config.clone().with_schedule(schedule);
            steps.map(|step| config.learning_rate_of(step))
        };
        assert_eq!(
            rates(Schedule::Constant, [0, 1, 3, 104]),
            [0.5, 1.0, 2.0, 2.0]
        );
        let linear = rates(Schedule::Linear { floor: 0.1 }, [3, 4, 54, 104]);
        for (found, expected) in linear.into_iter().zip([2.0, 2.0, 1.1, 0.2]) {
            assert!((found - expected).abs() < 1e-12, "{linear:?}");
        }
        let cosine = rates(Schedule::Cosine { floor: 0.0 }, [4, 29, 54, 104]);
        for (found, expected) in cosine
            .into_iter()
            .zip([2.0, 1.0 + 0.5_f64.sqrt(), 1.0, 0.0])
        {
            assert!((found - expected).abs() < 1e-12, "{cosine:?}");
        }
    }

    #[test]
    fn a_number_that_breaks_a_rule_is_named_with_its_value() {
        let good = TrainingConfig::new(10, 2, 1e-3);
        assert_eq!(good.check(), Ok(()));
        let bad = [
            (TrainingConfig::new(0, 2, 1e-3), "steps = 0"),
            (TrainingConfig::new(10, 0, 1e-3), "batch = 0"),
            (good.clone().with_microbatch(Some(0)), "microbatch = 0"),
            (good.clone().with_warmup(11), "warmup = 11"),
            (TrainingConfig::new(10, 2, f64::NAN), "learning_rate = NaN"),
            (good.clone().with_clip_norm(Some(-1.0)), "clip_norm = -1"),
            (good.clone().with_beta_2(1.0), "beta_2 = 1"),
            (good.clone().with_weight_decay(-0.1), "weight_decay = -0.1"),
            (
                TrainingConfig::new(u64::MAX, 2, 1e-3),
                "batch = 2: times steps = 18446744073709551615 must be",
            ),
            // As an f32 it is 1, and the variance is divided by 1 - 1.
            (
                good.clone().with_beta_2(0.99999999),
                "beta_2 = 0.99999999: must be at least 0 and below 1; as an f32, in which it is computed with, it is 1",
            ),
            (good.clone().with_beta_1(0.99999999), "beta_1 = 0.99999999"),
            (good.clone().with_epsilon(1e-50), "epsilon = "),
            (good.clone().with_epsilon(1e300), "epsilon = "),
            (good.clone().with_weight_decay(1e39), "weight_decay = "),
            (TrainingConfig::new(10, 2, 1e39), "learning_rate = "),
            (good.clone().with_clip_norm(Some(1e-50)), "clip_norm = "),
            (
                good.clone().with_schedule(Schedule::Cosine { floor: 2.0 }),
                "schedule.floor = 2",
            ),
        ];
        for (config, begins) in bad {
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with(begins), "{error}");
        }
    }
}

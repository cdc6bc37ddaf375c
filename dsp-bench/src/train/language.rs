//! A language model learns the next byte of a text.
//!
//! The last tenth of the text is held out. The errors to beat are those of byte statistics: how much each byte
//! surprises who knows how often it follows the one before it.

use burn::tensor::{Device, Tensor};
use dsp_core::strategy::Part;
use dsp_core::{Loss, Mask, ModelShape, Session};
use dsp_models::language::{CausalLm, LanguageConfig, Tokens, next_token_loss, roles};
use dsp_models::random::{Draws, Purpose};

use super::data::Data;
use super::task::{Baseline, Measure, Place, Samples, Shown, Stage, Task};
use crate::subject::{LanguageSizes, SubjectError};
use crate::text::{BUILT_IN_NAME, Text, TextError, VOCABULARY};

/// Bytes that are generated to show what was learnt.
const GENERATED: usize = 400;
/// Bytes of the held-out text that they go on from.
const PROMPT: usize = 64;
/// How even the choice of a byte is: 1 is as the model says, 0 the most likely one.
const TEMPERATURE: f64 = 0.7;

/// A language model on a text.
#[derive(Debug)]
pub(super) struct NextByte {
    config: LanguageConfig,
    tokens: usize,
    learnt: Vec<u8>,
    held_out: Vec<u8>,
}

impl NextByte {
    pub(super) fn new(sizes: &LanguageSizes, data: Option<Data>) -> Result<Self, SubjectError> {
        let (name, bytes) = match data {
            Some(data) => (data.file, data.bytes),
            None => (BUILT_IN_NAME.to_owned(), Text::built_in().bytes().to_vec()),
        };
        let (learnt, held_out) = bytes.split_at(bytes.len() - bytes.len() / 10);
        for part in [learnt, held_out] {
            if part.len() < sizes.tokens {
                return Err(TextError::Short {
                    name: format!("{name}, its last tenth held out"),
                    bytes: part.len(),
                    length: sizes.tokens,
                }
                .into());
            }
        }
        Ok(Self {
            config: sizes.config(),
            tokens: sizes.tokens,
            learnt: learnt.to_vec(),
            held_out: held_out.to_vec(),
        })
    }

    fn rows(&self, samples: &Samples) -> Result<Tokens, SubjectError> {
        let row = |text: &[u8], start: usize| {
            let bytes = &text[start..start + self.tokens];
            bytes.iter().map(|&byte| u32::from(byte)).collect()
        };
        let rows = match samples {
            Samples::Drawn { seed, numbers } => {
                let places = self.learnt.len() - self.tokens + 1;
                let place = |number| {
                    let uniform = Draws::new(*seed, Purpose::Samples, number).uniforms(1)[0];
                    (uniform * places as f64) as usize
                };
                let rows = numbers
                    .clone()
                    .map(|number| row(&self.learnt, place(number)));
                rows.collect()
            }
            Samples::HeldOut(numbers) => {
                let rows = numbers
                    .clone()
                    .map(|number| row(&self.held_out, number * self.tokens));
                rows.collect()
            }
        };
        Ok(Tokens::new(rows)?)
    }

    /// The pairs of a byte and the one before it whose surprise is measured: in each held-out sample all but the
    /// first byte.
    fn pairs(&self) -> impl Iterator<Item = (u8, u8)> + '_ {
        let samples = self.held_out.chunks_exact(self.tokens);
        samples.flat_map(|sample| sample.windows(2).map(|pair| (pair[0], pair[1])))
    }
}

/// How often bytes follow each other in a text.
struct Pairs {
    counts: Vec<f64>,
}

impl Pairs {
    fn of(pairs: impl Iterator<Item = (u8, u8)>) -> Self {
        let mut counts = vec![0.0; VOCABULARY * VOCABULARY];
        for (first, second) in pairs {
            counts[usize::from(first) * VOCABULARY + usize::from(second)] += 1.0;
        }
        Self { counts }
    }

    /// The mean surprise in bits, where a pair that was seen seldom leans on how often its second byte was seen,
    /// as if it had been seen `trust` times.
    fn surprise(&self, pairs: impl Iterator<Item = (u8, u8)>, trust: f64) -> f64 {
        let mut seconds = vec![1.0; VOCABULARY];
        let mut firsts = vec![0.0; VOCABULARY];
        for (pair, count) in self.counts.iter().enumerate() {
            firsts[pair / VOCABULARY] += count;
            seconds[pair % VOCABULARY] += count;
        }
        let all: f64 = seconds.iter().sum();
        let (mut sum, mut count) = (0.0, 0.0);
        for (first, second) in pairs {
            let (first, second) = (usize::from(first), usize::from(second));
            let seen = self.counts[first * VOCABULARY + second];
            let likely = (seen + trust * seconds[second] / all) / (firsts[first] + trust);
            sum -= likely.log2();
            count += 1.0;
        }
        sum / count
    }
}

impl Task for NextByte {
    type Module = CausalLm;

    fn template(&self, seed: u64) -> Result<CausalLm, SubjectError> {
        Ok(self.config.init(seed, &Device::flex())?)
    }

    fn shape(&self, samples: usize) -> ModelShape {
        self.config.shape(samples, self.tokens, &Mask::Causal)
    }

    fn role(&self, path: &str) -> Part {
        roles(&self.config)(path)
    }

    fn tokens(&self) -> usize {
        self.tokens
    }

    fn held_out(&self) -> usize {
        self.held_out.len() / self.tokens
    }

    fn measure(&self) -> Measure {
        Measure {
            unit: "bits a byte",
            factor: std::f64::consts::LOG2_E,
        }
    }

    fn baselines(&self) -> Result<Vec<Baseline>, SubjectError> {
        let learnt = self.learnt.windows(2).map(|pair| (pair[0], pair[1]));
        let learnt = Pairs::of(learnt);
        // The trust that serves the held-out text best: the model is to beat the best of them.
        let trusts = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0];
        let surprises = trusts.map(|trust| learnt.surprise(self.pairs(), trust));
        let own = Pairs::of(self.pairs());
        Ok(vec![
            Baseline {
                name: "pairs of bytes, counted in the text that is learnt from",
                error: surprises.into_iter().fold(f64::INFINITY, f64::min),
            },
            Baseline {
                name: "pairs of bytes, counted in the held-out text itself (its bigram entropy)",
                error: own.surprise(self.pairs(), 0.0),
            },
        ])
    }

    fn loss(
        &self,
        module: &CausalLm,
        samples: &Samples,
        _place: &Place,
        session: &Session,
    ) -> Result<Loss, SubjectError> {
        let tokens = self.rows(samples)?;
        let logits = module.forward(&tokens, session)?;
        Ok(Loss::OfShard(next_token_loss(&logits, &tokens)?))
    }

    fn show(&self, module: &CausalLm, stage: &Stage<'_>) -> Result<Vec<Shown>, SubjectError> {
        // At least one byte to go on with.
        let prompt = PROMPT.min(self.tokens - 1);
        let mut text: Vec<u8> = self.held_out[..prompt].to_vec();
        let draws = Draws::new(stage.seed, Purpose::Other, 0).uniforms(GENERATED);
        for uniform in draws {
            // The last bytes, and nothing behind them: causal attention does not see what stands there.
            let begin = text.len().saturating_sub(self.tokens - 1);
            let context = &text[begin..];
            let mut row = vec![0; self.tokens];
            for (token, &byte) in row.iter_mut().zip(context) {
                *token = u32::from(byte);
            }
            let logits = module.forward(&Tokens::new(vec![row])?, stage.session)?;
            let logits: Tensor<5> = stage.session.gather(logits)?;
            let row = logits.narrow(1, context.len() - 1, 1).into_data();
            text.push(draw(&row.iter::<f64>().collect::<Vec<f64>>(), uniform));
        }
        let (prompt, generated) = text.split_at(prompt);
        Ok(vec![Shown::Text(format!(
            "{}▌{}",
            String::from_utf8_lossy(prompt),
            String::from_utf8_lossy(generated)
        ))])
    }
}

/// The byte at which the summed probabilities pass `uniform`.
fn draw(logits: &[f64], uniform: f64) -> u8 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = (logits.iter())
        .map(|logit| ((logit - largest) / TEMPERATURE).exp())
        .collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    let chosen = weights.iter().position(|weight| {
        left -= weight;
        left <= 0.0
    });
    chosen.unwrap_or(0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_that_always_follow_each_other_surprise_nobody_and_even_ones_by_their_number_of_bits() {
        let pairs = |text: &'static [u8]| text.windows(2).map(|pair| (pair[0], pair[1]));
        let known = Pairs::of(pairs(b"abababab"));
        assert!(known.surprise(pairs(b"ababa"), 0.0).abs() < 1e-12);
        // After an `a` comes each of four bytes as often.
        let even = Pairs::of(pairs(b"abacadaeabacadaea"));
        let after_a = pairs(b"abacadae").filter(|pair| pair.0 == b'a');
        assert!((even.surprise(after_a, 0.0) - 2.0).abs() < 1e-12);
        // What was never seen is possible, and surprising.
        let unseen = known.surprise([(b'a', b'z')].into_iter(), 1.0);
        assert!(unseen.is_finite() && unseen > 8.0, "{unseen}");
    }

    #[test]
    fn a_byte_is_drawn_as_often_as_its_logit_says() {
        let logits = [0.0, TEMPERATURE * 3.0_f64.ln()];
        let drawn = (0..1000).map(|i| draw(&logits, (f64::from(i) + 0.5) / 1000.0));
        assert_eq!(drawn.filter(|&byte| byte == 1).count(), 750);
    }
}

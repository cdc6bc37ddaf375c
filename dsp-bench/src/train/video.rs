//! A video model learns a clip by rectified flow.
//!
//! A sample is some frames of the clip that follow each other, with a noise and a time of its own. The last quarter
//! of the frames is held out. The error to beat is that of a velocity of zero.
//!
//! There is no text encoder here: the clip's caption is a fixed random one. One sample in ten goes without, so that
//! sampling can be guided by the difference (Ho and Salimans, arXiv:2207.12598).

use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::precision::computed_in;
use dsp_core::strategy::Part;
use dsp_core::{Loss, ModelShape, Session};
use dsp_models::flow::{self, Batch, Guided, Noised, TIMESTEPS};
use dsp_models::random::{Draws, Purpose};
use dsp_models::video_dit::{Init, Text, VideoDit, VideoDitConfig, roles};

use super::data::Data;
use super::picture;
use super::task::{Baseline, Measure, Place, Samples, Shown, Stage, Task};
use crate::clip::{Clip, ClipError};
use crate::subject::{SubjectError, VideoSizes};

/// One sample in so many goes without its caption.
const WITHOUT_CAPTION: f64 = 0.1;
/// Held-out samples of each place in the clip: times spread evenly, each with its own noise.
const TIMES: usize = 8;
/// Steps from noise to a video.
const STEPS: usize = 20;
/// How far the caption leads away from none.
const GUIDANCE: f64 = 2.0;
/// The purpose [`Purpose::Other`]'s numbers.
const CAPTION: u64 = 0;
const FIRST_NOISE: u64 = 1;

/// A video model on a clip.
#[derive(Debug)]
pub(super) struct Velocity {
    config: VideoDitConfig,
    clip: Clip,
    frames: usize,
    first_held_out: usize,
    text_tokens: usize,
}

/// A sample's place, time, and whether it has its caption.
#[derive(Debug, Clone, Copy)]
struct Drawn {
    start: usize,
    time: f64,
    captioned: bool,
    /// Names the noise.
    noise: u64,
}

impl Velocity {
    pub(super) fn new(sizes: &VideoSizes, data: Option<Data>) -> Result<Self, SubjectError> {
        let clip = Data::clip(data)?;
        let clip = clip.sample(0, clip.frames, sizes.height, sizes.width)?;
        let held_out = clip.frames / 4;
        // Then there are enough to learn from too.
        if held_out < sizes.frames {
            return Err(ClipError::NoneHeldOut {
                wanted: sizes.frames,
                held_out,
                available: clip.frames,
            }
            .into());
        }
        Ok(Self {
            config: sizes.config(),
            frames: sizes.frames,
            first_held_out: clip.frames - held_out,
            text_tokens: sizes.text_tokens,
            clip,
        })
    }

    fn drawn(&self, samples: &Samples) -> Vec<Drawn> {
        match samples {
            Samples::Drawn { seed, numbers } => {
                let places = self.first_held_out - self.frames + 1;
                let draw = |number| {
                    let drawn = Draws::new(*seed, Purpose::Samples, number).uniforms(3);
                    Drawn {
                        start: (drawn[0] * places as f64) as usize,
                        time: drawn[1],
                        captioned: drawn[2] >= WITHOUT_CAPTION,
                        noise: number,
                    }
                };
                numbers.clone().map(draw).collect()
            }
            Samples::HeldOut(numbers) => {
                let draw = |number: usize| Drawn {
                    start: self.first_held_out + number / TIMES * self.frames,
                    time: (number % TIMES) as f64 / TIMES as f64 + 0.5 / TIMES as f64,
                    captioned: true,
                    noise: number as u64,
                };
                numbers.clone().map(draw).collect()
            }
        }
    }

    /// The noise of a sample. That of held-out ones is the same whatever the seed.
    fn noise(&self, seed: u64, number: u64) -> Vec<f64> {
        let count = 3 * self.frames * self.clip.height * self.clip.width;
        Draws::new(seed, Purpose::Noise, number).normals(count)
    }

    fn seed(samples: &Samples) -> u64 {
        match samples {
            Samples::Drawn { seed, .. } => *seed,
            Samples::HeldOut(_) => 0,
        }
    }

    fn pixels(&self, start: usize) -> impl Iterator<Item = f32> + '_ {
        let frame = self.clip.height * self.clip.width;
        (0..3).flat_map(move |channel| {
            let first = (channel * self.clip.frames + start) * frame;
            self.clip.rgb[first..first + self.frames * frame]
                .iter()
                .copied()
        })
    }

    fn size(&self, samples: usize) -> [usize; 5] {
        [samples, 3, self.frames, self.clip.height, self.clip.width]
    }

    /// A caption for each sample: the clip's, or the one that stands for none.
    fn text(&self, module: &VideoDit, captioned: &[bool], place: &Place) -> Text {
        let shape = [1, self.text_tokens, self.config.caption_channels];
        let values = Draws::new(0, Purpose::Other, CAPTION).normals(shape.iter().product());
        let device = place.device.clone().without_autodiff();
        let caption: Tensor<3> =
            Tensor::from_data(TensorData::new(values, shape), (&device, place.dtype));
        // It is stored with the parameters, and not trained.
        let none: Tensor<3> = module.y_embedder.no_text().inner().unsqueeze();
        let rows = captioned.iter().map(|captioned| match captioned {
            true => caption.clone(),
            false => none.clone(),
        });
        Text::full(Tensor::cat(rows.collect(), 0))
    }

    fn resolution(&self) -> [f64; 2] {
        [self.clip.height as f64, self.clip.width as f64]
    }
}

impl Task for Velocity {
    type Module = VideoDit;

    fn template(&self, seed: u64) -> Result<VideoDit, SubjectError> {
        Ok(self.config.init(Init::AsPublished, seed, &Device::flex())?)
    }

    fn shape(&self, samples: usize) -> ModelShape {
        let [_, _, frames, height, width] = self.size(samples);
        self.config.shape(samples, frames, height, width)
    }

    fn role(&self, path: &str) -> Part {
        roles(&self.config.block())(path)
    }

    fn tokens(&self) -> usize {
        let [_, _, frames, height, width] = self.size(1);
        self.config.grid([frames, height, width]).iter().product()
    }

    fn held_out(&self) -> usize {
        (self.clip.frames - self.first_held_out) / self.frames * TIMES
    }

    fn measure(&self) -> Measure {
        Measure {
            unit: "squared error of the velocity",
            factor: 1.0,
        }
    }

    fn baselines(&self) -> Result<Vec<Baseline>, SubjectError> {
        let samples = self.drawn(&Samples::HeldOut(0..self.held_out()));
        let mut sum = 0.0;
        for drawn in &samples {
            let noise = self.noise(0, drawn.noise);
            let squares = (self.pixels(drawn.start).zip(noise))
                .map(|(pixel, noise)| (f64::from(pixel) - noise).powi(2));
            sum += squares.sum::<f64>();
        }
        let count: usize = self.size(samples.len()).iter().product();
        Ok(vec![Baseline {
            name: "a velocity of zero",
            error: sum / count as f64,
        }])
    }

    fn loss(
        &self,
        module: &VideoDit,
        samples: &Samples,
        place: &Place,
        session: &Session,
    ) -> Result<Loss, SubjectError> {
        let drawn = self.drawn(samples);
        let size = self.size(drawn.len());
        let device = place.device.clone().without_autodiff();
        // Not in what passes are computed in: what is to be said is not rounded, what is seen is, once.
        let exact = (&device, computed_in(place.dtype));
        let tensor = |values: TensorData| Tensor::from_data(values, exact);
        let pixels: Vec<f32> = (drawn.iter())
            .flat_map(|drawn| self.pixels(drawn.start))
            .collect();
        let seed = Self::seed(samples);
        let noise: Vec<f64> = (drawn.iter())
            .flat_map(|drawn| self.noise(seed, drawn.noise))
            .collect();
        let captioned: Vec<bool> = drawn.iter().map(|drawn| drawn.captioned).collect();
        let batch = Batch {
            video: tensor(TensorData::new(pixels, size)),
            fps: vec![self.clip.fps; drawn.len()],
            resolution: self.resolution(),
            text: self.text(module, &captioned, place),
            frame_mask: None,
        };
        let noised = Noised {
            timesteps: drawn.iter().map(|drawn| drawn.time * TIMESTEPS).collect(),
            noise: tensor(TensorData::new(noise, size)),
        };
        Ok(Loss::OfShard(flow::loss(module, &batch, &noised, session)?))
    }

    fn show(&self, module: &VideoDit, stage: &Stage<'_>) -> Result<Vec<Shown>, SubjectError> {
        let noise = Draws::new(stage.seed, Purpose::Other, FIRST_NOISE);
        let size = self.size(1);
        let noise = noise.clone().normals(size.iter().product());
        let place = &stage.place;
        let guided = Guided {
            captioned: self.text(module, &[true], place),
            without: self.text(module, &[false], place),
            scale: GUIDANCE,
            fps: self.clip.fps,
            resolution: self.resolution(),
        };
        let noise = Tensor::from_data(TensorData::new(noise, size), (&place.device, place.dtype));
        let video = flow::sample(module, noise, &guided, STEPS, stage.session)?;
        if !stage.writes() {
            return Ok(vec![]);
        }
        let rgb: Vec<f64> = video.into_data().iter::<f64>().collect();
        let [_, _, frames, height, width] = size;
        let path = stage.folder.join("frames.png");
        let path = picture::frames(&path, &rgb, [frames, height, width])?;
        let words = format!("{frames} frames from noise in {STEPS} steps, guided by {GUIDANCE}");
        Ok(vec![Shown::File(path, words)])
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;
    use dsp_models::weights::cast;

    use super::*;
    use crate::scenario::{ModelKind, ModelSizes};
    use crate::train::RunConfig;
    use crate::train::task::tests::assert_first_baseline;

    #[test]
    fn a_velocity_of_zero_has_the_error_that_is_to_be_beaten_in_passes_of_bfloat16_too() {
        let run = RunConfig::of_model(ModelKind::Video).unwrap();
        let small = [
            "model.frames=4",
            "model.height=16",
            "model.width=16",
            "model.depth=1",
            "model.hidden=16",
            "model.heads=4",
        ];
        let run = run.with(&small.map(|change| change.parse().unwrap()));
        let ModelSizes::Video(sizes) = run.unwrap().model else {
            panic!("the model is a video model");
        };
        let task = Velocity::new(&sizes, None).unwrap();
        let mut module = cast(task.template(1).unwrap(), DType::BF16);
        let last = &mut module.final_layer.linear;
        last.weight = last.weight.clone().map(|weight| weight.zeros_like());
        last.bias = (last.bias.take()).map(|bias| bias.map(|bias| bias.zeros_like()));
        assert_first_baseline(&task, &module);
    }
}

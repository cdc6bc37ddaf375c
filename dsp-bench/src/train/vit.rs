//! A vision transformer learns which way up a picture is (Gidaris et al., arXiv:1803.07728).
//!
//! A sample is a square of a frame of a clip, turned by 0, 90, 180 or 270 degrees: the four classes. The last fifth
//! of the frames is held out, each of them with squares all over it in all four turns, so that who always says the
//! same is wrong three times in four.

use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::strategy::Part;
use dsp_core::{Loss, ModelShape, Session};
use dsp_models::random::{Draws, Purpose};
use dsp_models::vit::{Vit, VitConfig, class_loss, gather_logits, roles};

use super::data::Data;
use super::task::{Baseline, Measure, Place, Samples, Shown, Stage, Task};
use crate::clip::{Clip, ClipError};
use crate::subject::{SubjectError, VitSizes};

/// Ways that a picture can be turned.
pub(crate) const TURNS: usize = 4;
/// Held-out squares along a frame's width, and along its height.
const SQUARES: [usize; 2] = [4, 2];

/// A vision transformer on turned pictures.
#[derive(Debug)]
pub(super) struct WhichWayUp {
    config: VitConfig,
    /// The side of a picture.
    side: usize,
    /// Frames somewhat larger than a picture.
    clip: Clip,
    /// The first frame that is held out.
    first_held_out: usize,
}

/// A square of a frame, turned.
#[derive(Debug, Clone, Copy)]
struct Picture {
    frame: usize,
    top: usize,
    left: usize,
    turns: usize,
}

impl WhichWayUp {
    pub(super) fn new(sizes: &VitSizes, data: Option<Data>) -> Result<Self, SubjectError> {
        let clip = Data::clip(data)?;
        let side = sizes.height;
        if side > clip.height.min(clip.width) {
            return Err(ClipError::TooSmall {
                wanted_height: side,
                wanted_width: side,
                height: clip.height,
                width: clip.width,
            }
            .into());
        }
        // One to learn from, and one that is held out.
        if clip.frames < 2 {
            return Err(ClipError::TooFewFrames {
                wanted: 2,
                start: 0,
                available: clip.frames,
            }
            .into());
        }
        // Half as high again as a picture, so that there is something to choose, as wide as the clip is.
        let height = (side + side / 2).min(clip.height);
        let width = clip.width * height / clip.height;
        let clip = clip.sample(0, clip.frames, height, width.max(side))?;
        Ok(Self {
            config: sizes.config(),
            side,
            first_held_out: clip.frames - (clip.frames / 5).max(1),
            clip,
        })
    }

    fn pictures(&self, samples: &Samples) -> Vec<Picture> {
        let [rows, columns] = [self.clip.height, self.clip.width].map(|side| side - self.side);
        match samples {
            Samples::Drawn { seed, numbers } => {
                let picture = |number| {
                    let drawn = Draws::new(*seed, Purpose::Samples, number).uniforms(4);
                    let choose = |of: usize, ways: usize| (drawn[of] * ways as f64) as usize;
                    Picture {
                        frame: choose(0, self.first_held_out),
                        top: choose(1, rows + 1),
                        left: choose(2, columns + 1),
                        turns: choose(3, TURNS),
                    }
                };
                numbers.clone().map(picture).collect()
            }
            Samples::HeldOut(numbers) => {
                let [across, down] = SQUARES;
                let picture = |number: usize| {
                    let (turns, place) = (number % TURNS, number / TURNS);
                    let (frame, place) = (place / (across * down), place % (across * down));
                    Picture {
                        frame: self.first_held_out + frame,
                        top: (place / across) * rows / (down - 1),
                        left: (place % across) * columns / (across - 1),
                        turns,
                    }
                };
                numbers.clone().map(picture).collect()
            }
        }
    }

    /// `[B, 3, side, side]`.
    fn images(&self, pictures: &[Picture], place: &Place) -> Tensor<4> {
        let (clip, side) = (&self.clip, self.side);
        let mut values = Vec::with_capacity(pictures.len() * 3 * side * side);
        for picture in pictures {
            for channel in 0..3 {
                let frame = (channel * clip.frames + picture.frame) * clip.height;
                for y in 0..side {
                    for x in 0..side {
                        let [y, x] = turned([y, x], side, picture.turns);
                        let row = (frame + picture.top + y) * clip.width;
                        values.push(clip.rgb[row + picture.left + x]);
                    }
                }
            }
        }
        let shape = [pictures.len(), 3, side, side];
        let device = place.device.clone().without_autodiff();
        Tensor::from_data(TensorData::new(values, shape), (&device, place.dtype))
    }
}

/// Where the pixel that a turn puts at a place comes from.
fn turned([y, x]: [usize; 2], side: usize, turns: usize) -> [usize; 2] {
    (0..turns).fold([y, x], |[y, x], _| [x, side - 1 - y])
}

/// Whether the logit of `class` is above all others: not if one is its equal, nor if one is no number.
fn is_right(logits: &[f64], class: usize) -> bool {
    let own = logits[class];
    (logits.iter().enumerate()).all(|(other, &logit)| other == class || own > logit)
}

impl Task for WhichWayUp {
    type Module = Vit;

    fn template(&self, seed: u64) -> Result<Vit, SubjectError> {
        Ok(self.config.init(seed, &Device::flex())?)
    }

    fn shape(&self, samples: usize) -> ModelShape {
        self.config.shape(samples)
    }

    fn role(&self, path: &str) -> Part {
        roles(&self.config)(path)
    }

    fn tokens(&self) -> usize {
        self.config.tokens()
    }

    fn held_out(&self) -> usize {
        let [across, down] = SQUARES;
        (self.clip.frames - self.first_held_out) * across * down * TURNS
    }

    fn measure(&self) -> Measure {
        Measure {
            unit: "of the answers wrong",
            factor: 1.0,
        }
    }

    fn baselines(&self) -> Result<Vec<Baseline>, SubjectError> {
        Ok(vec![Baseline {
            name: "always the same answer (each is right as often)",
            error: 1.0 - 1.0 / TURNS as f64,
        }])
    }

    fn loss(
        &self,
        module: &Vit,
        samples: &Samples,
        place: &Place,
        session: &Session,
    ) -> Result<Loss, SubjectError> {
        let pictures = self.pictures(samples);
        let logits = module.forward(self.images(&pictures, place), session)?;
        let labels: Vec<u32> = (pictures.iter())
            .map(|picture| picture.turns as u32)
            .collect();
        Ok(Loss::OfShard(class_loss(logits, &labels)?))
    }

    fn error(
        &self,
        module: &Vit,
        samples: &Samples,
        place: &Place,
        session: &Session,
    ) -> Result<f64, SubjectError> {
        let pictures = self.pictures(samples);
        let logits = module.forward(self.images(&pictures, place), session)?;
        let logits = gather_logits(logits, session)?.into_data();
        let logits: Vec<f64> = logits.iter::<f64>().collect();
        let wrong = (logits.chunks(TURNS).zip(&pictures))
            .filter(|(logits, picture)| !is_right(logits, picture.turns));
        // Known on every rank alike, and counted once.
        let share = wrong.count() as f64 / pictures.len() as f64;
        Ok(share / session.group().size() as f64)
    }

    fn show(&self, _module: &Vit, _stage: &Stage<'_>) -> Result<Vec<Shown>, SubjectError> {
        Ok(vec![])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_only_if_its_logit_is_above_all_others() {
        assert!(is_right(&[0.0, 2.0, 1.0, -1.0], 1));
        assert!(!is_right(&[0.0, 2.0, 1.0, -1.0], 2));
        assert!(!is_right(&[2.0, 2.0, 1.0, -1.0], 1));
        for class in 0..4 {
            assert!(!is_right(&[f64::NAN; 4], class));
            assert!(!is_right(&[f64::NAN, 9.0, 9.0, f64::NAN], class));
        }
        assert!(!is_right(&[f64::NAN, 2.0, 1.0, 0.0], 1));
    }

    #[test]
    fn four_turns_are_none_and_one_brings_the_right_upper_corner_to_the_left() {
        for place in [[0, 0], [1, 2], [3, 3]] {
            assert_eq!(turned(place, 4, 4), place);
            assert_eq!(turned(place, 4, 0), place);
        }
        assert_eq!(turned([0, 0], 4, 1), [0, 3]);
        assert_eq!(turned([0, 0], 4, 2), [3, 3]);
    }
}

//! Real video: an 8-bit y4m file as planar RGB in [−1, 1], cut and scaled to what a scenario asks for.
//!
//! Reads the file by the crate `y4m`, so no system library is needed. The built-in clip
//! (`data/big-buck-bunny.y4m`, its licence in `data/README.md`) is compiled in.

use std::cell::Cell;
use std::io::Read;
use std::path::Path;

use y4m::Colorspace;

/// The built-in clip: 32 frames of *Big Buck Bunny*, © Blender Foundation, CC-BY 3.0.
const BUILT_IN: &[u8] = include_bytes!("../data/big-buck-bunny.y4m");

/// How the built-in clip is called in messages and reports.
pub const BUILT_IN_NAME: &str = "built-in Big Buck Bunny (© Blender Foundation, CC-BY 3.0)";

/// The largest width or height that is read; a larger one is a damaged header.
const MAX_SIDE: usize = 16_384;

/// A clip in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    /// Frames in time order.
    pub frames: usize,
    /// Rows of a frame.
    pub height: usize,
    /// Columns of a frame.
    pub width: usize,
    /// Frames a second.
    pub fps: f64,
    /// `[3, T, H, W]`, row-major; red, green, blue in [−1, 1].
    pub rgb: Vec<f32>,
}

/// Why a clip cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClipError {
    /// The file cannot be opened or read.
    #[error(
        "clip {file}: {source}; give the path of a y4m file that can be read, or leave `clip` out for the built-in one"
    )]
    Unreadable {
        /// The clip's file.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not a y4m, or its header or a frame's header is damaged.
    #[error(
        "clip {file}: not a readable YUV4MPEG2 file ({reason}); make one with `ffmpeg -i VIDEO -pix_fmt yuv420p OUT.y4m`"
    )]
    Malformed {
        /// The clip's file.
        file: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// A colour space that is not read.
    #[error(
        "clip {file}: colour space {found} is not read, only 8-bit 420, 422, 444 and mono; convert it with `ffmpeg -i {file} -pix_fmt yuv420p OUT.y4m`"
    )]
    Colourspace {
        /// The clip's file.
        file: String,
        /// The header's `C` parameter.
        found: String,
    },
    /// The file ends inside a frame.
    #[error(
        "clip {file}: the file ends inside frame {frame}, counted from 0 ({bytes} bytes left over); it was cut short, copy or make it again"
    )]
    Truncated {
        /// The clip's file.
        file: String,
        /// The frame that is not whole.
        frame: usize,
        /// Its bytes that are there.
        bytes: usize,
    },
    /// There is no frame in the file.
    #[error("clip {file}: the header is there but no frame follows; a clip needs at least one")]
    Empty {
        /// The clip's file.
        file: String,
    },
    /// More frames are asked for than the clip has.
    #[error(
        "{wanted} frames from frame {start} on are asked for, but the clip has {available}; lower `frames` or `batch`, or use a longer clip"
    )]
    TooFewFrames {
        /// Frames asked for.
        wanted: usize,
        /// The first of them.
        start: usize,
        /// Frames that the clip has.
        available: usize,
    },
    /// The last quarter of a clip, which a training holds out, is shorter than a sample.
    #[error(
        "the clip has {available} frames, of which a training holds out the last quarter, {held_out}, and a sample is of {wanted}; lower `frames`, or use a longer clip"
    )]
    NoneHeldOut {
        /// A sample's frames.
        wanted: usize,
        /// Frames that are held out.
        held_out: usize,
        /// Frames that the clip has.
        available: usize,
    },
    /// A larger picture is asked for than the clip has: nothing is invented by scaling up.
    #[error(
        "{wanted_height}×{wanted_width} pixels are asked for (height×width), but the clip has {height}×{width}, and clips are only scaled down; lower `height` and `width`, or use a larger clip"
    )]
    TooSmall {
        /// Height asked for.
        wanted_height: usize,
        /// Width asked for.
        wanted_width: usize,
        /// The clip's height.
        height: usize,
        /// The clip's width.
        width: usize,
    },
    /// No frame, no row or no column is asked for.
    #[error(
        "{frames} frames of {height}×{width} pixels are asked for; each of the three must be at least 1"
    )]
    Nothing {
        /// Frames asked for.
        frames: usize,
        /// Height asked for.
        height: usize,
        /// Width asked for.
        width: usize,
    },
}

impl Clip {
    /// Reads a y4m file.
    ///
    /// # Errors
    /// [`ClipError`] if the file cannot be read, is damaged, or has a colour space other than 8-bit
    /// 4:2:0, 4:2:2, 4:4:4 or mono.
    pub fn read(path: &Path) -> Result<Self, ClipError> {
        let file = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| ClipError::Unreadable {
            file: file.clone(),
            source,
        })?;
        Self::decode(&file, &bytes)
    }

    /// The clip that is compiled into the binary.
    ///
    /// # Errors
    /// Never, unless the file in `data/` was replaced by one that is not a y4m.
    pub fn built_in() -> Result<Self, ClipError> {
        Self::decode(BUILT_IN_NAME, BUILT_IN)
    }

    /// Reads y4m bytes; `file` names them in errors.
    ///
    /// # Errors
    /// As [`Clip::read`].
    pub fn decode(file: &str, bytes: &[u8]) -> Result<Self, ClipError> {
        let header = Header::parse(bytes);
        let consumed = Cell::new(0);
        let reader = Counted {
            inner: bytes,
            consumed: &consumed,
        };
        if let Some(side) = header.sides().into_iter().flatten().find(|&s| s > MAX_SIDE) {
            return Err(ClipError::Malformed {
                file: file.to_owned(),
                reason: format!("a side of {side} pixels, the largest read is {MAX_SIDE}"),
            });
        }
        let mut decoder = y4m::decode(reader).map_err(|error| match error {
            y4m::Error::UnknownColorspace => ClipError::Colourspace {
                file: file.to_owned(),
                found: header.text(b'C').unwrap_or_else(|| "unknown".to_owned()),
            },
            error => ClipError::Malformed {
                file: file.to_owned(),
                reason: format!("header: {error}"),
            },
        })?;

        let (height, width) = (decoder.get_height(), decoder.get_width());
        let chroma =
            Chroma::of(decoder.get_colorspace()).ok_or_else(|| ClipError::Colourspace {
                file: file.to_owned(),
                found: header
                    .text(b'C')
                    .unwrap_or_else(|| format!("{:?}", decoder.get_colorspace())),
            })?;
        let conversion = if header.has(b"XCOLORRANGE=FULL") {
            Bt601::FULL
        } else {
            Bt601::LIMITED
        };
        let rate = decoder.get_framerate();
        let fps = if rate.num > 0 && rate.den > 0 {
            rate.num as f64 / rate.den as f64
        } else {
            25.0
        };

        // [T, 3, H, W] while reading, for T is not known before; [3, T, H, W] at the end.
        let plane = height * width;
        let mut by_frame: Vec<f32> = Vec::new();
        let mut frames = 0;
        loop {
            let before = consumed.get();
            match decoder.read_frame() {
                Ok(frame) => {
                    let start = by_frame.len();
                    by_frame.resize(start + 3 * plane, 0.0);
                    let rgb = &mut by_frame[start..];
                    let (luma, blue, red) = (
                        frame.get_y_plane(),
                        frame.get_u_plane(),
                        frame.get_v_plane(),
                    );
                    for y in 0..height {
                        for x in 0..width {
                            let (cb, cr) = match chroma.index(y, x, width) {
                                Some(at) => (blue[at], red[at]),
                                None => (128, 128),
                            };
                            let at = y * width + x;
                            let colour = conversion.rgb(luma[at], cb, cr);
                            for (channel, value) in colour.into_iter().enumerate() {
                                rgb[channel * plane + at] = value;
                            }
                        }
                    }
                    frames += 1;
                }
                Err(y4m::Error::EOF) if consumed.get() == before => break,
                Err(y4m::Error::EOF) => {
                    return Err(ClipError::Truncated {
                        file: file.to_owned(),
                        frame: frames,
                        bytes: consumed.get() - before,
                    });
                }
                Err(error) => {
                    return Err(ClipError::Malformed {
                        file: file.to_owned(),
                        reason: format!("frame {frames}, counted from 0: {error}"),
                    });
                }
            }
        }
        if frames == 0 {
            return Err(ClipError::Empty {
                file: file.to_owned(),
            });
        }

        let mut rgb = Vec::with_capacity(by_frame.len());
        for channel in 0..3 {
            for frame in 0..frames {
                let start = (frame * 3 + channel) * plane;
                rgb.extend_from_slice(&by_frame[start..start + plane]);
            }
        }
        Ok(Self {
            frames,
            height,
            width,
            fps,
            rgb,
        })
    }

    /// `frames` frames from frame `start` on, at `height`×`width`: the largest centred rectangle of
    /// that shape, scaled down by area averaging (each new pixel is the mean of what it covers).
    ///
    /// # Errors
    /// [`ClipError::TooFewFrames`] and [`ClipError::TooSmall`]: a clip is never made longer or larger.
    pub fn sample(
        &self,
        start: usize,
        frames: usize,
        height: usize,
        width: usize,
    ) -> Result<Self, ClipError> {
        if frames == 0 || height == 0 || width == 0 {
            return Err(ClipError::Nothing {
                frames,
                height,
                width,
            });
        }
        if start
            .checked_add(frames)
            .is_none_or(|end| end > self.frames)
        {
            return Err(ClipError::TooFewFrames {
                wanted: frames,
                start,
                available: self.frames,
            });
        }
        if height > self.height || width > self.width {
            return Err(ClipError::TooSmall {
                wanted_height: height,
                wanted_width: width,
                height: self.height,
                width: self.width,
            });
        }

        let scale = (self.height as f64 / height as f64).min(self.width as f64 / width as f64);
        let rows = coverage(self.height, height, scale);
        let columns = coverage(self.width, width, scale);
        let mut rgb = Vec::with_capacity(3 * frames * height * width);
        let mut narrow = vec![0.0_f64; self.height * width];
        for channel in 0..3 {
            for frame in start..start + frames {
                let offset = (channel * self.frames + frame) * self.height * self.width;
                for y in 0..self.height {
                    let row = &self.rgb[offset + y * self.width..][..self.width];
                    for (x, (first, weights)) in columns.iter().enumerate() {
                        narrow[y * width + x] = weights
                            .iter()
                            .zip(&row[*first..])
                            .map(|(weight, &value)| weight * f64::from(value))
                            .sum();
                    }
                }
                for (first, weights) in &rows {
                    for x in 0..width {
                        let value: f64 = weights
                            .iter()
                            .enumerate()
                            .map(|(i, weight)| weight * narrow[(first + i) * width + x])
                            .sum();
                        rgb.push(value as f32);
                    }
                }
            }
        }
        Ok(Self {
            frames,
            height,
            width,
            fps: self.fps,
            rgb,
        })
    }

    /// A batch of `batch` samples `[B, 3, T, H, W]`, row-major, whose first frames are spread evenly
    /// over the clip, so that no two samples are the same.
    ///
    /// # Errors
    /// As [`Clip::sample`]; `batch` different samples need `frames + batch − 1` frames.
    pub fn batch(
        &self,
        batch: usize,
        frames: usize,
        height: usize,
        width: usize,
    ) -> Result<Vec<f32>, ClipError> {
        let last = batch.saturating_sub(1);
        let spare = self.frames.saturating_sub(frames);
        if spare < last {
            return Err(ClipError::TooFewFrames {
                wanted: frames,
                start: last,
                available: self.frames,
            });
        }
        let mut values = Vec::new();
        for sample in 0..batch {
            let start = (sample * spare).checked_div(last).unwrap_or(0);
            values.extend(self.sample(start, frames, height, width)?.rgb);
        }
        Ok(values)
    }
}

/// Which source pixels, from which on and with which weights, each of `to` pixels covers, where
/// `to·scale` of `from` pixels are used, centred.
fn coverage(from: usize, to: usize, scale: f64) -> Vec<(usize, Vec<f64>)> {
    let margin = (from as f64 - to as f64 * scale).max(0.0) / 2.0;
    (0..to)
        .map(|i| {
            let begin = margin + i as f64 * scale;
            let end = (begin + scale).min(from as f64);
            let first = (begin.floor() as usize).min(from - 1);
            let past = (end.ceil() as usize).clamp(first + 1, from);
            let mut weights: Vec<f64> = (first..past)
                .map(|pixel| (end.min((pixel + 1) as f64) - begin.max(pixel as f64)).max(0.0))
                .collect();
            let total: f64 = weights.iter().sum();
            for weight in &mut weights {
                *weight /= total;
            }
            (first, weights)
        })
        .collect()
}

/// How many chroma samples there are: one for each block of pixels of this shape.
#[derive(Debug, Clone, Copy)]
enum Chroma {
    None,
    Every { rows: usize, columns: usize },
}

impl Chroma {
    /// `None` for the colour spaces that are not read.
    fn of(colourspace: Colorspace) -> Option<Self> {
        Some(match colourspace {
            Colorspace::Cmono => Self::None,
            Colorspace::C420
            | Colorspace::C420jpeg
            | Colorspace::C420paldv
            | Colorspace::C420mpeg2 => Self::Every {
                rows: 2,
                columns: 2,
            },
            Colorspace::C422 => Self::Every {
                rows: 1,
                columns: 2,
            },
            Colorspace::C444 => Self::Every {
                rows: 1,
                columns: 1,
            },
            _ => return None,
        })
    }

    /// Where the chroma sample of a pixel lies in its plane.
    fn index(self, y: usize, x: usize, width: usize) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Every { rows, columns } => {
                Some((y / rows) * width.div_ceil(columns) + x / columns)
            }
        }
    }
}

/// ITU-R BT.601, from 8-bit Y'CbCr to RGB.
struct Bt601 {
    black: f32,
    luma: f32,
    chroma: f32,
}

impl Bt601 {
    /// Y in 16..=235, Cb and Cr in 16..=240: what y4m files hold unless they say otherwise.
    const LIMITED: Self = Self {
        black: 16.0,
        luma: 255.0 / 219.0,
        chroma: 255.0 / 224.0,
    };
    /// All of 0..=255.
    const FULL: Self = Self {
        black: 0.0,
        luma: 1.0,
        chroma: 1.0,
    };

    /// Red, green, blue in [−1, 1].
    fn rgb(&self, y: u8, cb: u8, cr: u8) -> [f32; 3] {
        let y = (f32::from(y) - self.black) * self.luma;
        let cb = (f32::from(cb) - 128.0) * self.chroma;
        let cr = (f32::from(cr) - 128.0) * self.chroma;
        [
            y + 1.402 * cr,
            y - 0.344_136 * cb - 0.714_136 * cr,
            y + 1.772 * cb,
        ]
        .map(|value| (value / 127.5 - 1.0).clamp(-1.0, 1.0))
    }
}

/// The parameters of a y4m header, for what the crate does not tell.
struct Header<'a>(Vec<&'a [u8]>);

impl<'a> Header<'a> {
    fn parse(bytes: &'a [u8]) -> Self {
        let line = bytes
            .iter()
            .take(1024)
            .position(|&b| b == b'\n')
            .map_or(&[][..], |end| &bytes[..end]);
        Self(line.split(|&b| b == b' ').skip(1).collect())
    }

    fn has(&self, parameter: &[u8]) -> bool {
        self.0.contains(&parameter)
    }

    fn text(&self, name: u8) -> Option<String> {
        self.0
            .iter()
            .find(|parameter| parameter.first() == Some(&name))
            .map(|parameter| String::from_utf8_lossy(parameter).into_owned())
    }

    fn sides(&self) -> [Option<usize>; 2] {
        [b'W', b'H'].map(|name| self.text(name)?.get(1..)?.parse().ok())
    }
}

/// Counts what was read: the decoder gives the same error for a clean end and for a cut one.
struct Counted<'a, R> {
    inner: R,
    consumed: &'a Cell<usize>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.consumed.set(self.consumed.get() + read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn y4m(header: &str, frames: &[&[u8]]) -> Vec<u8> {
        let mut bytes = format!("YUV4MPEG2 {header}\n").into_bytes();
        for frame in frames {
            bytes.extend_from_slice(b"FRAME\n");
            bytes.extend_from_slice(frame);
        }
        bytes
    }

    fn close(actual: &[f32], expected: &[f32]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            // 8-bit rounding of the file is 1/127.5; the conversion itself is exact to 1e-5.
            assert!((a - e).abs() < 0.012, "{actual:?} is not {expected:?}");
        }
    }

    #[test]
    fn the_built_in_clip_has_32_frames_of_256_by_144_and_uses_the_range() {
        let clip = Clip::built_in().unwrap();
        assert_eq!((clip.frames, clip.height, clip.width), (32, 144, 256));
        assert_eq!(clip.rgb.len(), 3 * 32 * 144 * 256);
        assert!((clip.fps - 12.5).abs() < 1e-12);
        let (low, high) = clip
            .rgb
            .iter()
            .fold((1.0_f32, -1.0_f32), |(l, h), &v| (l.min(v), h.max(v)));
        assert!(low < -0.9 && high > 0.9, "{low} to {high}");
        let differs = clip.rgb[..144 * 256] != clip.rgb[144 * 256..2 * 144 * 256];
        assert!(differs, "the bunny moves");
    }

    #[test]
    fn black_white_and_the_primaries_come_out_as_bt601_says() {
        // 4:4:4, five pixels: black, white, red, green, blue, as BT.601 encodes them.
        let planes = [
            [16_u8, 235, 81, 145, 41],
            [128, 128, 90, 54, 240],
            [128, 128, 240, 34, 110],
        ]
        .concat();
        let clip = Clip::decode("five", &y4m("W5 H1 F25:1 C444", &[&planes])).unwrap();
        close(&clip.rgb[..5], &[-1.0, 1.0, 1.0, -1.0, -1.0]);
        close(&clip.rgb[5..10], &[-1.0, 1.0, -1.0, 1.0, -1.0]);
        close(&clip.rgb[10..], &[-1.0, 1.0, -1.0, -1.0, 1.0]);
    }

    #[test]
    fn every_pixel_finds_its_chroma_sample_in_odd_sizes() {
        // 3×3 in 4:2:0: chroma is 2×2, the last row and column share the last samples.
        let frame = [
            &[128_u8; 9][..],
            &[128, 128, 128, 128],
            &[128, 128, 128, 240],
        ]
        .concat();
        let clip = Clip::decode("odd", &y4m("W3 H3 F25:1 C420", &[&frame])).unwrap();
        let red = &clip.rgb[..9];
        assert!(red[8] > red[0] + 0.5, "{red:?}");
        assert!(red[..8].iter().all(|&r| r == red[0]), "{red:?}");

        // 4:2:2 keeps every row: 2×2 pixels, one chroma sample a row.
        let frame = [128_u8, 128, 128, 128, 128, 128, 128, 240];
        let clip = Clip::decode("422", &y4m("W2 H2 F25:1 C422", &[&frame])).unwrap();
        assert_eq!(clip.rgb[0], clip.rgb[1]);
        assert_eq!(clip.rgb[2], clip.rgb[3]);
        assert!(clip.rgb[2] > clip.rgb[0] + 0.5);
    }

    #[test]
    fn mono_is_grey_and_the_full_range_is_kept_where_the_header_says_so() {
        let clip = Clip::decode(
            "m",
            &y4m("W2 H1 F25:1 Cmono XCOLORRANGE=FULL", &[&[0, 255]]),
        )
        .unwrap();
        assert_eq!(clip.rgb, [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]);
    }

    #[test]
    fn frames_lie_behind_channels() {
        let bytes = y4m("W1 H1 F25:1 Cmono XCOLORRANGE=FULL", &[&[0], &[255]]);
        let clip = Clip::decode("m", &bytes).unwrap();
        assert_eq!(clip.frames, 2);
        assert_eq!(clip.rgb, [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]);
    }

    #[test]
    fn area_averaging_takes_the_mean_of_what_a_pixel_covers_after_a_centred_crop() {
        let clip = Clip {
            frames: 1,
            height: 2,
            width: 4,
            fps: 25.0,
            rgb: [[9.0, 1.0, 3.0, 9.0, 9.0, 5.0, 7.0, 9.0]; 3].concat(),
        };
        // A square out of 2×4: columns 1 and 2.
        assert_eq!(clip.sample(0, 1, 1, 1).unwrap().rgb, [4.0; 3]);
        assert_eq!(
            clip.sample(0, 1, 2, 2).unwrap().rgb,
            [[1.0, 3.0, 5.0, 7.0]; 3].concat()
        );
        assert_eq!(clip.sample(0, 1, 2, 4).unwrap(), clip);
        // 3 → 2 pixels: each covers one and a half.
        let line = Clip {
            frames: 1,
            height: 1,
            width: 3,
            fps: 25.0,
            rgb: [[0.0, 3.0, 6.0]; 3].concat(),
        };
        let rows = coverage(3, 2, 1.5);
        assert_eq!(rows[0].0, 0);
        assert!((rows[0].1[0] - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(line.sample(0, 1, 1, 1).unwrap().rgb, [3.0; 3]);
    }

    #[test]
    fn a_batch_holds_different_samples_and_is_refused_where_there_are_too_few() {
        let clip = Clip {
            frames: 3,
            height: 1,
            width: 1,
            fps: 25.0,
            rgb: [0.0, 0.5, 1.0].repeat(3),
        };
        let batch = clip.batch(2, 2, 1, 1).unwrap();
        assert_eq!(batch[..6], [0.0, 0.5, 0.0, 0.5, 0.0, 0.5]);
        assert_eq!(batch[6..], [0.5, 1.0, 0.5, 1.0, 0.5, 1.0]);
        assert!(matches!(
            clip.batch(3, 2, 1, 1),
            Err(ClipError::TooFewFrames { start: 2, .. })
        ));
    }

    #[test]
    fn nothing_is_scaled_up_or_made_longer() {
        let clip = Clip::built_in().unwrap();
        let error = clip.sample(0, 33, 16, 16).unwrap_err().to_string();
        assert!(
            error.contains("33 frames") && error.contains("32"),
            "{error}"
        );
        let error = clip.sample(0, 1, 145, 16).unwrap_err().to_string();
        assert!(
            error.contains("145×16") && error.contains("144×256"),
            "{error}"
        );
        assert!(clip.sample(0, 1, 0, 16).is_err());
        assert!(clip.sample(usize::MAX, 1, 16, 16).is_err());
    }

    #[test]
    fn a_cut_file_is_not_taken_for_a_shorter_one() {
        let mut bytes = y4m("W2 H1 F25:1 Cmono", &[&[1, 2], &[3, 4]]);
        bytes.pop();
        let error = Clip::decode("cut.y4m", &bytes).unwrap_err();
        assert!(
            matches!(
                error,
                ClipError::Truncated {
                    frame: 1,
                    bytes: 7,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn other_files_and_colour_spaces_are_refused_by_name() {
        let ten_bits = Clip::decode("ten.y4m", &y4m("W2 H2 F25:1 C420p10", &[])).unwrap_err();
        assert!(ten_bits.to_string().contains("C420p10"), "{ten_bits}");
        let strange = Clip::decode("s.y4m", &y4m("W2 H2 F25:1 C411", &[])).unwrap_err();
        assert!(strange.to_string().contains("C411"), "{strange}");
        assert!(matches!(
            Clip::decode("a.png", b"\x89PNG\r\n\x1a\n"),
            Err(ClipError::Malformed { .. })
        ));
        assert!(matches!(
            Clip::decode("e.y4m", &y4m("W2 H2 F25:1 C420", &[])),
            Err(ClipError::Empty { .. })
        ));
        assert!(matches!(
            Clip::decode("h.y4m", &y4m("W9999999999 H9999999999 F25:1 C420", &[])),
            Err(ClipError::Malformed { .. })
        ));
        let missing = Clip::read(Path::new("no/such/clip.y4m")).unwrap_err();
        assert!(
            missing.to_string().contains("no/such/clip.y4m"),
            "{missing}"
        );
    }
}

//! Pictures of what was learnt: frames and maps as PNG files.

use std::path::{Path, PathBuf};

use image::{ImageError, Rgb, RgbImage};

/// A picture that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: the picture cannot be written: {source}", path.display())]
pub struct PictureError {
    path: PathBuf,
    source: ImageError,
}

/// A map, rows of values.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) values: Vec<f64>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// Which row of a map comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstRow {
    North,
    South,
}

/// Pixels between panels.
const GAP: u32 = 4;
/// Pixels a point of a map has each way.
const POINT: u32 = 6;

/// Writes maps below each other, in one scale of colours that is even around 0: blue below, red above.
pub(super) fn maps(
    path: &Path,
    first: FirstRow,
    panels: &[Panel],
) -> Result<PathBuf, PictureError> {
    let largest = (panels.iter())
        .flat_map(|panel| &panel.values)
        .fold(f64::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
    let width = panels
        .iter()
        .map(|panel| panel.columns as u32 * POINT)
        .max();
    let height = panels
        .iter()
        .map(|panel| panel.rows as u32 * POINT + GAP)
        .sum::<u32>();
    let mut picture = RgbImage::from_pixel(
        width.unwrap_or(1).max(1),
        height.max(1),
        Rgb([255, 255, 255]),
    );
    let mut top = 0;
    for panel in panels {
        for y in 0..panel.rows as u32 * POINT {
            let row = (y / POINT) as usize;
            let row = match first {
                FirstRow::North => row,
                FirstRow::South => panel.rows - 1 - row,
            };
            for x in 0..panel.columns as u32 * POINT {
                let value = panel.values[row * panel.columns + (x / POINT) as usize];
                picture.put_pixel(x, top + y, colour(value / largest));
            }
        }
        top += panel.rows as u32 * POINT + GAP;
    }
    save(&picture, path)
}

/// Blue at −1, white at 0, red at 1.
fn colour(value: f64) -> Rgb<u8> {
    let fade = |part: f64| (255.0 * (1.0 - part.clamp(0.0, 1.0))).round() as u8;
    match value < 0.0 {
        true => Rgb([fade(-value), fade(-0.6 * value), 255]),
        false => Rgb([255, fade(0.8 * value), fade(value)]),
    }
}

/// Writes the frames of a video beside each other.
///
/// `rgb` is `[3, frames, height, width]`, in [−1, 1].
pub(super) fn frames(
    path: &Path,
    rgb: &[f64],
    [frames, height, width]: [usize; 3],
) -> Result<PathBuf, PictureError> {
    let mut picture = RgbImage::new((frames * width) as u32, height as u32);
    for frame in 0..frames {
        for y in 0..height {
            for x in 0..width {
                let value = |channel: usize| {
                    let value = rgb[((channel * frames + frame) * height + y) * width + x];
                    ((value + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8
                };
                let pixel = Rgb([value(0), value(1), value(2)]);
                picture.put_pixel((frame * width + x) as u32, y as u32, pixel);
            }
        }
    }
    save(&picture, path)
}

fn save(picture: &RgbImage, path: &Path) -> Result<PathBuf, PictureError> {
    let saved = picture.save(path).map_err(|source| PictureError {
        path: path.to_owned(),
        source,
    });
    saved.map(|()| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_and_frames_are_written_as_they_are_and_a_folder_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("maps.png");
        let panel = Panel {
            values: vec![-1.0, 0.0, 0.5, 1.0],
            rows: 2,
            columns: 2,
        };
        maps(&path, FirstRow::South, &[panel]).unwrap();
        let picture = image::open(&path).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (2 * POINT, 2 * POINT + GAP));
        // The second row is the northern one.
        assert_eq!(*picture.get_pixel(POINT, 0), Rgb([255, 51, 0]));
        assert_eq!(*picture.get_pixel(POINT, POINT), Rgb([255, 255, 255]));

        let path = folder.path().join("frames.png");
        // Red, green, blue of two frames of one pixel.
        frames(&path, &[-1.0, 1.0, 0.0, 1.0, 1.0, -1.0], [2, 1, 1]).unwrap();
        let picture = image::open(&path).unwrap().to_rgb8();
        assert_eq!(*picture.get_pixel(0, 0), Rgb([0, 128, 255]));
        assert_eq!(*picture.get_pixel(1, 0), Rgb([255, 255, 0]));

        let absent = folder.path().join("none").join("frames.png");
        let error = frames(&absent, &[0.0; 3], [1, 1, 1])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("none/frames.png: the picture cannot be written"),
            "{error}"
        );
    }
}

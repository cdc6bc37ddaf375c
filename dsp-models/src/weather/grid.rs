//! Where and when fields are: a grid of latitudes and longitudes, and the season of each time.

use std::f64::consts::TAU;
use std::ops::Range;

/// A grid on the sphere, and the times at which each sample shows it: the same on every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    latitudes: Vec<f64>,
    longitudes: Vec<f64>,
    seasons: Vec<Vec<f64>>,
    times: usize,
}

/// Coordinates that describe no grid.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GridError {
    /// A latitude beyond a pole, or not a number.
    #[error("row {row} is at {degrees}° north: latitudes lie between −90 and 90")]
    Latitude {
        /// The row, from 0.
        row: usize,
        /// Its latitude.
        degrees: f64,
    },
    /// A longitude that is not a number.
    #[error("column {column} is at {degrees}° east: longitudes are finite numbers")]
    Longitude {
        /// The column, from 0.
        column: usize,
        /// Its longitude.
        degrees: f64,
    },
    /// A season that is not a number.
    #[error("time {time} of sample {sample} is {years} years: seasons are finite numbers")]
    Season {
        /// The sample.
        sample: usize,
        /// The time, from 0.
        time: usize,
        /// Its season.
        years: f64,
    },
    /// Samples with different numbers of times.
    #[error("sample {sample} has {got} times where the first has {expected}")]
    Times {
        /// The sample.
        sample: usize,
        /// Its times.
        got: usize,
        /// The first sample's.
        expected: usize,
    },
}

impl Grid {
    /// How many multiples of the year a season is told by: the annual and the semi-annual wave.
    pub const SEASON_HARMONICS: usize = 2;

    /// A grid of rows at `latitudes` (degrees north) and columns at `longitudes` (degrees east), and
    /// `seasons[sample][time]`, in years: the fraction counts, from the year's beginning.
    ///
    /// # Errors
    /// [`GridError`] with the coordinate that is impossible.
    pub fn new(
        latitudes: Vec<f64>,
        longitudes: Vec<f64>,
        seasons: Vec<Vec<f64>>,
    ) -> Result<Self, GridError> {
        for (row, &degrees) in latitudes.iter().enumerate() {
            if !(-90.0..=90.0).contains(&degrees) {
                return Err(GridError::Latitude { row, degrees });
            }
        }
        for (column, &degrees) in longitudes.iter().enumerate() {
            if !degrees.is_finite() {
                return Err(GridError::Longitude { column, degrees });
            }
        }
        let expected = seasons.first().map_or(0, Vec::len);
        for (sample, seasons) in seasons.iter().enumerate() {
            let got = seasons.len();
            if got != expected {
                return Err(GridError::Times {
                    sample,
                    got,
                    expected,
                });
            }
            if let Some(time) = seasons.iter().position(|years| !years.is_finite()) {
                return Err(GridError::Season {
                    sample,
                    time,
                    years: seasons[time],
                });
            }
        }
        Ok(Self {
            latitudes,
            longitudes,
            seasons,
            times: expected,
        })
    }

    /// Samples, times, latitudes, longitudes.
    pub fn dims(&self) -> [usize; 4] {
        [
            self.seasons.len(),
            self.times,
            self.latitudes.len(),
            self.longitudes.len(),
        ]
    }

    /// The places of the given rows and columns: `sin kφ`, `cos kφ`, `cos φ·sin kλ`, `cos φ·cos kλ` for `k` from
    /// 1 to `harmonics`. East of the last meridian lies the first, and all longitudes meet at the poles.
    ///
    /// # Shapes
    /// - returns: `[rows, columns, 4·harmonics]`, row by row
    pub(crate) fn places(
        &self,
        rows: &[Range<usize>],
        columns: &[Range<usize>],
        harmonics: usize,
    ) -> Vec<f64> {
        let mut places = Vec::new();
        for row in rows.iter().cloned().flatten() {
            let latitude = self.latitudes[row].to_radians();
            let circle = latitude.cos();
            for column in columns.iter().cloned().flatten() {
                let longitude = self.longitudes[column].to_radians();
                for k in 1..=harmonics {
                    let (north, east) = (k as f64 * latitude, k as f64 * longitude);
                    places.extend([north.sin(), north.cos()]);
                    places.extend([circle * east.sin(), circle * east.cos()]);
                }
            }
        }
        places
    }

    /// The seasons of the given times: sines and cosines of the year and its half.
    ///
    /// # Shapes
    /// - returns: `[samples, times, 2·SEASON_HARMONICS]`, row by row
    pub(crate) fn seasons(&self, times: &[Range<usize>]) -> Vec<f64> {
        let mut features = Vec::new();
        for sample in &self.seasons {
            for time in times.iter().cloned().flatten() {
                for k in 1..=Self::SEASON_HARMONICS {
                    let (sin, cos) = (TAU * k as f64 * sample[time]).sin_cos();
                    features.extend([sin, cos]);
                }
            }
        }
        features
    }

    /// The share of the sphere that each row stands for, of rows equally far apart: `cos φ` over their sum.
    pub fn areas(&self) -> Vec<f64> {
        let circles: Vec<f64> = (self.latitudes.iter())
            .map(|degrees| degrees.to_radians().cos().max(0.0))
            .collect();
        let sum: f64 = circles.iter().sum();
        circles.iter().map(|circle| circle / sum).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        let seasons = vec![vec![0.0, 0.25, 1.25]];
        Grid::new(vec![-90.0, -60.0, 0.0], vec![0.0, 90.0, 360.0], seasons).unwrap()
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() < 1e-12,
                "{found} instead of {expected}"
            );
        }
    }

    #[test]
    fn the_sphere_closes_in_longitude_and_at_the_poles() {
        let at =
            |row: usize, column: usize| grid().places(&[row..row + 1], &[column..column + 1], 3);
        close(&at(1, 0), &at(1, 2));
        close(&at(0, 0), &at(0, 1));
        assert!((at(1, 0)[2] - at(1, 1)[2]).abs() > 0.4);
        // φ = −60°, λ = 90°.
        let half = 0.5 * 3.0_f64.sqrt();
        close(&at(1, 1)[..4], &[-half, 0.5, 0.5, 0.0]);
    }

    #[test]
    fn seasons_come_back_every_year() {
        let seasons = grid().seasons(&[0..1, 1..3]);
        close(&seasons[4..8], &[1.0, 0.0, 0.0, -1.0]);
        close(&seasons[4..8], &seasons[8..]);
    }

    #[test]
    fn rows_count_by_their_area() {
        close(&grid().areas(), &[0.0, 1.0 / 3.0, 2.0 / 3.0]);
    }

    #[test]
    fn impossible_coordinates_are_named() {
        let new = |latitude, longitude, second: Vec<f64>| {
            let seasons = vec![vec![0.0], second];
            Grid::new(vec![0.0, latitude], vec![longitude], seasons)
        };
        assert!(new(90.0, -180.0, vec![0.5]).is_ok());
        for degrees in [90.5, f64::NAN] {
            let error = new(degrees, 0.0, vec![0.5]).unwrap_err();
            assert!(
                matches!(error, GridError::Latitude { row: 1, .. }),
                "{error}"
            );
        }
        let error = new(0.0, f64::INFINITY, vec![0.5]).unwrap_err();
        assert!(
            matches!(error, GridError::Longitude { column: 0, .. }),
            "{error}"
        );
        let error = new(0.0, 0.0, vec![f64::NAN]).unwrap_err();
        assert!(
            matches!(
                error,
                GridError::Season {
                    sample: 1,
                    time: 0,
                    ..
                }
            ),
            "{error}"
        );
        let error = new(0.0, 0.0, vec![0.1, 0.2]).unwrap_err();
        let expected = GridError::Times {
            sample: 1,
            got: 2,
            expected: 1,
        };
        assert_eq!(error, expected);
    }
}

//! Real weather: variables of a NetCDF file over time, latitude and longitude, normalised, thinned to what a
//! scenario asks for.
//!
//! `file.rs` reads them. The built-in fields (`data/navy-winds.nc`, their origin in `data/README.md`) are compiled in.

mod file;
#[cfg(test)]
mod tests;

use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_models::weather::{Grid, GridError, WeatherBatch};

use file::File;

/// The built-in fields: 36 months of winds at 73 latitudes and 48 longitudes.
const BUILT_IN: &[u8] = include_bytes!("../../data/navy-winds.nc");

/// How the built-in fields are called in messages and reports.
pub const BUILT_IN_NAME: &str =
    "built-in monthly winds of 1982 to 1984 (US Navy, by way of NOAA/PMEL's Ferret)";

/// The built-in fields' variables: the wind towards the east and towards the north, in m/s.
pub const BUILT_IN_VARIABLES: [&str; 2] = ["uwnd", "vwnd"];

/// Fields in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Fields {
    /// Where they are from: a file's path, or [`BUILT_IN_NAME`].
    pub source: String,
    /// What there is at each point.
    pub variables: Vec<Variable>,
    /// The season of each time, in years of which only the fraction counts, true to two days.
    pub seasons: Vec<f64>,
    /// Degrees north, row by row.
    pub latitudes: Vec<f64>,
    /// Degrees east, column by column.
    pub longitudes: Vec<f64>,
    /// `[T, lat, lon, variables]`, row-major: of each variable the deviations from its mean, in its standard
    /// deviations. 0 where nothing was measured.
    pub values: Vec<f32>,
}

/// A variable, and how it was normalised.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    /// Its name in the file.
    pub name: String,
    /// Its unit, as the file says.
    pub units: String,
    /// The mean of what was measured, in that unit.
    pub mean: f64,
    /// Its standard deviation, in that unit.
    pub deviation: f64,
    /// How many of its values are missing.
    pub missing: usize,
}

/// Samples for a forecast.
#[derive(Debug, Clone, PartialEq)]
pub struct FieldsBatch {
    /// Samples, times, latitudes, longitudes, variables.
    pub shape: [usize; 5],
    /// Of that shape, row-major.
    pub fields: Vec<f32>,
    /// The same one time later.
    pub next: Vec<f32>,
    /// Where and when `fields` are.
    pub grid: Grid,
}

/// Why fields cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FieldsError {
    /// The file cannot be opened or read.
    #[error("fields {file}: {source}; give the path of a NetCDF file that can be read")]
    Unreadable {
        /// The file.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is in the newer format.
    #[error(
        "fields {file}: a NetCDF-4 (HDF5) file, and only the classic format is read; convert it with `nccopy -k classic {file} OUT.nc`"
    )]
    NetCdf4 {
        /// The file.
        file: String,
    },
    /// The file is no NetCDF, or damaged.
    #[error("fields {file}: not a readable NetCDF file ({reason})")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// No variable is asked for.
    #[error("fields {file}: no variable is asked for; it has {}", available.join(", "))]
    NoVariable {
        /// The file.
        file: String,
        /// What the file has.
        available: Vec<String>,
    },
    /// A variable that is not in the file.
    #[error("fields {file}: there is no variable {variable}; it has {}", available.join(", "))]
    MissingVariable {
        /// The file.
        file: String,
        /// What was asked for.
        variable: String,
        /// What the file has.
        available: Vec<String>,
    },
    /// A variable over other dimensions, or in another order.
    #[error(
        "fields {file}: variable {variable} runs over ({}), where (time, latitude, longitude) is needed in this order, beside dimensions of length 1; reorder them with `ncpdq -a`, or choose another variable",
        found.join(", ")
    )]
    Dimensions {
        /// The file.
        file: String,
        /// The variable.
        variable: String,
        /// Its dimensions, with what each was taken for.
        found: Vec<String>,
    },
    /// A variable over other dimensions than the first one.
    #[error(
        "fields {file}: variable {variable} runs over ({}) and {first} over ({}); variables that are read together share their grid",
        found.join(", "), expected.join(", ")
    )]
    OtherGrid {
        /// The file.
        file: String,
        /// The variable.
        variable: String,
        /// Its dimensions.
        found: Vec<String>,
        /// The first variable.
        first: String,
        /// Its dimensions.
        expected: Vec<String>,
    },
    /// A dimension without coordinates.
    #[error(
        "fields {file}: dimension {dimension} has no variable of its name that gives its coordinates"
    )]
    NoCoordinates {
        /// The file.
        file: String,
        /// The dimension.
        dimension: String,
    },
    /// Times that cannot be placed in a year.
    #[error(
        "fields {file}: variable {variable} has units {found:?}, where times are `days since 1980-01-31` or the like, in seconds, minutes, hours, days, months or years"
    )]
    TimeUnits {
        /// The file.
        file: String,
        /// The times.
        variable: String,
        /// Their unit.
        found: String,
    },
    /// Coordinates that are on no sphere.
    #[error("fields {file}: {source}")]
    Grid {
        /// The file.
        file: String,
        /// What is wrong with them.
        source: GridError,
    },
    /// A variable whose values cannot be read as numbers.
    #[error("fields {file}: variable {variable} cannot be read ({reason})")]
    Values {
        /// The file.
        file: String,
        /// The variable.
        variable: String,
        /// What is wrong.
        reason: String,
    },
    /// A variable that cannot be normalised.
    #[error(
        "fields {file}: variable {variable} has {measured} values that are not missing, from {least} to {greatest}; there is nothing to forecast unless they differ"
    )]
    Constant {
        /// The file.
        file: String,
        /// The variable.
        variable: String,
        /// How many values are not missing.
        measured: usize,
        /// The least of them.
        least: f64,
        /// The greatest of them.
        greatest: f64,
    },
    /// More times are asked for than there are.
    #[error(
        "{batch} different samples of {times} times and the one after them are asked for, which takes {needed}, but {file} has {available}; lower the times or the batch, or use a longer file"
    )]
    TooFewTimes {
        /// The file.
        file: String,
        /// Samples asked for.
        batch: usize,
        /// Times asked for.
        times: usize,
        /// Times needed.
        needed: usize,
        /// Times that there are.
        available: usize,
    },
    /// The last third of the times, which a training holds out, is shorter than a sample.
    #[error(
        "{file} has {available} times, of which a training holds out the last third, {held_out}, and a sample is of {times}; lower the times, or use a longer file"
    )]
    NoneHeldOut {
        /// The file.
        file: String,
        /// A sample's times.
        times: usize,
        /// Times that are held out.
        held_out: usize,
        /// Times that there are.
        available: usize,
    },
    /// A finer grid is asked for than there is: nothing is invented between its points.
    #[error(
        "{latitudes}×{longitudes} points are asked for (latitudes×longitudes), but {file} has {rows}×{columns}, and grids are only thinned; ask for fewer, or use a finer file"
    )]
    TooCoarse {
        /// The file.
        file: String,
        /// Latitudes asked for.
        latitudes: usize,
        /// Longitudes asked for.
        longitudes: usize,
        /// The file's latitudes.
        rows: usize,
        /// The file's longitudes.
        columns: usize,
    },
    /// No sample, no time or no point is asked for.
    #[error(
        "{batch} samples of {times} times at {latitudes}×{longitudes} points are asked for; each of the four must be at least 1"
    )]
    Nothing {
        /// Samples asked for.
        batch: usize,
        /// Times asked for.
        times: usize,
        /// Latitudes asked for.
        latitudes: usize,
        /// Longitudes asked for.
        longitudes: usize,
    },
}

impl Fields {
    /// Reads variables of a NetCDF file.
    ///
    /// Packed values are unpacked (`scale_factor`, `add_offset`); those that `_FillValue`, `missing_value` or a
    /// valid range excludes, and those that are no numbers, are missing.
    ///
    /// # Errors
    /// [`FieldsError`] if the file cannot be read, lacks a variable, or has one that is not over time, latitude
    /// and longitude.
    pub fn read(path: &Path, variables: &[&str]) -> Result<Self, FieldsError> {
        let file = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| FieldsError::Unreadable {
            file: file.clone(),
            source,
        })?;
        Self::decode(&file, &bytes, variables)
    }

    /// The fields that are compiled into the binary.
    ///
    /// # Errors
    /// Never, unless the file in `data/` was replaced by another.
    pub fn built_in() -> Result<Self, FieldsError> {
        Self::decode(BUILT_IN_NAME, BUILT_IN, &BUILT_IN_VARIABLES)
    }

    /// Reads variables of a NetCDF file's bytes; `file` names them in errors.
    ///
    /// # Errors
    /// As [`Fields::read`].
    pub fn decode(file: &str, bytes: &[u8], variables: &[&str]) -> Result<Self, FieldsError> {
        File::open(file, bytes)?.fields(variables)
    }

    /// `batch` samples of `times` times, with the fields one time later, at `latitudes`×`longitudes` points.
    ///
    /// First times are spread evenly over the fields, so that no two samples are the same. Points are a thinned
    /// grid's, at their own coordinates: rows from the first to the last, columns all the way round.
    ///
    /// # Errors
    /// [`FieldsError::TooFewTimes`] and [`FieldsError::TooCoarse`]: fields are never made longer or finer.
    pub fn batch(
        &self,
        batch: usize,
        times: usize,
        latitudes: usize,
        longitudes: usize,
    ) -> Result<FieldsBatch, FieldsError> {
        if [batch, times, latitudes, longitudes].contains(&0) {
            return Err(FieldsError::Nothing {
                batch,
                times,
                latitudes,
                longitudes,
            });
        }
        let [rows, columns] = self.thinning(latitudes, longitudes)?;
        let (available, needed) = (self.seasons.len(), times.saturating_add(batch));
        if needed > available {
            return Err(FieldsError::TooFewTimes {
                file: self.source.clone(),
                batch,
                times,
                needed,
                available,
            });
        }
        let (spare, last) = (available - times - 1, batch - 1);
        let first = |sample: usize| (sample * spare).checked_div(last).unwrap_or(0);
        let starts: Vec<usize> = (0..batch).map(first).collect();

        let [fields, next] = [0, 1].map(|later| {
            let mut values = Vec::new();
            for &start in &starts {
                for time in start + later..start + later + times {
                    for &row in &rows {
                        for &column in &columns {
                            values.extend_from_slice(self.point(time, row, column));
                        }
                    }
                }
            }
            values
        });
        let seasons = |&start: &usize| self.seasons[start..start + times].to_vec();
        let grid = Grid::new(
            rows.iter().map(|&row| self.latitudes[row]).collect(),
            columns
                .iter()
                .map(|&column| self.longitudes[column])
                .collect(),
            starts.iter().map(seasons).collect(),
        );
        Ok(FieldsBatch {
            shape: [batch, times, latitudes, longitudes, self.variables.len()],
            fields,
            next,
            grid: grid.map_err(|source| FieldsError::Grid {
                file: self.source.clone(),
                source,
            })?,
        })
    }

    /// All times on a grid of fewer points, at their own coordinates, as [`batch`](Self::batch) chooses them.
    ///
    /// # Errors
    /// [`FieldsError::TooCoarse`] if there are not as many.
    pub fn thinned(&self, latitudes: usize, longitudes: usize) -> Result<Self, FieldsError> {
        let [rows, columns] = self.thinning(latitudes, longitudes)?;
        let mut values = Vec::new();
        for time in 0..self.seasons.len() {
            for &row in &rows {
                for &column in &columns {
                    values.extend_from_slice(self.point(time, row, column));
                }
            }
        }
        Ok(Self {
            latitudes: rows.iter().map(|&row| self.latitudes[row]).collect(),
            longitudes: (columns.iter())
                .map(|&column| self.longitudes[column])
                .collect(),
            values,
            ..self.clone()
        })
    }

    /// The rows and columns of a grid of fewer points.
    fn thinning(
        &self,
        latitudes: usize,
        longitudes: usize,
    ) -> Result<[Vec<usize>; 2], FieldsError> {
        let (rows, columns) = (self.latitudes.len(), self.longitudes.len());
        if latitudes > rows || longitudes > columns {
            return Err(FieldsError::TooCoarse {
                file: self.source.clone(),
                latitudes,
                longitudes,
                rows,
                columns,
            });
        }
        let row = |i: usize| match latitudes {
            1 => rows / 2,
            _ => i * (rows - 1) / (latitudes - 1),
        };
        Ok([
            (0..latitudes).map(row).collect(),
            (0..longitudes).map(|i| i * columns / longitudes).collect(),
        ])
    }

    /// The variables at a time and a point.
    fn point(&self, time: usize, row: usize, column: usize) -> &[f32] {
        let (rows, columns) = (self.latitudes.len(), self.longitudes.len());
        let count = self.variables.len();
        &self.values[((time * rows + row) * columns + column) * count..][..count]
    }
}

impl FieldsBatch {
    /// The samples as tensors.
    pub fn on(&self, device: &Device, dtype: DType) -> WeatherBatch {
        let tensor = |values: &[f32]| {
            Tensor::from_data(
                TensorData::new(values.to_vec(), self.shape),
                (device, dtype),
            )
        };
        WeatherBatch {
            fields: tensor(&self.fields),
            next: tensor(&self.next),
            grid: self.grid.clone(),
        }
    }
}

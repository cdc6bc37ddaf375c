//! Real weather: variables of a NetCDF file over time, latitude and longitude, normalised, thinned to what a
//! scenario asks for.
//!
//! Reads classic NetCDF (CDF-1, CDF-2, CDF-5) by the crate `netcdf-reader`, so no system library is needed. What a
//! dimension is, its coordinate variable's attributes tell, as the CF conventions have it, or else its name. The
//! built-in fields (`data/navy-winds.nc`, their origin in `data/README.md`) are compiled in.

use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_models::weather::{Grid, GridError, WeatherBatch};
use netcdf_reader::{NcDimension, NcFile, NcVariable};

/// The built-in fields: 36 months of winds at 73 latitudes and 48 longitudes.
const BUILT_IN: &[u8] = include_bytes!("../data/navy-winds.nc");

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

/// An open file and its name in errors.
struct File {
    name: String,
    file: NcFile,
}

/// Which dimensions a variable runs over: those of time, latitude and longitude.
type Dimensions<'a> = [&'a NcDimension; 3];

impl File {
    fn open(name: &str, bytes: &[u8]) -> Result<Self, FieldsError> {
        let name = name.to_owned();
        match NcFile::from_bytes(bytes) {
            Ok(file) => Ok(Self { name, file }),
            Err(netcdf_reader::Error::Nc4NotEnabled) => Err(FieldsError::NetCdf4 { file: name }),
            Err(error) => Err(FieldsError::Malformed {
                file: name,
                reason: error.to_string(),
            }),
        }
    }

    fn fields(&self, names: &[&str]) -> Result<Fields, FieldsError> {
        let Some((first, others)) = names.split_first() else {
            return Err(FieldsError::NoVariable {
                file: self.name.clone(),
                available: self.available(),
            });
        };
        let dimensions = self.dimensions(first)?;
        for name in others {
            let found = self.dimensions(name)?;
            if found != dimensions {
                let names = |dimensions: Dimensions<'_>| dimensions.map(|d| d.name.clone()).into();
                return Err(FieldsError::OtherGrid {
                    file: self.name.clone(),
                    variable: (*name).to_owned(),
                    found: names(found),
                    first: (*first).to_owned(),
                    expected: names(dimensions),
                });
            }
        }
        let [time, latitude, longitude] = dimensions;
        let (latitudes, longitudes) = (self.coordinates(latitude)?, self.coordinates(longitude)?);
        let seasons = self.seasons(time)?;
        let checked = Grid::new(latitudes.clone(), longitudes.clone(), vec![seasons.clone()]);
        checked.map_err(|source| FieldsError::Grid {
            file: self.name.clone(),
            source,
        })?;

        let mut values = Vec::new();
        let mut variables = Vec::with_capacity(names.len());
        for (index, name) in names.iter().enumerate() {
            let measured = self.values(name)?;
            let variable = self.normal(name, &measured)?;
            // Not before a variable was read: until then the lengths are only what a header claims.
            values.resize(measured.len() * names.len(), 0.0);
            for (point, &value) in measured.iter().enumerate() {
                if value.is_finite() {
                    let normal = (value - variable.mean) / variable.deviation;
                    values[point * names.len() + index] = normal as f32;
                }
            }
            variables.push(variable);
        }
        Ok(Fields {
            source: self.name.clone(),
            variables,
            seasons,
            latitudes,
            longitudes,
            values,
        })
    }

    fn available(&self) -> Vec<String> {
        let variables = self.file.variables().unwrap_or(&[]);
        variables.iter().map(|v| v.name().to_owned()).collect()
    }

    fn variable(&self, name: &str) -> Result<&NcVariable, FieldsError> {
        (self.file.variable(name)).map_err(|_| FieldsError::MissingVariable {
            file: self.name.clone(),
            variable: name.to_owned(),
            available: self.available(),
        })
    }

    fn dimensions(&self, name: &str) -> Result<Dimensions<'_>, FieldsError> {
        let variable = self.variable(name)?;
        let kinds: Vec<(&NcDimension, Option<Kind>)> = (variable.dimensions().iter())
            .map(|dimension| (dimension, self.kind(dimension)))
            .filter(|(dimension, kind)| kind.is_some() || dimension.size != 1)
            .collect();
        match kinds[..] {
            [
                (time, Some(Kind::Time)),
                (latitude, Some(Kind::Latitude)),
                (longitude, Some(Kind::Longitude)),
            ] => Ok([time, latitude, longitude]),
            _ => Err(FieldsError::Dimensions {
                file: self.name.clone(),
                variable: name.to_owned(),
                found: (kinds.iter())
                    .map(|(dimension, kind)| match kind {
                        Some(kind) => format!("{}: {}", dimension.name, kind.name()),
                        None => format!("{}: unknown", dimension.name),
                    })
                    .collect(),
            }),
        }
    }

    fn kind(&self, dimension: &NcDimension) -> Option<Kind> {
        let coordinates = self.file.coordinate_variable(&dimension.name).ok();
        let attribute = |name: &str| text(coordinates?, name);
        attribute("units")
            .and_then(|units| Kind::of_units(&units))
            .or_else(|| attribute("standard_name").and_then(|name| Kind::of_name(&name)))
            .or_else(|| attribute("axis").and_then(|axis| Kind::of_name(&axis)))
            .or_else(|| Kind::of_name(&dimension.name))
    }

    fn coordinate(&self, dimension: &NcDimension) -> Result<&NcVariable, FieldsError> {
        let found = self.file.coordinate_variable(&dimension.name);
        found.map_err(|_| FieldsError::NoCoordinates {
            file: self.name.clone(),
            dimension: dimension.name.clone(),
        })
    }

    fn coordinates(&self, dimension: &NcDimension) -> Result<Vec<f64>, FieldsError> {
        self.values(self.coordinate(dimension)?.name())
    }

    fn seasons(&self, time: &NcDimension) -> Result<Vec<f64>, FieldsError> {
        let variable = self.coordinate(time)?;
        let units = text(variable, "units").unwrap_or_default();
        let calendar = text(variable, "calendar").unwrap_or_default();
        let Some(clock) = Clock::parse(&units, &calendar) else {
            return Err(FieldsError::TimeUnits {
                file: self.name.clone(),
                variable: variable.name().to_owned(),
                found: units,
            });
        };
        let times = self.values(variable.name())?;
        Ok(times.into_iter().map(|time| clock.years(time)).collect())
    }

    /// All values in the file's order, unpacked; NaN where one is missing.
    fn values(&self, name: &str) -> Result<Vec<f64>, FieldsError> {
        match self.file.read_variable_unpacked_masked(name) {
            Ok(values) => Ok(values.iter().copied().collect()),
            Err(error) => Err(FieldsError::Values {
                file: self.name.clone(),
                variable: name.to_owned(),
                reason: error.to_string(),
            }),
        }
    }

    fn normal(&self, name: &str, values: &[f64]) -> Result<Variable, FieldsError> {
        let measured = || values.iter().copied().filter(|value| value.is_finite());
        let count = measured().count();
        let mean = measured().sum::<f64>() / count as f64;
        let square = measured().map(|value| (value - mean).powi(2)).sum::<f64>();
        let (least, greatest) = (
            measured().fold(f64::INFINITY, f64::min),
            measured().fold(f64::NEG_INFINITY, f64::max),
        );
        if count == 0 || least == greatest {
            return Err(FieldsError::Constant {
                file: self.name.clone(),
                variable: name.to_owned(),
                measured: count,
                least,
                greatest,
            });
        }
        Ok(Variable {
            name: name.to_owned(),
            units: text(self.variable(name)?, "units").unwrap_or_default(),
            mean,
            deviation: (square / count as f64).sqrt(),
            missing: values.len() - count,
        })
    }
}

fn text(variable: &NcVariable, attribute: &str) -> Option<String> {
    let text = variable.attribute(attribute)?.value.as_string()?;
    // Some writers end text with the 0 of C.
    Some(text.trim_end_matches('\0').trim().to_owned())
}

/// What a dimension is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Time,
    Latitude,
    Longitude,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Latitude => "latitude",
            Self::Longitude => "longitude",
        }
    }

    /// By the unit of its coordinates: `degrees_north` and its other spellings, or a time since another.
    fn of_units(units: &str) -> Option<Self> {
        let units = units.to_ascii_lowercase();
        let direction = || {
            let rest = units.strip_prefix("degree")?;
            Some(
                rest.strip_prefix('s')
                    .unwrap_or(rest)
                    .trim_start_matches('_'),
            )
        };
        match direction() {
            Some("north" | "n") => Some(Self::Latitude),
            Some("east" | "e") => Some(Self::Longitude),
            _ if units.contains(" since ") => Some(Self::Time),
            _ => None,
        }
    }

    /// By a dimension's name, a standard name or the letter of an axis.
    fn of_name(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "time" | "t" => Some(Self::Time),
            "latitude" | "lat" | "y" => Some(Self::Latitude),
            "longitude" | "lon" | "x" => Some(Self::Longitude),
            _ => None,
        }
    }
}

/// How a number becomes a season: `hours since 1980-01-14 14:00:00`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Clock {
    /// The season of 0, in years.
    origin: f64,
    /// A unit of time, in years.
    unit: f64,
}

impl Clock {
    /// Years have the calendar's mean length, and the hour of the origin is left out: seasons are true to two days.
    fn parse(units: &str, calendar: &str) -> Option<Self> {
        const DAYS_BEFORE: [f64; 12] = [
            0.0, 31.0, 59.0, 90.0, 120.0, 151.0, 181.0, 212.0, 243.0, 273.0, 304.0, 334.0,
        ];
        let units = units.to_ascii_lowercase();
        let (unit, origin) = units.split_once(" since ")?;
        let year = match calendar.to_ascii_lowercase().as_str() {
            "noleap" | "365_day" => 365.0,
            "all_leap" | "366_day" => 366.0,
            "360_day" => 360.0,
            _ => 365.2425,
        };
        let unit = match unit.trim() {
            "seconds" | "second" | "secs" | "sec" | "s" => 1.0 / 86_400.0 / year,
            "minutes" | "minute" | "mins" | "min" => 1.0 / 1_440.0 / year,
            "hours" | "hour" | "hrs" | "hr" | "h" => 1.0 / 24.0 / year,
            "days" | "day" | "d" => 1.0 / year,
            "months" | "month" => 1.0 / 12.0,
            "years" | "year" => 1.0,
            _ => return None,
        };
        let date = origin.trim().split([' ', 't']).next()?;
        let mut parts = date.splitn(3, '-');
        let _: i64 = parts.next()?.parse().ok()?;
        let month: usize = parts.next()?.parse().ok()?;
        let day: usize = parts.next()?.parse().ok()?;
        if !(1..=31).contains(&day) {
            return None;
        }
        let before = DAYS_BEFORE.get(month.checked_sub(1)?)?;
        Some(Self {
            origin: (before + (day - 1) as f64) / 365.0,
            unit,
        })
    }

    fn years(self, time: f64) -> f64 {
        self.origin + time * self.unit
    }
}

#[cfg(test)]
mod tests {
    use netcdf_writer::{DimensionId, NcAttrValue, NcFileBuilder, NcWriteOptions, VariableId};

    use super::*;

    /// A file in the making: 2 times, 3 latitudes, 2 longitudes, named and described as asked.
    struct Writer {
        builder: NcFileBuilder,
        time: DimensionId,
        latitude: DimensionId,
        longitude: DimensionId,
    }

    fn characters(text: &str) -> NcAttrValue {
        NcAttrValue::Chars(text.to_owned())
    }

    impl Writer {
        fn empty(names: [&str; 3]) -> Self {
            let mut builder = NcFileBuilder::new();
            let time = builder.add_unlimited_dimension(names[0]).unwrap();
            let latitude = builder.add_dimension(names[1], 3).unwrap();
            let longitude = builder.add_dimension(names[2], 2).unwrap();
            Self {
                builder,
                time,
                latitude,
                longitude,
            }
        }

        /// With coordinates whose units tell what they are.
        fn new(names: [&str; 3]) -> Self {
            Self::with_units(
                names,
                ["days since 1990-01-01", "degrees_north", "degreesE"],
            )
        }

        fn with_units(names: [&str; 3], units: [&str; 3]) -> Self {
            let mut writer = Self::empty(names);
            let dimensions = [writer.time, writer.latitude, writer.longitude];
            let values = [&[0.0, 365.2425][..], &[-45.0, 0.0, 45.0], &[0.0, 180.0]];
            for (((name, dimension), values), units) in
                names.into_iter().zip(dimensions).zip(values).zip(units)
            {
                let id = writer
                    .builder
                    .add_variable::<f64>(name, &[dimension])
                    .unwrap();
                writer.builder.write_variable(id, values).unwrap();
                writer.describe(id, "units", characters(units));
            }
            writer
        }

        fn describe(&mut self, variable: VariableId, name: &str, value: NcAttrValue) {
            let builder = &mut self.builder;
            builder
                .add_variable_attribute(variable, name, value)
                .unwrap();
        }

        fn over(&self) -> [DimensionId; 3] {
            [self.time, self.latitude, self.longitude]
        }

        fn bytes(&self) -> Vec<u8> {
            self.builder.to_vec(NcWriteOptions::default()).unwrap().1
        }

        fn decode(&self, variables: &[&str]) -> Result<Fields, FieldsError> {
            Fields::decode("winds.nc", &self.bytes(), variables)
        }
    }

    const NAMES: [&str; 3] = ["time", "lat", "lon"];
    const TWELVE: [f32; 12] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0];

    fn ramp() -> Writer {
        let mut writer = Writer::new(NAMES);
        let id = writer
            .builder
            .add_variable::<f32>("u", &writer.over())
            .unwrap();
        writer.builder.write_variable(id, &TWELVE).unwrap();
        writer.describe(id, "units", characters("m/s"));
        writer
    }

    fn close(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() <= tolerance,
            "{found} instead of {expected}"
        );
    }

    #[test]
    fn the_built_in_fields_are_three_years_of_winds_at_a_prime_number_of_latitudes() {
        let fields = Fields::built_in().unwrap();
        assert_eq!(fields.seasons.len(), 36);
        assert_eq!((fields.latitudes.len(), fields.longitudes.len()), (73, 48));
        assert_eq!((fields.latitudes[0], fields.latitudes[72]), (-90.0, 90.0));
        assert_eq!((fields.longitudes[0], fields.longitudes[1]), (20.0, 27.5));
        // The middle of January, and the middle of February.
        close(fields.seasons[0].fract(), 15.8 / 365.0, 2.0 / 365.0);
        close(fields.seasons[1].fract(), 46.2 / 365.0, 2.0 / 365.0);
        // As another program reads the file: mean, deviation, and single values of the original.
        let [east, north] = &fields.variables[..] else {
            panic!("{:?}", fields.variables);
        };
        for (variable, mean, deviation) in [
            (east, 0.154_185_3, 4.396_533_3),
            (north, -0.074_809_6, 2.637_466_4),
        ] {
            close(variable.mean, mean, 1e-6);
            close(variable.deviation, deviation, 1e-6);
            assert_eq!((variable.missing, variable.units.as_str()), (0, "m/s"));
        }
        let metres =
            |value: f32, variable: &Variable| f64::from(value) * variable.deviation + variable.mean;
        // Packing rounds to 0.001 m/s; f32 is finer.
        close(metres(fields.point(0, 0, 0)[0], east), 0.897_172, 6e-4);
        close(metres(fields.point(0, 0, 0)[1], north), -1.045_574, 6e-4);
        close(metres(fields.point(5, 36, 2)[0], east), 3.208, 6e-4);
        close(metres(fields.point(35, 72, 47)[1], north), 3.311, 6e-4);
    }

    #[test]
    fn values_lie_variable_by_variable_at_each_point_and_are_normalised() {
        let mut writer = ramp();
        let id = writer
            .builder
            .add_variable::<i32>("v", &writer.over())
            .unwrap();
        let squares: Vec<i32> = (0..12).map(|i| i * i).collect();
        writer.builder.write_variable(id, &squares).unwrap();
        let fields = writer.decode(&["v", "u"]).unwrap();
        assert_eq!(fields.variables[1].name, "u");
        close(fields.variables[1].mean, 5.5, 1e-12);
        close(
            fields.variables[1].deviation,
            (143.0_f64 / 12.0).sqrt(),
            1e-12,
        );
        for column in 0..2 {
            let values = (0..12).map(|point| f64::from(fields.values[2 * point + column]));
            let values: Vec<f64> = values.collect();
            close(values.iter().sum::<f64>() / 12.0, 0.0, 1e-6);
            close(values.iter().map(|x| x * x).sum::<f64>() / 12.0, 1.0, 1e-6);
        }
        // Time 1, latitude 0, longitude 1 is the value 7.
        let [v, u] = *fields.point(1, 0, 1) else {
            panic!("two variables");
        };
        let [of_v, of_u] = [0, 1].map(|i| &fields.variables[i]);
        close(f64::from(u) * of_u.deviation + of_u.mean, 7.0, 1e-5);
        close(f64::from(v) * of_v.deviation + of_v.mean, 49.0, 1e-4);
        // A mean year lies between the two times.
        close(fields.seasons[1] - fields.seasons[0], 1.0, 1e-12);
    }

    #[test]
    fn packed_values_are_unpacked_and_missing_ones_left_out() {
        let mut writer = Writer::new(NAMES);
        let over = writer.over();
        let id = writer.builder.add_variable::<i16>("packed", &over).unwrap();
        let stored = [10_i16, 20, -999, 30, 40, -1, 50, 60, -999, 70, 80, -1];
        writer.builder.write_variable(id, &stored).unwrap();
        writer.describe(id, "scale_factor", NcAttrValue::Doubles(vec![0.5]));
        writer.describe(id, "add_offset", NcAttrValue::Doubles(vec![100.0]));
        writer.describe(id, "_FillValue", NcAttrValue::Shorts(vec![-999]));
        writer.describe(id, "missing_value", NcAttrValue::Shorts(vec![-1]));
        let fields = writer.decode(&["packed"]).unwrap();
        let [variable] = &fields.variables[..] else {
            panic!("{:?}", fields.variables);
        };
        assert_eq!(variable.missing, 4);
        // 10, 20, … 80 have the mean 45 and the variance 525.
        close(variable.mean, 122.5, 1e-12);
        close(variable.deviation, 0.5 * 525.0_f64.sqrt(), 1e-12);
        for point in [2, 5, 8, 11] {
            assert_eq!(fields.values[point], 0.0);
        }
        let first = f64::from(fields.values[0]) * variable.deviation + variable.mean;
        close(first, 105.0, 1e-5);

        let id = writer.builder.add_variable::<f32>("u", &over).unwrap();
        let mut holes = TWELVE;
        (holes[3], holes[4]) = (f32::NAN, f32::INFINITY);
        writer.builder.write_variable(id, &holes).unwrap();
        let fields = writer.decode(&["u"]).unwrap();
        assert_eq!(fields.variables[0].missing, 2);
        assert!(fields.values.iter().all(|value| value.is_finite()));
    }

    #[test]
    fn dimensions_are_known_by_units_by_standard_names_by_axes_and_by_their_own_names() {
        let names = ["a", "b", "c"];
        let mut writer = Writer::new(names);
        let id = writer
            .builder
            .add_variable::<f32>("u", &writer.over())
            .unwrap();
        writer.builder.write_variable(id, &TWELVE).unwrap();
        assert_eq!(writer.decode(&["u"]).unwrap().latitudes, [-45.0, 0.0, 45.0]);

        for (attribute, values) in [
            ("standard_name", ["time", "latitude", "longitude"]),
            ("axis", ["T", "Y", "X"]),
        ] {
            let mut writer = Writer::empty(names);
            let coordinates = [&[0.0, 1.0][..], &[-45.0, 0.0, 45.0], &[0.0, 180.0]];
            for (index, dimension) in writer.over().into_iter().enumerate() {
                let builder = &mut writer.builder;
                let id = builder
                    .add_variable::<f64>(names[index], &[dimension])
                    .unwrap();
                builder.write_variable(id, coordinates[index]).unwrap();
                writer.describe(id, attribute, characters(values[index]));
                if index == 0 {
                    writer.describe(id, "units", characters("months since 2000-07-01"));
                } else {
                    writer.describe(id, "units", characters("degrees"));
                }
            }
            let id = writer
                .builder
                .add_variable::<f32>("u", &writer.over())
                .unwrap();
            writer.builder.write_variable(id, &TWELVE).unwrap();
            let fields = writer.decode(&["u"]).unwrap();
            assert_eq!(fields.longitudes, [0.0, 180.0], "{attribute}");
            close(fields.seasons[1], 0.5 + 1.0 / 12.0, 0.01);
        }

        let units = ["h since 1999-12-31T06:00", "degree", "degree"];
        let mut writer = Writer::with_units(["T", "Latitude", "X"], units);
        let id = writer
            .builder
            .add_variable::<f32>("u", &writer.over())
            .unwrap();
        writer.builder.write_variable(id, &TWELVE).unwrap();
        assert_eq!(writer.decode(&["u"]).unwrap().latitudes.len(), 3);
    }

    #[test]
    fn dimensions_of_length_one_are_passed_over() {
        let mut writer = ramp();
        let height = writer.builder.add_dimension("height", 1).unwrap();
        let over = [writer.time, height, writer.latitude, writer.longitude];
        let id = writer.builder.add_variable::<f32>("w", &over).unwrap();
        writer.builder.write_variable(id, &TWELVE).unwrap();
        let fields = writer.decode(&["u", "w"]).unwrap();
        let mut pairs = fields.values.chunks(2);
        assert!(pairs.all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn a_variable_that_is_not_there_is_answered_with_those_that_are() {
        let error = ramp().decode(&["u", "wind"]).unwrap_err();
        assert!(matches!(error, FieldsError::MissingVariable { .. }));
        let message = error.to_string();
        assert!(message.contains("winds.nc"), "{message}");
        assert!(
            message.contains("no variable wind; it has time, lat, lon, u"),
            "{message}"
        );
        let message = ramp().decode(&[]).unwrap_err().to_string();
        assert!(message.contains("it has time, lat, lon, u"), "{message}");
    }

    #[test]
    fn another_order_and_other_dimensions_are_refused_with_what_was_found() {
        let mut writer = ramp();
        let [time, latitude, longitude] = writer.over();
        let level = writer.builder.add_dimension("level", 2).unwrap();
        for (name, over, found) in [
            (
                "turned",
                vec![time, longitude, latitude],
                "(time: time, lon: longitude, lat: latitude)",
            ),
            (
                "flat",
                vec![latitude, longitude],
                "(lat: latitude, lon: longitude)",
            ),
            (
                "deep",
                vec![time, level, latitude, longitude],
                "(time: time, level: unknown, lat: latitude, lon: longitude)",
            ),
        ] {
            let id = writer.builder.add_variable::<f32>(name, &over).unwrap();
            let count = if name == "flat" {
                6
            } else if name == "deep" {
                24
            } else {
                12
            };
            writer
                .builder
                .write_variable(id, &vec![1.0_f32; count])
                .unwrap();
            let error = writer.decode(&[name]).unwrap_err();
            assert!(matches!(error, FieldsError::Dimensions { .. }));
            let message = error.to_string();
            for part in ["winds.nc", name, found, "(time, latitude, longitude)"] {
                assert!(message.contains(part), "{message}");
            }
        }
    }

    #[test]
    fn variables_on_different_grids_are_not_mixed() {
        let mut writer = ramp();
        let fine = writer.builder.add_dimension("y", 4).unwrap();
        let over = [writer.time, fine, writer.longitude];
        let id = writer.builder.add_variable::<f32>("w", &over).unwrap();
        writer.builder.write_variable(id, &[0.5_f32; 16]).unwrap();
        let message = writer.decode(&["u", "w"]).unwrap_err().to_string();
        assert!(
            message.contains("w runs over (time, y, lon) and u over (time, lat, lon)"),
            "{message}"
        );
        // By itself it lacks the coordinates of its rows.
        let message = writer.decode(&["w"]).unwrap_err().to_string();
        assert!(
            message.contains("dimension y has no variable of its name"),
            "{message}"
        );
    }

    #[test]
    fn times_without_a_date_and_places_off_the_sphere_are_refused() {
        for units in [
            "days",
            "fortnights since 1990-01-01",
            "days since the flood",
            "days since 1990-13-01",
        ] {
            let mut writer = Writer::with_units(NAMES, [units, "degrees_north", "degrees_east"]);
            let id = writer
                .builder
                .add_variable::<f32>("u", &writer.over())
                .unwrap();
            writer.builder.write_variable(id, &TWELVE).unwrap();
            let error = writer.decode(&["u"]).unwrap_err();
            assert!(matches!(error, FieldsError::TimeUnits { .. }), "{error}");
            assert!(error.to_string().contains(units), "{error}");
        }
        // Rows and columns of a map in metres are taken for degrees by their names, and then found to be none.
        let mut writer = Writer::empty(NAMES);
        for (name, dimension, units, values) in [
            ("time", writer.time, "d since 2000-1-1", &[0.0, 1.0][..]),
            ("lat", writer.latitude, "m", &[0.0, 90.0, 180.0]),
            ("lon", writer.longitude, "m", &[0.0, 1.0]),
        ] {
            let builder = &mut writer.builder;
            let id = builder.add_variable::<f64>(name, &[dimension]).unwrap();
            builder.write_variable(id, values).unwrap();
            writer.describe(id, "units", characters(units));
        }
        let id = writer
            .builder
            .add_variable::<f32>("u", &writer.over())
            .unwrap();
        writer.builder.write_variable(id, &TWELVE).unwrap();
        let error = writer.decode(&["u"]).unwrap_err();
        assert!(matches!(error, FieldsError::Grid { .. }), "{error}");
        assert!(error.to_string().contains("row 2 is at 180°"), "{error}");
    }

    #[test]
    fn a_variable_without_a_difference_or_without_a_value_is_refused() {
        let mut writer = Writer::new(NAMES);
        for (name, value) in [("still", 3.0_f32), ("nothing", f32::NAN)] {
            let id = writer
                .builder
                .add_variable::<f32>(name, &writer.over())
                .unwrap();
            writer.builder.write_variable(id, &[value; 12]).unwrap();
            let error = writer.decode(&[name]).unwrap_err();
            assert!(matches!(error, FieldsError::Constant { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn a_batch_holds_different_samples_with_the_fields_one_time_later() {
        let fields = Fields::built_in().unwrap();
        let batch = fields.batch(3, 6, 19, 12).unwrap();
        assert_eq!(batch.shape, [3, 6, 19, 12, 2]);
        assert_eq!(batch.grid.dims(), [3, 6, 19, 12]);
        let per_time = 19 * 12 * 2;
        let per_sample = 6 * per_time;
        assert_eq!(batch.fields.len(), 3 * per_sample);
        for sample in 0..3 {
            let start = sample * per_sample;
            assert_eq!(
                batch.fields[start + per_time..start + per_sample],
                batch.next[start..start + per_sample - per_time]
            );
        }
        // Samples begin at the times 0, 14 and 29; rows are every fourth, columns too.
        let at = |sample: usize, time: usize, row: usize, column: usize| {
            let point = ((sample * 6 + time) * 19 + row) * 12 + column;
            [
                &batch.fields[2 * point..][..2],
                &batch.next[2 * point..][..2],
            ]
        };
        assert_eq!(
            at(1, 2, 3, 5),
            [fields.point(16, 12, 20), fields.point(17, 12, 20)]
        );
        assert_eq!(
            at(2, 5, 18, 11),
            [fields.point(34, 72, 44), fields.point(35, 72, 44)]
        );
        assert!(batch.fields != fields.batch(1, 6, 19, 12).unwrap().fields);
        let whole = fields.batch(1, 35, 73, 48).unwrap();
        assert_eq!(whole.fields, fields.values[..35 * 73 * 48 * 2]);
    }

    #[test]
    fn nothing_is_made_longer_or_finer() {
        let fields = Fields::built_in().unwrap();
        let message = fields.batch(1, 36, 1, 1).unwrap_err().to_string();
        for part in ["36 times", "takes 37", "has 36", "winds"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(fields.batch(1, 35, 1, 1).is_ok());
        assert!(fields.batch(2, 35, 1, 1).is_err());
        assert!(fields.batch(1, usize::MAX, 1, 1).is_err());
        let message = fields.batch(1, 1, 74, 48).unwrap_err().to_string();
        assert!(
            message.contains("74×48") && message.contains("73×48"),
            "{message}"
        );
        assert!(matches!(
            fields.batch(1, 1, 0, 1),
            Err(FieldsError::Nothing { .. })
        ));
    }

    #[test]
    fn foreign_broken_and_absent_files_are_refused_by_name() {
        let decode = |bytes: &[u8]| Fields::decode("a.nc", bytes, &["u"]).unwrap_err();
        for bytes in [
            &b""[..],
            b"CDF",
            b"CDF\x07\0\0\0\0",
            b"\x89PNG\r\n\x1a\n",
            b"GRIB\0\0\0\0",
        ] {
            let error = decode(bytes);
            assert!(matches!(error, FieldsError::Malformed { .. }), "{error}");
            assert!(error.to_string().contains("a.nc"), "{error}");
        }
        let error = decode(b"\x89HDF\r\n\x1a\n\0\0\0\0\0\0\0\0");
        assert!(matches!(error, FieldsError::NetCdf4 { .. }), "{error}");
        assert!(
            error.to_string().contains("nccopy -k classic a.nc"),
            "{error}"
        );

        // Wherever a file is cut, it is refused and never taken for a shorter one.
        let bytes = ramp().bytes();
        for length in 0..bytes.len() {
            let error = decode(&bytes[..length]);
            assert!(error.to_string().contains("a.nc"), "{error}");
        }

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("u.nc");
        std::fs::write(&path, &bytes).unwrap();
        let fields = Fields::read(&path, &["u"]).unwrap();
        assert_eq!(fields.source, path.display().to_string());
        let missing = Fields::read(&folder.path().join("no.nc"), &["u"]).unwrap_err();
        assert!(matches!(missing, FieldsError::Unreadable { .. }));
        assert!(missing.to_string().contains("no.nc"), "{missing}");
    }
}

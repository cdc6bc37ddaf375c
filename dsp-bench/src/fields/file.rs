//! Variables over time, latitude and longitude out of a NetCDF file.
//!
//! Reads classic NetCDF (CDF-1, CDF-2, CDF-5) by the crate `netcdf-reader`, so no system library is needed. What a
//! dimension is, its coordinate variable's attributes tell, as the CF conventions have it, or else its name.

use dsp_models::weather::Grid;
use netcdf_reader::{NcDimension, NcFile, NcVariable};

use super::{Fields, FieldsError, Variable};

/// An open file and its name in errors.
pub(super) struct File {
    name: String,
    file: NcFile,
}

/// Which dimensions a variable runs over: those of time, latitude and longitude.
type Dimensions<'a> = [&'a NcDimension; 3];

impl File {
    pub(super) fn open(name: &str, bytes: &[u8]) -> Result<Self, FieldsError> {
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

    pub(super) fn fields(&self, names: &[&str]) -> Result<Fields, FieldsError> {
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

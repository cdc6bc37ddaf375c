//! Files that are as they should be, and those that are not.

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

    /// A variable over all three dimensions.
    fn add(&mut self, name: &str, values: &[f32; 12]) -> VariableId {
        let over = self.over();
        let id = self.builder.add_variable::<f32>(name, &over).unwrap();
        self.builder.write_variable(id, values).unwrap();
        id
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
    let id = writer.add("u", &TWELVE);
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
    writer.add("u", &TWELVE);
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
        writer.add("u", &TWELVE);
        let fields = writer.decode(&["u"]).unwrap();
        assert_eq!(fields.longitudes, [0.0, 180.0], "{attribute}");
        close(fields.seasons[1], 0.5 + 1.0 / 12.0, 0.01);
    }

    let units = ["h since 1999-12-31T06:00", "degree", "degree"];
    let mut writer = Writer::with_units(["T", "Latitude", "X"], units);
    writer.add("u", &TWELVE);
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
        writer.add("u", &TWELVE);
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
    writer.add("u", &TWELVE);
    let error = writer.decode(&["u"]).unwrap_err();
    assert!(matches!(error, FieldsError::Grid { .. }), "{error}");
    assert!(error.to_string().contains("row 2 is at 180°"), "{error}");
}

#[test]
fn a_variable_without_a_difference_or_without_a_value_is_refused() {
    let mut writer = Writer::new(NAMES);
    for (name, value) in [("still", 3.0_f32), ("nothing", f32::NAN)] {
        writer.add(name, &[value; 12]);
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

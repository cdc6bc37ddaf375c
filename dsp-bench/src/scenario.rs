//! What is compared: a scenario, read from a TOML file and checked whole before any work.
//!
//! `scenarios/*.toml` are compiled in and chosen by name; any other name is the path of a file.
//! An unknown key, a missing one and a value that breaks a rule are errors that name the file, the
//! key, the value and the rule.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::clip::{self, Clip, ClipError};

/// The scenarios that are compiled in: name, text.
const BUILT_IN: [(&str, &str); 2] = [
    ("default", include_str!("../scenarios/default.toml")),
    ("small", include_str!("../scenarios/small.toml")),
];

/// One comparison: the input, the model, the cases, and how long it may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// A short name, for tables and file names.
    pub name: String,
    /// One line for readers of the report.
    pub description: String,
    /// The y4m file; in the TOML relative to the TOML's folder, after [`Scenario::load`] relative to
    /// the current one. `None`: the built-in clip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<PathBuf>,
    /// Frames that a sample has, before the patch divides them.
    pub frames: usize,
    /// Rows of pixels, after cropping and scaling.
    pub height: usize,
    /// Columns of pixels, after cropping and scaling.
    pub width: usize,
    /// What becomes one token: `[frames, rows, columns]`.
    pub patch: [usize; 3],
    /// Samples, taken at different times of the clip.
    pub batch: usize,
    /// The numbers of ranks to compare.
    pub ranks: Vec<usize>,
    /// Strategies by name; `None`: all that are compiled in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategies: Option<Vec<String>>,
    /// What one repeat runs.
    pub passes: Passes,
    /// The type of every float of the model and its input.
    pub dtype: Precision,
    /// Of weights, noise, captions and timesteps.
    pub seed: u64,
    /// The largest error allowed against serial: max |Δ| / max(max |serial|, 1e-3).
    pub tolerance: f64,
    /// What the whole comparison may take, the runs that are held to serial included; the number of repeats
    /// adapts to it.
    pub time_budget_seconds: f64,
    /// Repeats that every case gets, whatever the budget.
    pub min_repeats: usize,
    /// Repeats that no case exceeds, whatever the budget.
    pub max_repeats: usize,
    /// How long a rank waits for another inside a collective.
    pub deadline_seconds: f64,
    /// The STDiT-3 to run. (Last, for TOML wants tables after values.)
    pub model: ModelSize,
}

/// The sizes of the STDiT-3 that a scenario runs; its input has three channels, red, green, blue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSize {
    /// Pairs of a spatial and a temporal block.
    pub depth: usize,
    /// Channels of a token.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the feed-forward over `hidden`.
    pub mlp_ratio: f64,
    /// Whether queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Channels of a caption token, before its projection.
    pub caption_channels: usize,
    /// Caption tokens, padding included.
    pub text_tokens: usize,
    /// Caption tokens of each sample that are not padding; `None`: all of every sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_lengths: Option<Vec<usize>>,
}

/// What one repeat runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Passes {
    /// The forward pass only.
    Forward,
    /// Forward and backward, the sum of the parameters' gradients over the ranks included.
    ForwardBackward,
}

/// The type of floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 64 bits.
    F64,
}

/// Why a scenario cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScenarioError {
    /// Neither a built-in name nor a file that can be read.
    #[error("scenario {name}: {source}; give the path of a TOML file, or one of the built-in names: {}", Scenario::built_in_names().join(", "))]
    Unreadable {
        /// What was asked for.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, an unknown or missing key, or a value of another type.
    #[error("scenario {file}: {source}")]
    Malformed {
        /// The scenario's file or built-in name.
        file: String,
        /// Line, column and what was expected.
        source: Box<toml::de::Error>,
    },
    /// A value that breaks a rule.
    #[error("scenario {file}: {key} = {value}: {rule}")]
    Rule {
        /// The scenario's file or built-in name.
        file: String,
        /// The key, with its table: `model.heads`.
        key: &'static str,
        /// The value given.
        value: String,
        /// The rule, and what to do.
        rule: String,
    },
    /// A strategy that is not compiled in, or does not exist.
    #[error("scenario {scenario}: strategies: {given:?} is not among those compiled in: {}; correct the name, or build with the feature of that name", enabled.join(", "))]
    UnknownStrategy {
        /// The scenario's name.
        scenario: String,
        /// The name given.
        given: String,
        /// The names that there are.
        enabled: Vec<String>,
    },
}

impl Scenario {
    /// The names that [`Scenario::load`] knows without a file.
    pub fn built_in_names() -> Vec<&'static str> {
        BUILT_IN.iter().map(|(name, _)| *name).collect()
    }

    /// A built-in scenario by its name, or the file at that path; checked.
    ///
    /// # Errors
    /// [`ScenarioError`] if there is no such file, it is not a scenario, or a value breaks a rule.
    pub fn load(name_or_path: &str) -> Result<Self, ScenarioError> {
        if let Some((name, text)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_path) {
            return Self::parse(name, text);
        }
        let text =
            std::fs::read_to_string(name_or_path).map_err(|source| ScenarioError::Unreadable {
                name: name_or_path.to_owned(),
                source,
            })?;
        let mut scenario = Self::parse(name_or_path, &text)?;
        if let (Some(clip), Some(folder)) = (&scenario.clip, Path::new(name_or_path).parent()) {
            scenario.clip = Some(folder.join(clip));
        }
        Ok(scenario)
    }

    /// A scenario from TOML text; `file` names it in errors; checked.
    ///
    /// # Errors
    /// As [`Scenario::load`].
    pub fn parse(file: &str, text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text).map_err(|source| ScenarioError::Malformed {
            file: file.to_owned(),
            source: Box::new(source),
        })?;
        scenario.check(file)?;
        Ok(scenario)
    }

    /// Checks every rule that needs neither the clip nor the strategies; `file` names it in errors.
    ///
    /// # Errors
    /// [`ScenarioError::Rule`], for the first rule that is broken.
    pub fn check(&self, file: &str) -> Result<(), ScenarioError> {
        let rule = |holds: bool, key, value: &dyn std::fmt::Debug, rule: String| {
            if holds {
                Ok(())
            } else {
                Err(ScenarioError::Rule {
                    file: file.to_owned(),
                    key,
                    value: format!("{value:?}"),
                    rule,
                })
            }
        };
        let at_least_one = || "must be at least 1".to_owned();

        rule(
            !self.name.trim().is_empty(),
            "name",
            &self.name,
            "must not be empty".into(),
        )?;
        for (key, value) in [
            ("frames", self.frames),
            ("height", self.height),
            ("width", self.width),
            ("batch", self.batch),
            ("model.depth", self.model.depth),
            ("model.hidden", self.model.hidden),
            ("model.heads", self.model.heads),
            ("model.caption_channels", self.model.caption_channels),
            ("model.text_tokens", self.model.text_tokens),
            ("min_repeats", self.min_repeats),
        ] {
            rule(value > 0, key, &value, at_least_one())?;
        }
        rule(
            self.patch.iter().all(|&side| side > 0),
            "patch",
            &self.patch,
            "each side must be at least 1".into(),
        )?;
        for (key, value, side) in [
            ("frames", self.frames, self.patch[0]),
            ("height", self.height, self.patch[1]),
            ("width", self.width, self.patch[2]),
        ] {
            rule(
                value.is_multiple_of(side),
                key,
                &value,
                format!(
                    "must be a multiple of the patch's side {side}, e.g. {}",
                    (value / side).max(1) * side
                ),
            )?;
        }

        let ModelSize { hidden, heads, .. } = self.model;
        rule(
            hidden.is_multiple_of(heads),
            "model.hidden",
            &hidden,
            format!(
                "must be a multiple of model.heads = {heads}, for a head has hidden/heads channels"
            ),
        )?;
        rule(
            (hidden / heads).is_multiple_of(2),
            "model.hidden",
            &hidden,
            format!(
                "gives heads of {} channels; they must be even, for rotary positions turn pairs",
                hidden / heads
            ),
        )?;
        rule(
            hidden.is_multiple_of(4),
            "model.hidden",
            &hidden,
            "must be a multiple of 4, for the position embedding has sine and cosine of rows and columns".into(),
        )?;
        let wide = self.model.mlp_ratio * hidden as f64;
        rule(
            wide.is_finite() && wide >= 1.0,
            "model.mlp_ratio",
            &self.model.mlp_ratio,
            "must give a feed-forward of at least one channel; 4.0 is usual".into(),
        )?;
        if let Some(lengths) = &self.model.text_lengths {
            rule(
                lengths.len() == self.batch,
                "model.text_lengths",
                lengths,
                format!(
                    "must have one length for each of the batch = {} samples",
                    self.batch
                ),
            )?;
            rule(
                lengths
                    .iter()
                    .all(|length| (1..=self.model.text_tokens).contains(length)),
                "model.text_lengths",
                lengths,
                format!(
                    "each must lie in 1..={}, model.text_tokens",
                    self.model.text_tokens
                ),
            )?;
        }

        rule(
            !self.ranks.is_empty(),
            "ranks",
            &self.ranks,
            "must name at least one number".into(),
        )?;
        let unique = |i: usize| !self.ranks[..i].contains(&self.ranks[i]);
        rule(
            (0..self.ranks.len()).all(|i| self.ranks[i] > 0 && unique(i)),
            "ranks",
            &self.ranks,
            "each must be at least 1 and stand there once".into(),
        )?;
        if let Some(strategies) = &self.strategies {
            rule(
                !strategies.is_empty(),
                "strategies",
                strategies,
                "must name at least one; leave the key out for all that are compiled in".into(),
            )?;
        }

        rule(
            self.max_repeats >= self.min_repeats,
            "max_repeats",
            &self.max_repeats,
            format!("must be at least min_repeats = {}", self.min_repeats),
        )?;
        for (key, value) in [
            ("tolerance", self.tolerance),
            ("time_budget_seconds", self.time_budget_seconds),
            ("deadline_seconds", self.deadline_seconds),
        ] {
            rule(
                value.is_finite() && value > 0.0,
                key,
                &value,
                "must be above 0 and finite".into(),
            )?;
        }
        Ok(())
    }

    /// The strategies to compare, out of those that are compiled in.
    ///
    /// # Errors
    /// [`ScenarioError::UnknownStrategy`] if one is named that is not there.
    pub fn chosen_strategies(&self, enabled: &[&str]) -> Result<Vec<String>, ScenarioError> {
        let owned = || enabled.iter().map(|&name| name.to_owned()).collect();
        let Some(chosen) = &self.strategies else {
            return Ok(owned());
        };
        match chosen.iter().find(|name| !enabled.contains(&name.as_str())) {
            Some(given) => Err(ScenarioError::UnknownStrategy {
                scenario: self.name.clone(),
                given: given.clone(),
                enabled: owned(),
            }),
            None => Ok(chosen.clone()),
        }
    }

    /// Tokens along time, rows and columns.
    pub fn grid(&self) -> [usize; 3] {
        [
            self.frames / self.patch[0],
            self.height / self.patch[1],
            self.width / self.patch[2],
        ]
    }

    /// Tokens along time: T.
    pub fn temporal_tokens(&self) -> usize {
        self.grid()[0]
    }

    /// Tokens of a frame: S.
    pub fn spatial_tokens(&self) -> usize {
        self.grid()[1] * self.grid()[2]
    }

    /// Caption tokens of each sample that are not padding.
    pub fn text_lengths(&self) -> Vec<usize> {
        self.model
            .text_lengths
            .clone()
            .unwrap_or_else(|| vec![self.model.text_tokens; self.batch])
    }

    /// The clip's name for tables and reports.
    pub fn clip_name(&self) -> String {
        match &self.clip {
            Some(path) => path.display().to_string(),
            None => clip::BUILT_IN_NAME.to_owned(),
        }
    }

    /// Reads the clip that the scenario names, or the built-in one, whole.
    ///
    /// # Errors
    /// As [`Clip::read`].
    pub fn read_clip(&self) -> Result<Clip, ClipError> {
        match &self.clip {
            Some(path) => Clip::read(path),
            None => Clip::built_in(),
        }
    }

    /// The pixels that the scenario asks for: `[B, 3, T, H, W]`, row-major, in [−1, 1].
    ///
    /// # Errors
    /// As [`Clip::read`] and [`Clip::batch`].
    pub fn pixels(&self) -> Result<Vec<f32>, ClipError> {
        self.read_clip()?
            .batch(self.batch, self.frames, self.height, self.width)
    }
}

impl Passes {
    /// In a sentence.
    pub fn label(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::ForwardBackward => "forward + backward",
        }
    }
}

impl Precision {
    /// As Burn and Rust call it.
    pub fn label(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
        }
    }

    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = BUILT_IN[1].1;

    fn broken(from: &str, to: &str) -> String {
        assert!(SMALL.contains(from), "{from} is not in small.toml");
        Scenario::parse("mine.toml", &SMALL.replacen(from, to, 1))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_built_in_scenarios_are_right_and_find_their_pixels() {
        for (name, _) in BUILT_IN {
            let scenario = Scenario::load(name).unwrap();
            assert_eq!(scenario.name, name);
            let pixels = scenario.pixels().unwrap();
            assert_eq!(
                pixels.len(),
                scenario.batch * 3 * scenario.frames * scenario.height * scenario.width
            );
        }
    }

    #[test]
    fn the_default_scenario_has_the_real_width_of_stdit3() {
        let scenario = Scenario::load("default").unwrap();
        assert_eq!((scenario.model.hidden, scenario.model.heads), (1152, 16));
        assert!(scenario.model.depth >= 1);
        assert!(scenario.temporal_tokens() >= 16);
        assert!(scenario.spatial_tokens() >= 256);
    }

    #[test]
    fn a_scenario_survives_being_written_and_read_again() {
        for (name, _) in BUILT_IN {
            let scenario = Scenario::load(name).unwrap();
            let text = toml::to_string(&scenario).unwrap();
            assert_eq!(Scenario::parse(name, &text).unwrap(), scenario);
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file() {
        let error = broken("batch = 2", "batch = 2\nbatches = 3");
        assert!(
            error.contains("mine.toml") && error.contains("batches"),
            "{error}"
        );
        let error = broken("heads = 4", "heads = 4\nhaeds = 4");
        assert!(error.contains("haeds"), "{error}");
    }

    #[test]
    fn a_missing_key_and_a_wrong_type_are_named() {
        assert!(broken("batch = 2", "").contains("batch"));
        assert!(broken("dtype = \"f32\"", "dtype = \"f16\"").contains("f16"));
        assert!(broken("passes = \"forward-backward\"", "passes = \"both\"").contains("both"));
    }

    #[test]
    fn every_broken_rule_names_key_value_and_rule() {
        for (from, to, key) in [
            ("name = \"small\"", "name = \" \"", "name"),
            ("frames = 8", "frames = 0", "frames = 0"),
            ("height = 32", "height = 33", "height = 33"),
            ("patch = [1, 8, 8]", "patch = [1, 0, 8]", "patch"),
            ("heads = 4", "heads = 5", "model.hidden = 64"),
            ("heads = 4", "heads = 64", "model.hidden = 64"),
            ("hidden = 64", "hidden = 8", "ok"),
            (
                "hidden = 64\nheads = 4",
                "hidden = 10\nheads = 1",
                "model.hidden = 10",
            ),
            ("mlp_ratio = 4.0", "mlp_ratio = 0.0", "model.mlp_ratio"),
            (
                "text_lengths = [12, 5]",
                "text_lengths = [12]",
                "model.text_lengths",
            ),
            (
                "text_lengths = [12, 5]",
                "text_lengths = [13, 5]",
                "model.text_lengths",
            ),
            (
                "text_lengths = [12, 5]",
                "text_lengths = [0, 5]",
                "model.text_lengths",
            ),
            ("ranks = [1, 2, 3, 4]", "ranks = []", "ranks"),
            ("ranks = [1, 2, 3, 4]", "ranks = [1, 2, 2]", "ranks"),
            ("ranks = [1, 2, 3, 4]", "ranks = [0]", "ranks"),
            (
                "ranks = [1, 2, 3, 4]",
                "ranks = [1]\nstrategies = []",
                "strategies",
            ),
            ("max_repeats = 9", "max_repeats = 2", "max_repeats = 2"),
            ("tolerance = 2e-5", "tolerance = 0.0", "tolerance"),
            ("tolerance = 2e-5", "tolerance = nan", "tolerance"),
            (
                "deadline_seconds = 30.0",
                "deadline_seconds = -1.0",
                "deadline_seconds",
            ),
        ] {
            if key == "ok" {
                Scenario::parse("mine.toml", &SMALL.replacen(from, to, 1)).unwrap();
                continue;
            }
            let error = broken(from, to);
            assert!(
                error.contains("mine.toml") && error.contains(key),
                "{to}: {error}"
            );
        }
    }

    #[test]
    fn a_clip_is_looked_for_beside_its_scenario() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        std::fs::write(&path, format!("clip = \"my.y4m\"\n{SMALL}")).unwrap();
        let scenario = Scenario::load(path.to_str().unwrap()).unwrap();
        assert_eq!(scenario.clip, Some(folder.path().join("my.y4m")));
        let error = scenario.pixels().unwrap_err().to_string();
        assert!(error.contains("my.y4m"), "{error}");
    }

    #[test]
    fn a_name_that_is_neither_built_in_nor_a_file_lists_the_built_in_ones() {
        let error = Scenario::load("defualt").unwrap_err().to_string();
        assert!(
            error.contains("defualt") && error.contains("default, small"),
            "{error}"
        );
    }

    #[test]
    fn strategies_are_all_enabled_ones_unless_named() {
        let mut scenario = Scenario::load("small").unwrap();
        assert_eq!(
            scenario.chosen_strategies(&["dsp", "ulysses"]).unwrap(),
            ["dsp", "ulysses"]
        );
        scenario.strategies = Some(vec!["dsp".into()]);
        assert_eq!(
            scenario.chosen_strategies(&["dsp", "ulysses"]).unwrap(),
            ["dsp"]
        );
        scenario.strategies = Some(vec!["dps".into()]);
        let error = scenario
            .chosen_strategies(&["dsp", "ulysses"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("dps") && error.contains("dsp, ulysses"),
            "{error}"
        );
    }
}

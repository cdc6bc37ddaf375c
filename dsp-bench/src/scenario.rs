//! What is compared: a scenario, read from a TOML file and checked whole before any work.
//!
//! `scenarios/*.toml` are compiled in and chosen by name; any other name is the path of a file.
//! An unknown key, a missing one and a value that breaks a rule are errors that name the file, the
//! key, the value and the rule.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use burn::tensor::DType;
use dsp_core::launch::LONGEST_TIMEOUT;
use dsp_models::language::Layers;
use dsp_models::training::{Mesh, Reduce};
use serde::{Deserialize, Serialize};

use crate::subject::{LanguageSizes, Sizes, VideoSizes, VitSizes, WeatherSizes};

// What is larger than these is a slip of the pen, not a model: it is refused before any work, and what is computed with
// the sizes that are left stays far below 2^64.

/// The most samples of a batch.
pub(crate) const MOST_SAMPLES: usize = 1 << 20;
/// The longest extent of a sample: tokens, frames, pixels, times, latitudes.
pub(crate) const LONGEST: usize = 1 << 24;
/// The most channels of a token, of its caption and of a feed-forward, heads, classes, and tokens of a caption.
pub(crate) const WIDEST: usize = 1 << 18;
/// The most layers.
pub(crate) const DEEPEST: usize = 1 << 16;
/// The most compute threads of a rank.
const MOST_THREADS: usize = 1 << 12;

/// The scenarios that are compiled in: name, text.
const BUILT_IN: [(&str, &str); 9] = [
    ("default", include_str!("../scenarios/default.toml")),
    ("small", include_str!("../scenarios/small.toml")),
    ("lm", include_str!("../scenarios/lm.toml")),
    ("linear-lm", include_str!("../scenarios/linear-lm.toml")),
    ("hybrid", include_str!("../scenarios/hybrid.toml")),
    ("vit", include_str!("../scenarios/vit.toml")),
    ("weather", include_str!("../scenarios/weather.toml")),
    ("pair", include_str!("../scenarios/pair.toml")),
    ("llama-block", include_str!("../scenarios/llama-block.toml")),
];

/// One comparison: the model and its input, the cases, and how long it may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// A short name, for tables and file names.
    pub name: String,
    /// One line for readers of the report.
    pub description: String,
    /// Samples, taken at different places of the input.
    pub batch: usize,
    /// The numbers of ranks to compare.
    pub ranks: Vec<usize>,
    /// The compute threads of each rank; `None`: the ranks share the cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads_per_rank: Option<usize>,
    /// Strategies by name, mixtures joined by `+`; `None`: all that are compiled in, and [`mixtures`](Self::mixtures).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategies: Option<Vec<String>>,
    /// The mixtures that are compared where `strategies` names none. One with a part that is not compiled in is
    /// refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixtures: Vec<String>,
    /// What one repeat runs.
    pub passes: Passes,
    /// When the ranks sum the parameters' gradients.
    #[serde(default = "at_once")]
    pub reduce: Reduce,
    /// In how many parts a switch of the residual stream goes after a sub-layer, one on its way while the next is
    /// computed.
    #[serde(default = "one")]
    pub switch_parts: NonZeroUsize,
    /// The type of every float of the model and its input.
    pub dtype: Precision,
    /// Of weights and whatever else is random.
    pub seed: u64,
    /// The largest error allowed against serial: max |Δ| / max(max |serial|, 1e-3).
    pub tolerance: f64,
    /// What the whole comparison may take, the runs that are held to serial included; the number of rounds, in each
    /// of which every case is timed once, adapts to it.
    pub time_budget_seconds: f64,
    /// Rounds that there are, whatever the budget.
    pub min_repeats: usize,
    /// Rounds that are not exceeded, whatever the budget.
    pub max_repeats: usize,
    /// How long a rank waits for another inside a collective.
    pub deadline_seconds: f64,
    /// The model to run, and its input. (Last, for TOML wants tables after values.)
    pub model: ModelSizes,
}

fn at_once() -> Reduce {
    Reduce::AtOnce
}

pub(crate) fn one() -> NonZeroUsize {
    NonZeroUsize::MIN
}

/// The models that there are, each with its own keys in the table `[model]`, which `kind` tells apart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ModelSizes {
    /// STDiT-3 on a clip.
    Video(VideoSizes),
    /// A causal language model on text.
    Language(LanguageSizes),
    /// A vision transformer on frames of a clip.
    Vit(VitSizes),
    /// An axial model on weather fields.
    Weather(WeatherSizes),
}

/// A kind of model, as it is called in `[model]` and on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ModelKind {
    /// STDiT-3, the video transformer: time and space.
    Video,
    /// A language model of LLaMA's kind: tokens.
    Lm,
    /// A language model of linear attention with decay.
    LinearLm,
    /// A language model with both kinds of layers.
    Hybrid,
    /// A vision transformer: patches.
    Vit,
    /// An axial weather model: time, latitude and longitude.
    Weather,
}

impl ModelKind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Video => "video",
            Self::Lm => "lm",
            Self::LinearLm => "linear-lm",
            Self::Hybrid => "hybrid",
            Self::Vit => "vit",
            Self::Weather => "weather",
        }
    }

    /// The name of the built-in scenario that runs it.
    fn scenario(self) -> &'static str {
        match self {
            Self::Video => "default",
            other => other.name(),
        }
    }
}

impl ModelSizes {
    /// Which one it is.
    pub fn kind(&self) -> ModelKind {
        match self {
            Self::Video(_) => ModelKind::Video,
            Self::Language(sizes) => match sizes.layers {
                Layers::Softmax => ModelKind::Lm,
                Layers::Linear => ModelKind::LinearLm,
                Layers::Hybrid { .. } => ModelKind::Hybrid,
            },
            Self::Vit(_) => ModelKind::Vit,
            Self::Weather(_) => ModelKind::Weather,
        }
    }

    /// Its sizes, whatever it is.
    pub fn sizes(&self) -> &dyn Sizes {
        match self {
            Self::Video(sizes) => sizes,
            Self::Language(sizes) => sizes,
            Self::Vit(sizes) => sizes,
            Self::Weather(sizes) => sizes,
        }
    }

    pub(crate) fn sizes_mut(&mut self) -> &mut dyn Sizes {
        match self {
            Self::Video(sizes) => sizes,
            Self::Language(sizes) => sizes,
            Self::Vit(sizes) => sizes,
            Self::Weather(sizes) => sizes,
        }
    }
}

/// What one repeat runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
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
    #[error("{place}: {key} = {value}: {rule}")]
    Rule {
        /// Where it stands: the scenario, or a run's file.
        place: String,
        /// The key, with its table: `model.heads`.
        key: &'static str,
        /// The value given.
        value: String,
        /// The rule, and what to do.
        rule: String,
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
        let file = scenario.model.sizes_mut().file();
        if let (Some(file), Some(folder)) = (file, Path::new(name_or_path).parent()) {
            *file = folder.join(&*file);
        }
        Ok(scenario)
    }

    /// The built-in scenario of a model.
    ///
    /// # Errors
    /// Never, unless a built-in scenario is wrong.
    pub fn of_model(kind: ModelKind) -> Result<Self, ScenarioError> {
        Self::load(kind.scenario())
    }

    /// The same comparison of another model, in the sizes of its built-in scenario; unchanged if the model is the
    /// one that it has.
    ///
    /// # Errors
    /// Never, unless a built-in scenario is wrong.
    pub fn with_model(self, kind: ModelKind) -> Result<Self, ScenarioError> {
        if self.model.kind() == kind {
            return Ok(self);
        }
        let of_model = Self::of_model(kind)?;
        Ok(Self {
            name: format!("{}, {}", self.name, kind.name()),
            description: of_model.description,
            batch: of_model.batch,
            mixtures: of_model.mixtures,
            model: of_model.model,
            ..self
        })
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

    /// Checks every rule that needs neither the input nor the strategies; `file` names it in errors.
    ///
    /// # Errors
    /// [`ScenarioError::Rule`], for the first rule that is broken.
    pub fn check(&self, file: &str) -> Result<(), ScenarioError> {
        let place = format!("scenario {file}");
        let rules = Rules { place: &place };
        rules.hold(
            !self.name.trim().is_empty(),
            "name",
            &self.name,
            "must not be empty",
        )?;
        rules.at_least_one(&[("min_repeats", self.min_repeats)])?;
        rules.within(MOST_SAMPLES, &[("batch", self.batch)])?;
        self.model.sizes().check(self.batch, &rules)?;

        rules.hold(
            !self.ranks.is_empty(),
            "ranks",
            &self.ranks,
            "must name at least one number",
        )?;
        let unique = |i: usize| !self.ranks[..i].contains(&self.ranks[i]);
        let possible = |ranks| (1..=Mesh::MOST_RANKS).contains(&ranks);
        rules.hold(
            (0..self.ranks.len()).all(|i| possible(self.ranks[i]) && unique(i)),
            "ranks",
            &self.ranks,
            format!(
                "each must be at least 1 and at most {}, and stand there once",
                Mesh::MOST_RANKS
            ),
        )?;
        if let Some(threads) = self.threads_per_rank {
            rules.within(MOST_THREADS, &[("threads_per_rank", threads)])?;
        }
        if let Some(strategies) = &self.strategies {
            rules.hold(
                !strategies.is_empty(),
                "strategies",
                strategies,
                "must name at least one; leave the key out for all that are compiled in",
            )?;
            let unique = |i: usize| !strategies[..i].contains(&strategies[i]);
            rules.hold(
                (0..strategies.len()).all(unique),
                "strategies",
                strategies,
                "each must stand there once",
            )?;
        }

        rules.hold(
            self.max_repeats >= self.min_repeats,
            "max_repeats",
            &self.max_repeats,
            format!("must be at least min_repeats = {}", self.min_repeats),
        )?;
        for (key, value) in [
            ("tolerance", self.tolerance),
            ("time_budget_seconds", self.time_budget_seconds),
        ] {
            rules.hold(
                value.is_finite() && value > 0.0,
                key,
                &value,
                "must be above 0 and finite",
            )?;
        }
        rules.seconds("deadline_seconds", self.deadline_seconds)
    }

    /// The strategies to compare, by name: those that are chosen, or all of `enabled` and then the mixtures.
    pub fn chosen_strategies(&self, enabled: &[&str]) -> Vec<String> {
        let all = || enabled.iter().map(|&name| name.to_owned());
        match &self.strategies {
            Some(chosen) => chosen.clone(),
            None => all().chain(self.mixtures.clone()).collect(),
        }
    }
}

/// Holds values to rules: what breaks one is an error that names place, key, value and rule.
#[derive(Debug)]
pub struct Rules<'a> {
    pub(crate) place: &'a str,
}

impl Rules<'_> {
    /// A rule.
    ///
    /// # Errors
    /// [`ScenarioError::Rule`] unless it holds.
    pub fn hold(
        &self,
        holds: bool,
        key: &'static str,
        value: &dyn std::fmt::Debug,
        rule: impl Into<String>,
    ) -> Result<(), ScenarioError> {
        if holds {
            return Ok(());
        }
        Err(ScenarioError::Rule {
            place: self.place.to_owned(),
            key,
            value: format!("{value:?}"),
            rule: rule.into(),
        })
    }

    /// A time to wait for.
    pub(crate) fn seconds(&self, key: &'static str, value: f64) -> Result<(), ScenarioError> {
        let waits = |time: Duration| !time.is_zero() && time <= LONGEST_TIMEOUT;
        self.hold(
            Duration::try_from_secs_f64(value).is_ok_and(waits),
            key,
            &value,
            format!(
                "must be above 0, and at most a year ({})",
                LONGEST_TIMEOUT.as_secs()
            ),
        )
    }

    /// Numbers of which none may be 0.
    pub(crate) fn at_least_one(
        &self,
        numbers: &[(&'static str, usize)],
    ) -> Result<(), ScenarioError> {
        let mut all = numbers.iter();
        all.try_for_each(|(key, value)| self.hold(*value > 0, key, value, "must be at least 1"))
    }

    /// Numbers of which each is at least 1 and at most `most`.
    pub(crate) fn within(
        &self,
        most: usize,
        numbers: &[(&'static str, usize)],
    ) -> Result<(), ScenarioError> {
        let rule = || format!("must be at least 1 and at most {most}");
        let mut all = numbers.iter();
        all.try_for_each(|(key, value)| self.hold((1..=most).contains(value), key, value, rule()))
    }

    /// A length that `side` must divide.
    pub(crate) fn multiple(
        &self,
        key: &'static str,
        value: usize,
        side: usize,
        what: &str,
    ) -> Result<(), ScenarioError> {
        let near = (value / side).max(1) * side;
        let rule = format!("must be a multiple of {what} {side}, e.g. {near}");
        self.hold(value.is_multiple_of(side), key, &value, rule)
    }

    /// `model.hidden` and `model.heads`.
    pub(crate) fn heads(&self, hidden: usize, heads: usize) -> Result<(), ScenarioError> {
        self.within(WIDEST, &[("model.hidden", hidden), ("model.heads", heads)])?;
        self.hold(
            hidden.is_multiple_of(heads),
            "model.hidden",
            &hidden,
            format!(
                "must be a multiple of model.heads = {heads}, for a head has hidden/heads channels"
            ),
        )
    }

    /// The same where rotary positions turn pairs of a head's channels.
    pub(crate) fn rotary_heads(&self, hidden: usize, heads: usize) -> Result<(), ScenarioError> {
        self.heads(hidden, heads)?;
        self.hold(
            (hidden / heads).is_multiple_of(2),
            "model.hidden",
            &hidden,
            format!(
                "gives heads of {} channels; they must be even, for rotary positions turn pairs",
                hidden / heads
            ),
        )
    }

    /// `model.mlp_ratio`.
    pub(crate) fn mlp_ratio(&self, ratio: f64, hidden: usize) -> Result<(), ScenarioError> {
        let wide = ratio * hidden as f64;
        self.hold(
            (1.0..=WIDEST as f64).contains(&wide),
            "model.mlp_ratio",
            &ratio,
            format!(
                "must give a feed-forward of at least one channel and at most {WIDEST}; 4.0 is usual"
            ),
        )
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

    /// As Burn has it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F64 => DType::F64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = BUILT_IN[1].1;
    const WEATHER: &str = include_str!("../scenarios/weather.toml");
    const LANGUAGE: &str = include_str!("../scenarios/lm.toml");
    const VIT: &str = include_str!("../scenarios/vit.toml");

    fn broken(from: &str, to: &str) -> String {
        assert!(SMALL.contains(from), "{from} is not in small.toml");
        Scenario::parse("mine.toml", &SMALL.replacen(from, to, 1))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_built_in_scenarios_are_right_and_find_their_input() {
        for (name, _) in BUILT_IN {
            let scenario = Scenario::load(name).unwrap();
            assert_eq!(scenario.name, name);
            let shape = scenario.model.sizes().subject(&scenario).unwrap().shape();
            assert_eq!(shape.batch, scenario.batch);
            shape.check().unwrap();
        }
    }

    #[test]
    fn the_default_scenario_has_the_real_width_of_stdit3() {
        let ModelSizes::Video(sizes) = Scenario::load("default").unwrap().model else {
            panic!("the default is a video");
        };
        assert_eq!((sizes.hidden, sizes.heads), (1152, 16));
        assert!(sizes.depth >= 1);
        assert!(sizes.temporal_tokens() >= 16);
        assert!(sizes.spatial_tokens() >= 256);
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
            ("frames = 8", "frames = 0", "model.frames = 0"),
            ("height = 32", "height = 33", "model.height = 33"),
            ("patch = [1, 8, 8]", "patch = [1, 0, 8]", "model.patch"),
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
                "ranks = [4611686018427387904]",
                "at most 4096",
            ),
            (
                "ranks = [1, 2, 3, 4]",
                "ranks = [1]\nthreads_per_rank = 1000000",
                "threads_per_rank = 1000000",
            ),
            (
                "ranks = [1, 2, 3, 4]",
                "ranks = [1]\nstrategies = [\"dsp\", \"ring\", \"dsp\"]",
                "each must stand there once",
            ),
            ("batch = 2", "batch = 9000000000000000000", "batch = 9"),
            ("hidden = 64", "hidden = 640000000", "model.hidden = 64"),
            ("frames = 8", "frames = 8000000000", "model.frames = 8"),
            ("mlp_ratio = 4.0", "mlp_ratio = 1e18", "model.mlp_ratio"),
            (
                "text_lengths = [12, 5]",
                "text_lengths = [9000000000000000000, 5]",
                "model.text_lengths",
            ),
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
            (
                "deadline_seconds = 30.0",
                "deadline_seconds = 1e20",
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
    fn an_input_is_looked_for_beside_its_scenario() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        for (text, key, file) in [
            (SMALL, "clip", "my.y4m"),
            (LANGUAGE, "text", "my.txt"),
            (VIT, "clip", "my.y4m"),
            (WEATHER, "fields", "my.nc"),
        ] {
            let text = text.replacen("kind =", &format!("{key} = {file:?}\nkind ="), 1);
            std::fs::write(&path, text).unwrap();
            let mut scenario = Scenario::load(path.to_str().unwrap()).unwrap();
            let found = scenario.model.sizes_mut().file().clone();
            assert_eq!(found, Some(folder.path().join(file)));
            let error = scenario.model.sizes().subject(&scenario).unwrap_err();
            assert!(error.to_string().contains(file), "{error}");
        }
    }

    #[test]
    fn another_model_keeps_the_cases_and_brings_its_own_sizes_and_mixtures() {
        let small = Scenario::load("small").unwrap();
        assert_eq!(small.clone().with_model(ModelKind::Video).unwrap(), small);
        let weather = Scenario::of_model(ModelKind::Weather).unwrap();
        let both = small.clone().with_model(ModelKind::Weather).unwrap();
        assert_eq!(both.name, "small, weather");
        assert_eq!((both.ranks, both.seed), (small.ranks, small.seed));
        assert_eq!(both.model, weather.model);
        assert_eq!(both.mixtures, weather.mixtures);
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
    fn strategies_are_all_enabled_ones_and_the_mixtures_unless_named() {
        let mut scenario = Scenario::load("small").unwrap();
        scenario.mixtures = vec!["dsp+ring".into()];
        let chosen = |scenario: &Scenario| scenario.chosen_strategies(&["dsp", "ulysses"]);
        assert_eq!(chosen(&scenario), ["dsp", "ulysses", "dsp+ring"]);
        scenario.strategies = Some(vec!["ulysses+dsp".into()]);
        assert_eq!(chosen(&scenario), ["ulysses+dsp"]);
    }
}

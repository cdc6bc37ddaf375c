//! What a command line says of a training. `dsp train` reads it, and so does who starts its ranks.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use dsp_models::training::Mesh;

use super::config::{Change, RunConfig, RunConfigError};
use super::folder::CONFIG;
use super::run::Begin;
use crate::devices::DeviceChoice;
use crate::scenario::ModelKind;

/// The arguments of `dsp train`.
#[derive(Debug, Clone, clap::Args)]
pub struct TrainArgs {
    /// The model, in the sizes of its built-in run and on the built-in data.
    #[arg(long, value_enum, required_unless_present_any = ["config", "resume"])]
    pub model: Option<ModelKind>,
    /// A run as a TOML file, as every run writes it beside its results.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "resume"])]
    pub config: Option<PathBuf>,
    /// Go on with the run in this folder, from its last checkpoint. Strategy, mesh and steps may be other ones.
    #[arg(long, value_name = "FOLDER", conflicts_with = "model")]
    pub resume: Option<PathBuf>,
    /// Go on from the checkpoint of this step instead of the last one; later ones are removed.
    #[arg(long, value_name = "STEP", requires = "resume")]
    pub from_step: Option<u64>,
    /// Where the run goes: configuration, metrics, checkpoints, what was learnt. By default dsp-run-MODEL.
    #[arg(long, value_name = "FOLDER", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// The strategy by name, a mixture's parts joined by +.
    #[arg(long, value_name = "NAME")]
    pub strategy: Option<String>,
    /// Where the ranks compute: flex (the processor), wgpu, cuda:0, or cuda:0,1 in turn. Under NCCL each
    /// has its GPU.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Ranks that share a sequence: --ranks 4 is --mesh sp=4.
    #[arg(long, value_name = "N", conflicts_with = "mesh", value_parser = ranks())]
    pub ranks: Option<usize>,
    /// Ranks that share a sequence, times replicas with samples of their own, e.g. sp=2,dp=2.
    #[arg(long)]
    pub mesh: Option<Mesh>,
    /// A file of one's own to learn from: y4m for video and vit, text for language models, NetCDF for weather.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Steps in all.
    #[arg(long, value_parser = of_toml())]
    pub steps: Option<u64>,
    /// What ranks look for in all that passes them: finite names the first rank and layer that have a NaN or an infinity,
    /// and reads all activations once more each way for it; nothing, if not said.
    #[arg(long, value_name = "WHAT")]
    pub watch: Option<String>,
    /// Of all that is random.
    #[arg(long, value_parser = of_toml())]
    pub seed: Option<u64>,
    /// Any other value of the run, e.g. training.learning_rate=0.001; may stand several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Change>,
}

/// The numbers that a configuration's file can hold.
fn of_toml() -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(..=i64::MAX as u64)
}

fn ranks() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=Mesh::MOST_RANKS as u64)
}

impl TrainArgs {
    /// The whole run: a model's, a file's or a folder's, with what is said beside it.
    ///
    /// # Errors
    /// [`RunConfigError`] if there is none, or a value breaks a rule.
    pub fn run(&self) -> Result<RunConfig, RunConfigError> {
        let run = match (&self.resume, &self.config, self.model) {
            (Some(folder), ..) => RunConfig::read(&folder.join(CONFIG))?,
            (None, Some(file), _) => RunConfig::read(file)?,
            (None, None, Some(kind)) => RunConfig::of_model(kind)?,
            (None, None, None) => return Err(RunConfigError::Unnamed),
        };
        let mut run = run.with(&self.changes())?;
        if let Some(path) = &self.data {
            run.set_data(path)?;
        }
        Ok(run)
    }

    /// Where a run goes that these arguments say.
    pub fn folder(&self, run: &RunConfig) -> PathBuf {
        match self.resume.as_ref().or(self.out.as_ref()) {
            Some(folder) => folder.clone(),
            None => format!("dsp-run-{}", run.model.kind().name()).into(),
        }
    }

    /// Where it begins.
    pub fn begin(&self) -> Begin {
        match (&self.resume, self.from_step) {
            (None, _) => Begin::Fresh,
            (Some(_), None) => Begin::Latest,
            (Some(_), Some(step)) => Begin::Step(step),
        }
    }

    /// The mesh that is asked for.
    pub fn mesh(&self) -> Option<Mesh> {
        self.mesh.or(self.ranks.map(|sp| Mesh { sp, dp: 1 }))
    }

    fn changes(&self) -> Vec<Change> {
        let change = |key: &str, value: toml::Value| Change {
            key: key.to_owned(),
            value,
        };
        // None is larger: they are parsed so.
        let number = |number: u64| toml::Value::Integer(i64::try_from(number).unwrap_or(i64::MAX));
        let device = self.device.as_ref().map(ToString::to_string);
        let mut changes = Vec::new();
        changes.extend((self.strategy.clone()).map(|name| change("strategy", name.into())));
        changes.extend((self.watch.clone()).map(|what| change("watch", what.into())));
        changes.extend(device.map(|device| change("device", device.into())));
        changes.extend(
            self.steps
                .map(|steps| change("training.steps", number(steps))),
        );
        changes.extend(self.seed.map(|seed| change("training.seed", number(seed))));
        changes.extend(self.set.iter().cloned());
        // Last, for whoever starts the ranks says the mesh so.
        changes.extend(self.mesh().into_iter().flat_map(|mesh| {
            [("mesh.sp", mesh.sp), ("mesh.dp", mesh.dp)]
                .map(|(key, size)| change(key, number(size as u64)))
        }));
        changes
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: TrainArgs,
    }

    #[test]
    fn a_number_that_the_runs_file_cannot_hold_is_refused_and_not_changed() {
        let parse = |more: [&str; 2]| {
            let line = Line::try_parse_from(["dsp", "--model", "lm"].into_iter().chain(more));
            line.map(|line| line.args.run().unwrap())
        };
        let largest = i64::MAX.to_string();
        assert_eq!(
            parse(["--seed", &largest]).unwrap().training.seed,
            i64::MAX as u64
        );
        for (option, value) in [
            ("--seed", "9223372036854775808"),
            ("--steps", "18446744073709551615"),
            ("--ranks", "4611686018427387904"),
            ("--ranks", "0"),
        ] {
            let error = parse([option, value]).unwrap_err().to_string();
            assert!(error.contains(value) && error.contains(option), "{error}");
        }
    }
}

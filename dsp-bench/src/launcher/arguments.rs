//! What a rank is told: which of how many it is, where the first one is, and what it is to do.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::{Job, LauncherError};

/// The variables that say where a process stands: those of the program that started it.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

/// Which of a job's processes one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which of all.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Which of those on its machine.
    pub local: usize,
}

/// Where the first rank listens, for those engines that need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Master {
    address: String,
    port: String,
}

impl Environment {
    /// From names and values; only those that are looked at are kept.
    pub fn new(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let text = |(name, value): (OsString, OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let known = |name: &str| {
            ["OMPI_", "PMI", "SLURM_", "MASTER_"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
                || ["RANK", "WORLD_SIZE", "LOCAL_RANK"].contains(&name)
        };
        let kept = variables.into_iter().filter_map(text);
        Self(kept.filter(|(name, _)| known(name)).collect())
    }

    fn number(&self, names: &[&str]) -> Option<usize> {
        names
            .iter()
            .find_map(|name| self.0.get(*name)?.parse().ok())
    }

    /// Where the program that started this process says it stands: MPI's, Slurm's, or a launcher's variables.
    pub fn own_place(&self) -> Option<Place> {
        let rank = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "RANK"];
        let size = [
            "OMPI_COMM_WORLD_SIZE",
            "PMI_SIZE",
            "SLURM_NTASKS",
            "WORLD_SIZE",
        ];
        let local = ["OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "LOCAL_RANK"];
        let (rank, size) = (rank.iter().zip(size))
            .find_map(|(&rank, size)| Some((self.number(&[rank])?, self.number(&[size])?)))?;
        let local = self.number(&local).unwrap_or(rank);
        Some(Place { rank, size, local })
    }

    /// Where a process's ranks meet: where the first one is, as all of them were told the same; anywhere, if it is
    /// alone.
    pub fn meeting(&self, place: Place) -> Option<String> {
        let told = self.0.contains_key("MASTER_ADDR") && self.0.contains_key("MASTER_PORT");
        (told || place.size == 1).then(|| {
            let Master { address, port } = self.master();
            match address.contains(':') {
                // Of the sixth version.
                true => format!("[{address}]:{port}"),
                false => format!("{address}:{port}"),
            }
        })
    }

    /// Where the first rank is: as it was said, on Slurm's first machine, or here.
    pub(super) fn master(&self) -> Master {
        let given = |names: &[&str]| names.iter().find_map(|name| self.0.get(*name).cloned());
        Master {
            address: given(&["MASTER_ADDR", "SLURM_LAUNCH_NODE_IPADDR"])
                .unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: given(&["MASTER_PORT"]).unwrap_or_else(|| {
                // Another for each job of a machine, and the same for a job's ranks.
                let job = self.number(&["SLURM_JOB_ID"]);
                let job = job.unwrap_or(std::process::id() as usize);
                (20_000 + job % 10_000).to_string()
            }),
        }
    }
}

impl Place {
    /// A process that nobody started among others.
    pub const ALONE: Self = Self {
        rank: 0,
        size: 1,
        local: 0,
    };

    /// The variables that name it, as other launchers do.
    pub(super) fn variables(&self, master: &Master) -> Vec<(&'static str, String)> {
        let own = [
            ("RANK", self.rank.to_string()),
            ("WORLD_SIZE", self.size.to_string()),
            ("LOCAL_RANK", self.local.to_string()),
        ];
        own.into_iter().chain(master.variables()).collect()
    }
}

impl Master {
    pub(super) fn variables(&self) -> [(&'static str, String); 2] {
        [
            ("MASTER_ADDR", self.address.clone()),
            ("MASTER_PORT", self.port.clone()),
        ]
    }
}

/// What each rank does the first time.
pub(super) fn first(job: &Job) -> Vec<OsString> {
    let mut arguments = job.arguments.clone();
    let named = |option: &str| value_of(&job.arguments, option).is_some();
    if job
        .arguments
        .first()
        .is_some_and(|command| command == "train")
        && !named("--ranks")
        && !named("--mesh")
    {
        arguments.extend(["--ranks".into(), job.ranks.to_string().into()]);
    }
    arguments
}

/// What each rank does after a failure: the training goes on from its last checkpoint, if it has one.
pub(super) fn again(job: &Job, ranks: usize) -> Result<Vec<OsString>, LauncherError> {
    let command = job.arguments.first().cloned().unwrap_or_default();
    if command != "train" {
        return Err(LauncherError::NotRestartable {
            command: command.to_string_lossy().into_owned(),
        });
    }
    let folder = value_of(&job.arguments, "--resume")
        .or_else(|| value_of(&job.arguments, "--out"))
        .map_or_else(
            || {
                let model = value_of(&job.arguments, "--model").unwrap_or_default();
                PathBuf::from(format!("dsp-run-{}", model.to_string_lossy()))
            },
            PathBuf::from,
        );
    let mut arguments = match has_checkpoint(&folder) {
        true => vec![command, "--resume".into(), folder.into()],
        false => job.arguments.clone(),
    };
    if ranks != job.ranks {
        for option in ["--ranks", "--mesh"] {
            remove(&mut arguments, option);
        }
        arguments.extend(["--ranks".into(), ranks.to_string().into()]);
    }
    Ok(match arguments == job.arguments {
        true => first(job),
        false => arguments,
    })
}

fn has_checkpoint(folder: &Path) -> bool {
    dsp_models::training::Store::existing(folder.join("checkpoints"))
        .and_then(|store| store.latest())
        .is_ok_and(|latest| latest.is_some())
}

/// The value of an option, as `--name value` or `--name=value`.
fn value_of(arguments: &[OsString], option: &str) -> Option<OsString> {
    let at = arguments.iter().position(|word| is_option(word, option))?;
    let word = arguments[at].to_string_lossy();
    match word.split_once('=') {
        Some((_, value)) => Some(value.into()),
        None => arguments.get(at + 1).cloned(),
    }
}

fn remove(arguments: &mut Vec<OsString>, option: &str) {
    while let Some(at) = arguments.iter().position(|word| is_option(word, option)) {
        let words = if arguments[at] == option { 2 } else { 1 };
        arguments.drain(at..(at + words).min(arguments.len()));
    }
}

fn is_option(word: &OsStr, option: &str) -> bool {
    let word = word.to_string_lossy();
    word == option
        || word
            .strip_prefix(option)
            .is_some_and(|rest| rest.starts_with('='))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::TransportKind;
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::new(
            variables
                .iter()
                .map(|&(name, value)| (name.into(), value.into())),
        )
    }

    fn job(arguments: &[&str], ranks: usize) -> Job {
        Job {
            program: "dsp".into(),
            arguments: arguments.iter().map(Into::into).collect(),
            ranks,
            transport: TransportKind::Local,
            mpirun: vec![],
            grace: Duration::from_secs(1),
            restarts: 1,
            fewer: 0,
        }
    }

    #[test]
    fn a_process_stands_where_mpi_or_slurm_or_a_launcher_says() {
        let place = |rank, size, local| Some(Place { rank, size, local });
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "5"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "2"),
        ];
        assert_eq!(environment(&mpi).own_place(), place(5, 8, 1));
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_LOCALID", "1"),
        ];
        assert_eq!(environment(&slurm).own_place(), place(3, 4, 1));
        let other = [("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")];
        assert_eq!(environment(&other).own_place(), place(2, 4, 0));
        assert_eq!(environment(&[("HOME", "/")]).own_place(), None);
    }

    #[test]
    fn what_was_said_of_the_first_rank_stays() {
        let given = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "1234")];
        let variables = environment(&given).master().variables();
        assert_eq!(variables.map(|(_, value)| value), ["node7", "1234"]);
    }

    #[test]
    fn ranks_meet_where_all_were_told_and_nowhere_else() {
        let place = Place {
            rank: 1,
            size: 2,
            local: 1,
        };
        let told = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "1234")];
        let meeting = environment(&told).meeting(place);
        assert_eq!(meeting.as_deref(), Some("node7:1234"));
        let told = [("MASTER_ADDR", "fe80::7"), ("MASTER_PORT", "1234")];
        let meeting = environment(&told).meeting(place);
        assert_eq!(meeting.as_deref(), Some("[fe80::7]:1234"));
        // A port that each would choose for itself is none.
        assert_eq!(environment(&told[..1]).meeting(place), None);
        assert!(environment(&[]).meeting(Place::ALONE).is_some());
    }

    #[test]
    fn a_training_gets_the_jobs_ranks_unless_it_names_a_mesh() {
        let words = |arguments: &[&str]| first(&job(arguments, 3)).join(OsStr::new(" "));
        assert_eq!(
            words(&["train", "--model", "lm"]),
            "train --model lm --ranks 3"
        );
        assert_eq!(words(&["train", "--mesh=sp=3"]), "train --mesh=sp=3");
        assert_eq!(words(&["compare"]), "compare");
    }

    #[test]
    fn a_training_without_a_checkpoint_begins_anew_and_one_with_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().to_str().unwrap();
        let training = job(&["train", "--model", "lm", "--ranks=4", "--out", out], 4);
        assert_eq!(again(&training, 4).unwrap(), training.arguments);
        let fewer = again(&training, 3).unwrap();
        let expected = ["train", "--model", "lm", "--out", out, "--ranks", "3"];
        assert_eq!(fewer, expected.map(OsString::from));

        let store = dsp_models::training::Store::open(folder.path().join("checkpoints")).unwrap();
        store
            .save(5, &[("a", vec![1_u8])], std::num::NonZeroUsize::MIN)
            .unwrap();
        let on = again(&training, 4).unwrap();
        assert_eq!(on, ["train", "--resume", out].map(OsString::from));
        let fewer = again(&training, 2).unwrap();
        assert_eq!(
            fewer,
            ["train", "--resume", out, "--ranks", "2"].map(OsString::from)
        );
    }

    #[test]
    fn only_a_training_is_started_again() {
        let error = again(&job(&["compare"], 2), 2).unwrap_err();
        assert!(
            error.to_string().contains("\"compare\" has no checkpoint"),
            "{error}"
        );
    }
}

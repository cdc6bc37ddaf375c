//! What a rank is told: which of how many it is, where the first one is, and what it is to do.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use clap::Parser;
use dsp_models::training::Store;

use super::{Job, LauncherError};
use crate::train::{CHECKPOINTS, TrainArgs};

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

/// The machine's name in a Slurm job.
const MACHINE: &str = "SLURMD_NODENAME";

/// How a program says where a process that it started stands: rank, size, and rank on the machine.
type Names = [&'static str; 3];

/// As launchers like this one say it.
const OWN: Names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"];

/// As MPI, those that it is built on, and Slurm do.
const OTHERS: [Names; 3] = [
    [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
    ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
];

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
            name.starts_with("MASTER_")
                || name == MACHINE
                || OWN.contains(&name)
                || OTHERS.as_flattened().contains(&name)
        };
        let kept = variables.into_iter().filter_map(text);
        Self(kept.filter(|(name, _)| known(name)).collect())
    }

    fn number(&self, name: &str) -> Option<usize> {
        self.0.get(name)?.parse().ok()
    }

    /// Where the program that started this process says it stands: a launcher's variables, MPI's, or Slurm's.
    ///
    /// Who says all three by a launcher's names means this process: what MPI and Slurm say may be of a process that it is
    /// in, of a batch script or of the launcher (`srun torchrun`).
    pub fn own_place(&self) -> Option<Place> {
        let of = |[rank, size, local]: Names| {
            let (rank, size) = (self.number(rank)?, self.number(size)?);
            Some((rank, size, self.number(local)))
        };
        if let Some((rank, size, Some(local))) = of(OWN) {
            return Some(Place { rank, size, local });
        }
        let (rank, size, local) = OTHERS.into_iter().chain([OWN]).find_map(of)?;
        // PMI by itself does not say it, Slurm beside it does.
        let any = || OTHERS.iter().find_map(|[.., local]| self.number(local));
        let local = local.or_else(any).unwrap_or(rank);
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

    /// Where the first rank is: as it was said, or here, where this process is to start it.
    pub(super) fn master(&self) -> Master {
        let given = |name| self.0.get(name).cloned();
        Master {
            address: given("MASTER_ADDR").unwrap_or_else(|| "127.0.0.1".to_owned()),
            // Another for each launcher of a machine: a Slurm job may have several.
            port: given("MASTER_PORT")
                .unwrap_or_else(|| (20_000 + std::process::id() % 10_000).to_string()),
        }
    }

    /// The same for ranks that MPI may start on other machines: by the name that they know this one by, if it has one.
    pub(super) fn master_of_machines(&self) -> Master {
        let Master { address, port } = self.master();
        let name = (self.0.get("MASTER_ADDR")).or_else(|| self.0.get(MACHINE));
        Master {
            address: name.cloned().unwrap_or(address),
            port,
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
    pub(super) fn variables(&self) -> impl Iterator<Item = (&'static str, String)> {
        let values = [self.rank, self.size, self.local];
        OWN.into_iter().zip(values.map(|number| number.to_string()))
    }

    /// Tells a process of this place and of no other one, where the launcher itself may be in an allocation or under MPI.
    pub(super) fn tell(&self, command: &mut Command) {
        for name in OTHERS.as_flattened() {
            command.env_remove(name);
        }
        command.envs(self.variables());
    }

    /// Tells a process of none of a launcher's: what it starts is told by MPI.
    pub(super) fn untell(command: &mut Command) {
        for name in OWN {
            command.env_remove(name);
        }
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

/// A job that is a training, and so can be started again.
#[derive(Debug)]
pub(super) struct Training {
    /// What each rank does, but for the mesh.
    words: Vec<OsString>,
    /// The words that name the mesh; none where the run itself has one of the job's ranks.
    mesh: Vec<OsString>,
    /// What each rank does when the run has begun, but for the mesh.
    on: Vec<OsString>,
    /// Where the run goes.
    folder: PathBuf,
    /// What the run begins by removing, the last of it: a checkpoint later than the one that it is to go on from.
    stale: Option<Stale>,
}

/// A checkpoint as it was before the job.
#[derive(Debug, PartialEq, Eq)]
struct Stale {
    path: PathBuf,
    written: SystemTime,
}

impl Stale {
    /// The first that is later than this step.
    fn after(step: u64, folder: &Path) -> Option<Self> {
        let store = Store::existing(folder.join(CHECKPOINTS)).ok()?;
        let first = store
            .steps()
            .ok()?
            .into_iter()
            .find(|&later| later > step)?;
        Self::at(store.path(first))
    }

    /// The one that is there now.
    fn at(path: PathBuf) -> Option<Self> {
        let written = path.metadata().and_then(|found| found.modified()).ok()?;
        Some(Self { path, written })
    }

    /// Whether it was not removed, nor another one put in its place.
    fn stands(&self) -> bool {
        Self::at(self.path.clone()).as_ref() == Some(self)
    }
}

/// `train` and what stands behind it, as the ranks will read it.
#[derive(Debug, clap::Parser)]
struct Words {
    #[command(flatten)]
    train: TrainArgs,
}

impl Training {
    /// The one that a job is, if it is one.
    ///
    /// # Errors
    /// [`LauncherError::Words`], [`LauncherError::Run`] or [`LauncherError::Taken`], which each rank would end with.
    pub(super) fn of(job: &Job) -> Result<Option<Self>, LauncherError> {
        if job.arguments.first().is_none_or(|word| word != "train") {
            return Ok(None);
        }
        let Words { train } = Words::try_parse_from(&job.arguments)?;
        let run = train.run()?;
        let mesh = match train.mesh() {
            Some(mesh) => vec!["--mesh".into(), mesh.to_string().into()],
            None if run.mesh.ranks() == job.ranks => vec![],
            None => ranks_of(job.ranks),
        };
        let mut words = job.arguments.clone();
        for option in ["--ranks", "--mesh"] {
            remove(&mut words, option);
        }
        let folder = train.folder(&run);
        let on = match &train.resume {
            // What is said beside it may not have been written into the folder yet.
            Some(_) => {
                let mut on = words.clone();
                remove(&mut on, "--from-step");
                on
            }
            // Or it would be gone on with after the ranks have been refused: another one's run.
            None if has_checkpoint(&folder) => return Err(LauncherError::Taken { folder }),
            None => vec!["train".into(), "--resume".into(), folder.clone().into()],
        };
        let stale = train.from_step.and_then(|step| Stale::after(step, &folder));
        Ok(Some(Self {
            words,
            mesh,
            on,
            folder,
            stale,
        }))
    }

    /// What each rank does the first time.
    pub(super) fn first(&self) -> Vec<OsString> {
        [&self.words[..], &self.mesh].concat()
    }

    /// What each rank does after a failure: it goes on from the last checkpoint, if the run has made one or goes on from
    /// it, on `ranks` ranks if those are other ones than the job's.
    pub(super) fn again(&self, job: &Job, ranks: usize) -> Vec<OsString> {
        let mesh = match ranks == job.ranks {
            true => self.mesh.clone(),
            false => ranks_of(ranks),
        };
        // A run that failed before it had removed what is later than its beginning goes on from there, not from that.
        let has_begun = !self.stale.as_ref().is_some_and(Stale::stands);
        let words = match has_begun && has_checkpoint(&self.folder) {
            true => self.on.clone(),
            false => self.words.clone(),
        };
        [words, mesh].concat()
    }
}

fn ranks_of(ranks: usize) -> Vec<OsString> {
    vec!["--ranks".into(), ranks.to_string().into()]
}

fn has_checkpoint(folder: &Path) -> bool {
    Store::existing(folder.join(CHECKPOINTS))
        .and_then(|store| store.latest())
        .is_ok_and(|latest| latest.is_some())
}

/// Takes an option and its value out, as `--name value` or `--name=value`.
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
    use std::num::NonZeroUsize;
    use std::time::Duration;

    use super::super::TransportKind;
    use super::*;
    use crate::scenario::ModelKind;
    use crate::train::RunConfig;

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
        let pmi = [("PMI_RANK", "3"), ("PMI_SIZE", "4"), ("SLURM_LOCALID", "1")];
        assert_eq!(environment(&pmi).own_place(), place(3, 4, 1));
        assert_eq!(environment(&other[..2]).own_place(), place(2, 4, 2));
        // In an allocation, or as `srun torchrun` does it: the innermost says all.
        for outer in [&slurm[..], &mpi] {
            let inner = environment(&[outer, &other].concat());
            assert_eq!(inner.own_place(), place(2, 4, 0));
            let half = environment(&[outer, &other[..2]].concat());
            assert_eq!(half.own_place(), environment(outer).own_place());
        }
        assert_eq!(environment(&[("HOME", "/")]).own_place(), None);
    }

    #[test]
    fn what_was_said_of_the_first_rank_stays() {
        let given = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "1234")];
        let slurm = [given[0], given[1], ("SLURMD_NODENAME", "node3")];
        let said = |master: Master| master.variables().map(|(_, value)| value);
        assert_eq!(said(environment(&given).master()), ["node7", "1234"]);
        assert_eq!(
            said(environment(&slurm).master_of_machines()),
            ["node7", "1234"]
        );
        assert_eq!(
            said(environment(&slurm[1..]).master_of_machines()),
            ["node3", "1234"]
        );
        assert_eq!(
            said(environment(&given[1..]).master_of_machines()),
            ["127.0.0.1", "1234"]
        );
        // Two launchers of one Slurm job meet at different ports, each on its machine.
        let slurm = [
            ("SLURM_JOB_ID", "1234"),
            ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.9"),
        ];
        let own = (20_000 + std::process::id() % 10_000).to_string();
        let [(_, address), (_, port)] = environment(&slurm).master().variables();
        assert_eq!((&*address, port), ("127.0.0.1", own));
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

    fn training(job: &Job) -> Training {
        Training::of(job).unwrap().unwrap()
    }

    #[test]
    fn a_training_gets_the_jobs_ranks_unless_it_has_or_names_a_mesh_of_its_own() {
        let words = |arguments: &[&str], ranks| {
            let first = training(&job(arguments, ranks)).first();
            let words: Vec<_> = first.iter().map(|word| word.to_string_lossy()).collect();
            words.join(" ")
        };
        let lm = ["train", "--model", "lm"];
        assert_eq!(words(&lm, 3), "train --model lm --ranks 3");
        assert_eq!(words(&lm, 2), "train --model lm");
        let named = ["train", "--mesh=sp=2,dp=2", "--model", "lm"];
        assert_eq!(words(&named, 4), "train --model lm --mesh sp=2,dp=2");

        // A file's mesh, and that of a run that is gone on with.
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        let changes = ["mesh.sp=2", "mesh.dp=2", "model.layers=linear"];
        let changes = changes.map(|text| text.parse().unwrap());
        let run = RunConfig::of_model(ModelKind::Lm).unwrap();
        std::fs::write(&file, run.with(&changes).unwrap().to_toml().unwrap()).unwrap();
        let (file, folder) = (file.to_str().unwrap(), folder.path().to_str().unwrap());
        for given in [["--config", file], ["--resume", folder]] {
            let arguments = [&["train"], &given[..]].concat();
            assert_eq!(words(&arguments, 4), arguments.join(" "));
            let of_two = arguments.join(" ") + " --ranks 2";
            assert_eq!(words(&arguments, 2), of_two);
        }
        let by_file = training(&job(&["train", "--config", file], 4));
        assert_eq!(by_file.folder, Path::new("dsp-run-linear-lm"));
        let by_words = ["train", "--model=lm", "--set", "model.layers=linear"];
        let by_words = training(&job(&by_words, 4));
        assert_eq!(by_words.folder, Path::new("dsp-run-linear-lm"));
        let resumed = training(&job(&["train", "--resume", folder], 4));
        assert_eq!(resumed.folder, Path::new(folder));
    }

    #[test]
    fn a_training_without_a_checkpoint_begins_anew_and_one_with_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().to_str().unwrap();
        let job = job(&["train", "--model", "lm", "--ranks=4", "--out", out], 4);
        let training = training(&job);
        assert_eq!(training.again(&job, 4), training.first());
        let fewer = training.again(&job, 3);
        let expected = ["train", "--model", "lm", "--out", out, "--ranks", "3"];
        assert_eq!(fewer, expected.map(OsString::from));

        let store = Store::open(folder.path().join(CHECKPOINTS)).unwrap();
        save(&store, 5);
        let on = training.again(&job, 4);
        let expected = ["train", "--resume", out, "--mesh", "sp=4,dp=1"];
        assert_eq!(on, expected.map(OsString::from));
        let fewer = training.again(&job, 2);
        let expected = ["train", "--resume", out, "--ranks", "2"];
        assert_eq!(fewer, expected.map(OsString::from));
    }

    #[test]
    fn a_run_that_is_gone_on_with_differently_is_so_after_a_failure_too() {
        let (folder, store) = run_of_steps(&[5, 10]);
        let out = folder.path().to_str().unwrap();
        let words = [
            "train",
            "--resume",
            out,
            "--strategy=dsp",
            "--seed",
            "7",
            "--set",
            "keep=9",
        ];
        let job = job(&[&words[..], &["--from-step=5"]].concat(), 2);
        let training = training(&job);
        assert_eq!(training.again(&job, 2), training.first());
        store.forget_after(5).unwrap();
        assert_eq!(training.again(&job, 2), words.map(OsString::from));
    }

    #[test]
    fn a_folder_that_holds_another_run_is_refused_before_a_rank_is_started() {
        let (folder, _store) = run_of_steps(&[5]);
        let out = folder.path().to_str().unwrap();
        let taken = Training::of(&job(&["train", "--model", "lm", "--out", out], 2));
        let error = taken.unwrap_err().to_string();
        assert!(error.contains(out) && error.contains("--resume"), "{error}");
    }

    #[test]
    fn the_jobs_ranks_are_more_than_what_is_set() {
        let arguments = ["train", "--model", "lm", "--set", "mesh.sp=4"];
        let job = job(&arguments, 2);
        let training = training(&job);
        for (words, ranks) in [(training.first(), 2), (training.again(&job, 1), 1)] {
            let Words { train } = Words::try_parse_from(words).unwrap();
            assert_eq!(train.run().unwrap().mesh.ranks(), ranks);
        }
    }

    /// A folder of a language model's run with a checkpoint of each step.
    fn run_of_steps(steps: &[u64]) -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let run = RunConfig::of_model(ModelKind::Lm).unwrap();
        std::fs::write(folder.path().join("config.toml"), run.to_toml().unwrap()).unwrap();
        let store = Store::open(folder.path().join(CHECKPOINTS)).unwrap();
        for &step in steps {
            save(&store, step);
        }
        (folder, store)
    }

    fn save(store: &Store, step: u64) {
        let all = NonZeroUsize::new(usize::MAX).unwrap();
        store.save(step, &[("a", vec![1_u8])], all).unwrap();
    }

    #[test]
    fn a_run_that_failed_before_it_went_back_goes_back_and_not_on_from_what_it_was_to_remove() {
        let (folder, store) = run_of_steps(&[5, 10, 15]);
        let out = folder.path().to_str().unwrap();
        let job = job(&["train", "--resume", out, "--from-step", "5"], 2);
        let training = training(&job);
        assert_eq!(training.again(&job, 2), training.first());
        // Half of the way back.
        store.forget_after(10).unwrap();
        assert_eq!(training.again(&job, 2), training.first());
        let on = ["train", "--resume", out].map(OsString::from);
        store.forget_after(5).unwrap();
        assert_eq!(training.again(&job, 2), on);
        // It has made that step again.
        std::thread::sleep(Duration::from_millis(20));
        save(&store, 10);
        assert_eq!(training.again(&job, 2), on);
    }

    #[test]
    fn what_is_no_training_is_none_and_a_wrong_one_is_refused_before_it_is_started() {
        assert!(Training::of(&job(&["compare"], 2)).unwrap().is_none());
        for (arguments, word) in [
            (&["train"][..], "--model"),
            (&["train", "--model", "ml"], "ml"),
            (&["train", "--resume", "none"], "none"),
            (&["train", "--model", "lm", "--set", "mesh.sp=0"], "mesh.sp"),
        ] {
            let error = Training::of(&job(arguments, 2)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}

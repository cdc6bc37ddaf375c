//! `dsp launch`: starts a job's ranks, shows what they say, and ends them together.
//!
//! ```text
//!   local                       mpi                                    nccl
//!   launcher                    launcher                               launcher
//!      │                           │ mpirun -n N                          ├── dsp …  RANK=0 LOCAL_RANK=0
//!      └── dsp … (N threads)       ├── dsp rank ── dsp …  RANK=0          ├── dsp …  RANK=1 LOCAL_RANK=1
//!                                  └── dsp rank ── dsp …  RANK=1          └── …
//! ```
//!
//! Every line comes out with its rank before it. When the first rank fails, the others have a grace to find that
//! out and to say what they saw; then all are ended, and the launcher returns the first one's exit code. A
//! training can then be started again from its last checkpoint.
//!
//! Whoever is started dies with who started it: its standard input closes ([`die_with_parent`]). Of ranks on other
//! machines `mpirun` may not tell that they are gone: their shims say now and then that they live (`silence.rs`).

mod arguments;
mod process;
mod silence;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use dsp_core::launch::LONGEST_TIMEOUT;

use arguments::Training;
pub use arguments::{Environment, Place};
pub use process::{TIED, die_with_parent, run_rank};
use silence::Silence;

use crate::train::RunConfigError;

/// What moves data between a job's ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TransportKind {
    /// Ranks are threads of one process, which read each other's memory.
    Local,
    /// Ranks are processes on one machine or many; MPI moves the data.
    Mpi,
    /// Ranks are processes with a GPU of this machine each; NCCL moves the data.
    Nccl,
}

/// A job to start.
#[derive(Debug, Clone)]
pub struct Job {
    /// The program of which every rank runs a copy: this one.
    pub program: PathBuf,
    /// What it is to do, from the subcommand on.
    pub arguments: Vec<OsString>,
    /// The ranks.
    pub ranks: usize,
    /// What moves data between them.
    pub transport: TransportKind,
    /// More words for `mpirun`, e.g. `--hostfile hosts`.
    pub mpirun: Vec<OsString>,
    /// How long the ranks may go on after the first has failed.
    pub grace: Duration,
    /// How often a training is started again.
    pub restarts: usize,
    /// With how many ranks fewer each time.
    pub fewer: usize,
}

/// Why a job was not started, or cannot be started again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LauncherError {
    /// A program that cannot be run.
    #[error("cannot start {program}: {source}{}", hint(program))]
    Start {
        /// The program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Only a training has checkpoints to go on from.
    #[error("--restarts is for a training: {command:?} has no checkpoint to go on from")]
    NotRestartable {
        /// The subcommand.
        command: String,
    },
    /// Arguments that are none of a training.
    #[error("{0}")]
    Words(#[from] clap::Error),
    /// A training that cannot be.
    #[error(transparent)]
    Run(#[from] RunConfigError),
    /// A training that begins where another one's checkpoints are.
    #[error(
        "{}: holds a run already; go on with it by --resume {}, or name another folder by --out",
        folder.display(), folder.display()
    )]
    Taken {
        /// The folder.
        folder: PathBuf,
    },
    /// A rank that cannot be asked how it is.
    #[error("waiting for a rank: {0}")]
    Wait(#[source] std::io::Error),
}

fn hint(program: &str) -> &'static str {
    match program {
        "mpirun" => " (of Debian's openmpi-bin, or the cluster's module of MPI)",
        _ => "",
    }
}

/// How often the processes are looked at.
const GLANCE: Duration = Duration::from_millis(50);

/// How long a rank of which its shim speaks may say nothing. What ends them both, or their machine, may leave `mpirun`
/// waiting for ever.
const SILENT: Duration = Duration::from_secs(30);

/// The exit code of a rank that is silent for too long.
const GONE: i32 = 72;

/// Exit codes above are of a process that a signal ended.
const SIGNALLED: i32 = 128;

/// How long what was said last is waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What happens in a job.
#[derive(Debug)]
enum Event {
    /// A rank said something.
    Line(Option<usize>, Stream, String),
    /// A shim says that its rank lives.
    Alive(usize),
    /// A shim says that its rank ended, with this exit code.
    Ended(usize, i32),
}

/// What failed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Failure {
    /// A rank, or else what started all of them.
    rank: Option<usize>,
    /// Its exit code.
    code: i32,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "rank {rank} failed first")?,
            None => write!(f, "mpirun failed")?,
        }
        write!(f, ", with exit code {}", self.code)
    }
}

/// Where a line was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Output,
    Error,
}

/// Runs a job, and starts it again as often as it may be; the exit code is that of the first rank that failed the
/// last time, or 0.
///
/// # Errors
/// [`LauncherError`] if a process cannot be started, or the job is none that can be started again.
pub fn run(job: &Job, environment: &Environment) -> Result<i32, LauncherError> {
    let training = Training::of(job)?;
    if training.is_none() && job.restarts > 0 {
        let command = job.arguments.first().cloned().unwrap_or_default();
        return Err(LauncherError::NotRestartable {
            command: command.to_string_lossy().into_owned(),
        });
    }
    let mut arguments = match &training {
        Some(training) => training.first(),
        None => job.arguments.clone(),
    };
    let mut ranks = job.ranks;
    for attempt in 0.. {
        let failed = run_once(job, ranks, &arguments, environment)?;
        let Some(failure) = failed else {
            return Ok(0);
        };
        say(&failure.to_string());
        let Some(training) = training.as_ref().filter(|_| attempt < job.restarts) else {
            return Ok(failure.code);
        };
        ranks = ranks.saturating_sub(job.fewer).max(1);
        arguments = training.again(job, ranks);
        let words: Vec<_> = arguments
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        say(&format!(
            "restart {} of {} on {ranks} ranks: {}",
            attempt + 1,
            job.restarts,
            words.join(" ")
        ));
    }
    unreachable!("attempts are counted")
}

/// What the launcher itself has to say.
#[allow(
    clippy::print_stderr,
    reason = "what a launcher says is for who started it"
)]
fn say(text: &str) {
    eprintln!("[launch] {text}");
}

/// One attempt: what failed first.
fn run_once(
    job: &Job,
    ranks: usize,
    arguments: &[OsString],
    environment: &Environment,
) -> Result<Option<Failure>, LauncherError> {
    let (events, happens) = mpsc::channel();
    let mut started = Vec::new();
    let commands = commands(job, ranks, arguments, environment);
    let first = start(commands, &events, &mut started)
        .and_then(|()| watch(&happens, &mut started, job.grace, Silence::new(SILENT)));
    drop(events);
    for (_, child) in &mut started {
        process::end(child).map_err(LauncherError::Wait)?;
    }
    // What was said last: the pipes close when nobody is left to write into them.
    let until = Instant::now() + LAST_WORDS;
    while let Ok(event) = happens.recv_timeout(until.saturating_duration_since(Instant::now())) {
        if let Event::Line(rank, stream, text) = event {
            process::show(rank, stream, &text);
        }
    }
    first
}

/// Shows what happens until all processes have ended, or the grace after the first failure is over.
fn watch(
    happens: &Receiver<Event>,
    started: &mut [(Option<usize>, Child)],
    grace: Duration,
    mut silence: Silence,
) -> Result<Option<Failure>, LauncherError> {
    let grace = grace.min(LONGEST_TIMEOUT);
    let mut first: Option<Failure> = None;
    let mut until: Option<Instant> = None;
    let mut note = |rank, code| {
        if code != 0 && first.is_none() {
            first = Some(Failure { rank, code });
            until = Some(Instant::now() + grace);
        }
        until
    };
    let mut ended = vec![false; started.len()];
    let mut end = None;
    let mut looked = Instant::now();
    while ended.contains(&false) && end.is_none_or(|end| Instant::now() < end) {
        let next = happens.try_recv().or_else(|_| {
            // All that was said has been heard.
            if let Some(rank) = silence.glance(Instant::now()) {
                let limit = silence.limit();
                say(&format!(
                    "rank {rank} was not heard of for {limit:?}: it or its machine is gone"
                ));
                end = note(Some(rank), GONE);
            }
            happens.recv_timeout(GLANCE)
        });
        match &next {
            Ok(Event::Line(rank, stream, text)) => process::show(*rank, *stream, text),
            Ok(Event::Alive(rank)) => silence.heard(*rank),
            Ok(Event::Ended(rank, code)) => {
                silence.ended(*rank);
                end = note(Some(*rank), *code);
            }
            Err(_) => {}
        }
        // However much is said: what ends later, because of the first, is not to be found with it.
        if looked.elapsed() < GLANCE {
            continue;
        }
        looked = Instant::now();
        let mut found = Vec::new();
        for ((rank, child), ended) in started.iter_mut().zip(&mut ended) {
            // Of `mpirun`'s ranks the shims have told before it ends: that is heard first.
            let told = rank.is_some() || next.is_err();
            if !*ended
                && told
                && let Some(status) = child.try_wait().map_err(LauncherError::Wait)?
            {
                *ended = true;
                found.push((*rank, process::code(status)));
            }
        }
        // Of several, who was ended by a signal did not do it because of another one.
        found.sort_by_key(|&(_, code)| code <= SIGNALLED);
        for (rank, code) in found {
            end = note(rank, code);
        }
    }
    Ok(first)
}

/// Starts the processes of one attempt.
fn start(
    commands: Vec<(Option<usize>, Command)>,
    events: &Sender<Event>,
    started: &mut Vec<(Option<usize>, Child)>,
) -> Result<(), LauncherError> {
    for (rank, mut command) in commands {
        let child = process::start(&mut command, rank, events);
        let child = child.map_err(|source| LauncherError::Start {
            program: command.get_program().to_string_lossy().into_owned(),
            source,
        })?;
        started.push((rank, child));
    }
    Ok(())
}

/// What is started: one process that holds all ranks or starts them, or one for each rank, which is named.
fn commands(
    job: &Job,
    ranks: usize,
    arguments: &[OsString],
    environment: &Environment,
) -> Vec<(Option<usize>, Command)> {
    let master = environment.master();
    let place = |rank: usize| Place {
        rank,
        size: ranks,
        local: rank,
    };
    match job.transport {
        TransportKind::Local => {
            let mut command = Command::new(&job.program);
            command.args(arguments).envs(master.variables());
            place(0).tell(&mut command);
            vec![(Some(0), command)]
        }
        TransportKind::Nccl => (0..ranks)
            .map(|rank| {
                let mut command = Command::new(&job.program);
                command.args(["--transport", "nccl"]).args(arguments);
                command.envs(master.variables());
                place(rank).tell(&mut command);
                (Some(rank), command)
            })
            .collect(),
        TransportKind::Mpi => {
            let mut command = Command::new("mpirun");
            command.args(["-n", &ranks.to_string()]).args(&job.mpirun);
            // A rank that dies is ours to report: the others are to find out first, and to say so.
            command.env("OMPI_MCA_orte_abort_on_non_zero_status", "0");
            command.env("OMPI_MCA_orte_allowed_exit_without_sync", "1");
            // Bound to a core each, as `mpirun` has it by default, ranks could use no other one, and each would share
            // its own with its communication thread. `--bind-to` says otherwise.
            command.env("OMPI_MCA_hwloc_base_binding_policy", "none");
            command.envs(environment.master_of_machines().variables());
            Place::untell(&mut command);
            let program = command.arg(&job.program);
            program.arg("rank").arg("--").args(arguments);
            // What `mpirun` starts names its ranks itself.
            vec![(None, command)]
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ffi::OsStr;

    use super::*;

    #[test]
    #[cfg(unix)]
    fn a_rank_that_says_nothing_any_more_has_failed_though_nothing_has_ended() {
        let (events, happens) = mpsc::channel();
        let mut sleeps = Command::new("sleep");
        let child = process::start(sleeps.arg("60"), None, &events).unwrap();
        let mut started = vec![(None, child)];
        for event in [Event::Alive(0), Event::Alive(1), Event::Ended(0, 0)] {
            events.send(event).unwrap();
        }
        let silence = Silence::new(Duration::from_millis(200));
        let first = watch(&happens, &mut started, Duration::ZERO, silence).unwrap();
        let expected = Failure {
            rank: Some(1),
            code: GONE,
        };
        assert_eq!(first, Some(expected));
        process::end(&mut started[0].1).unwrap();
    }

    /// What is told of processes that run scripts, and the processes.
    #[cfg(unix)]
    type Scripted = (
        (Sender<Event>, Receiver<Event>),
        Vec<(Option<usize>, Child)>,
    );

    #[cfg(unix)]
    fn run_scripts(scripts: &[(Option<usize>, &str)]) -> Scripted {
        let (events, happens) = mpsc::channel();
        let commands = scripts.iter().map(|&(rank, script)| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            (rank, command)
        });
        let mut started = Vec::new();
        start(commands.collect(), &events, &mut started).unwrap();
        ((events, happens), started)
    }

    /// What is said to have failed first.
    #[cfg(unix)]
    fn first_of(((_events, happens), mut started): Scripted, grace: Duration) -> String {
        let first = watch(&happens, &mut started, grace, Silence::new(SILENT)).unwrap();
        for (_, child) in &mut started {
            process::end(child).unwrap();
        }
        first.unwrap().to_string()
    }

    #[test]
    #[cfg(unix)]
    fn what_failed_first_is_found_while_another_rank_says_much() {
        // Rank 0 talks until it notices, some time after the end of rank 1.
        let talks = "for i in $(seq 60); do echo $i; sleep 0.01; done; exit 2";
        let scripts = run_scripts(&[(Some(0), talks), (Some(1), "sleep 0.1; exit 5")]);
        let first = first_of(scripts, Duration::from_secs(20));
        assert_eq!(first, "rank 1 failed first, with exit code 5");
    }

    #[test]
    #[cfg(unix)]
    fn of_several_that_ended_together_the_one_that_was_killed_failed_first() {
        let mut scripts = run_scripts(&[(Some(0), "exit 2"), (Some(1), "kill -9 $$")]);
        for (_, child) in &mut scripts.1 {
            child.wait().unwrap();
        }
        let first = first_of(scripts, Duration::from_secs(20));
        assert_eq!(first, "rank 1 failed first, with exit code 137");
    }

    #[test]
    #[cfg(unix)]
    fn mpirun_is_no_rank_and_its_ranks_are_heard_before_it() {
        let fails = run_scripts(&[(None, "exit 213")]);
        // However long the grace.
        let first = first_of(fails, Duration::MAX);
        assert_eq!(first, "mpirun failed, with exit code 213");
        let tells = "printf '\\0011\\001ended\\0017\\n'; exit 7";
        let first = first_of(run_scripts(&[(None, tells)]), Duration::from_secs(20));
        assert_eq!(first, "rank 1 failed first, with exit code 7");
    }

    #[test]
    fn ranks_under_mpirun_are_told_where_the_first_is() {
        let environment = Environment::new([("SLURMD_NODENAME".into(), "node3".into())]);
        let job = job(TransportKind::Mpi);
        let [(None, mpirun)] = &commands(&job, 2, &["compare".into()], &environment)[..] else {
            panic!("one mpirun");
        };
        let told: BTreeMap<_, _> = mpirun.get_envs().collect();
        let address = told[OsStr::new("MASTER_ADDR")].unwrap();
        assert_eq!(address, "node3");
        assert!(told[OsStr::new("MASTER_PORT")].is_some());
        assert!(told[OsStr::new("RANK")].is_none());
    }

    fn job(transport: TransportKind) -> Job {
        Job {
            program: "dsp".into(),
            arguments: vec![],
            ranks: 2,
            transport,
            mpirun: vec![],
            grace: Duration::ZERO,
            restarts: 0,
            fewer: 0,
        }
    }

    #[test]
    fn ranks_with_a_gpu_each_are_told_which_and_where_to_meet() {
        let job = job(TransportKind::Nccl);
        let environment = Environment::new([("MASTER_PORT".into(), "1234".into())]);
        let started = commands(&job, 2, &["compare".into()], &environment);
        let told: Vec<_> = (started.iter())
            .map(|(rank, command)| {
                let arguments: Vec<_> = command.get_args().collect();
                assert_eq!(arguments, ["--transport", "nccl", "compare"]);
                let told: BTreeMap<_, _> = (command.get_envs())
                    .filter_map(|(name, value)| Some((name.to_str()?, value?.to_str()?)))
                    .collect();
                assert_eq!(told["MASTER_ADDR"], "127.0.0.1");
                let names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"];
                (*rank, names.map(|name| told[name]))
            })
            .collect();
        let expected = [
            (Some(0), ["0", "0", "2", "1234"]),
            (Some(1), ["1", "1", "2", "1234"]),
        ];
        assert_eq!(told, expected);
        // What a batch script or `mpirun` around the launcher says of it is not true of them.
        for (_, command) in &started {
            for name in ["SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK"] {
                assert!(
                    command
                        .get_envs()
                        .any(|(other, value)| other == name && value.is_none())
                );
            }
        }
    }
}

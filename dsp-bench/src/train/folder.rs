//! A run's folder: who may write into it, its configuration and its metrics.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::config::RunConfig;
use super::run::{Line, TrainError};

pub(super) const CONFIG: &str = "config.toml";
pub(crate) const CHECKPOINTS: &str = "checkpoints";
pub(super) const SAMPLES: &str = "samples";
/// The page that shows a run which has ended.
pub(super) const REPORT: &str = "report.html";
const METRICS: &str = "metrics.jsonl";
const LOCK: &str = "lock";

/// How long a run that was killed may take to be gone.
const LEAVING: Duration = Duration::from_secs(5);

pub(super) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Io { what, path, source }
}

/// The right to write into a run's folder, until it is dropped or the process ends, however it does.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for a run that was killed a moment ago.
    ///
    /// # Errors
    /// [`TrainError::Busy`] if another training has it, [`TrainError::Nothing`] if there is no such folder.
    pub(super) fn take(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join(LOCK);
        let opened = OpenOptions::new().create(true).append(true).open(&path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => TrainError::Nothing {
                folder: folder.to_owned(),
            },
            _ => failed("cannot be written", &path)(error),
        })?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                // A file system that has no locks is no reason not to train.
                Ok(()) | Err(TryLockError::Error(_)) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) if begun.elapsed() > LEAVING => {
                    return Err(TrainError::Busy {
                        folder: folder.to_owned(),
                    });
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

/// Puts a file in its place whole: whoever reads it, after whatever happened meanwhile, finds the old one or the new
/// one.
fn replace(path: &Path, text: &str) -> Result<(), TrainError> {
    let mut made = tempfile::Builder::new();
    // As any new file is made, not for its owner alone.
    #[cfg(unix)]
    made.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let folder = path.parent().unwrap_or(Path::new("."));
    let replaced = made.tempfile_in(folder).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)
    });
    replaced
        .map(drop)
        .map_err(failed("cannot be written", path))
}

pub(super) fn write_config(config: &RunConfig, folder: &Path) -> Result<(), TrainError> {
    replace(&folder.join(CONFIG), &config.to_toml()?)
}

/// Writes the page of a run that has ended, which is there whole or not at all: by it a run is known to have been shown.
///
/// # Errors
/// [`TrainError::Io`] if it cannot be written.
pub fn write_report(folder: &Path, page: &str) -> Result<PathBuf, TrainError> {
    let path = folder.join(REPORT);
    replace(&path, page)?;
    Ok(path)
}

/// Removes the page of a run that goes on: it would say that the run has ended, and what it had learnt before.
pub(super) fn remove_report(folder: &Path) -> Result<(), TrainError> {
    let path = folder.join(REPORT);
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed("cannot be removed", &path)),
    }
}

/// The configuration of the run in a folder.
///
/// # Errors
/// [`TrainError::Config`] if there is none.
pub fn config_of(folder: &Path) -> Result<RunConfig, TrainError> {
    Ok(RunConfig::read(&folder.join(CONFIG))?)
}

/// What the run in a folder wrote of its steps and evaluations.
///
/// # Errors
/// [`TrainError::Io`] if the file cannot be read.
pub fn metrics_of(folder: &Path) -> Result<Vec<Line>, TrainError> {
    let path = folder.join(METRICS);
    let text = fs::read_to_string(&path).map_err(failed("cannot be read", &path))?;
    // The last line of a run that was killed may be cut off.
    Ok((text.lines())
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

/// The metrics' file: a line of JSON for each step and each evaluation.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Metrics {
    /// Goes on after `step` of `steps`: what was written of later steps, which are made again, is taken out, and so is
    /// the last evaluation, which is made again too.
    ///
    /// # Errors
    /// [`TrainError::Io`] if the file cannot be read or written; it is then as it was.
    pub(super) fn open(folder: &Path, step: u64, steps: u64) -> Result<Self, TrainError> {
        let path = folder.join(METRICS);
        let before = match fs::read_to_string(&path) {
            // Whatever is there is of no run.
            _ if step == 0 => String::new(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            before => before.map_err(failed("cannot be read", &path))?,
        };
        let stays = |line: Line| match line {
            Line::Step { step: of, .. } => of <= step,
            Line::HeldOut { step: of, .. } => of <= step && of != steps,
        };
        let kept =
            (before.lines()).filter(|line| serde_json::from_str::<Line>(line).is_ok_and(stays));
        let kept: String = kept.map(|line| format!("{line}\n")).collect();
        replace(&path, &kept)?;
        let file = OpenOptions::new().append(true).open(&path);
        Ok(Self {
            file: BufWriter::new(file.map_err(failed("cannot be written", &path))?),
            path,
        })
    }

    pub(super) fn add(&mut self, line: &Line) -> Result<(), TrainError> {
        let text = serde_json::to_string(line).unwrap_or_default();
        let written = writeln!(self.file, "{text}").and_then(|()| self.file.flush());
        written.map_err(failed("cannot be written", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> Line {
        Line::HeldOut {
            step,
            held_out: 0.5,
        }
    }

    #[test]
    fn metrics_go_on_after_the_step_and_what_was_cut_off_is_taken_out() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 0, 9).unwrap();
        for step in 1..=4 {
            metrics.add(&line(step)).unwrap();
        }
        write!(metrics.file, "{{\"step\":5,\"held").unwrap();
        drop(metrics);
        let mut metrics = Metrics::open(folder.path(), 2, 9).unwrap();
        metrics.add(&line(3)).unwrap();
        let found = metrics_of(folder.path()).unwrap();
        assert_eq!(found, [1, 2, 3].map(line));
        // An evaluation that is made again at the last step is there once.
        drop(Metrics::open(folder.path(), 3, 3).unwrap());
        assert_eq!(metrics_of(folder.path()).unwrap(), [1, 2].map(line));
        // Another run's are none of a new one's.
        Metrics::open(folder.path(), 0, 9).unwrap();
        assert_eq!(metrics_of(folder.path()).unwrap(), []);
    }

    #[test]
    fn metrics_that_cannot_be_read_stay_as_they_are_and_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS);
        let damaged = b"{\"step\":1,\"held_out\":0.5}\n\xff\n";
        fs::write(&path, damaged).unwrap();
        let error = Metrics::open(folder.path(), 1, 9).unwrap_err().to_string();
        assert!(
            error.contains("metrics.jsonl: cannot be read") && error.contains("UTF-8"),
            "{error}"
        );
        assert_eq!(fs::read(&path).unwrap(), damaged);
        // None at all is none yet.
        fs::remove_file(&path).unwrap();
        Metrics::open(folder.path(), 1, 9).unwrap();
    }

    #[test]
    fn one_training_at_a_time_has_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Lock::take(folder.path()).unwrap();
        let error = Lock::take(folder.path()).unwrap_err().to_string();
        assert!(error.contains("another training"), "{error}");
        // Somebody who ends meanwhile was waited for.
        let next = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(300));
                drop(lock);
            });
            Lock::take(folder.path())
        });
        next.unwrap();
        let none = Lock::take(&folder.path().join("none")).unwrap_err();
        assert!(matches!(none, TrainError::Nothing { .. }), "{none}");
    }
}

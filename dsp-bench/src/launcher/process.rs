//! Processes: how one is started, heard and ended, and the shim that stands between `mpirun` and a rank.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::arguments::{Environment, Place};
use super::{Event, Stream};

/// Set for whoever is to die with who started it.
pub const TIED: &str = "DSP_DIES_WITH_PARENT";

/// What a shim tells the launcher begins with this.
const MARK: char = '\u{1}';

/// How often a shim says that it lives.
const PULSE: Duration = Duration::from_secs(2);

/// How long a process has to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest piece of a line that a shim passes on: `mpirun` does not take such apart.
const LONGEST: usize = 3000;

/// The exit code of who dies with its parent.
const ORPHANED: i32 = 71;

/// Starts a process whose lines become events: lines of `rank`, or what a shim says of its own.
pub(super) fn start(
    command: &mut Command,
    rank: Option<usize>,
    events: &Sender<Event>,
) -> io::Result<Child> {
    let mut child = spawn(command)?;
    if let Some(rank) = rank {
        show(
            Some(rank),
            Stream::Error,
            &format!("is process {}", child.id()),
        );
    }
    let pipes: [Option<(Box<dyn Read + Send>, Stream)>; 2] = [
        child
            .stdout
            .take()
            .map(|pipe| (Box::new(pipe) as _, Stream::Output)),
        child
            .stderr
            .take()
            .map(|pipe| (Box::new(pipe) as _, Stream::Error)),
    ];
    for (pipe, stream) in pipes.into_iter().flatten() {
        let events = events.clone();
        thread::spawn(move || {
            each_line(pipe, |line| {
                // Nobody listens any more when the job is over.
                let _ = events.send(read(rank, stream, line));
            });
        });
    }
    Ok(child)
}

fn spawn(command: &mut Command) -> io::Result<Child> {
    (command.env(TIED, "1"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

fn each_line(pipe: impl Read, mut tell: impl FnMut(&str)) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line), Ok(read) if read > 0) {
        let text = String::from_utf8_lossy(&line);
        tell(text.trim_end_matches(['\n', '\r']));
        line.clear();
    }
}

/// What a line says: a process's own words, or a shim's.
fn read(rank: Option<usize>, stream: Stream, line: &str) -> Event {
    let marked = || {
        let (rank, rest) = line.strip_prefix(MARK)?.split_once(MARK)?;
        let (kind, text) = rest.split_once(MARK)?;
        let rank = rank.parse().ok()?;
        Some(match kind {
            "alive" => Event::Alive(rank),
            "ended" => Event::Ended(rank, text.parse().ok()?),
            "error" => Event::Line(Some(rank), Stream::Error, text.to_owned()),
            _ => Event::Line(Some(rank), Stream::Output, text.to_owned()),
        })
    };
    marked().unwrap_or_else(|| Event::Line(rank, stream, line.to_owned()))
}

/// Shows a line, its rank before it.
pub(super) fn show(rank: Option<usize>, stream: Stream, text: &str) {
    let line = match rank {
        Some(rank) => format!("[{rank}] {text}\n"),
        None => format!("{text}\n"),
    };
    // Whoever does not read it does not want it.
    let _ = match stream {
        Stream::Output => io::stdout().write_all(line.as_bytes()),
        Stream::Error => io::stderr().write_all(line.as_bytes()),
    };
}

/// A process's exit code, as shells say it.
pub(super) fn code(status: ExitStatus) -> i32 {
    #[cfg(unix)]
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    let signal: Option<i32> = None;
    status
        .code()
        .or(signal.map(|signal| 128 + signal))
        .unwrap_or(1)
}

/// Ends a process, if it has not ended: it is asked to, and not for long.
pub(super) fn end(child: &mut Child) -> io::Result<()> {
    if child.try_wait()?.is_some() {
        return Ok(());
    }
    drop(child.stdin.take());
    let _ = Command::new("kill").arg(child.id().to_string()).status();
    let asked = Instant::now();
    while child.try_wait()?.is_none() {
        if asked.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Ends this process when its standard input closes, which whoever started it keeps open.
pub fn die_with_parent() {
    thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = io::stdin().read_to_end(&mut rest);
        std::process::exit(ORPHANED);
    });
}

/// The shim that `mpirun` starts as rank: runs `program`, names its lines, says now and then that it lives, and at last
/// how it ended, which `mpirun` would not tell of each rank. Returns the exit code.
///
/// # Errors
/// What the system says if the program cannot be started.
pub fn run_rank(
    program: &Path,
    arguments: &[OsString],
    environment: &Environment,
) -> io::Result<i32> {
    let place = environment.own_place().unwrap_or(Place::ALONE);
    let rank = place.rank;
    let mut command = Command::new(program);
    command.args(["--transport", "mpi"]).args(arguments);
    command.envs(place.variables());
    let mut child = spawn(&mut command)?;
    say(rank, "error", &format!("is process {}", child.id()));
    let (running, runs) = mpsc::channel::<()>();
    let pulse = thread::spawn(move || {
        loop {
            say(rank, "alive", "");
            if runs.recv_timeout(PULSE) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    });
    let output = child
        .stdout
        .take()
        .map(|pipe| pass_on(pipe, rank, "output"));
    let error = child.stderr.take().map(|pipe| pass_on(pipe, rank, "error"));
    // Waiting would close it, and who is tied to it would end.
    let tie = child.stdin.take();
    let code = code(child.wait()?);
    drop(tie);
    // Nothing is said of a rank after its end.
    drop(running);
    for listener in [Some(pulse), output, error].into_iter().flatten() {
        let _ = listener.join();
    }
    say(rank, "ended", &code.to_string());
    Ok(code)
}

fn pass_on(pipe: impl Read + Send + 'static, rank: usize, kind: &'static str) -> JoinHandle<()> {
    thread::spawn(move || {
        each_line(pipe, |line| {
            let mut rest = line;
            while rest.len() > LONGEST {
                let (piece, left) = rest.split_at(rest.floor_char_boundary(LONGEST));
                say(rank, kind, piece);
                rest = left;
            }
            say(rank, kind, rest);
        });
    })
}

fn say(rank: usize, kind: &str, text: &str) {
    let line = format!("{MARK}{rank}{MARK}{kind}{MARK}{text}\n");
    let mut output = io::stdout().lock();
    let _ = output
        .write_all(line.as_bytes())
        .and_then(|()| output.flush());
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_shims_lines_are_told_from_others() {
        let Event::Line(Some(3), Stream::Error, text) =
            read(None, Stream::Output, "\u{1}3\u{1}error\u{1}a\u{1}b")
        else {
            panic!("a line");
        };
        assert_eq!(text, "a\u{1}b");
        assert!(matches!(
            read(None, Stream::Output, "\u{1}12\u{1}ended\u{1}137"),
            Event::Ended(12, 137)
        ));
        assert!(matches!(
            read(None, Stream::Output, "\u{1}12\u{1}alive\u{1}"),
            Event::Alive(12)
        ));
        for other in ["", "mpirun noticed", "\u{1}x\u{1}ended\u{1}0"] {
            let Event::Line(Some(1), _, text) = read(Some(1), Stream::Output, other) else {
                panic!("a line");
            };
            assert_eq!(text, other);
        }
    }

    #[test]
    #[cfg(unix)]
    fn a_process_that_does_not_listen_is_ended_all_the_same() {
        let (events, happens) = mpsc::channel();
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]);
        let mut child = start(&mut command, Some(0), &events).unwrap();
        assert!(matches!(happens.recv().unwrap(), Event::Line(Some(0), ..)));
        let start = Instant::now();
        end(&mut child).unwrap();
        assert!(start.elapsed() < 2 * PATIENCE);
        assert_eq!(code(child.wait().unwrap()), 128 + 9);
    }
}

//! What is running now, on stderr: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::record::seconds;

/// The progress of a comparison: cases (a strategy on a number of ranks), each held to serial, then timed round by
/// round.
///
/// Writing to stderr may fail (a closed pipe); the comparison does not end for that.
#[derive(Debug)]
pub struct Progress {
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
}

/// Debug by hand: a writer has none.
impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bar(_) => "Bar",
            Self::Lines(_) => "Lines",
        })
    }
}

struct Lines {
    writer: Box<dyn Write + Send>,
    /// Cases to check, then runs to time.
    steps: usize,
    done: usize,
    started: Instant,
}

impl Progress {
    /// For `cases` cases: a bar if stderr is a terminal, else a line for each step.
    pub fn new(cases: usize) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::lines(cases, Box::new(std::io::stderr()));
        }
        let bar = ProgressBar::new(cases as u64);
        // A template that does not parse is a mistake in this file; the default bar then serves.
        if let Ok(style) = ProgressStyle::with_template(
            "{spinner} {elapsed_precise} [{bar:24}] {pos}/{len}, {eta} left · {wide_msg}",
        ) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self {
            shown: Shown::Bar(bar),
        }
    }

    /// Plain lines into `writer`.
    pub fn lines(cases: usize, writer: Box<dyn Write + Send>) -> Self {
        Self {
            shown: Shown::Lines(Mutex::new(Lines {
                writer,
                steps: cases,
                done: 0,
                started: Instant::now(),
            })),
        }
    }

    /// A case is held to serial now.
    pub fn check(&self, strategy: &str, ranks: usize) {
        let step = format!("{}: equality with serial", case(strategy, ranks));
        match &self.shown {
            Shown::Bar(bar) => bar.set_message(step),
            Shown::Lines(lines) => with(lines, |lines| lines.step(&step)),
        }
    }

    /// It has been; `verdict` says in a few words what came of it.
    pub fn checked(&self, verdict: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.inc(1),
            Shown::Lines(lines) => with(lines, |lines| {
                let seconds = lines.started.elapsed().as_secs_f64();
                lines.say(&format!("      {verdict} (after {seconds:.0} s in all)"));
            }),
        }
    }

    /// All have been: `cases` of them are timed in each of `rounds` rounds.
    pub fn rounds(&self, rounds: usize, cases: usize) {
        match &self.shown {
            Shown::Bar(bar) => {
                // The runs to come take as long as those that were checked: none counts for the refused ones.
                bar.set_length((rounds + 1) as u64 * cases as u64);
                bar.set_position(cases as u64);
            }
            Shown::Lines(lines) => with(lines, |lines| {
                (lines.steps, lines.done) = (rounds * cases, 0);
                let (cases, rounds) = (plural(cases, "case"), plural(rounds, "round"));
                lines.say(&format!("{cases} to be timed in {rounds}"));
            }),
        }
    }

    /// A case is timed now, in this round (from 0). A bar only.
    pub fn time(&self, strategy: &str, ranks: usize, round: usize) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_message(run(strategy, ranks, round));
        }
    }

    /// It has been, and took `taken` seconds.
    pub fn timed(&self, strategy: &str, ranks: usize, round: usize, taken: f64) {
        match &self.shown {
            Shown::Bar(bar) => bar.inc(1),
            Shown::Lines(lines) => with(lines, |lines| {
                let run = run(strategy, ranks, round);
                lines.step(&format!("{run}: {}", seconds(taken)));
            }),
        }
    }

    /// Takes the bar away; call it before anything else is printed.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

impl Lines {
    fn step(&mut self, step: &str) {
        self.done += 1;
        self.say(&format!("[{}/{}] {step}", self.done, self.steps));
    }

    fn say(&mut self, line: &str) {
        // A closed stderr does not end a comparison.
        let _ = writeln!(self.writer, "{line}");
    }
}

fn with(lines: &Mutex<Lines>, say: impl FnOnce(&mut Lines)) {
    say(&mut lines
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner));
}

fn case(strategy: &str, ranks: usize) -> String {
    format!("{strategy} on {}", plural(ranks, "rank"))
}

fn run(strategy: &str, ranks: usize, round: usize) -> String {
    format!("{}, round {}", case(strategy, ranks), round + 1)
}

fn plural(number: usize, unit: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {unit}{plural}")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use super::*;

    /// What was written, for tests of those that write.
    #[derive(Clone, Default)]
    pub(crate) struct Page(Arc<Mutex<Vec<u8>>>);

    impl Page {
        pub(crate) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn without_a_terminal_every_step_has_a_line_and_its_end() {
        let page = Page::default();
        let progress = Progress::lines(2, Box::new(page.clone()));
        progress.check("serial", 1);
        progress.checked("equal to serial");
        progress.check("ulysses", 4);
        progress.checked("refused");
        progress.rounds(2, 1);
        progress.time("serial", 1, 1);
        progress.timed("serial", 1, 1, 8.1);
        progress.finish();
        let text = page.text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "[1/2] serial on 1 rank: equality with serial");
        assert!(lines[1].contains("equal to serial (after"), "{text}");
        assert_eq!(lines[2], "[2/2] ulysses on 4 ranks: equality with serial");
        assert!(lines[3].contains("refused"), "{text}");
        assert_eq!(lines[4], "1 case to be timed in 2 rounds");
        assert_eq!(lines[5], "[1/2] serial on 1 rank, round 2: 8.10 s");
        assert_eq!(lines.len(), 6);
    }
}

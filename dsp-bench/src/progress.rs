//! What is running now, on stderr: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// The progress of a comparison: cases (a strategy on a number of ranks), each with its steps.
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
    cases: u64,
    done: u64,
    started: Instant,
}

impl Progress {
    /// For `cases` cases: a bar if stderr is a terminal, else one line for each case.
    pub fn new(cases: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::lines(cases, Box::new(std::io::stderr()));
        }
        let bar = ProgressBar::new(cases);
        // A template that does not parse is a mistake in this file; the default bar then serves.
        if let Ok(style) = ProgressStyle::with_template(
            "{spinner} {elapsed_precise} [{bar:24}] {pos}/{len} cases, {eta} left · {wide_msg}",
        ) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self {
            shown: Shown::Bar(bar),
        }
    }

    /// Plain lines into `writer`.
    pub fn lines(cases: u64, writer: Box<dyn Write + Send>) -> Self {
        Self {
            shown: Shown::Lines(Mutex::new(Lines {
                writer,
                cases,
                done: 0,
                started: Instant::now(),
            })),
        }
    }

    /// A case begins.
    pub fn begin(&self, strategy: &str, ranks: usize) {
        let case = case(strategy, ranks);
        match &self.shown {
            Shown::Bar(bar) => bar.set_message(case),
            Shown::Lines(lines) => with(lines, |lines| {
                let number = lines.done + 1;
                lines.say(&format!("[{number}/{}] {case}", lines.cases));
            }),
        }
    }

    /// What the case does now: `equality with serial`, `warm-up`. A bar only.
    pub fn phase(&self, strategy: &str, ranks: usize, phase: &str) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_message(format!("{}: {phase}", case(strategy, ranks)));
        }
    }

    /// Repeat `repeat` of `repeats` (from 1) runs, the last one having taken `last_seconds`. A bar only.
    pub fn repeat(
        &self,
        strategy: &str,
        ranks: usize,
        repeat: usize,
        repeats: usize,
        last_seconds: Option<f64>,
    ) {
        if let Shown::Bar(bar) = &self.shown {
            let last = last_seconds.map_or(String::new(), |s| format!(", the last took {s:.2} s"));
            bar.set_message(format!(
                "{}: repeat {repeat} of {repeats}{last}",
                case(strategy, ranks)
            ));
        }
    }

    /// The case has ended; `summary` says how in a few words (`5.12 s`, `refused`).
    pub fn end(&self, summary: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.inc(1),
            Shown::Lines(lines) => with(lines, |lines| {
                lines.done += 1;
                let seconds = lines.started.elapsed().as_secs_f64();
                lines.say(&format!("      {summary} (after {seconds:.0} s in all)"));
            }),
        }
    }

    /// A line that stays, above the bar.
    pub fn note(&self, line: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.suspend(|| {
                // A closed stderr does not end a comparison.
                let _ = writeln!(std::io::stderr(), "{line}");
            }),
            Shown::Lines(lines) => with(lines, |lines| lines.say(line)),
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
    let unit = if ranks == 1 { "rank" } else { "ranks" };
    format!("{strategy} on {ranks} {unit}")
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
    fn without_a_terminal_every_case_has_a_line_and_its_end() {
        let page = Page::default();
        let progress = Progress::lines(2, Box::new(page.clone()));
        progress.begin("serial", 1);
        progress.repeat("serial", 1, 1, 3, None);
        progress.end("8.10 s");
        progress.begin("ulysses", 4);
        progress.note("heads: 2 for 4 ranks");
        progress.end("refused");
        progress.finish();
        let text = page.text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "[1/2] serial on 1 rank");
        assert!(lines[1].contains("8.10 s"), "{text}");
        assert_eq!(lines[2], "[2/2] ulysses on 4 ranks");
        assert_eq!(lines[3], "heads: 2 for 4 ranks");
        assert!(lines[4].contains("refused"), "{text}");
        assert_eq!(lines.len(), 5);
    }
}

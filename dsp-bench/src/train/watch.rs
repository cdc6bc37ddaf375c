//! What happens in a run, on stderr: a bar on a terminal, lines elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::run::{Event, Line};
use super::task::Measure;

/// Without a terminal a step has a line if none had one for so long.
const QUIET: Duration = Duration::from_secs(5);

/// Tells of a run's events as they come.
///
/// Writing to stderr may fail (a closed pipe); a training does not end for that.
pub struct Watch {
    state: Mutex<State>,
}

struct State {
    out: Out,
    measure: Option<Measure>,
    held_out: Option<f64>,
}

enum Out {
    Bar(ProgressBar),
    Lines {
        writer: Box<dyn Write + Send>,
        steps: u64,
        last: Option<Instant>,
    },
}

/// Debug by hand: a writer has none.
impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// A bar if stderr is a terminal, else lines.
    pub fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::lines(Box::new(std::io::stderr()));
        }
        let bar = ProgressBar::new(0);
        // A template that does not parse is a mistake in this file; the default bar then serves.
        if let Ok(style) = ProgressStyle::with_template(
            "{spinner} {elapsed_precise} [{bar:24}] step {pos}/{len}, {eta} left · {wide_msg}",
        ) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self::on(Out::Bar(bar))
    }

    /// Plain lines into `writer`.
    pub fn lines(writer: Box<dyn Write + Send>) -> Self {
        Self::on(Out::Lines {
            writer,
            steps: 0,
            last: None,
        })
    }

    fn on(out: Out) -> Self {
        Self {
            state: Mutex::new(State {
                out,
                measure: None,
                held_out: None,
            }),
        }
    }

    /// Tells of an event.
    pub fn tell(&self, event: Event<'_>) {
        let state = &mut *self.lock();
        match event {
            Event::Begins {
                step,
                steps,
                measure,
                baselines,
            } => {
                state.measure = Some(measure);
                for baseline in baselines {
                    let (error, unit) = (baseline.error, measure.unit);
                    state.note(&format!("to beat: {error:.4} {unit}, {}", baseline.name));
                }
                match &mut state.out {
                    Out::Bar(bar) => {
                        bar.set_length(steps);
                        bar.set_position(step);
                        // The steps of an earlier part say nothing of this one's speed.
                        bar.reset_eta();
                    }
                    Out::Lines { steps: all, .. } => *all = steps,
                }
            }
            Event::Step(Line::Step {
                step,
                loss,
                gradient_norm,
                tokens_per_second,
                ..
            }) => {
                let held_out = state
                    .held_out
                    .map_or(String::new(), |error| format!(" · held out {error:.4}"));
                let told = format!(
                    "loss {loss:.4} · gradient norm {gradient_norm:.3} · {tokens_per_second:.0} tokens/s{held_out}"
                );
                state.step(*step, &told);
            }
            // What was evaluated has an event of its own.
            Event::Step(Line::HeldOut { .. }) => {}
            Event::Evaluated { step, error } => {
                state.held_out = Some(error);
                let unit = state.measure.map_or("", |measure| measure.unit);
                state.note(&format!("step {step}: held out {error:.4} {unit}"));
            }
            Event::Saved(path) => state.note(&format!("saved {}", path.display())),
            Event::Shows => match &state.out {
                Out::Bar(bar) => bar.set_message("showing what was learnt"),
                Out::Lines { .. } => state.note("showing what was learnt"),
            },
        }
    }

    /// Takes the bar away; call it before anything else is printed.
    pub fn finish(&self) {
        if let Out::Bar(bar) = &self.lock().out {
            bar.finish_and_clear();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Watch {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn step(&mut self, step: u64, told: &str) {
        match &mut self.out {
            Out::Bar(bar) => {
                bar.set_position(step);
                bar.set_message(told.to_owned());
            }
            Out::Lines {
                writer,
                steps,
                last,
            } => {
                if step == *steps || last.is_none_or(|last| last.elapsed() >= QUIET) {
                    *last = Some(Instant::now());
                    // A closed stderr does not end a training.
                    let _ = writeln!(writer, "step {step}/{steps}: {told}");
                }
            }
        }
    }

    /// A line that stays.
    fn note(&mut self, line: &str) {
        // A closed stderr does not end a training.
        match &mut self.out {
            Out::Bar(bar) => bar.suspend(|| {
                let _ = writeln!(std::io::stderr(), "{line}");
            }),
            Out::Lines { writer, .. } => {
                let _ = writeln!(writer, "{line}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::task::Baseline;
    use super::*;
    use crate::progress::tests::Page;

    #[test]
    fn without_a_terminal_the_first_and_the_last_step_and_all_that_stays_have_lines() {
        let page = Page::default();
        let watch = Watch::lines(Box::new(page.clone()));
        let measure = Measure {
            unit: "bits a byte",
            factor: 1.0,
        };
        let baselines = [Baseline {
            name: "pairs of bytes",
            error: 3.25,
        }];
        watch.tell(Event::Begins {
            step: 4,
            steps: 7,
            measure,
            baselines: &baselines,
        });
        for step in 5..=7 {
            watch.tell(Event::Step(&Line::Step {
                step,
                loss: 2.5,
                gradient_norm: 0.125,
                learning_rate: 1e-3,
                tokens_per_second: 1e4,
            }));
        }
        watch.tell(Event::Evaluated {
            step: 7,
            error: 2.0,
        });
        watch.tell(Event::Saved(Path::new("run/step-7")));
        watch.finish();
        let text = page.text();
        let lines: Vec<_> = text.lines().collect();
        let step = |step: u64| {
            format!("step {step}/7: loss 2.5000 · gradient norm 0.125 · 10000 tokens/s")
        };
        let expected = [
            "to beat: 3.2500 bits a byte, pairs of bytes".to_owned(),
            step(5),
            step(7),
            "step 7: held out 2.0000 bits a byte".to_owned(),
            "saved run/step-7".to_owned(),
        ];
        assert_eq!(lines, expected);
    }
}

//! Memory that is wanted next, asked for while a product runs.
//!
//! ```text
//!   products of one head   ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓ pack ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓ pack      arithmetic
//!   rows of the next         ╵  ╵  ╵  ╵  ╵         ╵  ╵  ╵  ╵  ╵           memory: a few lines after each tile
//! ```
//!
//! Small products leave the memory idle, and packing what comes next leaves the arithmetic idle. Rows of a head lie
//! apart, so that the processor does not foresee them. All of them asked for at once would only wait for each other, as
//! a core can have some twenty lines on their way. A hint changes no result.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "a hint names an address")
)]

/// Multiply-adds for each cache line that is asked for, where there are enough: some 11 ns of the arithmetic of a core,
/// in which its memory can deliver more than a line.
const PACE: usize = 512;

/// Lines that are not too many to ask for: half a megabyte, which a second cache can hold beside what is worked on.
const MOST: usize = 1 << 13;

/// f32 in a cache line.
const LINE: usize = 16;

/// Rows in memory, which need not be there to be asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) start: *const f32,
    /// Elements from one row to the next, and of a row.
    pub(crate) stride: usize,
    pub(crate) width: usize,
}

impl Run {
    /// Cache lines of a row, about.
    #[inline(always)]
    fn lines(&self) -> usize {
        self.width.div_ceil(LINE)
    }
}

/// What is wanted next; nothing by default.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    runs: Vec<Run>,
    /// Multiply-adds for each line.
    pace: usize,
    /// The most lines at once.
    burst: usize,
    /// Rows of each run, and which of them is the next.
    rows: usize,
    row: usize,
    /// The run whose row is the next, and which of its lines.
    run: usize,
    line: usize,
    /// Multiply-adds for which nothing has been asked for yet.
    earned: usize,
}

impl Ahead {
    /// Rows of runs, in place of what was wanted before; none, if they are more than a cache holds until they are.
    pub(crate) fn want(&mut self, runs: impl IntoIterator<Item = Run>, rows: usize) {
        self.want_within(runs, rows, usize::MAX, usize::MAX);
    }

    /// The same while so many multiply-adds last: sooner where they would else not be enough for all of them. So
    /// many lines at once, at most: where work is counted often.
    pub(crate) fn want_within(
        &mut self,
        runs: impl IntoIterator<Item = Run>,
        rows: usize,
        multiply_adds: usize,
        burst: usize,
    ) {
        self.runs.clear();
        self.runs.extend(runs);
        let lines = rows * self.runs.iter().map(Run::lines).sum::<usize>();
        self.rows = if lines > MOST { 0 } else { rows };
        self.pace = PACE.min(multiply_adds / lines.max(1));
        self.burst = burst;
        (self.row, self.run, self.line, self.earned) = (0, 0, 0, 0);
    }

    /// Asks for as much as may be, after so many multiply-adds.
    #[inline(always)]
    pub(crate) fn worked(&mut self, multiply_adds: usize) {
        if self.row < self.rows {
            self.ask(multiply_adds);
        }
    }

    #[inline]
    fn ask(&mut self, multiply_adds: usize) {
        self.earned += multiply_adds;
        let mut left = self.burst.min(self.earned / self.pace.max(1));
        self.earned -= left * self.pace;
        while left > 0
            && self.row < self.rows
            && let Some(run) = self.runs.get(self.run)
        {
            let row = run.start.wrapping_add(self.row * run.stride);
            let end = run.lines().min(self.line + left);
            (self.line..end).for_each(|line| fetch(row.wrapping_add(line * LINE)));
            left -= end - self.line;
            self.line = end;
            if end == run.lines() {
                (self.line, self.run) = (0, self.run + 1);
            }
            if self.run == self.runs.len() {
                (self.run, self.row) = (0, self.row + 1);
            }
        }
    }
}

/// Asks for a cache line.
#[inline(always)]
fn fetch(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rows_are_asked_for_in_turn_and_no_faster_than_the_pace() {
        let data = [0.0; 100];
        let run = |width| Run {
            start: data.as_ptr(),
            stride: 20,
            width,
        };
        let mut ahead = Ahead::default();
        ahead.worked(10 * PACE);
        // Two lines and one, for each of three rows.
        ahead.want([run(17), run(16)], 3);
        let mut seen = vec![];
        for _ in 0..10 {
            ahead.worked(PACE);
            seen.push((ahead.row, ahead.run));
        }
        let expected = [
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 0),
            (1, 1),
            (2, 0),
            (2, 0),
            (2, 1),
        ];
        assert_eq!(seen[..8], expected);
        assert_eq!(seen[8..], [(3, 0), (3, 0)]);
        ahead.want([], 3);
        ahead.worked(PACE);
        assert_eq!((ahead.row, ahead.run), (0, 0));
        // Nine lines within 900 multiply-adds.
        ahead.want_within([run(17), run(16)], 3, 900, usize::MAX);
        let seen = [100, 100, 100, 500, 100].map(|work| {
            ahead.worked(work);
            (ahead.row, ahead.run, ahead.line)
        });
        assert_eq!(
            seen,
            [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 1, 0), (3, 0, 0)]
        );
        // No more than four at once, and what is over with the next ones.
        ahead.want_within([run(17), run(16)], 3, 900, 4);
        let seen = [600, 100, 100, 100].map(|work| {
            ahead.worked(work);
            (ahead.row, ahead.run, ahead.line)
        });
        assert_eq!(seen, [(1, 0, 1), (2, 0, 1), (2, 1, 0), (3, 0, 0)]);
        // More than a cache holds.
        ahead.want_within([run(16)], MOST + 1, 100 * PACE * MOST, usize::MAX);
        ahead.worked(10 * PACE);
        assert_eq!((ahead.row, ahead.run), (0, 0));
        ahead.want_within([run(16)], MOST, 100 * PACE * MOST, usize::MAX);
        ahead.worked(10 * PACE);
        assert_eq!((ahead.row, ahead.run), (10, 0));
    }
}

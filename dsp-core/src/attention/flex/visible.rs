//! What some queries see of the keys held here, as ranges of *rows* of keys.
//!
//! A query sees the keys of one range of positions, whatever the mask; the rows that hold them are as many ranges
//! as the keys' own positions have, most often one.

use std::ops::Range;

use crate::attention::Mask;

/// For each of some queries, the rows of keys that it sees: ranges that rise and do not touch.
#[derive(Debug, Default)]
pub(super) struct Visible {
    ranges: Vec<Range<usize>>,
    /// Where the ranges of each query end.
    ends: Vec<usize>,
}

impl Visible {
    /// Of the queries at `queries`, in their order, in one sample.
    pub(super) fn find(
        &mut self,
        mask: &Mask,
        sample: usize,
        queries: impl Iterator<Item = usize>,
        keys: &[Range<usize>],
    ) {
        self.ranges.clear();
        self.ends.clear();
        for query in queries {
            let seen = mask.visible(sample, query);
            let begin = self.ranges.len();
            let mut row = 0;
            for held in keys {
                let first = held.start.max(seen.start);
                let last = held.end.min(seen.end);
                if first < last {
                    let rows = row + (first - held.start)..row + (last - held.start);
                    match self.ranges[begin..].last_mut() {
                        Some(before) if before.end == rows.start => before.end = rows.end,
                        _ => self.ranges.push(rows),
                    }
                }
                row += held.len();
            }
            self.ends.push(self.ranges.len());
        }
    }

    /// What the query sees of all keys.
    #[inline(always)]
    pub(super) fn of(&self, query: usize) -> &[Range<usize>] {
        let begin = query.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.ranges[begin..self.ends[query]]
    }

    /// From the first to the last row of `keys` that one of the `queries` sees; empty if there is none.
    #[inline(always)]
    pub(super) fn hull(&self, queries: Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let mut hull = keys.end..keys.start;
        for query in queries {
            for seen in self.of(query) {
                let (first, last) = (seen.start.max(keys.start), seen.end.min(keys.end));
                if first < last {
                    hull = hull.start.min(first)..hull.end.max(last);
                }
            }
        }
        hull
    }

    /// Sets the scores of the keys that `query` does not see to −∞; `row` holds those of the keys from `first` on.
    #[inline(always)]
    pub(super) fn hide(&self, query: usize, row: &mut [f32], first: usize) {
        let mut from = 0;
        for seen in self.of(query) {
            let start = seen.start.saturating_sub(first).min(row.len());
            let end = seen.end.saturating_sub(first).min(row.len());
            if start < end {
                row[from..start].fill(f32::NEG_INFINITY);
                from = end;
            }
        }
        row[from..].fill(f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_sees_the_rows_whose_positions_its_mask_shows() {
        let mut visible = Visible::default();
        // Rows 0..3 are at 4..7, rows 3..5 at 0..2, rows 5..8 at 7..10.
        visible.find(
            &Mask::Causal,
            0,
            [0, 5, 8].into_iter(),
            &[4..7, 0..2, 7..10],
        );
        assert_eq!(visible.of(0), [3..4]);
        assert_eq!(visible.of(1), [0..2, 3..5]);
        assert_eq!(visible.of(2), [0..7]);
        assert_eq!(visible.hull(0..2, &(0..8)), 0..5);
        assert_eq!(visible.hull(1..2, &(1..4)), 1..4);
        assert!(visible.hull(0..1, &(4..8)).is_empty());
        let mut row = [1.0; 5];
        visible.hide(1, &mut row, 1);
        let hidden = f32::NEG_INFINITY;
        assert_eq!(row, [1.0, hidden, 1.0, 1.0, hidden]);
    }
}

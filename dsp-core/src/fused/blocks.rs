//! Rows in blocks that the threads of the rank's pool share.

use std::ops::Range;

use rayon::prelude::*;

/// How many elements a block has, about: a block and what is read beside it fit a core's own cache.
const BLOCK: usize = 1 << 14;

/// The rows of a group where all are of one.
pub(crate) const WHOLE: usize = usize::MAX;

/// `count` rows of `width` elements in blocks, of which none lies in two groups of `group` rows, each with the number of
/// its elements; none if there is nothing in them.
///
/// They do not depend on the number of threads, so neither does the order of any sum.
pub(super) fn cut(count: usize, width: usize, group: usize) -> Vec<(usize, Range<usize>)> {
    if count * width == 0 {
        return vec![];
    }
    let rows = (BLOCK / width).max(1);
    let mut blocks = vec![];
    let mut start = 0;
    while start < count {
        let of_group = count.min((start / group + 1).saturating_mul(group));
        let end = of_group.min(start + rows);
        blocks.push(((end - start) * width, start..end));
        start = end;
    }
    blocks
}

/// `values` in parts of such lengths.
///
/// # Panics
/// If they are more than there are.
pub(super) fn split<T>(
    mut values: &mut [T],
    lengths: impl Iterator<Item = usize>,
) -> impl Iterator<Item = &mut [T]> {
    lengths.map(move |length| {
        let (part, rest) = std::mem::take(&mut values).split_at_mut(length);
        values = rest;
        part
    })
}

/// Calls `work` for each block on the pool's threads; what it returns, in the order of the blocks.
pub(super) fn each<B: Send, R: Send>(
    blocks: Vec<B>,
    work: impl Fn(B) -> R + Send + Sync,
) -> Vec<R> {
    if rayon::current_num_threads() == 1 || blocks.len() == 1 {
        return blocks.into_iter().map(work).collect();
    }
    blocks.into_par_iter().map(work).collect()
}

/// Calls `work` for `count` rows of `width` elements in blocks; what it returns, in the order of the blocks.
pub(super) fn over<R: Send>(
    count: usize,
    width: usize,
    work: impl Fn(Range<usize>) -> R + Send + Sync,
) -> Vec<R> {
    each(cut(count, width, WHOLE), |(_, rows)| work(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_rows_in_order_and_end_where_groups_do() {
        for (count, width) in [
            (1, 1),
            (7, BLOCK),
            (100, BLOCK / 8),
            (100, 3 * BLOCK),
            (5000, 6),
        ] {
            for group in [1, 3, 25, 100, WHOLE] {
                let blocks = cut(count, width, group);
                let rows = blocks.iter().flat_map(|(_, rows)| rows.clone());
                assert!(rows.eq(0..count));
                for (elements, rows) in blocks {
                    assert_eq!(elements, rows.len() * width);
                    assert_eq!(rows.start / group, (rows.end - 1) / group);
                    assert!(rows.len() == 1 || elements <= BLOCK);
                }
            }
        }
        assert!(cut(0, 3, 5).is_empty() && cut(3, 0, 5).is_empty() && cut(0, 0, 1).is_empty());
    }
}

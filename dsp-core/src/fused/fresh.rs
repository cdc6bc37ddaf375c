//! New memory that threads write whole, part by part, and that is not cleared before.
//!
//! ```text
//!   part 0 ▓▓▓▓▓▓▒▒▒▒░░░░     ▓ written, and may be read and changed   ▒ being written   ░ nobody has been here
//! ```

#![expect(
    unsafe_code,
    reason = "memory that is about to be written whole is not cleared before"
)]

use std::mem::MaybeUninit;

use super::blocks::{each, split};

/// A part of new memory, which is written from its beginning to its end.
pub(crate) struct Part<'a, E> {
    memory: &'a mut [MaybeUninit<E>],
    /// How many of its elements have been written, from the first: all that is ever read of it.
    written: usize,
}

impl<E: Copy> Part<'_, E> {
    /// Writes the next elements, and lends them to be changed.
    ///
    /// # Panics
    /// If there is no room for them, or they are fewer than they say.
    #[inline(always)]
    pub(crate) fn extend(&mut self, values: impl ExactSizeIterator<Item = E>) -> &mut [E] {
        let next = &mut self.memory[self.written..][..values.len()];
        let mut count = 0;
        for (place, value) in next.iter_mut().zip(values) {
            place.write(value);
            count += 1;
        }
        assert_eq!(count, next.len(), "the elements that were to come");
        self.written += count;
        // SAFETY: as many places were written, in their order, as there are.
        unsafe { next.assume_init_mut() }
    }

    /// Writes the next elements, a copy of these, and lends them to be changed.
    ///
    /// # Panics
    /// If there is no room for them.
    #[inline(always)]
    pub(crate) fn extend_from_slice(&mut self, values: &[E]) -> &mut [E] {
        let next = &mut self.memory[self.written..][..values.len()];
        self.written += values.len();
        next.write_copy_of_slice(values)
    }

    /// All elements that have been written.
    pub(crate) fn values(&mut self) -> &mut [E] {
        // SAFETY: the first `written` have been: it grows by what was written behind them.
        unsafe { self.memory[..self.written].assume_init_mut() }
    }
}

/// New memory, a part for each of the blocks, with its length: calls `write` for each on the pool's threads. What it
/// returns comes beside, in the order of the blocks.
///
/// # Panics
/// If a part has not been written to its end.
pub(crate) fn written<B: Send, E: Copy + Send, R: Send>(
    blocks: Vec<(usize, B)>,
    write: impl Fn(B, &mut Part<'_, E>) -> R + Send + Sync,
) -> (Vec<E>, Vec<R>) {
    let lengths: Vec<usize> = blocks.iter().map(|(length, _)| *length).collect();
    let count = lengths.iter().sum();
    let mut values = Vec::with_capacity(count);
    let memory = split(
        &mut values.spare_capacity_mut()[..count],
        lengths.into_iter(),
    );
    let parts = memory
        .zip(blocks)
        .map(|(memory, (_, block))| (memory, block));
    let results = each(parts.collect(), |(memory, block)| {
        let first = memory.as_ptr();
        let mut part = Part { memory, written: 0 };
        let result = write(block, &mut part);
        assert!(
            part.memory.as_ptr() == first,
            "no other part was put in this one's place"
        );
        (part.written, result)
    });
    let (written, results): (Vec<usize>, Vec<R>) = results.into_iter().unzip();
    assert_eq!(
        written.iter().sum::<usize>(),
        count,
        "every element of new memory is written"
    );
    // SAFETY: the capacity is `count`; the parts do not overlap, of each its first `written` elements have been, and
    // those are as many as there are.
    unsafe { values.set_len(count) };
    (values, results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_written_in_any_way_and_lie_end_to_end() {
        let blocks = vec![(3, 10), (0, 20), (4, 30)];
        let (values, results) = written(blocks, |first: i32, part| {
            match first {
                10 => part.extend([1, 2, 3].into_iter())[1] = 7,
                30 => {
                    part.extend_from_slice(&[4, 5]);
                    part.extend([6].into_iter());
                    part.extend_from_slice(&[8]);
                    part.values()[0] += 1;
                }
                _ => {}
            }
            first + 1
        });
        assert_eq!(values, [1, 7, 3, 5, 5, 6, 8]);
        assert_eq!(results, [11, 21, 31]);
    }

    #[test]
    #[should_panic(expected = "is written")]
    fn a_part_that_was_not_written_whole_is_never_handed_out() {
        written(vec![(2, ())], |(), part| {
            part.extend_from_slice(&[1.0]);
        });
    }

    #[test]
    #[should_panic(expected = "no other part")]
    fn a_part_does_not_count_for_another() {
        let elsewhere: &'static mut [MaybeUninit<f32>] =
            Box::leak(Box::new([MaybeUninit::new(1.0)]));
        let elsewhere = std::sync::Mutex::new(Some(elsewhere));
        written(vec![(1, ())], |(), part: &mut Part<'_, f32>| {
            let memory = elsewhere.lock().unwrap().take().unwrap();
            *part = Part { memory, written: 1 };
        });
    }

    /// Says that there are more than come.
    struct Fewer(usize);

    impl Iterator for Fewer {
        type Item = u8;

        fn next(&mut self) -> Option<u8> {
            self.0 = self.0.checked_sub(1)?;
            Some(1)
        }
    }

    impl ExactSizeIterator for Fewer {
        fn len(&self) -> usize {
            self.0 + 1
        }
    }

    #[test]
    #[should_panic(expected = "the elements that were to come")]
    fn elements_that_do_not_come_are_missed() {
        written(vec![(3, ())], |(), part| {
            part.extend(Fewer(2));
        });
    }
}

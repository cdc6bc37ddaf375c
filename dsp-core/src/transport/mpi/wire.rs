//! What processes tell each other, and which bytes of an exchange are a message.
//!
//! Whoever enters an exchange *announces* it to the other members, with the call itself and the sizes of the
//! messages that follow. Nobody receives data for which it has no matching call, so a divergence is found
//! before a byte of it is misread, and a message never has another size than its receiver thinks.
//!
//! ```text
//! box of the sender's block        messages                       receiver's block
//! ┌──────────┐                     its longest runs that lie      ┌────┐
//! │   ▒▒▒▒   │   long runs         end to end in both blocks,     │▒▒▒▒│   where they belong,
//! │   ▒▒▒▒   │  ──────────────▶    straight from the tensor's  ▶  │▒▒▒▒│   without a copy
//! │   ▒▒▒▒   │                     memory                         │▒▒▒▒│
//! └──────────┘                                                    └────┘
//!               short runs         all boxes end to end, packed   laid out, or summed, by the receiver
//! ```

use serde::{Deserialize, Serialize};

use crate::blocks::{DIMS, Transfer};
use crate::error::{Call, CommError};
use crate::transport::waits::Wait;

/// The tag of control messages; data have tags of their own.
pub(super) const CONTROL: i32 = 0;

/// Tags of data, in turn. Far more than can be under way, and fewer than every MPI allows.
pub(super) const DATA_TAGS: std::ops::Range<i32> = 1..32_000;

/// The most bytes of one message: counts of elements are `int` in most MPI libraries.
pub(super) const LARGEST: usize = 1 << 30;

/// A run shorter than this is not worth a message of its own.
pub(super) const SHORTEST_RUN: usize = 64 << 10;

/// A control message, of one of the launches that follow each other in a process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Envelope {
    pub(super) launch: u64,
    pub(super) message: Message,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// The sender has entered an exchange.
    Entered(Announcement),
    /// The sender has found a cause to fail.
    Found(CommError),
    /// What the sender's rank waits for, now that somebody's wait is over.
    Waits(Wait),
    /// The launch has failed: the one cause for all.
    Fate(CommError),
    /// The sender's rank has returned.
    Returned,
    /// The sender has heard all ranks return, and that everybody entered what it entered.
    Balanced,
    /// The launch has succeeded.
    Done,
    /// The sender's process ends; said again to those that have not said so themselves.
    Bye,
    /// The sender's process has heard that, and does not end yet.
    Here,
}

/// What a rank says when it enters an exchange.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Announcement {
    /// Which group.
    pub(super) group: u64,
    /// Which exchange of it, and what the rank called.
    pub(super) call: Call,
    /// Of the blocks before and after.
    pub(super) digest: u64,
    /// The tag of the data that follow.
    pub(super) tag: i32,
    /// How many bytes each message for the receiver has.
    pub(super) sizes: Vec<usize>,
}

/// How the boxes that one rank hands to another travel. Sender and receiver find the same.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Runs of elements straight from the sender's block (row-major) into the receiver's.
    Runs(Vec<Run>),
    /// All boxes end to end, each row-major: this many elements.
    Packed(usize),
}

/// Elements that lie end to end in both blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    /// Where in the sender's block.
    pub(super) source: usize,
    /// Where in the receiver's.
    pub(super) target: usize,
    /// How many.
    pub(super) length: usize,
}

/// Finds the route of `transfers` between blocks of the given shapes, of elements of `width` bytes.
pub(super) fn route(
    transfers: &[Transfer],
    sender: [usize; DIMS],
    receiver: [usize; DIMS],
    width: usize,
) -> Route {
    let elements = || transfers.iter().map(|t| t.source.elements()).sum();
    let mut runs = Vec::new();
    for transfer in transfers {
        let (length, starts) = runs_of(transfer, sender, receiver);
        if length * width < SHORTEST_RUN {
            return Route::Packed(elements());
        }
        runs.extend(starts.map(|(source, target)| Run {
            source,
            target,
            length,
        }));
    }
    Route::Runs(runs)
}

/// The length of a box's longest runs, and where each begins in either block.
fn runs_of(
    transfer: &Transfer,
    sender: [usize; DIMS],
    receiver: [usize; DIMS],
) -> (usize, impl Iterator<Item = (usize, usize)>) {
    let Transfer { source, target } = *transfer;
    let extent = source.extent;
    // The dims from `inner` on are one run: all of them but the first are whole in both blocks.
    let mut inner = DIMS - 1;
    while inner > 0 && extent[inner] == sender[inner] && extent[inner] == receiver[inner] {
        inner -= 1;
    }
    let length = extent[inner..].iter().product();
    let outer: usize = extent[..inner].iter().product();
    let starts = (0..outer).map(move |mut index| {
        let mut at = [0; DIMS];
        for dim in (0..inner).rev() {
            at[dim] = index % extent[dim];
            index /= extent[dim];
        }
        let offset = |start: [usize; DIMS], shape: [usize; DIMS]| {
            (0..DIMS).fold(0, |flat, dim| flat * shape[dim] + start[dim] + at[dim])
        };
        (offset(source.start, sender), offset(target.start, receiver))
    });
    (length, starts)
}

impl Route {
    /// The messages, as ranges of bytes of the *sender's* bytes: of its block, or of its packed boxes.
    pub(super) fn sent(&self, width: usize) -> Vec<std::ops::Range<usize>> {
        match self {
            Self::Runs(runs) => (runs.iter())
                .flat_map(|run| chunks(run.source * width, run.length * width))
                .collect(),
            Self::Packed(elements) => chunks(0, elements * width).collect(),
        }
    }

    /// The same messages end to end, as they lie in a buffer of their own.
    pub(super) fn end_to_end(&self, width: usize) -> Vec<std::ops::Range<usize>> {
        let mut start = 0;
        (self.sent(width).into_iter())
            .map(|message| {
                let end = start + message.len();
                std::mem::replace(&mut start, end)..end
            })
            .collect()
    }

    /// The same messages where they land in the receiver's block, if they can land there.
    pub(super) fn landed(&self, width: usize) -> Option<Vec<std::ops::Range<usize>>> {
        match self {
            Self::Runs(runs) => Some(
                (runs.iter())
                    .flat_map(|run| chunks(run.target * width, run.length * width))
                    .collect(),
            ),
            Self::Packed(_) => None,
        }
    }
}

/// `bytes` bytes from `start` in messages that are not too large.
fn chunks(start: usize, bytes: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let end = start + bytes;
    (start..end)
        .step_by(LARGEST)
        .map(move |start| start..end.min(start + LARGEST))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::{Blocks, DimBlocks};
    use crate::partition::Partition;

    /// Every element of every box, as (in the sender's block, in the receiver's).
    fn pairs(
        transfers: &[Transfer],
        from: [usize; DIMS],
        to: [usize; DIMS],
    ) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        for transfer in transfers {
            let (length, starts) = runs_of(transfer, from, to);
            for (source, target) in starts {
                pairs.extend((0..length).map(|i| (source + i, target + i)));
            }
        }
        pairs
    }

    #[test]
    fn runs_are_the_boxes_element_by_element() {
        let whole = Blocks::replicated([2, 7, 1, 5, 3], 3);
        let split =
            |dim, partition: Partition| whole.clone().with_dim(dim, DimBlocks::split(&partition));
        let rows = split(1, Partition::zigzag(7, 3));
        let columns = split(3, Partition::balanced(5, 3));
        let index = |start: [usize; DIMS], at: [usize; DIMS], shape: [usize; DIMS]| {
            (0..DIMS).fold(0, |flat, dim| flat * shape[dim] + start[dim] + at[dim])
        };
        for (before, after) in [
            (&rows, &columns),
            (&columns, &rows),
            (&rows, &whole),
            (&whole, &columns),
        ] {
            for (source, target) in [(0, 1), (1, 0), (2, 2), (2, 0)] {
                let transfers = before.transfers(after, source, target);
                let (from, to) = (before.local_shape(source), after.local_shape(target));
                let mut expected = Vec::new();
                for transfer in &transfers {
                    let [a, b, c, d, e] = transfer.source.extent;
                    for flat in 0..a * b * c * d * e {
                        let at = [
                            flat / (b * c * d * e),
                            flat / (c * d * e) % b,
                            flat / (d * e) % c,
                            flat / e % d,
                            flat % e,
                        ];
                        expected.push((
                            index(transfer.source.start, at, from),
                            index(transfer.target.start, at, to),
                        ));
                    }
                }
                assert_eq!(pairs(&transfers, from, to), expected);
            }
        }
    }

    #[test]
    fn a_message_of_more_than_two_to_the_31_elements_is_several() {
        let elements = (1 << 31) + 5;
        let shape = [1, elements, 1, 1, 1];
        let after = Blocks::replicated(shape, 2);
        let transfers = after.transfers(&after, 0, 1);
        let route = route(&transfers, shape, shape, 2);
        let sizes: Vec<_> = (route.sent(2).into_iter()).map(|m| m.len()).collect();
        assert_eq!(sizes, [LARGEST, LARGEST, LARGEST, LARGEST, 10]);
        assert_eq!(route.sent(2), route.end_to_end(2));
        assert_eq!(route.landed(2), Some(route.sent(2)));
    }
}

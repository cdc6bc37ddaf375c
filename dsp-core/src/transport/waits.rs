//! Who waits for whom: of ranks that wait in a row, the last one knows the rank that is to blame.
//!
//! ```text
//!   rank 2 ──waits for──▶ rank 0 ──waits for──▶ rank 1, which waits for nobody: it sleeps, or is gone
//!     ▲ its deadline may pass first                ▲ and yet this one is named
//! ```

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Call, CommError};

/// A rank's wait for others, all ranks as the world numbers them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wait {
    /// What it has called.
    pub(super) call: Call,
    /// Who has not answered.
    pub(super) missing: Vec<usize>,
    /// For how long.
    pub(super) waited: Duration,
}

/// The error of a wait that is over: that of `rank`, or of the one that it leads to. `waits` has each rank's.
///
/// Where ranks wait in a circle nobody is to blame more than another, and the last one's wait is named as it is.
pub(super) fn unanswered(waits: &[Option<Wait>], rank: usize) -> Option<CommError> {
    let waiting = |rank: usize| waits.get(rank).and_then(Option::as_ref);
    let mut row = vec![rank];
    let (rank, wait) = loop {
        let last = row[row.len() - 1];
        let wait = waiting(last)?;
        let further = |member: &&usize| waiting(**member).is_some() && !row.contains(member);
        match wait.missing.iter().find(further) {
            Some(&next) => row.push(next),
            None => break (last, wait),
        }
    };
    let idle: Vec<usize> = (wait.missing.iter().copied())
        .filter(|&member| waiting(member).is_none())
        .collect();
    Some(CommError::Unanswered {
        rank,
        call: wait.call.clone(),
        missing: match idle.is_empty() {
            true => wait.missing.clone(),
            false => idle,
        },
        waited: wait.waited,
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::error::Tracking;
    use crate::ledger::Collective;

    fn wait(sequence: u64, missing: &[usize]) -> Option<Wait> {
        Some(Wait {
            call: Call {
                collective: Collective::AllToAll,
                sequence,
                dtype: DType::F32,
                shape: [1; 5],
                tracking: Tracking::Untracked,
                answers: None,
            },
            missing: missing.to_vec(),
            waited: Duration::from_millis(sequence),
        })
    }

    /// Who is named, by whom, in which call.
    fn named(waits: &[Option<Wait>], rank: usize) -> (usize, Vec<usize>, u64) {
        match unanswered(waits, rank) {
            Some(CommError::Unanswered {
                rank,
                missing,
                call,
                ..
            }) => (rank, missing, call.sequence),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_row_of_waits_leads_to_the_rank_that_waits_for_nobody() {
        let waits = [wait(4, &[1]), None, wait(5, &[0]), wait(6, &[2, 0])];
        for rank in [0, 2, 3] {
            assert_eq!(named(&waits, rank), (0, vec![1], 4));
        }
    }

    #[test]
    fn of_several_missing_only_those_are_named_that_wait_for_nobody() {
        let waits = [wait(1, &[1, 2, 3]), None, wait(1, &[0]), None];
        assert_eq!(named(&waits, 2), (0, vec![1, 3], 1));
    }

    #[test]
    fn a_circle_ends() {
        let waits = [wait(1, &[1]), wait(2, &[0])];
        assert_eq!(named(&waits, 0), (1, vec![0], 2));
        assert_eq!(unanswered(&[None], 0), None);
    }
}

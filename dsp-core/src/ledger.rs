//! What a rank sent: elements, bytes and messages, per collective and per phase, and how long it took.
//!
//! Only payload that leaves the rank counts: what a rank keeps is free, and so is whatever an engine adds on
//! its way. [`crate::cost`] gives the same numbers by formula; tests hold the two equal to the byte.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A kind of collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Collective {
    /// Each rank hands every other rank a part.
    AllToAll,
    /// Every rank gets every rank's part.
    AllGather,
    /// The ranks' terms are summed, each rank gets a part of the sum.
    ReduceScatter,
    /// The ranks' terms are summed, every rank gets the sum.
    AllReduce,
    /// One rank's tensor reaches all.
    Broadcast,
    /// The ranks' terms are summed on one rank.
    Reduce,
    /// Each rank hands its block to a neighbour on a ring.
    RingShift,
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllToAll => "all-to-all",
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllReduce => "all-reduce",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::RingShift => "ring shift",
        })
    }
}

/// In which part of a step something was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The forward pass.
    Forward,
    /// The backward pass.
    Backward,
    /// The reduction of replicated parameters' gradients after it.
    Gradients,
    /// Anything that is not part of a step: checks, results to be shown.
    Outside,
}

/// What was sent under one key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Collectives called.
    pub calls: u64,
    /// Non-empty messages to other ranks.
    pub messages: u64,
    /// Elements sent to other ranks.
    pub elements: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Time spent waiting until the other ranks had called.
    pub waited: Duration,
    /// Time spent moving what arrived.
    pub moved: Duration,
    /// Time for which the engine moved it meanwhile, before the rank came to wait: what overlapped with its other work.
    pub hidden: Duration,
}

impl std::ops::AddAssign for Entry {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.messages += other.messages;
        self.elements += other.elements;
        self.bytes += other.bytes;
        self.waited += other.waited;
        self.moved += other.moved;
        self.hidden += other.hidden;
    }
}

/// A reading of a [`Ledger`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    entries: BTreeMap<(Phase, Collective), Entry>,
}

impl Traffic {
    /// Each phase and collective with what was sent.
    pub fn iter(&self) -> impl Iterator<Item = (Phase, Collective, &Entry)> {
        self.entries
            .iter()
            .map(|(&(phase, collective), entry)| (phase, collective, entry))
    }

    /// All collectives of one phase together.
    pub fn phase(&self, phase: Phase) -> Entry {
        self.total(|key, _| key == phase)
    }

    /// One collective of one phase.
    pub fn entry(&self, phase: Phase, collective: Collective) -> Entry {
        self.total(|p, c| p == phase && c == collective)
    }

    fn total(&self, keep: impl Fn(Phase, Collective) -> bool) -> Entry {
        let mut total = Entry::default();
        for (phase, collective, entry) in self.iter() {
            if keep(phase, collective) {
                total += *entry;
            }
        }
        total
    }
}

/// One rank's account of what it sent.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: Mutex<BTreeMap<(Phase, Collective), Entry>>,
}

impl Ledger {
    /// Adds one exchange.
    pub fn record(&self, phase: Phase, collective: Collective, entry: Entry) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        *entries.entry((phase, collective)).or_default() += entry;
    }

    /// What was sent so far.
    pub fn read(&self) -> Traffic {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        Traffic {
            entries: entries.clone(),
        }
    }

    /// What was sent so far; the account starts anew.
    pub fn take(&self) -> Traffic {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        Traffic {
            entries: std::mem::take(&mut entries),
        }
    }
}

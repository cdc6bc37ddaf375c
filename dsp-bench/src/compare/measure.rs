//! From what ranks say of their runs to what a case took and sent.

use std::collections::BTreeMap;

use dsp_core::ledger::Phase;

use super::rank::RankRun;
use crate::record::{CollectiveCount, RankSeconds, RankTraffic, Sent, Timing, Traffic};

/// How long the runs of a case took, each of which all ranks made; `None` without any.
pub(super) fn timing(runs: &[Vec<RankRun>]) -> Option<Timing> {
    let each = (runs.iter()).map(|ranks| (slowest(ranks), ranks.iter().map(spent).collect()));
    Timing::of(each.collect())
}

/// A run takes as long as its slowest rank.
pub(super) fn slowest(ranks: &[RankRun]) -> f64 {
    ranks.iter().map(|rank| rank.seconds).fold(0.0, f64::max)
}

/// How a rank spent a run.
fn spent(run: &RankRun) -> RankSeconds {
    let mut spent = RankSeconds::default();
    for (phase, _, entry) in run.reading.iter() {
        if phase != Phase::Outside {
            spent.waiting_seconds += entry.waited.as_secs_f64();
            spent.communication_seconds += entry.moved.as_secs_f64();
            spent.hidden_seconds += entry.hidden.as_secs_f64();
        }
    }
    spent.compute_seconds = run.seconds - spent.waiting_seconds - spent.communication_seconds;
    spent
}

/// What the ranks sent in a run: in the first one that broke its formula, if any did, else in the last.
pub(super) fn traffic(runs: &[Vec<RankRun>]) -> Traffic {
    let mut each = runs.iter().map(|ranks| sent(ranks));
    let broken = each.find(|traffic| !traffic.equals_formula());
    broken.unwrap_or_else(|| {
        runs.last()
            .map_or_else(Traffic::default, |ranks| sent(ranks))
    })
}

fn sent(ranks: &[RankRun]) -> Traffic {
    let per_rank = ranks.iter().map(|rank| {
        let [forward, backward, parameters] = rank.formula;
        let sent = |phase, formula_bytes| Sent {
            measured_bytes: rank.reading.phase(phase).bytes,
            formula_bytes,
        };
        RankTraffic {
            forward: sent(Phase::Forward, forward),
            backward: sent(Phase::Backward, backward),
            parameters: sent(Phase::Gradients, parameters),
        }
    });
    let mut kinds: BTreeMap<String, CollectiveCount> = BTreeMap::new();
    for (phase, collective, entry) in ranks.iter().take(1).flat_map(|rank| rank.reading.iter()) {
        let kind = collective.to_string();
        let count = kinds.entry(kind.clone()).or_insert(CollectiveCount {
            kind,
            forward: 0,
            backward: 0,
        });
        match phase {
            Phase::Forward => count.forward += entry.calls,
            Phase::Backward | Phase::Gradients => count.backward += entry.calls,
            Phase::Outside => {}
        }
    }
    kinds.retain(|_, count| count.forward + count.backward > 0);
    Traffic {
        per_rank: per_rank.collect(),
        collectives: kinds.into_values().collect(),
    }
}

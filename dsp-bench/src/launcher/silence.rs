//! Who is still heard of: a rank that was, and is silent for too long, is gone, and perhaps its machine with it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The most that counts as silence between two glances: a launcher that was stopped for a while, and its ranks with it,
/// has not listened meanwhile.
const BLINK: Duration = Duration::from_secs(1);

/// How long each rank that is spoken of has been silent, while it was listened to.
#[derive(Debug)]
pub(super) struct Silence {
    limit: Duration,
    ranks: BTreeMap<usize, Duration>,
    glanced: Option<Instant>,
}

impl Silence {
    /// Nobody has been heard of; from then on, nobody may be silent for longer than `limit`.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            ranks: BTreeMap::new(),
            glanced: None,
        }
    }

    /// The longest silence that means nothing.
    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// A rank lives.
    pub(super) fn heard(&mut self, rank: usize) {
        self.ranks.insert(rank, Duration::ZERO);
    }

    /// A rank has ended, and says nothing any more.
    pub(super) fn ended(&mut self, rank: usize) {
        self.ranks.remove(&rank);
    }

    /// Counts the time since the last glance, when all has been heard that was said until `now`; the rank that is silent
    /// for longest, if that is too long, which is then asked for no more.
    pub(super) fn glance(&mut self, now: Instant) -> Option<usize> {
        let since = self.glanced.replace(now).unwrap_or(now);
        let listened = now.saturating_duration_since(since).min(BLINK);
        for silent in self.ranks.values_mut() {
            *silent += listened;
        }
        let longest = self.ranks.iter().max_by_key(|(_, silent)| **silent);
        let (&gone, _) = longest.filter(|(_, silent)| **silent > self.limit)?;
        self.ranks.remove(&gone);
        Some(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Glances at half seconds from `from` to `to`, and who is gone by when.
    fn glances(silence: &mut Silence, start: Instant, from: u64, to: u64) -> Vec<(u64, usize)> {
        let half = Duration::from_millis(500);
        let glance = |at: u64| Some((at, silence.glance(start + half * at as u32)?));
        (from..=to).filter_map(glance).collect()
    }

    #[test]
    fn a_rank_that_was_heard_of_and_has_not_ended_is_gone_after_its_silence() {
        let (mut silence, start) = (Silence::new(Duration::from_secs(3)), Instant::now());
        // Of whom nothing was heard nothing is known.
        assert_eq!(glances(&mut silence, start, 0, 100), []);
        for rank in [0, 1, 2] {
            silence.heard(rank);
        }
        assert_eq!(glances(&mut silence, start, 101, 104), []);
        silence.heard(0);
        silence.ended(2);
        assert_eq!(glances(&mut silence, start, 105, 110), [(107, 1)]);
        assert_eq!(glances(&mut silence, start, 111, 200), [(111, 0)]);

        // Of several it is the one that was silent first.
        let mut at = start + Duration::from_secs(200);
        silence.glance(at);
        silence.heard(1);
        let mut later = |millis| {
            at += Duration::from_millis(millis);
            at
        };
        silence.glance(later(100));
        silence.heard(0);
        for millis in [1000, 1000, 900] {
            assert_eq!(silence.glance(later(millis)), None);
        }
        assert_eq!(silence.glance(later(1000)), Some(1));
    }

    #[test]
    fn while_the_launcher_was_stopped_nobody_was_silent() {
        let (mut silence, start) = (Silence::new(Duration::from_secs(3)), Instant::now());
        silence.heard(0);
        silence.glance(start);
        let hour = start + Duration::from_secs(3600);
        assert_eq!(silence.glance(hour), None);
        assert_eq!(silence.glance(hour + Duration::from_secs(1)), None);
        silence.heard(0);
        assert_eq!(silence.glance(hour + Duration::from_secs(2)), None);
    }
}

//! What all processes agree on, decided in one place: rank 0's process hears everybody, and its word is the order.
//!
//! ```text
//!   rank 0   Entered ──▶ ┌─────┐        all members have entered, with the same call and blocks
//!   rank 1   Entered ──▶ │ hub │ ─ Go ──▶  every member: in one order, whatever groups they are of
//!   rank 2   Late    ──▶ │     │ ─ Fate ─▶ everybody: one cause, that of the first failure
//!            Returned ─▶ └─────┘ ─ Done ─▶ everybody: what all ranks returned
//! ```
//!
//! A mismatch is found before a box moves, as nobody is told to go. And since all go in the hub's order, the boxes of
//! two exchanges that ranks entered in different orders cannot be taken for each other, nor wait for each other.
//!
//! This is the part without sockets, threads or clocks: messages in, messages out.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::wire::{Announcement, Key, Said, Told};
use crate::error::{Call, CommError};
use crate::transport::waits::{self, Wait};

/// After how long a wait is worth telling the hub.
pub(super) const NOTICE: Duration = Duration::from_millis(50);

/// How long it is listened to who else waits, before the one that is missing is named.
const HEARING: Duration = Duration::from_millis(150);

/// For whom a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum To {
    All,
    One(usize),
}

/// What is to be sent, in this order.
pub(super) type Outbox = Vec<(To, Told)>;

#[derive(Debug)]
pub(super) struct Hub {
    size: usize,
    launches: BTreeMap<u64, Launch>,
    /// Which processes have ended.
    gone: Vec<bool>,
    outbox: Outbox,
}

#[derive(Debug)]
struct Launch {
    timeout: Duration,
    opened: Vec<bool>,
    meeting: Option<Vec<u8>>,
    rounds: HashMap<Key, Round>,
    /// Per rank: its last call, what it waits for, and what it returned.
    last: Vec<Option<Call>>,
    waits: Vec<Option<(Announcement, Duration)>>,
    values: Vec<Option<Vec<u8>>>,
    /// Whose deadlines are over, and since when that is known, in this order.
    late: Vec<(usize, Instant)>,
    last_return: Option<Instant>,
    over: bool,
}

/// An exchange that not all members have entered.
#[derive(Debug)]
struct Round {
    exchange: Announcement,
    /// World ranks, in the order in which they came.
    entered: Vec<usize>,
}

impl Round {
    fn missing(&self) -> impl Iterator<Item = usize> {
        let members = self.exchange.members.iter().copied();
        members.filter(|member| !self.entered.contains(member))
    }
}

impl Hub {
    pub(super) fn new(size: usize) -> Self {
        Self {
            size,
            launches: BTreeMap::new(),
            gone: vec![false; size],
            outbox: Vec::new(),
        }
    }

    /// Hears a process.
    pub(super) fn hear(&mut self, from: usize, said: Said, now: Instant) -> Outbox {
        match said {
            Said::Opened {
                launch,
                ranks,
                timeout,
            } => self.opened(from, launch, (ranks, timeout)),
            Said::Meeting { launch, name } => {
                if let Some(state) = self.open_launch(launch) {
                    state.meeting = Some(name);
                }
                self.meet(launch);
            }
            Said::Entered { launch, exchange } => self.entered(from, launch, exchange),
            Said::Waits { launch, wait } => {
                if let Some(state) = self.open_launch(launch) {
                    state.hear_wait(from, wait);
                }
            }
            Said::Late { launch, waited } => {
                if let Some(state) = self.open_launch(launch)
                    && let Some((_, so_far)) = &mut state.waits[from]
                {
                    *so_far = waited;
                    state.late.push((from, now));
                }
            }
            Said::Failed { launch, cause } => self.fail(launch, cause),
            Said::Returned { launch, value } => self.returned(from, launch, value, now),
            Said::Hello { .. } | Said::Bye => self.ended(from),
            // Who delivers messages asked for it.
            Said::Alive => {}
        }
        self.decided()
    }

    /// Notes that a process has ended, or cannot be reached any more.
    pub(super) fn lost(&mut self, rank: usize) -> Outbox {
        self.ended(rank);
        self.decided()
    }

    /// Whether a process has ended.
    pub(super) fn has_lost(&self, rank: usize) -> bool {
        self.gone[rank]
    }

    /// Whether all processes have ended.
    pub(super) fn deserted(&self) -> bool {
        self.gone.iter().all(|&gone| gone)
    }

    /// Looks for deadlines that have passed.
    pub(super) fn look_after(&mut self, now: Instant) -> Outbox {
        let open: Vec<u64> = (self.launches.iter())
            .filter(|(_, state)| !state.over)
            .map(|(&launch, _)| launch)
            .collect();
        for launch in open {
            let cause = self
                .launches
                .get(&launch)
                .and_then(|state| state.unanswered(now).or_else(|| state.stuck(now)));
            if let Some(cause) = cause {
                self.fail(launch, cause);
            }
        }
        self.decided()
    }

    /// What is to be sent. A launch that is over is forgotten when all processes have begun it, for then nothing that is
    /// still said of it begins it anew.
    fn decided(&mut self) -> Outbox {
        (self.launches).retain(|_, state| !state.over || state.opened.contains(&false));
        std::mem::take(&mut self.outbox)
    }

    fn open_launch(&mut self, launch: u64) -> Option<&mut Launch> {
        self.launches.get_mut(&launch).filter(|state| !state.over)
    }

    fn opened(&mut self, from: usize, launch: u64, (ranks, timeout): (usize, Duration)) {
        let size = self.size;
        let state = self.launches.entry(launch).or_insert_with(|| Launch {
            timeout,
            opened: vec![false; size],
            meeting: None,
            rounds: HashMap::new(),
            last: vec![None; size],
            waits: vec![None; size],
            values: vec![None; ranks],
            late: Vec::new(),
            last_return: None,
            over: false,
        });
        state.opened[from] = true;
        if let Some(rank) = self.gone.iter().position(|&gone| gone) {
            self.fail(launch, gone(rank));
        }
        self.meet(launch);
    }

    /// The movers join when all processes have come so far: nobody waits long for another then.
    fn meet(&mut self, launch: u64) {
        let Some(state) = self.open_launch(launch) else {
            return;
        };
        if state.opened.iter().all(|&opened| opened)
            && let Some(name) = state.meeting.take()
        {
            self.outbox.push((To::All, Told::Join { launch, name }));
        }
    }

    fn entered(&mut self, from: usize, launch: u64, exchange: Announcement) {
        let Some(state) = self.launches.get_mut(&launch).filter(|state| !state.over) else {
            return;
        };
        state.last[from] = Some(exchange.call.clone());
        state.hear_wait(from, None);
        let key = exchange.key();
        let round = state.rounds.entry(key).or_insert_with(|| Round {
            exchange: exchange.clone(),
            entered: Vec::new(),
        });
        if let Some(&other) = round.entered.first()
            && let Some(cause) = disagreement(from, &exchange, other, &round.exchange)
        {
            return self.fail(launch, cause);
        }
        round.entered.push(from);
        if round.missing().next().is_none() {
            state.rounds.remove(&key);
            let go = |member| (To::One(member), Told::Go { launch, key });
            self.outbox.extend(exchange.members.into_iter().map(go));
        } else if let Some(cause) = state.deserted(key) {
            self.fail(launch, cause);
        }
    }

    fn returned(&mut self, from: usize, launch: u64, value: Vec<u8>, now: Instant) {
        let Some(state) = self.launches.get_mut(&launch).filter(|state| !state.over) else {
            return;
        };
        if let Some(place) = state.values.get_mut(from) {
            *place = Some(value);
        }
        state.hear_wait(from, None);
        state.last_return = Some(now);
        // The same one of several in every run.
        let deserted = (state.rounds.keys().copied())
            .filter_map(|key| Some((key, state.deserted(key)?)))
            .min_by_key(|(key, _)| *key);
        if let Some((_, cause)) = deserted {
            return self.fail(launch, cause);
        }
        if state.values.iter().all(Option::is_some) {
            state.over = true;
            let values = std::mem::take(&mut state.values);
            let values = values.into_iter().flatten().collect();
            self.outbox.push((To::All, Told::Done { launch, values }));
        }
    }

    fn ended(&mut self, rank: usize) {
        if std::mem::replace(&mut self.gone[rank], true) {
            return;
        }
        let launches: Vec<u64> = self.launches.keys().copied().collect();
        for launch in launches {
            self.fail(launch, gone(rank));
        }
    }

    fn fail(&mut self, launch: u64, cause: CommError) {
        if let Some(state) = self.open_launch(launch) {
            state.over = true;
            state.rounds.clear();
            state.values.clear();
            self.outbox.push((To::All, Told::Fate { launch, cause }));
        }
    }
}

impl Launch {
    fn hear_wait(&mut self, rank: usize, wait: Option<(Announcement, Duration)>) {
        // What it waited for has come after all.
        if wait.is_none() {
            self.late.retain(|&(late, _)| late != rank);
        }
        self.waits[rank] = wait;
    }

    /// Why an exchange can no longer be entered by all.
    fn deserted(&self, key: Key) -> Option<CommError> {
        let round = self.rounds.get(&key)?;
        let returned = |&rank: &usize| self.values.get(rank).is_some_and(Option::is_some);
        Some(CommError::PeerEnded {
            rank: *round.entered.first()?,
            call: round.exchange.call.clone(),
            ended: round.missing().find(returned)?,
        })
    }

    /// The error of the wait that was over first, when it is known who else waits.
    fn unanswered(&self, now: Instant) -> Option<CommError> {
        let &(rank, since) = self.late.first()?;
        if now.saturating_duration_since(since) < HEARING {
            return None;
        }
        let waits: Vec<Option<Wait>> = (self.waits.iter().enumerate())
            .map(|(rank, wait)| {
                let (exchange, waited) = wait.as_ref()?;
                let missing = match self.rounds.get(&exchange.key()) {
                    Some(round) => round.missing().collect(),
                    // All have entered, and something is on its way that does not come.
                    None => (exchange.members.iter().copied())
                        .filter(|&member| member != rank)
                        .collect(),
                };
                Some(Wait {
                    call: exchange.call.clone(),
                    missing,
                    waited: *waited,
                })
            })
            .collect();
        waits::unanswered(&waits, rank)
    }

    /// A rank that neither returns nor calls, when the others have returned for long.
    fn stuck(&self, now: Instant) -> Option<CommError> {
        let waited = now.saturating_duration_since(self.last_return?);
        let rank = self.values.iter().position(Option::is_none)?;
        (waited > self.timeout).then(|| CommError::Stuck {
            rank,
            last: self.last[rank].clone(),
            waited,
        })
    }
}

fn gone(rank: usize) -> CommError {
    CommError::Engine {
        rank,
        message: "its process has ended, or cannot be reached".to_owned(),
    }
}

fn disagreement(
    rank: usize,
    mine: &Announcement,
    other: usize,
    theirs: &Announcement,
) -> Option<CommError> {
    let call = mine.call.clone();
    if mine.call != theirs.call || mine.members != theirs.members {
        return Some(CommError::Mismatch {
            rank,
            call,
            other,
            other_call: theirs.call.clone(),
        });
    }
    (mine.blocks != theirs.blocks).then_some(CommError::Partitions {
        rank,
        call,
        other,
        difference: None,
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::error::Tracking;
    use crate::ledger::Collective;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// A hub of which `ranks` processes have begun launch 0, and the time.
    fn hub(ranks: usize) -> (Hub, Instant) {
        let (mut hub, now) = (Hub::new(ranks), Instant::now());
        for rank in 0..ranks {
            let opened = Said::Opened {
                launch: 0,
                ranks,
                timeout: TIMEOUT,
            };
            assert_eq!(hub.hear(rank, opened, now), []);
        }
        (hub, now)
    }

    fn enter(exchange: Announcement) -> Said {
        Said::Entered {
            launch: 0,
            exchange,
        }
    }

    fn goes(outbox: &Outbox) -> Vec<(usize, u64)> {
        let go = |message: &(To, Told)| match message {
            (To::One(rank), Told::Go { key, .. }) => (*rank, key.1),
            other => panic!("{other:?}"),
        };
        outbox.iter().map(go).collect()
    }

    fn fate(outbox: Outbox) -> CommError {
        match &outbox[..] {
            [(To::All, Told::Fate { launch: 0, cause })] => cause.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nobody_goes_before_all_members_have_entered() {
        let (mut hub, now) = hub(3);
        assert_eq!(hub.hear(2, enter(Announcement::of(&[0, 1, 2], 0)), now), []);
        assert_eq!(hub.hear(0, enter(Announcement::of(&[0, 1, 2], 0)), now), []);
        let outbox = hub.hear(1, enter(Announcement::of(&[0, 1, 2], 0)), now);
        assert_eq!(goes(&outbox), [(0, 0), (1, 0), (2, 0)]);
    }

    #[test]
    fn exchanges_of_two_groups_entered_in_different_orders_are_made_in_one_order() {
        let (mut hub, now) = hub(3);
        let (first, second) = (Announcement::of(&[0, 1], 4), Announcement::of(&[1, 0], 9));
        assert_eq!(hub.hear(0, enter(first.clone()), now), []);
        assert_eq!(hub.hear(1, enter(second.clone()), now), []);
        let mut heard = goes(&hub.hear(0, enter(second), now));
        heard.extend(goes(&hub.hear(1, enter(first), now)));
        assert_eq!(heard, [(1, 9), (0, 9), (0, 4), (1, 4)]);
    }

    #[test]
    fn another_collective_dtype_shape_or_partition_is_found_before_anybody_goes() {
        let changes: [fn(&mut Announcement); 4] = [
            |other| other.call.collective = Collective::AllGather,
            |other| other.call.dtype = DType::F64,
            |other| other.call.shape[1] = 9,
            |other| other.call.tracking = Tracking::Untracked,
        ];
        for change in changes {
            let (mut hub, now) = hub(3);
            let mut other = Announcement::of(&[0, 1, 2], 0);
            change(&mut other);
            assert_eq!(hub.hear(2, enter(Announcement::of(&[0, 1, 2], 0)), now), []);
            let cause = fate(hub.hear(1, enter(other.clone()), now));
            let expected = CommError::Mismatch {
                rank: 1,
                call: other.call,
                other: 2,
                other_call: Announcement::of(&[0, 1, 2], 0).call,
            };
            assert_eq!(cause, expected);
            // The launch is over, with one cause.
            assert_eq!(hub.hear(0, enter(Announcement::of(&[0, 1, 2], 0)), now), []);
        }
        let (mut hub, now) = hub(2);
        let mut other = Announcement::of(&[0, 1], 0);
        other.blocks = 8;
        assert_eq!(hub.hear(0, enter(Announcement::of(&[0, 1], 0)), now), []);
        let cause = fate(hub.hear(1, enter(other), now));
        assert!(
            matches!(
                cause,
                CommError::Partitions {
                    rank: 1,
                    other: 0,
                    ..
                }
            ),
            "{cause}"
        );
    }

    #[test]
    fn of_ranks_that_wait_for_each_other_the_one_that_waits_for_nobody_is_named() {
        let (mut hub, now) = hub(3);
        let (all, two) = (
            Announcement::of(&[0, 1, 2], 0),
            Announcement::of(&[0, 1], 0),
        );
        let waits = |exchange: &Announcement| Said::Waits {
            launch: 0,
            wait: Some((exchange.clone(), NOTICE)),
        };
        // Rank 2 waits for 0, which waits for 1, which does nothing; 2's deadline is over first.
        for (rank, exchange) in [(2, &all), (0, &two)] {
            assert_eq!(hub.hear(rank, enter(exchange.clone()), now), []);
            assert_eq!(hub.hear(rank, waits(exchange), now), []);
        }
        let late = Said::Late {
            launch: 0,
            waited: TIMEOUT,
        };
        assert_eq!(hub.hear(2, late, now), []);
        assert_eq!(hub.look_after(now), []);
        let cause = fate(hub.look_after(now + HEARING));
        let expected = CommError::Unanswered {
            rank: 0,
            call: two.call,
            missing: vec![1],
            waited: NOTICE,
        };
        assert_eq!(cause, expected);
    }

    #[test]
    fn a_deadline_that_is_over_is_not_forgotten_when_what_an_earlier_one_waited_for_comes() {
        let (mut hub, now) = hub(4);
        let (first, second) = (Announcement::of(&[0, 1], 0), Announcement::of(&[2, 3], 0));
        for (rank, exchange) in [(0, &first), (2, &second)] {
            let waits = Said::Waits {
                launch: 0,
                wait: Some((exchange.clone(), NOTICE)),
            };
            let late = Said::Late {
                launch: 0,
                waited: TIMEOUT,
            };
            for said in [enter(exchange.clone()), waits, late] {
                assert_eq!(hub.hear(rank, said, now), []);
            }
        }
        assert_eq!(goes(&hub.hear(1, enter(first), now)), [(0, 0), (1, 0)]);
        let came = Said::Waits {
            launch: 0,
            wait: None,
        };
        assert_eq!(hub.hear(0, came, now), []);
        assert_eq!(hub.look_after(now), []);
        let expected = CommError::Unanswered {
            rank: 2,
            call: second.call,
            missing: vec![3],
            waited: TIMEOUT,
        };
        assert_eq!(fate(hub.look_after(now + HEARING)), expected);
    }

    #[test]
    fn an_exchange_that_a_member_has_left_behind_is_an_error_on_whichever_side_comes_first() {
        for returns_first in [true, false] {
            let (mut hub, now) = hub(2);
            let returned = Said::Returned {
                launch: 0,
                value: vec![],
            };
            let mut said = [(0, enter(Announcement::of(&[0, 1], 3))), (1, returned)];
            if returns_first {
                said.reverse();
            }
            let [(first, before), (second, after)] = said;
            assert_eq!(hub.hear(first, before, now), []);
            let cause = fate(hub.hear(second, after, now));
            assert!(
                matches!(
                    cause,
                    CommError::PeerEnded {
                        rank: 0,
                        ended: 1,
                        ..
                    }
                ),
                "{cause}"
            );
        }
    }

    #[test]
    fn a_launch_ends_with_all_values_and_a_rank_that_never_returns_is_named() {
        let returned = |value: u8| Said::Returned {
            launch: 0,
            value: vec![value],
        };
        let (mut hub, now) = hub(2);
        assert_eq!(hub.hear(1, returned(5), now), []);
        assert_eq!(hub.look_after(now + TIMEOUT), []);
        let values = vec![vec![4], vec![5]];
        let done = Told::Done { launch: 0, values };
        assert_eq!(hub.hear(0, returned(4), now), [(To::All, done)]);
        assert_eq!(hub.look_after(now + 3 * TIMEOUT), []);

        let (mut hub, now) = self::hub(2);
        assert_eq!(hub.hear(1, returned(5), now), []);
        let cause = fate(hub.look_after(now + 2 * TIMEOUT));
        assert!(
            matches!(
                cause,
                CommError::Stuck {
                    rank: 0,
                    last: None,
                    ..
                }
            ),
            "{cause}"
        );
    }

    #[test]
    fn a_launch_that_is_over_is_forgotten_when_all_have_begun_it_and_nothing_begins_it_anew() {
        let opened = Said::Opened {
            launch: 0,
            ranks: 2,
            timeout: TIMEOUT,
        };
        let returned = |value| Said::Returned { launch: 0, value };
        let failed = Said::Failed {
            launch: 0,
            cause: gone(0),
        };
        for ends_well in [true, false] {
            // Rank 2 has no part in it, and comes late.
            let (mut hub, now) = (Hub::new(3), Instant::now());
            for rank in 0..2 {
                assert_eq!(hub.hear(rank, opened.clone(), now), []);
            }
            if ends_well {
                let value = vec![4; 100];
                let place = value.as_ptr();
                assert_eq!(hub.hear(0, returned(value), now), []);
                let outbox = hub.hear(1, returned(vec![5]), now);
                let [(To::All, Told::Done { values, .. })] = &outbox[..] else {
                    panic!("{outbox:?}");
                };
                assert_eq!(values[0].as_ptr(), place, "handed on, not copied");
            } else {
                assert_eq!(fate(hub.hear(1, failed.clone(), now)), gone(0));
            }
            assert!(hub.launches[&0].values.is_empty());
            assert_eq!(hub.hear(2, opened.clone(), now), []);
            let exchange = Announcement::of(&[0, 1], 0);
            let late = [
                enter(exchange.clone()),
                Said::Waits {
                    launch: 0,
                    wait: Some((exchange, NOTICE)),
                },
                Said::Late {
                    launch: 0,
                    waited: TIMEOUT,
                },
                Said::Meeting {
                    launch: 0,
                    name: vec![1],
                },
                returned(vec![6]),
                failed.clone(),
            ];
            for said in late {
                assert_eq!(hub.hear(0, said, now), []);
                assert!(hub.launches.is_empty());
            }
            assert_eq!(hub.look_after(now + 10 * TIMEOUT), []);
            assert_eq!(hub.lost(0), []);
        }
    }

    #[test]
    fn a_process_that_is_gone_fails_the_launch_that_is_open_and_those_that_follow() {
        let (mut hub, now) = hub(2);
        let cause = fate(hub.lost(1));
        assert!(
            matches!(cause, CommError::Engine { rank: 1, .. }),
            "{cause}"
        );
        assert_eq!(hub.lost(1), []);
        let next = Said::Opened {
            launch: 1,
            ranks: 2,
            timeout: TIMEOUT,
        };
        let outbox = hub.hear(0, next, now);
        assert!(
            matches!(outbox[..], [(To::All, Told::Fate { launch: 1, .. })]),
            "{outbox:?}"
        );
        assert!(!hub.deserted());
        hub.hear(0, Said::Bye, now);
        assert!(hub.deserted());
    }

    #[test]
    fn movers_join_when_all_processes_have_begun_the_launch() {
        let (mut hub, now) = (Hub::new(2), Instant::now());
        let opened = Said::Opened {
            launch: 3,
            ranks: 2,
            timeout: TIMEOUT,
        };
        let name = vec![1, 2, 3];
        let meeting = Said::Meeting {
            launch: 3,
            name: name.clone(),
        };
        assert_eq!(hub.hear(0, opened.clone(), now), []);
        assert_eq!(hub.hear(0, meeting, now), []);
        let outbox = hub.hear(1, opened, now);
        assert_eq!(outbox, [(To::All, Told::Join { launch: 3, name })]);
    }
}

//! The communication thread: all of a process's MPI calls, made by one thread while the rank computes.
//!
//! The rank hands it [`Command`]s and waits for answers; peers send it control messages ([`Message`]). It never
//! blocks in MPI: it starts sends and receives, tests them, and looks for messages, so deadlines hold whatever
//! the peers do.
//!
//! ```text
//!   rank      Enter ──▶ ┌────────────────────────┐ ── Entered, data ──▶   other members
//!             Wait  ──▶ │ announced by all whose │ ◀── Entered, data ──
//!         ◀── arrived   │ parts are needed? the  │
//!             or fate   │ same call? arrived?    │ ── Found ──▶ first living rank ── Fate ──▶ all
//!                       └────────────────────────┘
//! ```
//!
//! **One cause.** Whoever finds a failure tells all. The lowest rank that lives makes the first that it hears
//! the fate of the launch, and tells all; each higher one takes its place half a second later. Where a wait is
//! over, everybody that waits says so first, and who waits for nobody is the one that is named.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ferrompi::{Communicator, CustomDatatype, Scope, Source, Tag};

use super::lent::{Flights, Incoming, Landed, Outgoing};
use super::parcel::Laying;
use super::wire::{Announcement, CONTROL, DATA_TAGS, Envelope, Message};
use crate::error::{Call, CommError};
use crate::transport::Times;
use crate::transport::waits::{self, Wait};

/// How long a rank waits for each lower one to settle the fate of a launch.
const TURN: Duration = Duration::from_millis(500);

/// How long it is listened to who else waits, before the one that is missing is named.
const HEARING: Duration = Duration::from_millis(300);

/// How long a process waits at its end for the others to end too. Where the last launch failed, it waits no longer than
/// that one's time-out, and only as long as one of those that it waits for says that it is there.
const FAREWELL: Duration = Duration::from_secs(600);

/// After how long a process that is asked whether it is there, and does not answer, is not; and how often it is asked.
const SILENCE: Duration = Duration::from_secs(1);
const QUESTION: Duration = Duration::from_millis(200);

/// The most that the thread sleeps while something is under way.
const LONGEST_NAP: Duration = Duration::from_micros(200);

/// The most that it sleeps while nothing is.
const IDLE_NAP: Duration = Duration::from_millis(1);

/// Rounds of the loop without a nap after anything has moved: in general, and while data are under way, which
/// MPI moves on only when it is called.
const WAKEFUL: u32 = 100;
const WAKEFUL_WITH_DATA: u32 = 10_000;

/// The exit code of a job that had to be aborted.
const ABORTED: i32 = 70;

/// A group and one of its exchanges.
pub(super) type Key = (u64, u64);

/// What the rank asks for.
pub(super) enum Command {
    /// A launch begins. `fate` is where its failure can be read.
    Open {
        launch: u64,
        ranks: usize,
        timeout: Duration,
        fate: Arc<OnceLock<CommError>>,
    },
    /// An exchange is entered.
    Enter(Box<Entry>),
    /// The rank waits for what an exchange brings.
    Wait {
        launch: u64,
        key: Key,
        deadline: Instant,
        answer: Sender<Result<Times, CommError>>,
    },
    /// The rank fails; the answer is the root cause.
    Fail {
        launch: u64,
        cause: CommError,
        answer: Sender<CommError>,
    },
    /// The rank has returned, and waits for the launch to end.
    Finish {
        launch: u64,
        answer: Sender<Result<(), CommError>>,
    },
    /// The process ends.
    Stop,
}

/// This rank's part in an exchange.
pub(super) struct Entry {
    pub(super) launch: u64,
    pub(super) group: u64,
    /// World ranks, and which of them this one is.
    pub(super) members: Vec<usize>,
    pub(super) rank: usize,
    pub(super) call: Call,
    pub(super) digest: u64,
    pub(super) outgoing: Vec<Vec<Outgoing>>,
    pub(super) incoming: Vec<Vec<Incoming>>,
    /// What this thread is to lay into the block while messages are on their way.
    pub(super) laying: Option<Laying>,
    /// Set when all has arrived.
    pub(super) arrived: Arc<AtomicBool>,
}

/// A launch, as this process sees it.
struct LaunchState {
    ranks: usize,
    timeout: Duration,
    fate: Arc<OnceLock<CommError>>,
    /// When the fate came, while the own rank still runs.
    fated: Option<Instant>,
    /// The first cause that was heard of, and when; who waits for the root cause.
    found: Option<(CommError, Instant)>,
    /// Per rank: what it waits for, if it has said so since.
    waits: Vec<Option<Wait>>,
    failing: Vec<Sender<CommError>>,
    finishing: Option<Sender<Result<(), CommError>>>,
    returned: Vec<bool>,
    last_return: Option<Instant>,
    balanced: Vec<bool>,
    said_balanced: bool,
    done: bool,
    /// Per rank: its last call that was heard of.
    last: Vec<Option<Call>>,
    rounds: HashMap<Key, Round>,
}

/// An exchange.
#[derive(Default)]
struct Round {
    own: Option<Own>,
    /// Announcements by world rank: those whose data have not been asked for yet, and who has been heard.
    early: BTreeMap<usize, Announcement>,
    heard: Vec<usize>,
}

struct Own {
    members: Vec<usize>,
    rank: usize,
    call: Call,
    digest: u64,
    /// Per member, the room for its messages, until they are asked for.
    incoming: Vec<Vec<Incoming>>,
    /// Members that send here and have not been heard, and requests under way.
    missing: Vec<usize>,
    receiving: usize,
    laid: Option<Instant>,
    entered: Option<Instant>,
    /// When all had arrived.
    done: Option<Instant>,
    arrived: Arc<AtomicBool>,
    waiter: Option<(Sender<Result<Times, CommError>>, Instant, Instant)>,
    taken: bool,
}

/// What a flight is for.
enum Purpose {
    /// Nobody waits for it: something sent, or received only to be thrown away.
    None,
    /// A message of a round.
    Part(u64, Key),
}

pub(super) struct Progress<'s, 'env> {
    world: &'s Communicator,
    scope: &'s Scope<'s, 'env>,
    /// MPI's name of what is received.
    room: &'s CustomDatatype,
    rank: usize,
    size: usize,
    commands: Receiver<Command>,
    /// Counts the rounds of the loop, so that the rank knows that this thread lives.
    pulse: Arc<AtomicU64>,
    launches: BTreeMap<u64, LaunchState>,
    flights: Flights<'s, Purpose>,
    next_tag: i32,
    /// Control messages of launches that have not begun here.
    ahead: Vec<(usize, Envelope)>,
    farewells: Vec<bool>,
    /// When each process was heard last.
    heard: Vec<Instant>,
    /// How the last launch failed, if it did.
    failed: Option<Failed>,
}

/// How a launch failed, as far as it matters to who waits for the others' end.
#[derive(Debug, Default)]
struct Failed {
    timeout: Duration,
    /// Who let a deadline pass.
    late: Vec<usize>,
}

impl<'s, 'env> Progress<'s, 'env> {
    pub(super) fn new(
        world: &'s Communicator,
        scope: &'s Scope<'s, 'env>,
        room: &'s CustomDatatype,
        commands: Receiver<Command>,
        pulse: Arc<AtomicU64>,
    ) -> Self {
        let size = world.size() as usize;
        Self {
            world,
            scope,
            room,
            rank: world.rank() as usize,
            size,
            commands,
            pulse,
            launches: BTreeMap::new(),
            flights: Flights::new(),
            next_tag: DATA_TAGS.start,
            ahead: Vec::new(),
            farewells: vec![false; size],
            heard: vec![Instant::now(); size],
            failed: None,
        }
    }

    /// Runs until the process ends, and nothing is under way any more: MPI can then be finalised.
    pub(super) fn run(mut self) {
        let mut quiet = 0;
        let mut stopping: Option<Instant> = None;
        let mut asked = Instant::now();
        loop {
            self.pulse.fetch_add(1, Ordering::Relaxed);
            let moved = match self.turn(&mut stopping) {
                Ok(moved) => moved,
                Err(error) => self.broken(&error),
            };
            self.look_after();
            if let Some(since) = stopping {
                let alone = self.farewells.iter().all(|&said| said);
                if alone && self.flights.is_empty() {
                    return;
                }
                if let Err(error) = self.linger(since, &mut asked) {
                    self.broken(&error);
                }
            }
            quiet = if moved { 0 } else { quiet + 1 };
            let wakeful = match self.flights.is_empty() {
                true => WAKEFUL,
                false => WAKEFUL_WITH_DATA,
            };
            if quiet > wakeful {
                self.nap(quiet - wakeful, &mut stopping);
            } else if !moved {
                std::thread::yield_now();
            }
        }
    }

    /// Waits for the others to end too. After a failure, who was killed or stopped never will; who computes, or writes a
    /// checkpoint, hears of the failure when it is done with that, and until then says that it is there.
    fn linger(&mut self, since: Instant, asked: &mut Instant) -> ferrompi::Result<()> {
        let now = Instant::now();
        let alone = self.farewells.iter().all(|&said| said);
        let (patience, late) = match &self.failed {
            Some(failed) => (failed.timeout.min(FAREWELL), &failed.late[..]),
            None => (FAREWELL, &[][..]),
        };
        // Who was late has been waited for until a deadline already.
        let silent = |rank: usize| {
            let heard = match late.contains(&rank) {
                true => since,
                false => self.heard[rank].max(since),
            };
            now.duration_since(heard) > SILENCE
        };
        // Of those that have said farewell something may be on its way still.
        let deserted = self.failed.is_some()
            && (0..self.size).all(|rank| (self.farewells[rank] && !alone) || silent(rank));
        if deserted || now - since > patience {
            self.die("not all processes are there to end it together");
        }
        if self.failed.is_some() && now.duration_since(*asked) > QUESTION {
            *asked = now;
            let launch = u64::MAX;
            for to in (0..self.size)
                .filter(|&to| !self.farewells[to])
                .collect::<Vec<_>>()
            {
                let message = Message::Bye;
                self.tell(to, Envelope { launch, message })?;
            }
        }
        Ok(())
    }

    /// Sleeps for a moment, or until the rank asks for something.
    fn nap(&mut self, quiet: u32, stopping: &mut Option<Instant>) {
        let waits = (self.launches.values())
            .any(|launch| launch.finishing.is_some() || launch.rounds.values().any(Round::waits));
        let longest = if waits || !self.flights.is_empty() {
            LONGEST_NAP
        } else {
            IDLE_NAP
        };
        let nap = Duration::from_micros(u64::from(quiet)).min(longest);
        match self.commands.recv_timeout(nap) {
            Ok(command) => {
                if let Err(error) = self.command(command, stopping) {
                    self.broken(&error);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            // The rank's end was dropped without a word, which only a panic can do.
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(nap),
        }
    }

    /// One round: commands, messages, requests. Whether anything moved.
    fn turn(&mut self, stopping: &mut Option<Instant>) -> ferrompi::Result<bool> {
        let mut moved = false;
        while let Ok(command) = self.commands.try_recv() {
            self.command(command, stopping)?;
            moved = true;
        }
        while let Some(status) = self.world.iprobe::<u8>(Source::Any, CONTROL)? {
            let (Source::Rank(from), Some(count)) = (status.source, status.count) else {
                break;
            };
            let mut bytes = vec![0u8; count];
            self.world.recv(&mut bytes, from, Tag::Value(CONTROL))?;
            match serde_json::from_slice(&bytes) {
                Ok(envelope) => self.hear(from as usize, envelope)?,
                Err(error) => self.die(&format!("a message that is none of ours: {error}")),
            }
            moved = true;
        }
        for Landed { purpose, error } in self.flights.landed()? {
            match (error, purpose) {
                (Some(class), _) => {
                    self.broken(&format!("a message failed: {class:?}"));
                }
                (None, Purpose::Part(launch, key)) => self.received(launch, key),
                (None, Purpose::None) => {}
            }
            moved = true;
        }
        Ok(moved)
    }

    fn command(
        &mut self,
        command: Command,
        stopping: &mut Option<Instant>,
    ) -> ferrompi::Result<()> {
        match command {
            Command::Open {
                launch,
                ranks,
                timeout,
                fate,
            } => self.open(launch, LaunchState::new(ranks, timeout, fate))?,
            Command::Enter(entry) => self.enter(*entry)?,
            Command::Wait {
                launch,
                key,
                deadline,
                answer,
            } => self.wait(launch, key, deadline, answer),
            Command::Fail {
                launch,
                cause,
                answer,
            } => {
                match self.launches.get_mut(&launch) {
                    Some(state) if !state.done => state.failing.push(answer),
                    _ => drop(answer.send(cause.clone())),
                }
                self.found(launch, cause)?;
            }
            Command::Finish { launch, answer } => {
                let Some(state) = self.launches.get_mut(&launch) else {
                    return Ok(());
                };
                let fate = state.fate.get().cloned();
                if fate.is_some() || state.done {
                    state.done = true;
                    let _ = answer.send(fate.map_or(Ok(()), Err));
                    return Ok(());
                }
                state.finishing = Some(answer);
                if self.rank < state.ranks {
                    self.tell_all(launch, || Message::Returned)?;
                }
            }
            Command::Stop => {
                *stopping = Some(Instant::now());
                // A launch that was never finished has been left by a panic.
                let left = (self.launches.values()).filter(|state| !state.done);
                if let Some(timeout) = left.map(|state| state.timeout).max() {
                    self.failed.get_or_insert_default().timeout = timeout;
                }
                self.tell_all(u64::MAX, || Message::Bye)?;
            }
        }
        Ok(())
    }

    fn open(&mut self, launch: u64, state: LaunchState) -> ferrompi::Result<()> {
        // Earlier launches have ended; what still arrives of them is dropped.
        self.launches.retain(|_, earlier| !earlier.done);
        self.launches.insert(launch, state);
        let (now, ahead) = std::mem::take(&mut self.ahead)
            .into_iter()
            .partition(|(_, envelope)| envelope.launch == launch);
        self.ahead = ahead;
        for (from, envelope) in now {
            self.hear(from, envelope)?;
        }
        Ok(())
    }

    // --- exchanges ---------------------------------------------------------------------------------------

    fn enter(&mut self, entry: Entry) -> ferrompi::Result<()> {
        let Entry {
            launch,
            group,
            members,
            rank,
            call,
            digest,
            outgoing,
            incoming,
            laying,
            arrived,
        } = entry;
        let Some(state) = self.launches.get_mut(&launch) else {
            return Ok(());
        };
        state.last[members[rank]] = Some(call.clone());
        if state.fate.get().is_some() {
            return Ok(());
        }
        let key = (group, call.sequence);
        let announcement = |tag, messages: &[Outgoing]| Announcement {
            group,
            call: call.clone(),
            digest,
            tag,
            sizes: messages.iter().map(Outgoing::len).collect(),
        };
        for (peer, messages) in outgoing.into_iter().enumerate() {
            if peer == rank {
                continue;
            }
            let tag = self.next_tag;
            self.next_tag = match tag + 1 {
                end if end == DATA_TAGS.end => DATA_TAGS.start,
                next => next,
            };
            let message = Message::Entered(announcement(tag, &messages));
            self.tell(members[peer], Envelope { launch, message })?;
            for outgoing in messages {
                self.send(outgoing, members[peer], tag)?;
            }
        }
        let laid = laying.map(|laying| {
            laying.lay();
            Instant::now()
        });
        let missing = (incoming.iter().enumerate())
            .filter(|(_, room)| !room.is_empty())
            .map(|(peer, _)| members[peer])
            .collect();
        let Some(state) = self.launches.get_mut(&launch) else {
            return Ok(());
        };
        let round = state.rounds.entry(key).or_default();
        round.own = Some(Own {
            members,
            rank,
            call,
            digest,
            incoming,
            missing,
            receiving: 0,
            laid,
            entered: None,
            done: None,
            arrived,
            waiter: None,
            taken: false,
        });
        let early = std::mem::take(&mut round.early);
        for (from, announcement) in early {
            self.announced(launch, from, announcement)?;
        }
        self.settle(launch, key);
        Ok(())
    }

    /// A peer has entered an exchange.
    fn announced(
        &mut self,
        launch: u64,
        from: usize,
        announcement: Announcement,
    ) -> ferrompi::Result<()> {
        let Some(state) = self.launches.get_mut(&launch) else {
            return self.discard(from, &announcement);
        };
        state.last[from] = Some(announcement.call.clone());
        if state.fate.get().is_some() {
            return self.discard(from, &announcement);
        }
        let key = (announcement.group, announcement.call.sequence);
        let round = state.rounds.entry(key).or_default();
        let Some(own) = &mut round.own else {
            round.early.insert(from, announcement);
            return Ok(());
        };
        if !round.heard.contains(&from) {
            round.heard.push(from);
        }
        let disagreement = own.disagreement(from, &announcement);
        if let Some(cause) = disagreement {
            self.discard(from, &announcement)?;
            return self.found(launch, cause);
        }
        let Some(position) = own.members.iter().position(|&member| member == from) else {
            return self.discard(from, &announcement);
        };
        own.missing.retain(|&member| member != from);
        let room = std::mem::take(&mut own.incoming[position]);
        debug_assert!((room.iter().map(Incoming::len)).eq(announcement.sizes.iter().copied()));
        own.receiving += room.len();
        for incoming in room {
            self.receive(incoming, from, announcement.tag, Purpose::Part(launch, key))?;
        }
        self.settle(launch, key);
        Ok(())
    }

    /// Receives what nobody wants, so that its sender gets its memory back.
    fn discard(&mut self, from: usize, announcement: &Announcement) -> ferrompi::Result<()> {
        for &bytes in &announcement.sizes {
            let incoming = Incoming::scratch(bytes);
            self.receive(incoming, from, announcement.tag, Purpose::None)?;
        }
        Ok(())
    }

    /// A message of a round has arrived.
    fn received(&mut self, launch: u64, key: Key) {
        if let Some(state) = self.launches.get_mut(&launch)
            && let Some(round) = state.rounds.get_mut(&key)
            && let Some(own) = &mut round.own
        {
            own.receiving -= 1;
        }
        self.settle(launch, key);
    }

    fn wait(
        &mut self,
        launch: u64,
        key: Key,
        deadline: Instant,
        answer: Sender<Result<Times, CommError>>,
    ) {
        let rank = self.rank;
        let ended = || CommError::Engine {
            rank,
            message: "the launch has ended".to_owned(),
        };
        let Some(state) = self.launches.get_mut(&launch).filter(|state| !state.done) else {
            let _ = answer.send(Err(ended()));
            return;
        };
        if let Some(fate) = state.fate.get() {
            let _ = answer.send(Err(fate.clone()));
            return;
        }
        if let Some(own) = (state.rounds.get_mut(&key)).and_then(|round| round.own.as_mut()) {
            own.waiter = Some((answer, deadline, Instant::now()));
        }
        self.settle(launch, key);
    }

    /// Answers the rank if all has arrived, and forgets the round when all members have been heard.
    fn settle(&mut self, launch: u64, key: Key) {
        let Some(state) = self.launches.get_mut(&launch) else {
            return;
        };
        let Some(round) = state.rounds.get_mut(&key) else {
            return;
        };
        let Some(own) = &mut round.own else {
            return;
        };
        if own.missing.is_empty() {
            let entered = *own.entered.get_or_insert_with(Instant::now);
            if own.receiving == 0 {
                let arrived = *own.done.get_or_insert_with(Instant::now);
                own.arrived.store(true, Ordering::Relaxed);
                if let Some((answer, ..)) = own.waiter.take() {
                    let _ = answer.send(Ok(Times {
                        laid: own.laid,
                        entered,
                        arrived,
                    }));
                    own.taken = true;
                }
            }
        }
        if own.taken && round.heard.len() + 1 == own.members.len() {
            state.rounds.remove(&key);
        }
    }

    // --- failures and endings ----------------------------------------------------------------------------

    /// Looks for deadlines that have passed.
    fn look_after(&mut self) {
        let launches: Vec<u64> = self.launches.keys().copied().collect();
        for launch in launches {
            if let Err(error) = self.look_after_launch(launch) {
                self.broken(&error);
            }
        }
    }

    fn look_after_launch(&mut self, launch: u64) -> ferrompi::Result<()> {
        let (rank, now) = (self.rank, Instant::now());
        let Some(state) = self.launches.get_mut(&launch) else {
            return Ok(());
        };
        if state.done {
            return Ok(());
        }
        if state.fate.get().is_some() {
            // A rank that goes on is stuck, and so would be all that comes after.
            if state.fated.is_some_and(|since| now - since > state.timeout) {
                let root = state.fate.get().map(ToString::to_string);
                self.die(&root.unwrap_or_default());
            }
            return Ok(());
        }
        if let Some((cause, since)) = &state.found {
            // Rank 0 settles at once; the others only if those below them are gone.
            let (heard, cause) = match cause {
                CommError::Unanswered { rank, .. } => (
                    HEARING,
                    waits::unanswered(&state.waits, *rank).unwrap_or(cause.clone()),
                ),
                cause => (Duration::ZERO, cause.clone()),
            };
            if now - *since >= heard + TURN * rank as u32 {
                self.tell_all(launch, || Message::Fate(cause.clone()))?;
                self.fate(launch, cause);
            }
            return Ok(());
        }
        // A process that ends has no more to give than a rank that has returned.
        let gone: Vec<bool> = (state.returned.iter().zip(&self.farewells))
            .map(|(returned, ended)| *returned || *ended)
            .collect();
        let late = (state.rounds.values()).find_map(|round| round.late(rank, now, &gone));
        if let Some(cause) = late {
            return self.found(launch, cause);
        }
        if state.finishing.is_none() {
            return Ok(());
        }
        let (Some(stuck), Some(since)) = (
            state.returned.iter().position(|&returned| !returned),
            state.last_return,
        ) else {
            return self.balance(launch);
        };
        if now - since > state.timeout {
            let cause = CommError::Stuck {
                rank: stuck,
                last: state.last[stuck].clone(),
                waited: now - since,
            };
            return self.found(launch, cause);
        }
        Ok(())
    }

    /// All ranks have returned: whatever one of them called, all must have.
    fn balance(&mut self, launch: u64) -> ferrompi::Result<()> {
        let Some(state) = self.launches.get_mut(&launch) else {
            return Ok(());
        };
        let everybody = !state.returned.contains(&false);
        if everybody && !state.said_balanced && self.rank < state.ranks {
            let unanswered = (state.rounds.iter())
                .filter_map(|(key, round)| round.unanswered().map(|error| (*key, error)))
                .min_by_key(|(key, _)| *key);
            if let Some((_, cause)) = unanswered {
                return self.found(launch, cause);
            }
            state.said_balanced = true;
            self.tell_all(launch, || Message::Balanced)?;
        }
        Ok(())
    }

    /// A cause to fail, found here or by another rank.
    fn found(&mut self, launch: u64, cause: CommError) -> ferrompi::Result<()> {
        let Some(state) = self.launches.get_mut(&launch) else {
            return Ok(());
        };
        if let Some(fate) = state.fate.get() {
            for answer in state.failing.drain(..) {
                let _ = answer.send(fate.clone());
            }
            return Ok(());
        }
        if state.found.is_none() && !state.done {
            state.found = Some((cause.clone(), Instant::now()));
            let rank = self.rank;
            let own = state.rounds.values().find_map(|round| round.wait(rank));
            self.tell_all(launch, || Message::Found(cause.clone()))?;
            if let (CommError::Unanswered { .. }, Some(own)) = (&cause, own) {
                self.tell_all(launch, || Message::Waits(own.clone()))?;
            }
        }
        Ok(())
    }

    /// The launch has failed: everybody who waits here hears it.
    fn fate(&mut self, launch: u64, cause: CommError) {
        let Some(state) = self.launches.get_mut(&launch) else {
            return;
        };
        let fate = state.fate.get_or_init(|| cause).clone();
        self.failed = Some(Failed {
            timeout: state.timeout,
            late: fate.late().to_vec(),
        });
        if state.done {
            return;
        }
        let rounds = std::mem::take(&mut state.rounds);
        for answer in state.failing.drain(..) {
            let _ = answer.send(fate.clone());
        }
        match state.finishing.take() {
            Some(answer) => {
                state.done = true;
                let _ = answer.send(Err(fate.clone()));
            }
            None => state.fated = Some(Instant::now()),
        }
        for round in rounds.into_values() {
            if let Some((answer, ..)) = round.own.and_then(|own| own.waiter) {
                let _ = answer.send(Err(fate.clone()));
            }
            for (from, announcement) in round.early {
                if let Err(error) = self.discard(from, &announcement) {
                    self.broken(&error);
                }
            }
        }
    }

    fn hear(&mut self, from: usize, envelope: Envelope) -> ferrompi::Result<()> {
        let Envelope { launch, message } = envelope;
        self.heard[from] = Instant::now();
        match message {
            Message::Bye => {
                self.farewells[from] = true;
                // Who ends itself has said so instead.
                if !self.farewells[self.rank] {
                    let message = Message::Here;
                    self.tell(from, Envelope { launch, message })?;
                }
                return Ok(());
            }
            Message::Here => return Ok(()),
            _ => {}
        }
        if !self.launches.contains_key(&launch) {
            let latest = self.launches.keys().next_back();
            if latest.is_none_or(|&latest| launch > latest) {
                self.ahead.push((from, Envelope { launch, message }));
            } else if let Message::Entered(announcement) = message {
                self.discard(from, &announcement)?;
            }
            return Ok(());
        }
        let Some(state) = self.launches.get_mut(&launch) else {
            return Ok(());
        };
        match message {
            Message::Entered(announcement) => self.announced(launch, from, announcement)?,
            Message::Found(cause) => self.found(launch, cause)?,
            Message::Waits(wait) => state.waits[from] = Some(wait),
            Message::Fate(cause) => self.fate(launch, cause),
            Message::Returned => {
                state.returned[from] = true;
                state.last_return = Some(Instant::now());
            }
            Message::Balanced => {
                state.balanced[from] = true;
                // The first rank's word ends it for all, those included that had no part in it.
                if self.rank == 0 && !state.balanced.contains(&false) {
                    self.tell_all(launch, || Message::Done)?;
                }
            }
            Message::Done => {
                state.done = true;
                if let Some(answer) = state.finishing.take() {
                    let _ = answer.send(Ok(()));
                }
                self.failed = None;
            }
            Message::Bye | Message::Here => {}
        }
        Ok(())
    }

    /// MPI itself has failed: all launches do.
    fn broken(&mut self, error: &impl std::fmt::Display) -> bool {
        let rank = self.rank;
        let launches: Vec<u64> = self.launches.keys().copied().collect();
        for launch in launches {
            let cause = CommError::Engine {
                rank,
                message: error.to_string(),
            };
            self.fate(launch, cause);
        }
        false
    }

    /// The last resort: ends the job, all processes of it.
    #[allow(clippy::print_stderr, reason = "nobody is left to return this to")]
    fn die(&self, cause: &str) -> ! {
        eprintln!("rank {} ends the job: {cause}", self.rank);
        self.world.abort(ABORTED)
    }

    // --- messages ----------------------------------------------------------------------------------------

    /// Tells every process, this one included.
    fn tell_all(&mut self, launch: u64, message: impl Fn() -> Message) -> ferrompi::Result<()> {
        let own = self.rank;
        for to in (0..self.size).filter(|&to| to != own) {
            let message = message();
            self.tell(to, Envelope { launch, message })?;
        }
        let message = message();
        self.hear(own, Envelope { launch, message })
    }

    fn tell(&mut self, to: usize, envelope: Envelope) -> ferrompi::Result<()> {
        let bytes = match serde_json::to_vec(&envelope) {
            Ok(bytes) => bytes,
            Err(error) => self.die(&format!("a message that cannot be written: {error}")),
        };
        let all = 0..bytes.len();
        self.send(Outgoing::new(Arc::new(bytes), all), to, CONTROL)
    }

    fn send(&mut self, outgoing: Outgoing, to: usize, tag: i32) -> ferrompi::Result<()> {
        let (world, scope) = (self.world, self.scope);
        let to = (to as i32, tag);
        self.flights.send(world, scope, outgoing, to, Purpose::None)
    }

    fn receive(
        &mut self,
        incoming: Incoming,
        from: usize,
        tag: i32,
        purpose: Purpose,
    ) -> ferrompi::Result<()> {
        let (world, scope) = (self.world, (self.scope, self.room));
        let from = (from as i32, tag);
        self.flights.receive(world, scope, incoming, from, purpose)
    }
}

impl LaunchState {
    fn new(ranks: usize, timeout: Duration, fate: Arc<OnceLock<CommError>>) -> Self {
        Self {
            ranks,
            timeout,
            fate,
            fated: None,
            found: None,
            waits: vec![None; ranks],
            failing: Vec::new(),
            finishing: None,
            returned: vec![false; ranks],
            last_return: None,
            balanced: vec![false; ranks],
            said_balanced: false,
            done: false,
            last: vec![None; ranks],
            rounds: HashMap::new(),
        }
    }
}

impl Round {
    fn waits(&self) -> bool {
        self.own.as_ref().is_some_and(|own| own.waiter.is_some())
    }

    /// What the rank waits for, if it does.
    fn wait(&self, rank: usize) -> Option<Wait> {
        let own = self.own.as_ref()?;
        let (_, _, since) = own.waiter.as_ref()?;
        let missing = match own.missing.is_empty() {
            // All have entered, and something is on its way that does not come.
            true => &own.members,
            false => &own.missing,
        };
        Some(Wait {
            call: own.call.clone(),
            missing: missing.iter().copied().filter(|&m| m != rank).collect(),
            waited: since.elapsed(),
        })
    }

    /// Why the rank need not wait any longer.
    fn late(&self, rank: usize, now: Instant, gone: &[bool]) -> Option<CommError> {
        let own = self.own.as_ref()?;
        let (_, deadline, _) = own.waiter.as_ref()?;
        if let Some(&ended) = own.missing.iter().find(|&&member| gone[member]) {
            let call = own.call.clone();
            return Some(CommError::PeerEnded { rank, call, ended });
        }
        let over = now >= *deadline;
        let wait = over.then(|| self.wait(rank)).flatten()?;
        Some(CommError::Unanswered {
            rank,
            call: wait.call,
            missing: wait.missing,
            waited: wait.waited,
        })
    }

    /// Who did not enter what this rank did, of a launch all of whose ranks have returned.
    fn unanswered(&self) -> Option<CommError> {
        let own = self.own.as_ref()?;
        let me = own.members[own.rank];
        let entered = |member: &usize| *member == me || self.heard.contains(member);
        Some(CommError::PeerEnded {
            rank: *own.members.iter().find(|member| entered(member))?,
            call: own.call.clone(),
            ended: *own.members.iter().find(|member| !entered(member))?,
        })
    }
}

impl Own {
    fn disagreement(&self, other: usize, theirs: &Announcement) -> Option<CommError> {
        let (rank, call) = (self.members[self.rank], self.call.clone());
        if call != theirs.call {
            return Some(CommError::Mismatch {
                rank,
                call,
                other,
                other_call: theirs.call.clone(),
            });
        }
        (self.digest != theirs.digest).then_some(CommError::Partitions {
            rank,
            call,
            other,
            difference: None,
        })
    }
}

//! A process of a job: what its rank asks for, what the hub tells it, and the one thread that moves its boxes.
//!
//! ```text
//!   rank's thread        enter ───────────────────────────── Entered ──▶ ┐
//!                          └──▶ ┌─────────────┐                          │ hub
//!   mover's thread              │ boxes, held │ ◀── Go, in one order ─── ┘
//!                               │ until then  │ ──▶ the mover sends and receives
//!   rank's thread        wait ◀─└─────────────┘
//! ```
//!
//! All that waits ends at a deadline or when the launch fails, and then with the cause that every process gets.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::NcclError;
use super::communicator::Boxes;
use super::hub::NOTICE;
use super::meeting::{Line, Voice};
use super::mover::{Limits, Mover};
use super::wire::{Announcement, Key, Said, Told};
use crate::error::{Call, CommError};
use crate::transport::Times;
use crate::transport::job::Fails;

/// How much longer than its own deadline a rank waits for the cause, which the hub may have to find.
const GRACE: Duration = Duration::from_secs(10);

/// How long leaving in peace may take.
const FAREWELL: Duration = Duration::from_secs(10);

/// How often the mover's thread looks after a rank that goes on although its launch has failed.
const GLANCE: Duration = Duration::from_secs(1);

/// The exit code of a process that had to be ended.
const ABORTED: i32 = 70;

/// What became of an exchange.
type Outcome = Result<Times, CommError>;

/// Where the outcome of an exchange arrives.
#[derive(Debug)]
pub(super) struct Answer {
    outcome: Receiver<Outcome>,
    settled: Arc<AtomicBool>,
}

impl Answer {
    /// Whether the outcome is there, or will never be.
    pub(super) fn is_ready(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }
}

/// From where it comes; dropped without one, none will come.
struct Reply {
    outcome: SyncSender<Outcome>,
    settled: Arc<AtomicBool>,
}

impl Reply {
    fn send(self, outcome: Outcome) {
        // Whoever does not wait for it has no use for it.
        let _ = self.outcome.send(outcome);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.settled.store(true, Ordering::Release);
    }
}

/// An answer, and from where it comes.
fn answer() -> (Reply, Answer) {
    let (sender, receiver) = sync_channel(1);
    let settled = Arc::<AtomicBool>::default();
    let reply = Reply {
        outcome: sender,
        settled: settled.clone(),
    };
    let answer = Answer {
        outcome: receiver,
        settled,
    };
    (reply, answer)
}

/// A process among those of its job. Dropped, it says farewell.
#[derive(Debug)]
pub(super) struct Process {
    rank: usize,
    size: usize,
    shared: Arc<Shared>,
    events: Sender<Event>,
    launches: AtomicU64,
    /// Bytes of boxes that left for other ranks.
    sent: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the threads of a process share.
#[derive(Debug)]
struct Shared {
    rank: usize,
    /// The way to the hub.
    voice: Voice,
    view: Mutex<View>,
    changed: Condvar,
}

/// What this process knows of its job.
#[derive(Debug, Default)]
struct View {
    /// Launches that have not ended here.
    launches: BTreeMap<u64, Launch>,
    /// Why the hub cannot be heard any more.
    deaf: Option<CommError>,
}

#[derive(Debug, Default)]
struct Launch {
    /// For the mover, which looks often: they say whether there is a fate.
    limits: Limits,
    /// Whether the own rank runs.
    runs: bool,
    fate: Option<CommError>,
    /// When it came, or when the rank began later than that.
    fated: Option<Instant>,
    values: Option<Vec<Vec<u8>>>,
}

/// What happens to the mover's thread.
enum Event {
    Open {
        launch: u64,
    },
    Join {
        launch: u64,
        name: Vec<u8>,
        limits: Limits,
    },
    Enter(Box<Entry>),
    Go {
        launch: u64,
        key: Key,
    },
    Fate {
        launch: u64,
    },
    Stop,
}

/// An exchange that is to be made when the hub says so.
struct Entry {
    launch: u64,
    exchange: Announcement,
    boxes: Boxes,
    limits: Limits,
    reply: Reply,
}

impl Process {
    /// Of a line to the hub. `mover` is made on the thread that calls it; `hub` is the hub's own thread, where
    /// it is in this process.
    pub(super) fn start<M: Mover>(
        (rank, size): (usize, usize),
        line: Line,
        hub: Option<JoinHandle<()>>,
        mover: impl FnOnce() -> M + Send + 'static,
    ) -> Result<Self, NcclError> {
        let (events, happens) = channel();
        let shared = Arc::new(Shared {
            rank,
            voice: line.voice(),
            view: Mutex::default(),
            changed: Condvar::new(),
        });
        let begin = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(format!("rank {rank}, NCCL {name}"));
            thread.spawn(body).map_err(NcclError::Thread)
        };
        let listener = {
            let (shared, events) = (shared.clone(), events.clone());
            begin("hears", Box::new(move || listen(line, &shared, &events)))?
        };
        let worker = {
            let shared = shared.clone();
            let body = move || Worker::new(mover(), shared).run(&happens);
            begin("moves", Box::new(body))?
        };
        // In the order in which they end.
        let threads = [Some(worker), Some(listener), hub];
        Ok(Self {
            rank,
            size,
            shared,
            events,
            launches: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            threads: Mutex::new(threads.into_iter().flatten().collect()),
        })
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// The bytes of boxes that this process has handed to its mover so far.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Begins a launch on the first `ranks` processes. All processes begin the same ones in the same order.
    pub(super) fn open(self: &Arc<Self>, ranks: usize, timeout: Duration) -> Job {
        let launch = self.launches.fetch_add(1, Ordering::Relaxed);
        let mut view = self.shared.view();
        let deaf = view.deaf.clone();
        let state = view.launches.entry(launch).or_default();
        state.limits.timeout = timeout;
        state.runs = true;
        state.fated = state.fated.map(|_| Instant::now());
        if let Some(cause) = deaf {
            state.fail(cause);
        }
        let limits = state.limits.clone();
        drop(view);
        self.shared.say(Said::Opened {
            launch,
            ranks,
            timeout,
        });
        self.event(Event::Open { launch });
        Job {
            process: self.clone(),
            launch,
            ranks,
            limits,
            last: Mutex::new(None),
        }
    }

    fn event(&self, event: Event) {
        // The thread lives as long as this value; if not, the answer that is then missing says so.
        let _ = self.events.send(event);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.event(Event::Stop);
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // Each ends by itself: the mover's at once, then the others as nothing more can be heard.
            let _ = thread.join();
        }
    }
}

/// A launch, as one of its processes sees it.
#[derive(Debug)]
pub(crate) struct Job {
    process: Arc<Process>,
    launch: u64,
    ranks: usize,
    limits: Limits,
    last: Mutex<Option<Call>>,
}

impl Job {
    /// This process's rank, if it has a part in the launch.
    pub(super) fn rank(&self) -> Option<usize> {
        Some(self.process.rank).filter(|&rank| rank < self.ranks)
    }

    pub(super) fn ranks(&self) -> usize {
        self.ranks
    }

    /// Notes what the rank calls.
    ///
    /// # Errors
    /// The cause, if the launch has failed.
    pub(super) fn call(&self, call: &Call) -> Result<(), CommError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(call.clone());
        match self.process.shared.fate(self.launch) {
            Some(fate) => Err(fate),
            None => Ok(()),
        }
    }

    /// Enters an exchange; returns at once.
    pub(super) fn enter(&self, exchange: Announcement, boxes: Boxes) -> Answer {
        let (reply, answer) = answer();
        (self.process.sent).fetch_add(boxes.sent_bytes(), Ordering::Relaxed);
        // The boxes first: the hub's word finds them there.
        self.process.event(Event::Enter(Box::new(Entry {
            launch: self.launch,
            exchange: exchange.clone(),
            boxes,
            limits: self.limits.clone(),
            reply,
        })));
        self.process.shared.say(Said::Entered {
            launch: self.launch,
            exchange,
        });
        answer
    }

    /// Waits until the boxes of an exchange have left and arrived.
    pub(super) fn wait(
        &self,
        answer: &Answer,
        exchange: &Announcement,
        deadline: Instant,
    ) -> Result<Times, CommError> {
        let (launch, start) = (self.launch, Instant::now());
        let say = |said| self.process.shared.say(said);
        let left = || deadline.saturating_duration_since(Instant::now());
        let outcome = &answer.outcome;
        let mut answered = outcome.recv_timeout(left().min(NOTICE));
        if let Err(RecvTimeoutError::Timeout) = answered {
            say(Said::Waits {
                launch,
                wait: Some((exchange.clone(), start.elapsed())),
            });
            answered = outcome.recv_timeout(left());
            if let Err(RecvTimeoutError::Timeout) = answered {
                let waited = start.elapsed();
                say(Said::Late { launch, waited });
                answered = outcome.recv_timeout(GRACE);
            }
            if let Ok(Ok(_)) = answered {
                say(Said::Waits { launch, wait: None });
            }
        }
        answered.unwrap_or_else(|_| {
            Err(self.fail(CommError::Engine {
                rank: self.process.rank,
                message: format!("{} did not end, nor did its deadline end it", exchange.call),
            }))
        })
    }

    /// Says that this process's rank has returned, and waits for the others: what all of them returned.
    ///
    /// # Errors
    /// The root cause, the same on every process, if the launch has failed.
    pub(crate) fn finish(&self, value: Vec<u8>) -> Result<Vec<Vec<u8>>, CommError> {
        let (launch, shared) = (self.launch, &self.process.shared);
        if let Some(state) = shared.view().launches.get_mut(&launch) {
            state.runs = false;
        }
        if self.rank().is_some() {
            shared.say(Said::Returned { launch, value });
        }
        let undecided = |view: &mut View| {
            (view.launches.get(&launch))
                .is_some_and(|launch| launch.fate.is_none() && launch.values.is_none())
        };
        let mut view = shared
            .changed
            .wait_while(shared.view(), undecided)
            .unwrap_or_else(PoisonError::into_inner);
        match view.launches.remove(&launch) {
            Some(Launch {
                fate: Some(fate), ..
            }) => Err(fate),
            Some(Launch { values, .. }) => Ok(values.unwrap_or_default()),
            None => Ok(Vec::new()),
        }
    }
}

impl Fails for Job {
    fn fail(&self, cause: CommError) -> CommError {
        let shared = &self.process.shared;
        shared.say(Said::Failed {
            launch: self.launch,
            cause: cause.clone(),
        });
        let view = shared.view();
        let undecided = |view: &mut View| {
            (view.launches.get(&self.launch))
                .is_some_and(|launch| launch.fate.is_none() && launch.values.is_none())
        };
        let (mut view, _) = shared
            .changed
            .wait_timeout_while(view, GRACE, undecided)
            .unwrap_or_else(PoisonError::into_inner);
        match view.launches.get_mut(&self.launch) {
            Some(launch) => launch.fail(cause),
            None => cause,
        }
    }

    fn last_call(&self, _: usize) -> Option<Call> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
    }
}

impl Launch {
    /// Fails it, unless it has failed or ended before; returns the root cause.
    fn fail(&mut self, cause: CommError) -> CommError {
        if self.fate.is_none() {
            self.fated = Some(Instant::now());
        }
        self.limits.failed.store(true, Ordering::Release);
        self.fate.get_or_insert(cause).clone()
    }
}

impl Shared {
    fn view(&self) -> MutexGuard<'_, View> {
        // No code of ours panics while it holds the lock.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, said: Said) {
        self.voice.say(said);
    }

    /// Why a launch has failed, if it has and is not over here.
    fn fate(&self, launch: u64) -> Option<CommError> {
        self.view().launches.get(&launch)?.fate.clone()
    }
}

/// Hears the hub until this process or the hub ends.
fn listen(mut line: Line, shared: &Shared, events: &Sender<Event>) {
    let fail = |view: &mut View, launch: u64, cause: CommError| {
        let state = view.launches.entry(launch).or_default();
        // First, for the mover may be at work; and what the rank asks for next comes after the event.
        state.limits.failed.store(true, Ordering::Release);
        let _ = events.send(Event::Fate { launch });
        state.fail(cause);
    };
    loop {
        let told = match line.hear() {
            Ok(told) => told,
            Err(error) => {
                let cause = CommError::Engine {
                    rank: 0,
                    message: format!("its process has ended, or cannot be heard: {error}"),
                };
                let mut view = shared.view();
                let open: Vec<u64> = (view.launches.iter())
                    .filter(|(_, launch)| launch.values.is_none())
                    .map(|(&launch, _)| launch)
                    .collect();
                for launch in open {
                    fail(&mut view, launch, cause.clone());
                }
                view.deaf = Some(cause);
                shared.changed.notify_all();
                return;
            }
        };
        let event = match told {
            Told::Join { launch, name } => match shared.view().launches.get(&launch) {
                Some(state) => Event::Join {
                    launch,
                    name,
                    limits: state.limits.clone(),
                },
                // The hub says this before it says the end: so it was given up here, which fails it for all.
                None => continue,
            },
            Told::Go { launch, key } => Event::Go { launch, key },
            Told::Fate { launch, cause } => {
                fail(&mut shared.view(), launch, cause);
                shared.changed.notify_all();
                continue;
            }
            Told::Done { launch, values } => {
                let mut view = shared.view();
                view.launches.entry(launch).or_default().values = Some(values);
                shared.changed.notify_all();
                continue;
            }
            Told::Alive | Told::Farewell | Told::Welcome | Told::Refused { .. } => continue,
        };
        let _ = events.send(event);
    }
}

/// The mover's thread.
struct Worker<M> {
    mover: M,
    shared: Arc<Shared>,
    /// Exchanges that were entered, by launch and key.
    entries: HashMap<(u64, Key), Entry>,
    /// Those that may be made as soon as the mover has joined the others.
    ready: VecDeque<(u64, Key)>,
    /// How the mover failed, as long as no launch has failed with it: where its launch was over already, nobody else knows,
    /// and the others' movers have not left.
    broken: Option<CommError>,
    /// The last launch that was begun here.
    latest: u64,
}

impl<M: Mover> Worker<M> {
    fn new(mover: M, shared: Arc<Shared>) -> Self {
        Self {
            mover,
            shared,
            entries: HashMap::new(),
            ready: VecDeque::new(),
            broken: None,
            latest: 0,
        }
    }

    fn run(mut self, happens: &Receiver<Event>) {
        loop {
            match happens.recv_timeout(GLANCE) {
                Ok(Event::Open { launch }) => self.open(launch),
                Ok(Event::Join {
                    launch,
                    name,
                    limits,
                }) => self.join(launch, &name, &limits),
                Ok(Event::Enter(entry)) => self.enter(*entry),
                Ok(Event::Go { launch, key }) => {
                    self.ready.push_back((launch, key));
                    self.go_on();
                }
                Ok(Event::Fate { launch }) => self.fate(launch),
                Err(RecvTimeoutError::Timeout) => self.look_after(),
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return self.stop(),
            }
        }
    }

    /// Rank 0 names the meeting, where one is needed: all processes find that alike.
    fn open(&mut self, launch: u64) {
        self.latest = launch;
        if let Some(cause) = self.broken.clone() {
            return self.shared.say(Said::Failed { launch, cause });
        }
        if self.shared.rank > 0 || self.mover.joined() {
            return;
        }
        match self.mover.name() {
            Ok(name) => self.shared.say(Said::Meeting { launch, name }),
            Err(error) => self.failed(launch, &error.to_string()),
        }
    }

    fn join(&mut self, launch: u64, name: &[u8], limits: &Limits) {
        match self.mover.join(name, &limits.patience()) {
            Ok(()) => self.go_on(),
            Err(error) => {
                self.mover.abort();
                self.failed(launch, &format!("before any collective: {error}"));
            }
        }
    }

    fn enter(&mut self, entry: Entry) {
        if !entry.limits.failed() {
            let key = (entry.launch, entry.exchange.key());
            self.entries.insert(key, entry);
        } else if let Some(fate) = self.shared.fate(entry.launch) {
            // The launch has failed meanwhile: nobody else would say so.
            entry.reply.send(Err(fate));
        }
    }

    /// Makes the exchanges that the hub has let go, in its order.
    fn go_on(&mut self) {
        while self.mover.joined()
            && let Some(next) = self.ready.pop_front()
        {
            // Entered before the hub let it go, unless its launch has failed since.
            if let Some(entry) = self.entries.remove(&next) {
                self.make(entry);
            }
        }
    }

    fn make(&mut self, entry: Entry) {
        let entered = Instant::now();
        match (self.mover).exchange(&entry.boxes, &entry.limits.patience()) {
            Ok(()) => {
                let Entry { boxes, reply, .. } = entry;
                drop(boxes);
                reply.send(Ok(Times {
                    laid: None,
                    entered,
                    arrived: Instant::now(),
                }));
            }
            Err(error) => {
                // Before the boxes are given back: they may be in use until then.
                self.mover.abort();
                let (launch, call) = (entry.launch, &entry.exchange.call);
                if !matches!(error, NcclError::Aborted) {
                    let members = &entry.exchange.members;
                    self.failed(launch, &format!("in {call} of ranks {members:?}: {error}"));
                }
                // Answered with the fate, which comes or has come.
                self.enter(entry);
            }
        }
    }

    fn failed(&mut self, launch: u64, message: &str) {
        let cause = CommError::Engine {
            rank: self.shared.rank,
            message: message.to_owned(),
        };
        self.broken = Some(cause.clone());
        // A launch after which another one has begun is over.
        let launch = launch.max(self.latest);
        self.shared.say(Said::Failed { launch, cause });
    }

    /// A launch has failed: what is under way ends, and everybody who waits hears why.
    fn fate(&mut self, launch: u64) {
        self.mover.abort();
        self.broken = None;
        self.ready.retain(|(of, _)| *of != launch);
        let fate = self.shared.fate(launch);
        let (over, others) = std::mem::take(&mut self.entries)
            .into_iter()
            .partition(|((of, _), _)| *of == launch);
        self.entries = others;
        let over: HashMap<(u64, Key), Entry> = over;
        if let Some(fate) = fate {
            for entry in over.into_values() {
                entry.reply.send(Err(fate.clone()));
            }
        }
    }

    /// A rank that goes on long after its launch has failed is stuck, and so would be all that comes after.
    #[allow(clippy::print_stderr, reason = "nobody is left to return this to")]
    fn look_after(&self) {
        let view = self.shared.view();
        let stuck = view.launches.values().find_map(|launch| {
            let stuck = launch.runs && launch.fated?.elapsed() > launch.limits.timeout;
            stuck.then_some(launch.fate.as_ref()?)
        });
        if let Some(root) = stuck {
            eprintln!(
                "rank {} does not end, so its process does: {root}",
                self.shared.rank
            );
            std::process::exit(ABORTED);
        }
    }

    fn stop(mut self) {
        let limits = Limits {
            timeout: FAREWELL,
            ..Limits::default()
        };
        if self.mover.leave(&limits.patience()).is_err() {
            self.mover.abort();
        }
        self.shared.say(Said::Bye);
    }
}

#[cfg(test)]
mod tests {
    use super::super::meeting;
    use super::super::mover::Patience;
    use super::*;
    use crate::launch::LONGEST_TIMEOUT;
    use crate::ledger::Collective;

    /// What a mover without a GPU does with boxes.
    type Make = fn(rank: usize, boxes: &Boxes, patience: &Patience<'_>) -> Result<(), NcclError>;

    /// A mover that notes what it is asked for.
    struct Notes {
        rank: usize,
        make: Make,
        joined: bool,
        written: Arc<Mutex<Vec<String>>>,
    }

    impl Notes {
        fn write(&self, note: String) {
            self.written.lock().unwrap().push(note);
        }
    }

    impl Mover for Notes {
        fn name(&mut self) -> Result<Vec<u8>, NcclError> {
            Ok(vec![self.written.lock().unwrap().len() as u8])
        }

        fn join(&mut self, name: &[u8], patience: &Patience<'_>) -> Result<(), NcclError> {
            // It waits for nobody, and so not in vain where a launch fails at once; but who has no time cannot join.
            if let Err(late @ NcclError::Late { .. }) = patience.pause("to join the others") {
                return Err(late);
            }
            self.joined = true;
            self.write(format!("joins {name:?}"));
            Ok(())
        }

        fn joined(&self) -> bool {
            self.joined
        }

        fn exchange(&mut self, boxes: &Boxes, patience: &Patience<'_>) -> Result<(), NcclError> {
            self.write(format!("moves {}", boxes.sent_bytes()));
            (self.make)(self.rank, boxes, patience)
        }

        fn abort(&mut self) {
            if std::mem::take(&mut self.joined) {
                self.write("aborts".to_owned());
            }
        }

        fn leave(&mut self, _patience: &Patience<'_>) -> Result<(), NcclError> {
            if std::mem::take(&mut self.joined) {
                self.write("leaves".to_owned());
            }
            Ok(())
        }
    }

    /// Runs `body` in as many processes as there are ranks, here on threads: what each returned, and what its mover
    /// was asked for.
    fn run<T: Send>(
        ranks: usize,
        make: Make,
        body: impl Fn(&Arc<Process>) -> T + Sync,
    ) -> Vec<(T, Vec<String>)> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut door = meeting::listen("127.0.0.1:0").unwrap();
        let address = door.address();
        let mut hub = Some(meeting::serve(door, ranks, deadline).unwrap());
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..ranks)
                .map(|rank| {
                    let (hub, address, body) = (hub.take(), &address, &body);
                    scope.spawn(move || {
                        let place = (rank, ranks);
                        let line = meeting::connect(address, place, deadline).unwrap();
                        let written = Arc::<Mutex<Vec<String>>>::default();
                        let mover = Notes {
                            rank,
                            make,
                            joined: false,
                            written: written.clone(),
                        };
                        let process = Process::start(place, line, hub, move || mover).unwrap();
                        let process = Arc::new(process);
                        let value = body(&process);
                        drop(process);
                        let written = written.lock().unwrap().clone();
                        (value, written)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    fn makes(_rank: usize, _boxes: &Boxes, _patience: &Patience<'_>) -> Result<(), NcclError> {
        Ok(())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn wait_while(so: impl Fn() -> bool) {
        let deadline = soon();
        while so() {
            assert!(Instant::now() < deadline, "waited for long enough");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Enters an exchange, waits for it and ends the launch.
    fn exchange_once(job: &Job, exchange: Announcement, deadline: Instant) -> Option<CommError> {
        let waited = job.call(&exchange.call).and_then(|()| {
            let answer = job.enter(exchange.clone(), Boxes::noted(8));
            job.wait(&answer, &exchange, deadline)
        });
        let ended = job.finish(vec![]).err();
        // A rank hears the fate before it ends, or then.
        assert!(waited.is_ok() || waited.err() == ended);
        ended
    }

    #[test]
    fn all_movers_make_exchanges_in_one_order_whatever_their_ranks_did() {
        let outcomes = run(2, makes, |process| {
            let job = process.open(2, TIMEOUT);
            let mut exchanges = [
                (Announcement::of(&[0, 1], 0), 100),
                (Announcement::of(&[1, 0], 0), 200),
            ];
            if process.rank() == 1 {
                exchanges.reverse();
            }
            let answers = (exchanges.clone())
                .map(|(exchange, bytes)| job.enter(exchange, Boxes::noted(bytes)));
            for (answer, (exchange, _)) in answers.iter().zip(&exchanges) {
                job.wait(answer, exchange, soon()).unwrap();
            }
            job.finish(vec![process.rank() as u8]).unwrap()
        });
        let [(values, first), (_, second)] = &outcomes[..] else {
            panic!("two ranks");
        };
        assert_eq!(*values, [vec![0], vec![1]]);
        assert_eq!(first, second);
        assert_eq!(first.len(), 4, "{first:?}");
        assert_eq!((&*first[0], &*first[3]), ("joins [0]", "leaves"));
    }

    #[test]
    fn ranks_that_call_different_things_get_one_error_and_nothing_moves() {
        let outcomes = run(3, makes, |process| {
            let job = process.open(3, TIMEOUT);
            let mut exchange = Announcement::of(&[0, 1, 2], 0);
            if process.rank() == 1 {
                exchange.call.collective = Collective::AllGather;
            }
            exchange_once(&job, exchange, soon())
        });
        let Some(CommError::Mismatch {
            call, other_call, ..
        }) = &outcomes[0].0
        else {
            panic!("{:?}", outcomes[0].0);
        };
        assert_ne!(call.collective, other_call.collective);
        for (error, notes) in &outcomes {
            assert_eq!(error, &outcomes[0].0);
            assert!(
                !notes.iter().any(|note| note.starts_with("moves")),
                "{notes:?}"
            );
        }
    }

    #[test]
    fn a_rank_that_calls_nothing_is_named_to_all_when_the_deadline_is_over() {
        let outcomes = run(2, makes, |process| {
            let job = process.open(2, TIMEOUT);
            if process.rank() == 0 {
                let deadline = Instant::now() + Duration::from_millis(200);
                return exchange_once(&job, Announcement::of(&[0, 1], 0), deadline);
            }
            // It is busy, and hears of it when it calls the next time.
            let next = Announcement::of(&[0, 1], 0);
            while job.call(&next.call).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
            job.finish(vec![]).err()
        });
        for (error, _) in outcomes {
            assert!(
                matches!(&error, Some(CommError::Unanswered { rank: 0, missing, .. }) if *missing == [1]),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_mover_that_fails_or_hangs_ends_all_and_the_next_launch_joins_anew() {
        let fails: Make = |rank, boxes, _| match (rank, boxes.sent_bytes()) {
            (1, 8) => Err(NcclError::Call {
                call: "ncclSend",
                message: "unhandled system error".to_owned(),
            }),
            _ => Ok(()),
        };
        let hangs: Make = |_, boxes, patience| {
            while boxes.sent_bytes() == 8 {
                patience.pause("for nothing")?;
            }
            Ok(())
        };
        for make in [fails, hangs] {
            let outcomes = run(2, make, |process| {
                let job = process.open(2, TIMEOUT);
                let deadline = Instant::now() + Duration::from_millis(300);
                let error = exchange_once(&job, Announcement::of(&[0, 1], 3), deadline);
                let job = process.open(2, TIMEOUT);
                let again = Announcement::of(&[0, 1], 0);
                let answer = job.enter(again.clone(), Boxes::noted(16));
                job.wait(&answer, &again, soon()).unwrap();
                job.finish(vec![]).unwrap();
                error.unwrap()
            });
            for (error, notes) in &outcomes {
                assert_eq!(error, &outcomes[0].0);
                assert!(error.to_string().contains("#3"), "{error}");
                let acts: Vec<&str> = notes.iter().map(|note| &note[..5]).collect();
                let expected = ["joins", "moves", "abort", "joins", "moves", "leave"];
                assert_eq!(acts, expected, "{notes:?}");
                assert_ne!(notes[0], notes[3], "a name is good for one time");
            }
            match &outcomes[0].0 {
                CommError::Engine { rank: 1, message } => {
                    assert!(message.contains("ncclSend failed: unhandled"), "{message}");
                }
                CommError::Unanswered { missing, .. } => assert_eq!(missing.len(), 1),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_mover_that_comes_to_joining_when_the_launch_has_ended_joins() {
        static BUSY: AtomicBool = AtomicBool::new(true);
        let make: Make = |rank, boxes, _| match (rank, boxes.sent_bytes()) {
            (0, 8) => Err(NcclError::Call {
                call: "ncclSend",
                message: "unhandled system error".to_owned(),
            }),
            (1, 8) => {
                wait_while(|| BUSY.load(Ordering::Relaxed));
                Err(NcclError::Aborted)
            }
            _ => Ok(()),
        };
        let outcomes = run(2, make, |process| {
            let both = |sequence| Announcement::of(&[0, 1], sequence);
            let job = process.open(2, TIMEOUT);
            let answer = job.enter(both(0), Boxes::noted(8));
            // Rank 1 does not wait for its mover, which is busy.
            if process.rank() == 0 {
                job.wait(&answer, &both(0), soon()).unwrap_err();
            }
            job.finish(vec![]).unwrap_err();

            let job = process.open(2, TIMEOUT);
            if process.rank() == 0 {
                // Made when this rank's mover has joined, so that the other's has been told to.
                let alone = Announcement::of(&[0], 0);
                let answer = job.enter(alone.clone(), Boxes::noted(4));
                job.wait(&answer, &alone, soon()).unwrap();
            }
            job.finish(vec![]).unwrap();
            if process.rank() == 1 {
                BUSY.store(false, Ordering::Relaxed);
            }

            let job = process.open(2, TIMEOUT);
            let answer = job.enter(both(0), Boxes::noted(16));
            job.wait(&answer, &both(0), soon()).unwrap();
            job.finish(vec![]).unwrap();
            assert!(process.shared.view().launches.is_empty(), "kept for ever");
        });
        for ((), notes) in &outcomes {
            let joins = |note: &&String| note.starts_with("joins");
            assert_eq!(notes.iter().filter(joins).count(), 2, "{notes:?}");
        }
    }

    #[test]
    fn exchanges_that_nobody_waits_for_are_made_when_their_launch_has_ended() {
        static BEGUN: AtomicBool = AtomicBool::new(false);
        static BUSY: AtomicBool = AtomicBool::new(true);
        let make: Make = |rank, boxes, patience| {
            if (rank, boxes.sent_bytes()) == (1, 8) {
                BEGUN.store(true, Ordering::Relaxed);
                wait_while(|| BUSY.load(Ordering::Relaxed));
            }
            patience.pause("for the boxes")
        };
        let outcomes = run(2, make, |process| {
            let exchange = |sequence| Announcement::of(&[0, 1], sequence);
            let job = process.open(2, TIMEOUT);
            let _first = job.enter(exchange(0), Boxes::noted(8));
            // The second one is met by a mover that comes to it too late.
            wait_while(|| !BEGUN.load(Ordering::Relaxed));
            let _second = job.enter(exchange(1), Boxes::noted(16));
            job.finish(vec![]).unwrap();
            if process.rank() == 1 {
                BUSY.store(false, Ordering::Relaxed);
            }
            let job = process.open(2, TIMEOUT);
            let answer = job.enter(exchange(0), Boxes::noted(32));
            job.wait(&answer, &exchange(0), soon()).unwrap();
            job.finish(vec![]).unwrap();
            assert!(process.shared.view().launches.is_empty(), "kept for ever");
        });
        let expected = ["joins [0]", "moves 8", "moves 16", "moves 32", "leaves"];
        for ((), notes) in outcomes {
            assert_eq!(notes, expected);
        }
    }

    #[test]
    fn a_mover_that_fails_when_its_launch_has_ended_fails_the_next_one_with_what_happened() {
        static BUSY: AtomicBool = AtomicBool::new(true);
        let make: Make = |rank, boxes, _| {
            if rank == 0 || boxes.sent_bytes() != 5 {
                return Ok(());
            }
            wait_while(|| BUSY.load(Ordering::Relaxed));
            Err(NcclError::Call {
                call: "ncclSend",
                message: "unhandled system error".to_owned(),
            })
        };
        let outcomes = run(2, make, |process| {
            let both = Announcement::of(&[0, 1], 3);
            let job = process.open(2, TIMEOUT);
            let _unawaited = job.enter(both.clone(), Boxes::noted(5));
            job.finish(vec![]).unwrap();
            if process.rank() == 1 {
                BUSY.store(false, Ordering::Relaxed);
            }
            let job = process.open(2, TIMEOUT);
            let failed = exchange_once(&job, both.clone(), soon());
            let job = process.open(2, TIMEOUT);
            assert_eq!(exchange_once(&job, both, soon()), None);
            failed
        });
        for (failed, notes) in &outcomes {
            let Some(CommError::Engine { rank: 1, message }) = failed else {
                panic!("{failed:?}");
            };
            assert!(
                message.contains("#3") && message.contains("ncclSend failed"),
                "{message}"
            );
            let joins = notes.iter().filter(|note| note.starts_with("joins"));
            assert_eq!(joins.count(), 2, "{notes:?}");
        }
    }

    #[test]
    fn an_exchange_is_ready_when_it_has_been_made_or_has_failed_and_not_before() {
        // How many exchanges rank 0 has entered, and asked about.
        let asked = AtomicU64::new(0);
        run(2, makes, |process| {
            let job = process.open(2, TIMEOUT);
            let enter = |sequence| job.enter(Announcement::of(&[0, 1], sequence), Boxes::noted(8));
            if process.rank() == 0 {
                for (sequence, made) in [(0, true), (1, false)] {
                    let answer = enter(sequence);
                    let early = answer.is_ready();
                    asked.store(sequence + 1, Ordering::Relaxed);
                    wait_while(|| !answer.is_ready());
                    assert!(!early, "of an exchange that rank 1 had not entered");
                    assert_eq!(answer.outcome.try_recv().unwrap().is_ok(), made);
                }
            } else {
                wait_while(|| asked.load(Ordering::Relaxed) < 1);
                let _answer = enter(0);
                wait_while(|| asked.load(Ordering::Relaxed) < 2);
                job.fail(CommError::Failed {
                    rank: 1,
                    last: None,
                    message: "no data".to_owned(),
                });
            }
            job.finish(vec![]).unwrap_err()
        });
    }

    #[test]
    fn a_time_out_may_be_as_long_as_one_likes() {
        run(2, makes, |process| {
            let job = process.open(2, Duration::MAX);
            if process.rank() == 1 {
                // So that the other one's wait is told to the hub.
                std::thread::sleep(2 * NOTICE);
            }
            let deadline = Instant::now() + LONGEST_TIMEOUT;
            assert_eq!(
                exchange_once(&job, Announcement::of(&[0, 1], 0), deadline),
                None
            );
        });
    }

    #[test]
    fn a_process_that_ends_early_is_named_to_those_that_go_on() {
        let outcomes = run(3, makes, |process| {
            if process.rank() == 2 {
                return None;
            }
            let job = process.open(3, TIMEOUT);
            exchange_once(&job, Announcement::of(&[0, 1, 2], 0), soon())
        });
        for (error, _) in &outcomes[..2] {
            assert!(
                matches!(error, Some(CommError::Engine { rank: 2, .. })),
                "{error:?}"
            );
        }
    }

    #[test]
    fn processes_without_a_part_in_a_launch_hear_how_it_ends() {
        let outcomes = run(3, makes, |process| {
            let job = process.open(2, TIMEOUT);
            assert_eq!(job.rank().is_some(), process.rank() < 2);
            if job.rank() == Some(1) {
                job.fail(CommError::Failed {
                    rank: 1,
                    last: None,
                    message: "no data".to_owned(),
                });
            }
            let failed = job.finish(vec![]).unwrap_err();
            let job = process.open(2, TIMEOUT);
            (failed, job.finish(vec![process.rank() as u8]).unwrap())
        });
        for ((failed, values), _) in outcomes {
            assert!(
                matches!(failed, CommError::Failed { rank: 1, .. }),
                "{failed}"
            );
            assert_eq!(values, [vec![0], vec![1]]);
        }
    }
}

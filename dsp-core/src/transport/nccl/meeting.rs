//! How the processes of a job find the hub and talk with it: over ZeroMQ, which has the sockets and the bytes on them.
//!
//! ```text
//!   rank 0's process                        address: what the launcher calls MASTER_ADDR:MASTER_PORT
//!   ┌──────────────────────┐
//!   │ hub ◀─▶ door, ROUTER │ ◀──────── rank 0, 1, 2, …, a line each, DEALER
//!   └──────────────────────┘
//!                              Hello ──▶   ◀── Welcome, when all are there
//!                               Said ──▶   ◀── Told              as much as there is to say
//!                              Alive ──▶   ◀── Alive             the pulse, and its answer
//!                                Bye ──▶   ◀── Farewell
//! ```
//!
//! Messages of a line arrive in the order in which they were said. A connection that ends is noticed at once, and a side
//! that only stopped by its silence. What was said may still be on its way when it has been handed over, so a line is
//! cut when the other side has answered the last word, and the hub waits for that.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_channel::mpsc::{Receiver, UnboundedReceiver, UnboundedSender, unbounded};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, sleep_until, timeout};
use zeromq::util::PeerIdentity;
use zeromq::{
    DealerSocket, RouterSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend,
    ZmqError, ZmqMessage,
};

use super::NcclError;
use super::hub::{Hub, Outbox, To};
use super::wire::{self, Said, Told};

/// For how long it is tried to connect before it is tried anew, at first and at most: ZeroMQ tries by itself, but ever
/// more seldom; but some names take seconds to be found.
const FIRST_TRY: Duration = Duration::from_secs(1);
const LONGEST_TRY: Duration = Duration::from_secs(10);

/// Between two tries where one fails at once, as with a name that is not known yet.
const PAUSE: Duration = Duration::from_millis(10);

/// Between two looks of the hub at its deadlines.
const GLANCE: Duration = Duration::from_millis(25);

/// How patient the two sides are with each other.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// How often the hub says that it lives, which a process answers.
    pulse: Duration,
    /// How long last words may take.
    manners: Duration,
    /// After how long without a word either side takes the other for dead.
    lifeless: Duration,
}

const PACE: Pace = Pace {
    pulse: Duration::from_secs(1),
    manners: Duration::from_secs(5),
    lifeless: Duration::from_secs(20),
};

/// Where a side's connections are served, whenever its thread waits for something.
fn runtime() -> io::Result<Arc<Runtime>> {
    let mut builder = Builder::new_current_thread();
    // A name is looked up on a thread of its own.
    builder.enable_all().thread_name("NCCL, names");
    builder.build().map(Arc::new)
}

fn io_error(error: ZmqError) -> io::Error {
    match error {
        ZmqError::Network(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

fn unusable(address: &str) -> impl Fn(io::Error) -> NcclError {
    move |source| NcclError::Address {
        address: address.to_owned(),
        source,
    }
}

/// Does something that waits on a thread of its own: the caller's may serve another runtime, where waiting is a panic.
fn apart<T: Send>(work: impl FnOnce() -> Result<T, NcclError> + Send) -> Result<T, NcclError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("NCCL, meets".to_owned());
        let thread = thread
            .spawn_scoped(scope, work)
            .map_err(NcclError::Thread)?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// The hub's end of all lines.
pub(super) struct Door {
    router: RouterSocket,
    events: Receiver<SocketEvent>,
    /// Who has heard its last word, and has not hung up.
    parting: HashSet<PeerIdentity>,
    pace: Pace,
    runtime: Arc<Runtime>,
}

/// Opens the hub's door: what connects from now on is heard when it is served.
pub(super) fn listen(address: &str) -> Result<Door, NcclError> {
    apart(|| {
        let failed = unusable(address);
        let runtime = runtime().map_err(&failed)?;
        let mut router = RouterSocket::new();
        let events = router.monitor();
        let bound = runtime.block_on(router.bind(&format!("tcp://{address}")));
        bound.map_err(|error| failed(io_error(error)))?;
        Ok(Door {
            router,
            events,
            parting: HashSet::new(),
            pace: PACE,
            runtime,
        })
    })
}

/// Serves `size` processes on a thread of its own, which ends when they all have.
pub(super) fn serve(mut door: Door, size: usize, deadline: Instant) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("NCCL, hub".to_owned())
        .spawn(move || {
            let runtime = door.runtime.clone();
            runtime.block_on(async {
                match door.gather(size, deadline).await {
                    Ok(processes) => door.attend(&processes).await,
                    Err((arrived, reason)) => {
                        for process in arrived {
                            let reason = reason.clone();
                            door.part(&process, &Told::Refused { reason }).await;
                        }
                    }
                }
                door.close().await;
            });
        })
}

fn unfit(rank: usize, theirs: usize, size: usize) -> String {
    format!(
        "a process came as rank {rank} of {theirs}, where rank 0 knows {size} with a number each"
    )
}

impl Door {
    /// Where it is, with the port that was chosen if none was asked for.
    #[cfg(test)]
    pub(super) fn address(&mut self) -> String {
        let endpoint = self.router.binds().keys().next();
        endpoint
            .map_or_else(String::new, ToString::to_string)
            .replace("tcp://", "")
    }

    /// One line a process, or those that came and why that is not enough.
    async fn gather(
        &mut self,
        size: usize,
        deadline: Instant,
    ) -> Result<Vec<PeerIdentity>, (Vec<PeerIdentity>, String)> {
        let mut processes: Vec<Option<PeerIdentity>> = vec![None; size];
        let refuse = |processes: Vec<Option<PeerIdentity>>, other, reason| {
            Err((
                processes.into_iter().flatten().chain(other).collect(),
                reason,
            ))
        };
        while processes.iter().any(Option::is_none) {
            if Instant::now() >= deadline {
                let absent: Vec<usize> = (0..size)
                    .filter(|&rank| processes[rank].is_none())
                    .collect();
                let reason =
                    format!("rank(s) {absent:?} of {size} did not come before the deadline");
                return refuse(processes, None, reason);
            }
            // Who says anything else first is none of ours.
            let Some((line, Some(Said::Hello { rank, size: theirs }))) = self.next(deadline).await
            else {
                continue;
            };
            if theirs != size || rank >= size || processes[rank].is_some() {
                return refuse(processes, Some(line), unfit(rank, theirs, size));
            }
            processes[rank] = Some(line);
        }
        Ok(processes.into_iter().flatten().collect())
    }

    /// Hears all processes and tells them what the hub decides, until they all have ended.
    async fn attend(&mut self, processes: &[PeerIdentity]) {
        let size = processes.len();
        let ranks: HashMap<&PeerIdentity, usize> = processes.iter().zip(0..).collect();
        let mut hub = Hub::new(size);
        let mut outbox = vec![(To::All, Told::Welcome)];
        let mut pulse = Instant::now();
        let mut unanswered = vec![0; size];
        loop {
            self.tell(&mut hub, processes, outbox).await;
            if hub.deserted() {
                return;
            }
            outbox = Vec::new();
            if let Some((line, said)) = self.next(Instant::now() + GLANCE).await {
                match (ranks.get(&line), said) {
                    (Some(&rank), Some(Said::Alive)) => unanswered[rank] = 0,
                    (Some(&rank), Some(said)) => {
                        if said == Said::Bye {
                            self.part(&line, &Told::Farewell).await;
                        }
                        outbox = hub.hear(rank, said, Instant::now());
                    }
                    (Some(&rank), None) => outbox = hub.lost(rank),
                    (None, Some(Said::Hello { rank, size: theirs })) => {
                        let reason = unfit(rank, theirs, size);
                        self.part(&line, &Told::Refused { reason }).await;
                    }
                    (None, _) => {}
                }
            }
            outbox.extend(hub.look_after(Instant::now()));
            if pulse.elapsed() > self.pace.pulse {
                pulse = Instant::now();
                // Pulses are counted, not seconds: while this process was stopped, nobody was asked.
                for (rank, unanswered) in unanswered.iter_mut().enumerate() {
                    if self.pace.pulse * *unanswered >= self.pace.lifeless {
                        outbox.extend(hub.lost(rank));
                    }
                    *unanswered += 1;
                }
                outbox.push((To::All, Told::Alive));
            }
        }
    }

    /// What is said next, and on which line; nothing, if the line has ended or what was said is no message.
    async fn next(&mut self, until: Instant) -> Option<(PeerIdentity, Option<Said>)> {
        loop {
            tokio::select! {
                biased;
                Ok(message) = self.router.recv() => {
                    let [line, message] = &message.into_vec()[..] else {
                        continue;
                    };
                    let Ok(line) = PeerIdentity::try_from(line.clone()) else {
                        continue;
                    };
                    return Some((line, wire::decode(message).ok()));
                }
                Ok(event) = self.events.recv() => {
                    // It comes after all that was said before.
                    if let SocketEvent::Disconnected(line) = event {
                        self.parting.remove(&line);
                        return Some((line, None));
                    }
                }
                () = sleep_until(until.into()) => return None,
            }
        }
    }

    /// Sends messages; who cannot be reached is lost, which others may have to be told.
    async fn tell(&mut self, hub: &mut Hub, processes: &[PeerIdentity], outbox: Outbox) {
        let mut outbox = VecDeque::from(outbox);
        while let Some((to, told)) = outbox.pop_front() {
            let whom = match to {
                To::All => 0..processes.len(),
                To::One(rank) => rank..rank + 1,
            };
            let message = wire::encode(&told).map(ZmqMessage::from);
            for rank in whom {
                if hub.has_lost(rank) {
                    continue;
                }
                let sent = match &message {
                    Ok(message) => self.send(&processes[rank], message.clone()).await,
                    Err(_) => false,
                };
                if !sent {
                    outbox.extend(hub.lost(rank));
                }
            }
        }
    }

    /// Sends the last message on a line.
    async fn part(&mut self, line: &PeerIdentity, told: &Told) {
        if let Ok(message) = wire::encode(told)
            && self.send(line, message.into()).await
        {
            self.parting.insert(line.clone());
        }
    }

    async fn send(&mut self, line: &PeerIdentity, mut message: ZmqMessage) -> bool {
        message.push_front(line.clone().into());
        let sent = timeout(self.pace.manners, self.router.send(message)).await;
        matches!(sent, Ok(Ok(())))
    }

    /// Waits until the last messages have been heard: then lines are cut by the other side.
    async fn close(mut self) {
        let until = Instant::now() + self.pace.manners;
        while !self.parting.is_empty() && Instant::now() < until {
            self.next(until).await;
        }
    }
}

/// A process's end of its line to the hub.
pub(super) struct Line {
    dealer: DealerSocket,
    events: Receiver<SocketEvent>,
    said: UnboundedReceiver<Said>,
    voice: Voice,
    /// Until when a word of the hub's is waited for, and whether the last one is.
    patience: Instant,
    parting: bool,
    pace: Pace,
    runtime: Arc<Runtime>,
}

/// What is said here leaves on the line while that is heard.
#[derive(Debug, Clone)]
pub(super) struct Voice(UnboundedSender<Said>);

impl Voice {
    /// Says something; returns at once.
    pub(super) fn say(&self, said: Said) {
        // Where the line has ended, it is heard no more either, which fails all launches.
        let _ = self.0.unbounded_send(said);
    }
}

/// Connects `rank` of `size` processes to the hub, which may not listen yet, and waits for the others.
pub(super) fn connect(
    address: &str,
    (rank, size): (usize, usize),
    deadline: Instant,
) -> Result<Line, NcclError> {
    apart(|| {
        let failed = unusable(address);
        let runtime = runtime().map_err(&failed)?;
        let mut options = SocketOptions::default();
        options.no_connect_timeout();
        let mut dealer = DealerSocket::with_options(options);
        let events = dealer.monitor();
        let (voice, said) = unbounded();
        let mut line = Line {
            dealer,
            events,
            said,
            voice: Voice(voice),
            // The hub's own deadline may be as late as this process's, and its answer has the better words.
            patience: deadline.max(Instant::now()) + PACE.manners,
            parting: false,
            pace: PACE,
            runtime: runtime.clone(),
        };
        let refused = |reason: String| NcclError::Meeting { reason };
        let welcome = runtime.block_on(async {
            line.connect(&format!("tcp://{address}"), deadline).await?;
            line.send(&Said::Hello { rank, size }).await?;
            line.next().await
        });
        match welcome.map_err(failed)? {
            Told::Welcome => Ok(line),
            Told::Refused { reason } => Err(refused(reason)),
            other => Err(refused(format!("rank 0 said {other:?} and no welcome"))),
        }
    })
}

impl Line {
    pub(super) fn voice(&self) -> Voice {
        self.voice.clone()
    }

    /// Waits for what the hub tells next; meanwhile, what the voice says leaves. After its last word nothing is lost
    /// if this is called until it fails.
    ///
    /// # Errors
    /// If the hub has ended, or is silent, or has answered the last word.
    pub(super) fn hear(&mut self) -> io::Result<Told> {
        self.runtime.clone().block_on(self.next())
    }

    async fn connect(&mut self, endpoint: &str, deadline: Instant) -> io::Result<()> {
        let mut patience = FIRST_TRY;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let tried = timeout(left.min(patience), self.dealer.connect(endpoint)).await;
            let error = match tried {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => io_error(error),
                Err(_) => io::Error::new(io::ErrorKind::TimedOut, "no hub answers there"),
            };
            if Instant::now() >= deadline {
                return Err(error);
            }
            patience = (2 * patience).min(LONGEST_TRY);
            sleep(PAUSE).await;
        }
    }

    async fn next(&mut self) -> io::Result<Told> {
        loop {
            tokio::select! {
                biased;
                message = self.dealer.recv() => {
                    let message = message.map_err(io_error)?;
                    let told = match &message.into_vec()[..] {
                        [message] => wire::decode(message)?,
                        _ => return Err(io::Error::other("a message of several parts")),
                    };
                    if !self.parting {
                        self.patience = Instant::now() + self.pace.lifeless;
                    }
                    match told {
                        Told::Alive => self.send(&Said::Alive).await?,
                        Told::Farewell => return Err(io::Error::other("it has said farewell")),
                        told => return Ok(told),
                    }
                }
                Ok(event) = self.events.recv() => {
                    // It comes after all that was told before.
                    if let SocketEvent::Disconnected(_) = event {
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    }
                }
                Ok(said) = self.said.recv() => {
                    if said == Said::Bye {
                        self.parting = true;
                        self.patience = Instant::now() + self.pace.manners;
                    }
                    self.send(&said).await?;
                }
                () = sleep_until(self.patience.into()) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "it is silent"));
                }
            }
        }
    }

    async fn send(&mut self, said: &Said) -> io::Result<()> {
        let message = wire::encode(said)?.into();
        let sent = timeout(self.pace.lifeless, self.dealer.send(message)).await;
        sent?.map_err(io_error)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;
    use zeromq::SubSocket;

    use super::*;
    use crate::error::CommError;

    /// For tests that wait until patience is over.
    const QUICK: Pace = Pace {
        pulse: Duration::from_millis(50),
        manners: Duration::from_secs(1),
        lifeless: Duration::from_secs(2),
    };

    /// For tests where nothing is to be noticed by what does not come.
    const PATIENT: Pace = Pace {
        pulse: Duration::from_secs(20),
        manners: Duration::from_secs(60),
        lifeless: Duration::from_secs(60),
    };

    /// Far above what a word takes, and below what patience does.
    const AT_ONCE: Duration = Duration::from_secs(2);

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn door() -> (Door, String) {
        let mut door = listen("127.0.0.1:0").unwrap();
        let address = door.address();
        (door, address)
    }

    /// The lines of all ranks, when they are welcome.
    fn lines(address: &str, size: usize) -> Vec<Line> {
        std::thread::scope(|scope| {
            let line = |rank| scope.spawn(move || connect(address, (rank, size), soon()).unwrap());
            let lines: Vec<_> = (0..size).map(line).collect();
            lines.into_iter().map(|line| line.join().unwrap()).collect()
        })
    }

    /// A hub, and the lines of its processes.
    fn job(size: usize, pace: Pace) -> (JoinHandle<()>, Vec<Line>) {
        let (mut door, address) = door();
        door.pace = pace;
        let hub = serve(door, size, soon()).unwrap();
        (hub, lines(&address, size))
    }

    /// The same with something else in the hub's place.
    fn met<T: Send + 'static>(
        size: usize,
        hub: impl AsyncFnOnce(Door, Vec<PeerIdentity>) -> T + Send + 'static,
    ) -> (JoinHandle<T>, Vec<Line>) {
        let (mut door, address) = door();
        let runtime = door.runtime.clone();
        let hub = std::thread::spawn(move || {
            runtime.block_on(async {
                let processes = door.gather(size, soon()).await.unwrap();
                for process in &processes {
                    let welcome = wire::encode(&Told::Welcome).unwrap();
                    assert!(door.send(process, welcome.into()).await);
                }
                sleep(Duration::from_millis(100)).await;
                hub(door, processes).await
            })
        });
        (hub, lines(&address, size))
    }

    fn say(line: &Line, said: Said) {
        line.voice().say(said);
    }

    fn leave(mut line: Line) {
        say(&line, Said::Bye);
        while line.hear().is_ok() {}
    }

    fn opened(launch: u64, ranks: usize) -> Said {
        let timeout = Duration::from_secs(20);
        Said::Opened {
            launch,
            ranks,
            timeout,
        }
    }

    fn returned(launch: u64, bytes: usize) -> Said {
        let value = vec![200; bytes];
        Said::Returned { launch, value }
    }

    /// The launch that a rank's end has failed, if this is what was told.
    fn failed_by(rank: usize, told: &Told) -> Option<u64> {
        match told {
            Told::Fate {
                launch,
                cause: CommError::Engine { rank: ended, .. },
            } if *ended == rank => Some(*launch),
            _ => None,
        }
    }

    #[test]
    fn all_are_welcomed_when_the_last_one_has_come_and_strangers_do_not_disturb() {
        let (door, address) = door();
        let hub = serve(door, 2, soon()).unwrap();
        let runtime = runtime().unwrap();
        let endpoint = format!("tcp://{address}");
        let mut noise = DealerSocket::new();
        let silent = runtime.block_on(async {
            let silent = TcpStream::connect(&address).await.unwrap();
            let stranger = TcpStream::connect(&address).await.unwrap();
            stranger.writable().await.unwrap();
            let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\n{:80}\r\n\r\n", "A: b");
            stranger.try_write(request.as_bytes()).unwrap();
            let closed = async {
                loop {
                    stranger.readable().await.unwrap();
                    match stranger.try_read(&mut [0; 256]) {
                        Ok(0) => break,
                        Err(error) if error.kind() != io::ErrorKind::WouldBlock => break,
                        _ => {}
                    }
                }
            };
            timeout(AT_ONCE, closed).await.unwrap();
            assert!(SubSocket::new().connect(&endpoint).await.is_err());
            noise.connect(&endpoint).await.unwrap();
            noise.send("no message of ours".into()).await.unwrap();
            sleep(Duration::from_millis(50)).await;
            silent
        });
        let lines = std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                let line = connect(&address, (0, 2), soon()).unwrap();
                (line, Instant::now())
            });
            std::thread::sleep(Duration::from_millis(100));
            let came = Instant::now();
            let last = connect(&address, (1, 2), soon()).unwrap();
            let (first, welcomed) = first.join().unwrap();
            assert!(welcomed > came);
            [first, last]
        });
        runtime.block_on(noise.send("nor now".into())).unwrap();
        lines.into_iter().for_each(leave);
        hub.join().unwrap();
        drop(silent);
    }

    #[test]
    fn whoever_came_hears_at_the_deadline_who_did_not() {
        let (door, address) = door();
        let deadline = Instant::now() + Duration::from_millis(200);
        let hub = serve(door, 3, deadline).unwrap();
        let error = connect(&address, (1, 3), deadline).err().unwrap();
        assert!(error.to_string().contains("rank(s) [0, 2] of 3"), "{error}");
        hub.join().unwrap();
    }

    #[test]
    fn two_processes_of_the_same_rank_are_refused() {
        let (door, address) = door();
        let hub = serve(door, 2, soon()).unwrap();
        std::thread::scope(|scope| {
            let ranks = [1, 1].map(|rank| {
                let address = &address;
                scope.spawn(move || connect(address, (rank, 2), soon()).err().unwrap())
            });
            for error in ranks.map(|rank| rank.join().unwrap()) {
                assert!(error.to_string().contains("rank 1 of 2"), "{error}");
            }
        });
        hub.join().unwrap();
    }

    #[test]
    fn a_process_that_knows_of_another_number_is_refused_before_all_are_there_and_after() {
        let words = "a process came as rank 1 of 3, where rank 0 knows 2 with a number each";
        let refused = |address: &str| {
            let error = connect(address, (1, 3), soon()).err().unwrap();
            assert!(matches!(error, NcclError::Meeting { .. }), "{error}");
            assert!(error.to_string().contains(words), "{error}");
        };
        let (door, address) = door();
        let hub = serve(door, 2, soon()).unwrap();
        refused(&address);
        hub.join().unwrap();

        let (door, address) = self::door();
        let hub = serve(door, 2, soon()).unwrap();
        let lines = lines(&address, 2);
        refused(&address);
        lines.into_iter().for_each(leave);
        hub.join().unwrap();
    }

    #[test]
    fn an_address_where_nobody_listens_or_that_is_taken_is_an_error_that_names_it() {
        let (door, address) = door();
        for address in [&address, "nowhere"] {
            let error = listen(address).err().unwrap();
            assert!(matches!(error, NcclError::Address { .. }), "{error}");
            assert!(error.to_string().contains(address), "{error}");
        }
        drop(door);
        for patience in [Duration::ZERO, Duration::from_millis(200)] {
            let deadline = Instant::now() + patience;
            let error = connect(&address, (1, 2), deadline).err().unwrap();
            assert!(matches!(error, NcclError::Address { .. }), "{error}");
            assert!(error.to_string().contains(&address), "{error}");
            assert!(deadline.elapsed() < AT_ONCE);
        }
    }

    #[test]
    fn whoever_serves_a_runtime_meets_too() {
        runtime().unwrap().block_on(async {
            let (door, address) = door();
            assert!(listen(&address).is_err());
            let hub = serve(door, 1, soon()).unwrap();
            let line = connect(&address, (0, 1), soon()).unwrap();
            assert!(connect(&address, (0, 1), soon()).is_err());
            // As a process does, whose threads hear.
            std::thread::spawn(|| leave(line)).join().unwrap();
            hub.join().unwrap();
        });
    }

    #[test]
    fn a_hub_that_listens_later_is_found() {
        let (door, address) = door();
        drop(door);
        std::thread::scope(|scope| {
            let line = scope.spawn(|| connect(&address, (0, 1), soon()).unwrap());
            std::thread::sleep(Duration::from_millis(300));
            let hub = serve(listen(&address).unwrap(), 1, soon()).unwrap();
            leave(line.join().unwrap());
            hub.join().unwrap();
        });
    }

    #[test]
    fn a_process_that_is_killed_is_named_to_all_others_at_once() {
        let (hub, mut lines) = job(3, PATIENT);
        let killed = lines.pop().unwrap();
        std::thread::scope(|scope| {
            let others = lines.into_iter().map(|mut line| {
                scope.spawn(move || {
                    say(&line, opened(0, 3));
                    let told = line.hear().unwrap();
                    assert_eq!(failed_by(2, &told), Some(0), "{told:?}");
                    (line, Instant::now())
                })
            });
            let others: Vec<_> = others.collect();
            std::thread::sleep(Duration::from_millis(50));
            let start = Instant::now();
            drop(killed);
            for (line, heard) in others.into_iter().map(|line| line.join().unwrap()) {
                assert!(heard - start < AT_ONCE);
                leave(line);
            }
        });
        hub.join().unwrap();
    }

    #[test]
    fn a_process_that_was_killed_before_all_were_there_is_named_to_those_that_came() {
        let (door, address) = door();
        let hub = serve(door, 2, soon()).unwrap();
        let runtime = runtime().unwrap();
        let mut killed = DealerSocket::new();
        runtime.block_on(async {
            killed.connect(&format!("tcp://{address}")).await.unwrap();
            let hello = wire::encode(&Said::Hello { rank: 1, size: 2 }).unwrap();
            killed.send(hello.into()).await.unwrap();
            sleep(Duration::from_millis(50)).await;
        });
        drop((killed, runtime));
        let mut line = connect(&address, (0, 2), soon()).unwrap();
        say(&line, opened(0, 2));
        let told = line.hear().unwrap();
        assert_eq!(failed_by(1, &told), Some(0), "{told:?}");
        leave(line);
        hub.join().unwrap();
    }

    #[test]
    fn a_process_that_says_bye_fails_no_launch_that_has_ended() {
        let (hub, lines) = job(2, PACE);
        let [mut first, mut last] = lines.try_into().ok().unwrap();
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| {
                say(&last, opened(0, 2));
                say(&last, returned(0, 1));
                let told = last.hear().unwrap();
                leave(last);
                told
            });
            say(&first, opened(0, 2));
            say(&first, returned(0, 1));
            let told = first.hear().unwrap();
            assert!(matches!(told, Told::Done { launch: 0, .. }), "{told:?}");
            assert_eq!(ended.join().unwrap(), told);
        });
        // Of what follows it has no part.
        say(&first, opened(1, 2));
        let told = first.hear().unwrap();
        assert_eq!(failed_by(1, &told), Some(1), "{told:?}");
        leave(first);
        hub.join().unwrap();
    }

    #[test]
    fn a_hub_that_is_killed_is_noticed_at_once() {
        let (hub, lines) = met(2, async |door, _| drop(door));
        hub.join().unwrap();
        let start = Instant::now();
        for mut line in lines {
            let error = line.hear().unwrap_err();
            assert!(start.elapsed() < AT_ONCE, "{error}");
        }
    }

    #[test]
    fn a_hub_that_only_stopped_is_noticed_by_its_silence() {
        let (stopped, goes_on) = std::sync::mpsc::channel::<()>();
        let (hub, mut lines) = met(1, async move |_door, _| goes_on.recv().is_ok());
        let start = Instant::now();
        lines[0].pace = QUICK;
        lines[0].patience = start + QUICK.lifeless;
        let error = lines[0].hear().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!((QUICK.lifeless..QUICK.lifeless + AT_ONCE).contains(&start.elapsed()));
        drop(stopped);
        hub.join().unwrap();
    }

    #[test]
    fn a_process_that_reads_nothing_is_lost_and_holds_up_nobody() {
        let (hub, mut lines) = job(3, QUICK);
        let deaf = lines.pop().unwrap();
        let start = Instant::now();
        std::thread::scope(|scope| {
            for mut line in lines {
                scope.spawn(move || {
                    for launch in 0.. {
                        let begun = Instant::now();
                        say(&line, opened(launch, 2));
                        say(&line, returned(launch, 1 << 14));
                        // This goes to all three.
                        let told = line.hear().unwrap();
                        assert!(begun.elapsed() < QUICK.manners, "held up");
                        if failed_by(2, &told) == Some(launch) {
                            break;
                        }
                        assert!(matches!(told, Told::Done { .. }), "{told:?}");
                        assert!(start.elapsed() < 5 * QUICK.lifeless, "not lost");
                    }
                    assert!(start.elapsed() > QUICK.lifeless / 2, "lost too early");
                    leave(line);
                });
            }
        });
        hub.join().unwrap();
        drop(deaf);
    }

    #[test]
    fn a_process_that_has_nothing_to_say_is_not_lost() {
        let (hub, lines) = job(2, QUICK);
        let voice = lines[0].voice();
        std::thread::scope(|scope| {
            for mut line in lines {
                scope.spawn(move || {
                    let told = line.hear().unwrap();
                    assert!(matches!(told, Told::Done { .. }), "{told:?}");
                    leave(line);
                });
            }
            std::thread::sleep(2 * QUICK.lifeless);
            voice.say(opened(0, 1));
            voice.say(returned(0, 1));
        });
        hub.join().unwrap();
    }

    #[test]
    fn who_sends_and_reads_large_values_is_not_lost() {
        const LARGE: usize = 1 << 23;
        let (hub, lines) = job(2, QUICK);
        std::thread::scope(|scope| {
            for mut line in lines {
                scope.spawn(move || {
                    for (launch, bytes) in [(0, LARGE), (1, 1)] {
                        say(&line, opened(launch, 2));
                        say(&line, returned(launch, bytes));
                        let told = line.hear().unwrap();
                        let done =
                            matches!(&told, Told::Done { values, .. } if values[1].len() == bytes);
                        assert!(done, "{:?}", failed_by(0, &told));
                    }
                    leave(line);
                });
            }
        });
        hub.join().unwrap();
    }

    #[test]
    fn what_was_said_before_the_last_word_arrives_in_order_both_ways() {
        const MANY: u64 = 5_000;
        let (hub, mut lines) = met(1, async |mut door: Door, processes: Vec<_>| {
            let mut heard = Vec::new();
            while let Some((_, Some(said))) = door.next(soon()).await {
                match said {
                    Said::Returned { launch, .. } => heard.push(launch),
                    Said::Bye => break,
                    other => panic!("{other:?}"),
                }
            }
            for launch in 0..MANY {
                let values = vec![vec![100; 200]];
                let done = wire::encode(&Told::Done { launch, values }).unwrap();
                assert!(door.send(&processes[0], done.into()).await);
            }
            door.part(&processes[0], &Told::Farewell).await;
            door.close().await;
            heard
        });
        let mut line = lines.pop().unwrap();
        for launch in 0..MANY {
            say(&line, returned(launch, 200));
        }
        say(&line, Said::Bye);
        let mut told = Vec::new();
        while let Ok(Told::Done { launch, .. }) = line.hear() {
            told.push(launch);
        }
        drop(line);
        let all: Vec<u64> = (0..MANY).collect();
        assert_eq!(hub.join().unwrap(), all);
        assert_eq!(told, all);
    }
}

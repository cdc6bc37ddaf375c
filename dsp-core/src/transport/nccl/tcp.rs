//! How the processes of a job find each other: the hub listens where rank 0 is, and all connect to it.
//!
//! ```text
//!   rank 0's process                        address: what the launcher calls MASTER_ADDR:MASTER_PORT
//!   ┌────────────────────────┐
//!   │ hub ◀─ a reader a rank │ ◀──────── rank 0, 1, 2, …   Hello ──▶   ◀── Welcome, when all are there
//!   └────────────────────────┘
//! ```

use std::collections::VecDeque;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::NcclError;
use super::hub::{Hub, Outbox, To};
use super::wire::{self, LONGEST_HELLO, Said, Told};

/// Between two tries to connect or to accept.
const PAUSE: Duration = Duration::from_millis(10);

/// Between two looks of the hub at its deadlines.
const GLANCE: Duration = Duration::from_millis(25);

/// How often the hub says that it lives, and after how long without a word a process takes it for dead.
const PULSE: Duration = Duration::from_secs(2);
pub(super) const LIFELESS: Duration = Duration::from_secs(20);

/// How long whoever connects may take to say who it is, and a process to take what it is told.
const MANNERS: Duration = Duration::from_secs(5);

/// Opens the hub's door: what connects from now on is heard when it is served.
pub(super) fn listen(address: &str) -> Result<TcpListener, NcclError> {
    let failed = |source| NcclError::Address {
        address: address.to_owned(),
        source,
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Serves `size` processes on a thread of its own, which ends when they all have.
pub(super) fn serve(
    listener: TcpListener,
    size: usize,
    deadline: Instant,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("NCCL, hub".to_owned())
        .spawn(move || match gather(&listener, size, deadline) {
            Ok(processes) => attend(processes),
            Err((arrived, reason)) => {
                for mut stream in arrived {
                    // Whoever has gone meanwhile need not be told.
                    let reason = reason.clone();
                    let _ = wire::write(&mut stream, &Told::Refused { reason });
                }
            }
        })
}

/// One connection a process, or those that came and why that is not enough.
fn gather(
    listener: &TcpListener,
    size: usize,
    deadline: Instant,
) -> Result<Vec<TcpStream>, (Vec<TcpStream>, String)> {
    let mut processes: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
    let refuse = |mut processes: Vec<Option<TcpStream>>, other, reason| {
        processes.push(other);
        Err((processes.into_iter().flatten().collect(), reason))
    };
    while processes.iter().any(Option::is_none) {
        if Instant::now() >= deadline {
            let absent: Vec<usize> = (0..size)
                .filter(|&rank| processes[rank].is_none())
                .collect();
            let reason = format!("rank(s) {absent:?} of {size} did not come before the deadline");
            return refuse(processes, None, reason);
        }
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(PAUSE);
            continue;
        };
        // What is none of ours goes away again.
        let Ok((rank, theirs)) = greet(&mut stream) else {
            continue;
        };
        if theirs != size || rank >= size || processes[rank].is_some() {
            let reason = format!(
                "a process came as rank {rank} of {theirs}, where rank 0 knows {size} with a number each"
            );
            return refuse(processes, Some(stream), reason);
        }
        processes[rank] = Some(stream);
    }
    Ok(processes.into_iter().flatten().collect())
}

fn greet(stream: &mut TcpStream) -> io::Result<(usize, usize)> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(MANNERS))?;
    stream.set_write_timeout(Some(MANNERS))?;
    let hello = wire::read(stream, LONGEST_HELLO)?;
    stream.set_read_timeout(None)?;
    match hello {
        Said::Hello { rank, size } => Ok((rank, size)),
        other => Err(io::Error::other(format!("{other:?} before a hello"))),
    }
}

/// Hears all processes and tells them what the hub decides, until they all have ended.
fn attend(mut processes: Vec<TcpStream>) {
    let size = processes.len();
    let mut hub = Hub::new(size);
    let (voices, said) = channel();
    for (rank, stream) in processes.iter().enumerate() {
        let voice = voices.clone();
        let ears = stream.try_clone().and_then(|stream| {
            std::thread::Builder::new()
                .name(format!("NCCL, hub, rank {rank}"))
                .spawn(move || hear(stream, rank, &voice))
        });
        if ears.is_err() {
            let _ = voices.send((rank, None));
        }
    }
    tell(&mut hub, &mut processes, vec![(To::All, Told::Welcome)]);
    let mut pulse = Instant::now();
    while !hub.deserted() {
        let outbox = match said.recv_timeout(GLANCE) {
            Ok((rank, Some(said))) => hub.hear(rank, said, Instant::now()),
            Ok((rank, None)) => hub.lost(rank),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Vec::new(),
        };
        tell(&mut hub, &mut processes, outbox);
        let outbox = hub.look_after(Instant::now());
        tell(&mut hub, &mut processes, outbox);
        if pulse.elapsed() > PULSE {
            pulse = Instant::now();
            tell(&mut hub, &mut processes, vec![(To::All, Told::Alive)]);
        }
    }
}

/// Passes on what a process says, until its last word.
fn hear(mut stream: TcpStream, rank: usize, voice: &Sender<(usize, Option<Said>)>) {
    while let Ok(said) = wire::read::<Said>(&mut stream, u32::MAX) {
        let last = said == Said::Bye;
        if voice.send((rank, Some(said))).is_err() || last {
            return;
        }
    }
    let _ = voice.send((rank, None));
}

/// Sends messages; who cannot be reached is lost, which others may have to be told.
fn tell(hub: &mut Hub, processes: &mut [TcpStream], outbox: Outbox) {
    let mut outbox = VecDeque::from(outbox);
    while let Some((to, told)) = outbox.pop_front() {
        let whom = match to {
            To::All => 0..processes.len(),
            To::One(rank) => rank..rank + 1,
        };
        for rank in whom {
            if !hub.has_lost(rank) && wire::write(&mut processes[rank], &told).is_err() {
                outbox.extend(hub.lost(rank));
            }
        }
    }
}

/// Connects `rank` of `size` processes to the hub, which may not listen yet, and waits for the others.
pub(super) fn connect(
    address: &str,
    (rank, size): (usize, usize),
    deadline: Instant,
) -> Result<TcpStream, NcclError> {
    let failed = |source| NcclError::Address {
        address: address.to_owned(),
        source,
    };
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(source) if Instant::now() >= deadline => return Err(failed(source)),
            Err(_) => std::thread::sleep(PAUSE),
        }
    };
    let refused = |reason: String| NcclError::Meeting { reason };
    let welcome = (|| {
        stream.set_nodelay(true)?;
        wire::write(&mut stream, &Said::Hello { rank, size })?;
        // The hub's own deadline may be as late as this, and its answer has the better words.
        let patience = deadline.saturating_duration_since(Instant::now()) + MANNERS;
        stream.set_read_timeout(Some(patience))?;
        let told = wire::read(&mut stream, u32::MAX)?;
        stream.set_read_timeout(Some(LIFELESS))?;
        Ok(told)
    })();
    match welcome.map_err(failed)? {
        Told::Welcome => Ok(stream),
        Told::Refused { reason } => Err(refused(reason)),
        other => Err(refused(format!("rank 0 said {other:?} and no welcome"))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn door() -> (TcpListener, String) {
        let listener = listen("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address)
    }

    #[test]
    fn all_are_welcomed_when_the_last_one_has_come_and_strangers_do_not_disturb() {
        let (listener, address) = door();
        let deadline = Instant::now() + Duration::from_secs(20);
        let hub = serve(listener, 2, deadline).unwrap();
        let mut stranger = TcpStream::connect(&address).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(stranger.read(&mut [0; 8]).unwrap_or(0), 0);
        let streams = std::thread::scope(|scope| {
            let ranks = [0, 1].map(|rank| {
                let address = &address;
                scope.spawn(move || connect(address, (rank, 2), deadline).unwrap())
            });
            ranks.map(|rank| rank.join().unwrap())
        });
        for mut stream in streams {
            wire::write(&mut stream, &Said::Bye).unwrap();
        }
        hub.join().unwrap();
    }

    #[test]
    fn whoever_came_hears_at_the_deadline_who_did_not() {
        let (listener, address) = door();
        let deadline = Instant::now() + Duration::from_millis(200);
        let hub = serve(listener, 3, deadline).unwrap();
        let error = connect(&address, (1, 3), deadline).unwrap_err();
        assert!(error.to_string().contains("rank(s) [0, 2] of 3"), "{error}");
        hub.join().unwrap();
    }

    #[test]
    fn two_processes_of_the_same_rank_are_refused() {
        let (listener, address) = door();
        let deadline = Instant::now() + Duration::from_secs(20);
        let hub = serve(listener, 2, deadline).unwrap();
        std::thread::scope(|scope| {
            let ranks = [1, 1].map(|rank| {
                let address = &address;
                scope.spawn(move || connect(address, (rank, 2), deadline).unwrap_err())
            });
            for error in ranks.map(|rank| rank.join().unwrap()) {
                assert!(error.to_string().contains("rank 1 of 2"), "{error}");
            }
        });
        hub.join().unwrap();
    }

    #[test]
    fn an_address_where_nobody_listens_or_that_is_taken_is_an_error_that_names_it() {
        let (listener, address) = door();
        let error = listen(&address).unwrap_err();
        assert!(error.to_string().contains(&address), "{error}");
        drop(listener);
        let error = connect(&address, (1, 2), Instant::now()).unwrap_err();
        assert!(matches!(error, NcclError::Address { .. }), "{error}");
        assert!(error.to_string().contains(&address), "{error}");
    }
}

//! What the processes of a job and its hub tell each other, each as a message in CBOR; boxes of tensors never go this way.

use std::io;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Call, CommError};

/// A group, as it is called between processes, and one of its exchanges.
pub(super) type Key = (u64, u64);

/// An exchange, as a rank that enters it or waits in it describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Announcement {
    /// Which group.
    pub(super) group: u64,
    /// Its members, as ranks of the world.
    pub(super) members: Vec<usize>,
    /// Which exchange of it, and what the rank called.
    pub(super) call: Call,
    /// A digest of the blocks before and after.
    pub(super) blocks: u64,
}

impl Announcement {
    /// One of some members, for tests.
    #[cfg(test)]
    pub(super) fn of(members: &[usize], sequence: u64) -> Self {
        Self {
            group: (members.iter()).fold(1, |group, &member| 10 * group + member as u64),
            members: members.to_vec(),
            call: Call {
                collective: crate::ledger::Collective::AllToAll,
                sequence,
                dtype: burn::tensor::DType::F32,
                shape: [1, 8, 1, 1, 4],
                tracking: crate::error::Tracking::Tracked,
                answers: None,
            },
            blocks: 7,
        }
    }

    pub(super) fn key(&self) -> Key {
        (self.group, self.call.sequence)
    }
}

/// What a process tells the hub.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Said {
    /// Who it is; its first message.
    Hello { rank: usize, size: usize },
    /// It begins a launch on the first `ranks` processes.
    Opened {
        launch: u64,
        ranks: usize,
        timeout: Duration,
    },
    /// The name under which the processes' movers are to join each other; from rank 0.
    Meeting {
        launch: u64,
        #[serde(with = "serde_bytes")]
        name: Vec<u8>,
    },
    /// Its rank has entered an exchange.
    Entered { launch: u64, exchange: Announcement },
    /// Its rank has waited for some time, or no longer waits.
    Waits {
        launch: u64,
        wait: Option<(Announcement, Duration)>,
    },
    /// The deadline of the wait that it spoke of is over.
    Late { launch: u64, waited: Duration },
    /// It has found a cause to fail.
    Failed { launch: u64, cause: CommError },
    /// Its rank has returned, with this value for all.
    Returned {
        launch: u64,
        #[serde(with = "serde_bytes")]
        value: Vec<u8>,
    },
    /// It lives, and has heard the hub's word that it does.
    Alive,
    /// It ends: its last message.
    Bye,
}

/// What the hub tells a process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Told {
    /// All processes are there.
    Welcome,
    /// They are not, or do not fit together.
    Refused { reason: String },
    /// The hub lives; a process answers.
    Alive,
    /// The process's last message has been heard, and so all before it.
    Farewell,
    /// All processes have begun the launch: their movers join under this name.
    Join {
        launch: u64,
        #[serde(with = "serde_bytes")]
        name: Vec<u8>,
    },
    /// All members have entered the exchange alike: it is made now, after those before it.
    Go { launch: u64, key: Key },
    /// The launch has failed: the one cause for all.
    Fate { launch: u64, cause: CommError },
    /// All ranks of the launch have returned: their values, in rank order.
    Done {
        launch: u64,
        #[serde(with = "each_as_bytes")]
        values: Vec<Vec<u8>>,
    },
}

/// Values as bytes each, where serde has lists of numbers: who reads one for seconds does not answer the hub's pulse.
mod each_as_bytes {
    use serde::{Deserialize, Deserializer, Serializer};
    use serde_bytes::{ByteBuf, Bytes};

    pub(super) fn serialize<S: Serializer>(
        values: &[Vec<u8>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|value| Bytes::new(value)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Vec<u8>>, D::Error> {
        let values = Vec::<ByteBuf>::deserialize(deserializer)?;
        Ok(values.into_iter().map(ByteBuf::into_vec).collect())
    }
}

/// A message's bytes.
pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    ciborium::into_writer(message, &mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// The message that bytes are.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    ciborium::from_reader(bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_takes_as_many_bytes_as_it_has() {
        let value = || vec![200; 1 << 12];
        let returned = Said::Returned {
            launch: 0,
            value: value(),
        };
        assert!(encode(&returned).unwrap().len() < (1 << 12) + 64);
        let done = Told::Done {
            launch: 0,
            values: vec![value(), vec![], value()],
        };
        let bytes = encode(&done).unwrap();
        assert!(bytes.len() < (2 << 12) + 64);
        assert_eq!(decode::<Told>(&bytes).unwrap(), done);
    }

    #[test]
    fn messages_are_read_as_they_were_written_and_what_is_cut_short_or_noise_is_an_error() {
        let messages = [
            Said::Hello { rank: 3, size: 4 },
            Said::Returned {
                launch: u64::MAX,
                value: vec![0xff; 300],
            },
            Said::Bye,
        ];
        for message in messages {
            let bytes = encode(&message).unwrap();
            assert_eq!(decode::<Said>(&bytes).unwrap(), message);
            assert!(decode::<Said>(&bytes[..bytes.len() - 1]).is_err());
        }
        assert!(decode::<Said>(b"GET / HTTP/1.1\r\n\r\n").is_err());
        assert!(decode::<Said>(b"").is_err());
    }
}

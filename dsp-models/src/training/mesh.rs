//! The mesh of a training: ranks that share a sequence, times replicas with samples of their own.
//!
//! ```text
//!   sp = 2, dp = 3        rank   0 1 | 2 3 | 4 5      neighbours share a sequence
//!                         replica 0     1     2       each has its part of a step's samples
//! ```

use std::ops::Range;
use std::str::FromStr;

use dsp_core::layout::MeshAxis;
use dsp_core::partition::Partition;
use dsp_core::{CommError, Group};
use serde::{Deserialize, Serialize};

/// How many ranks share a sequence, and how many replicas there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mesh {
    /// Ranks of a replica.
    pub sp: usize,
    /// Replicas.
    pub dp: usize,
}

/// A text that describes no mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no mesh: {rule}, as in sp=2,dp=2")]
pub struct MeshError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub rule: String,
}

fn size_rule() -> String {
    format!(
        "each number is at least 1, and their product at most {}",
        Mesh::MOST_RANKS
    )
}

impl Mesh {
    /// The most ranks of a mesh: more of them are a slip of the pen.
    pub const MOST_RANKS: usize = 1 << 12;

    /// Checks that it has at least one rank each way, and in all no more than [`MOST_RANKS`](Self::MOST_RANKS).
    ///
    /// # Errors
    /// [`MeshError`] with the rule.
    pub fn check(&self) -> Result<(), MeshError> {
        match self.sp.checked_mul(self.dp) {
            Some(ranks) if (1..=Self::MOST_RANKS).contains(&ranks) => Ok(()),
            _ => Err(MeshError {
                text: self.to_string(),
                rule: size_rule(),
            }),
        }
    }

    /// The ranks of it, if it passes its [check](Self::check).
    pub fn ranks(&self) -> usize {
        self.sp * self.dp
    }

    /// This rank's two groups: the ranks that share its sequence, and those that hold its part in each replica.
    ///
    /// # Errors
    /// [`CommError::Members`] if the world has another number of ranks.
    pub fn groups(&self, world: &Group) -> Result<[Group; 2], CommError> {
        let sequence = MeshAxis {
            stride: 1,
            size: self.sp,
        };
        let replicas = MeshAxis {
            stride: self.sp,
            size: self.dp,
        };
        Ok([world.along(sequence)?, world.along(replicas)?])
    }

    /// Which of `samples` samples are a replica's.
    pub fn share(&self, replica: usize, samples: usize) -> Range<usize> {
        let ranges = Partition::balanced(samples, self.dp);
        let ranges = ranges.ranges(replica);
        ranges.first().cloned().unwrap_or(0..0)
    }
}

impl std::fmt::Display for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sp={},dp={}", self.sp, self.dp)
    }
}

impl FromStr for Mesh {
    type Err = MeshError;

    fn from_str(text: &str) -> Result<Self, MeshError> {
        let wrong = |rule: String| MeshError {
            text: text.to_owned(),
            rule,
        };
        let mut sizes = [None; 2];
        for part in text.split(',') {
            let (name, size) = (part.trim().split_once('='))
                .ok_or_else(|| wrong("each part is a name, = and a number".to_owned()))?;
            let axis = match name {
                "sp" => 0,
                "dp" => 1,
                _ => {
                    return Err(wrong(
                        "the names are sp (sequence) and dp (data)".to_owned(),
                    ));
                }
            };
            let size = size.parse().ok();
            let size: usize = size.ok_or_else(|| wrong(size_rule()))?;
            if sizes[axis].replace(size).is_some() {
                return Err(wrong("each name stands there once".to_owned()));
            }
        }
        let mesh = Self {
            sp: sizes[0].unwrap_or(1),
            dp: sizes[1].unwrap_or(1),
        };
        mesh.check().map(|()| mesh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_is_read_as_it_is_written_and_nonsense_is_refused_with_the_rule() {
        for (text, sp, dp) in [("sp=2,dp=3", 2, 3), ("dp=4", 1, 4), ("sp=5", 5, 1)] {
            assert_eq!(text.parse(), Ok(Mesh { sp, dp }));
        }
        let mesh = Mesh { sp: 2, dp: 3 };
        assert_eq!(mesh.to_string().parse(), Ok(mesh));
        for (text, rule) in [
            ("2x2", "a name, = and a number"),
            ("sp=0", "at least 1"),
            ("sp=-1", "at least 1"),
            ("sp=4097", "at most 4096"),
            ("sp=64,dp=65", "at most 4096"),
            ("sp=4611686018427387904,dp=4", "at most 4096"),
            ("tp=2", "the names are"),
            ("sp=2,sp=2", "once"),
            ("", "a name, = and a number"),
        ] {
            let error = text.parse::<Mesh>().unwrap_err().to_string();
            assert!(error.contains(rule), "{error}");
        }
    }

    #[test]
    fn each_sample_is_one_replicas() {
        let mesh = Mesh { sp: 1, dp: 3 };
        let shares: Vec<_> = (0..3).flat_map(|replica| mesh.share(replica, 8)).collect();
        assert_eq!(shares, (0..8).collect::<Vec<_>>());
    }
}

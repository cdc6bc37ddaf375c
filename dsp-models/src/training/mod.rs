//! Training a model under a strategy, on a mesh of sequence-parallel ranks and data-parallel replicas.
//!
//! ```text
//!   a step's samples ──► each replica its share ──► each share in parts that fit in memory
//!
//!   every part:  forward ─ loss / all samples of the step ─ backward     gradients add up on each rank
//!   once:        sum over ranks and replicas ─ norm ─ clip ─ AdamW ─ learning rate of the step
//! ```
//!
//! What is summed is the same whatever the mesh, so a training goes on on another mesh, or under another strategy,
//! as if nothing had happened: [`Snapshot`] holds all of it in whole tensors under the models' public names.
//!
//! | file | what it is |
//! |---|---|
//! | config | [`TrainingConfig`], its rules, the learning rate's schedule |
//! | mesh | [`Mesh`]: which ranks share a sequence, which samples are whose |
//! | adamw | the optimizer: Burn's arithmetic, states by the parameters' paths |
//! | trainer | [`Trainer`]: a step |
//! | snapshot | [`Snapshot`]: all that a training is at a step, as files |
//! | store | [`Store`]: checkpoints in a folder, whole or not at all |

mod adamw;
mod config;
mod mesh;
mod snapshot;
mod store;
mod trainer;

pub use adamw::{AdamW, Moments};
pub use config::{
    Compute, Decayed, Recompute, Reduce, Schedule, TrainingConfig, TrainingConfigError,
};
pub use mesh::{Mesh, MeshError};
pub use snapshot::{MANIFEST, Manifest, Snapshot, SnapshotError, Subject};
pub use store::{Loaded, Store, StoreError, digest};
pub use trainer::{Report, Trainer};

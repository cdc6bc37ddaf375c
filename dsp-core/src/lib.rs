//! Sequence parallelism on Burn tensors.
//!
//! A transformer's activation `[batch, s1, s2, s3, channels]` is too long for one device, so each of N ranks
//! holds a block of it. Attention mixes along a sequence axis; everything else is position-wise. A
//! [`SequenceParallel`] strategy decides how activations are laid out over the ranks and what moves, so that
//! every sub-layer computes what one device would, gradients included.
//!
//! # Map
//! | module | what it is |
//! |---|---|
//! | [`partition`], [`layout`] | who holds which positions; [`Shard`], a local tensor that knows its layout |
//! | [`blocks`] | what must move to get from one distribution of a tensor to another |
//! | [`group`], [`transport`], [`launch()`] | ranks, sub-groups and meshes; what moves the data; threads as ranks |
//! | [`collective`], [`reference`](mod@reference) | differentiable collectives; the same as plain functions over all blocks |
//! | [`vjp`] | a function with a gradient of our own |
//! | [`shape`], [`mod@linear`] | reshaping and linear layers that take empty blocks |
//! | [`fused`] | element-wise chains in one pass: norms, gates, activations, rotary embedding, cross-entropy |
//! | [`attention`] | softmax attention in O(L) memory, with its logsumexp |
//! | [`strategy`], [`session`] | the trait and its plans; a model's walk through a plan |
//! | [`ending`] | a sub-layer's end and the switch after it, part by part, one on its way while the next is computed |
//! | [`place()`](mod@place), [`gradients`] | a rank's part of a module; the reduction of its gradients |
//! | [`overlap`] | the same reduction bucket by bucket, while the backward pass runs |
//! | [`share()`](share::share) | values of any type, from every rank to every rank |
//! | [`precision`] | in what is summed that is held in 16 bits |
//! | [`random`] | random bits that every rank draws alike |
//! | [`ledger`], [`cost`] | what was sent; the same by formula |
//! | [`error`] | what can go wrong |
//!
//! This crate knows nothing of any strategy, model, command line or chart.

#[cfg(all(feature = "flex", target_arch = "x86_64"))]
mod amx;
pub mod attention;
pub mod blocks;
pub mod collective;
pub mod cost;
pub mod ending;
pub mod error;
pub mod fused;
pub mod gradients;
pub mod group;
pub mod launch;
pub mod layout;
pub mod ledger;
pub mod linear;
mod matmul;
pub mod overlap;
pub mod partition;
pub mod place;
pub mod precision;
pub mod random;
pub mod reference;
pub mod session;
pub mod shape;
pub mod share;
#[cfg(feature = "flex")]
mod simd;
pub mod strategy;
pub mod transport;
pub mod vjp;
mod watch;

pub use attention::{Heads, Mask};
pub use ending::Ending;
pub use error::{CommError, Error};
pub use group::Group;
pub use launch::{Engine, Launch, LaunchError, launch};
pub use layout::{AxisSet, Layout, SeqAxis, Shard};
pub use overlap::Overlap;
pub use partition::Partition;
pub use place::Placed;
pub use session::{Loss, Session};
pub use strategy::{ModelShape, PlanError, SequenceParallel, Stage};

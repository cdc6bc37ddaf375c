//! What transformers are made of: position-wise layers, each on `[batch, s1, s2, s3, channels]` or on the
//! last dim of anything. None of them knows of ranks; what depends on a position is told the global one.

mod linear;
mod mlp;
mod norm;
mod rotary;
mod sincos;

pub(crate) use linear::buffer;
pub use linear::{linear, project_without_bias};
pub use mlp::{Mlp, gelu_tanh};
pub use norm::{RmsNorm, layer_norm, unit_rms};
pub use rotary::{Rotary, RotaryTables};
pub use sincos::{sin_cos_2d, timestep_features};

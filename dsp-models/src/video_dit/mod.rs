//! STDiT-3, the video diffusion transformer of Open-Sora 1.2, on shards.
//!
//! ```text
//!   video [B, C, F, H, W]
//!     │ patchify, split          every rank holds the video and keeps its own patches
//!     ▼
//!   [B, T, S, 1, C·patch] ─ linear ─ + positions          timestep, frame rate ─► t
//!     │                                                    text ─► y
//!     ▼   depth times
//!   spatial block:  attention over S · cross-attention to y · MLP      (adaLN-single from t)
//!   temporal block: attention over T, rotary · cross-attention · MLP
//!     │
//!     ▼
//!   modulated norm ─ linear ─► [B, T, S, 1, patch·out] ─ gather, unpatchify ─► [B, out, F, H, W]
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | config | sizes, and the stages that the model declares |
//! | patch | from a video to tokens and back |
//! | embed | patches, timesteps, frame rates and text, embedded |
//! | modulation | adaLN-single and the frame mask |
//! | attention | over an axis, and to the text |
//! | block | a block, a stack of pairs |
//! | `final_layer`, model | the end, and the whole |
//! | roles | which parameters a strategy may shard |
//!
//! This workspace has no VAE. The original's video is the latents of one, of 4 channels; ours has any number of
//! channels, and pixels are patchified as they are.
//!
//! Computed as in the original's evaluation mode: no dropout of text, no stochastic depth (which the published
//! model sets to 0).

mod attention;
mod block;
mod config;
mod embed;
mod final_layer;
mod model;
mod modulation;
mod patch;
mod roles;

pub use attention::{CrossAttention, SelfAttention, Text};
pub use block::{Block, BlockPairs, Conditions};
pub use config::{BlockConfig, BlockKind, Init, SPACE, TIME, VideoDitConfig};
pub use embed::{CaptionEmbedder, NumberEmbedder, PatchEmbedder, PatchProjection};
pub use final_layer::FinalLayer;
pub use model::{VideoConditions, VideoDit};
pub use modulation::{ByFrame, FrameMask};
pub use patch::{PatchOrder, patchify, unpatchify};
pub use roles::roles;

//! Transformers over one to three sequence axes, written once and run under any sequence-parallel strategy.
//!
//! A model here is a plain Burn module that walks [`dsp_core::Shard`]s through the stages that it declared. It
//! knows the trait [`dsp_core::SequenceParallel`] through a [`dsp_core::Session`], and no strategy by name; no
//! code of it asks how many ranks there are.
//!
//! # Map
//! | module | what it is |
//! |---|---|
//! | [`video_dit`] | STDiT-3, the video diffusion transformer of Open-Sora 1.2 |
//! | [`weather`] | an axial transformer over time, latitude and longitude |
//! | [`language`] | causal language models: LLaMA, TransNormer, hybrids |
//! | [`vit`] | vision transformers, under timm's and torchvision's names |
//! | [`layers`] | what transformers are made of: norms, feed-forward networks, rotary embedding |
//! | [`flow`] | the loss of rectified flow and sampling by it, for [`video_dit`] |
//! | [`training`] | steps of any model under any strategy: accumulation, clipping, AdamW, checkpoints |
//! | [`weights`] | safetensors in and out; gradients under the original names |
//! | [`random`] | numbers that every rank draws alike |
//! | [`error`] | what can go wrong |

pub mod error;
pub mod flow;
pub mod language;
pub mod layers;
pub mod random;
pub mod training;
pub mod video_dit;
pub mod vit;
pub mod weather;
pub mod weights;

pub use error::{ConfigError, ModelError};
pub use video_dit::{BlockConfig, BlockPairs, VideoDit, VideoDitConfig};
pub use weather::{Weather, WeatherConfig};

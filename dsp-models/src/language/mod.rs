//! Causal language models: LLaMA's blocks, TransNormer's linear attention, and models that mix the two.
//!
//! ```text
//!   tokens ─ embedding ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─ … ─ norm ─ head ─ logits of the next token
//!                       └────────────────────┘  └─────────────────┘
//! ```
//!
//! One sequence axis: the tokens. The parameters of a model whose layers are all softmax attention have the names
//! that Hugging Face's `LlamaForCausalLM` gives them. Sources: LLaMA (arXiv:2302.13971), grouped-query
//! attention (arXiv:2305.13245), TransNormer (arXiv:2307.14995), hybrids as in LASP-2 (arXiv:2502.07563).

mod attention;
mod block;
mod config;
mod loss;
mod model;
mod roles;

pub use attention::{LinearAttention, SoftmaxAttention, slopes};
pub use block::{Block, SwiGlu};
pub use config::{LanguageConfig, LayerKind, Layers, TOKENS};
pub use loss::{Tokens, next_token_loss};
pub use model::{CausalLm, Decoder, Embedding};
pub use roles::roles;

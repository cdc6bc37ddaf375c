//! ViT: an image's patches and a class token, attention over all of them, and a class at the end.
//!
//! ```text
//!   patches ─ embedding ─ + positions ─┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ─ … ─ norm ─ head of the class token
//!   class token ─┘                     └────────────────────┘  └───────────────┘
//! ```
//!
//! One sequence axis: the class token, then the patches row by row. Parameters have the names of timm's
//! `VisionTransformer`; [`TorchvisionVit`] gives them torchvision's. Source: arXiv:2010.11929.

mod config;
mod model;
mod roles;

pub use config::{PATCHES, VitConfig};
pub use model::{
    Attention, Block, Mlp, PatchEmbed, PatchProjection, TorchvisionVit, Vit, class_loss,
    gather_logits,
};
pub use roles::roles;

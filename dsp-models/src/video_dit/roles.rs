//! What each parameter is for, so that a strategy can decide which part of it a rank holds.

use dsp_core::strategy::Role;

use super::config::BlockConfig;

/// The role of the parameter at `path`, for [`dsp_core::Session::place`].
///
/// Projections into heads and into the feed-forward network's inner width are columns, those back are rows,
/// whose biases, added after the reduction, are replicated like everything else. Weights are `[in, out]`.
pub fn roles(config: &BlockConfig) -> impl Fn(&str) -> Role + use<> {
    let (heads, inner) = (config.num_heads, config.inner_size());
    move |path: &str| {
        if !path.contains("spatial_blocks.") && !path.contains("temporal_blocks.") {
            return Role::Replicated;
        }
        let mut parts = path.rsplit('.');
        let (dim, layer) = match (parts.next(), parts.next()) {
            (Some("weight"), Some(layer)) => (1, layer),
            (Some("bias"), Some(layer)) => (0, layer),
            _ => return Role::Replicated,
        };
        let columns = |fused, units| Role::Columns { dim, fused, units };
        match (layer, dim) {
            ("qkv", _) => columns(3, heads),
            ("q_linear", _) => columns(1, heads),
            ("kv_linear", _) => columns(2, heads),
            ("fc1", _) => columns(1, inner),
            ("proj", 1) => Role::Rows {
                dim: 0,
                units: heads,
            },
            ("fc2", 1) => Role::Rows {
                dim: 0,
                units: inner,
            },
            _ => Role::Replicated,
        }
    }
}

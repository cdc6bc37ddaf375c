//! What each parameter is for, so that a strategy can decide which part of it a rank holds.

use dsp_core::Heads;
use dsp_core::strategy::{Part, Role, Units};

use super::config::BlockConfig;

/// The role of the parameter at `path` and its stage, for [`dsp_core::Session::place`].
///
/// Projections into heads and into the feed-forward network's inner width are columns, those back are rows,
/// whose biases, added after the reduction, are replicated like everything else. Weights are `[in, out]`.
pub fn roles(config: &BlockConfig) -> impl Fn(&str) -> Part + use<> {
    let heads = Heads::multi(config.num_heads, config.head_dim());
    let (heads, inner) = (Units::Query(heads), Units::Features(config.inner_size()));
    move |path: &str| match stage(path) {
        Some(stage) => role(path, heads, inner).in_stage(stage),
        None => Role::Replicated.into(),
    }
}

/// The position of a block's parameter's stage among those that [`BlockConfig::shape`] declares.
fn stage(path: &str) -> Option<usize> {
    let mut parts = path
        .split('.')
        .skip_while(|part| !part.ends_with("_blocks"));
    let of_pair = match parts.next()? {
        "spatial_blocks" => 0,
        "temporal_blocks" => 3,
        _ => return None,
    };
    let pair: usize = parts.next()?.parse().ok()?;
    let of_block = match parts.next()? {
        "attn" => 0,
        "cross_attn" => 1,
        "mlp" => 2,
        _ => return None,
    };
    Some(6 * pair + of_pair + of_block)
}

fn role(path: &str, heads: Units, inner: Units) -> Role {
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

#[cfg(test)]
mod tests {
    use dsp_core::strategy::OutputLayout;

    use super::*;

    #[test]
    fn a_parameters_stage_is_the_one_that_was_declared_under_its_name() {
        let stages = BlockConfig::new(8, 2)
            .shape(2, [1, 3, 4], OutputLayout::Free)
            .stages;
        for (index, declared) in stages.iter().enumerate() {
            for prefix in ["", "blocks."] {
                let path = format!("{prefix}{}.proj.weight", declared.name);
                assert_eq!(stage(&path), Some(index), "{path}");
            }
        }
        assert_eq!(stage("blocks.spatial_blocks.0.scale_shift_table"), None);
        assert_eq!(stage("final_layer.linear.weight"), None);
    }
}

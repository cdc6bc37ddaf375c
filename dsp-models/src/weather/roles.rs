//! What each parameter is for, so that a strategy can decide which part of it a rank holds.

use dsp_core::Heads;
use dsp_core::strategy::{Part, Role, Units};

use super::config::WeatherConfig;

/// The role of the parameter at `path` and its stage, for [`dsp_core::Session::place`].
///
/// Projections into heads and into the feed-forward network's inner width are columns, those back are rows;
/// everything else is replicated. Weights are `[in, out]`.
pub fn roles(config: &WeatherConfig) -> impl Fn(&str) -> Part + use<> {
    let block = config.block();
    let heads = Heads::multi(block.num_heads, block.head_dim());
    let (heads, inner) = (Units::Query(heads), Units::Features(block.inner_size()));
    move |path: &str| match stage(path) {
        Some(stage) => role(path, heads, inner).in_stage(stage),
        None => Role::Replicated.into(),
    }
}

/// The position of a parameter's stage among those that [`WeatherConfig::shape`] declares.
fn stage(path: &str) -> Option<usize> {
    let mut parts = path.strip_prefix("layers.")?.split('.');
    let layer: usize = parts.next()?.parse().ok()?;
    let of_layer = match parts.next()? {
        "time" => 0,
        "latitude" => 1,
        "longitude" => 2,
        "mlp_norm" | "mlp" => 3,
        _ => return None,
    };
    Some(4 * layer + of_layer)
}

fn role(path: &str, heads: Units, inner: Units) -> Role {
    let columns = |dim, fused, units| Role::Columns { dim, fused, units };
    let mut parts = path.rsplit('.');
    match (parts.next(), parts.next()) {
        (Some("weight"), Some("qkv")) => columns(1, 3, heads),
        (Some("bias"), Some("qkv")) => columns(0, 3, heads),
        (Some("weight"), Some("fc1")) => columns(1, 1, inner),
        (Some("bias"), Some("fc1")) => columns(0, 1, inner),
        (Some("weight"), Some("proj")) => Role::Rows {
            dim: 0,
            units: heads,
        },
        (Some("weight"), Some("fc2")) => Role::Rows {
            dim: 0,
            units: inner,
        },
        _ => Role::Replicated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameters_stage_is_the_one_that_was_declared_under_its_name() {
        let config = WeatherConfig::new(2)
            .with_hidden_size(8)
            .with_num_heads(2)
            .with_depth(2);
        for (index, declared) in config.shape(1, 2, 3, 4).stages.iter().enumerate() {
            let path = format!("{}.fc1.weight", declared.name);
            assert_eq!(stage(&path), Some(index), "{path}");
        }
        for path in ["embed.weight", "place.weight", "norm.gamma", "head.bias"] {
            assert_eq!(stage(path), None, "{path}");
        }
    }

    #[test]
    fn projections_into_heads_are_columns_and_back_rows() {
        let config = WeatherConfig::new(2)
            .with_hidden_size(8)
            .with_num_heads(2)
            .with_depth(1);
        let roles = roles(&config);
        let part = |role: Role, stage| role.in_stage(stage);
        let columns = |dim, fused, units| Role::Columns { dim, fused, units };
        let rows = |units| Role::Rows { dim: 0, units };
        let heads = Units::Query(Heads::multi(2, 4));
        let inner = Units::Features(32);
        for (path, expected) in [
            (
                "layers.0.time.attn.qkv.weight",
                part(columns(1, 3, heads), 0),
            ),
            (
                "layers.0.latitude.attn.qkv.bias",
                part(columns(0, 3, heads), 1),
            ),
            ("layers.0.longitude.attn.proj.weight", part(rows(heads), 2)),
            ("layers.0.time.attn.proj.bias", part(Role::Replicated, 0)),
            ("layers.0.time.attn.q_norm.gamma", part(Role::Replicated, 0)),
            ("layers.0.mlp.fc1.bias", part(columns(0, 1, inner), 3)),
            ("layers.0.mlp.fc2.weight", part(rows(inner), 3)),
            ("head.weight", Role::Replicated.into()),
        ] {
            assert_eq!(roles(path), expected, "{path}");
        }
    }
}

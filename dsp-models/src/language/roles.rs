//! What each parameter is for, so that a strategy can decide which part of it a rank holds.

use dsp_core::strategy::{Part, Role, Units};

use super::config::{LanguageConfig, LayerKind};

/// The role of the parameter at `path` and its stage, for [`dsp_core::Session::place`].
///
/// Projections into heads and into the feed-forward network's inner width are columns, those back are rows;
/// everything else is replicated: of a linear layer also what needs all heads of a position. Weights are `[in, out]`.
pub fn roles(config: &LanguageConfig) -> impl Fn(&str) -> Part + use<> {
    let config = config.clone();
    move |path: &str| role(&config, path).unwrap_or_else(|| Role::Replicated.into())
}

fn role(config: &LanguageConfig, path: &str) -> Option<Part> {
    let mut parts = path.strip_prefix("model.layers.")?.split('.');
    let layer: usize = parts.next()?.parse().ok()?;
    let (part, name, tensor) = (parts.next()?, parts.next()?, parts.next()?);
    if tensor != "weight" {
        return None;
    }
    let stage = match part {
        "self_attn" | "linear_attn" => 2 * layer,
        "mlp" => 2 * layer + 1,
        _ => return None,
    };
    let heads = config.heads(layer);
    let inner = Units::Features(config.intermediate_size);
    let columns = |units| Role::Columns {
        dim: 1,
        fused: 1,
        units,
    };
    let rows = |units| Role::Rows { dim: 0, units };
    let role = match (name, config.kind(layer)) {
        ("q_proj", _) => columns(Units::Query(heads)),
        ("k_proj" | "v_proj", _) => columns(Units::KeyValue(heads)),
        ("o_proj", LayerKind::Softmax) => rows(Units::Query(heads)),
        ("gate_proj" | "up_proj", _) => columns(inner),
        ("down_proj", _) => rows(inner),
        _ => Role::Replicated,
    };
    Some(role.in_stage(stage))
}

#[cfg(test)]
mod tests {
    use dsp_core::Mask;

    use super::*;
    use crate::language::Layers;

    #[test]
    fn a_parameters_stage_is_the_one_that_was_declared_under_its_name() {
        let config =
            LanguageConfig::new(7, 8, 6, 4, 2, 1).with_layers(Layers::Hybrid { softmax_every: 2 });
        for (index, declared) in config.shape(1, 3, &Mask::Causal).stages.iter().enumerate() {
            for projection in ["q_proj", "up_proj"] {
                let path = format!("model.{}.{projection}.weight", declared.name);
                assert_eq!(roles(&config)(&path).stage, Some(index), "{path}");
            }
        }
        for path in [
            "lm_head.weight",
            "model.norm.gamma",
            "model.embed_tokens.weight",
        ] {
            assert_eq!(roles(&config)(path), Role::Replicated.into());
        }
    }

    #[test]
    fn a_linear_layers_output_projection_is_whole_for_it_follows_a_norm_over_all_heads() {
        let config = LanguageConfig::new(7, 8, 6, 2, 2, 1).with_layers(Layers::Linear);
        let role = |path: &str| roles(&config)(path).role;
        assert_eq!(
            role("model.layers.1.linear_attn.o_proj.weight"),
            Role::Replicated
        );
        assert_eq!(
            role("model.layers.1.linear_attn.output_gate.0.weight"),
            Role::Replicated
        );
        assert_ne!(
            role("model.layers.1.linear_attn.k_proj.weight"),
            Role::Replicated
        );
    }
}

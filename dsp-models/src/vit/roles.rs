//! What each parameter is for, so that a strategy can decide which part of it a rank holds.

use dsp_core::strategy::{Part, Role, Units};

use super::config::{PATCHES, VitConfig};

/// The role of the parameter at `path` and its stage, for [`dsp_core::Session::place`], also of a
/// [`TorchvisionVit`](super::TorchvisionVit).
pub fn roles(config: &VitConfig) -> impl Fn(&str) -> Part + use<> {
    let (heads, inner) = (
        Units::Query(config.all_heads()),
        Units::Features(config.mlp),
    );
    move |path: &str| {
        let path = path.strip_prefix("vit.").unwrap_or(path);
        if path == "pos_embed" {
            return Role::Table {
                dim: 1,
                axis: PATCHES,
            }
            .into();
        }
        role(path, heads, inner).unwrap_or_else(|| Role::Replicated.into())
    }
}

fn role(path: &str, heads: Units, inner: Units) -> Option<Part> {
    let mut parts = path.strip_prefix("blocks.")?.split('.');
    let layer: usize = parts.next()?.parse().ok()?;
    let (part, name, tensor) = (parts.next()?, parts.next()?, parts.next()?);
    let dim = usize::from(tensor == "weight");
    let columns = |fused, units| Role::Columns { dim, fused, units };
    let rows = |units| match tensor {
        "weight" => Role::Rows { dim: 0, units },
        _ => Role::Replicated,
    };
    let (stage, role) = match (part, name) {
        ("attn", "qkv") => (2 * layer, columns(3, heads)),
        ("attn", "proj") => (2 * layer, rows(heads)),
        ("mlp", "fc1") => (2 * layer + 1, columns(1, inner)),
        ("mlp", "fc2") => (2 * layer + 1, rows(inner)),
        _ => return None,
    };
    Some(role.in_stage(stage))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameters_stage_is_the_one_that_was_declared_under_its_name() {
        let config = VitConfig::new([4, 4], 2, 8, 2, 2, 6, 3);
        for (index, declared) in config.shape(1).stages.iter().enumerate() {
            for (projection, prefix) in [("qkv", ""), ("fc2", "vit.")] {
                let path = format!("{prefix}{}.{projection}.weight", declared.name);
                let stage = roles(&config)(&path).stage;
                let of_attention = index % 2 == 0;
                let expected = (of_attention == (projection == "qkv")).then_some(index);
                assert_eq!(stage, expected, "{path}");
            }
        }
        assert_eq!(roles(&config)("head.weight"), Role::Replicated.into());
    }
}

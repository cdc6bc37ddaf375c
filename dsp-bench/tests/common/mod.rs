//! Who refuses what: by name, so that nothing passes by being refused wrongly.

#![allow(dead_code, reason = "each test binary uses some of these")]

/// A strategy's refusal that is right: words of its reason, or none if it must run.
pub(crate) type Refusal = Option<&'static str>;

/// Who refuses a model whose every sequence axis softmax attention runs over.
pub(crate) fn softmax_refusal(
    strategy: &str,
    axes: usize,
    query_heads: usize,
    ranks: usize,
) -> Refusal {
    if ranks == 1 {
        return None;
    }
    match strategy {
        "dsp" if axes == 1 => Some("none is left to be split"),
        "ulysses" if ranks > query_heads => Some("leave a rank without a head"),
        "lasp" | "lasp2" => Some("softmax attention has none"),
        _ => None,
    }
}

/// Who refuses linear attention over the only sequence axis.
pub(crate) fn linear_refusal(strategy: &str, query_heads: usize, ranks: usize) -> Refusal {
    match strategy {
        "lasp" | "lasp2" => None,
        "ring" | "usp" | "lss" if ranks > 1 => Some("this one is linear"),
        _ => softmax_refusal(strategy, 1, query_heads, ranks),
    }
}

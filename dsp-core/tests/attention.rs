//! Softmax attention and its merge against PyTorch's and yunchang's results.
//!
//! Each fixture's own metadata names its source, layout and cases. The references were computed in
//! f64 and stored in f32.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot read its fixture has failed"
)]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "positions are lists of ranges"
)]

use std::fs;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_core::attention::linear::{self, linear_attention};
use dsp_core::attention::{HeadRange, Mask, Problem, forward, merge, softmax_attention};
use safetensors::SafeTensors;
use serde_json::Value;

struct Fixture(Vec<u8>);

impl Fixture {
    fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        Self(fs::read(folder.join(name)).unwrap())
    }

    fn cases(&self) -> serde_json::Map<String, Value> {
        let (_, metadata) = SafeTensors::read_metadata(&self.0).unwrap();
        let cases = &metadata.metadata().as_ref().unwrap()["cases"];
        serde_json::from_str(cases).unwrap()
    }

    fn tensor<const D: usize>(&self, name: &str, dtype: DType) -> Tensor<D> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::F32);
        let values: Vec<f32> = (view.data().chunks_exact(4))
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        let data = TensorData::new(values, view.shape().to_vec());
        Tensor::from_data(data, (&Device::flex(), dtype))
    }

    /// `[B, H, L, ·]`, as the fixtures store it, to `[B, L, H, ·]`: a view, never made contiguous.
    fn rows_first<const D: usize>(&self, name: &str, dtype: DType) -> Tensor<D> {
        self.tensor::<D>(name, dtype).swap_dims(1, 2)
    }
}

/// The largest difference relative to `max(max|expected|, 1e-3)`, as the fixtures measure theirs.
#[track_caller]
fn assert_close<const D: usize>(what: &str, found: Tensor<D>, expected: Tensor<D>, tolerance: f64) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let found: Vec<f64> = found.into_data().iter::<f64>().collect();
    let expected: Vec<f64> = expected.into_data().iter::<f64>().collect();
    let size = expected.iter().fold(1e-3, |size: f64, x| size.max(x.abs()));
    for (found, expected) in found.into_iter().zip(expected) {
        let difference = (found - expected).abs() / size;
        assert!(
            difference <= tolerance,
            "{what}: {found} instead of {expected}, a difference of {difference:e}"
        );
    }
}

/// f32: some ten times the worst difference of PyTorch's own f32 (1.24e-6). f64: what is left is
/// the references' storage in f32 (6e-8 of a value).
const TOLERANCES: [(DType, f64); 2] = [(DType::F32, 1.5e-5), (DType::F64, 1e-7)];

#[test]
fn outputs_logsumexps_and_gradients_are_pytorchs() {
    let fixture = Fixture::open("attention.safetensors");
    let cases = fixture.cases();
    assert_eq!(cases.len(), 8);
    for (case, config) in &cases {
        let number = |key: &str| config[key].as_u64().unwrap() as usize;
        let problem = Problem {
            heads: HeadRange {
                query: 0..number("Hq"),
                group: number("Hq") / number("Hkv"),
            },
            mask: match config["causal"].as_bool().unwrap() {
                true => Mask::Causal,
                false => Mask::Full,
            },
            query_positions: vec![0..number("Lq")],
            key_positions: vec![0..number("Lk")],
            scale: 1.0 / (number("d") as f64).sqrt(),
        };
        for (dtype, tolerance) in TOLERANCES {
            let load = |name: &str| fixture.rows_first::<4>(&format!("{case}.{name}"), dtype);
            let inputs = ["q", "k", "v"].map(|name| load(name).autodiff().require_grad());
            let [q, k, v] = inputs.clone();
            let (out, lse) = softmax_attention(q, k, v, problem.clone());
            let gradients = (out.clone() * load("dout").autodiff()).sum().backward();
            let close = |name: &str, found: Tensor<4>| {
                assert_close(
                    &format!("{case}.{name} {dtype:?}"),
                    found,
                    load(name),
                    tolerance,
                );
            };
            close("out", out.inner());
            let expected = fixture.rows_first::<3>(&format!("{case}.lse"), dtype);
            assert_close(&format!("{case}.lse"), lse.inner(), expected, tolerance);
            for (name, input) in ["dq", "dk", "dv"].into_iter().zip(inputs) {
                close(name, input.grad(&gradients).unwrap());
            }
        }
    }
}

#[test]
fn merging_block_after_block_gives_yunchangs_states_and_the_whole_attention() {
    let fixture = Fixture::open("ring_merge.safetensors");
    let cuts = [0, 5, 16, 27];
    for (dtype, tolerance) in TOLERANCES {
        let [q, k, v] = ["q", "k", "v"].map(|name| fixture.tensor::<4>(name, dtype));
        let [_, queries, heads, d] = q.dims();
        let problem = |keys: std::ops::Range<usize>| Problem {
            heads: HeadRange {
                query: 0..heads,
                group: 1,
            },
            mask: Mask::Full,
            query_positions: vec![0..queries],
            key_positions: vec![keys],
            scale: 1.0 / (d as f64).sqrt(),
        };
        let mut state: Option<(Tensor<4>, Tensor<3>)> = None;
        for (block, cut) in cuts.windows(2).enumerate() {
            let (start, end) = (cut[0], cut[1]);
            let rows = |x: &Tensor<4>| x.clone().slice([0..2, start..end]);
            let part = forward(q.clone(), rows(&k), rows(&v), &problem(start..end));
            let close = |name: &str, (out, lse): (Tensor<4>, Tensor<3>)| {
                let expected = fixture.tensor(&format!("{name}.out"), dtype);
                assert_close(&format!("{name}.out"), out, expected, tolerance);
                let expected = fixture.rows_first(&format!("{name}.lse"), dtype);
                assert_close(&format!("{name}.lse"), lse, expected, tolerance);
            };
            close(&format!("block{block}"), part.clone());
            let merged = match state.take() {
                Some(before) => merge(before, part),
                None => part,
            };
            close(&format!("merged{block}"), merged.clone());
            state = Some(merged);
        }
        let (out, _) = state.unwrap();
        assert_close(
            "full.out",
            out,
            fixture.tensor("full.out", dtype),
            tolerance,
        );
    }
}

/// Holds linear attention to the tensors of a case: `[B, H, L, ·]`.
fn assert_linear(fixture: &Fixture, case: &str, problem: &linear::Problem) {
    for (dtype, tolerance) in TOLERANCES {
        let load = |name: &str| fixture.rows_first::<4>(&format!("{case}.{name}"), dtype);
        let inputs = ["q", "k", "v"].map(|name| load(name).autodiff().require_grad());
        let [q, k, v] = inputs.clone();
        let out = linear_attention(q, k, v, problem.clone());
        let gradients = (out.clone() * load("dout").autodiff()).sum().backward();
        let close = |name: &str, found: Tensor<4>| {
            let what = format!("{case}.{name} {dtype:?}");
            assert_close(&what, found, load(name), tolerance);
        };
        close("out", out.inner());
        for (name, input) in ["dq", "dk", "dv"].into_iter().zip(inputs) {
            close(name, input.grad(&gradients).unwrap());
        }
    }
}

#[test]
fn linear_attention_with_decay_gives_lightning_attentions_outputs_states_and_gradients() {
    let fixture = Fixture::open("linear_attention_decay.safetensors");
    for case in ["alibi4", "alibi6", "fast", "zero", "mixed"] {
        let slopes = fixture.tensor::<1>(&format!("{case}.slope"), DType::F64);
        let slopes: Vec<f64> = slopes.into_data().iter::<f64>().collect();
        let problem = linear::Problem {
            heads: HeadRange {
                query: 0..slopes.len(),
                group: 1,
            },
            decay: slopes.iter().map(|slope| (-slope).exp()).collect(),
            scale: 1.0,
        };
        assert_linear(&fixture, case, &problem);
        for (dtype, tolerance) in TOLERANCES {
            let load = |name: &str| fixture.rows_first::<4>(&format!("{case}.{name}"), dtype);
            let state = linear::state(&load("k"), &load("v"), &problem);
            let expected = fixture.tensor::<4>(&format!("{case}.final_state"), dtype);
            assert_close(&format!("{case}.final_state"), state, expected, tolerance);
        }
    }
}

#[test]
fn retention_gives_flash_linear_attentions_outputs_and_gradients() {
    // Its other case, gated linear attention, has a decay for each token, which is another kind of attention.
    let fixture = Fixture::open("linear_attention_fla.safetensors");
    let problem = linear::Problem {
        heads: HeadRange {
            query: 0..4,
            group: 1,
        },
        decay: (0..4).map(|head| 1.0 - 2f64.powi(-5 - head)).collect(),
        scale: 0.25,
    };
    assert_linear(&fixture, "retention", &problem);
}

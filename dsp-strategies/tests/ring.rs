//! What only rings have: errors that do not grow with the ranks, and blocks that go no farther than they are seen.
#![cfg(all(feature = "flex", feature = "all"))]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use common::{launch, noise, values};
use dsp_core::attention::{Documents, Within};
use dsp_core::ledger::Phase;
use dsp_core::strategy::{AttentionStage, OutputLayout, StageKind};
use dsp_core::{
    AxisSet, Error, Heads, Loss, Mask, ModelShape, SeqAxis, SequenceParallel, Session, Stage,
};
use dsp_strategies::{Ring, Serial};

const HEADS: Heads = Heads {
    query: 4,
    key_value: 2,
    dim: 4,
};

fn model(length: usize, mask: Mask) -> ModelShape {
    let attention = AttentionStage::softmax(AxisSet::of(&[SeqAxis::FIRST]), HEADS, mask);
    ModelShape {
        batch: 1,
        lengths: vec![length],
        hidden: HEADS.query * HEADS.dim,
        stages: vec![Stage::new("attention", StageKind::Attention(attention))],
        output: OutputLayout::AsInput,
    }
}

/// What a rank sent forward and backward, and the whole output and gradients.
type Seen = ([u64; 2], Vec<Vec<f64>>);

fn run(
    strategy: Arc<dyn SequenceParallel>,
    ranks: usize,
    model: &ModelShape,
    dtype: DType,
) -> Vec<Seen> {
    let model = model.clone();
    launch(ranks, move |group| -> Result<Seen, Error> {
        let device = Device::flex().autodiff();
        let session = Session::new(strategy.clone(), group, model.clone())?;
        let length = model.lengths[0];
        let whole = |heads: usize, seed| -> Tensor<5> {
            let shape = [1, length, 1, 1, heads * HEADS.dim];
            let drawn: Vec<f64> = (0..shape.iter().product())
                .map(|index| noise(seed, index))
                .collect();
            Tensor::from_data(TensorData::new(drawn, shape), (&device, dtype)).require_grad()
        };
        let leaves = [whole(4, 1), whole(2, 2), whole(2, 3)];
        let stage = session.stages().attention()?;
        let [q, k, v] = leaves.clone().map(|leaf| session.split(leaf));
        let output = stage.attend(q?, k?, v?)?;
        let weight = session.split(whole(4, 4))?.into_tensor().detach();
        let loss = (output.tensor().clone() * weight).sum();
        let gradients = session.backward(Loss::OfShard(loss))?;
        let ledger = session.group().ledger().take();
        let sent = [Phase::Forward, Phase::Backward].map(|phase| ledger.phase(phase).elements);
        let expected = session.expected_sends();
        assert_eq!(sent, [expected.forward, expected.backward]);
        let mut found = vec![values(&session.gather(output)?.inner())];
        for leaf in leaves {
            let zeros = || leaf.clone().inner().zeros_like();
            let own = leaf.grad(&gradients).unwrap_or_else(zeros);
            let sum = dsp_core::collective::all_reduce_in(own, Phase::Outside, session.group())?;
            found.push(values(&sum));
        }
        Ok((sent, found))
    })
    .unwrap()
}

#[test]
fn the_error_in_f32_does_not_grow_with_the_ranks() {
    for mask in [Mask::Full, Mask::Causal] {
        let model = model(96, mask);
        let exact = run(Arc::new(Serial), 1, &model, DType::F64)
            .swap_remove(0)
            .1;
        let error = |ranks: usize| -> f64 {
            let found = run(Arc::new(Ring), ranks, &model, DType::F32)
                .swap_remove(0)
                .1;
            let pairs = found.iter().flatten().zip(exact.iter().flatten());
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        };
        let alone = error(1);
        // Values and gradients are of the size of a few units: alone, the error is some roundings of f32.
        assert!(alone > 0.0 && alone < 1e-5, "{alone:e}");
        for ranks in 2..=16 {
            let error = error(ranks);
            assert!(
                error <= 3.0 * alone,
                "{ranks} ranks: {error:e}, one alone {alone:e}"
            );
        }
    }
}

/// Elements of a block of keys and values.
const UNIT: u64 = 2 * 2 * 4;

#[test]
fn under_a_sliding_window_a_block_goes_as_far_as_the_window_and_no_farther() {
    // Blocks of 8: the first query of one sees 7 positions back, then 8, 9: one block, one block, two.
    for (size, hops) in [(1, 0), (2, 1), (8, 1), (9, 1), (10, 2), (17, 2), (18, 3)] {
        let size = NonZeroUsize::new(size).unwrap();
        let model = model(64, Mask::Window { size });
        let exact = run(Arc::new(Serial), 1, &model, DType::F64)
            .swap_remove(0)
            .1;
        let seen = run(Arc::new(Ring), 8, &model, DType::F64);
        for (rank, (sent, found)) in seen.into_iter().enumerate() {
            // Its own block, and those before it that go on: none wraps round from the end to the beginning.
            let passing = (0..=rank)
                .filter(|origin| rank - origin < hops && origin + hops.min(7 - origin) > rank);
            assert_eq!(
                sent[0],
                8 * UNIT * passing.count() as u64,
                "rank {rank}, a window of {size}"
            );
            for (found, exact) in found.iter().flatten().zip(exact.iter().flatten()) {
                assert!((found - exact).abs() < 1e-12);
            }
        }
    }
}

#[test]
fn packed_documents_are_shared_out_so_that_each_rank_has_a_part_of_each() {
    let documents = Documents::new(vec![5, 5, 17, 24]).unwrap();
    let mask = Mask::Packed {
        documents,
        within: Within::Causal,
    };
    let model = model(30, mask);
    let plan = Ring.plan(&model, 3).unwrap();
    let (_, partition) = plan.input.split_axis().unwrap();
    assert_eq!(partition.counts(), [10, 10, 10]);
    let exact = run(Arc::new(Serial), 1, &model, DType::F64)
        .swap_remove(0)
        .1;
    for (_, found) in run(Arc::new(Ring), 3, &model, DType::F64) {
        for (found, exact) in found.iter().flatten().zip(exact.iter().flatten()) {
            assert!((found - exact).abs() < 1e-12);
        }
    }
}

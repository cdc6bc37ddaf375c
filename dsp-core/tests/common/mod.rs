//! Inputs, partitions and bit-exact comparison, shared by this folder's tests.
#![allow(dead_code, reason = "each test binary uses its own part of this")]
#![allow(
    clippy::unwrap_used,
    reason = "a test whose preparation fails has failed"
)]

mod device;
mod engine;

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
#[allow(unused_imports, reason = "each test binary uses its own part of this")]
pub(crate) use device::{device, tries};
use dsp_core::Partition;
#[allow(unused_imports, reason = "each test binary uses its own part of this")]
pub(crate) use engine::{engine, launch};
use proptest::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A value in [-1, 1) for each pair of numbers, without any generator's state.
pub(crate) fn noise(seed: u64, index: usize) -> f64 {
    let mut z = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(index as u64 + 1)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 32;
    (z >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// Numbers without a pattern, on the device without autodiff.
pub(crate) fn random<const D: usize>(shape: [usize; D], seed: u64, dtype: DType) -> Tensor<D> {
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|index| noise(seed, index))
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (&Device::flex(), dtype))
}

/// The values, exactly: f32 widens to f64 without loss. -0 is told from 0 by its bits.
pub(crate) fn bits<const D: usize>(tensor: &Tensor<D>) -> Vec<u64> {
    let data = tensor.to_data();
    data.iter::<f64>().map(f64::to_bits).collect()
}

/// The values.
pub(crate) fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

/// A tensor that a rank returns, also to other processes.
#[derive(Debug, Clone)]
pub(crate) struct Held<const D: usize>(pub(crate) Tensor<D>);

impl<const D: usize> Serialize for Held<D> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.to_data().serialize(serializer)
    }
}

impl<'de, const D: usize> Deserialize<'de> for Held<D> {
    fn deserialize<S: Deserializer<'de>>(deserializer: S) -> Result<Self, S::Error> {
        let data = TensorData::deserialize(deserializer)?;
        let dtype = data.dtype();
        Ok(Self(Tensor::from_data(data, (&Device::flex(), dtype))))
    }
}

/// A partition from the rank that owns each position, each rank's runs in ascending order.
pub(crate) fn owned_by(owners: &[usize], ranks: usize) -> Partition {
    let mut ranges: Vec<Vec<Range<usize>>> = vec![vec![]; ranks];
    for (position, owner) in owners.iter().enumerate() {
        let list = &mut ranges[owner % ranks];
        match list.last_mut() {
            Some(last) if last.end == position => last.end += 1,
            _ => list.push(position..position + 1),
        }
    }
    Partition::new(owners.len(), ranges).unwrap()
}

/// Balanced, zigzag, and any other way of dealing out the positions; ranks without any included.
pub(crate) fn partitions(ranks: usize, longest: usize) -> impl Strategy<Value = Partition> {
    prop_oneof![
        (1..=longest).prop_map(move |length| Partition::balanced(length, ranks)),
        (1..=longest).prop_map(move |length| Partition::zigzag(length, ranks)),
        prop::collection::vec(0..ranks, 1..=longest)
            .prop_map(move |owners| owned_by(&owners, ranks)),
        // Contiguous blocks of any length, and each rank's list of ranges in descending order.
        prop::collection::vec(0..ranks, 1..=longest).prop_map(move |mut owners| {
            owners.sort_unstable();
            owned_by(&owners, ranks)
        }),
        prop::collection::vec(0..ranks, 1..=longest).prop_map(move |owners| {
            let ascending = owned_by(&owners, ranks);
            let descending = (0..ranks)
                .map(|rank| ascending.ranges(rank).iter().rev().cloned().collect())
                .collect();
            Partition::new(owners.len(), descending).unwrap()
        }),
    ]
}

/// One to five ranks.
pub(crate) fn ranks() -> impl Strategy<Value = usize> {
    1usize..=5
}

/// Both precisions.
pub(crate) fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F64), Just(DType::F32)]
}

//! Values of any type, from every rank to every rank: what a program gathers to show or to compare.
//!
//! No tensors of a model: a value is written as CBOR, and each byte of it travels as an element.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::blocks::{Blocks, DIMS, DimBlocks};
use crate::error::{CommError, Tracking};
use crate::group::{Group, Request, Step};
use crate::ledger::{Collective, Phase};

/// Every rank's `value`, in rank order, on every rank.
///
/// # Cost
/// Two all-gathers outside of any pass: the lengths, and the bytes at four bytes each.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges; [`CommError::Engine`] if a value cannot be written or read back.
pub fn share<T: Serialize + DeserializeOwned>(
    value: &T,
    device: &Device,
    group: &Group,
) -> Result<Vec<T>, CommError> {
    let broken = |message: String| CommError::Engine {
        rank: group.rank(),
        message,
    };
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes)
        .map_err(|error| broken(format!("a value could not be written: {error}")))?;
    // Lengths as two digits of 2^24, each of which f32 holds exactly.
    let (high, low) = (bytes.len() >> 24, bytes.len() & 0xff_ffff);
    let lengths = gather(
        &[high as f32, low as f32],
        &vec![2; group.size()],
        device,
        group,
    )?;
    let lengths: Vec<usize> = (lengths.chunks(2))
        .map(|digits| ((digits[0] as usize) << 24) + digits[1] as usize)
        .collect();
    let elements: Vec<f32> = bytes.iter().map(|&byte| f32::from(byte)).collect();
    let all = gather(&elements, &lengths, device, group)?;
    let mut rest = &all[..];
    (lengths.into_iter())
        .map(|length| {
            let (own, others) = rest.split_at(length);
            rest = others;
            let bytes: Vec<u8> = own.iter().map(|&element| element as u8).collect();
            ciborium::from_reader(&bytes[..])
                .map_err(|error| broken(format!("a value could not be read: {error}")))
        })
        .collect()
}

/// The ranks' numbers end to end, of which rank `r` has `lengths[r]`.
fn gather(
    own: &[f32],
    lengths: &[usize],
    device: &Device,
    group: &Group,
) -> Result<Vec<f32>, CommError> {
    let total = lengths.iter().sum();
    let mut start = 0;
    let ranges = (lengths.iter())
        .map(|length| {
            let end = start + length;
            vec![std::mem::replace(&mut start, end)..end]
        })
        .collect();
    let whole = Blocks::replicated([1, total, 1, 1, 1], group.size());
    let split = (whole.clone()).with_dim(1, DimBlocks::from_ranges(total, ranges));
    let data = TensorData::new(own.to_vec(), [1, own.len(), 1, 1, 1]);
    let all = group.exchange(Request {
        collective: Collective::AllGather,
        phase: Phase::Outside,
        tracking: Tracking::Untracked,
        tensor: Tensor::<DIMS>::from_data(data, (device, DType::F32)),
        before: Arc::new(split),
        after: Arc::new(whole),
        step: Step::First,
        answers: None,
    })?;
    Ok(all.into_data().iter::<f32>().collect())
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use super::*;
    use crate::launch;

    #[test]
    fn values_of_any_length_reach_every_rank_in_rank_order() {
        for ranks in 1..=4 {
            let seen = launch(ranks, |group| {
                let own = (
                    group.rank(),
                    vec![0.1_f64; 300 * group.rank()],
                    "ä".to_owned(),
                );
                share(&own, &Device::flex(), &group)
            });
            let expected: Vec<_> = (0..ranks)
                .map(|rank| (rank, vec![0.1_f64; 300 * rank], "ä".to_owned()))
                .collect();
            assert_eq!(seen.unwrap(), vec![expected; ranks]);
        }
    }
}

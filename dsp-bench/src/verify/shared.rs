//! What kinds of files share: weights, gradients, and keeping what a run produced.

use burn::module::Module;
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::{Group, Placed, Session};
use dsp_models::error::ModelError;
use dsp_models::weights::{OriginalNames, Weights, load, named_gradients};

use super::{CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored, data};

impl From<ModelError> for CaseError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Core(dsp_core::Error::Plan(refusal)) => Self::Refused(refusal),
            ModelError::Core(error) => Self::Core(error),
            other => Self::Model(other.to_string()),
        }
    }
}

/// The file's weights in f32 and in f64.
pub(super) fn weights<M: OriginalNames, E: std::fmt::Display>(
    reference: &Reference,
    template: impl Fn() -> Result<M, E>,
) -> Result<[M; 2], ReferenceError> {
    reference.inputs_under("param.");
    let source = Weights::file(reference.path()).with_prefix("param.");
    let of = |dtype| {
        let template = template().map_err(|error| reference.wrong_metadata(error.to_string()))?;
        load(template, &source, dtype).map_err(|source| ReferenceError::Weights {
            path: reference.path().to_owned(),
            source,
        })
    };
    Ok([of(DType::F32)?, of(DType::F64)?])
}

pub(super) fn of_dtype<M>(templates: &[M; 2], dtype: DType) -> &M {
    match dtype {
        DType::F64 => &templates[1],
        _ => &templates[0],
    }
}

pub(super) fn leaf<const D: usize>(
    stored: &Stored,
    shape: [usize; D],
    device: &Device,
    dtype: DType,
) -> Tensor<D> {
    let data: TensorData = data(stored.values.clone(), &shape, dtype);
    Tensor::<D>::from_data(data, (device, dtype)).require_grad()
}

/// The sum over the ranks of a replicated input's gradient.
pub(super) fn summed<const D: usize>(
    leaf: &Tensor<D>,
    gradients: &Gradients,
    group: &Group,
) -> Result<Tensor<D>, CaseError> {
    let zeros = || leaf.clone().inner().zeros_like();
    let own = leaf.grad(gradients).unwrap_or_else(zeros);
    Ok(all_reduce_in(own, Phase::Outside, group)?)
}

/// Keeps a tensor in the shape that the file has.
pub(super) fn keep<const D: usize>(
    produced: &mut Produced,
    name: &str,
    tensor: Tensor<D>,
    shape: &[usize],
) {
    let stored = Stored {
        shape: shape.to_vec(),
        values: tensor.into_data().iter::<f64>().collect(),
    };
    produced.insert(name.to_owned(), stored);
}

/// Keeps each parameter's gradient, after the sum over the ranks, under its original name.
pub(super) fn keep_parameters<M: Module + OriginalNames>(
    produced: &mut Produced,
    session: &Session,
    placed: &Placed<M>,
    mut gradients: Gradients,
) -> Result<(), CaseError> {
    let reduced = session.reduce(&mut gradients, placed)?;
    let reduced = session.whole(reduced, placed)?;
    let named = named_gradients(&placed.module, &reduced)
        .map_err(|error| CaseError::Model(error.to_string()))?;
    for (name, data) in named {
        let stored = Stored {
            shape: data.shape().to_vec(),
            values: data.iter::<f64>().collect(),
        };
        produced.insert(format!("grad.{name}"), stored);
    }
    Ok(())
}

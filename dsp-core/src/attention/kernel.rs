//! Attention of either form, for whoever holds all rows that it needs.

use burn::tensor::Tensor;

use super::{Problem, linear, softmax};

/// Softmax or linear attention: everything but the tensors.
#[derive(Debug, Clone, PartialEq)]
pub enum Kernel {
    /// Softmax attention of any rows.
    Softmax(Problem),
    /// Linear attention of all positions, in order.
    Linear(linear::Problem),
}

/// What the backward pass needs of the forward pass beside its inputs.
#[derive(Debug, Clone)]
pub enum Kept {
    /// The output and its logsumexp.
    Softmax(Box<(Tensor<4>, Tensor<3>)>),
    /// The states.
    Linear(Box<linear::Chunk>),
}

impl Kept {
    /// The output: `[B, Lq, Hq, dv]`.
    pub fn output(&self) -> &Tensor<4> {
        match self {
            Self::Softmax(kept) => &kept.0,
            Self::Linear(chunk) => &chunk.output,
        }
    }

    /// The logsumexp, `[B, Lq, Hq]`, which linear attention does not have.
    pub fn logsumexp(&self) -> Option<&Tensor<3>> {
        match self {
            Self::Softmax(kept) => Some(&kept.1),
            Self::Linear(_) => None,
        }
    }
}

impl Kernel {
    /// Attends, outside of any graph. Shapes, cost and panics are those of the form's own function.
    pub fn forward(&self, [q, k, v]: &[Tensor<4>; 3]) -> Kept {
        match self {
            Self::Softmax(problem) => {
                let (q, k, v) = (q.clone(), k.clone(), v.clone());
                Kept::Softmax(Box::new(softmax::forward(q, k, v, problem)))
            }
            Self::Linear(problem) => Kept::Linear(Box::new(linear::forward(q, k, v, problem))),
        }
    }

    /// The gradients of the query, the key and the value.
    ///
    /// # Panics
    /// If `kept` is of the other form.
    pub fn backward(
        &self,
        [q, k, v]: &[Tensor<4>; 3],
        kept: &Kept,
        dout: Tensor<4>,
    ) -> [Tensor<4>; 3] {
        match (self, kept) {
            (Self::Softmax(problem), Kept::Softmax(kept)) => {
                let (q, k, v) = (q.clone(), k.clone(), v.clone());
                let (output, lse) = (**kept).clone();
                softmax::backward(q, k, v, output, lse, dout, problem).into()
            }
            (Self::Linear(problem), Kept::Linear(chunk)) => {
                let gradients = linear::backward([q, k, v], &chunk.states, &dout, problem);
                [gradients.query, gradients.key, gradients.value]
            }
            _ => panic!("what is kept of an attention goes back through the same form"),
        }
    }

    /// Attends with a gradient: the output, and the logsumexp as a constant if the form has one.
    pub fn attend(self, [q, k, v]: [Tensor<4>; 3]) -> (Tensor<4>, Option<Tensor<3>>) {
        match self {
            Self::Softmax(problem) => {
                let (output, lse) = softmax::softmax_attention(q, k, v, problem);
                (output, Some(lse))
            }
            Self::Linear(problem) => (linear::linear_attention(q, k, v, problem), None),
        }
    }
}

//! A function with a gradient of our own: its output is computed outside the autodiff graph, then
//! attached to the graph of its inputs together with a hand-written backward.
//!
//! ```text
//!   x (tracked) ── x.inner() ──► ordinary code, may return an error ──► y (untracked)
//!   │                                                                   │
//!   └────────────────► attach1(x, y, dy ↦ dx) ◄─────────────────────────┘
//!                              │
//!                              ▼
//!                     y, tracked: its gradient goes through the closure
//! ```
//!
//! Collectives and attention are built this way (vector-Jacobian products, as JAX's `custom_vjp`):
//! the forward is an ordinary function that can fail, and nothing but the backward is left to the
//! graph. The graph keeps only what the closure captures.
//!
//! - The closure sees **untracked** tensors of the inner backend.
//! - It runs at most once for each backward pass, even if one input alone needs a gradient; the
//!   gradients of the others are dropped.
//! - Gradient checkpointing never repeats the function: it is registered as compute bound.
//! - Burn's backward cannot return an error. An `Err(e)` of the closure unwinds with `e` as the
//!   payload, past the panic hook; whoever started the backward pass catches and downcasts it.
//! - Ranks that shared a node would wait for one another inside a collective's backward: inputs
//!   belong to the rank that attaches them.
//!
//! One output can be attached. A second one (a logsumexp, say) stays a constant: see
//! [`constant_like`].

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, Dispatch, DispatchKindConversion, DispatchTensor,
    backend_extension,
};
use burn::tensor::Tensor;

/// Attaches `output`, computed from `input` outside the graph, to the graph of `input`.
///
/// # Shapes
/// - `backward`: the gradient of `output`, in its shape, to the gradient of `input`, in its shape
/// - returns: `output`, tracked if `input` is; else a constant on the device of `input`
///
/// # Gradient
/// What `backward` returns. Both its tensors are untracked.
///
/// # Panics
/// If `output` is tracked itself. During the backward pass: if `backward` returns an error, with
/// that error as the payload; if it returns a gradient of another shape than its input's.
pub fn attach1<const I: usize, const O: usize, E>(
    input: Tensor<I>,
    output: Tensor<O>,
    backward: impl Fn(Tensor<O>) -> Result<Tensor<I>, E> + Send + Sync + 'static,
) -> Tensor<O>
where
    E: Send + 'static,
{
    let inputs = [input];
    match joined(&inputs, output, move |gradient| {
        backward(gradient).map(|own| [own])
    }) {
        Joined::Constant(output) => output,
        Joined::Tracked(output, pullback) => {
            let [input] = inputs.map(Tensor::into_dispatch);
            let output = <Dispatch as Attach>::attach1(input, output.into_dispatch(), pullback);
            Tensor::from_dispatch(output)
        }
    }
}

/// Attaches `output`, computed from two inputs outside the graph, to the graphs of the inputs: see [`attach3`].
///
/// # Shapes
/// - `backward`: the gradient of `output`, in its shape, to the inputs' gradients, in their shapes
/// - returns: `output`, tracked if either input is; else a constant on the device of the inputs
///
/// # Panics
/// As [`attach1`].
pub fn attach2<const I: usize, const O: usize, E>(
    inputs: [Tensor<I>; 2],
    output: Tensor<O>,
    backward: impl Fn(Tensor<O>) -> Result<[Tensor<I>; 2], E> + Send + Sync + 'static,
) -> Tensor<O>
where
    E: Send + 'static,
{
    match joined(&inputs, output, backward) {
        Joined::Constant(output) => output,
        Joined::Tracked(output, pullback) => {
            let [a, b] = inputs.map(Tensor::into_dispatch);
            let output = <Dispatch as Attach>::attach2(a, b, output.into_dispatch(), pullback);
            Tensor::from_dispatch(output)
        }
    }
}

/// Attaches `output`, computed from three inputs outside the graph, to the graphs of the inputs.
///
/// As [`attach1`], which says what holds for both. Inputs that need no gradient may be mixed with
/// tracked ones.
///
/// # Shapes
/// - `backward`: the gradient of `output`, in its shape, to the inputs' gradients, in their shapes
/// - returns: `output`, tracked if any input is; else a constant on the device of the inputs
///
/// # Panics
/// As [`attach1`].
pub fn attach3<const I: usize, const O: usize, E>(
    inputs: [Tensor<I>; 3],
    output: Tensor<O>,
    backward: impl Fn(Tensor<O>) -> Result<[Tensor<I>; 3], E> + Send + Sync + 'static,
) -> Tensor<O>
where
    E: Send + 'static,
{
    match joined(&inputs, output, backward) {
        Joined::Constant(output) => output,
        Joined::Tracked(output, pullback) => {
            let [a, b, c] = inputs.map(Tensor::into_dispatch);
            let output = <Dispatch as Attach>::attach3(a, b, c, output.into_dispatch(), pullback);
            Tensor::from_dispatch(output)
        }
    }
}

/// Attaches `output`, computed from five inputs outside the graph, to the graphs of the inputs: see [`attach3`].
///
/// # Shapes
/// - `backward`: the gradient of `output`, in its shape, to the inputs' gradients, in their shapes
/// - returns: `output`, tracked if any input is; else a constant on the device of the inputs
///
/// # Panics
/// As [`attach1`].
pub fn attach5<const I: usize, const O: usize, E>(
    inputs: [Tensor<I>; 5],
    output: Tensor<O>,
    backward: impl Fn(Tensor<O>) -> Result<[Tensor<I>; 5], E> + Send + Sync + 'static,
) -> Tensor<O>
where
    E: Send + 'static,
{
    match joined(&inputs, output, backward) {
        Joined::Constant(output) => output,
        Joined::Tracked(output, pullback) => {
            let inputs = inputs.map(Tensor::into_dispatch);
            let [a, b, c, d, e] = inputs;
            let output = output.into_dispatch();
            let output = <Dispatch as Attach>::attach5(a, b, c, d, e, output, pullback);
            Tensor::from_dispatch(output)
        }
    }
}

/// An output, outside of any graph, and how it is to be joined to those of its inputs.
enum Joined<const N: usize, const O: usize> {
    /// Not at all: no input is tracked.
    Constant(Tensor<O>),
    /// By this pullback.
    Tracked(Tensor<O>, Pullback<N>),
}

fn joined<const N: usize, const I: usize, const O: usize, E>(
    inputs: &[Tensor<I>; N],
    output: Tensor<O>,
    backward: impl Fn(Tensor<O>) -> Result<[Tensor<I>; N], E> + Send + Sync + 'static,
) -> Joined<N, O>
where
    E: Send + 'static,
{
    let output = untracked(output);
    if !inputs.iter().any(Tensor::is_tracked) {
        let like = inputs.iter().find(|input| input.is_autodiff());
        return Joined::Constant(constant_like(output, like.unwrap_or(&inputs[0])));
    }
    let shapes = inputs.each_ref().map(Tensor::dims);
    let pullback = Pullback::new(move |gradient| {
        let mut index = 0;
        Ok::<_, E>(backward(Tensor::from_dispatch(gradient))?.map(|gradient| {
            index += 1;
            checked(gradient, shapes[index - 1])
        }))
    });
    Joined::Tracked(output, pullback)
}

/// `tensor` as a constant on the device of `like`: with autodiff, and its checkpointing strategy,
/// where `like` has it; without, where it has not.
///
/// # Panics
/// If `tensor` is tracked: as a constant it would lose its gradient without a word.
#[must_use]
pub fn constant_like<const D: usize, const L: usize>(
    tensor: Tensor<D>,
    like: &Tensor<L>,
) -> Tensor<D> {
    let tensor = untracked(tensor);
    match like.gradient_checkpointing_strategy() {
        Some(strategy) => tensor
            .autodiff()
            .with_gradient_checkpointing_strategy(strategy),
        None => tensor,
    }
}

fn untracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    assert!(
        !tensor.is_tracked(),
        "vjp: the output is tracked already; compute it from the inputs' `inner()`"
    );
    tensor.inner()
}

/// A gradient of a wrong shape would fail far from here, or be broadcast and be wrong.
fn checked<const D: usize>(gradient: Tensor<D>, input: [usize; D]) -> DispatchTensor {
    assert_eq!(
        gradient.dims(),
        input,
        "vjp: the shape of a gradient (left) is that of its input (right)"
    );
    gradient.into_dispatch()
}

/// The type-erased backward of a function with `N` inputs: the output's gradient to the inputs'.
#[derive(Clone)]
struct Pullback<const N: usize>(
    Arc<dyn Fn(DispatchTensor) -> Result<[DispatchTensor; N], Box<dyn Any + Send>> + Send + Sync>,
);

impl<const N: usize> Pullback<N> {
    fn new<E: Send + 'static>(
        backward: impl Fn(DispatchTensor) -> Result<[DispatchTensor; N], E> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(move |gradient| {
            backward(gradient).map_err(|error| Box::new(error) as Box<dyn Any + Send>)
        }))
    }
}

impl<const N: usize> fmt::Debug for Pullback<N> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Pullback<{N}>")
    }
}

/// The operation `(inputs, output) → output`, which holds nothing but a backward.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(any(feature = "cuda", feature = "wgpu", feature = "vulkan")),
    Autodiff
)]
trait Attach: Backend {
    fn attach1(
        input: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<1>,
    ) -> FloatTensor<Self> {
        let _ = (input, pullback);
        output
    }

    fn attach2(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<2>,
    ) -> FloatTensor<Self> {
        let _ = (a, b, pullback);
        output
    }

    fn attach3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<3>,
    ) -> FloatTensor<Self> {
        let _ = (a, b, c, pullback);
        output
    }

    fn attach5(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<5>,
    ) -> FloatTensor<Self> {
        let _ = (a, b, c, d, e, pullback);
        output
    }
}

#[cfg(feature = "flex")]
impl Attach for burn::backend::Flex {}

#[cfg(any(feature = "cuda", feature = "wgpu", feature = "vulkan"))]
impl Attach for burn::backend::Cube {}

impl<B, C> Attach for Autodiff<B, C>
where
    B: Backend,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B>,
{
    fn attach1(
        input: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<1>,
    ) -> FloatTensor<Self> {
        register::<B, C, 1>([input], output, pullback)
    }

    fn attach2(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<2>,
    ) -> FloatTensor<Self> {
        register::<B, C, 2>([a, b], output, pullback)
    }

    fn attach3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<3>,
    ) -> FloatTensor<Self> {
        register::<B, C, 3>([a, b, c], output, pullback)
    }

    fn attach5(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        output: FloatTensor<Self>,
        pullback: Pullback<5>,
    ) -> FloatTensor<Self> {
        register::<B, C, 5>([a, b, c, d, e], output, pullback)
    }
}

fn register<B, C, const N: usize>(
    inputs: [FloatTensor<Autodiff<B, C>>; N],
    output: FloatTensor<Autodiff<B, C>>,
    pullback: Pullback<N>,
) -> FloatTensor<Autodiff<B, C>>
where
    B: Backend,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B>,
{
    let output = output.into_primitive();
    // The guards keep the inputs' nodes until the new step is registered.
    let guards = inputs.map(|input| input.into_parts().1);
    match CallPullback.prepare::<C>(guards).compute_bound().stateful() {
        OpsKind::Tracked(operation) => operation.finish(pullback, output),
        OpsKind::UnTracked(operation) => operation.finish(output),
    }
}

#[derive(Debug)]
struct CallPullback;

impl<B, const N: usize> Backward<B, N> for CallPullback
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = Pullback<N>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let gradient = BackendTensor::Float(gradients.consume::<B>(&ops.node));
        let gradient = <DispatchTensor as DispatchKindConversion<B>>::from_backend(gradient);
        let inputs =
            (ops.state.0)(gradient).unwrap_or_else(|payload| std::panic::resume_unwind(payload));
        for (parent, gradient) in ops.parents.into_iter().zip(inputs) {
            let Some(node) = parent else { continue };
            let gradient =
                <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(gradient)
                    .unwrap_or_else(|problem| {
                        panic!("vjp: a backward must return untracked tensors: {problem}")
                    });
            gradients.register::<B>(node.id, gradient.float());
        }
    }
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use std::convert::Infallible;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use burn::tensor::{DType, Device, TensorData};

    use super::*;

    const DTYPES: [DType; 2] = [DType::F32, DType::F64];

    fn devices() -> [Device; 2] {
        let device = Device::flex().autodiff();
        [device.clone(), device.gradient_checkpointing()]
    }

    fn row(values: [f64; 3], device: &Device, dtype: DType) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, 3]), (device, dtype))
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    /// `x ↦ 3x` with the deliberately wrong gradient 5, so that nobody but the closure made it.
    fn tripled(x: Tensor<2>, calls: &Arc<AtomicUsize>) -> Tensor<2> {
        let output = x.clone().inner().mul_scalar(3.0);
        let calls = Arc::clone(calls);
        attach1(x, output, move |gradient: Tensor<2>| {
            assert!(!gradient.is_autodiff());
            calls.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Infallible>(gradient.mul_scalar(5.0))
        })
    }

    #[test]
    fn the_gradient_is_the_closures_for_both_checkpointing_strategies_and_both_precisions() {
        for device in devices() {
            for dtype in DTYPES {
                let calls = Arc::new(AtomicUsize::new(0));
                let x = row([1.0, 2.0, 3.0], &device, dtype).require_grad();
                // Memory-bound neighbours on both sides: what checkpointing would repeat.
                let y = tripled(x.clone().mul_scalar(2.0), &calls)
                    .exp()
                    .mul_scalar(0.5);
                assert_eq!(y.dtype(), dtype);
                let gradients = y.clone().sum().backward();
                let dx = x.grad(&gradients).unwrap();
                assert_eq!(dx.dtype(), dtype);
                let tolerance = if dtype == DType::F64 { 1e-14 } else { 1e-6 };
                for (x, dx) in values(x).into_iter().zip(values(dx)) {
                    let expected = 0.5 * (6.0 * x).exp() * 5.0 * 2.0;
                    assert!((dx - expected).abs() <= tolerance * expected);
                }
                assert_eq!(calls.load(Ordering::SeqCst), 1);
            }
        }
    }

    #[test]
    fn each_use_of_the_output_adds_to_one_call_of_the_closure() {
        let device = Device::flex().autodiff();
        let calls = Arc::new(AtomicUsize::new(0));
        let x = row([1.0, 2.0, 3.0], &device, DType::F64).require_grad();
        let y = tripled(x.clone(), &calls);
        let gradients = (y.clone() + y.clone() + y).sum().backward();
        assert_eq!(values(x.grad(&gradients).unwrap()), [15.0; 3]);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_output_may_have_another_rank_and_shape_than_the_input() {
        let device = Device::flex().autodiff();
        let x = row([1.0, 2.0, 3.0], &device, DType::F32).require_grad();
        let sum: Tensor<1> = x.clone().inner().sum();
        let y = attach1(x.clone(), sum, |gradient: Tensor<1>| {
            Ok::<_, Infallible>(gradient.reshape([1, 1]).expand([1, 3]))
        });
        let gradients = y.mul_scalar(7.0).backward();
        assert_eq!(values(x.grad(&gradients).unwrap()), [7.0; 3]);
    }

    #[test]
    fn three_inputs_get_their_own_gradients_and_untracked_ones_none() {
        for device in devices() {
            for dtype in DTYPES {
                // Every subset of tracked inputs: a swapped or misplaced gradient shows.
                for tracked in 0..8 {
                    let inputs: [Tensor<2>; 3] = std::array::from_fn(|i| {
                        let x = row([1.0 + i as f64, 2.0, 3.0], &device, dtype);
                        if tracked >> i & 1 == 1 {
                            x.require_grad()
                        } else {
                            x
                        }
                    });
                    let [a, b, c] = inputs.clone().map(Tensor::inner);
                    let y = attach3(inputs.clone(), a * b + c, |gradient: Tensor<2>| {
                        Ok::<_, Infallible>([2.0, 3.0, 4.0].map(|s| gradient.clone().mul_scalar(s)))
                    });
                    assert_eq!(y.is_tracked(), tracked != 0);
                    if tracked == 0 {
                        continue;
                    }
                    let gradients = y.sum().backward();
                    for (i, x) in inputs.into_iter().enumerate() {
                        let expected = (tracked >> i & 1 == 1).then(|| vec![2.0 + i as f64; 3]);
                        assert_eq!(x.grad(&gradients).map(values), expected);
                    }
                }
            }
        }
    }

    #[test]
    fn inputs_without_autodiff_mix_with_tracked_ones() {
        for device in devices() {
            let x = row([1.0; 3], &device, DType::F32).require_grad();
            let constant = row([2.0; 3], &Device::flex(), DType::F32);
            let output = row([9.0; 3], &Device::flex(), DType::F32);
            let inputs = [constant.clone(), x.clone(), constant];
            let y = attach3(inputs, output, |gradient: Tensor<2>| {
                Ok::<_, Infallible>([gradient.clone(), gradient.clone() * 2.0, gradient])
            });
            let gradients = y.sum().backward();
            assert_eq!(values(x.grad(&gradients).unwrap()), [2.0; 3]);
        }
    }

    #[test]
    fn an_untracked_input_gives_a_constant_on_its_own_device() {
        let calls = Arc::new(AtomicUsize::new(0));
        for device in devices() {
            let x = row([1.0, 2.0, 3.0], &device, DType::F64);
            let y = tripled(x.clone(), &calls);
            assert!(!y.is_tracked());
            // Devices are equal with and without autodiff: the strategy tells them apart.
            let strategy = device.gradient_checkpointing_strategy();
            assert!(strategy.is_some());
            assert_eq!(y.gradient_checkpointing_strategy(), strategy);
            // Mixing it with a tracked tensor of that device works.
            let z = row([1.0; 3], &device, DType::F64).require_grad();
            let gradients = (z.clone() * y).sum().backward();
            assert_eq!(values(z.grad(&gradients).unwrap()), [3.0, 6.0, 9.0]);
        }
        let y = tripled(row([1.0; 3], &Device::flex(), DType::F32), &calls);
        assert!(!y.is_autodiff());
        assert_eq!(calls.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn an_error_in_backward_unwinds_with_the_error_and_leaves_other_graphs_usable() {
        #[derive(Debug, PartialEq)]
        struct Lost(u32);

        for device in devices() {
            let x = row([1.0; 3], &device, DType::F32).require_grad();
            let output = x.clone().inner();
            let y = attach1(x, output, |_: Tensor<2>| Err::<Tensor<2>, _>(Lost(3)));
            let payload = catch_unwind(AssertUnwindSafe(|| y.sum().backward()))
                .err()
                .expect("the backward pass unwinds");
            assert_eq!(payload.downcast_ref::<Lost>(), Some(&Lost(3)));

            let calls = Arc::new(AtomicUsize::new(0));
            let x = row([1.0; 3], &device, DType::F32).require_grad();
            let gradients = tripled(x.clone(), &calls).sum().backward();
            assert_eq!(values(x.grad(&gradients).unwrap()), [5.0; 3]);
        }
    }

    #[test]
    #[should_panic(expected = "the output is tracked already")]
    fn a_tracked_output_is_refused() {
        let x = row([1.0; 3], &Device::flex().autodiff(), DType::F32).require_grad();
        let _ = attach1(x.clone(), x, Ok::<Tensor<2>, Infallible>);
    }

    #[test]
    #[should_panic(expected = "the shape of a gradient")]
    fn a_gradient_of_another_shape_than_the_input_is_refused() {
        let x = row([1.0; 3], &Device::flex().autodiff(), DType::F32).require_grad();
        let output = x.clone().inner();
        let y = attach1(x, output, |gradient: Tensor<2>| {
            Ok::<_, Infallible>(gradient.sum_dim(1))
        });
        let _ = y.sum().backward();
    }

    #[test]
    fn empty_tensors_go_through_forward_and_backward() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::zeros([0, 3], &device).require_grad();
        let calls = Arc::new(AtomicUsize::new(0));
        let gradients = tripled(x.clone(), &calls).sum().backward();
        assert_eq!(x.grad(&gradients).unwrap().dims(), [0, 3]);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn what_the_closure_captured_is_freed_when_the_graph_is_dropped() {
        let device = Device::flex().autodiff();
        let calls = Arc::new(AtomicUsize::new(0));
        let x = row([1.0; 3], &device, DType::F32).require_grad();
        let y = tripled(x.clone(), &calls);
        assert_eq!(Arc::strong_count(&calls), 2);
        drop(y.sum().backward());
        assert_eq!(
            Arc::strong_count(&calls),
            1,
            "the backward pass consumes the step"
        );
    }
}

//! A small plain Burn model with attention over any axes, run under a strategy and compared with serial.
//!
//! It is what a user would write: residual stream, norms, projections, an MLP, text conditioning and a table
//! of positions. Weights are numbers without a pattern, made from data, so that f64 stays f64.
#![allow(dead_code, reason = "each test binary uses its own part of this")]
#![allow(
    clippy::unwrap_used,
    reason = "a test whose preparation fails has failed"
)]

#[path = "../../../dsp-core/tests/common/device.rs"]
mod device;
#[path = "../../../dsp-core/tests/common/engine.rs"]
mod engine;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData, module};
#[allow(unused_imports, reason = "each test binary uses its own part of this")]
pub(crate) use device::{device, tries};
use dsp_core::attention::{Documents, Dropout, DropoutKey, Within};
use dsp_core::cost::Elements;
use dsp_core::gradients::reduced_parameters;
use dsp_core::layout::MeshAxis;
use dsp_core::ledger::{Entry, Phase, Traffic};
use dsp_core::session::Attend;
use dsp_core::shape::reshape;
use dsp_core::strategy::{AttentionStage, OutputLayout, Part, Placement, Role, StageKind, Units};
use dsp_core::{
    AxisSet, Ending, Error, Heads, Launch, Loss, Mask, ModelShape, Partition, Placed, PlanError,
    SeqAxis, SequenceParallel, Session, Shard, Stage,
};
#[allow(unused_imports, reason = "each test binary uses its own part of this")]
pub(crate) use engine::{engine, launch};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

/// One sub-layer of the model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Sub {
    /// Self-attention over some axes jointly, by number.
    Attention(Vec<usize>, Mask),
    /// Linear self-attention over some axes jointly, whose heads decay each in its own way.
    Linear(Vec<usize>),
    /// Attention to the text.
    Text,
    /// An MLP.
    Mlp,
}

/// A model's shape.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) batch: usize,
    pub(crate) lengths: Vec<usize>,
    /// Query heads and key-value heads, of [`HEAD`] channels each.
    pub(crate) heads: (usize, usize),
    pub(crate) subs: Vec<Sub>,
    pub(crate) output: OutputLayout,
    /// With which probability self-attentions drop, if they do.
    pub(crate) dropout: Option<f64>,
    /// Whether memory-bound operations are repeated in the backward pass.
    pub(crate) checkpointing: Checkpointing,
    /// In how many parts switches go that follow a sub-layer, whose end is then the library's.
    pub(crate) switch_parts: Option<NonZeroUsize>,
}

/// Burn's gradient checkpointing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Checkpointing {
    Off,
    On,
}

/// Channels of a head.
pub(crate) const HEAD: usize = 2;
/// Channels of the residual stream: not a multiple of the heads, which have their own width.
pub(crate) const HIDDEN: usize = 3;
/// Inner width of the MLP.
pub(crate) const INNER: usize = 5;
/// Tokens of the text.
const TEXT: usize = 3;

/// Attends over one axis, or some jointly, without a mask.
pub(crate) fn attend(axes: &[usize]) -> Sub {
    Sub::Attention(axes.to_vec(), Mask::Full)
}

impl Case {
    pub(crate) fn heads(&self) -> Heads {
        Heads {
            query: self.heads.0,
            key_value: self.heads.1,
            dim: HEAD,
        }
    }

    pub(crate) fn shape(&self) -> ModelShape {
        let stages = self.subs.iter().enumerate().map(|(index, sub)| {
            let heads = self.heads();
            let kind = match sub {
                Sub::Attention(axes, mask) => {
                    let axes: Vec<_> = axes.iter().map(|&axis| SeqAxis::ALL[axis]).collect();
                    let axes = AxisSet::of(&axes);
                    StageKind::Attention(AttentionStage::softmax(axes, heads, mask.clone()))
                }
                Sub::Linear(axes) => {
                    let axes: Vec<_> = axes.iter().map(|&axis| SeqAxis::ALL[axis]).collect();
                    let decay =
                        (0..heads.query).map(|head| 1.0 - 0.3 * head as f64 / heads.query as f64);
                    let axes = AxisSet::of(&axes);
                    StageKind::Attention(AttentionStage::linear(axes, heads, decay.collect()))
                }
                Sub::Text => StageKind::CrossAttention { heads },
                Sub::Mlp => StageKind::FeedForward { inner: INNER },
            };
            Stage::new(format!("sub {index}"), kind)
        });
        ModelShape {
            batch: self.batch,
            lengths: self.lengths.clone(),
            hidden: HIDDEN,
            stages: stages.collect(),
            output: self.output,
        }
    }

    /// Elements of the residual stream.
    pub(crate) fn elements(&self) -> usize {
        self.batch * HIDDEN * self.lengths.iter().product::<usize>()
    }

    fn lengths(&self) -> [usize; 3] {
        self.shape().lengths().unwrap()
    }

    /// How many tokens of the text count for each of some samples.
    fn text_lengths(samples: Range<usize>) -> Arc<[usize]> {
        samples.map(|sample| TEXT - sample % 2).collect()
    }

    fn dropout(&self, operation: usize) -> Option<Dropout> {
        let key = DropoutKey {
            seed: 7,
            step: 3,
            microbatch: 1,
            operation: operation as u32,
        };
        self.dropout
            .map(|probability| Dropout::new(probability, key).unwrap())
    }

    /// The same model of some of the samples.
    fn of_samples(&self, samples: &Range<usize>) -> Self {
        let mut part = self.clone();
        part.batch = samples.len();
        for sub in &mut part.subs {
            if let Sub::Attention(_, Mask::KeyLengths(lengths)) = sub {
                *lengths = lengths[samples.clone()].into();
            }
        }
        part
    }

    /// The role of the parameter at a path, such as `layers.2.inputs.0`, in its stage.
    pub(crate) fn role(&self, path: &str) -> Part {
        let words: Vec<&str> = path.split('.').collect();
        let (layer, name) = match words[..] {
            ["table"] => {
                let axis = SeqAxis::FIRST;
                return Role::Table { dim: 0, axis }.into();
            }
            ["layers", layer, name, ..] => (layer.parse::<usize>().unwrap(), name),
            _ => return Role::Replicated.into(),
        };
        let heads = self.heads();
        let units = match (&self.subs[layer], words.get(3)) {
            (Sub::Mlp, _) => Units::Features(INNER),
            (_, Some(&"1" | &"2")) => Units::KeyValue(heads),
            _ => Units::Query(heads),
        };
        let columns = |dim| Role::Columns {
            dim,
            fused: 1,
            units,
        };
        let role = match name {
            "inputs" => columns(1),
            "input_biases" => columns(0),
            "output" => Role::Rows { dim: 0, units },
            _ => Role::Replicated,
        };
        role.in_stage(layer)
    }
}

#[derive(Module, Debug)]
struct Layer {
    gamma: Param<Tensor<1>>,
    inputs: Vec<Param<Tensor<2>>>,
    input_biases: Vec<Param<Tensor<1>>>,
    output: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
    /// Of every other layer.
    gate: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
pub(crate) struct Model {
    table: Param<Tensor<2>>,
    layers: Vec<Layer>,
}

/// A value in [-1, 1] for each pair of numbers, one that f32 can hold: so that both precisions compute the same.
pub(crate) fn noise(seed: u64, index: usize) -> f64 {
    let mut z = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(index as u64 + 1)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 32;
    f64::from(((z >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as f32)
}

/// What a model and its input are made of.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    dtype: DType,
    /// Moves every number by up to half of f32's last place, one way for each seed.
    nudge: Option<u64>,
}

impl From<DType> for Numbers {
    fn from(dtype: DType) -> Self {
        Self { dtype, nudge: None }
    }
}

impl Numbers {
    fn tensor<const D: usize>(self, shape: [usize; D], seed: u64) -> Tensor<D> {
        let number = |index| {
            let nudge = |by: u64| noise(1000 * by + seed, index) * f64::from(f32::EPSILON) / 2.0;
            noise(seed, index) * (1.0 + self.nudge.map_or(0.0, nudge))
        };
        let values: Vec<f64> = (0..shape.iter().product()).map(number).collect();
        let data = TensorData::new(values, shape);
        Tensor::from_data(data, (&Device::flex(), self.dtype))
    }
}

pub(crate) fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

impl Model {
    fn new(case: &Case, numbers: Numbers) -> Self {
        let mut seed = 0;
        let mut next = || {
            seed += 1;
            seed
        };
        let layers = case.subs.iter().map(|sub| {
            let (query, key) = (case.heads.0 * HEAD, case.heads.1 * HEAD);
            let widths = match sub {
                Sub::Mlp => vec![INNER],
                Sub::Attention(..) | Sub::Linear(_) | Sub::Text => vec![query, key, key],
            };
            let mut matrix =
                |rows, columns| Param::from_tensor(numbers.tensor([rows, columns], next()));
            let inputs: Vec<_> = widths.iter().map(|&width| matrix(HIDDEN, width)).collect();
            let output = matrix(widths[0], HIDDEN);
            let mut vector = |width| Param::from_tensor(numbers.tensor([width], next()));
            Layer {
                gamma: vector(HIDDEN),
                inputs,
                input_biases: widths.iter().map(|&width| vector(width)).collect(),
                output,
                bias: vector(HIDDEN),
                gate: vector(HIDDEN),
            }
        });
        let layers = layers.collect();
        let table = Param::from_tensor(numbers.tensor([case.lengths[0], HIDDEN], next()));
        Self { table, layers }
    }

    fn forward(
        &self,
        case: &Case,
        session: &Session,
        x: Shard,
        (text, text_lengths): (&Tensor<3>, Arc<[usize]>),
    ) -> Result<Shard, Error> {
        let table = x.rows_of(self.table.val(), case.lengths[0], SeqAxis::FIRST)?;
        let count = table.dims()[0];
        let mut x = x.map(|x| x + reshape(table, [1, count, 1, 1, HIDDEN]))?;
        let mut stages = session.stages();
        for (index, (layer, sub)) in self.layers.iter().zip(&case.subs).enumerate() {
            let stage = match sub {
                Sub::Attention(..) | Sub::Linear(_) => stages.attention()?,
                Sub::Text => stages.cross_attention()?,
                Sub::Mlp => stages.feed_forward()?,
            };
            x = stage.arrange(x)?;
            let h = stage.enter(x.clone().map(|x| layer.norm(x))?)?;
            let inner = match sub {
                Sub::Attention(..) | Sub::Linear(_) => {
                    let q = h.clone().map(|h| layer.input(0, h))?;
                    let k = h.clone().map(|h| layer.input(1, h))?;
                    let v = h.map(|h| layer.input(2, h))?;
                    let dropout = match sub {
                        Sub::Attention(..) => case.dropout(index),
                        _ => None,
                    };
                    let options = Attend {
                        dropout,
                        ..Attend::default()
                    };
                    stage.attend_with([q, k, v], options)?.output
                }
                Sub::Text => {
                    let q = h.map(|h| layer.input(0, h))?;
                    let (k, v) = (layer.input(1, text.clone()), layer.input(2, text.clone()));
                    stage.cross_attend(q, k, v, text_lengths.clone())?
                }
                Sub::Mlp => h.map(|h| layer.input(0, h).tanh())?,
            };
            let gate = reshape(layer.gate.val(), [1, 1, 1, 1, HIDDEN]);
            if case.switch_parts.is_some() {
                let ending = Ending {
                    weight: layer.output.val(),
                    bias: Some(layer.bias.val()),
                    gate: (index % 2 == 0).then_some(gate),
                };
                x = stage.end(x, inner, ending)?;
                continue;
            }
            let part = inner.map(|h| linear(h, layer.output.val(), None))?;
            let part = stage.leave(part, Some(layer.bias.val()))?.into_tensor();
            x = match index % 2 {
                0 => x.map(|x| x + gate * part)?,
                _ => x.map(|x| x + part)?,
            };
        }
        stages.finish(x)
    }
}

/// `x·w + b` over the last dim. Burn's own, whose graph depends on the number of rows, and so differs by rank
/// where blocks are uneven: no strategy may trip over that. On Flex it reads out of bounds where a block is
/// empty; such a block goes through one plain product instead.
fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    if cfg!(feature = "cuda") {
        // Burn's product of f32 has TF32's precision there.
        return dsp_core::linear::affine(x, weight, bias);
    }
    let mut dims = x.dims();
    let [input, output] = weight.dims();
    let rows: usize = dims[..D - 1].iter().product();
    if rows * input * output > 0 {
        return module::linear(x, weight, bias);
    }
    let y = reshape(x, [rows, input]).matmul(weight);
    dims[D - 1] = output;
    let y = match bias {
        Some(bias) => y + reshape(bias, [1, output]),
        None => y,
    };
    reshape(y, dims)
}

impl Layer {
    /// Divides by the root mean square. Burn's own mean and powers would round factors to f32.
    fn norm(&self, x: Tensor<5>) -> Tensor<5> {
        let square = (x.clone() * x.clone())
            .sum_dim(4)
            .mul_scalar(1.0 / HIDDEN as f64);
        x / square.add_scalar(0.1).sqrt() * self.gamma.val().unsqueeze()
    }

    fn input<const D: usize>(&self, index: usize, x: Tensor<D>) -> Tensor<D> {
        let bias = self.input_biases[index].val();
        linear(x, self.inputs[index].val(), Some(bias))
    }
}

/// A gradient on one rank, and which part of the whole it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Gradient {
    shape: Vec<usize>,
    placement: Placement,
    values: Vec<f64>,
}

/// What one rank saw.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) output: Vec<f64>,
    input: Vec<f64>,
    text: Vec<f64>,
    parameters: BTreeMap<String, Gradient>,
    /// The ledger after the backward pass.
    pub(crate) step: Traffic,
    /// By formula.
    pub(crate) expected: Elements,
    /// The reduction of gradients, and its formula.
    pub(crate) reduction: (Entry, u64),
    /// The gather of the output, and its formula.
    pub(crate) gather: (Entry, Elements),
}

impl Seen {
    /// How many elements of each parameter the rank holds.
    pub(crate) fn held(&self) -> impl Iterator<Item = (&str, usize)> {
        let elements = |gradient: &Gradient| gradient.shape.iter().product();
        let parameters = self.parameters.iter();
        parameters.map(move |(path, gradient)| (path.as_str(), elements(gradient)))
    }
}

struct Collect<'a> {
    path: Vec<String>,
    gradients: &'a GradientsParams,
    placed: &'a Placed<Model>,
    found: BTreeMap<String, Gradient>,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.get::<D>(param.id);
        let gradient = Gradient {
            shape: param.val().dims().to_vec(),
            placement: self.placed.placement(param.id).clone(),
            values: gradient.map_or_else(Vec::new, |gradient| values(&gradient)),
        };
        self.found.insert(self.path.join("."), gradient);
    }
}

/// Runs the model on `ranks` ranks; a refusal is found before.
pub(crate) fn run(
    strategy: &Arc<dyn SequenceParallel>,
    case: &Case,
    ranks: usize,
    dtype: DType,
) -> Result<Vec<Seen>, PlanError> {
    run_replicas(strategy, case, (ranks, 1), dtype)
}

/// Runs the model on `ranks` ranks in each of some replicas, which have a part of the samples each.
pub(crate) fn run_replicas(
    strategy: &Arc<dyn SequenceParallel>,
    case: &Case,
    (ranks, replicas): (usize, usize),
    dtype: DType,
) -> Result<Vec<Seen>, PlanError> {
    run_of(strategy, case, (ranks, replicas), dtype.into())
}

fn run_of(
    strategy: &Arc<dyn SequenceParallel>,
    case: &Case,
    (ranks, replicas): (usize, usize),
    numbers: Numbers,
) -> Result<Vec<Seen>, PlanError> {
    strategy.plan(&case.shape(), ranks)?;
    let dtype = numbers.dtype;
    let model = Arc::new(Model::new(case, numbers));
    let (strategy, whole_case) = (strategy.clone(), case.clone());
    let samples = Partition::balanced(case.batch, replicas);
    let seen = Launch::new(ranks * replicas)
        .timeout(std::time::Duration::from_secs(20))
        .on(&engine(ranks * replicas))
        .run_shared(move |world| -> Result<Seen, Error> {
            let inside = MeshAxis {
                stride: 1,
                size: ranks,
            };
            let across = MeshAxis {
                stride: ranks,
                size: replicas,
            };
            let samples = &samples.ranges(across.coordinate(world.rank()))[0];
            let case = whole_case.of_samples(samples);
            let group = match replicas {
                1 => world.clone(),
                _ => world.along(inside)?,
            };
            let device = match case.checkpointing {
                Checkpointing::Off => device(dtype).autodiff(),
                Checkpointing::On => device(dtype).autodiff().gradient_checkpointing(),
            };
            let mut session = Session::new(strategy.clone(), group, case.shape())?;
            if let Some(parts) = case.switch_parts {
                session = session.switching_in(parts);
            }
            if replicas > 1 {
                session = session.with_replicas(world.along(across)?);
            }
            let placed = session.place(&*model, |path| case.role(path), &device);
            let [a, b, c] = case.lengths();
            let batch = whole_case.batch;
            let whole = [batch, a, b, c, HIDDEN];
            fn leaf<const D: usize>(value: &Tensor<D>, device: &Device) -> Tensor<D> {
                Tensor::from_data(value.to_data(), (device, value.dtype())).require_grad()
            }
            let x = leaf(&numbers.tensor(whole, 101), &device);
            let text = leaf(&numbers.tensor([batch, TEXT, HIDDEN], 102), &device);
            let own_text = text.clone().narrow(0, samples.start, samples.len());
            let own_x = x.clone().narrow(0, samples.start, samples.len());
            let output = placed.module.forward(
                &case,
                &session,
                session.split(own_x)?,
                (&own_text, Case::text_lengths(samples.clone())),
            )?;
            let weight = Tensor::from_data(numbers.tensor(whole, 103).to_data(), (&device, dtype));
            let weight = weight.narrow(0, samples.start, samples.len());
            let weight = Shard::split(weight, output.layout(), output.rank())?;
            let y = output.tensor().clone();
            let loss = (y.clone() * y * weight.into_tensor()).sum();
            let mut gradients = session.backward(Loss::OfShard(loss))?;
            let (dx, dtext) = (x.grad(&gradients), text.grad(&gradients));
            let ledger = session.group().ledger();
            let step = ledger.take();
            let reduced = session.reduce(&mut gradients, &placed)?;
            let reduction = ledger.take().phase(Phase::Gradients);
            let gathered = session.gather(output)?;
            let gather = ledger.take().phase(Phase::Forward);
            let mut collect = Collect {
                path: vec![],
                gradients: &reduced,
                placed: &placed,
                found: BTreeMap::new(),
            };
            placed.module.visit(&mut collect);
            let count = reduced_parameters(&placed);
            Ok(Seen {
                output: values(&gathered.inner()),
                input: values(&dx.unwrap()),
                text: dtext.map_or_else(Vec::new, |dtext| values(&dtext)),
                parameters: collect.found,
                step,
                expected: session.expected_sends(),
                reduction: (reduction, session.expected_reduce(count)),
                gather: (gather, session.expected_gather(case.batch, HIDDEN)),
            })
        })
        .unwrap();
    Ok(seen)
}

/// Everything that is compared, by name, whole.
pub(crate) fn whole(seen: &[Seen]) -> BTreeMap<String, Vec<f64>> {
    let sum = |part: fn(&Seen) -> &Vec<f64>| {
        let mut sum: Vec<f64> = vec![];
        for seen in seen {
            let terms = part(seen);
            sum.resize(terms.len().max(sum.len()), 0.0);
            for (sum, term) in sum.iter_mut().zip(terms) {
                *sum += term;
            }
        }
        sum
    };
    let mut whole = BTreeMap::from([
        ("output".to_owned(), seen[0].output.clone()),
        ("input".to_owned(), sum(|seen| &seen.input)),
        ("text".to_owned(), sum(|seen| &seen.text)),
    ]);
    for (path, first) in &seen[0].parameters {
        let gradient = match &first.placement {
            Placement::Replicated => first.values.clone(),
            Placement::Sharded { dim, .. } => joined(seen, path, *dim),
            Placement::Shared { .. } => joined_once(seen, path),
        };
        whole.insert(path.clone(), gradient);
    }
    whole
}

/// A sharded parameter's gradient from all ranks' parts.
fn joined(seen: &[Seen], path: &str, dim: usize) -> Vec<f64> {
    let parts: Vec<&Gradient> = seen.iter().map(|seen| &seen.parameters[path]).collect();
    let shape = &parts[0].shape;
    let (outer, inner) = (
        shape[..dim].iter().product::<usize>(),
        shape[dim + 1..].iter().product::<usize>(),
    );
    let mut joined = vec![];
    for row in 0..outer {
        for part in &parts {
            let width = part.shape[dim] * inner;
            joined.extend_from_slice(&part.values[row * width..(row + 1) * width]);
        }
    }
    joined
}

/// A shared parameter's gradient: what several ranks hold is the same on each.
fn joined_once(seen: &[Seen], path: &str) -> Vec<f64> {
    let parts = || seen.iter().map(|seen| &seen.parameters[path]);
    let held = |part: &Gradient| match &part.placement {
        Placement::Shared { dim, ranges } => (*dim, ranges.clone()),
        other => panic!("{path} is shared on every rank, but here {other:?}"),
    };
    let ends = parts().flat_map(|part| held(part).1).map(|range| range.end);
    let length = ends.max().unwrap();
    let (dim, shape) = (
        held(&seen[0].parameters[path]).0,
        &seen[0].parameters[path].shape,
    );
    let outer: usize = shape[..dim].iter().product();
    let inner: usize = shape[dim + 1..].iter().product();
    let mut whole: Vec<Option<f64>> = vec![None; outer * length * inner];
    for part in parts() {
        let positions: Vec<usize> = held(part).1.into_iter().flatten().collect();
        for (index, &value) in part.values.iter().enumerate() {
            let (row, rest) = (
                index / (positions.len() * inner),
                index % (positions.len() * inner),
            );
            let place = (row * length + positions[rest / inner]) * inner + rest % inner;
            assert!(whole[place].is_none_or(|other| other.to_bits() == value.to_bits()));
            whole[place] = Some(value);
        }
    }
    whole.into_iter().map(Option::unwrap).collect()
}

/// The replicated results are the same bits on every rank.
pub(crate) fn assert_alike_on_all_ranks(seen: &[Seen]) -> Result<(), TestCaseError> {
    for other in &seen[1..] {
        prop_assert_eq!(&seen[0].output, &other.output);
        for (path, gradient) in &seen[0].parameters {
            if gradient.placement == Placement::Replicated {
                prop_assert_eq!(&gradient.values, &other.parameters[path].values, "{}", path);
            }
        }
    }
    Ok(())
}

/// The largest difference from the serial results, and where it is: |Δ| / max(1, max|serial|), the largest of the
/// tensor's layer: a gradient that cancels to nothing, as that of a key's bias, carries the roundings of what was
/// summed, which is as large as the layer's other gradients.
fn difference(
    serial: &BTreeMap<String, Vec<f64>>,
    found: &BTreeMap<String, Vec<f64>>,
) -> (f64, String) {
    let layer = |name: &str| name.split('.').take(2).collect::<Vec<_>>().join(".");
    let mut sizes: BTreeMap<String, f64> = BTreeMap::new();
    for (name, values) in serial {
        let size = sizes.entry(layer(name)).or_insert(1.0);
        *size = values.iter().fold(*size, |size, x| size.max(x.abs()));
    }
    let mut most = (0.0, String::new());
    for (name, expected) in serial {
        let size = sizes[&layer(name)];
        for (index, (a, b)) in found[name].iter().zip(expected).enumerate() {
            let difference = (a - b).abs() / size;
            if difference > most.0 || difference.is_nan() {
                most = (difference, format!("{name}[{index}] is {a}, serially {b}"));
            }
            if difference.is_nan() {
                return most;
            }
        }
    }
    most
}

/// Holds results to the serial ones.
pub(crate) fn assert_close(
    what: &str,
    serial: &BTreeMap<String, Vec<f64>>,
    found: &BTreeMap<String, Vec<f64>>,
    tolerance: f64,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(serial.len(), found.len());
    for (name, expected) in serial {
        let elements = found[name].len();
        prop_assert_eq!(elements, expected.len(), "{}: elements of {}", what, name);
    }
    let (difference, place) = difference(serial, found);
    prop_assert!(
        difference <= tolerance,
        "{what}: {place}: a difference of {difference:e}"
    );
    Ok(())
}

/// Whether a case can be computed in f32 at all: moving its numbers by what f32 cannot tell moves the serial
/// results, in f64, by little. Which cases can is so decided without any f32 code of ours.
///
/// In 3000 random cases f32 on any strategy was off by at most 10 times as much as the worst of three such
/// moves; a quarter of them move by more than is allowed here, one in a thousand by 1e-5.
pub(crate) fn is_well_conditioned(case: &Case) -> bool {
    let serial: Arc<dyn SequenceParallel> = Arc::new(dsp_strategies::Serial);
    let of = |nudge| {
        let dtype = DType::F64;
        whole(&run_of(&serial, &by_hand(case), (1, 1), Numbers { dtype, nudge }).unwrap())
    };
    let reference = of(None);
    (1..=3).all(|seed| difference(&reference, &of(Some(seed))).0 <= 5e-7)
}

/// The case whose sub-layers end by the test's own code.
fn by_hand(case: &Case) -> Case {
    Case {
        switch_parts: None,
        ..case.clone()
    }
}

/// The serial results, in f64, for which nothing of the sub-layers' ends is the library's.
fn reference(case: &Case) -> BTreeMap<String, Vec<f64>> {
    let serial: Arc<dyn SequenceParallel> = Arc::new(dsp_strategies::Serial);
    whole(&run(&serial, &by_hand(case), 1, DType::F64).unwrap())
}

/// Runs a case serially, in f64, and under a strategy, and compares everything.
///
/// f32 is held to f64 too: where terms cancel, as in the gradient of a key's bias, which is 0, two f32 runs
/// differ by the sum of both's roundings.
pub(crate) fn check(
    strategy: &Arc<dyn SequenceParallel>,
    case: &Case,
    ranks: usize,
    dtype: DType,
    tolerance: f64,
) -> Result<Result<(), PlanError>, TestCaseError> {
    let reference = reference(case);
    let seen = match run(strategy, case, ranks, dtype) {
        Ok(seen) => seen,
        Err(refusal) => return Ok(Err(refusal)),
    };
    assert_alike_on_all_ranks(&seen)?;
    let what = format!("{} on {ranks} ranks", strategy.name());
    assert_close(&what, &reference, &whole(&seen), tolerance)?;
    assert_sent_as_planned(&seen, dtype)?;
    Ok(Ok(()))
}

/// The ledger equals the formulas, per rank, in elements and bytes.
pub(crate) fn assert_sent_as_planned(seen: &[Seen], dtype: DType) -> Result<(), TestCaseError> {
    for (rank, seen) in seen.iter().enumerate() {
        let (forward, backward) = (
            seen.step.phase(Phase::Forward),
            seen.step.phase(Phase::Backward),
        );
        let sent = Elements {
            forward: forward.elements,
            backward: backward.elements,
        };
        prop_assert_eq!(sent, seen.expected, "what rank {} sends", rank);
        prop_assert_eq!(forward.bytes, forward.elements * dtype.size() as u64);
        prop_assert_eq!(backward.bytes, backward.elements * dtype.size() as u64);
        prop_assert_eq!(
            seen.reduction.0.elements,
            seen.reduction.1,
            "rank {}'s reduction",
            rank
        );
        prop_assert_eq!(
            seen.gather.0.elements,
            seen.gather.1.forward,
            "rank {}'s gather",
            rank
        );
    }
    Ok(())
}

/// Runs a case serially, and under a strategy on ranks times replicas, and compares everything.
pub(crate) fn check_replicas(
    strategy: &Arc<dyn SequenceParallel>,
    case: &Case,
    (ranks, replicas): (usize, usize),
    tolerance: f64,
) -> Result<Result<(), PlanError>, TestCaseError> {
    let reference = reference(case);
    let seen = match run_replicas(strategy, case, (ranks, replicas), DType::F64) {
        Ok(seen) => seen,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let what = format!("{} on {ranks} ranks × {replicas}", strategy.name());
    // Inputs' gradients are sums over everyone; parameters' are found in each replica alike.
    let mut found = whole(&seen);
    let outputs = seen.chunks(ranks).flat_map(|seen| seen[0].output.clone());
    found.insert("output".to_owned(), outputs.collect());
    for replica in seen.chunks(ranks) {
        for (path, gradient) in whole(replica) {
            if replica[0].parameters.contains_key(&path) {
                found.insert(path, gradient);
            }
        }
        assert_close(&what, &reference, &found, tolerance)?;
    }
    Ok(Ok(()))
}

/// Windows and documents shorter and longer than the attended axes together.
fn masks(batch: usize) -> impl Strategy<Value = Mask> {
    let size = || {
        prop_oneof![3 => 1usize..5, 1 => 5usize..40]
            .prop_map(|size| NonZeroUsize::new(size).unwrap())
    };
    let documents = prop::collection::vec(0usize..7, 0..5).prop_map(|lengths| {
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        Documents::new(ends.collect::<Vec<_>>()).unwrap()
    });
    let within = prop_oneof![
        Just(Within::Full),
        Just(Within::Causal),
        size().prop_map(Within::Window),
    ];
    prop_oneof![
        2 => Just(Mask::Full),
        2 => Just(Mask::Causal),
        2 => size().prop_map(|size| Mask::Window { size }),
        2 => (documents, within).prop_map(|(documents, within)| Mask::Packed { documents, within }),
        1 => prop::collection::vec(0usize..5, batch).prop_map(|lengths| Mask::KeyLengths(lengths.into())),
    ]
}

/// An attention over any non-empty set of the axes, most often one.
fn attentions(axes: usize, batch: usize) -> impl Strategy<Value = Sub> {
    let sets = axis_sets(axes);
    (sets, masks(batch)).prop_map(|(axes, mask)| Sub::Attention(axes, mask))
}

fn axis_sets(axes: usize) -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        3 => (0..axes).prop_map(|axis| vec![axis]),
        1 => (1usize..1 << axes).prop_map(move |bits| (0..axes).filter(|axis| bits >> axis & 1 == 1).collect()),
    ]
}

/// Models of the given number of axes: lengths below the ranks too, heads that the ranks do not divide, fewer
/// key-value heads than ranks, any order of sub-layers.
pub(crate) fn cases(axes: usize) -> impl Strategy<Value = Case> {
    cases_of(axes, |axes, batch| attentions(axes, batch).boxed())
}

/// The same with linear attentions, and with both kinds.
pub(crate) fn linear_cases(axes: usize) -> impl Strategy<Value = Case> {
    prop_oneof![
        2 => cases_of(axes, |axes, _| axis_sets(axes).prop_map(Sub::Linear).boxed()),
        1 => cases_of(axes, |axes, batch| prop_oneof![
            axis_sets(axes).prop_map(Sub::Linear),
            attentions(axes, batch),
        ].boxed()),
    ]
}

fn cases_of(
    axes: usize,
    attentions: fn(usize, usize) -> BoxedStrategy<Sub>,
) -> impl Strategy<Value = Case> {
    let heads = [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 2),
        (5, 5),
        (6, 2),
        (5, 1),
        (6, 3),
    ];
    (1usize..=2).prop_flat_map(move |batch| {
        let sub =
            prop_oneof![4 => attentions(axes, batch), 1 => Just(Sub::Text), 1 => Just(Sub::Mlp)];
        let longest = [0usize, 9, 6, 4][axes];
        (
            Just(batch),
            prop::collection::vec(1..=longest, axes),
            prop::sample::select(heads.to_vec()),
            prop::collection::vec(sub, 1..=4),
            prop_oneof![Just(OutputLayout::AsInput), Just(OutputLayout::Free)],
            prop_oneof![2 => Just(None), 1 => Just(Some(0.2)), 1 => Just(Some(0.6))],
            prop_oneof![Just(Checkpointing::Off), Just(Checkpointing::On)],
            // More parts than there are channels are as many as there are.
            prop::option::of(
                (1usize..=HIDDEN + 1).prop_map(|parts| NonZeroUsize::new(parts).unwrap()),
            ),
        )
            .prop_map(
                |(batch, lengths, heads, subs, output, dropout, checkpointing, switch_parts)| {
                    Case {
                        batch,
                        lengths,
                        heads,
                        subs,
                        output,
                        dropout,
                        checkpointing,
                        switch_parts,
                    }
                },
            )
    })
}

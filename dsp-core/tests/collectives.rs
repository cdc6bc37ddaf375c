//! Every differentiable collective against a plain function over all ranks' blocks: forward and backward
//! bit for bit, and what it sends to the byte.
//!
//! Exactness needs no tolerance: a collective copies, or adds in rank order, and so does the reference.
#![cfg(feature = "flex")]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::sync::{Arc, Barrier};

use burn::tensor::{DType, Device, Tensor};
use common::{
    Held, bits, device, dtypes, engine, launch, noise, partitions, random, ranks, tries, values,
};
use dsp_core::blocks::{Blocks, DimBlocks};
use dsp_core::collective::{self, all_reduce_in, relayout};
use dsp_core::cost::{self, Elements};
use dsp_core::error::Tracking;
use dsp_core::group::{Request, Step};
use dsp_core::layout::{LayoutError, MeshAxis, Value};
use dsp_core::ledger::{Collective, Entry, Phase};
use dsp_core::{CommError, Engine, Error, Group, Layout, Partition, SeqAxis, Shard, reference};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

/// How the collective is called.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    /// On a leaf of the graph.
    Leaf,
    /// Between memory-bound operations under gradient checkpointing, whose backward repeats these.
    Checkpointed,
    /// On a permuted view.
    Strided,
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Leaf),
        Just(Mode::Checkpointed),
        Just(Mode::Strided)
    ]
}

/// What one rank saw of a collective.
#[derive(Serialize, Deserialize)]
struct Observed<const D: usize> {
    y: Held<D>,
    dx: Held<D>,
    forward: Entry,
    backward: Entry,
}

fn reversed<const D: usize>() -> [isize; D] {
    std::array::from_fn(|dim| (D - 1 - dim) as isize)
}

/// A leaf of the calling rank's own graph.
fn leaf<const D: usize>(value: &Tensor<D>, device: &Device) -> Tensor<D> {
    Tensor::from_data(value.to_data(), (device, value.dtype())).require_grad()
}

/// Runs `collective` on every rank's block, and back with every rank's cotangent.
fn observe<const D: usize, F>(
    blocks: &[Tensor<D>],
    cotangents: &[Tensor<D>],
    mode: Mode,
    collective: F,
) -> Vec<Observed<D>>
where
    F: Fn(Tensor<D>, &Group) -> Result<Tensor<D>, CommError> + Send + Sync + 'static,
{
    let inputs = Arc::new((blocks.to_vec(), cotangents.to_vec()));
    launch(blocks.len(), move |group| -> Result<_, CommError> {
        let block = &inputs.0[group.rank()];
        let device = device(block.dtype()).autodiff();
        let device = match mode {
            Mode::Checkpointed => device.gradient_checkpointing(),
            Mode::Leaf | Mode::Strided => device,
        };
        let cotangent = &inputs.1[group.rank()];
        let cotangent = Tensor::from_data(cotangent.to_data(), (&device, block.dtype()));
        let (y, gradient) = match mode {
            Mode::Leaf => {
                let x = leaf(block, &device);
                let y = collective(x.clone(), &group)?;
                let gradients = (y.clone() * cotangent).sum().backward();
                (y, x.grad(&gradients).unwrap())
            }
            Mode::Strided => {
                let x = leaf(&block.clone().permute(reversed::<D>()), &device);
                let y = collective(x.clone().permute(reversed::<D>()), &group)?;
                let gradients = (y.clone() * cotangent).sum().backward();
                let gradient = x.grad(&gradients).unwrap();
                (y, gradient.permute(reversed::<D>()))
            }
            Mode::Checkpointed => {
                // -x goes in, and what comes out is negated and squared: the square's backward asks for
                // -y again, whose recomputation starts at the collective's result. Signs and doubling are
                // exact, so that y's gradient is c·(-y) twice over, negated.
                let x = leaf(block, &device);
                let y = collective(x.clone().neg(), &group)?;
                let negated = y.clone().neg();
                let gradients = (negated.clone() * negated * cotangent).sum().backward();
                (y, x.grad(&gradients).unwrap().neg())
            }
        };
        let traffic = group.ledger().read();
        Ok(Observed {
            y: Held(y.inner()),
            dx: Held(gradient),
            forward: traffic.phase(Phase::Forward),
            backward: traffic.phase(Phase::Backward),
        })
    })
    .unwrap()
}

/// What a collective should do: the reference, its transpose, and what rank `r` sends each way as
/// (calls, messages, elements).
struct Expected<'a, const D: usize> {
    forward: &'a dyn Fn(&[Tensor<D>]) -> Vec<Tensor<D>>,
    backward: &'a dyn Fn(&[Tensor<D>]) -> Vec<Tensor<D>>,
    sends: &'a dyn Fn(usize) -> [(u64, u64, u64); 2],
}

/// Holds a collective to what it should do, in one mode and twice over.
fn check<const D: usize, F>(
    blocks: &[Tensor<D>],
    mode: Mode,
    expected: &Expected<'_, D>,
    collective: F,
) -> Result<(), TestCaseError>
where
    F: Fn(Tensor<D>, &Group) -> Result<Tensor<D>, CommError> + Clone + Send + Sync + 'static,
{
    let dtype = blocks[0].dtype();
    let given: Vec<_> = match mode {
        Mode::Checkpointed => blocks.iter().map(|block| block.clone().neg()).collect(),
        Mode::Leaf | Mode::Strided => blocks.to_vec(),
    };
    let y = (expected.forward)(&given);
    let cotangents: Vec<_> = (y.iter().enumerate())
        .map(|(rank, y)| random(y.dims(), 1000 + rank as u64, dtype))
        .collect();
    let dy: Vec<_> = match mode {
        Mode::Checkpointed => (y.iter().zip(&cotangents))
            .map(|(y, c)| y.clone().mul_scalar(2.0) * c.clone())
            .collect(),
        Mode::Leaf | Mode::Strided => cotangents.clone(),
    };
    let dx = (expected.backward)(&dy);

    // The oracle itself: <y, dy> = <x, dx> over all ranks, to rounding in f32 or f64 of at most a few
    // hundred terms of size one.
    let product = |a: &[Tensor<D>], b: &[Tensor<D>]| -> f64 {
        (a.iter().zip(b))
            .flat_map(|(a, b)| values(a).into_iter().zip(values(b)))
            .map(|(a, b)| a * b)
            .sum()
    };
    let rounding = if dtype == DType::F64 { 1e-11 } else { 1e-2 };
    prop_assert!((product(&y, &dy) - product(&given, &dx)).abs() < rounding);

    let first = observe(blocks, &cotangents, mode, collective.clone());
    let second = observe(blocks, &cotangents, mode, collective);
    for (rank, (seen, again)) in first.iter().zip(&second).enumerate() {
        prop_assert_eq!(seen.y.0.dtype(), dtype);
        prop_assert_eq!(seen.dx.0.dtype(), dtype);
        prop_assert_eq!(seen.y.0.dims(), y[rank].dims(), "rank {}'s result", rank);
        prop_assert_eq!(bits(&seen.y.0), bits(&y[rank]), "rank {}'s result", rank);
        prop_assert_eq!(
            seen.dx.0.dims(),
            dx[rank].dims(),
            "rank {}'s gradient",
            rank
        );
        prop_assert_eq!(
            bits(&seen.dx.0),
            bits(&dx[rank]),
            "rank {}'s gradient",
            rank
        );
        prop_assert_eq!(
            bits(&seen.y.0),
            bits(&again.y.0),
            "rank {}'s second run",
            rank
        );
        prop_assert_eq!(
            bits(&seen.dx.0),
            bits(&again.dx.0),
            "rank {}'s second run",
            rank
        );
        let sent = [&seen.forward, &seen.backward].map(|e| (e.calls, e.messages, e.elements));
        prop_assert_eq!(sent, (expected.sends)(rank), "what rank {} sends", rank);
        for entry in [seen.forward, seen.backward] {
            prop_assert_eq!(entry.bytes, entry.elements * dtype.size() as u64);
        }
    }
    Ok(())
}

/// Blocks of a partition along `dim`, of otherwise the given shape.
fn blocks<const D: usize>(
    shape: [usize; D],
    dim: usize,
    partition: &Partition,
    dtype: DType,
) -> Vec<Tensor<D>> {
    (0..partition.ranks())
        .map(|rank| {
            let mut shape = shape;
            shape[dim] = partition.count(rank);
            random(shape, rank as u64, dtype)
        })
        .collect()
}

/// How many ranks other than `rank` hold anything.
fn others_with_any(partition: &Partition, rank: usize) -> u64 {
    (0..partition.ranks())
        .filter(|&peer| peer != rank && partition.count(peer) > 0)
        .count() as u64
}

/// To how many others `rank` speaks if it speaks to each.
fn to_each(ranks: usize, anything: usize) -> u64 {
    if anything > 0 { ranks as u64 - 1 } else { 0 }
}

proptest! {
    #![proptest_config(tries(40))]

    #[test]
    fn all_gather_is_the_concatenation_and_its_backward_the_sum_of_the_parts(
        (partition, dim) in (ranks(), 0usize..3).prop_flat_map(|(n, dim)| (partitions(n, 9), Just(dim))),
        mode in modes(),
        dtype in dtypes(),
    ) {
        let ranks = partition.ranks();
        let shape = [2, 3, 2];
        let unit = 12 / shape[dim];
        let sends = |rank: usize| {
            let Elements { forward, backward } = cost::all_gather(1, unit, 1, &partition, rank);
            let own = partition.count(rank);
            assert_eq!(forward, (unit * (ranks - 1) * own) as u64);
            assert_eq!(backward, (unit * (partition.length() - own)) as u64);
            [(1, to_each(ranks, own), forward), (1, others_with_any(&partition, rank), backward)]
        };
        let expected = Expected {
            forward: &|x| reference::all_gather(x, dim, &partition),
            backward: &|dy| reference::reduce_scatter(dy, dim, &partition),
            sends: &sends,
        };
        let blocks = blocks(shape, dim, &partition, dtype);
        let p = partition.clone();
        check(&blocks, mode, &expected, move |x, group| collective::all_gather(x, dim, &p, group))?;
    }

    #[test]
    fn reduce_scatter_is_each_ranks_part_of_the_sum_and_its_backward_the_concatenation(
        (partition, dim) in (ranks(), 0usize..3).prop_flat_map(|(n, dim)| (partitions(n, 9), Just(dim))),
        mode in modes(),
        dtype in dtypes(),
    ) {
        let ranks = partition.ranks();
        let mut shape = [2, 3, 2];
        let unit = 12 / shape[dim];
        shape[dim] = partition.length();
        let sends = |rank: usize| {
            let own = partition.count(rank);
            let forward = (unit * (partition.length() - own)) as u64;
            let backward = (unit * (ranks - 1) * own) as u64;
            [(1, others_with_any(&partition, rank), forward), (1, to_each(ranks, own), backward)]
        };
        let expected = Expected {
            forward: &|x| reference::reduce_scatter(x, dim, &partition),
            backward: &|dy| reference::all_gather(dy, dim, &partition),
            sends: &sends,
        };
        let blocks: Vec<_> = (0..ranks).map(|rank| random(shape, rank as u64, dtype)).collect();
        let p = partition.clone();
        check(&blocks, mode, &expected, move |x, group| collective::reduce_scatter(x, dim, &p, group))?;
    }

    #[test]
    fn all_to_all_moves_the_split_to_another_dim_and_its_backward_moves_it_back(
        (from, to) in ranks().prop_flat_map(|n| (partitions(n, 7), partitions(n, 7))),
        dims in prop::sample::select(vec![(0usize, 1usize), (1, 0), (0, 2), (2, 0), (1, 3), (3, 1), (2, 3)]),
        mode in modes(),
        dtype in dtypes(),
    ) {
        let (from_dim, to_dim) = dims;
        let mut shape = [2, 1, 3, 2];
        let unit = 12 / (shape[from_dim] * shape[to_dim]);
        shape[to_dim] = to.length();
        let sends = |rank: usize| {
            let Elements { forward, backward } = cost::switch(1, unit, 1, &from, &to, rank);
            let (a, b) = (from.count(rank), to.count(rank));
            assert_eq!(forward, (unit * a * (to.length() - b)) as u64);
            assert_eq!(backward, (unit * b * (from.length() - a)) as u64);
            let messages = |held: usize, wanted: &Partition| match held {
                0 => 0,
                _ => others_with_any(wanted, rank),
            };
            [(1, messages(a, &to), forward), (1, messages(b, &from), backward)]
        };
        let expected = Expected {
            forward: &|x| reference::all_to_all(x, (from_dim, &from), (to_dim, &to)),
            backward: &|dy| reference::all_to_all(dy, (to_dim, &to), (from_dim, &from)),
            sends: &sends,
        };
        let blocks = blocks(shape, from_dim, &from, dtype);
        let (f, t) = (from.clone(), to.clone());
        check(&blocks, mode, &expected, move |x, group| {
            collective::all_to_all(x, (from_dim, &f), (to_dim, &t), group)
        })?;
    }

    #[test]
    fn all_reduce_is_the_sum_on_every_rank_forward_and_backward(
        ranks in ranks(),
        length in 1usize..8,
        mode in modes(),
        dtype in dtypes(),
    ) {
        let shape = [length, 1, 3];
        let count = 3 * length;
        let sends = |rank: usize| {
            let Elements { forward, backward } = cost::all_reduce(count, ranks, rank);
            let chunks = Partition::balanced(count, ranks);
            let own = chunks.count(rank);
            assert_eq!(forward, ((count - own) + (ranks - 1) * own) as u64);
            let messages = others_with_any(&chunks, rank) + to_each(ranks, own);
            [(1, messages, forward), (1, messages, backward)]
        };
        let expected = Expected {
            forward: &reference::all_reduce,
            backward: &reference::all_reduce,
            sends: &sends,
        };
        let blocks: Vec<_> = (0..ranks).map(|rank| random(shape, rank as u64, dtype)).collect();
        check(&blocks, mode, &expected, collective::all_reduce)?;
    }

    #[test]
    fn broadcast_is_the_roots_tensor_and_its_backward_the_sum_at_the_root(
        (ranks, root) in ranks().prop_flat_map(|n| (Just(n), 0..n)),
        length in 1usize..5,
        mode in modes(),
        dtype in dtypes(),
    ) {
        let shape = [length, 2];
        let count = 2 * length as u64;
        let sends = |rank: usize| {
            let others = ranks as u64 - 1;
            if rank == root {
                [(1, others, others * count), (1, 0, 0)]
            } else {
                [(1, 0, 0), (1, 1, count)]
            }
        };
        let transposed = |dy: &[Tensor<2>]| -> Vec<Tensor<2>> {
            (0..ranks)
                .map(|rank| match rank == root {
                    true => reference::sum(dy),
                    false => dy[rank].zeros_like(),
                })
                .collect()
        };
        let expected = Expected {
            forward: &|x| reference::broadcast(x, root),
            backward: &transposed,
            sends: &sends,
        };
        let blocks: Vec<_> = (0..ranks).map(|rank| random(shape, rank as u64, dtype)).collect();
        // Under checkpointing the ranks that are not the root get -0 for their zeros.
        let mode = if mode == Mode::Checkpointed { Mode::Leaf } else { mode };
        check(&blocks, mode, &expected, move |x, group| collective::broadcast(x, root, group))?;
    }

    #[test]
    fn ring_shift_hands_each_block_on_and_its_backward_hands_it_back(
        partition in ranks().prop_flat_map(|n| partitions(n, 9)),
        steps in -6isize..=6,
        mode in modes(),
        dtype in dtypes(),
    ) {
        let ranks = partition.ranks();
        let moves = steps.rem_euclid(ranks as isize) != 0;
        let sends = |rank: usize| {
            let origin = (rank as isize - steps).rem_euclid(ranks as isize) as usize;
            [rank, origin].map(|held| match partition.count(held) {
                count if moves && count > 0 => (1, 1, 6 * count as u64),
                _ => (1, 0, 0),
            })
        };
        let expected = Expected {
            forward: &|x| reference::ring_shift(x, steps),
            backward: &|dy| reference::ring_shift(dy, -steps),
            sends: &sends,
        };
        let blocks = blocks([2, 1, 3], 1, &partition, dtype);
        let p = partition.clone();
        check(&blocks, mode, &expected, move |x, group| {
            collective::ring_shift(x, 1, &p, steps, group)
        })?;
    }
}

// --- any exchange, and relayout, against an oracle that knows single elements only -----------------------

/// The flat positions of `[s1, s2, s3]` that each rank holds, in its local order.
fn held(layout: &Layout, rank: usize) -> Vec<usize> {
    let [_, b, c] = layout.lengths();
    let positions = SeqAxis::ALL
        .map(|axis| -> Vec<usize> { layout.ranges(axis, rank).into_iter().flatten().collect() });
    let mut flat = Vec::new();
    for &i in &positions[0] {
        for &j in &positions[1] {
            for &k in &positions[2] {
                flat.push((i * b + j) * c + k);
            }
        }
    }
    flat
}

/// What each rank must hold of `to`, and of the transpose, if rank `r` holds `given[r]` of `from`: sums in
/// rank order over the ranks that hold a position.
fn moved(from: &Layout, to: &Layout, given: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let ranks = given.len();
    let holders: Vec<_> = (0..ranks).map(|rank| held(from, rank)).collect();
    (0..ranks)
        .map(|rank| {
            let wanted = held(to, rank);
            let mut result = Vec::new();
            for position in wanted {
                for channel in 0..CHANNELS {
                    let mut terms = (0..ranks).filter_map(|source| {
                        let local = holders[source].iter().position(|&p| p == position)?;
                        Some(given[source][local * CHANNELS + channel])
                    });
                    let first = terms.next().unwrap_or(0.0);
                    result.push(terms.fold(first, |sum, term| sum + term));
                }
            }
            result
        })
        .collect()
}

/// What a rank has of `to` of its own: zeros where it held nothing.
fn kept(from: &Layout, to: &Layout, rank: usize, given: &[f64]) -> Vec<f64> {
    let own = held(from, rank);
    (held(to, rank).into_iter())
        .flat_map(|position| {
            let local = own.iter().position(|&p| p == position);
            (0..CHANNELS).map(move |c| local.map_or(0.0, |local| given[local * CHANNELS + c]))
        })
        .collect()
}

const CHANNELS: usize = 2;

/// A rank's terms of `layout`: random where they are partial sums, else the global tensor's values.
fn local_values(layout: &Layout, rank: usize) -> Vec<f64> {
    let seed = match layout.value() {
        Value::Complete => 7,
        Value::Partial => 70 + rank as u64,
    };
    held(layout, rank)
        .into_iter()
        .flat_map(|p| (0..CHANNELS).map(move |c| noise(seed, p * CHANNELS + c)))
        .collect()
}

fn local_shape(layout: &Layout, rank: usize) -> [usize; 5] {
    let [a, b, c] = layout.local_lengths(rank);
    [1, a, b, c, CHANNELS]
}

fn tensor(values: Vec<f64>, shape: [usize; 5], device: &Device) -> Tensor<5> {
    let data = burn::tensor::TensorData::new(values, shape);
    Tensor::from_data(data, (device, DType::F64))
}

/// The collective that leads from one layout to another, as the table in the documentation has it.
#[derive(Debug, PartialEq)]
enum Path {
    Nothing,
    Local,
    Exchange(Collective, Collective),
    None,
}

fn path(from: &Layout, to: &Layout, ranks: usize) -> Path {
    let whole = |layout: &Layout| layout.split_axis().is_none();
    if from == to {
        return Path::Nothing;
    }
    match (from.value(), to.value(), whole(from), whole(to)) {
        (Value::Complete, Value::Complete, true, _) => Path::Local,
        (Value::Complete, Value::Complete, _, _) if from.replicas(ranks) != 1 => Path::None,
        (Value::Complete, Value::Complete, false, true) => {
            Path::Exchange(Collective::AllGather, Collective::ReduceScatter)
        }
        (Value::Complete, Value::Complete, false, false) => {
            Path::Exchange(Collective::AllToAll, Collective::AllToAll)
        }
        (Value::Partial, Value::Complete, true, true) => {
            Path::Exchange(Collective::AllReduce, Collective::AllReduce)
        }
        (Value::Partial, Value::Complete, true, false) => {
            Path::Exchange(Collective::ReduceScatter, Collective::AllGather)
        }
        _ => Path::None,
    }
}

/// Every layout worth telling apart on this many ranks: whole, each axis split in two ways, two axes split
/// over a mesh, one axis split over a mesh's rows only, and partial sums.
fn layouts(lengths: [usize; 3], ranks: usize) -> Vec<Layout> {
    let whole = Layout::whole(lengths);
    let over = MeshAxis::whole(ranks);
    let mut all = vec![whole.clone(), whole.clone().with_value(Value::Partial)];
    for axis in SeqAxis::ALL {
        let length = lengths[axis.index()];
        for partition in [
            Partition::balanced(length, ranks),
            Partition::zigzag(length, ranks),
        ] {
            all.push(whole.clone().with_split(axis, partition, over).unwrap());
        }
    }
    if ranks == 4 {
        let rows = MeshAxis { stride: 1, size: 2 };
        let columns = MeshAxis { stride: 2, size: 2 };
        let split = |layout: Layout, axis: SeqAxis, over| {
            let partition = Partition::balanced(lengths[axis.index()], 2);
            layout.with_split(axis, partition, over).unwrap()
        };
        let row = split(whole.clone(), SeqAxis::FIRST, rows);
        all.push(split(row.clone(), SeqAxis::SECOND, columns));
        let column = split(whole.clone(), SeqAxis::THIRD, rows);
        all.push(split(column, SeqAxis::FIRST, columns));
        all.push(row);
    }
    all
}

proptest! {
    #![proptest_config(tries(10))]

    #[test]
    fn relayout_leads_from_every_layout_to_every_other_or_says_that_nothing_does(
        ranks in ranks(),
        lengths in [1usize..6, 1usize..6, 1usize..4],
    ) {
        let layouts = Arc::new(layouts(lengths, ranks));
        let pairs: Vec<(usize, usize)> = (0..layouts.len())
            .flat_map(|from| (0..layouts.len()).map(move |to| (from, to)))
            .collect();
        let (all, list) = (layouts.clone(), pairs.clone());
        let seen = launch(ranks, move |group| -> Result<_, Error> {
            let device = device(DType::F64).autodiff();
            let rank = group.rank();
            let mut seen = Vec::new();
            for &(from, to) in &list {
                let (from, to) = (&all[from], &all[to]);
                let x = tensor(local_values(from, rank), local_shape(from, rank), &device).require_grad();
                group.ledger().take();
                match relayout(Shard::new(x.clone(), from.clone(), rank)?, to, &group) {
                    Ok(y) => {
                        assert_eq!(y.layout(), to);
                        let dy: Vec<f64> = (0..y.tensor().shape().num_elements())
                            .map(|index| noise(900 + rank as u64, index))
                            .collect();
                        let dy = tensor(dy, local_shape(to, rank), &device);
                        let gradients = (y.tensor().clone() * dy).sum().backward();
                        let dx = x.grad(&gradients).unwrap();
                        let y = y.into_tensor().inner();
                        seen.push(Ok((Held(y), Held(dx), group.ledger().read())));
                    }
                    Err(error) => seen.push(Err(error.to_string())),
                }
            }
            Ok(seen)
        })
        .unwrap();

        for (index, &(from, to)) in pairs.iter().enumerate() {
            let (from, to) = (&layouts[from], &layouts[to]);
            let path = path(from, to, ranks);
            let given: Vec<_> = (0..ranks).map(|rank| local_values(from, rank)).collect();
            let cotangent = |rank: usize| -> Vec<f64> {
                (0..held(to, rank).len() * CHANNELS)
                    .map(|index| noise(900 + rank as u64, index))
                    .collect()
            };
            let dy: Vec<_> = (0..ranks).map(cotangent).collect();
            for (rank, seen) in seen.iter().enumerate() {
                match (&seen[index], &path) {
                    (Err(error), Path::None) => {
                        let said = LayoutError::NoPath { from: from.clone().into(), to: to.clone().into() };
                        prop_assert_eq!(error, &Error::Layout(said).to_string());
                    }
                    (Ok((Held(y), Held(dx), traffic)), path) if *path != Path::None => {
                        // Where nothing is sent, a rank's own terms are all: backward, the ranks' gradients
                        // are terms of a sum.
                        let (expected_y, expected_dx) = match path {
                            Path::Exchange(..) => (
                                moved(from, to, &given)[rank].clone(),
                                moved(to, from, &dy)[rank].clone(),
                            ),
                            _ => (kept(from, to, rank, &given[rank]), kept(to, from, rank, &dy[rank])),
                        };
                        prop_assert_eq!(values(y), expected_y, "{} to {}", from, to);
                        prop_assert_eq!(values(dx), expected_dx, "gradient of {} to {}", from, to);
                        let entries: Vec<_> = traffic.iter().map(|(phase, kind, _)| (phase, kind)).collect();
                        let expected: Vec<_> = match path {
                            Path::Exchange(forward, backward) => {
                                vec![(Phase::Forward, *forward), (Phase::Backward, *backward)]
                            }
                            _ => vec![],
                        };
                        prop_assert_eq!(entries, expected, "{} to {}", from, to);
                    }
                    (Ok(_), _) => prop_assert!(false, "{from} to {to} has no path and was found"),
                    (Err(error), _) => prop_assert!(false, "{from} to {to}: {error}"),
                }
            }
        }
    }
}

/// Any ranges of a dim for each rank: they may overlap, repeat between ranks, and leave gaps.
fn any_blocks(ranks: usize, length: usize) -> impl Strategy<Value = Vec<Vec<bool>>> {
    prop::collection::vec(prop::collection::vec(any::<bool>(), length), ranks)
}

fn dim_blocks(holds: &[Vec<bool>]) -> DimBlocks {
    let ranges = holds.iter().map(|holds| {
        let held = holds.iter().enumerate().filter(|&(_, &held)| held);
        held.map(|(position, _)| position..position + 1).collect()
    });
    DimBlocks::from_ranges(holds[0].len(), ranges.collect())
}

/// `[2, rows, 1, columns, 1]` of which rank `r` holds some rows and some columns.
fn held_boxes(
    rows: &[Vec<bool>],
    columns: &[Vec<bool>],
    rank: usize,
) -> Vec<(usize, usize, usize)> {
    let chosen =
        |holds: &[bool]| -> Vec<usize> { (0..holds.len()).filter(|&index| holds[index]).collect() };
    let (rows, columns) = (chosen(&rows[rank]), chosen(&columns[rank]));
    (0..2)
        .flat_map(|sample| {
            let columns = &columns;
            rows.iter()
                .flat_map(move |&row| columns.iter().map(move |&column| (sample, row, column)))
        })
        .collect()
}

type Holds = [Vec<Vec<bool>>; 2];

/// The sum in rank order of all that is held of each wanted element.
fn summed(from: &Holds, to: &Holds, given: &[Vec<f64>], rank: usize) -> Vec<f64> {
    let ranks = given.len();
    let sources: Vec<_> = (0..ranks)
        .map(|r| held_boxes(&from[0], &from[1], r))
        .collect();
    (held_boxes(&to[0], &to[1], rank).iter())
        .map(|wanted| {
            let mut terms = (0..ranks).filter_map(|source| {
                let local = sources[source].iter().position(|held| held == wanted)?;
                Some(given[source][local])
            });
            let first = terms.next().unwrap_or(0.0);
            terms.fold(first, |sum, term| sum + term)
        })
        .collect()
}

/// Elements and messages that `rank` sends to others.
fn delivered(from: &Holds, to: &Holds, rank: usize) -> (u64, u64) {
    let own = held_boxes(&from[0], &from[1], rank);
    let counts: Vec<u64> = (0..from[0].len())
        .filter(|&peer| peer != rank)
        .map(|peer| {
            let wanted = held_boxes(&to[0], &to[1], peer);
            own.iter().filter(|held| wanted.contains(held)).count() as u64
        })
        .collect();
    (
        counts.iter().filter(|&&count| count > 0).count() as u64,
        counts.iter().sum(),
    )
}

proptest! {
    #![proptest_config(tries(60))]

    #[test]
    fn exchange_sums_in_rank_order_whatever_the_ranks_hold_and_want(
        (before, after) in (ranks(), 1usize..5, 1usize..4).prop_flat_map(|(n, rows, columns)| {
            let holds = || [any_blocks(n, rows), any_blocks(n, columns)];
            (holds(), holds())
        }),
        reversed in any::<bool>(),
    ) {
        let ranks = before[0].len();
        let blocks = |holds: &Holds| {
            let shape = [2, holds[0][0].len(), 1, holds[1][0].len(), 1];
            let whole = Blocks::replicated(shape, ranks).with_dim(1, dim_blocks(&holds[0]));
            Arc::new(whole.with_dim(3, dim_blocks(&holds[1])))
        };
        let (from, to) = (blocks(&before), blocks(&after));
        let noise_of = |blocks: &Blocks, rank: usize, seed: u64| -> Vec<f64> {
            let count = blocks.local_shape(rank).iter().product();
            (0..count).map(|index| noise(seed + rank as u64, index)).collect()
        };
        let given: Vec<_> = (0..ranks).map(|rank| noise_of(&from, rank, 1)).collect();
        let dy: Vec<_> = (0..ranks).map(|rank| noise_of(&to, rank, 50)).collect();
        let (x, c, f, t) = (given.clone(), dy.clone(), from.clone(), to.clone());
        let seen = launch(ranks, move |group| -> Result<_, CommError> {
            let device = device(DType::F64).autodiff();
            let rank = group.rank();
            let mut x = tensor(x[rank].clone(), f.local_shape(rank), &device);
            if reversed {
                // The same values behind other strides.
                x = x.permute([4, 3, 2, 1, 0]);
                x = Tensor::from_data(x.to_data(), (&device, DType::F64)).permute([4, 3, 2, 1, 0]);
            }
            let x = x.require_grad();
            let kind = Collective::AllToAll;
            let y = collective::exchange(x.clone(), f.clone(), t.clone(), kind, kind, &group)?;
            let dy = tensor(c[rank].clone(), t.local_shape(rank), &device);
            let gradients = (y.clone() * dy).sum().backward();
            let traffic = group.ledger().read();
            Ok((Held(y.inner()), Held(x.grad(&gradients).unwrap()), traffic))
        })
        .unwrap();
        for (rank, (Held(y), Held(dx), traffic)) in seen.iter().enumerate() {
            prop_assert_eq!(y.dims(), to.local_shape(rank));
            prop_assert_eq!(values(y), summed(&before, &after, &given, rank));
            prop_assert_eq!(dx.dims(), from.local_shape(rank));
            prop_assert_eq!(values(dx), summed(&after, &before, &dy, rank));
            let sent = |phase| {
                let entry = traffic.phase(phase);
                (entry.messages, entry.elements)
            };
            prop_assert_eq!(sent(Phase::Forward), delivered(&before, &after, rank));
            prop_assert_eq!(sent(Phase::Backward), delivered(&after, &before, rank));
        }
    }
}

// --- single cases ----------------------------------------------------------------------------------------

#[test]
fn an_axis_of_length_zero_goes_through_every_collective() {
    let partition = Partition::balanced(0, 3);
    let shapes = launch(3, move |group| -> Result<_, CommError> {
        let device = device(DType::F32).autodiff();
        let x = Tensor::<3>::zeros([2, 0, 3], &device).require_grad();
        let gathered = collective::all_gather(x.clone(), 1, &partition, &group)?;
        let scattered = collective::reduce_scatter(gathered, 1, &partition, &group)?;
        let reduced = collective::all_reduce(scattered, &group)?;
        let copied = collective::broadcast(reduced, 1, &group)?;
        let shifted = collective::ring_shift(copied, 1, &partition, 1, &group)?;
        let other = Partition::balanced(3, 3);
        let moved = collective::all_to_all(shifted, (1, &partition), (2, &other), &group)?;
        let gradients = moved.clone().sum().backward();
        Ok((moved.dims(), x.grad(&gradients).unwrap().dims()))
    });
    assert_eq!(shapes.unwrap(), [([2, 0, 1], [2, 0, 3]); 3]);
}

#[test]
fn untracked_tensors_stay_untracked_with_and_without_an_autodiff_device() {
    launch(2, |group| -> Result<(), CommError> {
        let partition = Partition::balanced(3, 2);
        for device in [device(DType::F32), device(DType::F32).autodiff()] {
            let x = Tensor::<1>::zeros([partition.count(group.rank())], &device);
            let y = collective::all_gather(x.clone(), 0, &partition, &group)?;
            assert!(!y.is_tracked());
            assert_eq!(y.is_autodiff(), x.is_autodiff());
            assert_eq!(y.device(), device);
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn ranks_on_different_devices_get_what_they_need_where_they_are() {
    // Where no GPU's backend is compiled in, both are the processor. Only threads have more than one kind.
    let seen = dsp_core::launch(2, |group| -> Result<_, CommError> {
        let own = match group.rank() {
            0 => Device::flex(),
            _ => device(DType::F32),
        };
        let partition = Partition::balanced(4, 2);
        let block = random([2, 2], group.rank() as u64, DType::F32);
        let x = leaf(&block, &own.clone().autodiff());
        let whole = collective::all_gather(x.clone(), 0, &partition, &group)?;
        let sum = collective::all_reduce(whole.clone(), &group)?;
        let gradients = (sum.clone() * sum.clone()).sum().backward();
        let gradient = x.grad(&gradients).unwrap();
        for device in [whole.device(), sum.device(), gradient.device()] {
            assert_eq!(device, own);
        }
        Ok([values(&whole), values(&sum), values(&gradient)])
    })
    .unwrap();
    let blocks = [0, 1].map(|seed| random([2, 2], seed, DType::F32));
    let whole: Vec<f64> = blocks.iter().flat_map(values).collect();
    for (rank, [of_gather, of_sum, gradient]) in seen.iter().enumerate() {
        assert_eq!(of_gather, &whole);
        let doubled: Vec<f64> = whole.iter().map(|x| 2.0 * x).collect();
        assert_eq!(of_sum, &doubled);
        // Four times 2·(2x): each of two ranks sums the squares of what each of two ranks gathered.
        let expected = values(&blocks[rank]).into_iter().map(|x| 16.0 * x);
        assert_eq!(gradient, &expected.collect::<Vec<_>>());
    }
}

#[test]
fn a_loss_after_a_gather_and_an_all_reduced_loss_on_every_rank_count_once_for_each_rank() {
    // What is differentiated is the sum of the ranks' losses, so that N equal losses count N times; it is
    // `Loss::OfWhole` that divides.
    let gradients = launch(3, |group| -> Result<_, CommError> {
        let device = device(DType::F32).autodiff();
        let partition = Partition::balanced(3, 3);
        let x = Tensor::<1>::ones([1], &device).require_grad();
        let whole = collective::all_gather(x.clone(), 0, &partition, &group)?;
        let of_whole = x
            .grad(&whole.sum().backward())
            .unwrap()
            .into_scalar::<f32>();
        let x = Tensor::<1>::ones([1], &device).require_grad();
        let sum = collective::all_reduce(x.clone(), &group)?;
        let of_sum = x.grad(&sum.backward()).unwrap().into_scalar::<f32>();
        Ok([of_whole, of_sum])
    });
    assert_eq!(gradients.unwrap(), [[3.0, 3.0]; 3]);
}

#[test]
fn all_reduce_in_books_its_phase_and_sums_like_all_reduce() {
    launch(3, |group| -> Result<(), CommError> {
        let x = random([2, 5], group.rank() as u64, DType::F64).to_device(&device(DType::F64));
        let all: Vec<_> = (0..3)
            .map(|rank| random([2, 5], rank, DType::F64))
            .collect();
        let sum = all_reduce_in(x, Phase::Gradients, &group)?;
        assert_eq!(bits(&sum), bits(&reference::sum(&all)));
        let traffic = group.ledger().read();
        let sent = traffic.phase(Phase::Gradients);
        assert_eq!(sent.elements, cost::all_reduce(10, 3, group.rank()).forward);
        assert_eq!(sent.bytes, 8 * sent.elements);
        assert_eq!(traffic.iter().count(), 1);
        Ok(())
    })
    .unwrap();
}

#[test]
fn rows_and_columns_of_a_mesh_run_their_own_collectives_side_by_side() {
    for (u, r) in [(2, 2), (2, 3), (3, 2)] {
        let ranks = u * r;
        let rows = MeshAxis { stride: 1, size: u };
        let columns = MeshAxis { stride: u, size: r };
        let block = |rank: usize| random([2, 3], rank as u64, DType::F64);
        let seen = launch(ranks, move |group| -> Result<_, CommError> {
            let device = device(DType::F64).autodiff();
            let row = group.along(rows)?;
            let column = group.along(columns)?;
            assert_eq!(row.rank(), rows.coordinate(group.rank()));
            assert_eq!(column.rank(), columns.coordinate(group.rank()));
            let x = leaf(&block(group.rank()), &device);
            // Gather along the row, then sum along the column; the rows are at different calls at one time.
            let partition = Partition::balanced(3 * u, u);
            let gathered = collective::all_gather(x.clone(), 1, &partition, &row)?;
            let sum = collective::all_reduce(gathered, &column)?;
            let weight = random(sum.dims(), 500 + group.rank() as u64, DType::F64);
            let weight = Tensor::from_data(weight.to_data(), (&device, DType::F64));
            let gradients = (sum.clone() * weight).sum().backward();
            Ok((Held(sum.inner()), Held(x.grad(&gradients).unwrap())))
        })
        .unwrap();
        let partition = Partition::balanced(3 * u, u);
        let weight = |rank: usize| random([2, 3 * u], 500 + rank as u64, DType::F64);
        for (rank, (Held(sum), Held(gradient))) in seen.iter().enumerate() {
            let gathered = |rank: usize| {
                let blocks: Vec<_> = rows.members(rank).into_iter().map(block).collect();
                reference::all_gather(&blocks, 1, &partition)[0].clone()
            };
            let terms: Vec<_> = columns.members(rank).into_iter().map(gathered).collect();
            assert_eq!(
                bits(sum),
                bits(&reference::sum(&terms)),
                "{u}x{r}, rank {rank}"
            );
            let summed = |rank: usize| {
                let weights: Vec<_> = columns.members(rank).into_iter().map(weight).collect();
                reference::sum(&weights)
            };
            let weights: Vec<_> = rows.members(rank).into_iter().map(summed).collect();
            let parts = reference::reduce_scatter(&weights, 1, &partition);
            let own = &parts[rows.coordinate(rank)];
            assert_eq!(
                bits(gradient),
                bits(own),
                "{u}x{r}, gradient of rank {rank}"
            );
        }
    }
}

#[test]
fn two_groups_of_the_same_ranks_do_not_mix_whatever_the_order_of_waiting() {
    launch(3, |group| -> Result<(), CommError> {
        if group.rank() == 1 {
            return Ok(());
        }
        let pair = [0, 2];
        let first = group.subgroup(&pair)?;
        let second = group.subgroup(&pair)?;
        let inner = first.subgroup(&[0, 1])?;
        let partition = Partition::balanced(2, 2);
        let request = |group: &Group, value: f64| Request {
            collective: Collective::AllGather,
            phase: Phase::Outside,
            tracking: Tracking::Untracked,
            tensor: Tensor::<5>::full([1, 1, 1, 1, 1], value, &device(DType::F32)),
            before: Arc::new(
                Blocks::replicated([1, 2, 1, 1, 1], group.size())
                    .with_dim(1, DimBlocks::split(&partition)),
            ),
            after: Arc::new(Blocks::replicated([1, 2, 1, 1, 1], group.size())),
            step: Step::First,
            answers: None,
        };
        let own = group.rank() as f64;
        let flights = [(&first, 10.0), (&second, 20.0), (&inner, 30.0)]
            .map(|(group, base)| group.start(request(group, base + own)));
        let mut order: Vec<_> = flights.into_iter().zip([10.0, 20.0, 30.0]).collect();
        if group.rank() == 0 {
            order.reverse();
        }
        for (flight, base) in order {
            assert_eq!(values(&flight?.wait()?), [base, base + 2.0]);
        }
        // In reverse: rank 2 is the first of this group.
        let backwards = group.subgroup(&[2, 0])?;
        let gathered = backwards.exchange(request(&backwards, own))?;
        assert_eq!(values(&gathered), [2.0, 0.0]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_subgroup_without_its_caller_with_a_repeated_or_with_an_unknown_rank_is_refused() {
    launch(3, |group| -> Result<(), CommError> {
        let other = (group.rank() + 1) % 3;
        for (members, rule) in [
            (vec![other], "the rank that asks must be a member"),
            (
                vec![group.rank(), group.rank()],
                "each member may be named once",
            ),
            (
                vec![group.rank(), 3],
                "each member must be a rank of the group",
            ),
        ] {
            let error = group.subgroup(&members).unwrap_err();
            let expected = CommError::Members {
                rank: group.rank(),
                size: 3,
                members,
                rule: rule.into(),
            };
            assert_eq!(error, expected);
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_mesh_axis_of_no_rank_or_whose_ranks_do_not_stand_apart_is_refused() {
    for (stride, size) in [(1, 0), (0, 2), (0, 0)] {
        let axis = MeshAxis { stride, size };
        let error = Group::alone().along(axis).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "rank 0 of 1 asked for a sub-group of []: a mesh axis of {size} rank(s) that stand {stride} apart has no \
                 members; both must be at least 1"
            )
        );
    }
}

/// Blocks of ranks that are not there would be zeros, and ranks without a block nobody's.
#[test]
fn blocks_of_another_number_of_ranks_than_the_group_has_are_refused_on_every_rank() {
    for (ranks, of_blocks) in [(1, 2), (2, 4), (2, 1), (3, 2), (4, 5)] {
        type Call = fn(&Partition, &Group) -> Result<(), CommError>;
        let gather: Call = |own, group| {
            let x = Tensor::<2>::zeros([2, 2], &Device::flex());
            collective::all_gather(x, 1, own, group).map(|_| ())
        };
        let scatter: Call = |own, group| {
            let x = Tensor::<2>::zeros([2, 8], &Device::flex());
            collective::reduce_scatter(x, 1, own, group).map(|_| ())
        };
        let switch: Call = |own, group| {
            let right = Partition::balanced(8, group.size());
            let x = Tensor::<2>::zeros([8, 8 / group.size()], &Device::flex());
            collective::all_to_all(x, (1, &right), (0, own), group).map(|_| ())
        };
        let shift: Call = |own, group| {
            let x = Tensor::<2>::zeros([2, 2], &Device::flex());
            collective::ring_shift(x, 1, own, 1, group).map(|_| ())
        };
        for call in [gather, scatter, switch, shift] {
            let error = launch(ranks, move |group| {
                call(&Partition::balanced(8, of_blocks), &group)
            });
            let CommError::Ranks {
                ranks: named, size, ..
            } = error.unwrap_err().root
            else {
                panic!("{ranks} ranks, blocks of {of_blocks}");
            };
            assert_eq!((named, size), (of_blocks, ranks));
        }
    }
}

#[test]
fn a_layout_over_ranks_of_which_the_group_does_not_consist_leads_nowhere() {
    let first = SeqAxis::FIRST;
    let over = |stride, size| {
        let partition = Partition::balanced(6, size);
        Layout::whole([6, 1, 1]).with_split(first, partition, MeshAxis { stride, size })
    };
    for (ranks, over) in [(3, over(1, 2)), (2, over(2, 2)), (4, over(4, 2))] {
        let layout = over.unwrap();
        launch(ranks, move |group| -> Result<(), Error> {
            let held = layout.local_lengths(group.rank())[0];
            let x = Tensor::zeros([1, held, 1, 1, 1], &Device::flex());
            let x = Shard::new(x, layout.clone(), group.rank())?;
            let error = relayout(x, &Layout::whole([6, 1, 1]), &group).unwrap_err();
            assert!(
                matches!(error, Error::Layout(LayoutError::GroupSize { axis, .. }) if axis == first),
                "{error}"
            );
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_senders_later_changes_in_place_do_not_reach_its_peers() {
    let barrier = Arc::new(Barrier::new(2));
    dsp_core::launch(2, move |group| -> Result<(), CommError> {
        let partition = Partition::balanced(2, 2);
        let shape = [1, 2, 1, 1, 4];
        let whole = Blocks::replicated(shape, 2);
        let kept = Tensor::<5>::ones([1, 1, 1, 1, 4], &device(DType::F32));
        let flight = group.start(Request {
            collective: Collective::AllGather,
            phase: Phase::Outside,
            tracking: Tracking::Untracked,
            tensor: kept.clone(),
            before: Arc::new(whole.clone().with_dim(1, DimBlocks::split(&partition))),
            after: Arc::new(whole),
            step: Step::First,
            answers: None,
        })?;
        // Burn works in place where nobody shares the values; the posted handle shares them.
        let changed = kept
            .mul_scalar(100.0)
            .slice_fill(burn::tensor::s![.., .., .., .., 0..1], -1.0);
        barrier.wait();
        let gathered = flight.wait()?;
        assert_eq!(values(&gathered), [1.0; 8]);
        assert_eq!(values(&changed), [-1.0, 100.0, 100.0, 100.0]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_receivers_changes_in_place_do_not_reach_the_sender() {
    let barrier = Arc::new(Barrier::new(2));
    dsp_core::launch(2, move |group| -> Result<(), CommError> {
        // A broadcast hands the root's own tensor on without a copy.
        let x = Tensor::<1>::full([4], group.rank() as f64, &device(DType::F32));
        let y = collective::broadcast(x.clone(), 0, &group)?;
        assert_eq!(values(&y), [0.0; 4]);
        let changed = y.add_scalar(5.0 + group.rank() as f64);
        barrier.wait();
        assert_eq!(values(&x), [group.rank() as f64; 4]);
        assert_eq!(values(&changed), [5.0 + group.rank() as f64; 4]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn what_was_started_as_a_rank_runs_as_one() {
    let told = |name| std::env::var_os(name).is_some();
    let by_mpirun = cfg!(feature = "mpi") && told("OMPI_COMM_WORLD_SIZE");
    let as_a_rank = cfg!(feature = "nccl") && told("RANK");
    assert_eq!(
        matches!(engine(1), Engine::Threads),
        !by_mpirun && !as_a_rank
    );
}

#[test]
fn half_precision_moves_bit_for_bit_and_sums_in_rank_order() {
    for dtype in [DType::F16, DType::BF16] {
        for ranks in 1..=4 {
            let seen = launch(ranks, move |group| -> Result<_, CommError> {
                let partition = Partition::zigzag(7, group.size());
                let shape = [3, partition.count(group.rank())];
                let own = random(shape, group.rank() as u64, dtype).to_device(&device(dtype));
                let gathered = collective::all_gather(own, 1, &partition, &group)?;
                let sum =
                    collective::all_reduce(gathered.clone() * (1.0 + group.rank() as f64), &group)?;
                let part = collective::reduce_scatter(gathered.clone(), 1, &partition, &group)?;
                Ok((Held(gathered), Held(sum), Held(part)))
            })
            .unwrap();
            let partition = Partition::zigzag(7, ranks);
            let blocks: Vec<_> = (0..ranks)
                .map(|rank| random([3, partition.count(rank)], rank as u64, dtype))
                .collect();
            let whole = &reference::all_gather(&blocks, 1, &partition)[0];
            let terms: Vec<_> = (0..ranks)
                .map(|rank| whole.clone() * (1.0 + rank as f64))
                .collect();
            let sum = reference::sum(&terms);
            let parts = reference::reduce_scatter(&vec![whole.clone(); ranks], 1, &partition);
            for ((Held(gathered), Held(summed), Held(part)), own) in seen.iter().zip(&parts) {
                assert_eq!(gathered.dtype(), dtype);
                assert_eq!(bits(gathered), bits(whole));
                assert_eq!(bits(summed), bits(&sum));
                assert_eq!(bits(part), bits(own));
            }
        }
    }
}

/// Runs that are long enough to go straight from memory to memory, strided and not, and sums of them.
#[test]
fn large_blocks_are_moved_and_summed_like_small_ones() {
    let (rows, columns, width) = (6, 10, 9000);
    for ranks in 1..=4 {
        for reversed in [false, true] {
            let seen = launch(ranks, move |group| -> Result<_, CommError> {
                let row = Partition::balanced(rows, group.size());
                let column = Partition::balanced(columns, group.size());
                let shape = [row.count(group.rank()), columns, width];
                let device = device(DType::F64);
                let x = random(shape, group.rank() as u64, DType::F64);
                let x = match reversed {
                    false => x.to_device(&device),
                    true => {
                        let permuted = x.permute([2, 1, 0]).to_data();
                        Tensor::from_data(permuted, (&device, DType::F64)).permute([2, 1, 0])
                    }
                };
                let moved = collective::all_to_all(x.clone(), (0, &row), (1, &column), &group)?;
                let back = collective::all_to_all(moved.clone(), (1, &column), (0, &row), &group)?;
                let whole = collective::all_gather(x, 0, &row, &group)?;
                let part = collective::reduce_scatter(whole, 0, &row, &group)?;
                let digest = |x: &Tensor<3>| {
                    let weights = values(&random(x.dims(), 5, DType::F64));
                    (values(x).iter().zip(weights))
                        .map(|(x, w)| x * w)
                        .sum::<f64>()
                };
                Ok([digest(&moved), digest(&back), digest(&part)])
            })
            .unwrap();
            let row = Partition::balanced(rows, ranks);
            let column = Partition::balanced(columns, ranks);
            let blocks: Vec<_> = (0..ranks)
                .map(|rank| random([row.count(rank), columns, width], rank as u64, DType::F64))
                .collect();
            let moved = reference::all_to_all(&blocks, (0, &row), (1, &column));
            let whole = reference::all_gather(&blocks, 0, &row);
            let part = reference::reduce_scatter(&whole, 0, &row);
            let digest = |x: &Tensor<3>| {
                let weights = values(&random(x.dims(), 5, DType::F64));
                (values(x).iter().zip(weights))
                    .map(|(x, w)| x * w)
                    .sum::<f64>()
            };
            for (rank, seen) in seen.iter().enumerate() {
                let expected = [&moved[rank], &blocks[rank], &part[rank]].map(digest);
                assert_eq!(seen, &expected, "rank {rank} of {ranks}");
            }
        }
    }
}

#[test]
fn a_mesh_axis_names_its_members_by_coordinate() {
    let columns = MeshAxis { stride: 2, size: 3 };
    assert_eq!(columns.members(3), [1, 3, 5]);
    assert_eq!(columns.coordinate(3), 1);
    assert_eq!(MeshAxis::whole(3).members(1), [0, 1, 2]);
}

#[test]
fn two_axes_cannot_be_split_over_the_same_ranks() {
    let partition = |length, ranks| Partition::balanced(length, ranks);
    let first = Layout::split([4, 4, 4], SeqAxis::FIRST, 4);
    let refused = LayoutError::SameRanks {
        axis: SeqAxis::SECOND,
        other: SeqAxis::FIRST,
    };
    for over in [
        MeshAxis::whole(4),
        MeshAxis { stride: 2, size: 2 },
        MeshAxis { stride: 1, size: 2 },
    ] {
        let split = first
            .clone()
            .with_split(SeqAxis::SECOND, partition(4, over.size), over);
        assert_eq!(split, Err(refused.clone()));
    }
    // Splitting the same axis anew is a change of its split.
    let again = MeshAxis { stride: 2, size: 2 };
    first
        .clone()
        .with_split(SeqAxis::FIRST, partition(4, 2), again)
        .unwrap();
    first
        .with_split(
            SeqAxis::SECOND,
            partition(4, 2),
            MeshAxis { stride: 4, size: 2 },
        )
        .unwrap();
}

#[test]
fn a_view_of_a_part_of_a_tensor_is_sent_from_where_it_begins() {
    for dtype in [DType::F32, DType::F64] {
        launch(3, move |group| -> Result<(), CommError> {
            let partition = Partition::balanced(6, 3);
            // Of the outermost dim: what Flex cuts from an inner one it copies.
            let view = |rank: usize| random([4, 2, 1, 1, 3], rank as u64, dtype).narrow(0, 1, 2);
            let blocks: Vec<_> = (0..3).map(view).collect();
            let after = Blocks::replicated([2, 6, 1, 1, 3], 3);
            let before = after.clone().with_dim(1, DimBlocks::split(&partition));
            let (before, after) = (Arc::new(before), Arc::new(after));
            let kinds = (Collective::AllGather, Collective::ReduceScatter);
            let own = random([4, 2, 1, 1, 3], group.rank() as u64, dtype);
            let own = own.to_device(&device(dtype)).narrow(0, 1, 2);
            let gathered = collective::exchange(own, before, after, kinds.0, kinds.1, &group)?;
            let expected = &reference::all_gather(&blocks, 1, &partition)[group.rank()];
            assert_eq!(bits(&gathered), bits(expected));
            Ok(())
        })
        .unwrap();
    }
}

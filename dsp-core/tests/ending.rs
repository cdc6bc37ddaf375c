//! A sub-layer's end and the switch after it in parts: the sums and gradients of the end as a whole, sent as one
//! switch is; and the order in which parts go and are waited for.
#![cfg(feature = "flex")]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use burn::tensor::{DType, Tensor};
use common::{device, launch, random, tries, values};
use dsp_core::ending::Ending;
use dsp_core::ledger::{Collective, Phase};
use dsp_core::session::Watch;
use dsp_core::strategy::{OutputLayout, Plan, StageKind, StagePlan};
use dsp_core::transport::{Arrival, Exchange, Pending, Transport};
use dsp_core::{
    CommError, Error, Group, Layout, Loss, ModelShape, PlanError, SeqAxis, SequenceParallel,
    Session, Shard, Stage,
};
use proptest::prelude::*;

/// One stage with the first axis split, after which the second one is.
#[derive(Debug)]
struct Turning;

impl SequenceParallel for Turning {
    fn name(&self) -> &'static str {
        "turning"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        let split = |axis| Ok(Layout::split(model.lengths()?, axis, ranks));
        let (first, second) = (split(SeqAxis::FIRST)?, split(SeqAxis::SECOND)?);
        Ok(Plan {
            input: first.clone(),
            stages: vec![StagePlan::local(&first, ranks)],
            output: second,
            output_sends: vec![Default::default(); ranks],
        })
    }

    fn plan_stage(
        &self,
        _model: &ModelShape,
        _stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        Ok(StagePlan::local(residual, ranks))
    }
}

/// What there is of a gate.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Gate {
    None,
    OfSample,
    OfPosition,
}

#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    lengths: [usize; 2],
    /// Of the residual stream, and before the projection.
    widths: [usize; 2],
    gate: Gate,
    has_bias: bool,
    /// Which of x, h, weight, bias and gate need a gradient.
    tracked: [bool; 5],
    dtype: DType,
}

impl Case {
    fn session(&self, group: &Group) -> Session {
        let model = ModelShape {
            batch: self.batch,
            lengths: self.lengths.to_vec(),
            hidden: self.widths[0],
            stages: vec![Stage::new(
                "mlp",
                StageKind::FeedForward {
                    inner: self.widths[1],
                },
            )],
            output: OutputLayout::Free,
        };
        Session::new(Arc::new(Turning), group.clone(), model).unwrap()
    }

    /// The output, whole, and the gradients that there are: this rank's terms.
    fn run(&self, session: &Session) -> Result<Vec<Vec<f64>>, Error> {
        let device = device(self.dtype).autodiff();
        let leaf = |index: usize, shape: [usize; 5]| {
            let value: Tensor<5> = random(shape, index as u64, self.dtype);
            let value = Tensor::from_data(value.into_data(), (&device, self.dtype));
            match self.tracked[index] {
                true => value.require_grad(),
                false => value,
            }
        };
        let ([a, b], [wide, inner]) = (self.lengths, self.widths);
        let of_gate = match self.gate {
            Gate::OfPosition => a,
            _ => 1,
        };
        let leaves = [
            leaf(0, [self.batch, a, b, 1, wide]),
            leaf(1, [self.batch, a, b, 1, inner]),
            leaf(2, [1, 1, 1, inner, wide]),
            leaf(3, [1, 1, 1, 1, wide]),
            leaf(4, [self.batch, of_gate, 1, 1, wide]),
        ];
        let [x, h, weight, bias, gate] = leaves.clone();
        let (x, h) = (session.split(x)?, session.split(h)?);
        let gate = match self.gate {
            Gate::None => None,
            Gate::OfSample => Some(gate),
            Gate::OfPosition => {
                let own = x.positions(SeqAxis::FIRST);
                Some(dsp_core::layout::select_ranges(gate, 1, &own))
            }
        };
        let ending = Ending {
            weight: weight.reshape([inner, wide]),
            bias: self.has_bias.then(|| bias.reshape([wide])),
            gate,
        };
        let mut stages = session.stages();
        let stage = stages.feed_forward()?;
        let y = stages.finish(stage.end(stage.arrange(x)?, h, ending)?)?;
        let output = session.gather(y.clone().detach())?;
        let mut found = vec![values(&output.inner())];
        if y.tensor().is_tracked() {
            let cotangent: Tensor<5> = random([self.batch, a, b, 1, wide], 5, self.dtype);
            let cotangent = Tensor::from_data(cotangent.into_data(), (&device, self.dtype));
            let cotangent = Shard::split(cotangent, y.layout(), y.rank())?.into_tensor();
            let y = y.into_tensor();
            let loss = (y.clone() * y * cotangent).sum();
            let gradients = session.backward(Loss::OfShard(loss))?;
            for leaf in leaves {
                found.push(leaf.grad(&gradients).map_or_else(Vec::new, |x| values(&x)));
            }
        }
        Ok(found)
    }
}

/// The first rank's output and the sums of all ranks' gradients.
fn summed(seen: &[Vec<Vec<f64>>]) -> Vec<Vec<f64>> {
    let mut sums = seen[0].clone();
    for other in &seen[1..] {
        assert_eq!(other[0], sums[0], "ranks gather the same output");
        for (sum, term) in sums.iter_mut().zip(other).skip(1) {
            assert_eq!(sum.len(), term.len(), "gradients that some ranks have only");
            sum.iter_mut()
                .zip(term)
                .for_each(|(sum, term)| *sum += term);
        }
    }
    sums
}

fn cases() -> impl Strategy<Value = Case> {
    (
        1..=2usize,
        [1..=6usize, 1..=6usize],
        [1..=6usize, 1..=4usize],
        prop_oneof![
            Just(Gate::None),
            Just(Gate::OfSample),
            Just(Gate::OfPosition)
        ],
        any::<bool>(),
        prop::array::uniform5(prop::bool::weighted(0.8)),
        prop_oneof![Just(DType::F64), Just(DType::F32)],
    )
        .prop_map(
            |(batch, lengths, widths, gate, has_bias, tracked, dtype)| Case {
                batch,
                lengths,
                widths,
                gate,
                has_bias,
                tracked,
                dtype,
            },
        )
}

proptest! {
    #![proptest_config(tries(200))]

    #[test]
    fn an_end_in_parts_is_the_end_as_a_whole(
        case in cases(), ranks in 1..=5usize, parts in 1..=8usize,
    ) {
        let parts = NonZeroUsize::new(parts).unwrap();
        let whole = summed(&[case.run(&case.session(&Group::alone())).unwrap()]);
        let (tolerance, run) = (if case.dtype == DType::F64 { 1e-12 } else { 1e-5 }, case.clone());
        let seen = launch(ranks, move |group| -> Result<_, Error> {
            let session = run.session(&group).switching_in(parts);
            let found = run.run(&session)?;
            let all = group.ledger().read();
            // However many parts, they are one switch; one rank has nothing to switch.
            let calls = |phase| all.entry(phase, Collective::AllToAll).calls;
            let switches = u64::from(group.size() > 1);
            let backward = if found.len() > 1 { switches } else { 0 };
            assert_eq!((calls(Phase::Forward), calls(Phase::Backward)), (switches, backward));
            Ok(found)
        }).unwrap();
        let found = summed(&seen);
        prop_assert_eq!(found.len(), whole.len());
        for (index, (found, whole)) in found.iter().zip(&whole).enumerate() {
            prop_assert_eq!(found.len(), whole.len(), "{}", index);
            let size = whole.iter().fold(1.0_f64, |size, x| size.max(x.abs()));
            for (found, whole) in found.iter().zip(whole) {
                prop_assert!((found - whole).abs() <= tolerance * size, "{}: {} for {}", index, found, whole);
            }
        }
    }
}

/// What is started and waited for, in order.
#[derive(Debug)]
struct Watched {
    inner: Arc<dyn Transport>,
    seen: Arc<Mutex<Vec<String>>>,
}

struct Awaited {
    inner: Box<dyn Pending>,
    seen: Arc<Mutex<Vec<String>>>,
    name: String,
}

impl Transport for Watched {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn next_sequence(&self) -> u64 {
        self.inner.next_sequence()
    }

    fn start(&self, exchange: Exchange) -> Result<Box<dyn Pending>, CommError> {
        let channels = exchange.tensor.dims()[4];
        let way = match exchange.answers {
            None => "forth",
            Some(_) => "back",
        };
        let name = format!("{way} {channels}");
        self.seen.lock().unwrap().push(format!("start {name}"));
        let seen = self.seen.clone();
        let inner = self.inner.start(exchange)?;
        Ok(Box::new(Awaited { inner, seen, name }))
    }

    fn subgroup(&self, members: &[usize]) -> Result<Arc<dyn Transport>, CommError> {
        self.inner.subgroup(members)
    }

    fn abort(&self, cause: CommError) {
        self.inner.abort(cause);
    }
}

impl Pending for Awaited {
    fn is_ready(&self) -> bool {
        self.inner.is_ready()
    }

    fn wait(self: Box<Self>, deadline: std::time::Instant) -> Result<Arrival, CommError> {
        let name = &self.name;
        self.seen.lock().unwrap().push(format!("wait {name}"));
        self.inner.wait(deadline)
    }
}

/// What a rank of two starts and waits for, where five channels go in two parts.
fn order(watch: Watch) -> Vec<String> {
    let case = Case {
        batch: 1,
        lengths: [2, 2],
        widths: [5, 3],
        gate: Gate::OfSample,
        has_bias: true,
        tracked: [true; 5],
        dtype: DType::F64,
    };
    let orders = dsp_core::launch(2, move |group| -> Result<_, Error> {
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let watched = seen.clone();
        let group = group.through(move |inner| {
            Arc::new(Watched {
                inner,
                seen: watched,
            })
        });
        let parts = NonZeroUsize::new(2).unwrap();
        let session = case.session(&group).switching_in(parts).watching(watch);
        case.run(&session)?;
        Ok(seen.lock().unwrap().clone())
    });
    orders.unwrap().swap_remove(0)
}

#[test]
fn all_parts_are_on_their_way_before_one_is_waited_for() {
    let expected = [
        "start forth 2",
        "start forth 3",
        "wait forth 2",
        "wait forth 3",
        // The output is gathered.
        "start forth 5",
        "wait forth 5",
        "start back 2",
        "start back 3",
        "wait back 2",
        "wait back 3",
    ];
    assert_eq!(order(Watch::Nothing), expected);
}

/// What is sent is looked at first.
#[test]
fn a_session_that_watches_sends_the_whole() {
    let expected = [
        "start forth 5",
        "wait forth 5",
        "start forth 5",
        "wait forth 5",
        "start back 5",
        "wait back 5",
    ];
    assert_eq!(order(Watch::Finite), expected);
}

//! Gradients that are summed while the backward pass runs are, bit for bit, those that are summed after it.
#![cfg(feature = "flex")]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;

use burn::module::{Module, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use common::{bits, device, launch, random, tries};
use dsp_core::layout::MeshAxis;
use dsp_core::ledger::Phase;
use dsp_core::strategy::{OutputLayout, Parameter, Placement, Role, StagePlan, Units};
use dsp_core::{
    CommError, Error, Group, Layout, Loss, ModelShape, Overlap, Placed, PlanError,
    SequenceParallel, Session, Stage,
};
use proptest::prelude::*;

/// Columns are sharded by their units, of which a rank may have none; of rows, two ranks hold the same one.
#[derive(Debug)]
struct Cutting;

impl SequenceParallel for Cutting {
    fn name(&self) -> &'static str {
        "cutting"
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

    fn placement(&self, parameter: &Parameter<'_>, rank: usize, ranks: usize) -> Placement {
        let length = |dim: usize| parameter.shape[dim];
        match parameter.role {
            Role::Columns { dim, .. } => Placement::Sharded {
                dim,
                ranges: vec![rank * length(dim) / ranks..(rank + 1) * length(dim) / ranks],
            },
            Role::Rows { dim, .. } => Placement::Shared {
                dim,
                ranges: vec![rank..rank + length(dim) + 1 - ranks],
            },
            _ => Placement::Replicated,
        }
    }
}

/// Parameters of every kind.
#[derive(Module, Debug)]
struct Toy {
    first: Param<Tensor<2>>,
    sharded: Param<Tensor<2>>,
    shared: Param<Tensor<2>>,
    unused: Param<Tensor<1>>,
    twice: Param<Tensor<1>>,
    frozen: Param<Tensor<1>>,
}

impl Toy {
    fn new(dtype: DType) -> Self {
        Self {
            first: Param::from_tensor(random([2, 3], 0, dtype)),
            sharded: Param::from_tensor(random([2, 3], 1, dtype)),
            shared: Param::from_tensor(random([7, 2], 2, dtype)),
            unused: Param::from_tensor(random([4], 3, dtype)),
            twice: Param::from_tensor(random([5], 4, dtype)),
            frozen: Param::from_tensor(random([3], 5, dtype)).set_require_grad(false),
        }
    }

    fn role(path: &str) -> Role {
        let units = Units::Features(1);
        match path {
            "sharded" => Role::Columns {
                dim: 1,
                fused: 1,
                units,
            },
            "shared" => Role::Rows { dim: 0, units },
            _ => Role::Replicated,
        }
    }

    /// A loss of all of them, but for `unused` where the rank leaves it out; in another order on another rank.
    fn loss(&self, rank: usize, pass: usize, uses_all: bool) -> Tensor<1> {
        let weight = 0.3 + (rank + 7 * pass) as f64;
        let square = |x: Tensor<1>| (x.clone() * x).sum();
        let mut terms = vec![
            square(self.first.val().reshape([-1])).mul_scalar(weight),
            square(self.sharded.val().reshape([-1])),
            square(self.shared.val().reshape([-1])).mul_scalar(weight + 0.1),
            (self.twice.val() * self.twice.val().exp())
                .sum()
                .mul_scalar(weight),
            self.frozen.val().sum(),
        ];
        if uses_all {
            terms.push(square(self.unused.val()).mul_scalar(weight));
        }
        terms.rotate_left(rank % 5);
        terms.into_iter().reduce(|a, b| a + b).unwrap()
    }
}

/// A session of a model that says nothing of its stages.
fn toy_session(group: Group) -> Result<Session, PlanError> {
    let model = ModelShape {
        batch: 1,
        lengths: vec![5],
        hidden: 2,
        stages: vec![],
        output: OutputLayout::Free,
    };
    Session::new(Arc::new(Cutting), group, model)
}

/// All gradients of a module, in its order.
fn all(placed: &Placed<Toy>, gradients: &GradientsParams) -> Vec<Option<Vec<u64>>> {
    let toy = &placed.module;
    let of2 = |id: ParamId| gradients.get::<2>(id).map(|x| bits(&x));
    let of1 = |id: ParamId| gradients.get::<1>(id).map(|x| bits(&x));
    vec![
        of2(toy.first.id),
        of2(toy.sharded.id),
        of2(toy.shared.id),
        of1(toy.unused.id),
        of1(toy.twice.id),
        of1(toy.frozen.id),
    ]
}

#[derive(Debug, Clone)]
struct Case {
    ranks: usize,
    replicas: usize,
    bucket: NonZeroUsize,
    parts: usize,
    /// Which ranks use all parameters.
    users: Vec<bool>,
    dtype: DType,
}

fn cases() -> impl Strategy<Value = Case> {
    (
        1..=5usize,
        1..=2usize,
        1..=40usize,
        1..=3usize,
        prop::collection::vec(any::<bool>(), 10),
        prop_oneof![Just(DType::F32), Just(DType::F64)],
    )
        .prop_map(|(ranks, replicas, bucket, parts, users, dtype)| Case {
            ranks,
            replicas,
            bucket: NonZeroUsize::new(bucket).unwrap(),
            parts,
            users,
            dtype,
        })
}

impl Case {
    /// What this rank sends: after the pass, and while it runs.
    fn run(&self, world: &Group, toy: &Toy) -> Result<[u64; 2], Error> {
        let along = |stride, size| world.along(MeshAxis { stride, size });
        let group = along(1, self.ranks)?;
        let mut session = toy_session(group)?;
        if self.replicas > 1 {
            session = session.with_replicas(along(self.ranks, self.replicas)?);
        }
        let placed = session.place(toy, Toy::role, &device(DType::F64).autodiff());
        let overlap = Overlap::new(&session, self.bucket)?;
        let (rank, uses_all) = (world.rank(), self.users[world.rank()]);

        // What all parts but the last leave, the same for both ways.
        let mut earlier = burn::optim::GradientsAccumulator::<Toy>::new();
        let mut again = burn::optim::GradientsAccumulator::<Toy>::new();
        for part in 1..self.parts {
            let loss = placed.module.loss(rank, part, uses_all);
            let mut gradients = session.backward(Loss::OfShard(loss))?;
            let gradients = GradientsParams::from_module(&mut gradients, &placed.module);
            earlier.accumulate(&placed.module, gradients);
            let loss = placed.module.loss(rank, part, uses_all);
            let mut gradients = session.backward(Loss::OfShard(loss))?;
            let gradients = GradientsParams::from_module(&mut gradients, &placed.module);
            again.accumulate(&placed.module, gradients);
        }
        let loss = placed.module.loss(rank, 0, uses_all);
        let mut gradients = session.backward(Loss::OfShard(loss))?;
        let gradients = GradientsParams::from_module(&mut gradients, &placed.module);
        earlier.accumulate(&placed.module, gradients);
        world.ledger().take();
        let expected = session.reduce_collected(earlier.grads(), &placed)?;
        let after = world.ledger().take().phase(Phase::Gradients);

        let (module, reduction) = overlap.begin(&placed, again.grads());
        let mut gradients = session.backward(Loss::OfShard(module.loss(rank, 0, uses_all)))?;
        let found = reduction.finish(&mut gradients, &placed)?;
        let sent = world.ledger().read().phase(Phase::Gradients);
        assert_eq!(sent.elements, overlap.expected_sends(&placed));
        let (expected, found) = (all(&placed, &expected), all(&placed, &found));
        assert!(
            expected[..3]
                .iter()
                .chain([&expected[4]])
                .all(Option::is_some)
        );
        assert_eq!(found, expected);
        Ok([after.elements, sent.elements])
    }
}

proptest! {
    #![proptest_config(tries(200))]

    #[test]
    fn sums_are_the_same_for_any_buckets_replicas_parts_and_orders_of_use(case in cases()) {
        let toy = Arc::new(Toy::new(case.dtype));
        let ranks = case.ranks * case.replicas;
        let run = launch(ranks, move |world| case.run(&world, &toy));
        prop_assert!(run.is_ok(), "{}", run.unwrap_err());
        // Buckets cut the elements elsewhere: each rank's part is another, that of all is not.
        let all = |way: usize| -> u64 { run.iter().flatten().map(|sent| sent[way]).sum() };
        prop_assert_eq!(all(0), all(1));
    }
}

#[test]
fn a_rank_that_fails_in_its_backward_pass_ends_those_that_wait_for_its_gradients() {
    let toy = Arc::new(Toy::new(DType::F64));
    let error = launch(3, move |group| -> Result<(), Error> {
        let session = toy_session(group.clone())?;
        let placed = session.place(&*toy, Toy::role, &device(DType::F64).autodiff());
        let overlap = Overlap::new(&session, NonZeroUsize::MIN)?;
        let (module, reduction) = overlap.begin(&placed, GradientsParams::new());
        let loss = module.loss(group.rank(), 0, true);
        if group.rank() == 1 {
            panic!("no gradients from here");
        }
        let mut gradients = session.backward(Loss::OfShard(loss))?;
        reduction.finish(&mut gradients, &placed)?;
        Ok(())
    })
    .unwrap_err();
    assert!(
        matches!(error.root, CommError::Panicked { rank: 1, .. }),
        "{error}"
    );
}

/// What the first pass gave is on its way, and what the second one gives would be left out: Burn refuses it, because the
/// first pass has used up what the module's parameters are attached to.
#[test]
fn a_module_that_comes_through_two_backward_passes_ends_the_ranks() {
    let toy = Arc::new(Toy::new(DType::F64));
    for bucket in [1, 1000] {
        let toy = toy.clone();
        let error = launch(2, move |group| -> Result<(), Error> {
            let session = toy_session(group)?;
            let placed = session.place(&*toy, Toy::role, &device(DType::F64).autodiff());
            let overlap = Overlap::new(&session, NonZeroUsize::new(bucket).unwrap())?;
            let (module, reduction) = overlap.begin(&placed, GradientsParams::new());
            session.backward(Loss::OfShard(module.loss(0, 0, true)))?;
            let mut gradients = session.backward(Loss::OfShard(module.loss(0, 1, true)))?;
            reduction.finish(&mut gradients, &placed)?;
            Ok(())
        })
        .unwrap_err();
        let CommError::Panicked { message, .. } = &error.root else {
            panic!("{error}");
        };
        assert!(
            message.contains("graph tape has already been consumed"),
            "{message}"
        );
    }
}

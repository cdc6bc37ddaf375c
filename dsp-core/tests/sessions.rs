//! Sessions: a model that strays from its declaration, losses, placed modules, and their gradients' reduction.
#![cfg(feature = "flex")]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::sync::{Arc, Barrier};

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};
use common::{bits, random, values};
use dsp_core::attention::{Attended, Dropout, DropoutKey};
use dsp_core::gradients::reduced_parameters;
use dsp_core::layout::{LayoutError, MeshAxis};
use dsp_core::ledger::{Collective, Phase};
use dsp_core::session::{Attend, StageError, Watch};
use dsp_core::strategy::{
    AttentionScope, AttentionStage, Misfit, OutputLayout, Parameter, Placement, Role, RoleError,
    Scope, StageKind, StagePlan, Units, add_bias,
};
use dsp_core::{
    AxisSet, CommError, Error, Group, Heads, Layout, Loss, Mask, ModelShape, PlanError, SeqAxis,
    SequenceParallel, Session, Shard, Stage, collective, launch,
};

/// The first axis stays split; columns and rows are sharded by their units.
#[derive(Debug)]
struct Blocks;

impl SequenceParallel for Blocks {
    fn name(&self) -> &'static str {
        "blocks"
    }

    fn residuals(&self, model: &ModelShape, ranks: usize) -> Result<Vec<Layout>, PlanError> {
        let layout = Layout::split(model.lengths()?, SeqAxis::FIRST, ranks);
        Ok(vec![layout])
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
        let Parameter { role, shape, .. } = *parameter;
        let Role::Columns { dim, units, .. } = role else {
            return Placement::Replicated;
        };
        let units = units.count();
        let width = shape[dim] / units;
        let (start, end) = (rank * units / ranks, (rank + 1) * units / ranks);
        Placement::Sharded {
            dim,
            ranges: std::iter::once(start * width..end * width).collect(),
        }
    }
}

fn model() -> ModelShape {
    let heads = Heads::multi(1, 2);
    let attention = |axis| AttentionStage::softmax(AxisSet::of(&[axis]), heads, Mask::Full);
    ModelShape {
        batch: 1,
        lengths: vec![3, 2],
        hidden: 2,
        stages: vec![
            Stage::new("space", StageKind::Attention(attention(SeqAxis::SECOND))),
            Stage::new("text", StageKind::CrossAttention { heads }),
            Stage::new("mlp", StageKind::FeedForward { inner: 4 }),
        ],
        output: OutputLayout::AsInput,
    }
}

fn session(group: &Group) -> Session {
    Session::new(Arc::new(Blocks), group.clone(), model()).unwrap()
}

#[test]
fn a_model_that_strays_from_its_declaration_is_told_where() {
    let session = session(&Group::alone());
    let x = || {
        session
            .split(Tensor::zeros([1, 3, 2, 1, 2], &Device::flex()))
            .unwrap()
    };

    let mut stages = session.stages();
    let wrong = stages.feed_forward().unwrap_err();
    let expected = StageError::Kind {
        index: 0,
        name: "space".to_owned(),
        declared: "self-attention",
        wanted: "feed-forward",
    };
    assert_eq!(wrong, expected);
    assert_eq!(
        wrong.to_string(),
        r#"the model runs a feed-forward where it declared stage 0 ("space") to be a self-attention"#
    );
    // It may go on: a refused call uses up no stage.
    stages.attention().unwrap();
    assert_eq!(
        stages.finish(x()).unwrap_err(),
        Error::Stage(StageError::TooFew {
            run: 1,
            declared: 3
        })
    );

    let mut stages = session.stages();
    stages.attention().unwrap();
    let text = stages.cross_attention().unwrap();
    let not_attention = text.attend(x(), x(), x()).unwrap_err();
    let Error::Stage(StageError::Kind {
        index: 1,
        wanted: "self-attention",
        ..
    }) = not_attention
    else {
        panic!("{not_attention}");
    };
    stages.feed_forward().unwrap();
    let expected = StageError::TooMany {
        declared: 3,
        wanted: "cross-attention",
    };
    assert_eq!(stages.cross_attention().unwrap_err(), expected);
    stages.finish(x()).unwrap();
}

#[test]
fn a_shard_of_another_layout_than_the_plans_is_refused_by_name() {
    let session = session(&Group::alone());
    let mut stages = session.stages();
    let stage = stages.attention().unwrap();
    let other = Layout::whole([3, 1, 2]);
    let x = Tensor::zeros([1, 3, 1, 2, 2], &Device::flex());
    let x = Shard::new(x, other.clone(), 0).unwrap();
    let expected = LayoutError::Unexpected {
        place: "enter",
        expected: session.plan().input.clone().into(),
        got: other.into(),
    };
    assert_eq!(stage.enter(x).unwrap_err(), Error::Layout(expected));
    let lengths = session
        .split(Tensor::zeros([1, 3, 3, 1, 2], &Device::flex()))
        .unwrap_err();
    assert_eq!(
        lengths,
        LayoutError::Lengths {
            from: [3, 3, 1],
            to: [3, 2, 1]
        }
    );
}

#[test]
fn channels_that_are_not_the_declared_heads_are_refused() {
    let session = session(&Group::alone());
    let stage = session.stages().attention().unwrap();
    let x = |channels| {
        session
            .split(Tensor::zeros([1, 3, 2, 1, channels], &Device::flex()))
            .unwrap()
    };
    let Error::Shape { got, rule, .. } = stage.attend(x(3), x(3), x(3)).unwrap_err() else {
        panic!("an odd number of channels is no number of heads of 2");
    };
    assert_eq!(got, [3, 3, 3]);
    assert_eq!(
        rule,
        "their channels must be 1, 1 and 1 heads of 2: those that this rank holds"
    );
    stage.attend(x(4), x(2), x(2)).unwrap_err();
}

#[test]
fn a_role_is_held_to_a_parameters_shape() {
    let heads = Heads {
        query: 4,
        key_value: 2,
        dim: 3,
    };
    let columns = |dim, fused, units| Role::Columns { dim, fused, units };
    let rows = |dim, units| Role::Rows { dim, units };
    let table = |dim| {
        let axis = SeqAxis::FIRST;
        Role::Table { dim, axis }
    };
    let gates = Units::Query(Heads { dim: 1, ..heads });
    for (role, shape) in [
        (Role::Replicated, vec![]),
        (table(1), vec![1, 5]),
        (columns(1, 1, Units::Query(heads)), vec![7, 12]),
        (columns(0, 2, Units::KeyValue(heads)), vec![12]),
        (columns(1, 1, gates), vec![7, 4]),
        (columns(1, 2, Units::Features(5)), vec![7, 20]),
        (rows(0, Units::Query(heads)), vec![12, 7]),
        (rows(0, Units::Features(0)), vec![0, 7]),
    ] {
        role.check("it", &shape).unwrap();
    }
    let all = Units::Features(usize::MAX);
    for (role, shape, misfit) in [
        (table(2), vec![1, 5], Misfit::Dim { dim: 2, dims: 2 }),
        (rows(1, all), vec![5], Misfit::Dim { dim: 1, dims: 1 }),
        (columns(0, 0, all), vec![5], Misfit::Fused),
        (
            columns(0, 1, Units::Query(heads)),
            vec![36],
            Misfit::Heads {
                dim: 0,
                length: 36,
                fused: 1,
                count: 4,
                width: 3,
            },
        ),
        (
            rows(0, Units::KeyValue(heads)),
            vec![12, 7],
            Misfit::Heads {
                dim: 0,
                length: 12,
                fused: 1,
                count: 2,
                width: 3,
            },
        ),
        (
            columns(1, 3, Units::Features(4)),
            vec![7, 20],
            Misfit::Features {
                dim: 1,
                length: 20,
                fused: 3,
                count: 4,
            },
        ),
        (
            columns(1, 3, all),
            vec![7, 20],
            Misfit::Features {
                dim: 1,
                length: 20,
                fused: 3,
                count: usize::MAX,
            },
        ),
    ] {
        let expected = RoleError {
            path: "it".to_owned(),
            shape: shape.clone(),
            role,
            misfit,
        };
        assert_eq!(role.check("it", &shape), Err(expected));
    }
}

/// Attends, and forgets to go back.
#[derive(Debug)]
struct Astray;

impl SequenceParallel for Astray {
    fn name(&self) -> &'static str {
        "astray"
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

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let [query, ..] = qkv;
        let whole = Layout::whole(query.layout().lengths());
        Ok(Attended {
            output: collective::relayout(query, &whole, scope.scope.group)?,
            logsumexp: None,
        })
    }
}

#[test]
fn verbs_refuse_what_is_not_laid_out_as_planned_and_an_attention_that_returns_it() {
    let seen = launch(2, |group| -> Result<_, Error> {
        let session = Session::new(Arc::new(Astray), group, model())?;
        let stage = session.stages().attention()?;
        let whole = Tensor::zeros([1, 3, 2, 1, 2], &Device::flex());
        let own = session.split(whole.clone())?;
        let other = Shard::new(whole, Layout::whole([3, 2, 1]), own.rank())?;
        let own = || own.clone();
        let other = || other.clone();
        let strays = [
            stage.attend(own(), own(), own()),
            stage.attend(other(), own(), own()),
            stage.attend(own(), other(), own()),
            stage.attend(own(), own(), other()),
            stage.join(other()),
            stage.leave(other(), None),
        ];
        Ok(strays.map(|outcome| outcome.unwrap_err().to_string()))
    });
    for errors in seen.unwrap() {
        for (verb, error) in ["attend"; 4].iter().chain(&["join", "leave"]).zip(errors) {
            let expected = format!("{verb} expects [3/2, 2, 1], but was given [3, 2, 1]");
            assert_eq!(error, expected);
        }
    }
}

#[test]
fn a_strategy_without_a_layout_is_told_so() {
    #[derive(Debug)]
    struct Nowhere;

    impl SequenceParallel for Nowhere {
        fn name(&self) -> &'static str {
            "nowhere"
        }

        fn residuals(&self, _model: &ModelShape, _ranks: usize) -> Result<Vec<Layout>, PlanError> {
            Ok(vec![])
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
    assert_eq!(
        Nowhere.plan(&model(), 2).unwrap_err().to_string(),
        "nowhere cannot run on 2 ranks: it names no layout of the residual stream, and needs at least one"
    );
}

#[test]
fn to_drop_with_probability_0_is_no_dropout() {
    let mut linear = model();
    let axes = AxisSet::of(&[SeqAxis::SECOND]);
    let attention = AttentionStage::linear(axes, Heads::multi(1, 2), [0.5].into());
    linear.stages[0].kind = StageKind::Attention(attention);
    let session = Session::new(Arc::new(Blocks), Group::alone(), linear).unwrap();
    let stage = session.stages().attention().unwrap();
    let x = session
        .split(random([1, 3, 2, 1, 2], 3, DType::F64))
        .unwrap();
    let attend = |probability: f64| {
        let dropout = Dropout::new(probability, DropoutKey::default()).unwrap();
        let options = Attend {
            dropout: Some(dropout),
            ..Attend::default()
        };
        stage.attend_with([x.clone(), x.clone(), x.clone()], options)
    };
    let without = stage.attend(x.clone(), x.clone(), x.clone()).unwrap();
    let with = attend(0.0).unwrap().output;
    assert_eq!(bits(with.tensor()), bits(without.tensor()));
    let refusal = Error::LinearDropout { probability: 0.1 };
    assert_eq!(attend(0.1).unwrap_err(), refusal);
}

#[test]
fn a_bias_is_added_over_the_channels() {
    let layout = Layout::whole([1, 1, 1]);
    let x = Shard::new(Tensor::ones([1, 1, 1, 1, 2], &Device::flex()), layout, 0).unwrap();
    let bias = Tensor::<1>::from_floats([1.0, 2.0], &Device::flex());
    assert_eq!(
        values(add_bias(x, Some(bias)).unwrap().tensor()),
        [2.0, 3.0]
    );
}

#[test]
fn a_loss_of_the_whole_gives_the_gradients_of_a_loss_of_the_parts() {
    for ranks in 1..=5 {
        let seen = launch(ranks, |group| -> Result<_, Error> {
            let session = session(&group);
            let device = Device::flex().autodiff();
            let whole = random([1, 3, 2, 1, 2], 3, DType::F64);
            let leaf =
                || Tensor::<5>::from_data(whole.to_data(), (&device, DType::F64)).require_grad();

            let x = leaf();
            let part = session.split(x.clone())?.into_tensor();
            let loss = (part.clone() * part).sum().mul_scalar(1.0 / 12.0);
            let of_shard = x.grad(&session.backward(Loss::OfShard(loss))?).unwrap();

            let x = leaf();
            let gathered = session.gather(session.split(x.clone())?)?;
            let loss = (gathered.clone() * gathered).mean();
            let of_whole = x.grad(&session.backward(Loss::OfWhole(loss))?).unwrap();
            let sent = group
                .ledger()
                .read()
                .entry(Phase::Forward, Collective::AllGather);
            assert_eq!(sent.elements, session.expected_gather(1, 2).forward);
            let sent = group
                .ledger()
                .read()
                .entry(Phase::Backward, Collective::ReduceScatter);
            assert_eq!(sent.elements, session.expected_gather(1, 2).backward);
            Ok((values(&of_shard), values(&of_whole), values(&whole)))
        })
        .unwrap();
        for (of_shard, of_whole, _) in &seen {
            for (a, b) in of_shard.iter().zip(of_whole) {
                // One division by the ranks and their sum: a few roundings of f64.
                assert!((a - b).abs() < 1e-14, "{of_shard:?} {of_whole:?}");
            }
        }
        // And over the ranks they add up to the serial gradient, x/6.
        for (index, x) in seen[0].2.iter().enumerate() {
            let sum: f64 = seen.iter().map(|(_, of_whole, _)| of_whole[index]).sum();
            assert!((sum - x / 6.0).abs() < 1e-14);
        }
    }
}

#[test]
fn a_failure_in_backward_is_an_error_of_the_session_and_not_a_panic() {
    let roots = Arc::new(std::sync::Mutex::new(vec![]));
    let seen = roots.clone();
    let error = launch(2, move |group| -> Result<(), Error> {
        let session = session(&group);
        let x = Tensor::<5>::zeros([1, 3, 2, 1, 2], &Device::flex().autodiff()).require_grad();
        let gathered = session.gather(session.split(x)?)?;
        if group.rank() == 1 {
            return Ok(());
        }
        let error = session
            .backward(Loss::OfWhole(gathered.sum()))
            .err()
            .unwrap();
        seen.lock().unwrap().push(error.clone());
        Err(error.into())
    })
    .unwrap_err();
    assert_eq!(
        roots.lock().unwrap().as_slice(),
        std::slice::from_ref(&error.root)
    );
    let CommError::PeerEnded { ended: 1, .. } = error.root else {
        panic!("{error}")
    };
}

#[test]
fn a_session_that_watches_names_the_first_rank_and_stage_with_a_nan_forward_and_back() {
    for (pass, infinite) in [(Phase::Forward, false), (Phase::Backward, true)] {
        let error = launch(3, move |group| -> Result<(), Error> {
            let session = session(&group).watching(Watch::Finite);
            let bad = if infinite { f64::INFINITY } else { f64::NAN };
            let x = Tensor::<5>::ones([1, 3, 2, 1, 2], &Device::flex().autodiff()).require_grad();
            let stage = session.stages().attention()?;
            let x = stage.arrange(session.split(x)?)?;
            let mut h = stage.enter(x)?;
            if group.rank() == 1 && pass == Phase::Forward {
                h = h.map(|h| h.mul_scalar(bad))?;
            }
            let mut y = stage.leave(h, None)?.into_tensor();
            if group.rank() == 1 && pass == Phase::Backward {
                y = y.mul_scalar(bad);
            }
            session.backward(Loss::OfShard(y.sum()))?;
            // Where all meet.
            session.sum_over_ranks(Tensor::ones([1], &Device::flex()))?;
            Ok(())
        })
        .unwrap_err();
        let expected = CommError::NotFinite {
            rank: 1,
            stage: "space".to_owned(),
            verb: "leave".into(),
            pass,
        };
        assert_eq!(error.root, expected);
    }
}

/// Sums what the ranks give where a sub-layer ends, and so gives back a sum of the gradients where it began.
#[derive(Debug)]
struct Summing;

impl SequenceParallel for Summing {
    fn name(&self) -> &'static str {
        "summing"
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

    fn enter(&self, x: Shard, scope: &Scope<'_>) -> Result<Shard, Error> {
        let (layout, rank) = (x.layout().clone(), x.rank());
        let sum = collective::all_reduce(x.into_tensor(), scope.group)?;
        Ok(Shard::new(sum, layout, rank)?)
    }
}

/// An all-reduce hands one rank's infinite gradient to all: named is the rank where it arose.
#[test]
fn a_session_that_watches_looks_at_a_gradient_before_a_verb_sends_it() {
    let error = launch(3, move |group| -> Result<(), Error> {
        let session = Session::new(Arc::new(Summing), group.clone(), model())?;
        let session = session.watching(Watch::Finite);
        let x = Tensor::<5>::ones([1, 3, 2, 1, 2], &Device::flex().autodiff()).require_grad();
        let stage = session.stages().attention()?;
        let h = stage
            .enter(stage.arrange(session.split(x)?)?)?
            .into_tensor();
        let bad = [1.0, f64::INFINITY, 1.0][group.rank()];
        session.backward(Loss::OfShard(h.mul_scalar(bad).sum()))?;
        Ok(())
    })
    .unwrap_err();
    let CommError::NotFinite {
        rank: 1,
        verb,
        pass: Phase::Backward,
        ..
    } = error.root
    else {
        panic!("{error}");
    };
    assert_eq!(verb, "enter");
}

#[test]
#[should_panic(expected = "one parameter in two places, \"first\" and \"second\"")]
fn a_parameter_in_two_places_of_a_module_is_refused() {
    #[derive(Module, Debug)]
    struct Tied {
        first: Param<Tensor<2>>,
        second: Param<Tensor<2>>,
    }
    let first = Param::from_tensor(random([2, 3], 1, DType::F32));
    let second = first.clone();
    let tied = Tied { first, second };
    session(&Group::alone()).place(&tied, |_| Role::Replicated, &Device::flex());
}

/// f16 ends at 65504: the square of 300 is more.
#[test]
fn gradients_of_several_types_are_summed_and_their_norm_is_not_that_of_16_bits() {
    #[derive(Module, Debug)]
    struct Mixed {
        half: Param<Tensor<1>>,
        full: Param<Tensor<1>>,
    }
    let full = Param::from_tensor(random([4], 1, DType::F32));
    let half = Param::from_tensor(random([2], 2, DType::F16));
    let mixed = Mixed { half, full };
    let norms = launch(2, move |group| -> Result<_, Error> {
        let session = session(&group);
        let device = Device::flex().autodiff();
        let placed = session.place(&mixed, |_| Role::Replicated, &device);
        let mut gradients = GradientsParams::new();
        let ones = |count, dtype| Tensor::<1>::ones([count], (&Device::flex(), dtype));
        let Mixed { half, full } = &placed.module;
        gradients.register(half.id, ones(2, DType::F16).mul_scalar(150.0));
        gradients.register(full.id, ones(4, DType::F32).mul_scalar(2.0));
        let gradients = session.reduce_collected(gradients, &placed)?;
        let sums = gradients.get::<1>(full.id).map(|x| values(&x));
        assert_eq!(sums, Some(vec![4.0; 4]));
        assert_eq!(
            gradients.get::<1>(half.id).map(|x| x.dtype()),
            Some(DType::F16)
        );
        session
            .gradient_norm(&gradients, &placed)
            .map_err(Error::from)
    })
    .unwrap();
    let expected = (2.0 * 300.0f64.powi(2) + 4.0 * 16.0).sqrt();
    for norm in norms {
        assert!(
            (norm - expected).abs() < 1e-4 * expected,
            "{norm} {expected}"
        );
    }
}

#[test]
fn a_session_that_watches_computes_what_it_would_without() {
    let run = |watch| {
        let seen = launch(4, move |group| -> Result<_, Error> {
            let session = session(&group).watching(watch);
            let whole = random([1, 3, 2, 1, 2], 3, DType::F64);
            let device = Device::flex().autodiff();
            let x = Tensor::<5>::from_data(whole.to_data(), (&device, DType::F64)).require_grad();
            let stage = session.stages().attention()?;
            let own = stage.enter(stage.arrange(session.split(x.clone())?)?)?;
            let y = stage.attend(own.clone(), own.clone(), own)?;
            let y = stage.leave(y, None)?.into_tensor();
            let gradients = session.backward(Loss::OfShard((y.clone() * y.clone()).sum()))?;
            Ok((bits(&y.inner()), bits(&x.grad(&gradients).unwrap())))
        });
        seen.unwrap()
    };
    assert_eq!(run(Watch::Nothing), run(Watch::Finite));
}

/// A module with a parameter that some ranks do not use, one that is sharded and one that is frozen.
#[derive(Module, Debug)]
struct Toy {
    used: Param<Tensor<2>>,
    unused: Param<Tensor<1>>,
    sharded: Param<Tensor<2>>,
    frozen: Param<Tensor<1>>,
}

fn toy(dtype: DType) -> Toy {
    let frozen = Param::from_tensor(random([2], 4, dtype)).set_require_grad(false);
    Toy {
        used: Param::from_tensor(random([2, 3], 1, dtype)),
        unused: Param::from_tensor(random([4], 2, dtype)),
        sharded: Param::from_tensor(random([2, 6], 3, dtype)),
        frozen,
    }
}

fn toy_role(path: &str) -> Role {
    match path {
        "sharded" => Role::Columns {
            dim: 1,
            fused: 1,
            units: Units::Features(3),
        },
        "used" | "unused" | "frozen" => Role::Replicated,
        path => panic!("no parameter is at {path}"),
    }
}

#[test]
fn gradients_of_replicated_parameters_are_summed_and_those_of_sharded_ones_left_alone() {
    for dtype in [DType::F32, DType::F64] {
        for ranks in 1..=4 {
            let module = Arc::new(toy(dtype));
            let source = module.clone();
            let seen = launch(ranks, move |group| -> Result<_, Error> {
                let session = session(&group);
                let device = Device::flex().autodiff();
                let placed = session.place(&*source, toy_role, &device);
                let toy = &placed.module;
                assert_eq!(reduced_parameters(&placed), 10);
                let rank = group.rank();
                // What each rank holds, and that it may be trained or not as before.
                let columns = 2 * (3 * rank / ranks)..2 * (3 * (rank + 1) / ranks);
                assert_eq!(toy.sharded.val().dims(), [2, columns.len()]);
                assert!(toy.used.is_require_grad() && toy.sharded.is_require_grad());
                assert!(!toy.frozen.is_require_grad());
                for dtype_of in [toy.used.val().dtype(), toy.sharded.val().dtype()] {
                    assert_eq!(dtype_of, dtype);
                }

                let weight = (rank + 1) as f64;
                let mut loss = toy.used.val().mul_scalar(weight).sum();
                loss = loss + toy.sharded.val().mul_scalar(10.0 * weight).sum();
                loss = loss + toy.frozen.val().sum();
                if rank == ranks - 1 {
                    loss = loss + toy.unused.val().mul_scalar(0.5).sum();
                }
                let mut gradients = session.backward(Loss::OfShard(loss))?;
                group.ledger().take();
                let reduced = session.reduce(&mut gradients, &placed)?;
                let sent = group.ledger().read().phase(Phase::Gradients);
                assert_eq!(sent.elements, session.expected_reduce(10));
                assert_eq!(sent.bytes, sent.elements * dtype.size() as u64);
                // One bucket, one all-reduce.
                assert_eq!(sent.calls, 1);
                assert!(reduced.get::<1>(toy.frozen.id).is_none());
                let sharded = reduced.get::<2>(toy.sharded.id).unwrap();
                assert_eq!(sharded.dims(), toy.sharded.val().dims());
                Ok((
                    values(&reduced.get::<2>(toy.used.id).unwrap()),
                    values(&reduced.get::<1>(toy.unused.id).unwrap()),
                    values(&sharded),
                    bits(&toy.sharded.val().inner()),
                ))
            })
            .unwrap();
            let sum = (1..=ranks).sum::<usize>() as f64;
            for (rank, (used, unused, sharded, values)) in seen.into_iter().enumerate() {
                assert_eq!(used, [sum; 6]);
                assert_eq!(unused, [0.5; 4]);
                assert!(
                    sharded
                        .iter()
                        .all(|&value| value == 10.0 * (rank + 1) as f64)
                );
                let columns = 2 * (3 * rank / ranks)..2 * (3 * (rank + 1) / ranks);
                let own = module.sharded.val().slice([0..2, columns]);
                assert_eq!(values, bits(&own));
            }
        }
    }
}

#[test]
fn two_ranks_placed_from_one_tracked_module_walk_back_at_the_same_time() {
    // If they shared a node, the one that holds its graph's lock inside a collective would wait for the other,
    // which waits for the lock: this test would run into the deadline.
    let device = Device::flex().autodiff();
    let module = Arc::new(toy(DType::F64).fork(&device).train());
    let barrier = Arc::new(Barrier::new(2));
    let gradients = launch(2, move |group| -> Result<_, Error> {
        let session = session(&group);
        let placed = session.place(&*module, toy_role, &Device::flex().autodiff());
        let toy = &placed.module;
        let hidden = toy.used.val().mul_scalar(2.0);
        let sum = dsp_core::collective::all_reduce(hidden, &group)?;
        barrier.wait();
        let gradients = session.backward(Loss::OfShard(sum.sum()))?;
        // The source's own leaf has no part in it.
        assert!(module.used.val().grad(&gradients).is_none());
        Ok(values(&toy.used.val().grad(&gradients).unwrap()))
    });
    assert_eq!(gradients.unwrap(), [[4.0; 6]; 2]);
}

#[test]
fn an_error_on_one_rank_in_a_session_is_the_root_for_all() {
    let error = launch(2, |group| -> Result<(), Error> {
        let session = session(&group);
        let mut stages = session.stages();
        if group.rank() == 1 {
            stages.feed_forward()?;
        }
        let x = session.split(Tensor::zeros([1, 3, 2, 1, 2], &Device::flex()))?;
        session.gather(x)?;
        Ok(())
    })
    .unwrap_err();
    let CommError::Failed {
        rank: 1,
        last: None,
        message,
    } = &error.root
    else {
        panic!("{error}")
    };
    assert!(message.contains("space"), "{message}");
    let source = error.source.unwrap();
    let Some(Error::Stage(StageError::Kind { .. })) = source.downcast_ref() else {
        panic!("{source}")
    };
}

#[test]
fn a_placed_module_has_the_devices_checkpointing_and_none_of_it_without_autodiff() {
    let session = session(&Group::alone());
    let module = toy(DType::F32);
    for device in [
        Device::flex(),
        Device::flex().autodiff(),
        Device::flex().autodiff().gradient_checkpointing(),
    ] {
        let toy = session.place(&module, toy_role, &device).module;
        let strategy = device.gradient_checkpointing_strategy();
        for tensor in [toy.used.val(), toy.sharded.val()] {
            assert_eq!(tensor.gradient_checkpointing_strategy(), strategy);
            assert_eq!(tensor.is_require_grad(), strategy.is_some());
        }
        assert_eq!(toy.frozen.val().gradient_checkpointing_strategy(), strategy);
        assert!(!toy.frozen.val().is_require_grad());
    }
}

/// Three features over two ranks, of which both hold the second.
#[derive(Debug)]
struct Overlapping;

impl SequenceParallel for Overlapping {
    fn name(&self) -> &'static str {
        "overlapping"
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

    fn placement(&self, parameter: &Parameter<'_>, rank: usize, _ranks: usize) -> Placement {
        match parameter.role {
            Role::Columns { dim, .. } => Placement::Shared {
                dim,
                ranges: std::iter::once(2 * rank..2 * rank + 4).collect(),
            },
            _ => Placement::Replicated,
        }
    }
}

#[test]
fn what_two_ranks_hold_has_the_sum_of_their_gradients_and_what_one_holds_its_own() {
    let module = Arc::new(toy(DType::F64));
    let source = module.clone();
    let seen = launch(2, move |group| -> Result<_, Error> {
        let session = Session::new(Arc::new(Overlapping), group.clone(), model())?;
        let placed = session.place(&*source, toy_role, &Device::flex().autodiff());
        let toy = &placed.module;
        // `used`, `unused` and all of the shared one.
        assert_eq!(reduced_parameters(&placed), 6 + 4 + 12);
        let weight = [1.0, 10.0][group.rank()];
        let loss = toy.sharded.val().mul_scalar(weight).sum() + toy.used.val().sum();
        let mut gradients = session.backward(Loss::OfShard(loss))?;
        let reduced = session.reduce(&mut gradients, &placed)?;
        let own = values(&reduced.get::<2>(toy.sharded.id).unwrap());
        let whole = session.whole(reduced, &placed)?;
        let gathered = session.whole_module(&placed)?;
        assert!(!gathered.sharded.val().is_autodiff());
        Ok((
            own,
            values(&whole.get::<2>(toy.sharded.id).unwrap()),
            values(&whole.get::<2>(toy.used.id).unwrap()),
            bits(&gathered.sharded.val()),
        ))
    })
    .unwrap();
    let owns = [[1.0, 1.0, 11.0, 11.0], [11.0, 11.0, 10.0, 10.0]];
    for ((own, whole, used, parameter), expected) in seen.into_iter().zip(owns) {
        assert_eq!(own, [expected, expected].concat());
        let row = [1.0, 1.0, 11.0, 11.0, 10.0, 10.0];
        assert_eq!(whole, [row, row].concat());
        assert_eq!(used, [2.0; 6]);
        assert_eq!(parameter, bits(&module.sharded.val()));
    }
}

#[test]
fn replicas_add_up_their_gradients_the_sharded_ones_too() {
    // Two replicas of a model on two ranks: ranks 0 and 1, and ranks 2 and 3.
    let source = Arc::new(toy(DType::F64));
    let seen = launch(4, move |world| -> Result<_, Error> {
        let group = world.along(MeshAxis { stride: 1, size: 2 })?;
        let replicas = world.along(MeshAxis { stride: 2, size: 2 })?;
        let session = session(&group).with_replicas(replicas);
        let placed = session.place(&*source, toy_role, &Device::flex().autodiff());
        let toy = &placed.module;
        let weight = [1.0, 10.0, 100.0, 1000.0][world.rank()];
        let loss = (toy.sharded.val().sum() + toy.used.val().sum()).mul_scalar(weight);
        let mut gradients = session.backward(Loss::OfShard(loss))?;
        let reduced = session.reduce(&mut gradients, &placed)?;
        Ok([
            values(&reduced.get::<2>(toy.sharded.id).unwrap()),
            values(&reduced.get::<2>(toy.used.id).unwrap()),
        ])
    })
    .unwrap();
    for (rank, [sharded, used]) in seen.into_iter().enumerate() {
        // Rank 0 of each model holds one unit of two features, rank 1 two.
        let (sum, held) = [(101.0, 4), (1010.0, 8)][rank % 2];
        assert_eq!(sharded, vec![sum; held]);
        assert_eq!(used, [1111.0; 6]);
    }
}

#[test]
fn a_tables_rows_are_those_of_the_ranks_positions_whether_it_holds_all_or_its_own() {
    let layout = Layout::split([5, 1, 1], SeqAxis::FIRST, 2);
    let x = |rank: usize| {
        let held = layout.local_lengths(rank)[0];
        let tensor = Tensor::zeros([1, held, 1, 1, 2], &Device::flex());
        Shard::new(tensor, layout.clone(), rank).unwrap()
    };
    let table = random([7, 2], 1, DType::F64);
    let rows = |start: usize, count: usize| values(&table.clone().narrow(0, start, count));
    let first = SeqAxis::FIRST;
    assert_eq!(
        values(&x(1).rows_of(table.clone(), 7, first).unwrap()),
        rows(2, 3)
    );
    let own = table.clone().narrow(0, 2, 3);
    assert_eq!(values(&x(1).rows_of(own, 5, first).unwrap()), rows(2, 3));
    // Too short for the sequence, though it happens to have as many rows as the rank has positions.
    let short = table.clone().narrow(0, 0, 3);
    let error = x(1).rows_of(short, 3, first).unwrap_err();
    assert!(
        matches!(
            error,
            LayoutError::Table {
                rows: 3,
                whole: 3,
                ..
            }
        ),
        "{error}"
    );
    let error = x(1)
        .rows_of(table.clone().narrow(0, 0, 4), 7, first)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "4 rows of a table of 7 were given for sequence axis 0: the table needs at least 5, and of them rank 1 all, or, \
         of 5, the 3 of its positions"
    );
}

//! What a strategy refuses it refuses in its plan, with the numbers and the rule.
#![cfg(all(feature = "flex", feature = "all"))]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use common::{Case, Checkpointing, Sub, attend};
use dsp_core::error::CommError;
use dsp_core::strategy::{Form, MOST_RANKS, OutputLayout, Part, Role, StageKind, Units};
use dsp_core::{
    AxisSet, Ending, Error, Group, Heads, Mask, ModelShape, PlanError, SeqAxis, SequenceParallel,
    Session,
};
use dsp_strategies::{Dsp, Lss, Megatron, Serial, Ulysses, Usp, by_name};

fn case(lengths: &[usize], heads: (usize, usize), subs: Vec<Sub>) -> Case {
    Case {
        batch: 1,
        lengths: lengths.to_vec(),
        heads,
        subs,
        output: OutputLayout::AsInput,
        dropout: None,
        checkpointing: Checkpointing::Off,
        switch_parts: None,
    }
}

fn two_axes() -> ModelShape {
    case(
        &[3, 4],
        (4, 2),
        vec![attend(&[0]), Sub::Text, Sub::Mlp, attend(&[1])],
    )
    .shape()
}

#[test]
fn serial_runs_on_one_rank_only() {
    Serial.plan(&two_axes(), 1).unwrap();
    let refusal = Serial.plan(&two_axes(), 2).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "serial cannot run on 2 ranks: it is the model on one device; every other strategy runs on several"
    );
}

#[test]
fn dsp_needs_an_axis_that_a_stage_does_not_attend() {
    let text = case(&[8], (2, 2), vec![Sub::Mlp, attend(&[0])]).shape();
    let refusal = Dsp.plan(&text, 2).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "dsp cannot run stage \"sub 1\": it attends over every one of the model's 1 sequence axes, so that none \
         is left to be split; use a strategy that splits the attended axis"
    );
    let joint = case(&[3, 4], (2, 2), vec![attend(&[0]), attend(&[0, 1])]).shape();
    let expected = PlanError::NoAxisLeft {
        strategy: "dsp".to_owned(),
        stage: "sub 1".to_owned(),
        axes: 2,
    };
    assert_eq!(Dsp.plan(&joint, 2).unwrap_err(), expected);
    // One rank needs no split, and two of three axes leave one.
    Dsp.plan(&joint, 1).unwrap();
    let third = case(&[3, 4, 2], (2, 2), vec![attend(&[0, 1])]).shape();
    Dsp.plan(&third, 2).unwrap();
}

#[test]
fn ulysses_needs_a_query_head_for_each_rank() {
    Ulysses.plan(&two_axes(), 4).unwrap();
    let refusal = Ulysses.plan(&two_axes(), 5).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "ulysses cannot run stage \"sub 3\": 4 query heads over 5 ranks leave a rank without a head; use at \
         most 4 ranks"
    );
}

#[test]
fn usp_needs_a_query_head_for_each_rank_of_a_row() {
    let text = case(&[8], (2, 2), vec![attend(&[0])]).shape();
    let rows_of = |row: usize| Usp::with_rows_of(row.try_into().unwrap());
    rows_of(2).plan(&text, 8).unwrap();
    assert_eq!(
        rows_of(4).plan(&text, 8).unwrap_err().to_string(),
        "usp cannot run stage \"sub 0\": 2 query heads over each row of 4 of the 8 ranks leave a rank without a head; \
         use rows of at most 2"
    );
}

#[test]
fn a_mixture_says_why_each_of_its_strategies_refuses_a_stage() {
    let text = case(&[8], (2, 2), vec![Sub::Mlp, attend(&[0])]).shape();
    let mixture = by_name("ulysses+lasp2").unwrap();
    mixture.plan(&text, 2).unwrap();
    assert_eq!(
        mixture.plan(&text, 4).unwrap_err().to_string(),
        "ulysses+lasp2 cannot run stage \"sub 1\", for none of its strategies can: (1) ulysses cannot run stage \
         \"sub 1\": 2 query heads over 4 ranks leave a rank without a head; use at most 2 ranks; (2) lasp2 cannot run \
         stage \"sub 1\": it gathers the states of linear attention, and softmax attention has none; mix it with a \
         strategy for that, as in lasp2+ring"
    );
}

/// Each stage could be run where another axis is split.
#[test]
fn a_mixture_says_what_is_in_the_way_wherever_the_residual_stream_is() {
    let crossing = case(&[4, 8], (2, 2), vec![attend(&[0]), attend(&[1])]).shape();
    let refusals = |name: &str| {
        let refusal = by_name(name).unwrap().plan(&crossing, 4).unwrap_err();
        let PlanError::NoLeader { mixture, refusals } = refusal else {
            panic!("{refusal}");
        };
        assert_eq!(mixture, name);
        let [
            PlanError::Heads { heads: 2, .. },
            PlanError::NoPart { refusals, .. },
        ] = &refusals[..]
        else {
            panic!("{refusals:?}");
        };
        refusals.clone()
    };
    assert!(matches!(
        refusals("ulysses+lasp2")[..],
        [PlanError::Heads { .. }, PlanError::Form { .. }]
    ));
    let [PlanError::Heads { .. }, dsp] = &refusals("ulysses+dsp")[..] else {
        panic!("2 heads are too few for 4 ranks");
    };
    assert_eq!(
        dsp.to_string(),
        "dsp cannot run stage \"sub 0\" on [4/4, 8, 1]: it attends within a rank only, and the axis that is split is \
         attended"
    );
}

#[test]
fn attention_over_no_axis_or_over_one_that_is_not_there_is_refused_by_all() {
    let over = |axes: &[SeqAxis]| {
        let mut model = case(&[4, 8], (4, 2), vec![Sub::Mlp, attend(&[0])]).shape();
        let StageKind::Attention(attention) = &mut model.stages[1].kind else {
            unreachable!()
        };
        attention.axes = AxisSet::of(axes);
        model
    };
    for strategy in dsp_strategies::all() {
        let refusal = |axes: &[SeqAxis]| strategy.plan(&over(axes), 1).unwrap_err().to_string();
        assert_eq!(
            refusal(&[SeqAxis::FIRST, SeqAxis::THIRD]),
            "stage \"sub 1\" attends over sequence axis 2, and the model has 2 sequence axes, the first of which is 0"
        );
        assert_eq!(
            refusal(&[]),
            "stage \"sub 1\" is an attention over no sequence axis: it needs at least one"
        );
    }
}

#[test]
fn no_rank_and_more_ranks_than_can_be_planned_for_are_refused_by_all() {
    let mut strategies = dsp_strategies::all();
    strategies.push(by_name("dsp+ulysses").unwrap());
    for strategy in strategies {
        for ranks in [0, MOST_RANKS + 1, usize::MAX / 4, usize::MAX] {
            let refusal = strategy.plan(&two_axes(), ranks).unwrap_err();
            assert_eq!(refusal, PlanError::RankCount { ranks });
        }
    }
    assert_eq!(
        Dsp.plan(&two_axes(), 0).unwrap_err().to_string(),
        "a plan for 0 ranks was asked for; 1 to 1048576 are possible"
    );
}

#[test]
fn heads_that_do_not_form_groups_are_refused_by_all_with_both_numbers() {
    for (heads, stage) in [((3, 2), "sub 0"), ((2, 0), "sub 0"), ((0, 1), "sub 0")] {
        let model = case(&[3, 4], heads, vec![attend(&[0])]).shape();
        for strategy in dsp_strategies::all() {
            let expected = PlanError::HeadGroups {
                stage: stage.to_owned(),
                query: heads.0,
                key_value: heads.1,
            };
            assert_eq!(
                strategy.plan(&model, 1).unwrap_err(),
                expected,
                "{}",
                strategy.name()
            );
        }
    }
    // Of a cross-attention too.
    let model = case(&[3, 4], (3, 2), vec![Sub::Mlp, Sub::Text]).shape();
    let refusal = Dsp.plan(&model, 2).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "stage \"sub 1\" has 3 query heads and 2 key-value heads: the first must be a multiple of the second, and \
         neither 0"
    );
}

#[test]
fn key_lengths_that_are_not_one_a_sample_are_refused_by_all_with_both_numbers() {
    for lengths in [vec![], vec![3], vec![3, 4, 5]] {
        let given = Mask::KeyLengths(lengths.clone().into());
        let subs = vec![Sub::Mlp, Sub::Attention(vec![0], given)];
        let mut model = case(&[3, 4], (4, 2), subs).shape();
        model.batch = 2;
        for strategy in dsp_strategies::all() {
            for ranks in [1, 2] {
                let refusal = strategy.plan(&model, ranks).unwrap_err();
                assert_eq!(
                    refusal.to_string(),
                    format!(
                        "stage \"sub 1\" has {} key lengths for a batch of 2: give one for each sample, however many \
                         sequences of it are attended",
                        lengths.len()
                    ),
                    "{}",
                    strategy.name()
                );
            }
        }
    }
}

/// One axis, attended linearly.
fn linear(decay: &[f64], mask: Mask) -> ModelShape {
    let mut model = case(&[8], (4, 2), vec![Sub::Mlp, attend(&[0])]).shape();
    let StageKind::Attention(attention) = &mut model.stages[1].kind else {
        unreachable!()
    };
    attention.form = Form::Linear {
        decay: decay.into(),
    };
    attention.mask = mask;
    model
}

#[test]
fn softmax_strategies_refuse_linear_attention_over_the_split_axis() {
    let model = linear(&[0.9; 4], Mask::Causal);
    Lss.plan(&model, 1).unwrap();
    assert_eq!(
        Lss.plan(&model, 2).unwrap_err().to_string(),
        "lss cannot run stage \"sub 1\": it gathers keys and values for softmax attention, and this one is linear, \
         whose state is all that must move; use lasp or lasp2"
    );
}

#[test]
fn lasp_and_lasp2_refuse_softmax_attention_over_the_split_axis_and_run_it_over_another() {
    let text = case(&[8], (4, 2), vec![Sub::Linear(vec![0]), attend(&[0])]).shape();
    for (name, rule) in [
        (
            "lasp",
            "it hands on the state of linear attention, and softmax attention has none; mix it with a strategy for \
             that, as in lasp+ring",
        ),
        (
            "lasp2",
            "it gathers the states of linear attention, and softmax attention has none; mix it with a strategy for \
             that, as in lasp2+ring",
        ),
    ] {
        let strategy = by_name(name).unwrap();
        strategy.plan(&text, 1).unwrap();
        assert_eq!(
            strategy.plan(&text, 2).unwrap_err().to_string(),
            format!("{name} cannot run stage \"sub 1\": {rule}")
        );
        let hybrid = case(&[8, 4], (4, 2), vec![Sub::Linear(vec![1]), attend(&[0])]).shape();
        let plan = strategy.plan(&hybrid, 2).unwrap();
        assert!(plan.input.is_split(SeqAxis::SECOND));
    }
}

#[test]
fn lasp_and_lasp2_split_the_outermost_axis_of_a_joint_attention_or_refuse() {
    let joint = Sub::Linear(vec![0, 1]);
    for name in ["lasp", "lasp2"] {
        let strategy = by_name(name).unwrap();
        // The second is longer, but inside of the first a rank's positions would not follow each other.
        let two = case(&[3, 8], (4, 2), vec![joint.clone()]).shape();
        let plan = strategy.plan(&two, 2).unwrap();
        assert!(plan.input.is_split(SeqAxis::FIRST));
        // An outer axis of one position keeps nothing apart.
        let one = case(&[1, 8], (4, 2), vec![joint.clone()]).shape();
        assert!(
            strategy
                .plan(&one, 2)
                .unwrap()
                .input
                .is_split(SeqAxis::SECOND)
        );
        let stuck = case(&[3, 8], (4, 2), vec![joint.clone(), attend(&[0])]).shape();
        assert_eq!(
            strategy.plan(&stuck, 2).unwrap_err().to_string(),
            format!(
                "{name} cannot run stage \"sub 0\" on [3, 8/2, 1]: a state runs through contiguous positions in rank \
                 order; split the outermost attended axis in plain blocks"
            )
        );
    }
}

#[test]
fn linear_attention_that_is_not_causal_or_lacks_decays_is_refused_by_all() {
    for strategy in dsp_strategies::all() {
        let refusal = strategy.plan(&linear(&[0.9; 4], Mask::Full), 1);
        assert_eq!(
            refusal.unwrap_err().to_string(),
            "stage \"sub 1\" is linear attention, whose state runs forward only: its mask must be causal"
        );
        for decays in [&[0.9; 3][..], &[0.9, 0.9, 0.9, 1.5], &[0.9, 0.9, 0.9, 0.0]] {
            let refusal = strategy.plan(&linear(decays, Mask::Causal), 1);
            assert_eq!(
                refusal.unwrap_err().to_string(),
                format!(
                    "stage \"sub 1\" is linear attention of 4 query heads with the decays {decays:?}: it needs one \
                     in (0, 1] for each"
                )
            );
        }
    }
}

#[test]
fn a_model_of_no_axis_or_of_four_is_refused_by_all() {
    for axes in [0, 4] {
        let mut model = two_axes();
        model.lengths = vec![2; axes];
        for strategy in dsp_strategies::all() {
            let refusal = strategy.plan(&model, 1).unwrap_err();
            assert_eq!(refusal, PlanError::Axes { axes });
            assert_eq!(
                refusal.to_string(),
                format!("a model of {axes} sequence axes was given; one to three are possible")
            );
        }
    }
}

#[test]
fn a_model_without_stages_is_planned_by_all() {
    let model = case(&[3, 4], (1, 1), vec![]).shape();
    for strategy in dsp_strategies::all() {
        assert!(strategy.plan(&model, 1).unwrap().stages.is_empty());
    }
    Dsp.plan(&model, 3).unwrap();
    Ulysses.plan(&model, 3).unwrap();
}

#[test]
fn a_session_refuses_before_anything_is_sent() {
    let joint = case(&[3], (2, 2), vec![attend(&[0])]).shape();
    let errors = dsp_core::launch(2, move |group: Group| -> Result<_, Error> {
        let refusal = Session::new(Arc::new(Dsp), group.clone(), joint.clone()).unwrap_err();
        assert_eq!(group.ledger().read().iter().count(), 0);
        Ok(matches!(refusal, PlanError::NoAxisLeft { axes: 1, .. }))
    });
    assert_eq!(errors.unwrap(), [true, true]);
}

#[test]
fn a_strategy_is_found_by_its_name_and_an_unknown_name_is_told_the_known_ones() {
    for strategy in dsp_strategies::all() {
        assert_eq!(by_name(strategy.name()).unwrap().name(), strategy.name());
    }
    let message = by_name("rnig").unwrap_err().to_string();
    assert!(
        message
            .starts_with("no strategy is called \"rnig\"; compiled in are: serial, dsp, ulysses, ")
    );
}

#[test]
fn a_sub_layer_that_is_not_sharded_where_its_terms_are_summed_is_an_error_that_names_it() {
    let model = case(&[4], (2, 2), vec![Sub::Mlp]).shape();
    let errors = dsp_core::launch(2, move |group: Group| -> Result<_, Error> {
        let session = Session::new(Arc::new(Megatron), group, model.clone())?;
        let x = session.split(Tensor::zeros([1, 4, 1, 1, 3], &Device::flex()))?;
        let stage = session.stages().feed_forward()?;
        let x = stage.enter(stage.arrange(x)?)?;
        Ok(stage.leave(x, None).unwrap_err().to_string())
    });
    for error in errors.unwrap() {
        assert_eq!(
            error,
            "stage 0 (\"sub 0\") is to give each rank's terms of a sum, but no parameter of it was placed with the role \
             of rows: give Session::place the roles of its projections, in this stage"
        );
    }
}

/// A feed-forward layer of 10 features.
#[derive(Module, Debug)]
struct Mlp {
    up: Param<Tensor<2>>,
    down: Param<Tensor<2>>,
}

const INNER: Units = Units::Features(10);

fn columns(units: Units) -> Role {
    Role::Columns {
        dim: 1,
        fused: 1,
        units,
    }
}

fn role(path: &str, units: Units) -> Part {
    let rows = Role::Rows { dim: 0, units };
    if path == "up" { columns(units) } else { rows }.in_stage(0)
}

/// Runs it on two ranks, whose parameters have these roles, under Megatron-SP.
fn sharded(roles: fn(&str) -> Part) -> Result<(), Error> {
    let outcome = dsp_core::launch(2, move |group: Group| -> Result<_, Error> {
        let model = case(&[4], (2, 2), vec![Sub::Mlp]).shape();
        let session = Session::new(Arc::new(Megatron), group, model)?;
        let matrix = |shape| Param::from_tensor(Tensor::ones(shape, &Device::flex()));
        let mlp = Mlp {
            up: matrix([3, 10]),
            down: matrix([10, 3]),
        };
        let mlp = session.place(&mlp, roles, &Device::flex()).module;
        let stage = session.stages().feed_forward()?;
        let x = session.split(Tensor::ones([1, 4, 1, 1, 3], &Device::flex()))?;
        let x = stage.arrange(x)?;
        let up = mlp.up.val().unsqueeze();
        let h = stage.enter(x.clone())?.map(|x| x.matmul(up))?;
        let ending = Ending {
            weight: mlp.down.val(),
            bias: None,
            gate: None,
        };
        Ok(stage.end(x, h, ending).map(|_| ()))
    });
    outcome.unwrap().swap_remove(1)
}

#[test]
fn a_sub_layer_of_which_one_projection_was_given_no_role_is_an_error_that_names_it() {
    sharded(|path| role(path, INNER)).unwrap();
    let only = |forgotten: &str| {
        let roles: fn(&str) -> Part = match forgotten {
            "up" => |path| match path {
                "down" => role(path, INNER),
                _ => Role::Replicated.in_stage(0),
            },
            _ => |path| match path {
                "up" => role(path, INNER),
                _ => Role::Replicated.in_stage(0),
            },
        };
        sharded(roles).unwrap_err().to_string()
    };
    assert_eq!(
        only("up"),
        "stage 0 (\"sub 0\") ends with a projection of 5 input features on this rank, and 10 come to it: give \
         Session::place the role of columns for what leads to them and of rows for this one, in the same units and in \
         this stage"
    );
    assert!(
        only("down").contains("no parameter of it was placed with the role of rows"),
        "{}",
        only("down")
    );
}

/// Ten features are not three units: the last would be held by nobody, and the sum would lack it.
#[test]
#[should_panic(
    expected = "parameter \"up\" of shape [3, 10] was placed with the role Columns { dim: 1, fused: 1, units: Features(3) }, \
                which does not fit: the 10 features of dim 1 are not 1 × 3 units of equal width"
)]
fn units_that_do_not_divide_a_projection_are_refused_where_it_is_placed() {
    let group = Group::alone();
    let model = case(&[4], (2, 2), vec![Sub::Mlp]).shape();
    let session = Session::new(Arc::new(Megatron), group, model).unwrap();
    let matrix = |shape| Param::from_tensor(Tensor::ones(shape, &Device::flex()));
    let mlp = Mlp {
        up: matrix([3, 10]),
        down: matrix([10, 3]),
    };
    session.place(&mlp, |path| role(path, Units::Features(3)), &Device::flex());
}

/// Of `[q | k | v]` as one projection a rank would hold the queries and half of the keys.
#[test]
fn a_fused_projection_that_is_not_said_to_be_one_ends_all_ranks_with_its_name() {
    #[derive(Module, Debug)]
    struct Qkv {
        qkv: Param<Tensor<2>>,
    }
    let error = dsp_core::launch(2, |group: Group| -> Result<_, Error> {
        let model = case(&[4], (4, 4), vec![attend(&[0])]).shape();
        let session = Session::new(Arc::new(Megatron), group, model)?;
        let qkv = Param::from_tensor(Tensor::ones([8, 24], &Device::flex()));
        let heads = Units::Query(Heads::multi(4, 2));
        let roles = |_: &str| columns(heads).in_stage(0);
        session.place(&Qkv { qkv }, roles, &Device::flex());
        Ok(())
    })
    .unwrap_err();
    let CommError::Panicked { message, .. } = &error.root else {
        panic!("{error}");
    };
    assert!(
        message.ends_with(
            "which does not fit: the 24 features of dim 1 are not 1 × 4 heads of 2; say how many projections are fused, \
             and where a head has other features here, give heads of that dim"
        ),
        "{message}"
    );
}

#[test]
fn a_forgotten_enter_is_an_error_that_names_the_layouts() {
    let model = case(&[4], (2, 2), vec![attend(&[0]), Sub::Text]).shape();
    let errors = dsp_core::launch(2, move |group: Group| -> Result<_, Error> {
        let session = Session::new(Arc::new(Megatron), group, model.clone())?;
        let mut stages = session.stages();
        let (attention, text) = (stages.attention()?, stages.cross_attention()?);
        // Of one of two heads each.
        let x = session.split(Tensor::zeros([1, 4, 1, 1, common::HEAD], &Device::flex()))?;
        let keys = Tensor::zeros([1, 3, common::HEAD], &Device::flex());
        Ok([
            attention
                .attend(x.clone(), x.clone(), x.clone())
                .map(|_| ()),
            text.cross_attend(x, keys.clone(), keys, [3].into())
                .map(|_| ()),
        ]
        .map(|outcome| outcome.unwrap_err().to_string()))
    });
    for [attend, cross_attend] in errors.unwrap() {
        assert_eq!(
            attend,
            "attend expects [4, 1, 1], but was given [4/2, 1, 1]"
        );
        assert_eq!(
            cross_attend,
            "cross_attend expects [4, 1, 1], but was given [4/2, 1, 1]"
        );
    }
}

/// Where the end of a sub-layer and the switch after it are one operation, too.
#[test]
fn a_last_projection_of_another_width_is_an_error_also_where_the_switch_goes_in_parts() {
    let subs = vec![attend(&[0]), attend(&[1])];
    let model = case(&[4, 6], (2, 2), subs).shape();
    let errors = dsp_core::launch(2, move |group: Group| -> Result<_, Error> {
        let session = Session::new(Arc::new(Dsp), group, model.clone())?;
        let session = session.switching_in(2.try_into().unwrap());
        let stage = session.stages().attention()?;
        let x = session.split(Tensor::zeros([1, 4, 6, 1, 4], &Device::flex()))?;
        let ending = Ending {
            weight: Tensor::zeros([3, 4], &Device::flex()),
            bias: None,
            gate: None,
        };
        let x = stage.arrange(x)?;
        Ok(stage.end(x.clone(), x, ending).unwrap_err().to_string())
    });
    for error in errors.unwrap() {
        assert!(
            error.starts_with(
                "stage 0 (\"sub 0\") ends with a projection of 3 input features on this rank, and 4 come to it: "
            ),
            "{error}"
        );
    }
}

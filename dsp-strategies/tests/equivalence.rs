//! Every strategy that is compiled in gives what one rank alone gives: outputs, the gradients of the inputs
//! and of every parameter. A new strategy is tested by being registered.
#![cfg(all(feature = "flex", feature = "all"))]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use common::{
    Case, Checkpointing, HEAD, Sub, attend, cases, check, check_replicas, is_well_conditioned,
    launch, linear_cases, noise, run, tries, values, whole,
};
use dsp_core::attention::{Documents, Dropout, DropoutKey, Logsumexp, Within};
use dsp_core::session::Attend;
use dsp_core::strategy::{AttentionStage, OutputLayout, Plan, StageKind};
use dsp_core::{
    AxisSet, Error, Heads, Mask, ModelShape, PlanError, SeqAxis, SequenceParallel, Session, Stage,
};
use dsp_strategies::Usp;
use proptest::prelude::*;

/// What is left are f64's roundings, of sums in another order: about 1e-14 a layer.
const F64: f64 = 1e-10;
/// The same in f32, about 1e-7 each, of cases that f32 can hold.
const F32: f64 = 1e-5;

/// Which refusal is right, if any. Those that are not named here refuse nothing.
fn right_refusal(strategy: &str, case: &Case, ranks: usize) -> Option<PlanError> {
    let attentions = || {
        case.subs
            .iter()
            .enumerate()
            .filter_map(|(index, sub)| match sub {
                Sub::Attention(axes, _) | Sub::Linear(axes) => Some((format!("sub {index}"), axes)),
                _ => None,
            })
    };
    let name = strategy.to_owned();
    match strategy {
        "serial" => (ranks != 1).then_some(PlanError::Ranks {
            strategy: name,
            ranks,
            rule: "it is the model on one device; every other strategy runs on several",
        }),
        "dsp" => attentions()
            .find(|(_, axes)| axes.len() == case.lengths.len())
            .filter(|_| ranks > 1)
            .map(|(stage, _)| PlanError::NoAxisLeft {
                strategy: name,
                stage,
                axes: case.lengths.len(),
            }),
        "ulysses" if case.heads.0 < ranks => {
            // An axis that no stage attends needs no heads. Where there is none, the longest is refused first.
            let axes = 0..case.lengths.len();
            let first = |axis: usize| attentions().find(|(_, axes)| axes.contains(&axis));
            let refusals: Option<Vec<_>> = axes.clone().map(first).collect();
            let longest = axes.max_by_key(|&axis| (case.lengths[axis], usize::MAX - axis))?;
            refusals.map(|mut refusals| PlanError::Heads {
                strategy: name,
                stage: refusals.swap_remove(longest).0,
                heads: case.heads.0,
                ranks,
            })
        }
        // They run softmax attention where it is local: along an axis that is not split.
        "lasp" | "lasp2" if ranks > 1 => {
            let axes = 0..case.lengths.len();
            let first = |axis: usize| attentions().find(|(_, axes)| axes.contains(&axis));
            let refusals: Option<Vec<_>> = axes.clone().map(first).collect();
            let longest = axes.max_by_key(|&axis| (case.lengths[axis], usize::MAX - axis))?;
            refusals.map(|mut refusals| PlanError::Form {
                strategy: name,
                stage: refusals.swap_remove(longest).0,
                rule: match strategy {
                    "lasp" => "it hands on the state of linear attention, and softmax attention has none; mix it with \
                               a strategy for that, as in lasp+ring",
                    _ => "it gathers the states of linear attention, and softmax attention has none; mix it with a \
                          strategy for that, as in lasp2+ring",
                },
            })
        }
        _ => None,
    }
}

fn assert_refusal_is_right(
    strategy: &str,
    case: &Case,
    ranks: usize,
    given: Option<&PlanError>,
) -> Result<(), TestCaseError> {
    let right = right_refusal(strategy, case, ranks);
    prop_assert_eq!(given, right.as_ref(), "{} on {} ranks", strategy, ranks);
    Ok(())
}

fn check_all(case: &Case, ranks: usize, dtype: DType, tolerance: f64) -> Result<(), TestCaseError> {
    for strategy in dsp_strategies::all() {
        let outcome = check(&strategy, case, ranks, dtype, tolerance)?;
        assert_refusal_is_right(strategy.name(), case, ranks, outcome.err().as_ref())?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(tries(60))]

    #[test]
    fn two_axes_give_the_serial_results_in_f64(case in cases(2), ranks in 1usize..=5) {
        check_all(&case, ranks, DType::F64, F64)?;
    }

    #[test]
    fn three_axes_give_the_serial_results_in_f64(case in cases(3), ranks in 1usize..=5) {
        check_all(&case, ranks, DType::F64, F64)?;
    }

    #[test]
    fn one_axis_gives_the_serial_results_in_f64(case in cases(1), ranks in 1usize..=5) {
        check_all(&case, ranks, DType::F64, F64)?;
    }

    #[test]
    fn any_number_of_axes_gives_the_serial_results_in_f32(
        case in (1usize..=3).prop_flat_map(cases),
        ranks in 1usize..=5,
    ) {
        prop_assume!(is_well_conditioned(&case));
        check_all(&case, ranks, DType::F32, F32)?;
    }
}

proptest! {
    #![proptest_config(tries(30))]

    #[test]
    fn replicas_of_every_strategy_give_the_serial_gradients_of_all_samples(
        case in (1usize..=3).prop_flat_map(|axes| prop_oneof![cases(axes), linear_cases(axes)]),
        ranks in 1usize..=3,
    ) {
        // A replica has a sample at least.
        prop_assume!(case.batch == 2);
        // And numbers its samples itself: what it drops is not what one model of all samples would.
        let case = Case { dropout: None, ..case };
        for strategy in dsp_strategies::all() {
            let outcome = check_replicas(&strategy, &case, (ranks, 2), F64)?;
            prop_assert_eq!(outcome.is_err(), strategy.plan(&case.shape(), ranks).is_err());
        }
    }

    #[test]
    fn two_runs_give_the_same_bits(
        case in (1usize..=3).prop_flat_map(|axes| prop_oneof![cases(axes), linear_cases(axes)]),
        ranks in 2usize..=5,
    ) {
        for strategy in dsp_strategies::all() {
            let once = || run(&strategy, &case, ranks, DType::F32).map(|seen| whole(&seen));
            if let (Ok(first), Ok(second)) = (once(), once()) {
                for (name, values) in &first {
                    let bits = |values: &[f64]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    prop_assert_eq!(bits(values), bits(&second[name]), "{} {}", strategy.name(), name);
                }
            }
        }
    }
}

/// Whether a strategy may refuse a model with linear attentions. Those that compute one form only refuse the other
/// where no axis is left that only their own attends; others as for softmax.
fn may_refuse_forms(strategy: &str, case: &Case) -> bool {
    let refuses = |sub: &Sub, axis: usize| match (strategy, sub) {
        ("lasp" | "lasp2", Sub::Attention(axes, _)) => axes.contains(&axis),
        // A state runs through positions in order: of a joint attention, the outermost axis must be split.
        ("lasp" | "lasp2", Sub::Linear(axes)) => axes.contains(&axis) && axes[0] != axis,
        ("lss" | "ring" | "usp", Sub::Linear(axes)) => axes.contains(&axis),
        _ => false,
    };
    let mut axes = 0..case.lengths.len();
    axes.all(|axis| case.subs.iter().any(|sub| refuses(sub, axis)))
}

fn check_forms(
    strategy: &Arc<dyn SequenceParallel>,
    case: &Case,
    ranks: usize,
    dtype: DType,
    tolerance: f64,
) -> Result<(), TestCaseError> {
    let outcome = check(strategy, case, ranks, dtype, tolerance)?;
    let refusal = outcome.err();
    match &refusal {
        Some(PlanError::Form { .. } | PlanError::Residual { .. }) => {
            prop_assert!(may_refuse_forms(strategy.name(), case), "{refusal:?}");
        }
        _ => {
            let one_form = ["lasp", "lasp2", "lss", "ring", "usp"].contains(&strategy.name());
            if !one_form {
                assert_refusal_is_right(strategy.name(), case, ranks, refusal.as_ref())?;
            } else {
                prop_assert_eq!(refusal, None);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(tries(60))]

    #[test]
    fn linear_attention_gives_the_serial_results_in_f64(
        case in (1usize..=3).prop_flat_map(linear_cases),
        ranks in 1usize..=5,
    ) {
        for strategy in dsp_strategies::all() {
            check_forms(&strategy, &case, ranks, DType::F64, F64)?;
        }
    }

    #[test]
    fn linear_attention_gives_the_serial_results_in_f32(
        case in (1usize..=3).prop_flat_map(linear_cases),
        ranks in 1usize..=5,
    ) {
        prop_assume!(is_well_conditioned(&case));
        for strategy in dsp_strategies::all() {
            check_forms(&strategy, &case, ranks, DType::F32, F32)?;
        }
    }

    #[test]
    fn a_hybrids_softmax_and_linear_layers_run_with_a_strategy_each(
        case in linear_cases(1),
        ranks in 1usize..=5,
    ) {
        for name in ["lasp2+lss", "lasp+ulysses", "lss+lasp2", "lasp+megatron"] {
            let mixture = dsp_strategies::by_name(name).unwrap();
            let outcome = check(&mixture, &case, ranks, DType::F64, F64)?;
            let refuses = name == "lasp+ulysses" && case.heads.0 < ranks;
            prop_assert!(outcome.is_ok() || refuses, "{}: {:?}", name, outcome);
        }
    }
}

#[test]
fn linear_attention_runs_under_lasp_on_chunks_that_are_uneven_or_empty() {
    for (length, ranks) in [(1, 4), (3, 5), (7, 3), (130, 2), (11, 4)] {
        let mut case = model(
            &[length],
            (4, 2),
            vec![Sub::Linear(vec![0]), Sub::Mlp, Sub::Linear(vec![0])],
        );
        case.batch = 1;
        for name in ["lasp", "lasp2", "ulysses", "megatron"] {
            let strategy = dsp_strategies::by_name(name).unwrap();
            let outcome = check(&strategy, &case, ranks, DType::F64, F64).unwrap();
            assert!(
                outcome.is_ok() || (name == "ulysses" && ranks > 4),
                "{name}: {outcome:?}"
            );
        }
    }
}

/// Of the strategies that split an axis for ever, or move activations only, one with a first choice.
fn mixtures() -> Vec<Arc<dyn SequenceParallel>> {
    let names = [
        "dsp+ulysses",
        "dsp+megatron",
        "dsp+lss",
        "megatron+dsp",
        "ulysses+lss",
    ];
    names
        .map(|name| dsp_strategies::by_name(name).unwrap())
        .into()
}

proptest! {
    #![proptest_config(tries(40))]

    #[test]
    fn a_mixture_runs_each_stage_with_one_of_its_parts_and_gives_the_serial_results(
        case in (1usize..=3).prop_flat_map(cases),
        ranks in 1usize..=5,
    ) {
        for mixture in mixtures() {
            let outcome = check(&mixture, &case, ranks, DType::F64, F64)?;
            // Each has a part that refuses nothing.
            let refuses = mixture.name() == "dsp+ulysses" && case.heads.0 < ranks;
            prop_assert!(outcome.is_ok() || refuses, "{}: {:?}", mixture.name(), outcome);
        }
    }
}

proptest! {
    #![proptest_config(tries(40))]

    #[test]
    fn every_mesh_of_usp_gives_the_serial_results(
        case in (1usize..=3).prop_flat_map(cases),
        (row, rows) in prop::sample::select(vec![
            (1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (1, 5), (5, 1), (2, 3), (3, 2), (6, 1), (1, 6),
        ]),
    ) {
        let ranks = row * rows;
        let usp: Arc<dyn SequenceParallel> = Arc::new(Usp::with_rows_of(row.try_into().unwrap()));
        let outcome = check(&usp, &case, ranks, DType::F64, F64)?;
        match outcome {
            Ok(()) => (),
            Err(PlanError::RowHeads { heads, row: of, .. }) => prop_assert!(heads < row && of == row),
            Err(refusal) => prop_assert!(false, "{refusal}"),
        }
    }
}

#[test]
fn a_mixtures_second_part_runs_what_the_first_cannot() {
    let mixture = dsp_strategies::by_name("dsp+ulysses").unwrap();
    let case = model(
        &[3, 4],
        (4, 4),
        vec![attend(&[0]), attend(&[0, 1]), attend(&[1])],
    );
    let plan = mixture.plan(&case.shape(), 2).unwrap();
    let part = |stage: usize| plan.stages[stage].part.as_ref().unwrap().index;
    assert_eq!([part(0), part(1), part(2)], [0, 1, 0]);
}

fn model(lengths: &[usize], heads: (usize, usize), subs: Vec<Sub>) -> Case {
    Case {
        batch: 2,
        lengths: lengths.to_vec(),
        heads,
        subs,
        output: OutputLayout::AsInput,
        dropout: None,
        checkpointing: Checkpointing::Off,
        switch_parts: None,
    }
}

/// A case that must run under every parallel strategy.
#[track_caller]
fn assert_runs_everywhere(case: &Case) {
    for ranks in 2..=5 {
        for strategy in dsp_strategies::all() {
            // LASP is for linear attention.
            if !["serial", "lasp", "lasp2"].contains(&strategy.name()) {
                check(&strategy, case, ranks, DType::F64, F64)
                    .unwrap()
                    .unwrap();
            }
        }
    }
}

#[test]
fn heads_and_lengths_that_no_number_of_ranks_divides_give_the_serial_gradients() {
    let subs = vec![
        attend(&[0]),
        attend(&[1]),
        Sub::Mlp,
        attend(&[0]),
        Sub::Text,
        attend(&[1]),
    ];
    assert_runs_everywhere(&model(&[7, 11], (7, 7), subs));
}

#[test]
fn fewer_key_value_heads_than_ranks_give_the_serial_gradients() {
    let subs = vec![attend(&[0]), attend(&[1]), Sub::Mlp];
    assert_runs_everywhere(&model(&[5, 6], (6, 2), subs.clone()));
    assert_runs_everywhere(&model(&[5, 6], (5, 1), subs));
}

#[test]
fn axes_shorter_than_the_ranks_give_the_serial_gradients() {
    let subs = vec![attend(&[0]), attend(&[1]), Sub::Text, Sub::Mlp];
    assert_runs_everywhere(&model(&[1, 2], (5, 5), subs.clone()));
    assert_runs_everywhere(&model(&[2, 3], (5, 5), subs));
}

#[test]
fn causal_attention_sees_global_positions() {
    let causal = |axis| Sub::Attention(vec![axis], Mask::Causal);
    assert_runs_everywhere(&model(&[6, 7], (5, 5), vec![causal(0), causal(1)]));
}

#[test]
fn windows_and_documents_are_of_global_positions() {
    let window = |axis| {
        let size = NonZeroUsize::new(3).unwrap();
        Sub::Attention(vec![axis], Mask::Window { size })
    };
    let packed = |axis, within| {
        let documents = Documents::new([2, 5]).unwrap();
        Sub::Attention(vec![axis], Mask::Packed { documents, within })
    };
    let subs = vec![
        window(0),
        packed(1, Within::Causal),
        window(1),
        packed(0, Within::Full),
    ];
    assert_runs_everywhere(&model(&[6, 7], (5, 5), subs));
}

#[test]
fn every_strategy_drops_what_serial_drops() {
    let mut case = model(&[5, 6], (6, 2), vec![attend(&[0]), attend(&[1]), Sub::Mlp]);
    case.dropout = Some(0.3);
    assert_runs_everywhere(&case);
    let output = |case: &Case| {
        let serial: Arc<dyn SequenceParallel> = Arc::new(dsp_strategies::Serial);
        run(&serial, case, 1, DType::F64)
            .unwrap()
            .swap_remove(0)
            .output
    };
    let dropped = output(&case);
    case.dropout = None;
    assert_ne!(dropped, output(&case));
}

#[test]
fn dropout_of_a_linear_attention_is_refused_by_every_strategy() {
    let case = model(&[6], (4, 4), vec![Sub::Linear(vec![0])]);
    let dropout = Some(Dropout::new(0.5, DropoutKey::default()).unwrap());
    for name in ["dsp", "ulysses", "megatron", "lasp", "lasp2"] {
        let strategy = dsp_strategies::by_name(name).unwrap();
        let shape = case.shape();
        let refused = dsp_core::launch(1, move |group| -> Result<_, Error> {
            let session = Session::new(strategy.clone(), group, shape.clone())?;
            let stage = session.stages().attention()?;
            let x = || {
                let x = Tensor::<5>::zeros([2, 6, 1, 1, 4 * HEAD], &Device::flex());
                session.split(x)
            };
            let options = Attend {
                dropout,
                ..Attend::default()
            };
            Ok(stage.attend_with([x()?, x()?, x()?], options).err())
        });
        let expected = Error::LinearDropout { probability: 0.5 };
        assert_eq!(refused.unwrap().swap_remove(0), Some(expected), "{name}");
    }
}

#[test]
fn joint_attention_over_two_of_three_axes_gives_the_serial_gradients() {
    let joint = |a, b, mask| Sub::Attention(vec![a, b], mask);
    let subs = vec![
        joint(0, 1, Mask::Causal),
        joint(1, 2, Mask::Full),
        joint(0, 2, Mask::Causal),
    ];
    assert_runs_everywhere(&model(&[3, 4, 3], (6, 3), subs));
}

#[test]
fn the_logsumexp_of_a_split_attention_is_the_serial_one_where_its_queries_are() {
    let heads = Heads {
        query: 5,
        key_value: 1,
        dim: 2,
    };
    let axis = SeqAxis::FIRST;
    let attention = AttentionStage::softmax(AxisSet::of(&[axis]), heads, Mask::Causal);
    let model = ModelShape {
        batch: 2,
        lengths: vec![7],
        hidden: 10,
        stages: vec![Stage::new("attention", StageKind::Attention(attention))],
        output: OutputLayout::AsInput,
    };
    let whole = |channels: usize, seed| {
        let values: Vec<f64> = (0..14 * channels).map(|index| noise(seed, index)).collect();
        let data = TensorData::new(values, [2, 7, 1, 1, channels]);
        Tensor::<5>::from_data(data, (&Device::flex(), DType::F64))
    };
    let run = |strategy: Arc<dyn SequenceParallel>, ranks: usize| {
        let model = model.clone();
        let seen = launch(ranks, move |group| -> Result<_, Error> {
            let session = Session::new(strategy.clone(), group, model.clone())?;
            let stage = session.stages().attention()?;
            let wanted = Attend {
                logsumexp: Logsumexp::Wanted,
                ..Attend::default()
            };
            let [q, k, v] =
                [(10, 1), (2, 2), (2, 3)].map(|(c, seed)| session.split(whole(c, seed)));
            let attended = stage.attend_with([q?, k?, v?], wanted)?;
            Ok(values(&session.gather(attended.logsumexp.unwrap())?))
        });
        seen.unwrap().swap_remove(0)
    };
    let serial = run(Arc::new(dsp_strategies::Serial), 1);
    assert_eq!(serial.len(), 2 * 7 * 5);
    for strategy in dsp_strategies::all() {
        for ranks in 2..=5 {
            // A strategy that shards heads has no attention of all of them on any rank.
            let shards = |plan: Plan| plan.stages[0].inner != plan.stages[0].residual;
            if strategy.plan(&model, ranks).is_ok_and(|plan| !shards(plan)) {
                for (a, b) in run(strategy.clone(), ranks).iter().zip(&serial) {
                    assert!((a - b).abs() < F64, "{} on {ranks} ranks", strategy.name());
                }
            }
        }
    }
}

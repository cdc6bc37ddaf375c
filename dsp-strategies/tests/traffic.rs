//! What is sent, counted by the ledger and held to formulas that stand in this file: to the element and the
//! byte, forward and backward, per rank. (That the ledger equals each plan's own formula is a part of
//! `common::check`, and so of every equivalence test.)
#![cfg(all(feature = "flex", feature = "all"))]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::sync::Arc;

use burn::tensor::DType;
use common::{
    Case, Checkpointing, HEAD, HIDDEN, INNER, Seen, Sub, assert_sent_as_planned, attend, run,
};
use dsp_core::ledger::{Collective, Phase};
use dsp_core::strategy::OutputLayout;
use dsp_core::{Mask, Partition, SeqAxis, SequenceParallel};
use dsp_strategies::{Dsp, Lasp, Lasp2, Lss, Megatron, Ring, Ulysses, Usp};
use proptest::prelude::*;

fn pairs(count: usize, output: OutputLayout, lengths: [usize; 2]) -> Case {
    let subs = [
        attend(&[1]),
        Sub::Text,
        Sub::Mlp,
        attend(&[0]),
        Sub::Text,
        Sub::Mlp,
    ];
    Case {
        batch: 2,
        lengths: lengths.to_vec(),
        heads: (4, 4),
        subs: (0..count).flat_map(|_| subs.clone()).collect(),
        output,
        dropout: None,
        checkpointing: Checkpointing::Off,
        switch_parts: None,
    }
}

fn observe(strategy: impl SequenceParallel + 'static, case: &Case, ranks: usize) -> Vec<Seen> {
    let strategy: Arc<dyn SequenceParallel> = Arc::new(strategy);
    let seen = run(&strategy, case, ranks, DType::F32).unwrap();
    assert_sent_as_planned(&seen, DType::F32).unwrap();
    seen
}

/// All-to-alls of one direction: how many, and their elements.
fn switches(seen: &Seen, phase: Phase) -> (u64, u64) {
    let entry = seen.step.entry(phase, Collective::AllToAll);
    assert_eq!(entry, seen.step.phase(phase), "nothing but all-to-alls");
    (entry.calls, entry.elements)
}

#[test]
fn dsp_makes_two_switches_a_pair_and_one_less_if_the_output_may_stay_where_it_is() {
    for ranks in [2, 4] {
        for depth in 1..=3 {
            for (output, less) in [(OutputLayout::AsInput, 0), (OutputLayout::Free, 1)] {
                let case = pairs(depth, output, [4, 8]);
                let activation = case.elements();
                let each = activation * (ranks - 1) / (ranks * ranks);
                let count = 2 * depth - less;
                for seen in observe(Dsp, &case, ranks) {
                    for phase in [Phase::Forward, Phase::Backward] {
                        let expected = (count as u64, (count * each) as u64);
                        assert_eq!(
                            switches(&seen, phase),
                            expected,
                            "{depth} pairs, {ranks} ranks"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn ulysses_sends_four_times_as_much_an_attention_over_the_split_axis_and_nothing_over_the_other() {
    for ranks in [2, 4] {
        for depth in 1..=2 {
            let case = pairs(depth, OutputLayout::AsInput, [4, 8]);
            let heads = 2 * 4 * 8 * 4 * HEAD;
            let expected = 4 * depth * heads * (ranks - 1) / (ranks * ranks);
            for seen in observe(Ulysses, &case, ranks) {
                for phase in [Phase::Forward, Phase::Backward] {
                    assert_eq!(switches(&seen, phase), (4 * depth as u64, expected as u64));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_uneven_dsp_switch_sends_what_each_rank_does_not_keep(
        lengths in [1usize..7, 1usize..7],
        ranks in 1usize..=5,
    ) {
        let case = pairs(1, OutputLayout::AsInput, lengths);
        let [time, space] = lengths.map(|length| Partition::balanced(length, ranks));
        for (rank, seen) in observe(Dsp, &case, ranks).iter().enumerate() {
            let (a, b) = (time.count(rank), space.count(rank));
            let unit = case.batch * HIDDEN;
            // There, before time is attended, and back: each direction makes both moves once.
            let moved = unit * (a * (lengths[1] - b) + b * (lengths[0] - a));
            for phase in [Phase::Forward, Phase::Backward] {
                prop_assert_eq!(seen.step.phase(phase).elements, moved as u64);
                prop_assert_eq!(seen.step.phase(phase).bytes, 4 * moved as u64);
            }
        }
    }

    #[test]
    fn uneven_ulysses_sends_heads_for_sequence_as_the_formula_says(
        length in 1usize..8,
        (query, key_value) in prop::sample::select(vec![(5usize, 5usize), (6, 2), (5, 1), (6, 3), (7, 7)]),
        ranks in 1usize..=5,
    ) {
        let case = Case {
            batch: 2,
            lengths: vec![length],
            heads: (query, key_value),
            subs: vec![attend(&[0])],
            output: OutputLayout::AsInput,
            dropout: None,
            checkpointing: Checkpointing::Off,
            switch_parts: None,
        };
        let sequence = Partition::balanced(length, ranks);
        let heads = Partition::balanced(query, ranks);
        // The key-value heads that each rank's query heads touch, counted one by one.
        let touched = |rank: usize| {
            let groups = heads.ranges(rank).iter().cloned().flatten().map(|head| head * key_value / query);
            let mut groups: Vec<_> = groups.collect();
            groups.dedup();
            groups.len()
        };
        for (rank, seen) in observe(Ulysses, &case, ranks).iter().enumerate() {
            let (l, q, kv) = (sequence.count(rank), heads.count(rank), touched(rank));
            let others: usize = (0..ranks).filter(|&peer| peer != rank).map(touched).sum();
            let unit = 2 * HEAD;
            let forward = unit * (l * (query - q) + 2 * l * others + q * (length - l));
            let backward = unit * (q * (length - l) + 2 * kv * (length - l) + l * (query - q));
            prop_assert_eq!(seen.step.phase(Phase::Forward).elements, forward as u64);
            prop_assert_eq!(seen.step.phase(Phase::Backward).elements, backward as u64);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn lss_gathers_keys_and_values_forward_and_scatters_their_gradients_back(
        length in 1usize..8,
        (query, key_value) in prop::sample::select(vec![(5usize, 5usize), (6, 2), (5, 1)]),
        ranks in 1usize..=5,
    ) {
        let case = one_attention(length, (query, key_value));
        let sequence = Partition::balanced(length, ranks);
        for (rank, seen) in observe(Lss, &case, ranks).iter().enumerate() {
            let own = sequence.count(rank);
            let unit = case.batch * 2 * key_value * HEAD;
            let (forward, backward) = (seen.step.phase(Phase::Forward), seen.step.phase(Phase::Backward));
            prop_assert_eq!(forward.elements, (unit * (ranks - 1) * own) as u64);
            prop_assert_eq!(backward.elements, (unit * (length - own)) as u64);
            let calls = u64::from(ranks > 1);
            prop_assert_eq!((forward.calls, backward.calls), (calls, calls), "one fused exchange each way");
        }
    }

    #[test]
    fn a_ring_sends_all_blocks_but_the_next_ranks_and_gradients_of_all_but_its_own(
        length in 1usize..9,
        (query, key_value) in prop::sample::select(vec![(5usize, 5usize), (6, 2), (5, 1)]),
        causal in any::<bool>(),
        ranks in 1usize..=5,
    ) {
        let mut case = one_attention(length, (query, key_value));
        let sequence = if causal {
            case.subs = vec![Sub::Attention(vec![0], Mask::Causal)];
            Partition::zigzag(length, ranks)
        } else {
            Partition::balanced(length, ranks)
        };
        // Every rank sees something of every block that is not empty: all go round.
        prop_assume!(length >= 2 * ranks);
        for (rank, seen) in observe(Ring, &case, ranks).iter().enumerate() {
            let (own, next) = (sequence.count(rank), sequence.count((rank + 1) % ranks));
            let unit = case.batch * 2 * key_value * HEAD;
            let there = if ranks > 1 { unit * (length - next) } else { 0 };
            let back = if ranks > 1 { there + unit * (length - own) } else { 0 };
            prop_assert_eq!(seen.step.phase(Phase::Forward).elements, there as u64);
            prop_assert_eq!(seen.step.phase(Phase::Backward).elements, back as u64);
        }
    }

    #[test]
    fn megatron_gathers_before_and_scatters_after_each_sub_layer(
        length in 1usize..8,
        ranks in 1usize..=5,
    ) {
        let mut case = one_attention(length, (5, 1));
        case.subs.extend([Sub::Mlp, Sub::Text]);
        let sequence = Partition::balanced(length, ranks);
        for (rank, seen) in observe(Megatron, &case, ranks).iter().enumerate() {
            let own = sequence.count(rank);
            let each = case.batch * HIDDEN * ((ranks - 1) * own + (length - own));
            for phase in [Phase::Forward, Phase::Backward] {
                prop_assert_eq!(seen.step.phase(phase).elements, 3 * each as u64);
            }
        }
    }
}

#[test]
fn linear_attentions_state_is_all_that_lasp_and_lasp2_send_whatever_the_length() {
    for (length, ranks) in [(1, 3), (7, 4), (64, 4), (5, 1)] {
        let case = Case {
            subs: vec![Sub::Linear(vec![0])],
            ..one_attention(length, (4, 2))
        };
        let state = case.batch * 4 * HEAD * HEAD;
        for (rank, seen) in observe(Lasp, &case, ranks).iter().enumerate() {
            let (forward, backward) = (
                seen.step.phase(Phase::Forward),
                seen.step.phase(Phase::Backward),
            );
            let last = rank + 1 == ranks;
            assert_eq!(forward.elements, if last { 0 } else { state as u64 });
            assert_eq!(backward.elements, if rank == 0 { 0 } else { state as u64 });
        }
        for seen in observe(Lasp2, &case, ranks) {
            for phase in [Phase::Forward, Phase::Backward] {
                assert_eq!(
                    seen.step.phase(phase).elements,
                    ((ranks - 1) * state) as u64
                );
                assert_eq!(seen.step.phase(phase).calls, u64::from(ranks > 1));
            }
        }
    }
}

#[test]
fn an_even_usp_mesh_sends_ulysses_share_in_rows_and_the_rings_across() {
    let length = 24;
    for (query, key_value) in [(4, 4), (4, 2), (4, 1)] {
        let case = one_attention(length, (query, key_value));
        for (row, rows) in [(1, 4), (2, 2), (4, 1), (2, 3)] {
            let ranks = row * rows;
            let activation = case.batch * length * query * HEAD;
            // (M/N)·[(2+2g)(u−1)/u + 2g(r−1)] with g = max(Hkv, u)/Hq, in whole numbers.
            let held = key_value.max(row);
            let traded = (2 * query + 2 * held) * (row - 1) * activation / (query * row * ranks);
            let rung = 2 * held * (rows - 1) * activation / (query * ranks);
            for seen in observe(Usp::with_rows_of(row.try_into().unwrap()), &case, ranks) {
                let forward = seen.step.phase(Phase::Forward).elements;
                assert_eq!(
                    forward,
                    (traded + rung) as u64,
                    "{row}×{rows}, {query} heads, {key_value} of keys"
                );
            }
        }
    }
}

#[test]
fn megatrons_ranks_hold_their_share_of_the_weights_and_lss_ranks_of_the_table() {
    let case = Case {
        lengths: vec![8],
        subs: vec![attend(&[0]), Sub::Mlp],
        ..one_attention(8, (4, 4))
    };
    let held = |strategy: Arc<dyn SequenceParallel>, ranks: usize| {
        let seen = run(&strategy, &case, ranks, DType::F32).unwrap();
        let elements = |seen: &Seen| -> [usize; 3] {
            let of = |names: &[&str]| {
                let matching = |path: &str| names.iter().any(|name| path.contains(name));
                seen.held()
                    .filter(|(path, _)| matching(path))
                    .map(|(_, count)| count)
                    .sum()
            };
            [
                of(&["layers.0.inputs", "layers.0.output"]),
                of(&["layers.1.inputs"]),
                of(&["table"]),
            ]
        };
        seen.iter().map(elements).collect::<Vec<_>>()
    };
    let (attention, mlp, table) = (4 * HIDDEN * 4 * HEAD, HIDDEN * INNER, 8 * HIDDEN);
    // Five inner features over four ranks: one each, and two for the last.
    let features = [1, 1, 1, 2];
    for (rank, found) in held(Arc::new(Megatron), 4).into_iter().enumerate() {
        assert_eq!(found, [attention / 4, HIDDEN * features[rank], table]);
    }
    for found in held(Arc::new(Lss), 4) {
        assert_eq!(found, [attention, mlp, table / 4]);
    }
}

fn one_attention(length: usize, heads: (usize, usize)) -> Case {
    Case {
        batch: 2,
        lengths: vec![length],
        heads,
        subs: vec![attend(&[0])],
        output: OutputLayout::AsInput,
        dropout: None,
        checkpointing: Checkpointing::Off,
        switch_parts: None,
    }
}

#[test]
fn on_three_axes_attended_in_a_cycle_dsp_switches_on_every_second_layer() {
    // k/(k−1) switches a layer that attends each of k axes once: 3/2 for three axes.
    for layers in [2, 4] {
        let case = Case {
            batch: 1,
            lengths: vec![4, 4, 4],
            heads: (2, 2),
            subs: (0..layers)
                .flat_map(|_| [attend(&[0]), attend(&[1]), attend(&[2])])
                .collect(),
            output: OutputLayout::AsInput,
            dropout: None,
            checkpointing: Checkpointing::Off,
            switch_parts: None,
        };
        let each = case.elements() / 4;
        let expected = 3 * layers as u64 / 2;
        for seen in observe(Dsp, &case, 2) {
            for phase in [Phase::Forward, Phase::Backward] {
                assert_eq!(switches(&seen, phase), (expected, expected * each as u64));
            }
        }
    }
}

#[test]
fn dsp_splits_the_longer_axis_where_the_choice_is_free() {
    // Only the first axis is attended: either other may be split, and the last divides evenly.
    let case = Case {
        batch: 1,
        lengths: vec![5, 3, 8],
        heads: (1, 1),
        subs: vec![attend(&[0]), attend(&[0])],
        output: OutputLayout::Free,
        dropout: None,
        checkpointing: Checkpointing::Off,
        switch_parts: None,
    };
    let plan = Dsp.plan(&case.shape(), 4).unwrap();
    assert!(
        plan.stages
            .iter()
            .all(|stage| stage.residual.is_split(SeqAxis::THIRD))
    );
    assert!((0..4).all(|rank| plan.sends(rank) == Default::default()));
}

#[test]
fn one_rank_sends_nothing_at_all() {
    let case = pairs(1, OutputLayout::AsInput, [3, 4]);
    for strategy in dsp_strategies::all() {
        for seen in run(&strategy, &case, 1, DType::F32).unwrap() {
            assert_eq!(seen.step.phase(Phase::Forward).elements, 0);
            assert_eq!(seen.step.phase(Phase::Backward).elements, 0);
            assert_eq!(seen.reduction.0.elements, 0);
            assert_eq!(seen.gather.0.elements, 0);
        }
    }
}

#[test]
fn the_gather_of_an_output_and_the_reduction_of_gradients_send_as_their_formulas_say() {
    let case = pairs(1, OutputLayout::AsInput, [5, 7]);
    for ranks in 2..=4 {
        // DSP starts with time split, as space is attended first.
        let blocks = Partition::balanced(5, ranks);
        let parameters = parameters(&case);
        let chunks = Partition::balanced(parameters, ranks);
        for (rank, seen) in observe(Dsp, &case, ranks).iter().enumerate() {
            let own = 2 * HIDDEN * 7 * blocks.count(rank);
            assert_eq!(seen.gather.0.elements, ((ranks - 1) * own) as u64);
            let chunk = chunks.count(rank);
            let expected = (parameters - chunk) + (ranks - 1) * chunk;
            assert_eq!(seen.reduction.0.elements, expected as u64);
        }
    }
}

/// The model's parameters, counted by hand.
fn parameters(case: &Case) -> usize {
    let attention = {
        let (query, key) = (case.heads.0 * HEAD, case.heads.1 * HEAD);
        (HIDDEN + 1) * (query + 2 * key) + query * HIDDEN
    };
    let mlp = (HIDDEN + 1) * common::INNER + common::INNER * HIDDEN;
    // Beside them a norm's weight, the last bias and a gate.
    let layers = case
        .subs
        .iter()
        .map(|sub| 3 * HIDDEN + if *sub == Sub::Mlp { mlp } else { attention });
    case.lengths[0] * HIDDEN + layers.sum::<usize>()
}

/// What all ranks together send, each way, to move the split from one axis to another.
fn moved(case: &Case, ranks: usize, from: usize, to: usize) -> u64 {
    if from == to {
        return 0;
    }
    let others: usize = (0..case.lengths.len())
        .filter(|&axis| axis != from && axis != to)
        .map(|axis| case.lengths[axis])
        .product();
    let [a, b] = [from, to].map(|axis| Partition::balanced(case.lengths[axis], ranks).counts());
    let kept: usize = a.iter().zip(&b).map(|(a, b)| a * b).sum();
    let all = case.lengths[from] * case.lengths[to];
    2 * (case.batch * HIDDEN * others * (all - kept)) as u64
}

/// Holds DSP's plan to the best of all choices of a split axis for each sub-layer.
fn check_cheapest(case: &Case, ranks: usize) -> Result<(), TestCaseError> {
    let Ok(plan) = Dsp.plan(&case.shape(), ranks) else {
        return Ok(());
    };
    let planned: u64 = (0..ranks)
        .map(|rank| plan.sends(rank))
        .map(|sent| sent.forward + sent.backward)
        .sum();
    // Every choice of a split axis for each sub-layer, as digits of a number.
    let (axes, depth) = (case.lengths.len(), case.subs.len());
    let choices = (0..axes.pow(depth as u32)).map(|number| -> Vec<usize> {
        (0..depth)
            .map(|sub| number / axes.pow(sub as u32) % axes)
            .collect()
    });
    let least = choices
        .filter(|choice| {
            choice.iter().zip(&case.subs).all(|(axis, sub)| match sub {
                Sub::Attention(attended, _) | Sub::Linear(attended) => !attended.contains(axis),
                Sub::Text | Sub::Mlp => true,
            })
        })
        .map(|choice| {
            let steps = choice
                .windows(2)
                .map(|pair| moved(case, ranks, pair[0], pair[1]));
            let back = match case.output {
                OutputLayout::AsInput => moved(case, ranks, choice[depth - 1], choice[0]),
                OutputLayout::Free => 0,
            };
            steps.sum::<u64>() + back
        })
        .min();
    prop_assert_eq!(Some(planned), least);
    Ok(())
}

proptest! {
    #[test]
    fn no_other_choice_of_splits_sends_less_than_dsps_plan(
        case in (2usize..=3).prop_flat_map(common::cases),
        ranks in 2usize..=5,
    ) {
        check_cheapest(&case, ranks)?;
    }
}

#[test]
fn dsp_counts_the_way_back_to_the_inputs_layout_when_it_chooses_the_first_split() {
    // Over three ranks the shortest axis is the cheapest to leave (8 positions, against 10 for the second),
    // but then the output must come back to it (8 more): starting with the second axis split sends less.
    let case = Case {
        batch: 1,
        lengths: vec![4, 4, 1],
        heads: (1, 1),
        subs: vec![attend(&[0]), attend(&[1, 2]), attend(&[0, 2])],
        output: OutputLayout::AsInput,
        dropout: None,
        checkpointing: Checkpointing::Off,
        switch_parts: None,
    };
    check_cheapest(&case, 3).unwrap();
    let plan = Dsp.plan(&case.shape(), 3).unwrap();
    assert!(plan.input.is_split(SeqAxis::SECOND));
}

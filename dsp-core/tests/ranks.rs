//! Ranks that fail: each way of failing ends every rank with one root cause, in time.
//!
//! The ranks wait for one second. A launch may take one such wait until the failure is found and one more
//! for a thread that has to be abandoned; [`SLACK`] is for a busy machine.
#![cfg(feature = "flex")]
#![allow(clippy::unwrap_used, reason = "a test that fails to run has failed")]

mod common;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use common::{engine, launch, random, values};
use dsp_core::error::{Call, Tracking};
use dsp_core::launch::BoxError;
use dsp_core::ledger::Collective;
use dsp_core::{CommError, Engine, Group, Launch, LaunchError, Partition, collective};

const DEADLINE: Duration = Duration::from_secs(1);
const SLACK: Duration = Duration::from_secs(5);

/// How a launch failed, and what each rank saw of it.
struct Failure {
    launch: LaunchError,
    /// Per rank, the communication error that it returned or unwound with.
    views: Vec<Option<CommError>>,
}

/// Runs ranks of which some fail; asserts that the launch does, in time.
#[track_caller]
fn failing<F>(ranks: usize, body: F) -> Failure
where
    F: Fn(&Group) -> Result<(), BoxError> + Send + Sync + 'static,
{
    failing_on(&engine(ranks), ranks, body)
}

#[track_caller]
fn failing_on<F>(engine: &Engine, ranks: usize, body: F) -> Failure
where
    F: Fn(&Group) -> Result<(), BoxError> + Send + Sync + 'static,
{
    let views = Arc::new(Mutex::new(vec![None; ranks]));
    let seen = views.clone();
    let start = Instant::now();
    let launched = Launch::new(ranks).timeout(DEADLINE).on(engine).run(
        move |group: Group| -> Result<(), BoxError> {
            let rank = group.rank();
            let note = |error: &CommError| seen.lock().unwrap()[rank] = Some(error.clone());
            match catch_unwind(AssertUnwindSafe(|| body(&group))) {
                Ok(result) => result.inspect_err(|error| {
                    if let Some(error) = error.downcast_ref::<CommError>() {
                        note(error);
                    }
                }),
                Err(payload) => {
                    let payload: Box<dyn Any + Send> = payload;
                    if let Some(error) = payload.downcast_ref::<CommError>() {
                        note(error);
                    }
                    resume_unwind(payload)
                }
            }
        },
    );
    let elapsed = start.elapsed();
    assert!(elapsed < DEADLINE + SLACK, "the launch took {elapsed:?}");
    let launch = launched.expect_err("the launch fails");
    // Each process has seen its own rank only.
    let views = views.lock().unwrap().clone();
    let view = move |group: Group| Ok::<_, CommError>(views[group.rank()].clone());
    let views = Launch::new(ranks).on(engine).run_shared(view).unwrap();
    Failure { launch, views }
}

impl Failure {
    /// Asserts that all ranks but `gone` saw the root cause, and returns it.
    #[track_caller]
    fn root_on_all_but(&self, gone: &[usize]) -> CommError {
        for (rank, view) in self.views.iter().enumerate() {
            if !gone.contains(&rank) {
                assert_eq!(
                    view.as_ref(),
                    Some(&self.launch.root),
                    "what rank {rank} saw"
                );
            }
        }
        self.launch.root.clone()
    }
}

fn input(group: &Group, device: &Device) -> Tensor<2> {
    let x = random([2, 3], group.rank() as u64, DType::F32);
    Tensor::from_data(x.to_data(), device)
}

/// A tracked input through an all-reduce.
fn reduced(group: &Group) -> Result<Tensor<2>, CommError> {
    let x = input(group, &Device::flex().autodiff()).require_grad();
    collective::all_reduce(x, group)
}

/// Another launch right after, forward and backward: nothing that failed before is in its way.
#[track_caller]
fn assert_that_a_new_launch_works() {
    let sums = launch(2, |group| -> Result<_, CommError> {
        let x = Tensor::<1>::ones([2], &Device::flex().autodiff()).require_grad();
        let y = collective::all_reduce(x.clone(), &group)?;
        Ok(values(&x.grad(&y.sum().backward()).unwrap()))
    });
    assert_eq!(sums.unwrap(), [[2.0, 2.0]; 2]);
}

fn sleep_for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// The `sequence`th exchange of an all-reduce of `[2, 3]`.
fn all_reduce_call(sequence: u64) -> Call {
    Call {
        collective: Collective::AllReduce,
        sequence,
        dtype: DType::F32,
        shape: [1, 6, 1, 1, 1],
        tracking: Tracking::Tracked,
        answers: None,
    }
}

#[test]
fn a_panic_before_any_collective_ends_all_ranks() {
    for ranks in 1..=5 {
        let culprit = ranks / 2;
        let failure = failing(ranks, move |group| {
            assert!(group.rank() != culprit, "I am rank {culprit}");
            reduced(group)?;
            Ok(())
        });
        let root = failure.root_on_all_but(&[culprit]);
        let message = format!("I am rank {culprit}");
        assert_eq!(
            root,
            CommError::Panicked {
                rank: culprit,
                last: None,
                message
            }
        );
        let text = failure.launch.to_string();
        assert_eq!(
            text,
            format!("rank {culprit} panicked before any collective: I am rank {culprit}")
        );
    }
    assert_that_a_new_launch_works();
}

#[test]
fn a_panic_between_two_collectives_names_the_last_one() {
    for ranks in 2..=5 {
        let failure = failing(ranks, move |group| {
            reduced(group)?;
            assert!(group.rank() != 1, "out of luck");
            reduced(group)?;
            Ok(())
        });
        let CommError::Panicked {
            rank: 1,
            last,
            message,
        } = failure.root_on_all_but(&[1])
        else {
            panic!("{}", failure.launch);
        };
        // An all-reduce is two exchanges: 0 and 1.
        assert_eq!(
            (last, message.as_str()),
            (Some(all_reduce_call(1)), "out of luck")
        );
        let text = failure.launch.to_string();
        assert!(
            text.starts_with("rank 1 panicked after all-reduce #1 of "),
            "{text}"
        );
    }
}

#[test]
fn a_panic_in_the_middle_of_a_backward_pass_ends_all_ranks_and_leaves_burn_usable() {
    for ranks in 2..=4 {
        let failure = failing(ranks, move |group| {
            let x = input(group, &Device::flex().autodiff()).require_grad();
            let y = collective::all_reduce(x, group)?;
            let own = group.rank();
            let output = y.clone().inner();
            let z = dsp_core::vjp::attach1(y, output, move |gradient: Tensor<2>| {
                assert!(own != 1, "a bad gradient");
                Ok::<_, CommError>(gradient)
            });
            z.sum().backward();
            Ok(())
        });
        let CommError::Panicked {
            rank: 1, message, ..
        } = failure.root_on_all_but(&[1])
        else {
            panic!("{}", failure.launch);
        };
        assert_eq!(message, "a bad gradient");
        assert_that_a_new_launch_works();
    }
}

#[test]
fn an_error_that_a_rank_returns_reaches_the_others_and_stays_the_source() {
    #[derive(Debug, thiserror::Error)]
    #[error("no more data")]
    struct NoMoreData(#[source] std::io::Error);

    for ranks in 1..=5 {
        let culprit = ranks - 1;
        let failure = failing(ranks, move |group| {
            reduced(group)?;
            if group.rank() == culprit {
                return Err(Box::new(NoMoreData(std::io::Error::other("disk gone"))));
            }
            reduced(group)?;
            Ok(())
        });
        let root = failure.root_on_all_but(&[culprit]);
        let message = "no more data: disk gone".to_owned();
        let last = Some(all_reduce_call(1));
        assert_eq!(
            root,
            CommError::Failed {
                rank: culprit,
                last,
                message
            }
        );
        if engine(ranks).held(ranks).contains(&culprit) {
            let source = failure.launch.source.as_ref().unwrap();
            assert!(source.is::<NoMoreData>());
        }
        assert!(failure.launch.abandoned.is_empty());
    }
}

#[test]
fn a_rank_that_sleeps_where_others_wait_is_missed_at_the_deadline_and_abandoned() {
    for ranks in 2..=5 {
        let failure = failing_on(&Engine::Threads, ranks, move |group| {
            reduced(group)?;
            if group.rank() == 1 {
                sleep_for_ever();
            }
            reduced(group)?;
            Ok(())
        });
        let CommError::Unanswered {
            rank,
            call,
            missing,
            waited,
        } = failure.root_on_all_but(&[1])
        else {
            panic!("{}", failure.launch);
        };
        assert_ne!(rank, 1);
        assert_eq!((call, missing.as_slice()), (all_reduce_call(2), &[1][..]));
        assert!(waited >= DEADLINE && waited < DEADLINE + SLACK);
        assert_eq!(failure.launch.abandoned, [1]);
        let text = failure.launch.to_string();
        assert!(
            text.contains("in all-reduce #2 of [1, 6, 1, 1, 1] F32 (tracked)"),
            "{text}"
        );
        assert!(
            text.ends_with("(the threads of ranks [1] did not end and are abandoned)"),
            "{text}"
        );
    }
    assert_that_a_new_launch_works();
}

#[test]
fn a_rank_that_sleeps_when_nobody_needs_it_any_more_is_named_as_stuck() {
    let failure = failing_on(&Engine::Threads, 3, |group| {
        reduced(group)?;
        if group.rank() == 2 {
            sleep_for_ever();
        }
        Ok(())
    });
    let CommError::Stuck {
        rank: 2,
        last,
        waited,
    } = &failure.launch.root
    else {
        panic!("{}", failure.launch);
    };
    assert_eq!(last, &Some(all_reduce_call(1)));
    assert!(*waited >= DEADLINE);
    assert_eq!(failure.launch.abandoned, [2]);
}

#[test]
fn a_rank_that_is_busy_when_another_fails_has_a_deadline_from_then_on_to_return() {
    let failed = Launch::new(3).timeout(DEADLINE).run(|group: Group| {
        // Rank 2's grace is almost over when rank 1 fails.
        std::thread::sleep(DEADLINE.mul_f64([0.0, 0.9, 1.4][group.rank()]));
        match group.rank() {
            1 => Err("no more data"),
            _ => Ok(()),
        }
    });
    let failed = failed.unwrap_err();
    assert!(
        matches!(failed.root, CommError::Failed { rank: 1, .. }),
        "{failed}"
    );
    assert!(failed.abandoned.is_empty(), "{failed}");
}

#[test]
fn a_rank_that_calls_another_collective_is_told_from_the_others() {
    for ranks in 2..=5 {
        let failure = failing(ranks, move |group| {
            reduced(group)?;
            let x = input(group, &Device::flex().autodiff()).require_grad();
            if group.rank() == 1 {
                collective::broadcast(x, 0, group)?;
            } else {
                collective::all_reduce(x, group)?;
            }
            Ok(())
        });
        let CommError::Mismatch {
            rank,
            call,
            other,
            other_call,
        } = failure.root_on_all_but(&[])
        else {
            panic!("{}", failure.launch);
        };
        let (odd, usual) = if rank == 1 {
            (&call, &other_call)
        } else {
            (&other_call, &call)
        };
        assert!(rank == 1 || other == 1);
        assert_eq!(usual, &all_reduce_call(2));
        assert_eq!((odd.collective, odd.sequence), (Collective::Broadcast, 2));
    }
}

/// Two ranks or more, of which rank 1 calls an all-gather of something else.
#[track_caller]
fn odd_one_out(ranks: usize, call: fn(&Group, bool) -> Result<(), CommError>) -> CommError {
    let failure = failing(ranks, move |group| {
        call(group, group.rank() == 1)?;
        Ok(())
    });
    failure.root_on_all_but(&[])
}

#[test]
fn a_rank_that_passes_another_global_shape_is_a_mismatch() {
    for ranks in 2..=5 {
        let root = odd_one_out(ranks, |group, odd| {
            let x = Tensor::<1>::zeros([if odd { 4 } else { 3 }], &Device::flex());
            collective::all_reduce(x, group).map(|_| ())
        });
        let CommError::Mismatch {
            call, other_call, ..
        } = root
        else {
            panic!("{root}")
        };
        let mut lengths = [call.shape[1], other_call.shape[1]];
        lengths.sort_unstable();
        assert_eq!(lengths, [3, 4]);
    }
}

#[test]
fn a_rank_whose_block_is_not_its_part_is_named_with_both_shapes() {
    for ranks in 2..=5 {
        let root = odd_one_out(ranks, |group, odd| {
            let partition = Partition::balanced(2 * group.size(), group.size());
            let x = Tensor::<2>::zeros([3, if odd { 1 } else { 2 }], &Device::flex());
            collective::all_gather(x, 1, &partition, group).map(|_| ())
        });
        let CommError::Shape {
            rank: 1,
            call,
            expected,
            got,
        } = root
        else {
            panic!("{root}")
        };
        assert_eq!((call.collective, call.sequence), (Collective::AllGather, 0));
        assert_eq!(expected, [3, 2, 1, 1, 1]);
        assert_eq!(got.iter().product::<usize>(), 3);
    }
}

#[test]
fn a_rank_that_passes_another_dtype_is_a_mismatch() {
    for ranks in 2..=5 {
        let root = odd_one_out(ranks, |group, odd| {
            let dtype = if odd { DType::F64 } else { DType::F32 };
            let x = Tensor::<1>::zeros([3], (&Device::flex(), dtype));
            collective::all_reduce(x, group).map(|_| ())
        });
        let CommError::Mismatch {
            call, other_call, ..
        } = root
        else {
            panic!("{root}")
        };
        assert_ne!(call.dtype, other_call.dtype);
    }
}

#[test]
fn a_rank_whose_tensor_is_not_tracked_is_a_mismatch_before_its_backward_can_be_missed() {
    for ranks in 2..=5 {
        let root = odd_one_out(ranks, |group, odd| {
            let x = Tensor::<1>::zeros([3], &Device::flex().autodiff());
            let x = if odd { x } else { x.require_grad() };
            collective::all_reduce(x, group).map(|_| ())
        });
        let CommError::Mismatch {
            call, other_call, ..
        } = root
        else {
            panic!("{root}")
        };
        assert_ne!(call.tracking, other_call.tracking);
    }
}

/// Two exchanges that look alike, in branches whose depth, and so whose order in Burn's backward pass, differs by
/// rank: without the number of the call that each answers, their gradients would be swapped silently.
#[test]
fn ranks_that_walk_their_branches_back_in_different_orders_are_a_mismatch_and_no_wrong_number() {
    let root = odd_one_out(2, |group, odd| {
        let partition = Partition::balanced(4, 2);
        let x = input(group, &Device::flex().autodiff()).require_grad();
        let deeper = |x: Tensor<2>| x.mul_scalar(2.0).mul_scalar(2.0).mul_scalar(0.25);
        let (a, b) = if odd {
            (deeper(x.clone()), x.clone())
        } else {
            (x.clone(), deeper(x.clone()))
        };
        let gather = |x: Tensor<2>| {
            let row = x.reshape([1, -1]).narrow(1, 0, 2);
            collective::all_gather(row, 1, &partition, group)
        };
        let (a, b) = (gather(a)?, gather(b)?);
        let loss = (a * 3.0).sum() + b.sum();
        loss.backward();
        Ok(())
    });
    let CommError::Mismatch {
        call, other_call, ..
    } = root
    else {
        panic!("{root}")
    };
    assert_ne!(call.answers, other_call.answers);
}

/// Rank 2 waits for rank 0, which waits in a group of its own for rank 1, which sleeps.
#[test]
fn of_ranks_that_wait_for_one_another_the_last_one_is_named() {
    let failure = failing(3, |group| {
        let pair = (group.rank() < 2)
            .then(|| group.subgroup(&[0, 1]))
            .transpose()?;
        match (group.rank(), pair) {
            (0, Some(pair)) => {
                // Rank 2's time is over first.
                std::thread::sleep(DEADLINE / 4);
                collective::all_reduce(input(group, &Device::flex()), &pair)?;
            }
            (1, _) => std::thread::sleep(2 * DEADLINE),
            _ => {}
        }
        collective::all_reduce(input(group, &Device::flex()), group)?;
        Ok(())
    });
    let CommError::Unanswered {
        rank: 0,
        missing,
        waited,
        ..
    } = &failure.launch.root
    else {
        panic!("{}", failure.launch.root);
    };
    assert_eq!(missing, &[1]);
    assert!(
        *waited > DEADLINE / 4,
        "until it was named, not until it woke up last: {waited:?}"
    );
}

#[test]
fn the_longest_timeout_is_a_timeout() {
    let sums = Launch::new(2)
        .timeout(Duration::MAX)
        .on(&engine(2))
        .run_shared(|group: Group| {
            collective::all_reduce(input(&group, &Device::flex()), &group).map(|x| values(&x))
        });
    assert_eq!(sums.unwrap().len(), 2);

    let mut own = None;
    let _ = Group::alone().through(|transport| own.insert(transport).clone());
    let endless = Group::new(own.unwrap(), Duration::MAX);
    collective::all_reduce(input(&endless, &Device::flex()), &endless).unwrap();
}

#[test]
fn a_rank_with_another_partition_of_the_same_length_is_found() {
    for ranks in 2..=5 {
        let root = odd_one_out(ranks, |group, odd| {
            let (length, ranks) = (2 * group.size(), group.size());
            let partition = if odd {
                Partition::zigzag(length, ranks)
            } else {
                Partition::balanced(length, ranks)
            };
            let x = Tensor::<1>::zeros([2], &Device::flex());
            collective::all_gather(x, 0, &partition, group).map(|_| ())
        });
        let text = root.to_string();
        let CommError::Partitions {
            rank,
            other,
            call,
            difference,
        } = root
        else {
            panic!("{root}")
        };
        // Of rank 1's part; processes compare digests.
        if let Some(found) = &difference {
            let [zigzag, balanced] = [
                Partition::zigzag(2 * ranks, ranks),
                Partition::balanced(2 * ranks, ranks),
            ];
            let (own, others) = match rank {
                1 => (zigzag, balanced),
                _ => (balanced, zigzag),
            };
            let holder = found.holder;
            assert_eq!(found.own, own.ranges(holder));
            assert_eq!(found.other, others.ranges(holder));
            assert_ne!(found.own, found.other);
            assert!(
                text.contains(&format!("{:?} to rank {other}", found.other)),
                "{text}"
            );
        }
        assert_eq!(
            difference.is_some(),
            matches!(engine(ranks), Engine::Threads)
        );
        assert!(rank == 1 || other == 1);
        assert_eq!((call.collective, call.sequence), (Collective::AllGather, 0));
    }
}

#[test]
fn a_rank_that_returns_while_others_wait_for_it_ends_them_at_once() {
    for ranks in 2..=5 {
        let start = Instant::now();
        let failure = failing(ranks, move |group| {
            reduced(group)?;
            if group.rank() != 1 {
                reduced(group)?;
            }
            Ok(())
        });
        let CommError::PeerEnded {
            rank,
            call,
            ended: 1,
        } = failure.root_on_all_but(&[1])
        else {
            panic!("{}", failure.launch);
        };
        assert_ne!(rank, 1);
        assert_eq!(call, all_reduce_call(2));
        // Not only at the deadline: half of it is ample for a few small messages.
        assert!(start.elapsed() < DEADLINE / 2);
    }
}

#[test]
fn a_rank_that_returns_before_a_collective_in_which_nobody_needs_it_is_found_all_the_same() {
    let failure = failing(3, |group| {
        let x = Tensor::<1>::zeros([3], &Device::flex());
        if group.rank() != 1 {
            // Rank 0 sends to all and waits for none; rank 2 has all it needs.
            collective::broadcast(x, 0, group)?;
        }
        Ok(())
    });
    let CommError::PeerEnded {
        rank,
        call,
        ended: 1,
    } = &failure.launch.root
    else {
        panic!("{}", failure.launch);
    };
    assert_ne!(*rank, 1);
    assert_eq!((call.collective, call.sequence), (Collective::Broadcast, 0));
}

#[test]
fn a_rank_that_skips_its_backward_pass_ends_the_others() {
    let failure = failing(3, |group| {
        let y = reduced(group)?;
        if group.rank() != 2 {
            y.sum().backward();
        }
        Ok(())
    });
    let CommError::PeerEnded { ended: 2, call, .. } = failure.root_on_all_but(&[2]) else {
        panic!("{}", failure.launch);
    };
    assert_eq!(call.sequence, 2);
    assert_that_a_new_launch_works();
}

#[test]
fn a_failure_in_one_sub_group_ends_the_ranks_of_the_others() {
    let failure = failing(4, |group| {
        let pair = group.rank() / 2;
        let half = group.subgroup(&[2 * pair, 2 * pair + 1])?;
        reduced(&half)?;
        if group.rank() == 3 {
            return Err("rank 3 gives up".into());
        }
        if pair == 1 {
            reduced(&half)?;
        }
        // Ranks 0 and 1 go on among themselves until they hear of it.
        for _ in 0..100_000 {
            reduced(&half)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    let CommError::Failed {
        rank: 3, message, ..
    } = failure.root_on_all_but(&[3])
    else {
        panic!("{}", failure.launch);
    };
    assert_eq!(message, "rank 3 gives up");
}

#[test]
fn a_divergence_in_a_sub_group_names_ranks_of_the_world() {
    let failure = failing(4, |group| {
        let pair = group.rank() / 2;
        let half = group.subgroup(&[2 * pair, 2 * pair + 1])?;
        let x = Tensor::<1>::zeros([if group.rank() == 3 { 2 } else { 3 }], &Device::flex());
        collective::all_reduce(x, &half)?;
        reduced(group)?;
        Ok(())
    });
    let CommError::Mismatch { rank, other, .. } = failure.root_on_all_but(&[]) else {
        panic!("{}", failure.launch);
    };
    assert_eq!([rank.min(other), rank.max(other)], [2, 3]);
}

#[test]
fn a_cause_that_a_rank_names_itself_is_the_root_for_all() {
    let cause = CommError::Spawn {
        rank: 1,
        message: "an engine of its own".to_owned(),
    };
    let given = cause.clone();
    let failure = failing(3, move |group| {
        if group.rank() == 1 {
            group.abort(given.clone());
        }
        reduced(group)?;
        Ok(())
    });
    assert_eq!(failure.root_on_all_but(&[]), cause);
}

#[test]
fn one_rank_alone_runs_every_collective_and_sends_nothing() {
    let sent = launch(1, |group| -> Result<_, CommError> {
        let x = input(&group, &Device::flex().autodiff()).require_grad();
        let partition = Partition::balanced(3, 1);
        let y = collective::all_gather(x.clone(), 1, &partition, &group)?;
        let y = collective::reduce_scatter(y, 1, &partition, &group)?;
        let y = collective::ring_shift(y, 1, &partition, 1, &group)?;
        let y = collective::broadcast(y, 0, &group)?;
        let y = collective::all_reduce(y, &group)?;
        assert_eq!(values(&y.clone().inner()), values(&x.clone().inner()));
        let gradient = x.grad(&y.sum().backward()).unwrap();
        assert_eq!(values(&gradient), [1.0; 6]);
        let traffic = group.ledger().read();
        Ok(traffic
            .iter()
            .map(|(_, _, entry)| entry.bytes + entry.messages)
            .sum::<u64>())
    });
    assert_eq!(sent.unwrap(), [0]);
}

#[test]
fn values_come_back_in_rank_order_whoever_ends_first() {
    let ranks = launch(5, |group| -> Result<_, CommError> {
        std::thread::sleep(Duration::from_millis(20 * (5 - group.rank() as u64)));
        Ok(group.rank())
    });
    assert_eq!(ranks.unwrap(), [0, 1, 2, 3, 4]);
}

//! Gradients that are summed over the ranks while the backward pass still runs.
//!
//! ```text
//!   backward    layer 3 ───── layer 2 ───── layer 1 ───── layer 0 ─┐
//!                     │             │             │             │  finish
//!   bucket 0          └─ sums ─▶ gathers ─▶       │             │
//!   bucket 1                        └─ sums ─▶ gathers ─▶       │
//!   bucket 2                                      └─ sums ─▶ gathers ─▶
//! ```
//!
//! Parameters are put into buckets in the order in which a backward pass comes to them: the module's, from its end. A
//! bucket that is full goes through the two exchanges of an all-reduce, and over the replicas, which hold the same parts,
//! with this rank's parts through two more; the pass waits for none of them, but hands on what has arrived whenever it
//! comes by.
//!
//! Ranks need not fill their buckets in the same order, nor use the same parameters: each of these exchanges has a group
//! of its own, in which the buckets follow one another by number. So an exchange of the passes and one of the gradients
//! never take one another's place, and the sums are those of [`Session::reduce`] bit for bit.
//!
//! What is hidden so is what an engine moves by itself: MPI's communication thread, a GPU's copy engine. Threads that
//! read each other's memory copy when they are asked.
//!
//! Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", arXiv:2006.15704.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Gradients, Tensor};

use crate::collective::half_reduce;
use crate::cost;
use crate::error::CommError;
use crate::gradients::{Fit, Members};
use crate::group::{Group, InFlight, Step};
use crate::layout::select_ranges;
use crate::ledger::Phase;
use crate::place::Placed;
use crate::session::Session;
use crate::shape::reshape;
use crate::strategy::Placement;
use crate::vjp;

/// The groups over which gradients are summed while a backward pass runs, and how much goes at once.
#[derive(Debug, Clone)]
pub struct Overlap {
    /// The legs of a bucket's way: sums over the ranks, gathers, and the same over the replicas, if there are any.
    legs: Vec<Group>,
    bucket: NonZeroUsize,
}

impl Overlap {
    /// Buckets of at least `bucket` elements, but for the last. Every rank must call this alike, once for all steps.
    ///
    /// # Errors
    /// [`CommError`] if the group has failed.
    pub fn new(session: &Session, bucket: NonZeroUsize) -> Result<Self, CommError> {
        let groups = [Some(session.group()), session.replicas()];
        let mut legs = Vec::new();
        for group in groups.into_iter().flatten() {
            let members: Vec<usize> = (0..group.size()).collect();
            legs.push(group.subgroup(&members)?);
            legs.push(group.subgroup(&members)?);
        }
        Ok(Self { legs, bucket })
    }

    /// Begins a reduction: returns the module that the backward pass is to come through, and which reports its
    /// gradients on the way. `earlier` is what earlier parts of the step have left, to be added.
    ///
    /// The module is good for one forward and backward pass, and Burn panics in a second one; parameters that it does not
    /// use count with `earlier` alone.
    pub fn begin<M: Module>(
        &self,
        placed: &Placed<M>,
        mut earlier: GradientsParams,
    ) -> (M, Reduction) {
        let mut plan = Planning::new(placed);
        placed.module.visit(&mut plan);
        let flow = Flow::new(&self.legs, self.bucket, plan.entries);
        let mut hook = Hook {
            flow: Arc::new(Mutex::new(flow)),
            earlier: &mut earlier,
        };
        let module = placed.module.clone().map(&mut hook);
        let flow = hook.flow;
        (module, Reduction { flow, earlier })
    }

    /// What this rank sends for a module's gradients, by formula: an all-reduce for each bucket.
    pub fn expected_sends<M: Module>(&self, placed: &Placed<M>) -> u64 {
        let mut plan = Planning::new(placed);
        placed.module.visit(&mut plan);
        let buckets = Flow::new(&self.legs, self.bucket, plan.entries).buckets;
        let of_bucket = |bucket: Bucket| {
            let sends = |leg: usize| {
                let (elements, group) = (bucket.elements(leg), &self.legs[leg]);
                cost::all_reduce(elements, group.size(), group.rank()).forward
            };
            bucket.legs.clone().step_by(2).map(sends).sum::<u64>()
        };
        buckets.into_iter().map(of_bucket).sum()
    }
}

/// A reduction under way: see [`Overlap::begin`].
#[derive(Debug)]
#[must_use = "the other ranks wait for this one's gradients"]
pub struct Reduction {
    flow: Arc<Mutex<Flow>>,
    earlier: GradientsParams,
}

impl Reduction {
    /// Waits for what is still under way: the module's gradients, as [`Session::reduce_collected`] gives them.
    ///
    /// `gradients` are those of the backward pass, from which sharded parameters' are taken.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn finish<M: Module>(
        self,
        gradients: &mut Gradients,
        placed: &Placed<M>,
    ) -> Result<GradientsParams, CommError> {
        let Self { flow, earlier } = self;
        let mut flow = lock(&flow);
        flow.finish()?;
        let mut collect = Collect {
            flow: &flow,
            earlier,
            gradients: GradientsParams::from_module(gradients, &placed.module),
        };
        placed.module.visit(&mut collect);
        Ok(collect.gradients)
    }
}

fn lock(flow: &Mutex<Flow>) -> MutexGuard<'_, Flow> {
    // Whoever panicked with it has ended the ranks.
    flow.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first leg that leads over the replicas.
const OF_REPLICAS: usize = 2;

/// A parameter whose gradient is summed.
#[derive(Debug)]
struct Summed {
    id: ParamId,
    over: Over,
    slot: Slot,
}

/// Over whom a parameter's gradient is summed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Over {
    /// Over the ranks, and then the replicas.
    All,
    /// Over the replicas only: the rank's part is nobody else's.
    Replicas,
}

/// Lists a module's trainable parameters.
struct Planning<'a, M> {
    placed: &'a Placed<M>,
    entries: Vec<Summed>,
}

impl<'a, M> Planning<'a, M> {
    fn new(placed: &'a Placed<M>) -> Self {
        Self {
            placed,
            entries: Vec::new(),
        }
    }
}

impl<M> ModuleVisitor for Planning<'_, M> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        let over = match self.placed.placement(param.id) {
            Placement::Sharded { .. } => Over::Replicas,
            Placement::Replicated | Placement::Shared { .. } => Over::All,
        };
        let fit = Fit::of(self.placed, param.id, Members::OfOneModel);
        let value = param.val();
        self.entries.push(Summed {
            id: param.id,
            over,
            slot: Slot {
                held: value.shape().num_elements(),
                elements: fit.elements(&value.dims()),
                fit,
                like: (value.clone().inner().device(), value.dtype()),
                earlier: None,
                own: None,
            },
        });
    }
}

/// All buckets of a reduction and how far they are.
#[derive(Debug)]
struct Flow {
    legs: Vec<Group>,
    /// How many buckets have entered each leg.
    entered: Vec<usize>,
    buckets: Vec<Bucket>,
    /// Where a parameter's gradient is: in which bucket, as the how-manieth.
    places: HashMap<ParamId, (usize, usize)>,
}

#[derive(Debug)]
struct Bucket {
    slots: Vec<Slot>,
    legs: Range<usize>,
    /// How many buckets go before it on each of its legs.
    turns: Vec<usize>,
    state: State,
}

/// A parameter's place in a bucket.
#[derive(Debug)]
struct Slot {
    fit: Fit,
    /// Of its elements, how many are here.
    held: usize,
    elements: usize,
    like: (Device, DType),
    /// What earlier parts of the step left.
    earlier: Option<Tensor<1>>,
    own: Option<Tensor<1>>,
}

#[derive(Debug)]
enum State {
    /// Gradients are missing.
    Filling,
    /// It has not entered its next leg.
    Before(usize, Tensor<1>),
    /// It is on a leg.
    On(usize, InFlight),
    /// It has come through.
    Done(Tensor<1>),
}

impl Flow {
    fn new(legs: &[Group], limit: NonZeroUsize, entries: Vec<Summed>) -> Self {
        let mut flow = Self {
            legs: legs.to_vec(),
            entered: vec![0; legs.len()],
            buckets: Vec::new(),
            places: HashMap::new(),
        };
        // The last bucket of each kind, to which more may be added.
        let mut open: Vec<(Over, DType, usize)> = Vec::new();
        let mut before = vec![0; legs.len()];
        for Summed { id, over, slot } in entries.into_iter().rev() {
            let on = match over {
                Over::All => 0..legs.len(),
                Over::Replicas => OF_REPLICAS.min(legs.len())..legs.len(),
            };
            if on.is_empty() {
                continue;
            }
            let dtype = slot.like.1;
            let kind = |&(o, d, _): &(Over, DType, usize)| o == over && d == dtype;
            let index = match open.iter().position(kind) {
                Some(position) => open[position].2,
                None => {
                    flow.buckets.push(Bucket {
                        slots: Vec::new(),
                        turns: on.clone().map(|leg| before[leg]).collect(),
                        legs: on.clone(),
                        state: State::Filling,
                    });
                    on.for_each(|leg| before[leg] += 1);
                    open.push((over, dtype, flow.buckets.len() - 1));
                    flow.buckets.len() - 1
                }
            };
            let bucket = &mut flow.buckets[index];
            flow.places.insert(id, (index, bucket.slots.len()));
            bucket.slots.push(slot);
            if bucket.elements(0) >= limit.get() {
                open.retain(|&(.., bucket)| bucket != index);
            }
        }
        flow
    }

    fn slot(&mut self, id: ParamId) -> Option<&mut Slot> {
        let &(bucket, slot) = self.places.get(&id)?;
        Some(&mut self.buckets[bucket].slots[slot])
    }

    /// A parameter's gradient, from the backward pass.
    fn arrived(&mut self, id: ParamId, own: Tensor<1>) -> Result<(), CommError> {
        let Some(slot) = self.slot(id) else {
            return Ok(());
        };
        slot.own = Some(match slot.earlier.take() {
            Some(earlier) => earlier + own,
            None => own,
        });
        self.go_on()
    }

    /// Moves every bucket as far as it gets without waiting.
    fn go_on(&mut self) -> Result<(), CommError> {
        let mut at_rest = false;
        while !at_rest {
            at_rest = true;
            for index in 0..self.buckets.len() {
                at_rest &= !self.step(index)?;
            }
        }
        Ok(())
    }

    /// Moves a bucket a step, if it can be without waiting; whether it was.
    fn step(&mut self, index: usize) -> Result<bool, CommError> {
        let bucket = &mut self.buckets[index];
        let state = std::mem::replace(&mut bucket.state, State::Filling);
        let (state, has_moved) = match state {
            State::Filling if bucket.slots.iter().all(|slot| slot.own.is_some()) => {
                let pieces = bucket.slots.iter_mut().filter_map(|slot| slot.own.take());
                let flat = Tensor::cat(pieces.collect(), 0);
                (State::Before(bucket.legs.start, flat), true)
            }
            State::Before(leg, sums) if leg == bucket.legs.end => (State::Done(sums), true),
            State::Before(leg, flat)
                if self.entered[leg] == bucket.turns[leg - bucket.legs.start] =>
            {
                self.entered[leg] += 1;
                // Even legs sum, odd ones gather.
                let step = [Step::First, Step::Further][leg % 2];
                let half = (Phase::Gradients, step);
                let request = half_reduce(flat, bucket.elements(leg), half, &self.legs[leg]);
                (State::On(leg, self.legs[leg].start(request)?), true)
            }
            State::On(leg, flight) if flight.is_ready() => {
                (bucket.came_through(leg, flight)?, true)
            }
            state => (state, false),
        };
        bucket.state = state;
        Ok(has_moved)
    }

    /// Brings all buckets through.
    fn finish(&mut self) -> Result<(), CommError> {
        for bucket in &mut self.buckets {
            bucket.fill();
        }
        loop {
            self.go_on()?;
            // The first bucket that is not through waits for no other one.
            let under_way = |bucket: &&mut Bucket| matches!(bucket.state, State::On(..));
            let Some(first) = self.buckets.iter_mut().find(under_way) else {
                return Ok(());
            };
            if let State::On(leg, flight) = std::mem::replace(&mut first.state, State::Filling) {
                first.state = first.came_through(leg, flight)?;
            }
        }
    }

    /// A parameter's part of the sums: what is here of it.
    fn sum(&self, id: ParamId) -> Option<Tensor<1>> {
        let &(bucket, slot) = self.places.get(&id)?;
        let Bucket { slots, state, .. } = &self.buckets[bucket];
        let State::Done(sums) = state else {
            return None;
        };
        let start: usize = slots[..slot].iter().map(|slot| slot.held).sum();
        let own = start..start + slots[slot].held;
        Some(select_ranges(sums.clone(), 0, std::slice::from_ref(&own)))
    }
}

impl Bucket {
    /// How many elements go over a leg.
    fn elements(&self, leg: usize) -> usize {
        let of_slot = |slot: &Slot| match leg < OF_REPLICAS {
            true => slot.elements,
            false => slot.held,
        };
        self.slots.iter().map(of_slot).sum()
    }

    /// Waits for what comes over a leg. Of sums over the ranks only the parts that are here go on.
    fn came_through(&self, leg: usize, flight: InFlight) -> Result<State, CommError> {
        let arrived = flight.wait()?;
        let count = arrived.shape().num_elements();
        let mut flat = reshape(arrived, [count]);
        let all_held = self.slots.iter().all(|slot| slot.held == slot.elements);
        if leg + 1 == OF_REPLICAS && !all_held {
            let mut start = 0;
            let held = self.slots.iter().map(|slot| {
                let own = start..start + slot.elements;
                start = own.end;
                let own = select_ranges(flat.clone(), 0, std::slice::from_ref(&own));
                slot.fit.held(own)
            });
            flat = Tensor::cat(held.collect(), 0);
        }
        Ok(State::Before(leg + 1, flat))
    }

    /// What the pass did not use counts with what came earlier, or nothing.
    fn fill(&mut self) {
        if !matches!(self.state, State::Filling) {
            return;
        }
        for slot in self.slots.iter_mut().filter(|slot| slot.own.is_none()) {
            let (device, dtype) = &slot.like;
            let none = || Tensor::zeros([slot.elements], (device, *dtype));
            slot.own = Some(slot.earlier.take().unwrap_or_else(none));
        }
    }
}

/// Makes parameters report their gradients.
struct Hook<'a> {
    flow: Arc<Mutex<Flow>>,
    earlier: &'a mut GradientsParams,
}

impl ModuleMapper for Hook<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        let fit = match lock(&self.flow).slot(id) {
            Some(slot) => {
                let earlier = self.earlier.remove::<D>(id);
                slot.earlier = earlier.map(|earlier| slot.fit.flat(earlier));
                slot.fit.clone()
            }
            None => return param,
        };
        // A pass that fails leaves nodes behind, which must not keep the ranks' groups alive.
        let flow = Arc::downgrade(&self.flow);
        param.map(|value| {
            let same = value.clone().inner();
            vjp::attach1(value, same, move |gradient: Tensor<D>| {
                if let Some(flow) = flow.upgrade() {
                    lock(&flow).arrived(id, fit.flat(gradient.clone()))?;
                }
                Ok::<_, CommError>(gradient)
            })
        })
    }
}

/// Puts the sums in the place of the pass's own gradients.
struct Collect<'a> {
    flow: &'a Flow,
    earlier: GradientsParams,
    gradients: GradientsParams,
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = match (self.flow.sum(param.id), self.earlier.remove::<D>(param.id)) {
            (Some(sum), _) => reshape(sum, param.shape().dims::<D>()),
            (None, Some(earlier)) => match self.gradients.remove::<D>(param.id) {
                Some(own) => earlier + own,
                None => earlier,
            },
            (None, None) => return,
        };
        self.gradients.register(param.id, gradient);
    }
}

//! What a rank sends in an exchange and where it puts what arrives.
//!
//! All of it happens in this process's memory, on Flex; a tensor of another device comes here first and its
//! result goes back. A block that only gathers what others hold is received where it belongs, without a copy;
//! one that adds is laid out by the local transport's own code, in rank order, and so has the same bits.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::boxes;
use super::lent::{Incoming, Landing, Outgoing, Own, Steady};
use super::wire::{Route, route};
use crate::blocks::{Blocks, DIMS, Transfer};
use crate::shape::reshape;
use crate::transport::Exchange;
use crate::transport::copy::{self, Crossing, Source};
use crate::transport::tiles;

/// A rank's part in an exchange, ready to travel.
pub(super) struct Parcels {
    /// Per member: the messages for it.
    pub(super) outgoing: Vec<Vec<Outgoing>>,
    /// Per member: room for its messages. Empty where it sends nothing.
    pub(super) incoming: Vec<Vec<Incoming>>,
    /// What this rank lays into its block itself, if messages land there: while they are on their way.
    pub(super) laying: Option<Laying>,
    /// What becomes of what arrives.
    pub(super) unpacking: Unpacking,
}

/// This rank's boxes for its own block.
pub(super) struct Laying {
    place: Own,
    tensor: Tensor<DIMS>,
    boxes: Vec<Transfer>,
    shape: [usize; DIMS],
}

impl Laying {
    /// Lays them where they belong.
    pub(super) fn lay(self) {
        let Self {
            place,
            tensor,
            boxes,
            shape,
        } = self;
        place.write(|put| boxes::each_run(&tensor, &boxes, shape, |bytes, _| put(bytes)));
    }
}

/// How what arrives becomes this rank's block.
pub(super) struct Unpacking {
    device: Device,
    dtype: DType,
    shape: [usize; DIMS],
    from: Arrived,
}

#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each exchange under way"
)]
enum Arrived {
    /// It landed where it belongs.
    Landed(Arc<Landing>),
    /// Per member its boxes, and of this rank its tensor.
    Boxes {
        own: Tensor<DIMS>,
        rank: usize,
        members: Vec<(Option<Arc<Landing>>, Vec<Transfer>)>,
    },
}

impl Parcels {
    /// Packs this rank's part: it is `rank` of the group. Large parts are read from the tensor's own memory.
    pub(super) fn pack(exchange: &Exchange, rank: usize) -> Self {
        let (before, after) = (&*exchange.before, &*exchange.after);
        let (device, dtype) = (exchange.tensor.device(), exchange.tensor.dtype());
        let own = on_host(exchange.tensor.clone());
        let size = before.ranks();
        let mut block = None;
        let outgoing = (0..size)
            .map(|peer| {
                if peer == rank {
                    return vec![];
                }
                messages(&own, &mut block, before, after, (rank, peer))
            })
            .collect();
        let shape = after.local_shape(rank);
        let arrivals: Vec<_> = (0..size)
            .map(|peer| before.transfers(after, peer, rank))
            .collect();
        let routes: Vec<_> = (arrivals.iter().enumerate())
            .map(|(peer, transfers)| {
                route(transfers, before.local_shape(peer), shape, dtype.size())
            })
            .collect();
        let (incoming, laying, from) = match landing_places(shape, &arrivals, &routes, rank, dtype)
        {
            Some(places) => {
                let own_boxes = arrivals.into_iter().nth(rank).unwrap_or_default();
                let (incoming, laying, from) = land(own, shape, own_boxes, places);
                (incoming, Some(laying), from)
            }
            None => {
                let (incoming, from) = stage(own, rank, arrivals, &routes);
                (incoming, None, from)
            }
        };
        let unpacking = Unpacking {
            device,
            dtype,
            shape,
            from,
        };
        Self {
            outgoing,
            incoming,
            laying,
            unpacking,
        }
    }
}

impl Unpacking {
    /// This rank's block, when all messages have arrived.
    pub(super) fn unpack(self) -> Tensor<DIMS> {
        let Self {
            device,
            dtype,
            shape,
            from,
        } = self;
        let host = Device::flex();
        let tensor = match from {
            Arrived::Landed(landing) => received(landing, shape, dtype, &host),
            Arrived::Boxes { own, rank, members } => {
                let mut sources = Vec::new();
                for (peer, (landing, transfers)) in members.into_iter().enumerate() {
                    if peer == rank {
                        let tensor = own.clone();
                        sources.push(Source { tensor, transfers });
                    } else if let Some(landing) = landing {
                        sources.extend(unpacked(landing, transfers, dtype, &host));
                    }
                }
                sources.retain(|source| !source.transfers.is_empty());
                match sources.is_empty() {
                    true => Tensor::zeros(shape, (&host, dtype)),
                    false => copy::assemble(shape, &sources, &host, &Crossing::default()),
                }
            }
        };
        if is_flex(&device) {
            tensor
        } else {
            Tensor::from_data(tensor.into_data(), (&device, dtype))
        }
    }
}

/// Whether tensors of `device` are in this process's memory.
fn is_flex(device: &Device) -> bool {
    *device.as_dispatch() == *Device::flex().as_dispatch()
}

fn on_host(tensor: Tensor<DIMS>) -> Tensor<DIMS> {
    if is_flex(&tensor.device()) {
        return tensor;
    }
    let dtype = tensor.dtype();
    Tensor::from_data(tensor.into_data(), (&Device::flex(), dtype))
}

/// The messages from `rank` to `peer`. `block` is the whole block's memory, once it has been asked for: none
/// where its elements do not lie end to end.
fn messages(
    own: &Tensor<DIMS>,
    block: &mut Option<Option<Arc<dyn Steady>>>,
    before: &Blocks,
    after: &Blocks,
    (rank, peer): (usize, usize),
) -> Vec<Outgoing> {
    let transfers = before.transfers(after, rank, peer);
    if transfers.is_empty() {
        return vec![];
    }
    let width = own.dtype().size();
    let (mine, theirs) = (before.local_shape(rank), after.local_shape(peer));
    let route = route(&transfers, mine, theirs, width);
    let ranges = |ranges: Vec<Range<usize>>, owner: Arc<dyn Steady>| {
        (ranges.into_iter())
            .map(|range| Outgoing::new(owner.clone(), range))
            .collect()
    };
    if let Route::Runs(_) = route
        && let Some(memory) = block.get_or_insert_with(|| memory(own.clone()))
    {
        return ranges(route.sent(width), memory.clone());
    }
    let packed = boxes::pack(own, &transfers);
    let Some(packed) = memory(packed) else {
        unreachable!("what has been packed lies end to end");
    };
    ranges(route.end_to_end(width), packed)
}

/// A tensor's memory as row-major bytes, if that is what it is.
fn memory<const D: usize>(tensor: Tensor<D>) -> Option<Arc<dyn Steady>> {
    let width = tensor.dtype().size();
    let Ok(tensor) = tensor.try_into_primitive::<Flex>() else {
        unreachable!("the tensor is on Flex");
    };
    let (start, end) = tensor.layout().contiguous_offsets()?;
    let bytes = start * width..end * width;
    Some(Arc::new(Memory { tensor, bytes }))
}

/// A tensor that shares its memory with nobody who would change it: Burn copies on write.
struct Memory {
    tensor: FlexTensor,
    bytes: Range<usize>,
}

impl Steady for Memory {
    fn bytes(&self) -> &[u8] {
        &self.tensor.bytes()[self.bytes.clone()]
    }
}

/// Per member, where its messages land in the block of `shape`, if nothing has to be added or unpacked and all of it
/// arrives.
fn landing_places(
    shape: [usize; DIMS],
    arrivals: &[Vec<Transfer>],
    routes: &[Route],
    rank: usize,
    dtype: DType,
) -> Option<Vec<Vec<Range<usize>>>> {
    let from_others = (arrivals.iter().enumerate())
        .any(|(peer, transfers)| peer != rank && !transfers.is_empty());
    if !from_others || !matches!(dtype, DType::F32 | DType::F64) {
        return None;
    }
    let places = (routes.iter().enumerate())
        .map(|(peer, route)| match peer == rank {
            true => Some(vec![]),
            false => route.landed(dtype.size()),
        })
        .collect::<Option<Vec<_>>>()?;
    let targets = arrivals.iter().flatten().map(|transfer| transfer.target);
    tiles::cover(shape, &targets.collect::<Vec<_>>()).then_some(places)
}

/// Room in the block itself.
fn land(
    tensor: Tensor<DIMS>,
    shape: [usize; DIMS],
    boxes: Vec<Transfer>,
    places: Vec<Vec<Range<usize>>>,
) -> (Vec<Vec<Incoming>>, Laying, Arrived) {
    let landing = Landing::new(tensor.dtype().size(), shape.iter().product());
    let counts: Vec<_> = places.iter().map(Vec::len).collect();
    let mut own = vec![];
    boxes::each_run(&tensor, &boxes, shape, |_, place| own.push(place));
    let (landing, lent, place) = landing.lend(places.into_iter().flatten().collect(), own);
    let mut lent = lent.into_iter();
    let incoming = (counts.into_iter())
        .map(|count| lent.by_ref().take(count).collect())
        .collect();
    let laying = Laying {
        place,
        tensor,
        boxes,
        shape,
    };
    (incoming, laying, Arrived::Landed(landing))
}

/// Room for each member's boxes, end to end.
fn stage(
    own: Tensor<DIMS>,
    rank: usize,
    arrivals: Vec<Vec<Transfer>>,
    routes: &[Route],
) -> (Vec<Vec<Incoming>>, Arrived) {
    let width = own.dtype().size();
    let mut incoming = Vec::new();
    let mut members = Vec::new();
    for (peer, (transfers, route)) in arrivals.into_iter().zip(routes).enumerate() {
        if peer == rank || transfers.is_empty() {
            incoming.push(vec![]);
            members.push((None, transfers));
            continue;
        }
        let count = transfers.iter().map(|t| t.source.elements()).sum();
        let room = Landing::new(width, count);
        let (landing, lent, nothing) = room.lend(route.end_to_end(width), vec![]);
        nothing.write(|_| ());
        incoming.push(lent);
        members.push((Some(landing), transfers));
    }
    (incoming, Arrived::Boxes { own, rank, members })
}

/// What landed, as a tensor.
fn received<const D: usize>(
    landing: Arc<Landing>,
    shape: [usize; D],
    dtype: DType,
    device: &Device,
) -> Tensor<D> {
    let Some(bytes) = Landing::take(landing) else {
        unreachable!("a block is unpacked when all of it has arrived");
    };
    Tensor::from_data(TensorData::from_bytes(bytes, shape, dtype), (device, dtype))
}

/// A member's boxes, each as a source of its own.
fn unpacked(
    landing: Arc<Landing>,
    transfers: Vec<Transfer>,
    dtype: DType,
    device: &Device,
) -> Vec<Source> {
    let count: usize = transfers.iter().map(|t| t.source.elements()).sum();
    let all = received(landing, [count], dtype, device);
    let mut start = 0;
    (transfers.into_iter())
        .map(|mut transfer| {
            let elements = transfer.source.elements();
            let values = all.clone().narrow(0, start, elements);
            start += elements;
            transfer.source.start = [0; DIMS];
            Source {
                tensor: reshape(values, transfer.source.extent),
                transfers: vec![transfer],
            }
        })
        .collect()
}

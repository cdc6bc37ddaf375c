//! Tensors as NCCL sees them: the boxes that leave and arrive, by their address on the device.
//!
//! Unsafe here: that the addresses are those of CubeCL's tensors, whose resources hold them where they are.
#![expect(unsafe_code, reason = "addresses on the device, taken from tensors")]

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use burn::backend::Cube;
use burn::tensor::{Device, Shape, Tensor};
use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl_runtime::runtime::Runtime;

use super::communicator::{Boxes, Message, message};
use super::process::{Answer, Job};
use super::wire::Announcement;
use crate::blocks::{DIMS, Region, Transfer};
use crate::error::CommError;
use crate::launch::BoxError;
use crate::transport::copy::{Crossing, Source, assemble};
use crate::transport::job::Fails;
use crate::transport::position::{GroupId, Position};
use crate::transport::{Arrival, Exchange, Pending, Transport, digest};

/// A rank's end of the group of all ranks of a launch, whose tensors are on CUDA's device of this number; none if
/// this process has no part in the launch.
pub(super) fn transport(job: &Arc<Job>, device: usize) -> Option<Arc<dyn Transport>> {
    let rank = job.rank()?;
    let position = Position::new(GroupId::world(job.ranks()), rank);
    Some(Arc::new(NcclTransport::new(
        job.clone(),
        position,
        Device::cuda(device),
    )))
}

#[derive(Debug)]
struct NcclTransport {
    job: Arc<Job>,
    position: Position,
    /// The group, as it is called between processes.
    group: u64,
    sequence: AtomicU64,
    device: Device,
}

impl NcclTransport {
    fn new(job: Arc<Job>, position: Position, device: Device) -> Self {
        Self {
            job,
            group: digest(&position.id),
            position,
            sequence: AtomicU64::new(0),
            device,
        }
    }

    fn broken(&self, error: &dyn std::fmt::Display) -> CommError {
        self.job.fail(CommError::Engine {
            rank: self.position.world_rank(),
            message: error.to_string(),
        })
    }
}

impl Transport for NcclTransport {
    fn rank(&self) -> usize {
        self.position.rank
    }

    fn size(&self) -> usize {
        self.position.size()
    }

    fn next_sequence(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    fn start(&self, exchange: Exchange) -> Result<Box<dyn Pending>, CommError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let rank = self.position.rank;
        let call = exchange.call(sequence);
        self.job.call(&call)?;
        (exchange.check_shape(&self.position, &call)).map_err(|error| self.job.fail(error))?;
        if exchange.tensor.device() != self.device {
            let error = format!(
                "{call} was given a tensor on {:?}, and NCCL moves those on {:?}, this rank's GPU",
                exchange.tensor.device(),
                self.device
            );
            return Err(self.broken(&error));
        }
        let _span = tracing::info_span!("packing", call = %call).entered();
        let packed =
            Packed::pack(&exchange, &self.position).map_err(|error| self.broken(&error))?;
        let announcement = Announcement {
            group: self.group,
            members: self.position.id.members.clone(),
            call,
            blocks: digest(&(&*exchange.before, &*exchange.after)),
        };
        let answer = self.job.enter(announcement.clone(), packed.boxes);
        Ok(Box::new(NcclPending {
            job: self.job.clone(),
            answer,
            exchange: announcement,
            rank,
            shape: exchange.after.local_shape(rank),
            own: (exchange.tensor, packed.own),
            arrivals: packed.arrivals,
        }))
    }

    fn subgroup(&self, members: &[usize]) -> Result<Arc<dyn Transport>, CommError> {
        let position = self.position.subgroup(members)?;
        let (job, device) = (self.job.clone(), self.device.clone());
        Ok(Arc::new(Self::new(job, position, device)))
    }

    fn abort(&self, cause: CommError) {
        self.job.fail(cause);
    }
}

/// A rank's part of an exchange: a message for every box.
struct Packed {
    boxes: Boxes,
    /// What this rank keeps.
    own: Vec<Transfer>,
    /// What arrives from which member, and where it lands meanwhile.
    arrivals: Vec<(usize, Transfer, CubeTensor)>,
}

impl Packed {
    /// # Cost
    /// A copy of each box that is not the sender's whole block; waits until the device has made it.
    fn pack(exchange: &Exchange, position: &Position) -> Result<Self, BoxError> {
        let rank = position.rank;
        let (before, after) = (&exchange.before, &exchange.after);
        let primitive = |tensor: Tensor<DIMS>| {
            (tensor.try_into_primitive::<Cube>()).map_err(|error| format!("{error:?}"))
        };
        let CubeTensor {
            client,
            device,
            dtype,
            ..
        } = primitive(exchange.tensor.clone())?;
        let mut kept: Vec<Box<dyn Any + Send>> = Vec::new();
        let mut message_of = |peer: usize, tensor: &CubeTensor| -> Result<Message, BoxError> {
            let handle = tensor.handle.clone();
            let resource = client.get_resource::<<CudaRuntime as Runtime>::Server>(handle)?;
            let address = resource.resource().ptr;
            let elements: usize = tensor.meta.shape().iter().product();
            kept.push(Box::new((tensor.clone(), resource)));
            Ok(message(peer, address, elements * dtype.size())?)
        };
        let (mut sends, mut receives) = (Vec::new(), Vec::new());
        let (mut own, mut arrivals) = (Vec::new(), Vec::new());
        for (peer, &world_rank) in position.id.members.iter().enumerate() {
            let arriving = before.transfers(after, peer, rank);
            if peer == rank {
                own = arriving;
                continue;
            }
            for transfer in before.transfers(after, rank, peer) {
                let part = exchange.tensor.clone().slice(transfer.source.ranges());
                let part = into_contiguous(primitive(part)?);
                sends.push(message_of(world_rank, &part)?);
            }
            for transfer in arriving {
                let shape = Shape::from(transfer.source.extent);
                let place =
                    empty_device_contiguous_dtype(client.clone(), device.clone(), shape, dtype);
                receives.push(message_of(world_rank, &place)?);
                arrivals.push((peer, transfer, place));
            }
        }
        // All that was asked of the device so far: it makes the boxes, and may have used the empty ones' memory.
        exchange.tensor.device().sync()?;
        // SAFETY: each address is that of a tensor without gaps, on this rank's device, of the length of its elements;
        // `kept` holds the tensors' resources, and a held allocation is neither moved nor given away. The device has
        // done all work on them just now. `arrivals` are read when the boxes have been dropped, and nobody else has the
        // other tensors to write to: Burn copies on write what `exchange.tensor` shares with a box.
        let boxes = unsafe { Boxes::new(sends, receives, kept) };
        Ok(Self {
            boxes,
            own,
            arrivals,
        })
    }
}

struct NcclPending {
    job: Arc<Job>,
    answer: Answer,
    exchange: Announcement,
    rank: usize,
    shape: [usize; DIMS],
    own: (Tensor<DIMS>, Vec<Transfer>),
    arrivals: Vec<(usize, Transfer, CubeTensor)>,
}

impl Pending for NcclPending {
    fn is_ready(&self) -> bool {
        self.answer.is_ready()
    }

    fn wait(self: Box<Self>, deadline: Instant) -> Result<Arrival, CommError> {
        let start = Instant::now();
        let times = {
            let _span = tracing::info_span!("waiting", call = %self.exchange.call).entered();
            self.job.wait(&self.answer, &self.exchange, deadline)?
        };
        let (waited, hidden) = (times.waited(start), times.hidden(start));
        let call = &self.exchange.call;
        let _span = tracing::info_span!("communication", call = %call, ?hidden).entered();
        let (tensor, transfers) = self.own;
        let (device, dtype) = (tensor.device(), tensor.dtype());
        let mut sources: Vec<(usize, Source)> = (self.arrivals.into_iter())
            .map(|(peer, transfer, place)| {
                let source = Region {
                    start: [0; DIMS],
                    extent: transfer.source.extent,
                };
                let source = Source {
                    tensor: Tensor::from_primitive::<Cube>(place),
                    transfers: vec![Transfer { source, ..transfer }],
                };
                (peer, source)
            })
            .collect();
        if !transfers.is_empty() {
            sources.push((self.rank, Source { tensor, transfers }));
        }
        // In rank order, in which they are summed.
        sources.sort_by_key(|(peer, _)| *peer);
        let sources: Vec<Source> = sources.into_iter().map(|(_, source)| source).collect();
        let tensor = match sources.is_empty() {
            true => Tensor::zeros(self.shape, (&device, dtype)),
            false => assemble(self.shape, &sources, &device, &Crossing::default()),
        };
        Ok(Arrival {
            tensor,
            waited,
            moved: start.elapsed().saturating_sub(waited),
            hidden,
        })
    }
}

//! A rank's communicator and the stream that its messages travel on: every wait is a poll with a deadline.
//!
//! NCCL's calls begin something; whether it has ended, the communicator says for what happens on the host and
//! the stream for what happens on the device. Both are asked in turn, so that a peer that died, which NCCL
//! learns of on its own, ends the wait as well as the deadline does.
//!
//! Unsafe here: a [`Boxes`] is memory of this rank's device that stays where it is while it is moved, which who makes
//! one promises; and a [`Communicator`] is alive until it is closed or dropped.
#![expect(
    unsafe_code,
    reason = "NCCL and CUDA take addresses on a device and handles"
)]

use std::any::Any;
use std::ffi::{c_char, c_int};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};

use super::NcclError;
use super::library::{IN_PROGRESS, Library, int};
use super::mover::{Mover, Patience};

/// A message's other end, as a rank of the world, and its memory on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) peer: c_int,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

/// Memory of this rank's device that leaves for others, and room for what they send.
#[derive(Default)]
pub(super) struct Boxes {
    sends: Vec<Message>,
    receives: Vec<Message>,
    /// What keeps the memory where it is.
    _kept: Vec<Box<dyn Any + Send>>,
}

impl Boxes {
    /// # Safety
    /// Each message's memory lies on the device of the rank's mover and is as long as it says. `kept` holds it where
    /// it is. All work that was given to the device on it before is done, and none is given to it, of what is sent
    /// none that writes, before the boxes are dropped.
    pub(super) unsafe fn new(
        sends: Vec<Message>,
        receives: Vec<Message>,
        kept: Vec<Box<dyn Any + Send>>,
    ) -> Self {
        Self {
            sends,
            receives,
            _kept: kept,
        }
    }

    /// Boxes that nobody moves, but that are told apart by their bytes: for movers without a GPU.
    #[cfg(test)]
    pub(super) fn noted(bytes: usize) -> Self {
        let (peer, address) = (0, 0);
        Self {
            sends: vec![Message {
                peer,
                address,
                bytes,
            }],
            ..Self::default()
        }
    }

    pub(super) fn sent_bytes(&self) -> u64 {
        self.sends.iter().map(|message| message.bytes as u64).sum()
    }
}

/// Moves boxes by NCCL.
#[derive(Debug)]
pub(super) struct Gpu {
    library: Arc<Library>,
    context: Arc<CudaContext>,
    rank: usize,
    ranks: usize,
    communicator: Option<Communicator>,
}

impl Gpu {
    pub(super) fn new(
        library: Arc<Library>,
        context: Arc<CudaContext>,
        (rank, ranks): (usize, usize),
    ) -> Self {
        Self {
            library,
            context,
            rank,
            ranks,
            communicator: None,
        }
    }
}

impl Mover for Gpu {
    fn name(&mut self) -> Result<Vec<u8>, NcclError> {
        let id = self.library.unique_id()?;
        Ok(id.internal.map(|byte| byte as u8).into())
    }

    fn join(&mut self, name: &[u8], patience: &Patience<'_>) -> Result<(), NcclError> {
        let internal: [u8; 128] = name.try_into().map_err(|_| NcclError::Call {
            call: "joining the other ranks",
            message: format!("a name of {} bytes, where NCCL's have 128", name.len()),
        })?;
        let id = ncclUniqueId {
            internal: internal.map(|byte| byte as c_char),
        };
        let place = (self.rank, self.ranks);
        let joined = Communicator::join(&self.library, &self.context, id, place, patience)?;
        self.communicator = Some(joined);
        Ok(())
    }

    fn joined(&self) -> bool {
        self.communicator.is_some()
    }

    fn exchange(&mut self, boxes: &Boxes, patience: &Patience<'_>) -> Result<(), NcclError> {
        match &self.communicator {
            Some(communicator) => communicator.exchange(boxes, patience),
            None => Err(NcclError::Aborted),
        }
    }

    fn abort(&mut self) {
        self.communicator = None;
    }

    fn leave(&mut self, patience: &Patience<'_>) -> Result<(), NcclError> {
        match self.communicator.take() {
            Some(communicator) => communicator.close(patience),
            None => Ok(()),
        }
    }
}

/// One rank's end of the group of all ranks. Dropped, it aborts; [`close`](Self::close) leaves in peace.
#[derive(Debug)]
struct Communicator {
    library: Arc<Library>,
    stream: Arc<CudaStream>,
    /// Alive, or null when it has been closed.
    comm: ncclComm_t,
}

impl Communicator {
    /// Joins the other ranks; all of them must.
    fn join(
        library: &Arc<Library>,
        context: &Arc<CudaContext>,
        id: ncclUniqueId,
        place: (usize, usize),
        patience: &Patience<'_>,
    ) -> Result<Self, NcclError> {
        context.bind_to_thread()?;
        let stream = context.new_stream()?;
        let mut config = without_blocking();
        // SAFETY: the context was bound to this thread just now.
        let comm = unsafe { library.comm_init(place, id, &mut config) }?;
        let joined = Self {
            library: library.clone(),
            stream,
            comm,
        };
        joined.settle("to join the other ranks", patience)?;
        Ok(joined)
    }

    /// Sends and receives, and waits until both have happened.
    fn exchange(&self, boxes: &Boxes, patience: &Patience<'_>) -> Result<(), NcclError> {
        if boxes.sends.is_empty() && boxes.receives.is_empty() {
            return Ok(());
        }
        self.stream.context().bind_to_thread()?;
        let stream = self.stream.cu_stream().cast();
        // SAFETY: communicator and stream are this value's own and alive. The memory is as `Boxes::new` was promised;
        // it is kept until the boxes are dropped, which is after this returns and, where it returns an error, after
        // the communicator has been aborted.
        unsafe {
            let (sends, receives) = (&boxes.sends, &boxes.receives);
            (self.library).exchange(self.comm, stream, sends, receives)
        }?;
        self.settle("to enter an exchange", patience)?;
        self.drain("for the boxes of an exchange", patience)
    }

    /// Waits until the host's part of all calls is done.
    fn settle(&self, what: &'static str, patience: &Patience<'_>) -> Result<(), NcclError> {
        // SAFETY: the communicator lives as long as this value, which alone ends it.
        while unsafe { self.library.async_error(self.comm) }? == IN_PROGRESS {
            patience.pause(what)?;
        }
        Ok(())
    }

    /// Waits until the device's part is.
    fn drain(&self, what: &'static str, patience: &Patience<'_>) -> Result<(), NcclError> {
        loop {
            // SAFETY: the stream is this value's own and alive, its context is bound to this thread.
            match unsafe { sys::cuStreamQuery(self.stream.cu_stream()) } {
                sys::CUresult::CUDA_SUCCESS => return Ok(()),
                sys::CUresult::CUDA_ERROR_NOT_READY => {}
                error => return Err(DriverError(error).into()),
            }
            // SAFETY: as in `settle`. A peer that died is an error here, while the stream waits for ever.
            unsafe { self.library.async_error(self.comm) }?;
            patience.pause(what)?;
        }
    }

    /// Leaves the other ranks in peace: waits until what is under way is done.
    fn close(mut self, patience: &Patience<'_>) -> Result<(), NcclError> {
        self.stream.context().bind_to_thread()?;
        // SAFETY: as in `settle`.
        unsafe { self.library.finalize(self.comm) }?;
        self.settle("to leave the other ranks", patience)?;
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        // SAFETY: it is finalised, and this value has forgotten it: nobody can use it any more.
        unsafe { self.library.destroy(comm) }
    }
}

impl Drop for Communicator {
    /// Aborts: what is under way ends at once, here, and with an error at the other ranks.
    fn drop(&mut self) {
        if self.comm.is_null() {
            return;
        }
        let _ = self.stream.context().bind_to_thread();
        // SAFETY: the communicator is alive until now, and nobody can use it any more.
        unsafe { self.library.abort(self.comm) };
    }
}

/// A peer as NCCL numbers it, and its message.
pub(super) fn message(peer: usize, address: u64, bytes: usize) -> Result<Message, NcclError> {
    Ok(Message {
        peer: int(peer)?,
        address,
        bytes,
    })
}

/// NCCL's defaults (`NCCL_CONFIG_INITIALIZER` of its header), but for calls that only begin.
fn without_blocking() -> ncclConfig_t {
    /// "As NCCL would choose", for numbers; null says so for pointers.
    const UNDEFINED: i32 = i32::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 23_000,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

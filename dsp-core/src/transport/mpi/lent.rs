//! Memory that is lent to MPI while a message is under way: the one place of this transport with `unsafe`.
//!
//! A request that MPI has not completed may touch its memory at any time, whatever becomes of the code that
//! started it. So memory and request are one value, [`Flight`], which keeps the memory until MPI is done with
//! it, and *leaks* it if it is dropped before.

#![expect(unsafe_code, reason = "memory is lent to MPI")]

use std::any::Any;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Bytes;
use ferrompi::{Communicator, Request, Scope};

/// Bytes that nobody changes: a tensor's own, or packed ones.
pub(super) trait Steady: Send + Sync + 'static {
    /// The bytes, always the same ones at the same address.
    fn bytes(&self) -> &[u8];
}

impl Steady for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A part of steady bytes that is to be sent.
pub(super) struct Outgoing {
    owner: Arc<dyn Steady>,
    range: Range<usize>,
}

impl Outgoing {
    pub(super) fn new(owner: Arc<dyn Steady>, range: Range<usize>) -> Self {
        Self { owner, range }
    }

    pub(super) fn len(&self) -> usize {
        self.range.len()
    }
}

/// Room for what arrives: elements of 2, 4 or 8 bytes, aligned for them.
pub(super) struct Landing {
    elements: Elements,
    start: *mut u8,
    bytes: usize,
}

enum Elements {
    Two(Vec<u16>),
    Four(Vec<u32>),
    Eight(Vec<u64>),
}

// SAFETY: `start` points into `elements`, which goes where this value goes; nothing is bound to a thread.
unsafe impl Send for Landing {}
// SAFETY: through a shared reference nothing can be reached but the address and the length.
unsafe impl Sync for Landing {}

impl Landing {
    /// Zeros: `count` elements of `width` bytes.
    pub(super) fn new(width: usize, count: usize) -> Self {
        let mut elements = match width {
            2 => Elements::Two(vec![0; count]),
            4 => Elements::Four(vec![0; count]),
            8 => Elements::Eight(vec![0; count]),
            _ => unreachable!("floats have 2, 4 or 8 bytes"),
        };
        let start = match &mut elements {
            Elements::Two(vec) => vec.as_mut_ptr().cast(),
            Elements::Four(vec) => vec.as_mut_ptr().cast(),
            Elements::Eight(vec) => vec.as_mut_ptr().cast(),
        };
        Self {
            elements,
            start,
            bytes: width * count,
        }
    }

    /// All of it, before any of it is lent.
    #[cfg(feature = "flex")]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `start` and `bytes` are the vector's own, which is borrowed with `self`; any bits are bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// Lends out parts of it, which must not overlap.
    ///
    /// # Panics
    /// If they do, or one reaches past the end.
    pub(super) fn lend(self, parts: Vec<Range<usize>>) -> (Arc<Self>, Vec<Incoming>) {
        let mut sorted: Vec<_> = parts.iter().filter(|part| !part.is_empty()).collect();
        sorted.sort_unstable_by_key(|part| part.start);
        assert!(
            sorted.windows(2).all(|pair| pair[0].end <= pair[1].start)
                && sorted.last().is_none_or(|last| last.end <= self.bytes),
            "what arrives lands side by side"
        );
        let landing = Arc::new(self);
        let lent = (parts.into_iter())
            .map(|range| Incoming {
                landing: landing.clone(),
                range,
            })
            .collect();
        (landing, lent)
    }

    /// What landed, when nothing is lent any more; none before.
    pub(super) fn take(landing: Arc<Self>) -> Option<Bytes> {
        Some(match Arc::try_unwrap(landing).ok()?.elements {
            Elements::Two(vec) => Bytes::from_elems(vec),
            Elements::Four(vec) => Bytes::from_elems(vec),
            Elements::Eight(vec) => Bytes::from_elems(vec),
        })
    }
}

/// A part of a landing into which a message is to be received.
pub(super) struct Incoming {
    landing: Arc<Landing>,
    range: Range<usize>,
}

impl Incoming {
    /// A landing of its own, for bytes that nobody wants.
    pub(super) fn scratch(bytes: usize) -> Self {
        let landing = Arc::new(Landing::new(8, bytes.div_ceil(8)));
        Self {
            landing,
            range: 0..bytes,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.range.len()
    }
}

/// A message under way, and the memory that it needs.
pub(super) struct Flight<'s> {
    request: Request<'s>,
    memory: ManuallyDrop<Arc<dyn Any + Send + Sync>>,
}

/// Keeps any owner alive.
struct Kept<T: ?Sized>(#[allow(dead_code, reason = "it is only held")] Arc<T>);

impl<'s> Flight<'s> {
    /// Starts to send.
    pub(super) fn send(
        world: &Communicator,
        scope: &'s Scope<'s, '_>,
        outgoing: Outgoing,
        to: i32,
        tag: i32,
    ) -> ferrompi::Result<Self> {
        let Outgoing { owner, range } = outgoing;
        let bytes: *const [u8] = &owner.bytes()[range];
        // SAFETY: the bytes stay where they are and as they are as long as `owner` lives, which the flight
        // keeps until MPI has completed the request, or for ever.
        let bytes: &'s [u8] = unsafe { &*bytes };
        let request = world.isend(scope, bytes, to, tag)?;
        Ok(Self {
            request,
            memory: ManuallyDrop::new(Arc::new(Kept(owner))),
        })
    }

    /// Starts to receive.
    pub(super) fn receive(
        world: &Communicator,
        scope: &'s Scope<'s, '_>,
        incoming: Incoming,
        from: i32,
        tag: i32,
    ) -> ferrompi::Result<Self> {
        let Incoming { landing, range } = incoming;
        debug_assert!(range.end <= 8 * landing.bytes.div_ceil(8));
        // SAFETY: the range lies within the landing's vector (checked by `lend`, or by construction), no
        // other part of it overlaps and nobody reads it before all parts have come back (`take`); the flight
        // keeps the landing until MPI has completed the request, or for ever.
        let bytes: &'s mut [u8] =
            unsafe { std::slice::from_raw_parts_mut(landing.start.add(range.start), range.len()) };
        let request = world.irecv(scope, bytes, from, tag)?;
        Ok(Self {
            request,
            memory: ManuallyDrop::new(landing),
        })
    }

    /// Whether MPI is done with it.
    pub(super) fn test(&mut self) -> ferrompi::Result<bool> {
        Ok(self.request.test()?.is_some())
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if self.request.is_completed() {
            // SAFETY: dropped once, here; MPI does not touch the memory any more.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

//! Memory that is lent to MPI while a message is under way: the one place of this transport with `unsafe`.
//!
//! A request that MPI has not completed may touch its memory at any time, whatever becomes of the code that
//! started it. So memory and requests are one value, [`Flights`], which keeps the memory until MPI is done with
//! it, and *leaks* it if it is dropped before.

#![expect(unsafe_code, reason = "memory is lent to MPI")]

use std::mem::{ManuallyDrop, MaybeUninit};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::Bytes;
use ferrompi::{Communicator, CustomDatatype, MpiErrorClass, PlainData, Request, Scope};

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

/// A byte that may not have been written yet: room for what arrives need not be cleared before.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Room(#[allow(dead_code, reason = "MPI writes it")] MaybeUninit<u8>);

// SAFETY: a byte that was written is one, and so is one that was not.
unsafe impl PlainData for Room {}

/// What MPI is told that [`Room`] is.
///
/// # Errors
/// Those of MPI.
pub(super) fn datatype_of_room() -> ferrompi::Result<CustomDatatype> {
    CustomDatatype::contiguous::<u8>(1)
}

/// Room for what arrives: elements of 2, 4 or 8 bytes, aligned for them, which nobody has written before.
pub(super) struct Landing {
    elements: Elements,
    start: *mut u8,
    bytes: usize,
    /// How many of its parts have not been written whole.
    missing: AtomicUsize,
}

enum Elements {
    Two(Vec<MaybeUninit<u16>>),
    Four(Vec<MaybeUninit<u32>>),
    Eight(Vec<MaybeUninit<u64>>),
}

// SAFETY: `start` points into `elements`, which goes where this value goes; nothing is bound to a thread.
unsafe impl Send for Landing {}
// SAFETY: through a shared reference nothing can be reached but the address, the length and an atomic number.
unsafe impl Sync for Landing {}

impl Landing {
    /// Room for `count` elements of `width` bytes.
    pub(super) fn new(width: usize, count: usize) -> Self {
        let mut elements = match width {
            2 => Elements::Two(Box::new_uninit_slice(count).into_vec()),
            4 => Elements::Four(Box::new_uninit_slice(count).into_vec()),
            8 => Elements::Eight(Box::new_uninit_slice(count).into_vec()),
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
            missing: AtomicUsize::new(1),
        }
    }

    /// Shares it out: `parts` to messages, and `own` to this rank itself.
    ///
    /// # Panics
    /// Unless every byte belongs to exactly one range.
    pub(super) fn lend(
        mut self,
        parts: Vec<Range<usize>>,
        own: Vec<Range<usize>>,
    ) -> (Arc<Self>, Vec<Incoming>, Own) {
        let mut sorted: Vec<_> = (parts.iter().chain(&own))
            .filter(|part| !part.is_empty())
            .collect();
        sorted.sort_unstable_by_key(|part| part.start);
        let ends = [0].into_iter().chain(sorted.iter().map(|part| part.end));
        let starts = sorted.iter().map(|part| part.start).chain([self.bytes]);
        assert!(ends.eq(starts), "what arrives lands side by side");
        self.missing = AtomicUsize::new(parts.len() + 1);
        let landing = Arc::new(self);
        let lent = (parts.into_iter())
            .map(|range| Incoming {
                landing: landing.clone(),
                range,
            })
            .collect();
        let own = Own {
            landing: landing.clone(),
            ranges: own,
        };
        (landing, lent, own)
    }

    /// What landed, when all of it has and nothing is lent any more; none before.
    pub(super) fn take(landing: Arc<Self>) -> Option<Bytes> {
        let landing = Arc::try_unwrap(landing).ok()?;
        if landing.missing.load(Ordering::Acquire) > 0 {
            return None;
        }
        /// # Safety
        /// All elements have been written.
        unsafe fn written<T>(vec: Vec<MaybeUninit<T>>) -> Vec<T> {
            let mut vec = ManuallyDrop::new(vec);
            // SAFETY: the vector's own parts, of a type of the same layout, whose elements have been written.
            unsafe { Vec::from_raw_parts(vec.as_mut_ptr().cast(), vec.len(), vec.capacity()) }
        }
        // SAFETY: the parts are all the bytes (`lend`), and each has been written: by a message as long as itself
        // (`Flights::landed`), or by `Own::write`.
        unsafe {
            Some(match landing.elements {
                Elements::Two(vec) => Bytes::from_elems(written(vec)),
                Elements::Four(vec) => Bytes::from_elems(written(vec)),
                Elements::Eight(vec) => Bytes::from_elems(written(vec)),
            })
        }
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

/// The ranges of a landing that no message brings.
pub(super) struct Own {
    landing: Arc<Landing>,
    ranges: Vec<Range<usize>>,
}

impl Own {
    /// Writes them: `tell` is to give one piece for each range, in their order and of its length.
    ///
    /// # Panics
    /// If it does not.
    pub(super) fn write(self, tell: impl FnOnce(&mut dyn FnMut(&[u8]))) {
        let Self { landing, ranges } = self;
        let mut ranges = ranges.into_iter();
        tell(&mut |piece| {
            let next = ranges.next();
            let Some(range) = next.filter(|range| range.len() == piece.len()) else {
                panic!("a piece for each range");
            };
            // SAFETY: the range lies in the landing's vector and belongs to nobody else (`lend`), and it is as
            // long as the piece, which borrows memory of somebody else.
            unsafe {
                let target = landing.start.add(range.start);
                std::ptr::copy_nonoverlapping(piece.as_ptr(), target, piece.len());
            }
        });
        assert_eq!(ranges.len(), 0, "a piece for each range");
        landing.missing.fetch_sub(1, Ordering::Release);
    }
}

/// Messages under way, the memory that each needs, and what each is for.
pub(super) struct Flights<'s, P> {
    /// Side by side, so that one call of MPI asks after all of them.
    requests: Vec<Request<'s>>,
    /// Of each request.
    cargo: Vec<(ManuallyDrop<Memory>, P)>,
}

/// Memory that MPI reads or writes.
enum Memory {
    Sent(#[allow(dead_code, reason = "it is only held")] Arc<dyn Steady>),
    Received(Incoming),
}

/// A message with which MPI is done: what it was for, and the kind of error if it failed.
pub(super) struct Landed<P> {
    pub(super) purpose: P,
    pub(super) error: Option<MpiErrorClass>,
}

impl<'s, P> Flights<'s, P> {
    pub(super) fn new() -> Self {
        Self {
            requests: Vec::new(),
            cargo: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Starts to send.
    pub(super) fn send(
        &mut self,
        world: &Communicator,
        scope: &'s Scope<'s, '_>,
        outgoing: Outgoing,
        (to, tag): (i32, i32),
        purpose: P,
    ) -> ferrompi::Result<()> {
        let Outgoing { owner, range } = outgoing;
        let bytes: *const [u8] = &owner.bytes()[range];
        // SAFETY: the bytes stay where they are and as they are as long as `owner` lives, which is kept until MPI
        // has completed the request, or for ever.
        let bytes: &'s [u8] = unsafe { &*bytes };
        self.requests.push(world.isend(scope, bytes, to, tag)?);
        let memory = ManuallyDrop::new(Memory::Sent(owner));
        self.cargo.push((memory, purpose));
        Ok(())
    }

    /// Starts to receive. `room` is MPI's name of [`Room`].
    pub(super) fn receive(
        &mut self,
        world: &Communicator,
        (scope, room): (&'s Scope<'s, '_>, &'s CustomDatatype),
        incoming: Incoming,
        (from, tag): (i32, i32),
        purpose: P,
    ) -> ferrompi::Result<()> {
        let Incoming { landing, range } = &incoming;
        debug_assert!(range.end <= 8 * landing.bytes.div_ceil(8));
        // SAFETY: the range lies within the landing's vector (checked by `lend`, or by construction), no
        // other part of it overlaps and nobody reads it before all parts have come back (`take`); the landing is
        // kept until MPI has completed the request, or for ever.
        let bytes: &'s mut [Room] = unsafe {
            std::slice::from_raw_parts_mut(landing.start.add(range.start).cast(), range.len())
        };
        let request = world.irecv_custom(scope, bytes, room, from, tag)?;
        self.requests.push(request);
        let memory = ManuallyDrop::new(Memory::Received(incoming));
        self.cargo.push((memory, purpose));
        Ok(())
    }

    /// Those with which MPI is done by now.
    pub(super) fn landed(&mut self) -> ferrompi::Result<Vec<Landed<P>>> {
        let mut done = Request::test_some(&mut self.requests)?;
        // From the last one on, so that the others keep their places.
        done.sort_unstable_by_key(|(index, _)| std::cmp::Reverse(*index));
        let landed = done.into_iter().map(|(index, status)| {
            self.requests.swap_remove(index);
            let (memory, purpose) = self.cargo.swap_remove(index);
            // MPI is done with the request, and so with its memory.
            let memory = ManuallyDrop::into_inner(memory);
            if let Memory::Received(Incoming { landing, range }) = &memory
                && status.error.is_none()
                && status.count == Some(range.len())
            {
                landing.missing.fetch_sub(1, Ordering::Release);
            }
            let error = status.error;
            Landed { purpose, error }
        });
        Ok(landed.collect())
    }
}

impl<P> Drop for Flights<'_, P> {
    fn drop(&mut self) {
        for (request, (memory, _)) in self.requests.iter().zip(&mut self.cargo) {
            if request.is_completed() {
                // SAFETY: dropped once, here; MPI does not touch the memory any more.
                unsafe { ManuallyDrop::drop(memory) };
            }
        }
    }
}

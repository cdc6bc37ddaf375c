//! Packed sequences: documents of any lengths end to end, none of which sees another.
//!
//! ```text
//!              keys ──►
//!            ┌──┐
//!    queries │██│ document 0        ends: [2, 5]
//!       │    └──┼───┐
//!       ▼       │███│ document 1
//!               │███│
//!               └───┼──
//!                   │██ past the last end: one more document
//! ```
//!
//! The boundaries are those that variable-length attention kernels take as cumulative sequence lengths,
//! without the leading 0 (FlashAttention-2, arXiv:2307.08691).

use std::num::NonZeroUsize;
#[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
use std::ops::Range;
use std::sync::Arc;

use super::Span;

/// Which keys of its own document a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Within {
    /// Every key.
    Full,
    /// The keys at the query's own position and before it.
    Causal,
    /// The keys at the query's own position and before it, so many at most.
    Window(NonZeroUsize),
}

impl Within {
    pub(super) fn sees(self, query: usize, key: usize) -> bool {
        match self {
            Self::Full => true,
            Self::Causal => key <= query,
            Self::Window(size) => key <= query && query - key < size.get(),
        }
    }

    /// The positions that the query at one sees, of those of one endless document.
    #[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
    pub(super) fn visible(self, query: usize) -> Range<usize> {
        match self {
            Self::Full => 0..usize::MAX,
            Self::Causal => 0..query + 1,
            Self::Window(size) => (query + 1).saturating_sub(size.get())..query + 1,
        }
    }

    /// Whether each of the queries sees each of the keys. The pairs that lie furthest apart decide, so that gaps
    /// inside the spans change nothing.
    pub(super) fn shows_all(self, queries: Span, keys: Span) -> bool {
        match self {
            Self::Full => true,
            Self::Causal => keys.last <= queries.first,
            Self::Window(size) => {
                keys.last <= queries.first && queries.last - keys.first < size.get()
            }
        }
    }

    /// Whether one of the queries sees one of the keys. The differences of a query and a key of two spans without
    /// gaps are an interval, and so are those that a window lets through.
    pub(super) fn shows_any(self, queries: Span, keys: Span) -> bool {
        match self {
            Self::Full => true,
            Self::Causal => keys.first <= queries.last,
            Self::Window(size) => {
                keys.first <= queries.last && queries.first.saturating_sub(keys.last) < size.get()
            }
        }
    }
}

/// The documents of a sequence, by where each ends: they lie end to end from position 0.
///
/// Positions past the last end are a last document of their own. An empty document has the end of the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    ends: Arc<[usize]>,
}

/// Why some numbers are not the ends of documents.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentsError {
    /// A document ends before it begins.
    #[error(
        "document {document} ends at {end}, before it begins at {before}; give cumulative ends, which never fall"
    )]
    Falls {
        /// The document, from 0.
        document: usize,
        /// Its end.
        end: usize,
        /// The end of the one before.
        before: usize,
    },
}

impl Documents {
    /// The documents with these ends: the first position after each, cumulative.
    ///
    /// # Errors
    /// [`DocumentsError::Falls`] if an end is before the one before it.
    pub fn new(ends: impl Into<Arc<[usize]>>) -> Result<Self, DocumentsError> {
        let ends = ends.into();
        match (1..ends.len()).find(|&document| ends[document] < ends[document - 1]) {
            Some(document) => Err(DocumentsError::Falls {
                document,
                end: ends[document],
                before: ends[document - 1],
            }),
            None => Ok(Self { ends }),
        }
    }

    /// Where each document ends.
    pub fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// The document of a position, from 0. Cost: the logarithm of the number of documents.
    pub fn of(&self, position: usize) -> usize {
        self.ends.partition_point(|&end| end <= position)
    }

    /// The positions of the document around one.
    #[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
    pub(super) fn around(&self, position: usize) -> Range<usize> {
        let document = self.of(position);
        let start = document
            .checked_sub(1)
            .map_or(0, |before| self.ends[before]);
        start..self.ends.get(document).copied().unwrap_or(usize::MAX)
    }

    /// Whether each of the queries sees each of the keys: they lie in one document, which has no gap.
    pub(super) fn shows_all(&self, within: Within, queries: Span, keys: Span) -> bool {
        let first = self.of(queries.first.min(keys.first));
        first == self.of(queries.last.max(keys.last)) && within.shows_all(queries, keys)
    }

    /// Whether one of the queries sees one of the keys: in one of the documents that they share.
    pub(super) fn shows_any(&self, within: Within, queries: Span, keys: Span) -> bool {
        let first = self.of(queries.first.max(keys.first));
        let last = self.of(queries.last.min(keys.last));
        (first..=last).any(|document| {
            let parts = (self.part(document, queries), self.part(document, keys));
            matches!(parts, (Some(queries), Some(keys)) if within.shows_any(queries, keys))
        })
    }

    /// What a document has of some positions.
    fn part(&self, document: usize, span: Span) -> Option<Span> {
        let start = document
            .checked_sub(1)
            .map_or(0, |before| self.ends[before]);
        let first = span.first.max(start);
        let last = match self.ends.get(document) {
            Some(&end) => span.last.min(end.checked_sub(1)?),
            None => span.last,
        };
        (first <= last).then_some(Span { first, last })
    }
}

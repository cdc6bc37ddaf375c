//! The product of two panels, in the unit's registers.
//!
//! ```text
//!                        right: 32 lines, a block of 32 steps after the other
//!                           ┌ 6 ┐┌ 7 ┐     three parts of each
//!       left: 32 lines      └───┘└───┘
//!         ┌ 4 ┐             ┌ 0 ┐┌ 1 ┐     sums, in f32
//!         ├ 5 ┤      ──►    ├ 2 ┤├ 3 ┤
//!         └───┘             └───┘└───┘
//! ```
//!
//! A block takes the six products of parts in an order in which each needs one new part only. From its caches a core
//! with time to itself does so at 380 GFLOP/s (of f32; Xeon model 207), one that is slowed down, by a neighbour or for
//! power, at 100. That one has 130 to 145 if instructions that do nothing come between the products of tiles, of which
//! the other takes no notice: measured for 4 to 64 of them, about alike from 8 on, and as well for additions.

use std::arch::asm;

use super::{LINES, SIDE, TILES, Tile, Unit};

/// What the sums of a product begin with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    /// Of the first line of both.
    pub(crate) first: *const f32,
    /// Elements to the left matrix's next line: 0 where all begin alike.
    pub(crate) row: usize,
}

/// What comes between two products of tiles: nothing, twelve times.
macro_rules! pause {
    () => {
        "nop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\nnop\n"
    };
}

/// The products of the two left tiles and the two right ones.
macro_rules! products {
    () => {
        concat!(
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            pause!(),
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            pause!(),
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            pause!(),
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            pause!(),
        )
    };
}

impl Unit {
    /// `start + left · right` to `out`, whose rows are the left panel's lines, `out_row` elements apart. Meanwhile the
    /// first rows at `next` are asked for, two for each block: what is written next need not be there, nor exist.
    ///
    /// # Panics
    /// If the panels have not the same number of blocks, one at least.
    ///
    /// # Safety
    /// This thread has opened no other unit since this one. [`LINES`] rows of as many elements can be read at `start`
    /// and written at `out`, which nobody else does.
    #[inline(always)]
    pub(crate) unsafe fn multiply(
        &self,
        [left, right]: [&[Tile]; 2],
        start: Start,
        (out, out_row): (*mut f32, usize),
        next: *const f32,
    ) {
        assert!(left.len() == right.len() && left.len() >= TILES);
        assert!(left.len().is_multiple_of(TILES));
        const { assert!(LINES == 2 * SIDE && size_of::<Tile>() == 1024) };
        // SAFETY: the unit is configured on this thread, which `self` shows, and by the caller's word not yet released. Of
        // the panels as many blocks are read as they have; what is read and written elsewhere is the caller's.
        unsafe {
            asm!(
                "tileloadd tmm0, [{start} + {start_row}]",
                "tileloadd tmm1, [{start} + {start_row} + 64]",
                "tileloadd tmm2, [{more_start} + {start_row}]",
                "tileloadd tmm3, [{more_start} + {start_row} + 64]",
                "2:",
                // High by low.
                "tileloadd tmm4, [{left} + {line}]",
                "tileloadd tmm6, [{right} + {line} + 4096]",
                "tileloadd tmm5, [{left} + {line} + 1024]",
                "tileloadd tmm7, [{right} + {line} + 5120]",
                products!(),
                // High by middle.
                "tileloadd tmm6, [{right} + {line} + 2048]",
                "tileloadd tmm7, [{right} + {line} + 3072]",
                products!(),
                // Middle by middle.
                "tileloadd tmm4, [{left} + {line} + 2048]",
                "tileloadd tmm5, [{left} + {line} + 3072]",
                products!(),
                // Middle by high.
                "tileloadd tmm6, [{right} + {line}]",
                "tileloadd tmm7, [{right} + {line} + 1024]",
                products!(),
                // Low by high.
                "tileloadd tmm4, [{left} + {line} + 4096]",
                "tileloadd tmm5, [{left} + {line} + 5120]",
                products!(),
                // High by high.
                "tileloadd tmm4, [{left} + {line}]",
                "tileloadd tmm5, [{left} + {line} + 1024]",
                products!(),
                // Two rows of what is written next.
                "prefetchw [{next}]",
                "prefetchw [{next} + 64]",
                "add {next}, {out_row}",
                "prefetchw [{next}]",
                "prefetchw [{next} + 64]",
                "add {next}, {out_row}",
                "add {left}, 6144",
                "add {right}, 6144",
                "dec {blocks}",
                "jnz 2b",
                "tilestored [{out} + {out_row}], tmm0",
                "tilestored [{out} + {out_row} + 64], tmm1",
                "tilestored [{more_out} + {out_row}], tmm2",
                "tilestored [{more_out} + {out_row} + 64], tmm3",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                blocks = inout(reg) left.len() / TILES => _,
                line = in(reg) size_of::<Tile>() / SIDE,
                start = in(reg) start.first,
                more_start = in(reg) start.first.wrapping_add(SIDE * start.row),
                start_row = in(reg) start.row * size_of::<f32>(),
                out = in(reg) out,
                more_out = in(reg) out.wrapping_add(SIDE * out_row),
                out_row = in(reg) out_row * size_of::<f32>(),
                next = inout(reg) next => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

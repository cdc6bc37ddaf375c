//! Products of f32 on the matrix unit of Intel's processors (AMX), which multiplies bfloat16 only.
//!
//! ```text
//!   an f32:   1.▒▒▒▒▒▒▒ ░░░░░░░░ ········       a · b ≈ ah·bh            high · high
//!               │        │        │                    + ah·bm + am·bh
//!              high    middle    low                   + ah·bl + am·bm + al·bh
//!                 three bfloat16                  (left out: am·bl + al·bm + al·bl)
//! ```
//!
//! Three bfloat16 hold all bits of an f32, each rounded to the nearest from what the one before left. Of the nine
//! products of parts six are taken, summed in f32; the other three are at most 2⁻²³ of `a·b` together, and by far less
//! as a rule, where f32 rounds each sum by up to 2⁻²⁴. The unit has 16 times the rate of AVX-512's multiply-adds, so
//! that six products take three eighths of the time of one.
//! - Results are as right as f32's products are, but not the same bits. Those of more than 3.37e38 may be infinite.
//! - Numbers that are not finite, and those of 3.39e38 and more, have no such parts: packing tells of them.
//! - The parts of numbers below 2⁻¹¹⁰ are too small for bfloat16's exponent and are lost: down to 2⁻¹²⁶ 8 bits stay.
//!
//! Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
//! computations", arXiv:1904.06376.

#![expect(
    unsafe_code,
    reason = "the matrix unit has no instructions in the language, and is asked for of the system"
)]

mod multiply;
mod panels;
mod split;

use std::marker::PhantomData;
use std::sync::LazyLock;

pub(crate) use multiply::Start;
pub(crate) use panels::{Lines, Panels};
pub(crate) use split::{Order, Side, Unfit};

/// Lines of a panel: the rows of the left matrix, or the columns of the right one, that are multiplied at once.
pub(crate) const LINES: usize = 2 * SIDE;

/// Steps of a block, which the tiles of a panel hold: each a row of pairs.
const STEPS: usize = 2 * SIDE;

/// Tiles of a block: of each of three parts two, the first lines' and the others'.
const TILES: usize = 6;

/// Rows of a tile, and numbers of 32 bits in a row.
const SIDE: usize = 16;

/// What one of the unit's eight registers holds: 16 rows of 16 pairs of bfloat16.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Tile([[u32; SIDE]; SIDE]);

/// That this processor has the unit, and that the system lets this process use it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    pub(crate) fn detect() -> Option<Self> {
        static THERE: LazyLock<bool> = LazyLock::new(|| tiles() && permitted());
        THERE.then_some(Self(()))
    }

    /// What this thread multiplies with until it is dropped; at most one at a time. Costs some hundred cycles.
    pub(crate) fn open(self) -> Unit {
        let tiles = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [64; 8],
            more_row_bytes: [0; 8],
            rows: [SIDE as u8; 8],
            more_rows: [0; 8],
        };
        // SAFETY: the processor has the unit and the system permits it, which `self` shows; the configuration is one
        // of the palette that every such processor has. The tiles' registers hold nothing of the compiler's.
        unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &tiles, options(nostack, readonly)) };
        Unit(PhantomData)
    }
}

/// The unit as configured on this thread.
#[derive(Debug)]
pub(crate) struct Unit(PhantomData<*const ()>);

impl Drop for Unit {
    /// Without it the system would keep 8 KiB more at each switch of threads.
    fn drop(&mut self) {
        // SAFETY: the processor has the unit. The tiles' registers hold nothing that anyone waits for.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Shapes of the registers, as the processor reads them.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 8],
    more_row_bytes: [u16; 8],
    rows: [u8; 8],
    more_rows: [u8; 8],
}

/// Whether the processor has tiles, products of bfloat16 in them, and what numbers are packed with.
fn tiles() -> bool {
    use std::arch::x86_64::__cpuid_count;
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    // With AVX-512 there is a leaf 7.
    is_x86_feature_detected!("avx512f") && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES
}

/// Asks the system for the tiles' registers, for all threads of this process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// Of `arch_prctl`, and the number of the tiles' registers among what the system keeps for a thread.
    const REQUEST: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers, and reads and writes no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

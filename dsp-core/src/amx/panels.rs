//! A matrix as panels of tiles.

use rayon::prelude::*;

use super::{Amx, LINES, Order, STEPS, Side, TILES, Tile, Unfit};

/// Panels that a thread packs at a time, so that what it reads of each step lies side by side.
const AT_ONCE: usize = 8;

/// The numbers of a matrix, whose lines are its rows if it is multiplied from the left, else its columns.
pub(crate) struct Lines<R> {
    pub(crate) order: Order,
    /// Those of a line or of a step, by `order`; what is not there is zero.
    pub(crate) slice: R,
}

/// Panels of [`LINES`] lines each, all with the same blocks of steps; the room for them is kept for the next ones.
#[derive(Debug, Default)]
pub(crate) struct Panels {
    tiles: Vec<Tile>,
    /// Of each panel.
    each: usize,
}

impl Panels {
    /// Packs so many lines and steps, one of each at least, in place of what was there before.
    pub(crate) fn pack<'r>(
        &mut self,
        amx: Amx,
        side: Side,
        [lines, steps]: [usize; 2],
        from: Lines<impl Fn(usize) -> &'r [f32]>,
    ) -> Result<(), Unfit> {
        let (tiles, each) = (self.room(lines, steps), self.each);
        let panels = &mut self.tiles.spare_capacity_mut()[..tiles];
        amx.pack(side, (from.order, from.slice), 0, (panels, each))?;
        self.packed(tiles);
        Ok(())
    }

    /// The same, by all threads of the pool.
    pub(crate) fn pack_on_threads<'r>(
        &mut self,
        amx: Amx,
        side: Side,
        [lines, steps]: [usize; 2],
        from: Lines<impl Fn(usize) -> &'r [f32] + Sync>,
    ) -> Result<(), Unfit> {
        let (tiles, each) = (self.room(lines, steps), self.each);
        (self.tiles.spare_capacity_mut()[..tiles])
            .par_chunks_mut(AT_ONCE * each)
            .enumerate()
            .try_for_each(|(index, panels)| {
                let first_line = index * AT_ONCE * LINES;
                amx.pack(side, (from.order, &from.slice), first_line, (panels, each))
            })?;
        self.packed(tiles);
        Ok(())
    }

    /// Makes room for so many lines and steps, and tells for how many tiles.
    fn room(&mut self, lines: usize, steps: usize) -> usize {
        self.each = steps.div_ceil(STEPS) * TILES;
        let tiles = lines.div_ceil(LINES) * self.each;
        self.tiles.clear();
        self.tiles.reserve(tiles);
        tiles
    }

    fn packed(&mut self, tiles: usize) {
        // SAFETY: there is room for so many, and `Amx::pack` has written all of them.
        unsafe { self.tiles.set_len(tiles) };
    }

    pub(crate) fn len(&self) -> usize {
        self.tiles.len() / self.each.max(1)
    }

    pub(crate) fn panel(&self, index: usize) -> &[Tile] {
        &self.tiles[index * self.each..(index + 1) * self.each]
    }
}

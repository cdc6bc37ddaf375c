//! The three kernels: the forward pass, the gradient of the queries, and that of the keys and values.
//!
//! A cube of 16 × 16 units computes one tile of rows and walks along the other sequence in tiles:
//!
//! ```text
//!   forward, queries' gradient           keys' and values' gradient
//!
//!            keys, tile by tile ──►               keys
//!           ┌────┬────┬────┬────┐               ┌────┬────┬────┬────┐
//!   queries ││││││    │    │    │  one cube     │    ││││││    │    │
//!           ├────┼────┼────┼────┤               ├────┼────┼────┼────┤  queries, tile by tile,
//!           │    │    │    │    │               │    ││││││    │    │  of each head of the group
//!           └────┴────┴────┴────┘               └────┴────┴────┴────┘   │
//!                                                      one cube         ▼
//! ```
//!
//! Of a tile of scores, unit `(x, y)` holds rows `y, y+16, …` and columns `x, x+16, …` in registers. Every
//! operand passes through shared memory in f32, whatever the tensors' element type, and everything is summed
//! in f32, in one order: the same inputs give the same bits, and no atomic is needed.
//!
//! Which pairs are visible is a rule on positions: see [`super::rules`], whose one buffer of numbers is laid
//! out as `Rules` reads it. Tiles without a visible pair are passed over.
#![allow(
    clippy::too_many_arguments,
    reason = "a kernel's arguments are its bindings"
)]
#![allow(
    clippy::manual_div_ceil,
    clippy::assign_op_pattern,
    clippy::collapsible_if,
    clippy::manual_is_multiple_of,
    clippy::redundant_field_names,
    reason = "the kernels' language has not all of Rust's"
)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// Units of a cube along either dim of a tile.
pub(super) const UNITS: usize = 16;

/// Below every score, and far from where subtracting it would overflow.
const LOWEST: f32 = -1e30;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    /// Queries of a tile, a multiple of [`UNITS`].
    pub(super) queries: usize,
    /// Keys of a tile, a multiple of [`UNITS`].
    pub(super) keys: usize,
    /// Channels of queries and keys.
    pub(super) width: usize,
    /// Channels of values.
    pub(super) value_width: usize,
    /// Whether any pair is hidden.
    pub(super) masked: bool,
}

impl Tile {
    /// Channels in shared memory: whole units, and one more so that rows start in different banks.
    pub(super) fn stride(width: usize) -> usize {
        width.next_multiple_of(UNITS) + 1
    }

    /// The longer of the two rows that share a buffer.
    pub(super) fn shared_stride(&self) -> usize {
        Self::stride(self.width.max(self.value_width))
    }
}

/// The sizes of a problem.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: u32,
    pub(super) queries: u32,
    pub(super) keys: u32,
    /// Query heads held here.
    pub(super) heads: u32,
    /// Kv heads held here.
    pub(super) kv_heads: u32,
    /// The first query head, numbered over all ranks.
    pub(super) first_head: u32,
    /// Query heads per kv head.
    pub(super) group: u32,
    /// 1 if the mask differs by sample, else 0.
    pub(super) by_sample: u32,
}

/// Where the parts of the rules' buffer begin.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Rules {
    /// The first key position that each query sees.
    first: usize,
    /// The position after the last that it sees.
    end: usize,
    /// The keys' positions.
    keys: usize,
    /// The least of `first`, the greatest of `end`, the greatest of `first` and the least of `end` in each tile of queries.
    query_tiles: usize,
    /// The least and the greatest position in each tile of keys.
    key_tiles: usize,
}

#[cube]
pub(super) fn rules_of(sizes: &Sizes, sample: usize, #[comptime] tile: Tile) -> Rules {
    let queries = sizes.queries as usize;
    let query_tiles = (queries + tile.queries - 1) / tile.queries;
    let mut samples = 1usize;
    let mut own = 0usize;
    if sizes.by_sample == 1 {
        samples = sizes.batch as usize;
        own = sample;
    }
    let keys = 2 * samples * queries;
    let tiles = keys + sizes.keys as usize;
    Rules {
        first: own * queries,
        end: (samples + own) * queries,
        keys: keys,
        query_tiles: tiles + 4 * own * query_tiles,
        key_tiles: tiles + 4 * samples * query_tiles,
    }
}

/// Whether any query of a tile may see any key of another.
#[cube]
pub(super) fn meets(rules: &[i32], at: &Rules, query_tile: usize, key_tile: usize) -> bool {
    let first = rules[at.query_tiles + 4 * query_tile];
    let end = rules[at.query_tiles + 4 * query_tile + 1];
    let least = rules[at.key_tiles + 2 * key_tile];
    let greatest = rules[at.key_tiles + 2 * key_tile + 1];
    least < end && greatest >= first
}

/// Whether every query of a tile sees every key of another.
#[cube]
pub(super) fn covers(rules: &[i32], at: &Rules, query_tile: usize, key_tile: usize) -> bool {
    let first = rules[at.query_tiles + 4 * query_tile + 2];
    let end = rules[at.query_tiles + 4 * query_tile + 3];
    let least = rules[at.key_tiles + 2 * key_tile];
    let greatest = rules[at.key_tiles + 2 * key_tile + 1];
    least >= first && greatest < end
}

/// Whether a query sees a key; neither a row past the last.
#[cube]
pub(super) fn sees(
    rules: &[i32],
    at: &Rules,
    sizes: &Sizes,
    query: usize,
    key: usize,
    #[comptime] tile: Tile,
) -> bool {
    let mut seen = query < sizes.queries as usize && key < sizes.keys as usize;
    if tile.masked {
        if seen {
            let position = rules[at.keys + key];
            seen = rules[at.first + query] <= position && position < rules[at.end + query];
        }
    }
    seen
}

/// Lays `rows` rows of `width` channels into shared memory; what lies past the edges is 0.
#[cube]
fn load<E: Float>(
    from: &[E],
    to: &mut Shared<[f32]>,
    first: usize,
    row_stride: usize,
    valid: usize,
    #[comptime] rows: usize,
    #[comptime] width: usize,
    #[comptime] stride: usize,
) {
    let padded = comptime!(width.next_multiple_of(UNITS));
    let mut index = UNIT_POS as usize;
    while index < rows * padded {
        let row = index / padded;
        let column = index % padded;
        let mut value = 0.0f32;
        if row < valid && column < width {
            value = f32::cast_from(from[first + row * row_stride + column]);
        }
        to[row * stride + column] = value;
        index += UNITS * UNITS;
    }
}

/// `left · rightᵀ` over `depth` channels: unit `(x, y)` gets rows `y + 16 i` and columns `x + 16 j`.
#[cube]
fn products(
    left: &Shared<[f32]>,
    right: &Shared<[f32]>,
    into: &mut Array<f32>,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
    #[comptime] depth: usize,
    #[comptime] left_stride: usize,
    #[comptime] right_stride: usize,
) {
    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    #[unroll]
    for index in 0..rows * columns {
        into[index] = 0.0f32;
    }
    let mut row = Array::<f32>::new(rows);
    for channel in 0..depth {
        #[unroll]
        for i in 0..rows {
            row[i] = left[(y + i * UNITS) * left_stride + channel];
        }
        #[unroll]
        for j in 0..columns {
            let column = right[(x + j * UNITS) * right_stride + channel];
            #[unroll]
            for i in 0..rows {
                into[i * columns + j] += row[i] * column;
            }
        }
    }
}

/// Adds `weights · values`: unit `(x, y)` keeps rows `y + 16 i` and channels `x + 16 j`.
#[cube]
fn accumulate(
    weights: &Shared<[f32]>,
    values: &Shared<[f32]>,
    into: &mut Array<f32>,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
    #[comptime] depth: usize,
    #[comptime] weights_stride: usize,
    #[comptime] values_stride: usize,
) {
    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    let mut weight = Array::<f32>::new(rows);
    for inner in 0..depth {
        #[unroll]
        for i in 0..rows {
            weight[i] = weights[(y + i * UNITS) * weights_stride + inner];
        }
        #[unroll]
        for j in 0..columns {
            let value = values[inner * values_stride + x + j * UNITS];
            #[unroll]
            for i in 0..rows {
                into[i * columns + j] += weight[i] * value;
            }
        }
    }
}

/// Writes what [`accumulate`] kept, times a factor.
#[cube]
fn store<E: Float>(
    from: &Array<f32>,
    to: &mut [E],
    factor: f32,
    first: usize,
    row_stride: usize,
    valid: usize,
    #[comptime] rows: usize,
    #[comptime] width: usize,
) {
    let columns = comptime!(width.div_ceil(UNITS));
    #[unroll]
    for i in 0..rows {
        let row = UNIT_POS_Y as usize + i * UNITS;
        #[unroll]
        for j in 0..columns {
            let column = UNIT_POS_X as usize + j * UNITS;
            if row < valid && column < width {
                to[first + row * row_stride + column] =
                    E::cast_from(from[i * columns + j] * factor);
            }
        }
    }
}

/// How many of a tile's rows lie before the end.
#[cube]
pub(super) fn rows_left(length: usize, first: usize, #[comptime] rows: usize) -> usize {
    let mut left = length - first;
    if left > rows {
        left = rows.runtime();
    }
    left
}

/// The output and the logsumexp of one tile of queries, by online softmax.
///
/// Shared memory: `queries · stride + keys · shared stride + queries · (keys + 1) + queries · 17` numbers.
#[cube(launch_unchecked)]
pub(super) fn attend<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    rules: &[i32],
    out: &mut [E],
    lse: &mut [f32],
    sizes: Sizes,
    scale: f32,
    nothing: f32,
    #[comptime] tile: Tile,
    #[define(E)] _element: ElemType,
) {
    let rows = comptime!(tile.queries / UNITS);
    let columns = comptime!(tile.keys / UNITS);
    let channels = comptime!(tile.value_width.div_ceil(UNITS));
    let q_stride = comptime!(Tile::stride(tile.width));
    let kv_stride = comptime!(tile.shared_stride());
    let p_stride = comptime!(tile.keys + 1);
    let red_stride = comptime!(UNITS + 1);

    let queries = sizes.queries as usize;
    let keys = sizes.keys as usize;
    let heads = sizes.heads as usize;
    let kv_heads = sizes.kv_heads as usize;
    let query_tiles = (queries + tile.queries - 1) / tile.queries;
    let key_tiles = (keys + tile.keys - 1) / tile.keys;
    let query_tile = CUBE_POS % query_tiles;
    let head = CUBE_POS / query_tiles % heads;
    let sample = CUBE_POS / (query_tiles * heads);
    if sample >= sizes.batch as usize {
        terminate!();
    }
    let group = sizes.group as usize;
    let first_head = sizes.first_head as usize;
    let kv_head = (first_head + head) / group - first_head / group;
    let at = rules_of(&sizes, sample, tile);

    let mut shared_q = Shared::<[f32]>::new_slice(comptime!(tile.queries * q_stride));
    let mut shared_kv = Shared::<[f32]>::new_slice(comptime!(tile.keys * kv_stride));
    let mut shared_p = Shared::<[f32]>::new_slice(comptime!(tile.queries * p_stride));
    let mut partial = Shared::<[f32]>::new_slice(comptime!(tile.queries * red_stride));

    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    let first_query = query_tile * tile.queries;
    let valid_queries = rows_left(queries, first_query, tile.queries);
    let first_row = (sample * queries + first_query) * heads + head;
    load::<E>(
        q,
        &mut shared_q,
        first_row * tile.width,
        heads * tile.width,
        valid_queries,
        tile.queries,
        tile.width,
        q_stride,
    );

    let mut scores = Array::<f32>::new(comptime!(rows * columns));
    let mut sum = Array::<f32>::new(comptime!(rows * channels));
    let mut maximum = Array::<f32>::new(rows);
    let mut weight = Array::<f32>::new(rows);
    #[unroll]
    for i in 0..rows {
        maximum[i] = LOWEST;
        weight[i] = 0.0f32;
    }
    #[unroll]
    for index in 0..rows * channels {
        sum[index] = 0.0f32;
    }

    for key_tile in 0..key_tiles {
        let mut visible = true;
        if tile.masked {
            visible = meets(rules, &at, query_tile, key_tile);
        }
        if visible {
            let first_key = key_tile * tile.keys;
            let valid_keys = rows_left(keys, first_key, tile.keys);
            let first_kv = (sample * keys + first_key) * kv_heads + kv_head;
            // The units that are still at the tile before read the values that stand here.
            sync_cube();
            load::<E>(
                k,
                &mut shared_kv,
                first_kv * tile.width,
                kv_heads * tile.width,
                valid_keys,
                tile.keys,
                tile.width,
                kv_stride,
            );
            sync_cube();
            products(
                &shared_q,
                &shared_kv,
                &mut scores,
                rows,
                columns,
                tile.width,
                q_stride,
                kv_stride,
            );
            #[unroll]
            for i in 0..rows {
                let row = y + i * UNITS;
                let mut most = LOWEST.runtime();
                #[unroll]
                for j in 0..columns {
                    let key = first_key + x + j * UNITS;
                    let score = scores[i * columns + j] * scale;
                    let seen = sees(rules, &at, &sizes, first_query + row, key, tile);
                    let score = select(seen, score, LOWEST.runtime());
                    scores[i * columns + j] = score;
                    most = max(most, score);
                }
                partial[row * red_stride + x] = most;
            }
            sync_cube();
            #[unroll]
            for i in 0..rows {
                let row = y + i * UNITS;
                let mut most = maximum[i];
                for unit in 0..UNITS {
                    most = max(most, partial[row * red_stride + unit]);
                }
                let shrink = (maximum[i] - most).exp();
                maximum[i] = most;
                let mut weights = weight[i] * shrink;
                #[unroll]
                for j in 0..columns {
                    let score = scores[i * columns + j];
                    // Of a row that has seen nothing yet, the maximum is the hidden score itself. `max` passes over NaN:
                    // it is here that a row's NaN gets into its sums, so the comparison must be false for it.
                    let p = select(score <= LOWEST, 0.0f32, (score - most).exp());
                    weights += p;
                    shared_p[row * p_stride + x + j * UNITS] = p;
                }
                weight[i] = weights;
                #[unroll]
                for j in 0..channels {
                    sum[i * channels + j] = sum[i * channels + j] * shrink;
                }
            }
            load::<E>(
                v,
                &mut shared_kv,
                first_kv * tile.value_width,
                kv_heads * tile.value_width,
                valid_keys,
                tile.keys,
                tile.value_width,
                kv_stride,
            );
            sync_cube();
            accumulate(
                &shared_p, &shared_kv, &mut sum, rows, channels, tile.keys, p_stride, kv_stride,
            );
        }
    }

    sync_cube();
    #[unroll]
    for i in 0..rows {
        partial[(y + i * UNITS) * red_stride + x] = weight[i];
    }
    sync_cube();
    #[unroll]
    for i in 0..rows {
        let row = y + i * UNITS;
        let mut total = 0.0f32;
        for unit in 0..UNITS {
            total += partial[row * red_stride + unit];
        }
        // That of a row that sees nothing is 0, every other at least 1, or NaN.
        let share = select(total == 0.0f32, 0.0f32, 1.0f32 / total);
        #[unroll]
        for j in 0..channels {
            sum[i * channels + j] = sum[i * channels + j] * share;
        }
        if x == 0 && row < valid_queries {
            let logarithm = maximum[i] + total.ln();
            lse[first_row + row * heads] = select(total == 0.0f32, nothing, logarithm);
        }
    }
    store::<E>(
        &sum,
        out,
        1.0f32,
        first_row * tile.value_width,
        heads * tile.value_width,
        valid_queries,
        rows,
        tile.value_width,
    );
}

/// The gradient of one tile of queries.
///
/// Shared memory: `queries · (stride + value stride) + keys · shared stride + queries · (keys + 1)` numbers.
#[cube(launch_unchecked)]
pub(super) fn query_gradient<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    dout: &[E],
    lse: &[f32],
    delta: &[f32],
    rules: &[i32],
    dq: &mut [E],
    sizes: Sizes,
    scale: f32,
    #[comptime] tile: Tile,
    #[define(E)] _element: ElemType,
) {
    let rows = comptime!(tile.queries / UNITS);
    let columns = comptime!(tile.keys / UNITS);
    let channels = comptime!(tile.width.div_ceil(UNITS));
    let q_stride = comptime!(Tile::stride(tile.width));
    let dout_stride = comptime!(Tile::stride(tile.value_width));
    let kv_stride = comptime!(tile.shared_stride());
    let p_stride = comptime!(tile.keys + 1);

    let queries = sizes.queries as usize;
    let keys = sizes.keys as usize;
    let heads = sizes.heads as usize;
    let kv_heads = sizes.kv_heads as usize;
    let query_tiles = (queries + tile.queries - 1) / tile.queries;
    let key_tiles = (keys + tile.keys - 1) / tile.keys;
    let query_tile = CUBE_POS % query_tiles;
    let head = CUBE_POS / query_tiles % heads;
    let sample = CUBE_POS / (query_tiles * heads);
    if sample >= sizes.batch as usize {
        terminate!();
    }
    let group = sizes.group as usize;
    let first_head = sizes.first_head as usize;
    let kv_head = (first_head + head) / group - first_head / group;
    let at = rules_of(&sizes, sample, tile);

    let mut shared_q = Shared::<[f32]>::new_slice(comptime!(tile.queries * q_stride));
    let mut shared_dout = Shared::<[f32]>::new_slice(comptime!(tile.queries * dout_stride));
    let mut shared_kv = Shared::<[f32]>::new_slice(comptime!(tile.keys * kv_stride));
    let mut shared_ds = Shared::<[f32]>::new_slice(comptime!(tile.queries * p_stride));

    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    let first_query = query_tile * tile.queries;
    let valid_queries = rows_left(queries, first_query, tile.queries);
    let first_row = (sample * queries + first_query) * heads + head;
    load::<E>(
        q,
        &mut shared_q,
        first_row * tile.width,
        heads * tile.width,
        valid_queries,
        tile.queries,
        tile.width,
        q_stride,
    );
    load::<E>(
        dout,
        &mut shared_dout,
        first_row * tile.value_width,
        heads * tile.value_width,
        valid_queries,
        tile.queries,
        tile.value_width,
        dout_stride,
    );

    let mut scores = Array::<f32>::new(comptime!(rows * columns));
    let mut weights = Array::<f32>::new(comptime!(rows * columns));
    let mut sum = Array::<f32>::new(comptime!(rows * channels));
    let mut row_lse = Array::<f32>::new(rows);
    let mut row_delta = Array::<f32>::new(rows);
    #[unroll]
    for i in 0..rows {
        let row = y + i * UNITS;
        row_lse[i] = 0.0f32;
        row_delta[i] = 0.0f32;
        if row < valid_queries {
            row_lse[i] = lse[first_row + row * heads];
            row_delta[i] = delta[first_row + row * heads];
        }
    }
    #[unroll]
    for index in 0..rows * channels {
        sum[index] = 0.0f32;
    }

    for key_tile in 0..key_tiles {
        let mut visible = true;
        if tile.masked {
            visible = meets(rules, &at, query_tile, key_tile);
        }
        if visible {
            let first_key = key_tile * tile.keys;
            let valid_keys = rows_left(keys, first_key, tile.keys);
            let first_kv = (sample * keys + first_key) * kv_heads + kv_head;
            sync_cube();
            load::<E>(
                v,
                &mut shared_kv,
                first_kv * tile.value_width,
                kv_heads * tile.value_width,
                valid_keys,
                tile.keys,
                tile.value_width,
                kv_stride,
            );
            sync_cube();
            products(
                &shared_dout,
                &shared_kv,
                &mut weights,
                rows,
                columns,
                tile.value_width,
                dout_stride,
                kv_stride,
            );
            sync_cube();
            load::<E>(
                k,
                &mut shared_kv,
                first_kv * tile.width,
                kv_heads * tile.width,
                valid_keys,
                tile.keys,
                tile.width,
                kv_stride,
            );
            sync_cube();
            products(
                &shared_q,
                &shared_kv,
                &mut scores,
                rows,
                columns,
                tile.width,
                q_stride,
                kv_stride,
            );
            #[unroll]
            for i in 0..rows {
                let row = y + i * UNITS;
                #[unroll]
                for j in 0..columns {
                    let key = first_key + x + j * UNITS;
                    let seen = sees(rules, &at, &sizes, first_query + row, key, tile);
                    let p = (scores[i * columns + j] * scale - row_lse[i]).exp();
                    let ds = p * (weights[i * columns + j] - row_delta[i]);
                    shared_ds[row * p_stride + x + j * UNITS] = select(seen, ds, 0.0f32);
                }
            }
            sync_cube();
            accumulate(
                &shared_ds, &shared_kv, &mut sum, rows, channels, tile.keys, p_stride, kv_stride,
            );
        }
    }
    store::<E>(
        &sum,
        dq,
        scale,
        first_row * tile.width,
        heads * tile.width,
        valid_queries,
        rows,
        tile.width,
    );
}

/// The gradients of one tile of keys and values: the sum over the queries of all heads that share them.
///
/// Shared memory: `keys · (stride + value stride) + queries · shared stride + keys · (queries + 1)` numbers.
#[cube(launch_unchecked)]
pub(super) fn key_value_gradients<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    dout: &[E],
    lse: &[f32],
    delta: &[f32],
    rules: &[i32],
    dk: &mut [E],
    dv: &mut [E],
    sizes: Sizes,
    scale: f32,
    #[comptime] tile: Tile,
    #[define(E)] _element: ElemType,
) {
    // Rows of this kernel's tiles are keys, columns are queries.
    let rows = comptime!(tile.keys / UNITS);
    let columns = comptime!(tile.queries / UNITS);
    let channels = comptime!(tile.width.div_ceil(UNITS));
    let value_channels = comptime!(tile.value_width.div_ceil(UNITS));
    let k_stride = comptime!(Tile::stride(tile.width));
    let v_stride = comptime!(Tile::stride(tile.value_width));
    let q_stride = comptime!(tile.shared_stride());
    let p_stride = comptime!(tile.queries + 1);

    let queries = sizes.queries as usize;
    let keys = sizes.keys as usize;
    let heads = sizes.heads as usize;
    let kv_heads = sizes.kv_heads as usize;
    let query_tiles = (queries + tile.queries - 1) / tile.queries;
    let key_tiles = (keys + tile.keys - 1) / tile.keys;
    let key_tile = CUBE_POS % key_tiles;
    let kv_head = CUBE_POS / key_tiles % kv_heads;
    let sample = CUBE_POS / (key_tiles * kv_heads);
    if sample >= sizes.batch as usize {
        terminate!();
    }
    let at = rules_of(&sizes, sample, tile);
    // The local query heads that attend with this kv head.
    let group = sizes.group as usize;
    let first_head = sizes.first_head as usize;
    let shared_by = (first_head / group + kv_head) * group;
    let from = max(shared_by, first_head) - first_head;
    let to = min(shared_by + group, first_head + heads) - first_head;

    let mut shared_k = Shared::<[f32]>::new_slice(comptime!(tile.keys * k_stride));
    let mut shared_v = Shared::<[f32]>::new_slice(comptime!(tile.keys * v_stride));
    let mut shared_q = Shared::<[f32]>::new_slice(comptime!(tile.queries * q_stride));
    let mut shared_p = Shared::<[f32]>::new_slice(comptime!(tile.keys * p_stride));

    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    let first_key = key_tile * tile.keys;
    let valid_keys = rows_left(keys, first_key, tile.keys);
    let first_kv = (sample * keys + first_key) * kv_heads + kv_head;
    load::<E>(
        k,
        &mut shared_k,
        first_kv * tile.width,
        kv_heads * tile.width,
        valid_keys,
        tile.keys,
        tile.width,
        k_stride,
    );
    load::<E>(
        v,
        &mut shared_v,
        first_kv * tile.value_width,
        kv_heads * tile.value_width,
        valid_keys,
        tile.keys,
        tile.value_width,
        v_stride,
    );

    let mut weights = Array::<f32>::new(comptime!(rows * columns));
    let mut dweights = Array::<f32>::new(comptime!(rows * columns));
    let mut sum_k = Array::<f32>::new(comptime!(rows * channels));
    let mut sum_v = Array::<f32>::new(comptime!(rows * value_channels));
    #[unroll]
    for index in 0..rows * channels {
        sum_k[index] = 0.0f32;
    }
    #[unroll]
    for index in 0..rows * value_channels {
        sum_v[index] = 0.0f32;
    }

    for head in from..to {
        for query_tile in 0..query_tiles {
            let mut visible = true;
            if tile.masked {
                visible = meets(rules, &at, query_tile, key_tile);
            }
            if visible {
                let first_query = query_tile * tile.queries;
                let valid_queries = rows_left(queries, first_query, tile.queries);
                let first_row = (sample * queries + first_query) * heads + head;
                sync_cube();
                load::<E>(
                    dout,
                    &mut shared_q,
                    first_row * tile.value_width,
                    heads * tile.value_width,
                    valid_queries,
                    tile.queries,
                    tile.value_width,
                    q_stride,
                );
                sync_cube();
                products(
                    &shared_v,
                    &shared_q,
                    &mut dweights,
                    rows,
                    columns,
                    tile.value_width,
                    v_stride,
                    q_stride,
                );
                sync_cube();
                load::<E>(
                    q,
                    &mut shared_q,
                    first_row * tile.width,
                    heads * tile.width,
                    valid_queries,
                    tile.queries,
                    tile.width,
                    q_stride,
                );
                sync_cube();
                products(
                    &shared_k,
                    &shared_q,
                    &mut weights,
                    rows,
                    columns,
                    tile.width,
                    k_stride,
                    q_stride,
                );
                #[unroll]
                for j in 0..columns {
                    let column = x + j * UNITS;
                    let query = first_query + column;
                    let mut query_lse = 0.0f32;
                    let mut query_delta = 0.0f32;
                    if column < valid_queries {
                        query_lse = lse[first_row + column * heads];
                        query_delta = delta[first_row + column * heads];
                    }
                    #[unroll]
                    for i in 0..rows {
                        let row = y + i * UNITS;
                        let seen = sees(rules, &at, &sizes, query, first_key + row, tile);
                        let p = (weights[i * columns + j] * scale - query_lse).exp();
                        let p = select(seen, p, 0.0f32);
                        let ds = p * (dweights[i * columns + j] - query_delta);
                        weights[i * columns + j] = p;
                        shared_p[row * p_stride + column] = select(seen, ds, 0.0f32);
                    }
                }
                sync_cube();
                accumulate(
                    &shared_p,
                    &shared_q,
                    &mut sum_k,
                    rows,
                    channels,
                    tile.queries,
                    p_stride,
                    q_stride,
                );
                sync_cube();
                load::<E>(
                    dout,
                    &mut shared_q,
                    first_row * tile.value_width,
                    heads * tile.value_width,
                    valid_queries,
                    tile.queries,
                    tile.value_width,
                    q_stride,
                );
                #[unroll]
                for i in 0..rows {
                    #[unroll]
                    for j in 0..columns {
                        shared_p[(y + i * UNITS) * p_stride + x + j * UNITS] =
                            weights[i * columns + j];
                    }
                }
                sync_cube();
                accumulate(
                    &shared_p,
                    &shared_q,
                    &mut sum_v,
                    rows,
                    value_channels,
                    tile.queries,
                    p_stride,
                    q_stride,
                );
            }
        }
    }
    store::<E>(
        &sum_k,
        dk,
        scale,
        first_kv * tile.width,
        kv_heads * tile.width,
        valid_keys,
        rows,
        tile.width,
    );
    store::<E>(
        &sum_v,
        dv,
        1.0f32,
        first_kv * tile.value_width,
        kv_heads * tile.value_width,
        valid_keys,
        rows,
        tile.value_width,
    );
}

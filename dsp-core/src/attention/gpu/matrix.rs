//! The kernels on matrix units: for 16-bit inputs, on GPUs that multiply tiles of them in one instruction (NVIDIA's since
//! Ampere). Products of 16 bits are summed in f32, softmax is in f32, and its weights are rounded to 16 bits for the second
//! product, as FlashAttention-2 does (arXiv 2307.08691).
//!
//! ```text
//!                 16 columns, a step at a time ──►
//!               ┌────────┬────────┬────────┐         Unit 4 g + t holds, of 16 rows and 8 columns,
//!   plane 0     │ 16 rows of scores        │           rows g and g + 8, columns 2 t and 2 t + 1.
//!               ├────────┼────────┼────────┤         As the left operand of the next product two such
//!   plane 1     │ 16 rows                  │         tiles side by side are what the instruction wants,
//!               ├────────┼────────┼────────┤         so weights never leave the registers.
//!   …           │                          │
//!               └────────┴────────┴────────┘
//! ```
//!
//! A cube has up to four planes of 32 units. Each plane owns whole rows, of which it has one or two blocks of 16, and reads
//! the other operand from shared memory by `ldmatrix`, eight rows of 16 bytes at a time; rows there are an odd number of
//! 16 bytes long, so that the eight lie in different banks. What walks along which sequence is as in
//! [`kernels`](super::kernels), and so are the order of sums and the rules of visibility: the same inputs give the same bits.
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
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::kernels::{Rules, Sizes, Tile, covers, meets, rows_left, rules_of, sees};

/// Rows of a matrix instruction, and its depth.
pub(super) const BLOCK: usize = 16;

/// Columns of a matrix instruction.
const COLUMNS: usize = 8;

/// Units of a plane.
pub(super) const PLANE: usize = 32;

/// Elements of 16 bytes: what a unit copies and `ldmatrix` reads at a time.
pub(super) const VECTOR: usize = 8;

/// What a hidden pair scores.
const HIDDEN: f32 = -1e30;

/// Below every score that is not hidden, and far above that.
const FLOOR: f32 = -1e29;

/// Planes that share a tile's rows.
pub(super) fn planes(rows: usize) -> usize {
    (rows / BLOCK).min(4)
}

/// Blocks of 16 rows of each plane.
pub(super) fn blocks(rows: usize) -> usize {
    rows / BLOCK / planes(rows)
}

/// Vectors of a row in shared memory, an odd number.
pub(super) fn stride(width: usize) -> usize {
    width / VECTOR + 1
}

/// Lays rows into shared memory; what lies past the edge is 0.
#[cube]
fn load<E: Float, N: Size>(
    from: &[Vector<E, N>],
    to: &mut Shared<[Vector<E, N>]>,
    first: usize,
    row_stride: usize,
    valid: usize,
    #[comptime] rows: usize,
    #[comptime] width: usize,
    #[comptime] units: usize,
) {
    let vectors = comptime!(width / VECTOR);
    let stride = comptime!(stride(width));
    let mut index = UNIT_POS as usize;
    while index < rows * vectors {
        let row = index / vectors;
        let column = index % vectors;
        let mut value = Vector::<E, N>::cast_from(E::from_int(0));
        if row < valid {
            value = from[first / VECTOR + row * (row_stride / VECTOR) + column];
        }
        to[row * stride + column] = value;
        index += units;
    }
}

/// Adds the product of a block of 16 × 16 and one of 16 × 8 to the eight columns that stand at `at`.
#[cube]
fn multiply<E: Float, NA: Size, NB: Size>(
    left: &Array<Vector<E, NA>>,
    right: &Array<Vector<E, NB>>,
    into: &mut Array<f32>,
    #[comptime] at: usize,
) {
    let definition = MmaDefinition::<E, E, f32>::new(BLOCK, COLUMNS, BLOCK);
    let size!(NC) = definition.vector_size(MatrixIdent::Accumulator);
    let mut sum = Array::<Vector<f32, NC>>::new(2usize);
    #[unroll]
    for half in 0..2 {
        let mut pair = Vector::<f32, NC>::empty();
        pair.insert(0usize, into[comptime!(at + 2 * half)]);
        pair.insert(1usize, into[comptime!(at + 2 * half + 1)]);
        sum[half] = pair;
    }
    let sum = definition.execute(left, right, &sum);
    #[unroll]
    for half in 0..2 {
        let pair = sum[half];
        into[comptime!(at + 2 * half)] = pair.extract(0usize);
        into[comptime!(at + 2 * half + 1)] = pair.extract(1usize);
    }
}

/// `left · rightᵀ` over `depth` channels: the rows of this plane against all of the tile's columns.
#[cube]
fn products<E: Float, N: Size>(
    left: &Shared<[Vector<E, N>]>,
    right: &Shared<[Vector<E, N>]>,
    into: &mut Array<f32>,
    #[comptime] blocks: usize,
    #[comptime] columns: usize,
    #[comptime] depth: usize,
) {
    let definition = MmaDefinition::<E, E, f32>::new(BLOCK, COLUMNS, BLOCK);
    let size!(NA) = definition.vector_size(MatrixIdent::A);
    let size!(NB) = definition.vector_size(MatrixIdent::B);
    let stride = comptime!(stride(depth));
    let lane = UNIT_POS_PLANE as usize;
    let first_row = UNIT_POS_Y as usize * blocks * BLOCK;
    #[unroll]
    for index in 0..comptime!(blocks * columns / 2) {
        into[index] = 0.0f32;
    }
    #[unroll]
    for step in 0..comptime!(depth / BLOCK) {
        let mut rows = Array::<Vector<E, NA>>::new(comptime!(4 * blocks));
        #[unroll]
        for block in 0..blocks {
            let row = first_row + block * BLOCK + lane % BLOCK;
            let at = row * stride + step * 2 + lane / BLOCK;
            let four = definition.load_matrix::<Vector<E, N>, NA>(
                &left[at..at + 1],
                MatrixIdent::A,
                4usize,
                false,
            );
            #[unroll]
            for register in 0..4 {
                rows[comptime!(4 * block + register)] = four[register];
            }
        }
        #[unroll]
        for pair in 0..comptime!(columns / BLOCK) {
            let row = pair * BLOCK + (lane / BLOCK) * COLUMNS + lane % COLUMNS;
            let at = row * stride + step * 2 + (lane / COLUMNS) % 2;
            let four = definition.load_matrix::<Vector<E, N>, NB>(
                &right[at..at + 1],
                MatrixIdent::B,
                4usize,
                false,
            );
            #[unroll]
            for block in 0..blocks {
                let mut own = Array::<Vector<E, NA>>::new(4usize);
                #[unroll]
                for register in 0..4 {
                    own[register] = rows[comptime!(4 * block + register)];
                }
                #[unroll]
                for side in 0..2 {
                    let mut eight = Array::<Vector<E, NB>>::new(2usize);
                    eight[0] = four[comptime!(2 * side)];
                    eight[1] = four[comptime!(2 * side + 1)];
                    let at = comptime!(4 * (block * columns / COLUMNS + 2 * pair + side));
                    multiply::<E, NA, NB>(&own, &eight, into, at);
                }
            }
        }
    }
}

/// Adds `weights · values`, with the weights as [`products`] left them: `depth` columns, of which each is a row of `values`.
#[cube]
fn accumulate<E: Float, N: Size>(
    weights: &Array<f32>,
    values: &Shared<[Vector<E, N>]>,
    into: &mut Array<f32>,
    #[comptime] blocks: usize,
    #[comptime] depth: usize,
    #[comptime] width: usize,
) {
    let definition = MmaDefinition::<E, E, f32>::new(BLOCK, COLUMNS, BLOCK);
    let size!(NA) = definition.vector_size(MatrixIdent::A);
    let size!(NB) = definition.vector_size(MatrixIdent::B);
    let stride = comptime!(stride(width));
    let lane = UNIT_POS_PLANE as usize;
    #[unroll]
    for step in 0..comptime!(depth / BLOCK) {
        let mut rows = Array::<Vector<E, NA>>::new(comptime!(4 * blocks));
        #[unroll]
        for block in 0..blocks {
            // Of both tiles of eight columns the upper and the lower rows.
            #[unroll]
            for register in 0..4 {
                let tile = comptime!(block * depth / COLUMNS + 2 * step + register / 2);
                let at = comptime!(4 * tile + 2 * (register % 2));
                let mut pair = Vector::<E, NA>::empty();
                pair.insert(0usize, E::cast_from(weights[at]));
                pair.insert(1usize, E::cast_from(weights[comptime!(at + 1)]));
                rows[comptime!(4 * block + register)] = pair;
            }
        }
        #[unroll]
        for pair in 0..comptime!(width / BLOCK) {
            let row = step * BLOCK + (lane / COLUMNS) % 2 * COLUMNS + lane % COLUMNS;
            let at = row * stride + pair * 2 + lane / BLOCK;
            let four = definition.load_matrix::<Vector<E, N>, NB>(
                &values[at..at + 1],
                MatrixIdent::B,
                4usize,
                true,
            );
            #[unroll]
            for block in 0..blocks {
                let mut own = Array::<Vector<E, NA>>::new(4usize);
                #[unroll]
                for register in 0..4 {
                    own[register] = rows[comptime!(4 * block + register)];
                }
                #[unroll]
                for side in 0..2 {
                    let mut eight = Array::<Vector<E, NB>>::new(2usize);
                    eight[0] = four[comptime!(2 * side)];
                    eight[1] = four[comptime!(2 * side + 1)];
                    let at = comptime!(4 * (block * width / COLUMNS + 2 * pair + side));
                    multiply::<E, NA, NB>(&own, &eight, into, at);
                }
            }
        }
    }
}

/// The row of this unit's `half` of a block, within the tile.
#[cube]
fn row_of(#[comptime] blocks: usize, #[comptime] block: usize, #[comptime] half: usize) -> usize {
    let first = (UNIT_POS_Y as usize * blocks + block) * BLOCK;
    first + comptime!(half * COLUMNS) + UNIT_POS_PLANE as usize / 4
}

/// The first of this unit's two columns of the tile's eight `columns`.
#[cube]
fn column_of(#[comptime] columns: usize) -> usize {
    comptime!(columns * COLUMNS) + UNIT_POS_PLANE as usize % 4 * 2
}

/// Which of the two sequences runs along a tile's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Along {
    Queries,
    Keys,
}

/// Gives every hidden pair of a tile a score that no softmax sees.
#[cube]
fn hide(
    scores: &mut Array<f32>,
    rules: &[i32],
    at: &Rules,
    sizes: &Sizes,
    first_query: usize,
    first_key: usize,
    #[comptime] tile: Tile,
    #[comptime] rows: Along,
) {
    let (own, other) = comptime!(match rows {
        Along::Queries => (tile.queries, tile.keys),
        Along::Keys => (tile.keys, tile.queries),
    });
    let blocks = comptime!(blocks(own));
    #[unroll]
    for block in 0..blocks {
        #[unroll]
        for columns in 0..comptime!(other / COLUMNS) {
            #[unroll]
            for register in 0..4 {
                let row = row_of(blocks, block, comptime!(register / 2));
                let column = column_of(columns) + comptime!(register % 2);
                let mut query = first_query + row;
                let mut key = first_key + column;
                if comptime!(rows == Along::Keys) {
                    query = first_query + column;
                    key = first_key + row;
                }
                let index = comptime!(4 * (block * other / COLUMNS + columns) + register);
                let seen = sees(rules, at, sizes, query, key, tile);
                scores[index] = select(seen, scores[index], HIDDEN);
            }
        }
    }
}

/// Whether a tile holds a pair that is hidden, or past an edge.
#[cube]
fn hides(
    rules: &[i32],
    at: &Rules,
    sizes: &Sizes,
    query_tile: usize,
    key_tile: usize,
    #[comptime] tile: Tile,
) -> bool {
    let mut hides = (key_tile + 1) * tile.keys > sizes.keys as usize;
    if tile.masked {
        if !hides {
            hides = !covers(rules, at, query_tile, key_tile);
        }
    }
    hides
}

/// Writes what [`accumulate`] kept.
#[cube]
fn store<E: Float>(
    from: &Array<f32>,
    to: &mut [E],
    first: usize,
    row_stride: usize,
    valid: usize,
    factor: f32,
    #[comptime] blocks: usize,
    #[comptime] width: usize,
) {
    #[unroll]
    for block in 0..blocks {
        #[unroll]
        for columns in 0..comptime!(width / COLUMNS) {
            #[unroll]
            for register in 0..4 {
                let row = row_of(blocks, block, comptime!(register / 2));
                let column = column_of(columns) + comptime!(register % 2);
                let index = comptime!(4 * (block * width / COLUMNS + columns) + register);
                if row < valid {
                    to[first + row * row_stride + column] = E::cast_from(from[index] * factor);
                }
            }
        }
    }
}

/// The output and the logsumexp of one tile of queries, by online softmax.
#[cube(launch_unchecked)]
pub(super) fn attend<E: Float, N: Size>(
    q: &[Vector<E, N>],
    k: &[Vector<E, N>],
    v: &[Vector<E, N>],
    rules: &[i32],
    out: &mut [E],
    lse: &mut [f32],
    sizes: Sizes,
    scale: f32,
    nothing: f32,
    #[comptime] tile: Tile,
    #[define(E)] _element: ElemType,
) {
    let planes = comptime!(planes(tile.queries));
    let blocks = comptime!(blocks(tile.queries));
    let units = comptime!(planes * PLANE);
    let wide = comptime!(tile.keys / COLUMNS);
    let channels = comptime!(tile.value_width / COLUMNS);

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

    let mut shared_q = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.queries * stride(tile.width)),
        16usize,
    );
    let mut shared_k = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.keys * stride(tile.width)),
        16usize,
    );
    let mut shared_v = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.keys * stride(tile.value_width)),
        16usize,
    );

    let first_query = query_tile * tile.queries;
    let valid_queries = rows_left(queries, first_query, tile.queries);
    let first_row = (sample * queries + first_query) * heads + head;
    load::<E, N>(
        q,
        &mut shared_q,
        first_row * tile.width,
        heads * tile.width,
        valid_queries,
        tile.queries,
        tile.width,
        units,
    );

    let mut scores = Array::<f32>::new(comptime!(blocks * tile.keys / 2));
    let mut sum = Array::<f32>::new(comptime!(blocks * tile.value_width / 2));
    // Of each row that this unit has a part of: the largest score so far, and this unit's part of the weights' sum.
    let mut maximum = Array::<f32>::new(comptime!(2 * blocks));
    let mut total = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for row in 0..comptime!(2 * blocks) {
        maximum[row] = FLOOR;
        total[row] = 0.0f32;
    }
    #[unroll]
    for index in 0..comptime!(blocks * tile.value_width / 2) {
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
            // The units that are still at the tile before read what stands here.
            sync_cube();
            load::<E, N>(
                k,
                &mut shared_k,
                first_kv * tile.width,
                kv_heads * tile.width,
                valid_keys,
                tile.keys,
                tile.width,
                units,
            );
            load::<E, N>(
                v,
                &mut shared_v,
                first_kv * tile.value_width,
                kv_heads * tile.value_width,
                valid_keys,
                tile.keys,
                tile.value_width,
                units,
            );
            sync_cube();
            products::<E, N>(
                &shared_q,
                &shared_k,
                &mut scores,
                blocks,
                tile.keys,
                tile.width,
            );
            #[unroll]
            for index in 0..comptime!(blocks * tile.keys / 2) {
                scores[index] = scores[index] * scale;
            }
            if hides(rules, &at, &sizes, query_tile, key_tile, tile) {
                hide(
                    &mut scores,
                    rules,
                    &at,
                    &sizes,
                    first_query,
                    first_key,
                    tile,
                    Along::Queries,
                );
            }
            #[unroll]
            for block in 0..blocks {
                #[unroll]
                for half in 0..2 {
                    let row = comptime!(2 * block + half);
                    let mut most = maximum[row];
                    #[unroll]
                    for columns in 0..wide {
                        let index = comptime!(4 * (block * wide + columns) + 2 * half);
                        most = max(most, scores[index]);
                        most = max(most, scores[comptime!(index + 1)]);
                    }
                    most = max(most, plane_shuffle_xor(most, 1u32));
                    most = max(most, plane_shuffle_xor(most, 2u32));
                    let factor = (maximum[row] - most).exp();
                    maximum[row] = most;
                    let mut own = total[row] * factor;
                    #[unroll]
                    for columns in 0..wide {
                        let index = comptime!(4 * (block * wide + columns) + 2 * half);
                        let p = (scores[index] - most).exp();
                        let next = (scores[comptime!(index + 1)] - most).exp();
                        scores[index] = p;
                        scores[comptime!(index + 1)] = next;
                        own += p + next;
                    }
                    total[row] = own;
                    #[unroll]
                    for columns in 0..channels {
                        let index = comptime!(4 * (block * channels + columns) + 2 * half);
                        sum[index] = sum[index] * factor;
                        sum[comptime!(index + 1)] = sum[comptime!(index + 1)] * factor;
                    }
                }
            }
            accumulate::<E, N>(
                &scores,
                &shared_v,
                &mut sum,
                blocks,
                tile.keys,
                tile.value_width,
            );
        }
    }

    #[unroll]
    for block in 0..blocks {
        #[unroll]
        for half in 0..2 {
            let index = comptime!(2 * block + half);
            let mut all = total[index];
            all += plane_shuffle_xor(all, 1u32);
            all += plane_shuffle_xor(all, 2u32);
            // That of a row that sees nothing is 0, every other at least 1, or NaN: `max` passes over that, the weights do not.
            let share = select(all == 0.0f32, 0.0f32, 1.0f32 / all);
            #[unroll]
            for columns in 0..channels {
                let index = comptime!(4 * (block * channels + columns) + 2 * half);
                sum[index] = sum[index] * share;
                sum[comptime!(index + 1)] = sum[comptime!(index + 1)] * share;
            }
            let row = row_of(blocks, block, half);
            if UNIT_POS_PLANE % 4 == 0 && row < valid_queries {
                let logarithm = maximum[index] + all.ln();
                lse[first_row + row * heads] = select(all == 0.0f32, nothing, logarithm);
            }
        }
    }
    store::<E>(
        &sum,
        out,
        first_row * tile.value_width,
        heads * tile.value_width,
        valid_queries,
        1.0f32,
        blocks,
        tile.value_width,
    );
}

/// The gradient of one tile of queries.
#[cube(launch_unchecked)]
pub(super) fn query_gradient<E: Float, N: Size>(
    q: &[Vector<E, N>],
    k: &[Vector<E, N>],
    v: &[Vector<E, N>],
    dout: &[Vector<E, N>],
    lse: &[f32],
    delta: &[f32],
    rules: &[i32],
    dq: &mut [E],
    sizes: Sizes,
    scale: f32,
    #[comptime] tile: Tile,
    #[define(E)] _element: ElemType,
) {
    let planes = comptime!(planes(tile.queries));
    let blocks = comptime!(blocks(tile.queries));
    let units = comptime!(planes * PLANE);
    let wide = comptime!(tile.keys / COLUMNS);

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

    let mut shared_q = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.queries * stride(tile.width)),
        16usize,
    );
    let mut shared_dout = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.queries * stride(tile.value_width)),
        16usize,
    );
    let mut shared_k = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.keys * stride(tile.width)),
        16usize,
    );
    let mut shared_v = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.keys * stride(tile.value_width)),
        16usize,
    );

    let first_query = query_tile * tile.queries;
    let valid_queries = rows_left(queries, first_query, tile.queries);
    let first_row = (sample * queries + first_query) * heads + head;
    load::<E, N>(
        q,
        &mut shared_q,
        first_row * tile.width,
        heads * tile.width,
        valid_queries,
        tile.queries,
        tile.width,
        units,
    );
    load::<E, N>(
        dout,
        &mut shared_dout,
        first_row * tile.value_width,
        heads * tile.value_width,
        valid_queries,
        tile.queries,
        tile.value_width,
        units,
    );

    let mut scores = Array::<f32>::new(comptime!(blocks * tile.keys / 2));
    let mut weights = Array::<f32>::new(comptime!(blocks * tile.keys / 2));
    let mut sum = Array::<f32>::new(comptime!(blocks * tile.width / 2));
    let mut row_lse = Array::<f32>::new(comptime!(2 * blocks));
    let mut row_delta = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for block in 0..blocks {
        #[unroll]
        for half in 0..2 {
            let row = row_of(blocks, block, half);
            let mut own = 0.0f32;
            let mut slope = 0.0f32;
            if row < valid_queries {
                own = lse[first_row + row * heads];
                slope = delta[first_row + row * heads];
            }
            // That of a row that sees nothing is no number to subtract; NaN stays.
            row_lse[comptime!(2 * block + half)] = select(own <= FLOOR, 0.0f32, own);
            row_delta[comptime!(2 * block + half)] = slope;
        }
    }
    #[unroll]
    for index in 0..comptime!(blocks * tile.width / 2) {
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
            load::<E, N>(
                k,
                &mut shared_k,
                first_kv * tile.width,
                kv_heads * tile.width,
                valid_keys,
                tile.keys,
                tile.width,
                units,
            );
            load::<E, N>(
                v,
                &mut shared_v,
                first_kv * tile.value_width,
                kv_heads * tile.value_width,
                valid_keys,
                tile.keys,
                tile.value_width,
                units,
            );
            sync_cube();
            products::<E, N>(
                &shared_q,
                &shared_k,
                &mut scores,
                blocks,
                tile.keys,
                tile.width,
            );
            products::<E, N>(
                &shared_dout,
                &shared_v,
                &mut weights,
                blocks,
                tile.keys,
                tile.value_width,
            );
            #[unroll]
            for index in 0..comptime!(blocks * tile.keys / 2) {
                scores[index] = scores[index] * scale;
            }
            if hides(rules, &at, &sizes, query_tile, key_tile, tile) {
                hide(
                    &mut scores,
                    rules,
                    &at,
                    &sizes,
                    first_query,
                    first_key,
                    tile,
                    Along::Queries,
                );
            }
            #[unroll]
            for block in 0..blocks {
                #[unroll]
                for columns in 0..wide {
                    #[unroll]
                    for register in 0..4 {
                        let row = comptime!(2 * block + register / 2);
                        let index = comptime!(4 * (block * wide + columns) + register);
                        let p = (scores[index] - row_lse[row]).exp();
                        scores[index] = p * (weights[index] - row_delta[row]);
                    }
                }
            }
            accumulate::<E, N>(&scores, &shared_k, &mut sum, blocks, tile.keys, tile.width);
        }
    }
    store::<E>(
        &sum,
        dq,
        first_row * tile.width,
        heads * tile.width,
        valid_queries,
        scale,
        blocks,
        tile.width,
    );
}

/// The gradients of one tile of keys and values: the sum over the queries of all heads that share them.
#[cube(launch_unchecked)]
pub(super) fn key_value_gradients<E: Float, N: Size>(
    q: &[Vector<E, N>],
    k: &[Vector<E, N>],
    v: &[Vector<E, N>],
    dout: &[Vector<E, N>],
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
    let planes = comptime!(planes(tile.keys));
    let blocks = comptime!(blocks(tile.keys));
    let units = comptime!(planes * PLANE);
    let wide = comptime!(tile.queries / COLUMNS);

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

    let mut shared_q = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.queries * stride(tile.width)),
        16usize,
    );
    let mut shared_dout = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.queries * stride(tile.value_width)),
        16usize,
    );
    let mut shared_k = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.keys * stride(tile.width)),
        16usize,
    );
    let mut shared_v = Shared::<[Vector<E, N>]>::new_aligned_slice(
        comptime!(tile.keys * stride(tile.value_width)),
        16usize,
    );

    let first_key = key_tile * tile.keys;
    let valid_keys = rows_left(keys, first_key, tile.keys);
    let first_kv = (sample * keys + first_key) * kv_heads + kv_head;
    load::<E, N>(
        k,
        &mut shared_k,
        first_kv * tile.width,
        kv_heads * tile.width,
        valid_keys,
        tile.keys,
        tile.width,
        units,
    );
    load::<E, N>(
        v,
        &mut shared_v,
        first_kv * tile.value_width,
        kv_heads * tile.value_width,
        valid_keys,
        tile.keys,
        tile.value_width,
        units,
    );

    let mut weights = Array::<f32>::new(comptime!(blocks * tile.queries / 2));
    let mut dweights = Array::<f32>::new(comptime!(blocks * tile.queries / 2));
    let mut sum_k = Array::<f32>::new(comptime!(blocks * tile.width / 2));
    let mut sum_v = Array::<f32>::new(comptime!(blocks * tile.value_width / 2));
    #[unroll]
    for index in 0..comptime!(blocks * tile.width / 2) {
        sum_k[index] = 0.0f32;
    }
    #[unroll]
    for index in 0..comptime!(blocks * tile.value_width / 2) {
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
                load::<E, N>(
                    q,
                    &mut shared_q,
                    first_row * tile.width,
                    heads * tile.width,
                    valid_queries,
                    tile.queries,
                    tile.width,
                    units,
                );
                load::<E, N>(
                    dout,
                    &mut shared_dout,
                    first_row * tile.value_width,
                    heads * tile.value_width,
                    valid_queries,
                    tile.queries,
                    tile.value_width,
                    units,
                );
                sync_cube();
                products::<E, N>(
                    &shared_k,
                    &shared_q,
                    &mut weights,
                    blocks,
                    tile.queries,
                    tile.width,
                );
                products::<E, N>(
                    &shared_v,
                    &shared_dout,
                    &mut dweights,
                    blocks,
                    tile.queries,
                    tile.value_width,
                );
                #[unroll]
                for index in 0..comptime!(blocks * tile.queries / 2) {
                    weights[index] = weights[index] * scale;
                }
                if hides(rules, &at, &sizes, query_tile, key_tile, tile) {
                    hide(
                        &mut weights,
                        rules,
                        &at,
                        &sizes,
                        first_query,
                        first_key,
                        tile,
                        Along::Keys,
                    );
                }
                #[unroll]
                for columns in 0..wide {
                    #[unroll]
                    for side in 0..2 {
                        let column = column_of(columns) + side;
                        let mut query_lse = 0.0f32;
                        let mut query_delta = 0.0f32;
                        if column < valid_queries {
                            query_lse = lse[first_row + column * heads];
                            query_delta = delta[first_row + column * heads];
                        }
                        query_lse = select(query_lse <= FLOOR, 0.0f32, query_lse);
                        #[unroll]
                        for block in 0..blocks {
                            #[unroll]
                            for half in 0..2 {
                                let index =
                                    comptime!(4 * (block * wide + columns) + 2 * half + side);
                                let p = (weights[index] - query_lse).exp();
                                weights[index] = p;
                                dweights[index] = p * (dweights[index] - query_delta);
                            }
                        }
                    }
                }
                accumulate::<E, N>(
                    &weights,
                    &shared_dout,
                    &mut sum_v,
                    blocks,
                    tile.queries,
                    tile.value_width,
                );
                accumulate::<E, N>(
                    &dweights,
                    &shared_q,
                    &mut sum_k,
                    blocks,
                    tile.queries,
                    tile.width,
                );
            }
        }
    }
    store::<E>(
        &sum_k,
        dk,
        first_kv * tile.width,
        kv_heads * tile.width,
        valid_keys,
        scale,
        blocks,
        tile.width,
    );
    store::<E>(
        &sum_v,
        dv,
        first_kv * tile.value_width,
        kv_heads * tile.value_width,
        valid_keys,
        1.0f32,
        blocks,
        tile.value_width,
    );
}

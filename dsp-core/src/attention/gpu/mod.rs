//! Softmax attention as fused kernels on a GPU: CUDA, Vulkan, Metal and WebGPU through CubeCL.
//!
//! The same functions as [`super::softmax`]'s portable ones, which are what the tests hold them to and what
//! runs where these do not: with dropout, in f64, for heads too wide for the device's shared memory. Scores
//! never leave a cube's registers and shared memory. Whatever the inputs' type, softmax is in f32 and sums are.
//!
//! `kernels` computes anywhere and in any type; `matrix` in 16 bits on GPUs that multiply matrices in hardware; `rules`
//! says which pairs are visible; here is the choice of the kernel and its tile, and the launch.

#![expect(unsafe_code, reason = "kernels are launched")]

mod kernels;
mod matrix;
mod rules;
#[cfg(all(test, feature = "flex"))]
mod tests;

use burn::backend::Cube;
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{
    CubeDevice,
    cubecl::{CubeCount, CubeDim, client::Client, ir::features::MmaConfig, prelude::BufferArg},
};

use super::Problem;
use super::softmax::Sizes;
use kernels::{SizesLaunch, Tile, UNITS};

/// Numbers in a buffer: indices of 32 bits reach so far.
const LONGEST: usize = i32::MAX as usize;

/// Cubes along the first dim of a launch, within every device's limit.
const CUBES: usize = 1 << 15;

/// Starts a kernel of that name, of the kernels by which the launch goes: those on matrix units also take the elements of
/// a vector. Their functions are made by a macro and have no type in common.
macro_rules! start {
    ($kernel:ident by $launch:ident in $cubes:ident of $rows:expr, $($argument:expr),* $(,)?) => {
        match $launch.by {
            By::Units => kernels::$kernel::launch_unchecked(
                &$launch.client,
                $cubes,
                $launch.cube($rows),
                $($argument),*
            ),
            By::Matrices => matrix::$kernel::launch_unchecked(
                &$launch.client,
                $cubes,
                $launch.cube($rows),
                matrix::VECTOR,
                $($argument),*
            ),
        }
    };
}

/// [`super::forward`] as a kernel, or nothing where that must take the portable way.
///
/// The logsumexp of 16-bit inputs is in f32.
pub(super) fn forward(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    problem: &Problem,
) -> Option<(Tensor<4>, Tensor<3>)> {
    let launch = Launch::of(q, k, v, problem, Pass::Forward)?;
    let [q, k, v] = [q, k, v].map(primitive);
    let (q, k, v) = (q?, k?, v?);
    let [batch, queries, heads, _] = launch.q;
    let element = q.dtype;
    let out = launch.empty([batch, queries, heads, launch.tile.value_width], element);
    let lse = launch.empty([batch, queries, heads], DType::F32);
    let cubes = grid(queries.div_ceil(launch.tile.queries) * heads * batch);
    // SAFETY: the buffers have the lengths that `launch.sizes` says, and every index of the kernels is guarded
    // by those; the shared memory was held to the device's limit. Rows are whole vectors where they are read so.
    unsafe {
        start!(
            attend by launch in cubes of launch.tile.queries,
            q.into_buffer_arg(),
            k.into_buffer_arg(),
            v.into_buffer_arg(),
            launch.rules(),
            out.clone().into_buffer_arg(),
            lse.clone().into_buffer_arg(),
            launch.sizes(),
            problem.scale as f32,
            f32::NEG_INFINITY,
            launch.tile,
            element_of(element),
        );
    }
    Some((tensor(out), tensor(lse)))
}

/// [`super::backward`] as kernels, or nothing where that must take the portable way.
pub(super) fn backward(
    [q, k, v, out, dout]: [&Tensor<4>; 5],
    lse: &Tensor<3>,
    problem: &Problem,
) -> Option<[Tensor<4>; 3]> {
    Sizes::of(q, k, v, problem).check_results(out, lse, dout);
    let queries_launch = Launch::of(q, k, v, problem, Pass::Queries)?;
    let keys_launch = Launch::of(q, k, v, problem, Pass::KeysAndValues)?;
    if dout.dtype() != q.dtype() {
        return None;
    }
    let wide = |x: &Tensor<4>| x.clone().cast(DType::F32);
    // dout · out, which is Σ_j p_ij dp_ij: the softmax's own derivative.
    let delta: Tensor<4> = (wide(dout) * wide(out)).sum_dim(3);
    let delta = primitive(&delta)?;
    let lse = primitive(&lse.clone().cast(DType::F32).unsqueeze_dim::<4>(3))?;
    let (q_shape, k_shape, v_shape) = (q.dims(), k.dims(), v.dims());
    let [q, k, v, dout] = [q, k, v, dout].map(primitive);
    let (q, k, v, dout) = (q?, k?, v?, dout?);
    let element = q.dtype;
    let launch = queries_launch;
    let [batch, queries, heads, _] = q_shape;
    let dq = launch.empty(q_shape, element);
    let cubes = grid(queries.div_ceil(launch.tile.queries) * heads * batch);
    // SAFETY: as in `forward`.
    unsafe {
        start!(
            query_gradient by launch in cubes of launch.tile.queries,
            q.clone().into_buffer_arg(),
            k.clone().into_buffer_arg(),
            v.clone().into_buffer_arg(),
            dout.clone().into_buffer_arg(),
            lse.clone().into_buffer_arg(),
            delta.clone().into_buffer_arg(),
            launch.rules(),
            dq.clone().into_buffer_arg(),
            launch.sizes(),
            problem.scale as f32,
            launch.tile,
            element_of(element),
        );
    }
    let launch = keys_launch;
    let [batch, keys, kv_heads, _] = k_shape;
    let dk = launch.empty(k_shape, element);
    let dv = launch.empty(v_shape, element);
    let cubes = grid(keys.div_ceil(launch.tile.keys) * kv_heads * batch);
    // SAFETY: as in `forward`.
    unsafe {
        start!(
            key_value_gradients by launch in cubes of launch.tile.keys,
            q.into_buffer_arg(),
            k.into_buffer_arg(),
            v.into_buffer_arg(),
            dout.into_buffer_arg(),
            lse.into_buffer_arg(),
            delta.into_buffer_arg(),
            launch.rules(),
            dk.clone().into_buffer_arg(),
            dv.clone().into_buffer_arg(),
            launch.sizes(),
            problem.scale as f32,
            launch.tile,
            element_of(element),
        );
    }
    Some([dq, dk, dv].map(tensor))
}

/// Which kernel is launched: they hold different things in shared memory.
#[derive(Debug, Clone, Copy)]
enum Pass {
    Forward,
    Queries,
    KeysAndValues,
}

/// Which kernels: those on every unit's own arithmetic, or those on matrix units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Units,
    Matrices,
}

/// What every launch of a problem needs.
struct Launch<'a> {
    by: By,
    client: Client,
    device: CubeDevice,
    tile: Tile,
    rules: rules::Rules,
    problem: &'a Problem,
    q: [usize; 4],
    k: [usize; 4],
}

impl<'a> Launch<'a> {
    /// None if the tensors are not on such a device, or the kernels do not do what is asked.
    fn of(
        q: &Tensor<4>,
        k: &Tensor<4>,
        v: &Tensor<4>,
        problem: &'a Problem,
        pass: Pass,
    ) -> Option<Self> {
        let Sizes {
            q: q_shape,
            k: k_shape,
            v: v_shape,
        } = Sizes::of(q, k, v, problem);
        let size = |shape: [usize; 4]| shape.iter().product::<usize>();
        let smallest = size(q_shape).min(size(k_shape)).min(size(v_shape));
        let out_shape = [q_shape[0], q_shape[1], q_shape[2], v_shape[3]];
        let shapes = [q_shape, k_shape, v_shape, out_shape];
        let largest = shapes.into_iter().map(size).max().unwrap_or(0);
        let dtypes = [q.dtype(), k.dtype(), v.dtype()];
        let known = [DType::F32, DType::F16, DType::BF16].map(|dtype| [dtype; 3]);
        let suits = known.contains(&dtypes) && smallest > 0 && largest <= LONGEST;
        if !suits || problem.dropout.is_some() {
            return None;
        }
        let CubeTensor { client, device, .. } = q.clone().try_into_primitive::<Cube>().ok()?;
        let lengths = (q_shape[1], k_shape[1]);
        let widths = (q_shape[3], v_shape[3]);
        let masked = rules::masked(problem, q_shape[0]);
        let shared_bytes = client.properties().hardware.max_shared_memory_size;
        let by_matrices = has_matrices(&client, q.dtype())
            .then(|| matrix_tile(pass, lengths, widths, masked, shared_bytes))
            .flatten();
        let (by, tile) = match by_matrices {
            Some(tile) => (By::Matrices, tile),
            None => (
                By::Units,
                tile(pass, lengths, widths, masked, shared_bytes)?,
            ),
        };
        let rules = match tile.masked {
            true => rules::rules(problem, q_shape[0], (tile.queries, tile.keys))?,
            // A buffer holds something.
            false => rules::Rules {
                numbers: vec![0],
                by_sample: false,
            },
        };
        Some(Self {
            by,
            client,
            device,
            tile,
            rules,
            problem,
            q: q_shape,
            k: k_shape,
        })
    }

    fn sizes(&self) -> SizesLaunch {
        let heads = &self.problem.heads;
        let [batch, queries, _, _] = self.q;
        SizesLaunch::new(
            batch as u32,
            queries as u32,
            self.k[1] as u32,
            self.q[2] as u32,
            self.k[2] as u32,
            heads.query.start as u32,
            heads.group as u32,
            u32::from(self.rules.by_sample),
        )
    }

    /// The units of a cube whose tiles have so many rows.
    fn cube(&self, rows: usize) -> CubeDim {
        match self.by {
            By::Units => CubeDim::new_2d(UNITS as u32, UNITS as u32),
            By::Matrices => CubeDim::new_2d(matrix::PLANE as u32, matrix::planes(rows) as u32),
        }
    }

    fn rules(&self) -> BufferArg {
        let bytes = bytemuck::cast_slice(&self.rules.numbers);
        let handle = self.client.create_from_slice(bytes);
        // SAFETY: the handle is of so many numbers.
        unsafe { BufferArg::from_raw_parts(handle, self.rules.numbers.len()) }
    }

    fn empty<const D: usize>(&self, shape: [usize; D], dtype: DType) -> CubeTensor {
        let (client, device) = (self.client.clone(), self.device.clone());
        empty_device_contiguous_dtype(client, device, Shape::from(shape), dtype)
    }
}

/// The largest tile that is not larger than needed and fits into shared memory; none if none does.
fn tile(
    pass: Pass,
    (queries, keys): (usize, usize),
    (width, value_width): (usize, usize),
    masked: bool,
    shared_bytes: usize,
) -> Option<Tile> {
    let lengths = [64, 32, 16];
    let useful = |length: usize| length.next_multiple_of(UNITS);
    let tiles = lengths.into_iter().flat_map(|query_rows| {
        lengths.map(|key_rows| Tile {
            queries: query_rows,
            keys: key_rows,
            width,
            value_width,
            masked,
        })
    });
    tiles
        .filter(|tile| {
            let (queries, keys) = (useful(queries), useful(keys));
            (tile.queries <= queries.max(UNITS) && tile.keys <= keys.max(UNITS))
                && size_of::<f32>() * shared_numbers(pass, tile) <= shared_bytes
        })
        .max_by_key(|tile| (tile.queries * tile.keys, tile.keys))
}

/// What a kernel's shared memory holds.
fn shared_numbers(pass: Pass, tile: &Tile) -> usize {
    let Tile { queries, keys, .. } = *tile;
    let (stride, value_stride) = (Tile::stride(tile.width), Tile::stride(tile.value_width));
    let shared = tile.shared_stride();
    match pass {
        Pass::Forward => {
            queries * stride + keys * shared + queries * (keys + 1) + queries * (UNITS + 1)
        }
        Pass::Queries => queries * (stride + value_stride) + keys * shared + queries * (keys + 1),
        Pass::KeysAndValues => {
            keys * (stride + value_stride) + queries * shared + keys * (queries + 1)
        }
    }
}

/// Whether the device multiplies matrices of this type in its planes, as [`matrix`] asks it to.
fn has_matrices(client: &Client, dtype: DType) -> bool {
    let element = element_of(dtype);
    let instruction = MmaConfig {
        a_type: element,
        b_type: element,
        cd_type: element_of(DType::F32),
        m: 16,
        n: 8,
        k: 16,
    };
    let (hardware, features) = (&client.properties().hardware, client.features());
    let planes = (hardware.plane_size_min, hardware.plane_size_max);
    planes == (matrix::PLANE as u32, matrix::PLANE as u32)
        && features.matmul.mma.contains(&instruction)
        && features.matmul.ldmatrix.contains(&element)
}

/// [`tile`] for matrix units: none if rows are not whole blocks of their columns, or too long for the registers.
fn matrix_tile(
    pass: Pass,
    (queries, keys): (usize, usize),
    (width, value_width): (usize, usize),
    masked: bool,
    shared_bytes: usize,
) -> Option<Tile> {
    /// Sums and scores that a unit keeps in registers, of which it has 255.
    const KEPT: usize = 160;
    /// Channels of the widest heads: all loops over them are unrolled.
    const WIDEST: usize = 256;
    let whole = |width: usize| width <= WIDEST && width.is_multiple_of(matrix::BLOCK);
    if !whole(width) || !whole(value_width) {
        return None;
    }
    let useful = |length: usize| length.next_multiple_of(matrix::BLOCK);
    let lengths = [128, 64, 32, 16];
    let tiles = lengths.into_iter().flat_map(|queries| {
        lengths.map(|keys| Tile {
            queries,
            keys,
            width,
            value_width,
            masked,
        })
    });
    tiles
        .filter(|tile| {
            let (rows, columns, sums, scores) = match pass {
                Pass::Forward => (tile.queries, tile.keys, value_width, 1),
                Pass::Queries => (tile.queries, tile.keys, width, 2),
                Pass::KeysAndValues => (tile.keys, tile.queries, width + value_width, 2),
            };
            let kept = matrix::blocks(rows) * (scores * columns + sums) / 2;
            let row = matrix::stride(width) + matrix::stride(value_width);
            let own = match pass {
                Pass::Forward => matrix::stride(width),
                Pass::Queries | Pass::KeysAndValues => row,
            };
            let shared = 2 * matrix::VECTOR * (rows * own + columns * row);
            tile.queries <= useful(queries)
                && tile.keys <= useful(keys)
                && columns <= 64
                && kept <= KEPT
                && shared <= shared_bytes
        })
        .max_by_key(|tile| (tile.queries * tile.keys, tile.keys))
}

fn grid(cubes: usize) -> CubeCount {
    let first = cubes.min(CUBES);
    CubeCount::Static(first as u32, cubes.div_ceil(first) as u32, 1)
}

fn element_of(dtype: DType) -> burn_cubecl::cubecl::ir::ElemType {
    burn::backend::cubecl::dtype_to_storage_type(dtype)
}

/// The tensor's buffer, row by row without gaps.
fn primitive(tensor: &Tensor<4>) -> Option<CubeTensor> {
    let tensor = tensor.clone().try_into_primitive::<Cube>().ok()?;
    Some(into_contiguous(tensor))
}

fn tensor<const D: usize>(tensor: CubeTensor) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(tensor)
}

//! Products by kernels that are chosen here, on GPUs with matrix units.
//!
//! The choice is by type alone, never by what a trial run found: every rank takes the same kernel, so that the same product
//! has the same bits wherever it is computed.

use burn::backend::Cube;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::cubecl::prelude::Scalar;
use burn_cubecl::cubecl::tf32;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::TileSizeSelection;
use cubek::matmul::multi_level::routines::batch::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple_unit::SimpleUnitSelectionArgs;
use cubek::matmul::routine::BlueprintStrategy;
use cubek::std::InputBinding;

/// [`super::matmul`], or nothing where Burn's own is right.
pub(super) fn matmul<const D: usize>(left: &Tensor<D>, right: &Tensor<D>) -> Option<Tensor<D>> {
    let (left_shape, right_shape) = (left.dims(), right.dims());
    let same_batch = left_shape[..D - 2] == right_shape[..D - 2];
    let empty = [left_shape, right_shape].iter().flatten().any(|&n| n == 0);
    let dtype = left.dtype();
    if right.dtype() != dtype || !same_batch || empty {
        return None;
    }
    let strategies = strategies(dtype);
    if strategies.is_empty() {
        return None;
    }
    let left = left.clone().try_into_primitive::<Cube>().ok()?;
    let right = right.clone().try_into_primitive::<Cube>().ok()?;
    let CubeTensor { client, device, .. } = left.clone();
    // What has TF32 are NVIDIA's since Ampere, which is what the choice is made for.
    if !client.properties().supports_type(tf32::elem_type_native()) {
        return None;
    }
    let mut shape = left_shape;
    shape[D - 1] = right_shape[D - 1];
    let out = empty_device_contiguous_dtype(client.clone(), device, Shape::from(shape), dtype);
    let element = dtype_to_storage_type(dtype);
    let launched = strategies.into_iter().any(|strategy| {
        let mut elements = MatmulElems::from_globals(&MatmulGlobalElems {
            lhs: element,
            rhs: element,
            out: element,
        });
        launch_ref(
            &strategy.into(),
            &client,
            InputBinding::new(left.clone().binding(), element),
            InputBinding::new(right.clone().binding(), element),
            out.clone().binding(),
            &mut elements,
        )
        .is_ok()
    });
    launched.then(|| Tensor::from_primitive::<Cube>(out))
}

/// The kernels for a type, of which the first that takes the shapes is launched; none where Burn's choice is kept.
fn strategies(dtype: DType) -> Vec<Strategy> {
    match dtype {
        // On the units' own arithmetic. The last takes any shapes, so that none is left to TF32.
        DType::F32 => {
            let tile_size = TileSizeSelection::MinTileSize;
            let arguments = SimpleUnitSelectionArgs { tile_size };
            let inferred = BlueprintStrategy::Inferred(arguments);
            vec![Strategy::SimpleUnit(inferred), Strategy::Naive]
        }
        // On matrix units, the next tiles loaded while these are multiplied.
        DType::F16 | DType::BF16 => {
            let arguments = OrderedSelectionArgs {
                partition_k: Some(2),
                row_count: Some(8),
                rows_per_plane: Some(2),
                tile_matmul: TileMatmulKind::Mma,
            };
            let inferred = BlueprintStrategy::Inferred(arguments);
            vec![Strategy::OrderedDoubleMma(inferred)]
        }
        _ => vec![],
    }
}

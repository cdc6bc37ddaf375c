//! Weights in and out, and gradients, under the names and in the layouts that the original model gives them.
//!
//! Files are safetensors. Names differ where the original's are numbers in a list of layers; a linear layer's
//! weight is `[out, in]` there and `[in, out]` here; a norm's `weight` is `gamma` here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor, TensorData};
use burn_store::burn_pack::Tensor as Stored;
use burn_store::{
    ApplyError, BurnToPyTorchAdapter, FloatCastAdapter, KeyRemapper, ModuleAdapter, ModuleContext,
    ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, SafetensorsStore, bridge,
};

use crate::language::{CausalLm, LinearAttention};
use crate::video_dit::{BlockPairs, VideoDit};
use crate::vit::{TorchvisionVit, Vit};

/// A module whose parameters have other names where they are published.
pub trait OriginalNames: Module {
    /// The beginnings of paths that differ: ours, and the original's. `#` stands for a number.
    const RENAMED: &'static [(&'static str, &'static str)];
}

impl OriginalNames for BlockPairs {
    const RENAMED: &'static [(&'static str, &'static str)] = &[];
}

/// The names are Hugging Face's already.
impl OriginalNames for CausalLm {
    const RENAMED: &'static [(&'static str, &'static str)] = &[];
}

/// The names are the original's already.
impl OriginalNames for LinearAttention {
    const RENAMED: &'static [(&'static str, &'static str)] = &[];
}

/// The names are timm's already.
impl OriginalNames for Vit {
    const RENAMED: &'static [(&'static str, &'static str)] = &[];
}

impl OriginalNames for TorchvisionVit {
    const RENAMED: &'static [(&'static str, &'static str)] = &[
        ("vit.cls_token", "class_token"),
        ("vit.pos_embed", "encoder.pos_embedding"),
        ("vit.patch_embed.proj.", "conv_proj."),
        (
            "vit.blocks.#.norm1.",
            "encoder.layers.encoder_layer_#.ln_1.",
        ),
        (
            "vit.blocks.#.attn.qkv.",
            "encoder.layers.encoder_layer_#.self_attention.in_proj_",
        ),
        (
            "vit.blocks.#.attn.proj.",
            "encoder.layers.encoder_layer_#.self_attention.out_proj.",
        ),
        (
            "vit.blocks.#.norm2.",
            "encoder.layers.encoder_layer_#.ln_2.",
        ),
        (
            "vit.blocks.#.mlp.fc1.",
            "encoder.layers.encoder_layer_#.mlp.0.",
        ),
        (
            "vit.blocks.#.mlp.fc2.",
            "encoder.layers.encoder_layer_#.mlp.3.",
        ),
        ("vit.norm.", "encoder.ln."),
        ("vit.head.", "heads.head."),
    ];
}

impl OriginalNames for VideoDit {
    const RENAMED: &'static [(&'static str, &'static str)] = &[
        ("t_embedder.mlp_in.", "t_embedder.mlp.0."),
        ("t_embedder.mlp_out.", "t_embedder.mlp.2."),
        ("fps_embedder.mlp_in.", "fps_embedder.mlp.0."),
        ("fps_embedder.mlp_out.", "fps_embedder.mlp.2."),
        ("t_block.", "t_block.1."),
        ("blocks.spatial_blocks.", "spatial_blocks."),
        ("blocks.temporal_blocks.", "temporal_blocks."),
    ];
}

/// Why weights were not loaded or saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file that cannot be read or written, or is no safetensors file.
    #[error("{place}: {message}")]
    File {
        /// The file.
        place: String,
        /// What is wrong.
        message: String,
    },
    /// Parameters of the model that are not in the file.
    #[error("{place} lacks {} of the model's tensors: {}", names.len(), names.join(", "))]
    Missing {
        /// The file.
        place: String,
        /// Their original names.
        names: Vec<String>,
    },
    /// Tensors of the file that are not parameters of the model.
    #[error("{place} has {} tensors that the model does not have: {}", names.len(), names.join(", "))]
    Extra {
        /// The file.
        place: String,
        /// Their original names.
        names: Vec<String>,
    },
    /// A tensor of another shape than the model's parameter.
    #[error(
        "{place}: {name} is {got:?} (linear weights as [in, out]), where the model has {expected:?}; \
         check the configuration"
    )]
    Shape {
        /// The file.
        place: String,
        /// Its original name.
        name: String,
        /// The model's shape.
        expected: Vec<usize>,
        /// The file's.
        got: Vec<usize>,
    },
    /// A tensor that cannot be read.
    #[error("{place}: {name}: {message}")]
    Tensor {
        /// The file.
        place: String,
        /// Its original name.
        name: String,
        /// What is wrong.
        message: String,
    },
}

/// A source of weights: a safetensors file, or its bytes, of which those tensors count whose names begin with a
/// prefix.
#[derive(Debug, Clone)]
pub struct Weights {
    source: Source,
    prefix: String,
}

#[derive(Debug, Clone)]
enum Source {
    File(PathBuf),
    Bytes(Vec<u8>),
}

impl Weights {
    /// The tensors of a file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self {
            source: Source::File(path.into()),
            prefix: String::new(),
        }
    }

    /// The tensors of a file that was read already.
    pub fn bytes(bytes: Vec<u8>) -> Self {
        Self {
            source: Source::Bytes(bytes),
            prefix: String::new(),
        }
    }

    /// Only the tensors whose names begin with `prefix`, which is cut off. The others do not count as extra.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    fn place(&self) -> String {
        match &self.source {
            Source::File(path) => path.display().to_string(),
            Source::Bytes(_) => "the weights".to_owned(),
        }
    }

    fn tensors(&self) -> Result<Vec<Stored>, WeightsError> {
        let mut store = match &self.source {
            Source::File(path) => SafetensorsStore::from_file(path),
            Source::Bytes(bytes) => SafetensorsStore::from_bytes(Some(bytes.clone())),
        };
        let all = store
            .get_all_tensors()
            .map_err(|error| self.failed(error))?;
        let ours = all.iter().filter_map(|(name, tensor)| {
            let name = name.strip_prefix(&self.prefix)?;
            let mut tensor = tensor.clone();
            name.clone_into(&mut tensor.name);
            Some(tensor)
        });
        Ok(ours.collect())
    }

    fn failed(&self, error: impl std::fmt::Display) -> WeightsError {
        WeightsError::File {
            place: self.place(),
            message: error.to_string(),
        }
    }
}

/// The module with the weights of a file, in the given element type.
///
/// # Errors
/// [`WeightsError`] if the file cannot be read, lacks a tensor, has one too many, or one of another shape.
pub fn load<M: OriginalNames>(
    mut module: M,
    weights: &Weights,
    dtype: DType,
) -> Result<M, WeightsError> {
    let place = weights.place();
    let (tensors, _) = names::<M>(Direction::FromOriginal).remap(weights.tensors()?);
    let adapter = PyTorchToBurnAdapter.chain(FloatCastAdapter::to(dtype));
    let result = module.apply(tensors, None, Some(Box::new(adapter)), false);
    if let Some(error) = result.errors.into_iter().next() {
        return Err(apply_error::<M>(place, error));
    }
    if !result.missing.is_empty() {
        let paths = result.missing.into_iter().map(|(path, _)| path);
        let names = paths.map(|path| original_name::<M>(&path)).collect();
        return Err(WeightsError::Missing { place, names });
    }
    if !result.unused.is_empty() {
        let paths = result.unused.iter();
        let names = paths.map(|path| original_name::<M>(path)).collect();
        return Err(WeightsError::Extra { place, names });
    }
    Ok(module)
}

/// Writes the module's weights to a new file, or over an old one.
///
/// # Errors
/// [`WeightsError::File`] if it cannot be written.
pub fn save<M: OriginalNames>(module: &M, path: impl Into<PathBuf>) -> Result<(), WeightsError> {
    let weights = Weights::file(path);
    let Source::File(path) = &weights.source else {
        return Ok(());
    };
    let mut store = storing::<M>(SafetensorsStore::from_file(path)).overwrite(true);
    store
        .collect_from(module)
        .map_err(|error| weights.failed(error))
}

/// The bytes of the file that [`save`] writes.
///
/// # Errors
/// [`WeightsError::File`] if a tensor cannot be read back from its device.
pub fn to_bytes<M: OriginalNames>(module: &M) -> Result<Vec<u8>, WeightsError> {
    let weights = Weights::bytes(vec![]);
    let mut store = storing::<M>(SafetensorsStore::from_bytes(None));
    store
        .collect_from(module)
        .map_err(|error| weights.failed(error))?;
    store.get_bytes().map_err(|error| weights.failed(error))
}

/// The layouts are PyTorch's, and one entry of metadata says so: several would come in any order, so that the same
/// weights would not be the same bytes.
fn storing<M: OriginalNames>(store: SafetensorsStore) -> SafetensorsStore {
    store
        .clear_metadata()
        .metadata("format", "pt")
        .with_to_adapter(BurnToPyTorchAdapter)
        .remap(names::<M>(Direction::ToOriginal))
}

/// The module's parameters under their original names, in the original layouts.
///
/// # Errors
/// [`WeightsError::Tensor`] if one cannot be read back from its device.
pub fn named_parameters<M: OriginalNames>(
    module: &M,
) -> Result<BTreeMap<String, TensorData>, WeightsError> {
    data_of::<M>(module.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false))
}

/// The gradients of a module's parameters under the parameters' original names, in their original layouts.
/// Those that have none are left out.
///
/// # Errors
/// [`WeightsError::Tensor`] if one cannot be read back from its device.
pub fn named_gradients<M: OriginalNames>(
    module: &M,
    gradients: &GradientsParams,
) -> Result<BTreeMap<String, TensorData>, WeightsError> {
    let mut collect = CollectGradients {
        gradients,
        path: Vec::new(),
        containers: Vec::new(),
        found: Vec::new(),
    };
    module.visit(&mut collect);
    data_of::<M>(collect.found)
}

fn data_of<M: OriginalNames>(
    tensors: Vec<Stored>,
) -> Result<BTreeMap<String, TensorData>, WeightsError> {
    let (tensors, _) = names::<M>(Direction::ToOriginal).remap(tensors);
    let read = tensors.into_iter().map(|tensor| {
        let name = tensor.name.clone();
        match bridge::into_data(tensor) {
            Ok(data) => Ok((name, data)),
            Err(error) => Err(WeightsError::Tensor {
                place: "the model".to_owned(),
                name,
                message: error.to_string(),
            }),
        }
    });
    read.collect()
}

struct CollectGradients<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    containers: Vec<String>,
    found: Vec<Stored>,
}

impl ModuleVisitor for CollectGradients<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push(name.to_owned());
        self.containers.push(container_type.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
        self.containers.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            let stored = bridge::from_tensor(&gradient, self.path.join("."), None);
            let context = ModuleContext::new(&self.containers);
            self.found.push(BurnToPyTorchAdapter.adapt(stored, context));
        }
    }
}

/// The module with all its float parameters in another element type.
pub fn cast<M: Module>(module: M, dtype: DType) -> M {
    struct Cast(DType);
    impl ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let dtype = self.0;
            param.map(|tensor| {
                let is_trained = tensor.is_require_grad();
                tensor.detach().cast(dtype).set_require_grad(is_trained)
            })
        }
    }
    module.map(&mut Cast(dtype))
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    FromOriginal,
    ToOriginal,
}

fn names<M: OriginalNames>(direction: Direction) -> KeyRemapper {
    let mut remapper = KeyRemapper::new();
    for &(ours, original) in M::RENAMED {
        let (from, to) = match direction {
            Direction::FromOriginal => (original, ours),
            Direction::ToOriginal => (ours, original),
        };
        let pattern = format!("^{}", from.replace('.', r"\.").replace('#', r"(\d+)"));
        match remapper
            .clone()
            .add_pattern(pattern, to.replace('#', "${1}"))
        {
            Ok(extended) => remapper = extended,
            Err(error) => unreachable!("a path is a valid pattern: {error}"),
        }
    }
    remapper
}

/// The original name of the parameter at a path: prefix and last part.
fn original_name<M: OriginalNames>(path: &str) -> String {
    let renamed = M::RENAMED.iter().find_map(|(ours, original)| {
        let Some((before, after)) = ours.split_once('#') else {
            let rest = path.strip_prefix(ours)?;
            return Some(format!("{original}{rest}"));
        };
        let (number, rest) = path.strip_prefix(before)?.split_once('.')?;
        let rest = rest.strip_prefix(after.strip_prefix('.')?)?;
        let original = original.replace('#', number);
        Some(format!("{original}{rest}"))
    });
    let name = renamed.unwrap_or_else(|| path.to_owned());
    match name.strip_suffix(".gamma") {
        Some(norm) => format!("{norm}.weight"),
        None => name,
    }
}

fn apply_error<M: OriginalNames>(place: String, error: ApplyError) -> WeightsError {
    match error {
        ApplyError::ShapeMismatch {
            path,
            expected,
            found,
        } => WeightsError::Shape {
            place,
            name: original_name::<M>(&path),
            expected: expected.to_vec(),
            got: found.to_vec(),
        },
        ApplyError::DTypeMismatch { path, found, .. } => WeightsError::Tensor {
            place,
            name: original_name::<M>(&path),
            message: format!("it holds {found:?}, where the model has floating-point numbers"),
        },
        ApplyError::AdapterError { path, message } | ApplyError::LoadError { path, message } => {
            WeightsError::Tensor {
                place,
                name: original_name::<M>(&path),
                message,
            }
        }
    }
}

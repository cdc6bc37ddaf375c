//! A reference file: tensors made by other people's code, as safetensors, with what they are in its metadata.
//!
//! The format: `__metadata__` names the file's `kind`, where it comes from, and its configuration; floats are
//! stored in f32. `param.X` is a weight under its original name and `grad.X` its gradient, `dx` the gradient
//! of an input `x`, `dout` the cotangent that was fed to the backward pass.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

/// A reference file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// It cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not safetensors.
    #[error("{}: not a safetensors file: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: safetensors::SafeTensorError,
    },
    /// Its metadata lacks something, or has it in another form.
    #[error("{}: its metadata {problem}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A kind that this program does not know.
    #[error(
        "{}: kind {kind:?} is not known; known kinds are: {}", path.display(), known.join(", ")
    )]
    Kind {
        /// The file.
        path: PathBuf,
        /// Its kind.
        kind: String,
        /// The kinds that there are.
        known: Vec<&'static str>,
    },
    /// A tensor that the kind needs is not there.
    #[error("{}: a file of kind {kind:?} needs a tensor {name:?}, and it has none", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// Its kind.
        kind: String,
        /// The tensor.
        name: String,
    },
    /// A tensor of another shape than the configuration says.
    #[error("{}: tensor {name:?} has shape {got:?}, where {rule}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// What was expected.
        rule: String,
    },
    /// Its weights do not fit the model that its configuration describes.
    #[error("{}: {source}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        source: dsp_models::weights::WeightsError,
    },
    /// A tensor of a type that is not expected.
    #[error("{}: tensor {name:?} is stored as {dtype}; floats must be F32 or F64, others integers", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// Tensors that nothing was compared with.
    #[error(
        "{}: nothing is known to compare its tensors {names:?} with; \
         a file of kind {kind:?} must hold nothing else than that kind has", path.display()
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Its kind.
        kind: String,
        /// The tensors.
        names: Vec<String>,
    },
    /// A file that would be compared with nothing.
    #[error("{}: it holds no tensor to compare with", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// A tensor of a reference file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values; integers too.
    pub values: Vec<f64>,
}

impl Stored {
    /// The values as a tensor of a given dtype.
    ///
    /// # Panics
    /// If the stored shape has not `D` dims: [`Reference::shaped`] checks that first.
    pub fn tensor<const D: usize>(&self, device: &Device, dtype: DType) -> Tensor<D> {
        Tensor::from_data(
            data(self.values.clone(), &self.shape, dtype),
            (device, dtype),
        )
    }
}

/// Values as tensor data of a given dtype.
pub fn data(values: Vec<f64>, shape: &[usize], dtype: DType) -> TensorData {
    match dtype {
        DType::F64 => TensorData::new(values, shape.to_vec()),
        _ => {
            let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
            TensorData::new(values, shape.to_vec())
        }
    }
}

/// A reference file, read whole.
#[derive(Debug)]
pub struct Reference {
    path: PathBuf,
    kind: String,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Stored>,
    /// Tensors that were read as inputs: every other one must be compared with something.
    read: RefCell<BTreeSet<String>>,
}

impl Reference {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ReferenceError`] naming the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, ReferenceError> {
        let bytes = std::fs::read(path).map_err(|source| ReferenceError::Read {
            path: path.to_owned(),
            source,
        })?;
        let format = |source| ReferenceError::Format {
            path: path.to_owned(),
            source,
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let Some(kind) = metadata.get("kind").cloned() else {
            return Err(ReferenceError::Metadata {
                path: path.to_owned(),
                problem: "names no `kind`".to_owned(),
            });
        };
        let file = SafeTensors::deserialize(&bytes).map_err(format)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let Some(values) = values(view.dtype(), view.data()) else {
                return Err(ReferenceError::Type {
                    path: path.to_owned(),
                    name,
                    dtype: format!("{:?}", view.dtype()),
                });
            };
            let shape = view.shape().to_vec();
            tensors.insert(name, Stored { shape, values });
        }
        Ok(Self {
            path: path.to_owned(),
            kind,
            metadata,
            tensors,
            read: RefCell::default(),
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is a reference of.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// A metadata entry that is JSON.
    ///
    /// # Errors
    /// [`ReferenceError::Metadata`] if it is not there or of another form.
    pub fn json<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<T, ReferenceError> {
        let metadata = |problem| ReferenceError::Metadata {
            path: self.path.clone(),
            problem,
        };
        let text = self
            .metadata
            .get(key)
            .ok_or_else(|| metadata(format!("has no `{key}`")))?;
        serde_json::from_str(text)
            .map_err(|error| metadata(format!("has a `{key}` that is wrong: {error}")))
    }

    /// The error that the metadata is wrong.
    pub fn wrong_metadata(&self, problem: String) -> ReferenceError {
        ReferenceError::Metadata {
            path: self.path.clone(),
            problem,
        }
    }

    /// Whether the file has a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor that is an input.
    ///
    /// # Errors
    /// [`ReferenceError::Missing`] if the file has none of that name.
    pub fn input(&self, name: &str) -> Result<&Stored, ReferenceError> {
        let Some(stored) = self.tensors.get(name) else {
            return Err(ReferenceError::Missing {
                path: self.path.clone(),
                kind: self.kind.clone(),
                name: name.to_owned(),
            });
        };
        self.read.borrow_mut().insert(name.to_owned());
        Ok(stored)
    }

    /// An input that must be of a given shape.
    ///
    /// # Errors
    /// [`ReferenceError::Missing`], [`ReferenceError::Shape`].
    pub fn shaped(&self, name: &str, shape: &[usize]) -> Result<&Stored, ReferenceError> {
        let stored = self.input(name)?;
        if stored.shape != shape {
            return Err(ReferenceError::Shape {
                path: self.path.clone(),
                name: name.to_owned(),
                got: stored.shape.clone(),
                rule: format!("the configuration says {shape:?}"),
            });
        }
        Ok(stored)
    }

    /// All tensors whose name begins with `prefix`, without it; they are inputs.
    pub fn inputs_under(&self, prefix: &str) -> BTreeMap<String, Stored> {
        let mut found = BTreeMap::new();
        for (name, stored) in &self.tensors {
            if let Some(rest) = name.strip_prefix(prefix) {
                self.read.borrow_mut().insert(name.clone());
                found.insert(rest.to_owned(), stored.clone());
            }
        }
        found
    }

    /// The tensors that were not read as inputs: what a run must produce.
    pub fn expected(&self) -> BTreeMap<String, Stored> {
        let read = self.read.borrow();
        self.tensors
            .iter()
            .filter(|(name, _)| !read.contains(*name))
            .map(|(name, stored)| (name.clone(), stored.clone()))
            .collect()
    }
}

fn values(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        let (chunks, _) = bytes.as_chunks::<N>();
        chunks.iter().map(|&chunk| read(chunk)).collect()
    }
    Some(match dtype {
        Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F64 => each(bytes, f64::from_le_bytes),
        Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::I32 => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
        Dtype::U8 | Dtype::BOOL => each(bytes, |[b]| f64::from(b)),
        _ => return None,
    })
}

//! What a run learns from where it names a file: the file's bytes, read once, so that a checkpoint bears the digest of
//! just what was learnt from.

use dsp_models::training::digest;

use super::config::{RunConfig, RunConfigError, unreadable};
use crate::clip::{Clip, ClipError};

/// A file of data.
#[derive(Debug)]
pub(super) struct Data {
    /// Its path, as errors call it.
    pub file: String,
    /// All of it.
    pub bytes: Vec<u8>,
}

impl Data {
    /// What a run names; none if it learns from what is built in.
    ///
    /// # Errors
    /// [`RunConfigError::Unreadable`] if it cannot be read.
    pub(super) fn of(config: &RunConfig) -> Result<Option<Self>, RunConfigError> {
        let read = |path: std::path::PathBuf| {
            Ok(Self {
                file: path.display().to_string(),
                bytes: std::fs::read(&path).map_err(unreadable(&path))?,
            })
        };
        let named = config.model.clone().sizes_mut().file().take();
        named.map(read).transpose()
    }

    /// What a checkpoint says of it.
    pub(super) fn name(data: Option<&Self>) -> String {
        match data {
            Some(data) => format!("SHA-256 {}", digest(&data.bytes)),
            None => "built in".to_owned(),
        }
    }

    /// The clip in it, or the built-in one.
    ///
    /// # Errors
    /// As [`Clip::decode`].
    pub(super) fn clip(data: Option<Self>) -> Result<Clip, ClipError> {
        match data {
            Some(data) => Clip::decode(&data.file, &data.bytes),
            None => Clip::built_in(),
        }
    }
}

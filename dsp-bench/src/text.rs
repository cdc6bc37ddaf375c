//! Text for language models: the built-in one, or a file; a token is a byte.

use std::path::{Path, PathBuf};

/// The text that is used where none is named: the first chapters of *Pride and Prejudice* (`data/README.md`).
const BUILT_IN: &[u8] = include_bytes!("../data/pride-and-prejudice.txt");

/// What it is called in reports.
pub const BUILT_IN_NAME: &str = "Pride and Prejudice, its first chapters (built in)";

/// The tokens that there are: bytes.
pub const VOCABULARY: usize = 256;

/// A text that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// It cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is shorter than a sample.
    #[error(
        "{name}: has {bytes} bytes, and a sample is of {length}; take a longer text or fewer tokens"
    )]
    Short {
        /// The file.
        name: String,
        /// Its bytes.
        bytes: usize,
        /// A sample's.
        length: usize,
    },
}

/// A text.
#[derive(Debug, Clone)]
pub struct Text {
    name: String,
    bytes: Vec<u8>,
}

impl Text {
    /// The built-in one.
    pub fn built_in() -> Self {
        Self {
            name: BUILT_IN_NAME.to_owned(),
            bytes: BUILT_IN.to_vec(),
        }
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// [`TextError::Read`] if it cannot be read.
    pub fn read(path: &Path) -> Result<Self, TextError> {
        let bytes = std::fs::read(path).map_err(|source| TextError::Read {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            name: path.display().to_string(),
            bytes,
        })
    }

    /// The file, or [`BUILT_IN_NAME`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// `samples` of `length` tokens each, from places spread evenly over the text.
    ///
    /// # Errors
    /// [`TextError::Short`] if the text is shorter than one.
    pub fn samples(&self, samples: usize, length: usize) -> Result<Vec<Vec<u32>>, TextError> {
        let Some(room) = self.bytes.len().checked_sub(length) else {
            return Err(TextError::Short {
                name: self.name.clone(),
                bytes: self.bytes.len(),
                length,
            });
        };
        let sample = |index: usize| {
            let start = room * index / samples;
            let bytes = &self.bytes[start..start + length];
            bytes.iter().map(|&byte| u32::from(byte)).collect()
        };
        Ok((0..samples).map(sample).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_over_the_text_and_a_short_text_is_refused_with_both_lengths() {
        let text = Text {
            name: "text".to_owned(),
            bytes: b"abcdefgh".to_vec(),
        };
        let tokens = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
        assert_eq!(
            text.samples(2, 4).unwrap(),
            [tokens("abcd"), tokens("cdef")]
        );
        assert_eq!(
            text.samples(1, 9).unwrap_err().to_string(),
            "text: has 8 bytes, and a sample is of 9; take a longer text or fewer tokens"
        );
        let absent = Text::read(Path::new("no such file"))
            .unwrap_err()
            .to_string();
        assert!(
            absent.starts_with("no such file: cannot be read"),
            "{absent}"
        );
        assert!(Text::built_in().samples(4, 8192).is_ok());
    }
}

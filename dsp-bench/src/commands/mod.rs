//! The commands of `dsp`, one a file: its arguments, and what they lead to.

pub(crate) mod compare;
pub(crate) mod train;
pub(crate) mod verify;

use std::path::Path;

/// A path as a person can open it.
fn shown(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_owned())
        .display()
        .to_string()
}

//! The commands of `dsp`, one a file: its arguments, and what they lead to.

pub(crate) mod compare;
pub(crate) mod engine;
pub(crate) mod launch;
pub(crate) mod train;
pub(crate) mod verify;

use std::fs::OpenOptions;
use std::path::Path;

use anyhow::Context;

/// Sees that a file can be written, before minutes are spent on what is to stand in it. What is there stays.
fn writable(path: &Path) -> anyhow::Result<()> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    (opened.map(drop)).with_context(|| format!("cannot write {}", path.display()))
}

/// A path as a person can open it.
fn shown(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_owned())
        .display()
        .to_string()
}
